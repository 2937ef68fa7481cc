"""Networks up to their last feature map, by name. A new source of networks is one file, `from_SOURCE.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mprd.backbone.pixels import PIXELS, Pixels
from mprd.errors import UserError

if TYPE_CHECKING:
    from mprd.config.schema import BackboneConfig

PRETRAINED = ("imagenet", "pretrained")
"""Values of `backbone.weights` that a source answers with the weights it publishes under the network's name."""

State = dict[str, Tensor]


def unchanged(state: State) -> State:
    return state


@dataclass(frozen=True, eq=False)
class Trunk:
    """A network, and what its source knows about it."""

    network: nn.Module
    """Images `[B, 3, H, W]` to maps `[B, C, h, w]`, or, pooled by itself, to vectors `[B, C]`."""
    num_channels: int
    pixels: Pixels = PIXELS["imagenet"]
    """Of the published weights, and of files that do not tell."""
    convert: Callable[[State], State] = unchanged
    """Give the tensors of a file, which has the names of its authors, the names of `network`."""
    layers: dict[str, int] | None = None
    """The layer of each parameter, counted from the images, for layer-wise rates; None where there are none."""


def build_trunk(config: BackboneConfig, size: tuple[int, int]) -> Trunk:
    """Build `SOURCE:NAME` by `build(NAME, ...)` of `mprd.backbone.from_SOURCE`; without SOURCE it is torchvision.

    Published weights (`PRETRAINED`) are loaded here, by the source; files are not.

    Args:
        size: height and width of the images.

    Raises UserError for an unknown source or name, and for weights that cannot be had.
    """
    source, _, name = config.name.rpartition(":")
    source = source or "torchvision"
    known = sorted(path.stem.removeprefix("from_") for path in Path(__file__).parent.glob("from_*.py"))
    if source not in known:
        raise UserError(f"backbone.name: unknown source {source!r} in {config.name}; known: {', '.join(known)}")
    return import_module(f"mprd.backbone.from_{source}").build(name, config, size)
