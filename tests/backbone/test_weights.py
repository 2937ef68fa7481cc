"""Weights that users bring: each project's file gives the features of the same tensors by name."""

from __future__ import annotations

import logging
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mprd.backbone.from_solider import from_unfold
from mprd.backbone.network import Backbone, build_backbone
from mprd.config.schema import BackboneConfig
from mprd.errors import UserError

State = dict[str, Tensor]
SIZE = (64, 32)
SMALL = {
    "vit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "resnet18": {"channels": (4, 8, 8, 8)},
    "resnet34": {"channels": (4, 8, 8, 8)},
    "swin": {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 3},
}
"""Options that make small networks of timm's."""
RESNET, VIT, CLIP = "timm:resnet18", "timm:vit_small_patch16_224", "timm:vit_base_patch16_clip_quickgelu_224"
FIGURES = {"epoch": 3, "best_mAP": np.float64(0.5), "rank1": np.float32(0.7), "args": Namespace(lr=0.1, arch="vit")}
"""What checkpoints hold beside tensors."""


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model
    create = lambda name, **options: original(name, **SMALL.get(name.split("_")[0], {}), **options)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", create)


def build(name: str, weights: Path | str = "none", **settings: Any) -> Backbone:
    torch.manual_seed(1)
    config = BackboneConfig.model_validate({"name": name, "weights": str(weights), **settings})
    return build_backbone(config, size=SIZE).eval()


@cache
def tensors(name: str, seed: int = 0) -> State:
    """Return the tensors of a network, all drawn at random, under the library's names."""
    draw = torch.Generator().manual_seed(seed)
    state = build(name, pool="clip" if name == CLIP else "auto").trunk.state_dict()
    return {
        key.removeprefix("net."): torch.rand(part.shape, generator=draw) * 0.1 + 0.5 * (part.ndim == 1)
        for key, part in state.items()
        if part.is_floating_point()
    }


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: part for key, part in state.items()}


def renamed(state: State, *rules: tuple[str, str]) -> State:
    for old, new in rules:
        state = {re.sub(old, new, key): part for key, part in state.items()}
    return state


def noise(*names: str) -> State:
    """Return tensors of heads and queues."""
    return {name: torch.ones(3) for name in names}


def moco(state: State, *more: str) -> dict[str, Any]:
    other = prefixed(tensors(RESNET, seed=5), "module.encoder_k.")
    names = ("module.encoder_q.fc.0.weight", "module.encoder_q.fc.2.weight", "module.queue", *more)
    return {"arch": "resnet50", "state_dict": prefixed(state, "module.encoder_q.") | other | noise(*names), **FIGURES}


def cluster_contrast(state: State) -> dict[str, Any]:
    numbers = [("conv1", 0), ("bn1", 1), *((f"layer{i}", i + 3) for i in (1, 2, 3, 4))]
    base = renamed(state, *((rf"^{name}\.", f"base.{number}.") for name, number in numbers))
    return {"state_dict": prefixed(base | noise("feat_bn.weight", "feat_bn.bias"), "module."), **FIGURES}


def dino(state: State, prefix: str = "backbone.") -> dict[str, Any]:
    other = prefixed({key: part + 1 for key, part in state.items()}, "module.backbone.")
    return {"student": other, "teacher": prefixed(state, prefix) | noise("head.last_layer.weight_g"), **FIGURES}


def pass_names(state: State) -> State:
    """Split each token into token and position."""
    parts = dict(
        zip(("cls", "part1", "part2", "part3"), torch.cat([state["cls_token"], state["reg_token"]], 1)[0], strict=True)
    )
    kept = {key: part for key, part in state.items() if key not in ("cls_token", "reg_token")}
    for name, token in parts.items():
        kept[f"{name}_pos"] = torch.full_like(token, 0.3)[None, None]
        kept["cls_token" if name == "cls" else f"part_token{name[-1]}"] = token[None, None] - 0.3
    return kept


def openai_names(state: State) -> State:
    state = {key: part for key, part in state.items() if key != "head.bias"}
    shaped = {
        "cls_token": state["cls_token"][0, 0],
        "pos_embed": state["pos_embed"][0],
        "head.weight": state["head.weight"].T,
    }
    return renamed(
        state | shaped,
        *((r"^cls_token$", "class_embedding"), (r"^pos_embed$", "positional_embedding"), (r"^head\.weight$", "proj")),
        *((r"^patch_embed\.proj\.", "conv1."), (r"^norm_pre\.", "ln_pre."), (r"^norm\.", "ln_post.")),
        *((r"^blocks\.", "transformer.resblocks."), (r"\.norm([12])\.", r".ln_\1."), (r"attn\.qkv\.", "attn.in_proj_")),
        *((r"attn\.proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj")),
    )


def to_unfold(part: Tensor) -> Tensor:
    """Reorder the inputs of a merging from Swin's (0, 0), (1, 0), (0, 1), (1, 1) to channels of 2 x 2 cells each."""
    num, new = part.shape[-1] // 4, part.clone()
    for channel in range(num):
        for row in (0, 1):
            for column in (0, 1):
                new[..., 4 * channel + 2 * row + column] = part[..., (2 * column + row) * num + channel]
    return new


def solider(state: State) -> dict[str, Any]:
    merging = r"^layers\.1\.downsample\.0\."
    mine = {key: to_unfold(part) if re.match(merging, key) else part for key, part in state.items()}
    scale, shift = (mine.pop(f"layers.1.downsample.1.{name}") for name in ("scale", "shift"))
    mine = renamed(
        mine,
        *(
            (merging, "stages.0.downsample."),
            (r"^layers\.", "stages."),
            (r"^patch_embed\.proj\.", "patch_embed.projection."),
        ),
        *((r"\.attn\.", ".attn.w_msa."), (r"\.mlp\.fc1\.", ".ffn.layers.0.0."), (r"\.mlp\.fc2\.", ".ffn.layers.1.")),
        (r"^norm\.", "norm1."),
    )
    # softplus(0.2 a + 0.8 b + c) = scale
    half, inverse = torch.ones(len(scale), 2), scale.expm1().log()
    mine |= {"semantic_embed_w.0.weight": half, "semantic_embed_w.0.bias": inverse - 1}
    mine |= {"semantic_embed_b.0.weight": half, "semantic_embed_b.0.bias": shift - 1}
    return dino(mine | noise("norm0.weight", "stages.0.blocks.0.attn.w_msa.relative_position_index"))


def isr(state: State) -> dict[str, Any]:
    old = renamed(state, (r"^layers\.1\.downsample\.", "layers.0.downsample."))
    return {"model": prefixed(old | noise("head.weight"), "model.") | noise("feat.weight")}


Case = tuple[str, str, Callable[[State], Any]]
FILES: dict[str, Case] = {
    "torchvision": (
        "resnet18",
        "imagenet",
        lambda state: state | noise("fc.weight", "fc.bias") | {"bn1.num_batches_tracked": torch.tensor(7)},
    ),
    "LUPerson": (RESNET, "lup", lambda state: state | noise("fc.0.weight", "fc.2.weight")),
    "LUPerson, own pre-training": (RESNET, "lup", moco),
    "LUPerson-NL": (
        RESNET,
        "lup_nl",
        lambda state: moco(state, "module.encoder_q.classifier.weight", "module.prototypes"),
    ),
    "CION": (RESNET, "imagenet", lambda state: dino(state, "module.backbone.")),
    "torchreid": (
        RESNET,
        "imagenet",
        lambda state: {"state_dict": prefixed(state | noise("classifier.weight"), "module."), **FIGURES},
    ),
    "fast-reid": (
        RESNET,
        "imagenet",
        lambda state: {"model": prefixed(state, "backbone.") | noise("heads.weight", "pixel_mean"), **FIGURES},
    ),
    "Cluster-Contrast, SpCL": (RESNET, "imagenet", cluster_contrast),
    "OpenUnReID": (
        RESNET,
        "imagenet",
        lambda state: {
            "state_dict_1": prefixed(state, "module.backbone.") | noise("module.classifier.weight"),
            **FIGURES,
        },
    ),
    "a run of mprd": (
        RESNET,
        "imagenet",
        lambda state: {"format": 1, "backbone": prefixed(state, "trunk.") | noise("neck.weight"), "gcn": noise("a")},
    ),
    "a run of mprd on a network of timm": (
        VIT,
        "imagenet",
        lambda state: {
            "format": 1,
            "backbone": prefixed(state, "trunk.net.") | noise("neck.weight"),
            "gcn": noise("a"),
        },
    ),
    "timm": (VIT, "half", lambda state: {"state_dict_ema": prefixed(state, "_orig_mod."), "state_dict": noise("a")}),
    "TransReID-SSL, PersonViT": (VIT, "half", dino),
    "TransReID-SSL with a stem": (VIT.replace("timm", "ics"), "half", lambda state: dino(state, "module.backbone.")),
    "TransReID": (VIT, "half", lambda state: prefixed(state, "base.") | noise("classifier.weight")),
    "PASS": (VIT.replace("timm", "pass"), "half", lambda state: dino(pass_names(state))),
    "SOLIDER": ("solider:swin_tiny_patch4_window7_224", "half", solider),
    "ISR": ("timm:swin_tiny_patch4_window7_224", "imagenet", isr),
    "CLIP-ReID": (CLIP, "half", lambda state: prefixed(openai_names(state), "image_encoder.") | noise("cv_embed")),
    "OpenAI's CLIP": (CLIP, "clip", lambda state: prefixed(openai_names(state), "visual.") | noise("logit_scale")),
    "DINOv2": ("timm:vit_small_patch14_dinov2", "imagenet", lambda state: state | {"mask_token": torch.zeros(1, 32)}),
}


@pytest.mark.parametrize("title", FILES)
def test_a_file_gives_the_features_of_its_tensors_by_name(
    title: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, pixels, wrap = FILES[title]
    state = tensors(name)
    save_file({key: part.contiguous() for key, part in state.items()}, tmp_path / "flat.safetensors")
    torch.save(wrap(state), tmp_path / "file.pth")
    with caplog.at_level(logging.INFO, "mprd"):
        brought = build(name, tmp_path / "file.pth")
    wanted = build(name, tmp_path / "flat.safetensors", pixels=pixels)
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(brought(images), wanted(images), rtol=0, atol=1e-5)
    (line,) = caplog.messages
    num = len(state) - 2 * (name == CLIP)
    assert f"{num} of {num} tensors fit, skipped " in line
    assert line.endswith(f"pixels {pixels}")
    assert "skipped 2 of the file" in line or title != "torchvision"


def test_a_run_with_statistics_of_cameras_gives_its_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = tensors("small") | {"1.camera_moments": torch.ones(3, 2, 32)}
    torch.save({"backbone": prefixed(state, "trunk.")}, tmp_path / "last.pt")
    with caplog.at_level(logging.INFO, "mprd"):
        brought = build("small", tmp_path / "last.pt")
    assert "(a run of mprd): 40 of 40 tensors fit, skipped 1 of the file" in caplog.text
    torch.testing.assert_close(brought.trunk.state_dict()["1.weight"], state["1.weight"])


def test_a_merging_of_swin_sees_what_unfold_gave_it() -> None:
    maps, weight = torch.rand(2, 3, 4, 6), torch.rand(5, 12)
    merging = timm.models.swin_transformer.PatchMerging(3, 5, norm_layer=torch.nn.Identity)
    merging.reduction.weight.data = from_unfold(weight)
    wanted = F.unfold(maps, 2, stride=2).transpose(1, 2) @ weight.T
    torch.testing.assert_close(merging(maps.permute(0, 2, 3, 1)).flatten(1, 2), wanted)


def test_a_position_embedding_is_resampled_from_a_grid_that_is_not_square(tmp_path: Path) -> None:
    state = dict(tensors(VIT))
    # a grid of 16 x 8 whose rows are equal, and so are those of 4 x 2
    columns = torch.linspace(0, 1, 8).repeat(16)[:, None].expand(-1, 32)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], columns[None]], dim=1)
    torch.save(state, tmp_path / "weights.pth")
    found = build(VIT, tmp_path / "weights.pth").trunk.net.pos_embed[0, 1:].view(4, 2, 32)
    torch.testing.assert_close(found, found[:1, :, :1].expand(4, 2, 32), rtol=0, atol=1e-5)
    assert (found[0, 1] - found[0, 0] > 0.3).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (RESNET, lambda state: dict(list(state.items())[::2]), r"53 of 105 tensors fit; missing: .* and 49 more"),
        (RESNET, lambda _: tensors(VIT), r"\(tensors by name\) .*: 0 of 105 tensors fit; missing: net\.conv1\.weight"),
        (RESNET, lambda _: tensors(RESNET.replace("18", "34")), r": 105 of 105 .*; not in this network: net\.layer1"),
        (VIT, lambda _: tensors(RESNET), r"0 of \d+ tensors fit; missing: net\.cls_token"),
        (VIT, lambda _: tensors(VIT.replace("timm", "ics")), r"not in this network: net\.patch_embed\.conv\.0\.weight"),
        ("small", lambda state: {**state, "1.weight": torch.ones(9)}, r"of another shape: 1\.weight 9 for 32"),
    ],
    ids=["half", "ViT for ResNet", "deeper", "ResNet for ViT", "other stem", "wider"],
)  # fmt: skip
def test_a_file_of_another_network_is_refused_in_one_line(
    name: str, change: Callable[[State], State], message: str, tmp_path: Path
) -> None:
    torch.save(change(tensors(name)), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=rf"^backbone\.weights: .*weights\.pth .* does not fit {name}: .*") as error:
        build(name, tmp_path / "weights.pth")
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)


def test_figures_of_an_older_numpy_are_read(tmp_path: Path) -> None:
    torch.save({"state_dict": tensors("small"), **FIGURES}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert b"numpy.core.multiarray" in (tmp_path / "old.pth").read_bytes()
    assert torch.equal(build("small", tmp_path / "old.pth").trunk[0].weight, tensors("small")["0.weight"])


class Code:
    """An object of a class that no allow-list names."""


def write_half(path: Path) -> None:
    torch.save(tensors("small"), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file: "),
        (lambda path: path.write_text("text"), "is not a readable state dict"),
        (lambda path: torch.save({"model": Code()}, path), r"it holds objects of tests\.backbone\.test_weights\.Code"),
        (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), "TorchScript archive"),
        (lambda path: torch.save([1], path), "0 of 40 tensors fit; missing: "),
        (write_half, "is not a readable state dict"),
    ],
    ids=["none", "text", "code", "TorchScript", "list", "truncated"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    write: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=rf"^backbone\.weights: .*{message}"):
        build("small", tmp_path / "weights.pth")
