"""The backbone's maps, weights, learning rates and batch-norm statistics, and extraction in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mprd.backbone.features import extract, ordered_batches
from mprd.backbone.from_torchvision import has_imagenet_weights
from mprd.backbone.network import (
    Backbone,
    build_backbone,
    estimate_bn,
    estimate_camera_bn,
    fix_camera,
    parameter_groups,
)
from mprd.config.schema import BackboneConfig, DataConfig
from mprd.data.cache import Packs
from mprd.data.images import PlainImages
from mprd.errors import UserError
from mprd.runtime import device
from tests.trees import write_noise


def build(**settings: Any) -> Backbone:
    torch.manual_seed(0)
    config = BackboneConfig.model_validate({"name": "small", "weights": "none", **settings})
    return build_backbone(config, size=(64, 32))


@pytest.mark.parametrize(
    ("name", "last_stride", "size"),
    [
        # Sec. 5.2: 16 x 8 maps of 256 x 128 images
        ("resnet18", 1, (512, 16, 8)),
        ("resnet18", 2, (512, 8, 4)),
        ("mobilenet_v2", 1, (1280, 16, 8)),
        ("small", 1, (64, 64, 32)),
    ],
)
def test_the_last_map_has_the_size_of_the_stride(name: str, last_stride: int, size: tuple[int, int, int]) -> None:
    backbone = build(name=name, last_stride=last_stride, num_stripes=1).eval()
    with torch.no_grad():
        assert backbone.trunk(torch.zeros(1, 3, 256, 128)).shape[1:] == size
    assert backbone.num_features == size[0]


def test_features_are_unit_vectors_of_stripes_after_and_before_the_batch_norm() -> None:
    backbone = build(num_stripes=4)
    images = torch.rand(6, 3, 32, 16)
    maps = backbone.train().trunk(images).detach()
    # each channel's mean over each quarter of the height
    quarter = maps.shape[2] // 4
    parts = [maps[:, :, quarter * i : quarter * (i + 1)].mean((2, 3)) for i in range(4)]
    stripes = torch.stack(parts, dim=2).flatten(1)
    normalized = (stripes - stripes.mean(0)) / (stripes.var(0, correction=0) + 1e-5).sqrt()
    after, before = backbone.features(images)
    torch.testing.assert_close(before, stripes / stripes.norm(dim=1, keepdim=True), rtol=0, atol=1e-5)
    torch.testing.assert_close(after, normalized / normalized.norm(dim=1, keepdim=True), rtol=0, atol=1e-4)
    torch.testing.assert_close(backbone(images), after, rtol=0, atol=1e-6)


def test_imagenet_weights_are_found_in_the_cache_or_reported_as_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr("socket.create_connection", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert not has_imagenet_weights("small")
    with pytest.raises(UserError, match=r"^backbone\.weights: there are no ImageNet weights for the network small"):
        build(weights="imagenet")
    assert not has_imagenet_weights("resnet18")
    with pytest.raises(UserError, match=r"cannot download the ImageNet weights of resnet18 .*offline.*; give the path"):
        build(name="resnet18", weights="imagenet")
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert has_imagenet_weights("resnet18")


def test_pretrained_layers_have_their_own_learning_rate() -> None:
    backbone = build()
    for is_pretrained, lr_trunk in ((True, 0.01), (False, 0.1)):
        trunk, neck = parameter_groups(backbone, is_pretrained=is_pretrained, lr_backbone=0.01, lr_new=0.1)
        assert (trunk["lr"], neck["lr"]) == (lr_trunk, 0.1)
        assert len(trunk["params"]) == len([*backbone.trunk.parameters()])
        assert [*map(id, neck["params"])] == [*map(id, backbone.neck.parameters())]


def test_recalibration_is_the_mean_over_batches() -> None:
    backbone = build()
    batches = [torch.rand(4, 3, 32, 16) for _ in range(2)]
    weights = [parameter.clone() for parameter in backbone.parameters()]
    norm = backbone.trunk[1]
    maps = [backbone.trunk[0](images).detach() for images in batches]
    estimate_bn(backbone, batches)
    expected = torch.stack([part.mean((0, 2, 3)) for part in maps]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected, rtol=0, atol=1e-5)
    assert norm.momentum == 0.1
    assert all(torch.equal(one, other) for one, other in zip(weights, backbone.parameters(), strict=True))


def test_each_camera_has_the_statistics_of_its_own_images_in_evaluation() -> None:
    backbone = build(camera_bn=True)
    images = [[torch.rand(4, 3, 32, 16) * (camera + 1) for _ in range(2)] for camera in range(3)]
    estimate_camera_bn(backbone, [(10**9, images[0]), (0, []), (10**9, images[1]), (8, images[2])])
    shown = torch.rand(5, 3, 32, 16)
    # cameras 0, 1 (without images of its own) and 2, one that is not known and one that was not trained on
    found = backbone.eval()(shown, torch.tensor([0, 1, 2, -1, 7])).detach()

    def under(batches: list[Tensor], row: int) -> Tensor:
        plain = build(camera_bn=False)
        plain.load_state_dict({name: v for name, v in backbone.state_dict().items() if "camera" not in name})
        estimate_bn(plain, batches)
        return plain.eval()(shown[[row]]).detach()[0]

    expected = [under(images[number], row) for row, number in enumerate((0, 2, 1, 2, 2))]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    assert (found[0] - under(images[2], 0)).abs().max() > 1e-3

    again = build(camera_bn=True).eval()
    again.load_state_dict(backbone.state_dict())
    cameras = torch.tensor([2, 2, 0, 1, -1])
    assert torch.equal(again(shown, cameras), backbone(shown, cameras))
    fix_camera(again, 2)
    torch.testing.assert_close(again(shown), backbone(shown, torch.full((5,), 2)), rtol=0, atol=1e-5)


def test_extraction_follows_the_ids_and_uses_the_cores_of_idle_loaders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "num_cores", lambda: 4)
    images = PlainImages(
        write_noise(tmp_path / "a", 6), DataConfig(height=32, width=16), packs=Packs(tmp_path, mode="auto")
    )
    backbone, ids, threads = build(), torch.tensor([4, 0, 3]), []
    backbone.trunk.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    settings: dict[str, Any] = {"batch_size": 2, "num_workers": 3, "device": torch.device("cpu")}
    after, _ = extract(backbone, images, ids=ids, **settings)
    everything, before = extract(backbone, images, **settings)
    torch.testing.assert_close(after, everything[ids], rtol=0, atol=1e-6)
    assert before.shape == everything.shape == (6, backbone.num_features)
    assert set(threads) == {4}
    # sums over a batch depend on the number of threads
    threads.clear()
    extract(backbone, images, mode="train", **settings)
    assert set(threads) == {1}


def test_batches_are_nearly_equal() -> None:
    assert ordered_batches(torch.arange(7), 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert ordered_batches(torch.arange(0), 3) == []
