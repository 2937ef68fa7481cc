"""The settings of a run from the command line: a recipe, what the user changes in it, and what the data can give."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from mprd.cli import quiet
from mprd.config.loading import build_config, read_given, read_packaged, read_preset
from mprd.config.nested import flatten, get, layered, nest, put
from mprd.config.schema import Config, Preset
from mprd.data.camera_style import style_folder
from mprd.data.datasets import ReidDataset, load_dataset
from mprd.data.labeled import read_labels
from mprd.data.recognition import locate
from mprd.errors import UserError

logger = logging.getLogger("mprd")


def read_settings(
    settings: dict[str, Any], *, shared: dict[str, Any] | None = None, varied: Collection[str] = ()
) -> Config:
    """Lay the user's settings over a recipe, and leave out of it what the data cannot give, logging each.

    Args:
        settings: the options preset, data, set_, and where a command has them config, seed, smoke.
        shared: nested settings of a study, between the recipe and the user's.
        varied: dotted names that a study sets itself.

    Raises UserError for a wrong setting, and for a folder that cannot be read.
    """
    config, asked = compose(settings, shared=shared)
    if config.data.root is None:
        return config
    config = config.model_copy(update={"data": locate(config.data)})
    # the run itself loads the data again, and warns then
    with quiet():
        dataset = load_dataset(config.data)
    config, notes = fit_to_data(config, dataset, asked=asked | set(varied))
    for note in notes:
        logger.info("%s: %s", dataset.root, note)
    return config


def compose(settings: dict[str, Any], *, shared: dict[str, Any] | None = None) -> tuple[Config, set[str]]:
    """Lay a study's and the user's settings over a recipe; return them, and the dotted names that were asked for."""
    data: Path | None = settings["data"]
    overrides = settings["set_"] or ()
    given, typed = (read_given(file, overrides) for file in (settings.get("config"), None))
    for option, name in (("data", "data.root"), ("seed", "train.seed")):
        value, other = settings.get(option), get(typed, name)
        if None not in (value, other) and str(value) != str(other):
            raise UserError(f"--{option} {value} and --set {name}={other} differ; give one of them")
    if data is not None:
        put(given, "data.root", data)
        # a file such as best.yaml names the layout of the data that it comes from; crops have a pattern of the user's
        is_asked = get(typed, "data.dataset") is not None
        if get(given, "data.dataset") not in (None, "folder") and not is_asked:
            put(given, "data.dataset", "auto")
    if settings.get("seed") is not None:
        put(given, "train.seed", settings["seed"])
    asked = set(flatten(layered(shared or {}, given)))
    smoke = read_packaged("smoke") if settings.get("smoke") else {}
    if smoke and "meta.labels" in asked:
        # a part of the images may lack those that the file names
        put(smoke, "data.max_images", None)
    changes = layered(shared or {}, smoke, given)
    recipe = read_preset(settings["preset"] or ("demo" if data is None else choose_recipe(changes)))
    if "data.root" in asked and get(recipe, "data.dataset") == "synthetic":
        put(recipe, "data.dataset", "auto")
    return build_config(layered(recipe, changes)), asked


def choose_recipe(changes: dict[str, Any]) -> Preset:
    """Return the recipe for a data set: as `mprd doctor` proposes, the demo's where no ImageNet weights are at hand."""
    # local, as --help imports no torch
    from mprd.backbone.from_torchvision import has_imagenet_weights

    names_backbone = bool({"name", "weights"} & set(get(changes, "backbone") or {}))
    if names_backbone or has_imagenet_weights(build_config(layered(read_preset("recommended"), changes)).backbone.name):
        return "recommended"
    logger.warning(
        "the ImageNet weights of the recommended network are neither in torchvision's cache nor reachable, so the "
        "small network and settings of --preset demo are trained; --set backbone.weights=FILE trains the recommended"
    )
    return "demo"


def fit_to_data(config: Config, dataset: ReidDataset, *, asked: Collection[str]) -> tuple[Config, list[str]]:
    """Leave out of a recipe what the data cannot give; return the settings, and a line for each part left out.

    Settings that were asked for stay, and are refused by the code that needs the data; but for a style transfer without
    CamStyle's files, which is MPRD# by whatever name.
    """
    changes: dict[str, Any] = {}
    notes: list[str] = []

    def leave_out(name: str, value: Any, why: str) -> None:
        changes[name] = value
        notes.append(f"{why} ({name}={str(value).lower()})")

    if dataset.train.camids is None and config.backbone.camera_bn:
        notes.append("no cameras in the file names, so batch norms take the statistics of all images")
    if config.data.camera_style == "camstyle" and dataset.style_paths is None:
        folder = style_folder(dataset.train.paths, dataset.root)
        absent = "no CamStyle files" if folder is None else f"no CamStyle file of an expected name in {folder}"
        leave_out("data.camera_style", "none", f"{absent}, so no style is transferred, MPRD#")
    num_ids = count_labelled_ids(config, dataset)
    needs_labels = "meta.num_ids" in asked or config.pairs.relabel_meta or config.gcn.sources == "meta"
    if config.uses_meta and num_ids < config.meta.num_ids and not needs_labels:
        of = config.meta.labels or "the file names"
        known = "no identities" if num_ids == 0 else f"{num_ids} identities"
        leave_out("meta.num_ids", num_ids, f"{known} in {of}, so {num_ids or 'none'} labeled")
    return (build_config(layered(config.model_dump(), nest(changes))) if changes else config), notes


def count_labelled_ids(config: Config, dataset: ReidDataset) -> int:
    """Count the identities that can be labeled; a single one in file names counts as none: it has no negative pair."""
    if config.meta.labels is not None:
        return len(np.unique(read_labels(config.meta.labels, dataset.train, dataset.root)[1]))
    num_ids = 0 if dataset.train.pids is None else len(np.unique(dataset.train.pids))
    return num_ids if num_ids > 1 else 0
