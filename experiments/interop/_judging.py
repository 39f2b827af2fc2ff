"""Measures of samplers on a trained network: distance to a fine solve and Fréchet distance, as rows of a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from _mnist import Judge
from _trained import OUT
from torch import Tensor

Options = TypeVar("Options")


@dataclass(frozen=True)
class Entry:
    """One sampler at one budget.

    Arguments:
        name: Name of the sampler.
        nfe: Number of evaluations.
        error: Root mean square distance to the fine solve for each sample, per pixel; its median over the samples.
        frechet: Fréchet distance to held-out digits.
    """

    name: str
    nfe: int
    error: float
    frechet: float


def judge(samplers: Sequence[tuple[str, int, Callable[[], Tensor]]], fine: Tensor, judge: Judge) -> list[Entry]:
    """Run samplers from the same starts and measure them.

    Arguments:
        samplers: Names, evaluations and functions that return samples, (B, 1, 28, 28).
        fine: The same samples by a fine solve.
        judge: Judge of images.
    """
    rows = []
    for name, nfe, draw in samplers:
        x = draw().double()
        error = float((x - fine.double()).flatten(1).square().mean(1).sqrt().median())
        rows.append(Entry(name, nfe, error, judge.frechet(x)))
    return rows


def table(rows: Sequence[Entry]) -> str:
    """Rows as a Markdown table."""
    lines = ["| sampler | evaluations | error to a fine solve | Fréchet distance |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {row.name} | {row.nfe} | {row.error:.3g} | {row.frechet:.1f} |" for row in rows]
    return "\n".join(lines)


def write(name: str, lines: Sequence[str]) -> str:
    """Print lines, and write them to a file of that name among the results."""
    text = "\n".join(lines)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.md").write_text(text + "\n")
    print(text)
    return text


def from_command_line(kind: type[Options], summary: str, small: dict[str, int]) -> Options:
    """Options of the command line.

    Arguments:
        kind: Dataclass of the options, one of which is `quick`.
        summary: Summary of the script.
        small: Values of the options under ``--quick``.
    """
    parser = argparse.ArgumentParser(description=summary)
    for name, value in vars(kind()).items():
        if name != "quick":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI")
    given = vars(parser.parse_args())
    return kind(**{**given, **(small if given["quick"] else {})})
