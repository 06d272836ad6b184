"""Where a member of the mesh can be reached, as it travels to those that want to."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.deployments.runtime import bind_host
from expertmesh.errors import WireError
from expertmesh.platform.config import MeshConfig
from expertmesh.routing.transport import Address


@dataclass(frozen=True, slots=True)
class Source:
    """Addresses on a node."""

    node: str
    """Ray's id of it."""
    addresses: tuple[str, ...]

    def best(self, here: str) -> Address:
        """The address to use on the node `here`: a unix socket on the same one. Raises WireError if there is none."""
        addresses = [Address.parse(text) for text in self.addresses]
        usable = [a for a in addresses if a.family == "tcp" or self.node == here]
        if not usable:
            raise WireError(f"no address of {self.addresses} can be reached from here")
        return min(usable, key=lambda address: address.family == "tcp")


def addresses_for(config: MeshConfig, name: str) -> list[Address]:
    """Where a member listens, by `routing.transport`, as shards do for frames. name: unique on the node."""
    unix, tcp = Address("unix", f"expertmesh-{name}"), Address("tcp", bind_host(config), 0)
    return {"unix": [unix], "tcp": [tcp], "auto": [unix, tcp]}[config.routing.transport]
