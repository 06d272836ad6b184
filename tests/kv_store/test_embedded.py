"""The embedded server: private, bounded, and gone with its owner however that ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from expertmesh.kv_store import EmbeddedServer, StoreClient, StoreClosed, StoreRefused, StoreSettings, embedded
from expertmesh.kv_store.embedded import MEMORY_OVERHEAD
from expertmesh.kv_store.guard import _LEAST_LIFE_S as LEAST_LIFE_S
from tests.kv_store.servers import PATIENCE_S, until

BUDGET = 64 << 20


def guard_of_ours() -> psutil.Process:
    """The process that runs the only embedded server of this one."""
    (guard,) = [child for child in psutil.Process().children() if "guard.py" in " ".join(child.cmdline())]
    return guard


def test_a_server_of_our_own() -> None:
    with EmbeddedServer(BUDGET) as server:
        folder = Path(server.settings.endpoint.path).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        client = StoreClient(server.settings)
        assert client.set([(b"a", [memoryview(b"x")])], 60, PATIENCE_S) == [1]
        client.close()
        stranger = StoreClient(StoreSettings(server.settings.endpoint))
        (reply,) = stranger.exists([b"a"], PATIENCE_S)
        stranger.close()
        assert isinstance(reply, StoreRefused)
        assert reply.code == "NOAUTH"
        assert server.settings.password not in repr(server.settings)
        guard = guard_of_ours()
        processes = [guard, *guard.children(recursive=True)]
        told = [" ".join(process.cmdline()) + str(process.environ()) for process in processes]
        assert not any(server.settings.password in text for text in told)
        assert not any(server.settings.password in file.read_text() for file in folder.iterdir() if file.is_file())
        assert not [c for process in processes for c in process.net_connections("inet")], "no port"
        assert server.running
    assert not server.running
    assert not folder.exists()
    assert not [process for process in processes if process.is_running()]


def test_memory_is_bounded_and_new_blocks_take_the_place_of_others() -> None:
    with EmbeddedServer(BUDGET) as server:
        client = StoreClient(server.settings)
        value = memoryview(os.urandom(1 << 20))
        keys = [b"%d" % i for i in range(100)]
        assert [client.set([(key, [value])], 60, PATIENCE_S) for key in keys] == [[len(value)]] * 100
        there = [reply == 1 for reply in client.exists(keys, PATIENCE_S)]
        client.close()
        assert 10 < sum(there) <= BUDGET / MEMORY_OVERHEAD / len(value)
        assert there[-1]


OWNER = """
import os, sys, time
from expertmesh.kv_store import EmbeddedServer
server = EmbeddedServer(64 << 20)
if "fork" in sys.argv and os.fork() == 0:
    os.close(1)
    time.sleep(600)  # a child that has the pipe to the guard
print(server.settings.endpoint.path, flush=True)
sys.stdin.read()
if "leave" in sys.argv:
    os._exit(3)
"""


@pytest.mark.parametrize("way", ["kill", "kill fork", "leave", "end"])
def test_it_does_not_outlive_its_owner(way: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, *way.split()], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdin is not None
    folder = Path(owner.stdout.readline().decode().strip()).parent
    processes = psutil.Process(owner.pid).children(recursive=True)
    servers = [process for process in processes if "valkey" in process.name()]
    assert len(servers) == 1
    if way.startswith("kill"):
        owner.kill()
    owner.stdin.close()
    owner.wait()
    owner.stdout.close()
    until(lambda: not servers[0].is_running(), "server gone")
    until(lambda: not folder.exists(), "folder gone")
    for process in processes:
        if process.is_running() and "fork" in way:
            process.kill()


def test_it_does_not_outlive_its_guard() -> None:
    server = EmbeddedServer(BUDGET)
    guard = guard_of_ours()
    (valkey,) = guard.children()
    guard.send_signal(signal.SIGKILL)
    until(lambda: not valkey.is_running() or valkey.status() == psutil.STATUS_ZOMBIE, "server gone")
    server.close()
    assert not Path(server.settings.endpoint.path).parent.exists()


def answers(server: EmbeddedServer) -> bool:
    """Whether it does, now."""
    client = StoreClient(server.settings)
    (reply,) = client.exists([b"a"], PATIENCE_S)
    client.close()
    return reply is None  # the key is not there, and no error


def test_a_server_that_ends_by_itself_is_started_again_however_often() -> None:
    with EmbeddedServer(BUDGET) as server:
        guard = guard_of_ours()
        (first,) = guard.children()
        until(lambda: time.time() - first.create_time() > 2 * LEAST_LIFE_S, "it has lived")
        killed = {first.pid}
        first.kill()
        for _ in range(3):
            until(lambda: answers(server), "another one answers")
            (another,) = guard.children()
            assert another.pid not in killed
            killed.add(another.pid)
            another.kill()
    assert not guard.is_running()
    assert not Path(server.settings.endpoint.path).parent.exists()


def test_a_server_that_does_not_start_tells_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\necho no such instruction\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setattr(embedded, "server_binary", lambda: broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(StoreClosed, match="did not start: no such instruction"):
        EmbeddedServer(BUDGET)
    assert list(tmp_path.iterdir()) == [broken]
