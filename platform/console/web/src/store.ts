// The state of the page, and the loops that keep it fresh while somebody looks.
import { follow, forgetKey, get, hasKey, NoAnswer, setKey, type Trouble } from "./api";
import type { Heat, History, MeshEvent, Placement, Sample, Status } from "./types";

const PERIOD_MS = 2000;
const MOST_DELAY_MS = 10_000;
const KEPT_EVENTS = 1000;
const KEPT_S = 600;

export interface State {
  status: Status | null;
  placement: Placement | null;
  heat: Heat | null;
  samples: Sample[];
  now: Pick<History, "shards" | "attention">;
  events: MeshEvent[];
  trouble: Trouble | null;
  message: string;
  /** When the mesh last answered, in milliseconds. */
  heard: number;
  hasKey: boolean;
}

export let state: State = {
  status: null,
  placement: null,
  heat: null,
  samples: [],
  now: { shards: {}, attention: {} },
  events: [],
  trouble: null,
  message: "",
  heard: 0,
  hasKey: hasKey(),
};

const readers = new Set<() => void>();

export function subscribe(reader: () => void): () => void {
  readers.add(reader);
  return () => readers.delete(reader);
}

function set(change: Partial<State>): void {
  state = { ...state, ...change };
  for (const reader of readers) reader();
}

async function look(): Promise<void> {
  const status = await get<Status>("status");
  const { placement } = state;
  const moved = placement === null || placement.epoch !== status.placement.epoch;
  const moving = status.placement.moves > 0 || (placement?.running.length ?? 0) > 0;
  const since = state.samples.at(-1)?.at ?? 0;
  const [heat, history, fresh] = await Promise.all([
    get<Heat>("heat"),
    get<History>(`history?after=${since}`),
    moved || moving ? get<Placement>("placement") : placement,
  ]);
  set({
    status,
    heat: sameHeat(state.heat, heat) ? state.heat : heat,
    placement: fresh,
    samples: history.samples.length ? joined(state.samples, history.samples) : state.samples,
    now: { shards: history.shards, attention: history.attention },
    trouble: null,
    message: "",
    heard: Date.now(),
  });
}

/** Whether nothing has changed, so that nothing needs to be drawn. */
function sameHeat(a: Heat | null, b: Heat): boolean {
  return (
    a !== null &&
    a.rows_a_second.length === b.rows_a_second.length &&
    a.rows_a_second.every((row, i) => {
      const other = b.rows_a_second[i]!;
      return row.length === other.length && row.every((rows, j) => rows === other[j]);
    })
  );
}

function joined(before: Sample[], more: Sample[]): Sample[] {
  const oldest = more.at(-1)!.at - KEPT_S;
  return [...before, ...more].filter((sample) => sample.at > oldest);
}

function take(event: MeshEvent): void {
  const restarted = event.id <= (state.events.at(-1)?.id ?? 0);
  set({ events: restarted ? [event] : [...state.events, event].slice(-KEPT_EVENTS) });
  for (const go of [...waiting]) go();
}

let stop = new AbortController();
/** Whoever waits for its next turn; an event ends the waiting. */
const waiting = new Set<() => void>();

const pause = (ms: number, signal: AbortSignal): Promise<void> =>
  new Promise((resolve) => {
    const go = (): void => {
      clearTimeout(timer);
      waiting.delete(go);
      signal.removeEventListener("abort", go);
      resolve();
    };
    const timer = setTimeout(go, ms);
    waiting.add(go);
    signal.addEventListener("abort", go);
  });

/** Does something again and again, less often while it fails; ends with the signal or for want of a key. */
async function loop(what: () => Promise<void>, signal: AbortSignal): Promise<void> {
  let delay = PERIOD_MS;
  while (!signal.aborted) {
    try {
      await what();
      delay = PERIOD_MS;
    } catch (error) {
      if (signal.aborted) return;
      const trouble = error instanceof NoAnswer ? error.trouble : "unreachable";
      set({ trouble, message: error instanceof Error ? error.message : String(error) });
      if (trouble === "locked" || trouble === "refused") return stop.abort();
      delay = Math.min(delay * 1.5, MOST_DELAY_MS);
    }
    await pause(delay, signal);
  }
}

/** (Re)starts asking. */
export function start(): void {
  stop.abort();
  stop = new AbortController();
  const { signal } = stop;
  void loop(look, signal);
  void loop(() => follow(state.events.at(-1)?.id ?? 0, signal, take), signal);
}

export function unlock(key: string): void {
  setKey(key);
  set({ hasKey: true, trouble: null, message: "" });
  start();
}

export function lock(): void {
  stop.abort();
  forgetKey();
  const empty = { status: null, placement: null, heat: null, samples: [], events: [] };
  set({ ...empty, now: { shards: {}, attention: {} }, hasKey: false, trouble: "locked", message: "" });
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) stop.abort();
  else if (state.trouble !== "locked" && state.trouble !== "refused") start();
});
