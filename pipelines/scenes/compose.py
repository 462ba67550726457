"""One scene: backdrop, objects, captions."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from PIL import Image, ImageEnhance

from pipelines.scenes.backdrop import Backdrop, choose_backdrop, draw_backdrop, grainy, visible_colours
from pipelines.scenes.layout import Layout, choose_layout
from pipelines.scenes.shapes import paint

SIDE_PIXELS = (160, 256)
OVERSAMPLING = 2
GRAIN = 0.03
OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "there is ", "an image with ", "a scene showing ", "you see ")
COUNTED = {1: "one shape", 2: "two shapes", 3: "three shapes", 4: "four shapes"}


@dataclass(frozen=True)
class Scene:
    """image: RGB, each side 160 to 256 pixels. captions: two to four, all true. objects: what was
    drawn, as plain JSON: the backdrop, the relation, and each object's look and place."""

    image: Image.Image
    captions: list[str]
    objects: dict[str, Any]


def scene(seed: int, index: int, swapped: bool = False) -> Scene:
    """Scene `index` of the endless series `seed`; the same two numbers give the same scene, pixel for pixel.

    swapped: its twin, in which the first two objects have each other's shape and colour, and are told of so; a lone
    object has another's, and one that others lie in keeps its shape.
    """
    rng = Random(f"scene {seed} {index}")
    size = (rng.randint(*SIDE_PIXELS), rng.randint(*SIDE_PIXELS))
    backdrop = choose_backdrop(rng)
    layout = choose_layout(rng, visible_colours(backdrop), swapped)
    objects = {"backdrop": asdict(backdrop), "relation": layout.relation, "things": [asdict(t) for t in layout.things]}
    return Scene(_draw(backdrop, layout, size, rng), _captions(backdrop, layout, rng), objects)


def _draw(backdrop: Backdrop, layout: Layout, size: tuple[int, int], rng: Random) -> Image.Image:
    large = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
    image = draw_backdrop(backdrop, large, rng)
    for thing in layout.things:
        paint(image, thing)
    return grainy(image.resize(size, Image.Resampling.BOX), rng, GRAIN)


def _captions(backdrop: Backdrop, layout: Layout, rng: Random) -> list[str]:
    opening = rng.choice(OPENINGS)
    captions = [
        f"{opening}{rng.choice(layout.full)}",
        f"{rng.choice(layout.short)} on {backdrop.phrase()}",
        rng.choice(layout.short),
        f"{COUNTED[len(layout.things)]}: {_listed([thing.phrase(rng.random() < 0.5) for thing in layout.things])}",
        f"{rng.choice(('on', 'against'))} {backdrop.phrase()}, {rng.choice(layout.full)}",
    ]
    return [captions[0], *rng.sample(captions[1:], rng.choice((1, 2, 3)))]


def _listed(phrases: list[str]) -> str:
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def altered(image: Image.Image, seed: int) -> Image.Image:
    """A copy as the web makes them: up to 5 % cropped from each side, a little brighter or darker,
    saved as JPEG of quality 60. RGB; the same image and seed give the same copy."""
    rng = Random(f"altered {seed}")
    left, top, right, bottom = (rng.uniform(0.01, 0.05) for _ in range(4))
    width, height = image.size
    box = (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    copy = ImageEnhance.Brightness(image.convert("RGB").crop(box)).enhance(rng.uniform(0.88, 1.12))
    return Image.open(io.BytesIO(jpeg(copy, quality=60))).convert("RGB")


def jpeg(image: Image.Image, quality: int = 90, **options: Any) -> bytes:
    """The image's bytes as a JPEG file; options as PIL's writer takes them."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, **options)
    return file.getvalue()
