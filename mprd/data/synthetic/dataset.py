"""A synthetic data set in Market-1501's layout, determined to the byte by its settings."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from uuid import uuid4

import numpy as np

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
FORMAT_VERSION = 1  # to be incremented when the same settings yield other images

DISTRACTOR_PID = 0
JUNK_PID = -1
DISTRACTOR_SHARE = 0.05  # of the number of gallery images with an identity
JUNK_SHARE = 0.03  # likewise
LOOKALIKE_REACH = 6  # a look-alike resembles one of so many previous identities
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Drawing:
    """What is drawn: `data.synthetic`, and what only tests vary."""

    num_train_ids: int = 80
    num_test_ids: int = 80
    num_cameras: int = 5
    images_per_camera: int = 5
    lookalike_share: float = 0.5
    """Share of the identities that are dressed like an earlier one."""
    camera_gap: float = 0.6
    """How far the cameras' colors lie apart; 0 makes them alike."""
    seed: int = 0
    """Independent of the run's seed."""

    def to_json(self) -> str:
        """Return the settings as a key, always in the same order."""
        return json.dumps(asdict(self), separators=(",", ":"))


class RngStream(IntEnum):
    """The purpose of a generator, the second part of its key."""

    CAMERAS = 0
    LOOKALIKES = 1
    APPEARANCE = 2
    VISITS = 3
    IMAGE = 4
    CLUTTER = 5
    PASSER_BY = 6


class Shot(NamedTuple):
    """One image to draw."""

    split: Split
    pid: int
    """Identity from 1, distractor or junk, as in the file name."""
    wearer: int
    """Identity drawn; 0 for a person outside the data set."""
    camid: int
    """Camera from 0."""
    number: int = 0
    """Position among all images of the data set, from 1."""

    @property
    def name(self) -> str:
        """The file name in Market-1501's convention."""
        pid = f"{self.pid:04d}" if self.pid >= 0 else str(self.pid)
        return f"{pid}_c{self.camid + 1}s1_{self.number:06d}_01.jpg"


@dataclass(frozen=True, eq=False)
class Plan:
    """Cameras, identities and images, before anything is drawn."""

    cameras: list[Camera]
    appearances: dict[int, Appearance]
    """The appearance of each identity, by pid."""
    shots: list[Shot]


def write_dataset(root: Path, config: Drawing) -> None:
    """Draw the data set into a new folder in Market-1501's layout, atomically: it is written beside it and renamed.

    A folder that exists is not changed. Raises UserError where it lacks images of its own manifest, or where the new
    one cannot be written.
    """
    if root.exists():
        check_complete(root)
        return
    plan = plan_dataset(config)
    counts = {split: sum(shot.split == split for shot in plan.shots) for split in FOLDERS}
    manifest = {"version": FORMAT_VERSION, "config": asdict(config), "counts": counts}
    unfinished = root.with_name(f".{root.name}.{uuid4().hex}.tmp")
    try:
        write_images(unfinished, plan, seed=config.seed)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        unfinished.rename(root)
    except OSError as error:
        if not root.exists():
            raise UserError(f"{root}: cannot write the synthetic data set: {error.strerror or error}") from None
        # another process has drawn it meanwhile
        check_complete(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_complete(root: Path) -> None:
    """Raise UserError unless a folder holds as many images as its manifest counts."""
    try:
        counts = json.loads((root / MANIFEST).read_text())["counts"]
        wanted = {folder: counts[split] for split, folder in FOLDERS.items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{root}: exists, but has no readable {MANIFEST} of a synthetic data set; remove it") from None
    for folder, count in wanted.items():
        num_images = len(list((root / folder).glob("*.jpg")))
        if num_images != count:
            raise UserError(f"{root}: incomplete, {folder} has {num_images} of {count} images; remove it")


def generator(seed: int, stream: RngStream, *key: int) -> np.random.Generator:
    """Return the generator of a purpose and key."""
    return np.random.default_rng([seed, stream, *key])


def plan_dataset(config: Drawing) -> Plan:
    """Draw the cameras, the appearances, and the images of each identity by each camera."""
    train_pids = range(1, config.num_train_ids + 1)
    test_pids = range(train_pids.stop, train_pids.stop + config.num_test_ids)
    models = {**choose_models(train_pids, config), **choose_models(test_pids, config)}
    return Plan(
        cameras=cameras.draw_cameras(
            generator(config.seed, RngStream.CAMERAS), config.num_cameras, gap=config.camera_gap
        ),
        appearances=draw_appearances([*train_pids, *test_pids], models, seed=config.seed),
        shots=list_shots(train_pids, test_pids, config),
    )


def choose_models(pids: range, config: Drawing) -> dict[int, int]:
    """Choose the look-alikes among the identities of a split, and the previous identity that each resembles."""
    models = {}
    for pid in pids[1:]:
        rng = generator(config.seed, RngStream.LOOKALIKES, pid)
        model = int(rng.integers(max(pids.start, pid - LOOKALIKE_REACH), pid))
        if rng.random() < config.lookalike_share:
            models[pid] = model
    return models


def draw_appearances(pids: list[int], models: dict[int, int], *, seed: int) -> dict[int, Appearance]:
    """Draw the appearance of each identity; `pids` lists models before their look-alikes."""
    appearances: dict[int, Appearance] = {}
    for pid in pids:
        rng = generator(seed, RngStream.APPEARANCE, pid)
        model = models.get(pid)
        appearances[pid] = draw_appearance(rng) if model is None else draw_lookalike(rng, appearances[model])
    return appearances


def list_shots(train_pids: range, test_pids: range, config: Drawing) -> list[Shot]:
    """Return all images: training, query and gallery, and last the gallery's distractors and junk."""
    shots: list[Shot] = []
    for pid in train_pids:
        for camid, num in draw_visits(pid, config, least=1):
            shots += [Shot("train", pid, pid, camid)] * num
    for pid in test_pids:
        # one query and at least one gallery image per camera
        for camid, num in draw_visits(pid, config, least=2):
            shots += [Shot("query", pid, pid, camid)] + [Shot("gallery", pid, pid, camid)] * (num - 1)
    num_gallery = sum(shot.split == "gallery" for shot in shots)
    shots += list_clutter(test_pids, config, num_gallery=num_gallery)
    return [shot._replace(number=number) for number, shot in enumerate(shots, start=1)]


def list_clutter(test_pids: range, config: Drawing, *, num_gallery: int) -> list[Shot]:
    """Return the distractors and junk of a gallery with `num_gallery` images of known identity."""
    rng = generator(config.seed, RngStream.CLUTTER)
    num_distractors, num_junk = round(DISTRACTOR_SHARE * num_gallery), round(JUNK_SHARE * num_gallery)
    camids = rng.integers(config.num_cameras, size=num_distractors + num_junk).tolist()
    wearers = rng.integers(test_pids.start, test_pids.stop, size=num_junk).tolist()
    distractors = [Shot("gallery", DISTRACTOR_PID, 0, camid) for camid in camids[:num_distractors]]
    junk = zip(wearers, camids[num_distractors:], strict=True)
    return distractors + [Shot("gallery", JUNK_PID, wearer, camid) for wearer, camid in junk]


def draw_visits(pid: int, config: Drawing, *, least: int) -> list[tuple[int, int]]:
    """Draw the cameras that see an identity, at least two, and the number of images of each, at least `least`."""
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
    """Encode an image as JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def draw_shot(shot: Shot, plan: Plan, *, seed: int) -> Image.Image:
    """Draw one image, a function of the seed and the shot alone."""
    rng = generator(seed, RngStream.IMAGE, shot.number)
    camera = plan.cameras[shot.camid]
    picture = cameras.draw_background(camera, rng)
    is_clutter = shot.pid in (DISTRACTOR_PID, JUNK_PID)
    look = plan.appearances.get(shot.wearer) or draw_appearance(generator(seed, RngStream.PASSER_BY, shot.number))
    # half of the distractors are background alone, like a detector's false positives
    if shot.pid != DISTRACTOR_PID or rng.random() < 0.5:
        draw_person(picture, look, camera, rng)
    cameras.draw_occluder(picture, rng)
    size = rng.uniform(0.4, 0.65) if is_clutter else rng.uniform(0.9, 0.98)
    return cameras.take_image(picture, camera, Box(size, left=rng.random(), top=rng.random()), rng)


def draw_person(picture: Image.Image, look: Appearance, camera: Camera, rng: np.random.Generator) -> None:
    """Draw a person and its shadow into a camera's scene."""
    pose = draw_pose(rng, side_share=camera.side_share, back_share=camera.back_share)
    body = place_body(FRAME, look, pose, scale=camera.scale, drop=camera.drop)
    cameras.draw_shadow(picture, camera, middle=body.middle, foot=body.foot, half_width=body.half_width)
    draw_pedestrian(picture, look, pose, body)
