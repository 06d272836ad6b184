// Figures as people read them: three digits that count, one unit, a dash where there is nothing.

export const NONE = "–";

export function figure(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toFixed(size >= 1e7 ? 1 : 2)}M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(size >= 1e5 ? 0 : 1)}k`;
  if (size >= 100 || Number.isInteger(value)) return value.toFixed(0);
  return value.toFixed(size >= 10 ? 1 : 2);
}

export function percent(part: number | null | undefined, digits = 0): string {
  return part === null || part === undefined ? NONE : `${(100 * part).toFixed(digits)} %`;
}

export function milliseconds(seconds: number | null | undefined): string {
  return seconds === null || seconds === undefined ? NONE : figure(Math.round(seconds * 1e4) / 10);
}

export function clock(at: number): string {
  return new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
}

export function ago(seconds: number): string {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return seconds < 120 ? `${seconds.toFixed(0)} s` : `${(seconds / 60).toFixed(0)} min`;
}

export function count(number: number, what: string): string {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

/** Enough of a long id to tell it from others. */
export function short(id: string): string {
  return id.length > 10 ? id.slice(0, 8) : id;
}
