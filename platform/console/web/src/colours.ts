// Colours of the heat map. One lightness direction each, so that they read without hue: cold is close to the page.

type Rgb = readonly [number, number, number];

const LIGHT: readonly Rgb[] = [
  [240, 244, 244],
  [196, 226, 218],
  [126, 196, 190],
  [62, 155, 172],
  [44, 109, 152],
  [49, 62, 116],
  [34, 22, 58],
];
const DARK: readonly Rgb[] = [
  [24, 30, 40],
  [38, 52, 92],
  [44, 88, 140],
  [48, 130, 162],
  [84, 176, 172],
  [168, 220, 184],
  [246, 250, 214],
];

/** After Okabe and Ito: told apart with any kind of colour vision. */
const SHARDS: readonly Rgb[] = [
  [0, 114, 178],
  [230, 159, 0],
  [0, 158, 115],
  [204, 121, 167],
  [86, 180, 233],
  [213, 94, 0],
  [150, 140, 30],
  [120, 120, 130],
];

/** 256 steps from cold to hot. */
export function ramp(dark: boolean): Uint8ClampedArray {
  const stops = dark ? DARK : LIGHT;
  const table = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    for (let c = 0; c < 3; c++) {
      const from = stops[low]![c]!;
      table[3 * i + c] = from + (at - low) * (stops[low + 1]![c]! - from);
    }
  }
  return table;
}

/** The ninth and later ones are the same hues, paler and darker in turn. */
export function shardColour(index: number): Rgb {
  const [r, g, b] = SHARDS[index % SHARDS.length]!;
  const turn = Math.floor(index / SHARDS.length) % 3;
  const [towards, part] = [[0, 0], [255, 0.45], [0, 0.4]][turn] as [number, number];
  const mix = (channel: number): number => Math.round(channel + part * (towards - channel));
  return [mix(r), mix(g), mix(b)];
}

export function css(colour: Rgb): string {
  return `rgb(${colour.join(" ")})`;
}

export function gradient(dark: boolean): string {
  return `linear-gradient(90deg, ${(dark ? DARK : LIGHT).map(css).join(", ")})`;
}
