import socket
import threading

import pytest
import ray

from jobs import cluster
from jobs.cluster import connected, require_listener
from pipelines.errors import PreflightError


def test_an_address_where_nothing_listens_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LISTENER_WAIT_S", 0)
    with (
        pytest.raises(PreflightError, match=r"Cannot connect to Ray at 127\.0\.0\.1:1: .*refused\n  Check --address"),
        connected("127.0.0.1:1"),
    ):
        pass


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "ray://[::ffff:127.0.0.1]:{}"])
def test_a_listener_is_waited_for(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LISTENER_WAIT_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    listening = threading.Timer(0.5, lambda: started.append(socket.create_server(("127.0.0.1", port))))
    started: list[socket.socket] = []
    listening.start()
    require_listener(form.format(port))
    started[0].close()


@pytest.mark.parametrize("address", [None, "auto", "local"])
def test_addresses_without_a_port_are_rays_to_find(address: str | None) -> None:
    require_listener(address)


@pytest.mark.parametrize(("told", "starts"), [("The current node timed out during startup.", 3), ("no such flag", 1)])
def test_a_ray_that_is_slow_to_start_is_started_again(told: str, starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def init(*_: object, **__: object) -> None:
        begun.append(told)
        raise Exception(told)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PreflightError, match=f"Cannot connect to Ray at this machine: {told}"), connected(None):
        pass
    assert len(begun) == starts
