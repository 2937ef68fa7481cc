"""Networks of timm: their maps, pooling, layer-wise rates and batch norms, and a run from training to export."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from mprd.backbone.network import Backbone, build_backbone, parameter_groups
from mprd.config.loading import load_config
from mprd.config.schema import BackboneConfig, Config
from mprd.doctor.checks import examine
from mprd.engine.state import build_state
from mprd.engine.trainer import Trainer, fit
from mprd.errors import Interrupted, UserError
from mprd.evaluate.epoch_metrics import training_row
from mprd.export.formats import export_network
from mprd.model import Model, load_model
from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.search.run import SearchOptions, search_run
from tests.conftest import TINY
from tests.engine.loop import assert_same_state, open_data, stop_after, train


def build(name: str, *, size: tuple[int, int] = (64, 32), **settings: Any) -> Backbone:
    torch.manual_seed(0)
    config = BackboneConfig.model_validate({"name": name, "weights": "none", **settings})
    return build_backbone(config, size=size)


@pytest.mark.parametrize("name", ["timm:swin_tiny_patch4_window7_224", "solider:swin_tiny_patch4_window7_224"])
def test_networks_draw_no_random_numbers_while_they_train(name: str) -> None:
    backbone, images = build(name).train(), torch.rand(4, 3, 64, 32)
    assert torch.equal(backbone(images), backbone(images))


@pytest.mark.parametrize(
    ("name", "settings", "size", "num_features"),
    [
        # 32 channels a stage, in a map of 4 x 2 or of as much as a size gives
        ("timm:test_resnet", {"num_stripes": 2}, (100, 50), 192),
        ("timm:test_efficientnet", {"pool": "gem"}, (64, 32), 256),
        ("timm:test_convnext", {}, (64, 32), 64),
        ("timm:test_vit", {}, (100, 50), 64),
        ("timm:test_vit", {"pool": "mean", "num_stripes": 2}, (64, 32), 128),
        ("timm:test_vit", {"pool": "clip"}, (64, 32), 64 + 1000),
        # registers, and no class token
        ("timm:test_vit2", {"pool": "gem"}, (64, 32), 64),
        ("pass:test_vit", {}, (64, 32), 128),
    ],
)
def test_networks_give_unit_features_of_images_of_any_size(
    name: str, settings: dict[str, Any], size: tuple[int, int], num_features: int
) -> None:
    backbone = build(name, size=size, **settings)
    features = backbone(torch.rand(3, 3, *size))
    assert features.shape == (3, num_features)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3), rtol=0, atol=1e-5)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.neck.parameters())


def test_pooling_follows_its_definition() -> None:
    images = torch.rand(2, 3, 64, 32)
    gem, token, clip, mean = (build("timm:test_vit", pool=pool).eval() for pool in ("gem", "token", "clip", "mean"))
    tokens = mean.trunk.net.forward_features(images)
    patches = tokens[:, 1:]
    torch.testing.assert_close(mean.pool(images), patches.mean(1))
    torch.testing.assert_close(token.pool(images), tokens[:, 0])
    torch.testing.assert_close(gem.pool(images), (patches.clamp(min=1e-6) ** 3).mean(1) ** (1 / 3))
    first = clip.trunk.net.forward_features(images)[:, 0]
    torch.testing.assert_close(clip.pool(images), torch.cat([first, clip.trunk.net.head(first)], dim=1))


def test_the_map_of_a_vit_has_the_places_of_the_patches() -> None:
    backbone = build("timm:test_vit", pool="mean").eval()
    images = torch.rand(1, 3, 64, 32)
    found = backbone.trunk(images)[0]
    tokens = backbone.trunk.net.forward_features(images)[0, 1:]
    assert found.shape == (64, 4, 2)
    for row in range(4):
        for column in range(2):
            assert torch.equal(found[:, row, column], tokens[2 * row + column])


def test_layers_learn_more_slowly_the_nearer_they_are_to_the_images() -> None:
    backbone = build("timm:test_vit", freeze_patches=True)
    rates = {"is_pretrained": True, "lr_backbone": 0.01, "lr_new": 0.1}
    groups = parameter_groups(backbone, **rates, layer_decay=0.5)
    net = backbone.trunk.net
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    depth = len(net.blocks)
    wanted = {net.norm.weight: 0, net.blocks[-1].mlp.fc1.weight: 0, net.blocks[0].mlp.fc1.weight: depth - 1,
              net.pos_embed: depth}  # fmt: skip
    for parameter, power in wanted.items():
        assert rate[id(parameter)] == pytest.approx(0.01 * 0.5**power)
    assert rate[id(backbone.neck.weight)] == 0.1
    assert groups[0]["lr"] == 0.01
    assert id(net.patch_embed.proj.weight) not in rate
    assert len(rate) == sum(parameter.requires_grad for parameter in backbone.parameters())
    assert len(parameter_groups(backbone, **rates)) == 2
    with pytest.raises(UserError, match=r"^train\.layer_decay needs a network with numbered layers"):
        parameter_groups(build("small"), **rates, layer_decay=0.5)


def test_batch_norms_with_an_activation_are_normalized_by_groups() -> None:
    images = torch.rand(6, 3, 64, 32)
    plain, grouped = build("timm:test_efficientnet"), build("timm:test_efficientnet", bn_group=3)
    grouped.batch_split.set_batch(6)
    parts = torch.cat([plain.pool(images[:3]), plain.pool(images[3:])])
    torch.testing.assert_close(grouped.pool(images), parts, rtol=0, atol=1e-4)
    assert grouped.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("timm:test_vitt", {}, r"backbone\.name: timm .* has no network 'test_vitt'; near it are test_vit"),
        ("keras:resnet50", {}, r"unknown source 'keras' in keras:resnet50; known: .*timm, torchvision"),
        ("resnet5", {}, r"unknown network 'resnet5', did you mean resnet50\?"),
        ("timm:test_resnet", {"pool": "token"}, r"backbone\.pool=token needs a class token, but test_resnet has none"),
        ("resnet18", {"pool": "clip"}, r"backbone\.pool=clip needs a network with a class token"),
        ("timm:test_resnet", {"freeze_patches": True}, r"freeze_patches needs a network with a patch projection"),
        ("timm:test_vit", {"num_stripes": 2}, r"backbone\.num_stripes"),
        ("timm:test_vit", {"size": (8, 8)}, r"test_vit cannot be used for images of 8 x 8 \(data\.height"),
        ("timm:mixer_s32_224", {}, r"backbone\.name: mixer_s32_224 cannot be used for images of 64 x 32"),
        ("timm:xcit_nano_12_p16_224", {}, r"backbone\.name: xcit_nano_12_p16_224 cannot be used"),
        ("timm:efficientvit_b0", {"weights": "pretrained"}, r"name: efficientvit_b0 .*: Cannot disable pooling"),
        ("timm:test_vit2", {"weights": "pretrained"}, r"backbone\.weights: cannot get timm's weights of test_vit2"),
    ],
)  # fmt: skip
def test_names_and_settings_that_do_not_fit_are_refused(
    name: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(UserError, match=message) as error:
        build(name, **settings)
    assert "\n" not in str(error.value)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm, which is not installed: pip install 'mprd\[timm\]'$"):
        build("timm:test_vit")
    assert build("small").num_features == 64


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_trains_from_a_file_resumes_extracts_searches_and_is_exported(
    name: str, tiny_root: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    file = tmp_path / "weights.pth"
    torch.save({"model": timm.create_model(name).state_dict()}, file)
    sets = [f"backbone.name=timm:{name}", f"backbone.weights={file}", "backbone.num_stripes=1", "train.epochs=2",
            "train.layer_decay=0.8", "train.lr_backbone=0.001", "train.lr_new=0.001"]  # fmt: skip
    config = load_config("demo", overrides=(*TINY, *sets), values={"data": {"root": tiny_root}})
    whole = train(config)
    with pytest.raises(Interrupted):
        # in the second CNN step of the second epoch
        train(config, callbacks=stop_after(11, tmp_path / "last.pt"))
    resumed = Trainer(config, open_data(config), device=torch.device("cpu"))
    resumed.load_state_dict(checkpoint.load(tmp_path / "last.pt"), path=tmp_path / "last.pt")
    fit(resumed)
    assert_same_state(whole, resumed)
    assert training_row(whole)["lr_new"] == 0.001
    # the pixels of the weights, which are not ImageNet's, belong to the run
    file.unlink()
    model, folder = saved(config, whole, tmp_path / "run")
    scale = torch.tensor([0.229, 0.224, 0.225]) / 0.5
    torch.testing.assert_close(model.backbone.pixel_affine[0], scale)
    crop = min((tiny_root / "bounding_box_test").iterdir())
    plain = torch.from_numpy(np.asarray(Image.open(crop).resize((16, 32), Image.Resampling.BICUBIC), np.float32) / 255)
    pooled = first_features(model.backbone, (plain.permute(2, 0, 1)[None] - 0.5) / 0.5)
    np.testing.assert_allclose(model.extract([crop]), pooled.numpy(), atol=1e-4)
    options = SearchOptions(device="cpu", other_cameras=True)
    found = search_run(folder, tiny_root / "bounding_box_test", [str(crop)], options)
    others = [path for path in sorted(crop.parent.iterdir()) if path != crop]
    cosines = model.extract(others) @ model.extract([crop])[0]
    assert Path(found.answers[0].hits[0].path).name == others[cosines.argmax()].name
    pytest.importorskip("onnxruntime")
    exported = export_network(model, tmp_path / f"{name}.onnx", kind="onnx")
    assert exported.difference <= 1e-4


def saved(config: Config, trainer: Trainer, path: Path) -> tuple[Model, Path]:
    """Write a run folder, and load its network."""
    folder = RunFolder(path)
    folder.create(config)
    folder.save(trainer.state_dict())
    return load_model(path, device="cpu"), path


@torch.no_grad()
def first_features(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the features of images that are normalized as timm does."""
    maps = backbone.trunk(images)
    pooled = maps if maps.ndim == 2 else maps.mean((2, 3))
    return torch.nn.functional.normalize(backbone.neck(pooled), dim=1)


def test_the_preset_of_clip_trains_a_small_vit(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = timm.create_model
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: original(name, **small, **options))
    tiny = [setting for setting in TINY if not setting.startswith("data.dataset")]
    config = load_config("clip", overrides=(*tiny, "backbone.weights=none", "train.epochs=1"),
                         values={"data": {"root": tiny_root, "dataset": "market1501"}})  # fmt: skip
    before = build_state(config, num_images=24, device=torch.device("cpu")).backbone
    after = saved(config, train(config), tmp_path / "run")[0].backbone
    assert after.num_features == 32 + 512
    same = {key for key, part in before.trunk.state_dict().items() if torch.equal(part, after.trunk.state_dict()[key])}
    assert {key for key in same if "patch_embed" in key} == same
    assert same
    # normalized by 0.5 and 0.5
    torch.testing.assert_close(after.pixel_affine[0], torch.tensor([0.458, 0.448, 0.45]))


def test_the_doctor_tells_what_a_network_costs(tiny_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "mprd")
    found = examine(tiny_root, backbone="timm:test_vit")
    assert found.command == f"python -m mprd.train --data {tiny_root} --set backbone.name=timm:test_vit"
    assert found.plan is not None
    assert found.plan.cost is not None
    assert found.plan.cost.train_seconds > 0
    wrong = examine(tiny_root, backbone="timm:test_vitt")
    assert "near it are test_vit" in wrong.findings[-1].text
    assert wrong.command is None
