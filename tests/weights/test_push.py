"""`expertmesh push` and the way back as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.s3 import Cut, Proxy, Refuse, s3_client
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.platform.checkpoints import open_checkpoint
from expertmesh.platform.cli import app
from expertmesh.platform.weights.mirror import open_files
from expertmesh.platform.weights.s3_location import S3Location
from expertmesh.platform.weights.whole import download
from tests.weights.conftest import Pushed
from tests.weights.test_mirror import FILE, assert_same, parts_of


@pytest.fixture
def folder(family: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that the test may change."""
    return Path(shutil.copytree(family("qwen3_moe"), tmp_path / "tiny"))


def run(folder: Path, target: str, proxy: Proxy) -> str:
    """What the command prints. Raises what it raises."""
    result = CliRunner().invoke(app, ["push", str(folder), target, "--endpoint-url", proxy.url])
    if result.exception is not None:
        raise result.exception
    return result.stdout.strip()


@pytest.fixture
def bucket(s3_url: str, request: pytest.FixtureRequest) -> str:
    """An empty bucket, named after the test."""
    name = request.node.name.replace("_", "-")[:60].strip("-")
    s3_client(s3_url).create_bucket(Bucket=name)
    return str(name)


def test_a_checkpoint_goes_up_and_a_second_time_nothing_does(
    folder: Path, bucket: str, proxy: Proxy, s3_url: str, tmp_path: Path
) -> None:
    (folder / ".hidden").write_text("x")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    small = [path.name for path in folder.iterdir() if path.suffix not in (".safetensors", ".bin", "")]
    size = sum((folder / name).stat().st_size for name in [*small, FILE])
    target = f"s3://{bucket}/models/tiny"
    assert (
        run(folder, target, proxy) == f"{target}: {len(small) + 1} files uploaded ({size} bytes), 0 were there already"
    )
    puts = [asked.path.removeprefix(f"/{bucket}/models/tiny/") for asked in proxy.asked if asked.method == "PUT"]
    assert (puts[0], puts[-1]) == (FILE, "config.json")
    assert sorted(puts) == sorted([FILE, *small])
    entries = s3_client(s3_url).list_objects_v2(Bucket=bucket)["Contents"]
    assert {entry["StorageClass"] for entry in entries} == {"INTELLIGENT_TIERING"}
    assert all(entry["ChecksumAlgorithm"] == ["CRC32"] for entry in entries)
    proxy.reset()
    assert run(folder, target + "/", proxy).endswith(f"0 files uploaded (0 bytes), {len(small) + 1} were there already")
    assert not any(asked.method == "PUT" for asked in proxy.asked)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert run(folder, target, proxy).endswith(f"1 files uploaded (14 bytes), {len(small)} were there already")


def test_large_files_go_in_parts_and_come_back_whole(
    folder: Path, pushed: Callable[[Path], Pushed], tmp_path: Path
) -> None:
    tensors = load_file(folder / FILE)
    tensors["long"] = torch.randint(-(2**62), 2**62, (9, 1 << 20))  # 72 MiB
    save_file(tensors, folder / FILE)
    there = pushed(folder)
    head = there.client.head_object(Bucket=there.location.bucket, Key=there.location.key(FILE), ChecksumMode="ENABLED")
    assert head["ETag"].endswith('-2"')
    assert head["ChecksumType"] == "FULL_OBJECT"
    model = there.mirror(tmp_path / "cache")
    said: list[float] = []
    there.proxy.fault = lambda asked: Cut(5 << 20) if asked.range and asked.number == 0 else None
    download(model, lambda what, fraction: said.append(fraction))
    assert said == sorted(said)
    assert said[-1] == 1
    assert (model / FILE).read_bytes() == (folder / FILE).read_bytes()
    header = open_checkpoint(folder).files[0].data_offset  # fetched twice: by the mirror, and as part of the whole
    assert there.proxy.sent[there.path(FILE)] == (folder / FILE).stat().st_size + header


def test_a_download_that_was_interrupted_goes_on(gpt_oss: Pushed, tmp_path: Path) -> None:
    model = gpt_oss.mirror(tmp_path)
    gpt_oss.proxy.fault = lambda asked: Refuse() if asked.path == gpt_oss.path(FILE) else None
    with pytest.raises(CheckpointError, match=f"{FILE}: bytes 0-.*given up after 3"):
        download(model)
    assert not (model / FILE).is_symlink()
    gpt_oss.proxy.reset()
    download(model)
    original = (gpt_oss.folder / FILE).read_bytes()
    assert (model / FILE).read_bytes() == original
    assert download(model).bytes_fetched == 0
    raw = bytearray(original)
    raw[100] ^= 255
    parts_of(model).write_bytes(bytes(raw))
    assert download(model).bytes_fetched == len(original)  # one part
    assert (model / FILE).read_bytes() == original
    assert_same(open_checkpoint(model), gpt_oss.folder)


def test_a_file_whose_checksum_differs_is_not_used(qwen: Pushed, tmp_path: Path) -> None:
    raw = (qwen.folder / FILE).read_bytes()
    qwen.client.put_object(
        Bucket=qwen.location.bucket,
        Key=qwen.location.key(FILE),
        Body=raw,
        ChecksumAlgorithm="CRC32",
        ChecksumCRC32="AAAAAA==",  # moto takes the client's word for it
    )
    model = qwen.mirror(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{FILE}: CRC-32 is [\w+/]{{6}}==, S3 keeps AAAAAA=="):
        download(model)
    assert not (model / FILE).is_symlink()


def test_a_plain_folder_is_nobodys_mirror(folder: Path) -> None:
    assert open_files(folder).bytes_fetched == 0
    with pytest.raises(CheckpointError, match="is not the mirror of a checkpoint in S3"):
        download(folder)


def test_a_broken_checkpoint_is_refused_before_anything_is_sent(folder: Path, bucket: str, proxy: Proxy) -> None:
    with (folder / FILE).open("r+b") as file:
        file.truncate((folder / FILE).stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        run(folder, f"s3://{bucket}/x", proxy)
    assert not proxy.asked


def test_another_checkpoints_files_are_not_mixed_in(folder: Path, bucket: str, proxy: Proxy, s3_url: str) -> None:
    name = "x/model-00001-of-00002.safetensors"
    s3_client(s3_url).put_object(Bucket=bucket, Key=name, Body=b"x")
    with pytest.raises(CheckpointError, match=rf"s3://.*/{name}: is there, but the folder has no such file"):
        run(folder, f"s3://{bucket}/x", proxy)
    assert not any(asked.method == "PUT" for asked in proxy.asked)


def test_what_s3_refuses_once_is_sent_again(folder: Path, bucket: str, proxy: Proxy, s3_url: str) -> None:
    proxy.fault = lambda asked: Refuse() if asked.number == 0 and asked.path.endswith(FILE) else None
    run(folder, f"s3://{bucket}/x", proxy)
    found = s3_client(s3_url).get_object(Bucket=bucket, Key=f"x/{FILE}")["Body"].read()
    assert found == (folder / FILE).read_bytes()


def test_what_s3_does_not_allow_is_said(folder: Path, bucket: str, proxy: Proxy) -> None:
    with pytest.raises(CheckpointError, match=r"s3://no-such-bucket/x: there is no such bucket"):
        run(folder, "s3://no-such-bucket/x", proxy)
    proxy.fault = lambda asked: Refuse(403, "AccessDenied") if asked.method == "PUT" else None
    with pytest.raises(CheckpointError, match=rf"s3://{bucket}/x/{FILE}: .*AccessDenied"):
        run(folder, f"s3://{bucket}/x", proxy)


@pytest.mark.parametrize(
    "url", ["s3://", "s3://b", "s3://Bucket/x", "s3://bucket/../x", "s3://bucket//x", "http://b/x"]
)
def test_what_is_no_place_in_s3_is_said(url: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form s3://bucket/prefix"):
        S3Location.parse(url)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://my.bucket-1/a/b/", "s3://bucket/a b"])
def test_places_in_s3(url: str) -> None:
    location = S3Location.parse(url)
    assert location.url("x").startswith(url.rstrip("/"))
    assert location.key("x") == f"{location.prefix}/x".removeprefix("/")
