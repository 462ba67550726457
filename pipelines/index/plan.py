"""What a build decides before it writes anything."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import IndexConfig
from pipelines.index.choose import choose_key, cut, empty_index, largest_rows, shard_bytes, shard_count
from pipelines.index.parts import BATCH_BYTES, Ids, Parts
from pipelines.index.rerank import rerank_dtype, side_bytes
from pipelines.index.train import Draw, draw
from pipelines.index.tune import require_params
from pipelines.index.variants import require_variants


@dataclass(frozen=True)
class Plan:
    """All that is decided before anything is written. runs: the parts of each index shard to be filled. rerank: what
    their side files hold, `none` for no such. standing: the first so many parts are in index shards that are there
    already, the largest of them of standing_bytes."""

    parts: Parts
    key: str
    runs: tuple[range, ...]
    draw: Draw
    rerank: str = "none"
    standing: int = 0
    standing_bytes: int = 0

    @property
    def new_parts(self) -> Parts:
        return self.parts.run(self.standing, len(self.parts.ranges))

    def run_parts(self) -> list[Parts]:
        return [self.parts.run(run.start, run.stop) for run in self.runs]

    def run_positions(self) -> list[tuple[Ids, ...]]:
        return [self.draw.positions[run.start : run.stop] for run in self.runs]

    @property
    def task_bytes(self) -> int:
        """What filling or asking the largest index shard holds: itself, and a batch as read, cast, compared and
        stored."""
        return max(self.standing_bytes, shard_bytes(self.key, self._most_rows, self.parts.dim)) + 5 * BATCH_BYTES

    @property
    def scratch_bytes(self) -> int:
        """Of local disk, what filling the largest index shard writes before it is put."""
        return self._files_bytes(self._most_rows)

    @property
    def output_bytes(self) -> int:
        """Of all index shards and their side files."""
        return self._files_bytes(self.parts.rows)

    @property
    def _most_rows(self) -> int:
        return max((run.rows for run in self.run_parts()), default=0)

    def _files_bytes(self, rows: int) -> int:
        return shard_bytes(self.key, rows, self.parts.dim) + side_bytes(self.rerank, rows, self.parts.dim)


def make_plan(parts: Parts, settings: IndexConfig) -> Plan:
    """Raises: ConfigError for a key or size that cannot be, IndexBuildError for what does not fit."""
    shards = shard_count(parts, settings)
    runs = cut(parts, shards)
    largest = largest_rows(parts, runs)
    alone = largest == max(part.rows for part in parts.ranges)
    key = choose_key(parts.rows, parts.dim, shards, settings, largest, alone)
    require_params(empty_index(key, parts.dim, settings.metric), key, settings.search_params or "")
    require_variants(settings, parts.dim)
    return Plan(parts, key, tuple(runs), draw(parts, key, settings), rerank_dtype(key, settings))
