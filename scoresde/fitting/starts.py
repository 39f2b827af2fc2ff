"""The plans from which a fit may begin, if only a number of evaluations is given."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian
from scoresde.grids.spacings import uniform_lam, uniform_t
from scoresde.plan.table import Plan
from scoresde.sampling.defaults import default_grid
from scoresde.sampling.solve import plan_for
from scoresde.solvers.deterministic import UniPC, VelocityAB, with_corrector
from scoresde.solvers.universal import Universal, tables

_SECOND, _LAST = 2.5, 0.1  # first and last level of a rule after a Gaussian start, in units of the data


def begin_plans(nfe: int, model: AbstractDenoiser, gaussian: Gaussian | None) -> list[Plan]:
    """Plans of `nfe` evaluations to begin a fit from.

    From T these are the plan of the default rule; UniPC-2, and Adams–Bashforth of order 2 on the velocity with a
    corrector, on even steps of the time of training; and the universal plan. With a Gaussian start they are the
    universal plan and Adams–Bashforth from 2.5 standard deviations of the data.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser.
        gaussian: Gaussian of the start, or None.
    """
    sde = model.sde
    makers: list[Callable[[], Plan]] = []
    if gaussian is None:
        corrected = with_corrector(VelocityAB(2))
        makers.append(lambda: plan_for(model, nfe=nfe, grid=default_grid(nfe, model)))
        makers += [partial(rule.plan, sde, uniform_t(sde, nfe)) for rule in (UniPC(2), corrected)]
    else:
        std = float(gaussian.spectrum.mean().sqrt())
        low, high = sde.lam(sde.T), sde.lam(sde.t_min)
        ends = [sde.t_of_lam(min(max(-math.log(s * std), low), high)) for s in (_SECOND, _LAST)]
        makers.append(lambda: VelocityAB(2).plan(sde, uniform_lam(sde, nfe, t_start=ends[0], t_min=ends[1])))
    kind = "noise" if model.kind.predicts in ("eps", "score") else "data"
    if nfe in tables("gaussian" if gaussian is not None else kind):
        makers.append(lambda: plan_for(model, Universal(), nfe=nfe, gaussian=gaussian))
    plans = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a start that is bad is not chosen
        for make in makers:
            plan = make()
            times = [float(t) for t in plan.times]
            if plan.nfe == nfe and not plan.stochastic and all(a > b for a, b in pairwise(times)):
                plans.append(plan)
    return plans
