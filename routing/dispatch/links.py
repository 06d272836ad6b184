"""The connections of one dispatcher: opened when first needed, left alone for a while when they fail."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expertmesh.errors import WireError
from expertmesh.routing import native
from expertmesh.routing.dispatch.link import Link
from expertmesh.routing.dispatch.settings import DispatchSettings
from expertmesh.routing.placement import RoutingTable, Target
from expertmesh.routing.transport import Address, Peer, connect

_RETRY_SHARD_S = 0.25
"""How long a shard that failed is left alone."""
PATIENCE = 2.0
"""How many times as long as the failure took it is left alone while other copies can answer: a node that went dark
costs a timeout at each attempt, and an attempt at each step would cost more than the shard is worth."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a shard is left alone."""

    at: float
    """`time.monotonic()`"""
    cost_s: float
    """What the failure took."""
    why: str

    def over(self, now: float, patience: float) -> bool:
        """Whether the shard may be asked again."""
        return now - self.at >= max(_RETRY_SHARD_S, patience * self.cost_s)


class Links:
    """One link a shard, and which shards failed lately."""

    def __init__(self, secret: bytes, settings: DispatchSettings) -> None:
        self._secret = secret
        self._settings = settings
        self.by_shard: dict[str, Link] = {}
        self.down: dict[str, Failure] = {}

    def get(self, target: Target, x: torch.Tensor) -> Link | None:
        """The link to a shard that takes rows like x; None if it can't be reached, which is remembered."""
        link = self.by_shard.get(target.shard)
        return link if link is not None else self._open(target, x)

    def up(self, table: RoutingTable, failed: Sequence[int], patience: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which targets may be asked now: [S]; those at the positions `failed` may not."""
        up = np.ones(len(table.targets), dtype=bool)
        if self.down or failed:
            now = time.monotonic()
            over = {shard for shard, failure in self.down.items() if failure.over(now, patience)}
            for position, target in enumerate(table.targets):
                up[position] = position not in failed and (target.shard not in self.down or target.shard in over)
            if patience:
                self.down = {shard: failure for shard, failure in self.down.items() if shard not in over}
        return up

    def keep(self, table: RoutingTable) -> None:
        """Closes the links to shards that the table does not name."""
        named = {target.shard for target in table.targets}
        for shard in self.by_shard.keys() - named:
            self.by_shard.pop(shard).close()

    def drop(self, link: Link, why: str, cost_s: float = 0.0) -> None:
        """Closes a link and leaves its shard alone. Nothing the second time."""
        if self.by_shard.pop(link.shard, None) is not None:
            self.mark_down(link.shard, why, cost_s)
            link.close()

    def mark_down(self, shard: str, why: str, cost_s: float = 0.0) -> None:
        """Leaves a shard alone for a while."""
        self.down[shard] = Failure(time.monotonic(), cost_s, why)

    def abandon(self) -> None:
        """Ends a step half-way: answers that are still to come must not be taken for the next step's."""
        for link in list(self.by_shard.values()):
            if link.stream.state == native.WAITING:
                self.drop(link, "the step was abandoned")

    def close(self) -> None:
        """Closes every connection."""
        for link in list(self.by_shard.values()):
            self.drop(link, "closed")

    def _open(self, target: Target, x: torch.Tensor) -> Link | None:
        begin = time.monotonic()
        try:
            sock, peer = connect(self._address(target), self._secret, self._settings.connect_timeout_s)
            try:
                self._check(peer, target, x)
            except WireError:
                sock.close()
                raise
        except WireError as error:
            self.mark_down(target.shard, str(error), time.monotonic() - begin)
            return None
        link = Link(sock, target.shard, self._settings.limits)
        self.by_shard[target.shard] = link
        return link

    def _check(self, peer: Peer, target: Target, x: torch.Tensor) -> None:
        """Raises WireError if the shard is not who it should be or doesn't take rows like x."""
        if peer.shard != target.shard or peer.revision != self._settings.revision:
            raise WireError(
                f"shard {peer.shard} with checkpoint {peer.revision} answers where {target.shard} "
                f"with {self._settings.revision} should be"
            )
        dtype = str(x.dtype).removeprefix("torch.")
        if peer.width != x.shape[1] or peer.dtype != dtype:
            raise WireError(
                f"shard {peer.shard} takes rows of width {peer.width} in {peer.dtype}; "
                f"the engine sends width {x.shape[1]} in {dtype}"
            )

    def _address(self, target: Target) -> Address:
        addresses = [Address.parse(text) for text in target.addresses]
        local = target.node == self._settings.node
        wanted = self._settings.transport
        for family in ("unix", "tcp") if local else ("tcp",):
            for address in addresses:
                if address.family == family and wanted in ("auto", family):
                    return address
        raise WireError(f"no way to shard {target.shard} by transport {wanted!r}: it listens at {target.addresses}")
