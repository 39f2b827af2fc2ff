r"""The reverse SDE of a denoiser, solved by torchsde with any of its methods.

torchsde integrates forward in its own time s, on states (B, d). Here s counts steps, so it is exact in floating point,
and diffusion time decreases in s:

.. math:: dx = \dot t\,\mathrm{drift}(x, t)\,ds + \eta\,g(t)\sqrt{|\dot t|}\,dW_s, \qquad t = t(s), \quad
          t(s) \text{ or } \lambda(t(s)) \text{ linear}.

The noise does not depend on the state ("additive"), which torchsde's method of strong order 1.5 requires. The problem
gives the product of the diffusion with an increment instead of a matrix, so images cost no more than vectors of the
same size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, trainable
from scoresde.denoisers.predictions import Form
from scoresde.integrators.loop import SolverError
from scoresde.integrators.method import Method, Problem, Solution
from scoresde.noise.brownian import BrownianPath, depth_for
from scoresde.noise.keyed import Noise
from scoresde.processes.sde import SDE

ITO = ("euler", "milstein", "srk")

STRATONOVICH = ("euler_heun", "heun", "midpoint", "reversible_heun")

_AHEAD = 1 << 15  # numbers that one call draws

_SHORTEST = 1e-4  # shortest adaptive step, in units of torchsde's time


@checked
@dataclass(frozen=True)
class TorchSDE(Method):
    """Solve the reverse SDE with torchsde (``pip install torchsde``).

    Where σ(t_end) = 0, the solve stops at ``sde.t_min`` and returns E[x_0 | x] there, with one more evaluation. At the
    first time, by default T, g must be finite, which excludes α = 0.

    The increments come from the keyed seeds of the library: sample i is the same in any batch, and torch's global
    generator is not used. There are two exceptions: the adaptive ``"srk"`` uses torchsde's own Brownian interval, whose
    entropy is the seed; and every adaptive method of torchsde has one error estimate, hence one step, for the batch.
    ``Noise(seed, path=True)`` gives every method but ``"srk"`` one Brownian path for all numbers of steps.

    A solve with ``grad="adjoint"`` has the memory of one step. Its gradients are exact with ``"reversible_heun"``, and
    have the order of the method otherwise.

    Arguments:
        method: ``"srk"`` (strong order 1.5, two evaluations per step); with one evaluation ``"euler"``, ``"milstein"``
            (here the same as Euler), ``"euler_heun"`` or ``"reversible_heun"``; with two, ``"midpoint"`` or ``"heun"``.
        steps: Number of equal steps; if `adaptive`, the first step is one of them.
        eta: Factor η > 0 of the noise; 1 is the reverse SDE.
        variable: Variable in which the steps are equal: ``"t"``, or ``"lam"``, which suits most processes near data.
        adaptive: Whether torchsde controls the error by its choice of steps.
        rtol: Relative tolerance of adaptive steps.
        atol: Absolute tolerance of adaptive steps.

    References:
        | Scalable Gradients for Stochastic Differential Equations (Li et al., 2020), arXiv:2001.01328

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> solution = ss.solve(mix, (4, 1), ss.integrators.TorchSDE("srk", steps=30, variable="lam"), seed=0)
        >>> solution.nfe, bool(((solution.x.abs() - 1).abs() < 0.5).all())
        (61, True)
    """

    grads = ("off", "full", "adjoint")

    method: str = "srk"
    steps: int = 100
    eta: float = 1.0
    variable: str = "t"
    adaptive: bool = False
    rtol: float = 1e-2
    atol: float = 1e-3

    def __post_init__(self) -> None:
        check.choice("method", self.method, ITO + STRATONOVICH)
        check.integer("steps", self.steps, at_least=1)
        check.number("eta", self.eta, above=0)
        check.choice("variable", self.variable, ("t", "lam"))
        check.number("rtol", self.rtol, at_least=0)
        check.number("atol", self.atol, at_least=0)

    def run(self, problem: Problem) -> Solution:
        import torchsde

        model, sde = problem.model, problem.model.sde
        end = check.number("t_end", problem.t_end, at_least=0, below=sde.T)
        clean = sde.sigma(end) == 0
        equation = self.equation(model, problem.t_start, sde.t_min if clean else end)
        with torch.set_grad_enabled(problem.grad != "off"):
            x = problem.draw(equation.t_start)
            equation.shape = tuple(x.shape)
            y = x.flatten(1) if x.ndim > 1 else x[:, None]
            arguments: dict[str, object] = {
                "bm": brownian(equation, self.method, problem.steps, y, self.adaptive),
                "method": self.method,
                "dt": 1.0,
                "adaptive": self.adaptive,
                "rtol": self.rtol,
                "atol": self.atol,
                "dt_min": _SHORTEST,
            }
            if problem.grad == "adjoint":
                arguments["adjoint_params"] = trainable(model)
            integrate = torchsde.sdeint_adjoint if problem.grad == "adjoint" else torchsde.sdeint
            # float64 times: a sum of float32 steps overshoots the end
            s = torch.tensor([0.0, float(self.steps)], dtype=torch.float64)
            # torchsde draws a normal to find out shapes
            with torch.random.fork_rng([y.device] if y.device.type == "cuda" else []):
                try:
                    x = integrate(equation, y, s, **arguments)[-1].reshape(x.shape)
                except AssertionError as error:
                    raise equation.failure(str(error), problem.counter.calls) from None
            equation.forget()
            x = problem.denoise(x, equation.t_end) if clean else x
        return problem.solution(x, [equation.t_start, end])

    @checked
    def equation(self, model: AbstractDenoiser, t_start: float | None = None, t_end: float | None = None) -> ReverseSDE:
        """The equation that this method solves.

        Arguments:
            model: Denoiser.
            t_start: First time, by default T.
            t_end: Last time, by default ``sde.t_min``.
        """
        return ReverseSDE(
            model, self.steps, eta=self.eta, variable=self.variable, t_start=t_start, t_end=t_end, method=self.method
        )


@checked
class ReverseSDE(nn.Module):
    """The equation in the form of torchsde: ``f`` and ``g_prod`` of torchsde's time and of flat states.

    Arguments:
        model: Denoiser.
        steps: Number of units of torchsde's time.
        eta: Factor η > 0 of the noise.
        variable: Variable that is linear in torchsde's time, ``"t"`` or ``"lam"``.
        t_start: First time, by default T.
        t_end: Last time, by default ``sde.t_min``.
        method: Name of the method in torchsde, which determines the form of the noise.
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
    ) -> None:
        super().__init__()
        check.integer("steps", steps, at_least=1)
        check.number("eta", eta, above=0)
        check.choice("variable", variable, ("t", "lam"))
        check.choice("method", method, ITO + STRATONOVICH)
        self.model = model
        sde = model.sde
        self.t_start = sde.T if t_start is None else check.number("t_start", t_start, above=0, at_most=sde.T)
        self.t_end = sde.t_min if t_end is None else check.number("t_end", t_end, at_least=0, below=self.t_start)
        _check_ends(sde, self.t_start, self.t_end)
        self.steps, self.eta, self.variable = steps, eta, variable
        self.shape: tuple[int, ...] = ()
        self.sde_type = "ito" if method in ITO else "stratonovich"
        self.noise_type = "diagonal" if method == "reversible_heun" else "additive"
        if self.noise_type == "diagonal":  # the only method that evaluates g itself
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
        """Value of `variable` at torchsde's time s: the time of a Brownian path that all numbers of steps share."""
        return self.time(s) if self.variable == "t" else self.model.sde.lam(self.time(s))

    def _speed(self, t: Tensor, sigma: Tensor, g2: Tensor) -> Tensor:
        """|dt/ds|."""
        if self.variable == "t":
            return torch.full_like(t, (self.t_start - self.t_end) / self.steps)
        return (self._lam[1] - self._lam[0]) / self.steps * 2 * sigma**2 / g2

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """Drift. torchsde evaluates the drift twice at one place; the second time the stored value is returned."""
        grad = torch.is_grad_enabled()
        if self._last is not None and self._last[1] is y and (self._last[0], self._last[2]) == (float(s), grad):
            return self._last[3]
        t, of_x0, of_eps, _ = self._coefficients(float(s))
        form = Form(of_x0, of_eps)
        drift = self.model.predict(lambda *_: form, y.reshape(self.shape), t).reshape(y.shape)
        self._last = float(s), y, grad, drift
        return drift

    def g_prod(self, s: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times `v`."""
        return v * self._coefficients(float(s))[3]

    def _diagonal(self, s: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, self._coefficients(float(s))[3])

    def _coefficients(self, s: float) -> tuple[float, float, float, float]:
        """Time, coefficients of x0 and ε in the drift, and diffusion; computed for all steps in one call."""
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

    def failure(self, reason: str, nfe: int) -> SolverError:
        """The error with its time and sample.

        Arguments:
            reason: Reason that torchsde gives.
            nfe: Number of evaluations so far.
        """
        s, _, _, drift = self._last or (0.0, torch.zeros(1), False, torch.zeros(1))
        bad = ~drift.isfinite().reshape(len(drift), -1).all(1)
        here = self._coefficients(s)[0]
        row, finite = int(bad.double().argmax()), not bool(bad.any())
        return SolverError(f"torchsde gave up ({reason})", t=here, dt=0.0, nfe=nfe, worst_sample=row, finite=finite)

    def forget(self) -> None:
        """Delete the stored drift and its state."""
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
            f"{sde.t_min:g} and take E[x_0 | x] there, as `TorchSDE` does."
        )


class Brownian(Protocol):
    """Brownian motion of torchsde: increments W over an interval of s and, for "srk", their time integrals U."""

    def __call__(self, a: float, b: float, *, return_U: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """W(b) − W(a), or (W, U)."""


def brownian(equation: ReverseSDE, method: str, noise: Noise, y: Tensor, adaptive: bool) -> Brownian:
    """The Brownian motion of a solve: keyed increments, or torchsde's own for adaptive "srk".

    Arguments:
        equation: Equation that is solved.
        method: Name of the method in torchsde.
        noise: Noise of the steps.
        y: Flat state, (B, d).
        adaptive: Whether the steps are adaptive.
    """
    import torchsde

    if noise.path and method == "srk":
        raise ValueError("`method`='srk' needs the time integral of its noise, which a path has not; take 'euler'.")
    if not adaptive or method != "srk":
        return _increments(equation, method, noise, y, adaptive)
    interval: Brownian = torchsde.BrownianInterval(
        0.0,
        float(equation.steps),
        size=tuple(y.shape),
        dtype=y.dtype,
        device=y.device,
        entropy=[*noise.seed] if isinstance(noise.seed, tuple) else [noise.seed, noise.offset],
        dt=1.0,
        levy_area_approximation="space-time",
    )
    return interval


def _increments(equation: ReverseSDE, method: str, noise: Noise, y: Tensor, adaptive: bool) -> Brownian:
    import torchsde

    each = 2 if method == "srk" else 1  # normals of a step: one for W, one more for U
    fixed = noise.path and not adaptive
    times = [equation.clock(float(k)) for k in range(equation.steps + 1)] if fixed else []
    depth = {"depth": depth_for(torch.tensor(times, dtype=torch.float64))} if fixed else {}
    path = BrownianPath(noise, y.shape, dtype=y.dtype, device=y.device, **depth)

    class Increments(torchsde.BaseBrownian):  # type: ignore[misc]
        """Keyed increments: one draw per unit of s or, if intervals have any length, a keyed path."""

        dtype, device, shape = y.dtype, y.device, tuple(y.shape)
        levy_area_approximation = "space-time" if method == "srk" else "none"

        def __init__(self) -> None:
            self._ahead = max(1, _AHEAD // (each * max(1, y.numel())))
            self._chunk: tuple[int, Tensor] | None = None

        def __repr__(self) -> str:
            return f"Increments({noise})"

        def __call__(
            self, a: float, b: float, return_U: bool = False, return_A: bool = False
        ) -> Tensor | tuple[Tensor, Tensor]:
            a, b = float(a), float(b)
            if noise.path:
                return path.normal(equation.clock(a), equation.clock(b)) * math.sqrt(b - a)
            if adaptive:
                return path(a, b)
            if b - a != 1 or not a.is_integer():
                raise ValueError(f"the interval [{a:g}, {b:g}] of torchsde's time is not one of its steps.")
            w, *h = self._normals(int(a))
            return (w, w / 2 + h[0] * 12**-0.5) if return_U else w

        def _normals(self, k: int) -> Tensor:
            first = k - k % self._ahead
            if self._chunk is None or self._chunk[0] != first:
                draws = each * first + torch.arange(each * self._ahead)
                self._chunk = first, noise.normals(y.shape, draws, dtype=y.dtype, device=y.device)
            at = each * (k - first)
            return self._chunk[1][at : at + each]

    increments: Brownian = Increments()
    return increments
