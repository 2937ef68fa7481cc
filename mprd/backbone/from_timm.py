"""Networks of timm, convolutional or not, for images of any size (extra `mprd[timm]`)."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprd.backbone.pixels import Pixels
from mprd.backbone.trunk import PRETRAINED, State, Trunk
from mprd.errors import UserError

if TYPE_CHECKING:
    from mprd.config.schema import BackboneConfig

GRID_RATIOS = (1, 2, 3)
"""Height over width of the grids that position embeddings of files are for."""


class TimmTrunk(nn.Module):
    """A network of timm without pooling: maps `[B, C, h, w]`, or by `pool` the class token `[B, C]`.

    Args:
        pool: `token`: the class token, before the mean of the part tokens if there are any; `clip`: the class token,
            before its projection by the head; otherwise the map of patch tokens.
        num_parts: tokens after the class token that are parts of a person.
        padding: pixels to the right and below that complete the last patches.
    """

    net: Any

    def __init__(self, net: nn.Module, *, pool: str, num_parts: int = 0, padding: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.net, self.pool, self.num_parts, self.padding = net, pool, num_parts, padding

    def forward(self, images: Tensor) -> Tensor:
        if any(self.padding):
            images = F.pad(images, (0, self.padding[0], 0, self.padding[1]))
        if self.pool == "clip":
            token = self.net.forward_features(images)[:, 0]
            return torch.cat([token, self.net.head(token)], dim=1)
        maps = self.net(images)
        if self.pool == "token":
            parts = maps[:, 1 : 1 + self.num_parts]
            return torch.cat([maps[:, 0], parts.mean(1)], dim=1) if self.num_parts else maps[:, 0]
        if maps.ndim == 3:
            return maps[:, self.net.num_prefix_tokens :].transpose(1, 2).unflatten(2, self.net.patch_embed.grid_size)
        return maps.permute(0, 3, 1, 2) if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else maps


def build(name: str, config: BackboneConfig, size: tuple[int, int]) -> Trunk:
    """Build a network of `timm.list_models()`."""
    return build_timm(name, config, size)


def build_timm(
    name: str,
    config: BackboneConfig,
    size: tuple[int, int],
    *,
    pixels: Pixels | None = None,
    num_parts: int = 0,
    **options: Any,
) -> Trunk:
    """Build a network of timm, with more of timm's options for it.

    Args:
        pixels: of files of weights; None, and for weights that timm publishes: timm's for the name.

    Raises UserError for a network that has no map or class token, and for a size that it cannot take.
    """
    timm = import_timm()
    with explained(name, size):
        net = create(timm, name, config, size, options)
        has_token = getattr(net, "cls_token", None) is not None
        pool = config.pool if config.pool != "auto" else "token" if has_token else "mean"
        if pool in ("token", "clip") and not (has_token and (pool == "token" or isinstance(net.head, nn.Linear))):
            wanted = "a class token" if pool == "token" else "a class token and its projection"
            raise UserError(f"backbone.pool={pool} needs {wanted}, but {name} has none")
        if pool in ("token", "clip") and config.num_stripes > 1:
            raise UserError(
                f"backbone.num_stripes must be 1 for the class token of {name}; backbone.pool=mean has stripes"
            )
        if config.freeze_patches:
            freeze_patches(net, name)
        drop_nothing(timm, net)
        network = TimmTrunk(net, pool=pool, num_parts=num_parts, padding=fit_patches(net, size))
        groups = timm.models.group_parameters(net, net.group_matcher(coarse=False))
        if pixels is None or config.weights in PRETRAINED:
            pixels = tuple(net.pretrained_cfg["mean"]), tuple(net.pretrained_cfg["std"])
        return Trunk(
            network,
            count_channels(network, size),
            pixels,
            lambda state: {f"net.{key}": part for key, part in timm_names(timm, net, state).items()},
            {f"net.{key}": layer for layer, keys in groups.items() for key in keys},
        )


@contextmanager
def explained(name: str, size: tuple[int, int]) -> Iterator[None]:
    """Turn what a network raises, each in its own way, into a UserError."""
    try:
        yield
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        shape = f"{size[0]} x {size[1]} (data.height, data.width)"
        raise UserError(f"backbone.name: {name} cannot be used for images of {shape}: {reason}") from error


def import_timm() -> ModuleType:
    """Import timm; raise UserError naming the extra."""
    try:
        import timm
    except ImportError:
        raise UserError(
            "backbone.name: this network is of timm, which is not installed: pip install 'mprd[timm]'"
        ) from None
    # it logs each resized embedding
    logging.getLogger("timm").setLevel(logging.WARNING)
    return timm


def create(timm: ModuleType, name: str, config: BackboneConfig, size: tuple[int, int], options: dict) -> Any:
    """Create a network without pooling, and without a head but for `pool: clip`; for one size of images if need be."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; near it are {', '.join(close)}" if close else ""
        raise UserError(f"backbone.name: timm {timm.__version__} has no network {name!r}{hint}")
    options = {"pretrained": config.weights in PRETRAINED, "global_pool": "", **options}
    if config.pool != "clip":
        options["num_classes"] = 0
    try:
        try:
            return timm.create_model(name, img_size=size, **options)
        except TypeError:
            # a convolutional network
            return timm.create_model(name, **options)
    except Exception as error:  # of the hub's client, of timm and of torch
        # what timm asserts is of the network
        if not options["pretrained"] or isinstance(error, AssertionError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"backbone.weights: cannot get timm's weights of {name} ({reason}); give a file, or none"
        ) from None


def fit_patches(net: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Fit a ViT, in place, to images that are no multiple of its patches; return the pixels to add, right and below."""
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", (1, 1))
    below, right = (-pixels % edge for pixels, edge in zip(size, patch, strict=True))
    if below or right:
        net.set_input_size(img_size=(size[0] + below, size[1] + right))
    return right, below


@torch.no_grad()
def count_channels(network: nn.Module, size: tuple[int, int]) -> int:
    """Return C by a trial."""
    found = network.eval()(torch.zeros(1, 3, *size))
    network.train()
    return found.shape[1]


def drop_nothing(timm: ModuleType, net: nn.Module) -> None:
    """Turn dropout and stochastic depth off, in place, which Swins have by default.

    They draw from torch's global generator, so a run would not resume exactly, and would perturb the statistics that
    batch norms are estimated from.
    """
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0


def freeze_patches(net: nn.Module, name: str) -> None:
    """Freeze the patch projection, in place."""
    projection = getattr(getattr(net, "patch_embed", None), "proj", None)
    if projection is None:
        raise UserError(f"backbone.freeze_patches needs a network with a patch projection, but {name} has none")
    projection.requires_grad_(False)


def timm_names(timm: ModuleType, net: nn.Module, state: State) -> State:
    """Give tensors timm's names, by timm's own rules for the network, and fit position embeddings to its grid."""
    if "class_embedding" in state:
        state = {f"visual.{key}": part for key, part in state.items()}
    state = {key: fit_grid(timm, net, part) if is_position(key) else part for key, part in state.items()}
    rules = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    return state if rules is None else rules(state, net)


def is_position(key: str) -> bool:
    return key in ("pos_embed", "visual.positional_embedding")


def fit_grid(timm: ModuleType, net: Any, embedding: Tensor) -> Tensor:
    """Resample a position embedding, `[1, N, D]` or `[N, D]`, of a grid of some ratio of height to width."""
    grid = net.patch_embed.grid_size
    num_prefix = 0 if getattr(net, "no_embed_class", False) else net.num_prefix_tokens
    num_cells = embedding.shape[-2] - num_prefix
    widths = [(ratio, round((num_cells / ratio) ** 0.5)) for ratio in GRID_RATIOS]
    old = next(((ratio * width, width) for ratio, width in widths if ratio * width * width == num_cells), None)
    if num_cells == grid[0] * grid[1] or old is None:
        return embedding
    batch = embedding if embedding.ndim == 3 else embedding[None]
    fitted = timm.layers.resample_abs_pos_embed(batch, new_size=grid, old_size=old, num_prefix_tokens=num_prefix)
    return fitted if embedding.ndim == 3 else fitted[0]
