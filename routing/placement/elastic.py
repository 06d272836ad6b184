"""Who takes over which experts when shards come, go or die: adding copies, lending them to a newcomer, giving them up.

Glossary: a shard is *present* if it serves and is to stay; its *share* is how many experts of a layer it holds where
all present shards hold equally many; an expert is *endangered* while fewer than `redundancy` present shards hold it,
and its copies beyond that are *surplus*; the *time* of a shard is the sum, over its experts, of load over copies.

Worked number: four experts with loads 40, 30, 20, 10 on two shards, redundancy 1, a share of two: shard 0 holds 0 and
3 (time 50), shard 1 holds 1 and 2 (time 50). Shard 1 dies: the share of one shard is four, `adopted` gives 1 and 2 to
shard 0, the hotter first. A shard takes its place with experts 1 and 2 again: the share is two, shard 0 holds four,
and `surplus` names 1 and 2, which have two copies. If a third shard comes instead to the whole two, the share is
ceil(4 / 3) = 2 and `lent` gives it 3 and 2, one from each, so that the three have 40, 30 and 30; the copies on the old
shards are surplus then.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from expertmesh.routing.placement.static import IntArray, slots_per_shard

Floats = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

_LEAST = 0.01
"""Of a layer's mean load: what an expert without any counts, so that idle experts are spread as well."""


def share(experts: int, shards: int, redundancy: int, spare: int) -> int:
    """Experts of a layer that each of so many shards is to hold; spare: beyond what redundancy needs."""
    return min(experts, slots_per_shard(experts, max(1, shards), min(redundancy, max(1, shards))) + spare)


def holders(slots: IntArray, experts: int) -> Mask:
    """Whether a shard has an expert in any slot: [shards, layers, experts] of slots [shards, layers, slots]."""
    shards, layers = slots.shape[:2]
    held = np.zeros((shards, layers, experts), dtype=bool)
    shard, layer, slot = np.nonzero(slots >= 0)
    held[shard, layer, slots[shard, layer, slot]] = True
    return held


def adopted(
    has: Mask, keeps: Mask, loads: Floats, *, redundancy: int, able: Mask, usual: int, most: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Copies that bring every expert to `redundancy`, or to all able shards where there are fewer.

    has: what each shard holds or is ordered to [shards, layers, experts]; keeps: of that, what counts, as it does not
    go soon; loads: [layers, experts], any unit; able: shards that may get more [shards]; usual: experts of a layer that
    a shard holds, beyond which it is only given more if no other has room; most: beyond which it never is.

    Returns (shard, layer, expert) for each copy to add, no shard getting an expert that it has, and (layer, expert) for
    each that is wanting and has no place. In each layer the experts with fewest copies go first, of these the hotter,
    each to the shard with the least time.
    """
    weights = _weights(loads)
    counts = keeps.sum(axis=0)  # [layers, experts]
    wanted = np.minimum(redundancy, (keeps.any(axis=(1, 2)) | able).sum())
    added: list[tuple[int, int, int]] = []
    unplaced: list[tuple[int, int]] = []
    for layer in np.flatnonzero((counts < wanted).any(axis=1)).tolist():
        mine = has[:, layer].copy()
        held = mine.sum(axis=1)
        times = _times(keeps[:, layer], weights[layer])
        lacking = sorted(
            (copies, -float(weights[layer, expert]), expert)
            for expert in np.flatnonzero(counts[layer] < wanted).tolist()
            for copies in range(int(counts[layer, expert]), int(wanted))
        )
        for *_, expert in lacking:
            places = np.flatnonzero(able & ~mine[:, expert] & (held < most)).tolist()
            if not places:
                unplaced.append((layer, expert))
                continue
            shard = min(places, key=lambda s: (held[s] >= usual, times[s], s))
            mine[shard, expert] = True
            held[shard] += 1
            times[shard] += float(weights[layer, expert]) / int(wanted)
            added.append((shard, layer, expert))
    return added, unplaced


def surplus(has: Mask, loads: Floats, *, redundancy: int, usual: int) -> list[tuple[int, int, int]]:
    """(shard, layer, expert) for each copy to give up, so that no shard holds more than `usual` experts of a layer.

    has: what present shards serve, False for others [shards, layers, experts]; loads: [layers, experts], any unit. No
    expert that has its redundancy loses it. Of the copies that may go, those of experts with most copies go first, of
    these the cooler.
    """
    weights = _weights(loads)
    dropped: list[tuple[int, int, int]] = []
    serving = has.any(axis=(1, 2))
    for layer in np.flatnonzero((has.sum(axis=2) > usual).any(axis=0)).tolist():
        mine = has[:, layer].copy()
        copies = mine.sum(axis=0)
        while True:
            over = mine.sum(axis=1) - usual
            spared = mine & (copies > redundancy)
            if (spared & (over > 0)[:, None]).any():
                spared &= (over > 0)[:, None]
            elif not spared.any() or (over <= 0).all() or (over[serving] < 0).any():
                break  # else a copy elsewhere goes, so that there is room for one that a crowded shard could give away
            shard = max(np.flatnonzero(spared.any(axis=1)).tolist(), key=lambda s: (over[s], -s))
            experts = np.flatnonzero(spared[shard]).tolist()
            expert = min(experts, key=lambda e: (-copies[e], weights[layer, e], e))
            mine[shard, expert] = False
            copies[expert] -= 1
            dropped.append((shard, layer, expert))
    return dropped


def evened(has: Mask, loads: Floats, *, able: Mask, usual: int) -> list[tuple[int, int, int]]:
    """(shard, layer, expert) for each copy to add, so that those who hold more than `usual` of a layer can give one up.

    has: what present shards hold, False for others [shards, layers, experts]; able: shards that may get more [shards].
    The coolest experts go, each to the shard that holds least. To be asked when nothing is surplus or endangered.
    """
    weights = _weights(loads)
    added: list[tuple[int, int, int]] = []
    for layer in np.flatnonzero((has.sum(axis=2) > usual).any(axis=0)).tolist():
        mine = has[:, layer].copy()
        for giver in np.flatnonzero(mine.sum(axis=1) > usual).tolist():
            for expert in sorted(np.flatnonzero(mine[giver]).tolist(), key=lambda e: (weights[layer, e], e)):
                held = mine.sum(axis=1)
                takers = np.flatnonzero(able & ~mine[:, expert] & (held < usual)).tolist()
                if held[giver] > usual and takers:
                    taker = min(takers, key=lambda s: (held[s], s))
                    mine[giver, expert], mine[taker, expert] = False, True
                    added.append((taker, layer, expert))
    return added


def filled(has: Mask, loads: Floats, *, able: Mask, usual: int) -> list[tuple[int, int, int]]:
    """(shard, layer, expert) for each copy to add, so that each able shard holds `usual` experts of a layer.

    has: what present shards hold, False for others [shards, layers, experts]; able: shards that may get more [shards].
    The experts with most load a copy go first, each to the able shard with the least time.
    """
    weights = _weights(loads)
    added: list[tuple[int, int, int]] = []
    short = (has.sum(axis=2) < usual) & able[:, None]
    for layer in np.flatnonzero(short.any(axis=0)).tolist():
        mine = has[:, layer].copy()
        while (open_ := ~mine & (able & (mine.sum(axis=1) < usual))[:, None]).any():
            parts = np.where(open_.any(axis=0), weights[layer] / np.maximum(1, mine.sum(axis=0)), -np.inf)
            expert, times = int(parts.argmax()), _times(mine, weights[layer])
            shard = min(np.flatnonzero(open_[:, expert]).tolist(), key=lambda s: (times[s], s))
            mine[shard, expert] = True
            added.append((shard, layer, expert))
    return added


def lent(has: Mask, loads: Floats, *, redundancy: int, usual: int) -> IntArray:
    """Experts for a shard that comes to those of `has`: [layers, usual] expert ids, -1 where there are no more.

    has: what the others hold or are ordered to [shards, layers, experts]; usual: experts of a layer that each shard is
    to hold with the newcomer. They are taken from the shard that holds most beyond `usual`, then from the one with most
    time: of its experts the one whose load is closest to what the newcomer lacks of an even part, over what it has yet
    to get.
    """
    weights = _weights(loads)
    shards, layers, experts = has.shape
    kept = has.copy()
    for shard, layer, expert in surplus(has, loads, redundancy=redundancy, usual=usual):
        kept[shard, layer, expert] = False
    taken = np.full((layers, usual), -1, dtype=np.int32)
    for layer in range(layers):
        mine = kept[:, layer].copy()
        parts = weights[layer] / np.maximum(1, mine.sum(axis=0))
        even, got = float(weights[layer].sum()) / (shards + 1), 0.0
        most = min(usual, int(mine.any(axis=0).sum()))
        for nth in range(most):
            counts, times = mine.sum(axis=1), (mine * parts).sum(axis=1)
            free = np.ones(experts, dtype=bool)
            free[taken[layer, :nth]] = False
            givers = np.flatnonzero((mine & free).any(axis=1)).tolist()
            if not givers:
                break
            giver = max(givers, key=lambda s: (max(0, counts[s] - usual), times[s], -s))
            aim = (even - got) / (most - nth)
            expert = min(np.flatnonzero(mine[giver] & free).tolist(), key=lambda e: (abs(parts[e] - aim), e))
            mine[giver, expert] = False
            got += float(parts[expert])
            taken[layer, nth] = expert
    return taken


def _weights(loads: Floats) -> Floats:
    """Loads with a little for the idle: [layers, experts], > 0."""
    mean = loads.sum(axis=1, keepdims=True) / max(1, loads.shape[1])  # of a dense model there are none
    weights: Floats = np.maximum(loads, np.where(mean > 0, _LEAST * mean, 1.0))
    return weights


def _times(held: Mask, weights: Floats) -> list[float]:
    """Time of each shard from what they hold [shards, experts] and the experts' weights [experts]."""
    times: list[float] = (held * (weights / np.maximum(1, held.sum(axis=0)))).sum(axis=1).tolist()
    return times
