"""A shard on another machine that is cut off with a frame in flight and comes back: real TCP, real packets lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from expertmesh.routing.placement import Target
from tests.routing.harness import EXPERTS, LAYERS, SECRET, shard_process
from tests.support.netns import Network, network, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

HERE = "attention"
SHARDS = ("left", "right")


@pytest.fixture
def net() -> Iterator[Network]:
    with network(HERE, *SHARDS) as made:
        yield made


class Sender:
    """A dispatcher in a process on the attention machine; see `main`."""

    def __init__(self, net: Network, targets: list[Target], redundancy: int) -> None:
        told = {"targets": [[t.shard, t.node, list(t.addresses)] for t in targets], "redundancy": redundancy}
        command = [*net.on(HERE), sys.executable, str(Path(__file__).resolve()), json.dumps(told)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def post(self) -> None:
        """Begins a step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()

    def take(self) -> dict[str, object]:
        """How it ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the sender ended"
        answer: dict[str, object] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


@pytest.mark.parametrize("redundancy", [1, 2])
def test_a_machine_that_is_cut_off_and_comes_back(net: Network, redundancy: int) -> None:
    everything = {layer: set(range(EXPERTS)) for layer in LAYERS}
    with ExitStack() as stack:
        targets = []
        for name in SHARDS:
            started = shard_process(everything, name, host=net.addresses[name], prefix=net.on(name))
            targets.append(stack.enter_context(started)[1])
        sender = Sender(net, targets, redundancy)
        stack.callback(sender.close)
        for _ in range(5):
            sender.post()
            assert sender.take() == {"right": True, "links": list(SHARDS)}
        net.cut("right")
        sender.post()
        if redundancy == 2:  # the other copy answers while the machine is away
            assert sender.take() == {"right": True, "links": ["left"]}
            net.join("right")
        else:  # nobody else can: the step waits, and the frame that was lost is sent again
            net.join("right")
            assert sender.take()["right"] is True
        for _ in range(200):
            sender.post()
            answer = sender.take()
            assert answer["right"] is True
            if answer["links"] == list(SHARDS):
                break
        else:
            pytest.fail("the machine is back and nobody asks it")


def main(text: str) -> None:
    """Runs a step for each line on stdin and says whether the output was the reference's, and who is connected."""
    import time

    import numpy as np
    import torch

    from expertmesh.routing.dispatch import Dispatcher, DispatchSettings, StaticTable
    from expertmesh.routing.placement import RoutingTable
    from tests.routing.harness import REVISION, ReferenceExperts, batch

    told = json.loads(text)
    targets = tuple(Target(shard, node, tuple(addresses)) for shard, node, addresses in told["targets"])
    copies = np.full((len(LAYERS), EXPERTS, 2), -1, dtype=np.int32)
    copies[:, :, 0] = np.arange(EXPERTS) % 2
    if told["redundancy"] == 2:
        copies[:, :, 1] = 1 - copies[:, :, 0]
    table = RoutingTable(1, LAYERS, targets, copies)
    settings = DispatchSettings("elsewhere", REVISION, frame_deadline_s=1.0, connect_timeout_s=0.5)
    dispatcher = Dispatcher(StaticTable(table), SECRET, settings)
    experts = ReferenceExperts()
    x, weights, ids = batch(30, 4)
    for _ in sys.stdin:
        right = torch.equal(dispatcher(LAYERS[0], x, weights, ids), experts.dense(LAYERS[0], x, weights, ids))
        print(json.dumps({"right": right, "links": sorted(dispatcher._links.by_shard)}), flush=True)
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1])
