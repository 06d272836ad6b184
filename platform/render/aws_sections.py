"""The `cluster:` section: on which AWS nodes a mesh runs. Every default is here, on the field that it belongs to."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from expertmesh.errors import ConfigError
from expertmesh.platform.config.fields import Count, Section, Text, problem, unit
from expertmesh.platform.hardware import InstanceType, instance_type

GPU_AMI = "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
NEURON_AMI = "resolve:ssm:/aws/service/neuron/dlami/base/ubuntu-22.04/latest/image_id"

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise problem(f"{value!r} is not a name; allowed: lower-case letters, digits and -, 1 to 40 characters")
    return value


def _known_type(value: str) -> str:
    try:
        instance_type(value)
    except ConfigError as error:
        raise problem(str(error)) from None
    return value


def _starts_with(*prefixes: str) -> AfterValidator:
    def check(value: str) -> str:
        if not value.startswith(prefixes):
            raise problem(f"{value!r} must start with {' or '.join(prefixes)}")
        return value

    return AfterValidator(check)


Name = Annotated[str, AfterValidator(_name)]
TypeName = Annotated[str, AfterValidator(_known_type)]
Ami = Annotated[str, _starts_with("ami-", "resolve:ssm:/")]
SubnetId = Annotated[str, _starts_with("subnet-")]
SecurityGroupId = Annotated[str, _starts_with("sg-")]
AbsolutePath = Annotated[str, _starts_with("/")]
Environment = dict[Text, str]


class NodeSection(Section):
    """What the head and every pool have in common."""

    instance_type: TypeName = Field(description="EC2 instance type; one of the hardware table.")
    ami: Ami | None = Field(
        default=None,
        description="AMI by id or `resolve:ssm:/parameter`; null takes AWS's deep-learning base image.",
    )
    disk_gib: Count = Field(
        default=200, description="Size of the gp3 root disk, encrypted.", json_schema_extra=unit("GiB")
    )

    @property
    def hardware(self) -> InstanceType:
        """The row of the hardware table."""
        return instance_type(self.instance_type)

    @property
    def accelerator(self) -> Literal["cpu", "gpu", "neuron"]:
        """Which image the node runs."""
        found = self.hardware.accelerator
        return "cpu" if found is None else found.kind

    @property
    def image_id(self) -> str:
        """The AMI to start from."""
        return self.ami or (NEURON_AMI if self.accelerator == "neuron" else GPU_AMI)


class HeadConfig(NodeSection):
    """The head node: Ray's control, the HTTP proxy, and room for ingress and controller. Always on demand."""

    instance_type: TypeName = Field(default="m7i.4xlarge", description="EC2 instance type; one of the hardware table.")
    instance_profile: Text | None = Field(
        default=None, description="Instance profile whose role may start nodes; null takes the cluster's."
    )


class PoolConfig(NodeSection):
    """Nodes of one instance type for one side of the mesh. A side may have any number of pools."""

    name: Name = Field(description="Name of the node type.")
    side: Literal["attention", "experts"] = Field(description="Which deployment's replicas run here.")
    min_nodes: int = Field(default=0, ge=0, description="Fewest nodes.", json_schema_extra=unit("nodes"))
    max_nodes: Count = Field(description="Most nodes.", json_schema_extra=unit("nodes"))
    replicas_per_node: Count | None = Field(
        default=None,
        description="Replicas that one node takes; null takes as many as fit.",
        json_schema_extra=unit("replicas"),
    )
    market: Literal["on-demand", "spot", "capacity-block"] = Field(
        default="on-demand", description="How nodes are bought."
    )
    capacity_reservation_id: Annotated[str, _starts_with("cr-")] | None = Field(
        default=None, description="The Capacity Block or On-Demand Capacity Reservation to start in."
    )
    placement_group: Text | None = Field(
        default=None,
        description="An existing placement group; `cluster` strategy for EFA. null takes the cluster's, with EFA.",
    )
    efa: bool | None = Field(
        default=None, description="Attach all EFA interfaces; null: on instances with several network cards."
    )
    idle_timeout_minutes: float | None = Field(
        default=None,
        gt=0,
        description="Idle time after which a node goes; null takes the cluster's.",
        json_schema_extra=unit("min"),
    )
    environment: Environment = Field(default_factory=dict, description="More environment variables of its containers.")

    @field_validator("max_nodes")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        least = info.data.get("min_nodes", 0)
        if value < least:
            raise problem(f"{value} is below min_nodes ({least})")
        return value

    @model_validator(mode="after")
    def _can_be_bought(self) -> Self:
        if self.market == "capacity-block":
            if not self.hardware.capacity_blocks:
                raise problem(f"{self.instance_type} is not sold in capacity blocks; allowed: on-demand, spot")
            if self.capacity_reservation_id is None:
                raise problem("market capacity-block needs capacity_reservation_id")
        if self.market == "spot" and self.capacity_reservation_id is not None:
            raise problem("spot nodes can't start in a capacity reservation")
        if self.efa and self.hardware.efa == 0:
            raise problem(f"{self.instance_type} has no EFA")
        return self

    @property
    def uses_efa(self) -> bool:
        """Whether EFA interfaces are attached."""
        return self.hardware.network_cards > 1 if self.efa is None else self.efa


class FsxConfig(Section):
    """An FSx for Lustre file system that every node mounts."""

    dns_name: Text = Field(description="DNS name of the file system.")
    mount_name: Text = Field(description="Its mount name.")
    path: AbsolutePath = Field(default="/fsx", description="Where nodes and containers see it.")


class KeyPairConfig(Section):
    """An existing EC2 key pair; without one, Ray makes one and keeps it in ~/.ssh."""

    name: Text = Field(description="Name of the key pair.")
    file: Text = Field(description="Its private key's file on the machine that runs `ray up`.")


class ImagesConfig(Section):
    """Container images with ExpertMesh, by hardware. Only those that the nodes need must be there."""

    cpu: Text | None = Field(default=None, description="For the head and for CPU nodes.")
    gpu: Text | None = Field(default=None, description="For NVIDIA GPUs.")
    neuron: Text | None = Field(default=None, description="For Trainium and Inferentia.")


class WeightsConfig(Section):
    """Sizes of the checkpoint, with which memory is checked."""

    attention_gib: float = Field(gt=0, description="All but the routed experts.", json_schema_extra=unit("GiB"))
    experts_gib: float = Field(ge=0, description="All routed experts, one copy of each.", json_schema_extra=unit("GiB"))
    experts_per_layer: Count | None = Field(
        default=None,
        description="Routed experts of one layer; with it, the slots that a shard has beyond redundancy count too.",
        json_schema_extra=unit("experts"),
    )


class AwsCluster(Section):
    """A Ray cluster on EC2."""

    name: Name = Field(default="expertmesh", description="Name of the Ray cluster.")
    region: Text = Field(description="AWS region.")
    subnets: list[SubnetId] = Field(min_length=1, description="Subnets of one VPC; pools with EFA use the first.")
    security_groups: list[SecurityGroupId] = Field(
        min_length=1,
        description="Existing security groups for all nodes. EFA needs one that allows all traffic within itself, "
        "both ways.",
    )
    instance_profile: Text = Field(
        description="Instance profile of all nodes; without `head.instance_profile` its role must allow what Ray calls."
    )
    placement_group: Text | None = Field(
        default=None, description="Placement group of the pools with EFA that name none."
    )
    key_pair: KeyPairConfig | None = Field(default=None, description="SSH key; null lets Ray make one.")
    ssh_user: Text = Field(default="ubuntu", description="User of the AMIs.")
    ssh_proxy_command: Text | None = Field(
        default=None, description="OpenSSH ProxyCommand, such as one through a bastion."
    )
    internal_ips: bool = Field(
        default=True, description="Reach nodes by private addresses; nodes with EFA have no others."
    )
    key_folder: Text = Field(
        default="~/.expertmesh/keys",
        description="Folder on the machine that runs `ray up`. Its file `cluster` (mode 600, at least 16 bytes) holds "
        "the cluster's secret; nodes get a copy.",
    )
    images: ImagesConfig = Field(description="Container images by hardware.")
    weights: WeightsConfig | None = Field(default=None, description="Sizes to check memory with; null: no check.")
    fsx: FsxConfig | None = Field(default=None, description="File system for checkpoints; null: none.")
    head: HeadConfig = Field(default_factory=HeadConfig, description="The head node.")
    pools: list[PoolConfig] = Field(min_length=1, description="Worker nodes.")
    idle_timeout_minutes: float = Field(
        default=10.0, gt=0, description="Idle time after which a node goes.", json_schema_extra=unit("min")
    )
    upscaling_speed: float = Field(default=1.0, gt=0, description="Nodes added at once, as a multiple of those there.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Ray's own log level.")
    tags: dict[Text, str] = Field(default_factory=dict, description="More tags of the instances.")
    environment: Environment = Field(default_factory=dict, description="Environment variables of all containers.")
    initialization_commands: list[Text] = Field(
        default_factory=list,
        description="Commands on each node before its container starts: a registry's login, the Lustre client.",
    )
    setup_commands: list[Text] = Field(
        default_factory=list, description="Commands in each container before Ray starts."
    )

    @field_validator("pools")
    @classmethod
    def _distinct(cls, pools: list[PoolConfig]) -> list[PoolConfig]:
        names = [pool.name for pool in pools]
        for name in {"head", *names}:
            if names.count(name) > (0 if name == "head" else 1):
                raise problem(f"the pool name {name!r} is taken; each pool needs its own, and head is the head node's")
        return pools

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for pool in self.pools:
            if pool.uses_efa and pool.hardware.network_cards > 1 and not self.internal_ips:
                raise problem(
                    f"internal_ips: pool {pool.name} has several network interfaces, and EC2 gives such instances no "
                    "public address; use true"
                )
        for kind in sorted({node.accelerator for node in self.pools} | {self.head.accelerator}):
            if getattr(self.images, kind) is None:
                raise problem(f"images.{kind}: needed, because there are {kind} nodes")
        return self
