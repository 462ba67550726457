"""Kubernetes documents against their schemas, strictly: a field that is not in the schema is an error."""

import gzip
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

CRDS = Path(__file__).parent / "crds"
KUBERNETES = "1.31"


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with one document; of ray.io's kinds as structure, not their CEL rules."""
    validator = validators().get((document["apiVersion"], document["kind"]))
    if validator:
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error)]
    return []


@cache
def validators() -> dict[tuple[str, str], jsonschema.Draft202012Validator]:
    """By apiVersion and kind."""
    found = {}
    for path in sorted(CRDS.glob("*.yaml.gz")):
        spec = yaml.load(gzip.decompress(path.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"]["metadata"] = {"type": "object"}
            key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            found[key] = jsonschema.Draft202012Validator(strict(schema))
    return found


def strict(schema: Any) -> Any:
    """An OpenAPI schema as JSON Schema, with unknown fields forbidden wherever fields are named."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    if schema.get("nullable"):
        schema["type"] = [schema["type"], "null"]
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    named = {name: strict(inner) for name, inner in schema.get("properties", {}).items()}
    rest = {key: strict(value) for key, value in schema.items() if key != "properties"}
    return rest | ({"properties": named} if "properties" in schema else {})
