"""`vecmill releases`, `vecmill publish` and `vecmill rollback`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.console import err, out, size
from jobs.index import Floor, given_settings, index_settings
from jobs.options import AsJson, EncoderFolder, ModalityFlag, NamedOutput, OutputArgument, Set, named_output

if TYPE_CHECKING:
    from pipelines.index.publish import Listed

Version = Annotated[
    str | None,
    typer.Option(help="Release to publish, as in v0002; the last one built if left out.", show_default=False),
]


def releases(
    output: OutputArgument, encoder: EncoderFolder = None, modality: ModalityFlag = "image", as_json: AsJson = False
) -> None:
    """List the releases of an index: which one is current, which one a rollback leads to, what they find.

    Example: vecmill releases s3://bucket/emb
    """
    from pipelines.index.publish import list_releases

    named = named_output(output)
    facts = [facts_of(listed) for listed in list_releases(named.store, chosen(named, encoder), modality)]
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for fact in facts:
        figures = ""
        if fact["state"] != "unfinished":
            recall = "unknown" if fact["recall@10"] is None else f"{fact['recall@10']:.3f}"
            figures = f"{fact['vectors']:>13,} vectors {size(fact['bytes']):>11}  recall@10 {recall}"
        out.print(f"  {fact['version']:<7}{fact['state']:<11}{figures}  {fact['index_key']}", markup=False)
    if not facts:
        out.print("There is no release. `vecmill index` builds one.")


def chosen(named: NamedOutput, encoder: str | None) -> str:
    from pipelines.search import choose_encoder

    return choose_encoder(named.store, encoder or named.encoder)


def facts_of(listed: Listed) -> dict[str, Any]:
    release = listed.release
    if release is None:
        return {"version": listed.version, "state": listed.state, "index_key": ""}
    return {
        "version": listed.version,
        "state": listed.state,
        "made": release.made,
        "vectors": release.parts.standing,
        "bytes": sum(file.bytes for file in release.files),
        "index_key": release.index_key,
        "search_params": release.search_params,
        "recall@10": release.recall.lowest_at_10,
        "query_ms": release.query_ms,
    }


def publish(
    output: OutputArgument,
    release: Version = None,
    encoder: EncoderFolder = None,
    modality: ModalityFlag = "image",
    floor: Floor = None,
    set: Set = None,
) -> None:
    """Make a release the current one, if its recall, the rejects and the counts allow it; exit code 5 if not.

    Example: vecmill publish s3://bucket/emb --release v0002 --floor 0.8
    """
    from pipelines.index.publish import publish as publish_release
    from pipelines.index.release import newest_or_none, read_release

    named = named_output(output)
    folder = chosen(named, encoder)
    settings = index_settings(named, given_settings({"floor": floor}, set))
    newest = None if release else newest_or_none(named.store, folder, modality)
    wanted = newest or read_release(named.store, folder, modality, release)
    publish_release(named.store, wanted, settings.floor, settings.keep, lambda line: err.print(line, markup=False))


def rollback(output: OutputArgument, encoder: EncoderFolder = None, modality: ModalityFlag = "image") -> None:
    """Make the release current again that was so before the present one.

    Example: vecmill rollback s3://bucket/emb
    """
    from pipelines.index.publish import rollback as roll_back

    named = named_output(output)
    release = roll_back(named.store, chosen(named, encoder), modality)
    err.print(f"{release.folder} is the current release", markup=False)
