"""A data set of drawn pedestrians in Market-1501's layout: the same bytes from the same settings."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

import numpy as np

from mprd.config.schema import SyntheticConfig
from mprd.data.synthetic import cameras
from mprd.data.synthetic.cameras import FRAME, Box, Camera
from mprd.data.synthetic.pedestrians import (
    Appearance,
    draw_appearance,
    draw_lookalike,
    draw_pedestrian,
    draw_pose,
    place_body,
)
from mprd.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "query", "gallery"]
FOLDERS: dict[Split, str] = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
MANIFEST = "manifest.json"
FORMAT_VERSION = 1  # raise it when the same settings draw other pictures

DISTRACTOR_PID = 0
JUNK_PID = -1
DISTRACTOR_SHARE = 0.05  # of the gallery's identified images; likewise junk
JUNK_SHARE = 0.03
LOOKALIKE_REACH = 6  # a look-alike's model is among so many identities before it
JPEG_QUALITY = 95


class RngStream(IntEnum):
    """What a generator is for: the second part of its key, so that no draw depends on another."""

    CAMERAS = 0
    LOOKALIKES = 1
    APPEARANCE = 2
    VISITS = 3
    IMAGE = 4
    CLUTTER = 5
    PASSER_BY = 6


class Shot(NamedTuple):
    """One image that will be taken."""

    split: Split
    pid: int
    """Identity from 1, distractor or junk, as the file name has it."""
    wearer: int
    """Identity that is drawn; 0 for somebody outside the data set."""
    camid: int
    """Camera from 0."""
    number: int = 0
    """Place among all shots of the data set, from 1."""

    @property
    def name(self) -> str:
        """File name as Market-1501 has it."""
        pid = f"{self.pid:04d}" if self.pid >= 0 else str(self.pid)
        return f"{pid}_c{self.camid + 1}s1_{self.number:06d}_01.jpg"


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is decided before the first picture."""

    cameras: list[Camera]
    appearances: dict[int, Appearance]
    """How each identity looks, by pid."""
    models: dict[int, int]
    """Of each look-alike, the pid whose clothes it wears."""
    shots: list[Shot]


def write_dataset(root: Path, config: SyntheticConfig) -> None:
    """Draw the data set of these settings into a folder in Market-1501's layout, all of it or nothing.

    It is written beside the folder and then renamed. A folder that already holds it is left alone.
    Raises UserError where the folder holds anything else, or cannot be written.
    """
    plan = plan_dataset(config)
    manifest = describe(config, plan)
    if root.exists() and not is_empty_folder(root):
        check_existing(root, manifest)
        return
    unfinished = root.with_name(f".{root.name}.{uuid4().hex}.tmp")
    try:
        write_images(unfinished, plan, seed=config.seed)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        publish(unfinished, root, manifest)
    except OSError as error:
        raise UserError(f"{root}: cannot write the drawn data set: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_empty_folder(path: Path) -> bool:
    """Say whether a path is a folder with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def publish(unfinished: Path, root: Path, manifest: dict[str, Any]) -> None:
    """Give a finished folder its name, unless another process was faster with the same one."""
    try:
        unfinished.rename(root)
    except OSError:
        if not root.exists() or is_empty_folder(root):
            raise
        check_existing(root, manifest)


def check_existing(root: Path, manifest: dict[str, Any]) -> None:
    """Raise UserError unless a folder holds the complete data set of a manifest."""
    advice = "remove it or choose another folder"
    try:
        found = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError(f"{root}: there already, but no drawn data set ({MANIFEST} cannot be read); {advice}") from None
    if found != manifest:
        raise UserError(f"{root}: holds a data set drawn from other settings ({difference(found, manifest)}); {advice}")
    for split, folder in FOLDERS.items():
        num_images, wanted = len(list((root / folder).glob("*.jpg"))), manifest["counts"][split]
        if num_images != wanted:
            raise UserError(f"{root / folder}: wanted {wanted} images, but found {num_images}; {advice}")


def difference(found: Any, wanted: dict[str, Any]) -> str:
    """Name the first setting in which two manifests differ."""
    settings = found.get("config") if isinstance(found, dict) else None
    if isinstance(settings, dict):
        for name, value in wanted["config"].items():
            if settings.get(name) != value:
                return f"{name} {settings.get(name)}, wanted {value}"
    return "another version of the drawing"


def describe(config: SyntheticConfig, plan: Plan) -> dict[str, Any]:
    """Build the manifest: version, settings, and per split how many images and which identities."""
    shots = {split: [shot for shot in plan.shots if shot.split == split] for split in FOLDERS}
    return {
        "version": FORMAT_VERSION,
        "config": config.model_dump(mode="json"),
        "counts": {split: len(members) for split, members in shots.items()},
        "pids": {split: sorted({shot.pid for shot in members}) for split, members in shots.items()},
        "lookalikes": {str(pid): model for pid, model in plan.models.items()},
    }


def generator(seed: int, draw: RngStream, *key: int) -> np.random.Generator:
    """Return the generator of one purpose and key."""
    return np.random.default_rng([seed, draw, *key])


def plan_dataset(config: SyntheticConfig) -> Plan:
    """Decide who looks how, who resembles whom, and who is seen how often by which camera."""
    train_pids = range(1, config.num_train_ids + 1)
    test_pids = range(train_pids.stop, train_pids.stop + config.num_test_ids)
    models = {**choose_models(train_pids, config), **choose_models(test_pids, config)}
    return Plan(
        cameras=cameras.draw_cameras(
            generator(config.seed, RngStream.CAMERAS), config.num_cameras, gap=config.camera_gap
        ),
        appearances=dress([*train_pids, *test_pids], models, seed=config.seed),
        models=models,
        shots=list_shots(train_pids, test_pids, config),
    )


def choose_models(pids: range, config: SyntheticConfig) -> dict[int, int]:
    """Choose which identities of one half resemble an earlier one, and which."""
    models = {}
    for pid in pids[1:]:
        rng = generator(config.seed, RngStream.LOOKALIKES, pid)
        model = int(rng.integers(max(pids.start, pid - LOOKALIKE_REACH), pid))
        if rng.random() < config.lookalike_share:
            models[pid] = model
    return models


def dress(pids: list[int], models: dict[int, int], *, seed: int) -> dict[int, Appearance]:
    """Draw how each identity looks, models before their look-alikes."""
    appearances: dict[int, Appearance] = {}
    for pid in pids:
        rng = generator(seed, RngStream.APPEARANCE, pid)
        model = models.get(pid)
        appearances[pid] = draw_appearance(rng) if model is None else draw_lookalike(rng, appearances[model])
    return appearances


def list_shots(train_pids: range, test_pids: range, config: SyntheticConfig) -> list[Shot]:
    """List all images: training, queries and gallery, with the gallery's distractors and junk last."""
    shots: list[Shot] = []
    for pid in train_pids:
        for camid, num in draw_visits(pid, config, least=1):
            shots += [Shot("train", pid, pid, camid)] * num
    for pid in test_pids:
        # a query of one camera needs an image in the gallery under another
        for camid, num in draw_visits(pid, config, least=2):
            shots += [Shot("query", pid, pid, camid)] + [Shot("gallery", pid, pid, camid)] * (num - 1)
    num_gallery = sum(shot.split == "gallery" for shot in shots)
    shots += list_clutter(test_pids, config, num_gallery=num_gallery)
    return [shot._replace(number=number) for number, shot in enumerate(shots, start=1)]


def list_clutter(test_pids: range, config: SyntheticConfig, *, num_gallery: int) -> list[Shot]:
    """List the distractors and the junk of a gallery with so many identified images."""
    rng = generator(config.seed, RngStream.CLUTTER)
    num_distractors, num_junk = round(DISTRACTOR_SHARE * num_gallery), round(JUNK_SHARE * num_gallery)
    camids = rng.integers(config.num_cameras, size=num_distractors + num_junk).tolist()
    wearers = rng.integers(test_pids.start, test_pids.stop, size=num_junk).tolist()
    distractors = [Shot("gallery", DISTRACTOR_PID, 0, camid) for camid in camids[:num_distractors]]
    junk = zip(wearers, camids[num_distractors:], strict=True)
    return distractors + [Shot("gallery", JUNK_PID, wearer, camid) for wearer, camid in junk]


def draw_visits(pid: int, config: SyntheticConfig, *, least: int) -> list[tuple[int, int]]:
    """Draw the cameras that see an identity, two or more of them, and the images of each, `least` or more."""
    rng = generator(config.seed, RngStream.VISITS, pid)
    num_visited = int(rng.integers(min(2, config.num_cameras), config.num_cameras + 1))
    camids = np.sort(rng.choice(config.num_cameras, num_visited, replace=False)).tolist()
    return [(camid, int(rng.integers(least, max(least, config.images_per_camera) + 1))) for camid in camids]


def write_images(root: Path, plan: Plan, *, seed: int) -> None:
    """Draw all images of a plan into the folders of their splits."""
    for folder in FOLDERS.values():
        (root / folder).mkdir(parents=True)
    for shot in plan.shots:
        (root / FOLDERS[shot.split] / shot.name).write_bytes(encode(draw_shot(shot, plan, seed=seed)))


def encode(image: Image.Image) -> bytes:
    """Encode an image as JPEG with its full colour resolution."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def draw_shot(shot: Shot, plan: Plan, *, seed: int) -> Image.Image:
    """Draw one image; it depends on the seed and the shot alone, not on what was drawn before."""
    rng = generator(seed, RngStream.IMAGE, shot.number)
    camera = plan.cameras[shot.camid]
    picture = cameras.draw_background(camera, rng)
    is_clutter = shot.pid in (DISTRACTOR_PID, JUNK_PID)
    who = plan.appearances.get(shot.wearer) or draw_appearance(generator(seed, RngStream.PASSER_BY, shot.number))
    # half of the distractors are nothing but background, as a detector's false alarms are
    if shot.pid != DISTRACTOR_PID or rng.random() < 0.5:
        draw_person(picture, who, camera, rng)
    cameras.draw_occluder(picture, rng)
    size = rng.uniform(0.4, 0.65) if is_clutter else rng.uniform(0.9, 0.98)
    return cameras.take_image(picture, camera, Box(size, left=rng.random(), top=rng.random()), rng)


def draw_person(picture: Image.Image, who: Appearance, camera: Camera, rng: np.random.Generator) -> None:
    """Draw a person and its shadow as a camera sees it."""
    pose = draw_pose(rng, side_share=camera.side_share, back_share=camera.back_share)
    body = place_body(FRAME, who, pose, scale=camera.scale, drop=camera.drop)
    cameras.draw_shadow(picture, camera, middle=body.middle, foot=body.foot, half_width=body.half_width)
    draw_pedestrian(picture, who, pose, body)
