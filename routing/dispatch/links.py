"""The connections of one dispatcher: opened beside its steps when needed, left alone for a while when they fail."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expertmesh.errors import WireError
from expertmesh.routing import native
from expertmesh.routing.dispatch.connecting import GRACE_S, Attempt, Outcome
from expertmesh.routing.dispatch.link import Link
from expertmesh.routing.dispatch.settings import DispatchSettings
from expertmesh.routing.placement import RoutingTable, Target
from expertmesh.routing.transport import Address, Peer, Tls

log = logging.getLogger("expertmesh.dispatch")

_RETRY_SHARD_S = 0.25
"""How long a shard that failed is left alone."""
PATIENCE = 2.0
"""How many times as long as the failure took it is left alone while other copies can answer: a node that went dark
costs a timeout at each attempt, and an attempt at each step would cost more than the shard is worth."""

_MAX_DOUBLINGS = 6
_RETRY_RENEWAL_S = 60.0
"""Between two attempts to open a connection in the place of one that works."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a shard is left alone."""

    at: float
    """`time.monotonic()`"""
    cost_s: float
    """What the failure took."""
    why: str
    strikes: int
    """Failures in a row, this one included."""

    def over(self, now: float, patience: float) -> bool:
        """Whether the shard may be asked again: after each failure in a row it is left alone for twice as long."""
        doublings = min(self.strikes - 1, _MAX_DOUBLINGS) if patience else 0
        return now - self.at >= max(_RETRY_SHARD_S, patience * self.cost_s) * (1 << doublings)


class Links:
    """One link a shard, and which shards failed lately."""

    def __init__(self, secret: bytes, settings: DispatchSettings, tell: Callable[[list[str]], None]) -> None:
        """tell: is called with the shards in trouble when these have changed. Raises ConfigError for certificates that
        can't be used."""
        self._tell = tell
        self._secret = secret
        self._settings = settings
        self.by_shard: dict[str, Link] = {}
        self.down: dict[str, Failure] = {}
        self._tls = None if settings.tls is None else Tls(settings.tls)
        self._renew_after_s = math.inf if settings.tls is None else settings.tls.renew_after_s
        self._attempts: dict[str, Attempt] = {}
        self._renewals: dict[str, Attempt] = {}
        """Attempts for shards that have a link."""
        self.strikes: dict[str, int] = {}
        """Failures since its last answer, of shards that had any. No step waits while such a shard is connected to."""

    def get(self, target: Target, x: torch.Tensor) -> Link | None:
        """The link to a shard that takes rows like x; None if it isn't there (yet), a failure being remembered."""
        link = self.by_shard.get(target.shard)
        if link is None:
            return self._open(target, x)
        if link.renew_at <= time.monotonic():
            return self._renewed(link, target, x)
        return link

    def up(self, table: RoutingTable, failed: Sequence[int], patience: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which targets may be asked now: [S]; not those at the positions `failed`, nor those that are being connected
        to."""
        up = np.ones(len(table.targets), dtype=bool)
        if self.down or failed or self._attempts:
            now = time.monotonic()
            left_alone = {shard for shard, failure in self.down.items() if not failure.over(now, patience)}
            left_alone |= {shard for shard, attempt in self._attempts.items() if attempt.outcome(0) is None}
            for position, target in enumerate(table.targets):
                up[position] = position not in failed and target.shard not in left_alone
            if patience:
                self.down = {shard: failure for shard, failure in self.down.items() if not failure.over(now, patience)}
        return up

    def keep(self, table: RoutingTable) -> None:
        """Closes the links to shards that the table does not name."""
        named = {target.shard for target in table.targets}
        for shard in self.by_shard.keys() - named:
            self.by_shard.pop(shard).close()
            self._renew_no_more(shard)
        for shard in self._attempts.keys() - named:
            self._attempts.pop(shard).cancel()
        self.forgive(self.strikes.keys() - named)

    def drop(self, link: Link, why: str, cost_s: float = 0.0) -> None:
        """Closes a link and leaves its shard alone. Nothing the second time."""
        if self.by_shard.pop(link.shard, None) is not None:
            self.mark_down(link.shard, why, cost_s)
            link.close()
            self._renew_no_more(link.shard)

    def mark_down(self, shard: str, why: str, cost_s: float = 0.0) -> None:
        """Leaves a shard alone for a while."""
        self.strikes[shard] = strikes = self.strikes.get(shard, 0) + 1
        self.down[shard] = Failure(time.monotonic(), cost_s, why, strikes)
        if strikes == 1:
            self._tell(sorted(self.strikes))

    def forgive(self, shards: Iterable[str]) -> None:
        """These have answered."""
        known = len(self.strikes)
        for shard in shards:
            self.strikes.pop(shard, None)
        if len(self.strikes) != known:
            self._tell(sorted(self.strikes))

    def abandon(self) -> None:
        """Ends a step half-way: answers that are still to come must not be taken for the next step's."""
        for link in list(self.by_shard.values()):
            if link.stream.state == native.WAITING:
                self.drop(link, "the step was abandoned")

    def close(self) -> None:
        """Closes every connection."""
        for link in list(self.by_shard.values()):
            self.drop(link, "closed")
        for attempt in self._attempts.values():
            attempt.cancel()
        self._attempts.clear()

    def _open(self, target: Target, x: torch.Tensor) -> Link | None:
        shard = target.shard
        try:
            attempt = self._attempts.get(shard)
            if attempt is None:
                attempt = self._attempts[shard] = self._attempt(target)
            outcome = attempt.outcome(0 if shard in self.strikes else GRACE_S)
            if outcome is None:
                return None
            del self._attempts[shard]
            link = self._link(outcome, target, x)
        except WireError as error:
            self.mark_down(shard, str(error))
            return None
        if link is None:
            self.mark_down(shard, outcome.why, outcome.seconds)
            return None
        self.by_shard[shard] = link
        return link

    def _attempt(self, target: Target) -> Attempt:
        return Attempt(self._address(target), self._secret, self._settings.connect_timeout_s, self._tls)

    def _renewed(self, link: Link, target: Target, x: torch.Tensor) -> Link:
        """A link in the place of one that works and is between two frames, as soon as it is open; nothing waits."""
        shard = link.shard
        attempt = self._renewals.get(shard)
        if attempt is None:
            self._renewals[shard] = self._attempt(target)
            return link
        outcome = attempt.outcome(0)
        if outcome is None:
            return link
        del self._renewals[shard]
        link.renew_at = time.monotonic() + _RETRY_RENEWAL_S
        why = outcome.why
        try:
            fresh = self._link(outcome, target, x)
        except WireError as error:
            fresh, why = None, str(error)
        if fresh is None:
            log.warning("the connection to shard %s is not renewed: %s", shard, why)
            return link
        self.by_shard[shard] = fresh
        link.close()
        return fresh

    def _renew_no_more(self, shard: str) -> None:
        if (attempt := self._renewals.pop(shard, None)) is not None:
            attempt.cancel()

    def _link(self, outcome: Outcome, target: Target, x: torch.Tensor) -> Link | None:
        """The link over a connection that was opened. Raises WireError if it leads to another than it should."""
        if outcome.connection is None:
            return None
        sock, peer = outcome.connection
        try:
            self._check(peer, target, x)
        except WireError:
            sock.close()
            raise
        encrypted = self._tls is not None and self._address(target).family == "tcp"
        renew_at = time.monotonic() + self._renew_after_s if encrypted else math.inf
        return Link(sock, target.shard, self._settings.limits, renew_at)

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
