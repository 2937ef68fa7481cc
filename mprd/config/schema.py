"""The settings of one run: frozen, validated, the paper's values as defaults.

Every field's docstring gives its meaning and, where there is one, its place in the paper.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Preset = Literal["demo", "bench", "recommended", "market1501", "dukemtmcreid", "msmt17"]
ListSource = Literal["memory", "clean", "mean"]
Labeller = Literal["gcn", "jaccard", "reciprocal", "knn", "ss", "mplp", "mlcr", "dbscan", "supervised", "single"]
Decision = Literal["likelihood", "agreement"]
Extra = Literal["reranked", "standardised"]
"""What the field does after the network: shown beside the headline, never as it."""
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SyntheticConfig(Section):
    """The drawn pedestrians that stand in where no data set is given."""

    num_train_ids: int = Field(80, ge=1)
    """Identities in the training half."""
    num_test_ids: int = Field(80, ge=1)
    """Identities in query and gallery, none of them in training."""
    num_cameras: int = Field(5, ge=1, le=32)
    """Cameras, each with its own colour, light, background, blur and noise."""
    images_per_camera: int = Field(5, ge=1)
    """At most so many images of an identity under one camera."""
    lookalike_share: Share = 0.5
    """Share of the identities that are dressed like an earlier one."""
    camera_gap: float = Field(1.0, ge=0, le=3)
    """How far the cameras' colours lie apart; 0 makes them alike."""
    seed: int = Field(0, ge=0)
    """Seed of the drawing, independent of the run's seed."""


class DataConfig(Section):
    """Which images, and how they reach the network (Sec. 5.1, 5.2)."""

    dataset: Literal["synthetic", "market1501", "dukemtmcreid", "msmt17", "folder"] = "synthetic"
    """The layout to read; `folder` is any tree of crops."""
    root: Path | None = None
    """Folder of the data set; none only with `synthetic`."""
    name_pattern: str = r"(?P<pid>-?\d+)_c(?P<camid>\d+)"
    """Regular expression for `folder`: named groups `pid` and `camid`, both optional."""
    height: int = Field(256, ge=16)
    """Height in pixels that an image is resized to (Sec. 5.2)."""
    width: int = Field(128, ge=8)
    """Width in pixels that an image is resized to (Sec. 5.2)."""
    camera_style: Literal["camstyle", "colour", "none"] = "camstyle"
    """Camera style transfer: CamStyle files, per-camera colour statistics, or none (Sec. 5.2, MPRD#)."""
    colour_jitter: float = Field(0.2, ge=0, lt=1)
    """Range of brightness, contrast and saturation, as a share (Sec. 5.2)."""
    rotation: float = Field(10.0, ge=0, le=90)
    """Largest random rotation in degrees (Sec. 5.2)."""
    crop_area: tuple[Share, Share] = (0.64, 1.0)
    """Range of the random crop's share of the area (Sec. 5.2)."""
    erasing_probability: Share = 0.5
    """Probability of random erasing (Sec. 5.2)."""
    erasing_area: tuple[Share, Share] = (0.02, 0.2)
    """Range of the erased share of the area."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an unreadable image does: stop with its name, or be left out and counted."""
    num_workers: int = Field(1, ge=0)
    """Processes that decode and augment, at most one a core; 0 does it in the training process."""
    cache: Literal["auto", "ram", "device", "none"] = "auto"
    """Decoded images, packed on disk once and mapped into memory: `ram` leaves them there, `device` copies them to
    the accelerator, `auto` copies what takes a quarter of its free memory and packs what half of the RAM holds."""
    augment: Literal["auto", "image", "batch"] = "auto"
    """One image at a time in the loader's processes, or a batch at once on the device, which needs the cache; `auto`
    is `batch` on an accelerator, and for test images. Same numbers drawn; a level's difference in few pixels."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The drawn pedestrians."""

    @model_validator(mode="after")
    def _root_is_given(self) -> DataConfig:
        if self.dataset != "synthetic" and self.root is None:
            raise ValueError(f"data.root: the data set {self.dataset} needs a folder; give --data ROOT")
        return self


class BackboneConfig(Section):
    """F: image to feature (Sec. 3.1, 5.2)."""

    name: Literal["resnet50", "resnet34", "resnet18", "mobilenet_v2", "small"] = "resnet50"
    """Network up to its last feature map; `small` is a 4-layer ResNet for small images."""
    weights: str = "imagenet"
    """`imagenet` (torchvision), `none`, or the path of a state dict."""
    last_stride: Literal[1, 2] = 1
    """Stride of the last stage; 1 gives a 16 x 8 map at 256 x 128."""
    num_stripes: int = Field(1, ge=1, le=16)
    """Horizontal stripes that are pooled apart; 1 is the paper's global pooling."""
    bn_bias: bool = True
    """Whether the bias of the appended batch normalization is trained."""
    recalibrate_bn: bool = False
    """Re-estimate all batch-norm statistics on the training images before the first epoch."""
    freeze_bn: bool = False
    """Keep the backbone's own batch norms at their stored statistics while training."""
    bn_group: int = Field(0, ge=0)
    """Images whose statistics a batch norm takes together in training, on any number of workers; 0: the whole batch."""

    @model_validator(mode="after")
    def _group_has_a_variance(self) -> BackboneConfig:
        if self.bn_group == 1:
            raise ValueError("backbone.bn_group must be 0 or at least 2: one image has no variance")
        return self


class MemoryConfig(Section):
    """The feature memory M (Eq. 1)."""

    update: Literal["before", "after"] = "after"
    """When a batch enters: before its labels and loss (Alg. 1 line 9) or after its loss."""
    gamma_start: Share = 1.0
    """Weight of the new feature in the first epoch (Sec. 5.2)."""
    gamma_end: Share = 0.5
    """Weight of the new feature in the last epoch (Sec. 5.2)."""
    start_mode: Literal["eval", "train"] = "eval"
    """Batch-norm mode of the extraction that fills the memory; `train` suits random weights."""


class NeighborsConfig(Section):
    """NN_k, the candidates of a label (Sec. 4.1, 5.2)."""

    k: int = Field(8, ge=1)
    """Least number of neighbors (Sec. 5.2)."""
    similarity: float = Field(0.6, ge=-1, le=1)
    """Cosine above which an image is a neighbor beyond the first k (Sec. 5.2)."""
    k_max: int = Field(64, ge=1)
    """Most neighbors; how often it cuts is counted and logged."""
    metric: Literal["cosine", "csls", "camera"] = "cosine"
    """Similarity that orders the lists: cosine, or corrected for local density over all images or in each camera."""
    density_k: int | None = Field(None, ge=1)
    """Nearest images, of all (`csls`: 8) or of each camera (`camera`: 5), whose mean cosine is the local density."""
    standardise: bool = False
    """Standardise features within each camera before they are compared: for lists, by the rules, for clusters."""
    source: ListSource = "memory"
    """Lists from the memory (Alg. 1), features extracted without augmentation each epoch, or the mean of both."""
    search: Literal["exact", "ivf", "hnsw"] = "exact"
    """How all lists of an epoch are searched; a faiss index logs its recall. A batch's own lists are always exact."""
    num_shards: int = Field(0, ge=0)
    """Ray actors that hold the rows for an exact search of all lists; 0 searches in the training process."""
    memory_mb: int = Field(256, ge=1)
    """Memory that the similarities of some rows to all images may take; metrics other than cosine take three times."""

    @model_validator(mode="after")
    def _k_fits(self) -> NeighborsConfig:
        if self.k_max < self.k:
            raise ValueError(f"neighbors.k_max must be at least neighbors.k = {self.k}, but got {self.k_max}")
        return self

    @model_validator(mode="after")
    def _search_fits(self) -> NeighborsConfig:
        if self.metric != "cosine" and (self.search != "exact" or self.num_shards > 0):
            raise ValueError(f"neighbors.metric: {self.metric} needs neighbors.search=exact and neighbors.num_shards=0")
        if self.search != "exact" and self.num_shards > 0:
            raise ValueError(f"neighbors.num_shards: shards are searched exactly, never with {self.search}")
        return self


class SubgraphsConfig(Section):
    """Who builds the pair graphs (Eq. 4) of a GCN epoch and of a labelling pass over all images."""

    executor: Literal["auto", "serial", "ray"] = "auto"
    """The training process, actors of Ray Data, or the faster by a timed sample. The graphs are the same."""
    num_actors: int = Field(2, ge=1)
    """Ray Data actors beside each worker; each takes one logical CPU. `auto` makes do with fewer."""


class GcnConfig(Section):
    """G: the neighborhood of a pair to a likelihood (Sec. 3.2, 5.2)."""

    variant: Literal["paper", "structure", "reciprocal"] = "paper"
    """Node inputs: `paper` is feature and DRNL; `structure` is DRNL and the cosines to both ends, to which
    `reciprocal` adds the k-reciprocal similarities."""
    link: Literal["keep", "drop"] = "keep"
    """The direct edge i-j: Eq. 4 to the letter keeps it, SEAL drops it."""
    read_out: Literal["pooled", "scalars", "both"] = "pooled"
    """What the last layers see: the pooled graph (Sec. 3.2), cosine and overlap of the pair alone, or both."""
    hidden: int = Field(64, ge=1)
    """Width of the two graph convolutions."""
    conv_channels: int = Field(4, ge=1)
    """Channels of the 1-D convolution over the pooled vector."""
    mlp_hidden: int = Field(64, ge=1)
    """Width between the two fully connected layers."""
    sources: Literal["both", "unlabelled", "meta"] = "both"
    """Whose pairs train it (Eq. 10): `meta` alone is "MPRD w/o"."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD is the paper's (Sec. 5.2)."""
    learning_rate: float = Field(0.001, gt=0)
    """beta_2 (Eq. 9)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD (Sec. 5.2)."""
    weight_decay: float = Field(5e-4, ge=0)
    """Not stated in the paper; MLCReID's value."""
    batch_size: int = Field(32, ge=2)
    """n': half of the anchors unlabelled, half labeled (Sec. 4.2)."""
    passes: int = Field(1, ge=1)
    """Passes over the training images in a GCN epoch (Alg. 1 lines 3-7: one)."""


class PairsConfig(Section):
    """P_i and N_i*: which pairs train the CNN (Eq. 3, Eq. 7, Tables 1 and 2)."""

    labeller: Labeller = "gcn"
    """Who says which pairs are positive; `mlcr`: MPLP's labels under the MMCL loss, `dbscan`: Cluster-Contrast."""
    mu: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Likelihood above which a pair is positive (Eq. 7)."""
    decide: Decision = "likelihood"
    """What must exceed `mu`, or `jaccard`: what is said of the pair (Eq. 7), or how far both images agree in what is
    said of them and all others, which labels all images at once, `refresh` or not."""
    limit: bool = False
    """At most as many positives under an image's own camera, and under the others, as any labeled image has; where
    labeled identities are whole (`meta.all_listed`). For `gcn` and the controls `jaccard` and `reciprocal`."""
    refresh: Literal["batch", "epoch"] = "batch"
    """Neighbors and P_i anew for each batch (Alg. 1) or once an epoch."""
    knn_k: int = Field(8, ge=1)
    """K of the `knn` labeller (Sec. 5.3)."""
    ss_similarity: float = Field(0.6, ge=-1, le=1)
    """Threshold of the `ss` labeller (Sec. 5.3)."""
    mplp_t: float = Field(0.6, ge=-1, le=1)
    """Threshold t of the `mplp` and `mlcr` labellers."""
    jaccard: Share = 0.3
    """Overlap of the lists of i and j above which the `jaccard` labeller, a control, takes a candidate."""
    reciprocal: Share = 0.4
    """k-reciprocal Jaccard similarity above which the `reciprocal` labeller, a control, takes any image."""
    relabel_meta: bool = False
    """Give labeled images their true labels: MLCR(+5id) of Table 2. With the paper's rules alone."""

    @property
    def judges_candidates(self) -> bool:
        """Whether the labeller looks at NN_k, rather than at similarities alone."""
        return self.labeller in ("gcn", "jaccard")

    @property
    def is_once_an_epoch(self) -> bool:
        """Whether P of all images is written before an epoch's first step, and stands until its last."""
        agrees = self.judges_candidates and self.decide == "agreement"
        return self.refresh == "epoch" or agrees or self.labeller == "reciprocal"


class EtaConfig(Section):
    """eta, falling monotonically with the epoch (Eq. 10)."""

    kind: Literal["linear", "cosine", "step", "exponential", "constant"] = "linear"
    """Shape of the fall."""
    start: float = Field(1.0, ge=0)
    """Value in the first epoch (Eq. 10)."""
    end: float = Field(0.1, ge=0)
    """Value in the last epoch; `constant` ignores it."""
    step_epoch: Share = 0.5
    """For `step`: share of the epochs after which eta falls to its end value."""

    @model_validator(mode="after")
    def _falls(self) -> EtaConfig:
        if self.kind != "constant" and self.end > self.start:
            raise ValueError(f"meta.eta.end must not exceed meta.eta.start = {self.start}, but got {self.end}")
        if self.kind == "exponential" and self.end <= 0:
            raise ValueError("meta.eta.end must be above 0 for the exponential schedule")
        return self


class MetaConfig(Section):
    """Z, the few labeled identities that jump-start the GCN (Sec. 4.2)."""

    num_ids: int = Field(5, ge=0)
    """M (Sec. 4.2); 0 is MPRD(0id)."""
    labels: Path | None = None
    """CSV `file,identity` of labeled training images, paths below data.root; without it file names tell identities."""
    all_listed: bool = False
    """The file lists every training image of its identities, so that `pairs.limit` can go by it."""
    pairs: Literal["random", "candidates"] = "random"
    """Where labeled pairs come from (Sec. 4.2): the paper's random draws, or each image's own neighbors."""
    eta: EtaConfig = EtaConfig()
    """Weight of the meta gradient (Eq. 10)."""

    @property
    def is_whole(self) -> bool:
        """Whether Z is known to hold all training images of its identities, and any."""
        return self.num_ids > 0 and (self.labels is None or self.all_listed)


class ClustersConfig(Section):
    """DBSCAN, and Cluster-Contrast, the yardstick behind `pairs.labeller: dbscan`; its authors' values if not said."""

    mu: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Under `pairs.decide: agreement`, takes the place of `pairs.mu` within a cluster; none: no clusters."""
    eps: float = Field(0.6, gt=0, lt=1)
    """Jaccard distance within which images are neighbors for DBSCAN."""
    min_samples: int = Field(4, ge=1)
    """Neighbors that make an image the core of a cluster."""
    k1: int = Field(30, ge=1)
    """Length of the k-reciprocal lists behind the Jaccard distance."""
    k2: int = Field(6, ge=1)
    """Images over which those lists are averaged."""
    num_instances: int = Field(4, ge=1)
    """Images of a cluster in a batch; theirs is 16 of 256."""
    temperature: float = Field(0.05, gt=0)
    """Of InfoNCE."""
    old_weight: Share = 0.1
    """Weight of the old centroid when an image moves it."""


class LossConfig(Section):
    """Binomial deviance (Eq. 2), and the r that it shares with MMCL."""

    delta: float = Field(5.0, gt=0)
    """Weight of the positive pairs (Eq. 2)."""
    alpha: float = Field(4.0, gt=0)
    """Amplification (Eq. 2)."""
    lambda_1: float = Field(0.2, ge=-1, le=1)
    """Margin of the positive pairs (Eq. 2)."""
    lambda_2: float = Field(0.2, ge=-1, le=1)
    """Margin of the negative pairs (Eq. 2)."""
    r: float = Field(0.01, gt=0)
    """Hard negatives (Eq. 3): below 1 a share of the negatives, from 1 on their number."""


class TrainConfig(Section):
    """The alternating loop (Alg. 1, Sec. 5.2)."""

    epochs: int = Field(40, ge=1)
    """T (Alg. 1)."""
    batch_size: int = Field(32, ge=2)
    """n, images a step (Sec. 5.2); batches of an epoch differ in size by at most one."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD is the paper's (Sec. 5.2)."""
    lr_backbone: float = Field(0.01, gt=0)
    """beta_1 of the pre-trained layers (Eq. 8)."""
    lr_new: float = Field(0.1, gt=0)
    """beta_1 of all other layers (Eq. 8)."""
    lr_step: int = Field(20, ge=1)
    """Epochs after which the learning rates fall (Sec. 5.2)."""
    lr_factor: Share = 0.1
    """By what they are multiplied (Sec. 5.2)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD (Sec. 5.2)."""
    nesterov: bool = False
    """Nesterov's form of it."""
    weight_decay: float = Field(5e-4, ge=0)
    """Not stated in the paper; MLCReID's value."""
    warmup_epochs: int = Field(0, ge=0)
    """First epochs with the labeller `single`, before the GCN or another takes over."""
    seed: int = Field(0, ge=0)
    """Seed of weights, order, augmentation and meta identities."""
    tracker: Literal["none", "wandb", "mlflow"] = "none"
    """Where to send the figures beside TensorBoard (extras `wandb`, `mlflow`)."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0: its own choice, up to the cores there are. Extraction takes idle loaders' cores too."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the network up to its last map; pooling, features, memory, labels and losses stay float32.
    `bf16` pays on a GPU, and on a CPU with amx_bf16 or avx512_bf16 alone."""
    channels_last: bool = True
    """Keep weights and maps with the channels innermost, which most convolutions run faster on."""
    compile: bool = False
    """Compile the network up to its last map (torch.compile): minutes at the start, and other rounding."""
    cuda_graphs: bool = False
    """Launch training passes, the GCN's too, at once as CUDA graphs: a fast GPU waits for the host; for one worker."""
    cudnn_benchmark: bool = True
    """On a GPU, try out which kernels convolve a batch fastest; runs differ in last bits then, as sums there do."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Save when so many seconds have passed since the last save; 0 turns the clock off."""
    checkpoint_steps: int = Field(0, ge=0)
    """Save after so many steps; 0 turns the count off. Each epoch's end is always saved."""


class EvalConfig(Section):
    """Query against gallery (Sec. 5.1)."""

    every: int = Field(1, ge=1)
    """Evaluate after so many epochs, and after the last."""
    batch_size: int = Field(64, ge=1)
    """Images a forward pass."""
    rerank: bool = False
    """Also k-reciprocal re-ranking, in the final evaluation."""
    standardise: bool = False
    """Also by features standardised within each camera, in the final evaluation."""
    memory_mb: int = Field(512, ge=1)
    """Memory that a block of the distance matrix may take."""

    @property
    def extras(self) -> list[Extra]:
        """What the final evaluation shows beside the headline."""
        wanted: dict[Extra, bool] = {"reranked": self.rerank, "standardised": self.standardise}
        return [extra for extra, is_wanted in wanted.items() if is_wanted]


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
    def needs_cameras(self) -> str | None:
        """The setting that needs the images' cameras, where one does."""
        if self.neighbors.standardise:
            return "neighbors.standardise"
        draws_by_camera = self.neighbors.metric == "camera" and self.pairs.judges_candidates
        return "neighbors.metric: camera" if draws_by_camera else None

    @property
    def uses_meta(self) -> bool:
        """Whether anything learns from the labeled images."""
        return self.pairs.labeller == "gcn" or self.pairs.relabel_meta or self.limits_positives

    @property
    def limits_positives(self) -> bool:
        """Whether labeled images tell how many positives an image has at most."""
        return self.pairs.limit and self.meta.is_whole and self.pairs.labeller in ("gcn", "jaccard", "reciprocal")

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        if self.pairs.relabel_meta and self.pairs.labeller in ("gcn", "jaccard", "reciprocal", "dbscan"):
            raise ValueError(f"pairs.relabel_meta: with {self.pairs.labeller} the labels of Z never reach the CNN")
        if self.pairs.labeller == "gcn" and self.gcn.sources == "meta" and self.meta.num_ids == 0:
            raise ValueError("gcn.sources: meta pairs need meta.num_ids of at least 1")
        if self.clusters.mu and not (self.pairs.judges_candidates and self.pairs.decide == "agreement"):
            raise ValueError("clusters.mu needs pairs.labeller=gcn or jaccard, and pairs.decide=agreement")
        if self.train.cuda_graphs and (self.train.compile or self.backbone.bn_group):
            raise ValueError("train.cuda_graphs goes with neither train.compile nor backbone.bn_group")
        # these need a pass over all images, which no batch can afford
        of_all_images = {
            "neighbors.standardise": self.neighbors.standardise,
            f"neighbors.metric: {self.neighbors.metric}": self.neighbors.metric != "cosine",
            "gcn.variant: reciprocal": self.gcn.variant == "reciprocal",
        }
        for setting, is_asked in of_all_images.items():
            if is_asked and self.searches_live:
                raise ValueError(f"{setting} needs pairs.refresh=epoch or neighbors.source=clean or mean")
        return self
