"""All that Algorithm 1 changes, in one place: what a checkpoint holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mprd.backbone.network import Backbone, build_backbone, parameter_groups, set_training_format
from mprd.config.schema import Config, GcnConfig, TrainConfig
from mprd.errors import NonFiniteLoss, UserError
from mprd.gcn.network import PairGCN
from mprd.memory import FeatureMemory
from mprd.pairs.clusters import ClusterMemory
from mprd.pairs.labellers import Labels
from mprd.pairs.rules import PADDING, MetaSet, PositiveTable
from mprd.runtime import checkpoint
from mprd.runtime.distributed import WorkerGroup
from mprd.runtime.seeding import RngStream, generator

Phase = Literal["gcn", "cnn", "evaluate"]


@dataclass
class EpochStats:
    """What an epoch counts as it goes: sums, and the candidate pairs that the GCN judged."""

    sums: dict[str, float] = field(default_factory=dict)
    candidates: list[Tensor] = field(default_factory=list)
    """Judged pairs, each `[P, 5]` float64: i, j, g_ij, cosine, overlap of their lists; a 6th is agreement, if asked."""

    waiting: dict[str, Tensor] = field(default_factory=dict)
    """What is still to be added, on an accelerator that the host would have to wait for."""

    def add(self, name: str, value: float | Tensor) -> None:
        """Add to a running sum; a tensor on an accelerator is fetched when a sum is asked for."""
        if isinstance(value, Tensor) and value.device.type != "cpu":
            self.waiting[name] = self.waiting.get(name, 0.0) + value.detach().double()
        else:
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def settle(self) -> None:
        """Fetch what is waiting, all in one go."""
        waiting, self.waiting = self.waiting, {}
        values = torch.stack([*waiting.values()]).tolist() if waiting else []
        for name, value in zip(waiting, values, strict=True):
            self.add(name, value)

    def mean(self, name: str, count: str) -> float | None:
        """Divide one sum by another; None where nothing was counted."""
        self.settle()
        return self.sums[name] / self.sums[count] if self.sums.get(count) else None

    def count_judged(self, ids: Tensor, labels: Labels, memory: Tensor) -> None:
        """Keep the candidates of a batch with g_ij, cosine and overlap, and count lengths and cuts of the lists."""
        assert labels.candidates is not None
        assert labels.likelihoods is not None
        assert labels.overlaps is not None
        places = torch.nonzero_static(labels.candidates != PADDING, size=labels.num_candidates).unbind(1)
        first, second = ids[places[0]], labels.candidates[places]
        cosines = (memory[first] * memory[second]).sum(1)
        columns = [first, second, labels.likelihoods[places], cosines, labels.overlaps[places]]
        if labels.agreements is not None:
            columns.append(labels.agreements[places])
        self.candidates.append(torch.stack([column.double() for column in columns], dim=1))
        self.add("k", len(first))
        self.add("k_capped", labels.num_capped)
        self.add("labeled", len(ids))

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        # those of before a resumption are on the CPU already
        candidates = [part.cpu() for part in self.candidates] or [torch.zeros(0, 5, dtype=torch.float64)]
        return {"sums": dict(self.sums), "candidates": torch.cat(candidates)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> EpochStats:
        return cls(dict(state["sums"]), [state["candidates"]] if len(state["candidates"]) else [])


@dataclass
class TrainState:
    """Networks, optimizers, memory, P, and the position: epoch, phase, step.

    Generators are not in it: each is made anew from (seed, epoch, step), so position says all of them.
    """

    backbone: Backbone
    optimizer: torch.optim.Optimizer
    gcn: PairGCN
    gcn_optimizer: torch.optim.Optimizer
    memory: FeatureMemory
    positives: PositiveTable
    meta: MetaSet = field(default_factory=MetaSet.empty)
    list_features: Tensor | None = None
    """`[N, D]`, what this epoch's lists are drawn from where `neighbors.source` is not the memory."""
    clusters: ClusterMemory | None = None
    """Of this epoch, under the labeller `dbscan`."""
    epoch: int = 0
    phase: Phase = "gcn"
    step: int = 0
    best_score: float = -1.0
    stats: EpochStats = field(default_factory=EpochStats)

    def begin_epoch(self, epoch: int) -> None:
        """Move on to an epoch's first step."""
        self.epoch, self.phase, self.step = epoch, "gcn", 0
        self.stats = EpochStats()
        self.list_features = None
        self.clusters = None

    def check_losses(self) -> None:
        """Raise NonFiniteLoss where a loss of this epoch was no number; on an accelerator this waits for it."""
        self.stats.settle()
        for name in ("GCN", "CNN"):
            if not math.isfinite(self.stats.sums.get(f"{name.lower()}_loss", 0.0)):
                raise non_finite(name, "no number", self)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values; raise NonFiniteLoss where it is not worth keeping."""
        self.check_losses()
        return {
            "backbone": self.backbone.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gcn": self.gcn.state_dict(),
            "gcn_optimizer": self.gcn_optimizer.state_dict(),
            "memory": self.memory.features,
            "positives": self.positives.ids,
            "meta": self.meta.table(),
            "list_features": self.list_features,
            "clusters": None if self.clusters is None else self.clusters.state_dict(),
            "epoch": self.epoch,
            "phase": self.phase,
            "step": self.step,
            "best_score": self.best_score,
            "stats": self.stats.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, path: Path) -> None:
        """Take over a checkpoint; raise UserError where it does not fit the settings or the data."""
        device = self.memory.features.device
        if len(state["memory"]) != len(self.memory):
            raise UserError(
                f"{path}: made on {len(state['memory'])} training images, but the data set now has {len(self.memory)}"
            )
        # checkpoints of before 23 November 2026 do not say
        if "meta" in state and not torch.equal(state["meta"], self.meta.table().cpu()):
            raise UserError(f"{path}: made with other labeled images; meta.labels, or the data set, has changed")
        checkpoint.load_module(self.backbone, state["backbone"], path=path, name="backbone")
        checkpoint.load_module(self.gcn, state["gcn"], path=path, name="GCN")
        self.optimizer.load_state_dict(state["optimizer"])
        self.gcn_optimizer.load_state_dict(state["gcn_optimizer"])
        # taken as they are: normalizing a row again would move its last bits
        self.memory.features = state["memory"].to(device)
        self.positives.ids = state["positives"].to(device)
        self.list_features = None if state["list_features"] is None else state["list_features"].to(device)
        clusters = state["clusters"]
        if clusters is not None:
            clusters = ClusterMemory(**{name: part.to(device) for name, part in clusters.items()})
        self.clusters = clusters
        self.epoch, self.phase, self.step = state["epoch"], state["phase"], state["step"]
        self.best_score = state["best_score"]
        self.stats = EpochStats.from_state_dict(state["stats"])


def non_finite(name: str, value: float | str, state: TrainState) -> NonFiniteLoss:
    """Say which loss is no number, where, and what helps."""
    return NonFiniteLoss(
        f"the {name} loss is {value} in epoch {state.epoch}, step {state.step}; stopped before the step, the "
        "last checkpoint is sound. A lower learning rate (train.lr_backbone, train.lr_new, "
        "gcn.learning_rate) is the usual cure"
    )


def build_state(
    config: Config, *, num_images: int, device: torch.device, workers: WorkerGroup | None = None
) -> TrainState:
    """Build the networks from the seed; the memory is zeros until it is filled."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.train.seed, RngStream.WEIGHTS).initial_seed() % 2**63)
        backbone = build_backbone(config.backbone, workers=workers).to(device)
        set_training_format(backbone, precision=config.train.precision)
        gcn = build_gcn(config.gcn, num_features=backbone.num_features).to(device)
    return TrainState(
        backbone=backbone,
        optimizer=cnn_optimizer(backbone, config.train, is_pretrained=config.backbone.weights != "none"),
        gcn=gcn,
        gcn_optimizer=gcn_optimizer(gcn, config.gcn),
        memory=FeatureMemory(torch.zeros(num_images, backbone.num_features, device=device)),
        positives=PositiveTable(num_images, device),
    )


def build_gcn(config: GcnConfig, *, num_features: int) -> PairGCN:
    """Build the GCN of the settings."""
    return PairGCN(
        num_features,
        variant=config.variant,
        link=config.link,
        hidden=config.hidden,
        conv_channels=config.conv_channels,
        mlp_hidden=config.mlp_hidden,
        read_out=config.read_out,
    )


def cnn_optimizer(backbone: Backbone, config: TrainConfig, *, is_pretrained: bool) -> torch.optim.Optimizer:
    """Build the optimizer of Eq. 8, with a rate for the pre-trained and one for the new layers (Sec. 5.2)."""
    groups = parameter_groups(
        backbone, is_pretrained=is_pretrained, lr_backbone=config.lr_backbone, lr_new=config.lr_new
    )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=is_fused(backbone))
    return torch.optim.SGD(
        groups,
        lr=config.lr_new,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=is_fused(backbone),
    )


def gcn_optimizer(gcn: PairGCN, config: GcnConfig) -> torch.optim.Optimizer:
    """Build the optimizer of Eq. 9."""
    if config.optimizer == "adam":
        return torch.optim.Adam(
            gcn.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=is_fused(gcn)
        )
    return torch.optim.SGD(
        gcn.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=is_fused(gcn),
    )


def is_fused(network: nn.Module) -> bool:
    """Say whether an optimizer should step in one kernel, which alone can leave a step out without asking the host."""
    return next(network.parameters()).device.type == "cuda"
