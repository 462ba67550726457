"""Codes of what belongs together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluate.groups import OUTSIDE, Groups, code_of_key
from pipelines.evaluate.items import stored
from pipelines.storage import Store
from tests.indexed import ENCODER, everything, write_output


def codes_by_key(store: Store) -> dict[str, int]:
    codes = np.concatenate([codes for _, codes in stored(store, ENCODER, "image", Groups(store, "key")).codes()])
    keys = [item.key for item in everything(Path(store.root), "image")[0]]
    return dict(zip(keys, codes.tolist(), strict=True))


def test_a_key_has_one_code_in_whatever_output(tmp_path: Path) -> None:
    """Also where others come before it."""
    one, other = (codes_by_key(write_output(tmp_path / str(first), parts=2, first=first)) for first in (0, 1))
    common = one.keys() & other.keys()
    assert len(common) == 188 and {key: one[key] for key in common} == {key: other[key] for key in common}
    assert len({*one.values(), *other.values()}) == len({*one, *other}) == 3 * 188


@given(st.text())
def test_the_code_of_a_key_is_a_number_of_63_bits(key: str) -> None:
    assert OUTSIDE < code_of_key(key) < 2**63 and code_of_key(key) == code_of_key(key)
