"""The configuration: what is read, what is refused and how, secrets, the documentation, and `expertmesh config`."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expertmesh.errors import ConfigError
from expertmesh.platform.config import (
    DEMO,
    SECRET_ENV,
    AttentionAutoscaling,
    MeshConfig,
    ModelConfig,
    cluster_secret,
    config_schema,
    configuration_markdown,
    load_config,
    parse_changes,
)
from expertmesh.platform.config import schema as schemas
from expertmesh.platform.config.markdown import EXAMPLE
from expertmesh.platform.config.secret import looks_like_secret
from tests.support.command import Done, expertmesh

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = config_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SECTIONS: dict[str, dict[str, Any]] = {
    name: schemas.properties(SCHEMA, node) for name, node in SCHEMA["properties"].items()
}
CANARY = "hunter2-is-no-good-password"

WriteYaml = Callable[[str], Path]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(text: str) -> Path:
        path = tmp_path / "mesh.yaml"
        path.write_text(text)
        return path

    return write


def problems(source: str | Path | Mapping[str, Any] | None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value).splitlines()


def nested(path: str, value: object) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


# --- what is read ---


def test_nothing_demo_and_an_empty_file_are_the_defaults(write_yaml: WriteYaml) -> None:
    defaults = MeshConfig()
    assert load_config(None) == load_config(DEMO) == load_config({}) == load_config(write_yaml("# later\n")) == defaults
    assert defaults.model.name == DEMO
    assert (defaults.experts.shards, defaults.attention.replicas, defaults.kv_store.url) == (2, 1, "off")


def test_a_checkpoint_folder_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some-moe"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    for source in (folder, str(folder), "some-moe", Path("some-moe"), {"model": "./some-moe"}, {"model": folder}):
        config = load_config(source)
        assert (config.model.source, config.model.name) == (str(folder), "some-moe")
    assert config.with_changes({"model.served_name": "mine"}).model.name == "mine"


def test_a_folder_called_demo_is_reached_by_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").model.source == DEMO
    for source in ("./demo", Path("demo"), {"model": "./demo"}, {"model": Path("demo")}):
        assert load_config(source).model.source == str(tmp_path / "demo")


def test_relative_paths_count_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs" / "ckpt"
    folder.mkdir(parents=True)
    file = tmp_path / "configs" / "mesh.yaml"
    file.write_text("model: {source: ckpt, cache_dir: ../cache}\nrouting: {secret_file: ~/secret}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config("configs/mesh.yaml")
    assert config.model.source == str(folder)
    assert config.model.cache_dir == tmp_path / "cache"
    assert config.routing.secret_file == Path("/home/somebody/secret")
    assert config.with_changes({"model.cache_dir": "here"}).model.cache_dir == tmp_path / "here"


def test_yaml_as_people_write_it(write_yaml: WriteYaml) -> None:
    config = load_config(write_yaml("kv_store: {url: off}\nattention: {gpus: 1e0, cpus: 2, compile: on}\n"))
    assert config.kv_store.url == "off"
    assert (config.attention.gpus, config.attention.cpus, config.attention.compile) == (1.0, 2.0, True)
    shared = "attention: &base {cpus: 2, threads: 3}\nexperts: {<<: *base, threads: 1}\n"
    assert load_config(write_yaml(shared)).experts.threads == 1


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXPERTMESH_CACHE", str(tmp_path))
    assert ModelConfig().resolved_cache_dir == tmp_path
    assert ModelConfig(cache_dir=Path("/elsewhere")).resolved_cache_dir == Path("/elsewhere")
    monkeypatch.delenv("EXPERTMESH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelConfig().resolved_cache_dir == tmp_path / ".cache" / "expertmesh"


def test_frozen() -> None:
    config = load_config(None)
    with pytest.raises(ValidationError, match="frozen"):
        config.experts.shards = 3  # type: ignore[misc]


def test_colocated_ignores_how_the_other_expert_fields_fit() -> None:
    config = load_config({"experts": {"mode": "colocated", "redundancy": 5, "heartbeat_interval_s": 60}})
    assert config.experts.redundancy == 5


# --- what is refused, and how ---

IAM = {"cache_name": "c", "region": "r"}
BAD_VALUES: list[tuple[str, object, str]] = [
    ("attention.replicas", 0, "0 is below the minimum 1"),
    ("attention.replicas", "2", "'2' is text; allowed: integer >= 1"),
    ("attention.replicas", True, "true is a boolean; allowed: integer >= 1"),
    ("attention.replicas", 2.0, "2.0 is a number; allowed: integer >= 1"),
    ("attention.cpus", False, "false is a boolean; allowed: number >= 0"),
    ("attention.kv_cache_gib", float("inf"), "inf can't be used; allowed: number > 0 or null (GiB)"),
    ("attention.kv_cache_gib", 0, "0 is not above 0"),
    ("attention.compile", "on", "'on' is text; allowed: true or false"),
    ("attention.max_num_batched_tokens", 63, "63 is less than attention.max_num_seqs (64)"),
    ("attention.resources", {"GPU": 1}, "use gpus beside resources"),
    ("attention.resources", {"disk": -1}, "-1 is below the minimum 0"),
    ("attention.engine_args", {"max-logprobs": 1}, "did you mean 'max_logprobs'?"),
    ("experts.redundancy", 3, "3 copies of each expert need as many shards; experts.shards is 2"),
    ("experts.heartbeat_timeout_s", 1, "1 must be more than experts.heartbeat_interval_s (1)"),
    ("experts", None, "is empty; write its keys below it, or leave the line out"),
    ("experts", [], "a list is not a section; allowed: the keys mode, shards"),
    ("routing.transport", "tpc", "'tpc' is not one of auto, unix, tcp; did you mean 'tcp'?"),
    ("routing.bind_host", "0.0.0.0:80", "is not an IP address or host name (without a port)"),
    ("kv_store.url", "redis://:pw/x@host/0", "holds a user or password; use kv_store.username and kv_store.password_f"),
    ("kv_store.url", "http://host", "is none of off, embedded, redis://HOST[:PORT]"),
    ("kv_store.url", "redis://host/3", "is none of off, embedded, redis://HOST[:PORT]"),
    ("kv_store", {"url": "embedded", "username": "x"}, "the embedded server has no users"),
    ("kv_store", {"url": "redis://host", "ca_file": "ca.pem"}, "ca_file: is for rediss:// only"),
    ("kv_store", {"url": "redis://host", "iam": IAM}, "iam: IAM authentication needs TLS: use rediss://"),
    ("kv_store", {"url": "rediss://host", "iam": IAM}, "iam: IAM authentication needs kv_store.username"),
    ("autoscaling.attention", {"min_replicas": 1}, "is missing; allowed: integer >= 1"),
    (
        "autoscaling.attention",
        {"min_replicas": 3, "max_replicas": 2},
        "2 is below autoscaling.attention.min_replicas (3)",
    ),
    (
        "autoscaling.experts",
        {"min_shards": 3, "max_shards": 2},
        "2 is below autoscaling.experts.min_shards (3)",
    ),
    ("telemetry.traces_sample", 1.5, "1.5 is above the maximum 1"),
    (
        "telemetry.traces_endpoint",
        "http://collector",
        "'http://collector' is not the address of an OTLP collector; allowed: "
        "http(s)://host:port[/path], grpc(s)://host:port",
    ),
    ("ingress.port", 70000, "70000 is above the maximum 65535"),
    ("model", 3, "3 is not a section; allowed: text or the keys source"),
    (
        "model.source",
        "/nowhere/at/all",
        "'/nowhere/at/all' does not exist; allowed: 'demo', an existing checkpoint folder, or s3://",
    ),
    ("model.served_name", "", "is empty; allowed: text or null"),
]


@pytest.mark.parametrize(("path", "value", "said"), BAD_VALUES)
def test_a_bad_value_is_refused_with_its_path_and_what_is_allowed(path: str, value: object, said: str) -> None:
    [line] = problems(nested(path, value))
    assert line.startswith(path)
    assert said in line


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("experts.redundency", "did you mean 'redundancy'? allowed: mode, shards, redundancy"),
        ("expert", "did you mean 'experts'? allowed: model, attention, experts"),
        ("shards", "did you mean 'experts.shards'?"),
        ("autoscaling.attention.max", "allowed: min_replicas, max_replicas"),
    ],
)
def test_a_close_key_is_suggested(path: str, said: str) -> None:
    assert any(line.startswith(f"{path}: unknown key; ") and said in line for line in problems(nested(path, 1)))


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("model", "model.source"),
        ("served_model_name", "model.served_name"),
        ("dtype", "model.dtype"),
        ("max_model_len", "model.max_model_len"),
        ("load_format", "experts.mode"),
        ("additional_config", "experts.mode"),
        ("enforce_eager", "attention.compile"),
        ("max_num_seqs", "attention.max_num_seqs"),
        ("max_num_batched_tokens", "attention.max_num_batched_tokens"),
        ("enable_prefix_caching", "attention.prefix_caching"),
        ("tensor_parallel_size", "only 1 is supported so far"),
        ("pipeline_parallel_size", "only 1 is supported so far"),
        ("data_parallel_size", "attention.replicas"),
        ("enable_expert_parallel", "experts.shards"),
        ("enable_eplb", "experts.redundancy"),
    ],
)
def test_engine_arguments_of_the_mesh_are_refused(key: str, owner: str) -> None:
    [line] = problems({"attention": {"engine_args": {"tokenizer": "x", key: 1}}})
    assert line.startswith(f"attention.engine_args.{key}: the mesh sets this engine argument; ")
    assert owner in line
    assert not list(VALIDATOR.iter_errors(nested("attention.engine_args.tokenizer", "x")))
    assert list(VALIDATOR.iter_errors(nested(f"attention.engine_args.{key}", 1)))


def test_engine_arguments_may_be_any_json_and_nothing_else() -> None:
    value = {"a": [1, 2.5, None, {"b": True}], "eos_token": "</s>"}
    assert load_config(nested("attention.engine_args.hf_overrides", value)).attention.engine_args == {
        "hf_overrides": value
    }
    [line] = problems(nested("attention.engine_args.x", {"a": [{"b": {1}}]}))
    assert line == "attention.engine_args.x: a set can't be used; allowed: any JSON value"


def test_all_problems_come_at_once() -> None:
    lines = problems({"attention": {"replicas": 0}, "experts": {"shard": 1}, "ingress": {"port": 0}, "x": 1, 3: 4})
    assert [line.split(":")[0] for line in lines] == ["attention.replicas", "experts.shard", "ingress.port", "x", "3"]
    many = problems({f"key{number}": 1 for number in range(200)})
    assert (len(many), many[-1]) == (51, "and 150 more problems")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "line 1, column 6: while parsing a flow sequence, expected ',' or ']'"),
        ("model: demo\n\tx: 1", "line 2, column 1: while scanning"),
        ("model: demo\nmodel: demo", "line 2, column 1: the key model is there twice, first on line 1"),
        ("experts: {shards: 1, shards: 1}", "line 1, column 22: the key shards is there twice, first on line 1"),
        ("x: !!python/object/apply:os.system [ls]", "line 1, column 4: could not determine a constructor"),
        ("x: 2026-13-45", "line 1, column 4: this can't be read as timestamp; is it text that needs quotes?"),
        ("x: !!bool maybe", "line 1, column 4: this can't be read as bool"),
        ("--- {}\n--- {}", "line 2, column 1: expected a single document"),
        ("? [a]\n: 1", "line 1, column 3: while constructing a mapping, found unhashable key"),
        ("x: 'a\x01'", "character 6: special characters are not allowed"),
        ("[" * 5000, "nested too deeply"),
        ("- 1", "the top level is a list; allowed: a mapping of sections"),
    ],
)
def test_yaml_that_cannot_be_read_names_file_line_and_column(write_yaml: WriteYaml, text: str, said: str) -> None:
    path = write_yaml(text)
    [line] = problems(path)
    assert line.startswith(f"{path}: {said}")


def test_other_libraries_do_not_change_what_is_read(write_yaml: WriteYaml) -> None:
    """lm-format-enforcer makes text of timestamps in all of PyYAML's safe loaders when it is imported."""
    tag = "tag:yaml.org,2002:timestamp"
    constructors = yaml.SafeLoader.yaml_constructors
    before = constructors[tag]
    constructors[tag] = constructors["tag:yaml.org,2002:str"]
    try:
        [line] = problems(write_yaml("x: 2026-13-45"))
    finally:
        constructors[tag] = before
    assert "this can't be read as timestamp" in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "mesh.yaml"
    assert problems(missing) == [
        f"{missing}: does not exist; allowed: a YAML file, a checkpoint folder, s3://..., or 'demo'"
    ]
    binary = tmp_path / "binary"
    binary.write_bytes(b"model: \xff")
    assert problems(binary) == [f"{binary}: byte 8 is not UTF-8"]
    large = tmp_path / "large"
    large.write_bytes(b"#" * (1 << 21))
    assert "larger than" in problems(large)[0]
    assert "can't be read" in problems("a\0b")[0]
    assert "a file; allowed" in problems({"model": str(large)})[0]


@pytest.mark.parametrize(
    "text",
    [
        "x: &a {b: *a}",
        "a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]",
    ],
)
def test_yaml_that_grows_without_bound_is_refused(write_yaml: WriteYaml, text: str) -> None:
    [line] = problems(write_yaml(text))
    assert "refers to itself or is too large" in line


# --- secrets in the configuration ---


@pytest.mark.parametrize(
    "path",
    [
        "secret",
        "routing.secret",
        "routing.password",
        "ingress.api_key",
        "ingress.apiKey",
        "ingress.token",
        "model.hf_token",
        "attention.engine_args.hf_token",
        "attention.engine_args.hf_overrides.aws.secret_access_key",
    ],
)
def test_secrets_are_refused_and_never_shown(path: str) -> None:
    lines = problems(nested(path, CANARY))
    [line] = [line for line in lines if line.startswith(f"{path}: a secret does not belong")]
    assert "routing.secret_file" in line
    assert SECRET_ENV in line
    assert CANARY not in "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        f"password: *{CANARY}",
        f"password: !{CANARY} x",
        f"password: '{CANARY}\n  x: [",
        f"password: %{CANARY}\n- {CANARY}",
        f"{CANARY}",
        f"routing: {{secret_file: [{CANARY}]}}",
        f"routing: {{secret_file: {{value: {CANARY}}}}}",
        f"kv_store: {{url: 'redis://user:{CANARY}@host'}}",
    ],
)
def test_yaml_errors_do_not_show_what_stands_there(write_yaml: WriteYaml, text: str) -> None:
    assert CANARY not in "\n".join(problems(write_yaml(text)))


def test_python_errors_do_not_show_values() -> None:
    with pytest.raises(ValidationError) as caught:
        MeshConfig.model_validate({"routing": {"password": CANARY}})
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["max_num_batched_tokens", "tokenizer", "pad_token", "long_prefill_token_threshold", "keys", "monkey", "", "_"],
)
def test_ordinary_keys_do_not_look_like_secrets(key: str) -> None:
    assert not looks_like_secret(key)


def test_no_known_key_looks_like_a_secret_but_the_one_that_names_the_file() -> None:
    found = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys if looks_like_secret(key)]
    assert found == ["routing.secret_file", "kv_store.password_file"]


# --- the cluster's secret ---


def test_secret_from_file_before_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cluster"
    file.write_bytes(b"0123456789abcdef\r\n")
    file.chmod(0o640)
    monkeypatch.setenv(SECRET_ENV, "an environment's secret")
    assert cluster_secret(load_config({"routing": {"secret_file": file}}), tmp_path) == b"0123456789abcdef"
    assert cluster_secret(load_config(None), tmp_path) == b"an environment's secret"
    assert not (tmp_path / "secret").exists()


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644, 0o601])
def test_a_secret_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "cluster"
    file.write_text(CANARY)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=f"routing.secret_file: .*mode {mode:04o}.*chmod 600 {file}") as caught:
        cluster_secret(load_config({"routing": {"secret_file": file}}))
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "0 bytes"), (b"0123456789abcde\n", "15 bytes"), (b"x" * 5000, "more than 4096 bytes")]
)
def test_a_secret_of_the_wrong_length_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    file.chmod(0o600)
    monkeypatch.delenv(SECRET_ENV, raising=False)
    for ask in (
        lambda: cluster_secret(load_config({"routing": {"secret_file": file}})),
        lambda: cluster_secret(load_config(None), tmp_path),
    ):
        with pytest.raises(ConfigError, match=f"{said}; allowed: 16 to 4096"):
            ask()
    monkeypatch.setenv(SECRET_ENV, content.decode())
    with pytest.raises(ConfigError, match=f"{SECRET_ENV}: the secret has {said}"):
        cluster_secret(load_config(None), tmp_path)


def test_secret_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, said in (("missing", "No such file"), ("pipe", "not a regular file"), ("", "not a regular file")):
        with pytest.raises(ConfigError, match=f"routing.secret_file: .*{said}"):
            cluster_secret(load_config({"routing": {"secret_file": tmp_path / name}}))


def test_no_secret_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SECRET_ENV, raising=False)
    with pytest.raises(ConfigError, match=f"routing.secret_file, or set {SECRET_ENV}"):
        cluster_secret(load_config(None))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cluster secret: can't make"):
        cluster_secret(load_config(None), tmp_path / "file")


def test_a_secret_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_ENV, raising=False)
    folder = tmp_path / "new" / "cache"
    made = cluster_secret(load_config(None), folder)
    assert len(bytes.fromhex(made.decode())) == 32
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert [entry.name for entry in folder.iterdir()] == ["secret"]
    assert cluster_secret(load_config(None), folder) == made
    assert cluster_secret(load_config(None), tmp_path / "other") != made


def test_processes_that_race_get_one_secret(tmp_path: Path) -> None:
    # Each waits at a pipe until all have imported, so that they start together.
    program = (
        "import sys, pathlib; from expertmesh.platform.config import cluster_secret, load_config;"
        "config = load_config(None);"
        "print('ready', flush=True); sys.stdin.readline();"
        "print(cluster_secret(config, pathlib.Path(sys.argv[1])).decode())"
    )
    environment = {key: value for key, value in os.environ.items() if key != SECRET_ENV}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(6)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        found = {racer.communicate(timeout=60)[0] for racer in racers}
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert found == {(tmp_path / "secret").read_text()}
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


# --- changes ---


def test_changes() -> None:
    config = load_config({"model": {"dtype": "bfloat16"}, "attention": {"resources": {"a": 1}}})
    changed = config.with_changes(
        {
            "experts.shards": 3,
            "experts.redundancy": 3,
            "model": "demo",
            "autoscaling.attention.min_replicas": 1,
            "autoscaling.attention.max_replicas": 2,
            "attention.resources.b": 2,
        }
    )
    assert (changed.experts.shards, changed.model.dtype) == (3, "bfloat16")
    assert changed.autoscaling.attention == AttentionAutoscaling(min_replicas=1, max_replicas=2)
    assert changed.attention.resources == {"a": 1, "b": 2}
    assert (config.experts.shards, config.attention.resources) == (2, {"a": 1})
    assert config.with_changes({}) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts.shard": 3}, "experts.shard: unknown key; did you mean 'shards'?"),
        ({"experts.redundancy": 3}, "experts.redundancy: 3 copies"),
        ({"experts.shards.x": 3}, "experts.shards.x: experts.shards is 2, which has no keys below it"),
        ({"experts..shards": 3}, "'experts..shards' is not a dotted path"),
        ({"model": "/nowhere"}, "model.source: '/nowhere' does not exist"),
        ({"routing.secret": CANARY}, "routing.secret: a secret does not belong"),
    ],
)
def test_changes_are_validated(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None).with_changes(changes)
    assert str(caught.value).startswith(said)
    assert CANARY not in str(caught.value)


def test_changes_from_text() -> None:
    texts = ["a.b=3", "c=[1, x]", "d='3'", "e=", "f=x=y"]
    assert parse_changes(texts) == {"a.b": 3, "c": [1, "x"], "d": "3", "e": None, "f": "x=y"}
    for bad in (CANARY, f"={CANARY}", f"a=[{CANARY}", f"a=*{CANARY}"):
        with pytest.raises(ConfigError) as caught:
            parse_changes([bad])
        assert CANARY not in str(caught.value)


# --- properties ---

_KEYS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=6,
)


def values(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the schema allows at `node`."""
    choices = schemas.alternatives(SCHEMA, node)
    if len(choices) > 1:
        return st.one_of([values(choice) for choice in choices])
    [node] = choices
    words = schemas.choices(SCHEMA, node)
    if words:
        return st.sampled_from(words)
    match node.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(node["minimum"], node.get("maximum", 2**40))
        case "number":
            low = node.get("minimum", node.get("exclusiveMinimum"))
            high = node.get("maximum", node.get("exclusiveMaximum", 1e18))
            return st.floats(low, high, exclude_min="minimum" not in node, exclude_max="maximum" not in node)
        case "array":
            return st.lists(values(node["items"]), max_size=3)
        case "string" if "pattern" in node:
            return st.from_regex(re.compile(node["pattern"], re.ASCII), fullmatch=True)
        case "string" if str(node.get("title")).endswith("Host"):
            return st.just("127.0.0.1")
        case "string":  # `~name` is the home of a user, who must be there
            return st.text(min_size=1).filter(lambda text: not text.startswith("~"))
        case "object" if "properties" in node:
            required = {
                key: values(inner) for key, inner in node["properties"].items() if key in node.get("required", [])
            }
            optional = {key: values(inner) for key, inner in node["properties"].items() if key not in required}
            return st.fixed_dictionaries(required, optional=optional)
        case "object":
            inner = values(node["additionalProperties"])
            return st.dictionaries(_KEYS.filter(lambda key: not looks_like_secret(key)), inner, max_size=3)
        case _:
            return _JSON


def documents() -> st.SearchStrategy[dict[str, Any]]:
    sections = {name: values(node) for name, node in SCHEMA["properties"].items() if name != "model"}
    model = {key: values(node) for key, node in SECTIONS["model"].items() if key != "source"}
    return st.fixed_dictionaries({}, optional={**sections, "model": st.fixed_dictionaries({}, optional=model)})


# Pairs of fields of which the second must not be below the first.
_ORDERED = [
    ("attention", "max_num_seqs", "max_num_batched_tokens"),
    ("experts", "redundancy", "shards"),
    ("experts", "heartbeat_interval_s", "heartbeat_timeout_s"),
    ("autoscaling.attention", "min_replicas", "max_replicas"),
    ("autoscaling.experts", "min_shards", "max_shards"),
]


def made_to_fit(document: dict[str, Any]) -> dict[str, Any]:
    """The document with values of ordered pairs swapped or left out where they are the wrong way round."""
    for path, low, high in _ORDERED:
        section: Any = document
        for key in path.split("."):
            section = (section or {}).get(key)
        if not section:
            continue
        first, second = section.pop(low, None), section.pop(high, None)
        # Equal heartbeat times are refused; the others' fields may be equal.
        if first is not None and second is not None and (first != second or path != "experts"):
            section[low], section[high] = sorted((first, second))
    store = document.get("kv_store", {})
    if store.get("url", "off") != "off":  # each of these fits to some URLs only
        for key in ("username", "ca_file", "iam"):
            store.pop(key, None)
    return document


def load_or_reject(document: dict[str, Any]) -> MeshConfig:
    """The configuration, unless a generated engine argument's name is one that is refused."""
    try:
        return load_config(document)
    except ConfigError as error:
        unexpected = [line for line in str(error).splitlines() if not line.startswith("attention.engine_args.")]
    if unexpected:
        pytest.fail("\n".join(unexpected))
    return hypothesis.reject()


_property = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@_property
@example({"model": {"served_name": "a\x85b\u2028c"}, "attention": {"engine_args": {"x": "1e3", "y": "off"}}})
@given(documents().map(made_to_fit))
def test_yaml_round_trip(tmp_path: Path, document: dict[str, Any]) -> None:
    config = load_or_reject(document)
    file = tmp_path / "round.yaml"
    file.write_text(config.to_yaml())
    again = load_config(file)
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    VALIDATOR.validate(json.loads(config.model_dump_json()))


@_property
@example(section="", key="[key]", value=None)
@example(section="experts", key="two\nlines", value=None)
@given(section=st.sampled_from(["", *SECTIONS, "autoscaling.attention"]), key=st.text(), value=_JSON)
def test_an_unknown_key_is_always_refused_with_its_path(section: str, key: str, value: object) -> None:
    node = schemas.node_at(SCHEMA, section.split(".") if section else []) or {}
    assume(key not in schemas.properties(SCHEMA, node))
    document = {key: value}
    for name in reversed(section.split(".") if section else []):
        document = {name: document}
    plain = key if key.isascii() and key.replace("_", "a").isalnum() else None
    lines = problems(document)
    where = f"{section}." if section else ""
    assert any(
        line.startswith(f"{where}{plain or ''}") and ("unknown key" in line or "a secret" in line) for line in lines
    )
    assert list(VALIDATOR.iter_errors(document))


@_property
@given(st.data())
def test_values_of_another_type_are_refused(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(sorted(set(SECTIONS) - {"model"})))
    key = data.draw(st.sampled_from(sorted(SECTIONS[section])))
    wrong = data.draw(st.sampled_from([b"1", ["1"], {1, 2}, object()]))
    [line] = problems(nested(f"{section}.{key}", wrong))
    assert line.startswith(f"{section}.{key}: ")


# --- schema, documentation, imports ---


def test_every_field_is_described() -> None:
    for section, keys in SECTIONS.items():
        for key, node in keys.items():
            assert node.get("description"), f"{section}.{key}"
            if key.endswith(("_s", "_ms", "_gib", "_mib", "_rows")):
                assert schemas.unit_at(SCHEMA, node), f"{section}.{key}"


def test_schema_is_the_configurations() -> None:
    VALIDATOR.check_schema(SCHEMA)
    for good in ({}, {"model": "demo"}, yaml.safe_load(EXAMPLE)):
        VALIDATOR.validate(good)
    for bad in (
        {"experts": {"redundency": 1}},
        {"attention": {"replicas": 0}},
        {"model": 1},
        {"kv_store": {"url": "x"}},
    ):
        assert list(VALIDATOR.iter_errors(bad))
    config_schema()["properties"].clear()
    assert config_schema() == SCHEMA


def test_documentation_is_current_and_its_example_loads(write_yaml: WriteYaml) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == configuration_markdown(), "run: python -m expertmesh.platform.config.docs > docs/configuration.md"
    assert f"```yaml\n{EXAMPLE}```" in text
    config = load_config(write_yaml(EXAMPLE))
    assert (config.experts.redundancy, config.ingress.port) == (2, 8080)
    for section, keys in SECTIONS.items():
        assert all(f"| `{section}.{key}` |" in text for key in keys)


def test_documentation_module_writes_it_and_imports_nothing_heavy() -> None:
    program = (
        "import runpy, sys; runpy.run_module('expertmesh.platform.config.docs', run_name='__main__');"
        "import expertmesh.platform.cli.config;"
        "assert not {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == configuration_markdown()


# --- expertmesh config ---


def run(*arguments: str) -> Done:
    return expertmesh("config", *arguments)


def test_cli_show(write_yaml: WriteYaml) -> None:
    path = str(write_yaml(EXAMPLE))
    code, out, _ = run("show", path, "--set", "experts.shards=4", "--set", "model.served_name='1'")
    assert code == 0
    expected = load_config(path).with_changes({"experts.shards": 4, "model.served_name": "1"})
    assert load_config(yaml.safe_load(out)) == expected
    code, out, _ = run("show", "--json", "--set", "ingress.port=1")
    assert (code, json.loads(out)["ingress"]["port"]) == (0, 1)
    assert load_config(json.loads(run("show", "--json")[1])) == load_config(None)


def test_cli_check(write_yaml: WriteYaml, tmp_path: Path) -> None:
    path = str(write_yaml(EXAMPLE))
    assert run("check", path) == (0, f"ok: {path}\n", "")
    bad = str(write_yaml("experts: {shards: 0}\nx: 1\n"))
    code, out, err = run("check", bad)
    assert (code, out) == (2, "")
    assert [line.split(":")[:2] for line in err.splitlines()] == [["error", " experts.shards"], ["error", " x"]]
    assert run("check", str(tmp_path / "none.yaml")).code == 2
    assert json.loads(run("check", "demo", "--json").out) == {"ok": True, "problems": []}
    code, out, err = run("check", bad, "--json")
    assert (code, json.loads(out)["ok"], err) == (2, False, "")
    assert len(json.loads(out)["problems"]) == 2
    assert run("check", "demo", "--set", "experts.shards=0").code == 2


def test_cli_errors_and_usage() -> None:
    code, out, err = run("show", "--set", "experts.shards=0")
    assert (code, out, err) == (2, "", "error: experts.shards: 0 is below the minimum 1\n")
    for arguments in (("check",), ("show", "--set", "experts.shards"), ("show", "--nope"), ("nope",)):
        assert run(*arguments).code == 2


def test_cli_schema() -> None:
    code, out, _ = run("schema")
    assert (code, json.loads(out)) == (0, SCHEMA)
