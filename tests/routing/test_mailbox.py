"""What an attention replica and its engine process share in memory."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from expertmesh.errors import WireError
from expertmesh.routing.dispatch import LoadCounters, Mailbox, StaticTable, TableFile
from expertmesh.routing.dispatch.mailbox import EVENTS, PARTS
from expertmesh.routing.placement import RoutingTable, Target, build_table, even_slots


def table(epoch: int, shards: int = 3) -> RoutingTable:
    """A table whose target names carry the epoch, so that a mixture of two would show."""
    targets = {i: Target(f"{epoch}-{i}", "node", (f"unix:@{epoch}-{i}",)) for i in range(shards)}
    return build_table(epoch, (0, 1), 64, even_slots(2, 64, shards, 2), targets)


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    box = Mailbox.create()
    yield box
    box.close()
    assert not box.folder.exists()


def test_a_mailbox_is_private_and_its_end_can_be_repeated(mailbox: Mailbox) -> None:
    assert stat.S_IMODE(mailbox.folder.stat().st_mode) == 0o700
    mailbox.publish(table(1))
    mailbox.close()
    assert not mailbox.folder.exists()
    mailbox.close()


def test_a_static_table_stays() -> None:
    only = table(1)
    assert StaticTable(only).current() is only


def test_the_newest_table_is_read_and_kept(mailbox: Mailbox) -> None:
    source = TableFile(mailbox.table_path)
    assert source.current() is None
    mailbox.publish(table(1))
    first = source.current()
    assert first is not None
    assert first.epoch == 1
    assert source.current() is first, "parsed again although nothing changed"
    mailbox.publish(table(2))
    second = source.current()
    assert second is not None
    assert (second.epoch, second.targets) == (2, table(2).targets)


def test_a_table_survives_its_file(mailbox: Mailbox) -> None:
    source = TableFile(mailbox.table_path)
    mailbox.publish(table(1))
    first = source.current()
    mailbox.close()
    assert source.current() is first


def test_a_file_that_holds_no_table_is_refused_until_it_does(mailbox: Mailbox) -> None:
    source = TableFile(mailbox.table_path)
    mailbox.table_path.write_text('{"epoch": 1')
    for _ in range(2):
        with pytest.raises(WireError, match="not a routing table"):
            source.current()
    mailbox.publish(table(5))
    read = source.current()
    assert read is not None
    assert read.epoch == 5


def test_a_reader_never_sees_half_a_table_or_an_older_one(mailbox: Mailbox) -> None:
    last, failures = 150, []

    def publish() -> None:
        try:
            for epoch in range(1, last + 1):
                mailbox.publish(table(epoch, shards=3 + epoch % 5))
        except Exception as error:
            failures.append(error)

    writer = threading.Thread(target=publish)
    source, seen = TableFile(mailbox.table_path), [0]
    writer.start()
    while seen[-1] < last and not failures:
        read = source.current()
        if read is not None and read.epoch != seen[-1]:
            assert read.epoch > seen[-1]
            assert {t.shard.split("-")[0] for t in read.targets} == {str(read.epoch)}
            assert len(read.targets) == 3 + read.epoch % 5
            seen.append(read.epoch)
    writer.join()
    assert not failures
    assert seen[-1] == last


def test_a_table_that_vanishes_while_it_is_read_is_the_last_one_seen(mailbox: Mailbox) -> None:
    """A replica that ends removes the folder; its engine's step at hand must not fail by it."""
    come_and_go = (
        "import os, sys\n"
        "table = sys.argv[1]; os.rename(table, table + '.kept'); print(flush=True)\n"
        "for _ in range(20_000): os.link(table + '.kept', table); os.unlink(table)"
    )
    source = TableFile(mailbox.table_path)
    mailbox.publish(table(1))
    first = source.current()
    assert first is not None
    with subprocess.Popen(
        [sys.executable, "-S", "-c", come_and_go, str(mailbox.table_path)], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        while other.poll() is None:
            fresh = TableFile(mailbox.table_path).current()
            assert fresh is None or fresh.epoch == 1
            assert source.current() is first
    assert other.returncode == 0


def test_counters_start_at_zero_and_survive_a_restart(mailbox: Mailbox) -> None:
    first = LoadCounters(mailbox.loads_path, 2, 4)
    assert first.as_dict() == dict.fromkeys(EVENTS + PARTS, 0)
    assert first.tokens.tolist() == [[0] * 4] * 2
    first.tokens[1] += np.array([1, 2, 3, 4])
    first.events[EVENTS.index("waits")] += 5
    first.parts[PARTS.index("combine_ns")] += 7
    again = LoadCounters(mailbox.loads_path, 2, 4)
    assert again.as_dict() == {**dict.fromkeys(EVENTS + PARTS, 0), "waits": 5, "combine_ns": 7}
    assert again.tokens.tolist() == [[0] * 4, [1, 2, 3, 4]]


def test_counters_are_seen_by_another_process(mailbox: Mailbox) -> None:
    mine = LoadCounters(mailbox.loads_path, 2, 4)
    count = (
        "import sys; from pathlib import Path; from expertmesh.routing.dispatch import LoadCounters\n"
        "loads = LoadCounters(Path(sys.argv[1]), 2, 4); loads.tokens[0] += 7; loads.events[0] += 1"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", count, str(mailbox.loads_path)], check=True, env=environment)
    assert mine.tokens.tolist() == [[7] * 4, [0] * 4]
    assert mine.as_dict()["dispatches"] == 1


def test_counters_where_there_is_no_folder_are_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        LoadCounters(tmp_path / "nowhere" / "loads", 1, 1)
