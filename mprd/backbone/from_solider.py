"""SOLIDER's Swin transformers on timm's: `solider:swin_base_patch4_window7_224`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprd.backbone.from_timm import build_timm
from mprd.backbone.pixels import PIXELS
from mprd.backbone.trunk import State, Trunk

if TYPE_CHECKING:
    from mprd.config.schema import BackboneConfig

SEMANTIC_WEIGHT = 0.2
"""Of semantic against appearance information; its authors' value for re-ID."""
# mmcv's names, which SOLIDER uses, and timm's
RENAMED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\.w_msa\.", "."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    # timm's stages begin with the merging, mmcv's end with it
    (r"^stages\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample.0."),
    (r"^stages\.", "layers."),
)


class Semantics(nn.Module):
    """Scale and shift of each channel after a merging, `[C]`; not trained."""

    scale: Tensor
    shift: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(num_channels))
        self.register_buffer("shift", torch.zeros(num_channels))

    def forward(self, maps: Tensor) -> Tensor:
        return maps * self.scale + self.shift


def build(name: str, config: BackboneConfig, size: tuple[int, int]) -> Trunk:
    """Build a Swin of timm with `Semantics`; windows keep their size, small maps are padded, as in mmcv."""
    trunk = build_timm(name, config, size, pixels=PIXELS["half"], always_partition=True)
    net: Any = trunk.network.net
    for stage in list(net.layers)[1:]:
        stage.downsample = nn.Sequential(stage.downsample, Semantics(stage.downsample.reduction.out_features))
    last = len(net.layers) - 1
    renamed = {re.sub(r"(\.downsample\.)", r"\g<1>0.", key): layer for key, layer in (trunk.layers or {}).items()}
    return replace(trunk, convert=lambda state: trunk.convert(timm_names(state, last)), layers=renamed)


def timm_names(state: State, last: int) -> State:
    """Rename mmcv's tensors; apply the semantic weight to the semantic embeddings."""
    if "semantic_embed_w.0.weight" not in state:
        return state
    named: State = {}
    for key, part in state.items():
        if key.startswith("semantic_embed_") or (key.startswith("norm") and not key.startswith(f"norm{last}.")):
            continue
        if ".downsample." in key:
            part = from_unfold(part)
        for old, new in RENAMED:
            key = re.sub(old, new, key)
        named[re.sub(rf"^norm{last}\.", "norm.", key)] = part
    for stage in range(last):
        scale, shift = (embed(state, f"semantic_embed_{kind}.{stage}") for kind in "wb")
        named[f"layers.{stage + 1}.downsample.1.scale"] = F.softplus(scale)
        named[f"layers.{stage + 1}.downsample.1.shift"] = shift
    return named


def embed(state: State, name: str) -> Tensor:
    """Apply a linear layer to the pair of weights, semantic and appearance."""
    return state[f"{name}.weight"] @ torch.tensor([SEMANTIC_WEIGHT, 1 - SEMANTIC_WEIGHT]) + state[f"{name}.bias"]


def from_unfold(part: Tensor) -> Tensor:
    """Reorder the inputs of a merging, the last axis: mmcv has (channel, row, column), timm (column, row, channel)."""
    return part.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
