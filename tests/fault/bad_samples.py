"""Samples that are broken, hostile or odd, by kind: what each puts into a shard, and which rows must come of it.

A kind tells it for every format that can hold it; `mixed` puts some of them among good samples.
"""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources.members import MAX_MEMBERS
from pipelines.sources.text import MAX_CAPTIONS
from tests.fault.bad_images import BROKEN, ODD, RED, Colour, Picture, plain
from tests.unit.sources.made import gnu_sparse

Format = Literal["tar", "parquet", "folder", "jsonl", "csv"]
FORMATS: tuple[Format, ...] = ("tar", "parquet", "folder", "jsonl", "csv")
MAX_IMAGE_BYTES = 2**20
BIG_CAPTION = "big " * 2_500_000


@dataclass(frozen=True)
class Rejected:
    """The item is a reject of this reason."""

    reason: str


@dataclass(frozen=True)
class Row:
    """What a row must be. key: None where it is a digest. image: its colour, a reject, or None for no image.

    captions: those that are embedded as they are, or rejects.
    """

    key: str | None = "{}"
    image: Colour | Rejected | None = RED
    captions: tuple[str | Rejected, ...] = ("fine",)


@dataclass(frozen=True)
class Put:
    """What a sample puts into a shard: bytes of the tar, rows of the table, a text of the manifest, files."""

    tar: bytes = b""
    rows: tuple[dict[str, Any], ...] = ()
    text: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A way to be bad. put: by format, what a sample of this key puts into a shard."""

    name: str
    rows: tuple[Row, ...]
    put: dict[Format, Callable[[str], Put]]


@dataclass(frozen=True)
class Mixed:
    """What to give as input, and the rows that must come, in order. kinds: names of those that are in it."""

    uri: Path
    rows: list[Row]
    kinds: list[str]
    kind_of_row: list[str]


# -- a sample in every format --------------------------------------------------------------------


def member(name: str, data: bytes = b"", type_: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> bytes:
    """A tar member as bytes: headers and contents."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = type_, link, len(data), pax
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _tar(key: str, extension: str, image: bytes | None, caption: bytes | None) -> Put:
    picture = b"" if image is None else member(f"{key}.{extension}", image)
    return Put(tar=picture + (b"" if caption is None else member(f"{key}.txt", caption)))


def _parquet(key: str, extension: str, image: bytes | None, caption: bytes | None) -> Put:
    return Put(rows=({"key": key, "image": image, "captions": [] if caption is None else [caption]},))


def _folder(key: str, extension: str, image: bytes | None, caption: bytes | None) -> Put:
    texts = {} if caption is None else {f"{key}.txt": caption}
    return Put(files=texts | ({} if image is None else {f"{key}.{extension}": image}))


def _jsonl(key: str, extension: str, image: bytes | None, caption: bytes | None) -> Put:
    name = f"images/{key}.{extension}"
    row = {"key": key, "image": None if image is None else name, "captions": [_text(caption)]}
    return Put(text=_line(row), files={} if image is None else {name: image})


def _csv(key: str, extension: str, image: bytes | None, caption: bytes | None) -> Put:
    name = f"images/{key}.{extension}"
    fields = [key, "" if image is None else name, _text(caption) or ""]
    return Put(text=_csv_line(fields), files={} if image is None else {name: image})


_SAMPLES: dict[Format, Callable[[str, str, bytes | None, bytes | None], Put]] = {
    "tar": _tar,
    "parquet": _parquet,
    "folder": _folder,
    "jsonl": _jsonl,
    "csv": _csv,
}


def _text(caption: bytes | None) -> str | None:
    return None if caption is None else caption.decode("utf-8", "surrogateescape")


def _line(row: Any, ascii_: bool = False) -> bytes:
    return json.dumps(row, ensure_ascii=ascii_).encode("utf-8", "surrogateescape") + b"\n"


def _csv_line(fields: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerow(fields)
    return text.getvalue().encode("utf-8", "surrogateescape")


def everywhere(
    name: str,
    row: Row,
    extension: str = "jpg",
    image: Callable[[], bytes | None] = plain,
    caption: bytes | None = b"fine",
) -> Kind:
    """A kind that every format can hold."""

    def put(format_: Format) -> Callable[[str], Put]:
        return lambda key: _SAMPLES[format_](key, extension, image(), caption)

    return Kind(name, (row,), {format_: put(format_) for format_ in FORMATS})


def but(kind: Kind, *formats: Format) -> Kind:
    """The kind, without formats that cannot hold it or mean something else by it."""
    return replace(kind, put={format_: put for format_, put in kind.put.items() if format_ not in formats})


# -- kinds of every format -----------------------------------------------------------------------


def _of(picture: Picture) -> Kind:
    image = picture.colour if picture.reason is None else Rejected(picture.reason)
    return everywhere(picture.name, Row(image=image), picture.extension, lambda: picture.data)


def _caption(name: str, caption: bytes | None, *expected: str | Rejected) -> Kind:
    return everywhere(name, Row(captions=expected), caption=caption)


IMAGES = [_of(picture) for picture in (*BROKEN, *ODD)] + [
    everywhere(
        "a file larger than allowed", Row(image=Rejected("image_too_large")), image=lambda: bytes(MAX_IMAGE_BYTES + 1)
    ),
    everywhere("no image", Row(image=None), image=lambda: None),
]
CAPTIONS = [
    _caption("a caption in Latin-1", "déjà vu".encode("latin-1"), Rejected("not_utf8")),
    _caption("a caption in UTF-16", "déjà vu".encode("utf-16"), Rejected("not_utf8")),
    _caption("a caption of noise", bytes(range(128, 256)), Rejected("not_utf8")),
    _caption("a caption with half a surrogate", "a \ud800 b".encode("utf-8", "surrogatepass"), Rejected("not_utf8")),
    _caption("a caption of 10 MB", BIG_CAPTION.encode(), Rejected("caption_too_large")),
    _caption("a caption with NUL bytes", b"a\0dog\0", "adog"),
    _caption("a caption of NUL bytes", b"\0\0\0"),
    _caption("a caption of blanks", b"  \t "),
    _caption("an empty caption", b""),
    _caption("no caption", None),
    _caption("a caption with line ends", b"a dog\r\n", "a dog"),
    _caption(
        "a caption of signs that turn text around", "\u202ea dog\u202c \u200d".encode(), "\u202ea dog\u202c \u200d"
    ),
    but(_caption("a caption after a byte order mark", b"\xef\xbb\xbfa dog", "a dog"), "parquet", "jsonl", "csv"),
]

# -- kinds of tars -------------------------------------------------------------------------------


def in_tar(name: str, make: Callable[[str], bytes], *rows: Row) -> Kind:
    return Kind(name, rows, {"tar": lambda key: Put(tar=make(key))})


def _pair(key: str, extension: str = "jpg") -> bytes:
    return member(f"{key}.{extension}", plain()) + member(f"{key}.txt", b"fine")


def _special(what: str, type_: bytes, link: str = "") -> Kind:
    """Has an image's name and no image's bytes."""
    row = Row(image=Rejected("not_a_file"), captions=())
    return in_tar(what, lambda key: member(f"{key}.jpg", b"", type_, link), row)


def _sparse_of_pax(key: str) -> bytes:
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"}
    return member(f"{key}.jpg", b"1\n0\n512\n".ljust(512, b"\0") + plain(), **pax)


def _path_not_utf8(key: str) -> bytes:
    record = b"path=%s-\xff\xfe.jpg\n" % key.encode()
    record = b"%d " % (len(record) + 3) + record
    head = tarfile.TarInfo("x")
    head.type, head.size = tarfile.XHDTYPE, len(record)
    return head.tobuf() + record.ljust(512, b"\0") + member("short.jpg", plain())


def _size_by_pax(key: str) -> bytes:
    """The header says nothing of the size, the extended header all."""
    picture = plain()
    info = tarfile.TarInfo(f"{key}.jpg")
    info.pax_headers = {"size": str(len(picture))}
    return info.tobuf(tarfile.PAX_FORMAT) + picture + bytes(-len(picture) % 512) + member(f"{key}.txt", b"fine")


def _unknown_type(key: str) -> bytes:
    info = tarfile.TarInfo(f"{key}.jpg")
    info.type, info.size = b"Q", 3
    return info.tobuf() + b"abc".ljust(512, b"\0")


def _long_name(key: str) -> bytes:
    info = tarfile.TarInfo(f"{key}/{'d' * 150}/{'n' * 200}.jpg")
    picture = plain()
    info.size = len(picture)
    return info.tobuf(tarfile.GNU_FORMAT) + picture + bytes(-len(picture) % 512)


NOT_A_FILE = Row(image=Rejected("not_a_file"), captions=())
UNKNOWN = Row(image=Rejected("unknown_extension"), captions=())
AGAIN = Row(image=Rejected("duplicate_key"), captions=(Rejected("duplicate_key"),))
TARS = [
    in_tar("an absolute path", lambda key: _pair(f"/etc/{key}"), Row("/etc/{}")),
    in_tar("a path that climbs out", lambda key: _pair(f"../../{key}"), Row("../../{}")),
    in_tar("a path of Windows", lambda key: _pair(f"C:\\{key}"), Row("C:\\{}")),
    _special("a link to a file of the system", tarfile.SYMTYPE, "/etc/passwd"),
    _special("a hard link to another member", tarfile.LNKTYPE, "good-00000.jpg"),
    _special("a pipe", tarfile.FIFOTYPE),
    _special("a device", tarfile.CHRTYPE),
    in_tar("a sparse member of GNU", lambda key: gnu_sparse(f"{key}.jpg", 512, 2) + bytes(512), NOT_A_FILE),
    in_tar("a sparse member of PAX", _sparse_of_pax, NOT_A_FILE),
    in_tar("a member of an unknown type", _unknown_type, NOT_A_FILE),
    in_tar(
        "PAX headers of all sorts",
        lambda key: (
            member(f"{key}.jpg", plain(), comment="c" * 3000, mtime="1e9", **{"SCHILY.xattr.x": "\0"})
            + member(f"{key}.txt", b"fine")
        ),
        Row(),
    ),
    in_tar("a PAX path that is not UTF-8", _path_not_utf8, Row("{}-\\udcff\\udcfe", captions=())),
    in_tar("a size in the PAX header alone", _size_by_pax, Row()),
    in_tar("a very long name", _long_name, Row(f"{{}}/{'d' * 150}/{'n' * 200}", captions=())),
    in_tar("a name with a line end and a tab", lambda key: _pair(f"{key}\n\t"), Row("{}\n\t")),
    in_tar("a key twice, one after the other", lambda key: _pair(key) * 2, Row(), AGAIN),
    in_tar("a key twice, apart", lambda key: _pair(key) + _pair(f"{key}b") + _pair(key), Row(), Row("{}b"), AGAIN),
    in_tar(
        "an image twice under one key",
        lambda key: member(f"{key}.jpg", plain()) + member(f"{key}.png", b"other") + member(f"{key}.txt", b"fine"),
        Row(),
    ),
    in_tar("a file of unknown kind alone", lambda key: member(f"{key}.raw7", b"abc"), UNKNOWN),
    in_tar("a name without an extension", lambda key: member(key, plain()), UNKNOWN),
    in_tar("a hidden file", lambda key: _pair(f".{key}"), Row(".{}")),
    in_tar("what a desktop leaves", lambda key: member(f"._{key}.jpg", b"x") + member(f"{key}/.DS_Store", b"x")),
    in_tar("a folder", lambda key: member(f"{key}.jpg", type_=tarfile.DIRTYPE)),
    in_tar(
        "JSON that is broken, without another caption",
        lambda key: member(f"{key}.jpg", plain()) + member(f"{key}.json", b'{"caption": "a'),
        Row(captions=(Rejected("bad_json"),)),
    ),
    in_tar(
        "JSON nested 100,000 deep beside a caption",
        lambda key: _pair(key) + member(f"{key}.json", b"[" * 100_000),
        Row(),
    ),
    in_tar(
        "more files than a sample may have",
        lambda key: _pair(key) + b"".join(member(f"{key}.f{number}", b"x") for number in range(MAX_MEMBERS)),
        Row(),
        UNKNOWN,
    ),
    in_tar(
        "more captions than a sample may have",
        lambda key: member(f"{key}.jpg", plain()) + member(f"{key}.json", _line({"captions": ["a"] * 2_000})),
        Row(captions=("a",) * MAX_CAPTIONS + (Rejected("too_many_captions"),)),
    ),
    in_tar(
        "captions in JSON of all types",
        lambda key: (
            member(f"{key}.jpg", plain())
            + member(
                f"{key}.json", _line({"captions": ["one", 2, None, {"raw": "three"}, ["four"], True, "\ud800"]}, True)
            )
        ),
        Row(captions=("one", "2", "three", Rejected("not_text"), Rejected("not_text"), Rejected("not_utf8"))),
    ),
]

# -- kinds of tables, folders and manifests ------------------------------------------------------


def in_parquet(name: str, row: Row, **columns: Any) -> Kind:
    return Kind(
        name,
        (row,),
        {"parquet": lambda key: Put(rows=({"key": key, "image": plain(), "captions": [b"fine"]} | columns,))},
    )


def in_folder(name: str, make: Callable[[str], dict[str, bytes]], *rows: Row) -> Kind:
    return Kind(name, rows, {"folder": lambda key: Put(files=make(key))})


def in_jsonl(name: str, line: Callable[[str], bytes], *rows: Row) -> Kind:
    return Kind(name, rows, {"jsonl": lambda key: Put(text=line(key), files={f"images/{key}.jpg": plain()})})


def in_csv(name: str, line: Callable[[str], bytes], *rows: Row) -> Kind:
    return Kind(name, rows, {"csv": lambda key: Put(text=line(key), files={f"images/{key}.jpg": plain()})})


def _refers(name: str, reference: str, reason: str) -> Kind:
    """A row whose image is elsewhere, or nowhere."""

    def row(key: str) -> dict[str, Any]:
        return {"key": key, "image": reference, "captions": ["fine"]}

    put: dict[Format, Callable[[str], Put]] = {"jsonl": lambda key: Put(text=_line(row(key)))}
    if "\n" not in reference:
        put["csv"] = lambda key: Put(text=_csv_line([key, reference, "fine"]))
    return Kind(name, (Row(image=Rejected(reason)),), put)


def _with(key: str, **fields: Any) -> bytes:
    return _line({"key": key, "image": f"images/{key}.jpg", "captions": ["fine"], **fields}, True)


BAD_LINE = Row(None, Rejected("bad_manifest_line"), ())
PARQUETS = [
    in_parquet("a row of nulls", Row(image=None, captions=()), image=None, captions=None),
    in_parquet("a null among the captions", Row(captions=("one", "two")), captions=[b"one", None, b"two"]),
    in_parquet("a blank among the captions", Row(captions=("one", " ", "two")), captions=[b"one", b" ", b"two"]),
    in_parquet("1,000 captions", Row(captions=("same",) * 1000), captions=[b"same"] * 1000),
    in_parquet("a key of nothing", Row(None), key=None),
    in_parquet("a key twice in a table", Row("twice"), key="twice"),
]
FOLDERS = [
    in_folder(
        "an image twice in a folder",
        lambda key: {f"{key}.jpg": plain(), f"{key}.png": plain("PNG"), f"{key}.txt": b"fine"},
        Row(),
        Row(image=Rejected("duplicate_key"), captions=()),
    ),
    in_folder("a stray file in a folder", lambda key: {f"{key}.raw7": b"abc"}, UNKNOWN),
    in_folder("what a desktop leaves in a folder", lambda key: {f"._{key}.jpg": b"x", f".{key}/a.jpg": b"x"}),
    in_folder(
        "five captions, one of them bad",
        lambda key: {f"{key}.jpg": plain(), f"{key}.txt": b"one\n\xff\nthree\n\n \nfour"},
        Row(captions=("one", Rejected("not_utf8"), "three", "four")),
    ),
    in_folder(
        "JSON that is broken, in a folder",
        lambda key: {f"{key}.jpg": plain(), f"{key}.json": b"\xff\xfe{"},
        Row(captions=(Rejected("bad_json"),)),
    ),
    in_folder("a name that is not UTF-8", lambda key: {f"{key}-\udcff.jpg": plain()}, Row("{}-\\udcff", captions=())),
]
MANIFESTS = [
    _refers("a path to nothing", "images/none.jpg", "not_found"),
    _refers("a path to a folder", "images", "not_a_file"),
    _refers("a path with a NUL", "images/a\0.jpg", "forbidden_url"),
    _refers("a path with a line end", "images/a\nb.jpg", "not_found"),
    _refers("a path of 5,000 characters", "a" * 5_000, "not_found"),
    _refers("a chained URL", "zip://a.jpg::file:///etc/x.zip", "forbidden_url"),
    _refers("a URL of no known protocol", "gopher://host/a.jpg", "forbidden_url"),
    _refers("a bucket without a key", "s3://bucket", "forbidden_url"),
    in_jsonl("a line that is no JSON", lambda key: b"%s, a dog\n" % key.encode(), BAD_LINE),
    in_jsonl("half a line", lambda key: _with(key)[:30] + b"\n", BAD_LINE),
    in_jsonl("a line of noise", lambda key: bytes(range(128, 256)) + key.encode() + b"\n", BAD_LINE),
    in_jsonl("a list as a line", lambda key: _line([key]), BAD_LINE),
    in_jsonl("a number as a line", lambda key: b"1e999\n", BAD_LINE),
    in_jsonl("a line nested 100,000 deep", lambda key: b'{"a":' * 100_000 + key.encode() + b"\n", BAD_LINE),
    in_jsonl("a line with a raw NUL", lambda key: _with(key).replace(b"fine", b"f\0ne"), BAD_LINE),
    in_jsonl("blank lines", lambda key: b"\n  \n\r\n"),
    in_jsonl("an image that is a number", lambda key: _with(key, image=7), Row(image=Rejected("not_an_image"))),
    in_jsonl("an image that is a list", lambda key: _with(key, image=["a"]), Row(image=Rejected("not_an_image"))),
    in_jsonl("captions of all types", lambda key: _with(key, captions=["a", 2.5, {}, False, "\udfff"]),
             Row(captions=("a", "2.5", Rejected("not_text"), Rejected("not_text"), Rejected("not_utf8")))),
    in_jsonl("one image in two lines", lambda key: _with(key, captions=["a"]) + _with(key, captions=["b"]), Row(captions=("a", "b"))),
    in_jsonl("a key with two images", lambda key: _with(key) + _with(key, image="images/none.jpg"), Row(),
             Row(image=Rejected("not_found"), captions=(Rejected("duplicate_key"),))),
    in_jsonl("numbers that JSON has no word for", lambda key: _with(key, x=float("nan"), y=float("-inf")), Row()),
    in_csv("a quote that is never closed", lambda key: b'%s,images/%s.jpg,"a dog\n' % (key.encode(), key.encode()), BAD_LINE),
    in_csv("a quote before a field's end", lambda key: b'%s,images/%s.jpg,"5" pipe"\n' % (key.encode(), key.encode()), Row(captions=('5 pipe"',))),
    in_csv("a quote within a field", lambda key: b'%s,images/%s.jpg,a 5" pipe\n' % (key.encode(), key.encode()), Row(captions=('a 5" pipe',))),
    in_csv("a comma too many", lambda key: b"%s,images/%s.jpg,a,dog\n" % (key.encode(), key.encode()), BAD_LINE),
    in_csv("a field too few", lambda key: b"%s,images/%s.jpg\n" % (key.encode(), key.encode()), BAD_LINE),
    in_csv("a caption of two lines", lambda key: b'%s,images/%s.jpg,"a\ndog"\n' % (key.encode(), key.encode()), Row(captions=("a\ndog",))),
    in_csv("blank rows", lambda key: b"\n\r\n"),
]  # fmt: skip

KINDS = [*IMAGES, *CAPTIONS, *TARS, *PARQUETS, *FOLDERS, *MANIFESTS]


def kinds_of(format_: Format) -> list[Kind]:
    return [kind for kind in KINDS if format_ in kind.put]


# -- shards --------------------------------------------------------------------------------------


def good(number: int) -> Kind:
    """A good sample of a colour and caption of its own, so that rows that are mixed up show."""
    colour = (37 * number % 256, 91 * number % 256, 199 * number % 256)
    caption = f"scene {number}"
    return everywhere(
        "good", Row(image=colour, captions=(caption,)), "png", lambda: plain("PNG", colour, (8, 8)), caption.encode()
    )


def mixed(format_: Format, kinds: Iterable[Kind], goods: int, seed: int, folder: Path) -> Mixed:
    """Good samples and one of each kind, in an order drawn by the seed, as one input in `folder`."""
    rng = random.Random(seed)
    numbered = [*kinds, *(good(number) for number in range(goods))]
    rng.shuffle(numbered)
    keyed = [(f"k{index:05d}", kind) for index, kind in enumerate(numbered)]
    puts = [kind.put[format_](key) for key, kind in keyed]
    rows = [_named(row, key) for key, kind in keyed for row in kind.rows]
    kind_of_row = [kind.name for kind in numbered for _ in kind.rows]
    return Mixed(_WRITERS[format_](folder, puts), rows, [kind.name for kind in numbered], kind_of_row)


def _named(row: Row, key: str) -> Row:
    return row if row.key is None else replace(row, key=row.key.format(key))


def _write_tar(folder: Path, puts: list[Put]) -> Path:
    path = folder / "mixed.tar"
    path.write_bytes(b"".join(put.tar for put in puts) + bytes(1024))
    return path


def _write_parquet(folder: Path, puts: list[Put]) -> Path:
    """Captions are declared to be text, whatever is in them, as by writers that do not look."""
    rows = [row for put in puts for row in put.rows]
    raw = pa.schema([("key", pa.string()), ("image", pa.binary()), ("captions", pa.list_(pa.binary()))])
    table = pa.Table.from_pylist(rows, raw)
    captions = table["captions"].combine_chunks()
    text = pa.ListArray.from_arrays(captions.offsets, captions.values.view(pa.string()), mask=captions.is_null())
    path = folder / "mixed.parquet"
    pq.write_table(table.set_column(2, "captions", text), path, row_group_size=40)
    return path


def _write_folder(folder: Path, puts: list[Put]) -> Path:
    _write_files(folder / "mixed", puts)
    return folder / "mixed"


def _write_jsonl(folder: Path, puts: list[Put]) -> Path:
    return _write_manifest(folder, puts, "mixed.jsonl", b"")


def _write_csv(folder: Path, puts: list[Put]) -> Path:
    return _write_manifest(folder, puts, "mixed.csv", b"key,image,caption\n")


def _write_manifest(folder: Path, puts: list[Put], name: str, header: bytes) -> Path:
    _write_files(folder, puts)
    (folder / "images").mkdir(exist_ok=True)
    (folder / name).write_bytes(header + b"".join(put.text for put in puts))
    return folder / name


def _write_files(folder: Path, puts: list[Put]) -> None:
    for name, data in _files(puts):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _files(puts: list[Put]) -> Iterator[tuple[str, bytes]]:
    for put in puts:
        yield from put.files.items()


_WRITERS: dict[Format, Callable[[Path, list[Put]], Path]] = {
    "tar": _write_tar,
    "parquet": _write_parquet,
    "folder": _write_folder,
    "jsonl": _write_jsonl,
    "csv": _write_csv,
}
