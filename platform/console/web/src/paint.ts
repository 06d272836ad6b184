// Draws layers x experts on a canvas: one pixel a cell, scaled up without smoothing, so that 60 x 256 cost next to nothing.
import { ramp, shardColour } from "./colours";

export interface Picture {
  layers: number;
  experts: number;
  /** Width and height of a cell in CSS pixels. */
  cell: readonly [number, number];
  /** Rows a second: [layer][expert]. */
  rows: readonly (readonly number[])[];
  /** What is the hottest colour. */
  most: number;
  /** Serving shard indices: holders[layer][expert]. */
  holders: readonly (readonly (readonly number[])[])[];
  mode: "load" | "placement";
  /** Only this shard's experts are shown in full. */
  only: number | null;
  dark: boolean;
  missing: string;
  gap: string;
}

const ramps = { light: ramp(false), dark: ramp(true) };
const DIMMED = 56;

export function paint(canvas: HTMLCanvasElement, picture: Picture): void {
  const { layers, experts, cell } = picture;
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [experts * cell[0], layers * cell[1]];
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d")!;
  context.imageSmoothingEnabled = false;
  context.drawImage(pixels(picture), 0, 0, canvas.width, canvas.height);
  context.scale(scale, scale);
  if (Math.min(...cell) >= 6) lines(context, picture, width, height);
  hatch(context, picture);
  canvas.dataset.draws = String(Number(canvas.dataset.draws ?? 0) + 1);
}

function pixels(picture: Picture): OffscreenCanvas {
  const { layers, experts, rows, most, holders, mode, only, dark } = picture;
  const small = new OffscreenCanvas(experts, layers);
  const context = small.getContext("2d")!;
  const image = context.createImageData(experts, layers);
  const table = dark ? ramps.dark : ramps.light;
  for (let layer = 0, at = 0; layer < layers; layer++) {
    for (let expert = 0; expert < experts; expert++, at += 4) {
      const held = holders[layer]?.[expert] ?? [];
      const load = Math.min(1, (rows[layer]?.[expert] ?? 0) / most);
      let colour: readonly number[];
      if (mode === "load") {
        const step = 3 * Math.round(255 * load);
        colour = [table[step]!, table[step + 1]!, table[step + 2]!];
      } else {
        colour = held.length ? shardColour(only !== null && held.includes(only) ? only : held[0]!) : [128, 128, 128];
      }
      image.data.set(colour, at);
      image.data[at + 3] = only !== null && !held.includes(only) ? DIMMED : 255;
    }
  }
  context.putImageData(image, 0, 0);
  return small;
}

function lines(context: CanvasRenderingContext2D, picture: Picture, width: number, height: number): void {
  context.fillStyle = picture.gap;
  for (let expert = 1; expert < picture.experts; expert++) context.fillRect(Math.round(expert * picture.cell[0]) - 1, 0, 1, height);
  for (let layer = 1; layer < picture.layers; layer++) context.fillRect(0, layer * picture.cell[1] - 1, width, 1);
}

/** Experts that nobody serves are crossed out: a shape, not only a colour. */
function hatch(context: CanvasRenderingContext2D, { layers, experts, cell, holders, missing }: Picture): void {
  const [w, h] = cell;
  context.beginPath();
  for (let layer = 0; layer < layers; layer++) {
    for (let expert = 0; expert < experts; expert++) {
      if (holders[layer]?.[expert]?.length !== 0) continue;
      const [x, y] = [expert * w, layer * h];
      context.moveTo(x + 1, y + h - 2);
      context.lineTo(x + w - 2, y + 1);
    }
  }
  context.strokeStyle = missing;
  context.lineWidth = Math.min(w, h) >= 6 ? 1.5 : 1;
  context.stroke();
}
