"""A posterior of sbi that samples with a solver of this library; importing this module imports sbi."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sbi.inference.posteriors.vector_field_posterior import VectorFieldPosterior
from sbi.samplers.rejection.rejection import accept_reject_sample
from sbi.utils.sbiutils import warn_if_outside_prior_support, within_support
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.network import Denoiser
from scoresde.integrators.method import Method
from scoresde.interop.sbi import from_sbi, observation
from scoresde.likelihood.flow import Tolerance, log_prob
from scoresde.noise.keyed import Noise
from scoresde.plan.table import Plan
from scoresde.sampling.solve import sample
from scoresde.solvers.deterministic import VelocityAB
from scoresde.solvers.rule import Solver

_NFE = 20


class SolverPosterior(VectorFieldPosterior):  # type: ignore[misc]
    r"""Posterior p(θ | x_o) of an estimator of sbi, sampled by a solver; made by :func:`sbi_posterior`.

    It is a ``VectorFieldPosterior``, so that sbi's diagnostics and plots accept it. As there, samples outside the
    support of the prior are rejected, and the log-density is −∞ outside. Inside, it is that of the flow: it is not
    divided by the rate of acceptance. Several independent observations of one θ, guidance and sbi's samplers are left
    to sbi's own posterior.

    Arguments:
        estimator: Estimator of NPSE or FMPE.
        prior: Prior of θ, whose support bounds the samples.
        solver: Solver, plan or method, as in ``ss.sample``; by default ``VelocityAB(3)``.
        nfe: Number of function evaluations of a solver, by default 20.
        grid: Times from noise to data, instead of `nfe`.
        tolerance: Steps of :meth:`log_prob`.
    """

    def __init__(
        self,
        estimator: nn.Module,
        prior: torch.distributions.Distribution,
        solver: Solver | Plan | Method | None = None,
        *,
        nfe: int | None = None,
        grid: Tensor | Sequence[float] | None = None,
        tolerance: Tolerance | None = None,
    ) -> None:
        super().__init__(estimator, prior)
        self.solver = VelocityAB(3) if solver is None else solver
        self.grid, self.tolerance = grid, tolerance
        self.nfe = _NFE if nfe is None and grid is None and isinstance(self.solver, Solver) else nfe
        self._network()
        self._purpose = f"It samples with {self.solver!r}."

    def _network(self) -> None:
        model = from_sbi(self.vector_field_estimator)
        assert isinstance(model, Denoiser) and model.card is not None
        self.model, self.card = model, model.card

    def to(self, device: str | torch.device) -> None:
        """Move the posterior to a device."""
        super().to(device)
        self._network()

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        x: Tensor | None = None,
        show_progress_bars: bool = False,
        *,
        seed: int | None = None,
        max_sampling_batch_size: int = 10_000,
        reject_outside_prior: bool = True,
        max_sampling_time: float | None = None,
        return_partial_on_timeout: bool = False,
    ) -> Tensor:
        """Samples θ of the posterior, ``(*sample_shape, *event)``.

        Arguments:
            sample_shape: Shape of the samples.
            x: Observation; by default that of ``set_default_x``.
            show_progress_bars: Whether to show a progress bar.
            seed: Seed; by default drawn from torch's global generator, which ``torch.manual_seed`` sets.
            max_sampling_batch_size: Number of samples that are solved at once.
            reject_outside_prior: Whether to draw again in the place of samples outside the support of the prior.
            max_sampling_time: Time in seconds after which rejection raises an error.
            return_partial_on_timeout: Whether to return what there is then instead of the error.
        """
        row = observation(self.vector_field_estimator, self._x_else_default_x(x))
        model = self.model.given(shared={"x_o": row})
        n = torch.Size(sample_shape).numel()
        source, drawn = Noise(_seed(seed)), 0

        def propose(shape: Sequence[int]) -> Tensor:
            nonlocal drawn
            parts = []
            for first in range(0, torch.Size(shape).numel(), max_sampling_batch_size):
                rows = min(max_sampling_batch_size, torch.Size(shape).numel() - first)
                parts.append(self._draw(model, rows, Noise(source.seed, offset=drawn)))
                drawn += rows
            return torch.cat(parts)

        theta: Tensor
        if reject_outside_prior:
            theta, _ = accept_reject_sample(
                proposal=propose,
                accept_reject_fn=lambda theta: within_support(self.prior, theta),
                num_samples=n,
                show_progress_bars=show_progress_bars,
                max_sampling_batch_size=max_sampling_batch_size,
                max_sampling_time=max_sampling_time,
                return_partial_on_timeout=return_partial_on_timeout,
            )
        else:
            theta = propose((n,))
            warn_if_outside_prior_support(self.prior, theta)
        theta = theta.reshape(-1, *self._event())
        shape = tuple(sample_shape) if len(theta) == n else (len(theta),)
        return theta.reshape(*shape, *self._event())

    def sample_batched(
        self,
        sample_shape: Sequence[int],
        x: Tensor,
        show_progress_bars: bool = False,
        *,
        seed: int | None = None,
        max_sampling_batch_size: int = 10_000,
        reject_outside_prior: bool = True,
        max_sampling_time: float | None = None,
        return_partial_on_timeout: bool = False,
    ) -> Tensor:
        """Samples θ of the posteriors of N observations, ``(*sample_shape, N, *event)``.

        Arguments:
            sample_shape: Shape of the samples of each posterior.
            x: Observations, (N, *condition_shape).
            show_progress_bars: Whether to show a progress bar.
            seed: Seed; by default drawn from torch's global generator.
            max_sampling_batch_size: Number of samples of each posterior that are solved at once.
            reject_outside_prior: Whether to draw again in the place of samples outside the support of the prior.
            max_sampling_time: Time in seconds after which rejection raises an error.
            return_partial_on_timeout: Whether to return what there is then instead of the error.
        """
        condition = tuple(self.vector_field_estimator.condition_shape)
        x = torch.as_tensor(x, dtype=torch.float32, device=self._device)
        if tuple(x.shape[1:]) != condition:
            raise ValueError(f"`x` must be observations of shape (N, *{condition}), got {tuple(x.shape)}.")
        n, many = torch.Size(sample_shape).numel(), len(x)
        source, drawn = Noise(_seed(seed)), 0

        def propose(shape: Sequence[int]) -> Tensor:
            nonlocal drawn
            rows = torch.Size(shape).numel()
            model = self.model.given(x_o=x.repeat(rows, *[1] * len(condition)))
            theta = self._draw(model, rows * many, Noise(source.seed, offset=drawn))
            drawn += rows * many
            return theta.reshape(rows, many, *self._event())

        theta: Tensor
        if reject_outside_prior:
            theta, _ = accept_reject_sample(
                proposal=propose,
                accept_reject_fn=lambda theta: within_support(self.prior, theta),
                num_samples=n,
                num_xos=many,
                show_progress_bars=show_progress_bars,
                max_sampling_batch_size=max_sampling_batch_size,
                max_sampling_time=max_sampling_time,
                return_partial_on_timeout=return_partial_on_timeout,
            )
        else:
            parts = [min(max_sampling_batch_size, n - k) for k in range(0, n, max_sampling_batch_size)]
            theta = torch.cat([propose((rows,)) for rows in parts])
            warn_if_outside_prior_support(self.prior, theta)
        shape = tuple(sample_shape) if len(theta) == n else (len(theta),)
        return theta.reshape(*shape, many, *self._event())

    def log_prob(self, theta: Tensor, x: Tensor | None = None, track_gradients: bool = False) -> Tensor:
        """Log-density of θ by the probability flow, with the exact trace, (B,); −∞ outside the support of the prior.

        Arguments:
            theta: Parameters θ, (B, *event).
            x: Observation; by default that of ``set_default_x``.
            track_gradients: Whether the result is differentiable.
        """
        row = observation(self.vector_field_estimator, self._x_else_default_x(x))
        theta = torch.as_tensor(theta).to(self._device)
        event = self._event()
        states = check.state("theta", theta.reshape(-1, *event).double())
        value = log_prob(
            self.model.given(shared={"x_o": row}),
            states,
            reference=self.card.gaussian,
            scale=self.card.scale,
            tolerance=self.tolerance,
            grad="full" if track_gradients else "off",
        ).value
        inside = within_support(self.prior, states.to(torch.float32))
        return torch.where(inside, value, -torch.inf).to(torch.float32)

    def _event(self) -> tuple[int, ...]:
        return tuple(self.vector_field_estimator.input_shape)

    def _draw(self, model: AbstractDenoiser, rows: int, noise: Noise) -> Tensor:
        """Samples of one batch, on the scale of θ."""
        z = sample(
            model,
            (rows, *self._event()),
            self.solver,
            nfe=self.nfe,
            grid=self.grid,
            start=self.card.gaussian,
            seed=noise,
        )
        return z if self.card.scale is None else self.card.scale.inverse(z)


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**62, ())) if seed is None else check.integer("seed", seed)
