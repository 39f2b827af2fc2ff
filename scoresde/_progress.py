"""A progress bar that is there or not: the callers need no branch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")


class Bar:
    """A bar of tqdm, or nothing.

    Arguments:
        show: Whether to show the bar in an interactive terminal; ``"always"`` shows it everywhere.
        total: Number of units, or None.
        text: Text before the bar; long texts are cut.
        unit: Name of a unit.
    """

    def __init__(self, show: bool | str, total: float | None, text: str, unit: str = "it") -> None:
        self._bar: Any = None
        if show:
            from tqdm.auto import tqdm

            short = text if len(text) <= 40 else text[:37] + "..."
            self._bar = tqdm(total=total, desc=short, unit=unit, disable=False if show == "always" else None)

    def __enter__(self) -> Bar:
        return self

    def to(self, n: float, **values: str) -> None:
        """Move the bar to `n` units, and show `values` after it."""
        if self._bar is not None:
            if values:
                self._bar.set_postfix(values, refresh=False)
            self._bar.update(n - self._bar.n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def each(items: Iterable[ItemT], show: bool | str, text: str, unit: str = "step") -> Iterator[ItemT]:
    """The items, under a bar that moves by one when the next is asked for.

    Arguments:
        items: Items.
        show: Whether to show the bar, as in :class:`Bar`.
        text: Text before the bar.
        unit: Name of an item.
    """
    known = list(items)
    with Bar(show, len(known), text, unit) as bar:
        for k, item in enumerate(known):
            yield item
            bar.to(k + 1)
