r"""The reverse SDE of a denoiser as a problem for torchsde, with any of its methods.

torchsde integrates forward in its own time s, of states (B, d). Here s counts steps, so that it is exact in floating
point, and goes down in diffusion time:

.. math:: dx = \dot t\,\mathrm{drift}(x, t)\,ds + \eta\,g(t)\sqrt{|\dot t|}\,dW_s, \qquad t = t(s), \quad
          t(s) \text{ or } \lambda(t(s)) \text{ linear}.

The noise does not depend on the state ("additive"), which is what torchsde's method of strong order 1.5 needs, and its
product with an increment is given instead of a matrix, so images are no larger a problem than vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.predictions import Form
from scoresde.denoisers.start import device_of
from scoresde.noise.brownian import BrownianPath, depth_for
from scoresde.noise.keyed import Noise
from scoresde.processes.sde import SDE

ITO = ("euler", "milstein", "srk")

STRATONOVICH = ("euler_heun", "heun", "midpoint", "reversible_heun")

_START, _STEPS = 0, 1  # streams of a seed: the start, as in `solve`, and the increments

_AHEAD = 1 << 15  # numbers drawn in one call


def torchsde_sample(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    method: str = "srk",
    *,
    steps: int = 100,
    eta: float = 1.0,
    variable: str = "t",
    seed: int | Sequence[int] | Noise | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    denoise: bool = True,
    adaptive: bool = False,
    rtol: float = 1e-2,
    atol: float = 1e-3,
    grad: str = "off",
    data_std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **cond: Any,
) -> Tensor:
    """Draw samples with torchsde (``pip install torchsde``).

    Increments come from our seeds: sample i is the same in any batch, and torch's global generator is left alone. Two
    exceptions: adaptive "srk" needs torchsde's own Brownian interval, whose entropy is the seed, and every adaptive
    method of torchsde has one error, hence one step, for the whole batch.

    Arguments:
        model: A denoiser.
        shape_or_x: Shape (B, *event) to start from the prior at `t_start`, or a state at `t_start`.
        method: ``"srk"`` (strong order 1.5, two evaluations a step), ``"euler"``, ``"milstein"`` (the same as Euler
            here), or, one evaluation, ``"reversible_heun"``, or, two, ``"midpoint"``, ``"heun"``, ``"euler_heun"``.
        steps: Number of equal steps; the first step if `adaptive`.
        eta: 1 for the reverse SDE, or any other positive number.
        variable: In which steps are equal: ``"t"``, or ``"lam"``, which suits the steep end of most processes.
        seed: An integer, one for each sample, a :class:`Noise`, or None for a fresh one. ``Noise(seed, path=True)``
            gives one Brownian path whatever the number of steps, to every method but "srk".
        t_start: Where to start, by default T; α must not vanish there.
        t_end: Where to stop, by default ``sde.t_min``; σ must not vanish there.
        denoise: Return E[x_0 | x] at `t_end`, one more evaluation, instead of x.
        adaptive: Let torchsde choose the steps.
        rtol: Relative tolerance of adaptive steps.
        atol: Absolute tolerance of adaptive steps.
        grad: ``"off"``, ``"full"`` to differentiate through every step, or ``"adjoint"`` for torchsde's adjoint: exact
            with "reversible_heun", to the order of the method with others, and always with the memory of one step.
        data_std: Standard deviation of the data, for the prior.
        dtype: Of the state, when a shape is given.
        device: Of the state, when a shape is given; by default the model's.
        **cond: Conditions, handed to the network.

    Returns:
        (B, *event).
    """
    import torchsde

    check.conditions(cond, torchsde_sample)
    check.choice("method", method, ITO + STRATONOVICH)
    check.choice("grad", grad, ("off", "full", "adjoint"))
    check.integer("steps", steps, at_least=1)
    problem = ReverseSDE(
        model, steps, eta=eta, variable=variable, t_start=t_start, t_end=t_end, method=method, cond=cond
    )
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    if isinstance(shape_or_x, Tensor):
        x = check.state("x", shape_or_x)
    else:
        shape = tuple(check.integer("shape", n) for n in shape_or_x)
        where = device_of(model) if device is None else device
        prior = model.sde.prior(problem.t_start, std=data_std)
        x = prior.sample(shape, noise.fork(_START), dtype=dtype, device=where)
    problem.shape = tuple(x.shape)
    y = x.flatten(1) if x.ndim > 1 else x[:, None]
    bm = _brownian(problem, method, noise.fork(_STEPS), y, adaptive)
    how: dict[str, Any] = {"bm": bm, "method": method, "dt": 1.0, "adaptive": adaptive, "rtol": rtol, "atol": atol}
    how["dt_min"] = 1e-4
    if grad == "adjoint":
        how |= {"adjoint_params": tuple(p for p in model.parameters() if p.requires_grad)}
    # float64 times: a sum of float32 steps overshoots the end. torchsde draws a normal to look at shapes.
    ts = torch.tensor([0.0, float(steps)], dtype=torch.float64)
    devices = [y.device] if y.device.type == "cuda" else []
    with torch.set_grad_enabled(grad != "off"), torch.random.fork_rng(devices):
        integrate = torchsde.sdeint_adjoint if grad == "adjoint" else torchsde.sdeint
        end = integrate(problem, y, ts, **how)[-1].reshape(x.shape)
        problem.forget()
        end = model.x0(end, problem.t_end, **cond) if denoise else end
    check.warn_unless_finite(end)
    return end


class ReverseSDE(nn.Module):
    """The problem that torchsde is given: ``f`` and ``g_prod`` of its time and its flat states.

    Arguments:
        model: A denoiser.
        steps: How many units of torchsde's time there are.
        eta: η.
        variable: What is linear in torchsde's time, ``"t"`` or ``"lam"``.
        t_start: Where to start.
        t_end: Where to stop.
        method: torchsde's name of the method, which decides how it wants the noise.
        cond: Conditions for the network.
    """

    def __init__(
        self,
        model: AbstractDenoiser,
        steps: int,
        *,
        eta: float = 1.0,
        variable: str = "t",
        t_start: float | None = None,
        t_end: float | None = None,
        method: str = "srk",
        cond: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check.number("eta", eta, above=0)
        check.choice("variable", variable, ("t", "lam"))
        self.model = model
        sde = model.sde
        self.t_start = sde.T if t_start is None else check.number("t_start", t_start, above=0, at_most=sde.T)
        self.t_end = sde.t_min if t_end is None else check.number("t_end", t_end, at_least=0, below=self.t_start)
        _check_ends(sde, self.t_start, self.t_end)
        self.steps, self.eta, self.variable, self.cond = steps, eta, variable, cond or {}
        self.shape: tuple[int, ...] = ()
        self.sde_type = "ito" if method in ITO else "stratonovich"
        self.noise_type = "diagonal" if method == "reversible_heun" else "additive"
        if self.noise_type == "diagonal":  # it alone asks for g itself
            self.g = self._diagonal
        self._lam = sde.lam(self.t_start), sde.lam(self.t_end)
        self._table: dict[float, tuple[float, float, float, float]] = {}
        self._last: tuple[float, Tensor, bool, Tensor] | None = None

    def time(self, s: float) -> float:
        """Diffusion time at torchsde's time s."""
        return float(self._times(torch.tensor([s], dtype=torch.float64)))

    def _times(self, s: Tensor) -> Tensor:
        start, end = (self.t_start, self.t_end) if self.variable == "t" else self._lam
        u = start + s / self.steps * (end - start)
        t = u if self.variable == "t" else self.model.sde.t_of_lam(u)
        return torch.where(s == 0, self.t_start, torch.where(s == self.steps, self.t_end, t))

    def clock(self, s: float) -> float:
        """What is linear in torchsde's time: the time of a Brownian path that all numbers of steps share."""
        return self.time(s) if self.variable == "t" else self.model.sde.lam(self.time(s))

    def _speed(self, t: Tensor, sigma: Tensor, g2: Tensor) -> Tensor:
        """|dt/ds|."""
        if self.variable == "t":
            return torch.full_like(t, (self.t_start - self.t_end) / self.steps)
        return (self._lam[1] - self._lam[0]) / self.steps * 2 * sigma**2 / g2

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """Drift. torchsde asks twice at the same place, to check shapes and within a step: it is computed once."""
        grad = torch.is_grad_enabled()
        if self._last is not None and self._last[1] is y and (self._last[0], self._last[2]) == (float(s), grad):
            return self._last[3]
        t, of_x0, of_eps, _ = self._at(float(s))
        form = Form(of_x0, of_eps)
        drift = self.model.predict(lambda *_: form, y.reshape(self.shape), t, **self.cond).reshape(y.shape)
        self._last = float(s), y, grad, drift
        return drift

    def g_prod(self, s: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times `v`."""
        return v * self._at(float(s))[3]

    def _diagonal(self, s: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, self._at(float(s))[3])

    def _at(self, s: float) -> tuple[float, float, float, float]:
        """Time, coefficients of x0 and ε in the drift, and diffusion; those of all steps at once."""
        if s not in self._table:
            at = torch.arange(self.steps + 1, dtype=torch.float64) + (s - math.floor(s))
            at = at[at <= self.steps]
            t = self._times(at)
            sde = self.model.sde
            sigma, g2 = sde.sigma(t), sde.g2(t)
            speed = self._speed(t, sigma, g2)
            of_eps = sde.sigma_dot(t) + self.eta**2 * g2 / (2 * sigma)
            columns = (-speed * sde.alpha_dot(t), -speed * of_eps, self.eta * (g2 * speed).sqrt())
            rows = zip(*(c.tolist() for c in (t, *columns)), strict=True)
            self._table.update(zip(at.tolist(), rows, strict=True))
            self._table[s] = self._table[s] if s in self._table else self._table[at.tolist()[math.floor(s)]]
        return self._table[s]

    def forget(self) -> None:
        """Drop the last drift, and the state that it was computed at."""
        self._last = None


def _check_ends(sde: SDE, start: float, end: float) -> None:
    if not sde.g2(start) * sde.T < 1e8:
        raise ValueError(
            f"`t_start` = {start:g} has α = {sde.alpha(start):.1g} and no finite g; start a little before it, as in "
            f"t_start={(1 - 1e-3) * sde.T:g}."
        )
    if sde.sigma(end) == 0:
        raise ValueError(
            f"`t_end` = {end:g} has σ = 0, where the score is infinite; stop at a positive time such as `sde.t_min` = "
            f"{sde.t_min:g} and take E[x_0 | x] there, as `denoise`=True does."
        )


def _brownian(problem: ReverseSDE, method: str, noise: Noise, y: Tensor, adaptive: bool) -> Any:
    """What torchsde calls a Brownian motion: W and, for "srk", its time integral U on a stretch of s."""
    import torchsde

    if noise.path and method == "srk":
        raise ValueError("`method`='srk' needs the time integral of its noise, which a path has not; take 'euler'.")
    each = 2 if method == "srk" else 1  # normals a step: W, and what U has besides
    how: dict[str, Any] = {"dtype": y.dtype, "device": y.device}
    if noise.path and not adaptive:
        times = [problem.clock(float(k)) for k in range(problem.steps + 1)]
        how["depth"] = depth_for(torch.tensor(times, dtype=torch.float64))
    path = BrownianPath(noise, y.shape, **how)

    class Increments(torchsde.BaseBrownian):  # type: ignore[misc]
        """Keyed increments: one draw a unit of s, or, where stretches are of any length, a keyed path."""

        dtype, device, shape = y.dtype, y.device, tuple(y.shape)
        levy_area_approximation = "space-time" if method == "srk" else "none"

        def __init__(self) -> None:
            self._ahead = max(1, _AHEAD // (each * max(1, y.numel())))
            self._chunk: tuple[int, Tensor] | None = None

        def __repr__(self) -> str:
            return f"Increments({noise})"

        def __call__(self, a: Any, b: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
            a, b = float(a), float(b)
            if noise.path:
                return path.normal(problem.clock(a), problem.clock(b)) * math.sqrt(b - a)
            if adaptive:
                return path(a, b)
            if b - a != 1 or not a.is_integer():
                raise ValueError(f"stretch [{a:g}, {b:g}] of torchsde's time is not one of its steps.")
            w, *h = self._normals(int(a))
            return (w, w / 2 + h[0] * 12**-0.5) if return_U else w

        def _normals(self, k: int) -> Tensor:
            first = k - k % self._ahead
            if self._chunk is None or self._chunk[0] != first:
                draws = each * first + torch.arange(each * self._ahead)
                self._chunk = first, noise.normals(y.shape, draws, dtype=y.dtype, device=y.device)
            at = each * (k - first)
            return self._chunk[1][at : at + each]

    if adaptive and method == "srk":
        entropy = [*noise.seed] if isinstance(noise.seed, tuple) else [noise.seed, noise.offset]
        return torchsde.BrownianInterval(
            0.0,
            float(problem.steps),
            size=tuple(y.shape),
            dtype=y.dtype,
            device=y.device,
            entropy=entropy,
            dt=1.0,
            levy_area_approximation="space-time",
        )
    return Increments()
