"""How even is the work of expert shards, for our placement and dispatch and for others'?

    python -m benchmarks.balance [--loads FILE.npz] [--shards S] [--redundant R] [--batch B] [--quick] [--demo]

FILE holds arrays `old` and `new`, each [layers, experts]. Experts are placed on `old`, each once with R slots a layer
for further copies, and judged on `new`. Without it: 48 layers of 128 experts with seeded log-normal loads, the hottest
expert at 6 to 12 times the mean, for a full change of subject (the figures at the top of the JSON) and for a drift
(`drift`), the same at 8, 32 and 64 shards (`shards`), and loads recorded from the demo model on prose and on code
(`demo`; it is built if it isn't there, which takes some CPU-minutes). --quick: 8 layers, no other numbers of shards
and no demo model, unless --demo asks for it.

Balancedness is the mean over layers of mean / max rows of a shard. `static` is one copy of each expert; `eplb` is
vLLM's EPLB: round-robin over copies, our dispatch, and the LP's optimum, all on its placement for `old`, and the share
of slots that it moves when it is called with `new`, after which it would reach `after`; `ours` is our placement after
so many steps of re-placement; `unchanged` is our placement judged on `old`. `dispatch.of_lp` is LP's optimum / our
maximum, mean over layers, the least over placements (ours after each number of steps, EPLB's for `new`);
`us_per_layer` one decision on the last of ours, `plan_cpu_s` the plan of all 16 steps. `batches` samples steps of B
tokens, 8 experts each, drawn from `new`, and judges our placement after 8 steps: EPLB's round-robin, our dispatch, and
the LP, on the same tokens. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
import timeit
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import eplb_slots, lp_max_load, round_robin_loads
from benchmarks.recorded import demo_loads
from expertmesh.routing.dispatch.split import LayerSplit
from expertmesh.routing.placement import Limits, applied, balancedness, even_slots, loaded_slots, plan
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.placement.table import Target, build_table

LAYERS, EXPERTS, TOP_K = 48, 128, 8
STEPS = (0, 2, 4, 8, 16)
BATCHES = (64, 256, 1024)
OTHER_SHARDS = (8, 32, 64)
DEMO_SHARDS, DEMO_REDUNDANT = 4, 8
EXPECTATION_TOKENS = 100_000
"""Tokens a layer that stand for the expectation: so many that whole tokens don't matter."""

Floats = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]


def log_normal(rng: np.random.Generator, layers: int, experts: int) -> Floats:
    """Loads [layers, experts] with mean 1 and the hottest expert of each layer at 6 to 12 times that."""
    rows: list[Floats] = []
    while len(rows) < layers:
        row = rng.lognormal(0.0, rng.uniform(0.8, 1.3), experts)
        row /= row.mean()
        if 6 <= row.max() <= 12:
            rows.append(row)
    return np.array(rows)


def drifted(rng: np.random.Generator, loads: Floats) -> Floats:
    """The same subject later: each load times a log-normal factor of sigma 0.35."""
    return loads * rng.lognormal(0.0, 0.35, loads.shape)


class Judged:
    """A placement [shards, layers, slots] under our dispatch, without a cost for opening an expert."""

    def __init__(self, slots: IntArray, experts: int) -> None:
        shards, layers, _ = slots.shape
        targets = {shard: Target(str(shard), "node", ()) for shard in range(shards)}
        self.copies = build_table(0, tuple(range(layers)), experts, slots, targets).copies
        self.shards = shards
        self._equal, self._idle = np.ones(shards), np.zeros(shards)
        self._splits = [LayerSplit(copies, np.ones(shards, dtype=bool)) for copies in self.copies]

    def split(self, layer: int, counts: Counts) -> Counts:
        """One dispatch decision: tokens by copy [E, C]."""
        return self._splits[layer](counts, self._equal, self._idle, 0.0)

    def rows(self, counts: Counts) -> Floats:
        """Rows of each shard for counts [layers, experts]: [layers, shards]."""
        result = np.zeros((len(counts), self.shards))
        for layer, copies in enumerate(self.copies):
            np.add.at(result[layer], copies[copies >= 0], self.split(layer, counts[layer])[copies >= 0])
        return result

    def lp(self, counts: Counts) -> Floats:
        """The LP's maximum by layer: [layers]."""
        pairs = zip(counts, self.copies, strict=True)
        return np.array([lp_max_load(row.astype(np.float64), copies, self.shards) for row, copies in pairs])

    def lp_balancedness(self, counts: Counts) -> float:
        """As if every layer reached the LP's maximum."""
        return float((counts.sum(axis=1) / self.shards / self.lp(counts)).mean())

    def of_lp(self, counts: Counts) -> float:
        """LP's maximum / ours, mean over layers."""
        return float((self.lp(counts) / self.rows(counts).max(axis=1)).mean())

    def us_per_layer(self, counts: Counts) -> float:
        """Time of one decision, mean over layers of the best of five."""
        best = []
        for layer, row in enumerate(counts):
            timer = timeit.Timer(lambda layer=layer, row=row: self.split(layer, row))  # type: ignore[misc]
            best.append(min(timer.repeat(5, 10)) / 10)
        return float(np.mean(best) * 1e6)


def expectation(loads: Floats) -> Counts:
    """Loads as tokens of one large step, [layers, experts]."""
    return np.rint(loads / loads.sum(axis=1, keepdims=True) * EXPECTATION_TOKENS).astype(np.int64)


def compared(old: Floats, new: Floats, shards: int, redundant: int) -> tuple[dict[str, Any], IntArray]:
    """The figures of one pair of loads, and our placement after 8 steps."""
    layers, experts = old.shape
    before, now = expectation(old), expectation(new)
    of_old = eplb_slots(old, shards, redundant)
    of_new = eplb_slots(new, shards, redundant, of_old)
    eplb, eplb_after = Judged(of_old, experts), Judged(of_new, experts)

    start = loaded_slots(old, shards, (experts + redundant) // shards, 1)
    everyone: dict[str, Any] = {"redundancy": 1, "rates": np.ones(shards), "ready": np.ones(shards, dtype=bool)}
    begin = time.process_time()
    moves = plan(start, new, **everyone, limits=Limits(steps=max(STEPS)))
    plan_cpu_s = time.process_time() - begin
    placed = {n: applied(start, [move for move in moves if move.step < n]) for n in STEPS}
    judged = {n: Judged(slots, experts) for n, slots in placed.items()}
    unchanged = applied(start, plan(start, old, **everyone, limits=Limits(steps=max(STEPS))))

    static = Judged(even_slots(layers, experts, shards, 1), experts)
    figures = {
        "static": balancedness(static.rows(now)),
        "eplb": {
            "round_robin": balancedness(round_robin_loads(now, of_old)),
            "ours": balancedness(eplb.rows(now)),
            "lp": eplb.lp_balancedness(now),
            "moved": float((of_old != of_new).mean()),
            "after": {
                "round_robin": balancedness(round_robin_loads(now, of_new)),
                "ours": balancedness(eplb_after.rows(now)),
                "lp": eplb_after.lp_balancedness(now),
            },
        },
        "ours": {
            str(n): {"balancedness": balancedness(judged[n].rows(now)), "moved": float((placed[n] != start).mean())}
            for n in STEPS
        },
        "unchanged": balancedness(Judged(unchanged, experts).rows(before)),
        "dispatch": {
            "of_lp": min(one.of_lp(now) for one in (*judged.values(), eplb_after)),
            "us_per_layer": judged[max(STEPS)].us_per_layer(now),
        },
        "plan_cpu_s": plan_cpu_s,
    }
    return figures, placed[8]


def sampled(new: Floats, slots: IntArray, batch: int, rng: np.random.Generator) -> dict[str, float]:
    """Balancedness of one sampled step of `batch` tokens a layer, TOP_K (token, expert) pairs each."""
    shares = new / new.sum(axis=1, keepdims=True)
    counts = rng.multinomial(batch * TOP_K, shares)
    judged = Judged(slots, new.shape[1])
    return {
        "round_robin": balancedness(round_robin_loads(counts, slots)),
        "ours": balancedness(judged.rows(counts)),
        "lp": judged.lp_balancedness(counts),
    }


def show(title: str, figures: dict[str, Any]) -> None:
    """The figures of one pair of loads as lines of text."""
    eplb, after = figures["eplb"], figures["eplb"]["after"]
    print(f"\n{title}: balancedness")
    print(f"  no copies                      {figures['static']:.3f}")
    for name, key in (("round-robin", "round_robin"), ("our dispatch", "ours"), ("LP bound", "lp")):
        print(f"  EPLB, {name:12}             {eplb[key]:.3f}   ({after[key]:.3f} once it moved {eplb['moved']:.1%})")
    for steps, at in figures["ours"].items():
        even, moved = at["balancedness"], at["moved"]
        print(f"  ours after {steps:>2} steps            {even:.3f}   ({moved:.1%} of the slots moved)")
    print(f"  ours, unchanged traffic        {figures['unchanged']:.3f}")
    dispatch = figures["dispatch"]
    print(f"  dispatch {dispatch['of_lp']:.3f} of the LP in {dispatch['us_per_layer']:.0f} us a layer", end="")
    print(f"; full plan {figures['plan_cpu_s']:.2f} s CPU")


def rounded(value: Any) -> Any:
    """Floats to 4 digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def fitting(experts: int, redundant: int, shards: int) -> int:
    """The least number of redundant slots, at least `redundant`, with which every shard has equally many."""
    return redundant + -(experts + redundant) % shards


def read_loads(path: Path) -> tuple[Floats, Floats]:
    """`old` and `new` of a file. Raises SystemExit if it doesn't hold two equal shapes [layers, experts] of loads."""
    with np.load(path) as file:
        if not {"old", "new"} <= set(file.files):
            raise SystemExit(f"{path}: holds {file.files}, not arrays `old` and `new`")
        old, new = (np.asarray(file[name], dtype=np.float64) for name in ("old", "new"))
    if old.ndim != 2 or old.shape != new.shape:
        raise SystemExit(f"{path}: old is {old.shape}, new is {new.shape}; both must be [layers, experts]")
    for loads in (old, new):
        if not np.isfinite(loads).all() or (loads < 0).any() or (loads.sum(axis=1) <= 0).any():
            raise SystemExit(f"{path}: loads must be finite and not negative, with some load in every layer")
    return old, new


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it prints as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=Path, help="file with arrays `old` and `new`")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--redundant", type=int, default=32, help="slots a layer beside one for each expert")
    parser.add_argument("--batch", type=int, help="tokens of a sampled step; 64, 256 and 1024 if not given")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--demo", action="store_true", help="loads of the demo model also with --quick")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    rng = np.random.default_rng(options.seed)
    if options.loads:
        old, new = read_loads(options.loads)
        drift = None
    else:
        layers = 8 if options.quick else LAYERS
        old, new = log_normal(rng, layers, EXPERTS), log_normal(rng, layers, EXPERTS)
        drift = drifted(rng, old)
    experts = old.shape[1]
    redundant = fitting(experts, options.redundant, options.shards)

    report, after_8 = compared(old, new, options.shards, redundant)
    title = f"{old.shape[0]} x {experts} experts, {redundant} redundant slots"
    show(f"{title}, {options.shards} shards", report)
    report["batches"] = {}
    for batch in (options.batch,) if options.batch else BATCHES:
        report["batches"][str(batch)] = step = sampled(new, after_8, batch, rng)
        print(f"  steps of {batch:>4} tokens: ", "   ".join(f"{name} {value:.3f}" for name, value in step.items()))
    if drift is not None:
        report["drift"], _ = compared(old, drift, options.shards, redundant)
        show(f"{title}, {options.shards} shards, drift", report["drift"])
    if not options.quick:
        report["shards"] = {}
        for shards in OTHER_SHARDS:
            more = fitting(experts, options.redundant, shards)
            report["shards"][str(shards)], _ = compared(old, new, shards, more)
            show(
                f"{old.shape[0]} x {experts} experts, {more} redundant slots, {shards} shards",
                report["shards"][str(shards)],
            )
    if options.demo or not (options.quick or options.loads):
        prose, code = demo_loads()
        report["demo"], _ = compared(prose, code, DEMO_SHARDS, fitting(prose.shape[1], DEMO_REDUNDANT, DEMO_SHARDS))
        show(
            f"demo model, {prose.shape[0]} x {prose.shape[1]} experts, {DEMO_SHARDS} shards, prose to code",
            report["demo"],
        )
    report = rounded(report)
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
