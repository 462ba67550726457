"""Shapes, colours and textures, and how one object is painted."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

from PIL import Image, ImageChops, ImageDraw

Point = tuple[float, float]
Rgb = tuple[int, int, int]
Layer = tuple[list[Point], int]

COLOURS: dict[str, Rgb] = {
    "red": (212, 32, 38),
    "orange": (248, 134, 24),
    "yellow": (252, 214, 40),
    "green": (40, 146, 60),
    "turquoise": (36, 196, 186),
    "blue": (36, 78, 210),
    "purple": (126, 48, 168),
    "pink": (250, 128, 188),
    "brown": (118, 70, 34),
    "black": (24, 24, 27),
    "grey": (128, 130, 134),
    "white": (252, 252, 250),
}
CONTRAST = 190
TEXTURES = ("plain", "outlined", "striped", "dotted", "chequered")


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    centre: x and y as fractions of the picture's width and height. radius: of the circle around the
    shape, as a fraction of the picture's shorter side. turn_deg: clockwise.
    """

    shape: str
    colour: str
    texture: str
    size: str
    centre: Point
    radius: float
    turn_deg: float

    def phrase(self, full: bool) -> str:
        """`a big striped red star`, or `a red star` where not `full`."""
        texture = "" if self.texture == "plain" else self.texture
        words = [self.size, texture, self.colour, self.shape] if full else [self.colour, self.shape]
        return with_article(" ".join(word for word in words if word))


def distance(a: Rgb, b: Rgb) -> int:
    """Sum of the channels' differences; objects stand out from what is CONTRAST away."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def paint(image: Image.Image, thing: Thing) -> None:
    """Draws the object onto an RGB image, in place."""
    radius = thing.radius * min(image.size)
    side = 2 * round(radius) + 2
    outlines = _outlines(thing, radius, side)
    mask = _mask(outlines, side)
    left, top = (round(c * length) - side // 2 for c, length in zip(thing.centre, image.size, strict=True))
    image.paste(_texture(thing, radius, side), (left, top), mask)
    if thing.texture == "outlined":
        border = _border(outlines, side, width=max(2, min(image.size) // 50))
        image.paste(_shade(COLOURS[thing.colour], 0.3), (left, top), ImageChops.multiply(border, mask))


def _outlines(thing: Thing, radius: float, side: int) -> list[Layer]:
    """The object's polygons, in pixels of a square patch around it."""

    def placed(point: Point) -> Point:
        x, y = _turned(point, thing.turn_deg)
        return side / 2 + radius * x, side / 2 + radius * y

    return [([placed(point) for point in points], ink) for points, ink in SHAPES[thing.shape]]


def _mask(outlines: list[Layer], side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    for points, ink in outlines:
        ImageDraw.Draw(mask).polygon(points, fill=ink)
    return mask


def _border(outlines: list[Layer], side: int, width: int) -> Image.Image:
    border = Image.new("L", (side, side))
    for points, _ in outlines:
        ImageDraw.Draw(border).line([*points, *points[:2]], fill=255, width=width, joint="curve")
    return border


def _texture(thing: Thing, radius: float, side: int) -> Image.Image:
    colour = COLOURS[thing.colour]
    fill = Image.new("RGB", (side, side), colour)
    if thing.texture in ("striped", "dotted", "chequered"):
        fill.paste(_shade(colour, 0.62), mask=pattern(thing.texture, fill.size, max(4, round(radius / 3.2))))
    return fill


def _shade(colour: Rgb, strength: float) -> Rgb:
    """The colour darkened, or lightened where it is almost black; the same colour still."""
    dark = sum(colour) < 120
    red, green, blue = (round(c + (255 - c) * (1 - strength)) if dark else round(c * strength) for c in colour)
    return red, green, blue


def pattern(name: str, size: tuple[int, int], step: int) -> Image.Image:
    """A mask ("L") of diagonal stripes, dots or chequers, `step` pixels wide."""
    width, height = size
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    if name == "striped":
        for x in range(-height, width, 2 * step):
            draw.polygon([(x, height), (x + step, height), (x + step + height, 0), (x + height, 0)], fill=255)
        return mask
    for i in range(width // step + 1):
        for j in range(height // step + 1):
            if (i + j) % 2 == 0:
                x, y = i * step, j * step
                shape = draw.ellipse if name == "dotted" else draw.rectangle
                shape((x, y, x + step - 1, y + step - 1), fill=255)
    return mask


def _ngon(n: int, radius: float = 1.0, start_deg: float = -90.0, x: float = 0.0, y: float = 0.0) -> list[Point]:
    angles = (start_deg * pi / 180 + 2 * pi * k / n for k in range(n))
    return [(x + radius * cos(angle), y + radius * sin(angle)) for angle in angles]


def _star() -> list[Point]:
    tips = zip(_ngon(5), _ngon(5, 0.44, -54), strict=True)
    return [point for pair in tips for point in pair]


def _cross() -> list[Point]:
    arm = [(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3)]
    return [_turned(point, 90.0 * k) for k in range(4) for point in arm]


def _heart() -> list[Point]:
    """The usual curve (MathWorld, Heart Curve), centred and scaled into the unit circle."""

    def at(t: float) -> Point:
        y = 13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)
        return 0.95 * sin(t) ** 3, -(y + 2.5) / 16

    return [at(2 * pi * k / 64) for k in range(64)]


def _drop() -> list[Point]:
    """A tip above a round belly, as the two tangents from one to the other."""
    belly = [(0.62 * cos(angle * pi / 180), 0.36 + 0.62 * sin(angle * pi / 180)) for angle in range(-27, 208, 5)]
    return [(0, -1), *belly]


def _turned(point: Point, degrees: float) -> Point:
    c, s = cos(degrees * pi / 180), sin(degrees * pi / 180)
    return point[0] * c - point[1] * s, point[0] * s + point[1] * c


SHAPES: dict[str, list[Layer]] = {
    "circle": [(_ngon(96, 0.95), 255)],
    "square": [(_ngon(4, 1.0, -45), 255)],
    "triangle": [(_ngon(3, 1.0), 255)],
    "diamond": [([(0, -1), (0.66, 0), (0, 1), (-0.66, 0)], 255)],
    "hexagon": [(_ngon(6, 1.0, 0), 255)],
    "star": [(_star(), 255)],
    "cross": [(_cross(), 255)],
    "heart": [(_heart(), 255)],
    "arrow": [([(0, -0.98), (0.7, -0.1), (0.27, -0.1), (0.27, 0.92), (-0.27, 0.92), (-0.27, -0.1), (-0.7, -0.1)], 255)],
    "drop": [(_drop(), 255)],
    "ring": [(_ngon(96), 255), (_ngon(96, 0.62), 0)],
    "moon": [(_ngon(96), 255), (_ngon(96, 0.8, x=0.46, y=-0.12), 0)],
}
"""Polygons in the unit circle (y down), painted in order: 255 adds, 0 cuts out."""
