"""What to do where a library cannot read a model's files."""

from __future__ import annotations

import pytest

from pipelines.encoders.hf_text import remedy


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("pass `trust_remote_code=True`"), "needs no code of its own"),
        (ImportError("This needs code; set trust_remote_code"), "needs no code of its own"),
        (ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece"), "Install sentencepiece,"),
        (ImportError("requires the tiktoken library"), "Install the package it names,"),
        (OSError("not valid JSON"), "files are whole"),
    ],
)
def test_the_remedy_fits_the_error(error: Exception, expected: str) -> None:
    assert expected in remedy(error)
    assert ("code of its own" in remedy(error)) == ("trust_remote_code" in str(error))
