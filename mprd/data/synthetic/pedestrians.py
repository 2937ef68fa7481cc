"""Drawn pedestrians: what an identity looks like, how it stands, and its picture.

Lengths are pixels of the picture drawn on. Across a body `u` counts half shoulder widths from its middle line,
positive where the person looks (side view) or to the right of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]
Item = TypeVar("Item")
Pattern = Literal["plain", "stripes", "bars", "print", "two-tone", "jacket"]
Cut = Literal["trousers", "skirt", "shorts"]
HairStyle = Literal["short", "long", "bun", "cap"]
Bag = Literal["none", "backpack", "handbag", "crossbody"]

# muted, as in the street: saturated clothes would let a colour histogram do the matching
CLOTHES: tuple[Colour, ...] = (
    (34, 34, 40), (222, 220, 214), (122, 124, 128), (150, 48, 46), (46, 66, 128), (52, 96, 66), (196, 168, 84),
    (104, 70, 120), (198, 122, 56), (98, 70, 52), (104, 146, 172), (186, 118, 138), (58, 62, 86), (138, 134, 98),
)  # fmt: skip
SKINS: tuple[Colour, ...] = ((226, 190, 164), (196, 150, 116), (142, 100, 72), (96, 66, 50))
HAIRS: tuple[Colour, ...] = ((28, 24, 22), (82, 58, 40), (164, 128, 78), (118, 116, 114), (128, 66, 42))

DYE_DEVIATION = 9.0  # two garments of one colour name, in gray levels
LOOKALIKE_DYE_DEVIATION = 5.0
DETAILS = ("accent", "pattern", "cut", "shoes", "hair", "hair_style", "bag", "bag_colour", "has_sleeves")
NUM_CHANGED_DETAILS = 5  # of a look-alike's, drawn anew

# shares of the picture's height or width, for a person of ordinary build
HEAD, TORSO, LEGS = 0.125, 0.32, 0.42
HEAD_ROOM = 0.06
HALF_SHOULDERS = 0.165
SIDE_WIDTH = 0.72


@dataclass(frozen=True)
class Appearance:
    """What stays the same of an identity under every camera."""

    top: Colour
    bottom: Colour
    accent: Colour
    """Second colour of the top's pattern, and of a cap."""
    pattern: Pattern
    cut: Cut
    shoes: Colour
    skin: Colour
    hair: Colour
    hair_style: HairStyle
    bag: Bag
    bag_colour: Colour
    has_sleeves: bool
    carries_left: bool
    breadth: float
    """Breadth against the ordinary build; likewise `height`."""
    height: float


@dataclass(frozen=True)
class Pose:
    """How a person stands in one image."""

    is_side: bool
    is_back: bool
    facing: int
    """1 or -1: where a side view looks in the picture."""
    stride: float
    """Distance of each foot from the middle line, -1 to 1."""
    swings: tuple[float, float]
    """How far the hands swing, -1 to 1."""
    shift: Point
    size: float
    """Against the ordinary size under this camera."""


@dataclass(frozen=True)
class Body:
    """Where the parts of a body lie in the picture."""

    middle: float
    half_width: float
    facing: int
    head_top: float
    shoulder: float
    hip: float
    foot: float

    def at(self, u: float, y: float) -> Point:
        """Place a point, `u` half widths off the middle line."""
        return (self.middle + self.facing * u * self.half_width, y)

    def down(self, share: float) -> float:
        """Return the height a share of the way from shoulder to hip."""
        return self.shoulder + share * (self.hip - self.shoulder)

    def down_leg(self, share: float) -> float:
        """Return the height a share of the way from hip to foot."""
        return self.hip + share * (self.foot - self.hip)


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """Draw one of some items."""
    return items[int(rng.integers(len(items)))]


def shade(colour: Colour, factor: float) -> Colour:
    """Multiply a colour, keeping it in range."""
    red, green, blue = (min(255, max(0, round(value * factor))) for value in colour)
    return red, green, blue


def dye(rng: np.random.Generator, colour: Colour, deviation: float) -> Colour:
    """Draw a colour near another, the deviation in gray levels."""
    red, green, blue = (min(255, max(0, round(value + rng.normal(0, deviation)))) for value in colour)
    return red, green, blue


def draw_appearance(rng: np.random.Generator) -> Appearance:
    """Draw what an identity looks like."""
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
        bag_colour=dye(rng, pick(rng, CLOTHES), DYE_DEVIATION),
        has_sleeves=pick(rng, (False, True)),
        carries_left=pick(rng, (False, True)),
        breadth=rng.uniform(0.85, 1.2),
        height=rng.uniform(0.92, 1.05),
    )


def draw_lookalike(rng: np.random.Generator, model: Appearance) -> Appearance:
    """Draw another identity in the model's clothes: the colours of top and bottom and some details are shared."""
    other = draw_appearance(rng)
    changed = rng.choice(DETAILS, NUM_CHANGED_DETAILS, replace=False).tolist()
    kept = {name: getattr(model, name) for name in DETAILS if name not in changed}
    top, bottom = (dye(rng, colour, LOOKALIKE_DYE_DEVIATION) for colour in (model.top, model.bottom))
    return replace(other, top=top, bottom=bottom, **kept)


def draw_pose(rng: np.random.Generator, *, side_share: float, back_share: float) -> Pose:
    """Draw how a person stands, for a camera that sees such shares of people from the side and from behind."""
    return Pose(
        is_side=bool(rng.random() < side_share),
        is_back=bool(rng.random() < back_share),
        facing=pick(rng, (-1, 1)),
        stride=rng.uniform(-1, 1),
        swings=(rng.uniform(-1, 1), rng.uniform(-1, 1)),
        shift=(rng.normal(0, 5), rng.normal(0, 5)),
        size=rng.uniform(0.95, 1.05),
    )


def place_body(size: tuple[int, int], who: Appearance, pose: Pose, *, scale: float, drop: float) -> Body:
    """Lay a body into a picture of this width and height; a camera scales it and moves it down by `drop` pixels."""
    width, height = size
    scale *= who.height * pose.size
    head_top = HEAD_ROOM * height + drop + pose.shift[1]
    shoulder = head_top + HEAD * scale * height
    hip = shoulder + TORSO * scale * height
    half_width = HALF_SHOULDERS * width * who.breadth * scale * (SIDE_WIDTH if pose.is_side else 1)
    foot = hip + LEGS * scale * height
    return Body(width / 2 + pose.shift[0], half_width, pose.facing, head_top, shoulder, hip, foot)


def draw_pedestrian(picture: Image.Image, who: Appearance, pose: Pose, body: Body) -> None:
    """Draw a person into a picture, from what is farthest to what is nearest."""
    pen = ImageDraw.Draw(picture)
    draw_legs(pen, who, pose, body)
    draw_arm(pen, who, pose, body, end=0)
    if not pose.is_side:
        draw_arm(pen, who, pose, body, end=1)
    if who.bag == "backpack" and pose.is_side:
        pen.polygon(corners(body, -1.55, body.down(0.06), -0.7, body.down(0.66)), fill=who.bag_colour)
    draw_torso(picture, who, pose, body)
    if pose.is_side:
        draw_arm(pen, who, pose, body, end=1)
    draw_bag(pen, who, pose, body)
    draw_head(pen, who, pose, body)


def corners(body: Body, left: float, top: float, right: float, bottom: float) -> list[Point]:
    """Return the corners of an upright box between two `u` and two heights."""
    return [body.at(left, top), body.at(right, top), body.at(right, bottom), body.at(left, bottom)]


def draw_limb(pen: ImageDraw.ImageDraw, joints: Sequence[Point], radii: Sequence[float], colour: Colour) -> None:
    """Draw a limb through its joints, as thick at each as its radius."""
    for (x, y), radius in zip(joints, radii, strict=True):
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    for (x, y), (next_x, next_y), radius, next_radius in zip(joints, joints[1:], radii, radii[1:], strict=False):
        pen.polygon(
            [(x - radius, y), (x + radius, y), (next_x + next_radius, next_y), (next_x - next_radius, next_y)],
            fill=colour,
        )


def draw_legs(pen: ImageDraw.ImageDraw, who: Appearance, pose: Pose, body: Body) -> None:
    """Draw legs, shoes, and trousers, skirt or shorts over them."""
    radius = body.half_width * 0.44
    is_bare = who.cut != "trousers"
    for end, light in ((-1, 0.86), (1, 1.0)):
        hip_u = end * (0.16 if pose.is_side else 0.48)
        foot_u = hip_u + end * pose.stride * (0.8 if pose.is_side else 0.2)
        knee_u = (hip_u + foot_u) / 2 + (0.22 * abs(pose.stride) if pose.is_side else 0)
        joints = [body.at(hip_u, body.hip), body.at(knee_u, body.down_leg(0.5)), body.at(foot_u, body.down_leg(0.95))]
        colour = shade(who.skin if is_bare else who.bottom, light)
        thin = 0.78 if is_bare else 1.0
        draw_limb(pen, joints, [radius * thin, radius * 0.84 * thin, radius * 0.62 * thin], colour)
        toe = 0.62 if pose.is_side else 0.3
        shoe = corners(body, foot_u - 0.32, body.down_leg(0.94), foot_u + toe, body.foot)
        pen.polygon(shoe, fill=shade(who.shoes, light))
        if who.cut == "shorts":
            draw_limb(pen, joints[:2], [radius * 1.1, radius * 1.05], shade(who.bottom, light))
    if who.cut == "skirt":
        hem = body.down_leg(0.52)
        skirt = [body.at(-0.92, body.hip - 4), body.at(0.92, body.hip - 4), body.at(1.2, hem), body.at(-1.2, hem)]
        pen.polygon(skirt, fill=who.bottom)


def draw_arm(pen: ImageDraw.ImageDraw, who: Appearance, pose: Pose, body: Body, *, end: int) -> None:
    """Draw one arm, sleeved to the wrist or to the upper arm; end 0 is the far or left one."""
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
    sleeve = shade(who.top, 0.84 if end == 0 else 0.92)
    draw_limb(pen, [elbow, wrist, hand], [radius * 0.82, radius * 0.66, radius * 0.6], who.skin)
    draw_limb(pen, [shoulder, elbow], [radius, radius * 0.88], sleeve)
    if who.has_sleeves:
        draw_limb(pen, [elbow, wrist], [radius * 0.88, radius * 0.72], sleeve)


def draw_torso(picture: Image.Image, who: Appearance, pose: Pose, body: Body) -> None:
    """Draw the top with its pattern, cut out by the torso's outline."""
    cloth = Image.new("RGB", picture.size, who.top)
    draw_pattern(ImageDraw.Draw(cloth), who, pose, body)
    outline = Image.new("L", picture.size, 0)
    half = [(0.55, 0.0), (0.98, 0.07), (0.92, 0.55), (0.96, 1.04)]
    shape = half + [(-u, share) for u, share in reversed(half)]
    ImageDraw.Draw(outline).polygon([body.at(u, body.down(share)) for u, share in shape], fill=255)
    picture.paste(cloth, (0, 0), outline)


def draw_pattern(pen: ImageDraw.ImageDraw, who: Appearance, pose: Pose, body: Body) -> None:
    """Draw the second colour of the top; prints and open jackets show from the front only."""
    length = body.hip - body.shoulder
    if who.pattern == "stripes":
        for row in range(6):
            top = body.shoulder + length * (row + 0.4) / 5
            pen.polygon(corners(body, -1.2, top, 1.2, top + length * 0.09), fill=who.accent)
    elif who.pattern == "bars":
        for column in range(-2, 3):
            left = 0.5 * column - 0.12
            pen.polygon(corners(body, left, body.shoulder, left + 0.24, body.down(1.1)), fill=who.accent)
    elif who.pattern == "two-tone":
        pen.polygon(corners(body, -1.2, body.down(0.52), 1.2, body.down(1.1)), fill=who.accent)
    elif who.pattern == "print" and not pose.is_back and not pose.is_side:
        pen.polygon(corners(body, -0.45, body.down(0.25), 0.45, body.down(0.56)), fill=who.accent)
    elif who.pattern == "jacket" and not pose.is_back:
        near, far = (0.35, 0.95) if pose.is_side else (-0.3, 0.3)
        pen.polygon(corners(body, near, body.shoulder, far, body.down(1.1)), fill=who.accent)


def draw_bag(pen: ImageDraw.ImageDraw, who: Appearance, pose: Pose, body: Body) -> None:
    """Draw what shows of the bag from this viewpoint, apart from a backpack seen from the side."""
    # the carrying hand changes its side of the picture between front and back view
    end = 1 if who.carries_left != pose.is_back else -1
    width = round(body.half_width * 0.24)
    if who.bag == "backpack" and not pose.is_side and pose.is_back:
        pen.polygon(corners(body, -0.68, body.down(0.06), 0.68, body.down(0.68)), fill=who.bag_colour)
        pen.polygon(corners(body, -0.5, body.down(0.4), 0.5, body.down(0.6)), fill=shade(who.bag_colour, 0.8))
    elif who.bag == "backpack":
        for u in (0.1,) if pose.is_side else (-0.5, 0.5):
            pen.line([body.at(u, body.down(0.02)), body.at(u, body.down(0.6))], fill=who.bag_colour, width=width)
    elif who.bag == "handbag":
        u = end * (0.75 if pose.is_side else 1.3)
        pen.line([body.at(u, body.down(0.95)), body.at(u, body.down(1.12))], fill=shade(who.bag_colour, 0.7), width=3)
        pen.polygon(corners(body, u - 0.45, body.down(1.1), u + 0.45, body.down(1.5)), fill=who.bag_colour)
    elif who.bag == "crossbody":
        strap = [body.at(-0.7 * end, body.down(0.04)), body.at(0.8 * end, body.down(0.86))]
        pen.line(strap, fill=shade(who.bag_colour, 0.85), width=width)
        pen.polygon(corners(body, 0.4 * end, body.down(0.72), 1.25 * end, body.down(1.06)), fill=who.bag_colour)


def draw_head(pen: ImageDraw.ImageDraw, who: Appearance, pose: Pose, body: Body) -> None:
    """Draw neck, face and hair or cap."""
    tall = body.shoulder - body.head_top
    wide = tall * 0.4
    middle, top = body.middle, body.head_top
    if who.hair_style == "long":
        back = 0.35 * wide * body.facing if pose.is_side else 0
        pen.ellipse([middle - back - wide * 1.12, top, middle - back + wide * 1.12, top + tall * 1.4], fill=who.hair)
    neck = [middle - wide * 0.42, top + tall * 0.8, middle + wide * 0.42, top + tall * 1.06]
    pen.rectangle(neck, fill=shade(who.skin, 0.88))
    pen.ellipse([middle - wide, top, middle + wide, top + tall], fill=who.skin)
    draw_hair(pen, who, pose, body, wide=wide, tall=tall)


def draw_hair(pen: ImageDraw.ImageDraw, who: Appearance, pose: Pose, body: Body, *, wide: float, tall: float) -> None:
    """Draw the hair over a head so many pixels half wide and tall, as seen from this viewpoint."""
    middle, top = body.middle, body.head_top
    crown = [middle - wide * 1.08, top - tall * 0.05, middle + wide * 1.08, top + tall * 0.86]
    if pose.is_back and not pose.is_side:
        length = 1.4 if who.hair_style == "long" else 0.86
        pen.ellipse([crown[0], crown[1], crown[2], top + tall * length], fill=who.hair)
    elif pose.is_side:
        # the nape lies opposite to where the person looks
        start, stop = (100, 330) if body.facing > 0 else (210, 440)
        pen.pieslice(crown, start, stop, fill=who.hair)
    else:
        pen.chord(crown, 190, 350, fill=who.hair)
    if who.hair_style == "bun":
        x, radius = middle - (body.facing * wide if pose.is_side else 0), wide * 0.5
        pen.ellipse([x - radius, top - radius * 1.2, x + radius, top + radius * 0.8], fill=who.hair)
    elif who.hair_style == "cap":
        pen.chord([crown[0], crown[1], crown[2], top + tall * 0.75], 180, 360, fill=who.accent)
        if not pose.is_back or pose.is_side:
            peak = wide * 0.8 * body.facing if pose.is_side else 0
            brim = [middle + peak - wide, top + tall * 0.3, middle + peak + wide, top + tall * 0.44]
            pen.rectangle(brim, fill=shade(who.accent, 0.75))
