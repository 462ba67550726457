"""What a `beit3:` reference names: a size, a checkpoint file, and the sentencepiece model of its captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.encoders import weights
from pipelines.encoders.name import EncoderName
from pipelines.errors import ConfigError
from pipelines.secrets import carries_credentials

VOCABULARY = "beit3.spm"
_SPM = "?spm="


@dataclass(frozen=True)
class File:
    """One file of a folder."""

    folder: weights.Folder
    name: str

    @property
    def reference(self) -> str:
        return f"{self.folder.reference}/{self.name}"

    @property
    def local(self) -> bool:
        return isinstance(self.folder, weights.LocalFolder)

    def fetched(self) -> Path:
        return self.folder.fetch([self.name]) / self.name


@dataclass(frozen=True)
class Source:
    """size: `base` or `large`."""

    size: str
    checkpoint: File
    vocabulary: File

    @property
    def reference(self) -> str:
        """Read again by `resolve`."""
        return f"{self.size}@{self.checkpoint.reference}{_SPM}{self.vocabulary.reference}"


def named(name: EncoderName, options: dict[str, dict[str, Any]]) -> Source:
    """Of the name that a user gave. Raises: ConfigError."""
    size, at, file = name.reference.partition("@")
    if not (size and at and file):
        raise ConfigError(f"encoder = {name.text}: a size and a file are needed.", "As in beit3:base@DIR/beit3.pth.")
    spm = name.options.get("spm", f"{file.rpartition('/')[0] or '.'}/{VOCABULARY}")
    if carries_credentials(spm):
        raise ConfigError(f"encoder = {name.text}: a URL with credentials would be recorded.", "Put them into storage.")
    return resolve(f"{name.reference}{_SPM}{spm}", options)


def resolve(reference: str, options: dict[str, dict[str, Any]]) -> Source:
    files, _, spm = reference.partition(_SPM)
    size, _, checkpoint = files.partition("@")
    return Source(size, _file(checkpoint, options), _file(spm, options))


def _file(uri: str, options: dict[str, dict[str, Any]]) -> File:
    return File(*weights.containing(uri, options))
