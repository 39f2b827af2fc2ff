r"""Averages of a module's weights over a run: exponential, or a power function whose length is chosen afterwards.

An average is a copy of the parameters, in float32 or float64; buffers are copied without averaging. The module and its
tensors are never replaced, so that optimisers, DDP and compiled graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.training.sharding import State, local, shard, whole

Weights = dict[str, Tensor]


@checked
class EMA:
    r"""Exponential moving average of a module's weights.

    .. math:: \bar\theta \leftarrow \beta_n\bar\theta + (1 - \beta_n)\theta, \qquad
              \beta_n = \min\!\big(\beta, \tfrac{1+n}{10+n}\big)

    Call :meth:`update` after every step of the optimiser, and sample inside ``with ema.swapped():``.

    Arguments:
        module: Module whose weights are averaged: a :class:`Denoiser`, its network, or any module with parameters.
        decay: Largest decay β.
        warmup: Whether β_n rises to β as in the formula; else β_n = β.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239, section 4

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> ema = EMA(net, decay=0.5, warmup=False)
        >>> start = net.weight.item()
        >>> torch.nn.init.constant_(net.weight, start + 2.0).requires_grad
        True
        >>> ema.update()
        >>> with ema.swapped():
        ...     round(net.weight.item() - start, 5)
        1.0
        >>> round(net.weight.item() - start, 5)
        2.0
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        if next(module.parameters(), None) is None:
            raise ValueError("`module` has no parameters to average; its network must be an nn.Module, not a function.")
        self.module = module
        self.decay = check.number("decay", decay, at_least=0, below=1)
        self.warmup = bool(warmup)
        self.updates = 0
        self.weights = _copy(module)
        self._swaps = 0

    def __repr__(self) -> str:
        return f"EMA({_counted(self.module)}, decay={self.decay:g}, warmup={self.warmup}, updates={self.updates})"

    def rate(self) -> float:
        """Decay β_n of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    def update(self) -> None:
        """Update the average with the current weights of the module."""
        _refuse_swapped(self._swaps)
        _move(self.weights, self.module, 1 - self.rate())
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """Context in which the module has the averaged weights; its own return at the end, also after an error."""
        self._swaps += 1
        try:
            with swapped(self.module, self.weights) as module:
                yield module
        finally:
            self._swaps -= 1

    def restart(self) -> None:
        """Begin the average again, at the current weights of the module."""
        _refuse_swapped(self._swaps)
        self.updates, self.weights = 0, _copy(self.module)

    def state_dict(self) -> State:
        """Averaged weights, number of updates, and settings."""
        return {
            "weights": dict(self.weights),
            "updates": self.updates,
            "decay": self.decay,
            "warmup": self.warmup,
        }

    @checked
    def load_state_dict(self, state: State) -> None:
        """Load a :meth:`state_dict`; missing or unknown entries raise an error."""
        _only(state, ("weights", "updates", "decay", "warmup"))
        _load(self.weights, state["weights"])
        self.updates, self.decay, self.warmup = int(state["updates"]), float(state["decay"]), bool(state["warmup"])


@checked
class PowerEMA:
    r"""Power-function averages, from which :func:`reconstruct` makes an average of any length after the run.

    .. math:: \bar\theta_\gamma(t) = \frac{\int_0^t \tau^\gamma\,\theta(\tau)\,d\tau}{\int_0^t \tau^\gamma\,d\tau},
              \qquad \bar\theta \leftarrow \beta_t\bar\theta + (1-\beta_t)\theta, \quad
              \beta_t = \big(1 - \tfrac1t\big)^{\gamma+1}

    The length of an average is the standard deviation of its profile in units of t:
    :math:`\sigma_{rel} = \sqrt{\gamma+1}\,(\gamma+2)^{-1}(\gamma+3)^{-1/2}`. Save a :meth:`snapshot` regularly.

    Arguments:
        module: Module whose weights are averaged.
        stds: Lengths σ_rel to track, in (0, 0.288); two are enough to reconstruct others.

    References:
        | Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2024), arXiv:2312.02696
    """

    def __init__(self, module: nn.Module, stds: Sequence[float] = (0.05, 0.10)) -> None:
        self.module = module
        self.stds = tuple(float(std) for std in stds)
        if not self.stds:
            raise ValueError("`stds` must have at least one length, such as (0.05, 0.10), got none.")
        self.gammas = tuple(gamma_of_std(std) for std in self.stds)
        self.updates = 0
        self.weights = [_copy(module) for _ in self.stds]
        self._swaps = 0

    def __repr__(self) -> str:
        return f"PowerEMA({_counted(self.module)}, stds={self.stds}, updates={self.updates})"

    def update(self) -> None:
        """Update the average with the current weights of the module."""
        _refuse_swapped(self._swaps)
        self.updates += 1
        for gamma, weights in zip(self.gammas, self.weights, strict=True):
            _move(weights, self.module, 1 - (1 - 1 / self.updates) ** (gamma + 1))

    @contextmanager
    def swapped(self, which: int = 0) -> Iterator[nn.Module]:
        """Context in which the module has the average of length ``stds[which]``, as :meth:`EMA.swapped`.

        Arguments:
            which: Index of the length in `stds`.
        """
        self._swaps += 1
        try:
            with swapped(self.module, self.weights[which]) as module:
                yield module
        finally:
            self._swaps -= 1

    def snapshot(self) -> list[Snapshot]:
        """Copies of the current averages on the CPU, one for each length."""
        return [
            Snapshot(self.updates, gamma, {name: whole(w).detach().to("cpu", copy=True) for name, w in weights.items()})
            for gamma, weights in zip(self.gammas, self.weights, strict=True)
        ]

    def restart(self) -> None:
        """Begin the averages again, at the current weights of the module."""
        _refuse_swapped(self._swaps)
        self.updates, self.weights = 0, [_copy(self.module) for _ in self.stds]

    def state_dict(self) -> State:
        """Averaged weights, number of updates, and lengths."""
        return {"weights": [dict(w) for w in self.weights], "updates": self.updates, "stds": list(self.stds)}

    @checked
    def load_state_dict(self, state: State) -> None:
        """Load a :meth:`state_dict`; missing or unknown entries raise an error."""
        _only(state, ("weights", "updates", "stds"))
        if tuple(state["stds"]) != self.stds:
            raise ValueError(f"`state` has `stds`={tuple(state['stds'])}, this PowerEMA {self.stds}; they must agree.")
        for mine, theirs in zip(self.weights, state["weights"], strict=True):
            _load(mine, theirs)
        self.updates = int(state["updates"])


@dataclass(frozen=True)
class Snapshot:
    """A power-function average at one update of a run.

    Arguments:
        t: Number of updates.
        gamma: Exponent γ of its profile.
        weights: Averaged weights, by name.
    """

    t: int
    gamma: float
    weights: Weights


def gamma_of_std(std: float) -> float:
    r"""Exponent γ of a relative length: the largest root of :math:`(\gamma+2)^2(\gamma+3) = (\gamma+1)/\sigma_{rel}^2`.

    Arguments:
        std: Relative length σ_rel, in (0, √(1/12)); γ = 0, the mean of the whole run, has √(1/12).
    """
    import numpy as np

    check.number("std", std, above=0, below=12**-0.5)
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


def std_of_gamma(gamma: float) -> float:
    """Relative length σ_rel of an exponent γ; the inverse of :func:`gamma_of_std`.

    Arguments:
        gamma: Exponent γ > −1.
    """
    check.number("gamma", gamma, above=-1)
    return float((gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5)


@checked
def reconstruct(snapshots: Sequence[Snapshot], std: float, t: int | None = None) -> Weights:
    r"""Power-function average of any length, as the least-squares combination of snapshots.

    .. math:: \min_x \int \Big(\sum_i x_i\,p_{\gamma_i,t_i}(\tau) - p_{\gamma,t}(\tau)\Big)^2 d\tau, \qquad
              p_{\gamma,t}(\tau) = (\gamma+1)\,\tau^\gamma/t^{\gamma+1} \text{ on } [0, t]

    Arguments:
        snapshots: Snapshots of one run, from :meth:`PowerEMA.snapshot`; more of them give a smaller error.
        std: Relative length σ_rel of the result.
        t: Update at which the profile of the result ends: the time of a snapshot, by default of the last one.

    Returns:
        Weights by name, for :func:`swapped` or ``module.load_state_dict``.
    """
    if not snapshots:
        raise ValueError("`snapshots` must have at least one entry; save `PowerEMA.snapshot()` during the run.")
    last = max(snapshot.t for snapshot in snapshots)
    t = last if t is None else check.integer("t", t, at_least=1)
    if t > last:
        raise ValueError(f"`t` must not lie after the last snapshot, at {last}, got {t}.")
    if min(snapshot.t for snapshot in snapshots) < 1:
        raise ValueError("`snapshots` must be of averages that were updated at least once.")
    used = [snapshot for snapshot in snapshots if snapshot.t <= t]
    if not used:
        raise ValueError(f"`t`={t} lies before the first snapshot, at {min(s.t for s in snapshots)}.")
    if (before := max(s.t for s in used)) < t:
        after = min(s.t for s in snapshots if s.t > t)
        raise ValueError(
            f"`t` must be the time of a snapshot, got {t} between {before} and {after}: no combination of snapshots "
            f"has a profile that ends there; use t={before} or t={after}, or save a snapshot at {t}."
        )
    at = torch.tensor([s.t for s in used] + [t], dtype=torch.float64)
    gamma = torch.tensor([s.gamma for s in used] + [gamma_of_std(std)], dtype=torch.float64)
    products = _inner_products(at[:, None], gamma[:, None], at[None], gamma[None])
    # Nearby snapshots are almost linearly dependent, so that the smallest singular values are rounding errors.
    x = torch.linalg.lstsq(products[:-1, :-1], products[:-1, -1:], rcond=1e-15, driver="gelsd").solution[:, 0]
    out: Weights = {}
    for name, first in used[0].weights.items():
        if not first.is_floating_point():
            out[name] = used[-1].weights[name].clone()
            continue
        total = torch.zeros(first.shape, dtype=torch.float64)
        for c, snapshot in zip(x.tolist(), used, strict=True):
            total += c * snapshot.weights[name].double()
        out[name] = total.to(first.dtype)
    return out


def _inner_products(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """∫ p_a p_b = (γ_a + 1)(γ_b + 1)/(γ_a + γ_b + 1) · (t_min/t_max)^γ_max / t_max, with γ_max the γ at t_max."""
    later = torch.where(t_a > t_b, gamma_a, gamma_b)
    small, large = torch.minimum(t_a, t_b), torch.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (small / large) ** later / large


@contextmanager
def swapped(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Context in which a module has other weights; its own return at the end, also after an error.

    Arguments:
        module: Module whose tensors are overwritten in place.
        weights: All parameters and saved buffers, by name.
    """
    own = _tensors(module)
    _match(own, weights)
    saved = {name: w.detach().clone() for name, w in own.items()}
    try:
        with torch.no_grad():
            for name, w in own.items():
                w.copy_(shard(weights[name], w))
        yield module
    finally:
        with torch.no_grad():
            for name, w in own.items():
                w.copy_(saved[name])


def _tensors(module: nn.Module, names: Collection[str] | None = None) -> Weights:
    """Parameters and saved buffers by name, without wrappers of DDP and torch.compile; a shared tensor appears once."""
    while (inner := _wrapped(module)) is not None:
        module = inner
    compiled = [f"{name}." for name, part in module.named_modules() if name and _is_compiled(part)]

    def plain(name: str) -> str:
        for prefix in reversed(compiled):  # inner wrappers first, so that the outer prefixes still match
            if name.startswith(f"{prefix}_orig_mod."):
                name = prefix + name[len(prefix) + len("_orig_mod.") :]
        return name

    if names is None:
        names = {plain(name) for name in module.state_dict(keep_vars=True)}
    both = ((plain(name), w) for name, w in (*module.named_parameters(), *module.named_buffers()))
    return {name: w for name, w in both if name in names}


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module in a wrapper of DDP or torch.compile, or None; a network may have a child called `module`."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = module.module
        return inner
    return module.get_submodule("_orig_mod") if _is_compiled(module) else None


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is a wrapper of torch.compile, which has one child and no tensors."""
    alone = [name for name, _ in module.named_children()] == ["_orig_mod"]
    return alone and not any(True for _ in module.parameters(False)) and not any(True for _ in module.buffers(False))


def _copy(module: nn.Module) -> Weights:
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # half precision rounds 1 − β away
    return {name: w.detach().to(wide.get(w.dtype, w.dtype), copy=True) for name, w in _tensors(module).items()}


@torch.no_grad()
def _move(average: Weights, module: nn.Module, share: float) -> None:
    """Interpolate average parameters to those of the module by `share`; copy buffers."""
    averages: list[Tensor] = []
    current: list[Tensor] = []
    for name, w in _tensors(module, average).items():
        mine = average[name] = shard(average[name], w)  # the module may be on another device now
        if not (isinstance(w, nn.Parameter) and w.is_floating_point()):
            mine.copy_(w)
        else:
            averages.append(local(mine))
            current.append(local(w.detach()).to(averages[-1].dtype))
    if averages:
        torch._foreach_lerp_(averages, current, share)


def _counted(module: nn.Module) -> str:
    return f"{type(module).__name__} with {sum(p.numel() for p in module.parameters()):,} weights"


def _refuse_swapped(swaps: int) -> None:
    if swaps:
        raise RuntimeError("`update` inside `swapped` would average the average; call `update` after the block.")


def _only(state: State, names: Sequence[str]) -> None:
    if set(state) != set(names):
        raise ValueError(f"`state` must have {', '.join(names)} and nothing else, got {', '.join(map(str, state))}.")


def _load(mine: Weights, theirs: Mapping[str, Tensor]) -> None:
    _match(mine, theirs)
    with torch.no_grad():
        for name, w in mine.items():
            w.copy_(shard(theirs[name], w))


def _match(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or extra:
        raise ValueError(
            f"the weights do not fit the module: missing {missing or 'none'}, unknown {extra or 'none'}; construct the "
            f"module with the same settings as before."
        )
    for name, w in own.items():
        if w.shape != given[name].shape:
            raise ValueError(f"`{name}` has shape {tuple(w.shape)} here and {tuple(given[name].shape)} in the weights.")
