"""From a stack's outputs to what `expertmesh render` and Helm take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertmesh.platform.aws.settings import Infrastructure
from expertmesh.platform.render.serve_config import SECRET_FILE

FSX_PATH = "/fsx"
PASSWORD_FILE = f"{SECRET_FILE.rpartition('/')[0]}/valkey"
"""Where the nodes of a Ray cluster find the cache's password: `valkey` in `cluster.key_folder`, beside the secret."""


def cluster_sections(settings: Infrastructure, outputs: Mapping[str, str]) -> dict[str, Any]:
    """The part of a cluster file that the stack decides: `render ray-cluster FILE --stack` puts it beneath FILE."""
    cluster: dict[str, Any] = {
        "name": settings.ray_cluster,
        "region": settings.region,
        "subnets": list(settings.subnets),
        "security_groups": [outputs["NodeSecurityGroupId"]],
        "instance_profile": outputs["WorkerInstanceProfile"],
        "head": {"instance_profile": outputs["HeadInstanceProfile"]},
    }
    if "PlacementGroupName" in outputs:
        cluster["placement_group"] = outputs["PlacementGroupName"]
    if "FsxDnsName" in outputs:
        cluster["fsx"] = {
            "dns_name": outputs["FsxDnsName"],
            "mount_name": outputs["FsxMountName"],
            "path": FSX_PATH,
        }
    store = _kv_store(settings, outputs)
    if "ValkeyPasswordSecret" in outputs:
        store["password_file"] = PASSWORD_FILE
    return {"mesh": {"kv_store": store}, "cluster": cluster} if store else {"cluster": cluster}


def helm_values(settings: Infrastructure, outputs: Mapping[str, str]) -> dict[str, Any]:
    """Values of the chart that the stack decides, for `helm install -f`.

    The pods' role is not among them: Pod Identity associates it with the chart's ServiceAccount by name. Nor is the
    cache's password: put it into a Secret and name that in `kvStore.existingSecret`.
    """
    if settings.fsx is not None:
        storage = {
            "fsx": {
                "enabled": True,
                "fileSystemId": outputs["FsxFileSystemId"],
                "dnsName": outputs["FsxDnsName"],
                "mountName": outputs["FsxMountName"],
                "capacity": f"{settings.fsx.storage_gib}Gi",
                "mountPath": FSX_PATH,
            }
        }
    else:
        storage = {
            "s3": {
                "enabled": True,
                "bucket": outputs["BucketName"],
                "region": settings.region,
                "prefix": "models/",
            }
        }
    values: dict[str, Any] = {"storage": storage}
    store = _kv_store(settings, outputs)
    if store:
        values["mesh"] = {"kv_store": store}
    if "PlacementGroupName" in outputs:
        values["karpenter"] = {"nodeClass": {"placementGroup": outputs["PlacementGroupName"]}}
    if settings.hyperpod is not None:
        values["hyperpod"] = {"enabled": True}
    return values


def _kv_store(settings: Infrastructure, outputs: Mapping[str, str]) -> dict[str, Any]:
    """The mesh's `kv_store` section without its password; empty without a cache."""
    if "ValkeyAddress" not in outputs:
        return {}
    store: dict[str, Any] = {
        "url": f"rediss://{outputs['ValkeyAddress']}?cluster=true",
        "username": outputs["ValkeyUser"],
    }
    if "ValkeyPasswordSecret" not in outputs:
        store["iam"] = {"cache_name": outputs["ValkeyName"], "region": settings.region}
    return store
