// The panels: /metrics and /health, asked every second while somebody looks.

const POLL_MS = 1000;
const WIDTH = 120;
const HEIGHT = 32;
const STATES = {
  ok: "ok",
  asleep: "asleep",
  draining: "waiting",
  loading: "waiting",
  restarting: "waiting",
};
const NONE = "–";
const history = new History(WIDTH);

/** Do the work now and a second after it was done, but never while the tab is hidden. */
function whileSeen(work) {
  let timer = 0;
  let busy = false;
  async function turn() {
    clearTimeout(timer);
    if (busy || document.hidden) return;
    busy = true;
    await work().catch(() => {}); // the state says what is wrong
    busy = false;
    timer = setTimeout(turn, POLL_MS);
  }
  document.addEventListener("visibilitychange", turn);
  turn();
}

async function drawState() {
  let word;
  let reason = "";
  try {
    const response = await fetch("health", { cache: "no-store" });
    const told = await response.json();
    word = told.status;
    reason = told.reason ?? "";
    if (response.status === 503) {
      word = (await (await fetch("ready", { cache: "no-store" })).json()).status;
      if (word === "ready") word = "unavailable"; // it is there, and does not answer
    }
  } catch {
    word = "unreachable";
  }
  const state = document.getElementById("state");
  const label = state.querySelector("span");
  state.dataset.state = STATES[word] ?? "bad";
  state.title = reason;
  if (label.textContent !== word) label.textContent = word; // a change is read out
}

async function drawFigures() {
  const response = await fetch("metrics", { cache: "no-store" });
  if (!response.ok) return;
  const point = history.add(lookAt(await response.text(), performance.now() / 1000));
  const { points } = history;
  const peak = (of) => Math.max(...points.map(of).filter(Number.isFinite));
  show("speed", rate(point.speed));
  show("speed-peak", rate(peak(({ speed }) => speed)));
  show("running", whole(point.running));
  show("waiting", whole(point.waiting));
  show("running-peak", whole(peak(({ running }) => running)));
  show("ttft-p50", seconds(point.ttft[0]));
  show("ttft-p95", seconds(point.ttft[1]));
  show("tpot-p50", seconds(point.tpot[0]));
  show("tpot-p95", seconds(point.tpot[1]));
  show("batch", rate(point.batch));
  show("batch-peak", rate(peak(({ batch }) => batch)));
  show("blocks-used", whole(point.blocksUsed));
  show("blocks-total", whole(point.blocksTotal));
  show("hits", Number.isFinite(point.hits) ? `${(100 * point.hits).toFixed(0)} %` : NONE);
  spark("speed", ({ speed }) => speed);
  spark("running", ({ running }) => running);
  spark("ttft", ({ ttft }) => ttft[0]);
  spark("tpot", ({ tpot }) => tpot[0]);
  spark("batch", ({ batch }) => batch);
  spark("blocks", ({ blocksUsed }) => blocksUsed);
}

function show(name, text) {
  document.querySelector(`[data-value="${name}"]`).textContent = text;
}

/** A line over the last two minutes, broken where there is no data. */
function spark(name, of) {
  const { points } = history;
  const last = points.at(-1).time;
  const highest = Math.max(...points.map(of).filter(Number.isFinite), 0) || 1;
  const runs = [[]];
  points.forEach((point, index) => {
    const gap = index && point.time - points[index - 1].time > 5;
    if (gap || !Number.isFinite(of(point))) runs.push([]);
    if (!Number.isFinite(of(point))) return;
    const x = WIDTH - (last - point.time);
    const y = HEIGHT - 1.5 - (HEIGHT - 4) * Math.min(of(point) / highest, 1);
    runs.at(-1).push([x.toFixed(1), y.toFixed(1)]);
  });
  const drawn = runs.filter((run) => run.length);
  const line = (run) => `M${run.map((point) => point.join(" ")).join("L")}`;
  const area = (run) => `${line(run)}L${run.at(-1)[0]} ${HEIGHT}L${run[0][0]} ${HEIGHT}Z`;
  const svg = document.querySelector(`[data-panel="${name}"] svg`);
  svg.querySelector(".line").setAttribute("d", drawn.map(line).join(""));
  svg.querySelector(".area").setAttribute("d", drawn.map(area).join(""));
}

function whole(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en") : NONE;
}

function rate(value) {
  if (!Number.isFinite(value)) return NONE;
  return value < 10 ? String(Math.round(value * 10) / 10) : whole(value);
}

function seconds(value) {
  if (!Number.isFinite(value)) return NONE;
  if (value >= 9.95) return `${value.toFixed(0)} s`;
  if (value >= 0.9995) return `${value.toFixed(2)} s`;
  return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
}
