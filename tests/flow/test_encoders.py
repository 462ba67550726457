"""Every family gives its library's own vectors through the whole pipeline: tars in, float32 Parquet out."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.config import IndexConfig
from pipelines.contracts import MODALITIES, Modality
from pipelines.embed import Report
from pipelines.errors import ConfigError
from pipelines.index.build import build_index
from pipelines.queries import Query, embed_queries, query_spec
from pipelines.search import Searcher
from pipelines.storage import Store
from tests.checkpoints import save_hf, save_open_clip
from tests.checkpoints_beit3 import HEADS, save_beit3
from tests.checkpoints_blip import save_blip, save_blip2, save_blip2_opt
from tests.checkpoints_marian import save_marian
from tests.checkpoints_matcher import save_matcher
from tests.checkpoints_st import save_st
from tests.checkpoints_timm import save_timm
from tests.checkpoints_vision import save_vision
from tests.flow.outputs import datasets, read_part
from tests.flow.runs import SMALL, embedded, rows
from tests.unit.encoders.beit3_reference import Beit3Reference
from tests.unit.encoders.blip_reference import HfBlip, HfBlip2, HfBlip2Opt
from tests.unit.encoders.inputs import CAPTIONS, ENTITIES, photos, varied
from tests.unit.encoders.marian_reference import MarianReference
from tests.unit.encoders.matcher_reference import MatcherReference
from tests.unit.encoders.reference import HfReference, OpenClipReference, error, spread
from tests.unit.encoders.st_reference import Naive
from tests.unit.encoders.vision_reference import (
    Backbone,
    Represent,
    TimmReference,
    first,
    last_map_mean,
    map_mean,
)

pytestmark = pytest.mark.timeout(300)

Towers = dict[Modality, Callable[..., np.ndarray]]
Item = tuple[str, int | None]
"""A key, and which caption of it."""


# -- the encoders --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """name: with {} for the checkpoint that `save` writes. library: the reference's towers, an item at a time."""

    name: str
    save: Callable[[Path], Path]
    library: Callable[[Path], Towers]


def both(reference: Any) -> Towers:
    return {"image": reference.image, "text": reference.text}


def hf(kind: str) -> Encoder:
    return Encoder("hf:{}", partial(save_hf, kind=kind), lambda path: both(HfReference(f"hf:{path}")))


def backbone(kind: str, represent: Represent, options: str = "") -> Encoder:
    save = partial(save_vision, kind=kind)
    return Encoder(f"hf:{{}}{options}", save, lambda path: {"image": Backbone(path, represent).image})


def of_timm(kind: str) -> Encoder:
    save = partial(save_timm, kind=kind)
    return Encoder("timm:local-dir:{}", save, lambda path: {"image": TimmReference(path).image})


def of_blip(name: str, save: Callable[[Path], Path], library: type[HfBlip], *keys: str) -> Encoder:
    """keys: the reference's names of what an image, a caption, and the two together give."""

    def towers(path: Path) -> Towers:
        reference = library(str(path))
        methods = (reference.image, reference.text, reference.pair)
        return {
            modality: lambda *item, give=give, key=key: give(*item)[key].numpy()
            for modality, give, key in zip(MODALITIES, methods, keys, strict=True)
        }

    return Encoder(name, save, towers)


ENCODERS = {
    "open-clip": Encoder(
        "open_clip:local-dir:{}", save_open_clip, lambda path: both(OpenClipReference(f"local-dir:{path}"))
    ),
    "clip": hf("clip-eos2"),
    "siglip": hf("siglip"),
    "siglip2-naflex": hf("siglip2-naflex"),
    "vit": backbone("vit", first),
    "dinov2": backbone("dinov2", first),
    "dinov3": backbone("dinov3", first),
    "efficientnet": backbone("efficientnet", map_mean),
    "efficientnet-last": backbone("efficientnet", last_map_mean, "?layer=-1"),
    "timm-vit": of_timm("vit"),
    "timm-resnet": of_timm("resnet"),
    "blip": of_blip("blip:{}", save_blip, HfBlip, *["projected"] * 3),
    "blip-hidden": of_blip("blip:{}?space=hidden", save_blip, HfBlip, *["hidden"] * 3),
    "blip2": of_blip("blip2:{}", save_blip2, HfBlip2, "mean_norm", "projected", "mean_raw"),
    "blip2-tokens": of_blip("blip2:{}?pool=tokens", save_blip2, HfBlip2, "tokens", "projected", "mean_raw"),
    "blip2-opt": Encoder("blip2:{}", save_blip2_opt, lambda path: {"image": HfBlip2Opt(str(path)).image}),
    "beit3": Encoder(f"beit3:base@{{}}?heads={HEADS}", save_beit3, lambda path: both(Beit3Reference(path))),
    "matcher": Encoder("matcher:{}", save_matcher, lambda path: both(MatcherReference(path))),
    "st": Encoder("st:{}", partial(save_st, normalize=True), lambda path: {"text": Naive(path)}),
}
# One of a family, without batch norms, behind which random weights do not survive bf16.
IN_HALF = ["open-clip", "siglip2-naflex", "vit", "timm-vit", "blip", "blip2", "beit3", "matcher", "st"]
TRANSLATED = ["open-clip", "blip", "st"]
# By their names in an output that has all: under a new one they pass through each other's actors, vit has no work.
LATER = {"later-tokens": "blip2-tokens", "vit": "vit", "later-st": "st"}


# -- what they are given -------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    key: str
    image: bytes | None
    captions: list[str]

    def files(self) -> dict[str, bytes]:
        """One caption is in a `.txt`, two are in a `.json`, and of three the first is in the `.txt`."""
        files = {Image.open(io.BytesIO(self.image)).format or "": self.image} if self.image else {}
        listed = self.captions[len(self.captions) % 2 :]
        if len(self.captions) % 2:
            files["txt"] = self.captions[0].encode()
        if listed:
            files["json"] = json.dumps({"captions": listed}).encode()
        return {f"{self.key}.{extension.lower()}": data for extension, data in files.items()}


TEXTS = [*CAPTIONS, *ENTITIES]
IMAGES: dict[str, bytes | None] = {**varied(), **{Path(name).stem: data for name, data in photos(8).items()}}


def given() -> list[Given]:
    """Images with none to three captions, and captions alone. Two of one sample are five apart: never all blank."""
    samples, at = [], 0
    for number, (key, image) in enumerate([*IMAGES.items(), *((f"words-{each}", None) for each in range(4))]):
        count = number % 4 if image else 3
        samples.append(Given(key, image, [TEXTS[(at + 5 * each) % len(TEXTS)] for each in range(count)]))
        at += 1 if count else 0
    return samples


SAMPLES = given()
# What holds nothing but blanks is no caption; a blank one among others is one.
TAKEN = {each.key: each.captions if any(map(str.strip, each.captions)) else [] for each in SAMPLES}


def items(modality: Modality, captions: dict[str, list[str]] = TAKEN) -> dict[Item, tuple[Any, ...]]:
    """Every item, and what the reference is given for it. captions: of each key."""
    if modality == "text":
        return {(key, at): (text,) for key, texts in captions.items() for at, text in enumerate(texts)}
    if modality == "image":
        return {(each.key, None): (each.image,) for each in SAMPLES if each.image}
    paired = [each for each in SAMPLES if each.image and captions[each.key]]
    return {(each.key, None): (each.image, captions[each.key][0]) for each in paired}


def write_tar(path: Path, samples: list[Given]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in (file for sample in samples for file in sample.files().items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


# -- the runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    store: Store
    report: Report

    def items(self, folder: str) -> dict[Modality, dict[str, int]]:
        """What the report says of an encoder's, by modality."""
        return dict(self.report["encoders"][folder]["items"])


@dataclass(frozen=True)
class Bench:
    """Two shards, a checkpoint and a reference for each encoder, all made once."""

    folder: Path
    checkpoint: Callable[[str], Path]
    towers: Callable[[str], Towers]

    def run(self, output: str, encoders: Iterable[str], names: Iterable[str] = (), **more: Any) -> Ended:
        """names: of the encoders' folders, their own if left out. more: settings; of `encode`, on top of the usual."""
        recipe = {
            **SMALL,
            "input": str(self.folder / "*.tar"),
            "output": str(self.folder / output),
            "encoder": [ENCODERS[alias].name.format(self.checkpoint(alias)) for alias in encoders],
            "name": list(names or encoders),
            **more,
            "encode": {**SMALL["encode"], **more.get("encode", {})},
            "write": {**SMALL["write"], "dtype": "float32"},
        }
        return Ended(*embedded(recipe))

    def theirs(self, alias: str, modality: Modality, captions: dict[str, list[str]] = TAKEN) -> np.ndarray:
        """In the order of `items`, raw."""
        return np.stack([self.towers(alias)[modality](*item) for item in items(modality, captions).values()])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("encoders")
    write_tar(folder / "a.tar", SAMPLES[: len(SAMPLES) // 2])
    write_tar(folder / "b.tar", SAMPLES[len(SAMPLES) // 2 :])
    checkpoint = cache(lambda alias: ENCODERS[alias].save(folder / alias))

    @cache
    def towers(alias: str) -> Towers:
        return {modality: cache(tower) for modality, tower in ENCODERS[alias].library(checkpoint(alias)).items()}

    return Bench(folder, checkpoint, towers)


@pytest.fixture(scope="module")
def whole(ray_local: str, bench: Bench) -> Ended:
    return bench.run("fp32", ENCODERS)


@pytest.fixture(scope="module")
def half(ray_local: str, bench: Bench) -> Ended:
    return bench.run("bf16", IN_HALF, encode={"precision": "bf16"})


@dataclass(frozen=True)
class Later(Ended):
    """before: the output's files, before encoders were added."""

    before: dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def later(whole: Ended, bench: Bench) -> Later:
    """Into the output of `whole`, in actors of their own."""
    before = files(whole.store)
    ended = bench.run("fp32", LATER.values(), LATER, encode={"pools": "each", "cpus_per_actor": 0.5})
    return Later(ended.store, ended.report, before)


def files(store: Store) -> dict[str, tuple[int, str]]:
    """When each was written, and what it holds: of data and commits, not of what is said of runs."""
    tops = [Path(store.root, top) for top in ("samples", "embeddings", "rejects", "commits")]
    paths = [path for top in tops for path in top.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(store.root)): (path.stat().st_mtime_ns, sha256(path.read_bytes()).hexdigest())
        for path in paths
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- comparing -----------------------------------------------------------------------------------


def ours(store: Store, folder: str, modality: Modality) -> np.ndarray:
    """In the order of `items`, each of which must be there once: [n, dim], or [n, count, dim]."""
    found = list(rows(store, f"embeddings/{folder}/{modality}"))
    vectors = {(row["key"], row.get("caption_index")): row["embedding"] for row in found}
    expected = items(modality)
    assert len(vectors) == len(found) and vectors.keys() == expected.keys()
    return np.array([vectors[item] for item in expected], np.float32)


def assert_near(found: np.ndarray, theirs: np.ndarray, bound: float, names: Any) -> float:
    """theirs: raw."""
    theirs = theirs.reshape(found.shape)
    theirs = theirs / np.linalg.norm(theirs, axis=-1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)
    found, theirs = (each.reshape(len(each), -1) for each in (found, theirs))
    assert spread(theirs) >= 0.2 * np.linalg.norm(theirs, axis=1).mean(), "a checkpoint that tells nothing apart"
    errors = error(found, theirs)
    worst = float(errors.max())
    assert worst <= bound, f"{list(names)[int(errors.argmax())]}: {worst:.1e}"
    return worst


def assert_the_librarys(bench: Bench, ended: Ended, alias: str, bound: float) -> None:
    modalities = [modality for modality in MODALITIES if modality in bench.towers(alias)]
    assert [each for each in MODALITIES if f"embeddings/{alias}/{each}" in datasets(ended.store)] == modalities
    assert list(ended.items(alias)) == modalities and ended.report["encoders"][alias]["rejects"] == {}
    for modality in modalities:
        expected, counts = items(modality), ended.items(alias)[modality]
        assert counts["items"] == counts["embedded"] == len(expected)
        worst = assert_near(ours(ended.store, alias, modality), bench.theirs(alias, modality), bound, expected)
        print(f"{alias} {modality} {worst:.1e}")


# -- right vectors -------------------------------------------------------------------------------


def test_every_kind_of_input_is_there() -> None:
    assert len([each for each in SAMPLES if each.image]) >= 32
    assert {text for texts in TAKEN.values() for text in texts} == set(TEXTS)
    assert {len(each.captions) for each in SAMPLES if each.image} == {0, 1, 2, 3}
    assert any(each.captions and not TAKEN[each.key] for each in SAMPLES), "captions that are all blank"


@pytest.mark.parametrize("alias", ENCODERS)
def test_vectors_are_the_librarys(whole: Ended, bench: Bench, alias: str) -> None:
    assert_the_librarys(bench, whole, alias, 1e-3)


@pytest.mark.parametrize("alias", IN_HALF)
def test_vectors_are_near_the_librarys_in_bf16(half: Ended, bench: Bench, alias: str) -> None:
    assert_the_librarys(bench, half, alias, 1e-1)


def test_parts_are_plain_float32(whole: Ended) -> None:
    for dataset, parts in datasets(whole.store).items():
        assert len(parts) == 2 and not dataset.startswith("rejects/")
        if dataset.startswith("embeddings/"):
            of = read_part(whole.store, f"{dataset}/{parts[0]}")["embedding"].type
            of = of.value_type if dataset == "embeddings/blip2-tokens/image" else of
            assert pa.types.is_fixed_size_list(of) and of.value_type == pa.float32()


def test_samples_hold_captions_as_they_came(whole: Ended) -> None:
    found = list(rows(whole.store, "samples"))
    assert len(found) == len(SAMPLES) and {row["key"]: row["captions"] for row in found} == TAKEN
    digests = {each.key: sha256(each.image).hexdigest() if each.image else None for each in SAMPLES}
    assert {row["key"]: row["sha256"] for row in found} == digests


# -- encoders that come later --------------------------------------------------------------------


def test_pools_of_their_own_give_the_same(whole: Ended, later: Later) -> None:
    assert later.report["settings"]["encode"]["pools"] == "each"
    for folder, alias in LATER.items():
        assert later.items(folder) == whole.items(alias)
        for modality in later.items(folder):
            together = ours(whole.store, alias, modality)
            assert_near(ours(later.store, folder, modality), together, 1e-5, items(modality))


def test_later_encoders_compute_only_what_is_missing(later: Later, bench: Bench) -> None:
    after = files(later.store)
    assert {path: after.get(path) for path in later.before} == later.before
    new = {"/".join(path.split("/")[:2]) for path in after.keys() - later.before.keys()}
    assert new == {f"{top}/{folder}" for top in ("embeddings", "commits") for folder in LATER if folder != "vit"}
    missing = [count["items"] for folder in LATER if folder != "vit" for count in later.items(folder).values()]
    assert later.report["stages"]["encode"]["items"] == sum(missing)
    again = bench.run("fp32", LATER.values(), LATER)
    shards = again.report["shards"]
    assert (shards["done_before"], shards["done_now"], again.report["stages"]) == (2, 0, {})
    assert files(again.store) == after


# -- translation ---------------------------------------------------------------------------------


def test_translations_are_embedded_in_place_of_captions(ray_local: str, bench: Bench) -> None:
    marian = save_marian(bench.folder / "marian")
    store = bench.run("translated", TRANSLATED, translate={"pair": "it:en", "model": str(marian)}).store
    naive = cache(MarianReference(marian))
    english = {key: [naive(text) if text.strip() else text for text in texts] for key, texts in TAKEN.items()}
    assert len({text for texts in english.values() for text in texts}) > len(TEXTS) / 2, "it says little"
    assert {row["key"]: row["captions"] for row in rows(store, "samples")} == TAKEN
    told = {
        (key, at): (text, english[key][at])
        for key, texts in TAKEN.items()
        for at, text in enumerate(texts)
        if text.strip()
    }
    for alias in TRANSLATED:
        found = list(rows(store, f"translations/{alias}"))
        assert len(found) == len(told)
        assert {(row["key"], row["caption_index"]): (row["caption"], row["translation"]) for row in found} == told
        for modality in bench.towers(alias):
            theirs = bench.theirs(alias, modality, english)
            assert_near(ours(store, alias, modality), theirs, 1e-3, items(modality))
            if modality != "image":
                untranslated = bench.theirs(alias, modality)
                assert error(theirs, untranslated).max() > 1e-1, "translated or not, it is the same"


# -- several vectors an image, and several spaces ------------------------------------------------


def test_tokens_are_searched_by_max_similarity(whole: Ended, bench: Bench) -> None:
    store, alias = whole.store, "blip2-tokens"
    asked = [text for text in TEXTS[:3] if text.strip()]
    queries = embed_queries(query_spec(store, alias), [Query(text=text) for text in asked])
    hits = Searcher(store, alias, exact=True).search(queries, len(SAMPLES))
    keys = [key for key, _ in items("image")]
    images = bench.theirs(alias, "image").reshape(len(keys), -1, queries.shape[1])
    images /= np.linalg.norm(images, axis=2, keepdims=True)
    for text, found in zip(asked, hits, strict=True):
        query = bench.towers(alias)["text"](text)
        naive = [max(float(vector @ query) for vector in image) / np.linalg.norm(query) for image in images]
        scores = {hit.key: hit.score for hit in found}
        assert [scores[key] for key in keys] == pytest.approx(naive, abs=1e-4)
        assert len(found) == len(keys) and found[0].key == keys[int(np.argmax(naive))]
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_an_index_of_tokens_is_refused(whole: Ended) -> None:
    with pytest.raises(ConfigError, match=r"4 vectors an item, compared by max-similarity(?s:.*)--exact"):
        build_index(whole.store, "blip2-tokens", "image", IndexConfig())


def test_a_query_of_another_space_is_refused(whole: Ended) -> None:
    words = [Query(text="a dog runs over the grass")]
    with pytest.raises(ConfigError, match=r"space projected, multimodal vectors of hidden: they cannot be compared"):
        embed_queries(query_spec(whole.store, "blip"), words, searched="multimodal")
    queries = embed_queries(query_spec(whole.store, "blip-hidden"), words, searched="multimodal")
    assert len(Searcher(whole.store, "blip-hidden", "multimodal", exact=True).search(queries, 5)[0]) == 5
