"""A worker's place among all of them, and what they do together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, distributed, nn

Tables = Callable[[str, int], Iterable[pa.Table]]
"""tables(name, rows): of EXAMPLE, of `rows` rows each; of the data set `train` a worker's own share, of `val` all."""


@dataclass(frozen=True)
class Place:
    """rank: from 0; the first worker alone writes. workers: how many there are."""

    rank: int
    workers: int
    device: torch.device
    tables: Tables

    def all(self, mine: bool) -> bool:
        """Whether it is so for every worker; each must ask."""
        if self.workers == 1:
            return mine
        flag = torch.tensor([int(mine)], device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MIN)
        return bool(flag.item())

    def gather(self, mine: Any) -> list[Any]:
        """What each worker has, by rank."""
        if self.workers == 1:
            return [mine]
        held: list[Any] = [None] * self.workers
        distributed.all_gather_object(held, mine)
        return held

    def make_alike(self, tensors: Iterable[Tensor]) -> None:
        """Gives every worker the first one's."""
        if self.workers > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network as all workers train it together."""
        if self.workers == 1:
            return network
        return nn.parallel.DistributedDataParallel(network)

    def draws(self) -> Tensor:
        """State of the generator that the device's draws come from."""
        return torch.get_rng_state() if self.device.type == "cpu" else torch.cuda.get_rng_state(self.device)

    def set_draws(self, state: Tensor) -> None:
        if self.device.type == "cpu":
            torch.set_rng_state(state.cpu())
        else:
            torch.cuda.set_rng_state(state.cpu(), self.device)
