"""The check of :func:`solve`: whether a plan is accurate enough with its number of steps."""

from __future__ import annotations

import warnings

import torch

from scoresde import _checks as check
from scoresde.analysis.moments import gaussian_stds
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.sampling.memo import Unknown, value_of

SCALES = (1.0, 0.5, 0.2, 0.05, 0.02, 0.01, 0.005)  # standard deviations of the directions, in units of that of the data
WIDER, NARROWER = 1 / 4, 2 / 3  # errors of the standard deviation that are tolerated, in units of the widest direction
FEWEST, FEW = 3, 100  # evaluations of deterministic plans that are checked


def verdict(plan: Plan, sde: SDE, data_std: float = 1.0) -> str | None:
    """What is wrong with a plan that gives Gaussian data a wrong standard deviation, or None.

    A rule that extrapolates predictions, or one that is unstable, amplifies errors if its steps are long. The result on
    Gaussian data is a property of the table, so that no sample is needed: :func:`gaussian_stds`. The plan is tried on
    directions from the given standard deviation s down to s/200, because some rules are unstable in thin directions
    only. The text names the worst one, if it comes out wider by more than a quarter of the exact standard deviation
    of the widest direction, or narrower by more than two thirds of it. The bounds differ because a result that is too
    wide holds noise, and one that is too narrow lacks detail, as that of every first-order rule with few steps.

    Consistency sampling is for consistency models, has no order and is not checked. Deterministic plans of one or two
    evaluations, which give about the mean of the data, are for networks that are distilled, and are not checked;
    neither are those of more than a hundred. A fitted plan was judged on its own model and data, and is not checked.

    Arguments:
        plan: Plan to check.
        sde: Process of the plan.
        data_std: Standard deviation s of the data.
    """
    fitted = plan.order is None and "held_out" in plan.meta
    if plan.order == 0 or fitted or not (plan.stochastic or FEWEST <= plan.nfe <= FEW):
        return None
    scales = [scale * data_std for scale in SCALES]
    stds = gaussian_stds(plan, sde, scales)
    unit = stds[0][1]  # s at the data, about σ where a run ends in noise
    errors = [(found - exact, found, exact, s) for s, (found, exact) in zip(scales, stds, strict=True)]
    error, found, exact, s = max(errors, key=lambda e: max(e[0] / WIDER, -e[0] / NARROWER))
    if not (error > WIDER * unit or error < -NARROWER * unit):
        return None
    otherwise = "a lower order or a solver without noise" if plan.stochastic else "a lower order or another solver"
    return (
        f"{plan.name or 'the plan'} is inaccurate with so few steps: after these {plan.nfe} evaluations, the standard "
        f"deviation is {found:.3g} instead of {exact:.3g} on Gaussian data of {s:g}. Take more steps, {otherwise}; "
        f"`analysis.gaussian_stds` computes this for any plan."
    )


def warn_of_few_steps(plan: Plan, sde: SDE, data_std: float = 1.0) -> None:
    """Warn of a plan that is inaccurate with its number of steps, by :func:`verdict`.

    Arguments:
        plan: Plan to check.
        sde: Process of the plan.
        data_std: Standard deviation s of the data.
    """
    text = _known(plan, sde, data_std)
    if text is not None:
        warnings.warn(text, stacklevel=check.levels_to_user())


def _known(plan: Plan, sde: SDE, data_std: float) -> str | None:
    """The verdict, which a plan of numbers keeps for the next call."""
    try:
        if torch.compiler.is_compiling() or not all(line.plain for line in plan.program):
            raise Unknown
        question = value_of(sde), value_of(float(data_std))
    except Unknown:
        return verdict(plan, sde, data_std)
    for seen, text in list(plan.verdicts.items()):
        if seen == question:
            return text
    text = verdict(plan, sde, data_std)
    plan.verdicts.clear()  # the last one is enough: a plan is run again on the same data
    plan.verdicts[question] = text
    return text
