// What the mesh answers, as far as the page uses it; the fields are described in platform/client/_models.py.

export interface Status {
  model: string;
  mode: string;
  health: string;
  placement: {
    epoch: number;
    layers: number;
    experts: number;
    redundancy: number;
    missing_experts: number;
    balancedness: number;
    moves: number;
    frozen: boolean;
  };
  attention: Replica[];
  shards: Shard[];
  wanted?: { attention: number; experts: number | null };
}

export interface Replica {
  replica: string;
  node: string;
  ready: boolean;
  epoch: number;
  running: number;
  seen_s: number;
  load?: { waiting?: number; kv_use?: number; ttft_s?: number };
}

export interface Shard {
  shard: string;
  index: number;
  node: string;
  ready: boolean;
  leaving: boolean;
  experts: number;
  seen_s: number;
}

export interface Placement {
  epoch: number;
  layers: number[];
  experts: number;
  /** Serving shard of each index. */
  shards: Record<string, string>;
  /** [shard index][position in layers][slot]: expert id, -1 where a slot is empty. */
  slots: number[][][];
  running: string[];
  ended: string[];
}

export interface Heat {
  layers: number[];
  experts: number;
  rows_a_second: number[][];
}

export interface Sample {
  at: number;
  attention: number;
  shards: number;
  running: number;
  waiting: number;
  tokens_s: number;
  kv_hits: number | null;
  ttft_s: number | null;
  itl_s: number | null;
  rows_s: number;
  busy: number;
  balancedness: number | null;
}

export interface History {
  interval_s: number;
  samples: Sample[];
  shards: Record<string, { busy: number; rows_s: number }>;
  attention: Record<string, { tokens_s: number; kv_hits: number | null; itl_s: number | null }>;
}

export interface MeshEvent {
  id: number;
  at: number;
  kind: string;
  text: string;
  about: Record<string, string | number>;
}
