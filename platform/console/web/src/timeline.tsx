// What happened, the newest first.
import { memo } from "preact/compat";
import { useState } from "preact/hooks";
import { clock } from "./format";
import type { MeshEvent } from "./types";

const SHOWN = 200;
const BAD = new Set(["shard_lost", "replica_lost", "experts_missing", "moves_failed"]);
const GOOD = new Set(["shard_serving", "replica_ready", "experts_whole", "moves_done"]);
const GROUPS: Record<string, (kind: string) => boolean> = {
  Members: (kind) => /^(shard|replica|office|scale)/.test(kind),
  Experts: (kind) => /^(experts|takeover|moves|freeze|traffic)/.test(kind),
  Epochs: (kind) => kind === "epoch",
};

function look(kind: string): [string, string] {
  if (BAD.has(kind)) return ["bad", "✕"];
  if (GOOD.has(kind)) return ["good", "●"];
  return ["plain", "○"];
}

export const Timeline = memo(function Timeline({ events }: { events: MeshEvent[] }) {
  const [hidden, setHidden] = useState<readonly string[]>(["Epochs"]);
  const kept = events.filter((event) => !hidden.some((group) => GROUPS[group]!(event.kind)));
  const shown = kept.slice(-SHOWN).reverse();
  const toggle = (group: string): void =>
    setHidden(hidden.includes(group) ? hidden.filter((other) => other !== group) : [...hidden, group]);
  return (
    <section class="panel events" aria-labelledby="events-title">
      <header>
        <h2 id="events-title">Timeline</h2>
        <div class="choice" role="group" aria-label="Which events are shown">
          {Object.keys(GROUPS).map((group) => (
            <button key={group} type="button" aria-pressed={!hidden.includes(group)} onClick={() => toggle(group)}>
              {group}
            </button>
          ))}
        </div>
      </header>
      <ol class="scroll" tabIndex={0} aria-labelledby="events-title" data-testid="events">
        {shown.map((event) => {
          const [health, sign] = look(event.kind);
          return (
            <li key={event.id} class={health} data-kind={event.kind}>
              <time dateTime={new Date(event.at * 1000).toISOString()}>{clock(event.at)}</time>
              <i aria-hidden="true">{sign}</i>
              <span>{event.text}</span>
            </li>
          );
        })}
        {shown.length === 0 && <li class="faint">Nothing has happened since the controller took office.</li>}
      </ol>
    </section>
  );
});
