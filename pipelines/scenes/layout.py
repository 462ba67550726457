"""Which objects a scene has, where they stand, and what may truly be said of them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from pipelines.scenes.shapes import COLOURS, CONTRAST, SHAPES, TEXTURES, Point, Thing, distance

RADII = {"small": (0.09, 0.11), "": (0.125, 0.145), "big": (0.195, 0.22), "within": (0.1, 0.12), "around": (0.34, 0.4)}
HOLDERS = ("circle", "square", "hexagon", "ring")
PLACES = {
    "in the middle": (0.5, 0.5),
    "in the top left corner": (0.22, 0.22),
    "in the top right corner": (0.78, 0.22),
    "in the bottom left corner": (0.22, 0.78),
    "in the bottom right corner": (0.78, 0.78),
}
PAIRS: dict[str, tuple[Point, Point]] = {
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
    "to the left of": ((0.26, 0.5), (0.74, 0.5)),
    "to the right of": ((0.74, 0.5), (0.26, 0.5)),
}
SAID = {
    "above": ("above", "above", "over", "on top of"),
    "below": ("below", "below", "under", "beneath"),
    "to the left of": ("to the left of", "to the left of", "left of"),
    "to the right of": ("to the right of", "to the right of", "right of"),
}
"""How a relation may be put; the first ones more often."""
OPPOSITE = dict(zip(PAIRS, ("below", "above", "to the right of", "to the left of"), strict=True))
LINES: dict[str, list[Point]] = {
    "from left to right": [(0.16, 0.5), (0.5, 0.5), (0.84, 0.5)],
    "from top to bottom": [(0.5, 0.16), (0.5, 0.5), (0.5, 0.84)],
}
JITTER = 0.015


@dataclass(frozen=True)
class Layout:
    """The objects, back to front, how they are arranged, and what is said: in full, and in short."""

    things: list[Thing]
    relation: str
    full: list[str]
    short: list[str]


class Kit:
    """Makes objects that differ from each other in colour and in shape."""

    def __init__(self, rng: Random, colours: list[str], swapped: bool) -> None:
        """swapped: what the first two would look like is exchanged, as far as their layout leaves them a choice."""
        self.rng = rng
        self._colours = rng.sample(colours, len(colours))
        self._shapes = rng.sample(list(SHAPES), len(SHAPES))
        if swapped:
            for looks in (self._colours, self._shapes):
                looks[-2:] = reversed(looks[-2:])

    def thing(self, at: Point, sizes: tuple[str, ...], textures: tuple[str, ...] = TEXTURES) -> Thing:
        """An object near `at`, of one of `sizes` (keys of RADII) and of a shape and colour not used yet."""
        rng, size = self.rng, self.rng.choice(sizes)
        said = size if size in ("small", "big") else ""
        x, y = (c + rng.uniform(-JITTER, JITTER) for c in at)
        texture, radius, turn_deg = rng.choice(textures), rng.uniform(*RADII[size]), rng.uniform(-12, 12)
        return Thing(self._shapes.pop(), self._colours.pop(), texture, said, (x, y), radius, turn_deg)

    def holder(self) -> Thing:
        """A large object that others can lie in; what is made next stands out from it."""
        shape = self.rng.choice(HOLDERS)
        self._shapes = [*(name for name in self._shapes if name != shape), shape]
        outer = self.thing((0.5, 0.5), ("around",), ("plain", "outlined"))
        rgb = COLOURS[outer.colour]
        self._colours = [name for name in self._colours if distance(COLOURS[name], rgb) > CONTRAST]
        return outer


def choose_layout(rng: Random, colours: list[str], swapped: bool = False) -> Layout:
    """One to four objects, of at least four `colours` to choose from. swapped: as Kit has it."""
    plan = rng.choices((_alone, _pair, _inside, _line, _trio, _corners), (3, 6, 3, 3, 3, 2))[0]
    return plan(Kit(rng, colours, swapped))


def _alone(kit: Kit) -> Layout:
    place = kit.rng.choice(list(PLACES))
    thing = kit.thing(PLACES[place], ("small", "", "big") if place == "in the middle" else ("small", ""))
    full, short = ([f"{thing.phrase(fully)} {place}"] for fully in (True, False))
    return Layout([thing], place, full, short)


def _pair(kit: Kit) -> Layout:
    relation = kit.rng.choice(list(PAIRS))
    one, two = (kit.thing(at, ("small", "", "big")) for at in PAIRS[relation])
    ways = [kit.rng.choice(SAID[way]) for way in (relation, OPPOSITE[relation])]
    return Layout([one, two], relation, *(_both_ways(one, two, ways, fully) for fully in (True, False)))


def _both_ways(one: Thing, two: Thing, ways: list[str], full: bool) -> list[str]:
    first, second = one.phrase(full), two.phrase(full)
    return [f"{first} {ways[0]} {second}", f"{second} {ways[1]} {first}"]


def _inside(kit: Kit) -> Layout:
    outer = kit.holder()
    inner = kit.thing(outer.centre, ("within",))

    def said(full: bool) -> list[str]:
        small, large = inner.phrase(full), outer.phrase(full)
        return [f"{small} inside {large}", f"{large} with {small} in it"]

    return Layout([outer, inner], "inside", said(True), said(False))


def _line(kit: Kit) -> Layout:
    order = kit.rng.choice(list(LINES))
    things = [kit.thing(at, ("small", "")) for at in LINES[order]]

    def said(full: bool) -> list[str]:
        one, two, three = (thing.phrase(full) for thing in things)
        return [f"{one}, {two} and {three}, {order}", f"{two} between {one} and {three}"]

    return Layout(things, order, said(True), said(False))


def _trio(kit: Kit) -> Layout:
    relation = kit.rng.choice(("above", "below"))
    lone, rest = (0.25, 0.73) if relation == "above" else (0.75, 0.27)
    places = [(0.5, lone), (0.25, rest), (0.75, rest)]
    things = [kit.thing(at, ("small", "")) for at in places]

    def said(full: bool) -> list[str]:
        one, two, three = (thing.phrase(full) for thing in things)
        return [f"{one} {relation} {two} and {three}", f"{two} next to {three}, and {one} {relation} them"]

    return Layout(things, relation, said(True), said(False))


def _corners(kit: Kit) -> Layout:
    places = [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]
    things = [kit.thing(at, ("small", "")) for at in places]
    over, under = kit.rng.choice(SAID["above"]), kit.rng.choice(SAID["below"])

    def said(full: bool) -> list[str]:
        one, two, three, four = (thing.phrase(full) for thing in things)
        return [f"{one} and {two} {over} {three} and {four}", f"{three} next to {four}, {under} {one} and {two}"]

    return Layout(things, "in four corners", said(True), said(False))
