"""Captions as LAVIS's own processor makes them."""

from pipelines.encoders.text_clean import CLEANERS


def test_as_lavis_does() -> None:
    lavis = CLEANERS["lavis"]
    assert lavis('A Dog! (runs) over;  the #grass. "now"~\n') == "a dog runs over the grass now"
    assert lavis("a " * 60) == " ".join(["a"] * 50)
    assert lavis("") == lavis(" . ") == ""
    assert CLEANERS["none"](" A Dog! ") == " A Dog! "
