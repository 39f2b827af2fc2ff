"""Wrong arguments of every public callable get a clear answer; `tests/fuzz.py` has the rules."""

from __future__ import annotations

import re
from pathlib import Path

import fuzz
import fuzz_calls
import pytest

TARGETS = {f"{t.folder}.{t.name}": t for t in fuzz.targets() if t.name not in fuzz_calls.REASONS}
SAMPLE = 1500  # of the calls of `python tests/fuzz.py`


def budgets() -> dict[str, float]:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[tool\.scoresde\.fuzz\]\n(.*?)(?=^\[|\Z)", text, re.M | re.S)
    assert section is not None
    return {k: float(v) for k, v in re.findall(r"^([\w-]+) = ([\d.]+)", section[1], re.M)}


def test_every_reason_names_a_callable() -> None:
    names = {t.name for t in fuzz.targets()}
    arguments = {f"{t.name}.{a}" for t in fuzz.targets() if not issubclass(type(t.call), type) for a in t.parameters}
    constructors = {f"{t.name}.{a}" for t in TARGETS.values() for a in t.parameters}
    assert [n for n in (*fuzz_calls.REASONS, *fuzz_calls.CALLS) if n not in names] == []
    assert [n for n in fuzz_calls.SKIPPED if n not in arguments | constructors] == []


@pytest.mark.filterwarnings("ignore")
def test_the_valid_calls_are_valid() -> None:
    values = fuzz_calls.values()
    failed = []
    for name, target in TARGETS.items():
        try:
            fuzz.limited(lambda t=target: fuzz_calls.invoke(t, fuzz_calls.valid_call(t, values), values), 60)
        except Exception as error:
            failed.append(f"{name}: {error!r}")
    assert failed == []


def test_wrong_arguments_are_answered_clearly() -> None:
    answers = fuzz.fuzz(SAMPLE, seed=0)
    invalid = [a for a in answers if a.invalid]
    silent = [a for a in invalid if a.kind == "silent"]
    obscure = [a for a in invalid if a.kind == "obscure"]
    unclear = [a for a in answers if not a.invalid and a.kind == "obscure"]
    shown = "\n".join(f"{a.kind}: {a.target.name}({a.argument}={a.damage}) {a.text}" for a in silent + obscure)
    allowed = budgets()
    assert len(silent) == 0, shown
    assert 100 * len(obscure) / len(invalid) <= allowed["obscure-percent"], shown
    assert 100 * len(unclear) / (len(answers) - len(invalid)) <= allowed["obscure-percent-of-doubtful"]


def test_the_fuzz_sees_each_kind_of_answer() -> None:
    """A function that checks nothing is silent or obscure, and one that checks is clear."""

    def careless(model: fuzz.ss.denoisers.AbstractDenoiser, steps: int) -> object:
        return model.sde if steps is None else steps + 1

    def careful(steps: int) -> int:
        if not isinstance(steps, int):
            raise TypeError(f"`steps` must be an integer, got {steps!r}.")
        return steps

    for wrong, kind in ((None, "silent"), ("ten", "obscure")):
        call = fuzz.Target("", "careless", careless)
        assert not fuzz.fits(call.annotation("steps"), wrong, "steps")
        try:
            careless(fuzz_calls.values()["model"], wrong)  # type: ignore[arg-type]
            found = "silent"
        except TypeError as error:
            found = "clear" if fuzz.is_clear(error, "steps") else "obscure"
        assert found == kind
    with pytest.raises(TypeError) as caught:
        careful("ten")  # type: ignore[arg-type]
    assert not fuzz.is_clear(caught.value, "steps")  # not the library's own error
    with pytest.raises(TypeError) as caught:
        fuzz.ss.DDIM(eta="ten")
    assert fuzz.is_clear(caught.value, "eta")
    assert not fuzz.is_clear(caught.value, "order")
