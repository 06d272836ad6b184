"""What the router believes against a real engine: the same hashes, and what it says is held is what is found."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.bare import Worker
from benchmarks.timing import free_port
from tests.kv_store.servers import plain_server, until
from tests.requests.events_host import EventsHost

pytestmark = pytest.mark.engine

BLOCK = 128
"""vLLM's on a CPU."""


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(10, 300), k=tokens)


def leading(blocks: tuple[int, ...], held: set[int]) -> int:
    return next((i for i, block in enumerate(blocks) if block not in held), len(blocks))


def test_what_an_engine_writes_to_the_store_is_told(family: Callable[[str], Path], tmp_path: Path) -> None:
    """With the steps of the engine; what is written after the last one is told with the next."""
    server = plain_server(tmp_path, free_port())
    server.start()
    try:
        url = f"redis://127.0.0.1:{server.config['port']}"
        with Worker(EventsHost, family("gpt_oss"), 0.01, url) as host:
            first = prompt(1, 5 * BLOCK + 7)
            blocks = set(host.ask("blocks", first))
            host.ask("run", first)

            def told() -> bool:
                host.ask("run", prompt(2, 10))
                return bool(host.ask("in_store") == blocks)

            until(told, "the feed says that the store has the prompt's blocks, and no others")
    finally:
        server.kill()


def test_router_and_engine_speak_of_the_same_blocks(family: Callable[[str], Path]) -> None:
    """A hybrid model: its full attention layers and its sliding windows have KV caches of their own."""
    with Worker(EventsHost, family("gpt_oss"), 0.01) as host:
        assert host.ask("block_tokens") == BLOCK

        first = prompt(1, 5 * BLOCK + 7)
        blocks = host.ask("blocks", first)
        assert len(blocks) == 5
        assert host.ask("run", first) == 0
        assert host.ask("held", blocks) == set(blocks)
        assert host.ask("run", first) == 5 * BLOCK, "what is held is found"

        next_turn = [*first, *prompt(2, 2 * BLOCK)]
        assert leading(host.ask("blocks", next_turn), host.ask("held")) == 5
        assert host.ask("run", next_turn) == 5 * BLOCK

        branch = [*first[: 3 * BLOCK], *prompt(4, 2 * BLOCK)]
        assert leading(host.ask("blocks", branch), host.ask("held")) == 3
        assert host.ask("run", branch) <= 3 * BLOCK, "less: the window's blocks are only kept where prompts ended"

        short = prompt(3, BLOCK - 1)
        assert host.ask("blocks", short) == ()
        assert host.ask("run", short) == 0

        for salt in ("one tenant", "another"):
            salted = host.ask("blocks", first, salt)
            assert leading(salted, host.ask("held")) == 0, "equal prompts of others are no hit"
            assert host.ask("run", first, salt) == 0
            assert set(salted) <= host.ask("held", salted)
            assert host.ask("run", first, salt) == 5 * BLOCK

        for seed in range(10, 10_000):
            if leading(blocks, host.ask("held")) < 5:
                break
            filler = prompt(seed, 7 * BLOCK + 1)
            assert host.ask("run", filler) == 0
            host.ask("held", host.ask("blocks", filler)[:1])
        believed = leading(blocks, host.ask("held"))
        assert believed < 5, "the cache is full: the oldest made room"
        assert host.ask("run", first) <= believed * BLOCK
