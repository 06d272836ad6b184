"""The OpenAI API and the admin routes over a running mesh of the demo model, by the SDK and by plain HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from expertmesh import AsyncClient, Client
from expertmesh.deployments.local import LocalMesh
from expertmesh.platform.checkpoints import expert_layout, is_expert_tensor, open_checkpoint

pytestmark = pytest.mark.mesh

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(demo_mesh: LocalMesh) -> Iterator[Client]:
    with Client(base_url=demo_mesh.url, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def http(demo_mesh: LocalMesh) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_mesh.url, timeout=120) as http:
        yield http


def eventually(check: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether `check` comes true in time; looks ten times a second."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.1)
    return check()


def test_status_shows_a_whole_mesh(client: Client) -> None:
    status = client.mesh.status()
    assert (status.health, status.mode, status.model) == ("ok", "mesh", "demo")
    assert status.placement.missing_experts == 0
    assert status.placement.redundancy == 1
    assert status.placement.epoch > 0
    assert [shard.ready for shard in status.shards] == [True, True]
    assert [replica.ready for replica in status.attention] == [True]


def test_each_side_reads_only_its_own_bytes(demo_folder: Path, client: Client) -> None:
    checkpoint = open_checkpoint(demo_folder)
    layout = expert_layout(checkpoint)
    attention_bytes = sum(info.nbytes for name, info in checkpoint.tensors.items() if not is_expert_tensor(name))
    placement = client.mesh.placement()
    raw = client.mesh.raw("status")
    loaded = raw["attention"][0]["loaded"]
    assert loaded["bytes_read"] == attention_bytes
    assert loaded["tensors_skipped"] == sum(map(is_expert_tensor, checkpoint.tensors))
    for shard in raw["shards"]:
        slots = placement.slots[shard["index"]]
        leased = [(placement.layers[i], e) for i, held in enumerate(slots) for e in held if e >= 0]
        assert shard["bytes_read"] == sum(layout.expert_bytes(layer, expert) for layer, expert in leased)
    assert sum(shard["bytes_read"] for shard in raw["shards"]) == layout.total_expert_bytes


def test_it_speaks_english(client: Client) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=40, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_models_health_and_tokenize(client: Client, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert http.get("/health").status_code == 200
    tokens = http.post("/tokenize", json={"model": "demo", "prompt": "héllo wörld"}).json()
    back = http.post("/detokenize", json={"model": "demo", "tokens": tokens["tokens"]}).json()
    assert back["prompt"].endswith("héllo wörld")


def test_streaming_says_the_same_as_waiting(client: Client) -> None:
    settings = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert len(chunks) > 10
    streamed = chunks[-1].usage
    assert whole.usage is not None
    assert streamed is not None
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (whole.usage.prompt_tokens, 24)
    assert whole.usage.completion_tokens == 24


def test_stop_ends_before_the_string(client: Client) -> None:
    settings = {"model": "demo", "prompt": "Count: one, two, three,", "max_tokens": 24, "temperature": 0}
    full = client.completions.create(**settings).choices[0].text
    word = full.split()[2]
    cut = client.completions.create(**settings, stop=[word]).choices[0]
    assert cut.text == full[: full.index(word)]
    assert cut.finish_reason == "stop"


def test_n_and_seed(client: Client) -> None:
    settings = {"model": "demo", "prompt": "My favourite animal is", "max_tokens": 12, "temperature": 1.0, "n": 3}
    first = client.completions.create(**settings, seed=7)
    again = client.completions.create(**settings, seed=7)
    assert [c.text for c in first.choices] == [c.text for c in again.choices]
    assert len({c.text for c in first.choices}) > 1


def test_logprobs(client: Client) -> None:
    answer = client.completions.create(model="demo", prompt="The sky is", max_tokens=4, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values())
        assert chosen <= 0


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"prompt": "word " * 9000}, 400),
        ({"temperature": -3}, 400),
        ({"max_tokens": "many"}, 400),
        ({"max_tokens": 10**9}, 400),
        ({"n": 0}, 400),
        ({"prompt": None}, 400),
    ],
)
def test_bad_requests_get_openais_error(http: httpx.Client, change: dict[str, object], status: int) -> None:
    body = {"model": "demo", "prompt": "hi", "max_tokens": 4, **change}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) >= {"message", "type", "code"}


def test_malformed_json_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=b'{"model": "demo", ', headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert "message" in answer.json()["error"]


def test_the_openai_package_raises_its_own_errors(client: Client) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="hi")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="demo", messages=QUESTION, temperature=-1)


def test_a_client_that_leaves_stops_its_generation(client: Client, http: httpx.Client) -> None:
    body = {"model": "demo", "prompt": "Tell me", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        for _ in range(6):
            next(lines)
        assert eventually(lambda: client.mesh.status().attention[0].running == 1)
    assert eventually(lambda: client.mesh.status().attention[0].running == 0)


async def test_many_streams_at_once_say_what_one_says(demo_mesh: LocalMesh, client: Client) -> None:
    prompts = [f"Number {i} is" for i in range(8)]
    settings = {"model": "demo", "max_tokens": 16, "temperature": 0}
    alone = [client.completions.create(prompt=p, **settings).choices[0].text for p in prompts]
    async with AsyncClient(base_url=demo_mesh.url, timeout=120) as many:
        together = await asyncio.gather(*[many.completions.create(prompt=p, **settings) for p in prompts])
    assert [answer.choices[0].text for answer in together] == alone


def test_loads_count_every_token(client: Client, demo_folder: Path) -> None:
    seen: list[int] = []

    def settled() -> bool:
        seen.append(sum(map(sum, client.mesh.loads().tokens)))
        return len(seen) > 10 and len(set(seen[-10:])) == 1  # a second without a change: reports come every 0.5 s

    assert eventually(settled)
    before = seen[-1]
    answer = client.completions.create(model="demo", prompt="A quite new prompt:", max_tokens=8, temperature=0)
    assert answer.usage is not None
    rows = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1  # the last token is not computed any more
    config = open_checkpoint(demo_folder).config
    per_token = config["num_hidden_layers"] * config["num_experts_per_tok"]
    assert eventually(lambda: seen.clear() is None and eventually(settled) and seen[-1] - before >= rows * per_token)
    # vLLM may schedule one more token than is used before it sees the end.
    assert seen[-1] - before <= (rows + 2) * per_token
