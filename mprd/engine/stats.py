"""What an epoch counts as it goes: sums, and the candidate pairs that were scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mprd.neighbors.exact import PADDING
from mprd.pairs.labellers import Labels


@dataclass
class EpochStats:
    """Running sums and scored candidates of one epoch, saved with the state so that a resumed epoch has them all."""

    sums: dict[str, float] = field(default_factory=dict)
    candidates: list[Tensor] = field(default_factory=list)
    """Scored pairs, each `[P, 4]` float64: i, j, g_ij, cosine."""
    pending: dict[str, Tensor] = field(default_factory=dict)
    """Device sums not yet copied to the host."""

    def add(self, name: str, value: float | Tensor) -> None:
        """Add to a running sum; a value on an accelerator is copied to the host when a sum is read."""
        if isinstance(value, Tensor) and value.device.type != "cpu":
            self.pending[name] = self.pending.get(name, 0.0) + value.detach().double()
        else:
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def timer(self, name: str) -> Callable[[], None]:
        """Start a clock; each call of the result adds the seconds since the last to a sum.

        A sum that grows with the steps is saved with each checkpoint, so a resumed epoch has all of its seconds.
        """
        last = time.monotonic()

        def add() -> None:
            nonlocal last
            now = time.monotonic()
            self.add(name, now - last)
            last = now

        return add

    def sync(self) -> None:
        """Copy all pending sums to the host in one transfer."""
        pending, self.pending = self.pending, {}
        values = torch.stack([*pending.values()]).tolist() if pending else []
        for name, value in zip(pending, values, strict=True):
            self.add(name, value)

    def mean(self, name: str, count: str) -> float | None:
        """Divide one sum by another; None where nothing was counted."""
        self.sync()
        return self.sums[name] / self.sums[count] if self.sums.get(count) else None

    def non_finite_loss(self) -> str | None:
        """Return `GCN` or `CNN` where the sum of its losses is not finite."""
        self.sync()
        names = (name for name in ("GCN", "CNN") if not math.isfinite(self.sums.get(f"{name.lower()}_loss", 0.0)))
        return next(names, None)

    def add_candidates(self, ids: Tensor, labels: Labels, compared: Tensor) -> None:
        """Keep the candidates of the images `ids` `[B]` with their scores, and count list lengths and cut lists.

        Cosines are of `compared` `[N, D]`, the features that lists are drawn from.
        """
        assert labels.candidates is not None
        assert labels.likelihoods is not None
        assert labels.is_capped is not None
        places = (labels.candidates != PADDING).nonzero(as_tuple=True)
        first, second = ids[places[0]], labels.candidates[places]
        cosines = (compared[first] * compared[second]).sum(1)
        columns = [first, second, labels.likelihoods[places], cosines]
        self.candidates.append(torch.stack([column.double() for column in columns], dim=1))
        self.add("k", len(first))
        self.add("k_capped", labels.is_capped.sum())
        self.add("labelled", len(ids))

    def state_dict(self) -> dict[str, Any]:
        self.sync()
        # those of before a resumption are on the CPU already
        candidates = [part.cpu() for part in self.candidates] or [torch.zeros(0, 4, dtype=torch.float64)]
        return {"sums": dict(self.sums), "scored": torch.cat(candidates)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> EpochStats:
        # a version that had a further column kept them under another name; without them the epoch's row has no AUC
        scored = state.get("scored", ())
        return cls(dict(state["sums"]), [scored] if len(scored) else [])
