"""The hardware table against the EC2 data that moto carries, the layout of EFA interfaces, and what fits."""

from __future__ import annotations

from typing import Any

import boto3
import botocore.session
import pytest

from expertmesh.errors import ConfigError
from expertmesh.platform.hardware import INSTANCE_TYPES, InstanceType, ReplicaNeed, efa_interfaces, fit, instance_type
from tests.aws.conftest import aws_account


@pytest.fixture(scope="module")
def of_ec2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    with aws_account(tmp_path_factory.mktemp("home")):
        pages = boto3.client("ec2", "us-east-1").get_paginator("describe_instance_types").paginate()
        return {each["InstanceType"]: dict(each) for page in pages for each in page["InstanceTypes"]}


@pytest.mark.parametrize("row", INSTANCE_TYPES.values(), ids=lambda row: row.name)
class TestAgainstEC2:
    def test_cpus_memory_and_network(self, row: InstanceType, of_ec2: dict[str, dict[str, Any]]) -> None:
        there = of_ec2[row.name]
        network = there["NetworkInfo"]
        assert row.vcpus == there["VCpuInfo"]["DefaultVCpus"]
        assert row.memory_gib * 1024 == there["MemoryInfo"]["SizeInMiB"]
        assert row.network_cards == network["MaximumNetworkCards"]
        assert row.efa == network.get("EfaInfo", {}).get("MaximumEfaInterfaces", 0)
        assert row.capacity_blocks == ("capacity-block" in there["SupportedUsageClasses"])

    def test_accelerators(self, row: InstanceType, of_ec2: dict[str, dict[str, Any]]) -> None:
        there = of_ec2[row.name]
        devices = there.get("GpuInfo", {}).get("Gpus") or there.get("NeuronInfo", {}).get("NeuronDevices") or []
        if row.accelerator is None:
            assert not devices
            return
        [device] = devices
        assert (row.accelerator.name, row.accelerators) == (device["Name"], device["Count"])
        assert row.accelerator.cores == device.get("CoreInfo", {}).get("Count", 0)
        if row.accelerator.name == "Trainium2":
            assert device["MemoryInfo"]["SizeInMiB"] == 512 * 1024  # EC2 reports 512 GiB; the data sheet says 96
        else:  # makers round up: an L40S of 48 GB has 44.7 GiB
            assert device["MemoryInfo"]["SizeInMiB"] / 1024 == pytest.approx(row.accelerator.memory_gib, rel=0.07)


def test_botocore_knows_every_type() -> None:
    shape = botocore.session.get_session().get_service_model("ec2").shape_for("InstanceType")
    assert set(INSTANCE_TYPES) <= set(shape.enum)


def test_an_unknown_type_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'p5en.48xlarge'"):
        instance_type("p5enn.48xlarge")


def test_efa_interfaces_of_one_and_of_many_cards() -> None:
    assert [(i.card, i.device, i.kind) for i in efa_interfaces(instance_type("r7i.48xlarge"))] == [(0, 0, "efa")]
    many = [(i.card, i.device, i.kind) for i in efa_interfaces(instance_type("g6e.48xlarge"))]
    assert many[:2] == [(0, 0, "interface"), (0, 1, "efa-only")]
    assert many[2:] == [(1, 0, "efa-only"), (2, 0, "efa-only"), (3, 0, "efa-only")]
    assert efa_interfaces(instance_type("inf2.48xlarge")) == ()


@pytest.mark.parametrize(
    ("need", "name", "replicas", "limit"),
    [
        (ReplicaNeed("x", cpus=8, gpus=1, weights_gib=60, kv_cache_gib=10), "p5en.48xlarge", 8, "GPU"),
        (ReplicaNeed("x", cpus=8, gpus=0.5, weights_gib=20, kv_cache_gib=10), "p5.48xlarge", 16, "GPU"),
        (ReplicaNeed("x", cpus=60, gpus=1), "p5.48xlarge", 3, "CPU"),
        (ReplicaNeed("x", cpus=2, weights_gib=100), "r7i.8xlarge", 2, "memory"),
        (ReplicaNeed("x", cpus=2, neuron_cores=2, weights_gib=20), "inf2.48xlarge", 12, "neuron_cores"),
    ],
)
def test_how_many_fit(need: ReplicaNeed, name: str, replicas: int, limit: str) -> None:
    found = fit(need, instance_type(name))
    assert (found.replicas, found.limit) == (replicas, limit)


@pytest.mark.parametrize(
    ("need", "name", "message"),
    [
        (
            ReplicaNeed("attention replica", cpus=8, gpus=1, weights_gib=60, kv_cache_gib=24),
            "p5.48xlarge",
            "attention replica on p5.48xlarge: weights 60.0 + KV cache 24.0 = 84.0 GiB; "
            "1 H100 x 80 GiB x 0.9 = 72.0 GiB: 12.0 GiB too much",
        ),
        (
            ReplicaNeed("expert shard", cpus=1, weights_gib=300),
            "r7i.8xlarge",
            "expert shard on r7i.8xlarge: weights 300.0 + KV cache 0.0 = 300.0 GiB; "
            "256 GiB of host memory x 0.9 = 230.4 GiB: 69.6 GiB too much",
        ),
        (
            ReplicaNeed("expert shard", cpus=1, gpus=1),
            "r7i.8xlarge",
            "expert shard on r7i.8xlarge: reserves 1 GPUs of 0",
        ),
        (ReplicaNeed("expert shard", cpus=64), "r7i.8xlarge", "expert shard on r7i.8xlarge: reserves 64 CPUs of 32"),
        (ReplicaNeed("x", cpus=0), "r7i.8xlarge", "x on r7i.8xlarge: it reserves nothing, so no number of replicas"),
    ],
)
def test_what_does_not_fit_says_why(need: ReplicaNeed, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(need, instance_type(name))
    assert str(caught.value).startswith(message)


def test_prices_have_a_date_and_a_source() -> None:
    prices = [row.price for row in INSTANCE_TYPES.values() if row.price is not None]
    assert len(prices) >= 7
    assert all(price.usd_per_hour > 0 and price.source and price.date.year >= 2026 for price in prices)
