"""Results as the rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

Row = TypeVar("Row")


def write(rows: Sequence[object], path: Path) -> None:
    """Write rows, dataclasses of one kind; a run that is stopped in between leaves the old file.

    Arguments:
        rows: Rows.
        path: File.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([list(vars(rows[0]))] if rows else [])
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in vars(row).values()] for row in rows)
    new.replace(path)


def read(kind: type[Row], path: Path) -> list[Row]:
    """Rows of an earlier run.

    Arguments:
        kind: Dataclass of the rows, with numbers and texts.
        path: File.
    """
    convert = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="") as file:
        return [kind(**{name: convert[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]
