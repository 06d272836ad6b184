"""Checkpoints on disk: real files, every way in which they can be broken."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints import (
    check_checkpoint,
    checkpoint_revision,
    expert_layout,
    is_expert_tensor,
    open_checkpoint,
)

HIDDEN, VOCAB, LAYERS, EXPERTS, INNER = 8, 16, 3, 4, 6
DENSE_LAYER = 0  # as in DeepSeek's `first_k_dense_replace`
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
Tensors = dict[str, torch.Tensor]


def base_config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
    }


def dense_tensors() -> Tensors:
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(HIDDEN)
        tensors[f"model.layers.{layer}.mlp.shared_expert.up_proj.weight"] = torch.randn(INNER, HIDDEN)
        if layer != DENSE_LAYER:
            tensors[f"model.layers.{layer}.mlp.gate.weight"] = torch.randn(EXPERTS, HIDDEN)
            tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = torch.randn(EXPERTS)
    return tensors


def separate_tensors() -> Tensors:
    tensors = dense_tensors()
    for layer in range(DENSE_LAYER + 1, LAYERS):
        for expert in range(EXPERTS):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors[f"{prefix}.gate_proj.weight"] = torch.randn(INNER, HIDDEN)
            tensors[f"{prefix}.up_proj.weight"] = torch.randn(INNER, HIDDEN)
            tensors[f"{prefix}.down_proj.weight"] = torch.randn(HIDDEN, INNER)
    return tensors


def fused_tensors() -> Tensors:
    tensors = dense_tensors()
    for layer in range(DENSE_LAYER + 1, LAYERS):
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.randn(EXPERTS, HIDDEN, 2 * INNER)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.randn(EXPERTS, INNER, HIDDEN)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj_bias"] = torch.randn(EXPERTS, HIDDEN)
    return tensors


def write_single(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(base_config() if config is None else config))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, tensors: Tensors, files: int = 3, index: bool = True) -> Path:
    write_single(folder, {})
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::files]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    if index:
        write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A folder whose only weights file has this header (object or bytes) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_single(folder, {})
    claimed = len(raw) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + raw + data)
    return folder


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, so that NaN and the 8-bit floats, which torch.equal can't compare, count too."""
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


# ------------------------------------------------------------------------------------------------------------ opening


def test_import_is_light() -> None:
    code = "import sys, expertmesh.platform.checkpoints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_open_reads_no_tensor_data(tmp_path: Path) -> None:
    tensors = separate_tensors()
    checkpoint = open_checkpoint(str(write_single(tmp_path, tensors)))
    assert checkpoint.folder == tmp_path
    assert checkpoint.config == base_config()
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.bytes_read == 0
    info = checkpoint.tensors["model.embed_tokens.weight"]
    assert (info.file, info.dtype, info.shape) == (tmp_path / "model.safetensors", "F32", (VOCAB, HIDDEN))
    stored = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
    assert stored == tensors["model.embed_tokens.weight"].numpy().tobytes()


@pytest.mark.parametrize("index", [True, False])
def test_sharded(tmp_path: Path, index: bool) -> None:
    tensors = separate_tensors()
    checkpoint = open_checkpoint(write_sharded(tmp_path, tensors, index=index))
    assert len({info.file for info in checkpoint.tensors.values()}) == 3
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_index_decides_which_files_count(tmp_path: Path) -> None:
    tensors = separate_tensors()
    write_sharded(tmp_path, tensors)
    save_file(tensors, tmp_path / "consolidated.safetensors")
    assert {info.file.name[:5] for info in open_checkpoint(tmp_path).tensors.values()} == {"model"}


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: can't be read as a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a regular file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "nope", "[1]", '{"a": 1, "a": 2}', "\ufeff{}", "[" * 100_000, "1" * 5000])
def test_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    write_single(tmp_path, {})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: (is not valid JSON|must hold a JSON object)"):
        open_checkpoint(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    write_single(tmp_path, {"a": torch.ones(3), "b": torch.ones(5)})
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
            open_checkpoint(tmp_path)


F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{nope", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"a": {"dtype": "F32"}, "a": {}}', "'a' occurs twice"),
        ([1], "must hold a JSON object"),
        ({"__metadata__": {"format": 1}, "a": F32_PAIR}, "__metadata__ must map strings to strings"),
        ({"a": [1]}, "tensor 'a': its header entry must be an object, not list"),
        ({"a": F32_PAIR | {"dtype": "F4"}}, "tensor 'a': unknown dtype 'F4'"),
        ({"a": F32_PAIR | {"dtype": ["F32"]}}, "tensor 'a': unknown dtype"),
        ({"a": F32_PAIR | {"shape": [-2]}}, "tensor 'a': shape must be"),
        ({"a": F32_PAIR | {"shape": [2.0]}}, "tensor 'a': shape must be"),
        ({"a": F32_PAIR | {"shape": [True, 2]}}, "tensor 'a': shape must be"),
        ({"a": F32_PAIR | {"shape": [1] * 65 + [2]}}, "tensor 'a': shape must be"),
        ({"a": F32_PAIR | {"shape": [10**4000]}}, "tensor 'a': shape must be"),
        ({"a": F32_PAIR | {"shape": 2}}, "tensor 'a': shape must be"),
        ({"a": F32_PAIR | {"shape": [3]}}, "tensor 'a': F32 of shape .3. takes 12 bytes, its offsets give 8"),
        ({"a": F32_PAIR | {"shape": [2**62, 2**62]}}, "tensor 'a': F32 of shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "tensor 'a': data_offsets must be"),
        ({"a": F32_PAIR | {"data_offsets": [8, 0]}}, "tensor 'a': data_offsets must be"),
        ({"a": F32_PAIR | {"data_offsets": [0, 8, 8]}}, "tensor 'a': data_offsets must be"),
        ({"a": F32_PAIR | {"data_offsets": [1, 9]}}, "tensor 'a': ends at byte .* truncated"),
        ({"a": F32_PAIR, "b": F32_PAIR}, "tensor 'b': overlaps"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, "tensor 'a': leaves a hole"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, "4 bytes at the end .* belong to no tensor"),
    ],
)
def test_bad_header(tmp_path: Path, header: object, message: str) -> None:
    write_raw(tmp_path, header, bytes(8))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [90, 100_000_000, 100_000_001, 2**40, 2**64 - 1])
def test_header_length_is_not_believed(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path, b"{}", length=length)
    open_peak = traced_peak(tmp_path)
    assert open_peak < 200_000  # far below the smallest length that would be worth the attempt


def traced_peak(folder: Path) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_index_errors(tmp_path: Path) -> None:
    tensors = separate_tensors()
    write_sharded(tmp_path, tensors)
    good = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    first = next(iter(good.values()))

    write_index(tmp_path, good | {"model.extra.weight": first})
    with pytest.raises(CheckpointError, match=rf"{first}: lacks the tensor 'model\.extra\.weight'"):
        open_checkpoint(tmp_path)
    other = next(file for file in good.values() if file != first)
    write_index(tmp_path, good | {next(iter(good)): other})
    with pytest.raises(CheckpointError, match=rf"{other}: lacks the tensor '{next(iter(good))}'"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, good | {"a": "model-9.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-9\.safetensors: is missing, but .*index\.json names it"):
        open_checkpoint(tmp_path)
    for file in ("../other/model.safetensors", "/model.safetensors", "config.json", 3, None):
        write_index(tmp_path, good | {"a": file})
        with pytest.raises(CheckpointError, match="weight_map puts tensor 'a' into"):
            open_checkpoint(tmp_path)
    not_maps: list[Any] = [{}, [], "x", None]
    for not_a_map in not_maps:
        write_index(tmp_path, not_a_map)
        with pytest.raises(CheckpointError, match=r"index\.json: weight_map must map"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_tensor_in_two_files(tmp_path: Path, index: bool) -> None:
    tensors = separate_tensors()
    write_sharded(tmp_path, tensors, index=index)
    first, last = (tmp_path / f"model-0000{number}-of-00003.safetensors" for number in (1, 3))
    name = next(iter(load_file(first)))
    save_file({name: tensors[name]} | load_file(last), last)
    with pytest.raises(CheckpointError, match=rf"{last.name}: tensor '{name}' is in {first.name} too"):
        open_checkpoint(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), believable=st.booleans())
def test_random_bytes(tmp_path: Path, content: bytes, believable: bool) -> None:
    file = write_single(tmp_path, {}) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content if believable else content)
    try:
        open_checkpoint(tmp_path)
    except CheckpointError:
        return
    load_file(file)  # what we take, the format's own reader takes too


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=3),
    cut=st.integers(0, 40),
    tail=st.binary(max_size=3),
)
def test_damaged_header(tmp_path: Path, flips: list[tuple[int, int]], cut: int, tail: bytes) -> None:
    file = write_single(tmp_path, {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8)}) / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    header_end = 8 + int.from_bytes(damaged[:8], "little")
    for position, bit in flips:
        damaged[position % header_end] ^= 1 << bit
    file.write_bytes(bytes(damaged[: len(damaged) - cut]) + tail)
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(tmp_path)
    except CheckpointError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 500_000
    for name, tensor in load_file(file).items():
        assert same(checkpoint.read(name), tensor)
    assert checkpoint.bytes_read <= file.stat().st_size


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_read_equals_safe_open(tmp_path: Path, dtype: str) -> None:
    bits = torch.randint(0, 256, (5, 3, 2 * 8), dtype=torch.uint8)
    if dtype == "BOOL":
        bits %= 2
    tensor = bits.view(TORCH_DTYPES[dtype])
    shapes = {"whole": tensor, "row": tensor[1, 1].clone(), "scalar": tensor[0, 0, 0].clone(), "none": tensor[:0]}
    checkpoint = open_checkpoint(write_single(tmp_path, shapes))
    expected = load_file(tmp_path / "model.safetensors")
    for name in shapes:
        assert checkpoint.tensors[name].dtype == dtype
        assert same(checkpoint.read(name), expected[name])
    assert checkpoint.bytes_read == checkpoint.total_bytes
    assert same(checkpoint.read_rows("whole", [4, 0]), tensor[[4, 0]])


@pytest.mark.parametrize("rows", [[], [0], [6], [2, 3, 4], [6, 5, 0], [0, 1, 5, 6, 3], [2, 2, 3], range(7)])
def test_read_rows_reads_these_bytes(tmp_path: Path, rows: list[int]) -> None:
    tensor = torch.randn(7, 3, 5)
    checkpoint = open_checkpoint(write_single(tmp_path, {"a": torch.ones(3), "experts": tensor}))
    got = checkpoint.read_rows("experts", rows)
    assert got.shape == (len(rows), 3, 5)
    assert same(got, tensor[list(rows)])
    assert checkpoint.bytes_read == len(rows) * 3 * 5 * 4


def test_neighbouring_rows_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_single(tmp_path, {"experts": torch.randn(9, 16)}))
    reads = []
    real = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(sum(map(len, buffers)))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    checkpoint.read_rows("experts", [1, 2, 3, 7, 5, 6])
    assert sorted(reads) == [64, 2 * 64, 3 * 64]


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(100)
    checkpoint = open_checkpoint(write_single(tmp_path, {"a": tensor}))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    assert same(checkpoint.read("a"), tensor)


def test_read_errors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_single(tmp_path, {"a": torch.randn(4, 2), "s": torch.tensor(1.0)}))
    with pytest.raises(CheckpointError, match="has no tensor 'b'"):
        checkpoint.read("b")
    for row in (-1, 4):
        with pytest.raises(CheckpointError, match=rf"tensor 'a' has no row {row}, allowed: 0\.\.3"):
            checkpoint.read_rows("a", [0, row])
    with pytest.raises(CheckpointError, match="tensor 's' is a scalar"):
        checkpoint.read_rows("s", [0])
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="was longer when it was opened"):
        [checkpoint.read(name) for name in checkpoint.tensors]
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: can't be read"):
        checkpoint.read("a")


def test_counter_is_exact_across_threads(tmp_path: Path) -> None:
    tensor = torch.randn(64, 8)
    checkpoint = open_checkpoint(write_single(tmp_path, {"a": tensor}))
    wrong = []

    def work(seed: int) -> None:
        for row in random.Random(seed).sample(range(64), 50):
            if not same(checkpoint.read_rows("a", [row]), tensor[row : row + 1]):
                wrong.append(row)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert checkpoint.bytes_read == 8 * 50 * 32


def test_revision(tmp_path: Path) -> None:
    tensors = separate_tensors()
    first, copy, sharded = tmp_path / "first", tmp_path / "copy", tmp_path / "sharded"
    revision = checkpoint_revision(open_checkpoint(write_single(first, tensors)))
    assert len(bytes.fromhex(revision)) == 8
    assert checkpoint_revision(open_checkpoint(write_single(copy, tensors))) == revision
    assert checkpoint_revision(open_checkpoint(write_sharded(sharded, tensors))) != revision
    write_single(copy, tensors, base_config() | {"rope_theta": 1.0})
    assert checkpoint_revision(open_checkpoint(copy)) != revision
    write_single(copy, tensors | {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})
    assert checkpoint_revision(open_checkpoint(copy)) != revision


def test_revision_with_samples_tells_trainings_apart(tmp_path: Path) -> None:
    big = torch.randn(64, 1024)
    left = open_checkpoint(write_single(tmp_path / "left", {"a": big}))
    right = open_checkpoint(write_single(tmp_path / "right", {"a": big + 1}))
    assert checkpoint_revision(left, 0) == checkpoint_revision(right, 0)
    assert checkpoint_revision(left, samples_per_file=4) != checkpoint_revision(right, samples_per_file=4)
    assert left.bytes_read == 4 * 4096
    assert checkpoint_revision(left, 4) == checkpoint_revision(open_checkpoint(tmp_path / "left"), 4)
    tiny = open_checkpoint(write_single(tmp_path / "tiny", {"a": torch.ones(3)}))
    assert checkpoint_revision(tiny, 4) == checkpoint_revision(tiny, 1)
    empty = open_checkpoint(write_single(tmp_path / "empty", {}))
    assert checkpoint_revision(empty, 4)


# ------------------------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.experts.0.down_proj.weight", True),
        ("model.layers.1.mlp.experts.down_proj", True),
        ("experts.0.w1", True),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", False),
        ("model.layers.1.mlp.shared_expert.up_proj.weight", False),
        ("model.layers.1.mlp.shared_expert_gate.weight", False),
        ("model.layers.1.mlp.gate.weight", False),
        ("model.layers.1.mlp.router.bias", False),
        ("model.layers.1.mlp.gate.e_score_correction_bias", False),
    ],
)
def test_is_expert_tensor(name: str, expected: bool) -> None:
    assert is_expert_tensor(name) is expected


def test_separate_layout(tmp_path: Path) -> None:
    tensors = separate_tensors()
    layout = expert_layout(open_checkpoint(write_single(tmp_path, tensors)))
    assert (layout.layers, layout.num_experts, layout.fused) == ((1, 2), EXPERTS, False)
    prefix = "model.layers.2.mlp.experts.3"
    assert layout.names(2, 3) == tuple(f"{prefix}.{kind}_proj.weight" for kind in ("down", "gate", "up"))
    assert layout.expert_bytes(2, 3) == 3 * INNER * HIDDEN * 4
    of_experts = {name for name in tensors if layout.is_expert(name)}
    assert of_experts == {name for layer in layout.layers for e in range(EXPERTS) for name in layout.names(layer, e)}
    assert layout.total_expert_bytes == sum(tensors[name].nbytes for name in of_experts)


def test_fused_layout(tmp_path: Path) -> None:
    tensors = fused_tensors()
    layout = expert_layout(open_checkpoint(write_single(tmp_path, tensors)))
    assert (layout.layers, layout.num_experts, layout.fused) == ((1, 2), EXPERTS, True)
    prefix = "model.layers.1.mlp.experts"
    assert layout.names(1, 0) == (f"{prefix}.down_proj", f"{prefix}.down_proj_bias", f"{prefix}.gate_up_proj")
    assert layout.expert_bytes(1, 3) == (3 * INNER * HIDDEN + HIDDEN) * 4
    assert layout.total_expert_bytes == sum(tensors[name].nbytes for name in tensors if is_expert_tensor(name))


def test_layout_refuses_what_is_not_there(tmp_path: Path) -> None:
    layout = expert_layout(open_checkpoint(write_single(tmp_path, separate_tensors())))
    for question in (layout.names, layout.expert_bytes):
        with pytest.raises(CheckpointError, match=r"layer 0 has no routed experts; the layers \[1, 2\] do"):
            question(0, 0)
        with pytest.raises(CheckpointError, match=r"layer 1 has no expert 4, allowed: 0\.\.3"):
            question(1, 4)


@pytest.mark.parametrize("key", ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"])
@pytest.mark.parametrize("nested", [False, True])
def test_expert_count_keys(tmp_path: Path, key: str, nested: bool) -> None:
    config = base_config()
    del config["num_experts"]
    if nested:
        tensors = {f"model.language_{name}": tensor for name, tensor in separate_tensors().items()}
        config = {"architectures": config.pop("architectures"), "text_config": config | {key: EXPERTS}}
    else:
        tensors = separate_tensors()
        config[key] = EXPERTS
    checkpoint = check_checkpoint(write_single(tmp_path, tensors, config))
    assert expert_layout(checkpoint).num_experts == EXPERTS


@pytest.mark.parametrize("count", [None, 0])
def test_dense_layout(tmp_path: Path, count: int | None) -> None:
    tensors = {name: tensor for name, tensor in dense_tensors().items() if ".gate." not in name}
    layout = expert_layout(open_checkpoint(write_single(tmp_path, tensors, base_config() | {"num_experts": count})))
    assert (layout.layers, layout.num_experts, layout.total_expert_bytes) == ((), 0, 0)


def test_prediction_heads_beyond_the_layers_are_left_out(tmp_path: Path) -> None:
    tensors = separate_tensors()
    tensors[f"model.layers.{LAYERS}.mlp.experts.0.up_proj.weight"] = torch.randn(INNER, HIDDEN)
    tensors[f"model.layers.{LAYERS}.mlp.gate.weight"] = torch.randn(EXPERTS, HIDDEN)
    assert expert_layout(check_checkpoint(write_single(tmp_path, tensors))).layers == (1, 2)


def without(tensors: Tensors, part: str) -> Tensors:
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    return kept


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


SIBLING = "model.layers.1.mlp.experts.2.up_proj.weight"
FUSED = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(separate_tensors(), SIBLING), f"layer 1: expert 2 lacks the tensor '{SIBLING}'"),
        (without(separate_tensors(), "layers.1.mlp.experts.3."), "layer 1 lacks expert 3 of the 4"),
        (without(separate_tensors(), "layers.1.mlp.experts."), "layer 1 has the router .* no tensor of an expert"),
        (without(separate_tensors(), "experts."), "config.json names 4 experts, no tensor holds any"),
        (
            {n: t for n, t in separate_tensors().items() if not ("layers.2.mlp.experts" in n and "up_proj" in n)},
            "layer 2 lacks the expert tensor .*up_proj.weight', layer 1 has it",
        ),
        (renamed(separate_tensors(), "layers.2.mlp.experts.3.", "layers.2.mlp.experts.9."), "lacks expert 3"),
        (
            separate_tensors() | {"model.layers.2.mlp.experts.4.up_proj.weight": torch.ones(INNER, HIDDEN)},
            "layer 2 has an expert 4",
        ),
        (separate_tensors() | {SIBLING: torch.ones(INNER + 1, HIDDEN)}, rf"'{SIBLING}' is F32 \[7, 8\], but"),
        (separate_tensors() | {SIBLING: torch.ones(INNER, HIDDEN).half()}, rf"'{SIBLING}' is F16 \[6, 8\], but"),
        (fused_tensors() | {FUSED: torch.ones(EXPERTS - 1, INNER, HIDDEN)}, f"'{FUSED}' has shape .* 4 experts"),
        (fused_tensors() | {FUSED: torch.tensor(1.0)}, f"'{FUSED}' has shape .* 4 experts"),
        (without(fused_tensors(), "layers.2.mlp.experts.down_proj_bias"), "layer 2 lacks .*down_proj_bias"),
        (
            without(separate_tensors(), "layers.1.mlp.experts") | {FUSED: torch.ones(EXPERTS, 2)},
            "experts are fused in layer 1 and separate in layer 2",
        ),
        (separate_tensors() | {FUSED: torch.ones(EXPERTS, 2)}, "experts are fused in layer 1 and separate in"),
        (separate_tensors() | {"model.experts.0.up": torch.ones(1)}, r"'model\.experts\.0\.up' is an expert's but"),
        (separate_tensors() | {f"model.layers.{'9' * 5000}.experts.0.up": torch.ones(1)}, "is an expert's but"),
        (renamed(separate_tensors(), ".experts.2.", ".experts.02."), "experts are fused in layer 1 and separate"),
    ],
)
def test_experts_that_are_not_as_promised(tmp_path: Path, tensors: Tensors, message: str) -> None:
    checkpoint = open_checkpoint(write_single(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=message):
        expert_layout(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "config.json names no number of them"),
        ({"num_experts": 5}, "lacks expert 4 of the 5"),
        ({"num_experts": 3}, "has an expert 3, config.json names 3"),
        ({"num_experts": "4"}, "num_experts must be an integer >= 0"),
        ({"num_experts": True}, "num_experts must be an integer >= 0"),
        ({"n_routed_experts": 8}, "different numbers of experts"),
    ],
)
def test_expert_counts_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    checkpoint = open_checkpoint(write_single(tmp_path, separate_tensors(), base_config() | change))
    with pytest.raises(CheckpointError, match=message):
        expert_layout(checkpoint)


def test_quantised_layers_may_differ(tmp_path: Path) -> None:
    tensors = separate_tensors()
    for expert in range(EXPERTS):
        tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight_scale"] = torch.tensor(1.0)
    config = base_config() | {"quantization_config": {"quant_method": "fp8"}}
    layout = expert_layout(open_checkpoint(write_single(tmp_path, tensors, config)))
    assert layout.expert_bytes(1, 0) == layout.expert_bytes(2, 0) + 4


# ------------------------------------------------------------------------------------------------------------- sanity


def test_check_accepts_both_namings(tmp_path: Path) -> None:
    assert check_checkpoint(write_single(tmp_path / "a", separate_tensors())).bytes_read == 0
    assert check_checkpoint(write_single(tmp_path / "b", fused_tensors())).bytes_read == 0
    dense = {name: tensor for name, tensor in dense_tensors().items() if ".gate." not in name}
    assert check_checkpoint(write_single(tmp_path / "c", dense, base_config() | {"num_experts": None}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": None}, "architectures must be a list"),
        ({"architectures": []}, "architectures must be a list"),
        ({"architectures": "Qwen3MoeForCausalLM"}, "architectures must be a list"),
        ({"hidden_size": 16}, r"tensor '.*' has shape \[.*8\], config.json says .*hidden_size\] = \[.*16\]"),
        ({"vocab_size": 17}, r"'model\.embed_tokens\.weight' has shape \[16, 8\].* = \[17, 8\]"),
        ({"hidden_size": None}, "hidden_size must be an integer > 0, not None"),
        ({"num_hidden_layers": LAYERS + 1}, "no tensor of layer 3, config.json says num_hidden_layers = 4"),
        ({"num_hidden_layers": 10**15}, "no tensor of layer 3"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be an integer > 0, not '3'"),
    ],
)
def test_check_refuses_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_single(tmp_path, separate_tensors(), base_config() | change)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(tmp_path)


def test_check_wants_every_layer(tmp_path: Path) -> None:
    write_single(tmp_path, without(separate_tensors(), f"layers.{DENSE_LAYER}."))
    with pytest.raises(CheckpointError, match=f"no tensor of layer {DENSE_LAYER}"):
        check_checkpoint(tmp_path)


def test_check_wants_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = write_single(tmp_path, separate_tensors()) / "tokenizer.json"
    tokenizer.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        check_checkpoint(tmp_path)
    for name in ("tokenizer.model", "qwen.tiktoken", "vocab.json"):
        (tmp_path / name).write_text("x")
        check_checkpoint(tmp_path)
        (tmp_path / name).unlink()
