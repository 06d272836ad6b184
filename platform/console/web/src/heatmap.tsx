// The layers x experts of the mesh: what each has to do, who holds it, and a cursor that mouse and keys move.
import { memo } from "preact/compat";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { css, gradient, shardColour } from "./colours";
import { count, figure, percent, short } from "./format";
import { useDark, useWidth } from "./hooks";
import { paint } from "./paint";
import { colour } from "./theme";
import type { Heat, Placement } from "./types";

const LABELS = 34;
const HOT = 5;

type Mode = "load" | "placement";
type Cell = readonly [layer: number, expert: number];

interface Props {
  heat: Heat;
  placement: Placement;
  /** Index of the shard whose experts are brought out. */
  only: number | null;
}

/** Serving shard indices of each expert: [layer][expert]. */
function holdersOf(placement: Placement): number[][][] {
  const holders = placement.layers.map(() => Array.from({ length: placement.experts }, (): number[] => []));
  placement.slots.forEach((layers, index) => {
    if (placement.shards[index] === undefined) return;
    layers.forEach((slots, layer) => {
      for (const expert of slots) if (expert >= 0) holders[layer]?.[expert]?.push(index);
    });
  });
  return holders;
}

function hottest(rows: readonly (readonly number[])[]): [Cell, number][] {
  const all: [Cell, number][] = [];
  rows.forEach((row, layer) => row.forEach((value, expert) => value > 0 && all.push([[layer, expert], value])));
  return all.sort((a, b) => b[1] - a[1]).slice(0, HOT);
}

/** The hottest colour is for a load that one expert in 200 exceeds, so that a single one doesn't make all others cold. */
function scaleOf(rows: readonly (readonly number[])[]): number {
  const sorted = rows.flat().sort((a, b) => a - b);
  return Math.max(sorted[Math.floor(0.995 * (sorted.length - 1))] ?? 0, 1);
}

/** Of the cells: as wide as the space allows, if need be broken pixels, and no smaller than can be told apart. */
function cellOf(width: number, layers: number, experts: number): readonly [number, number] {
  const wide = Math.max(3.2, Math.min(64, (width - LABELS) / experts));
  return [wide, Math.max(6, Math.min(16, Math.floor(430 / layers)))];
}

export const HeatMap = memo(function HeatMap({ heat, placement, only }: Props) {
  const [mode, setMode] = useState<Mode>("load");
  const [cursor, setCursor] = useState<Cell | null>(null);
  const frame = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const grid = useRef<HTMLDivElement>(null);
  const dark = useDark();
  const width = useWidth(frame);
  const rows = heat.rows_a_second;
  const [layers, experts] = [heat.layers.length, heat.experts];
  const holders = useMemo(() => holdersOf(placement), [placement]);
  const most = useMemo(() => scaleOf(rows), [rows]);
  const hot = useMemo(() => hottest(rows), [rows]);
  const [w, h] = cellOf(width, layers, experts);

  useEffect(() => {
    if (width === 0) return;
    const colours = { missing: colour("bad"), gap: colour("panel") };
    paint(canvas.current!, { layers, experts, cell: [w, h], rows, most, holders, mode, only, dark, ...colours });
  }, [layers, experts, w, h, ...(mode === "load" ? [rows, most] : [null, null]), holders, mode, only, dark, width === 0]);

  const goTo = (layer: number, expert: number): void => {
    const cell: Cell = [Math.max(0, Math.min(layers - 1, layer)), Math.max(0, Math.min(experts - 1, expert))];
    setCursor(cell);
    const view = grid.current!;
    const left = LABELS + cell[1] * w;
    if (left < view.scrollLeft + LABELS) view.scrollLeft = left - LABELS;
    else if (left + w > view.scrollLeft + view.clientWidth) view.scrollLeft = left + w - view.clientWidth;
  };
  const onKey = (event: KeyboardEvent): void => {
    const [layer, expert] = cursor ?? [0, 0];
    const page = Math.max(1, Math.round(layers / 4));
    const steps: Record<string, () => void> = {
      ArrowRight: () => goTo(layer, expert + 1),
      ArrowLeft: () => goTo(layer, expert - 1),
      ArrowDown: () => goTo(layer + 1, expert),
      ArrowUp: () => goTo(layer - 1, expert),
      Home: () => goTo(event.ctrlKey ? 0 : layer, 0),
      End: () => goTo(event.ctrlKey ? layers - 1 : layer, experts - 1),
      PageDown: () => goTo(layer + page, expert),
      PageUp: () => goTo(layer - page, expert),
      Escape: () => setCursor(null),
    };
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    step();
  };
  const onMove = (event: PointerEvent): void => {
    const box = canvas.current!.getBoundingClientRect();
    const [layer, expert] = [Math.floor((event.clientY - box.top) / h), Math.floor((event.clientX - box.left) / w)];
    if (layer < 0 || layer >= layers || expert < 0 || expert >= experts) return;
    if (cursor?.[0] !== layer || cursor[1] !== expert) setCursor([layer, expert]);
  };

  const words = cursor === null ? null : describe(cursor, heat, holders, placement);
  const every = Math.ceil(11 / h);
  return (
    <section class="panel heat" aria-labelledby="heat-title">
      <header>
        <h2 id="heat-title">Experts</h2>
        <p class="sub">
          {count(layers, "layer")} × {count(experts, "expert")}
        </p>
        <div class="choice" role="group" aria-label="What the colours show">
          {(["load", "placement"] as const).map((name) => (
            <button key={name} type="button" aria-pressed={mode === name} onClick={() => setMode(name)}>
              {name === "load" ? "Load" : "Placement"}
            </button>
          ))}
        </div>
      </header>
      <div ref={frame}>
        <div
          ref={grid}
          class="grid"
          role="grid"
          tabIndex={0}
          aria-label="Layers by experts; arrow keys move"
          aria-rowcount={layers}
          aria-colcount={experts}
          aria-activedescendant={cursor === null ? undefined : "heat-cell"}
          onKeyDown={onKey}
          onFocus={() => setCursor((at) => at ?? [0, 0])}
          onPointerMove={onMove}
        >
          <div class="layers" aria-hidden="true" style={{ height: `${layers * h}px` }}>
            {heat.layers.map((number, layer) =>
              layer % every ? null : (
                <span key={number} class={cursor?.[0] === layer ? "here" : ""} style={{ top: `${layer * h}px`, lineHeight: `${h}px` }}>
                  {number}
                </span>
              ),
            )}
          </div>
          <div class="cells">
            <canvas ref={canvas} aria-hidden="true" />
            {cursor && (
              <div class="cursor" style={{ transform: `translate(${cursor[1] * w}px, ${cursor[0] * h}px)`, width: `${w}px`, height: `${h}px` }} />
            )}
            {cursor && words && (
              <div role="row" class="unseen" aria-rowindex={cursor[0] + 1}>
                <div id="heat-cell" role="gridcell" aria-colindex={cursor[1] + 1} aria-selected="true">
                  {words.where}: {words.rows}, {words.share}, {words.held}
                </div>
              </div>
            )}
          </div>
        </div>
      </div>
      <p class="inspector" data-testid="inspector">
        {words ? (
          <>
            <b>{words.where}</b>
            <span>{words.rows}</span>
            <span>{words.share}</span>
            <span class={words.missing ? "bad" : ""}>{words.held}</span>
          </>
        ) : (
          <span class="faint">Point at an expert, or use the arrow keys, to see its load and who holds it.</span>
        )}
      </p>
      <footer>
        {mode === "load" ? (
          <span class="legend">
            0<i style={{ background: gradient(dark) }} />
            {figure(most)} rows/s and more
          </span>
        ) : (
          <span class="legend">
            {Object.keys(placement.shards).map((index) => (
              <span key={index}>
                <i class="dot" style={{ background: css(shardColour(Number(index))) }} />
                {index}
              </span>
            ))}
          </span>
        )}
        <span class="legend">
          <i class="crossed" /> served by nobody
        </span>
        <span class="hot">
          {hot.length > 0 && <span class="faint">hottest</span>}
          {hot.map(([[layer, expert], value]) => (
            <button key={`${layer}.${expert}`} type="button" onClick={() => (goTo(layer, expert), grid.current!.focus())}>
              {heat.layers[layer]}·{expert} <b>{figure(value)}</b>
            </button>
          ))}
        </span>
      </footer>
    </section>
  );
});

function describe([layer, expert]: Cell, heat: Heat, holders: number[][][], placement: Placement) {
  const row = heat.rows_a_second[layer] ?? [];
  const rows = row[expert] ?? 0;
  const total = row.reduce((sum, value) => sum + value, 0);
  const held = holders[layer]?.[expert] ?? [];
  const names = held.map((index) => `${index} (${short(placement.shards[index]!)})`).join(", ");
  return {
    where: `Layer ${heat.layers[layer]}, expert ${expert}`,
    rows: `${figure(rows)} rows/s`,
    share: `${percent(total > 0 ? rows / total : 0, 1)} of its layer`,
    held: held.length ? `on shard ${names}` : "served by nobody",
    missing: held.length === 0,
  };
}
