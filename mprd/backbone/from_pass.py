"""PASS's ViTs on timm's: `pass:vit_small_patch16_224`, with three part tokens beside the class token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mprd.backbone.from_timm import build_timm
from mprd.backbone.pixels import PIXELS
from mprd.backbone.trunk import State, Trunk

if TYPE_CHECKING:
    from mprd.config.schema import BackboneConfig

NUM_PARTS = 3


def build(name: str, config: BackboneConfig, size: tuple[int, int]) -> Trunk:
    """Build a ViT of timm with part tokens, which are its registers."""
    options = {"reg_tokens": NUM_PARTS, "no_embed_class": True, "num_parts": NUM_PARTS}
    trunk = build_timm(name, config, size, pixels=PIXELS["half"], **options)
    return replace(trunk, convert=lambda state: trunk.convert(merge_positions(state)))


def merge_positions(state: State) -> State:
    """Add the position embeddings of class and part tokens to the tokens: the patches alone have one in timm."""
    if "part_token1" not in state:
        return state
    parts = [state[f"part_token{i}"] + state[f"part{i}_pos"] for i in range(1, NUM_PARTS + 1)]
    merged = {"cls_token": state["cls_token"] + state["cls_pos"], "reg_token": torch.cat(parts, dim=1)}
    kept = {key: part for key, part in state.items() if not key.startswith("part") and key != "cls_pos"}
    return kept | merged
