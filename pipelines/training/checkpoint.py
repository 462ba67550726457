"""Checkpoints in any storage: everything that decides how a run goes on, which it does from the newest."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from pipelines.encoders.matcher_folder import CONFIG, WEIGHTS, MatcherConfig
from pipelines.encoders.matcher_model import Matcher
from pipelines.storage import Store, scratch_folder

FOLDER, MODEL, SURVEY, RECORD = "checkpoints", "model", "survey.json", "train.json"
METRICS, CURVES = "metrics.json", "curves.png"
KEPT = 2
_NAME = re.compile(r"epoch-(\d{5})(?:-step-(\d{8}))?\.pt")

Position = tuple[int, int]
"""Epochs that are done, and steps of the next."""


def save_checkpoint(store: Store, at: Position, state: dict[str, Any]) -> None:
    """Those before the last two go. A put is whole or absent, so each that is there is whole."""
    with scratch_folder() as folder:
        path = Path(folder) / "state.pt"
        torch.save(state, path)
        store.put_atomic(_path(at), path)
    store.delete(map(_path, checkpoints(store)[:-KEPT]))


def checkpoints(store: Store) -> list[Position]:
    """Of which there is one, ascending."""
    found = (_NAME.fullmatch(name) for name in store.names(FOLDER))
    return sorted((int(match[1]), int(match[2] or 0)) for match in found if match)


def last_checkpoint(store: Store, device: torch.device) -> dict[str, Any] | None:
    there = checkpoints(store)
    if not there:
        return None
    data = store.read(_path(there[-1]))
    return dict(torch.load(io.BytesIO(data), map_location=device, weights_only=True))


def _path(at: Position) -> str:
    epoch, step = at
    return f"{FOLDER}/epoch-{epoch:05d}" + (f"-step-{step:08d}.pt" if step else ".pt")


def save_model(store: Store, matcher: Matcher, config: MatcherConfig, vocabulary: list[str], dtype: str) -> None:
    """The folder `model/`, an encoder at once. Its weights come last: a first folder without them is none yet."""
    weights = {
        name: value.detach().cpu().to(getattr(torch, dtype) if value.is_floating_point() else value.dtype).contiguous()
        for name, value in matcher.state_dict().items()
    }
    store.put_atomic(f"{MODEL}/{config.vocab}", ("\n".join(vocabulary) + "\n").encode())
    store.put_atomic(f"{MODEL}/{CONFIG}", config.json().encode())
    store.put_atomic(f"{MODEL}/{WEIGHTS}", save(weights, metadata={"format": "pt"}))


def read_history(store: Store) -> dict[str, Any]:
    """metrics.json, as the last epoch left it; nothing where there is none yet."""
    try:
        return dict(json.loads(store.read(METRICS)))
    except FileNotFoundError:
        return {"epochs": []}
