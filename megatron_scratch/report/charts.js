"use strict";
// Charts of uPlot from the page's numbers. What is drawn is in chosen units, so that ticks are plain numbers and the label tells the unit.

const report = JSON.parse(document.getElementById("report").textContent);
const runs = report.runs;
const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7"];
const UNITS = [[1e24, "Y"], [1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
const TIMES = [[172800, 86400, "days"], [7200, 3600, "hours"], [120, 60, "minutes"], [0, 1, "seconds"]];
const COUNTS = { T: "trillion ", G: "billion ", M: "million ", k: "thousand ", "": "" };
const PARTS = [["forward_backward_seconds", "forward, backward", "--c0"], ["optimizer_seconds", "optimizer", "--c2"],
  ["data_seconds", "data", "--c1"], ["other_seconds", "other", "--c7"], ["checkpoint_seconds", "checkpoint", "--c3"]];
const CHARTS = {
  tokens_per_second: { title: "tokens/s", label: (p) => `${COUNTS[p] ?? p}tokens per second`, zero: true },
  mfu: { title: "MFU", label: () => "MFU (%)", scale: 0.01, zero: true },
  memory_gib: { title: "memory", label: () => "GiB", scale: 1, zero: true },
  grad_norm: { title: "norm", label: () => "gradient norm", scale: 1, loglike: true },
  lr: { title: "rate", label: (p, power) => `learning rate${power ? ` (× 10${raised(power)})` : ""}`, zero: true },
  spike_score: { title: "score", label: () => "σ above the mean", scale: 1 },
  loss_scale: { title: "scale", label: (p) => `loss scale${p ? ` (${p})` : ""}`, zero: true },
};
const state = { x: "step", log: false, smooth: 40, drawn: [] };

const palette = new Map(); // of the theme that charts are drawn in

function css(name) {
  if (!palette.has(name)) palette.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return palette.get(name);
}

const raised = (n) => String(n).replace(/./g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[+c]));
const most = (values) => values.reduce((m, v) => (v != null && Math.abs(v) > m ? Math.abs(v) : m), 0);
const colourOf = (run) => css(COLOURS[run % COLOURS.length]);
const spaced = (text) => text.replace(/\B(?=(\d{3})+(?!\d))/g, "\u2009");

function fixed(value, step) {
  let digits = Math.max(0, Math.min(9, -Math.floor(Math.log10(step) + 1e-9)));
  if (digits < 9 && Math.abs(Math.round(step * 10 ** digits) / 10 ** digits - step) > step * 1e-6) digits++; // steps of 2.5
  const [whole, rest] = value.toFixed(digits).split(".");
  return spaced(whole) + (rest ? "." + rest : "");
}

function brief(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return spaced(String(value));
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(2);
  return fixed(value, size >= 1000 ? 1 : 10 ** (Math.floor(Math.log10(size || 1)) - 3));
}

// x of a curve, as chosen, in its own unit
function along(run, curve) {
  return state.x === "flops" ? curve.tokens?.map((t) => t * run.facts.flops_per_token) : curve[state.x];
}

function xUnit() {
  let far = 0;
  for (const run of runs) for (const curve of [...Object.values(run.curves), ...Object.values(run.valid)]) {
    const x = along(run, curve);
    if (x) far = Math.max(far, x[x.length - 1]);
  }
  if (state.x === "step") return [1, "step"];
  if (state.x === "wall" || state.x === "train") {
    const [, size, word] = TIMES.find(([least]) => far >= least);
    return [size, `${state.x === "wall" ? "time since the first start" : "time in steps"} (${word})`];
  }
  const [size, prefix] = UNITS.find(([least]) => far >= least) || [1, ""];
  return state.x === "tokens" ? [size, `${COUNTS[prefix] ?? prefix}tokens`] : [size, `compute (${prefix}FLOP)`];
}

function yUnit(values, spec) {
  if (spec.scale) return [spec.scale, spec.label("", 0)];
  const high = most(values);
  if (high > 0 && high < 0.01) {
    const power = Math.floor(Math.log10(high) + 1e-9);
    return [10 ** power, spec.label("", power)];
  }
  const [size, prefix] = UNITS.find(([least]) => high >= least) || [1, ""];
  return [size, spec.label(prefix, 0)];
}

// exponential mean over steps, however far apart they are
function smoothed(steps, values, halfLife) {
  let total = 0, weight = 0, before = null;
  return values.map((v, i) => {
    if (v == null) return null;
    const keep = before === null || halfLife <= 0 ? 0 : 0.5 ** ((steps[i] - before) / halfLife);
    [total, weight, before] = [total * keep + v, weight * keep + 1, steps[i]];
    return total / weight;
  });
}

function halfLife() {
  const far = Math.max(1, ...runs.map((run) => run.facts.step || 0));
  return state.smooth ? far * 0.001 * 10 ** ((state.smooth / 100) * 2.3) : 0;
}

// columns: {label, colour, x, y, width, dash, points, quiet}
function draw(holder, columns, spec) {
  holder.textContent = "";
  if (!columns.length) return holder.append("No numbers against this axis.");
  const [xSize, xLabel] = xUnit();
  const tables = columns.map((c) => [c.x.map((v) => v / xSize), c.y.map((v) => (v == null ? null : v / spec.size))]);
  const data = uPlot.join(tables);
  const axis = { stroke: css("--muted"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1, size: 5 },
    font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
  const log = spec.log && !data.slice(1).some((column) => column.some((v) => v != null && v <= 0));
  const options = {
    width: Math.max(240, holder.clientWidth), height: holder.classList.contains("tall") ? 380 : 230, padding: [12, 24, 0, 0],
    scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: log ? undefined : (u, low, high) => range(spec, low, high) } },
    cursor: { y: false, sync: { key: "runs" }, drag: { x: true, y: false, dist: 5 }, points: { size: 6 } },
    legend: { live: true, isolate: false, markers: { width: 0, fill: (u, i) => columns[i - 1] && columns[i - 1].colour + (columns[i - 1].alpha ? "66" : "") } },
    series: [{ label: xLabel.replace(/ \(.*/, ""), value: (u, v) => (v == null ? "–" : brief(v)) }, ...columns.map((c, i) => ({
      label: c.label.slice(0, 60), stroke: c.colour, width: c.width ?? 1.5, dash: c.dash, fill: c.fill, alpha: c.alpha ?? 1, spanGaps: false,
      paths: c.only ? () => null : undefined, class: c.quiet ? "quiet" : undefined,
      points: c.points ? { show: true, size: 6, fill: c.colour } : { show: false },
      value: (u, v, _, at) => brief(c.raw ? (at == null ? null : c.raw[at]) : v) }))],
    axes: [
      { ...axis, label: xLabel, labelSize: 20, size: 34, values: (u, at, _, space, step) => at.map((v) => fixed(v, step)) },
      { ...axis, label: spec.label, labelSize: 22, size: 54,
        values: (u, at, _, space, step) => at.map((v) => (v == null ? "" : log ? brief(v).replace(/\.?0+$/, "") : fixed(v, step))) },
    ],
    bands: spec.bands,
    hooks: { draw: [(u) => spec.events && marks(u, xSize)], setCursor: [(u) => spec.events && tip(u, xSize)],
      setScale: [(u, key) => key === "x" && zoomed(u)] },
  };
  const u = new uPlot(options, data, holder);
  holder.querySelectorAll(".u-legend tr").forEach((row, i) => columns[i - 1]?.quiet && row.classList.add("quiet"));
  holder.dataset.x = xLabel;
  holder.dataset.y = spec.label;
  state.drawn.push(u);
}

// One spike must not flatten all the rest: a cap, where the spec has one, holds unless nothing lies below it.
function range(spec, low, high) {
  if (low == null) return [0, 1];
  const cap = spec.cap;
  if (cap && high > cap && low < cap) high = cap;
  if (spec.zero) return [0, high > 0 ? high * 1.08 : 1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

function lossChart(holder) {
  const columns = [], several = runs.length > 1, life = halfLife();
  let cap = 0;
  runs.forEach((run, r) => {
    const curve = run.curves.loss, colour = colourOf(r), x = curve && along(run, curve);
    if (x) {
      const even = smoothed(curve.step, curve.mean || curve.loss, life);
      if (life) columns.push({ label: several ? run.name : "as logged", colour, x, y: curve.loss, width: 1, alpha: 0.3, quiet: several });
      columns.push({ label: several ? run.name : life ? "training, smoothed" : "training", colour, x, y: even, width: 2 });
      cap = Math.max(cap, curve.loss[0], (curve.mean || curve.loss)[0]);
    }
    Object.entries(run.valid).forEach(([name, curve], k) => {
      const told = "validation" + (name ? " " + name : "");
      columns.push({ label: several ? `${run.name}, ${told}` : told, colour: several ? colour : css(COLOURS[(k + 1) % COLOURS.length]),
        x: along(run, curve), y: curve.loss, dash: k ? [1, 3] : [4, 4], width: 1.25, points: true });
    });
  });
  const high = most(columns.flatMap((c) => c.y));
  draw(holder, columns.filter((c) => c.x), { label: "loss", size: 1, log: state.log, events: true, cap: high > 1.5 * cap ? 1.15 * cap : 0 });
}

function curveChart(holder, name) {
  const spec = CHARTS[name], there = runs.map((run, r) => [run, r]).filter(([run]) => run.curves[name] && along(run, run.curves[name]));
  const values = there.flatMap(([run]) => run.curves[name][name]), positive = values.filter((v) => v > 0);
  const [size, label] = yUnit(values, spec);
  const log = spec.loglike && positive.length === values.length && Math.max(1e-30, most(values)) > 50 * positive.reduce((a, b) => Math.min(a, b), Infinity);
  const columns = there.map(([run, r]) => ({ label: runs.length > 1 ? run.name : spec.title, colour: colourOf(r),
    x: along(run, run.curves[name]), y: run.curves[name][name], width: 1.25 }));
  draw(holder, columns, { label, size, zero: spec.zero, log });
}

function splitChart(holder, r) {
  const run = runs[r], curve = run.curves.split, x = along(run, curve);
  const parts = PARTS.filter(([key]) => curve[key].some((v) => v > 0));
  let below = curve.step.map(() => 0);
  const columns = parts.map(([key, label, colour]) => {
    const raw = curve[key].map((v) => v * 1000);
    below = below.map((v, i) => v + raw[i]);
    return { label, colour: css(colour), fill: css(colour), x, y: below, raw, width: 0 };
  }).reverse();
  const bands = columns.slice(1).map((_, i) => ({ series: [i + 1, i + 2] }));
  draw(holder, columns, { label: "milliseconds a step", size: 1, zero: true, bands });
  holder.classList.add("fixed");
}

function drawAll() {
  state.drawn.forEach((u) => u.destroy());
  state.drawn = [];
  palette.clear();
  for (const holder of document.querySelectorAll(".plot")) {
    const { chart, run } = holder.dataset;
    if (chart === "loss") lossChart(holder);
    else if (chart === "split") splitChart(holder, +run);
    else curveChart(holder, chart);
  }
}
