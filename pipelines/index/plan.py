"""What a build decides before it writes anything."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import IndexConfig
from pipelines.index.choose import choose_key, cut, shard_bytes, shard_count
from pipelines.index.parts import BATCH_BYTES, Ids, Parts
from pipelines.index.train import Draw, draw


@dataclass(frozen=True)
class Plan:
    """All that is decided before anything is written. runs: the parts of each index shard."""

    parts: Parts
    key: str
    runs: tuple[range, ...]
    draw: Draw

    def run_parts(self) -> list[Parts]:
        return [self.parts.run(run.start, run.stop) for run in self.runs]

    def run_positions(self) -> list[tuple[Ids, ...]]:
        return [self.draw.positions[run.start : run.stop] for run in self.runs]

    @property
    def task_bytes(self) -> int:
        """What filling the largest index shard holds: itself, and a batch as read, as cast and as compared."""
        rows = max(run.rows for run in self.run_parts())
        return shard_bytes(self.key, rows, self.parts.dim) + 4 * BATCH_BYTES


def make_plan(parts: Parts, settings: IndexConfig) -> Plan:
    """Raises: ConfigError for a key or size that cannot be, IndexBuildError for what does not fit."""
    shards = shard_count(parts, settings)
    key = choose_key(parts.rows, parts.dim, shards, settings)
    return Plan(parts, key, tuple(cut(parts, shards)), draw(parts, key, settings))
