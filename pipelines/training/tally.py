"""An epoch's figures while it lasts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Tally:
    """pairs: of all workers. totals: sums of what each step told, left on the device, for reading them waits for it.
    before_s: seconds that the epoch took before this process went on with it."""

    steps: int = 0
    pairs: int = 0
    before_s: float = 0.0
    totals: dict[str, Tensor] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def add(self, told: dict[str, Tensor], pairs: int) -> None:
        for name, value in told.items():
            self.totals[name] = self.totals[name] + value.detach() if name in self.totals else value.detach().clone()
        self.steps, self.pairs = self.steps + 1, self.pairs + pairs

    @property
    def seconds(self) -> float:
        return round(self.before_s + time.monotonic() - self.started, 3)

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.steps for name, total in self.totals.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint; `Tally(**state)` goes on from it."""
        return {"steps": self.steps, "pairs": self.pairs, "before_s": self.seconds, "totals": dict(self.totals)}
