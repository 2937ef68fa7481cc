"""Synthetic cameras: their scene, color response, light, focus, resolution and noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from mprd.data.synthetic.pedestrians import Color, dye, pick, shade

FRAME = (128, 256)
"""Width and height in pixels of the drawing, before the camera model is applied."""
IMAGE = (64, 128)
"""Width and height in pixels of an image."""
SCENE_WIDTH = 3 * FRAME[0]
CURVE_LENGTH = 1024

GROUNDS: tuple[Color, ...] = (
    (112, 112, 110), (138, 132, 122), (96, 98, 102), (124, 116, 100), (150, 148, 142), (104, 112, 96),
)  # fmt: skip
WALLS: tuple[Color, ...] = (
    (142, 138, 132), (120, 118, 122), (160, 150, 134), (108, 116, 110), (132, 122, 114), (150, 154, 158),
)  # fmt: skip
LEAVES: Color = (84, 104, 74)
# the extremes over cameras, relative to neutral, at a gap of 1
EXPOSURE, BALANCE, GAMMA = (-0.16, 0.11), (-0.08, 0.08), (-0.12, 0.17)
SATURATION, LIGHT = (-0.2, 0.07), (-0.17, 0.17)
PLACE_DEVIATION = 8.0  # of the colors of walls and grounds between scenes, in gray levels
OCCLUSION_SHARE = 0.12  # of the images


@dataclass(frozen=True, eq=False)
class Camera:
    """One scene and one sensor."""

    scene: Image.Image
    """The background, three frames wide."""
    ground: Color
    gains: np.ndarray
    """Exposure times white balance, float64 `[3]`."""
    curve: np.ndarray
    """Gray level for each of CURVE_LENGTH equal steps of exposure, float64."""
    saturation: float
    light: float
    """Half the relative difference in light between the left and the right border."""
    scale: float
    """Size of a person relative to the frame; `drop` moves it down, in pixels."""
    drop: float
    blur: float
    """Standard deviation of the blur, in pixels of the image."""
    detail: float
    """Resolution of the sensor, as a share of the image's side length."""
    noise: float
    """Standard deviation of the noise, in gray levels."""
    side_share: float
    """Share of the people seen from the side; `back_share` likewise from behind."""
    back_share: float


@dataclass(frozen=True)
class Box:
    """A detector's box: its size as a share of the frame, and the position of its corner in the remaining space."""

    size: float
    left: float
    top: float


def draw_cameras(rng: np.random.Generator, num_cameras: int, *, gap: float) -> list[Camera]:
    """Draw cameras whose colors and light differ in proportion to `gap`."""

    def spread(low: float, high: float) -> np.ndarray:
        # stratified over the cameras, because few independent draws may be close by chance
        return low + (high - low) * (rng.permutation(num_cameras) + rng.random(num_cameras)) / num_cameras

    exposure, saturation, gamma = (1 + gap * spread(*limits) for limits in (EXPOSURE, SATURATION, GAMMA))
    balance = 1 + gap * np.stack([spread(*BALANCE) for _ in range(3)], axis=1)
    light, detail, blur = gap * spread(*LIGHT), spread(0.6, 1.0), spread(0, 0.8)
    side_share, back_share = spread(0.1, 0.7), spread(0.2, 0.8)
    cameras = []
    for index in range(num_cameras):
        ground, wall = (dye(rng, pick(rng, colors), PLACE_DEVIATION) for colors in (GROUNDS, WALLS))
        cameras.append(
            Camera(
                scene=draw_scene(rng, ground=ground, wall=wall),
                ground=ground,
                gains=exposure[index] * balance[index],
                curve=(255 * np.linspace(0, 1, CURVE_LENGTH) ** gamma[index]).round(6),
                saturation=float(saturation[index]),
                light=float(light[index]),
                scale=rng.uniform(0.86, 1.0),
                drop=rng.normal(0, 5),
                blur=float(blur[index]),
                detail=float(detail[index]),
                noise=rng.uniform(2, 6),
                side_share=float(side_share[index]),
                back_share=float(back_share[index]),
            )
        )
    return cameras


def draw_scene(rng: np.random.Generator, *, ground: Color, wall: Color) -> Image.Image:
    """Draw a background out of focus: a wall or greenery, the ground, and street furniture."""
    horizon = round(FRAME[1] * rng.uniform(0.25, 0.5))
    scene = draw_surfaces(ground, wall, horizon)
    pen = ImageDraw.Draw(scene)
    pick(rng, (draw_windows, draw_courses, draw_leaves))(pen, rng, wall, horizon)
    draw_paving(pen, rng, ground, horizon)
    draw_furniture(pen, rng, horizon)
    return scene.filter(ImageFilter.GaussianBlur(2.2))


def draw_surfaces(ground: Color, wall: Color, horizon: int) -> Image.Image:
    """Draw the wall, darker downwards, above the ground, lighter towards the viewer."""
    above = np.linspace(1.06, 0.94, horizon)[:, None] * np.array(wall)
    below = np.linspace(0.86, 1.08, FRAME[1] - horizon)[:, None] * np.array(ground)
    column = np.concatenate([above, below]).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(np.repeat(column[:, None], SCENE_WIDTH, axis=1))


def draw_windows(pen: ImageDraw.ImageDraw, rng: np.random.Generator, wall: Color, horizon: int) -> None:
    """Draw a row of shop windows into the wall."""
    for x in range(0, SCENE_WIDTH, 46):
        pen.rectangle([x + 8, 12, x + 34, max(14, horizon - 18)], fill=dye(rng, shade(wall, 0.72), 6))


def draw_courses(pen: ImageDraw.ImageDraw, rng: np.random.Generator, wall: Color, horizon: int) -> None:
    """Draw the courses of a stone wall."""
    for y in range(0, horizon, 14):
        pen.line([0, y, SCENE_WIDTH, y], fill=dye(rng, shade(wall, 0.86), 2), width=2)


def draw_leaves(pen: ImageDraw.ImageDraw, rng: np.random.Generator, wall: Color, horizon: int) -> None:
    """Draw bushes before the wall."""
    for _ in range(22):
        x, y, radius = draw_ints(rng, (0, SCENE_WIDTH), (0, horizon), (12, 40))
        leaves = dye(rng, LEAVES, 12)
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=leaves)


def draw_paving(pen: ImageDraw.ImageDraw, rng: np.random.Generator, ground: Color, horizon: int) -> None:
    """Draw curbs and lines that run towards the viewer."""
    for _ in range(rng.integers(3, 8)):
        x, slant, width = draw_ints(rng, (0, SCENE_WIDTH), (-60, 60), (4, 14))
        corners = [(x, horizon), (x + slant, FRAME[1]), (x + slant + width, FRAME[1])]
        pen.polygon(corners, fill=shade(ground, rng.uniform(0.85, 1.15)))


def draw_furniture(pen: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int) -> None:
    """Draw posts, bins and signs."""
    for _ in range(rng.integers(2, 6)):
        x, width, top, depth = draw_ints(rng, (0, SCENE_WIDTH), (4, 30), (0, horizon), (0, 50))
        pen.rectangle([x, top, x + width, horizon + depth], fill=draw_gray(rng))


def draw_ints(rng: np.random.Generator, *limits: tuple[int, int]) -> list[int]:
    """Draw an integer in each half-open interval."""
    return [int(rng.integers(low, high)) for low, high in limits]


def draw_gray(rng: np.random.Generator) -> Color:
    """Draw the color of street furniture."""
    (gray,) = draw_ints(rng, (60, 150))
    return dye(rng, (gray, gray, gray), 12)


def draw_background(camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Return a random frame of the camera's scene."""
    left = int(rng.integers(0, SCENE_WIDTH - FRAME[0]))
    return camera.scene.crop((left, 0, left + FRAME[0], FRAME[1]))


def draw_shadow(picture: Image.Image, camera: Camera, *, middle: float, foot: float, half_width: float) -> None:
    """Draw the shadow under a person's feet."""
    box = [middle - 1.7 * half_width, foot - 6, middle + 1.7 * half_width, foot + 8]
    ImageDraw.Draw(picture).ellipse(box, fill=shade(camera.ground, 0.6))


def draw_occluder(picture: Image.Image, rng: np.random.Generator) -> None:
    """Occlude the person in a share of the images: a bin or cart at the bottom, or a post."""
    if rng.random() >= OCCLUSION_SHARE:
        return
    width, height = FRAME
    color, left = draw_gray(rng), rng.uniform(-0.3, 0.8) * width
    if rng.random() < 0.7:
        box = [left, rng.uniform(0.6, 0.85) * height, left + 0.5 * width, height]
    else:
        box = [left, 0, left + rng.uniform(0.06, 0.12) * width, height]
    ImageDraw.Draw(picture).rectangle(box, fill=color)


def take_image(picture: Image.Image, camera: Camera, box: Box, rng: np.random.Generator) -> Image.Image:
    """Return the camera's image of a box of a drawing, of size IMAGE."""
    width, height = FRAME
    left, top = ((1 - box.size) * share * length for share, length in ((box.left, width), (box.top, height)))
    edges = (left, top, left + box.size * width, top + box.size * height)
    sensor = (round(IMAGE[0] * camera.detail), round(IMAGE[1] * camera.detail))
    view = picture.resize(sensor, Image.Resampling.BOX, box=edges).resize(IMAGE, Image.Resampling.BILINEAR)
    view = view.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.6, 1.4)))
    return develop(view, camera, rng)


def develop(view: Image.Image, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Apply the light of the scene, and the sensor's color response and noise."""
    pixels = np.asarray(ImageEnhance.Color(view).enhance(camera.saturation), np.float64)
    light = 1 + camera.light * np.linspace(-1, 1, IMAGE[0])
    exposed = pixels * light[None, :, None] * (camera.gains * rng.uniform(0.93, 1.07))
    # a table, because the last bit of a power differs between processors
    levels = (exposed * ((CURVE_LENGTH - 1) / 255)).round().clip(0, CURVE_LENGTH - 1).astype(np.intp)
    noisy = camera.curve[levels] + rng.normal(0, camera.noise, levels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
