"""One local Ray, one object store and one small checkpoint for all tests of a session that want them.

Small models on few cores: one thread each, or two test processes fight over every layer.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, which reads how many threads it may have.
os.environ.update(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        # Ray's own default, but read when it is imported, which a forked command has long done.
        "RAY_AUTH_MODE": "token",
    }
)

import pytest
from hypothesis import HealthCheck, settings

from tests import ceph
from tests.checkpoints import save_open_clip
from tests.s3_server import s3_server

# A busy machine is no fault of the code: no deadline, nothing said of slow generation.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ATTEMPTS = 3


def start(folder: str, store_bytes: int = 512 * 2**20, **more: Any) -> None:
    """Ray gives its raylet 30 s to start, fixed in its code, which a busy machine may need twice."""
    import ray

    for left in reversed(range(ATTEMPTS)):
        try:
            ray.init(
                num_cpus=4,
                object_store_memory=store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                _temp_dir=folder,
                **more,
            )
            return
        except Exception:
            ray.shutdown()
            if not left:
                raise


@pytest.fixture(scope="session")
def ray_local() -> Iterator[str]:
    """Ray with 4 CPUs in this process's own session folder, whose path must stay short for its sockets.

    Yields its address, for runs in processes of their own.
    """
    import ray

    with tempfile.TemporaryDirectory(prefix="vm", ignore_cleanup_errors=True) as folder:
        start(folder)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small open_clip model with random weights, in a local-dir."""
    return save_open_clip(tmp_path_factory.mktemp("checkpoint") / "clip")


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The URL of an S3 server on loopback, with conditional puts and listings as S3's."""
    with s3_server() as url:
        yield url


@pytest.fixture(scope="session")
def ceph_store() -> Iterator[dict[str, Any]]:
    """Storage settings of a Ceph object gateway on loopback."""
    missing = ceph.missing_programs()
    if missing:
        pytest.skip(f"Ceph is not installed here: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="vm", ignore_cleanup_errors=True) as folder, ceph.Ceph(Path(folder)) as run:
        yield {"s3": {"endpoint_url": run.url, "key": ceph.KEY, "secret": ceph.SECRET}}


@pytest.fixture(scope="session")
def s3(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Storage settings of the most real S3 server there is here: Ceph's, else moto's."""
    if not ceph.missing_programs():
        return dict(request.getfixturevalue("ceph_store"))
    url = request.getfixturevalue("object_store")
    return {"s3": {"endpoint_url": url, "key": ceph.KEY, "secret": ceph.SECRET}}
