"""What surrounds the loop: callbacks that watch it, and backends that do its work on all images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mprd.neighbors.approximate import NeighborSearch
from mprd.neighbors.exact import find_neighbors
from mprd.subgraphs import SubgraphBuilder, build_serially

if TYPE_CHECKING:
    from mprd.engine.trainer import Trainer


def ignore(*_: Any) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Callbacks:
    """What `fit` calls besides training; each may raise to end the run."""

    after_step: Callable[[Trainer, int], None] = ignore
    """After each step, with the number of steps of the phase."""
    after_epoch: Callable[[Trainer], None] = ignore
    """After each epoch's training."""
    between_epochs: Callable[[Trainer], None] = ignore
    """With the state at the first step of the next epoch."""


@dataclass(frozen=True)
class Backends:
    """Implementations of the work on all images at once; their results are the same."""

    build_subgraphs: SubgraphBuilder = build_serially
    """The pair graphs of a GCN epoch, or of a labeling pass."""
    search_all: NeighborSearch = find_neighbors
    """The neighbor lists of all images."""
