"""Scenes are the same every time, their captions are true, and the broken samples are broken as announced."""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageOps, ImageStat

from pipelines.config import ReadConfig
from pipelines.contracts import Sample
from pipelines.errors import ConfigError
from pipelines.scenes import altered, key_of, planned_damage, scene, write_shards
from pipelines.scenes.backdrop import GROUNDS, KINDS
from pipelines.scenes.compose import OPENINGS
from pipelines.scenes.layout import SAID
from pipelines.scenes.shapes import COLOURS, SHAPES, TEXTURES
from pipelines.sources import tar
from pipelines.storage import Store

MANY = [scene(3, index) for index in range(150)]
OPENING = rf"^(?:{'|'.join(opening for opening in set(OPENINGS) if opening)})?"


@pytest.mark.parametrize("index", range(20))
def test_in_a_twin_the_first_two_objects_have_each_others_looks(index: int) -> None:
    one, twin = scene(3, index), scene(3, index, swapped=True)
    things, theirs = one.objects["things"], twin.objects["things"]
    assert one.objects["backdrop"] == twin.objects["backdrop"] and one.objects["relation"] == twin.objects["relation"]
    assert [(thing["centre"], thing["size"]) for thing in things] == [(each["centre"], each["size"]) for each in theirs]
    assert one.captions != twin.captions and len(one.captions) == len(twin.captions)
    if one.objects["relation"] in ("above", "below", "to the left of", "to the right of"):
        looks, others = ([(each["shape"], each["colour"]) for each in of] for of in (things, theirs))
        assert others == [looks[1], looks[0], *looks[2:]]


def test_the_same_seed_and_index_give_the_same_scene() -> None:
    again = scene(3, 7)
    assert again.image.tobytes() == MANY[7].image.tobytes()
    assert again.captions == MANY[7].captions and again.objects == MANY[7].objects
    assert scene(4, 7).image.tobytes() != again.image.tobytes()


def test_scenes_are_rgb_of_moderate_size_and_plain_json() -> None:
    for drawn in MANY:
        assert drawn.image.mode == "RGB" and all(160 <= side <= 256 for side in drawn.image.size)
        assert 2 <= len(drawn.captions) <= 4 and 1 <= len(drawn.objects["things"]) <= 4
        json.dumps(drawn.objects)


def test_scenes_are_varied() -> None:
    things = [thing for drawn in MANY for thing in drawn.objects["things"]]
    for field, known in ("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES):
        assert {thing[field] for thing in things} == set(known)
    assert {drawn.objects["backdrop"]["kind"] for drawn in MANY} == set(KINDS)
    assert {drawn.objects["backdrop"]["colour"] for drawn in MANY} == set(GROUNDS)
    assert len({drawn.captions[0] for drawn in MANY}) > 140


def test_objects_of_a_scene_differ_and_lie_within_the_picture() -> None:
    for drawn in MANY:
        things = drawn.objects["things"]
        assert len({thing["colour"] for thing in things}) == len({thing["shape"] for thing in things}) == len(things)
        for thing in things:
            for centre, side in zip(thing["centre"], drawn.image.size, strict=True):
                reach = thing["radius"] * min(drawn.image.size)
                assert reach - 1 <= centre * side <= side - reach + 1


def test_captions_name_what_was_drawn_and_where() -> None:
    for drawn in MANY:
        for caption in drawn.captions:
            said = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", caption)
            drawn_pairs = {(thing["colour"], thing["shape"]) for thing in drawn.objects["things"]}
            assert set(said) == drawn_pairs, caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
            assert stated_place_is_true(caption, drawn.objects["things"]), caption


def stated_place_is_true(caption: str, things: list[dict]) -> bool:
    """Compares `A above B` and its like with the centres that were drawn."""
    centre = {(thing["colour"], thing["shape"]): thing["centre"] for thing in things}
    noun = rf"an? [a-z ]*?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    ways = {said: relation for relation, ways in SAID.items() for said in ways}
    found = re.search(rf"{OPENING}{noun} ({'|'.join(sorted(ways, key=len, reverse=True))}) {noun}", caption)
    if not found:
        return True
    (x1, y1), (x2, y2) = centre[found[1], found[2]], centre[found[4], found[5]]
    return {"above": y1 < y2, "below": y1 > y2, "to the left of": x1 < x2, "to the right of": x1 > x2}[ways[found[3]]]


def test_objects_are_painted_in_their_colour() -> None:
    for drawn in MANY:
        for thing in drawn.objects["things"]:
            if (
                drawn.objects["relation"] == "inside"
                or thing["texture"] != "plain"
                or thing["shape"] in ("ring", "moon")
            ):
                continue
            x, y = (round(c * side) for c, side in zip(thing["centre"], drawn.image.size, strict=True))
            patch = ImageStat.Stat(drawn.image.crop((x - 2, y - 2, x + 3, y + 3))).mean
            assert all(abs(a - b) < 12 for a, b in zip(patch, COLOURS[thing["colour"]], strict=True)), thing


def test_an_altered_copy_is_near_its_original_but_not_the_same() -> None:
    image = MANY[0].image
    copy = altered(image, 1)
    assert copy.mode == "RGB" and copy.tobytes() == altered(image, 1).tobytes() != altered(image, 2).tobytes()
    assert all(0.88 * before <= after < before for before, after in zip(image.size, copy.size, strict=True))
    assert distance(copy, image) < 0.5 * distance(MANY[1].image, image)


def distance(one: Image.Image, two: Image.Image) -> float:
    small = [image.resize((16, 16), Image.Resampling.BOX) for image in (one, two)]
    return sum(ImageStat.Stat(ImageChops.difference(*small)).mean)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("shards"), samples=40, shards=3)


def read(paths: list[Path]) -> list[Sample]:
    store = Store()
    planned = tar.plan([store.stat(str(path)) for path in paths])
    return [sample for shard in planned for sample in tar.samples(shard, ReadConfig(), store)]


def test_shards_hold_every_sample_once_in_order(shards: list[Path]) -> None:
    samples = read(shards)
    assert [path.name for path in shards] == ["scenes-00000.tar", "scenes-00001.tar", "scenes-00002.tar"]
    assert [sample.key for sample in samples] == [key_of(index) for index in range(40)]
    assert samples[0].captions == scene(0, 0).captions
    assert samples[0].metadata["objects"]["relation"] == scene(0, 0).objects["relation"]


def test_shards_are_the_same_bytes_every_time(shards: list[Path], tmp_path: Path) -> None:
    again = write_shards(tmp_path, samples=40, shards=3)
    assert [digest(path) for path in again] == [digest(path) for path in shards]
    with tarfile.open(again[0]) as archive:
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}
        assert {Path(member.name).suffix for member in archive} >= {".jpg", ".png", ".txt", ".json"}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_broken_samples_are_broken_as_announced_and_no_others(shards: list[Path]) -> None:
    damage = planned_damage(40, 6)
    assert sum(done.modality is not None for done in damage.values()) == 6
    for index, sample in enumerate(read(shards)):
        expected = damage[index].modality if index in damage else None
        broken_captions = [reject.caption_index for reject in sample.rejects if reject.modality == "text"]
        assert broken_captions == ([0] if expected == "text" else []), sample.key
        assert readable(sample.image) == (expected != "image"), sample.key


def readable(data: bytes | None) -> bool:
    try:
        Image.open(io.BytesIO(data or b"")).load()
    except (OSError, Image.DecompressionBombError):
        return False
    return True


def test_odd_samples_show_the_same_picture(shards: list[Path]) -> None:
    samples = read(shards)
    odd = [index for index, done in planned_damage(40, 6).items() if done.modality is None]
    for index in odd:
        stored = Image.open(io.BytesIO(samples[index].image or b""))
        shown = ImageOps.exif_transpose(stored).convert("RGB")
        assert shown.size == scene(0, index).image.size
        assert distance(shown, scene(0, index).image) < 15
    assert {Image.open(io.BytesIO(samples[i].image or b"")).mode for i in odd} == {"RGB", "CMYK"}


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few"):
        write_shards(tmp_path, samples=8, shards=1)
