"""What a `timm:` reference names: a model, and where its weights lie."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg

from pipelines.encoders import weights
from pipelines.encoders.hub import hub_folder
from pipelines.errors import ConfigError, EncoderError

EXAMPLES = (
    "timm:vit_base_patch14_dinov2.lvd142m",
    "timm:resnet50@s3://models/mine.pth",
    "timm:local-dir:DIR",
    "timm:hf-hub:ORG/REPO",
)

_CONFIG = "config.json"
# The order in which timm itself looks for a checkpoint in a folder.
_CHECKPOINTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A reference resolved.

    model: timm's name of it, with its tag; None where the folder's config.json tells all.
    arguments: what that configuration builds the model with.
    """

    reference: str
    folder: weights.Folder
    checkpoint: str
    model: str | None
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def small(self) -> list[str]:
        """What building the model needs, the weights apart."""
        return [] if self.model else [_CONFIG]

    @property
    def files(self) -> list[str]:
        return [self.checkpoint, *self.small]

    def identifier(self, path: Path | None) -> str:
        """The name timm's own functions take. path: of the folder's files."""
        return self.model or f"local-dir:{path}"


def resolve(reference: str, options: dict[str, dict[str, Any]]) -> Source:
    """Reads configurations, never weights. Raises: ConfigError, EncoderError."""
    kind, _, rest = reference.partition(":")
    if kind in ("local-dir", "hf-hub"):
        return _of_folder(kind, weights.folder(rest, options))
    model, _, where = reference.partition("@")
    config = _configuration(model)
    if where and not _COMMIT.fullmatch(where):
        return _of_file(model, where, options)
    return _of_hub(config, where or None)


def _of_folder(kind: str, folder: weights.Folder) -> Source:
    names = folder.names()
    checkpoint = next((name for name in _CHECKPOINTS if name in names), None)
    told = json.loads((folder.fetch([_CONFIG]) / _CONFIG).read_text()) if _CONFIG in names else {}
    if checkpoint is None or not timm.is_model(str(told.get("architecture"))):
        raise EncoderError(
            f"{folder.reference} holds no timm model: {_CONFIG} with an architecture that the installed timm has, "
            f"and a checkpoint ({_CHECKPOINTS[0]}, …).",
            f"There: {', '.join(names) or 'nothing'}.",
        )
    return Source(f"{kind}:{folder.reference}", folder, checkpoint, None, told.get("model_args") or {})


def _of_file(model: str, file: str, options: dict[str, dict[str, Any]]) -> Source:
    if file.endswith((".npz", ".npy")):
        raise ConfigError(f"{file} is not a PyTorch checkpoint.", "Convert it with timm, or use the weights of a tag.")
    folder, name = weights.containing(file, options)
    return Source(f"{model}@{folder.reference}/{name}", folder, name, model)


def _of_hub(config: PretrainedCfg, revision: str | None) -> Source:
    """The commit is pinned, and so is the tag, which another timm may choose otherwise."""
    model = f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)
    if not config.hf_hub_id or str(config.custom_load) == "hf":
        raise EncoderError(
            f"timm has no weights for {model} on the hub, or none in a format of its own.",
            f"Name a tag{_tags(str(config.architecture))}, or a checkpoint: timm:{model}@FILE.",
        )
    repository, _, pinned = config.hf_hub_id.partition("@")
    folder = hub_folder(repository, revision or pinned or None, weights.default_cache())
    wanted = _hub_files(config.hf_hub_filename)
    checkpoint = next((name for name in wanted if name in folder.names()), None)
    if checkpoint is None:
        raise EncoderError(f"{repository} holds none of {', '.join(wanted)}.", "Fetch it once while online.")
    return Source(f"{model}@{folder.commit}", folder, checkpoint, model)


def _hub_files(told: str | None) -> list[str]:
    """safetensors first, as timm prefers them."""
    name = told or "pytorch_model.bin"
    safe = (
        "model.safetensors"
        if not told
        else f"{name.removesuffix('.bin').replace('pytorch_model', 'model')}.safetensors"
    )
    return [safe, name] if name.endswith(".bin") else [name]


def _configuration(model: str) -> PretrainedCfg:
    """Raises: ConfigError for an architecture or a tag that timm does not know."""
    architecture = model.partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), 3)
        raise ConfigError(
            f"timm knows no model {architecture!r}.",
            f"Perhaps {', '.join(close)}." if close else f"As in {EXAMPLES[0]}; timm.list_models() names all.",
        )
    try:
        config = timm.get_pretrained_cfg(model)
    except RuntimeError:
        config = None
    if config is None:
        raise ConfigError(f"timm has no weights {model!r}.", f"Name a tag{_tags(architecture)}.")
    return config


def _tags(architecture: str) -> str:
    known = timm.list_pretrained(f"{architecture}.*")
    return f" ({', '.join(known)})" if known else ""
