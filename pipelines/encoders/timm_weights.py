"""Checkpoints of timm's models, loaded whole."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict

from pipelines.errors import EncoderError

_State = dict[str, torch.Tensor]


def load_strictly(model: Any, checkpoint: Path, whole: Collection[str], name: str) -> None:
    """All of a checkpoint's weights into the model, and into all of the model.

    checkpoint: safetensors, or a pickle of tensors; of a training run's, the averaged weights where it has them.
    whole: keys of the model with its classifier, which the checkpoint may have and the model need not. name: for
    messages. Raises: EncoderError listing keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    try:
        state = _without(load_state_dict(str(checkpoint), weights_only=True), whole, own)
        if state.keys() != own.keys():
            state = _without(_converted(state, model, own), whole, own)
        model.load_state_dict(state)
    except Exception as error:
        raise EncoderError(
            f"{name}: the weights are not those of the model: {error}",
            "Name the model that the checkpoint was trained as, or repair the checkpoint.",
        ) from error


def _without(state: _State, whole: Collection[str], own: _State) -> _State:
    """Less the classifier."""
    return {key: value for key, value in state.items() if key in own or key not in whole}


def _converted(state: _State, model: Any, own: _State) -> _State:
    """From the format in which a model was first released, by timm's own filter of its module, where it has one.

    Not where a shape differs: the filters interpolate tables of positions, so that another size's weights load.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or any(key in own and value.shape != own[key].shape for key, value in state.items()):
        return state
    converted: _State = convert(state, model)
    return converted
