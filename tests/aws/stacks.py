"""Stacks on moto that several test modules make."""

from __future__ import annotations

from typing import Any

import boto3

from expertmesh.platform.aws import Stack, load_infrastructure

HYPERPOD = {
    "eks_cluster": "arn:aws:eks:us-east-1:111122223333:cluster/mesh",
    "eks_security_group": "sg-1",
    "instance_type": "ml.p5.48xlarge",
    "instances": 2,
    "lifecycle": "s3://sagemaker-111122223333/hyperpod",
}
EVERYTHING: dict[str, Any] = {
    "clients": "10.0.0.0/16",
    "placement_group": True,
    "fsx": {"storage_gib": 4800, "throughput": 500},
    "valkey": {"node_type": "cache.r7g.2xlarge", "shards": 2, "replicas": 1},
    "hyperpod": HYPERPOD,
}


def infrastructure(**more: Any) -> dict[str, Any]:
    """Settings in the account's default VPC."""
    subnets = boto3.client("ec2").describe_subnets()["Subnets"][:2]
    return {
        "name": "mesh",
        "region": "us-east-1",
        "vpc": subnets[0]["VpcId"],
        "subnets": [subnet["SubnetId"] for subnet in subnets],
        **more,
    }


def new_stack(**more: Any) -> Stack:
    """A stack with these settings beside the necessary ones; it waits for nothing."""
    return Stack(load_infrastructure(infrastructure(**more)), pause=lambda _: None)
