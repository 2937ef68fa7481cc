"""Synthetic pedestrians: appearance of an identity, pose in an image, and the drawing.

Lengths are pixels of the picture drawn on. Across a body, `u` is in half shoulder widths from its middle line, positive
in the direction of view (side view) or to the right of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]
Item = TypeVar("Item")
Pattern = Literal["plain", "stripes", "bars", "print", "two-tone", "jacket"]
Cut = Literal["trousers", "skirt", "shorts"]
HairStyle = Literal["short", "long", "bun", "cap"]
Bag = Literal["none", "backpack", "handbag", "crossbody"]

# muted: with saturated clothes a color histogram would be enough for matching
CLOTHES: tuple[Color, ...] = (
    (34, 34, 40), (222, 220, 214), (122, 124, 128), (150, 48, 46), (46, 66, 128), (52, 96, 66), (196, 168, 84),
    (104, 70, 120), (198, 122, 56), (98, 70, 52), (104, 146, 172), (186, 118, 138), (58, 62, 86), (138, 134, 98),
)  # fmt: skip
SKINS: tuple[Color, ...] = ((226, 190, 164), (196, 150, 116), (142, 100, 72), (96, 66, 50))
HAIRS: tuple[Color, ...] = ((28, 24, 22), (82, 58, 40), (164, 128, 78), (118, 116, 114), (128, 66, 42))

DYE_DEVIATION = 9.0  # between garments of one base color, in gray levels
LOOKALIKE_DYE_DEVIATION = 5.0
DETAILS = ("accent", "pattern", "cut", "shoes", "hair", "hair_style", "bag", "bag_color", "has_sleeves")
NUM_CHANGED_DETAILS = 5  # that a look-alike does not share

# shares of the picture's height or width, for an average person
HEAD, TORSO, LEGS = 0.125, 0.32, 0.42
HEAD_ROOM = 0.06
HALF_SHOULDERS = 0.165
SIDE_WIDTH = 0.72


@dataclass(frozen=True)
class Appearance:
    """The attributes of an identity that are the same in all images."""

    top: Color
    bottom: Color
    accent: Color
    """Second color of the top's pattern, and of a cap."""
    pattern: Pattern
    cut: Cut
    shoes: Color
    skin: Color
    hair: Color
    hair_style: HairStyle
    bag: Bag
    bag_color: Color
    has_sleeves: bool
    carries_left: bool
    breadth: float
    """Relative to the average; likewise `height`."""
    height: float


@dataclass(frozen=True)
class Pose:
    """The pose of a person in one image."""

    is_side: bool
    is_back: bool
    facing: int
    """1 or -1: the direction of a side view in the picture."""
    stride: float
    """Distance of each foot from the middle line, -1 to 1."""
    swings: tuple[float, float]
    """Swing of each hand, -1 to 1."""
    shift: Point
    size: float
    """Relative to the camera's scale."""


@dataclass(frozen=True)
class Body:
    """Positions of the parts of a body in the picture."""

    middle: float
    half_width: float
    facing: int
    head_top: float
    shoulder: float
    hip: float
    foot: float

    def at(self, u: float, y: float) -> Point:
        """Return the point `u` half widths from the middle line at height `y`."""
        return (self.middle + self.facing * u * self.half_width, y)

    def down(self, share: float) -> float:
        """Return the height at a share of the way from shoulder to hip."""
        return self.shoulder + share * (self.hip - self.shoulder)

    def down_leg(self, share: float) -> float:
        """Return the height at a share of the way from hip to foot."""
        return self.hip + share * (self.foot - self.hip)


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """Draw one of the items."""
    return items[int(rng.integers(len(items)))]


def shade(color: Color, factor: float) -> Color:
    """Multiply a color by a factor, clipped to 0 to 255."""
    red, green, blue = (min(255, max(0, round(value * factor))) for value in color)
    return red, green, blue


def dye(rng: np.random.Generator, color: Color, deviation: float) -> Color:
    """Draw a color near another; the deviation is in gray levels."""
    red, green, blue = (min(255, max(0, round(value + rng.normal(0, deviation)))) for value in color)
    return red, green, blue


def draw_appearance(rng: np.random.Generator) -> Appearance:
    """Draw the attributes of an identity independently."""
    return Appearance(
        top=dye(rng, pick(rng, CLOTHES), DYE_DEVIATION),
        bottom=dye(rng, pick(rng, CLOTHES), DYE_DEVIATION),
        accent=dye(rng, pick(rng, CLOTHES), DYE_DEVIATION),
        pattern=pick(rng, get_args(Pattern)),
        cut=pick(rng, get_args(Cut)),
        shoes=pick(rng, CLOTHES),
        skin=pick(rng, SKINS),
        hair=pick(rng, HAIRS),
        hair_style=pick(rng, get_args(HairStyle)),
        bag=pick(rng, get_args(Bag)),
        bag_color=dye(rng, pick(rng, CLOTHES), DYE_DEVIATION),
        has_sleeves=pick(rng, (False, True)),
        carries_left=pick(rng, (False, True)),
        breadth=rng.uniform(0.85, 1.2),
        height=rng.uniform(0.92, 1.05),
    )


def draw_lookalike(rng: np.random.Generator, model: Appearance) -> Appearance:
    """Draw an identity that shares the colors of top and bottom and some details with a model."""
    other = draw_appearance(rng)
    changed = rng.choice(DETAILS, NUM_CHANGED_DETAILS, replace=False).tolist()
    kept = {name: getattr(model, name) for name in DETAILS if name not in changed}
    top, bottom = (dye(rng, color, LOOKALIKE_DYE_DEVIATION) for color in (model.top, model.bottom))
    return replace(other, top=top, bottom=bottom, **kept)


def draw_pose(rng: np.random.Generator, *, side_share: float, back_share: float) -> Pose:
    """Draw a pose; the shares are the probabilities of a view from the side and from behind."""
    return Pose(
        is_side=bool(rng.random() < side_share),
        is_back=bool(rng.random() < back_share),
        facing=pick(rng, (-1, 1)),
        stride=rng.uniform(-1, 1),
        swings=(rng.uniform(-1, 1), rng.uniform(-1, 1)),
        shift=(rng.normal(0, 5), rng.normal(0, 5)),
        size=rng.uniform(0.95, 1.05),
    )


def place_body(size: tuple[int, int], look: Appearance, pose: Pose, *, scale: float, drop: float) -> Body:
    """Place a body in a picture of size (width, height), scaled and moved down by `drop` pixels."""
    width, height = size
    scale *= look.height * pose.size
    head_top = HEAD_ROOM * height + drop + pose.shift[1]
    shoulder = head_top + HEAD * scale * height
    hip = shoulder + TORSO * scale * height
    half_width = HALF_SHOULDERS * width * look.breadth * scale * (SIDE_WIDTH if pose.is_side else 1)
    foot = hip + LEGS * scale * height
    return Body(width / 2 + pose.shift[0], half_width, pose.facing, head_top, shoulder, hip, foot)


def draw_pedestrian(picture: Image.Image, look: Appearance, pose: Pose, body: Body) -> None:
    """Draw a person into a picture, back to front."""
    pen = ImageDraw.Draw(picture)
    draw_legs(pen, look, pose, body)
    draw_arm(pen, look, pose, body, end=0)
    if not pose.is_side:
        draw_arm(pen, look, pose, body, end=1)
    if look.bag == "backpack" and pose.is_side:
        pen.polygon(corners(body, -1.55, body.down(0.06), -0.7, body.down(0.66)), fill=look.bag_color)
    draw_torso(picture, look, pose, body)
    if pose.is_side:
        draw_arm(pen, look, pose, body, end=1)
    draw_bag(pen, look, pose, body)
    draw_head(pen, look, pose, body)


def corners(body: Body, left: float, top: float, right: float, bottom: float) -> list[Point]:
    """Return the corners of an upright box between two `u` and two heights."""
    return [body.at(left, top), body.at(right, top), body.at(right, bottom), body.at(left, bottom)]


def draw_limb(pen: ImageDraw.ImageDraw, joints: Sequence[Point], radii: Sequence[float], color: Color) -> None:
    """Draw a limb through its joints, with a radius at each."""
    for (x, y), radius in zip(joints, radii, strict=True):
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
    for (x, y), (next_x, next_y), radius, next_radius in zip(joints, joints[1:], radii, radii[1:], strict=False):
        pen.polygon(
            [(x - radius, y), (x + radius, y), (next_x + next_radius, next_y), (next_x - next_radius, next_y)],
            fill=color,
        )


def draw_legs(pen: ImageDraw.ImageDraw, look: Appearance, pose: Pose, body: Body) -> None:
    """Draw legs, shoes, and trousers, skirt or shorts over them."""
    radius = body.half_width * 0.44
    is_bare = look.cut != "trousers"
    for end, light in ((-1, 0.86), (1, 1.0)):
        hip_u = end * (0.16 if pose.is_side else 0.48)
        foot_u = hip_u + end * pose.stride * (0.8 if pose.is_side else 0.2)
        knee_u = (hip_u + foot_u) / 2 + (0.22 * abs(pose.stride) if pose.is_side else 0)
        joints = [body.at(hip_u, body.hip), body.at(knee_u, body.down_leg(0.5)), body.at(foot_u, body.down_leg(0.95))]
        color = shade(look.skin if is_bare else look.bottom, light)
        thin = 0.78 if is_bare else 1.0
        draw_limb(pen, joints, [radius * thin, radius * 0.84 * thin, radius * 0.62 * thin], color)
        toe = 0.62 if pose.is_side else 0.3
        shoe = corners(body, foot_u - 0.32, body.down_leg(0.94), foot_u + toe, body.foot)
        pen.polygon(shoe, fill=shade(look.shoes, light))
        if look.cut == "shorts":
            draw_limb(pen, joints[:2], [radius * 1.1, radius * 1.05], shade(look.bottom, light))
    if look.cut == "skirt":
        hem = body.down_leg(0.52)
        skirt = [body.at(-0.92, body.hip - 4), body.at(0.92, body.hip - 4), body.at(1.2, hem), body.at(-1.2, hem)]
        pen.polygon(skirt, fill=look.bottom)


def draw_arm(pen: ImageDraw.ImageDraw, look: Appearance, pose: Pose, body: Body, *, end: int) -> None:
    """Draw one arm with a long or short sleeve; end 0 is the far or left one."""
    radius = body.half_width * (0.32 if pose.is_side else 0.26)
    swing = pose.swings[end]
    if pose.is_side:
        shoulder_u, elbow_u, hand_u = 0.0, 0.35 * swing - 0.1, 0.9 * swing
    else:
        outwards = 2 * end - 1
        reach = abs(swing)
        shoulder_u, elbow_u, hand_u = (outwards * u for u in (0.86, 1.04 + 0.12 * reach, 1.02 + 0.3 * reach))
    shoulder, elbow = body.at(shoulder_u, body.down(0.1)), body.at(elbow_u, body.down(0.55))
    wrist, hand = body.at(hand_u, body.down(0.98)), body.at(hand_u, body.down(1.06))
    sleeve = shade(look.top, 0.84 if end == 0 else 0.92)
    draw_limb(pen, [elbow, wrist, hand], [radius * 0.82, radius * 0.66, radius * 0.6], look.skin)
    draw_limb(pen, [shoulder, elbow], [radius, radius * 0.88], sleeve)
    if look.has_sleeves:
        draw_limb(pen, [elbow, wrist], [radius * 0.88, radius * 0.72], sleeve)


def draw_torso(picture: Image.Image, look: Appearance, pose: Pose, body: Body) -> None:
    """Draw the top with its pattern, masked by the torso's outline."""
    cloth = Image.new("RGB", picture.size, look.top)
    draw_pattern(ImageDraw.Draw(cloth), look, pose, body)
    outline = Image.new("L", picture.size, 0)
    half = [(0.55, 0.0), (0.98, 0.07), (0.92, 0.55), (0.96, 1.04)]
    shape = half + [(-u, share) for u, share in reversed(half)]
    ImageDraw.Draw(outline).polygon([body.at(u, body.down(share)) for u, share in shape], fill=255)
    picture.paste(cloth, (0, 0), outline)


def draw_pattern(pen: ImageDraw.ImageDraw, look: Appearance, pose: Pose, body: Body) -> None:
    """Draw the second color of the top; prints and open jackets are visible from the front only."""
    length = body.hip - body.shoulder
    if look.pattern == "stripes":
        for row in range(6):
            top = body.shoulder + length * (row + 0.4) / 5
            pen.polygon(corners(body, -1.2, top, 1.2, top + length * 0.09), fill=look.accent)
    elif look.pattern == "bars":
        for column in range(-2, 3):
            left = 0.5 * column - 0.12
            pen.polygon(corners(body, left, body.shoulder, left + 0.24, body.down(1.1)), fill=look.accent)
    elif look.pattern == "two-tone":
        pen.polygon(corners(body, -1.2, body.down(0.52), 1.2, body.down(1.1)), fill=look.accent)
    elif look.pattern == "print" and not pose.is_back and not pose.is_side:
        pen.polygon(corners(body, -0.45, body.down(0.25), 0.45, body.down(0.56)), fill=look.accent)
    elif look.pattern == "jacket" and not pose.is_back:
        near, far = (0.35, 0.95) if pose.is_side else (-0.3, 0.3)
        pen.polygon(corners(body, near, body.shoulder, far, body.down(1.1)), fill=look.accent)


def draw_bag(pen: ImageDraw.ImageDraw, look: Appearance, pose: Pose, body: Body) -> None:
    """Draw the visible part of the bag, except a backpack seen from the side."""
    # the carrying hand is on opposite sides of the picture in front and back view
    end = 1 if look.carries_left != pose.is_back else -1
    width = round(body.half_width * 0.24)
    if look.bag == "backpack" and not pose.is_side and pose.is_back:
        pen.polygon(corners(body, -0.68, body.down(0.06), 0.68, body.down(0.68)), fill=look.bag_color)
        pen.polygon(corners(body, -0.5, body.down(0.4), 0.5, body.down(0.6)), fill=shade(look.bag_color, 0.8))
    elif look.bag == "backpack":
        for u in (0.1,) if pose.is_side else (-0.5, 0.5):
            pen.line([body.at(u, body.down(0.02)), body.at(u, body.down(0.6))], fill=look.bag_color, width=width)
    elif look.bag == "handbag":
        u = end * (0.75 if pose.is_side else 1.3)
        pen.line([body.at(u, body.down(0.95)), body.at(u, body.down(1.12))], fill=shade(look.bag_color, 0.7), width=3)
        pen.polygon(corners(body, u - 0.45, body.down(1.1), u + 0.45, body.down(1.5)), fill=look.bag_color)
    elif look.bag == "crossbody":
        strap = [body.at(-0.7 * end, body.down(0.04)), body.at(0.8 * end, body.down(0.86))]
        pen.line(strap, fill=shade(look.bag_color, 0.85), width=width)
        pen.polygon(corners(body, 0.4 * end, body.down(0.72), 1.25 * end, body.down(1.06)), fill=look.bag_color)


def draw_head(pen: ImageDraw.ImageDraw, look: Appearance, pose: Pose, body: Body) -> None:
    """Draw neck, face and hair or cap."""
    tall = body.shoulder - body.head_top
    wide = tall * 0.4
    middle, top = body.middle, body.head_top
    if look.hair_style == "long":
        back = 0.35 * wide * body.facing if pose.is_side else 0
        pen.ellipse([middle - back - wide * 1.12, top, middle - back + wide * 1.12, top + tall * 1.4], fill=look.hair)
    neck = [middle - wide * 0.42, top + tall * 0.8, middle + wide * 0.42, top + tall * 1.06]
    pen.rectangle(neck, fill=shade(look.skin, 0.88))
    pen.ellipse([middle - wide, top, middle + wide, top + tall], fill=look.skin)
    draw_hair(pen, look, pose, body, wide=wide, tall=tall)


def draw_hair(pen: ImageDraw.ImageDraw, look: Appearance, pose: Pose, body: Body, *, wide: float, tall: float) -> None:
    """Draw the hair of a head; `wide` is half its width and `tall` its height, in pixels."""
    middle, top = body.middle, body.head_top
    crown = [middle - wide * 1.08, top - tall * 0.05, middle + wide * 1.08, top + tall * 0.86]
    if pose.is_back and not pose.is_side:
        length = 1.4 if look.hair_style == "long" else 0.86
        pen.ellipse([crown[0], crown[1], crown[2], top + tall * length], fill=look.hair)
    elif pose.is_side:
        # the nape is opposite to the direction of view
        start, stop = (100, 330) if body.facing > 0 else (210, 440)
        pen.pieslice(crown, start, stop, fill=look.hair)
    else:
        pen.chord(crown, 190, 350, fill=look.hair)
    if look.hair_style == "bun":
        x, radius = middle - (body.facing * wide if pose.is_side else 0), wide * 0.5
        pen.ellipse([x - radius, top - radius * 1.2, x + radius, top + radius * 0.8], fill=look.hair)
    elif look.hair_style == "cap":
        pen.chord([crown[0], crown[1], crown[2], top + tall * 0.75], 180, 360, fill=look.accent)
        if not pose.is_back or pose.is_side:
            peak = wide * 0.8 * body.facing if pose.is_side else 0
            brim = [middle + peak - wide, top + tall * 0.3, middle + peak + wide, top + tall * 0.44]
            pen.rectangle(brim, fill=shade(look.accent, 0.75))
