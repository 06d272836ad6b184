"""The autoscaling policy that Ray Serve's controller asks, several times a second, for attention and for experts."""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.config import AutoscalingContext

from expertmesh.deployments.controller.durable import RayKeyValues
from expertmesh.platform.autoscaling.targets import Deployment, Targets

log = logging.getLogger("expertmesh.controller")


class TargetPolicy:
    """Answers with the number in force, else the configured one. Decides nothing: our controller has the signals."""

    def __init__(self, deployment: Deployment, configured: int) -> None:
        self._deployment: Deployment = deployment
        self._configured = configured

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """(replicas, no state); what is there now if the number can't be read."""
        try:
            target = Targets(RayKeyValues(), context.app_name or "").target(self._deployment)
        except Exception as error:  # Serve's control loop must go on
            log.warning("the number of %s replicas can't be read: %r", self._deployment, error)
            return context.target_num_replicas, {}
        return self._configured if target is None else target, {}
