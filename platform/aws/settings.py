"""The file that `expertmesh aws` reads: what surrounds a mesh, and the parameters of the template that come of it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator

from expertmesh.errors import ConfigError
from expertmesh.platform.config.fields import Count, Section, Text, problem, unit
from expertmesh.platform.config.problems import Scan, explain, report
from expertmesh.platform.hardware import instance_type
from expertmesh.platform.render.yaml_file import read_mapping

_SMALLEST_FSX_GIB = 1200
_FSX_STEP_GIB = 2400
_FSX_THROUGHPUTS = (125, 250, 500, 1000)


def _matches(pattern: str, example: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise problem(f"{value!r} is not of the form {example}")
        return value

    return AfterValidator(check)


def _network(value: str) -> str:
    try:
        network = ipaddress.IPv4Network(value)
    except ValueError as error:
        raise problem(f"{value!r} is not an IPv4 network such as 10.0.0.0/16: {error}") from None
    if network.prefixlen == 0:
        raise problem("0.0.0.0/0 is the whole internet, and the API has no wall of its own; name your networks")
    return value


StackName = Annotated[str, _matches(r"[a-z][a-z0-9-]{0,28}[a-z0-9]", "my-mesh: a-z, 0-9 and -, at most 30 characters")]
RayClusterName = Annotated[str, _matches(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "my-mesh: a-z, 0-9 and -")]
Network = Annotated[str, AfterValidator(_network)]
VpcId = Annotated[str, _matches(r"vpc-[0-9a-z]+", "vpc-0a1b2c3d")]
SubnetId = Annotated[str, _matches(r"subnet-[0-9a-z]+", "subnet-0a1b2c3d")]
SecurityGroupId = Annotated[str, _matches(r"sg-[0-9a-z]+", "sg-0a1b2c3d")]
CacheNodeType = Annotated[str, _matches(r"cache\.[a-z0-9]+\.[a-z0-9]+", "cache.r7g.2xlarge")]
HyperPodType = Annotated[str, _matches(r"ml\.[a-z0-9-]+\.[a-z0-9]+", "ml.p5en.48xlarge")]
ClusterArn = Annotated[
    str, _matches(r"arn:aws[a-z-]*:eks:[a-z0-9-]+:[0-9]{12}:cluster/\S+", "arn:aws:eks:REGION:ACCOUNT:cluster/NAME")
]
LifecycleUri = Annotated[str, _matches(r"s3://sagemaker-[a-z0-9.-]+(/\S*)?", "s3://sagemaker-BUCKET/FOLDER")]


class Fsx(Section):
    """An FSx for Lustre file system (PERSISTENT_2) whose folder /models shows the bucket's models/."""

    storage_gib: int = Field(description="Size: 1200 or a multiple of 2400.", json_schema_extra=unit("GiB"))
    throughput: int = Field(
        default=250, description="Throughput of each TiB: 125, 250, 500 or 1000.", json_schema_extra=unit("MB/s")
    )

    @field_validator("storage_gib")
    @classmethod
    def _a_size_that_fsx_has(cls, value: int) -> int:
        if value != _SMALLEST_FSX_GIB and (value <= 0 or value % _FSX_STEP_GIB):
            raise problem(f"{value} is not a size of FSx for Lustre; allowed: 1200 and multiples of 2400")
        return value

    @field_validator("throughput")
    @classmethod
    def _a_throughput_that_fsx_has(cls, value: int) -> int:
        if value not in _FSX_THROUGHPUTS:
            raise problem(f"{value} is not one of {', '.join(map(str, _FSX_THROUGHPUTS))}")
        return value


class Valkey(Section):
    """An ElastiCache replication group of Valkey in cluster mode, with TLS."""

    node_type: CacheNodeType = Field(description="Node type; large ones have more bandwidth too.")
    shards: Count = Field(default=1, description="Shards.", json_schema_extra=unit("shards"))
    replicas: int = Field(
        default=0,
        ge=0,
        le=5,
        description="Replicas of each shard. The store is a cache: none is enough, and a shard that fails costs time.",
        json_schema_extra=unit("replicas"),
    )
    login: Literal["iam", "password"] = Field(
        default="iam", description="IAM tokens, or a password that Secrets Manager makes and keeps."
    )


class HyperPod(Section):
    """A SageMaker HyperPod cluster of one instance group, orchestrated by an EKS cluster that is there."""

    eks_cluster: ClusterArn = Field(description="ARN of the EKS cluster, with HyperPod's Helm chart installed.")
    eks_security_group: SecurityGroupId = Field(
        description="The EKS cluster's own security group, by which its control plane reaches the instances."
    )
    instance_type: HyperPodType = Field(description="Instance type, with SageMaker's prefix.")
    instances: Count = Field(description="Instances.", json_schema_extra=unit("instances"))
    lifecycle: LifecycleUri = Field(
        description="S3 folder with on_create.sh. AWS's policy for HyperPod reads buckets called sagemaker-... only."
    )

    @field_validator("instance_type")
    @classmethod
    def _in_the_table(cls, value: str) -> str:
        try:
            instance_type(value.removeprefix("ml."))
        except ConfigError as error:
            raise problem(str(error)) from None
        return value


class Infrastructure(Section):
    """One CloudFormation stack around a mesh, in a VPC that is there."""

    name: StackName = Field(description="Name of the stack, and of what is in it.")
    region: Text = Field(description="AWS region.")
    vpc: VpcId = Field(description="VPC of the nodes.")
    subnets: list[SubnetId] = Field(min_length=1, description="Its subnets for nodes; the file system is in the first.")
    ray_cluster: RayClusterName = Field(
        default="expertmesh", description="`cluster.name` of the Ray cluster whose nodes the head may start and end."
    )
    image_repository: Text = Field(default="expertmesh", description="ECR repository that nodes pull images from.")
    bucket: Annotated[str, _matches(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "my-checkpoints")] | None = Field(
        default=None, description="Name of the bucket for checkpoints; null takes one from the stack's name."
    )
    clients: Network | None = Field(default=None, description="Network that may reach the API; null: nodes only.")
    ssh: Network | None = Field(default=None, description="Network that `ray up` runs in; null: nodes only.")
    placement_group: bool = Field(
        default=False, description="Make a placement group with the cluster strategy, for EFA."
    )
    fsx: Fsx | None = Field(default=None, description="File system for checkpoints; null: none.")
    valkey: Valkey | None = Field(default=None, description="Store for KV blocks; null: none.")
    hyperpod: HyperPod | None = Field(default=None, description="HyperPod cluster; null: none.")

    @field_validator("valkey")
    @classmethod
    def _failover_needs_zones(cls, value: Valkey | None, info: ValidationInfo) -> Valkey | None:
        if value is not None and value.replicas and len(info.data.get("subnets", ())) == 1:
            raise problem(
                "replicas go into other zones, and there is one subnet; name subnets of other zones, or use 0"
            )
        return value

    def parameters(self) -> dict[str, str]:
        """The template's parameters by name. What isn't wanted is left to the template's default, which is: none."""
        wanted: dict[str, object] = {
            "VpcId": self.vpc,
            "SubnetIds": ",".join(self.subnets),
            "RayClusterName": self.ray_cluster,
            "ImageRepository": self.image_repository,
            "BucketName": self.bucket,
            "ClientCidr": self.clients,
            "SshCidr": self.ssh,
            "UsePlacementGroup": "true" if self.placement_group else None,
        }
        if self.fsx is not None:
            wanted |= {"FsxStorageGib": self.fsx.storage_gib, "FsxThroughput": self.fsx.throughput}
        if self.valkey is not None:
            wanted |= {
                "ValkeyNodeType": self.valkey.node_type,
                "ValkeyShards": self.valkey.shards,
                "ValkeyReplicas": self.valkey.replicas,
                "ValkeyLogin": self.valkey.login,
            }
        if self.hyperpod is not None:
            wanted |= {
                "HyperPodEksClusterArn": self.hyperpod.eks_cluster,
                "HyperPodEksSecurityGroupId": self.hyperpod.eks_security_group,
                "HyperPodInstanceType": self.hyperpod.instance_type,
                "HyperPodInstanceCount": self.hyperpod.instances,
                "HyperPodLifecycleUri": self.hyperpod.lifecycle,
            }
        return {name: str(value) for name, value in wanted.items() if value is not None}


def load_infrastructure(source: str | Path | Mapping[str, Any]) -> Infrastructure:
    """Read and validate a file, or a mapping of the same form.

    Raises ConfigError with one line for each problem, each starting with the dotted path.
    """
    scan = Scan(source if isinstance(source, Mapping) else read_mapping(Path(source)))
    if scan.problems:
        raise ConfigError(report(scan.problems))
    try:
        return Infrastructure.model_validate(scan.data)
    except ValidationError as error:
        raise ConfigError(report(explain(error, Infrastructure.model_json_schema()))) from None
