// Figures now, and how they came to be over the last 10 minutes. All charts share one cursor.
import { memo } from "preact/compat";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { figure, milliseconds, NONE, percent } from "./format";
import { useDark, useWidth } from "./hooks";
import { colour } from "./theme";
import type { MeshEvent, Sample } from "./types";

const HEIGHT = 92;
const WINDOW_S = 600;
const MARKED: Record<string, string> = { shard_lost: "bad", replica_lost: "bad", shard_serving: "good", replica_ready: "good" };

interface Line {
  label: string;
  colour: string;
  value: (sample: Sample) => number | null;
  stepped?: boolean;
  filled?: boolean;
}

interface Chart {
  id: string;
  title: string;
  unit: string;
  now: (sample: Sample) => string;
  show: (value: number) => string;
  lines: Line[];
  /** The scale reaches at least to here. */
  top: number;
  fixed?: boolean;
}

const CHARTS: Chart[] = [
  {
    id: "ratio",
    title: "Attention : experts",
    unit: "",
    now: (s) => `${s.attention} : ${s.shards}`,
    show: (v) => figure(v),
    top: 2,
    lines: [
      { label: "attention replicas", colour: "line-2", value: (s) => s.attention, stepped: true },
      { label: "expert shards", colour: "line-1", value: (s) => s.shards, stepped: true },
    ],
  },
  {
    id: "tokens",
    title: "Generated",
    unit: "tokens/s",
    now: (s) => figure(s.tokens_s),
    show: (v) => figure(v),
    top: 5,
    lines: [{ label: "tokens/s", colour: "line-1", value: (s) => s.tokens_s, filled: true }],
  },
  {
    id: "ttft",
    title: "First token",
    unit: "ms",
    now: (s) => milliseconds(s.ttft_s),
    show: (v) => `${figure(v)} ms`,
    top: 10,
    lines: [{ label: "time to first token", colour: "line-1", value: (s) => ms(s.ttft_s) }],
  },
  {
    id: "itl",
    title: "Between tokens",
    unit: "ms",
    now: (s) => milliseconds(s.itl_s),
    show: (v) => `${figure(v)} ms`,
    top: 10,
    lines: [{ label: "time between tokens", colour: "line-1", value: (s) => ms(s.itl_s) }],
  },
  {
    id: "kv",
    title: "KV hits",
    unit: "of prompt tokens",
    now: (s) => percent(s.kv_hits),
    show: (v) => percent(v),
    top: 1,
    fixed: true,
    lines: [{ label: "hits", colour: "line-1", value: (s) => s.kv_hits }],
  },
  {
    id: "balance",
    title: "Balancedness",
    unit: "mean / max",
    now: (s) => (s.balancedness === null ? NONE : s.balancedness.toFixed(2)),
    show: (v) => v.toFixed(2),
    top: 1,
    fixed: true,
    lines: [{ label: "balancedness", colour: "line-1", value: (s) => s.balancedness }],
  },
];

const ms = (seconds: number | null): number | null => (seconds === null ? null : 1000 * seconds);

/** The newest sample that says anything about a chart's first line; within a minute. */
function newest(samples: Sample[], chart: Chart): Sample | undefined {
  const last = samples.at(-1);
  return samples.findLast((s) => s.at > last!.at - 60 && chart.lines[0]!.value(s) !== null) ?? last;
}

interface Props {
  samples: Sample[];
  events: MeshEvent[];
}

export const Charts = memo(function Charts({ samples, events }: Props) {
  return (
    <section class="charts" aria-label="Figures over the last 10 minutes">
      {CHARTS.map((chart) => (
        <Plot key={chart.id} chart={chart} samples={samples} events={events} />
      ))}
    </section>
  );
});

function Plot({ chart, samples, events }: Props & { chart: Chart }) {
  const frame = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const marks = useRef(events);
  marks.current = events;
  const width = useWidth(frame);
  const dark = useDark();
  const sample = newest(samples, chart);
  const now = sample === undefined ? NONE : chart.now(sample);

  useEffect(() => {
    if (width === 0) return;
    plot.current = new uPlot(options(chart, width, () => marks.current), columns(chart, samples), frame.current!);
    return () => {
      plot.current?.destroy();
      plot.current = null;
    };
  }, [width, dark]);
  useEffect(() => plot.current?.setData(columns(chart, samples)), [samples]);

  return (
    <figure class="panel chart" data-chart={chart.id}>
      <figcaption>
        <span class="title">{chart.title}</span>
        <span class="now">
          <b data-testid={`now-${chart.id}`}>{now}</b> {chart.unit}
        </span>
      </figcaption>
      <div ref={frame} class="plot" role="img" aria-label={`${chart.title}, last 10 minutes; now ${now} ${chart.unit}`} />
    </figure>
  );
}

function columns(chart: Chart, samples: Sample[]): uPlot.AlignedData {
  return [samples.map((s) => s.at), ...chart.lines.map((line) => samples.map(line.value))];
}

function options(chart: Chart, width: number, events: () => MeshEvent[]): uPlot.Options {
  const axis = {
    stroke: colour("faint"),
    font: "10.5px system-ui, sans-serif",
    ticks: { show: false },
    grid: { stroke: colour("grid"), width: 1 },
  };
  return {
    width,
    height: HEIGHT,
    padding: [6, 2, 0, 0],
    legend: { show: false },
    cursor: {
      sync: { key: "mesh" },
      y: false,
      drag: { x: false, y: false },
      points: { size: 6 },
    },
    scales: {
      x: { time: true, range: (_, __, max) => [(max ?? 0) - WINDOW_S, max ?? 0] },
      y: { range: (_, __, max) => [0, chart.fixed ? chart.top : Math.max(chart.top, (max ?? 0) * 1.15)] },
    },
    axes: [
      { ...axis, size: 18, gap: 2, space: 56, grid: { show: false }, values: (_, at) => at.map(clockOf) },
      { ...axis, size: 40, gap: 4, space: 28, values: (_, values) => values.map((v) => (chart.fixed ? chart.show(v) : figure(v))) },
    ],
    series: [
      {},
      ...chart.lines.map((line) => ({
        label: line.label,
        stroke: colour(line.colour),
        width: 1.75,
        fill: line.filled ? colour("fill") : undefined,
        points: { show: false },
        spanGaps: !line.stepped,
        paths: line.stepped ? uPlot.paths.stepped!({ align: 1 }) : undefined,
      })),
    ] as uPlot.Series[],
    hooks: { draw: [(plot) => mark(plot, events())], setCursor: [(plot) => tell(plot, chart)] },
  };
}

function clockOf(at: number): string {
  return new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
}

/** Members that came and went, as thin lines. */
function mark(plot: uPlot, events: MeshEvent[]): void {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.lineWidth = window.devicePixelRatio;
  ctx.setLineDash([3 * window.devicePixelRatio, 3 * window.devicePixelRatio]);
  for (const event of events) {
    const kind = MARKED[event.kind];
    if (kind === undefined || event.at < (plot.scales.x!.min ?? 0)) continue;
    const x = Math.round(plot.valToPos(event.at, "x", true));
    if (x > bbox.left + bbox.width) continue;
    ctx.strokeStyle = colour(kind);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

/** The values under the shared cursor, in a chart's own corner. */
function tell(plot: uPlot, chart: Chart): void {
  let label = plot.over.querySelector<HTMLElement>(".under");
  if (label === null) {
    label = document.createElement("div");
    label.className = "under";
    plot.over.append(label);
  }
  const at = plot.cursor.idx;
  const values = chart.lines.map((_, i) => (at === null || at === undefined ? null : plot.data[i + 1]![at]));
  const known = values.filter((v): v is number => v !== null && v !== undefined);
  label.textContent = known.length && (plot.cursor.left ?? -1) >= 0 ? known.map(chart.show).join(" : ") : "";
}
