"""What a user names as input, expanded to objects of one kind each: paths, brace ranges, globs, folders, lists."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from braceexpand import braceexpand

from pipelines.contracts import Entry
from pipelines.errors import InputError
from pipelines.sources.fetch import require_allowed
from pipelines.sources.identity import shard_id
from pipelines.sources.kinds import Kind, basename, kind_of, stem
from pipelines.sources.places import allowing, is_web, lies_in, place_of
from pipelines.sources.text import printable
from pipelines.storage import Store, is_local, protocol_of, whole_uri

_FORMAT_KINDS: dict[str, Kind] = {"tar": "tar", "parquet": "parquet", "manifest": "manifest"}
_FORMATS = "Known are tar, tar.gz, Parquet, JSON lines, CSV, Karpathy's JSON, and folders of images."


@dataclass
class Found:
    """The objects of each kind, each once. allow: places that lists from the network may name."""

    tars: dict[str, Entry] = field(default_factory=dict)
    parquets: dict[str, Entry] = field(default_factory=dict)
    manifests: dict[str, None] = field(default_factory=dict)
    folders: dict[str, None] = field(default_factory=dict)
    allow: Sequence[str] = ()

    def add(self, kind: Kind, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if kind == "manifest":
                self.manifests[entry.uri] = None
            else:
                (self.tars if kind == "tar" else self.parquets)[shard_id(entry.uri)] = entry


def find(inputs: list[str], format_: str, store: Store, allow: Sequence[str] = ()) -> Found:
    """Everything the inputs name. allow: places that lists from the network may name too.

    Raises: InputError where one names nothing, nothing that is known, or what it may not.
    """
    found = Found(allow=allow)
    for given in inputs:
        try:
            _find(given, format_, store, found)
        except (ValueError, ImportError, PermissionError) as error:
            raise InputError(f"{given} cannot be read: {error}", "Check its protocol and your access to it.") from error
        except FileNotFoundError as error:
            raise InputError(f"{given} does not exist: {error}", "Check the name.") from error
    return found


def _find(given: str, format_: str, store: Store, found: Found, lists: tuple[str, ...] = ()) -> None:
    """lists: the list files that lead here, each named by the one before."""
    uris = _expand_braces(given)
    if len(uris) > 1 and not any(_is_pattern(uri) for uri in uris):
        _add_files(store.stat_many(uris), given, format_, found)
        return
    for uri in uris:
        if _is_pattern(uri) and not store.exists(uri):
            _add_pattern(uri, format_, store, found)
        elif _may_be_folder(uri) and store.is_folder(uri):
            _add_folder(uri, store.entries(uri), format_, store, found)
        elif kind_of(uri) == "list" and format_ != "manifest":
            _add_list(uri, format_, store, found, lists)
        else:
            _add_files(store.stat_many([uri]), given, format_, found)


def _expand_braces(given: str) -> list[str]:
    try:
        uris = list(braceexpand(given))
    except ValueError:
        raise InputError(f"{given}: a brace is not closed", "Write a range as {00000..00099}.") from None
    return [whole_uri(uri) for uri in uris]


def _is_pattern(uri: str) -> bool:
    return any(sign in uri for sign in "*?[")


def _may_be_folder(uri: str) -> bool:
    """Spark writes folders called `x.parquet`; every other known suffix is a file's."""
    return kind_of(uri) in (None, "parquet")


def _add_files(entries: list[Entry], given: str, format_: str, found: Found) -> None:
    """Each by its suffix, or all as the format that was named."""
    for entry in entries:
        kind = _FORMAT_KINDS.get(format_) or kind_of(entry.uri)
        if kind in ("tar", "parquet", "manifest"):
            found.add(kind, [entry])
        elif kind == "image" or format_ == "folder":
            raise InputError(f"{given} is one image", "Name its folder, a pattern such as folder/*.jpg, or a manifest.")
        else:
            raise InputError(f"{entry.uri} is of no known format", f"{_FORMATS} Or name it with --format.")


def _add_pattern(pattern: str, format_: str, store: Store, found: Found) -> None:
    entries = _listed(store, store.glob(pattern))
    if not entries:
        raise InputError(f"{pattern} matches nothing", "Check the pattern; quote it, so that your shell leaves it.")
    if format_ == "folder" or all(kind_of(entry.uri) in ("image", "list") for entry in entries):
        found.folders[pattern] = None
    else:
        _add_members(pattern, entries, format_, found)


def _add_folder(uri: str, entries: list[Entry], format_: str, store: Store, found: Found) -> None:
    visible = [entry for entry in entries if not basename(entry.uri).startswith((".", "_"))]
    if not visible:
        raise InputError(f"{uri} is empty", _FORMATS)
    if format_ == "folder":
        found.folders[uri] = None
    else:
        _add_members(uri, _listed(store, visible), format_, found, uri)


def _add_members(uri: str, entries: list[Entry], format_: str, found: Found, folder: str = "") -> None:
    """The one kind a folder holds. Beside tars or Parquet other files are taken for their description.

    folder: where not a pattern but a folder was named, which links may not lead out of.
    """
    kinds: dict[Kind | None, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(kind_of(entry.uri), []).append(entry)
    kinds = _without_companions(kinds)
    present = [kind for kind in ("tar", "parquet", "image") if kind in kinds]
    wanted = _FORMAT_KINDS.get(format_)
    if wanted and kinds.get(wanted):
        _require_inside(folder, kinds[wanted], found.allow)
        found.add(wanted, kinds[wanted])
    elif wanted or len(present) > 1 or ("image" in present and _has_rows(kinds)):
        raise InputError(f"{uri} holds {_tally(kinds)}", "Name one kind with a pattern (folder/*.tar), or --format.")
    elif present == ["image"]:
        found.folders[uri] = None
    elif present or "manifest" in kinds:
        kind: Kind = "tar" if present == ["tar"] else "parquet" if present else "manifest"
        _require_inside(folder, kinds[kind], found.allow)
        found.add(kind, kinds[kind])
    else:
        raise InputError(f"{uri} holds {_tally(kinds)}, nothing to embed", _FORMATS)


def _require_inside(folder: str, entries: list[Entry], allow: Sequence[str]) -> None:
    """Raises: InputError where one is a symbolic link to what is neither in the folder nor allowed."""
    for uri in (entry.uri for entry in entries if folder and is_local(entry.uri)):
        if Path(uri).is_symlink() and not lies_in(uri, (folder, *allow)):
            place = printable(place_of(uri))
            raise InputError(
                f"{uri} is a link that leads out of its folder, to {place}",
                f"Name it by itself or with a pattern, or allow it: {allowing(place, allow)}",
            )


def _without_companions(kinds: dict[Kind | None, list[Entry]]) -> dict[Kind | None, list[Entry]]:
    """img2dataset puts `00000.parquet`, the same metadata again, beside `00000.tar` or the folder `00000`."""
    tars = {posixpath.join(posixpath.dirname(e.uri), stem(e.uri)) for e in kinds.get("tar", [])}
    folders = {posixpath.dirname(e.uri) for e in kinds.get("image", [])}
    described = tars | folders
    kept = [e for e in kinds.get("parquet", []) if e.uri.rpartition(".")[0] not in described]
    others = {kind: entries for kind, entries in kinds.items() if kind != "parquet"}
    return others | ({"parquet": kept} if kept else {})


def _has_rows(kinds: dict[Kind | None, list[Entry]]) -> bool:
    """Whether a manifest lies among images: its captions would be lost without a word. A `.json` is one
    image's metadata there."""
    return any(not entry.uri.lower().endswith(".json") for entry in kinds.get("manifest", []))


def _tally(kinds: dict[Kind | None, list[Entry]]) -> str:
    return ", ".join(
        f"{len(found)} {kind or 'other'} file{'s' * (len(found) > 1)}"
        for kind, found in sorted(kinds.items(), key=lambda kind: kind[0] or "~")
    )


def _add_list(uri: str, format_: str, store: Store, found: Found, lists: tuple[str, ...]) -> None:
    """A list file: inputs one a line, relative to its folder; a list of images is a manifest."""
    if uri in lists:
        raise InputError(f"List files name each other: {' → '.join((*lists, uri))}", "Take one of the names out.")
    lines = [line.strip() for line in _text(uri, store, lists).splitlines()]
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise InputError(f"{uri} lists nothing", "Put one path or URI on each line.")
    if all(kind_of(name) == "image" for name in named):
        found.manifests[uri] = None
        return
    uris = dict.fromkeys(name for line in named for name in _expand_braces(_absolute(line, uri)))
    if not is_local(uri):
        for name in uris:
            _require_reachable(name, uri, found.allow)
    files = {name: None for name in uris if not _is_pattern(name) and kind_of(name) not in (None, "list")}
    if files:
        _add_files(store.stat_many(list(files)), uri, format_, found)
    for name in uris:
        if name not in files and name != uri:
            _find(name, format_, store, found, (*lists, uri))


def _require_reachable(name: str, listing: str, allow: Sequence[str]) -> None:
    """A list of the user's own may name anything, as the command may; one that came over the network may send us
    to other buckets, but not to this machine's files or network. Raises: InputError."""
    if "::" in name:
        raise InputError(f"{listing} names {name}, which is no plain address", "Name the objects themselves.")
    if is_local(name) or is_web(name):
        require_allowed([name], listing, allow)


def _text(uri: str, store: Store, lists: tuple[str, ...]) -> str:
    try:
        return store.read(uri).decode("utf-8-sig", "replace")
    except FileNotFoundError:
        named = f", which {lists[-1]} names," if lists else ""
        raise InputError(f"The list file {uri}{named} does not exist", "Check the name.") from None


def _absolute(name: str, listing: str) -> str:
    if "://" in name or (is_local(listing) and name.startswith("/")):
        return name
    return f"{listing.rpartition('/')[0]}/{name.lstrip('/')}"


def _listed(store: Store, entries: list[Entry]) -> list[Entry]:
    """Web servers list names without sizes."""
    if entries and protocol_of(entries[0].uri) in ("http", "https"):
        return store.stat_many([entry.uri for entry in entries])
    return entries
