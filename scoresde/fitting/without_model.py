"""Plans fitted to the covariance of the data alone, without a model."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import replace

import torch

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.gaussian import Gaussian
from scoresde.fitting.mixtures import Problems, Waves, from_spectrum
from scoresde.fitting.universal import Group, descend, errors, mean_log
from scoresde.plan.table import Plan
from scoresde.solvers.universal import PREDICTS, STARTS, Universal, unit_of, write_plan

_COMPONENTS = 12
_ERRORS = (0.005, 0.03)  # smallest and largest error of the networks, relative to their predictions


@checked
def fit_to_data(
    nfe: int,
    gaussian: Gaussian,
    *,
    predicts: str = "data",
    start: str = "prior",
    problems: int = 8,
    trajectories: int = 16,
    steps: int = 40,
    seed: int = 0,
) -> Plan:
    """Fit a universal table to random mixtures that have the covariance of the data; no network is evaluated.

    The mixtures, :func:`from_spectrum`, have the variances of the data along its principal axes, and the
    smooth error of a network. The fit begins from the table of :class:`Universal` and takes seconds.

    Arguments:
        nfe: Number of evaluations of the plan, one of those that :class:`Universal` has a table for.
        gaussian: Gaussian of the data on the process of the model, as from ``ss.Gaussian.estimate(sde, data)``.
        predicts: Kind of the network: ``"data"`` for x0, v and velocity, ``"noise"`` for ε and score.
        start: First state of the plan: at T, ``"prior"``, or at the first level of the table, ``"gaussian"``; run the
            latter with ``start=gaussian``.
        problems: Number of mixtures.
        trajectories: Number of trajectories of each mixture; half as many decide when to stop.
        steps: Largest number of iterations.
        seed: Seed of the mixtures and their trajectories.

    Returns:
        A plan with its origin in ``plan.meta``.

    Example:
        >>> import torch, scoresde as ss
        >>> z = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
        >>> data = z * torch.tensor([3, 1, 0.3, 0.1])
        >>> gaussian = ss.Gaussian.estimate(ss.VP(), data)
        >>> plan = fit_to_data(5, gaussian, problems=2, trajectories=6, steps=5)
        >>> plan.nfe, plan.meta["held_out"]["after"] <= plan.meta["held_out"]["before"]
        (5, True)
    """
    check.choice("predicts", predicts, PREDICTS)
    check.choice("start", start, STARTS)
    seed = check.integer("seed", seed)
    count = check.integer("problems", problems, at_least=1)
    n = check.integer("trajectories", trajectories, at_least=2)
    sde, spectrum = gaussian.sde, gaussian.spectrum
    unit = unit_of(spectrum)
    table = Universal(predicts=predicts, start=start).table(nfe)
    first = 1e4 if sde.alpha(sde.T) == 0 else min(1e4, float(sde.sigma(sde.T) / sde.alpha(sde.T)) / unit)

    def group(seed: int, n: int) -> Group:
        data = from_spectrum(spectrum / unit**2, count, _COMPONENTS, seed)
        g = torch.Generator().manual_seed(seed)
        low, high = map(math.log, _ERRORS)
        size = (low + (high - low) * torch.rand(count, generator=g, dtype=torch.float64)).exp()
        kind = "eps" if predicts == "noise" else "v"
        waves = Waves.draw(count, len(spectrum), predicts=kind, size=size, drift=0.7, seed=seed)
        return Group.draw(Problems.of(data, first, waves), n, seed=seed, gaussian=start == "gaussian")

    train, held = group(2 * seed, n), group(2 * seed + 1, max(2, n // 2))
    fitted, after = descend(
        table, [train], [held], steps=check.integer("steps", steps, at_least=1), first_shift=start == "gaussian"
    )
    before = mean_log(errors(table, [held]))
    plan = write_plan(fitted.scaled(unit), sde, None if start == "gaussian" else sde.T, name=f"universal-{nfe}, fitted")
    meta = {
        **plan.meta,
        "scoresde": importlib.metadata.version("scoresde"),
        "from": f"Universal(predicts={predicts!r}, start={start!r})",
        "fitted to": f"{count} mixtures with the spectrum of the data, {n} trajectories each",
        "gaussian start": start == "gaussian",
        "seed": seed,
        "held_out": {"before": math.exp(before), "after": math.exp(after)},
    }
    return replace(plan, meta=meta)
