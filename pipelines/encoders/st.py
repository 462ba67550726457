"""Text models of sentence-transformers: a hub name with `@revision`, a folder, or a folder in object storage.

Vectors are those of the model's own modules. Where these end in a Normalize they are of unit length; all others are
made so by the pipeline, unless `?normalize=false`. https://sbert.net
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import transformers

from pipelines.contracts import VectorSpec
from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.batch import DTYPES
from pipelines.encoders.digest import combined
from pipelines.encoders.hf_text import from_files, library_tokenizer
from pipelines.encoders.hf_weights import checkpoint_files
from pipelines.encoders.light_tokenizer import kept_digest
from pipelines.encoders.name import EncoderName
from pipelines.encoders.st_model import Normalize, Pooling, SentenceModel, load_dense, load_transformer
from pipelines.encoders.st_source import POOLS, Source, place, read
from pipelines.encoders.torch_encoder import TorchEncoder
from pipelines.errors import ConfigError, EncoderError

EXAMPLES = (
    "st:sentence-transformers/all-MiniLM-L6-v2",
    "st:sentence-transformers/clip-ViT-B-32-multilingual-v1",
    "st:intfloat/multilingual-e5-base?prompt=passage&query_prompt=query",
    "st:s3://models/labse",
)
OPTIONS = {
    "prompt": "which of the model's prompts is put before captions; its default one, if it has any, if left out",
    "query_prompt": "which of them is put before queries; the same as before captions if left out",
    "pool": f"how tokens' vectors become one, {', '.join(POOLS)}; as the folder says if left out",
    "layer": "whose vectors are pooled: 0 the embeddings, -1 the last; -1 if left out",
}

# Of a model that also writes, what reads.
_READERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
# Models that count positions from behind the padding's id, which is 1.
_POSITION_OFFSETS = {"roberta": 2, "xlm-roberta": 2, "xlm-roberta-xl": 2, "camembert": 2, "mpnet": 2}
_NO_LIMIT = 10**6


def describe(name: EncoderName, storage: dict[str, dict[str, Any]]) -> EncoderSpec:
    pool = name.one_of("pool", POOLS, "mean") if "pool" in name.options else None
    source = read(weights.folder(name.reference, storage), pool)
    folder = place(source.folder, source.transformer)
    path = folder.fetch(weights.small(folder.names()))
    config = from_files(transformers.AutoConfig, path, folder.reference)
    tokens = library_tokenizer(path, folder.reference)
    return EncoderSpec(
        name=name.text,
        family="st",
        reference=source.folder.reference,
        vectors={"text": VectorSpec(_dim(source, int(config.hidden_size)))},
        image=None,
        context_length=_longest(source, config, tokens),
        weights=combined(part.digest(files) for part, files in _parts(source.folder, source.transformer, source.steps)),
        details={
            "model": _model_class(config, folder.reference),
            "config": hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
            "matryoshka": list(getattr(config, "matryoshka_dimensions", None) or []),
            "tokenizer": kept_digest(tokens),
            "transformer": source.transformer,
            "layer": _layer(name, int(config.num_hidden_layers)),
            "steps": source.steps,
            "truncate": source.truncate,
            "lower": source.lower,
            **_prompts(name, source),
        },
        options=storage,
    )


def load(spec: EncoderSpec, device: torch.device) -> SentenceEncoder:
    root, details, dtype = weights.folder(spec.reference, spec.options), spec.details, DTYPES[spec.precision]
    parts = _parts(root, details["transformer"], details["steps"])
    paths = [folder.fetch([*files, *weights.small(folder.names())]) for folder, files in parts]
    found = combined(folder.fetched_digest(files) for folder, files in parts)
    weights.refuse_changed(root.reference, spec.weights, found)
    transformer = load_transformer(getattr(transformers, details["model"]), paths[0], dtype, spec.name)
    steps = [_step(step, root, dtype, spec.name) for step in details["steps"]]
    return SentenceEncoder(spec, device, SentenceModel(transformer, details["layer"], steps, details["truncate"]))


class SentenceEncoder(TorchEncoder):
    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.model(ids, mask)
        return vectors


def _step(step: dict[str, Any], root: weights.Folder, dtype: torch.dtype, name: str) -> torch.nn.Module:
    if step["type"] != "Dense":
        return Pooling(step["pool"]) if step["type"] == "Pooling" else Normalize()
    folder = place(root, step["path"])
    file = checkpoint_files(folder)[0]
    return load_dense(step, folder.fetch([file]) / file, dtype, name)


def _parts(
    root: weights.Folder, transformer: str, steps: list[dict[str, Any]]
) -> list[tuple[weights.Folder, list[str]]]:
    """Folders that hold weights with their files: the transformer's, then those of each Dense."""
    places = [transformer, *(step["path"] for step in steps if step["type"] == "Dense")]
    folders = [place(root, path) for path in places]
    return [(folder, checkpoint_files(folder)) for folder in folders]


def _model_class(config: Any, reference: str) -> str:
    """The bare model of the type; what was saved on top of it, as an architecture may say, is not used."""
    if config.model_type in _READERS:
        return _READERS[config.model_type]
    cls = transformers.MODEL_MAPPING.get(type(config), None)
    if hasattr(config, "vision_config") or config.is_encoder_decoder or not isinstance(cls, type):
        raise ConfigError(
            f"{reference} is of type {config.model_type}, which st: does not embed.",
            "It embeds text alone; name a model of images and text by hf:.",
        )
    return cls.__name__


def _dim(source: Source, dim: int) -> int:
    """Of the vectors, from that of the transformer's. Raises: EncoderError where a step does not fit the one before."""
    for step in source.steps:
        if step["type"] == "Pooling":
            dim *= len(step["pool"])
        elif step["type"] == "Dense":
            if step["inputs"] != dim:
                raise EncoderError(
                    f"{source.folder.reference}: {step['path']} takes {step['inputs']} values and gets {dim}.",
                    "Leave ?pool= out, or repair the checkpoint.",
                )
            dim = step["outputs"]
    return min(dim, source.truncate or dim)


def _longest(source: Source, config: Any, tokens: Any) -> int:
    """Tokens of the longest text, as the folder says, else the tokenizer; no more than the model has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    most = _NO_LIMIT if positions in (None, -1) else positions - _POSITION_OFFSETS.get(config.model_type, 0)
    longest = min(int(source.longest or tokens.model_max_length), most)
    if longest >= _NO_LIMIT:
        raise EncoderError(
            f"{source.folder.reference} does not say how long a text may be.",
            "Set max_seq_length in its sentence_bert_config.json.",
        )
    return longest


def _layer(name: EncoderName, layers: int) -> int:
    """Counted from the end, so that one layer has one name."""
    layer = name.integer("layer", -1)
    assert layer is not None
    if not -layers - 1 <= layer <= layers:
        raise ConfigError(f"encoder = {name.text}: there is no layer {layer}.", f"It has {layers}, and 0 before them.")
    return layer - layers - 1 if layer >= 0 else layer


def _prompts(name: EncoderName, source: Source) -> dict[str, str]:
    prompt = _prompt(name, "prompt", source, source.default_prompt)
    query = _prompt(name, "query_prompt", source, name.options.get("prompt", source.default_prompt))
    if (prompt or query) and not source.include_prompt:
        raise ConfigError(f"encoder = {name.text}: its pooling leaves prompts out, which is not known here.")
    return {"prompt": prompt, "query_prompt": query}


def _prompt(name: EncoderName, option: str, source: Source, default: str | None) -> str:
    key = name.options.get(option, default)
    if key is None:
        return ""
    if key not in source.prompts:
        known = f"It has {', '.join(sorted(source.prompts))}." if source.prompts else "It has none."
        raise ConfigError(f"encoder = {name.text}: the model has no prompt {key}.", known)
    return source.prompts[key]
