"""The mesh's request router and two others in one, so that they can take turns on the same live replicas."""

from __future__ import annotations

import random

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import (  # type: ignore[attr-defined]  # Ray doesn't say that it exports them
    PendingRequest,
    RunningReplica,
)

from expertmesh.deployments.requests.router import PrefixRouter


class SwitchingRouter(PrefixRouter, PowerOfTwoChoicesRequestRouter):
    """Routes a request by the policy that its id names: `random`, `least_loaded` (Serve's own), else ours."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Only Serve's own way of routing asks."""
        return await PowerOfTwoChoicesRequestRouter.choose_replicas(self, candidate_replicas, pending_request)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        name = pending_request.args[0].request_id
        if "least_loaded" in name:
            return await super(PrefixRouter, self)._choose_replica_for_request(pending_request, is_retry=is_retry)
        if "random" in name:
            return random.choice(self._replicas_list)
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
