// Light, dark, or as the system says. Only the choice is remembered.
const THEME = "expertmesh.theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const readers = new Set<() => void>();

export type Choice = "auto" | "light" | "dark";

export function choice(): Choice {
  const kept = localStorage.getItem(THEME);
  return kept === "light" || kept === "dark" ? kept : "auto";
}

export function isDark(): boolean {
  return choice() === "auto" ? system.matches : choice() === "dark";
}

export function choose(next: Choice): void {
  if (next === "auto") localStorage.removeItem(THEME);
  else localStorage.setItem(THEME, next);
  apply();
}

export function onTheme(reader: () => void): () => void {
  readers.add(reader);
  return () => readers.delete(reader);
}

export function apply(): void {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  for (const reader of readers) reader();
}

/** A colour of the style sheet, for what is drawn on a canvas. */
export function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

system.addEventListener("change", apply);
