"""Why universal tables gain little on UNets: how rough their data predictions are, and what a fit to them gains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from _cases import EXACT, SELECTION, Case, cases
from _networks import NetworkGroup

import scoresde as ss
from scoresde.fitting.universal import descend, errors
from scoresde.solvers.universal import UniversalTable, unit_of

STEP = 0.25  # of log σ/α between two evaluations


def roughness(case: Case, n: int = 8) -> float:
    """Second difference of x₀ over its first difference along trajectories, at noise levels of 0.1 to 5 units.

    Both are root mean squares over the entries and means over the samples; the steps are even in the logarithm of the
    noise level. It tends to 0 for smooth functions as the steps become short; it is 1.4 for a random walk.

    Arguments:
        case: Model with initial states.
        n: Number of trajectories.
    """
    sde, unit = case.model.sde, unit_of(case.gaussian.spectrum)
    low = max(float(sde.lam(sde.T)), -math.log(200 * unit))
    high = min(float(sde.lam(sde.t_min)), -math.log(0.04 * unit))
    lam = torch.linspace(low, high, int((high - low) / STEP) + 1, dtype=torch.float64)
    times = [sde.T, *sde.t_of_lam(lam)[1:].tolist(), 0.0]
    path = ss.solve(case.model, case.x[:n], ss.VelocityAB(3), grid=times, watch=ss.Watch(save_at="all")).trajectory
    states = [(t, path[t]) for t in sorted(path, reverse=True)[1:-1]]  # neither T, where α may be 0, nor the result
    with torch.no_grad():
        d = torch.stack([case.model.x0(x, t).flatten(1).double() for t, x in states])
    levels = [float(sde.sigma(t) / sde.alpha(t)) / unit for t, _ in states]
    inside = torch.tensor([0.1 <= s <= 5 for s in levels])[1:-1]
    first, second = (v.square().mean(-1).sqrt().mean(-1) for v in (d[1:] - d[:-1], d[2:] - 2 * d[1:-1] + d[:-2]))
    return float((second / first[:-1])[inside].mean())


def reasons(out: Path, nfe: int = 8) -> Iterator[list[str]]:
    """Rows of a table: roughness, and amplification and last noise level of the default and the universal plan.

    Arguments:
        out: Folder of the networks.
        nfe: Number of evaluations.
    """
    for case in cases(EXACT[:2] + SELECTION, out):
        sde, unit = case.model.sde, unit_of(case.gaussian.spectrum)
        row = [case.name, f"{roughness(case):.2f}"]
        for solver in (None, ss.solvers.Universal(unit)):
            plan = ss.solve(case.model, case.x[:2], solver, nfe=nfe).plan
            assert plan is not None
            t = [float(r.t) for r in plan.rows if r.evaluates][-1]
            most = float(ss.analysis.amplification(plan, sde).max())
            row += [f"{most:.2f}", f"{float(sde.sigma(t) / sde.alpha(t)) / unit:.2g}"]
        yield row


def limit(begin: UniversalTable, out: Path, steps: int = 25) -> Iterator[list[str]]:
    """Rows of a table: error of the default's table, and after its fit to two UNets, on trajectories of both.

    Arguments:
        begin: Table of the default.
        out: Folder of the networks.
        steps: Largest number of iterations.
    """
    chosen = list(cases(("v, cosine", "velocity, flow"), out))

    def part(low: int, high: int) -> list[NetworkGroup]:
        return [NetworkGroup(c.model, c.x[low:high], c.end[low:high], unit_of(c.gaussian.spectrum)) for c in chosen]

    train, held = part(0, 8), part(16, 24)
    fitted, _ = descend(begin, train, part(8, 16), steps=steps)
    for name, groups in (("of the fit", train), ("others", held)):
        before, after = (torch.cat(errors(t, groups)).log().mean(1).exp() for t in (begin, fitted))
        for case, b, a in zip(chosen, before.tolist(), after.tolist(), strict=True):
            yield [case.name, name, str(begin.nfe), f"{b:.3g}", f"{a:.3g}"]
