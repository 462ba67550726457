"""Properties of the tar reader: nothing is lost, nothing raises, whatever the bytes are."""

import gzip
import tarfile
from itertools import groupby

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.sources.kinds import is_litter
from pipelines.sources.tar import split_name
from tests.unit.sources.made import read_tar, reasons, tar_of

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
NAMES = st.builds(
    lambda folder, stem, extension: f"{folder}{stem}.{extension}",
    st.sampled_from(["", "d/", "d.e/f/", "ü/"]),
    st.sampled_from(["a", "b", "c", "café", "x" * 120]),
    st.sampled_from(["jpg", "PNG", "txt", "json", "cls", "caption", "npy", "seg.png", "v.jpg", ""]),
)
CONTENTS = st.one_of(
    st.binary(max_size=700),
    st.text(max_size=50).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([b"", b"{}", b'{"captions": ["a", null, "b"]}', b'{"caption": 3}', b"[", b'{"captions": "one"}']),
)
MEMBERS = st.lists(st.tuples(NAMES, CONTENTS), max_size=12)
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


def groups(members: list[tuple[str, bytes]]) -> list[tuple[str, list[str]]]:
    """Key and extensions of each run of members that share a key, cut where an extension comes again."""
    found: list[tuple[str, list[str]]] = []
    for key, run in groupby((split_name(name) for name, _ in members), key=lambda pair: pair[0]):
        extensions: list[str] = []
        for _, extension in run:
            if extension in extensions:
                found.append((key, extensions))
                extensions = []
            extensions.append(extension)
        found.append((key, extensions))
    return found


def rows_of(extensions: list[str]) -> int:
    """One, and one more for each further image when all images have dots in their extension."""
    images = [e for e in extensions if e.rpartition(".")[2] in ("jpg", "png")]
    return 1 if not images or any("." not in image for image in images) else len(images)


@QUICK
@given(MEMBERS, FORMATS, st.booleans())
def test_every_group_is_exactly_one_row(members: list[tuple[str, bytes]], format_: int, packed: bool) -> None:
    data = tar_of(members, format_)
    found = read_tar(gzip.compress(data) if packed else data)
    expected = [key for key, extensions in groups(members) for _ in range(rows_of(extensions))]
    assert [sample.key for sample in found] == expected
    for sample in found:
        if sample.image is not None and sample.length:
            assert data[sample.offset : sample.offset + sample.length] == sample.image


@QUICK
@given(MEMBERS)
def test_a_key_is_embedded_at_most_once(members: list[tuple[str, bytes]]) -> None:
    kept = [sample.key for sample in read_tar(tar_of(members)) if sample.image is not None]
    assert len(kept) == len(set(kept))


@QUICK
@given(MEMBERS, st.data())
def test_a_cut_changes_no_row_before_it_and_never_raises(members: list[tuple[str, bytes]], data: st.DataObject) -> None:
    whole = tar_of(members)
    at = data.draw(st.integers(0, len(whole)))
    full, found = read_tar(whole), read_tar(whole[:at])
    broken = [index for index, sample in enumerate(found) if "truncated_shard" in reasons(sample)]
    assert all(index >= len(found) - 1 for index in broken)
    for before, sample in zip(full, found[: max(0, len(found) - 2)], strict=False):
        assert (sample.key, sample.image, sample.captions) == (before.key, before.image, before.captions)
    if not broken:
        assert [sample.key for sample in found] == [sample.key for sample in full]


@QUICK
@given(MEMBERS, st.data(), st.booleans())
def test_damage_never_raises(members: list[tuple[str, bytes]], data: st.DataObject, packed: bool) -> None:
    whole = tar_of(members)
    whole = gzip.compress(whole) if packed else whole
    at = data.draw(st.integers(0, len(whole) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=600))
    read_tar((whole[:at] + patch + whole[at + len(patch) :])[: len(whole)])


@QUICK
@given(st.binary(max_size=3000))
def test_any_bytes_give_rows_not_exceptions(data: bytes) -> None:
    found = read_tar(data)
    assert found or not data.strip(b"\0")


@given(st.text(min_size=1, max_size=20))
def test_the_parts_of_a_name_make_the_name(name: str) -> None:
    key, extension = split_name(name)
    assert name.lower() in (f"{key}.{extension}".lower(), key.lower()) or is_litter(name)
