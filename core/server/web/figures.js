// Figures out of Prometheus's text: pure functions, and the history that they are drawn from.

/** Samples by name, each {labels, value}; a line that is none is passed over. */
function parseMetrics(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const parts = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (!parts) continue;
    const labels = {};
    for (const [, name, value] of (parts[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value;
    }
    const value = numberOf(parts[3]);
    if (!found.has(parts[1])) found.set(parts[1], []);
    found.get(parts[1]).push({ labels, value });
  }
  return found;
}

function numberOf(word) {
  return Number(word.replace(/^([+-]?)Inf$/, "$1Infinity"));
}

/** The sum of a metric's samples; NaN where there is none. */
function total(metrics, name) {
  const samples = metrics.get(name);
  return samples ? samples.reduce((sum, { value }) => sum + value, 0) : NaN;
}

/** A histogram's buckets as [upper bound, count up to it], sorted. */
function buckets(metrics, name) {
  const counts = new Map();
  for (const { labels, value } of metrics.get(`${name}_bucket`) ?? []) {
    const bound = numberOf(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([a], [b]) => a - b);
}

/**
 * The share-quantile of what a histogram took in between two looks at it, linear within a bucket as
 * Prometheus has it; NaN without data. Beyond the last bound it is that bound.
 */
function quantile(share, before, now) {
  const old = new Map(before);
  const rise = now.map(([bound, count]) => [bound, count - (old.get(bound) ?? 0)]);
  const all = rise.length ? rise.at(-1)[1] : 0;
  if (!(all > 0)) return NaN;
  const rank = share * all;
  const index = rise.findIndex(([, count]) => count >= rank);
  const [upper, upTo] = rise[index];
  const [lower, below] = index ? rise[index - 1] : [0, 0];
  if (upper === Infinity) return lower;
  return lower + ((upper - lower) * (rank - below)) / (upTo - below);
}

const TTFT = "infopt:time_to_first_token_seconds";
const TPOT = "infopt:inter_token_latency_seconds";
const STEP = "infopt:iteration_tokens_total";

/** What one look at /metrics found, at a time in seconds. */
function lookAt(text, time) {
  const metrics = parseMetrics(text);
  return {
    time,
    running: total(metrics, "infopt:num_requests_running"),
    waiting: total(metrics, "infopt:num_requests_waiting"),
    blocksUsed: total(metrics, "infopt:kv_blocks_used"),
    blocksTotal: total(metrics, "infopt:kv_blocks_total"),
    prefixQueries: total(metrics, "infopt:prefix_cache_queries_total"),
    prefixHits: total(metrics, "infopt:prefix_cache_hits_total"),
    tokens: total(metrics, "infopt:generation_tokens_total"),
    stepTokens: total(metrics, `${STEP}_sum`),
    steps: total(metrics, `${STEP}_count`),
    ttft: buckets(metrics, TTFT),
    tpot: buckets(metrics, TPOT),
  };
}

/** The looks of the last two minutes, and what follows from them. */
class History {
  constructor(seconds = 120) {
    this.seconds = seconds;
    this.looks = [];
    this.points = [];
  }

  /** Take in a look; the server having begun anew, what was before it is forgotten. */
  add(look) {
    const last = this.looks.at(-1);
    if (last && look.tokens < last.tokens) this.looks = [];
    this.looks.push(look);
    const oldest = look.time - this.seconds;
    this.looks = this.looks.filter(({ time }) => time >= oldest);
    this.points = this.points.filter(({ time }) => time >= oldest);
    this.points.push(this.#point(look));
    return this.points.at(-1);
  }

  /** The oldest look that is no more than so many seconds older than the last one. */
  #since(seconds) {
    const from = this.looks.at(-1).time - seconds - 0.5; // looks are never a second apart exactly
    return this.looks.find(({ time }) => time >= from);
  }

  #point(now) {
    const recent = this.#since(3);
    const half = this.#since(30);
    const apart = now.time - recent.time;
    const steps = now.steps - recent.steps;
    return {
      time: now.time,
      running: now.running,
      waiting: now.waiting,
      speed: apart > 0 ? (now.tokens - recent.tokens) / apart : NaN,
      batch: steps > 0 ? (now.stepTokens - recent.stepTokens) / steps : NaN,
      ttft: [quantile(0.5, half.ttft, now.ttft), quantile(0.95, half.ttft, now.ttft)],
      tpot: [quantile(0.5, half.tpot, now.tpot), quantile(0.95, half.tpot, now.tpot)],
      blocksUsed: now.blocksUsed,
      blocksTotal: now.blocksTotal,
      hits: now.prefixQueries > 0 ? now.prefixHits / now.prefixQueries : NaN,
    };
  }
}
