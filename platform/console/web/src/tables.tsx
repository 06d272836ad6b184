// Who serves: shards and attention replicas, with load and health.
import { memo } from "preact/compat";
import { css, shardColour } from "./colours";
import { ago, figure, milliseconds, NONE, percent, short } from "./format";
import type { State } from "./store";
import type { Placement, Replica, Shard, Status } from "./types";

type Health = "good" | "wait" | "bad";
const SIGNS: Record<Health, string> = { good: "●", wait: "◐", bad: "✕" };

export function Sign({ health, word }: { health: Health; word: string }) {
  return (
    <span class={`sign ${health}`}>
      <i aria-hidden="true">{SIGNS[health]}</i> {word}
    </span>
  );
}

function Bar({ part }: { part: number }) {
  const width = `${(100 * Math.min(1, Math.max(0, part))).toFixed(1)}%`;
  return (
    <span class="bar">
      <span class="track">
        <i style={{ width }} />
      </span>
      <span class="n">{percent(part)}</span>
    </span>
  );
}

interface Props {
  status: Status;
  placement: Placement | null;
  now: State["now"];
}

function shardHealth(shard: Shard): [Health, string] {
  if (shard.leaving) return ["wait", "leaving"];
  return shard.ready ? ["good", "serving"] : ["wait", "loading"];
}

interface ShardProps extends Props {
  only: number | null;
  choose: (index: number | null) => void;
}

export const Shards = memo(function Shards({ status, placement, now, only, choose }: ShardProps) {
  const known = new Set(status.shards.map((shard) => shard.index));
  const vacant = (placement?.slots ?? [])
    .map((layers, index) => ({ index, experts: layers.flat().filter((expert) => expert >= 0).length }))
    .filter(({ index, experts }) => experts > 0 && !known.has(index));
  const total = Object.values(now.shards).reduce((sum, shard) => sum + shard.rows_s, 0);
  return (
    <section class="panel table" aria-labelledby="shards-title">
      <header>
        <h2 id="shards-title">Expert shards</h2>
        <p class="sub">
          {status.shards.filter((shard) => shard.ready).length} serve, {status.wanted?.experts ?? NONE} wanted
        </p>
      </header>
      <div class="scroll" tabIndex={0} role="region" aria-labelledby="shards-title">
        <table>
          <thead>
            <tr>
              <th>Shard</th>
              <th>State</th>
              <th class="n">Experts</th>
              <th>Busy</th>
              <th class="n">Rows/s</th>
              <th class="n">Share</th>
              <th class="n">Heard</th>
            </tr>
          </thead>
          <tbody>
            {status.shards.map((shard) => {
              const rate = now.shards[shard.shard];
              const [health, word] = shardHealth(shard);
              const chosen = only === shard.index;
              return (
                <tr key={shard.shard} data-shard={shard.shard} class={chosen ? "chosen" : ""}>
                  <td>
                    <button
                      type="button"
                      class="id"
                      aria-pressed={chosen}
                      title={`${shard.shard} on node ${shard.node}: show only its experts`}
                      onClick={() => choose(chosen ? null : shard.index)}
                    >
                      <i class="dot" style={{ background: css(shardColour(shard.index)) }} />
                      {shard.index} <code>{short(shard.shard)}</code>
                    </button>
                  </td>
                  <td>
                    <Sign health={health} word={word} />
                  </td>
                  <td class="n">{shard.experts}</td>
                  <td>
                    <Bar part={rate?.busy ?? 0} />
                  </td>
                  <td class="n">{figure(rate?.rows_s)}</td>
                  <td class="n">{percent(rate && total > 0 ? rate.rows_s / total : null)}</td>
                  <td class="n">{ago(shard.seen_s)}</td>
                </tr>
              );
            })}
            {vacant.map(({ index, experts }) => (
              <tr key={index} class="vacant">
                <td>
                  <span class="id">
                    <i class="dot" /> {index}
                  </span>
                </td>
                <td>
                  <Sign health="bad" word="nobody" />
                </td>
                <td class="n">{experts}</td>
                <td colSpan={4} class="faint">
                  waits for a shard
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
});

function replicaHealth(replica: Replica, epoch: number): [Health, string] {
  if (!replica.ready) return ["wait", "loading"];
  return replica.epoch > 0 && replica.epoch < epoch ? ["good", "ready, older table"] : ["good", "ready"];
}

export const Replicas = memo(function Replicas({ status, now }: Props) {
  return (
    <section class="panel table" aria-labelledby="replicas-title">
      <header>
        <h2 id="replicas-title">Attention replicas</h2>
        <p class="sub">
          {status.attention.filter((replica) => replica.ready).length} ready, {status.wanted?.attention ?? NONE} wanted
        </p>
      </header>
      <div class="scroll" tabIndex={0} role="region" aria-labelledby="replicas-title">
        <table>
          <thead>
            <tr>
              <th>Replica</th>
              <th>State</th>
              <th class="n">Running</th>
              <th class="n">Waiting</th>
              <th>KV use</th>
              <th class="n">Tokens/s</th>
              <th class="n">First token</th>
              <th class="n">Heard</th>
            </tr>
          </thead>
          <tbody>
            {status.attention.map((replica) => {
              const [health, word] = replicaHealth(replica, status.placement.epoch);
              const ttft = milliseconds(replica.load?.ttft_s);
              return (
                <tr key={replica.replica} data-replica={replica.replica}>
                  <td title={`${replica.replica} on node ${replica.node}`}>
                    <code>{short(replica.replica)}</code>
                  </td>
                  <td>
                    <Sign health={health} word={word} />
                  </td>
                  <td class="n">{replica.running}</td>
                  <td class="n">{replica.load?.waiting ?? 0}</td>
                  <td>
                    <Bar part={replica.load?.kv_use ?? 0} />
                  </td>
                  <td class="n">{figure(now.attention[replica.replica]?.tokens_s)}</td>
                  <td class="n">{ttft === NONE ? NONE : `${ttft} ms`}</td>
                  <td class="n">{ago(replica.seen_s)}</td>
                </tr>
              );
            })}
            {status.attention.length === 0 && (
              <tr>
                <td colSpan={8} class="faint">
                  none has reported yet
                </td>
              </tr>
            )}
          </tbody>
        </table>
      </div>
    </section>
  );
});

export const Moves = memo(function Moves({ placement, frozen }: { placement: Placement; frozen: boolean }) {
  const ended = placement.ended.slice(-4).reverse();
  return (
    <section class="panel moves" aria-labelledby="moves-title">
      <header>
        <h2 id="moves-title">Moves</h2>
        <p class="sub">{frozen ? "frozen: experts stay where they are" : `${placement.running.length} on their way`}</p>
      </header>
      <ul data-testid="moves">
        {placement.running.map((move) => (
          <li key={move}>
            <Sign health="wait" word={move} />
          </li>
        ))}
        {ended.map((move) => (
          <li key={move} class="faint">
            {move}
          </li>
        ))}
        {placement.running.length + ended.length === 0 && <li class="faint">No expert has moved lately.</li>}
      </ul>
    </section>
  );
});
