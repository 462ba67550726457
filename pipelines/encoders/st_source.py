"""What a folder of sentence-transformers says of its model: its modules, the longest text, and prompts.

https://sbert.net/docs/package_reference/sentence_transformer; of pooling, the settings before and since version 6.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from pipelines.encoders import weights
from pipelines.errors import ConfigError, EncoderError

POOLS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_OLD_POOLS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "Mish", "Softplus")
_PLACE = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Source:
    """transformer: where its files lie in the folder, "" for the folder itself.

    steps: what happens to tokens' vectors, in order, JSON-able: `{"type": "Pooling", "pool": [...]}`,
        `{"type": "Dense", "path": …, "inputs": …, "outputs": …, "bias": …, "activation": …}`, `{"type": "Normalize"}`.
    include_prompt: whether a prompt's tokens are pooled too.
    """

    folder: weights.Folder
    transformer: str
    steps: list[dict[str, Any]]
    include_prompt: bool = True
    longest: int | None = None
    lower: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    truncate: int | None = None


def place(folder: weights.Folder, path: str) -> weights.Folder:
    """A module's own folder. Raises: EncoderError for one that is not in the model's."""
    if not path:
        return folder
    if not _PLACE.fullmatch(path):
        raise EncoderError(f"{folder.reference}/modules.json names a module at {path!r}.", "Save the model anew.")
    return folder.sub(path)


def read(folder: weights.Folder, pool: str | None) -> Source:
    """pool: takes the place of the folder's pooling. Raises: ConfigError, EncoderError."""
    modules = _modules(folder, pool)
    transformer = str(modules[0]["path"])
    settings = _json(place(folder, transformer), "sentence_bert_config.json")
    _require_text(settings, folder.reference)
    steps, include_prompt = [], True
    for module in modules[1:]:
        step = _step(folder, module)
        include_prompt &= step.pop("include_prompt", True)
        steps.append({**step, "pool": [pool]} if pool and step["type"] == "Pooling" else step)
    said = _json(folder, "config_sentence_transformers.json")
    return Source(
        folder=folder,
        transformer=transformer,
        steps=[step for step in steps if step["type"] != "Dropout"],
        include_prompt=include_prompt,
        longest=settings.get("max_seq_length"),
        lower=bool(settings.get("do_lower_case")),
        prompts={key: text or "" for key, text in (said.get("prompts") or {}).items()},
        default_prompt=said.get("default_prompt_name"),
        truncate=said.get("truncate_dim"),
    )


def _modules(folder: weights.Folder, pool: str | None) -> list[dict[str, Any]]:
    """As listed, each with its `kind`; of a plain model of transformers, those that a pool makes of it."""
    names = folder.names()
    if "modules.json" not in names:
        if pool and "config.json" in names:
            return [{"path": "", "kind": "Transformer"}, {"path": None, "kind": "Pooling"}]
        raise EncoderError(
            f"{folder.reference} holds no modules.json of sentence-transformers.",
            f"A model of transformers needs ?pool=, as in ?pool=mean. There: {', '.join(names) or 'nothing'}.",
        )
    listed = sorted(json.loads((folder.fetch(["modules.json"]) / "modules.json").read_text()), key=lambda m: m["idx"])
    modules = [{**module, "kind": str(module["type"]).rpartition(".")[2]} for module in listed]
    kinds = [module["kind"] for module in modules]
    if any(kind in ("CLIPModel", "SigLIPModel") for kind in kinds):
        raise ConfigError(f"{folder.reference} is a CLIP model.", "Name the model of transformers in it by hf:.")
    unknown = [kind for kind in kinds if kind not in ("Transformer", *_STEPS)]
    if unknown or kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Transformer") + kinds.count("Pooling") > 2:
        raise ConfigError(
            f"{folder.reference} is made of {', '.join(kinds)}, which st: does not embed.",
            f"It embeds a Transformer and a Pooling, then any of {', '.join(list(_STEPS)[1:])}.",
        )
    return modules


def _require_text(settings: dict[str, Any], reference: str) -> None:
    """Of what version 6 adds: models of other tasks, of images, or with chat templates are not read."""
    task, modalities = settings.get("transformer_task", "feature-extraction"), settings.get("modality_config") or {}
    plain = {"method": "forward", "method_output_name": "last_hidden_state"}
    said = [modalities[key] for key in modalities if key != "text"] + [settings.get("processing_kwargs")]
    if task != "feature-extraction" or any(said) or modalities.get("text", plain) != plain:
        raise ConfigError(
            f"{reference}: its sentence_bert_config.json is not that of a plain text model.",
            "Name a model of images and text by hf: or open_clip:.",
        )


def _step(folder: weights.Folder, module: dict[str, Any]) -> dict[str, Any]:
    path = module["path"]
    config = {} if path is None else _json(place(folder, path), "config.json")
    step: dict[str, Any] = {"type": module["kind"], **_STEPS[module["kind"]](config, f"{folder.reference}/{path}")}
    return {**step, "path": path} if step["type"] == "Dense" else step


def _pooling(config: dict[str, Any], where: str) -> dict[str, Any]:
    chosen = config.get("pooling_mode") or [pool for key, pool in _OLD_POOLS.items() if config.get(key)] or ["mean"]
    pools = [chosen] if isinstance(chosen, str) else list(chosen)
    if unknown := [pool for pool in pools if pool not in POOLS]:
        raise EncoderError(f"{where}: a pooling of {unknown[0]} is not known.", f"Known: {', '.join(POOLS)}.")
    return {"pool": pools, "include_prompt": config.get("include_prompt", True)}


def _dense(config: dict[str, Any], where: str) -> dict[str, Any]:
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise EncoderError(
            f"{where}: an activation {path} is not known.", f"Known of torch.nn: {', '.join(ACTIVATIONS)}."
        )
    places = {config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")}
    if places != {"sentence_embedding"} or config.get("use_residual"):
        raise EncoderError(f"{where}: a Dense of tokens, or with a residual, is not known.", "Use another model.")
    if not {"in_features", "out_features"} <= set(config):
        raise EncoderError(f"{where}/config.json does not say in_features and out_features.", "Save the model anew.")
    return {
        "inputs": int(config["in_features"]),
        "outputs": int(config["out_features"]),
        "bias": bool(config.get("bias", True)),
        "activation": activation,
    }


def _nothing(config: dict[str, Any], where: str) -> dict[str, Any]:
    return {}


_STEPS = {"Pooling": _pooling, "Dense": _dense, "Normalize": _nothing, "Dropout": _nothing}


def _json(folder: weights.Folder, name: str) -> dict[str, Any]:
    """Empty where there is no such file."""
    if name not in folder.names():
        return {}
    return dict(json.loads((folder.fetch([name]) / name).read_text()))
