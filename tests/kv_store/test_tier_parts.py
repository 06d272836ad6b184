"""What of the tier needs no vLLM: its settings, its clock, its report, and the config's way to a server."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from expertmesh.errors import ConfigError, Unavailable
from expertmesh.kv_store import EmbeddedServer, Endpoint, IamLogin, StoreClient, StoreLimits, StoreSettings
from expertmesh.kv_store.configured import check_store, embedded_link, embedded_password, limits_of, server_of
from expertmesh.kv_store.tier import TierSettings, engine_arguments
from expertmesh.kv_store.tier.prompt_timer import PromptTimer
from expertmesh.kv_store.tier.report import Reporter
from expertmesh.platform.config import load_config
from tests.kv_store.servers import PATIENCE_S, until

SECRET = b"the secret of the cluster"


def test_a_prompts_time_is_its_part_of_the_steps_that_computed_it() -> None:
    timer = PromptTimer()
    timer.scheduled({"a": 300}, {"a": 200}, now=10.0)
    assert timer.done(now=12.0) == []
    timer.scheduled({"b": 100}, {"a": 100, "b": 100}, now=12.5)
    assert timer.done(now=13.5) == [(300, 2.5), (100, 0.5)]
    timer.scheduled({}, {"a": 1, "b": 1}, now=14.0)
    assert timer.done(now=15.0) == []


def test_a_step_that_was_scheduled_ahead_begins_when_the_one_before_ends() -> None:
    timer = PromptTimer()
    timer.scheduled({"a": 10}, {"a": 10}, now=0.0)
    timer.scheduled({"b": 10}, {"b": 10}, now=0.1)
    assert timer.done(now=2.0) == [(10, 2.0)]
    assert timer.done(now=5.0) == [(10, 3.0)]
    assert timer.done(now=6.0) == []


def test_empty_steps_and_requests_that_end_early_count_for_nothing() -> None:
    timer = PromptTimer()
    timer.scheduled({"a": 10, "hit": 0}, {"a": 5, "hit": 1}, now=0.0)
    assert timer.done(now=1.0) == []
    timer.forget("a")
    timer.forget("nobody")
    timer.scheduled({}, {}, now=1.0)
    assert timer.done(now=2.0) == []
    timer.scheduled({}, {"a": 5}, now=3.0)
    assert timer.done(now=4.0) == []


def test_settings_come_back_from_a_private_file_and_hide_secrets(tmp_path: Path) -> None:
    server = StoreSettings(
        Endpoint("host", 6379, tls=True), "user", "", True, None, IamLogin("cache", "eu-west-1", serverless=True)
    )
    settings = TierSettings(server, StoreLimits(ttl_s=5), "canary-secret", "weights", tmp_path / "report")
    settings.save(tmp_path / "settings")
    assert TierSettings.load(tmp_path / "settings") == settings
    assert stat.S_IMODE((tmp_path / "settings").stat().st_mode) == 0o600
    assert "canary" not in repr(settings)
    assert "canary" not in json.dumps(engine_arguments(tmp_path / "settings", 1 << 20))
    (tmp_path / "broken").write_text('{"secret": "canary-secret"')
    with pytest.raises(ConfigError) as caught:
        TierSettings.load(tmp_path / "broken")
    assert "canary" not in str(caught.value)
    with pytest.raises(ConfigError):
        TierSettings.load(tmp_path / "nothing")


def test_a_report_is_written_when_something_changed_and_in_the_end(tmp_path: Path) -> None:
    now = {"counts": {"found": 1}}
    reporter = Reporter(tmp_path / "report", lambda: dict(now))
    until(lambda: (tmp_path / "report").exists(), "written")
    assert json.loads((tmp_path / "report").read_text()) == {"counts": {"found": 1}}
    now["counts"] = {"found": 2}
    reporter.close()
    assert json.loads((tmp_path / "report").read_text()) == {"counts": {"found": 2}}


def test_the_config_names_a_server(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("p w\n")
    (tmp_path / "ca.pem").write_text("")
    config = load_config(
        {
            "kv_store": {
                "url": "rediss://cache.example:6380?cluster=true",
                "username": "mesh",
                "password_file": str(tmp_path / "password"),
                "ca_file": str(tmp_path / "ca.pem"),
                "lookup_timeout_ms": 50,
                "host_memory_mib": 64,
            }
        }
    )
    assert server_of(config, SECRET) == StoreSettings(
        Endpoint("cache.example", 6380, tls=True), "mesh", "p w", True, tmp_path / "ca.pem"
    )
    limits = limits_of(config.kv_store)
    assert (limits.lookup_timeout_s, limits.max_queued_bytes, limits.ttl_s) == (0.05, 32 << 20, 86400)
    iam = {"cache_name": "c", "region": "r", "serverless": True}
    config = load_config({"kv_store": {"url": "rediss://cache.example", "username": "mesh", "iam": iam}})
    assert server_of(config, SECRET).iam == IamLogin("c", "r", serverless=True)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_store\.url is off"):
        server_of(load_config({}), SECRET)
    embedded = load_config({"model": {"cache_dir": str(tmp_path)}, "kv_store": {"url": "embedded"}})
    with pytest.raises(Unavailable, match="no embedded KV store runs for a mesh on port 8000"):
        server_of(embedded, SECRET)
    for name, content in (("missing", None), ("empty", ""), ("long", "x" * 5000)):
        if content is not None:
            (tmp_path / name).write_text(content)
        store = {"url": "redis://host", "password_file": str(tmp_path / name)}
        with pytest.raises(ConfigError, match=r"kv_store\.password_file: .*" + name):
            server_of(load_config({"kv_store": store}), SECRET)


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ({"prefix_caching": False}, "attention.prefix_caching: must be true"),
        ({"engine_args": {"kv_transfer_config": {}}}, "kv_transfer_config: kv_store sets this"),
    ],
)
def test_what_rules_the_store_out_is_refused(attention: dict[str, object], said: str) -> None:
    check_store(load_config({"attention": attention}))
    with pytest.raises(ConfigError, match=said):
        check_store(load_config({"attention": attention, "kv_store": {"url": "embedded"}}))


def test_all_that_know_the_secret_find_the_embedded_server(tmp_path: Path) -> None:
    config = load_config({"model": {"cache_dir": str(tmp_path / "cache")}, "kv_store": {"url": "embedded"}})
    link = embedded_link(config)
    with EmbeddedServer(64 << 20, embedded_password(SECRET), link):
        client = StoreClient(server_of(config, SECRET))
        assert client.set([(b"a", [memoryview(b"x")])], 60, PATIENCE_S) == [1]
        client.close()
        assert server_of(config, b"another secret").password != embedded_password(SECRET)
    assert not link.is_symlink()
    link.symlink_to(tmp_path / "of-a-server-before")
    with EmbeddedServer(64 << 20, embedded_password(SECRET), link) as server:
        assert link.resolve() == Path(server.settings.endpoint.path).parent
