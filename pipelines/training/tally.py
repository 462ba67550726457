"""An epoch's figures while it lasts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Tally:
    """pairs: of all workers. totals: sums of what each step told, left on the device, for reading them waits for it.
    counts: of how many steps; what is not finite, as gradients that half precision cannot hold, is in neither.
    before_s: seconds that the epoch took before this process went on with it."""

    steps: int = 0
    pairs: int = 0
    before_s: float = 0.0
    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def add(self, told: dict[str, Tensor], pairs: int) -> None:
        for name, value in told.items():
            finite = torch.isfinite(value)
            kept = torch.where(finite, value.detach(), 0)
            self.totals[name] = self.totals[name] + kept if name in self.totals else kept
            self.counts[name] = self.counts[name] + finite if name in self.counts else finite.int()
        self.steps, self.pairs = self.steps + 1, self.pairs + pairs

    @property
    def seconds(self) -> float:
        return round(self.before_s + time.monotonic() - self.started, 3)

    def means(self) -> dict[str, float]:
        """Without those that were finite in no step."""
        return {name: float(total) / count for name, total in self.totals.items() if (count := int(self.counts[name]))}

    def state(self) -> dict[str, Any]:
        """For a checkpoint; `Tally(**state)` goes on from it."""
        sums = {"totals": dict(self.totals), "counts": dict(self.counts)}
        return {"steps": self.steps, "pairs": self.pairs, "before_s": self.seconds, **sums}
