"""The command line: one verb a file, collected here."""

from __future__ import annotations

import sys
import traceback
from tempfile import NamedTemporaryFile

import typer

from jobs.collect import collect, verify
from jobs.console import err
from jobs.demo import demo
from jobs.embed import embed, plan
from jobs.index import index
from jobs.search import search
from jobs.signals import Stopped, raise_when_stopped
from jobs.status import status
from pipelines.errors import VecmillError
from pipelines.secrets import masked

app = typer.Typer(
    name="vecmill",
    help="Shards of images and captions in; embeddings in Parquet and a sharded FAISS index out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (plan, embed, index, search, status, verify, collect, demo):
    app.command()(verb)


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 finished but above the reject ceiling, 4 held by
    another run, 130 and 143 stopped."""
    raise_when_stopped()
    try:
        app()
    except VecmillError as error:
        err.print(f"vecmill: {error}", markup=False, style="red")
        sys.exit(error.exit_code)
    except Exception as error:
        with NamedTemporaryFile("w", prefix="vecmill-", suffix=".log", delete=False) as log:
            log.write(masked(traceback.format_exc()))
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        err.print(f"vecmill: failed unexpectedly: {told}", markup=False, style="red")
        err.print(f"  What is committed stays. The traceback is in {log.name}: please report it.", markup=False)
        sys.exit(1)
    except Stopped as stopped:
        err.print("vecmill: stopped. What is committed stays; run the same command to go on.", style="red")
        sys.exit(stopped.exit_code)
