"""A stand-in for a Kubernetes API server: discovery, storage, and the admission that `schemas.problems` does.

Enough for `helm install`, `upgrade`, `rollback` and `uninstall`. It runs no pods and no controllers, and it knows one
field manager: an apply replaces what was applied before.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml

from tests.helm.chart import Object
from tests.helm.protobuf import MAGIC, read_secret
from tests.helm.schemas import KUBERNETES, problems


@dataclass(frozen=True)
class Resource:
    """A kind of object as the API serves it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def group_version(self) -> str:
        return f"{self.group}/{self.version}".lstrip("/")


RESOURCES = (
    Resource("", "v1", "namespaces", "Namespace", namespaced=False),
    Resource("", "v1", "persistentvolumes", "PersistentVolume", namespaced=False),
    Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "configmaps", "ConfigMap"),
    Resource("", "v1", "services", "Service"),
    Resource("", "v1", "serviceaccounts", "ServiceAccount"),
    Resource("", "v1", "pods", "Pod"),
    Resource("apps", "v1", "statefulsets", "StatefulSet"),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget"),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    Resource("networking.k8s.io", "v1", "ingresses", "Ingress"),
    Resource("monitoring.coreos.com", "v1", "podmonitors", "PodMonitor"),
    Resource("monitoring.coreos.com", "v1", "servicemonitors", "ServiceMonitor"),
    Resource("monitoring.coreos.com", "v1", "prometheusrules", "PrometheusRule"),
    Resource("ray.io", "v1", "rayservices", "RayService"),
    Resource("karpenter.sh", "v1", "nodepools", "NodePool", namespaced=False),
    Resource("karpenter.k8s.aws", "v1", "ec2nodeclasses", "EC2NodeClass", namespaced=False),
)

_PATH = re.compile(r"/(?:api/(v1)|apis/([^/]+)/([^/]+))(?:/namespaces/([^/]+)(?=/[^/]))?(?:/([^/]+))?(?:/([^/]+))?")
_ALL_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        self.status |= {"reason": reason, "message": message, "code": code}
        self.code = code


class Store:
    """All objects, by resource, namespace and name."""

    def __init__(self) -> None:
        self._objects: dict[tuple[Resource, str, str], Object] = {}
        self._version = 0
        self.lock = threading.RLock()

    def list(self, resource: Resource, namespace: str = "", labels: dict[str, str] | None = None) -> list[Object]:
        """Those that carry all `labels`."""
        return [
            found
            for (kind, where, _), found in self._objects.items()
            if kind == resource
            and namespace in ("", where)
            and (labels or {}).items() <= found["metadata"].get("labels", {}).items()
        ]

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        try:
            return self._objects[resource, namespace, name]
        except KeyError:
            raise ApiError(404, "NotFound", f'{resource.plural} "{name}" not found') from None

    def put(self, resource: Resource, namespace: str, name: str, new: Object, dry: bool) -> Object:
        """Admit and keep `new`; what the server gave the old object stays."""
        found = problems({key: value for key, value in _without_nulls(new).items() if key != "status"})
        if found:
            raise ApiError(422, "Invalid", f'{resource.kind} "{name}" is invalid: {"; ".join(found[:8])}')
        old = self._objects.get((resource, namespace, name), {}).get("metadata", {})
        self._version += 1
        metadata = new["metadata"]
        metadata |= {"name": name, "resourceVersion": str(self._version), "uid": old.get("uid") or str(uuid.uuid4())}
        metadata |= {"namespace": namespace} if resource.namespaced else {}
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        if not dry:
            self._objects[resource, namespace, name] = new
        return new

    def delete(self, resource: Resource, namespace: str, name: str, dry: bool) -> None:
        self.get(resource, namespace, name)
        if not dry:
            del self._objects[resource, namespace, name]


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
        case list():
            return [_without_nulls(inner) for inner in value]
    return value


def _merged(old: Any, change: Any) -> Any:
    """JSON merge patch (RFC 7386)."""
    if not isinstance(change, dict):
        return change
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, format: str, *args: Any) -> None:
        """No lines on the console."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        try:
            code, answer = self._route(body)
        except ApiError as error:
            code, answer = error.code, error.status
        encoded = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815 (http.server's names)

    def _route(self, body: bytes) -> tuple[int, Object]:
        url = urlparse(self.path)
        path, query = url.path.rstrip("/"), {key: values[0] for key, values in parse_qs(url.query).items()}
        discovered = _discovery(path)
        if discovered is not None:
            return 200, discovered
        matched = _PATH.fullmatch(path)
        if matched is None:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        core, group, version, namespace, plural, name = matched.groups()
        for resource in RESOURCES:
            if (resource.group, resource.version, resource.plural) == (group or "", core or version, plural):
                with self.store.lock:
                    return self._act(resource, namespace or "", name, query, body)
        raise ApiError(404, "NotFound", f"no resource {plural}")

    def _act(
        self, resource: Resource, namespace: str, name: str | None, query: dict[str, str], body: bytes
    ) -> tuple[int, Object]:
        dry = "dryRun" in query
        if self.command == "GET" and name is None:
            items = self.store.list(resource, namespace, _labels(query.get("labelSelector", "")))
            return 200, {
                "kind": f"{resource.kind}List",
                "apiVersion": resource.group_version,
                "metadata": {},
                "items": items,
            }
        if self.command == "POST":
            new = _decoded(body)
            name = str(new["metadata"]["name"])
            with contextlib.suppress(ApiError):
                self.store.get(resource, namespace, name)
                return 409, ApiError(409, "AlreadyExists", f'{resource.plural} "{name}" already exists').status
            return 201, self.store.put(resource, namespace, name, new, dry)
        if name is None:
            raise ApiError(405, "MethodNotAllowed", f"{self.command} needs a name")
        match self.command:
            case "GET":
                return 200, self.store.get(resource, namespace, name)
            case "DELETE":
                self.store.delete(resource, namespace, name, dry)
                return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
            case "PATCH" if "apply-patch" not in self.headers["Content-Type"]:
                old = copy.deepcopy(self.store.get(resource, namespace, name))
                return 200, self.store.put(resource, namespace, name, _merged(old, _decoded(body)), dry)
            case _:
                return 200, self.store.put(resource, namespace, name, _decoded(body), dry)


def _decoded(body: bytes) -> Object:
    return read_secret(body) if body.startswith(MAGIC) else dict(yaml.load(body, Loader=yaml.CSafeLoader))


def _labels(selector: str) -> dict[str, str]:
    pairs = (part.replace("==", "=").partition("=") for part in selector.split(",") if "=" in part and "!=" not in part)
    return {key: value for key, _, value in pairs}


def _discovery(path: str) -> Object | None:
    if path == "/version":
        major, minor = KUBERNETES.split(".")
        return {"major": major, "minor": minor, "gitVersion": f"v{KUBERNETES}.0", "platform": "linux/amd64"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = {resource.group: resource for resource in RESOURCES if resource.group}
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(each) for each in groups.values()]}
    for version in {resource.group_version for resource in RESOURCES}:
        if path in (f"/api/{version}", f"/apis/{version}"):
            return _resource_list(version)
    return None


def _group(resource: Resource) -> Object:
    version = {"groupVersion": resource.group_version, "version": resource.version}
    return {"name": resource.group, "versions": [version], "preferredVersion": version}


def _resource_list(group_version: str) -> Object:
    found = [
        {
            "name": resource.plural,
            "singularName": resource.kind.lower(),
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": _ALL_VERBS,
        }
        for resource in RESOURCES
        if resource.group_version == group_version
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": found}


@contextlib.contextmanager
def api_server(kubeconfig: Path, namespace: str) -> Iterator[Store]:
    """Runs the server on loopback, with one namespace; writes the file with which clients find it."""
    store = Store()
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, name="api-server")
    thread.start()
    here = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    store.put(RESOURCES[0], "", namespace, here, dry=False)
    kubeconfig.write_text(yaml.safe_dump(_kubeconfig(server.server_port)))
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _kubeconfig(port: int) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "here",
    }
