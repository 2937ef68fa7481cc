"""Batches of ids, and the sizes of the batches that a batch norm sees while training."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch

from mprd.backbone.features import ordered_batches
from mprd.backbone.network import batch_norms
from mprd.config.loading import build_config
from mprd.config.nested import layered
from mprd.config.schema import Config
from mprd.data.datasets import load_dataset
from mprd.engine.trainer import Trainer, fit


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_hold_all_ids_in_order_and_two_images_under_batch_norm(batch_size: int) -> None:
    for count in range(2, 20):
        ids = torch.randperm(count)
        plain, normalized = (ordered_batches(ids, batch_size, is_normalized=flag) for flag in (False, True))
        assert [*chain(*plain)] == [*chain(*normalized)] == ids.tolist()
        assert max(map(len, plain)) <= batch_size
        assert min(map(len, normalized)) >= 2
        assert max(map(len, normalized)) <= max(3, batch_size)
        # only where one image would be left over
        assert plain == normalized or min(map(len, plain)) == 1


@pytest.mark.parametrize("labeller", ["gcn", "dbscan"])
def test_no_batch_norm_sees_one_image_while_training(labeller: str, tiny_config: Config) -> None:
    changes = {
        "train": {"batch_size": 2, "epochs": 1},
        "eval": {"batch_size": 1},
        "backbone": {"camera_bn": True},
        "pairs": {"labeller": labeller},
    }
    config = build_config(layered(tiny_config.model_dump(), changes))
    dataset = load_dataset(config.data)
    # an odd number of images
    train = dataset.train.select(torch.arange(len(dataset.train) - 1).numpy())
    trainer = Trainer(config, replace(dataset, train=train), device=torch.device("cpu"))
    sizes: set[int] = set()
    for norm in batch_norms(trainer.state.backbone):
        norm.register_forward_pre_hook(lambda norm, maps: sizes.add(len(maps[0]) if norm.training else 2))
    trainer.fill_memory()
    fit(trainer)
    assert min(sizes) >= 2
