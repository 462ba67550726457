"""The flags that several verbs share, and how they become settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
import yaml

from pipelines.config import RunConfig, load_config, yaml_problem
from pipelines.contracts import Modality
from pipelines.errors import ConfigError, InputError
from pipelines.storage import Store, whole_uri

if TYPE_CHECKING:
    from pipelines.index.cache import Cache

DEFAULT_CACHE, DEFAULT_CACHE_SIZE = "~/.cache/vecmill", "20G"

What = Annotated[
    list[str],
    typer.Argument(
        help="A recipe (.yaml), or inputs: paths, brace ranges, globs, folders or list files (.txt).",
        show_default=False,
    ),
]
Output = Annotated[str | None, typer.Option(help="Folder or bucket prefix that gets everything.", show_default=False)]
EncoderNames = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder",
        help="FAMILY:MODEL, as in open_clip:ViT-B-32/laion2b_s34b_b79k; `vecmill encoders` lists them. Several share "
        "one read and one decode.",
        show_default=False,
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--name", help="Alias for the encoder's folder under embeddings/; one an encoder.", show_default=False
    ),
]
Format = Annotated[str | None, typer.Option(help="tar, parquet, folder or manifest; recognised by suffix if left out.")]
Modalities = Annotated[
    str | None, typer.Option(help="image, text, multimodal, or several as image,text; all the encoder has if left out.")
]
Translate = Annotated[
    str | None,
    typer.Option(
        help="Translate captions first, as in it:en; --set translate.model=… names the model.", show_default=False
    ),
]
TextClean = Annotated[str | None, typer.Option(help="lavis: captions cleaned as LAVIS does; none if left out.")]
PrecisionFlag = Annotated[
    str | None, typer.Option("--precision", help="fp32, fp16 or bf16; fp16 on GPUs and fp32 on CPU if left out.")
]
BatchSize = Annotated[int | None, typer.Option(help="Items in one forward pass.")]
Dtype = Annotated[str | None, typer.Option(help="float16 or float32, of the vectors as written.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, as in --set decode.max_aspect=80. Repeatable."),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster; RAY_ADDRESS or a local one if left out.")]
RECIPE_SUFFIXES = (".yaml", ".yml")
OutputArgument = Annotated[
    str, typer.Argument(help="The output of an embed run, or the run's recipe (.yaml).", show_default=False)
]
EncoderFolder = Annotated[
    str | None, typer.Option("--encoder", help="The encoder's folder; needed where the output has several.")
]
ModalityFlag = Annotated[Modality, typer.Option(help="Whose vectors.")]
CacheFlag = Annotated[
    str,
    typer.Option(
        "--cache", metavar="DIR", help="Where files of an index in other storage are kept for the next search, or none."
    ),
]
CacheSize = Annotated[str, typer.Option(help="Most that the cache may hold; what was used longest ago goes first.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def settings_of(what: list[str], flags: dict[str, Any], assignments: list[str] | None) -> RunConfig:
    """A recipe and/or inputs, with flags on top. Raises: ConfigError."""
    recipes = [item for item in what if item.endswith(RECIPE_SUFFIXES)]
    inputs = [item for item in what if item not in recipes]
    if len(recipes) > 1:
        raise ConfigError(f"{len(recipes)} recipes were given: {', '.join(recipes)}", "Give one recipe a run.")
    overrides = {**flags, "input": inputs or None, **assignments_of(assignments)}
    return load_config(recipes[0] if recipes else None, overrides)


def assignments_of(texts: list[str] | None) -> dict[str, Any]:
    """`--set KEY=VALUE` as dotted keys and YAML values."""
    return dict(map(_assignment, texts or []))


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        shown = re.sub(r"[^\w.-].*", "…", text, flags=re.DOTALL)
        raise ConfigError(f"--set {shown}: KEY=VALUE is expected", "As in --set encode.batch_size=32.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: the value is not YAML: {yaml_problem(error)}") from None


def output_store_root(output: str) -> str:
    """Local paths made absolute: workers run elsewhere. Raises: ConfigError."""
    if "://" not in output:
        return str(Path(output).expanduser().resolve())
    try:
        whole_uri(output)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{output} cannot be an output: {error}", "Check its protocol.") from None
    return output


def text_in(inputs: Store, file: str) -> str:
    """A file or object in UTF-8, a byte order mark left out. inputs: a store of whole addresses. Raises: InputError."""
    try:
        local = inputs.local_path(whole_uri(file))
        # A pipe cannot be sought in, which fsspec does.
        is_pipe = local is not None and local.exists() and not local.is_file()
        return (local.read_bytes() if local and is_pipe else inputs.read(whole_uri(file))).decode("utf-8-sig")
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{file} cannot be read: {error}", "Check the path.") from None


def cache_of(folder: str, size: str) -> Cache | None:
    from pipelines.index.cache import Cache
    from pipelines.index.choose import parse_bytes

    most, optional = parse_bytes(size, "--cache-size"), folder == DEFAULT_CACHE
    try:
        return None if folder == "none" else Cache(Path(folder).expanduser(), most, optional)
    except RuntimeError as error:
        if optional:
            return None
        raise ConfigError(f"--cache {folder}: {error}", "Name a folder by its whole path.") from None


class NamedOutput(NamedTuple):
    """An output as the command line names it. recipe: the one that names it, where one does."""

    store: Store
    recipe: RunConfig | None

    @property
    def address(self) -> str | None:
        """Of the Ray cluster that the recipe names."""
        return self.recipe.cluster.address if self.recipe else None

    @property
    def inputs(self) -> Store:
        """Of whole addresses, with the output's storage settings."""
        return Store(options=self.store.options)

    @property
    def encoder(self) -> str | None:
        """The encoder's folder as the recipe aliases it."""
        names = self.recipe.name if self.recipe else None
        return names[0] if names and len(names) == 1 else None


def named_output(given: str) -> NamedOutput:
    """With the recipe's storage settings, where a recipe is given. Raises: ConfigError."""
    if not given.endswith(RECIPE_SUFFIXES):
        return NamedOutput(Store(output_store_root(given)), None)
    recipe = load_config(given)
    return NamedOutput(Store(output_store_root(recipe.output), recipe.storage), recipe)
