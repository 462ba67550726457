"""One bucket behind one proxy, with an undisturbed run to compare with, for all fault tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fault.rig import Rig
from tests.s3_proxy import S3Proxy


@pytest.fixture(scope="session")
def rig(
    s3: dict[str, Any], checkpoint: Path, ray_local: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    with S3Proxy(s3["s3"]["endpoint_url"]) as proxy:
        through = {"s3": {**s3["s3"], "endpoint_url": proxy.url}}
        rig = Rig(tmp_path_factory.mktemp("rig"), checkpoint, proxy, through, ray_local)
        rig.fill()
        yield rig
