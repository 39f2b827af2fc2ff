"""Whether a penalty on the weights of universal tables makes them better on networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from _cases import SELECTION, cases
from _comparison import Store, rule
from _networks import SELECTED_VECTORS
from _table_fits import Options, Training, begin_default

from scoresde.fitting.universal import descend, errors, mean_log
from scoresde.solvers.universal import unit_of, write_plan

PENALTIES = (0.0, 0.003, 0.03, 0.3)


def penalties(options: Options, nfes: tuple[int, ...] = (5, 8)) -> Iterator[list[str]]:
    """Rows of a table: the squares of the weights, and errors over those of the rule, for each penalty.

    The tables begin from that of the default and are fitted to one set of low-dimensional mixtures, a network of two
    moons among them. Errors are geometric means of the median and of the root mean square error.

    Arguments:
        options: Options of the fits.
        nfes: Numbers of evaluations.
    """
    training = Training.of(3, "data", options)
    vectors, images = (
        [c for c in cases(names, options.out) if c.model.kind.predicts not in ("eps", "score")]
        for names in (tuple(r.name for r in SELECTED_VECTORS), SELECTION)
    )
    for n in nfes:
        for penalty in PENALTIES:
            how = {"squares": training.how["squares"], "penalty": penalty}
            table, _ = descend(begin_default(n, "data"), training.train, training.held, steps=100, **how)
            row = [str(n), f"{penalty:g}", f"{float(table.weights.square().sum()) / n:.2f}"]
            row.append(f"{math.exp(mean_log(errors(table, training.held[:-1]), 0.5)):.4f}")
            for group in (vectors, images):
                found = []
                for case in group:
                    plan = write_plan(table.scaled(unit_of(case.gaussian.spectrum)), case.model.sde, case.model.sde.T)
                    store = Store.of(case.name, options.out)
                    pairs = zip(*(store.errors(case, p, None) for p in (plan, rule(case.model, n))), strict=True)
                    found += [math.log(a / b) for a, b in pairs]
                row.append(f"{math.exp(fmean(found)):.3f}")
            yield row
