"""From the controller's state machines to events: what has changed since it last looked. No Ray, no clock."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from expertmesh.deployments.controller.events import Kind, Timeline
from expertmesh.deployments.controller.membership import Membership, ShardMember
from expertmesh.deployments.controller.replacement import Replacement, Running, State
from expertmesh.deployments.controller.takeover import Takeover

_Numbers = Mapping[str, int | None]
_About = dict[str, int | str]
_MOVES = (Kind.MOVES_BEGUN, Kind.MOVES_DONE, Kind.MOVES_FAILED)


class Chronicle:
    """Tells the timeline; changes nothing of what it looks at."""

    def __init__(self, timeline: Timeline, members: Membership, replacement: Replacement, takeover: Takeover) -> None:
        """Takes over `replacement.tell`: what it does is told in one event for all moves of one look."""
        self._timeline = timeline
        self._members = members
        self._takeover = takeover
        self._shards: dict[str, tuple[int, bool, bool]] = {}
        """Index, whether it serves, whether it leaves, of each shard that has joined."""
        self._replicas: dict[str, bool] = {}
        """Whether it is ready, of each attention replica that has reported."""
        self._moves: dict[Kind, list[Running]] = {kind: [] for kind in _MOVES}
        """Since the last look."""
        self._taken_over = 0
        self._missing: int | None = None
        """Experts that nobody serves; None until every one was served once."""
        replacement.tell = self._note

    def look_at_members(self, lost: Collection[str] = ()) -> None:
        """Who has come, changed and gone; lost: ids of those that were not heard of in time."""
        shards = {m.shard: (m.index, m.target is not None, m.leaving) for m in self._members.shards.values()}
        for shard, (index, serving, leaving) in shards.items():
            _, had_served, was_leaving = self._shards.get(shard, (index, False, False))
            about: _About = {"shard": shard, "index": index, "node": self._members.shards[shard].node}
            if shard not in self._shards:
                self._timeline.add(Kind.SHARD_JOINED, f"shard {shard} joins as index {index}", **about)
            if serving and not had_served:
                experts = _held(self._members.shards[shard])
                text = f"shard {shard} serves {_count(experts, 'expert')}"
                self._timeline.add(Kind.SHARD_SERVING, text, experts=experts, **about)
            if leaving and not was_leaving:
                self._timeline.add(
                    Kind.SHARD_LEAVING, f"shard {shard} is leaving, once others have its experts", **about
                )
        for shard in self._shards.keys() - shards.keys():
            index, was_lost = self._shards[shard][0], shard in lost
            kind = Kind.SHARD_LOST if was_lost else Kind.SHARD_GONE
            text = f"shard {shard} is lost: not heard of in time" if was_lost else f"shard {shard} is gone"
            self._timeline.add(kind, text, shard=shard, index=index)
        self._shards = shards
        self._look_at_replicas()

    def _look_at_replicas(self) -> None:
        replicas = {replica: member.report.ready for replica, member in self._members.attention.items()}
        for replica, ready in replicas.items():
            about = {"replica": replica, "node": self._members.attention[replica].report.node}
            if replica not in self._replicas:
                self._timeline.add(Kind.REPLICA_JOINED, f"attention replica {replica} joins", **about)
            if ready and not self._replicas.get(replica):
                self._timeline.add(Kind.REPLICA_READY, f"attention replica {replica} is ready", **about)
        for replica in self._replicas.keys() - replicas.keys():
            text = f"attention replica {replica} is not heard of any more"
            self._timeline.add(Kind.REPLICA_LOST, text, replica=replica)
        self._replicas = replicas

    def look_at_placement(self) -> None:
        """Which experts change hands, and moves."""
        more, self._taken_over = self._takeover.adopted - self._taken_over, self._takeover.adopted
        if more:
            self._timeline.add(Kind.TAKEOVER, f"{_count(more, 'expert')} ordered from other shards", experts=more)
        for kind, moves in self._moves.items():
            self._tell_moves(kind, moves)
            moves.clear()

    def published(self, epoch: int, missing: int) -> None:
        """A routing table with `missing` experts that nobody serves was given this epoch."""
        self._timeline.add(Kind.EPOCH, f"placement epoch {epoch}", epoch=epoch)
        if missing and self._missing == 0:
            text = f"{_count(missing, 'expert')} served by nobody"
            self._timeline.add(Kind.EXPERTS_MISSING, text, experts=missing)
        if not missing and self._missing != 0:
            self._timeline.add(Kind.EXPERTS_WHOLE, "every expert is served")
        if self._missing is not None or not missing:
            self._missing = missing

    def scaled(self, before: _Numbers, after: _Numbers, by: str) -> None:
        """The numbers of replicas that are wanted may have been changed, by `hand` or by `signals`."""
        for deployment, wanted in after.items():
            had = before[deployment]
            if wanted is not None and had is not None and wanted != had:
                text = f"{deployment}: {wanted} wanted instead of {had}, by {by}"
                about: _About = {"deployment": deployment, "before": had, "after": wanted, "by": by}
                self._timeline.add(Kind.SCALE, text, **about)

    def froze(self, frozen: bool) -> None:
        """Re-placement by itself was stopped, or started again."""
        text = "experts stay where they are" if frozen else "experts are moved as traffic moves"
        self._timeline.add(Kind.FREEZE, text, frozen=int(frozen))

    def shifted(self, layers: int) -> None:
        """Traffic was found to have shifted in so many layers."""
        self._timeline.add(Kind.TRAFFIC_SHIFTED, f"traffic has shifted in {_count(layers, 'layer')}", layers=layers)

    def _note(self, running: Running) -> None:
        ended = {State.DONE: Kind.MOVES_DONE, State.ABANDONED: Kind.MOVES_FAILED}
        self._moves[ended.get(running.state, Kind.MOVES_BEGUN)].append(running)

    def _tell_moves(self, kind: Kind, moves: list[Running]) -> None:
        if not moves:
            return
        verb = kind.removeprefix("moves_")
        why = f" ({moves[0].why})" if moves[0].why else ""
        text = f"{verb}: {moves[0].move}{why}" if len(moves) == 1 else f"{len(moves)} moves {verb}{why}"
        self._timeline.add(kind, text, moves=len(moves))


def _held(member: ShardMember) -> int:
    return 0 if member.held is None else int((member.held >= 0).sum())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
