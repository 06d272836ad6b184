"""EC2 requests of the nodes: the `node_config` that Ray's AWS provider hands to RunInstances."""

from __future__ import annotations

from typing import Any

from expertmesh.platform.hardware import efa_interfaces
from expertmesh.platform.render.aws_sections import AwsCluster, NodeSection, PoolConfig


def head_node(cluster: AwsCluster) -> dict[str, Any]:
    """RunInstances parameters of the head node."""
    profile = cluster.head.instance_profile or cluster.instance_profile
    return {**_common(cluster, cluster.head, profile), **_plain_network(cluster)}


def pool_node(cluster: AwsCluster, pool: PoolConfig) -> dict[str, Any]:
    """RunInstances parameters of a node of `pool`."""
    config = _common(cluster, pool, cluster.instance_profile)
    config |= _efa_network(cluster, pool) if pool.uses_efa else _plain_network(cluster)
    group = pool.placement_group or (cluster.placement_group if pool.uses_efa else None)
    if group is not None:
        config["Placement"] = {"GroupName": group}
    if pool.market != "on-demand":
        config["InstanceMarketOptions"] = {"MarketType": pool.market}
    if pool.capacity_reservation_id is not None:
        config["CapacityReservationSpecification"] = {
            "CapacityReservationTarget": {"CapacityReservationId": pool.capacity_reservation_id}
        }
    return config


def _common(cluster: AwsCluster, node: NodeSection, profile: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "InstanceType": node.instance_type,
        "ImageId": node.image_id,
        "IamInstanceProfile": {"Name": profile},  # Ray gives one to the head only
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/sda1",
                "Ebs": {
                    "VolumeSize": node.disk_gib,
                    "VolumeType": "gp3",
                    "Encrypted": True,
                    "DeleteOnTermination": True,
                },
            }
        ],
        # IMDSv2 only; two hops, because the containers are one further away.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if cluster.key_pair is not None:
        config["KeyName"] = cluster.key_pair.name
    if cluster.tags:
        tags = [{"Key": key, "Value": value} for key, value in cluster.tags.items()]
        config["TagSpecifications"] = [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")]
    return config


def _plain_network(cluster: AwsCluster) -> dict[str, Any]:
    # Named groups keep Ray from making one of its own, which opens SSH to the world.
    return {"SubnetIds": list(cluster.subnets), "SecurityGroupIds": list(cluster.security_groups)}


def _efa_network(cluster: AwsCluster, pool: PoolConfig) -> dict[str, Any]:
    return {
        "NetworkInterfaces": [
            {
                "NetworkCardIndex": each.card,
                "DeviceIndex": each.device,
                "InterfaceType": each.kind,
                "SubnetId": cluster.subnets[0],
                "Groups": list(cluster.security_groups),
                "DeleteOnTermination": True,
            }
            for each in efa_interfaces(pool.hardware)
        ]
    }
