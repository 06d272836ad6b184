"""Network namespaces on one bridge: machines that can be cut off and joined again, on this one."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_NET = 0x40000000
"""CLONE_NEWNET of sched.h."""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Why namespaces can't be made here; None if they can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux and iproute2"
    name = f"xm-try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces can't be made here: {error.stderr.strip()}"
    return None


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _NET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class Network:
    """Machines by name, each with one address, all on one bridge in a namespace of its own."""

    def __init__(self, machines: Sequence[str]) -> None:
        mark = f"{os.getpid():x}"
        self._switch = f"xm-{mark}-switch"
        self._names = {machine: f"xm-{mark}-{machine}" for machine in machines}
        self._ports = {machine: f"p{mark}{i}" for i, machine in enumerate(machines)}
        self.addresses: Mapping[str, str] = {machine: f"10.213.7.{i + 1}" for i, machine in enumerate(machines)}

    def open(self) -> None:
        """Makes everything."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for machine, name in self._names.items():
            port = self._ports[machine]
            _ip("netns", "add", name)
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{self.addresses[machine]}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            # Leads nowhere, but says which address is this machine's own to who asks by a route to the world.
            _ip("-n", name, "route", "add", "default", "dev", "eth0")

    def close(self) -> None:
        """Kills what still runs on the machines, and removes everything."""
        for machine in self._names:
            for pid in self.processes(machine):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for name in [*self._names.values(), self._switch]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self, machine: str) -> None:
        """Nothing comes to or from a machine any more, and nobody is told: packets vanish."""
        # The bridge's port stops, the machine's own interface stays up: a cable that was pulled at the far end.
        _ip("-n", self._switch, "link", "set", self._ports[machine], "nomaster")

    def join(self, machine: str) -> None:
        """The opposite."""
        _ip("-n", self._switch, "link", "set", self._ports[machine], "master", "br0", "up")

    def sever(self, one: str, other: str) -> None:
        """Nothing passes between two machines any more, and nobody is told; both reach all others. One pair at once."""
        for machine in (one, other):
            self._isolate(machine, "on")

    def mend(self, one: str, other: str) -> None:
        """The opposite."""
        for machine in (one, other):
            self._isolate(machine, "off")

    def _isolate(self, machine: str, state: str) -> None:
        # A bridge passes nothing between two isolated ports.
        port = self._ports[machine]
        _ip("-n", self._switch, "link", "set", "dev", port, "type", "bridge_slave", "isolated", state)

    def processes(self, machine: str) -> list[int]:
        """The ids of the processes on a machine."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._names[machine]], check=False, capture_output=True, text=True
        )
        return [int(pid) for pid in found.stdout.split()]

    @contextmanager
    def inside(self, machine: str) -> Iterator[None]:
        """The calling thread is on a machine during the block, with the threads and processes that it starts."""
        with (
            Path("/proc/thread-self/ns/net").open() as before,
            Path(f"/run/netns/{self._names[machine]}").open() as there,
        ):
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def on(self, machine: str) -> list[str]:
        """What a command begins with that is to run on a machine."""
        return ["ip", "netns", "exec", self._names[machine]]


@contextmanager
def network(*machines: str) -> Iterator[Network]:
    """Machines that are there during the block."""
    made = Network(machines)
    try:
        made.open()
        yield made
    finally:
        made.close()
