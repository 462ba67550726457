"""Models of the hub: listed there, or in the hub's local cache where it cannot be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from pipelines.encoders.digest import combined, file_digest
from pipelines.errors import EncoderError


@dataclass(frozen=True)
class HubFolder:
    """A model of the hub at one commit. files: name, with its folders, to sha256, where the hub tells it.

    within: of a folder of the model, its name and a slash.
    """

    name: str
    commit: str
    files: dict[str, str | None] = field(hash=False)
    cache: Path
    within: str = ""

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.commit}"

    def names(self) -> list[str]:
        inside = (name.removeprefix(self.within) for name in self.files if name.startswith(self.within))
        return sorted(name for name in inside if "/" not in name)

    def sub(self, name: str) -> HubFolder:
        return replace(self, within=f"{self.within}{name}/")

    def digest(self, names: Sequence[str]) -> str:
        return combined(self.files.get(self.within + name) or self.fetched_digest([name]) for name in names)

    def fetch(self, names: Sequence[str]) -> Path:
        wanted = [self.within + name for name in names]
        try:
            return [Path(hf_hub_download(self.name, name, revision=self.commit)) for name in wanted][-1].parent
        except Exception as error:
            raise EncoderError(f"Cannot fetch {self.reference}: {_line(error)}", _hub_fix(self.name)) from error

    def fetched_digest(self, names: Sequence[str]) -> str:
        path = self.fetch(names)
        return combined(file_digest(path / name, self.cache) for name in names)


def hub_folder(name: str, revision: str | None, cache: Path) -> HubFolder:
    """As the hub lists it; as the hub's local cache holds it, where the hub cannot be reached."""
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise EncoderError(f"The hub has no {name} for you: {_line(error)}", _hub_fix(name)) from error
    except Exception as error:
        return _cached_hub_folder(name, revision, cache, error)
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    return HubFolder(name, str(info.sha), files, cache)


def _cached_hub_folder(name: str, revision: str | None, cache: Path, cause: Exception) -> HubFolder:
    try:
        path = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:
        raise EncoderError(f"Cannot reach the hub for {name}: {_line(cause)}", _hub_fix(name)) from cause
    files = (entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file())
    return HubFolder(name, path.name, dict.fromkeys(files), cache)


def _hub_fix(name: str) -> str:
    return f"Check the name and the revision, or download {name} and give its folder (a path or s3://…) in its place."


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
