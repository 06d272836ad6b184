"""A checkpoint in S3 behind a folder here: the same tensors, no byte too many, a cache that may be damaged."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from benchmarks.s3 import Asked, Cut, Fault, Refuse
from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints import (
    Checkpoint,
    Wanted,
    check_checkpoint,
    checkpoint_revision,
    expert_layout,
    is_expert_tensor,
    open_checkpoint,
)
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import load_config
from expertmesh.platform.weights.s3_location import S3Location
from tests.weights.conftest import Pushed

FILE = "model.safetensors"


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor, by name."""
    return dict(zip(checkpoint.tensors, checkpoint.read_each(map(Wanted, checkpoint.tensors)), strict=True))


def assert_same(checkpoint: Checkpoint, original: Path) -> None:
    """That all tensors are those of the folder `original`, bit for bit."""
    wanted = open_checkpoint(original)
    found = read_all(checkpoint)
    assert found.keys() == wanted.tensors.keys()
    assert all(torch.equal(tensor, wanted.read(name)) for name, tensor in found.items())


def parts_of(model: Path) -> Path:
    """The file in which the mirror `model` keeps what it read."""
    return model.parent / "parts" / FILE


def test_opening_reads_small_files_and_headers_only(qwen: Pushed, tmp_path: Path) -> None:
    model = qwen.mirror(tmp_path)
    original = check_checkpoint(qwen.folder)
    header = original.files[0].data_offset
    assert {path.name for path in model.iterdir()} == {path.name for path in qwen.folder.iterdir()}
    for path in model.iterdir():
        raw = (qwen.folder / path.name).read_bytes()
        assert path.read_bytes() == (raw[:header] if path.name == FILE else raw)
    checkpoint = check_checkpoint(model)
    assert {name: (i.dtype, i.shape, i.offset) for name, i in checkpoint.tensors.items()} == {
        name: (i.dtype, i.shape, i.offset) for name, i in original.tensors.items()
    }
    assert expert_layout(checkpoint) == expert_layout(original)
    assert (checkpoint.bytes_read, checkpoint.bytes_fetched) == (0, 0)
    assert qwen.proxy.sent[qwen.path(FILE)] == header


def test_who_takes_a_header_for_a_file_gets_an_error(qwen: Pushed, tmp_path: Path) -> None:
    model = qwen.mirror(tmp_path)
    with pytest.raises(SafetensorError, match="not fully covered"):
        safe_open(model / FILE, framework="pt")


def test_tensors_are_the_same_and_are_read_once(qwen: Pushed, tmp_path: Path) -> None:
    model = qwen.mirror(tmp_path)
    checkpoint = open_checkpoint(model)
    assert_same(checkpoint, qwen.folder)
    assert checkpoint.bytes_read == checkpoint.total_bytes
    size = (qwen.folder / FILE).stat().st_size
    assert qwen.proxy.sent[qwen.path(FILE)] == size
    assert checkpoint.bytes_fetched == size - checkpoint.files[0].data_offset
    again = open_checkpoint(model)
    assert_same(again, qwen.folder)
    assert again.bytes_read == checkpoint.bytes_read
    assert again.bytes_fetched == 0


def test_rows_cost_their_own_bytes(gpt_oss: Pushed, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gpt_oss.mirror(tmp_path))
    original = open_checkpoint(gpt_oss.folder)
    layout = expert_layout(checkpoint)
    before = checkpoint.bytes_fetched
    names = layout.names(layout.layers[0], 0)
    for name, rows in zip(names, checkpoint.read_each(Wanted(name, [6, None, 2]) for name in names), strict=True):
        whole = original.read(name)
        assert torch.equal(rows, torch.stack([whole[6], torch.zeros_like(whole[0]), whole[2]]))
    assert checkpoint.bytes_fetched - before == 2 * layout.expert_bytes(layout.layers[0], 0)


def test_without_keeping_no_tensor_is_on_the_disk(qwen: Pushed, tmp_path: Path) -> None:
    model = qwen.mirror(tmp_path, keep_tensors=False)
    journal = parts_of(model).with_name(f"{FILE}.parts")
    headers = journal.read_bytes()
    for _ in range(2):
        checkpoint = open_checkpoint(model)
        assert_same(checkpoint, qwen.folder)
        assert checkpoint.bytes_fetched == checkpoint.total_bytes
    assert journal.read_bytes() == headers


def test_long_tensors_are_read_in_parts(pushed: Callable[[Path], Pushed], qwen: Pushed, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "long"
    folder.mkdir()
    for path in qwen.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / FILE)
    tensors["long"] = torch.randint(-(2**62), 2**62, (5, 1 << 20))  # 40 MiB
    save_file(tensors, folder / FILE)
    long = pushed(folder)
    checkpoint = open_checkpoint(long.mirror(tmp_path / "cache"))
    assert torch.equal(checkpoint.read("long"), tensors["long"])
    assert torch.equal(checkpoint.read_rows("long", [4, 1, 2]), tensors["long"][[4, 1, 2]])
    spans = [tuple(map(int, a.range[6:].split("-"))) for a in long.proxy.asked if a.path == long.path(FILE)]
    assert sorted(last - first + 1 for first, last in spans)[-5:] == [8 << 20] * 3 + [16 << 20] * 2  # row 4 was there


def test_the_revision_is_the_same_everywhere_and_another_after_a_change(qwen: Pushed, tmp_path: Path) -> None:
    first, second = (open_checkpoint(qwen.mirror(tmp_path / name)) for name in ("a", "b"))
    fetched = first.bytes_fetched
    revision = checkpoint_revision(first)
    assert checkpoint_revision(second) == revision
    assert first.bytes_fetched == fetched
    raw = bytearray((qwen.folder / FILE).read_bytes())
    raw[-1] ^= 1
    qwen.overwrite(FILE, bytes(raw))
    changed = qwen.mirror(tmp_path / "a")
    assert changed != first.folder
    assert checkpoint_revision(open_checkpoint(changed)) != revision
    with pytest.raises(
        CheckpointError, match=rf"s3://.*/{FILE}: bytes \d+-\d+: the object changed since it was listed"
    ):
        read_all(first)


@pytest.mark.parametrize("damage", ["data", "journal", "torn record", "both gone", "cut short"])
def test_damaged_parts_are_noticed_and_fetched_again(
    qwen: Pushed, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = qwen.mirror(tmp_path)
    original = open_checkpoint(model)
    read_all(original)
    data, journal = parts_of(model), parts_of(model).with_name(f"{FILE}.parts")
    info = original.info("model.embed_tokens.weight")
    if damage == "data":
        with data.open("r+b") as file:
            file.seek(info.offset + 5)
            file.write(b"x")
        lost = info.nbytes
    elif damage == "journal":
        raw = bytearray(journal.read_bytes())
        raw[-3] ^= 1
        journal.write_bytes(bytes(raw))
        lost = None
    elif damage == "torn record":
        os.truncate(journal, journal.stat().st_size - 7)
        lost = None
    elif damage == "both gone":
        data.unlink()
        journal.unlink()
        lost = data_size(qwen)
    else:
        os.truncate(data, data_size(qwen) - 1)
        lost = None
    with caplog.at_level(logging.WARNING, "expertmesh.weights"):
        again = open_checkpoint(model)
        assert_same(again, qwen.folder)
    if lost is not None:
        assert again.bytes_fetched == lost
    assert 0 < again.bytes_fetched <= data_size(qwen)
    assert ("are damaged; they are fetched again" in caplog.text) == (damage in ("data", "cut short"))
    last = open_checkpoint(model)
    assert_same(last, qwen.folder)
    assert last.bytes_fetched == 0


def data_size(pushed: Pushed) -> int:
    """Bytes of the weights' file."""
    return (pushed.folder / FILE).stat().st_size


def test_damaged_small_files_are_noticed(qwen: Pushed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = qwen.mirror(tmp_path)
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").unlink()
    qwen.proxy.reset()
    with caplog.at_level(logging.WARNING, "expertmesh.weights"):
        assert qwen.mirror(tmp_path) == model
    assert "config.json: is damaged" in caplog.text
    fetched = {asked.path for asked in qwen.proxy.asked if asked.method == "GET"}
    assert fetched == {f"/{qwen.location.bucket}", qwen.path("config.json"), qwen.path("tokenizer.json")}
    check_checkpoint(model)
    source = model.parent / "expertmesh-s3.json"
    source.write_text(source.read_text()[:-20])
    assert qwen.mirror(tmp_path) == model
    assert_same(open_checkpoint(model), qwen.folder)


def test_a_disk_that_takes_nothing_costs_the_cache_and_not_the_start(
    qwen: Pushed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = qwen.mirror(tmp_path)
    parts_of(model).unlink()
    parts_of(model).mkdir()  # a file of that name can't be written
    with caplog.at_level(logging.WARNING, "expertmesh.weights"):
        assert_same(open_checkpoint(model), qwen.folder)
    assert caplog.text.count("parts are not kept any more") >= 1


READER = """
import sys
from pathlib import Path
from expertmesh.platform.checkpoints import Wanted, open_checkpoint
from expertmesh.platform.weights.mirror import mirror
from expertmesh.platform.weights.s3 import S3Settings
from expertmesh.platform.weights.s3_location import S3Location

model = mirror(S3Location.parse(sys.argv[1]), S3Settings(endpoint_url=sys.argv[2], connections=4), Path(sys.argv[3]))
checkpoint = open_checkpoint(model)
for tensor in checkpoint.read_each(map(Wanted, checkpoint.tensors)):
    pass
print(checkpoint.bytes_fetched, model)
"""


def start_reader(pushed: Pushed, cache: Path) -> subprocess.Popen[str]:
    """A process that reads every tensor."""
    command = [sys.executable, "-c", READER, pushed.location.url(), pushed.proxy.url, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_share_a_cold_cache(qwen: Pushed, tmp_path: Path) -> None:
    readers = [start_reader(qwen, tmp_path) for _ in range(2)]
    said = [reader.communicate()[0].split() for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0]
    assert len({model for _, model in said}) == 1
    checkpoint = open_checkpoint(Path(said[0][1]))
    assert_same(checkpoint, qwen.folder)
    assert checkpoint.bytes_fetched == 0


def test_a_killed_process_leaves_what_it_fetched(qwen: Pushed, tmp_path: Path) -> None:
    """The process is killed while S3 holds back what it wants next, so it is in the middle for certain."""
    halfway, killed = threading.Event(), threading.Event()
    wanted = data_size(qwen) // 2

    def hold(asked: Asked) -> Fault | None:
        if qwen.proxy.sent.get(qwen.path(FILE), 0) < wanted:
            return None
        halfway.set()
        killed.wait()
        return Cut(0)

    qwen.proxy.fault = hold
    reader = start_reader(qwen, tmp_path)
    assert halfway.wait(300)
    os.kill(reader.pid, signal.SIGKILL)
    reader.communicate()
    killed.set()
    sent = qwen.proxy.sent[qwen.path(FILE)]
    qwen.proxy.fault = lambda asked: None
    checkpoint = open_checkpoint(qwen.mirror(tmp_path))
    assert_same(checkpoint, qwen.folder)
    # Lost are at most the parts that its four connections had not written down yet.
    longest = max(info.nbytes for info in checkpoint.tensors.values())
    assert data_size(qwen) - sent <= checkpoint.bytes_fetched <= data_size(qwen) - sent + 4 * longest


def test_requester_pays_is_said_in_every_request(qwen: Pushed, tmp_path: Path) -> None:
    read_all(open_checkpoint(qwen.mirror(tmp_path, requester_pays=True)))
    assert {asked.headers.get("x-amz-request-payer") for asked in qwen.proxy.asked} == {"requester"}


def test_every_range_names_the_etag(qwen: Pushed, tmp_path: Path) -> None:
    read_all(open_checkpoint(qwen.mirror(tmp_path)))
    etag = qwen.client.head_object(Bucket=qwen.location.bucket, Key=qwen.location.key(FILE))["ETag"]
    ranged = [asked for asked in qwen.proxy.asked if asked.range]
    assert len(ranged) > 20
    assert {(asked.path, asked.headers["if-match"]) for asked in ranged} == {(qwen.path(FILE), etag)}


def test_a_mirror_holds_files_right_below_the_prefix_only(qwen: Pushed, tmp_path: Path) -> None:
    for name in ("original/consolidated.safetensors", ".hidden", "../escape.json"):
        qwen.overwrite(name, b"x")
    model = qwen.mirror(tmp_path)
    assert not {path.name for path in model.iterdir()} & {"original", ".hidden", "escape.json"}
    assert_same(check_checkpoint(model), qwen.folder)


def test_what_is_no_checkpoint_is_said(qwen: Pushed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(qwen, location=S3Location(qwen.location.bucket, "models"))
    with pytest.raises(CheckpointError, match=r"s3://bucket-\d+/models: there is no object under this prefix"):
        other.mirror(tmp_path)
    other.overwrite("readme.md", b"x")
    with pytest.raises(CheckpointError, match=r"s3://bucket-\d+/models/config\.json: is missing"):
        other.mirror(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such bucket"):
        replace(qwen, location=S3Location("nobodys-bucket", "x")).mirror(tmp_path)
    qwen.proxy.fault = lambda asked: Refuse(403, "AccessDenied")
    with pytest.raises(CheckpointError, match=r"access denied \(AccessDenied\); needed are s3:ListBucket"):
        qwen.mirror(tmp_path)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(CheckpointError, match="no AWS credentials were found"):
        qwen.mirror(tmp_path)


def test_the_config_leads_to_the_mirror(qwen: Pushed, tmp_path: Path) -> None:
    settings = {"source": qwen.location.url(), "cache_dir": tmp_path, "s3": {"endpoint_url": qwen.proxy.url}}
    config = load_config({"model": settings})
    assert config.model.name == "tiny"
    said: list[float] = []
    model = model_folder(config.model, lambda what, fraction: said.append(fraction))
    assert said[-1] == 1
    assert is_relative(model, tmp_path)
    assert json.loads((model / "config.json").read_text()) == open_checkpoint(qwen.folder).config
    whole = model_folder(config.model, whole=True)
    assert whole == model
    assert (model / FILE).read_bytes() == (qwen.folder / FILE).read_bytes()
    assert any(map(is_expert_tensor, open_checkpoint(model).tensors))


def is_relative(path: Path, base: Path) -> bool:
    """Whether `path` lies below `base`."""
    return path.resolve().is_relative_to(base.resolve())
