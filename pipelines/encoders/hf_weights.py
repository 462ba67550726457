"""Weights of transformers' models: which files hold them, and loading them whole."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from pipelines.encoders import weights
from pipelines.errors import EncoderError

# Of buffers that old checkpoints saved and today's classes compute.
_DERIVED = re.compile(r"\.position_ids$")


# A bar on the terminal for each model that is loaded would tear the run's own progress.
logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def checkpoint_files(folder: weights.Folder) -> list[str]:
    """The weight files `from_pretrained` reads: safetensors first, whole or in pieces."""
    names = folder.names()
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if whole in names:
            return [whole]
        index = f"{whole}.index.json"
        if index in names:
            pieces = set(json.loads((folder.fetch([index]) / index).read_text())["weight_map"].values())
            if elsewhere := sorted(pieces - set(names)):
                raise EncoderError(
                    f"{folder.reference} lacks {elsewhere[0]}, which its {index} names.", "Fetch it too."
                )
            return sorted(pieces)
    raise EncoderError(
        f"{folder.reference} holds no model.safetensors or pytorch_model.bin.", f"There: {', '.join(names)}."
    )


def load_strictly(
    cls: Any, path: Path, dtype: torch.dtype, name: str, dropped: Collection[str] = (), **arguments: Any
) -> Any:
    """A model of transformers in `dtype` from the folder `path`, with all its weights and no others.

    name: for messages. dropped: keys that the model does without, as a classifier's head. arguments: of `cls`.
    Raises: EncoderError listing keys that are missing, unexpected or of another shape.
    """
    # Mismatched sizes are ignored by the library only, so as to be listed here with all else that is wrong.
    how: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "ignore_mismatched_sizes": True}
    how |= {"weights_only": True, "trust_remote_code": False}
    try:
        model, info = cls.from_pretrained(path, output_loading_info=True, **how, **arguments)
    except Exception as error:
        raise EncoderError(f"{name}: cannot be loaded: {error}", "Repair or replace the checkpoint.") from error
    wrong = {
        problem: sorted(str(key) for key in info.get(problem) or () if not _DERIVED.search(str(key)))
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    }
    wrong["unexpected_keys"] = [key for key in wrong["unexpected_keys"] if key not in dropped]
    if any(wrong.values()):
        told = "; ".join(f"{problem.replace('_', ' ')}: {', '.join(keys)}" for problem, keys in wrong.items() if keys)
        raise EncoderError(f"{name}: the weights are not those of a {cls.__name__}: {told}.", "Repair the checkpoint.")
    return model
