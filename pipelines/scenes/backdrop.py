"""What stands behind the objects: a plain colour, a gradient, stripes, dots or noise."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import Image

from pipelines.scenes.shapes import COLOURS, CONTRAST, Rgb, distance, pattern, with_article

KINDS = ("plain", "gradient", "striped", "dotted", "noisy")
GROUNDS: dict[str, Rgb] = {
    "white": (246, 246, 244),
    "cream": (250, 240, 214),
    "light grey": (208, 210, 213),
    "light blue": (184, 214, 244),
    "light green": (196, 230, 190),
    "light pink": (252, 216, 228),
    "lilac": (216, 202, 240),
    "sand": (222, 200, 156),
    "dark blue": (20, 30, 78),
    "dark green": (16, 60, 36),
    "dark red": (86, 14, 24),
    "dark grey": (60, 62, 66),
    "black": (14, 14, 16),
}


@dataclass(frozen=True)
class Backdrop:
    """kind: one of KINDS. colour: its name in GROUNDS, with `towards` the second one of a gradient."""

    kind: str
    colour: str
    towards: str | None

    def phrase(self) -> str:
        """`a striped light blue background`, `a background from black to dark red`."""
        if self.towards:
            return f"a background fading from {self.colour} to {self.towards}"
        kind = "" if self.kind == "plain" else f"{self.kind} "
        return f"{with_article(f'{kind}{self.colour}')} background"


def choose_backdrop(rng: Random) -> Backdrop:
    kind = rng.choice(KINDS)
    colour = rng.choice(list(GROUNDS))
    near = [name for name in GROUNDS if name != colour and distance(GROUNDS[name], GROUNDS[colour]) < 2 * CONTRAST]
    return Backdrop(kind, colour, rng.choice(near) if kind == "gradient" else None)


def visible_colours(backdrop: Backdrop) -> list[str]:
    """Names of the colours that stand out from all of the backdrop."""
    grounds = [GROUNDS[name] for name in (backdrop.colour, backdrop.towards) if name]
    return [name for name, rgb in COLOURS.items() if all(distance(rgb, ground) > CONTRAST for ground in grounds)]


def draw_backdrop(backdrop: Backdrop, size: tuple[int, int], rng: Random) -> Image.Image:
    """An RGB image of `size` (width, height)."""
    image = Image.new("RGB", size, GROUNDS[backdrop.colour])
    if backdrop.towards:
        return _gradient(image, GROUNDS[backdrop.towards], rng.randrange(360))
    if backdrop.kind in ("striped", "dotted"):
        step = round(min(size) * rng.uniform(0.04, 0.12))
        image.paste(_nearby(GROUNDS[backdrop.colour], 26), mask=pattern(backdrop.kind, size, step))
    if backdrop.kind == "noisy":
        return grainy(image, rng, 0.22, coarse=rng.choice((2, 4, 8)))
    return image


def _nearby(colour: Rgb, by: int) -> Rgb:
    sign = 1 if sum(colour) < 384 else -1
    red, green, blue = (min(255, max(0, c + sign * by)) for c in colour)
    return red, green, blue


def _gradient(image: Image.Image, towards: Rgb, angle_deg: int) -> Image.Image:
    width, height = image.size
    side = round(1.5 * max(width, height))
    ramp = Image.linear_gradient("L").resize((side, side)).rotate(angle_deg, Image.Resampling.BILINEAR)
    left, top = (side - width) // 2, (side - height) // 2
    mask = ramp.crop((left, top, left + width, top + height))
    return Image.composite(Image.new("RGB", image.size, towards), image, mask)


def grainy(image: Image.Image, rng: Random, strength: float, coarse: int = 1) -> Image.Image:
    """A copy with seeded grey noise; grains are `coarse` pixels wide. strength: 0 none, 1 nothing else."""
    width, height = -(-image.width // coarse), -(-image.height // coarse)
    grains = Image.frombytes("L", (width, height), rng.randbytes(width * height))
    grains = grains.resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image, grains.convert("RGB"), strength)
