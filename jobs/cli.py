"""The command line: one verb a file, collected here."""

from __future__ import annotations

import sys
import traceback
from tempfile import NamedTemporaryFile

import typer

from jobs.classify import classify
from jobs.collect import collect, verify
from jobs.compare import compare
from jobs.console import err
from jobs.demo import demo
from jobs.duplicates import duplicates
from jobs.embed import embed, plan
from jobs.encoders import app as encoders
from jobs.evaluate import evaluate
from jobs.fit import fit
from jobs.index import index
from jobs.map import map
from jobs.releases import publish, releases, rollback
from jobs.remove import remove
from jobs.report import report
from jobs.search import search
from jobs.signals import received, stoppable
from jobs.similarity import similarity
from jobs.split import split
from jobs.stats import stats
from jobs.status import status
from jobs.train import train
from pipelines.errors import HeldError, VecmillError
from pipelines.secrets import masked

app = typer.Typer(
    name="vecmill",
    help="Shards of images and captions in; embeddings in Parquet and a sharded FAISS index out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS = (
    *(plan, embed, index, releases, publish, rollback, search, remove),
    *(evaluate, similarity, compare, classify, duplicates, map, report),
    *(train, split, stats),
    *(fit, status, verify, collect, demo),
)
for verb in VERBS:
    app.command()(verb)
app.add_typer(encoders, name="encoders")


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 finished but above the reject ceiling, 4 held by
    another run, 5 a release is built but not published, 130 and 143 stopped."""
    end = end_of_command()
    if isinstance(end, SystemExit) and not received():
        raise end
    sys.exit(tell(end))


def end_of_command() -> BaseException:
    """What it ends with, of which the command-line library makes a SystemExit, without a word where it is stopped."""
    with stoppable():
        try:
            app()
        except BaseException as error:
            return error
    raise AssertionError("it always exits")


def tell(error: BaseException) -> int:
    """Says what ended the command, and what to do next. Returns the exit code."""
    number = received()
    # A run whose lease was taken over is interrupted as by Ctrl-C.
    if number and not isinstance(error, HeldError):
        err.print("vecmill: stopped. What is committed stays; run the same command to go on.", style="red")
        return 128 + number
    if isinstance(error, VecmillError):
        err.print(f"vecmill: {error}", markup=False, style="red")
        return error.exit_code
    with NamedTemporaryFile("w", prefix="vecmill-", suffix=".log", delete=False) as log:
        log.write(masked("".join(traceback.format_exception(error))))
    told = f"{type(error).__name__}: {error}".splitlines()[0]
    err.print(f"vecmill: failed unexpectedly: {told}", markup=False, style="red")
    err.print(f"  What is committed stays. The traceback is in {log.name}: please report it.", markup=False)
    return 1
