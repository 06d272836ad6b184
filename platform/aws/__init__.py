"""What surrounds a mesh on AWS, as one CloudFormation stack: bucket, file system, cache, roles, network, HyperPod.

`settings` is the user's file, `infrastructure.yaml` the template, `stack` drives CloudFormation, `outputs` passes on
what came of it. Nodes are not in the stack: Ray's autoscaler or Karpenter starts them.
"""

from __future__ import annotations

from expertmesh.platform.aws.changes import Change, Plan
from expertmesh.platform.aws.errors import AwsError
from expertmesh.platform.aws.outputs import cluster_sections, helm_values
from expertmesh.platform.aws.settings import Infrastructure, load_infrastructure
from expertmesh.platform.aws.stack import Event, Stack, StackState

__all__ = [
    "AwsError",
    "Change",
    "Event",
    "Infrastructure",
    "Plan",
    "Stack",
    "StackState",
    "cluster_sections",
    "helm_values",
    "load_infrastructure",
]
