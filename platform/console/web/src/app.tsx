import { useEffect, useState } from "preact/hooks";
import { Charts } from "./charts";
import { ago, count } from "./format";
import { HeatMap } from "./heatmap";
import { useStore } from "./hooks";
import { lock, type State, unlock } from "./store";
import { Moves, Replicas, Shards, Sign } from "./tables";
import { type Choice, choice, choose } from "./theme";
import { Timeline } from "./timeline";

export function App() {
  const state = useStore();
  const [only, setOnly] = useState<number | null>(null);
  const { status, heat, placement } = state;
  const locked = state.trouble === "locked" || state.trouble === "refused";
  useEffect(() => {
    document.title = `${status === null ? "" : `${words(state)[1]} · `}ExpertMesh console`;
  }, [status?.health, state.trouble]);
  return (
    <>
      <Header state={state} />
      <main class={state.trouble !== null && !locked ? "stale" : ""}>
        {locked ? <KeyForm refused={state.trouble === "refused"} tried={state.hasKey} message={state.message} /> : <Banner state={state} />}
        {!locked && status !== null && (
          <>
            <Charts samples={state.samples} events={state.events} />
            <div class="columns">
              <div class="wide">
                {heat !== null && placement !== null && heat.layers.length > 0 && status.mode === "mesh" && (
                  <HeatMap heat={heat} placement={placement} only={only} />
                )}
                {status.mode === "mesh" && (
                  <Shards status={status} placement={placement} now={state.now} only={only} choose={setOnly} />
                )}
                <Replicas status={status} placement={placement} now={state.now} />
              </div>
              <div class="side">
                <Timeline events={state.events} />
                {placement !== null && status.mode === "mesh" && <Moves placement={placement} frozen={status.placement.frozen} />}
              </div>
            </div>
          </>
        )}
      </main>
    </>
  );
}

function words(state: State): ["good" | "wait" | "bad", string] {
  if (state.trouble === "locked" || state.trouble === "refused") return ["wait", "locked"];
  if (state.trouble === "limited") return ["wait", "limited"];
  if (state.trouble === "unreachable") return ["bad", "unreachable"];
  if (state.trouble === "away") return ["wait", "controller away"];
  const health = state.status?.health;
  if (health === undefined) return ["wait", "connecting"];
  return [health === "ok" ? "good" : health === "starting" ? "wait" : "bad", health];
}

function Header({ state }: { state: State }) {
  const [health, word] = words(state);
  const { status } = state;
  return (
    <header class="top">
      <h1>
        <img src="console/icon.svg" alt="" width="22" height="22" /> ExpertMesh
      </h1>
      <span class="health" role="status" data-testid="health">
        <Sign health={health} word={word} />
      </span>
      {status !== null && (
        <dl>
          <Fact name="model" value={status.model} />
          <Fact name="epoch" value={String(status.placement.epoch)} />
          <Fact name="redundancy" value={String(status.placement.redundancy)} />
          <Fact name="missing" value={String(status.placement.missing_experts)} bad={status.placement.missing_experts > 0} />
        </dl>
      )}
      <div class="tools">
        {state.hasKey && (
          <button type="button" onClick={lock}>
            Forget key
          </button>
        )}
        <Theme />
      </div>
    </header>
  );
}

function Fact({ name, value, bad }: { name: string; value: string; bad?: boolean }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd data-testid={`fact-${name}`} class={bad ? "bad" : ""}>
        {value}
      </dd>
    </div>
  );
}

function Theme() {
  const [now, setNow] = useState<Choice>(choice());
  const next: Record<Choice, Choice> = { auto: "light", light: "dark", dark: "auto" };
  const change = (): void => {
    choose(next[now]);
    setNow(next[now]);
  };
  return (
    <button type="button" onClick={change} aria-label={`Theme: ${now}; change to ${next[now]}`}>
      {{ auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[now]}
    </button>
  );
}

/** What is wrong, what it means, and what happens next; nothing while all is well. */
function Banner({ state }: { state: State }) {
  const { status, trouble } = state;
  const since = state.heard === 0 ? "" : ` The figures below are ${ago((Date.now() - state.heard) / 1000)} old.`;
  if (trouble === "unreachable") {
    return <Note kind="bad" title="The mesh can't be reached." text={`${since} Trying again.`} />;
  }
  if (trouble === "limited") {
    return <Note kind="wait" title="The key is over its limits." text={`The mesh says: ${state.message}.${since} Trying again.`} />;
  }
  if (trouble === "away") {
    return <Note kind="wait" title="The controller is away." text={`Requests are served on by the last placement.${since}`} />;
  }
  if (status === null) return <Note kind="wait" title="Connecting…" text="Asking the mesh for its state." />;
  if (status.health === "starting") {
    const loading = status.shards.filter((shard) => !shard.ready).length;
    const text = `No attention replica is ready yet${loading ? `, and ${count(loading, "shard")} still load${loading === 1 ? "s" : ""}` : ""}.`;
    return <Note kind="wait" title="The mesh is starting." text={text} />;
  }
  const missing = status.placement.missing_experts;
  if (missing > 0) {
    const text = "Other shards are reading them; requests that need them wait.";
    return <Note kind="bad" title={`${count(missing, "expert")} served by nobody.`} text={text} />;
  }
  return null;
}

function Note({ kind, title, text }: { kind: "bad" | "wait"; title: string; text: string }) {
  return (
    <p class={`note ${kind}`} role={kind === "bad" ? "alert" : "status"} data-testid="note">
      <b>{title}</b> {text}
    </p>
  );
}

function KeyForm({ refused, tried, message }: { refused: boolean; tried: boolean; message: string }) {
  const [key, setKey] = useState("");
  const title = !tried ? "The mesh asks for a key" : refused ? "This key may not look at the mesh" : "This key is not known";
  return (
    <form
      class="panel key"
      onSubmit={(event) => {
        event.preventDefault();
        if (key.trim()) unlock(key.trim());
      }}
    >
      <h2>{title}</h2>
      <p>
        {refused ? message : "An API key with the scope admin, as `expertmesh keys create` makes it."} It is kept for this tab only, and sent to
        this mesh only.
      </p>
      <label for="key">API key</label>
      <div>
        <input
          id="key"
          type="password"
          autocomplete="off"
          spellcheck={false}
          value={key}
          onInput={(event) => setKey(event.currentTarget.value)}
        />
        <button type="submit">Open</button>
      </div>
    </form>
  );
}
