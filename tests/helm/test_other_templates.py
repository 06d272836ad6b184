"""The templates beside rayservice.yaml, one class each."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.timing import free_port
from expertmesh.platform.config import MeshConfig
from expertmesh.platform.metrics import CATALOGUE
from tests.helm.chart import CHART, NAME, NAMESPACE, RELEASE, Helm, Object, Refused

SELECTOR = {"app.kubernetes.io/name": "expertmesh", "app.kubernetes.io/instance": RELEASE}

STORE: dict[str, Any] = {
    "kvStore": {"useValkey": True},
    "valkey": {"enabled": True, "maxMemoryPolicy": "volatile-lru"},
}

FSX: dict[str, Any] = {"enabled": True, "fileSystemId": "fs-1", "dnsName": "fs-1.fsx", "mountName": "m"}

MONITORING: dict[str, Any] = {
    "podMonitor": {"enabled": True, "labels": {"release": "p"}},
    "serviceMonitor": {"enabled": True, "interval": "30s"},
    "prometheusRule": {"enabled": True, "labels": {"release": "p"}},
    "dashboards": {"enabled": True, "annotations": {"grafana_folder": "mesh"}},
}

KARPENTER: dict[str, Any] = {
    "enabled": True,
    "nodeClass": {"role": "r", "subnetTags": {"k": "v"}, "securityGroupTags": {"k": "v"}},
    "nodePools": {"gpu": {"instanceTypes": ["p5en.48xlarge"]}},
}


FACING: dict[str, Any] = {"ingress": {"nlb": {"enabled": True, "scheme": "internet-facing"}}}


@contextmanager
def _api(status: int) -> Iterator[tuple[str, list[str]]]:
    """A healthy API whose /v1/models answers with `status`. Yields its address and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/health" else status)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "moe"}]}).encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def _run(code: str, address: str) -> str:
    """What the test pod's program prints, with no time to try again."""
    return subprocess.run(
        [sys.executable, "-c", code, address, "0"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout


class TestSecret:
    def test_random_and_long_enough(self, helm: Helm) -> None:
        first = helm.template({}).one("Secret")["data"]["secret"]
        second = helm.template({"commonLabels": {"a": "b"}}).one("Secret")["data"]["secret"]
        assert len(base64.b64decode(first)) == 48
        assert first != second

    def test_an_existing_one_is_used(self, helm: Helm) -> None:
        objects = helm.template({"clusterSecret": {"existingSecret": "mine", "key": "value"}})
        assert objects.of("Secret") == []
        assert objects.mesh["routing"]["secret_file"] == "/etc/expertmesh/secret/value"
        assert all(pod["volumes"][0]["secret"]["secretName"] == "mine" for pod in objects.pods())


class TestServiceAccount:
    def test_irsa_by_annotation(self, helm: Helm) -> None:
        annotations = {"eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/mesh"}
        account = helm.template({"serviceAccount": {"annotations": annotations}}).one("ServiceAccount")
        assert account["metadata"]["annotations"] == annotations

    def test_one_that_is_there(self, helm: Helm) -> None:
        objects = helm.template({"serviceAccount": {"create": False, "name": "mine"}})
        assert objects.of("ServiceAccount") == []
        assert {pod["serviceAccountName"] for pod in objects.pods()} == {"mine"}

    def test_none_is_the_default_one(self, helm: Helm) -> None:
        objects = helm.template({"serviceAccount": {"create": False}})
        assert {pod["serviceAccountName"] for pod in objects.pods()} == {"default"}


class TestValkey:
    def test_off_by_default(self, helm: Helm) -> None:
        assert helm.template().of("StatefulSet") == []

    def test_memory_password_and_no_disk(self, helm: Helm) -> None:
        objects = helm.template({"valkey": {"enabled": True, "maxMemoryMib": 300, "maxMemoryPolicy": "allkeys-lru"}})
        pod = objects.one("StatefulSet")["spec"]["template"]["spec"]
        [container] = pod["containers"]
        text = " ".join(container["args"])
        assert "--maxmemory 300mb --maxmemory-policy allkeys-lru --appendonly no" in text
        assert "--requirepass $(VALKEY_PASSWORD)" in text
        assert container["resources"]["limits"]["memory"] == "400Mi"
        assert pod["volumes"] == [{"name": "data", "emptyDir": {}}]
        assert (
            objects.one("Service")["spec"]["selector"] == objects.one("StatefulSet")["spec"]["selector"]["matchLabels"]
        )
        assert len(base64.b64decode(objects.one("Secret", f"{NAME}-valkey")["data"]["password"])) == 32

    def test_on_a_volume_with_a_password_from_elsewhere(self, helm: Helm) -> None:
        persistence = {"enabled": True, "size": "5Gi", "storageClassName": "gp3"}
        objects = helm.template({"valkey": {"enabled": True, "existingSecret": "pw", "persistence": persistence}})
        spec = objects.one("StatefulSet")["spec"]
        [claim] = spec["volumeClaimTemplates"]
        assert claim["spec"]["storageClassName"] == "gp3"
        assert claim["spec"]["resources"]["requests"]["storage"] == "5Gi"
        assert "volumes" not in spec["template"]["spec"]
        assert len(objects.of("Secret")) == 1
        reference = spec["template"]["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "pw", "key": "password"}


class TestApiKeysAndKvStore:
    def test_off_by_default(self, helm: Helm) -> None:
        objects = helm.template()
        assert not {"ingress", "kv_store"} & set(objects.mesh)
        names = {volume["name"] for pod in objects.pods() for volume in pod["volumes"]}
        assert not {"api-keys", "kv-store"} & names

    def test_keys_are_mounted_where_the_mesh_looks(self, helm: Helm) -> None:
        values = {"apiKeys": {"existingSecret": "keys", "key": "k.json"}, "mesh": {"ingress": {"replicas": 2}}}
        objects = helm.template(values)
        assert objects.mesh["ingress"] == {"keys_file": "/etc/expertmesh/api-keys/k.json", "replicas": 2}
        for pod in objects.pods():
            [secret] = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "api-keys"]
            assert secret["secretName"] == "keys"
            paths = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
            assert paths["api-keys"] == "/etc/expertmesh/api-keys"

    def test_certificates_are_mounted_where_the_mesh_looks(self, helm: Helm) -> None:
        assert "tls" not in helm.template().mesh["routing"]
        objects = helm.template({"tls": {"existingSecret": "certs"}})
        folder = "/etc/expertmesh/tls"
        files = {"cert_file": f"{folder}/tls.crt", "key_file": f"{folder}/tls.key", "ca_file": f"{folder}/ca.crt"}
        assert objects.mesh["routing"]["tls"] == files
        for pod in objects.pods():
            [secret] = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "tls"]
            assert secret == {"secretName": "certs", "defaultMode": 0o440}, "the key is closed to others"
            [mount] = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "tls"]
            assert mount == {"name": "tls", "mountPath": folder, "readOnly": True}, (
                "no subPath: it would stay as it was"
            )

    def test_the_charts_valkey_as_the_store(self, helm: Helm) -> None:
        objects = helm.template(STORE)
        expected = {"url": f"redis://{NAME}-valkey:6379", "password_file": "/etc/expertmesh/kv-store/password"}
        assert objects.mesh["kv_store"] == expected
        MeshConfig.model_validate(objects.mesh)
        for pod in objects.pods():
            [secret] = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "kv-store"]
            assert secret["secretName"] == objects.one("StatefulSet")["metadata"]["name"] == f"{NAME}-valkey"
            assert secret["items"] == [{"key": "password", "path": "password"}]

    def test_a_store_of_ones_own_with_a_password(self, helm: Helm) -> None:
        store = {"url": "rediss://cache:6379?cluster=true", "username": "mesh"}
        objects = helm.template({"mesh": {"kv_store": store}, "kvStore": {"existingSecret": "cache"}})
        assert objects.mesh["kv_store"] == {**store, "password_file": "/etc/expertmesh/kv-store/password"}

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"kvStore": {"useValkey": True}}, "kvStore.useValkey: needs valkey.enabled"),
            (
                {**STORE, "valkey": {"enabled": True}},
                "valkey.maxMemoryPolicy: noeviction takes no new KV blocks when memory is full; use volatile-lru",
            ),
            (
                {
                    **STORE,
                    "valkey": {"enabled": True, "maxMemoryPolicy": "allkeys-lru"},
                    "ray": {"gcsFaultTolerance": {"enabled": True}},
                },
                "valkey.maxMemoryPolicy: allkeys-lru would drop the head's state; use volatile-lru",
            ),
            ({**STORE, "mesh": {"kv_store": {"url": "redis://a"}}}, "mesh.kv_store.url is redis://a already"),
            ({**STORE, "kvStore": {"useValkey": True, "existingSecret": "x"}}, "the chart's Valkey has a password"),
            ({"kvStore": {"existingSecret": "x"}}, "kvStore.existingSecret: a password without a store"),
            ({"mesh": {"kv_store": {"url": "embedded"}}}, "mesh.kv_store.url: embedded is on one machine"),
        ],
    )
    def test_stores_that_cannot_be(self, helm: Helm, values: dict[str, Any], message: str) -> None:
        with pytest.raises(Refused) as caught:
            helm.template(values)
        assert message in str(caught.value)


class TestStorage:
    def test_fsx(self, helm: Helm) -> None:
        objects = helm.template({"storage": {"fsx": {**FSX, "mountPath": "/models"}}})
        volume, claim = objects.one("PersistentVolume"), objects.one("PersistentVolumeClaim")
        assert volume["spec"]["csi"]["driver"] == "fsx.csi.aws.com"
        assert volume["spec"]["csi"]["volumeAttributes"] == {"dnsname": "fs-1.fsx", "mountname": "m"}
        assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
        assert volume["spec"]["claimRef"] == {"namespace": NAMESPACE, "name": claim["metadata"]["name"]}
        for pod in objects.pods():
            mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
            assert mounts["fsx"] == {"name": "fsx", "mountPath": "/models", "readOnly": True}

    def test_s3(self, helm: Helm) -> None:
        s3 = {"enabled": True, "bucket": "b", "region": "us-east-1", "prefix": "models/"}
        volume = helm.template({"storage": {"s3": s3}}).one("PersistentVolume")["spec"]
        assert volume["csi"]["volumeAttributes"] == {"bucketName": "b"}
        assert volume["mountOptions"] == ["read-only", "allow-other", "region us-east-1", "prefix models/"]

    def test_existing_claims(self, helm: Helm) -> None:
        claims = [{"claimName": "a", "mountPath": "/a"}, {"claimName": "b", "mountPath": "/b", "readOnly": False}]
        for pod in helm.template({"storage": {"existingClaims": claims}}).pods():
            mounts = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"].startswith("claim")]
            assert [(mount["mountPath"], mount["readOnly"]) for mount in mounts] == [("/a", True), ("/b", False)]

    @pytest.mark.parametrize("key", ["fileSystemId", "dnsName", "mountName"])
    def test_what_is_missing_is_named(self, helm: Helm, key: str) -> None:
        with pytest.raises(Refused, match=f"storage.fsx.{key}: needed"):
            helm.template({"storage": {"fsx": {**FSX, key: ""}}})


class TestNetworkPolicy:
    def rules(self, helm: Helm, **more: Any) -> list[Object]:
        rules: list[Object] = helm.template({"networkPolicy": {"enabled": True, **more}}).one("NetworkPolicy")["spec"][
            "ingress"
        ]
        return rules

    def test_off_by_default(self, helm: Helm) -> None:
        assert helm.template().of("NetworkPolicy") == []

    def test_the_mesh_reaches_itself_and_the_operator_its_two_ports(self, helm: Helm) -> None:
        mesh, operator, monitoring, clients = self.rules(helm)
        assert mesh == {"from": [{"podSelector": {"matchLabels": SELECTOR}}]}
        assert [port["port"] for port in operator["ports"]] == [8265, 8000]
        assert [port["port"] for port in monitoring["ports"]] == [8080, 44217, 44227]
        assert clients == {"ports": [{"protocol": "TCP", "port": 8000}]}

    def test_only_some_clients(self, helm: Helm) -> None:
        peers = [{"podSelector": {"matchLabels": {"app": "chat"}}}]
        assert self.rules(helm, clients=peers)[-1]["from"] == peers

    def test_it_selects_every_pod_and_the_test(self, helm: Helm) -> None:
        objects = helm.template({"networkPolicy": {"enabled": True}})
        assert objects.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == SELECTOR
        groups = [objects.cluster["headGroupSpec"], *objects.cluster["workerGroupSpecs"]]
        labels = [group["template"]["metadata"]["labels"] for group in groups] + [
            objects.one("Pod")["metadata"]["labels"]
        ]
        assert all(SELECTOR.items() <= each.items() for each in labels)

    def test_egress_and_valkey(self, helm: Helm) -> None:
        values = {"networkPolicy": {"enabled": True, "egressPorts": [443], "extraEgress": [{"to": []}]}}
        objects = helm.template({**values, "valkey": {"enabled": True}})
        egress = objects.one("NetworkPolicy", NAME)["spec"]["egress"]
        ports = [port["port"] for rule in egress if "to" not in rule for port in rule["ports"]]
        assert ports == [53, 53, 443]
        assert egress[-1] == {"to": []}
        valkey = objects.one("NetworkPolicy", f"{NAME}-valkey")["spec"]
        assert valkey["ingress"][0]["from"][0] == {"podSelector": {"matchLabels": SELECTOR}}
        assert any(rule.get("ports", [{}])[0].get("port") == 6379 for rule in egress)


class TestPodDisruptionBudget:
    def test_one_a_group_that_never_blocks_a_drain(self, helm: Helm) -> None:
        budgets = helm.template().of("PodDisruptionBudget")
        assert [budget["metadata"]["name"] for budget in budgets] == [
            f"{NAME}-{n}" for n in ("head", "attention", "experts")
        ]
        assert all(budget["spec"]["maxUnavailable"] == 1 for budget in budgets)
        assert all("minAvailable" not in budget["spec"] for budget in budgets)

    def test_it_selects_the_group_pods(self, helm: Helm) -> None:
        objects = helm.template()
        selector = objects.one("PodDisruptionBudget", f"{NAME}-experts")["spec"]["selector"]["matchLabels"]
        labels = objects.group("experts")["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert not selector.items() <= objects.group("attention")["template"]["metadata"]["labels"].items()

    def test_off(self, helm: Helm) -> None:
        assert helm.template({"podDisruptionBudget": {"enabled": False}}).of("PodDisruptionBudget") == []


class TestMonitoring:
    def test_workers_by_their_pods(self, helm: Helm) -> None:
        objects = helm.template({"monitoring": MONITORING})
        monitor = objects.one("PodMonitor")
        assert monitor["metadata"]["labels"]["release"] == "p"
        assert monitor["spec"]["selector"]["matchLabels"] == SELECTOR
        [expression] = monitor["spec"]["selector"]["matchExpressions"]
        assert objects.group("experts")["template"]["metadata"]["labels"][expression["key"]] in expression["values"]
        assert objects.cluster["headGroupSpec"]["labels"][expression["key"]] not in expression["values"]
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        ports = {port["name"] for port in objects.group("experts")["template"]["spec"]["containers"][0]["ports"]}
        assert endpoint["port"] in ports

    def test_the_head_by_a_service_of_its_own(self, helm: Helm) -> None:
        objects = helm.template({"monitoring": MONITORING})
        monitor, service = objects.one("ServiceMonitor"), objects.one("Service")
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        names = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} == names
        assert {endpoint["interval"] for endpoint in monitor["spec"]["endpoints"]} == {"30s"}
        head = objects.cluster["headGroupSpec"]["template"]
        assert service["spec"]["selector"].items() <= head["metadata"]["labels"].items()
        assert names <= {port["name"] for port in head["spec"]["containers"][0]["ports"]}

    def test_rules_are_the_file(self, helm: Helm) -> None:
        rule = helm.template({"monitoring": MONITORING}).one("PrometheusRule")
        assert rule["metadata"]["labels"]["release"] == "p"
        assert rule["spec"] == yaml.safe_load((CHART / "rules" / "expertmesh.yaml").read_text())

    def test_dashboards_are_the_files(self, helm: Helm) -> None:
        config_map = helm.template({"monitoring": MONITORING}).one("ConfigMap")
        assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
        files = {path.name: json.loads(path.read_text()) for path in (CHART / "dashboards").glob("*.json")}
        assert {name: json.loads(text) for name, text in config_map["data"].items()} == files

    @pytest.mark.parametrize("path", sorted((CHART / "dashboards").glob("*.json")), ids=lambda path: path.stem)
    def test_dashboards_ask_only_for_what_is_exported(self, path: Path) -> None:
        """Every series of a dashboard is one of ours or one that Ray's own dashboards show."""
        spec = find_spec("ray")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        source = Path(spec.submodule_search_locations[0]) / "dashboard" / "modules" / "metrics" / "dashboards"
        known = set(re.findall(r"\b(?:ray|autoscaler)_\w+", " ".join(file.read_text() for file in source.glob("*.py"))))
        ours = {name for chapter in CATALOGUE.values() for series in chapter for name in series.names}
        board = json.loads(path.read_text())
        expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        asked = {name for text in expressions for name in re.findall(r"\b(?:ray|autoscaler)_\w+(?=\{)", text)}
        assert len(board["panels"]) >= 8
        assert asked
        assert asked <= known | ours

    def test_off_by_default(self, helm: Helm) -> None:
        kinds = {each["kind"] for each in helm.template()}
        assert not kinds & {"PodMonitor", "ServiceMonitor", "PrometheusRule", "ConfigMap"}


class TestIngress:
    def test_alb_with_tls(self, helm: Helm) -> None:
        alb = {
            "enabled": True,
            "host": "h",
            "certificateArn": "arn:c",
            "idleTimeoutSeconds": 60,
            "annotations": {"x": "y"},
        }
        ingress = helm.template({"ingress": {"alb": alb}}).one("Ingress")
        annotations = ingress["metadata"]["annotations"]
        assert annotations["alb.ingress.kubernetes.io/scheme"] == "internal"
        assert json.loads(annotations["alb.ingress.kubernetes.io/listen-ports"]) == [{"HTTPS": 443}]
        assert annotations["alb.ingress.kubernetes.io/load-balancer-attributes"] == "idle_timeout.timeout_seconds=60"
        assert annotations["x"] == "y"
        assert ingress["spec"]["ingressClassName"] == "alb"
        [rule] = ingress["spec"]["rules"]
        assert rule["host"] == "h"
        assert rule["http"]["paths"][0]["backend"]["service"] == {"name": f"{NAME}-serve-svc", "port": {"number": 8000}}

    def test_alb_without_tls(self, helm: Helm) -> None:
        annotations = helm.template({"ingress": {"alb": {"enabled": True}}}).one("Ingress")["metadata"]["annotations"]
        assert json.loads(annotations["alb.ingress.kubernetes.io/listen-ports"]) == [{"HTTP": 80}]
        assert "alb.ingress.kubernetes.io/certificate-arn" not in annotations

    def test_nlb_is_serves_own_service(self, helm: Helm) -> None:
        nlb = {"enabled": True, "certificateArn": "arn:c", "sourceRanges": ["10.0.0.0/8"], "annotations": {"x": "y"}}
        service = helm.template({"ingress": {"nlb": nlb}}).one("RayService")["spec"]["serveService"]
        assert service["spec"]["loadBalancerClass"] == "service.k8s.aws/nlb"
        assert service["spec"]["loadBalancerSourceRanges"] == ["10.0.0.0/8"]
        prefix = "service.beta.kubernetes.io/aws-load-balancer"
        assert service["metadata"]["annotations"][f"{prefix}-scheme"] == "internal"
        assert service["metadata"]["annotations"][f"{prefix}-ssl-cert"] == "arn:c"
        assert service["metadata"]["annotations"]["x"] == "y"
        assert service["metadata"]["name"] == f"{NAME}-serve-svc"

    def test_neither_by_default(self, helm: Helm) -> None:
        objects = helm.template()
        assert objects.of("Ingress") == []
        assert "serveService" not in objects.one("RayService")["spec"]


class TestKarpenter:
    def test_pools_refer_to_the_class(self, helm: Helm) -> None:
        objects = helm.template({"karpenter": KARPENTER})
        reference = objects.one("NodePool")["spec"]["template"]["spec"]["nodeClassRef"]
        assert reference["name"] == objects.one("EC2NodeClass")["metadata"]["name"] == f"{NAMESPACE}-{NAME}"

    def test_defaults_are_on_demand_and_stay(self, helm: Helm) -> None:
        spec = helm.template({"karpenter": KARPENTER}).one("NodePool")["spec"]
        requirements = {each["key"]: each["values"] for each in spec["template"]["spec"]["requirements"]}
        assert requirements["karpenter.sh/capacity-type"] == ["on-demand"]
        assert spec["template"]["spec"]["expireAfter"] == "Never"
        assert spec["disruption"] == {"consolidationPolicy": "WhenEmpty", "consolidateAfter": "10m"}

    def test_everything_of_a_pool(self, helm: Helm) -> None:
        pool = {
            "instanceTypes": ["r7i.8xlarge"],
            "capacityTypes": ["spot"],
            "zones": ["us-east-1a"],
            "labels": {"a": "b"},
            "taints": [{"key": "t", "effect": "NoSchedule"}],
            "limits": {"cpu": 64},
            "weight": 5,
            "consolidateAfter": "1h",
            "expireAfter": "24h",
        }
        spec = helm.template({"karpenter": {**KARPENTER, "nodePools": {"memory": pool}}}).one("NodePool")["spec"]
        assert spec["template"]["metadata"]["labels"] == {"expertmesh.io/pool": "memory", "a": "b"}
        assert spec["template"]["spec"]["taints"] == pool["taints"]
        assert spec["template"]["spec"]["expireAfter"] == "24h"
        assert (spec["limits"], spec["weight"]) == ({"cpu": 64}, 5)
        values = [each["values"] for each in spec["template"]["spec"]["requirements"]]
        assert values == [["r7i.8xlarge"], ["spot"], ["us-east-1a"]]

    def test_the_class_is_encrypted_and_takes_reservations(self, helm: Helm) -> None:
        more = {"capacityReservationIds": ["cr-1"], "placementGroup": "pg", "tags": {"a": "b"}}
        karpenter = {**KARPENTER, "nodeClass": {**KARPENTER["nodeClass"], **more}}
        spec = helm.template({"karpenter": karpenter}).one("EC2NodeClass")["spec"]
        assert spec["capacityReservationSelectorTerms"] == [{"id": "cr-1"}]
        assert spec["placementGroupSelector"] == {"name": "pg"}
        assert spec["tags"] == {"a": "b"}
        assert spec["blockDeviceMappings"][0]["ebs"]["encrypted"] is True
        assert spec["metadataOptions"]["httpTokens"] == "required"

    @pytest.mark.parametrize("change", [{"role": ""}, {"instanceProfile": "p"}])
    def test_role_or_profile(self, helm: Helm, change: dict[str, str]) -> None:
        karpenter = {**KARPENTER, "nodeClass": {**KARPENTER["nodeClass"], **change}}
        with pytest.raises(Refused, match="give either role or instanceProfile"):
            helm.template({"karpenter": karpenter})


class TestExtraObjectsTestPodAndNotes:
    def test_extra_objects_as_mapping_and_text(self, helm: Helm) -> None:
        item = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-a"}}
        text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: b}\n"
        found = helm.template({"extraObjects": [item, text]}).of("ConfigMap")
        assert [each["metadata"]["name"] for each in found] == ["mesh-a", "b"]

    def test_the_test_pod_asks_the_serve_service(self, helm: Helm) -> None:
        pod = helm.template({"tests": {"timeoutSeconds": 9}}).one("Pod")
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        [container] = pod["spec"]["containers"]
        code, url, seconds = container["args"]
        assert (url, seconds) == (f"http://{NAME}-serve-svc:8000", "9")
        with _api(200) as (address, asked):
            assert _run(code, address) == "['moe']\n"
        assert asked == ["/health", "/v1/models"]
        assert helm.template({"tests": {"enabled": False}}).of("Pod") == []

    def test_the_test_pod_is_content_with_an_api_that_asks_for_a_key(self, helm: Helm) -> None:
        code = helm.template().one("Pod")["spec"]["containers"][0]["args"][0]
        with _api(401) as (address, _):
            assert _run(code, address) == "the API asks for a key\n"

    def test_the_test_pod_fails_without_an_api(self, helm: Helm) -> None:
        code = helm.template().one("Pod")["spec"]["containers"][0]["args"][0]
        with pytest.raises(subprocess.CalledProcessError):
            _run(code, f"http://127.0.0.1:{free_port()}")

    def test_common_labels_are_everywhere(self, helm: Helm) -> None:
        values = {"commonLabels": {"team": "x"}, "karpenter": KARPENTER, "valkey": {"enabled": True}}
        objects = helm.template({**values, "monitoring": MONITORING, "networkPolicy": {"enabled": True}})
        assert all(each["metadata"]["labels"]["team"] == "x" for each in objects)

    def test_keys_take_the_warning_away(self, helm: Helm) -> None:
        arguments = ["install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client"]
        assert "WARNING: the load balancer" not in helm.run(
            *arguments, values={**FACING, "apiKeys": {"existingSecret": "keys"}}
        )

    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            ({}, "experts: experts, 2 to 2 pods of 1 replicas on cpu"),
            ({}, "aws eks create-pod-identity-association"),
            ({}, "Argo CD"),
            (FACING, "WARNING: the load balancer faces the internet, and the API asks for no key"),
        ],
    )
    def test_notes(self, helm: Helm, values: dict[str, Any], sentence: str) -> None:
        arguments = ["install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client"]
        assert sentence in helm.run(*arguments, values=values)
