"""Real engines over a real store: later engines' hits, equal tokens, tenants, and a server that fails in every way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from benchmarks.checkpoints import write_medium_moe
from benchmarks.kv_engine import Engines
from benchmarks.timing import free_port
from expertmesh.kv_store import Endpoint, StoreLimits, StoreSettings
from expertmesh.kv_store.keys import KEY_PREFIX
from tests.kv_store.servers import Server, plain_server, until

pytestmark = pytest.mark.engine

PASSWORD = "of-the-store"
TOKENS = 16
LENGTH = 1024
"""Longest prompt and answer."""
BLOCK = 128
"""Tokens in a block of vLLM's KV cache on CPU."""
PREFIX = 5 * BLOCK
LIMITS = StoreLimits(lookup_timeout_s=2.0)
"""Longer than by default: on a machine with too much to do a lookup must not miss its deadline."""


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts that share their first PREFIX tokens."""
    draw = random.Random(seed)
    shared = [draw.randrange(10, 300) for _ in range(PREFIX)]
    return [shared + [draw.randrange(10, 300) for _ in range(40)] for _ in range(count)]


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Computing PREFIX tokens of it takes so long that fetching them is worth it on any machine."""
    return write_medium_moe(tmp_path_factory.mktemp("slow") / "model", layers=6, experts=8, vocab=384)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """One process for all engines of this module."""
    with Engines(tmp_path_factory.mktemp("engines")) as engines:
        yield engines


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Valkey that a test may break."""
    running = plain_server(tmp_path / "valkey", free_port(), requirepass=PASSWORD)
    running.start()
    yield running
    running.resume()
    running.kill()


def settings_of(server: Server) -> StoreSettings:
    return StoreSettings(Endpoint("127.0.0.1", int(server.config["port"])), password=PASSWORD)


def connected(server: Server) -> redis.Redis:
    return redis.Redis(port=int(server.config["port"]), password=PASSWORD, protocol=2)


@pytest.mark.parametrize(
    ("name", "blocks"), [("qwen3_moe", 5), ("gpt_oss", 6), pytest.param("mixtral", 1, marks=pytest.mark.long)]
)
def test_a_later_engine_says_the_same_from_blocks_that_the_first_one_wrote(
    family: Callable[[str], Path], engines: Engines, server: Server, name: str, blocks: int
) -> None:
    """Full attention with fewer KV heads than heads; full attention and windows in turn; windows only.

    Of a window vLLM offers only the blocks that it covers at the prompt's end.
    """
    folder, store = family(name), settings_of(server)
    asked = prompts(3, seed=1)
    engines.start(folder, max_model_len=LENGTH)
    expected = [engines.reply(prompt, TOKENS).tokens for prompt in asked]
    assert len(set(expected)) == 3

    engines.start(folder, store, limits=LIMITS, max_model_len=LENGTH)
    first = [engines.reply(prompt, TOKENS) for prompt in asked]
    assert [reply.tokens for reply in first] == expected
    assert first[0].cached == 0
    until(lambda: engines.counts().get("stored", 0) >= blocks, "blocks are written")

    engines.start(folder, store, limits=LIMITS, max_model_len=LENGTH)
    later = [engines.reply(prompt, TOKENS) for prompt in asked]
    assert [reply.tokens for reply in later] == expected
    assert [reply.cached for reply in later] == [PREFIX] * 3
    stranger = engines.reply(asked[0], TOKENS, salt="another tenant")
    assert stranger.cached == 0
    assert stranger.tokens == expected[0]
    until(lambda: engines.counts().get("load_sound", 0) > 0, "loads are counted")

    engines.start(folder, store, weights="of another training", limits=LIMITS, max_model_len=LENGTH)
    assert engines.reply(asked[0], TOKENS).cached == 0


def test_a_server_in_trouble_costs_no_request_and_no_token(slow_model: Path, engines: Engines, server: Server) -> None:
    asked = prompts(1, seed=2)[0]
    engines.start(slow_model, max_model_len=LENGTH)
    expected = engines.reply(asked, TOKENS).tokens
    engines.start(slow_model, settings_of(server), limits=LIMITS, max_model_len=LENGTH)

    def answer(cached: int) -> None:
        engines.forget()
        reply = engines.reply(asked, TOKENS)
        assert (reply.tokens, reply.cached, reply.finish) == (expected, cached, "length")

    def count(name: str) -> int:
        return engines.counts().get(name, 0)

    def stored() -> bool:
        with connected(server) as client:
            return int(client.dbsize()) >= PREFIX // BLOCK

    answer(0)
    until(stored, "written")
    answer(PREFIX)

    with connected(server) as client:  # a bit of the first block, and the end of the second one
        keys = sorted(client.keys(KEY_PREFIX + b"*"))
        for key in keys:
            client.setrange(key, 200, b"\xff\x00\xff\x00")
    answer(0)
    until(lambda: count("load_corrupt") >= 1, "damage is counted")
    with connected(server) as client:
        client.flushall()
    answer(0)
    until(stored, "written again")
    with connected(server) as client:
        for key in keys:
            client.set(key, client.get(key)[:1000])
    answer(0)
    until(lambda: count("load_truncated") >= 1, "what was cut off is counted")

    server.pause()
    answer(0)
    until(lambda: count("timed_out") >= 1 and engines.breakers() == ["open"], "the server is left alone")
    answer(0)
    until(lambda: count("skipped") >= 1, "nobody waits for it again")
    server.resume()
    until(lambda: engines.breakers() == ["closed"], "the server is used again")
    with connected(server) as client:
        client.flushall()
    answer(0)
    until(stored, "written after it hung")
    answer(PREFIX)

    server.kill()
    answer(0)
    until(lambda: engines.breakers() == ["open"], "the server is gone")
    answer(0)
    server.start()
    until(lambda: engines.breakers() == ["closed"], "the server is back")
    answer(0)
    until(stored, "written to the new one")
    answer(PREFIX)


def test_an_engine_starts_without_its_server(slow_model: Path, engines: Engines, server: Server) -> None:
    server.kill()
    asked = prompts(1, seed=3)[0]
    engines.start(slow_model, settings_of(server), limits=LIMITS, max_model_len=LENGTH)
    alone = engines.reply(asked, TOKENS)
    assert alone.cached == 0
    until(lambda: engines.breakers() == ["open"], "the server is not there")
    server.start()
    until(lambda: engines.breakers() == ["closed"], "the server is there")
    engines.forget()
    assert engines.reply(asked, TOKENS).tokens == alone.tokens
    engines.forget()
    until(lambda: engines.counts().get("stored", 0) >= PREFIX // BLOCK, "written")
    assert engines.reply(asked, TOKENS).cached == PREFIX


def test_a_killed_engine_leaves_no_memory_behind(
    family: Callable[[str], Path], engines: Engines, server: Server
) -> None:
    engines.start(family("qwen3_moe"), settings_of(server), max_model_len=LENGTH)
    assert not list(Path("/dev/shm").glob("vllm_offload_*"))


def test_mla_without_prefix_caching_is_refused(family: Callable[[str], Path], engines: Engines, server: Server) -> None:
    import torch

    if torch.cpu._is_amx_tile_supported():
        pytest.skip("with AMX vLLM's MLA can begin in the middle of a prompt")
    with pytest.raises(RuntimeError, match=r"no prefix caching for MLA on this CPU.*allowed: off"):
        engines.start(family("deepseek_v3"), settings_of(server))


def test_host_memory_that_holds_next_to_nothing_is_refused(
    family: Callable[[str], Path], engines: Engines, server: Server
) -> None:
    with pytest.raises(RuntimeError, match=r"kv_store.host_memory_mib: a block of this model takes .* MiB"):
        engines.start(family("qwen3_moe"), settings_of(server), host_bytes=256 << 10, max_model_len=LENGTH)
