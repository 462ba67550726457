"""OpenAI's, DFN's and MetaCLIP's weights were trained with QuickGELU: `x * sigmoid(1.702 x)`.

open_clip builds them with GELU unless the architecture says `-quickgelu`, and only warns; the
vectors then differ by a few percent, which no cosine test sees.
"""

from __future__ import annotations

from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained

from pipelines.errors import EncoderError

_SUFFIX = "-quickgelu"


def refuse_mismatch(model: dict[str, Any], hint: str, arch: str = "", trained: bool | None = None) -> None:
    """Raises EncoderError where the activation of `model` is not the one its weights were trained with.

    hint: the tag, or the name of the file or folder, which tells where `trained` is not known.
    """
    built = bool(model.get("quick_gelu", False))
    known = _trained_with(hint) if trained is None else trained
    other = arch.removesuffix(_SUFFIX) if built else arch + _SUFFIX
    # A name that has no counterpart (roberta-ViT-B-32) is right as open_clip has it.
    if known is None or known == built or (arch and open_clip.get_model_config(other) is None) or other == arch != "":
        return
    raise EncoderError(
        f"{arch or hint}: quick_gelu is {built}, but weights named {hint!r} were trained with {known}.",
        f"Use open_clip:{other} in place of open_clip:{arch}."
        if arch
        else f"Set quick_gelu to {known} in its model_cfg, or rename it if the name misleads.",
    )


def _trained_with(hint: str) -> bool | None:
    """What the name of a file or folder tells; None where it tells nothing."""
    name = _plain(hint)
    if "quickgelu" in name:
        return True
    found = {trained for tag, trained in _tags().items() if tag in name}
    return found.pop() if len(found) == 1 else None


def _tags() -> dict[str, bool]:
    """Tags that mean the same activation for every architecture, and the groups they come from."""
    seen: dict[str, set[bool]] = {}
    for arch, tag in list_pretrained():
        seen.setdefault(_plain(tag), set()).add(bool(get_pretrained_cfg(arch, tag).get("quick_gelu", False)))
    told = {tag: values.pop() for tag, values in seen.items() if len(values) == 1 and len(tag) > 4}
    return {**told, "metaclip": True, "dfn2b": True, "dfn5b": True}


def _plain(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "")
