"""`expertmesh top` and `expertmesh events`, over a mesh that says what the test tells it to."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from expertmesh.deployments.controller.events import Kind
from expertmesh.errors import ExpertMeshError
from expertmesh.platform.cli import app as cli
from tests.console.scripted import ScriptedMesh, scripted

# A shell's background jobs ignore Ctrl-C, and so would their children.
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
RUN = [sys.executable, "-c", CTRL_C + "from expertmesh.platform.cli import main; main()"]
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("EXPERTMESH_", "OPENAI_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def mesh() -> ScriptedMesh:
    return ScriptedMesh(6, 8, 2)


def printed(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, list(arguments))
    assert done.exit_code == code, done.output
    return done.output


def test_one_frame_has_everything(mesh: ScriptedMesh) -> None:
    mesh.moves = ["step 0: layer 3, shard 0, slot 4: expert 7 in an empty slot"] * 6
    with scripted(mesh) as url:
        text = printed("top", "--once", "--url", url)
    assert f"ok  synthetic, 6 layers x 8 experts, epoch {mesh.epoch}" in text
    for index in range(2):
        (line,) = [line for line in text.splitlines() if mesh.name(index) in line]
        assert line.split()[:4] == [str(index), mesh.name(index), "serving", "24"]
        assert line.split()[-4:-2] == [str(900 + 30 * index), ("49%", "51%")[index]]
    (replica,) = [line for line in text.splitlines() if "z6k2p9qa" in line]
    assert "43%" in replica
    assert "212.5" in replica
    assert "1:2" in text
    assert f"layer {mesh.layers[3]} expert 2: {mesh.rows.max():.0f} rows/s" in text
    assert text.count("moving: step 0") == 4
    assert "and 2 more moves" in text
    assert "the controller of term 3 takes office" in text


def test_a_mesh_that_is_not_well(mesh: ScriptedMesh) -> None:
    mesh.lose(1)
    mesh.samples.clear()
    mesh.samples.append({**mesh.sample(time.time(), 0), "ttft_s": None, "kv_hits": None})
    mesh.rows = 0 * mesh.rows
    with scripted(mesh) as url:
        text = printed("top", "--once", "--url", url)
    assert "degraded" in text
    assert "24 experts served by nobody" in text
    assert "no traffic" in text
    assert "is lost" in text


def test_nobody_there_ends_it_with_one_line() -> None:
    done = subprocess.run(
        [*RUN, "top", "--once", "--url", "http://127.0.0.1:9"], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "can't be reached" in done.stderr


def test_events_as_lines_and_as_json(mesh: ScriptedMesh) -> None:
    mesh.timeline.add(Kind.SCALE, "experts: 3 wanted instead of 2, by hand", deployment="experts", after=3)
    with scripted(mesh) as url:
        lines = printed("events", "--url", url).splitlines()
        assert [line[10:] for line in lines] == [event.text for event in mesh.timeline.after(0)]
        told = [json.loads(line) for line in printed("events", "--json", "--url", url).splitlines()]
        assert told == [event.to_dict() for event in mesh.timeline.after(0)]
        assert printed("events", "--after", str(told[0]["id"]), "--url", url).splitlines() == lines[1:]


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
        self.process = subprocess.Popen(
            [*RUN, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self._seen = ""

    def until(self, text: str) -> None:
        """Returns once it has shown this since the last call."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self._seen:
            assert time.monotonic() < deadline, f"{text!r} is not in {self._seen[-2000:]}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self._seen += os.read(self._ours, 1 << 16).decode(errors="replace")
        self._seen = self._seen[self._seen.index(text) + len(text) :]

    def press(self, key: str) -> None:
        """As somebody does."""
        os.write(self._ours, key.encode())

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """Ends what still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize("end", [lambda shown: shown.press("q"), Terminal.interrupt], ids=["q", "Ctrl-C"])
def test_it_goes_on_until_somebody_ends_it(mesh: ScriptedMesh, end: Callable[[Terminal], None]) -> None:
    with scripted(mesh) as url, terminal("top", "--url", url) as shown:
        shown.until("takes office")
        mesh.lose(1)
        shown.until("degraded")
        shown.until("is lost")
        mesh.away = True
        shown.until("controller does not answer")
        mesh.away = False
        shown.until("degraded")
        end(shown)
        shown.until("\x1b[?1049l")  # the terminal is as it was
        assert shown.process.wait(DEADLINE_S) == 0


def test_following_events(mesh: ScriptedMesh) -> None:
    with scripted(mesh) as url, terminal("events", "--follow", "--url", url) as shown:
        shown.until("takes office")
        mesh.timeline.add(Kind.FREEZE, "experts stay where they are", frozen=1)
        shown.until("experts stay where they are")
        shown.interrupt()
        assert shown.process.wait(DEADLINE_S) == 0


def test_a_wrong_url_is_refused() -> None:
    with pytest.raises(ExpertMeshError, match="no URL of a mesh"):
        CliRunner().invoke(cli, ["top", "--once", "--url", "ftp://x"], catch_exceptions=False)
