"""Imports go one way, and the heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {"errors", "contracts", "observe", "secrets"},
    {"config", "listed", "local_disk", "retry", "stream", "uploads"},
    {"storage"},
    {"fragments", "ledger", "lease", "record", "takedowns"},
    {"sources", "encoders", "scenes", "families"},
    {
        "prepare",
        "meter",
        "failures",
        "read",
        "translate",
        "decode",
        "overlap",
        "encode",
        "merge",
        "write",
        "remove",
        "compact",
    },
    {"embed", "training"},
    {"stats", "splits"},
    {"index"},
    {"collect", "fit", "fold", "latency", "like", "purge", "queries", "rate", "search", "verify"},
    {"evaluate"},
]
# record.py describes an encoder by its spec, which is light; training measures by metrics of NumPy alone. Nothing else
# may reach up.
ALLOWED_UP = {("record", "encoders"), ("training", "evaluate")}
HEAVY = {
    "ray": {"read", "write", "meter", "failures", "embed", "index", "training", "stats", "splits", "evaluate"},
    "torch": {"encoders", "encode", "translate", "rate", "training"},
    "faiss": {"index", "search", "evaluate"},
    "autofaiss": {"index"},
}
FILES = sorted((ROOT / "pipelines").rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "pipelines").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "pipelines"}
    return found


def layer_of(module: str) -> int:
    for depth, modules in enumerate(LAYERS):
        if module in modules:
            return depth
    pytest.fail(f"pipelines/{module} has no layer: place it in LAYERS")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    module = module_of(path)
    if module == "__init__":
        return
    for name in imports(path):
        head, *rest = name.split(".")
        assert head != "jobs", f"{path.name} imports {name}: pipelines know nothing of jobs"
        if head == "pipelines" and rest and rest[0] != module and (module, rest[0]) not in ALLOWED_UP:
            assert layer_of(rest[0]) <= layer_of(module), f"{module} imports {rest[0]}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_place(path: Path) -> None:
    module = module_of(path)
    for name in imports(path):
        head = name.split(".")[0]
        assert module in HEAVY.get(head, {module}), f"{module} imports {head}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pipelines_read_no_environment_and_no_arguments(path: Path) -> None:
    source = path.read_text()
    assert "os.environ" not in source and "getenv" not in source and "sys.argv" not in source


def test_workers_that_do_not_encode_import_no_torch() -> None:
    """630 MB each, and a node has dozens of them."""
    code = (
        "import sys, pipelines.read, pipelines.decode, pipelines.write, pipelines.meter; print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
