"""Named spans of time in the code: free while nothing listens (`mprd train --profile` does)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

Item = TypeVar("Item")
Listener = Callable[[str], AbstractContextManager[None]]
NOTHING: AbstractContextManager[None] = nullcontext()

listener: Listener | None = None


def span(name: str) -> AbstractContextManager[None]:
    """Return a context that the listener times under this name."""
    return NOTHING if listener is None else listener(name)


def spanned(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield items; the wait for each is a span."""
    iterator = iter(items)
    while True:
        try:
            with span(name):
                item = next(iterator)
        except StopIteration:
            return
        yield item


@contextmanager
def listening(new: Listener) -> Iterator[None]:
    """Send the spans of this process to a listener while the block runs."""
    global listener
    before, listener = listener, new
    try:
        yield
    finally:
        listener = before
