import { useEffect, useReducer, useState } from "preact/hooks";
import { isDark, onTheme } from "./theme";
import { type State, state, subscribe } from "./store";

export function useStore(): State {
  const [, again] = useReducer((n: number) => n + 1, 0);
  useEffect(() => subscribe(() => again(undefined as never)), []);
  return state;
}

export function useDark(): boolean {
  const [dark, setDark] = useState(isDark());
  useEffect(() => onTheme(() => setDark(isDark())), []);
  return dark;
}

/** Width of an element in CSS pixels, as it changes. */
export function useWidth(element: { current: HTMLElement | null }): number {
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const watcher = new ResizeObserver(([entry]) => setWidth(Math.floor(entry!.contentRect.width)));
    watcher.observe(element.current!);
    return () => watcher.disconnect();
  }, []);
  return width;
}
