"""What an `open_clip:` reference names: an architecture, its preprocessing, and where the weights lie."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from pipelines.encoders import weights
from pipelines.encoders.hub import hub_folder
from pipelines.encoders.quickgelu import refuse_mismatch
from pipelines.errors import ConfigError, EncoderError

EXAMPLES = (
    "open_clip:ViT-B-32/laion2b_s34b_b79k",
    "open_clip:ViT-B-32@s3://models/mine.pt",
    "open_clip:local-dir:DIR",
    "open_clip:hf-hub:ORG/REPO",
)

_CONFIG = "open_clip_config.json"
# The order in which open_clip itself looks for a checkpoint in a folder.
_CHECKPOINTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


@dataclass(frozen=True)
class Source:
    """A reference resolved: which architecture, preprocessing and weights, and where they lie."""

    reference: str
    folder: weights.Folder
    checkpoint: str
    model: dict[str, Any]
    preprocess: dict[str, Any]
    arch: str | None

    @property
    def files(self) -> list[str]:
        """All that loading needs: with a folder of its own, the configuration and the tokenizer too."""
        return [self.checkpoint] if self.arch else [self.checkpoint, *weights.small(self.folder.names())]

    def identifier(self, path: Path) -> str:
        """The name open_clip's own functions take."""
        return self.arch or f"local-dir:{path}"


def resolve(reference: str, options: dict[str, dict[str, Any]]) -> Source:
    """Reads configurations, never weights. Raises: ConfigError, EncoderError."""
    kind, _, rest = reference.partition(":")
    if kind in ("local-dir", "hf-hub"):
        return _of_folder(kind, weights.folder(rest, options))
    if "@" in reference:
        arch, _, file = reference.partition("@")
        return _of_file(arch, file, options)
    arch, _, tag = reference.rpartition("/")
    return _of_tag(arch.replace("/", "-") or reference, tag if arch else "")


def _of_folder(kind: str, folder: weights.Folder) -> Source:
    names = folder.names()
    checkpoint = _checkpoint(names)
    if _CONFIG not in names or checkpoint is None:
        raise EncoderError(
            f"{folder.reference} holds no open_clip model: {_CONFIG} and a checkpoint ({_CHECKPOINTS[0]}, …).",
            f"There: {', '.join(names) or 'nothing'}.",
        )
    config = json.loads((folder.fetch([_CONFIG]) / _CONFIG).read_text())
    if "model_cfg" not in config:
        raise EncoderError(f"{folder.reference}/{_CONFIG} has no model_cfg.", "Save it as open_clip's push_to_hf_hub.")
    refuse_mismatch(config["model_cfg"], folder.reference.rpartition("/")[2])
    reference = f"{kind}:{folder.reference}"
    return Source(reference, folder, checkpoint, config["model_cfg"], config.get("preprocess_cfg") or {}, None)


def _checkpoint(names: list[str]) -> str | None:
    """As open_clip chooses among several."""
    found = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pth")))
    preferred = [name for name in _CHECKPOINTS if name in found]
    return next(iter(preferred + [name for name in found if name.endswith(".safetensors")] + found), None)


def _of_file(arch: str, file: str, options: dict[str, dict[str, Any]]) -> Source:
    model = _architecture(arch)
    refuse_mismatch(model, file.rpartition("/")[2], arch)
    folder, name = weights.containing(file, options)
    return Source(f"{arch}@{folder.reference}/{name}", folder, name, model, {}, arch)


def _of_tag(arch: str, tag: str) -> Source:
    model, pretrained = tagged(arch, tag)
    repository, _, name = str(pretrained["hf_hub"]).rpartition("/")
    folder = hub_folder(repository, None, weights.default_cache())
    wanted = [name.rpartition(".")[0] + ".safetensors", name] if name else [_CHECKPOINTS[0], _CHECKPOINTS[2]]
    checkpoint = next((candidate for candidate in wanted if candidate in folder.files), None)
    if checkpoint is None:
        raise EncoderError(f"{repository} holds none of {', '.join(wanted)}.", "Fetch it once while online.")
    return Source(f"{arch}/{tag}", folder, checkpoint, model, pretrained, arch)


def tagged(arch: str, tag: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configurations of an architecture and of one of its pretrained tags. Raises: ConfigError, EncoderError."""
    model = _architecture(arch)
    pretrained = get_pretrained_cfg(arch, tag)
    if not pretrained:
        tags = ", ".join(list_pretrained_tags_by_model(arch)) or "none"
        raise ConfigError(f"open_clip has no weights {tag!r} for {arch}.", f"Its tags: {tags}. A file: {arch}@FILE.")
    refuse_mismatch(model, tag, arch, bool(pretrained.get("quick_gelu", False)))
    return model, pretrained


def _architecture(arch: str) -> dict[str, Any]:
    model: dict[str, Any] | None = open_clip.get_model_config(arch)
    if model is None:
        close = difflib.get_close_matches(arch, open_clip.list_models(), 3)
        raise ConfigError(
            f"open_clip knows no architecture {arch!r}.",
            f"Perhaps {', '.join(close)}." if close else f"As in {EXAMPLES[0]}; open_clip.list_models() names all.",
        )
    return model
