"""Algorithm 1: `fit` says when, the two epochs in what order, the two steps how.

Every worker holds the same memory, P and networks and computes its shard of each batch; only this file changes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprd import losses
from mprd.backbone.features import extract, ordered_batches, sharded_batches
from mprd.backbone.network import recalibrate_bn
from mprd.config.schema import Config, Labeller
from mprd.data.camera_style import choose_style
from mprd.data.datasets import ReidDataset
from mprd.data.images import PlainImages, TrainImages
from mprd.engine import schedules
from mprd.engine.gcn_loss import GcnLoss, RecordedGcnLoss
from mprd.engine.gcn_pool import PairSources, draw_pool
from mprd.engine.requirements import check_requirements
from mprd.engine.state import TrainState, build_state, non_finite
from mprd.memory import FeatureMemory
from mprd.neighbors.approximate import NeighborSearch
from mprd.neighbors.exact import find_neighbors
from mprd.neighbors.lists import NeighborLists, list_features
from mprd.neighbors.reciprocal import SimilarityTable
from mprd.pairs import labellers
from mprd.pairs.clusters import balanced_batches, find_clusters
from mprd.pairs.labellers import CandidateLabeller, Labels, RuleLabeller, choose_labeller
from mprd.pairs.rules import PADDING, choose_limit, choose_meta
from mprd.runtime.device import cudnn_benchmark
from mprd.runtime.distributed import WorkerGroup
from mprd.runtime.seeding import RngStream, generator
from mprd.subgraphs import SubgraphBuilder, build_serially

CHECK_STEPS = 50
"""Steps after which the host looks at the losses of an accelerator."""


def ignore(*_: Any) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Hooks:
    """What happens outside the method: called by `fit`, and all optional."""

    after_step: Callable[[TrainState, int], None] = ignore
    """After each step, with the number of steps of the phase; may save, may raise Interrupted."""
    after_epoch: Callable[[Trainer], None] = ignore
    """After each epoch's training; evaluates and reports."""
    checkpoint: Callable[[TrainState], None] = ignore
    """Between two epochs; saves."""
    build_subgraphs: SubgraphBuilder = build_serially
    """Who builds the subgraphs of a GCN epoch and of a labelling pass over all images."""
    search_all: NeighborSearch = find_neighbors
    """Who searches the neighbors of all images."""


def fit(trainer: Trainer) -> TrainState:
    """Train by Algorithm 1 from where the state stands until the last epoch.

    Raises NonFiniteLoss before the step that it would have spoilt.
    """
    state = trainer.state
    while state.epoch < trainer.config.train.epochs:
        trainer.set_learning_rates()
        if state.phase == "gcn":
            trainer.train_gcn_epoch()
            state.phase, state.step = "cnn", 0
        if state.phase == "cnn":
            trainer.train_cnn_epoch()
            state.phase, state.step = "evaluate", 0
        trainer.hooks.after_epoch(trainer)
        state.begin_epoch(state.epoch + 1)
        trainer.hooks.checkpoint(state)
    return state


class Trainer:
    """The loop's settings, data and state."""

    def __init__(
        self,
        config: Config,
        dataset: ReidDataset,
        *,
        device: torch.device,
        hooks: Hooks,
        workers: WorkerGroup | None = None,
    ) -> None:
        """Build everything from the seed; the memory is still to be filled or restored.

        Raises UserError for data that cannot train under these settings.
        """
        self.config = config
        self.dataset = dataset
        self.device = device
        self.hooks = hooks
        self.workers = workers or WorkerGroup()
        train = dataset.train
        style = choose_style(config.data.camera_style, train.paths, train.camids, files=dataset.style_paths)
        self.train_images, self.perturbed_images = (
            TrainImages(train, config.data, style=style, seed=config.train.seed, view=view, packs=dataset.packs)
            for view in ("train", "perturbed")
        )
        self.plain_images = PlainImages(train, config.data, packs=dataset.packs)
        self.num_images = len(train)
        check_requirements(config, dataset, self.workers)
        self.pids = as_tensor(train.pids, device)
        self.camids = as_tensor(train.camids, device)
        meta = choose_meta(config, dataset, device)
        self.state = build_state(config, num_images=self.num_images, device=device, workers=self.workers)
        self.state.meta = meta
        self.limit = choose_limit(config, meta, self.camids, self.num_images)
        self.extracted_lists: NeighborLists | None = None
        gcn = self.state.gcn
        self.gcn_loss = RecordedGcnLoss(gcn) if config.train.cuda_graphs else GcnLoss(gcn, self.workers)

    # -- the state of an epoch --------------------------------------------------------------------

    @property
    def labeller(self) -> Labeller:
        """Who labels in this epoch: `single` while warming up."""
        is_warm = self.state.epoch < self.config.train.warmup_epochs
        labeller = self.config.pairs.labeller
        return "single" if is_warm and labeller != "supervised" else labeller

    def set_learning_rates(self) -> None:
        """Set both rates of the CNN for this epoch (Sec. 5.2)."""
        train = self.config.train
        for group in self.state.optimizer.param_groups:
            start = group["base_lr"]
            group["lr"] = schedules.learning_rate(self.state.epoch, start, step=train.lr_step, factor=train.lr_factor)

    def gamma(self) -> float:
        """Return this epoch's weight of the new feature (Eq. 1)."""
        ends = {"start": self.config.memory.gamma_start, "end": self.config.memory.gamma_end}
        return schedules.gamma(self.state.epoch, self.config.train.epochs, **ends)

    def eta(self) -> float:
        """Return this epoch's weight of the meta gradient (Eq. 10)."""
        eta = self.config.meta.eta.model_dump()
        return schedules.eta(self.state.epoch, self.config.train.epochs, **eta)

    def extract(self, images: Any, *, ids: Tensor | None = None, mode: str = "eval") -> Tensor:
        """Return unit features `[n, D]` of training images."""
        after, _ = extract(
            self.state.backbone,
            images,
            batch_size=self.config.eval.batch_size,
            num_workers=self.config.data.num_workers,
            device=self.device,
            ids=ids,
            mode=mode,
        )
        return after

    def batches(self, images: Any, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this worker's images of each batch and the ids of the whole batch."""
        split, num_workers = self.state.backbone.batch_split, self.config.data.num_workers
        return sharded_batches(images, batches, split, num_workers=num_workers, device=self.device)

    def fill_memory(self) -> None:
        """Fill the memory with features of the initial backbone (zeros would make NN_k meaningless)."""
        # in random order: batch statistics of neighboring files would be those of one identity
        order = torch.randperm(self.num_images, generator=generator(self.config.train.seed, RngStream.ORDER))
        if self.config.backbone.recalibrate_bn:
            batches = self.batches(self.plain_images, ordered_batches(order, self.config.eval.batch_size))
            recalibrate_bn(self.state.backbone, (images for images, _ in batches))
        features = self.extract(self.plain_images, ids=order, mode=self.config.memory.start_mode)
        self.state.memory = FeatureMemory(features[order.argsort()])

    def lists(self) -> NeighborLists:
        """Return the neighbor lists of this epoch; the GCN's epoch and the labelling share those that stand still."""
        state, rest = self.state, (self.camids, self.config.neighbors, self.hooks.search_all)
        if self.config.neighbors.source == "memory":
            return NeighborLists(state.memory.features, *rest)
        if self.extracted_lists is None or self.extracted_lists.source is not state.list_features:
            # the last epoch's features go before this one's come
            self.extracted_lists = None
            self.extracted_lists = NeighborLists(self.extracted_features(), *rest, stands_still=True)
        return self.extracted_lists

    def extracted_features(self) -> Tensor:
        """Return features of all images without augmentation; where lists are drawn from them, once an epoch."""
        state, source = self.state, self.config.neighbors.source
        if state.list_features is not None:
            return state.list_features
        if source == "memory":
            return self.extract(self.plain_images)
        state.list_features = list_features(source, state.memory.features, lambda: self.extract(self.plain_images))
        return state.list_features

    # -- the GCN's epoch: Alg. 1 lines 3-7 --------------------------------------------------------

    def train_gcn_epoch(self) -> None:
        """Train G on the labeled pairs of each image, F fixed; on resuming, go on behind `state.step`."""
        state, gcn = self.state, self.config.gcn
        if self.labeller != "gcn":
            return
        started = time.monotonic()
        lists = self.lists()
        lists.refresh()
        features, neighbor_ids, similarities, perturbed = self.add_perturbed(lists)
        # memory and P stand still in this phase, so an interrupted epoch draws the same pool again
        pool = draw_pool(
            self.pair_sources(lists.ids, perturbed),
            batch_size=gcn.batch_size,
            passes=gcn.passes,
            seed=self.config.train.seed,
            epoch=state.epoch,
        )
        rest = pool[state.step :]
        own = [step.pairs[self.workers.shard(len(step)).own] for step in rest]
        stream = self.hooks.build_subgraphs(torch.cat([*own, pool[0].pairs[:0]]), neighbor_ids, [*map(len, own)])
        loss_of = self.gcn_loss.begin(features, similarities, eta=self.eta() if gcn.sources == "both" else 1.0)
        for step, subgraphs in zip(rest, stream, strict=True):
            self.gcn_step(loss_of(subgraphs, step))
            state.step += 1
            self.hooks.after_step(state, len(pool))
        state.stats.add("gcn_seconds", time.monotonic() - started)

    def pair_sources(self, neighbor_ids: Tensor, perturbed: Tensor) -> PairSources:
        """Gather where this epoch's GCN pairs are drawn from."""
        return PairSources(
            positives=self.state.positives,
            memory=self.state.memory.features,
            neighbor_ids=neighbor_ids,
            perturbed=perturbed,
            meta=self.state.meta,
            meta_pairs=self.config.meta.pairs,
            use=self.config.gcn.sources,
            is_first=self.state.epoch == self.config.train.warmup_epochs,
            r=self.config.loss.r,
        )

    def add_perturbed(self, lists: NeighborLists) -> tuple[Tensor, Tensor, SimilarityTable | None, Tensor]:
        """Put features, neighbors and similarities of perturbed copies behind those of the images.

        An image takes part while its P_i is still {i}: at first every image does, which is the paper's "first
        iteration"; later those without a positive, which would otherwise send the GCN negatives alone.

        Returns:
            Features `[N + X, D]`, neighbor ids `[N + X, K]`, similarities where the GCN needs them, and each image's
            copy's row or -1, `[N]`.
        """
        features = self.state.memory.features
        similarities = lists.similarities if self.state.gcn.needs_similarities else None
        rows = torch.full((self.num_images,), PADDING, device=self.device)
        lonely = (self.state.positives.counts() == 1).nonzero().squeeze(1)
        if self.config.gcn.sources == "meta" or len(lonely) == 0:
            return features, lists.ids, similarities, rows
        self.perturbed_images.set_epoch(self.state.epoch)
        copies = self.extract(self.perturbed_images, ids=lonely)
        near = lists.search_outside(copies, None if self.camids is None else self.camids[lonely])
        rows[lonely] = self.num_images + torch.arange(len(lonely), device=self.device)
        lists.widen(near.shape[1])
        near = F.pad(near, (0, lists.ids.shape[1] - near.shape[1]), value=PADDING)
        if similarities is not None:
            similarities = similarities.with_copies(lonely)
        return torch.cat([features, copies]), torch.cat([lists.ids, near]), similarities, rows

    def gcn_step(self, loss: Tensor) -> None:
        """Take one step of Eq. 9 with the gradient of Eq. 10."""
        state = self.state
        # every worker has the whole loss, and gradients of its own pairs alone
        whole = self.descend(state.gcn, state.gcn_optimizer, loss, part=loss / self.workers.size, name="GCN")
        state.stats.add("gcn_loss", whole)
        state.stats.add("gcn_steps", 1)

    # -- the CNN's epoch: Alg. 1 lines 8-12 -------------------------------------------------------

    def train_cnn_epoch(self) -> None:
        """Train F on P and N*, G fixed; on resuming, go on behind `state.step`."""
        state = self.state
        started = time.monotonic()
        if state.step == 0 and self.labeller == "dbscan":
            state.clusters = find_clusters(self.extracted_features(), self.config, camids=self.camids)
        labeller = self.build_labeller()
        if state.step == 0 and isinstance(labeller, CandidateLabeller):
            state.stats.add("k_capped", labeller.num_capped)
        if state.step == 0 and self.config.pairs.is_once_an_epoch:
            self.label_all(labeller)
        self.train_images.set_epoch(state.epoch)
        batches = self.plan_batches()
        state.backbone.train()
        with cudnn_benchmark():
            for images, ids in self.batches(self.train_images, batches[state.step :]):
                self.cnn_step(images, ids, labeller)
                state.step += 1
                self.hooks.after_step(state, len(batches))
        state.stats.add("cnn_seconds", time.monotonic() - started)

    def cnn_step(self, images: Tensor, ids: Tensor, labeller: CandidateLabeller | RuleLabeller) -> None:
        """Take one step of Alg. 1 lines 9-11, with this worker's images: memory (Eq. 1), P_i (Eq. 7), F (Eq. 8)."""
        state, update = self.state, self.config.memory.update
        shard = state.backbone.batch_split.shard(len(ids))
        own = ids[shard.own]
        is_labelled = not self.config.pairs.is_once_an_epoch
        # with nothing to update yet, what labels wait for is on its way while F is launched
        label = labeller.begin(own) if is_labelled and update == "after" else None
        features = state.backbone(images)
        everyones = self.workers.gather(features, shard.counts)
        if update == "before":
            state.memory.update(ids, everyones, gamma=self.gamma())
            label = labeller.begin(own) if is_labelled else None
        if label is not None:
            self.set_positives(ids, labellers.gather_labels(label(), shard.counts, self.workers))
        loss = shard.weight * self.batch_loss(features, own)
        whole = self.descend(state.backbone, state.optimizer, loss, part=loss, name="CNN")
        if update == "after":
            state.memory.update(ids, everyones, gamma=self.gamma())
        if state.clusters is not None:
            state.clusters.update(everyones, ids, old_weight=self.config.clusters.old_weight)
        state.stats.add("cnn_loss", whole.double() * len(ids))
        state.stats.add("images", len(ids))

    def plan_batches(self) -> list[list[int]]:
        """Return this epoch's batches: every image once, or under `dbscan` as many images of each of some clusters."""
        train, clusters = self.config.train, self.state.clusters
        draw = generator(train.seed, RngStream.ORDER, self.state.epoch)
        if clusters is None:
            return ordered_batches(torch.randperm(self.num_images, generator=draw), train.batch_size)
        size = self.config.clusters.num_instances
        return balanced_batches(clusters.labels, batch_size=train.batch_size, num_instances=size, generator=draw)

    def build_labeller(self) -> CandidateLabeller | RuleLabeller:
        """Build this epoch's labeller; with clean or epoch-wise lists it searches all of them at once."""
        return choose_labeller(
            self.labeller,
            self.config,
            self.lists(),
            gcn=self.state.gcn,
            memory=self.state.memory.features,
            pids=self.pids,
            meta=self.state.meta,
            clusters=self.state.clusters,
            limit=self.limit,
        )

    def label_all(self, labeller: CandidateLabeller | RuleLabeller) -> None:
        """Write P of every image from one state of the memory."""
        everyone = torch.arange(self.num_images, device=self.device)
        for ids, labels in labellers.label_all(
            labeller, everyone, build=self.hooks.build_subgraphs, workers=self.workers
        ):
            self.set_positives(ids, labels)

    def set_positives(self, ids: Tensor, labels: Labels) -> None:
        """Write P_i of a batch, and count what the GCN judged."""
        self.state.positives.set_rows(ids, labels.positives)
        if labels.candidates is not None:
            self.state.stats.count_judged(ids, labels, self.state.memory.features)

    def batch_loss(self, features: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of this worker's images: against the memory, or under `dbscan` against the clusters."""
        if self.state.clusters is not None:
            return self.state.clusters.loss(features, ids, temperature=self.config.clusters.temperature)
        return self.cnn_loss(features @ self.state.memory.features.T, self.state.positives.mask(ids))

    def cnn_loss(self, similarities: Tensor, positives: Tensor) -> Tensor:
        """Return Eq. 2, or MMCL under the labeller `mlcr`."""
        c = self.config.loss
        if self.config.pairs.labeller == "mlcr":
            return losses.mmcl(similarities, positives, delta=c.delta, r=c.r)
        margins = {"alpha": c.alpha, "lambda_1": c.lambda_1, "lambda_2": c.lambda_2}
        return losses.binomial_deviance(similarities, positives, delta=c.delta, r=c.r, **margins)

    def descend(self, network: nn.Module, optimizer: Any, loss: Tensor, *, part: Tensor, name: str) -> Tensor:
        """Take one step down the loss; return the whole of it, what the workers' `part` add up to.

        Where it is no number a CPU raises NonFiniteLoss before the step. An accelerator, rather than wait, leaves
        the step out by itself, and raises when the host looks: every CHECK_STEPS steps, and before anything is saved.
        """
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        whole = self.workers.sum_gradients(network.parameters(), part)
        if whole.device.type == "cpu":
            if not torch.isfinite(whole):
                raise non_finite(name, float(whole), self.state)
        else:
            # 0 times a number is 0, and of infinity and what is no number it is neither
            optimizer.found_inf = (whole * 0 != 0).float()
            if self.state.step % CHECK_STEPS == 0:
                self.state.check_losses()
        optimizer.step()
        return whole


def as_tensor(ids: Any, device: torch.device) -> Tensor | None:
    """Move an id array to the device; None stays None."""
    return None if ids is None else torch.as_tensor(ids, device=device)
