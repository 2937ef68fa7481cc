"""The settings of one run: frozen, validated, the paper's values as defaults.

Each field's docstring gives its meaning and, where there is one, its place in the paper.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator

from mprd.storage.places import local_path, place_of

Preset = Literal[
    "demo",
    "bench",
    "recommended",
    "paper",
    "market1501",
    "dukemtmcreid",
    "msmt17",
    "luperson",
    "luperson_vit",
    "clip",
]
Labeller = Literal["gcn", "reciprocal", "knn", "ss", "mplp", "mlcr", "dbscan", "supervised", "single"]
Share = Annotated[float, Field(ge=0, le=1)]
Place = Annotated[
    Path,
    BeforeValidator(lambda value: local_path(value) if isinstance(value, str | Path) else value),
    PlainSerializer(place_of, when_used="json"),
]
"""A path; of a URL it is that of the working copy, and files hold the URL, of which each machine has its own copy."""

THRESHOLDS: dict[Labeller, float] = {"ss": 0.6, "mplp": 0.6, "mlcr": 0.6, "reciprocal": 0.4}
"""`pairs.threshold` if not set: of a cosine (`ss`: Sec. 5.3; `mplp`, `mlcr`: MLCReID's t), or a k-reciprocal
similarity."""


class Section(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _tilde_is_home(cls, value: object) -> object:
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


class SyntheticConfig(Section):
    """Drawn pedestrians, the data set if no folder is given."""

    num_train_ids: int = Field(80, ge=1)
    """Identities in the training half."""
    num_test_ids: int = Field(80, ge=1)
    """Identities in query and gallery, none of them in training."""
    num_cameras: int = Field(5, ge=1, le=32)
    """Cameras, each with its own color, light, background, blur and noise."""
    images_per_camera: int = Field(5, ge=1)
    """Most images of an identity under one camera."""


class DataConfig(Section):
    """Which images, and how they reach the network (Sec. 5.1, 5.2)."""

    dataset: Literal["auto", "synthetic", "market1501", "dukemtmcreid", "msmt17", "folder", "list"] = "synthetic"
    """The layout to read; `auto` recognizes it as `mprd doctor` does, `folder` is any tree of crops, `list` a CSV."""
    root: Place | None = None
    """Folder of the data set, or a CSV `file,split,identity,camera`; none only with `synthetic`."""
    train: str | None = None
    """Folder of the training images below `data.root`, `.` for all of it; none: by the names of the folders."""
    query: str | None = None
    """Folder of the query images below `data.root`; none: by the names of the folders."""
    gallery: str | None = None
    """Folder of the gallery images below `data.root`; none: by the names of the folders."""
    name_pattern: str = r"(?P<pid>-?\d+)_c(?P<camid>\d+)"
    """Regular expression for `folder`: named groups `pid` and `camid`, both optional."""
    height: int = Field(256, ge=16)
    """Height in pixels that an image is resized to (Sec. 5.2)."""
    width: int = Field(128, ge=8)
    """Width in pixels that an image is resized to (Sec. 5.2)."""
    augmentation: Literal["standard", "small"] = "standard"
    """Strength of crop, rotation, color jitter and erasing: MLCReID's (Sec. 5.2), or one for small images."""
    camera_style: Literal["camstyle", "none"] = "camstyle"
    """Camera style transfer by CamStyle files, where they are found, or none (Sec. 5.2, MPRD#)."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """An unreadable image stops the run, named, or is left out and counted."""
    on_changed: Literal["stop", "continue"] = "stop"
    """A resumed run whose training images have changed stops, or goes on with memory rows that follow their names."""
    compare: Literal["times", "content"] = "times"
    """How a resumed run compares its training images: by name, size and time, or name and content (reads all files)."""
    num_workers: int = Field(1, ge=0)
    """Processes that decode and augment, at most one per core; 0 does it in the training process."""
    cache: Literal["auto", "none"] = "auto"
    """`auto`: decode images once into a file that is mapped into memory, if that takes at most half of the memory, and
    copy it to the accelerator if that takes at most a quarter of its free memory."""
    max_images: int | None = Field(None, ge=2)
    """Use about this many training images, and as many of query and gallery, as whole identities where these are known;
    for trial runs (`--smoke`)."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The drawn pedestrians."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.height, self.width

    @model_validator(mode="after")
    def _root_is_given(self) -> DataConfig:
        if self.dataset != "synthetic" and self.root is None:
            what = "these settings need" if self.dataset == "auto" else f"the data set {self.dataset} needs"
            raise ValueError(f"data.root: {what} a folder; give --data ROOT")
        return self


class BackboneConfig(Section):
    """F: image to feature (Sec. 3.1, 5.2)."""

    name: str = "resnet50"
    """Network up to its last feature map: `resnet50`, `resnet34`, `resnet18`, `mobilenet_v2`, `small` (4 layers, for
    small images), or `timm:NAME` (extra `timm`); docs/backbones.md has more."""
    weights: str = "imagenet"
    """`imagenet` or `pretrained`, what torchvision or timm publishes for the network; `none`; or a file."""
    pixels: Literal["auto", "imagenet", "half", "clip", "lup", "lup_nl"] = "auto"
    """Mean and standard deviation of pixels that the weights expect; `auto`: by the file, or its network."""
    freeze_patches: bool = False
    """Freeze the patch projection of a ViT."""
    last_stride: Literal[1, 2] = 1
    """Stride of the last stage, of torchvision's networks; 1 gives a 16 x 8 map at 256 x 128."""
    pool: Literal["auto", "mean", "gem", "token", "clip"] = "auto"
    """Pooling of the last map: `mean`, `gem` (generalized mean), `token` (class token), `clip` (class token and its
    projection); `auto` is the class token where there is one, else the mean."""
    num_stripes: int = Field(1, ge=1, le=16)
    """Horizontal stripes pooled separately; 1 is the paper's global pooling."""
    camera_bn: bool = False
    """Normalize by camera: batches of one camera, and statistics of clean images of each, renewed after each epoch."""
    bn_group: int = Field(0, ge=0)
    """Images per batch-norm group in training, whatever the number of workers; 0: the whole batch."""

    @field_validator("weights")
    @classmethod
    def _file_may_be_at_home(cls, weights: str) -> str:
        return os.path.expanduser(weights)

    @model_validator(mode="after")
    def _group_has_a_variance(self) -> BackboneConfig:
        if self.bn_group == 1:
            raise ValueError("backbone.bn_group must be 0 or at least 2: one image has no variance")
        return self


class MemoryConfig(Section):
    """The feature memory M (Eq. 1)."""

    update: Literal["before", "after"] = "after"
    """When a batch enters: before its labels and loss (Alg. 1 line 9) or after its loss."""


class NeighborsConfig(Section):
    """NN_k, the candidates of a label (Sec. 4.1, 5.2)."""

    k: int = Field(8, ge=1)
    """Least number of neighbors (Sec. 5.2)."""
    similarity: float = Field(0.6, ge=-1, le=1)
    """Cosine above which an image is a neighbor beyond the first k (Sec. 5.2)."""
    k_max: int = Field(64, ge=1)
    """Most neighbors; lists that it cuts are counted and logged."""
    whitening: bool = False
    """Whiten features by the differences of the surest pseudo pairs (of highest J), fitted once an epoch, before
    comparing them: for lists, rules, clusters and the GCN."""
    source: Literal["memory", "mean"] = "memory"
    """Lists from the memory (Alg. 1), or from the mean of it and features extracted without augmentation each epoch."""
    search: Literal["exact", "ivf"] = "exact"
    """How all lists of an epoch are searched: exactly, or through faiss' inverted file (`ivf`; the pairs of J as well).
    A batch's own lists are always exact."""

    @model_validator(mode="after")
    def _k_fits(self) -> NeighborsConfig:
        if self.k_max < self.k:
            raise ValueError(f"neighbors.k_max must be at least neighbors.k = {self.k}, but got {self.k_max}")
        return self


class SubgraphsConfig(Section):
    """Where the pair graphs (Eq. 4) of a GCN epoch and of a labeling pass over all images are built."""

    executor: Literal["auto", "serial", "ray"] = "auto"
    """The training process, Ray Data actors, or the faster by a timed sample. The graphs are the same."""
    num_actors: int = Field(2, ge=1)
    """Ray actors beside each worker, of one logical CPU each."""


class GcnConfig(Section):
    """G: the neighborhood of a pair to a likelihood (Sec. 3.2, 5.2)."""

    sources: Literal["both", "unlabelled", "meta"] = "both"
    """Which pairs train it (Eq. 10): `meta` alone is "MPRD w/o"."""
    learning_rate: float = Field(0.001, gt=0)
    """beta_2 (Eq. 9)."""
    batch_size: int = Field(32, ge=2)
    """n': half of the anchors unlabeled, half labeled (Sec. 4.2)."""


class PairsConfig(Section):
    """P_i and N_i*: which pairs train the CNN (Eq. 3, Eq. 7, Tables 1 and 2)."""

    labeller: Labeller = "gcn"
    """The GCN, a rule of Tables 1 and 2 (`mlcr`: MPLP's labels under the MMCL loss), Cluster-Contrast (`dbscan`), or
    J, the k-reciprocal similarity, without a network (`reciprocal`)."""
    mu: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Likelihood above which a pair is positive (Eq. 7)."""
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Score above which a pair is positive under `ss`, `mplp`, `mlcr` (default 0.6) and `reciprocal` (0.4)."""
    limit: bool = False
    """Bound the positives under an image's own camera, and under the others, by what labeled images have, where labeled
    identities are complete (`meta.all_listed`). For `gcn` and `reciprocal`."""
    refresh: Literal["auto", "batch", "epoch"] = "auto"
    """Neighbors and P_i anew for each batch (Alg. 1) or once an epoch; `auto`: once an epoch where all images are
    labeled at once, else for each batch."""
    relabel_meta: bool = False
    """Give labeled images their true labels: MLCR(+5id) of Table 2. With the paper's rules alone."""

    @model_validator(mode="after")
    def _parts_agree(self) -> PairsConfig:
        if self.refresh == "batch" and self.labels_all_at_once:
            raise ValueError(
                f"pairs.labeller: {self.labeller} labels all images at once, so pairs.refresh must not be batch: use "
                "epoch"
            )
        if self.threshold is not None and self.labeller not in THRESHOLDS:
            known = ", ".join(THRESHOLDS)
            raise ValueError(f"pairs.threshold is for the labellers {known}, but pairs.labeller is {self.labeller}")
        return self

    @property
    def labels_all_at_once(self) -> bool:
        """Whether P_i of one image depends on the labels of all."""
        return self.labeller in ("reciprocal", "dbscan")

    @property
    def is_once_an_epoch(self) -> bool:
        """Whether P of all images is written before an epoch's first step and kept until its last."""
        return self.refresh == "epoch" or self.labels_all_at_once

    def threshold_of(self, labeller: Labeller) -> float:
        """Return what a pair's score must exceed under a labeller other than the GCN."""
        is_set = self.threshold is not None and labeller == self.labeller
        return self.threshold if is_set and self.threshold is not None else THRESHOLDS[labeller]


class EtaConfig(Section):
    """eta, falling monotonically from 1 in the first epoch (Eq. 10)."""

    kind: Literal["linear", "cosine", "step", "exponential", "constant"] = "linear"
    """Shape of the fall; `step` falls after half of the epochs."""
    end: Share = 0.1
    """Value in the last epoch; `constant` ignores it."""

    @model_validator(mode="after")
    def _falls(self) -> EtaConfig:
        if self.kind == "exponential" and self.end <= 0:
            raise ValueError("meta.eta.end must be above 0 for the exponential schedule")
        return self


class MetaConfig(Section):
    """Z, the few labeled identities that jump-start the GCN (Sec. 4.2)."""

    num_ids: int = Field(5, ge=0)
    """M (Sec. 4.2); 0 is MPRD(0id)."""
    labels: Place | None = None
    """CSV `file,identity` of labeled training images, paths absolute or below data.root; without it identities are
    those of file names."""
    all_listed: bool = False
    """The file lists every training image of its identities, as `pairs.limit` and the length of J's lists need."""
    eta: EtaConfig = EtaConfig()
    """Weight of the meta gradient (Eq. 10)."""

    @property
    def is_whole(self) -> bool:
        """Whether Z is known to hold all training images of its identities, and any."""
        return self.num_ids > 0 and (self.labels is None or self.all_listed)


class ClustersConfig(Section):
    """DBSCAN, for the Cluster-Contrast baseline (`pairs.labeller: dbscan`)."""

    eps: float = Field(0.6, gt=0, lt=1)
    """Jaccard distance within which images are neighbors for DBSCAN; Cluster-Contrast's value."""


class LossConfig(Section):
    """Binomial deviance (Eq. 2), and the r that it shares with MMCL."""

    delta: float = Field(5.0, gt=0)
    """Weight of the positive pairs (Eq. 2)."""
    r: float = Field(0.01, gt=0)
    """Hard negatives (Eq. 3): below 1 a share of the negatives, from 1 on their number."""


class TrainConfig(Section):
    """The alternating loop (Alg. 1, Sec. 5.2)."""

    epochs: int = Field(40, ge=1)
    """T (Alg. 1)."""
    batch_size: int = Field(32, ge=2)
    """n, images per step (Sec. 5.2); batches of an epoch differ in size by at most one."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum is the paper's (Sec. 5.2)."""
    lr_backbone: float = Field(0.01, gt=0)
    """beta_1 of the pre-trained layers (Eq. 8)."""
    lr_new: float = Field(0.1, gt=0)
    """beta_1 of all other layers (Eq. 8)."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Rate of a pre-trained layer over that of the layer above it, for ViTs; 1: the same for all."""
    lr_step: int = Field(20, ge=1)
    """Epochs after which the learning rates are divided by 10 (Sec. 5.2)."""
    warmup_epochs: int = Field(0, ge=0)
    """First epochs with the labeller `single`, before the configured one."""
    seed: int = Field(0, ge=0)
    """Seed of weights, order, augmentation and meta identities."""
    tracker: Literal["none", "wandb", "mlflow"] = "none"
    """Where metrics go beside TensorBoard (extras `wandb`, `mlflow`)."""
    tracker_group: str | None = None
    """Group of the run there (a tag in MLflow); trials have their study's name."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0: its own choice, up to the number of cores. Extraction also uses the cores of idle
    loaders."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the network up to its last map; pooling, features, memory, labels and losses stay float32.
    `bf16` pays on a GPU, and on a CPU with amx_bf16 or avx512_bf16 alone."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Seconds between checkpoints within an epoch; 0: none. Each epoch ends with one."""
    max_restarts: int = Field(3, ge=0)
    """Under Ray: restarts after lost processes, counted since the last checkpoint."""


class EvalConfig(Section):
    """Query against gallery (Sec. 5.1)."""

    every: int = Field(1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    batch_size: int = Field(64, ge=1)
    """Images per forward pass."""


class Config(Section):
    """All settings of one run."""

    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    memory: MemoryConfig = MemoryConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    subgraphs: SubgraphsConfig = SubgraphsConfig()
    gcn: GcnConfig = GcnConfig()
    pairs: PairsConfig = PairsConfig()
    meta: MetaConfig = MetaConfig()
    clusters: ClustersConfig = ClustersConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def searches_live(self) -> bool:
        """Whether lists are searched batch by batch, in the memory as it moves (Alg. 1)."""
        return not self.pairs.is_once_an_epoch and self.neighbors.source == "memory"

    @property
    def num_actors(self) -> int:
        """The logical CPUs that each training worker needs in addition to its own."""
        return self.subgraphs.num_actors if self.subgraphs.executor == "ray" else 0

    @property
    def uses_meta(self) -> bool:
        """Whether anything reads the labeled images."""
        judges_pairs = self.neighbors.whitening
        return self.pairs.labeller == "gcn" or self.pairs.relabel_meta or self.limits_positives or judges_pairs

    @property
    def limits_positives(self) -> bool:
        """Whether labeled images tell how many positives an image has at most."""
        return self.pairs.limit and self.meta.is_whole and self.pairs.labeller in ("gcn", "reciprocal")

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        if self.pairs.relabel_meta and self.pairs.labeller in ("gcn", "reciprocal", "dbscan", "single"):
            raise ValueError(f"pairs.relabel_meta: with {self.pairs.labeller} the labels of Z never reach the CNN")
        if self.pairs.labeller == "gcn" and self.gcn.sources == "meta" and self.meta.num_ids == 0:
            raise ValueError("gcn.sources: meta pairs need meta.num_ids of at least 1")
        # it needs a pass over all images, which no batch can afford
        if self.neighbors.whitening and self.searches_live:
            raise ValueError("neighbors.whitening needs pairs.refresh=epoch or neighbors.source=mean")
        return self
