"""What goes wrong between S3 and us: either the right bytes come in the end, or an error names object and range."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.s3 import Asked, Cut, Fault, Forget, Refuse
from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints import Wanted, open_checkpoint
from tests.weights.conftest import Pushed
from tests.weights.test_mirror import FILE, assert_same

EMBEDDING = "model.embed_tokens.weight"


def first_time(fault: Fault) -> Callable[[Asked], Fault | None]:
    """A fault that each request meets once."""
    return lambda asked: fault if asked.number == 0 else None


@pytest.mark.parametrize("refusal", [Refuse(503, "SlowDown"), Refuse(500, "InternalError"), Refuse(429, "Throttling")])
def test_what_s3_refuses_once_is_asked_again(qwen: Pushed, tmp_path: Path, refusal: Refuse) -> None:
    qwen.proxy.fault = first_time(refusal)
    checkpoint = open_checkpoint(qwen.mirror(tmp_path))
    for name in list(checkpoint.tensors)[::9]:
        assert checkpoint.read(name).equal(open_checkpoint(qwen.folder).read(name))
    assert max(asked.number for asked in qwen.proxy.asked) == 1
    assert min(qwen.proxy.count_of(asked) for asked in qwen.proxy.asked) == 2


def test_a_broken_body_goes_on_where_it_broke(qwen: Pushed, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(qwen.mirror(tmp_path))
    info = checkpoint.info(EMBEDDING)
    qwen.proxy.reset()
    qwen.proxy.fault = lambda asked: Cut(60_000)
    cut = 60_000 * ((info.nbytes - 1) // 60_000)
    assert cut
    assert checkpoint.read(EMBEDDING).equal(open_checkpoint(qwen.folder).read(EMBEDDING))
    last = info.offset + info.nbytes - 1
    assert [a.range for a in qwen.proxy.asked] == [
        f"bytes={first}-{last}" for first in range(info.offset, info.offset + cut + 1, 60_000)
    ]
    assert qwen.proxy.sent[qwen.path(FILE)] == info.nbytes


def test_an_answer_that_never_comes_whole_is_given_up(qwen: Pushed, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(qwen.mirror(tmp_path))
    info = checkpoint.info(EMBEDDING)
    where = rf"s3://bucket-\d+/models/tiny/{FILE}: bytes {info.offset}-{info.offset + info.nbytes - 1}"
    for fault in (Refuse(), Cut(0)):
        qwen.proxy.reset()
        qwen.proxy.fault = lambda asked, fault=fault: fault
        with pytest.raises(CheckpointError, match=f"{where}: given up after 3 failures in a row, the last: "):
            checkpoint.read(EMBEDDING)
        assert len(qwen.proxy.asked) == 3
    qwen.proxy.reset()
    assert checkpoint.read(EMBEDDING).equal(open_checkpoint(qwen.folder).read(EMBEDDING))


def test_nobody_listens(qwen: Pushed, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(qwen.mirror(tmp_path))
    qwen.proxy.stop()
    with pytest.raises(CheckpointError, match=rf"{FILE}: bytes \d+-\d+: given up after 3 failures"):
        checkpoint.read(EMBEDDING)
    with pytest.raises(CheckpointError, match=r"s3://bucket-\d+/models/tiny: given up after 3 failures"):
        qwen.mirror(tmp_path)


def test_one_failure_ends_what_is_read_ahead(qwen: Pushed, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(qwen.mirror(tmp_path))
    info = checkpoint.info(list(checkpoint.tensors)[20])
    qwen.proxy.fault = lambda asked: Refuse() if asked.range.startswith(f"bytes={info.offset}-") else None
    tensors = checkpoint.read_each(map(Wanted, checkpoint.tensors))
    assert all(next(tensors).nbytes for _ in range(20))
    with pytest.raises(CheckpointError, match=f"bytes {info.offset}-"):
        next(tensors)
    with pytest.raises(StopIteration):
        next(tensors)


@pytest.mark.parametrize("honoured", [True, False])
def test_an_object_that_changes_under_way_is_noticed(qwen: Pushed, tmp_path: Path, honoured: bool) -> None:
    """Whether the store honours If-Match or, as some do, doesn't know it."""
    checkpoint = open_checkpoint(qwen.mirror(tmp_path))
    raw = bytearray((qwen.folder / FILE).read_bytes())
    raw[-1] ^= 1
    seen = 0

    def change(asked: Asked) -> Fault | None:
        nonlocal seen
        seen += 1
        if seen == 30:
            qwen.overwrite(FILE, bytes(raw))
        return None if honoured else Forget("If-Match")

    qwen.proxy.fault = change
    with pytest.raises(CheckpointError, match=rf"{FILE}(: bytes \d+-\d+)?: the object changed since it was listed"):
        list(checkpoint.read_each(map(Wanted, checkpoint.tensors)))
    qwen.proxy.reset()
    renewed = open_checkpoint(qwen.mirror(tmp_path))
    name = max(renewed.tensors, key=lambda name: renewed.tensors[name].offset)
    assert bytes(renewed.read(name).numpy().tobytes())[-1] == raw[-1]


def test_an_object_that_is_gone_is_said(qwen: Pushed, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(qwen.mirror(tmp_path))
    qwen.client.delete_object(Bucket=qwen.location.bucket, Key=qwen.location.key(FILE))
    with pytest.raises(CheckpointError, match=rf"{FILE}: bytes \d+-\d+: the object is gone since it was listed"):
        checkpoint.read(EMBEDDING)


def test_a_store_that_ignores_ranges_is_refused(qwen: Pushed, tmp_path: Path) -> None:
    qwen.proxy.fault = lambda asked: Forget("Range")
    with pytest.raises(CheckpointError, match=rf"{FILE}: bytes 0-7: the answer holds None, asked for 'bytes 0-7/\d+'"):
        open_checkpoint(qwen.mirror(tmp_path))


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_faults_gives_the_right_bytes(gpt_oss: Pushed, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)

    def fault(asked: Asked) -> Fault | None:
        if asked.number >= 1:  # a cut before and this one make two failures; the third would be the last
            return None
        return rng.choice([None, Refuse(), Refuse(500, "InternalError"), Cut(0), Cut(rng.randrange(1, 200_000))])

    gpt_oss.proxy.fault = fault
    checkpoint = open_checkpoint(gpt_oss.mirror(tmp_path))
    assert_same(checkpoint, gpt_oss.folder)
    assert sum(gpt_oss.proxy.sent.values()) >= checkpoint.total_bytes
    again = open_checkpoint(checkpoint.folder)
    assert_same(again, gpt_oss.folder)
    assert again.bytes_fetched == 0


@pytest.mark.parametrize("after", [0, 40, 300])
def test_a_list_that_breaks_off_is_not_taken_for_a_short_one(qwen: Pushed, tmp_path: Path, after: int) -> None:
    listing = f"/{qwen.location.bucket}"
    qwen.proxy.fault = lambda asked: Cut(after) if asked.path == listing and asked.number == 0 else None
    model = qwen.mirror(tmp_path)
    assert {path.name for path in model.iterdir()} == {path.name for path in qwen.folder.iterdir()}
    assert [asked.path for asked in qwen.proxy.asked].count(listing) == 2


def test_a_small_file_whose_checksum_differs_is_not_used(qwen: Pushed, tmp_path: Path) -> None:
    qwen.client.put_object(
        Bucket=qwen.location.bucket,
        Key=qwen.location.key("config.json"),
        Body=b"{}",
        ChecksumAlgorithm="CRC32",
        ChecksumCRC32="AAAAAA==",  # moto takes the client's word for it
    )
    with pytest.raises(
        CheckpointError, match=r"config\.json: given up after 3 failures in a row, the last: .*checksum"
    ):
        qwen.mirror(tmp_path)
