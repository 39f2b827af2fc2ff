r"""Denoisers: a network, its process, and the conversion between prediction types.

A state is :math:`x = \alpha x_0 + \sigma\varepsilon`. Every prediction is a linear form
:math:`a\,x_0 + b\,\varepsilon`: x0 (1, 0), ε (0, 1), score (0, −1/σ), v (−σ, α), velocity (α̇, σ̇) and EDM's F. These
two linear equations convert any prediction into any other.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from scoresde import _checks as check
from scoresde._doors import checked, checked_with, constant, words
from scoresde._printing import fields
from scoresde.denoisers.base import AbstractDenoiser, Condition, Kind, check_conditions, expand_conditions, share
from scoresde.denoisers.card import Card
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.outputs import Coefficients, Evaluation, tensors_of
from scoresde.denoisers.predictions import PREDICTIONS, Coefficient, Want, form_of
from scoresde.plan.folding import Outputs
from scoresde.processes.discrete import Discrete
from scoresde.processes.sde import SDE

VARIANCES = ("range", "log", "value")
# Our words for the predictions of other libraries.
ELSEWHERE = {
    **dict.fromkeys(("epsilon", "noise", "pred_noise", "eps_prediction"), "eps"),
    **dict.fromkeys(("sample", "x_start", "start_x", "pred_x0", "x_0", "data", "denoised"), "x0"),
    **dict.fromkeys(("v_prediction", "v-prediction", "pred_v"), "v"),
    **dict.fromkeys(("flow", "flow_prediction", "vector_field", "drift"), "velocity"),
    **dict.fromkeys(("edm", "raw"), "F"),
}
# Hints for the keywords of other libraries.
WORDS = words("""
prediction_type parameterization parametrization objective prediction predict target mean_type: use `predicts`
model network unet score_fn score_model denoiser eps_model: use `net`
scheduler schedule noise_schedule noise_scheduler process diffusion: use `sde`, as in ss.VP()
sigma_data: use `precondition`, as in precondition=ss.Preconditioning(sigma_data)
preconditioning precond: use `precondition`
betas alphas_cumprod num_timesteps timesteps num_train_timesteps T: the process has it, as in ss.Discrete(betas)
scale_timesteps time_scale t_scale time_embedding: use `time`, a function of the times
learn_sigma learned_sigma var_type: use `learned_variance`
clip_denoised clip thresholding: thresholds are denoisers, as in ss.guidance.Clamp(model)
guidance_scale cfg_scale: guidance is a denoiser, ss.ClassifierFree(model, scale, null={"label": ...})
label class_labels y cond: conditions belong to a denoiser, as in Denoiser(...).given(label=y)
device dtype: a denoiser is a module; use Denoiser(...).to(device)
eps eps_min t_min: the process has it, as in ss.VP(t_min=1e-5)
""")

CLOCKS = ("t", "index", "nearest_index", "sigma", "log_sigma")

LABELS = ("y", "c", "cls", "target", "targets", "class_ids")  # names of class labels elsewhere

Clock = Callable[[Tensor], Tensor]

_STANDARD = ("x0", "predict", "output", "convert")  # methods that make a data prediction of an output of the network


@checked
@dataclass(frozen=True)
class Preconditioning:
    r"""EDM's scaling of a network's input, output and time, at any (α, σ).

    .. math::
        D = c_{skip} x + c_{out} F(c_{in} x,\, c_{noise}), \quad
        c_{skip} = \frac{\alpha s^2}{\alpha^2 s^2 + \sigma^2}, \;
        c_{out} = \frac{\sigma s}{\sqrt{\alpha^2 s^2 + \sigma^2}}, \;
        c_{in} = \frac{1}{\sqrt{\alpha^2 s^2 + \sigma^2}}, \;
        c_{noise} = \tfrac14 \log\tfrac{\sigma}{\alpha}

    With ``predicts="F"`` all four apply. With another prediction only c_in and c_noise apply.

    Arguments:
        sigma_data: Standard deviation s of the data.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check.number("sigma_data", self.sigma_data, above=0)

    def c_in(self, alpha: Coefficient, sigma: Coefficient) -> Coefficient:
        """Scale c_in of the network's input."""
        return (alpha**2 * self.sigma_data**2 + sigma**2) ** -0.5


@checked_with(WORDS, needs={"predicts": f"give one of {', '.join(map(repr, PREDICTIONS))}, as in predicts='eps'"})
class Denoiser(AbstractDenoiser):
    r"""A network with its process and its prediction type; the methods return every other prediction.

    .. math:: \mathrm{out} = \mathrm{net}(c_{in}\,x,\; c_{time}(t),\; \mathrm{cond}), \qquad
              x_0 = c_{skip}\,x + c_{out}\,\mathrm{out}

    The input of the network is cast to the network's dtype, and its output to the dtype of `x`. The network's time is a
    float32 tensor (B,).

    Arguments:
        net: Module or function ``net(x, time, **cond)`` that returns a tensor of the shape of `x`.
        sde: Process that the network is trained on.
        predicts: Output of the network: ``"eps"``, ``"score"``, ``"x0"``, ``"v"``, ``"velocity"`` or, with
            `precondition`, ``"F"``. There is no default, because a wrong value gives noise instead of samples.
            :func:`check_denoiser` detects a wrong value.
        precondition: EDM's input scaling and clock, and its output scaling when ``predicts="F"``.
        time: Time input of the network: ``"t"``, ``"index"`` (label of a :class:`Discrete` process, fractional between
            labels), ``"nearest_index"``, ``"sigma"``, ``"log_sigma"``, or a function of a tensor of times. The default
            is ¼ log(σ/α) with `precondition`, otherwise the index for discrete processes, otherwise t.
        learned_variance: Whether the network returns twice the channels, with the variance v of a step in the second
            half, and its meaning: ``"range"`` or True for r in [−1, 1] between the small and the large variance,
            ``"log"`` for log v, ``"value"`` for v. :meth:`x0_and_variance` returns that half, and
            :func:`log_variance` converts it.
        shared: Names of conditions without a batch axis, such as positions; the network receives them as they are.
        check_finite: Whether to raise an error, with the time, at the first output that is not finite. The check
            waits for the GPU, so leave it off for speed.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239, for ε
        | Progressive Distillation (Salimans & Ho, 2022), arXiv:2202.00512, for v
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          for F

    Example:
        >>> import torch, scoresde as ss
        >>> model = ss.Denoiser(lambda x, t: torch.zeros_like(x), ss.VP(), predicts="eps")
        >>> model.x0(torch.ones(2, 3), 0.5).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        sde: SDE,
        *,
        predicts: str,
        precondition: Preconditioning | None = None,
        time: str | Clock | None = None,
        learned_variance: bool | str = False,
        shared: tuple[str, ...] = (),
        check_finite: bool = False,
    ) -> None:
        if isinstance(net, type):
            raise TypeError(f"`net` must be a module or a function, got the class {net.__name__}; call it first.")
        if not callable(net):
            raise TypeError(f"`net` must be a module or a function net(x, time, **cond), got {type(net).__name__}.")
        super().__init__(sde)
        check.choice("predicts", predicts, PREDICTIONS, ELSEWHERE)
        if not isinstance(learned_variance, bool):
            check.choice("learned_variance", learned_variance, VARIANCES)
        if not (precondition is None or isinstance(precondition, Preconditioning)):
            raise TypeError(
                f"`precondition` must be Preconditioning(sigma_data) or None, got {type(precondition).__name__}."
            )
        if predicts == "F" and precondition is None:
            raise ValueError(
                "`predicts`='F' needs the scaling of EDM; give `precondition`=Preconditioning(sigma_data)."
            )
        if sde.alpha(sde.T) < 1e-12 * sde.sigma(sde.T):  # cos(π/2) is 6e-17
            uninformative = predicts in ("eps", "score") or (predicts == "velocity" and sde.alpha_dot(sde.T) == 0)
            if uninformative:
                raise ValueError(
                    f"`predicts`={predicts!r} does not determine the data where α = 0, and {type(sde).__name__} has "
                    f"α(T) = 0 at T = {sde.T:g}; train with predicts='x0', 'v' or 'velocity', or give the process "
                    f"a smaller `T`."
                )
            if precondition is not None and time is None:
                raise ValueError(
                    f"`time` must be given with `precondition` where α(T) = 0, as for {type(sde).__name__} at "
                    f"T = {sde.T:g}: the default, log(σ/α) / 4, is infinite there; use for example time='t'."
                )
        self.net = net
        self.predicts = predicts
        self.precondition = precondition
        self.time = time
        self.learned_variance = learned_variance
        self.shared = shared
        self.check_finite = check_finite
        self.card: Card | None = None
        _clock(time, sde, precondition)

    def __repr__(self) -> str:
        names = ("net", "sde", "predicts", "precondition", "time", "learned_variance", "check_finite")
        values = {name: getattr(self, name) for name in names}
        return f"{type(self).__name__}({fields(**values, shared=self.shared or None)})"

    @property
    def kind(self) -> Kind:
        variance = "range" if self.learned_variance is True else self.learned_variance or None
        return Kind(self.predicts, self.sde, variance=variance)

    @property
    def gaussian(self) -> Gaussian | None:
        """Gaussian approximation of the data, that of the card, which is saved with the model."""
        return None if self.card is None else self.card.gaussian

    def _refuse_misspelled(self, names: tuple[str, ...]) -> None:
        function = self.net.forward if isinstance(self.net, nn.Module) else self.net
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return  # functions of C have no signature
        by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        own = by_name[2:]
        for name in names:
            near = [] if name in own else difflib.get_close_matches(name, own, n=1)
            if not near and name in LABELS and name not in own and "label" in own:
                near = ["label"]
            if near:
                raise TypeError(
                    f"`{name}` is no condition of the network, which takes {', '.join(own)}; "
                    f"did you mean {near[0]}=...?"
                )

    @property
    def shared_conditions(self) -> tuple[str, ...]:
        return self.shared

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self.predict("x0", x, t, **cond)

    def x0_and_variance(self, x: Tensor, t: float | Tensor, **cond: Condition) -> tuple[Tensor, Tensor]:
        """Data prediction and the network's raw variance output, both of the shape of `x`, from one evaluation."""
        if not self.learned_variance:
            raise ValueError("`x0_and_variance` needs a denoiser with `learned_variance`=True, got False.")
        out, variance = self.output(x, t, **cond)
        assert variance is not None
        return self.convert(self.predicts, out, "x0", x, t, self.data_scale), variance

    def output(self, x: Tensor, t: float | Tensor, **cond: Condition) -> tuple[Tensor, Tensor | None]:
        """Output of the network in the dtype of `x`, and its variance part or None."""
        check.state("x", x)
        check.timelike("t", t)
        if self.learned_variance and x.ndim == 1:
            raise ValueError("`learned_variance` needs channels, the second axis of `x`; `x` has shape (B,).")
        if cond:
            cond = share(cond, self.shared) if self.shared else cond
            check_conditions(cond, len(x))
            cond = expand_conditions(cond, len(x))
        net_x = x
        if self.precondition is not None:
            c_in = self.precondition.c_in(self.sde.alpha(t), self.sde.sigma(t))
            net_x = check.expand(c_in, x) * x
        dtype = _dtype_of(self.net)
        out = self._evaluate(x, net_x if dtype is None else net_x.to(dtype), self._net_time(x, t), cond)
        self.check_output(out, x)
        out = out.to(x.dtype)
        if self.check_finite and not bool(out.isfinite().all()):
            row = int((~out.isfinite()).reshape(len(out), -1).any(1).nonzero()[0, 0])
            at = float(t[row] if isinstance(t, Tensor) and t.ndim else t)
            raise ValueError(f"`net` returned a value that is not finite at t = {at:g}, first in sample {row}.")
        if not self.learned_variance:
            return out, None
        mean, variance = out.chunk(2, dim=1)
        return mean, variance

    def check_output(self, out: object, x: Tensor) -> None:
        """Raise an error unless an output of the network has the kind and the shape that the state asks for.

        Arguments:
            out: Output of the network.
            x: State, (B, *event).
        """
        if not isinstance(out, Tensor):
            theirs = type(out).__module__.partition(".")[0] == "diffusers"
            first = "for a network of diffusers, ss.interop.from_diffusers(net, scheduler); else " if theirs else ""
            raise TypeError(
                f"`net` must return a tensor, got {type(out).__name__}; {first}unpack it, as in "
                f"`lambda x, t: net(x, t).sample`."
            )
        if not out.is_floating_point():
            raise TypeError(
                f"`net` must return floating-point numbers, got {str(out.dtype)[6:]}: a prediction is no index, mask "
                f"or complex number; return the values before they are rounded or compared."
            )
        double = (len(x), 2 * x.shape[1], *x.shape[2:]) if x.ndim > 1 else None
        expected = double if self.learned_variance else tuple(x.shape)
        if tuple(out.shape) != expected:
            hint = "check the network"
            if tuple(out.shape) == double:
                hint = "it has twice the channels; if the second half is a variance, give `learned_variance`=True"
            raise ValueError(f"`net` returned shape {tuple(out.shape)} where {expected} was expected: {hint}.")

    def outputs_at(self, times: tuple[float, ...], x: Tensor, **cond: Condition) -> Outputs | None:
        if self.check_finite or not self.keeps(Denoiser, _STANDARD):
            return None  # a subclass may change any evaluation, and the check of each is made by `output`
        check.state("x", x)
        if self.learned_variance and x.ndim == 1:
            return None
        numbers = self.coefficients(times)
        if numbers is None:
            return None
        if cond:
            cond = share(cond, self.shared) if self.shared else cond
            check_conditions(cond, len(x))
            cond = expand_conditions(cond, len(x))
        halve = bool(self.learned_variance)
        evaluate = Evaluation(self.net, numbers, _dtype_of(self.net), cond, x, self.check_output, halve)
        return Outputs(numbers.p, numbers.q, evaluate)

    @constant
    def coefficients(self, times: tuple[float, ...]) -> Coefficients | None:
        """Numbers of the network at the times of a run; None if the data prediction is not defined at one of them.

        Arguments:
            times: Times of the evaluations.
        """

        def compute() -> Coefficients | None:
            levels = [self._coefficients(self.predicts, "x0", t, self.data_scale) for t in times]
            scale = self.precondition
            c_in = [1.0 if scale is None else float(scale.c_in(self.sde.alpha(t), self.sde.sigma(t))) for t in times]
            labels = [] if callable(self.time) else [self._label(t) for t in times]
            return Coefficients(tuple(p for p, _ in levels), tuple(q for _, q in levels), tuple(c_in), tuple(labels))

        try:
            out = self._cached(("run", self.predicts, self.precondition, self.time, times), compute)
        except ValueError:
            return None  # the evaluation at this time raises the error
        if out is not None and callable(self.time):  # a user's clock may be a trainable module: it is not cached
            return out._replace(labels=tuple(self._label(t) for t in times))
        return out

    def _evaluate(self, x: Tensor, net_x: Tensor, time: Tensor, cond: dict[str, Condition]) -> Tensor:
        """Output of the network; raise an error if the network writes into the state or into a condition."""
        if torch.compiler.is_compiling():
            return self.net(net_x, time, **cond)
        if net_x is x:
            net_x = check.protected(x)
        if cond and any(leaf.is_inference() for leaf in tensors_of(cond)):
            cond = tree_map(lambda leaf: check.protected(leaf) if isinstance(leaf, Tensor) else leaf, cond)
        before = check.writes(net_x)
        received = [(name, leaf, check.writes(leaf)) for name, tree in cond.items() for leaf in tensors_of(tree)]
        out = self.net(net_x, time, **cond)
        if net_x is x:
            check.refuse_writes(x, before, "`net`", self.net)
        for name, leaf, count in received:
            check.refuse_writes(leaf, count, "`net`", self.net, what=f"condition `{name}`", copy=name)
        return out

    @checked
    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        card: Card | None = None,
        build: Mapping[str, object] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the weights, and all that is needed to use them, to a folder for ``ss.load``.

        The folder holds JSON and safetensors; :mod:`scoresde.denoisers.saving` has the format. A process, or a network
        time, that is a function cannot be written: the one who loads the folder gives it, and it is compared.

        Arguments:
            folder: Path of the folder.
            card: Facts that a user of the weights needs beside them; by default ``self.card``.
            build: Import path and arguments of the network's class, ``{"class": "package.module:Class", "arguments":
                {...}}``; by default as recorded, for networks of ``ss.nn`` and of diffusers. Without them, the one who
                loads the folder gives the network.
            overwrite: Whether to replace the files in a folder that is not empty.

        Returns:
            Path of the folder.
        """
        from scoresde.denoisers.saving import save_model

        return save_model(self, folder, card=card, build=build, overwrite=overwrite)

    def target(self, x0: Tensor, t: float | Tensor, eps: Tensor) -> Tensor:
        """Training target: the network output that belongs to the state ``sde.perturb(x0, t, eps)``.

        Arguments:
            x0: Data, (B, *event).
            t: Time, a number, () or (B,).
            eps: Standard normal noise of the shape of `x0`.
        """
        check.match("eps", eps, "x0", check.state("x0", x0))
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        form = form_of(self.predicts, self.sde, t, alpha, sigma, self.data_scale)
        a, b, scale = (check.expand(c, x0) for c in (form.a, form.b, form.scale))
        return (a * x0 + b * eps) / scale

    @property
    def data_scale(self) -> float:
        """Standard deviation of the data in EDM's scaling; 1 without `precondition`."""
        return 1.0 if self.precondition is None else self.precondition.sigma_data

    def predict(self, want: Want, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        out, _ = self.output(x, t, **cond)
        return self.convert(self.predicts, out, want, x, t, self.data_scale)

    def _net_time(self, x: Tensor, t: float | Tensor) -> Tensor:
        if not isinstance(t, Tensor):
            # A user's clock may be a trainable module, so its labels are not cached.
            custom = callable(self.time)
            key = (self.time, self.precondition, t)
            label = self._label(t) if custom else self._cached(key, lambda: self._label(t))
            return torch.full((len(x),), label, dtype=torch.float32, device=x.device)
        s = check.time(t, self.sde.T)
        if s.ndim:
            check.expand(s, x)
        return self._labels(s).to(device=x.device, dtype=torch.float32).expand(len(x))

    def _label(self, t: float) -> float:
        return float(self._labels(check.time(t, self.sde.T)))

    def _labels(self, s: Tensor) -> Tensor:
        labels = torch.as_tensor(_clock(self.time, self.sde, self.precondition)(s))
        if labels.shape not in ((), s.shape):
            raise ValueError(
                f"`time` must map times to labels of the same shape, got {tuple(labels.shape)} for {tuple(s.shape)}."
            )
        return labels


@checked
def log_variance(kind: str, output: Tensor, small: Tensor, large: Tensor) -> Tensor:
    r"""Log-variance of a step from the variance output of a network.

    .. math:: \log v = \tfrac{1+r}{2}\log v_{large} + \tfrac{1-r}{2}\log v_{small}

    for ``"range"`` with output r; the output for ``"log"``; its logarithm for ``"value"``.

    Arguments:
        kind: Meaning of the output, ``model.kind.variance``.
        output: Variance output of :meth:`Denoiser.x0_and_variance`, (B, *event).
        small: Variance of q(x_s | x_t, x_0), broadcasting with `output`.
        large: Variance of x_t given x_s, likewise.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), arXiv:2102.09672, eq. 15
    """
    if check.choice("kind", kind, VARIANCES) == "range":
        share = (output + 1) / 2
        return share * large.log() + (1 - share) * small.log()
    return output if kind == "log" else output.log()


def _clock(time: str | Clock | None, sde: SDE, precondition: Preconditioning | None) -> Clock:
    if time is None:
        if precondition is not None:
            return lambda t: -sde.lam(t) / 4
        time = "index" if isinstance(sde, Discrete) else "t"
    if callable(time):
        return time
    try:
        check.choice("time", time, CLOCKS)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}; or a function such as lambda t: 1000 * t.") from None
    if time in ("index", "nearest_index"):
        if not isinstance(sde, Discrete):
            raise ValueError(
                f"`time`={time!r} needs a process with indices, Discrete(betas), got {type(sde).__name__}; if the "
                f"network was trained on scaled times, give a function such as `time=lambda t: 999 * t`."
            )
        index = sde.index_of_t
        return index if time == "index" else (lambda t: index(t).round())
    if time == "sigma":
        return sde.sigma
    return sde.log_sigma if time == "log_sigma" else (lambda t: t)


def _dtype_of(net: object) -> torch.dtype | None:
    """Floating dtype that a network declares as ``net.dtype``, or that of its first parameter, or None."""
    declared = getattr(net, "dtype", torch.dtype)
    if declared is None or isinstance(declared, torch.dtype):  # None: the network casts for itself
        return declared if declared is not None and declared.is_floating_point else None
    parameters: Iterator[Tensor] = net.parameters() if isinstance(net, nn.Module) else iter(())
    first = next(parameters, None)
    return first.dtype if first is not None and first.is_floating_point() else None
