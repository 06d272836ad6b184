"""A Ray cluster of several machines on this one, each a network namespace with a `ray start` of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from expertmesh.routing.dispatch import Mailbox
from tests.nodes.fake_nodes import AUTOSCALER_ENVIRONMENT, OBJECT_STORE_BYTES, autoscaling
from tests.support.netns import Network

BIN = Path(sys.executable).parent
HEAD = "head"
GCS_PORT, HTTP_PORT = 6379, 8000
_START_S = 180.0
_END_S = 20.0


class RayMachines:
    """Ray nodes by the name of their machine; their logs are in `folder`."""

    def __init__(
        self,
        net: Network,
        resources: Mapping[str, Mapping[str, int]],
        folder: Path,
        fake_types: Mapping[str, Mapping[str, int]] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """resources: what each machine offers. Only the head has CPUs, so that what asks for nothing else is there.

        environment: of each machine's Ray, beside that of this process.
        fake_types: with these node types, Ray's autoscaler starts and ends more nodes on the head's machine.
        """
        self._net = net
        self._resources = resources
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._temporary: list[str] = []
        self.address = f"{net.addresses[HEAD]}:{GCS_PORT}"
        self._environment = {**os.environ, **(environment or {})}
        self._autoscaling: Path | None = None
        if fake_types is not None:
            self._autoscaling = folder / "autoscaling.yaml"
            self._autoscaling.write_text(json.dumps(autoscaling(self.address, fake_types)))

    def start(self, machine: str) -> None:
        """Starts a machine's Ray, which serves a moment later."""
        temporary = tempfile.mkdtemp(prefix="xmn-")  # short: Ray puts unix sockets below it
        self._temporary.append(temporary)
        head = machine == HEAD
        autoscaled = head and self._autoscaling is not None
        arguments = [
            *(["--head", f"--port={GCS_PORT}", "--include-dashboard=false"] if head else [f"--address={self.address}"]),
            f"--node-ip-address={self._net.addresses[machine]}",
            f"--num-cpus={int(head)}",
            f"--resources={json.dumps(dict(self._resources[machine]))}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={temporary}",
            "--disable-usage-stats",
            "--block",
            *([f"--autoscaling-config={self._autoscaling}"] if autoscaled else []),
        ]
        command = [str(BIN / "ray"), "start", *arguments]
        environment = {**self._environment, **(AUTOSCALER_ENVIRONMENT if autoscaled else {})}
        self._running[machine] = self.run(machine, f"ray-{machine}", command, environment)

    def run(
        self, machine: str, log: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """A command on this cluster, in a process group of its own; what it says is appended to a log."""
        with (self._folder / f"{log}.log").open("ab") as out:
            return subprocess.Popen(
                [*self._net.on(machine), *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **environment,
                    "RAY_ADDRESS": self.address,
                    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
                },
            )

    def ended(self, machine: str) -> bool:
        """Whether a machine's Ray has ended by itself."""
        return self._running[machine].poll() is not None

    def stop(self, machine: str) -> None:
        """Ends a machine's Ray and everything that ran under it."""
        end(self._running.pop(machine))

    def close(self) -> None:
        """Ends all of them, the head last."""
        for machine in reversed(list(self._running)):
            self.stop(machine)
        for folder in self._temporary:
            shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process group: SIGTERM, SIGKILL where that is not enough."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)


@contextmanager
def serving(
    net: Network,
    resources: Mapping[str, Mapping[str, int]],
    config: Mapping[str, Any],
    folder: Path,
    fake_types: Mapping[str, Mapping[str, int]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[RayMachines]:
    """A mesh on such a cluster, deployed by `expertmesh serve` on the head, where it answers on loopback."""
    machines = RayMachines(net, resources, folder, fake_types, environment)
    command = None
    try:
        for machine in resources:
            machines.start(machine)
            if machine == HEAD:
                eventually(lambda: _listens(net, GCS_PORT), _START_S)
        written = folder / "mesh.yaml"
        written.write_text(json.dumps(dict(config)))  # JSON is YAML
        command = machines.run(HEAD, "mesh", [str(BIN / "expertmesh"), "serve", str(written)], os.environ)
        eventually(lambda: _answers(net, command), _START_S)
        yield machines
    finally:
        if command is not None:
            end(command)
        machines.close()
        Mailbox.sweep()


def eventually(condition: Callable[[], bool], seconds: float) -> None:
    """Waits for a condition. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.2)


def _listens(net: Network, port: int) -> bool:
    with net.inside(HEAD):
        listening = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], check=True, capture_output=True, text=True)
    return bool(listening.stdout.strip())


def _answers(net: Network, command: subprocess.Popen[bytes]) -> bool:
    if command.poll() is not None:
        raise RuntimeError("the mesh did not start; its log says why")
    with net.inside(HEAD), suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{HTTP_PORT}/health", timeout=5).status_code == httpx.codes.OK
    return False
