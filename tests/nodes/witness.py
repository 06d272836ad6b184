"""What is said and served on a mesh of several machines while something happens to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.parity import prompts_for, vocabulary_of
from benchmarks.served import served_answers
from benchmarks.traffic import Judge, Traffic
from expertmesh import Client, ExpertMeshError
from expertmesh.deployments.controller.durable import EPOCHS_A_TERM
from expertmesh.routing.dispatch.mailbox import TableFile

MODEL = "tiny"
PROMPTS, TOKENS, STREAMS = 8, 48, 4
_POLL_S = 0.1


class Epochs:
    """Every placement epoch that the controller says, and that each engine goes by, as they follow each other."""

    def __init__(self, url: str, processes: Callable[[], list[int]]) -> None:
        """processes: those of the machine with the attention replicas."""
        self.decided: list[int] = []
        self.served: dict[Path, list[int]] = {}
        self._url, self._processes = url, processes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="epochs")

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes them during the block."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def check(self) -> None:
        """One term, and no epoch after a higher one, anywhere."""
        assert self.decided
        assert self.served
        for epochs in [self.decided, *self.served.values()]:
            assert epochs == sorted(epochs)
            assert {epoch // EPOCHS_A_TERM for epoch in epochs} == {self.decided[0] // EPOCHS_A_TERM}
        for epochs in self.served.values():
            assert epochs[-1] <= self.decided[-1]

    def _follow(self) -> None:
        with Client(base_url=self._url, timeout=5, max_retries=0) as client:
            while not self._over.wait(_POLL_S):
                for path in self._tables():
                    if (table := TableFile(path).current()) is not None:
                        _note(self.served.setdefault(path, []), table.epoch)
                with suppress(ExpertMeshError):
                    _note(self.decided, client.mesh.status().placement.epoch)

    def _tables(self) -> list[Path]:
        return [path for pid in self._processes() for path in Path("/dev/shm").glob(f"expertmesh-{pid}-*/table.json")]


def _note(epochs: list[int], epoch: int) -> None:
    if not epochs or epochs[-1] != epoch:
        epochs.append(epoch)


def replicas(pids: Sequence[int], deployment: str) -> set[int]:
    """Those of the processes that are replicas of a deployment."""
    found = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if f"ServeReplica:expertmesh:{deployment}" in " ".join(psutil.Process(pid).cmdline()):
                found.add(pid)
    return found


@contextmanager
def traffic(url: str, folder: Path, streams: int = STREAMS) -> Iterator[Traffic]:
    """Constant requests during the block, compared with what the mesh answered to each before it, undisturbed."""
    prompts = prompts_for(vocabulary_of(folder), PROMPTS)
    judge = Judge([served_answers(url, MODEL, [prompt], TOKENS)[0] for prompt in prompts])
    running = Traffic(url, MODEL, prompts, judge, streams)
    running.start()
    try:
        yield running
    finally:
        running.stop()
