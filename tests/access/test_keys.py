"""API keys: their text, their file, its command line, and their limits."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from expertmesh.errors import ConfigError
from expertmesh.platform.access import ADMIN, INFER, Key, KeyFile, KeyRing, Meters, new_token
from expertmesh.platform.access.file import MAX_FILE_BYTES, change_keys, read_keys
from expertmesh.platform.cli import app as cli


def make(name: str = "team", **changes: Any) -> tuple[str, Key]:
    """A new token and its record."""
    made = new_token()
    fields = {"scopes": [INFER], "tenant": name, "created": "2026-11-24T12:00:00+00:00", **changes}
    return made.token, Key(id=made.id, name=name, sha256=made.digest, **fields)


def write(path: Path, *keys: Key) -> Path:
    path.write_text(KeyRing(keys).dump())
    path.chmod(0o600)
    return path


# --- tokens and rings ---


def test_a_token_finds_its_key_and_no_other_does() -> None:
    token, key = make("a")
    other, other_key = make("b")
    ring = KeyRing([key, other_key])
    assert ring.find(token) is key
    assert ring.find(other) is other_key
    assert len(ring) == 2
    same_id = f"xm-{key.id}-{other.rpartition('-')[2][:43].ljust(43, 'A')}"
    for wrong in ("", "xm-", "none", token[:-1], token + "A", token.upper(), same_id, f"{token}\n", f" {token}"):
        assert ring.find(wrong) is None, wrong
    assert KeyRing().find(token) is None


@given(at=st.integers(0, 58), to=st.characters(codec=None))
def test_a_token_with_any_character_changed_is_not_known(at: int, to: str) -> None:
    token, key = make()
    changed = token[:at] + to + token[at + 1 :]
    assert KeyRing([key]).find(changed) is (key if changed == token else None)


def test_what_is_stored_is_not_the_token() -> None:
    token, key = make()
    text = KeyRing([key]).dump()
    secret = token.removeprefix(f"xm-{key.id}-")
    assert len(secret) == 43
    assert secret not in text
    assert KeyRing.parse(text).find(token) == key


def test_tokens_differ() -> None:
    made = [new_token() for _ in range(1000)]
    assert len({token.id for token in made}) == len({token.digest for token in made}) == 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": ""}, "keys.0.name: "),
        ({"name": "a b"}, "keys.0.name: "),
        ({"scopes": []}, "keys.0.scopes: "),
        ({"scopes": ["root"]}, "keys.0.scopes.0: "),
        ({"sha256": "00"}, "keys.0.sha256: "),
        ({"id": "0011"}, "keys.0.id: "),
        ({"requests_per_minute": 0}, "keys.0.requests_per_minute: "),
        ({"requests_per_minute": "5"}, "keys.0.requests_per_minute: "),
        ({"concurrent_requests": 1.5}, "keys.0.concurrent_requests: "),
        ({"expires": "never"}, "keys.0.expires: "),
    ],
)
def test_a_record_that_is_wrong_is_refused_with_its_place(change: dict[str, Any], said: str) -> None:
    _, key = make()
    text = json.dumps({"version": 1, "keys": [{**key.model_dump(), **change}]})
    with pytest.raises(ConfigError, match=rf"^{said}") as refused:
        KeyRing.parse(text)
    assert key.sha256 not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 2}', '{"keys": {}}', '{"more": 1}', "\x00", '"xm"'])
def test_files_of_another_kind_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        KeyRing.parse(text)


def test_names_and_ids_are_there_once() -> None:
    _, key = make("a")
    _, other = make("a")
    for twice in ([key, key], [key, other]):
        with pytest.raises(ConfigError, match="'a' is there twice"):
            KeyRing(twice)


# --- the file ---


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token, key = make("a")
    other, other_key = make("b")
    path = write(tmp_path / "keys.json", key)
    file = KeyFile(path)
    assert file.current() is file.current(), "read again without need"
    assert file.current().find(token) == key
    change_keys(path, lambda keys: keys.with_key(other_key))
    assert file.current().find(other) == other_key
    change_keys(path, lambda keys: keys.without("a"))
    with caplog.at_level(logging.WARNING, "expertmesh.access"):
        assert file.current().find(token) is None
    assert file.current().find(other) == other_key
    assert "1 keys" in caplog.messages[-1]


@pytest.mark.parametrize("harm", ["removed", "emptied", "opened"])
def test_a_file_that_breaks_leaves_the_keys_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    token, key = make()
    path = write(tmp_path / "keys.json", key)
    file = KeyFile(path)
    match harm:
        case "removed":
            path.unlink()
        case "emptied":
            path.write_text("")
        case "opened":
            path.chmod(0o622)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "expertmesh.access"):
        assert all(file.current().find(token) == key for _ in range(3))
    assert [record.levelno for record in caplog.records] == [logging.ERROR], "said once"
    other, other_key = make("new")
    path.unlink(missing_ok=True)
    write(path, other_key)
    assert file.current().find(token) is None
    assert file.current().find(other) == other_key


def test_a_link_that_is_swapped_is_followed(tmp_path: Path) -> None:
    """As Kubernetes does with a mounted secret."""
    token, key = make("a")
    other, other_key = make("b")
    write(tmp_path / "1", key)
    write(tmp_path / "2", other_key)
    link = tmp_path / "keys.json"
    link.symlink_to("1")
    file = KeyFile(link)
    assert file.current().find(token)
    draft = tmp_path / "draft"
    draft.symlink_to("2")
    draft.replace(link)
    assert file.current().find(other)
    assert not file.current().find(token)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "keys.json")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode 0{mode:o}.*chmod go-w"):
        KeyFile(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    large = tmp_path / "large"
    large.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    large.chmod(0o600)
    for path, said in [(tmp_path, "regular"), (tmp_path / "no", "No such"), (pipe, "regular"), (large, "larger than")]:
        with pytest.raises(ConfigError, match=said):
            KeyFile(path)


def test_a_change_keeps_the_files_mode_and_a_refused_one_keeps_the_file(tmp_path: Path) -> None:
    _, key = make("a")
    path = write(tmp_path / "keys.json", key)
    path.chmod(0o640)
    change_keys(path, lambda keys: keys.without("a"))
    assert path.stat().st_mode & 0o777 == 0o640
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="no API key is called 'a'"):
        change_keys(path, lambda keys: keys.without("a"))
    with pytest.raises(ConfigError, match="can't read"):
        change_keys(tmp_path / "other.json", lambda keys: keys)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]


def test_processes_that_change_the_file_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    program = (
        "import sys; from pathlib import Path; from expertmesh.platform.access.file import change_keys;"
        "from tests.access.test_keys import make;"
        "[change_keys(Path(sys.argv[1]), lambda k: k.with_key(make(f'{sys.argv[2]}-{i}')[1]), True) for i in range(20)]"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    racing = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(number)], env=environment)
        for number in range(3)
    ]
    assert [process.wait(120) for process in racing] == [0, 0, 0]
    assert len(read_keys(path)) == 60


# --- limits ---


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def enter_and_leave(meters: Meters, key: Key) -> float:
    wait = meters.enter(key)
    if not wait:
        meters.leave(key)
    return wait


def test_requests_a_minute() -> None:
    clock = Clock()
    meters, (_, key) = Meters(clock), make(requests_per_minute=3)
    assert [enter_and_leave(meters, key) for _ in range(3)] == [0, 0, 0]
    assert enter_and_leave(meters, key) == pytest.approx(20)
    clock.now += 19
    assert enter_and_leave(meters, key) == pytest.approx(1)
    clock.now += 1
    assert enter_and_leave(meters, key) == 0
    assert enter_and_leave(meters, key) == pytest.approx(20)
    clock.now += 1e6
    assert [enter_and_leave(meters, key) > 0 for _ in range(4)] == [False, False, False, True], (
        "no more than a minute's"
    )


@given(limit=st.integers(1, 100), steps=st.lists(st.floats(0, 30), max_size=200))
def test_no_minute_takes_more_than_twice_the_limit_and_no_wait_is_too_short(limit: int, steps: list[float]) -> None:
    """A full bucket and a minute's refill is the most that any minute may see."""
    clock = Clock()
    meters, (_, key) = Meters(clock), make(requests_per_minute=limit)
    taken: list[float] = []
    for step in steps:
        clock.now += step
        wait = enter_and_leave(meters, key)
        if not wait:
            taken.append(clock.now)
            assert sum(clock.now - 60 < at for at in taken) <= 2 * limit
            continue
        clock.now += wait + 1e-6
        assert enter_and_leave(meters, key) == 0, "asked again when it was told to"
        taken.append(clock.now)


def test_requests_at_once() -> None:
    meters, (_, key) = Meters(Clock()), make(concurrent_requests=2)
    assert [meters.enter(key) > 0 for _ in range(4)] == [False, False, True, True]
    assert meters.running(key) == 2
    meters.leave(key)
    assert [meters.enter(key) > 0 for _ in range(2)] == [False, True]


def test_a_request_that_is_turned_away_for_those_that_run_costs_no_token() -> None:
    meters, (_, key) = Meters(Clock()), make(concurrent_requests=1, requests_per_minute=2)
    assert [meters.enter(key) > 0 for _ in range(5)] == [False, True, True, True, True]
    meters.leave(key)
    assert meters.enter(key) == 0


def test_keys_do_not_count_for_each_other_and_none_means_any_number() -> None:
    meters, (_, free) = Meters(Clock()), make("c")
    (_, a), (_, b) = (make(name, requests_per_minute=1) for name in "ab")
    assert [meters.enter(a) > 0, meters.enter(a) > 0, meters.enter(b) > 0] == [False, True, False]
    assert not any(meters.enter(free) for _ in range(1000))


def test_a_changed_limit_counts_from_now_on() -> None:
    meters, (_, key) = Meters(Clock()), make(requests_per_minute=2)
    more, fewer = (key.model_copy(update={"requests_per_minute": n}) for n in (4, 1))
    assert [enter_and_leave(meters, key) > 0 for _ in range(3)] == [False, False, True]
    assert [enter_and_leave(meters, more) > 0 for _ in range(3)] == [False, False, True]
    assert enter_and_leave(meters, fewer) > 0


# --- the command line ---

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `expertmesh keys ... --file keys.json`; gives the result."""
    monkeypatch.delenv("EXPERTMESH_KEYS_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, ["keys", *arguments, "--file", "keys.json"])


def test_create_list_and_revoke(run: Run, tmp_path: Path) -> None:
    token = run("create", "team-a", "--requests-per-minute", "600").output.strip()
    made = json.loads(run("create", "ops", "--scope", "admin", "--scope", "infer", "--tenant", "us", "--json").output)
    ring = read_keys(tmp_path / "keys.json")
    team, ops = ring.find(token), ring.find(made.pop("key"))
    assert team is not None
    assert ops is not None
    assert (team.name, team.scopes, team.tenant, team.requests_per_minute) == ("team-a", [INFER], "team-a", 600)
    assert (ops.name, ops.scopes, ops.tenant, ops.concurrent_requests) == ("ops", [ADMIN, INFER], "us", None)
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600
    shown = run("list").output
    assert all(word in shown for word in ("team-a", "ops", "admin,infer", "600", team.id))
    listed = json.loads(run("list", "--json").output)
    assert listed[1] == made
    assert team.sha256 not in shown + str(listed)
    assert run("revoke", ops.id).exit_code == 0
    assert run("revoke", "team-a").exit_code == 0
    assert len(read_keys(tmp_path / "keys.json")) == 0


def test_the_file_may_come_from_the_environment(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_KEYS_FILE", "other.json")
    assert CliRunner().invoke(cli, ["keys", "create", "a"]).exit_code == 0
    assert [key.name for key in read_keys(tmp_path / "other.json")] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "a b"], "name: "),
        (["create", "a", "--scope", "root"], "scope: "),
        (["create", "a", "--tenant", ""], "tenant: "),
        (["create", "a", "--concurrent-requests", "0"], "concurrent_requests: "),
        (["revoke", "nobody"], "can't read"),
        (["list"], "can't read"),
    ],
)
def test_mistakes_are_told_and_make_no_file(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)
    assert not (tmp_path / "keys.json").exists()
