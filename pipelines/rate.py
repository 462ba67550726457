"""How large an encoder is, and how fast here."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from os import cpu_count
from typing import Any, cast

import torch

from pipelines.config import Precision
from pipelines.contracts import Modality
from pipelines.encode import Tower, largest
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec
from pipelines.errors import ConfigError

BATCH = {"cuda": 256, "cpu": 16}
LEAST_S = 1.0


def parameters_and_rates(spec: EncoderSpec, precision: str) -> tuple[int, dict[Modality, float], str]:
    """Parameters of the loaded model, items a second by modality, and the device. Items are of the largest size."""
    if precision not in ("fp32", "fp16", "bf16"):
        raise ConfigError(f"--precision {precision} is not known", "fp32, fp16 or bf16.")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(cpu_count() or 1)
    encoder = registry.load(replace(spec, precision=cast(Precision, precision)), device)
    rates = {}
    for modality in spec.modalities:
        tower = Tower(encoder, modality, BATCH[device.type], threading.Lock())
        tower.warm_up()
        rates[modality] = _rate(tower, [largest(spec, modality)] * BATCH[device.type])
    return parameters(encoder), rates, torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


def parameters(encoder: Any) -> int:
    encoder = getattr(encoder, "inner", encoder)
    modules = [part for part in vars(encoder).values() if isinstance(part, torch.nn.Module)]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _rate(tower: Tower, batch: list[Any]) -> float:
    started, items = time.monotonic(), 0
    while time.monotonic() - started < LEAST_S:
        tower(batch, str)
        items += len(batch)
    return items / (time.monotonic() - started)
