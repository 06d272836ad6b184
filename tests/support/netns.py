"""Network namespaces on one bridge: machines that can be cut off and joined again, on this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


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

    def close(self) -> None:
        """Removes everything."""
        for name in [*self._names.values(), self._switch]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self, machine: str) -> None:
        """Nothing comes to or from a machine any more, and nobody is told: packets vanish."""
        # The bridge's port stops, the machine's own interface stays up: a cable that was pulled at the far end.
        _ip("-n", self._switch, "link", "set", self._ports[machine], "nomaster")

    def join(self, machine: str) -> None:
        """The opposite."""
        _ip("-n", self._switch, "link", "set", self._ports[machine], "master", "br0", "up")

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
