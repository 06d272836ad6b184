"""From the configuration to Serve's options and a replica's addresses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from expertmesh.deployments.requests.router import PrefixRouter
from expertmesh.deployments.requests.settings import metadata_of, router_options, routes_by_prefix, source_of
from expertmesh.deployments.source import Source, addresses_for
from expertmesh.errors import WireError
from expertmesh.platform.config import load_config
from expertmesh.routing.transport import Address


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"attention": {"replicas": 2}}, True),
        ({"attention": {"replicas": 1}}, False),
        ({"autoscaling": {"attention": {"min_replicas": 1, "max_replicas": 3}}}, True),
        ({"attention": {"replicas": 2}, "routing": {"requests": {"policy": "load"}}}, False),
        ({"attention": {"replicas": 2, "prefix_caching": False}}, False),
    ],
)
def test_our_router_is_used_where_there_is_something_to_choose_by(settings: dict[str, Any], ours: bool) -> None:
    config = load_config(settings)
    assert routes_by_prefix(config) == ours
    options = router_options(config)
    assert ("request_router_config" in options) == ours
    if ours:
        router = options["request_router_config"]
        assert router.get_request_router_class().__name__ == PrefixRouter.__name__
        assert load_config(json.loads(json.dumps(router.request_router_kwargs))["mesh"]) == config


@pytest.mark.parametrize(("transport", "families"), [("auto", ["unix", "tcp"]), ("unix", ["unix"]), ("tcp", ["tcp"])])
def test_a_feed_listens_where_shards_would(transport: str, families: list[str]) -> None:
    addresses = addresses_for(load_config({"routing": {"transport": transport}}), "kv-events-replica")
    assert [address.family for address in addresses] == families


def test_a_source_is_reached_by_unix_socket_on_its_node_and_by_tcp_from_others() -> None:
    source = Source("here", ("tcp:127.0.0.1:7", "unix:@name"))
    assert source_of(json.loads(json.dumps(metadata_of(source)))) == source
    assert source.best("here") == Address("unix", "name")
    assert source.best("elsewhere") == Address("tcp", "127.0.0.1", 7)
    assert source_of({}) is None
    with pytest.raises(WireError, match="can be reached from here"):
        Source("here", ("unix:@name",)).best("elsewhere")
