"""Nothing in an input makes the job touch a file that it was not pointed at, nor run what comes in one."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from itertools import starmap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from tests.fault.through import rows_of
from tests.unit.sources.made import jpeg

# Reads and decodes a tar, and tells of every file that was opened, made or looked at meanwhile.
WATCHED = """
import json, sys
from tests.fault.through import rows_of

good, bad = sys.argv[1:]
rows_of(good)
touched = []

def watch(event, arguments):
    if event.split(".")[0] in ("open", "os", "shutil", "socket", "subprocess", "tempfile", "pickle"):
        touched.append([event, str(arguments[0]) if arguments else ""])

sys.addaudithook(watch)
rows = rows_of(bad)
print(json.dumps([[[row["key"], [reject["reason"] for reject in row["rejects"]]] for row in rows], touched]))
"""


class Pickled:
    """What makes a folder where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def watched(folder: Path, members: dict[str, bytes]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Keys and reasons of the rows of a tar, and what was touched while it was read, in a folder that stays as it is."""
    good = write_tar(folder / "good.tar", {"a.jpg": jpeg(), "a.txt": b"a", "b.jpg": b"bad", "c.npy": b"\0"})
    bad = write_tar(folder / "bad.tar", members)
    (folder / "work").mkdir()
    before = sorted(folder.rglob("*"))
    command = [sys.executable, "-c", WATCHED, str(good), str(bad)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(command, cwd=folder / "work", env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert sorted(folder.rglob("*")) == before
    rows, touched = json.loads(ended.stdout)
    own = (str(bad), "/proc/self/status")  # where the memory of a stage is measured
    return [(key, reasons) for key, reasons in rows], [(event, at) for event, at in touched if at not in own]


def test_names_in_a_tar_touch_no_file(tmp_path: Path) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"of another")
    names = [str(outside)[1:], str(outside), "../outside.jpg", "../../../../etc/passwd.jpg", "/etc/hostname.txt",
             "a\0b.jpg", "~/x.jpg", "file:///etc/passwd.jpg", "C:\\x.jpg", "./../y.jpg", "/", "..", "x/../../z.jpg"]  # fmt: skip
    rows, touched = watched(tmp_path, {name: jpeg() if name.endswith(".jpg") else b"x" for name in names})
    assert touched == []
    images = [key for key, reasons in rows if not reasons]
    assert len(rows) >= len(names) - 3 and len(images) >= 8
    assert outside.read_bytes() == b"of another"


def test_pickles_in_a_tar_are_not_loaded(tmp_path: Path) -> None:
    loaded = pickle.dumps(Pickled(tmp_path / "marker"))
    array = io.BytesIO()
    np.save(array, np.array([Pickled(tmp_path / "marker")], object))
    extensions = ("pkl", "pickle", "pyd", "pth", "pt", "bin", "joblib", "cls", "json", "txt", "index")
    members = {f"a.{extension}": loaded for extension in extensions}
    members |= {"a.jpg": jpeg(), "a.npy": array.getvalue(), "a.npz": array.getvalue(), "b.jpg": loaded, "c.pkl": loaded}
    rows, touched = watched(tmp_path, members)
    assert touched == []
    assert not (tmp_path / "marker").exists()
    assert dict(rows) == {"a": ["not_utf8"], "b": ["unidentified_image"], "c": ["unknown_extension"]}


@pytest.mark.parametrize("column", ["mask", "image"])
def test_pickles_in_a_parquet_are_not_loaded(tmp_path: Path, column: str) -> None:
    """Ray has registered a type with Arrow whose values are unpickled as they are read; any file may say it has it."""
    assert ray.data
    loaded = pickle.dumps(Pickled(tmp_path / "marker"))
    known_as = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""}
    pickled = pa.field("item", pa.large_binary(), metadata=known_as)
    nested = {"list": pa.list_(pickled), "struct": pa.struct([pickled]), "map": pa.map_(pa.string(), pickled)}
    values = {"list": [loaded], "struct": {"item": loaded}, "map": [("a", loaded)], column: loaded, "caption": "fine"}
    fields = [pa.field("caption", pa.string()), pickled.with_name(column), *starmap(pa.field, nested.items())]
    pq.write_table(pa.Table.from_pylist([values], pa.schema(fields)), tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path / "a.parquet")
    assert row["captions"] == ["fine"] and not (tmp_path / "marker").exists()
    assert [reject["reason"] for reject in row["rejects"]] == (["unidentified_image"] if column == "image" else [])


def test_the_pickle_of_these_tests_does_run_where_it_is_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Pickled(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()
