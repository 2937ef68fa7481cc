"""Images divided by camera: each once, none in a batch too small for its statistics."""

from __future__ import annotations

import pytest
import torch

from mprd.engine.camera_groups import SAMPLE_IMAGES, CameraGroups


@pytest.mark.parametrize("seed", range(20))
def test_every_image_is_in_one_group_of_its_camera_or_in_the_rest(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shares = torch.rand(7, generator=draw) ** 3
    camids = torch.multinomial(shares, 200, replacement=True, generator=draw)
    groups = CameraGroups.of(camids, 200, least=32)
    batched = groups.batched()
    assert torch.cat(batched).sort().values.tolist() == list(range(200))
    assert min(map(len, batched)) >= 32
    counts = camids.bincount()
    for camera, ids in enumerate(groups.cameras):
        if ids is not None:
            assert torch.equal(ids, (camids == camera).nonzero().squeeze(1))
        else:
            assert counts[camera] < 32


def test_cameras_of_few_images_share_batches() -> None:
    camids = torch.tensor([0] * 40 + [1] * 33 + [2] * 5 + [3] * 30)
    groups = CameraGroups.of(camids, len(camids), least=32)
    assert [None if ids is None else len(ids) for ids in groups.cameras] == [40, 33, None, None]
    assert [*map(len, groups.batched())] == [33, 40, 35]
    # five images are too few for batches, so they join the smallest camera's, which keeps its statistics
    few = CameraGroups.of(camids[:78], 78, least=32)
    assert [None if ids is None else len(ids) for ids in few.cameras] == [40, 33, None]
    assert [*map(len, few.batched())] == [38, 40]
    alone = CameraGroups.of(None, 9, least=32)
    assert [ids.tolist() for ids in alone.batched()] == [list(range(9))]


def test_samples_are_the_first_images_of_each_camera_in_the_order() -> None:
    draw = torch.Generator().manual_seed(0)
    camids = torch.randint(0, 3, (3000,), generator=draw).clamp(max=2)
    camids[:10] = 3
    order = torch.randperm(3000, generator=draw)
    first, second, third, small, everyone = CameraGroups.of(camids, 3000, least=32).samples(order)
    for camera, ids in enumerate((first, second, third)):
        expected = [row for row in order.tolist() if camids[row] == camera][:SAMPLE_IMAGES]
        assert ids.tolist() == expected
    assert len(small) == 0
    assert everyone.tolist() == order[:SAMPLE_IMAGES].tolist()
