"""Weights that users bring: files of re-ID projects and of libraries, read as they are, without running their code."""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mprd.backbone.pixels import PIXELS, pixel_affine
from mprd.backbone.trunk import State, Trunk
from mprd.errors import UserError

logger = logging.getLogger("mprd")

WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "state_dict_1", "backbone")
"""Keys under which files hold the network; the first that is there counts, and again within it."""
WRAPPED_NAMES = re.compile(r"^(?:module\.|_orig_mod\.)+")
"""What DataParallel and torch.compile put before each name."""
LEAST_SHARE = 0.9
"""Share of the network's tensors that a file must hold."""
NUM_SHOWN = 3


@dataclass(frozen=True)
class Format:
    """How a project names the tensors of its files."""

    title: str
    sign: str
    """Regular expression that matches one of the names at least."""
    prefix: str = ""
    """Of the backbone's names; all others belong to heads, queues and other networks."""
    pixels: str | None = None
    """Key of PIXELS; None: those of the network's source."""


# the first whose sign matches counts
FORMATS = (
    Format("a run of mprd", r"trunk\.", "trunk.", "imagenet"),
    Format("LUPerson-NL", r"encoder_q\.(classifier|embed_fc|fc1)\.|prototypes", "encoder_q.", "lup_nl"),
    Format("LUPerson", r"encoder_q\.", "encoder_q.", "lup"),
    # the projection of MoCo v2 is fc.0, ReLU, fc.2
    Format("LUPerson", r"fc\.2\.weight", pixels="lup"),
    Format("Cluster-Contrast or SpCL", r"base\.0\.weight", "base.", "imagenet"),
    Format("fast-reid", r"heads\.", "backbone.", "imagenet"),
    Format("CLIP-ReID", r"image_encoder\.", "image_encoder.", "half"),
    Format("OpenAI's CLIP", r"visual\.class_embedding", "visual.", "clip"),
    Format("OpenUnReID", r"mean_net\.backbone\.", "mean_net.backbone."),
    Format("SOLIDER", r"backbone\.semantic_embed_w\.", "backbone.", "half"),
    Format("DINO (TransReID-SSL, PASS, PersonViT)", r"backbone\.(cls_token|patch_embed)", "backbone.", "half"),
    Format("a network under backbone.", r"backbone\.", "backbone."),
    Format("TransReID or SOLIDER-REID", r"base\.", "base.", "half"),
    Format("ISR", r"model\.", "model."),
    Format("TransReID-SSL or PASS", r"part_token1|patch_embed\.conv\.", pixels="half"),
    Format("tensors by name", ""),
)
NUMBERED_RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Cluster-Contrast and SpCL put the parts of a ResNet into one Sequential, `base`."""


def load_weights(trunk: Trunk, path: Path, *, name: str) -> Tensor | None:
    """Load a file into a network, in place, and log what was loaded, skipped and missing.

    Returns the pixels that the weights expect, as `pixel_affine` does.
    Raises UserError where the file cannot be read, holds less than 90 % of the network's tensors, or one of them in
    another shape.
    """
    everything = named_tensors(read_file(path))
    layout = next(form for form in FORMATS if not form.sign or any(re.match(form.sign, key) for key in everything))
    state = convert(trunk, backbone_tensors(everything, layout))
    found = compare(trunk, state)
    if found.is_refused:
        raise UserError(f"backbone.weights: {path} ({layout.title}) does not fit {name}: {found.describe()}")
    trunk.network.load_state_dict(state, strict=False)
    own_pixels = everything.get("pixel_affine")
    pixels = trunk.pixels if layout.pixels is None else PIXELS[layout.pixels]
    logger.info(
        "%s (%s): %s, skipped %d of the file; pixels %s",
        *(path, layout.title, found.describe(), sum(is_wanted(key) for key in everything) - found.num_fitting),
        "of that run" if own_pixels is not None else title_of(pixels),
    )
    return pixel_affine(pixels) if own_pixels is None else own_pixels


@dataclass(frozen=True)
class Comparison:
    """Which tensors of a network a file holds."""

    num_fitting: int
    num_wanted: int
    misshapen: list[str]
    missing: list[str]
    foreign: list[str]
    """Names within the network's own parts that it does not have: of a larger one, or of another kind."""

    @property
    def is_refused(self) -> bool:
        """Whether the file is of another network, or of a part of this one."""
        return bool(self.misshapen or self.foreign) or self.num_fitting < LEAST_SHARE * self.num_wanted

    def describe(self) -> str:
        """Return what fits and what does not."""
        return (
            f"{self.num_fitting} of {self.num_wanted} tensors fit{some('of another shape', self.misshapen)}"
            f"{some('missing', self.missing)}{some('not in this network', self.foreign)}"
        )


def compare(trunk: Trunk, state: State) -> Comparison:
    """Compare names and shapes of tensors with those of a network."""
    every = trunk.network.state_dict()
    own = {key: part for key, part in every.items() if is_wanted(key)}
    held = {key: part for key, part in own.items() if key in state}
    misshapen = [
        f"{key} {shape(state[key])} for {shape(part)}" for key, part in held.items() if state[key].shape != part.shape
    ]
    parts = {part_of(key) for key in every}
    strange = [key for key in state if key not in every]
    # of a file without any familiar name, all are of interest
    foreign = [key for key in strange if part_of(key) in parts or not held]
    return Comparison(len(held) - len(misshapen), len(own), misshapen, [key for key in own if key not in held], foreign)


def is_weight(key: str) -> bool:
    """Return whether a tensor is not of the statistics of a run's cameras, which another run measures of its own."""
    return not key.endswith(".camera_moments")


def is_wanted(key: str) -> bool:
    """Return whether a tensor counts: files of old versions lack the counters of batch norms, which nothing reads."""
    return not key.endswith("num_batches_tracked")


def part_of(key: str) -> str:
    """Return the part of the network that a tensor belongs to, such as `layer1` or `blocks`."""
    return key.removeprefix("net.").split(".")[0]


def read_file(path: Path) -> Any:
    """Read safetensors, or a torch file without running code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(harmless_classes()), warnings.catch_warnings():
            # that a TorchScript archive is none of torch.save; it is refused below
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"backbone.weights: no such file: {path}") from None
    except Exception as error:  # the readers raise many types, from pickle's to their own
        if "TorchScript" in str(error):
            reason = "a TorchScript archive, which is code; save the state_dict() of the network in it"
        else:
            found = re.search(
                r"Unsupported (?:global|class)[^.]*GLOBAL (\S+)|Unsupported global: GLOBAL (\S+)", str(error)
            )
            reason = type(error).__name__ if found is None else f"it holds objects of {found[1] or found[2]}"
        raise UserError(f"backbone.weights: {path} is not a readable state dict ({reason})") from None


def harmless_classes() -> list[Any]:
    """Return what checkpoints hold beside tensors: figures as numpy scalars, and options as a Namespace."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    dtypes = {type(np.dtype(kind)) for kind in (*"?bBhHiIlLqQefdg", "S1", "U1")}
    return [argparse.Namespace, np.dtype, *dtypes, *((scalar, name) for name in names)]


def named_tensors(content: Any) -> State:
    """Take the tensors out of their wrappers, and the wrappers' prefixes off their names."""
    while isinstance(content, Mapping):
        inside = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inside is None:
            break
        content = content[inside]
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(key): part for key, part in content.items() if isinstance(part, Tensor)}
    return {WRAPPED_NAMES.sub("", key): part for key, part in tensors.items()}


def backbone_tensors(everything: State, layout: Format) -> State:
    """Return the backbone's tensors, without the prefix."""
    size = len(layout.prefix)
    state = {key[size:]: part for key, part in everything.items() if key.startswith(layout.prefix) and is_weight(key)}
    if layout.prefix != "base.":
        return state
    return {
        re.sub(r"^\d+", lambda found: NUMBERED_RESNET.get(found[0], found[0]), key): part for key, part in state.items()
    }


def convert(trunk: Trunk, state: State) -> State:
    """Give tensors the network's names; those of another network keep theirs, as those that have them do."""
    if state.keys() <= trunk.network.state_dict().keys():
        return state
    try:
        return trunk.convert(state)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        # what does not fit is named by the comparison
        return state


def shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def some(title: str, names: Iterable[str]) -> str:
    """Return `; title: a, b, c and 5 more`, or nothing."""
    names = list(names)
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return f"; {title}: {', '.join(names[:NUM_SHOWN])}{more}" if names else ""


def title_of(pixels: tuple) -> str:
    """Return the name of pixel statistics for `backbone.pixels`."""
    return next((name for name, known in PIXELS.items() if known == pixels), str(pixels))
