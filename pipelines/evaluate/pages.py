"""Pages to look at: one HTML file each, which loads nothing from anywhere."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from pipelines.evaluate.thumbnails import Thumbnail

_TEMPLATES = Environment(
    loader=PackageLoader("pipelines.evaluate"),
    autoescape=select_autoescape(),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(template: str, **values: Any) -> bytes:
    """A page from one of `templates/`, in UTF-8; everything in `values` is escaped but Markup."""
    # A key or caption may hold half a surrogate pair, which no file can.
    return _TEMPLATES.get_template(template).render(**values).encode("utf-8", "replace")


def markup(element: str) -> Markup:
    """An element of our own making, as `charts.svg` gives it."""
    return Markup(element)


def shown(sample: dict[str, Any], small: Thumbnail, note: str = "") -> dict[str, Any]:
    """A sample as the macro `picture` takes it."""
    return {
        "key": sample["key"],
        "caption": sample["caption"],
        "image": small.data_uri,
        "reason": small.reason,
        "note": note or sample["key"],
    }
