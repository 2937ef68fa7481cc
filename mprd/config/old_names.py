"""Settings of earlier versions: what a refused name is told, and how their run folders are read.

A name that is gone is refused from users. In a run folder it is dropped where it says what is now fixed, and moved
where it has a new name. What training alone reads is dropped or replaced, and such a run is not resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from mprd.config.nested import Nested, flatten, get, nest, pop, put
from mprd.config.schema import THRESHOLDS
from mprd.errors import UserError

REMEDY = "read it with the version of mprd that wrote it"


@dataclass(frozen=True)
class Fixed:
    """A setting that is now a constant."""

    value: Any
    why: str

    def tell(self, name: str) -> str:
        """Return why the name is refused."""
        return f"{name} is now fixed at {show(self.value)} ({self.why})"

    def move(self, name: str, value: Any, _settings: Nested) -> None:
        """Drop the value; raise UserError where it is another."""
        if value != self.value:
            raise UserError(f"{self.tell(name)}, but this run has {show(value)}; {REMEDY}")


@dataclass(frozen=True)
class FixedInTraining(Fixed):
    """A setting that is now a constant, and that training alone reads: only a run that goes on needs its value."""

    labeller: str | None = None
    """The labeler under which it is read; None: any."""

    def move(self, _name: str, _value: Any, _settings: Nested) -> None:
        """Drop the value."""


@dataclass(frozen=True)
class Gone:
    """A setting that changed no result, or that is now chosen by itself."""

    why: str

    def tell(self, name: str) -> str:
        """Return why the name is refused."""
        return f"{name} is gone: {self.why}"

    def move(self, _name: str, _value: Any, _settings: Nested) -> None:
        """Drop the value."""


@dataclass(frozen=True)
class Moved:
    """A setting with a new name, or one that is now a value of another."""

    new: str
    move_value: Callable[[Any, Nested], None]

    def tell(self, name: str) -> str:
        """Return why the name is refused."""
        return f"{name} is now {self.new}"

    def move(self, _name: str, value: Any, settings: Nested) -> None:
        """Set the new one, in place."""
        self.move_value(value, settings)


def threshold(*labellers: str) -> Moved:
    """Move a labeller's own threshold to `pairs.threshold`, where this labeller runs and it is not the default."""

    def move(value: Any, settings: Nested) -> None:
        labeller = get(settings, "pairs.labeller", "gcn")
        if labeller in labellers and value != THRESHOLDS[labeller]:
            put(settings, "pairs.threshold", value)

    return Moved("pairs.threshold, for the labeller that runs", move)


def strength(standard: Any, small: Any) -> Moved:
    """Move a part of the augmentation, whose values were these, to `data.augmentation`."""

    def move(value: Any, settings: Nested) -> None:
        name = {standard: "standard", small: "small"}.get(tuple(value) if isinstance(value, list) else value)
        if name is None or get(settings, "data.augmentation", name) != name:
            raise UserError(
                f"data.augmentation is now standard or small, and this run's {show(value)} is of neither; {REMEDY}"
            )
        put(settings, "data.augmentation", name)

    return Moved("a part of data.augmentation, standard or small", move)


SEC_5_2 = "Sec. 5.2"
AUTHORS = "Cluster-Contrast's value"
NO_STANDARDIZING = "batch norms by camera leave nothing to standardize"
OLD: dict[str, Fixed | Gone | Moved] = {
    "data.colour_jitter": strength(0.2, 0.3),
    "data.rotation": strength(10.0, 5.0),
    "data.crop_area": strength((0.64, 1.0), (0.8, 1.0)),
    "data.erasing_probability": strength(0.5, 0.3),
    "data.erasing_area": Fixed([0.02, 0.2], "MLCReID's value"),
    "data.augment": Gone("images are augmented a batch at once on an accelerator, and one by one on a CPU"),
    "data.synthetic.lookalike_share": Fixed(0.5, "only tests varied it"),
    "data.synthetic.camera_gap": Fixed(0.6, "the demo's value"),
    "data.synthetic.seed": Fixed(0, "only tests varied it"),
    "backbone.bn_bias": FixedInTraining(True, "a frozen one brought nothing"),
    "backbone.freeze_bn": Fixed(False, "no recipe froze them"),
    "memory.gamma_start": Fixed(1.0, SEC_5_2),
    "memory.gamma_end": Fixed(0.5, SEC_5_2),
    "memory.start_mode": Gone("train for random weights (backbone.weights=none), else eval"),
    "neighbors.num_shards": FixedInTraining(0, "shards on Ray actors brought no measured gain"),
    "neighbors.metric": FixedInTraining("cosine", SEC_5_2, "gcn"),
    "neighbors.density_k": Gone("the density that J is corrected for is of 20 images"),
    "neighbors.standardise": FixedInTraining(False, NO_STANDARDIZING),
    "neighbors.memory_mb": Gone("blocks take 256 MB, and the results do not depend on it"),
    "gcn.hidden": Fixed(64, "not stated in the paper"),
    "gcn.conv_channels": Fixed(4, "not stated in the paper"),
    "gcn.mlp_hidden": Fixed(64, "not stated in the paper"),
    "gcn.read_out": FixedInTraining("pooled", "Sec. 3.2", "gcn"),
    "gcn.variant": FixedInTraining("paper", "Sec. 3.2", "gcn"),
    "gcn.link": FixedInTraining("keep", "Eq. 4", "gcn"),
    "gcn.optimizer": FixedInTraining("sgd", SEC_5_2, "gcn"),
    "gcn.momentum": Fixed(0.9, SEC_5_2),
    "gcn.weight_decay": Fixed(5e-4, "MLCReID's value"),
    "gcn.passes": Fixed(1, "Alg. 1 lines 3-7"),
    "pairs.decide": FixedInTraining("likelihood", "Eq. 7", "gcn"),
    "pairs.knn_k": Fixed(8, "Sec. 5.3"),
    "pairs.ss_similarity": threshold("ss"),
    "pairs.mplp_t": threshold("mplp", "mlcr"),
    "pairs.jaccard": Gone("it was of the labeller list_overlap, which is gone"),
    "pairs.reciprocal": threshold("reciprocal"),
    "meta.pairs": FixedInTraining("random", "Sec. 4.2", "gcn"),
    "meta.eta.start": Fixed(1.0, "Eq. 10"),
    "meta.eta.step_epoch": Fixed(0.5, "half of the epochs"),
    "clusters.mu": Fixed(None, "clusters beside the GCN brought nothing on two sets"),
    "clusters.min_samples": Fixed(4, AUTHORS),
    "clusters.k1": Fixed(30, AUTHORS),
    "clusters.k2": Fixed(6, AUTHORS),
    "clusters.num_instances": Fixed(4, "a batch of 32; Cluster-Contrast has 16 in 256"),
    "clusters.temperature": Fixed(0.05, AUTHORS),
    "clusters.old_weight": Fixed(0.1, AUTHORS),
    "loss.alpha": Fixed(4.0, SEC_5_2),
    "loss.lambda_1": Fixed(0.2, SEC_5_2),
    "loss.lambda_2": Fixed(0.2, SEC_5_2),
    "train.lr_factor": Fixed(0.1, SEC_5_2),
    "train.momentum": Fixed(0.9, SEC_5_2),
    "train.nesterov": FixedInTraining(False, SEC_5_2),
    "train.weight_decay": Fixed(5e-4, "MLCReID's value"),
    "train.channels_last": Gone("weights and maps always have the channels innermost"),
    "train.compile": Gone("it was never faster where it was tried"),
    "train.cuda_graphs": Gone("passes are no longer recorded"),
    "train.cudnn_benchmark": Gone("on a GPU cuDNN always tries its kernels out on training batches"),
    "train.checkpoint_steps": Gone("train.checkpoint_seconds is the one clock"),
    "eval.rerank": Gone("mprd evaluate RUN --rerank"),
    "eval.standardise": Gone(NO_STANDARDIZING),
    "eval.memory_mb": Gone("blocks take 256 MB, and the results do not depend on it"),
}

GONE_VALUES = [("pairs.labeller", "jaccard"), ("pairs.labeller", "list_overlap")]
"""Values that no setting has any more."""

GONE_IN_TRAINING = [
    ("data.camera_style", "colour", "none"),
    ("neighbors.search", "hnsw", "exact"),
    ("neighbors.search", "sharded", "exact"),
    ("neighbors.source", "clean", "mean"),
    ("train.optimizer", "nesterov", "sgd"),
]
"""The same for settings that training alone reads, with the value that their run folders are read with."""


def tell_old(name: str) -> str | None:
    """Return why a setting's dotted name is refused; None where no version had it."""
    return OLD[name].tell(name) if name in OLD else None


def upgrade(settings: Nested) -> Nested:
    """Return nested settings of a run folder under today's names.

    Raises UserError where a setting that is now fixed had another value.
    """
    settings = deepcopy(settings)
    for name, value in GONE_VALUES:
        if get(settings, name) == value:
            raise UserError(f"{name}: {value} is gone; {REMEDY}")
    for name, value, other in GONE_IN_TRAINING:
        if get(settings, name) == value:
            put(settings, name, other)
    if get(settings, "data.cache") in ("ram", "device"):
        put(settings, "data.cache", "auto")
    if get(settings, "pairs.refresh") == "batch" and get(settings, "pairs.labeller") in ("reciprocal", "dbscan"):
        # it did not say that all images are labeled at once
        put(settings, "pairs.refresh", "auto")
    is_drawn = get(settings, "data.dataset", "synthetic") == "synthetic"
    for name, rule in OLD.items():
        value = get(settings, name, settings)
        if value is settings:
            continue
        pop(settings, name)
        if is_drawn or not name.startswith("data.synthetic."):
            rule.move(name, value, settings)
    return settings


def check_resumable(settings: Nested) -> None:
    """Raise UserError where a run folder's settings train in a way that is gone."""
    remedy = REMEDY.replace("read", "resume", 1)
    for name, value, _ in GONE_IN_TRAINING:
        if get(settings, name) == value:
            raise UserError(f"{name}: {value} is gone; {remedy}")
    labeller = get(settings, "pairs.labeller", "gcn")
    for name, rule in OLD.items():
        if isinstance(rule, FixedInTraining) and rule.labeller in (None, labeller):
            value = get(settings, name, rule.value)
            if value != rule.value:
                raise UserError(f"{rule.tell(name)}, but this run has {show(value)}; {remedy}")


def upgrade_dotted(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings under dotted names, such as those of a study's point, under today's names."""
    return flatten(upgrade(nest(settings)))


def show(value: Any) -> str:
    """Write a value as `--set` takes it."""
    return json.dumps(value, default=str)
