"""A bucket with shards behind a proxy, and `vecmill embed` over it as a process of its own, as often as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import s3fs

from pipelines.collect import collect
from pipelines.ledger import list_commits
from pipelines.scenes import write_shards
from pipelines.storage import Store
from pipelines.verify import problems
from tests.flow.command import Command
from tests.flow.outputs import assert_same, datasets
from tests.flow.runs import settings, write_recipe
from tests.s3_proxy import Chaos, S3Proxy, Trap

SHARDS, SAMPLES, BROKEN = 4, 125, 6
BUCKET = "fault"


@dataclass
class Rig:
    """storage: settings that lead through the proxy. shards: how many there are."""

    folder: Path
    checkpoint: Path
    proxy: S3Proxy
    storage: dict[str, Any]
    address: str
    shards: int = SHARDS
    samples: int = SAMPLES
    _spare: list[Path] = field(default_factory=list)

    def fill(self) -> None:
        """The bucket with the input, and an output `reference` of a run that was left alone."""
        s3fs.S3FileSystem(**self.storage["s3"]).mkdir(BUCKET)
        per_shard = self.samples // self.shards
        paths = write_shards(self.folder / "shards", self.samples + per_shard, self.shards + 1, broken=BROKEN)
        *first, last = paths
        for path in first:
            self.store("in").put_atomic(path.name, path)
        self._spare = [last]
        status, printed = self.run("reference")
        assert status == 0, printed

    @contextmanager
    def another_shard(self) -> Iterator[None]:
        """In the input, while the block runs."""
        (last,) = self._spare
        self.store("in").put_atomic(last.name, last)
        yield
        self.store("in").delete([last.name])

    def store(self, output: str) -> Store:
        return Store(f"s3://{BUCKET}/{output}", self.storage)

    def recipe(self, output: str, /, **more: Any) -> str:
        recipe = settings(f"s3://{BUCKET}/in/*.tar", f"s3://{BUCKET}/{output}", self.checkpoint, storage=self.storage)
        return write_recipe(self.folder / f"{output}.yaml", recipe | more)

    def impatient(self, timeout_s: float) -> dict[str, Any]:
        """Storage settings whose client takes a server that says nothing for so long for silent."""
        patience = {"read_timeout": timeout_s, "connect_timeout": timeout_s}
        return {"s3": {**self.storage["s3"], "config_kwargs": patience}}

    def command(self, output: str, /, **more: Any) -> list[str]:
        return ["embed", self.recipe(output, **more), "--address", self.address]

    def run(
        self,
        output: str,
        trap: Callable[[Command], Trap] | None = None,
        command: list[str] | None = None,
        chaos: Chaos | None = None,
        **more: Any,
    ) -> tuple[int, str]:
        """Exit status and what was printed. With a trap, until the process has died of it."""
        process = Command(command or self.command(output, **more))
        self.proxy.trap, self.proxy.chaos = trap(process) if trap else None, chaos
        try:
            return process.wait()
        finally:
            self.proxy.trap = self.proxy.chaos = None

    def run_and_check_reads(
        self, output: str, trap: Callable[[Command], Trap] | None = None, **more: Any
    ) -> tuple[int, str]:
        """A run that reads nothing of the shards that were finished before it."""
        finished, before = self.finished(output), self.proxy.bytes_read.copy()
        ended = self.run(output, trap, **more)
        for path, count in self.proxy.bytes_read.items():
            name = path.rpartition("/")[2].removesuffix(".tar")
            if "/in/" in path and any(shard.startswith(f"{name}-") for shard in finished):
                assert count == before.get(path, 0), f"{path} was read again although its shard was finished"
        return ended

    def finished(self, output: str) -> set[str]:
        """Shards that have all their commits."""
        store = self.store(output)
        both = [{ref.shard for ref in list_commits(store, family)} for family in ("samples", "clip")]
        return both[0] & both[1]

    def require_right(self, output: str, reference: str = "reference") -> None:
        """The output holds what an undisturbed run's does, each row once; and after collecting, nothing else."""
        store = self.store(output)
        assert_same(store, self.store(reference))
        assert len(datasets(store)["samples"]) == len(self.finished(output))
        collect(store)
        assert list(problems(store, deep=True)) == []
        assert store.names("staging") == store.names("leases") == store.names("retired") == []
