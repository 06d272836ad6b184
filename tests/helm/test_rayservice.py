"""rayservice.yaml: the Serve config, the head, worker groups, upgrades, Ray's own settings."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from expertmesh.platform.config import MeshConfig
from expertmesh.platform.render import serve_config
from tests.helm.chart import CHART, NAME, Helm, Refused, parse

GPU = {"accelerator": "gpu", "gpus": 8, "slots": 8, "cpus": 4}


def groups(**attention: Any) -> dict[str, Any]:
    return {"workerGroups": {"attention": {"side": "attention", **attention}}}


def test_the_mesh_is_what_render_makes_of_it(helm: Helm) -> None:
    mesh = {
        "model": {"source": "/fsx/moe", "served_name": "moe"},
        "attention": {"resources": {"rack": 1}, "gpus": 0},
        "experts": {"shards": 2, "redundancy": 2},
        "telemetry": {"log_level": "info"},
    }
    config = yaml.safe_load(helm.template({"mesh": mesh}).one("RayService")["spec"]["serveConfigV2"])
    expected = serve_config(MeshConfig.model_validate(mesh))
    own, theirs = config["applications"][0]["args"]["mesh"], expected["applications"][0]["args"]["mesh"]
    assert own.pop("routing") == {"bind_host": "auto", "secret_file": "/etc/expertmesh/secret/secret"}
    assert theirs.pop("routing")["bind_host"] == "auto"
    assert own == theirs
    assert config["applications"][0]["import_path"] == expected["applications"][0]["import_path"]
    assert config["logging_config"] == expected["logging_config"]


def test_what_the_user_set_for_routing_is_kept(helm: Helm) -> None:
    routing = {"bind_host": "10.0.0.1", "secret_file": "/run/mesh", "frame_deadline_ms": 500}
    assert helm.template({"mesh": {"routing": routing}}).mesh["routing"] == routing


def test_a_mesh_given_as_a_model_name(helm: Helm) -> None:
    assert helm.template({"mesh": {"model": "demo"}}).mesh["model"] == "demo"
    assert "model" not in helm.template().mesh


def test_each_side_has_slots_of_its_own(helm: Helm) -> None:
    objects = helm.template()
    assert objects.group("attention")["resources"] == {"CPU": "2", "expertmesh_attention": "1"}
    assert objects.group("experts")["resources"] == {"CPU": "2", "expertmesh_experts": "1"}
    assert objects.mesh["attention"]["resources"] == {"expertmesh_attention": 1}
    assert objects.mesh["experts"]["resources"] == {"expertmesh_experts": 1}


def test_colocated_has_no_expert_groups(helm: Helm) -> None:
    objects = helm.template({"mesh": {"experts": {"mode": "colocated"}}})
    assert [group["groupName"] for group in objects.cluster["workerGroupSpecs"]] == ["attention"]
    assert "resources" not in objects.mesh["experts"]


def test_a_group_overrides_defaults_one_by_one(helm: Helm) -> None:
    values = {
        "workerDefaults": {"memory": "32Gi", "nodeSelector": {"a": "1"}},
        **groups(cpus=7, nodeSelector={"b": "2"}),
    }
    objects = helm.template(values)
    pod = objects.group("attention")["template"]["spec"]
    assert pod["containers"][0]["resources"]["requests"] == {"cpu": "7", "memory": "32Gi"}
    assert pod["nodeSelector"] == {"a": "1", "b": "2"}
    assert objects.group("experts")["template"]["spec"]["nodeSelector"] == {"a": "1"}


def test_a_group_that_is_off_is_left_out(helm: Helm) -> None:
    values = {"workerGroups": {"experts": {"enabled": False}, "more": {"side": "experts", "maxReplicas": 2}}}
    names = [group["groupName"] for group in helm.template(values).cluster["workerGroupSpecs"]]
    assert names == ["attention", "more"]


def test_devices_efa_and_hugepages(helm: Helm) -> None:
    group = helm.template(groups(**GPU, efa=16)).group("attention")
    pod = group["template"]["spec"]
    [container] = pod["containers"]
    devices = {"nvidia.com/gpu": 8, "vpc.amazonaws.com/efa": 16, "hugepages-2Mi": "5120Mi"}
    assert devices.items() <= container["resources"]["limits"].items()
    assert devices.items() <= container["resources"]["requests"].items()
    assert group["resources"]["GPU"] == "8"
    assert {"name": "FI_PROVIDER", "value": "efa"} in container["env"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert {"name": "hugepages", "emptyDir": {"medium": "HugePages-2Mi"}} in pod["volumes"]
    keys = [each["key"] for each in pod["tolerations"]]
    assert keys == ["nvidia.com/gpu", "vpc.amazonaws.com/efa"]
    assert not any("hostPath" in volume for volume in pod["volumes"])


def test_no_devices_no_traces_of_them(helm: Helm) -> None:
    pod = helm.template().group("attention")["template"]["spec"]
    assert "tolerations" not in pod
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "8Gi"}
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_images_follow_the_hardware(helm: Helm) -> None:
    objects = helm.template({"image": {"repository": "r/mesh"}, **groups(**GPU)})
    assert [pod["containers"][0]["image"] for pod in objects.pods()] == [
        "r/mesh:0.1.0-cpu",
        "r/mesh:0.1.0-gpu",
        "r/mesh:0.1.0-cpu",
    ]
    objects = helm.template({"image": {"tag": "nightly"}, **groups(image="mine:1")})
    assert [pod["containers"][0]["image"] for pod in objects.pods()] == [
        "expertmesh:nightly",
        "mine:1",
        "expertmesh:nightly",
    ]


def test_every_pod_runs_as_a_user_and_sees_the_secret(helm: Helm) -> None:
    for pod in helm.template().pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["serviceAccountName"] == NAME
        [secret] = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "cluster-secret"]
        assert secret == {"secretName": f"{NAME}-cluster", "defaultMode": 0o440}
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["cluster-secret"] == "/etc/expertmesh/secret"
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}


def test_autoscaler_is_version_two_and_pods_may_not_restart(helm: Helm) -> None:
    objects = helm.template({"ray": {"autoscaler": {"idleTimeoutSeconds": 7}}, **groups(idleTimeoutSeconds=9)})
    assert objects.cluster["enableInTreeAutoscaling"] is True
    assert objects.cluster["autoscalerOptions"]["version"] == "v2"
    assert objects.cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 7
    assert objects.group("attention")["idleTimeoutSeconds"] == 9
    assert "idleTimeoutSeconds" not in objects.group("experts")
    assert all("restartPolicy" not in pod for pod in objects.pods())
    off = helm.template({"ray": {"autoscaler": {"enabled": False}}})
    assert off.cluster["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in off.cluster


def test_resources_are_said_once(helm: Helm) -> None:
    """KubeRay refuses a group with both `resources` and resources in rayStartParams."""
    for group in helm.template().cluster["workerGroupSpecs"]:
        assert group["rayStartParams"] == {}
        assert group["resources"]


def test_upgrade_strategies(helm: Helm) -> None:
    assert helm.template().one("RayService")["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    none = helm.template({"ray": {"upgradeStrategy": {"type": "None"}}})
    assert none.one("RayService")["spec"]["upgradeStrategy"] == {"type": "None"}
    steps = {"type": "NewClusterWithIncrementalUpgrade", "incremental": {"gatewayClassName": "istio"}}
    strategy = helm.template({"ray": {"upgradeStrategy": steps}}).one("RayService")["spec"]["upgradeStrategy"]
    assert strategy["clusterUpgradeOptions"]["gatewayClassName"] == "istio"
    with pytest.raises(Refused, match="gatewayClassName: needed"):
        helm.template({"ray": {"upgradeStrategy": {"type": steps["type"]}}})


def test_head_state_in_valkey_or_elsewhere(helm: Helm) -> None:
    assert "gcsFaultToleranceOptions" not in helm.template().cluster
    on = {"ray": {"gcsFaultTolerance": {"enabled": True}}}
    with pytest.raises(Refused, match=r"needs valkey.enabled, or externalAddress"):
        helm.template(on)
    options = helm.template({**on, "valkey": {"enabled": True}}).cluster["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"{NAME}-valkey:6379"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": f"{NAME}-valkey", "key": "password"}
    external = {"enabled": True, "externalAddress": "cache:6380", "existingSecret": "cache"}
    options = helm.template({"ray": {"gcsFaultTolerance": external}}).cluster["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "cache:6380"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "cache"


def test_hyperpod_selects_healthy_nodes_for_workers_only(helm: Helm) -> None:
    objects = helm.template({"hyperpod": {"enabled": True}})
    head, *workers = objects.pods()
    assert "nodeSelector" not in head
    assert all(pod["nodeSelector"] == {"sagemaker.amazonaws.com/node-health-status": "Schedulable"} for pod in workers)
    annotations = objects.group("experts")["template"]["metadata"]["annotations"]
    assert annotations == {"sagemaker.amazonaws.com/enable-job-auto-resume": "true"}
    without = helm.template({"hyperpod": {"enabled": True, "autoResume": False}})
    assert "annotations" not in without.group("experts")["template"]["metadata"]


def test_placing_and_environment_of_head_and_groups(helm: Helm) -> None:
    more: dict[str, Any] = {
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "x", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "env": [{"name": "A", "value": "1"}],
        "annotations": {"note": "1"},
        "priorityClassName": "high",
    }
    objects = helm.template({"head": more, **groups(**more, rayLabels={"rack": "1"})})
    for group in (objects.cluster["headGroupSpec"], objects.group("attention")):
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] == {"zone": "a"}
        assert pod["tolerations"] == more["tolerations"]
        assert pod["affinity"] == more["affinity"]
        assert pod["priorityClassName"] == "high"
        assert {"name": "A", "value": "1"} in pod["containers"][0]["env"]
        assert group["template"]["metadata"]["annotations"] == {"note": "1"}
    assert objects.group("attention")["labels"] == {"expertmesh.io/side": "attention", "rack": "1"}


def test_a_new_chart_version_alone_makes_no_new_cluster(helm: Helm) -> None:
    """KubeRay compares the cluster's spec: nothing in it may carry the chart's version."""
    cluster = helm.template({"image": {"tag": "fixed"}}).cluster
    assert "0.1.0" not in yaml.safe_dump(cluster)


def test_names_stay_below_kuberay_limit(helm: Helm) -> None:
    objects = parse(helm.run("template", "r" * 50, str(CHART)))
    assert objects.one("RayService")["metadata"]["name"] == "r" * 47
    assert all(len(each["metadata"]["name"]) <= 63 for each in objects)
    assert helm.template({"fullnameOverride": "plain"}).one("RayService")["metadata"]["name"] == "plain"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (groups(accelerator="gpu"), "workerGroups.attention.gpus: 0, but its accelerator is gpu"),
        (groups(gpus=1), "workerGroups.attention.accelerator: cpu, but it asks for 1 GPUs; use gpu"),
        (
            {"mesh": {"experts": {"mode": "colocated"}}, **groups(accelerator="neuron")},
            "workerGroups.attention.neuronCores: 0, but its accelerator is neuron",
        ),
        (groups(accelerator="neuron", neuronCores=2), "neuron needs mesh.experts.mode: colocated"),
        (
            {"mesh": {"attention": {"gpus": 1}}, **groups(accelerator="gpu", gpus=2, slots=3)},
            "workerGroups.attention.gpus: 2, but its slots need 3 (3 slots x 1 GPUs a replica)",
        ),
        (groups(slots=5), "workerGroups.attention.cpus: 2, but its slots need 2.5 (5 slots x 0.5 CPUs a replica)"),
        (groups(minReplicas=3), "workerGroups.attention.minReplicas: 3 is more than maxReplicas (1)"),
        ({"mesh": {"experts": {"shards": 3}}}, "the mesh has up to 3 experts replicas, but its groups hold 2"),
        ({"mesh": {"attention": {"replicas": 2}}}, "the mesh has up to 2 attention replicas, but its groups hold 1"),
        (
            {"mesh": {"autoscaling": {"attention": {"min_replicas": 1, "max_replicas": 5}}}},
            "the mesh has up to 5 attention replicas, but its groups hold 1",
        ),
        (
            {"mesh": {"autoscaling": {"experts": {"min_shards": 1, "max_shards": 6}}}},
            "the mesh has up to 6 experts replicas, but its groups hold 2",
        ),
    ],
)
def test_groups_that_cannot_hold_the_mesh_are_refused(helm: Helm, values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused) as caught:
        helm.template(values)
    assert message in str(caught.value)
