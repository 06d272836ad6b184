"""The command line as its users meet it: help, examples, JSON, exit codes, one-line errors, completion."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from expertmesh.platform.cli.reference import cli_markdown, commands, examples_of
from expertmesh.platform.cli.shared import EXIT_CODES
from tests.support.command import expertmesh
from tests.support.command_lines import parsed

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
COMMANDS: dict[str, Any] = dict(commands())
PRINTS_NO_DATA = {
    "expertmesh serve": "runs until Ctrl-C and prints where it serves, on stderr",
    "expertmesh config schema": "prints JSON and nothing else",
    "expertmesh top": "a picture that changes; what it shows is in status, placement and events",
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("EXPERTMESH_", "AWS_"))]:
        if name != "EXPERTMESH_CACHE":  # the demo model is there
            monkeypatch.delenv(name)


# --- help ---


@pytest.mark.parametrize("words", COMMANDS)
def test_help_has_examples_that_parse(words: str) -> None:
    done = expertmesh(*words.split()[1:], "--help")
    assert (done.code, done.err) == (0, "")
    assert "Examples:" in done.out
    examples = examples_of(COMMANDS[words])
    assert any(f"expertmesh {parsed(example).command}" == words for example in examples)
    flat = " ".join(done.out.split())
    for example in examples:
        assert example in flat
        assert parsed(example)


def test_examples_that_do_not_parse_are_noticed() -> None:
    for wrong in ("expertmesh statsu", "expertmesh status --frob", "expertmesh push ./x", "expertmesh config check"):
        with pytest.raises(typer.TyperException):
            parsed(wrong)
    with pytest.raises(ValueError, match="runs helm"):
        parsed("helm install")


@pytest.mark.parametrize("words", ["", "placement", "kv", "render", "aws", "keys", "config"])
def test_groups_show_their_commands(words: str) -> None:
    done = expertmesh(*words.split(), "--help")
    assert done.code == 0
    assert "Examples:" in done.out
    assert expertmesh(*words.split()).code == 2


def test_the_reference_is_current() -> None:
    """If not: python -m expertmesh.platform.cli.reference > docs/cli.md"""
    assert (ROOT / "docs" / "cli.md").read_text() == cli_markdown()


def test_the_reference_imports_nothing_heavy() -> None:
    program = (
        "import sys; from expertmesh.platform.cli.reference import cli_markdown; cli_markdown();"
        "assert not {'torch', 'ray', 'vllm', 'openai', 'boto3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


# --- JSON ---


def test_every_command_that_prints_data_prints_json() -> None:
    without = {
        words for words, command in COMMANDS.items() if "--json" not in {o for p in command.params for o in p.opts}
    }
    assert without == set(PRINTS_NO_DATA)


def test_json_of_commands_that_need_no_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def read(*words: str) -> Any:
        done = expertmesh(*words)
        assert (done.code, done.err) == (0, "")
        return json.loads(done.out)

    assert set(read("version", "--json")) >= {"expertmesh", "openai"}
    assert read("config", "show", "--json")["experts"]["shards"] == 2
    assert read("config", "check", "demo", "--json") == {"ok": True, "problems": []}
    assert read("config", "schema")["type"] == "object"
    made = read("keys", "create", "a", "--file", "keys.json", "--json")
    assert [key["name"] for key in read("keys", "list", "--file", "keys.json", "--json")] == ["a"]
    assert made["key"].startswith("xm-")
    assert read("keys", "revoke", "a", "--file", "keys.json", "--json") == {"revoked": "a"}
    example = str(ROOT / "examples" / "aws" / "cpu-experts-r7i.yaml")
    wrote = read("render", "ray-cluster", example, "--output", "cluster", "--json")["wrote"]
    assert wrote == ["cluster/ray-cluster.yaml", "cluster/serve.yaml"]
    assert all(Path(name).exists() for name in wrote)


# --- errors ---


@pytest.fixture
def nobody() -> Iterator[str]:
    """A URL where nobody listens, and nobody else will while it is held."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


WRONG_USE = [
    ("stats", "No such command 'stats'. Did you mean 'status'?; see `expertmesh --help`"),
    ("config shwo", "No such command 'shwo'. Did you mean 'show'?; see `expertmesh config --help`"),
    ("status --frob", "No such option: --frob; see `expertmesh status --help`"),
    ("status --url nonsense", "--url: 'nonsense' is no URL of a mesh; allowed: http(s)://host[:port]"),
    ("scale", "Missing argument 'attention=N experts=N'; see `expertmesh scale --help`"),
    ("scale shards=3", "'shards=3'; allowed: attention=N, experts=N"),
    ("serve none.yaml", "none.yaml: does not exist; allowed: a YAML file, a checkpoint folder, s3://..., or 'demo'"),
    ("serve demo --set experts.shards", "a change is written KEY=VALUE, for example experts.shards=3"),
    ("serve demo --set experts.shrads=3", "experts.shrads: unknown key; did you mean 'shards'?"),
    ("serve demo --set experts.shards=many", "experts.shards: 'many' is text; allowed: integer >= 1 (shards)"),
    ("demo --set experts.redundancy=9", "experts.redundancy"),
    ("config show none.yaml", "none.yaml: does not exist"),
    ("config check broken.yaml", "broken.yaml: line 1, column 9"),
    ("kv stats", "kv_store.url is off: this mesh has no KV store"),
    ("render ray-cluster none.yaml", "none.yaml: can't be read: No such file or directory"),
    ("aws plan none.yaml", "none.yaml: can't be read: No such file or directory"),
    ("keys list", "Missing option '--file' (env var: 'EXPERTMESH_KEYS_FILE'); see `expertmesh keys list --help`"),
    ("keys list --file none.json", "API keys: can't read none.json: No such file or directory"),
    ("keys create 'a b' --file keys.json", "name: allowed: letters, digits and . _ @ -"),
    ("keys create a --file keys.json --scope root", "scope: Input should be 'infer' or 'admin'"),
    ("keys create a --file keys.json --concurrent-requests many", "--concurrent-requests"),
]


@pytest.mark.parametrize(("line", "says"), WRONG_USE)
def test_wrong_use_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("model: [")
    done = expertmesh(*shlex.split(line))
    assert (done.code, done.out) == (2, "")
    [told] = done.err.splitlines()
    assert told.startswith("error: ")
    assert says in told
    assert not (tmp_path / "keys.json").exists()


@pytest.mark.parametrize(
    "line",
    [
        *("status", "status --json", "scale attention=2", "placement show", "placement show --json"),
        *("placement plan", "placement apply", "placement freeze"),
    ],
)
def test_a_mesh_that_is_not_there(nobody: str, line: str) -> None:
    done = expertmesh(*line.split(), "--url", nobody)
    assert (done.code, done.out) == (1, "")
    [told] = done.err.splitlines()
    assert told.startswith(f"error: {nobody} can't be reached: ")
    assert told.endswith("; is it running? start it with `expertmesh serve`")


def test_other_things_that_are_not_there(nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = nobody.removeprefix("http://")
    done = expertmesh("kv", "stats", "--set", f"kv_store.url=redis://{address}")
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert f"redis://{address} can't be reached" in done.err
    file = tmp_path / "file"
    file.touch()
    example = str(ROOT / "examples" / "aws" / "cpu-experts-r7i.yaml")
    done = expertmesh("render", "ray-cluster", example, "--output", str(file / "below"))
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: {file / 'below'}: Not a directory\n"


def test_a_bare_client_is_told_what_serve_needs(demo_folder: Path) -> None:
    """In a process that has no Ray, as after `pip install expertmesh`."""
    program = "import sys; sys.modules['ray'] = None; from expertmesh.platform.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "demo"], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "error: ray is not installed; this command needs it: pip install 'expertmesh[serve]'"
    )
    assert "Traceback" not in done.stderr


def test_exit_codes_are_told_apart_in_the_reference() -> None:
    assert list(EXIT_CODES) == [0, 1, 2, 3, 130]
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in cli_markdown()


# --- completion ---


ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def bash(script: str, *words: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        capture_output=True,
        text=True,
        check=True,
        env={**ENVIRONMENT, **environment},
        timeout=120,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def completed() -> Callable[..., list[str]]:
    """What bash offers for the last of some words, by the script that `--show-completion` prints."""
    shown = bash("expertmesh --show-completion; true")
    offer = (
        'COMP_WORDS=(expertmesh "$@"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))\n'
        "$(complete -p expertmesh | sed 's/.*-F \\([^ ]*\\).*/\\1/') expertmesh\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    return lambda *words: bash(shown + offer, *words).split()


def test_bash_completes_commands_options_and_config_keys(completed: Callable[..., list[str]]) -> None:
    assert completed("placement", "") == ["show", "plan", "apply", "freeze"]
    assert completed("status", "--w") == ["--watch"]
    assert completed("serve", "demo", "--set", "experts.sh") == ["experts.shards="]


def test_completion_is_installed_for_bash(tmp_path: Path) -> None:
    bash("expertmesh --install-completion; true", HOME=str(tmp_path))
    [script] = tmp_path.glob(".bash_completions/expertmesh.sh")
    assert str(script) in (tmp_path / ".bashrc").read_text()
    assert "complete" in script.read_text()
