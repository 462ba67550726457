"""A Ceph object gateway with all it stands on (one monitor, one OSD in memory), on loopback, for tests.

Unlike moto it checks signatures, and it settles races between requests as a real store does. From Debian:
`radosgw ceph-mon ceph-osd ceph-common`. How: https://docs.ceph.com/en/quincy/install/manual-deployment/
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

KEY, SECRET = "testkey", "testsecret"
PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool")
START_S = 120

SETTINGS = """
[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
ms bind msgr1 = false
osd objectstore = memstore
memstore device bytes = 2147483648
osd memory target = 1073741824
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 1
mon data = {folder}/mon
osd data = {folder}/osd
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
crash dir = {folder}
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
rgw thread pool size = 32
rgw enable usage log = false
rgw enable lc threads = false
rgw run sync thread = false
"""
CAPS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *", "mgr", "allow *"),
    "client.rgw": ("mon", "allow rwx", "osd", "allow rwx"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
}


def missing_programs() -> list[str]:
    """Those of Ceph's programs that are not installed here."""
    return [program for program in PROGRAMS if not shutil.which(program)]


class Ceph:
    """`with Ceph(folder) as ceph:` an S3 server at `ceph.url` for KEY and SECRET; its daemons end with the block."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._daemons = folder, ExitStack()
        self._port, self._mon_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Ceph:
        try:
            self._start()
        except BaseException:
            self._daemons.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._daemons.close()

    def _start(self) -> None:
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        for name in ("mon", "osd", "rgw"):
            (self._folder / name).mkdir()
        settings = SETTINGS.format(folder=self._folder, fsid=fsid, mon_port=self._mon_port, port=self._port)
        (self._folder / "ceph.conf").write_text(settings)
        self._make_keys()
        monmap = str(self._folder / "monmap")
        self._run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{self._mon_port}]", "--fsid", fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", self._keyring)
        self._daemon("ceph-mon", "-i", "a")
        self._run("ceph", "osd", "new", osd, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0")
        self._wait_for_port(self._daemon("radosgw", "-n", "client.rgw"))
        user = ("--uid", "test", "--display-name", "test", "--access-key", KEY, "--secret-key", SECRET)
        self._run("radosgw-admin", "user", "create", *user)

    @property
    def _keyring(self) -> str:
        return str(self._folder / "keyring")

    def _make_keys(self) -> None:
        self._run("ceph-authtool", "--create-keyring", self._keyring)
        for name, caps in CAPS.items():
            each = [word for pair in zip(caps[::2], caps[1::2], strict=True) for word in ("--cap", *pair)]
            self._run("ceph-authtool", self._keyring, "--gen-key", "-n", name, *each)

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [program, "-c", str(self._folder / "ceph.conf"), *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(self._command(program, *arguments), capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr}")

    def _daemon(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """In the foreground, so that its process is ours to end."""
        command = [*self._command(program, *arguments), "-f"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._daemons.callback(stop, process)
        return process

    def _wait_for_port(self, gateway: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        while gateway.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.1)
        log = self._folder / "client.rgw.log"
        raise RuntimeError(f"Ceph's gateway does not answer: {log.read_text()[-2000:] if log.exists() else ''}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(30)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
