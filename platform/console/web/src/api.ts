// Asking the mesh. The key is kept for this tab only and goes nowhere but into the Authorization header.
import type { MeshEvent } from "./types";

const KEY = "expertmesh.key";
const SILENCE_MS = 30_000;

export type Trouble = "locked" | "refused" | "limited" | "away" | "unreachable";

/** Why there is no answer: no key or an unknown one, one without the scope, one over its limits, no controller, nobody. */
export class NoAnswer extends Error {
  constructor(
    readonly trouble: Trouble,
    message: string,
  ) {
    super(message);
  }
}

export const hasKey = (): boolean => sessionStorage.getItem(KEY) !== null;
export const setKey = (key: string): void => sessionStorage.setItem(KEY, key);
export const forgetKey = (): void => sessionStorage.removeItem(KEY);

async function ask(path: string, signal?: AbortSignal): Promise<Response> {
  const key = sessionStorage.getItem(KEY);
  let response: Response;
  try {
    response = await fetch(path, {
      headers: key === null ? {} : { Authorization: `Bearer ${key}` },
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      signal: signal ?? null,
    });
  } catch (error) {
    throw new NoAnswer("unreachable", String(error));
  }
  if (response.ok) return response;
  const said = await response
    .json()
    .then((body: { error?: { message?: string } }) => body.error?.message)
    .catch(() => undefined);
  const message = said ?? `HTTP ${response.status}`;
  if (response.status === 401) throw new NoAnswer("locked", message);
  if (response.status === 403) throw new NoAnswer("refused", message);
  if (response.status === 429) throw new NoAnswer("limited", message);
  throw new NoAnswer(response.status === 503 ? "away" : "unreachable", message);
}

/** The JSON of a route below /mesh. */
export async function get<T>(route: string): Promise<T> {
  const response = await ask(`mesh/${route}`, AbortSignal.timeout(SILENCE_MS));
  return (await response.json()) as T;
}

/** Follows the timeline from `after` until the stream ends; EventSource can't send a key. */
export async function follow(after: number, signal: AbortSignal, take: (event: MeshEvent) => void): Promise<void> {
  const silence = new AbortController();
  const response = await ask(`mesh/events?after=${after}`, AbortSignal.any([signal, silence.signal]));
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const timer = setTimeout(() => silence.abort(), SILENCE_MS);
    const { done, value } = await reader.read().finally(() => clearTimeout(timer));
    if (done) return;
    text += value;
    const messages = text.split("\n\n");
    text = messages.pop()!;
    for (const message of messages) {
      const data = message.split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) take(JSON.parse(data.map((line) => line.slice(6)).join("\n")) as MeshEvent);
    }
  }
}
