"""Algorithm 1. `fit` is the loop; each phase and each step is a method of `Trainer`.

Every worker holds the whole memory, P and networks, and takes its shard of every batch; results are gathered in the
order of the batch, so the number of workers changes nothing. Memory, P and networks change in this folder alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mprd.backbone.features import extract, recalibrate, sharded_batches
from mprd.config.schema import Config, Labeller
from mprd.data.datasets import ReidDataset
from mprd.data.images import PlainImages, TrainImages
from mprd.data.same_images import record_images
from mprd.engine import schedules
from mprd.engine.callbacks import Callbacks, ignore
from mprd.engine.camera_groups import CameraGroups
from mprd.engine.continuing import follow_images
from mprd.engine.epoch_lists import EpochLists
from mprd.engine.gcn_inputs import GcnInputs
from mprd.engine.gcn_sampling import PairSources, StepPairs, draw_epoch
from mprd.engine.objectives import Objective, choose_objective
from mprd.engine.requirements import check_batches, check_requirements
from mprd.engine.state import TrainState, build_state
from mprd.engine.stats import EpochStats
from mprd.errors import NonFiniteLoss
from mprd.memory import FeatureMemory
from mprd.neighbors.lists import FrozenLists, LiveLists
from mprd.pairs.clusters import ClusterMemory, find_clusters
from mprd.pairs.labellers import Labels, PairLabeller, choose_labeller, gather_labels, label_all
from mprd.pairs.positives import choose_limit, choose_meta
from mprd.runtime.device import cudnn_benchmark
from mprd.runtime.distributed import BatchShard, WorkerGroup
from mprd.runtime.seeding import RngStream, generator
from mprd.runtime.spans import span, spanned
from mprd.subgraphs import SubgraphBatch, SubgraphBuilder, build_serially

CHECK_STEPS = 50
"""Steps between two looks of the host at the losses of an accelerator."""


def fit(trainer: Trainer) -> TrainState:
    """Train by Algorithm 1 from the state's position to the last epoch.

    Raises NonFiniteLoss before the step that a non-finite loss would spoil.
    """
    state = trainer.state
    while state.epoch < trainer.config.train.epochs:
        state.set_learning_rates(step=trainer.config.train.lr_step)
        if state.phase == "gcn":
            trainer.train_gcn_epoch()
            state.begin_phase("cnn")
        if state.phase == "cnn":
            trainer.train_cnn_epoch()
            state.begin_phase("evaluate")
        trainer.callbacks.after_epoch(trainer)
        trainer.begin_epoch(state.epoch + 1)
        trainer.callbacks.between_epochs(trainer)
    return state


class Trainer:
    """Settings, data and state of the loop."""

    def __init__(
        self,
        config: Config,
        dataset: ReidDataset,
        *,
        device: torch.device,
        callbacks: Callbacks = Callbacks(),
        build_subgraphs: SubgraphBuilder = build_serially,
        workers: WorkerGroup | None = None,
    ) -> None:
        """Build everything from the seed; the memory is still to be filled, or a checkpoint to be loaded.

        `build_subgraphs` builds the pair graphs of a GCN epoch, or of a labeling pass. Raises UserError where the data
        cannot be trained on under these settings.
        """
        self.config = config
        self.dataset = dataset
        self.device = device
        self.callbacks = callbacks
        self.build_subgraphs = build_subgraphs
        self.workers = workers or WorkerGroup()
        train = dataset.train
        self.train_images, self.perturbed_images = (
            TrainImages(
                train, config.data, style=dataset.style_paths, seed=config.train.seed, view=view, packs=dataset.packs
            )
            for view in ("train", "perturbed")
        )
        self.plain_images = PlainImages(train.paths, config.data, packs=dataset.packs)
        self.num_images = len(train)
        # files beside each other show one identity, whose batch statistics would be its own
        self.order = torch.randperm(self.num_images, generator=generator(config.train.seed, RngStream.ORDER))
        self.images = record_images(dataset, config.data)
        self.pids, self.camids = (
            None if ids is None else torch.as_tensor(ids, device=device) for ids in (train.pids, train.camids)
        )
        camids = self.camids if config.backbone.camera_bn else None
        self.groups = CameraGroups.of(camids, self.num_images, least=config.train.batch_size)
        check_requirements(config, dataset, self.groups, self.workers)
        self.state = build_state(config, num_images=self.num_images, device=device, workers=self.workers)
        self.state.meta = choose_meta(config, dataset, device)
        self.limit = choose_limit(config, self.state.meta, self.camids, self.num_images)
        self.stats = EpochStats()
        self.passes: dict[str, Any] = {
            "batch_size": config.eval.batch_size,
            "num_workers": config.data.num_workers,
            "device": device,
        }
        """How `extract` and `recalibrate` pass images through the network."""
        extract_all = partial(self.extract, self.plain_images)
        self.epoch_lists = EpochLists(config, self.state, self.camids, extract=extract_all)

    # -- position, and what depends on it ------------------------------------------------------------

    @property
    def labeller(self) -> Labeller:
        """The labeler of this epoch: `single` during the warm-up."""
        is_warm = self.state.epoch < self.config.train.warmup_epochs
        labeller = self.config.pairs.labeller
        return "single" if is_warm and labeller != "supervised" else labeller

    @property
    def gamma(self) -> float:
        """This epoch's weight of the new feature (Eq. 1)."""
        return schedules.gamma(self.state.epoch, self.config.train.epochs)

    @property
    def eta(self) -> float:
        """This epoch's weight of the meta gradient (Eq. 10)."""
        # the GCN's first epoch comes after the warm-up
        eta, warmup = self.config.meta.eta.model_dump(), self.config.train.warmup_epochs
        return schedules.eta(max(0, self.state.epoch - warmup), self.config.train.epochs - warmup, **eta)

    def begin_epoch(self, epoch: int) -> None:
        """Move to an epoch's first step, with empty statistics."""
        self.state.begin_epoch(epoch)
        self.stats = self.epoch_lists.begin_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Return state and statistics for a checkpoint; raise NonFiniteLoss where they are not worth keeping."""
        self.check_losses()
        own = {"stats": self.stats.state_dict(), "images": self.images.state_dict()}
        return {**self.state.state_dict(), **own, **self.dataset.cameras_of(self.dataset.train)}

    def load_state_dict(self, saved: dict[str, Any], *, path: Path) -> None:
        """Restore a checkpoint; raise UserError where it does not fit the settings or the data."""
        saved, unknown = follow_images(saved, self.images, path=path, on_changed=self.config.data.on_changed)
        self.state.load_state_dict(saved, path=path)
        # `tally` in older checkpoints
        self.stats = EpochStats.from_state_dict(saved["stats"] if "stats" in saved else saved["tally"])
        cameras = self.dataset.cameras_of(self.dataset.train)
        if any(saved.get(name, now) != now for name, now in cameras.items()):
            # statistics are in the order of the cameras of then
            self.state.similarity = None
            self.recalibrate()
        if len(unknown):
            self.state.memory.features[unknown] = self.extract(self.plain_images, ids=unknown)

    # -- features, memory, neighbor lists --------------------------------------------------------------

    def extract(self, images: Any, *, ids: Tensor | None = None, mode: str = "eval", **changed: Any) -> Tensor:
        """Return unit features `[n, D]` of training images, by `passes` with what is changed in them."""
        how = {"ids": ids, "cameras": self.camids, "mode": mode} | self.passes | changed
        with span("extraction"):
            return extract(self.state.backbone, images, **how)[0]

    def fill_memory(self) -> None:
        """Fill the memory with features of the initial backbone (zeros would make NN_k meaningless)."""
        self.recalibrate()
        # batch norms of random weights have no statistics yet
        is_new = self.config.backbone.weights == "none" and not self.config.backbone.camera_bn
        features = self.extract(self.plain_images, ids=self.order, mode="train" if is_new else "eval")
        self.state.memory = FeatureMemory(features[self.order.argsort()])

    def recalibrate(self) -> None:
        """Give the batch norms the statistics of clean images of each camera, under `backbone.camera_bn`."""
        if self.config.backbone.camera_bn:
            with span("extraction"):
                recalibrate(self.state.backbone, self.plain_images, self.groups.samples(self.order), **self.passes)

    def update_memory(self, ids: Tensor, features: Tensor) -> None:
        """Blend the features `[B, D]` of a global batch into M (Eq. 1)."""
        with span("memory"):
            self.state.memory.update(ids, features, gamma=self.gamma)

    def frozen_lists(self) -> FrozenLists:
        """Return the epoch's lists, from features that are fixed when lists are first needed."""
        return self.epoch_lists.get(self.stats)

    # -- the GCN's epoch: Alg. 1 lines 3-7 ---------------------------------------------------------------

    def train_gcn_epoch(self) -> None:
        """Train G on labeled pairs, F frozen; resumes behind `state.step`."""
        if self.labeller != "gcn":
            return
        state, timer = self.state, self.stats.timer("gcn_seconds")
        with span("GCN"):
            inputs = self.gcn_inputs()
            # memory and P are fixed in this phase, so a resumed epoch draws the same pairs
            steps = draw_epoch(
                self.pair_sources(inputs),
                batch_size=self.config.gcn.batch_size,
                seed=self.config.train.seed,
                epoch=state.epoch,
            )
            rest = steps[state.step :]
            own = [step.pairs[self.workers.shard(len(step)).own] for step in rest]
            pairs = torch.cat([*own, steps[0].pairs[:0]])
            stream = self.build_subgraphs(pairs, inputs.neighbor_ids, [*map(len, own)])
            for step, subgraphs in zip(rest, stream, strict=True):
                self.gcn_step(inputs, step, subgraphs)
                state.step += 1
                timer()
                self.callbacks.after_step(self, len(steps))

    def pair_sources(self, inputs: GcnInputs) -> PairSources:
        """Return what this epoch's GCN pairs are drawn from."""
        return PairSources(
            positives=self.state.positives,
            memory=self.state.memory.features,
            neighbor_ids=inputs.neighbor_ids[: self.num_images],
            perturbed=inputs.copies,
            meta=self.state.meta,
            use=self.config.gcn.sources,
            is_first=self.state.epoch == self.config.train.warmup_epochs,
            r=self.config.loss.r,
        )

    def gcn_inputs(self) -> GcnInputs:
        """Return features and lists of all images and of perturbed copies.

        Copied are images whose P_i is still {i}: at first all, the paper's "first iteration"; later those without a
        positive, which would otherwise give the GCN negatives alone.
        """
        state, lists = self.state, self.frozen_lists()
        with span("neighbors"):
            inputs = GcnInputs.of_images(lists)
        lonely = (state.positives.counts() == 1).nonzero().squeeze(1)
        if self.config.gcn.sources == "meta" or len(lonely) == 0:
            return inputs
        self.perturbed_images.set_epoch(state.epoch)
        perturbed = self.extract(self.perturbed_images, ids=lonely)
        with span("neighbors"):
            return inputs.with_copies(perturbed, lonely, lists)

    def gcn_step(self, inputs: GcnInputs, step: StepPairs, subgraphs: SubgraphBatch) -> None:
        """Take one step of Eq. 9 with the gradient of Eq. 10, given the graphs of this worker's shard of the pairs."""
        gcn, workers = self.state.gcn, self.workers
        own = gcn(inputs.features, subgraphs)
        # the whole loss on every worker, with gradients of its own pairs
        unlabelled, meta = step.losses(workers.join(own, workers.shard(len(step)).counts))
        loss = unlabelled + (self.eta if self.config.gcn.sources == "both" else 1.0) * meta
        whole = self.descend(gcn, self.state.gcn_optimizer, loss, part=loss / workers.size, name="GCN")
        self.stats.add("gcn_loss", whole)
        self.stats.add("gcn_steps", 1)

    # -- the CNN's epoch: Alg. 1 lines 8-12 --------------------------------------------------------------

    def train_cnn_epoch(self) -> None:
        """Train F on P and N*, G frozen; resumes behind `state.step`."""
        state, timer = self.state, self.stats.timer("cnn_seconds")
        if state.step == 0 and self.labeller == "dbscan":
            state.clusters = self.find_clusters()
        label = self.begin_labels(self.build_labeller())
        objective = choose_objective(self.config, state, self.camids, self.groups.batched())
        self.train_images.set_epoch(state.epoch)
        batches = objective.batches(generator(self.config.train.seed, RngStream.ORDER, state.epoch))
        check_batches("train.batch_size", batches, self.workers)
        state.backbone.train()
        split, num_workers = state.backbone.batch_split, self.config.data.num_workers
        rest = batches[state.step :]
        shown = sharded_batches(self.train_images, rest, split, num_workers=num_workers, device=self.device)
        with cudnn_benchmark():
            for images, ids in spanned("load", shown):
                self.cnn_step(images, ids, label, objective)
                state.step += 1
                timer()
                self.callbacks.after_step(self, len(batches))
        self.recalibrate()
        # the last step's weights have met no loss yet; two images are not worth the start of a loader
        if not self.extract(self.plain_images, ids=self.order[:2], num_workers=0).isfinite().all():
            raise self.non_finite("CNN", "no longer finite")
        timer()

    def find_clusters(self) -> ClusterMemory | None:
        """Cluster the images by clean features, as Cluster-Contrast does, which become the memory.

        Its batches leave outliers out, whose rows of the memory would otherwise be of earlier epochs.
        """
        lists = self.frozen_lists()
        self.state.memory = FeatureMemory(lists.source)
        return find_clusters(lists.source, lists.features, eps=self.config.clusters.eps)

    def cnn_step(
        self, images: Tensor, ids: Tensor, label: Callable[[Tensor, BatchShard], None], objective: Objective
    ) -> None:
        """Take one step of Alg. 1 lines 9-11 with this worker's images of the global batch `ids`."""
        state, updates_first = self.state, self.config.memory.update == "before"
        shard = state.backbone.batch_split.shard(len(ids))
        with span("network"):
            features = state.backbone(images)
        gathered = self.workers.gather(features, shard.counts)
        if updates_first:
            self.update_memory(ids, gathered)  # line 9, Eq. 1
        label(ids, shard)  # line 10, Eq. 7
        with span("loss"):
            loss = shard.weight * objective.loss(features, ids[shard.own])  # Eq. 2
        with span("network"):
            whole = self.descend(state.backbone, state.optimizer, loss, part=loss, name="CNN")  # line 11, Eq. 8
        if not updates_first:
            self.update_memory(ids, gathered)
        objective.update(gathered, ids)
        self.stats.add("cnn_loss", whole.double() * len(ids))
        self.stats.add("images", len(ids))

    def build_labeller(self) -> PairLabeller:
        """Return this epoch's labeler, on live lists where the settings search them batch by batch."""
        is_live = self.config.searches_live
        return choose_labeller(
            self.labeller,
            self.config,
            LiveLists(self.state.memory.features, self.config.neighbors) if is_live else self.frozen_lists(),
            gcn=self.state.gcn,
            pids=self.pids,
            meta=self.state.meta,
            clusters=self.state.clusters,
            limit=self.limit,
        )

    def begin_labels(self, labeller: PairLabeller) -> Callable[[Tensor, BatchShard], None]:
        """Write P of all images where it holds for the epoch; return what a step does for P of its batch."""
        if not self.config.pairs.is_once_an_epoch:
            return partial(self.label_batch, labeller)
        if self.state.step == 0:
            self.label_all(labeller)
        return ignore

    def label_all(self, labeller: PairLabeller) -> None:
        """Write P of all images from one state of the memory."""
        everyone = torch.arange(self.num_images, device=self.device)
        with span("labels"):
            for ids, labels in label_all(labeller, everyone, build=self.build_subgraphs, workers=self.workers):
                self.set_positives(ids, labels)

    def label_batch(self, labeller: PairLabeller, ids: Tensor, shard: BatchShard) -> None:
        """Write P_i of a batch; each worker labels its shard."""
        with span("labels"):
            self.set_positives(ids, gather_labels(labeller.label(ids[shard.own]), shard.counts, self.workers))

    def set_positives(self, ids: Tensor, labels: Labels) -> None:
        """Write P_i, and keep the scores of candidates for the epoch's statistics."""
        self.state.positives.set_rows(ids, labels.positives, labels.refused)
        if labels.candidates is not None:
            compared = self.state.memory.features if self.config.searches_live else self.frozen_lists().features
            self.stats.add_candidates(ids, labels, compared)

    # -- a step of either network ------------------------------------------------------------------------

    def descend(self, network: nn.Module, optimizer: Any, loss: Tensor, *, part: Tensor, name: str) -> Tensor:
        """Take one step down the loss; return the whole loss, the sum of all workers' `part`.

        On a CPU a non-finite loss raises NonFiniteLoss before the step. An accelerator skips the step by itself,
        without a sync; the next check raises, every CHECK_STEPS steps and before anything is saved.
        """
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        whole = self.workers.sum_gradients(network.parameters(), part)
        if whole.device.type == "cpu":
            if not torch.isfinite(whole):
                raise self.non_finite(name, float(whole))
        else:
            # NaN * 0 and inf * 0 are NaN
            optimizer.found_inf = (whole * 0 != 0).float()
            if self.state.step % CHECK_STEPS == 0:
                self.check_losses()
        optimizer.step()
        return whole

    def check_losses(self) -> None:
        """Raise NonFiniteLoss where a loss of this epoch was not finite; on an accelerator this syncs."""
        name = self.stats.non_finite_loss()
        if name is not None:
            raise self.non_finite(name, "not finite")

    def non_finite(self, name: str, value: float | str) -> NonFiniteLoss:
        """Return the error that names the loss and its place."""
        return NonFiniteLoss(name, value, epoch=self.state.epoch, step=self.state.step)
