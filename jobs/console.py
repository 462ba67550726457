"""What people see: progress, tables of numbers, and errors as one message."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.observe import Stages, duration
from pipelines.secrets import masked


class PrivateConsole(Console):
    """Prints without credentials."""

    def print(self, *objects: Any, **how: Any) -> None:
        super().print(*(masked(each) if isinstance(each, str) else each for each in objects), **how)


out = PrivateConsole(soft_wrap=True, highlight=False, emoji=False)
err = PrivateConsole(stderr=True, soft_wrap=True, highlight=False, emoji=False)

LINE_EVERY_S = 30.0


def size(count: float) -> str:
    """`12.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


class LiveProgress:
    """A bar in a terminal; elsewhere one JSON line every 30 s."""

    def __init__(self, title: str, unit: str, told: str, total: int | None, **fields: Any) -> None:
        """told: what stands behind the bar, a format of `task.fields`, of which `fields` are those to begin with."""
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if err.is_terminal:
            columns = [TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TextColumn(told)]
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err)
            self._task = self._bar.add_task(title, total=total, **fields)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, line: Callable[[], dict[str, Any]], **bar: Any) -> None:
        """line: what a JSON line tells. bar: what the bar does, as Rich's `Progress.update` takes it."""
        if self._bar:
            self._bar.update(self._task, **bar)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(json.dumps({"event": "progress", **line()}), file=sys.stderr, flush=True)


class RunProgress(LiveProgress):
    """Of embedding. Called with the meter's reading. shards: those of each encoder count."""

    def __init__(self, shards: int, encoders: int = 1) -> None:
        self._shards, self._encoders = shards, encoders
        what = "shards" if encoders == 1 else f"shards of {encoders} encoders"
        super().__init__(
            "embedding", what, "{task.fields[rows]} rows, {task.fields[rate]:.0f}/s", shards, rows=0, rate=0.0
        )

    def __call__(self, stages: Stages) -> None:
        written = stages.get("write", {})
        done, rows = int(written.get("shards", 0)), int(written.get("rows", 0))
        elapsed = time.monotonic() - self._started
        encoded = stages.get("encode", {}).get("rows", 0)
        rate = encoded / elapsed if elapsed else 0.0
        self.show(lambda: self._line(stages, done, rate, elapsed), completed=done, rows=rows, rate=rate)

    def _line(self, stages: Stages, done: int, rate: float, elapsed: float) -> dict[str, Any]:
        left = (self._shards - done) * elapsed / done if done else None
        return {
            "shards_done": done,
            "shards": self._shards,
            "encoders": self._encoders,
            "rows": {stage: int(numbers.get("rows", 0)) for stage, numbers in stages.items()},
            "rows_per_second": round(rate, 1),
            "elapsed_s": round(elapsed),
            "eta_s": None if left is None else round(left),
        }


def print_plan(facts: dict[str, Any]) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        out.print(f"  {name:<{width}}  {value}", markup=False)


def print_report(report: dict[str, Any]) -> None:
    shards, stages = report["shards"], report["stages"]
    done = f"{shards['done_now']} shards embedded, {shards['done_before']} were done before"
    out.print(f"{done}; {duration(report['seconds'])}.", markup=False)
    for folder, encoder in report["encoders"].items():
        print_outcome(folder if len(report["encoders"]) > 1 else None, encoder)
    if stages:
        out.print(f"  {'stage':<9}{'rows':>10}{'seconds':>10}{'rows/s':>10}{'peak MiB':>10}")
    for name in ("read", "translate", "decode", "encode", "write"):
        stage = stages.get(name)
        if stage:
            mark = "  ← bottleneck" if name == report["bottleneck"] else ""
            cells = f"{stage['rows']:>10,.0f}{stage['seconds']:>10.1f}{stage.get('rows_per_second', 0):>10.1f}"
            out.print(f"  {name:<9}{cells}{stage.get('peak_mib', 0):>10.0f}{mark}", markup=False)


def print_outcome(folder: str | None, encoder: dict[str, Any]) -> None:
    """Of one encoder: its items by modality, and why some were rejected."""
    if folder:
        out.print(f"  {folder}", markup=False)
    for modality, count in encoder["items"].items():
        absent = f", {count['absent']} samples without" if count["absent"] else ""
        outcome = f"{count['embedded']:,} embedded + {count['rejected']:,} rejected"
        removed = f" + {count['removed']:,} removed" if count["removed"] else ""
        out.print(f"  {modality:<10} {count['items']:>9,} items = {outcome}{removed}{absent}", markup=False)
    if encoder["rejects"]:
        top = ", ".join(f"{reason} {count:,}" for reason, count in list(encoder["rejects"].items())[:5])
        out.print(f"  rejects by reason: {top}", markup=False)
