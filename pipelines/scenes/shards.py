"""Scenes as WebDataset tars, the same bytes every time."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from pipelines.scenes.compose import Scene, jpeg, scene
from pipelines.scenes.damage import Damage, Files, key_of, planned_damage

PNG_EVERY = 8


def write_shards(
    folder: Path, samples: int = 1000, shards: int = 8, seed: int = 0, broken: int = 6, twins: bool = False
) -> list[Path]:
    """`shards` tars of `samples` in all, named scenes-00000.tar and on; `planned_damage` names the odd ones.

    A sample is key.jpg (every eighth a .png), key.txt with its first caption, and key.json with all
    its captions and what was drawn. twins: every second is the swapped one of that before it, with which it shares
    the metadata's `twins`. Raises: ConfigError where samples are too few for the broken ones.
    """
    damage = planned_damage(samples, broken)
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [samples * k // shards for k in range(shards + 1)]
    paths = [folder / f"scenes-{k:05d}.tar" for k in range(shards)]
    for path, start, stop in zip(paths, bounds, bounds[1:], strict=False):
        _write_tar(path, range(start, stop), seed, damage, twins)
    return paths


def _write_tar(path: Path, indices: range, seed: int, damage: dict[int, Damage], twins: bool) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            for extension, data in _files(index, seed, damage.get(index), twins).items():
                # The rest of a TarInfo is constant: no owner, no time of day.
                member = tarfile.TarInfo(f"{key_of(index)}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _files(index: int, seed: int, damage: Damage | None, twins: bool) -> Files:
    of, swapped = divmod(index, 2) if twins else (index, 0)
    drawn = scene(seed, of, swapped=bool(swapped))
    extension, image = ("png", _png(drawn)) if index % PNG_EVERY == PNG_EVERY - 1 else ("jpg", jpeg(drawn.image))
    metadata = {"seed": seed, "index": of, "captions": drawn.captions, "objects": drawn.objects}
    if twins:
        metadata |= {"twins": of, "swapped": bool(swapped)}
    files = {extension: image, "txt": drawn.captions[0].encode(), "json": json.dumps(metadata).encode()}
    return damage.apply(drawn, files) if damage else files


def _png(drawn: Scene) -> bytes:
    file = io.BytesIO()
    drawn.image.save(file, "PNG", compress_level=3)
    return file.getvalue()
