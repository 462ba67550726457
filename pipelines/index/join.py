"""A release's index shards as one FAISS file, for readers that want no more than `faiss.read_index`."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
from faiss.contrib.ondisk import merge_ondisk

from pipelines.errors import IndexBuildError
from pipelines.index.files import sha256_of
from pipelines.index.manifest import MERGED, IndexShard, KeptFile, Merged, Release
from pipelines.index.release import merged_files
from pipelines.index.room import require_free_disk
from pipelines.index.selection import Selection, standing
from pipelines.index.train import available_bytes
from pipelines.index.tune import apply
from pipelines.lease import held
from pipelines.local_disk import COPY_BYTES
from pipelines.storage import Store, scratch_folder

FILE, LISTS = "merged.faiss", "merged.ivfdata"

Say = Callable[[str], None]


def join(store: Store, release: Release, say: Say = lambda line: None) -> None:
    """Puts `merged.faiss` beside the index shards, with their ids and search parameters, without what is gone.

    The inverted lists of an IVF go into `merged.ivfdata`, which the other file names without a folder: FAISS finds it
    from any folder with `read_index(path, faiss.IO_FLAG_ONDISK_SAME_DIR)`. Memory: one index shard at most; of keys
    without lists, all of them. Raises: IndexBuildError for a graph, of which FAISS cannot merge two, for what does not
    fit, and for index shards that are gone or damaged.
    """
    target = f"{release.folder}/{FILE}"
    if _stands(store, release):
        say(f"{target} is there already")
        return
    whole = sum(shard.bytes for shard in release.shards)
    with held(store, f"index/merge.{uuid.uuid4().hex[:12]}", "index", say=say), scratch_folder() as folder:
        scratch = Path(folder)
        require_free_disk(scratch, 2 * whole)
        among = standing(release.parts)
        files = [_fetched(store, release, shard, among, scratch) for shard in release.shards]
        index = _joined(files, store, release, whole, scratch)
        apply(index, release.search_params)
        faiss.write_index(index, str(scratch / FILE))
        count = index.ntotal
        del index
        _put(store, release, [scratch / name for name in (LISTS, FILE) if (scratch / name).exists()])
    say(f"{target}: {count:,} vectors of {len(files)} index shards")


def _stands(store: Store, release: Release) -> bool:
    known, sizes = merged_files(store, release), dict(store.sizes(release.folder))
    return bool(known) and all(sizes.get(f"{release.folder}/{file.file}") == file.bytes for file in known)


def _put(store: Store, release: Release, made: list[Path]) -> None:
    """The files, and then a note of them, by which `vecmill verify` knows them: a manifest never changes."""
    for local in made:
        store.put_atomic(f"{release.folder}/{local.name}", local)
    kept = tuple(KeptFile(file=local.name, bytes=local.stat().st_size, sha256=sha256_of(local)) for local in made)
    store.put_atomic(f"{release.folder}/{MERGED}", Merged(files=kept).model_dump_json(indent=1).encode())


def _joined(files: list[Path], store: Store, release: Release, whole: int, scratch: Path) -> Any:
    if len(files) == 1:
        # Not mapped: inverted lists that are would be written as a name of the file that they lie in.
        return faiss.read_index(str(files[0]))
    first = faiss.read_index(str(files[0]), faiss.IO_FLAG_MMAP)
    ivf = faiss.try_extract_index_ivf(first)
    if ivf is not None and release.trained:
        if isinstance(faiss.downcast_index(ivf), (faiss.IndexIVFFastScan, faiss.IndexIVFPQR)):
            raise _refused(release)
        trained = _copied(store, f"{release.folder}/{release.trained.file}", scratch / "trained.faiss")
        return _on_disk(faiss.read_index(str(trained)), files, scratch)
    free = available_bytes()
    if whole > free:
        raise IndexBuildError(
            f"{release.folder} as one {release.index_key} takes {whole:,} bytes in memory; {free:,} are free",
            "Only an IVF is merged on disk. Search the index shards as they are, or merge on a larger machine.",
        )
    try:
        return _in_memory(files)
    except RuntimeError:
        raise _refused(release) from None


def _on_disk(trained: Any, files: list[Path], scratch: Path) -> Any:
    merge_ondisk(trained, [str(file) for file in files], str(scratch / LISTS))
    lists = faiss.downcast_InvertedLists(faiss.extract_index_ivf(trained).invlists)
    # It is written as it is named here, and found beside the index wherever both are taken.
    lists.filename = LISTS
    return trained


def _in_memory(files: list[Path]) -> Any:
    index = faiss.read_index(str(files[0]))
    for file in files[1:]:
        index.merge_from(faiss.read_index(str(file)), 0)
    return index


def _refused(release: Release) -> IndexBuildError:
    return IndexBuildError(
        f"{release.folder} is of the kind {release.index_key}, of which FAISS cannot merge two",
        "Join its files with faiss.IndexShards, or build it with --shards 1.",
    )


def _fetched(store: Store, release: Release, shard: IndexShard, among: Selection | None, scratch: Path) -> Path:
    """An index shard's file on local disk, whole, and without what may not be found."""
    path = f"{release.folder}/{shard.file}"
    local = store.local_path(path) or _copied(store, path, scratch / shard.file)
    if not local.exists() or sha256_of(local) != shard.sha256:
        raise IndexBuildError(f"{store.uri(path)} is gone or damaged", "Index again with --force.")
    if among is None or among.count(shard.first_id, shard.first_id + shard.rows) == shard.rows:
        return local
    index = faiss.read_index(str(local))
    try:
        index.remove_ids(faiss.IDSelectorNot(among.selector()))
    except RuntimeError:
        raise IndexBuildError(
            f"{path} holds vectors of parts that are gone, which a {release.index_key} cannot let go of",
            "Build anew, without them: `vecmill index --force --merge`.",
        ) from None
    faiss.write_index(index, str(scratch / f"standing-{shard.file}"))
    return scratch / f"standing-{shard.file}"


def _copied(store: Store, path: str, local: Path) -> Path:
    try:
        with store.open(path) as source, local.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
    except FileNotFoundError:
        raise IndexBuildError(f"{store.uri(path)} is gone", "Index again with --force.") from None
    return local
