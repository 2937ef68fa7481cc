"""All that Algorithm 1 changes: networks, optimizers, memory, P, and the position in the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mprd.backbone.network import Backbone, build_backbone, parameter_groups, set_training_format
from mprd.config.schema import Config, GcnConfig, TrainConfig
from mprd.engine.schedules import learning_rate
from mprd.errors import UserError
from mprd.gcn.network import PairGCN
from mprd.memory import FeatureMemory
from mprd.neighbors.similarity import Similarity, Whitening
from mprd.pairs.clusters import ClusterMemory
from mprd.pairs.positives import MetaSet, PositiveTable
from mprd.runtime import checkpoint
from mprd.runtime.distributed import WorkerGroup
from mprd.runtime.seeding import RngStream, generator

Phase = Literal["gcn", "cnn", "evaluate"]

MOMENTUM = 0.9
"""Of SGD, for F and G (Sec. 5.2)."""
WEIGHT_DECAY = 5e-4
"""For F and G; not stated in the paper, MLCReID's value."""


@dataclass
class TrainState:
    """Networks, optimizers, memory, P, and the position: epoch, phase, step.

    RNG streams derive from (seed, epoch, step), so the position is enough.
    """

    backbone: Backbone
    optimizer: torch.optim.Optimizer
    gcn: PairGCN
    gcn_optimizer: torch.optim.Optimizer
    memory: FeatureMemory
    positives: PositiveTable
    meta: MetaSet = field(default_factory=MetaSet.empty)
    list_features: Tensor | None = None
    """`[N, D]`, the features that this epoch's lists are drawn from, where they are fixed for the epoch."""
    similarity: Similarity | None = None
    """The map to the features that are compared, fitted to `list_features`."""
    clusters: ClusterMemory | None = None
    """Of this epoch, under the labeler `dbscan`."""
    epoch: int = 0
    phase: Phase = "gcn"
    step: int = 0
    best_score: float = -1.0

    def set_learning_rates(self, *, step: int) -> None:
        """Set the rates of the CNN for this epoch (Sec. 5.2)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.epoch, group["base_lr"], step=step)

    def begin_epoch(self, epoch: int) -> None:
        """Move to an epoch's first step."""
        self.epoch, self.clusters = epoch, None
        self.begin_phase("gcn")

    def begin_phase(self, phase: Phase) -> None:
        """Move to a phase's first step."""
        self.phase, self.step = phase, 0

    @property
    def whitening(self) -> Whitening | None:
        """The whitening of the similarity; None without one."""
        return None if self.similarity is None else self.similarity.whitening

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        return {
            "backbone": self.backbone.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gcn": self.gcn.state_dict(),
            "gcn_optimizer": self.gcn_optimizer.state_dict(),
            "memory": self.memory.features,
            "positives": self.positives.ids,
            "refused": self.positives.refused,
            "meta": self.meta.table(),
            "list_features": self.list_features,
            "similarity": None if self.similarity is None else self.similarity.state_dict(),
            "clusters": None if self.clusters is None else self.clusters.state_dict(),
            "epoch": self.epoch,
            "phase": self.phase,
            "step": self.step,
            "best_score": self.best_score,
        }

    def load_state_dict(self, state: dict[str, Any], *, path: Path) -> None:
        """Restore a checkpoint; raise UserError where it does not fit the settings or the data."""
        device = self.memory.features.device
        if len(state["memory"]) != len(self.memory):
            raise UserError(
                f"{path}: made on {len(state['memory'])} training images, but the data set now has {len(self.memory)}"
            )
        # older checkpoints lack Z
        if "meta" in state and not torch.equal(state["meta"], self.meta.table().cpu()):
            raise UserError(f"{path}: made with other labeled images; meta.labels, or the data set, has changed")
        checkpoint.load_module(self.backbone, state["backbone"], path=path, name="backbone")
        checkpoint.load_module(self.gcn, state["gcn"], path=path, name="GCN")
        checkpoint.load_optimizer(self.optimizer, state["optimizer"], path=path, setting="train.optimizer")
        checkpoint.load_optimizer(self.gcn_optimizer, state["gcn_optimizer"], path=path, setting="optimizer of the GCN")
        # bit for bit: normalizing a row again would change its last bits
        self.memory.features = state["memory"].to(device)
        self.positives.ids = state["positives"].to(device)
        # older checkpoints lack them
        self.positives.refused = state.get("refused", self.positives.refused).to(device)
        self.list_features = None if state["list_features"] is None else state["list_features"].to(device)
        # older checkpoints lack it
        similarity = state.get("similarity")
        self.similarity = None if similarity is None else Similarity.from_state_dict(similarity, device)
        clusters = state["clusters"]
        if clusters is not None:
            clusters = ClusterMemory(**{name: part.to(device) for name, part in clusters.items()})
        self.clusters = clusters
        self.epoch, self.phase, self.step = state["epoch"], state["phase"], state["step"]
        self.best_score = state["best_score"]


def build_state(
    config: Config, *, num_images: int, device: torch.device, workers: WorkerGroup | None = None
) -> TrainState:
    """Build networks and optimizers from the seed; the memory is zeros until it is filled."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.train.seed, RngStream.WEIGHTS).initial_seed() % 2**63)
        backbone = build_backbone(config.backbone, size=config.data.size, workers=workers).to(device)
        set_training_format(backbone, precision=config.train.precision)
        gcn = PairGCN(backbone.num_features).to(device)
    return TrainState(
        backbone=backbone,
        optimizer=cnn_optimizer(backbone, config.train, is_pretrained=config.backbone.weights != "none"),
        gcn=gcn,
        gcn_optimizer=gcn_optimizer(gcn, config.gcn),
        memory=FeatureMemory(torch.zeros(num_images, backbone.num_features, device=device)),
        positives=PositiveTable(num_images, device),
    )


def cnn_optimizer(backbone: Backbone, config: TrainConfig, *, is_pretrained: bool) -> torch.optim.Optimizer:
    """Build the optimizer of Eq. 8, with one rate for pre-trained and one for new layers (Sec. 5.2)."""
    groups = parameter_groups(
        backbone,
        is_pretrained=is_pretrained,
        lr_backbone=config.lr_backbone,
        lr_new=config.lr_new,
        layer_decay=config.layer_decay,
    )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=is_fused(backbone))
    return torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=is_fused(backbone))


def gcn_optimizer(gcn: PairGCN, config: GcnConfig) -> torch.optim.Optimizer:
    """Build the optimizer of Eq. 9."""
    return torch.optim.SGD(
        gcn.parameters(),
        lr=config.learning_rate,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        fused=is_fused(gcn),
    )


def is_fused(network: nn.Module) -> bool:
    """Return whether the optimizer is fused: only fused ones skip a step by `found_inf` without a sync."""
    return next(network.parameters()).device.type == "cuda"
