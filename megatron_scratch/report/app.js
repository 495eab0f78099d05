// The page's controls, the marks of events, the picture of the layers, and the samples.

const KINDS = { save: "--muted", start: "--c2", resume: "--c2", finish: "--c2", rewind: "--c4", rollback: "--c4", spike: "--gone", skip: "--gone",
  straggler: "--gone", stop: "--c1", failed: "--c3", hang: "--c3" };
const kind = (e) => KINDS[e.event] || "--muted";
const quiet = (e) => !(e.event in KINDS) || e.event === "save" || (e.event === "start" && !e.step);
const $ = (id) => document.getElementById(id);

function eventAt(run, e) {
  return state.x === "flops" ? e.x.tokens * (run.facts.flops_per_token ?? NaN) : e.x[state.x];
}

function marks(u, size) {
  const { ctx } = u, { left, top, width, height } = u.bbox, ratio = devicePixelRatio || 1;
  ctx.save();
  for (const run of runs) for (const e of run.events) {
    const x = Math.round(u.valToPos(eventAt(run, e) / size, "x", true));
    if (!(x >= left - 1 && x <= left + width + 1)) continue;
    ctx.strokeStyle = ctx.fillStyle = css(kind(e));
    ctx.lineWidth = ratio;
    ctx.beginPath();
    if (quiet(e)) {
      if (e.event !== "save") continue;
      ctx.moveTo(x, top + height - 7 * ratio);
      ctx.lineTo(x, top + height);
      ctx.stroke();
      continue;
    }
    ctx.setLineDash([3 * ratio, 3 * ratio]);
    ctx.globalAlpha = 0.55;
    ctx.moveTo(x, top);
    ctx.lineTo(x, top + height);
    ctx.stroke();
    ctx.setLineDash([]);
    ctx.globalAlpha = 1;
    ctx.beginPath();
    ctx.moveTo(x - 4 * ratio, top - 1);
    ctx.lineTo(x + 4 * ratio, top - 1);
    ctx.lineTo(x, top + 6 * ratio);
    ctx.fill();
  }
  ctx.restore();
}

// Events under the cursor, in words. Texts of a run are never markup: textContent only.
function tip(u, size) {
  let box = u.over.querySelector(".tip");
  const at = u.cursor.left, near = [];
  if (at >= 0) for (const run of runs) for (const e of run.events) {
    const d = Math.abs(u.valToPos(eventAt(run, e) / size, "x") - at);
    if (d <= 5 && (!quiet(e) || e.event === "save")) near.push([quiet(e), d, run, e]);
  }
  if (!near.length) return box?.remove();
  near.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  if (!box) u.over.append((box = Object.assign(document.createElement("div"), { className: "tip" })));
  box.textContent = near.slice(0, 5).map(([, , run, e]) =>
    `${runs.length > 1 ? run.name + ": " : ""}${e.event.replace(/_/g, " ")}, step ${spaced(String(e.step))}${e.text ? "\n" + e.text : ""}`).join("\n\n")
    + (near.length > 5 ? `\n\nand ${near.length - 5} more` : "");
  const right = at > u.over.clientWidth / 2;
  box.style.left = right ? "" : at + 12 + "px";
  box.style.right = right ? u.over.clientWidth - at + 12 + "px" : "";
}

function markKeys() {
  const seen = new Set(runs.flatMap((run) => run.events).filter((e) => !quiet(e) || e.event === "save").map((e) => e.event));
  $("marks")?.replaceChildren(...[...seen].map((name) => {
    const mark = Object.assign(document.createElement("i"), { className: name === "save" ? "tick" : "mark" });
    mark.style.setProperty("--mark", `var(${KINDS[name]})`);
    const key = document.createElement("span");
    key.append(mark, name.replace(/_/g, " "));
    return key;
  }));
}

function zoomed(u) {
  const x = u.data[0], { min, max } = u.scales.x;
  if ($("reset") && x.length) $("reset").hidden = !(min > x[0] || max < x[x.length - 1]);
}

// layers

const HEAT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function heat(part) {
  const at = Math.min(0.9999, Math.max(0, part)) * (HEAT.length - 1), i = Math.floor(at), f = at - i;
  return `rgb(${HEAT[i].map((c, k) => Math.round(c + (HEAT[i + 1][k] - c) * f))})`;
}

function layerMap() {
  const box = $("layers");
  if (!box) return;
  const run = runs[$("layer-run") ? +$("layer-run").value : runs.findIndex((r) => r.layers)], what = $("layer-kind").value;
  const { names, step } = run.layers, values = run.layers.values[what] || step.map(() => names.map(() => null));
  const rows = names.map((_, i) => i).filter((i) => values.some((column) => column[i] != null));
  const all = values.flatMap((column) => column.filter((v) => v != null)).sort((a, b) => a - b);
  const low = all[0] ?? 0, high = all[all.length - 1] ?? 1, log = low > 0 && high > 20 * low;
  const part = (v) => (high === low ? 0.5 : log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low));
  const canvas = box.querySelector("canvas"), ratio = devicePixelRatio || 1, each = rows.length > 60 ? 7 : rows.length > 24 ? 12 : 18;
  const left = 84, width = Math.max(200, box.clientWidth - left - 6), height = each * rows.length;
  Object.assign(canvas, { width: (left + width + 6) * ratio, height: (height + 40) * ratio });
  Object.assign(canvas.style, { width: left + width + 6 + "px", height: height + 40 + "px" });
  const ctx = canvas.getContext("2d");
  ctx.scale(ratio, ratio);
  ctx.font = "12px system-ui, sans-serif";
  const wide = width / step.length;
  values.forEach((column, s) => rows.forEach((i, r) => {
    if (column[i] == null) return;
    ctx.fillStyle = heat(part(column[i]));
    ctx.fillRect(left + s * wide, r * each, Math.ceil(wide), each - (each > 10 ? 1 : 0));
  }));
  ctx.fillStyle = css("--muted");
  ctx.textBaseline = "middle";
  ctx.textAlign = "right";
  const skip = Math.ceil(13 / each);
  rows.forEach((i, r) => r % skip === 0 && ctx.fillText(names[i].slice(0, 14), left - 8, r * each + each / 2));
  ctx.textAlign = "center";
  ctx.textBaseline = "top";
  const every = Math.max(1, Math.ceil((step.length * 70) / width));
  for (let s = every - 1; s < step.length; s += every) {
    const x = Math.min(left + width - 14, Math.max(left + 10, left + (s + 0.5) * wide));
    ctx.fillText(spaced(String(step[s])), x, height + 6);
  }
  ctx.fillText("step", left + width / 2, height + 23);
  const plain = (v) => brief(v).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  $("layer-scale").textContent = `${plain(low)} `;
  $("layer-scale").append(Object.assign(document.createElement("i"), { className: "ramp" }), ` ${plain(high)}${log ? ", log scale" : ""}`);
  canvas.onmousemove = (at) => {
    const s = Math.floor((at.offsetX - left) / wide), i = rows[Math.floor(at.offsetY / each)];
    canvas.title = s >= 0 && s < step.length && i !== undefined ? `${names[i]}, step ${step[s]}: ${brief(values[s][i])}` : "";
  };
}

// samples

function showSamples() {
  if (!$("samples")) return;
  const run = runs[$("sample-run") ? +$("sample-run").value : runs.findIndex((r) => r.samples.shown.length)];
  const steps = [...new Set(run.samples.shown.map((s) => s.step))], slider = $("sample-step");
  slider.max = steps.length - 1;
  const step = steps[Math.min(+slider.value, steps.length - 1)];
  $("sample-at").textContent = spaced(String(step));
  $("samples").replaceChildren(...run.samples.shown.filter((s) => s.step === step).map((s) => {
    const box = document.createElement("pre"), prompt = document.createElement("b");
    prompt.textContent = s.prompt;
    box.append(prompt, s.text.startsWith(s.prompt) ? s.text.slice(s.prompt.length) : s.text);
    return box;
  }));
}

function newestSample() {
  if ($("samples")) $("sample-step").max = $("sample-step").value = 1e6;
  showSamples();
}

// controls

function smoothing() {
  const life = halfLife();
  if ($("smoothed")) $("smoothed").textContent = life ? `half-life ${spaced(String(+life.toPrecision(2)))} steps` : "none";
}

function redraw() {
  drawAll();
  layerMap();
  if ($("reset")) $("reset").hidden = true;
}

document.querySelectorAll("input[name=x]").forEach((radio) => radio.addEventListener("change", () => { state.x = radio.value; redraw(); }));
$("log")?.addEventListener("change", (e) => { state.log = e.target.checked; redraw(); });
$("smooth")?.addEventListener("input", (e) => {
  state.smooth = +e.target.value;
  smoothing();
  const holder = document.querySelector('[data-chart="loss"]'), old = state.drawn.findIndex((u) => holder.contains(u.root));
  if (old < 0) return;
  const { min, max } = state.drawn[old].scales.x;
  state.drawn.splice(old, 1)[0].destroy();
  lossChart(holder);
  state.drawn[state.drawn.length - 1].setScale("x", { min, max });
});
$("reset")?.addEventListener("click", redraw);
["layer-run", "layer-kind"].forEach((id) => $(id)?.addEventListener("change", layerMap));
$("sample-step")?.addEventListener("input", showSamples);
$("sample-run")?.addEventListener("change", newestSample);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let wide = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== wide) redraw();
  wide = innerWidth;
});
const paper = (on) => { document.documentElement.classList.toggle("paper", on); redraw(); };
addEventListener("beforeprint", () => paper(true));
addEventListener("afterprint", () => paper(false));

state.x = document.querySelector("input[name=x]:checked")?.value || "step";
state.log = Boolean($("log")?.checked);
state.smooth = +($("smooth")?.value || 0);
smoothing();
markKeys();
redraw();
newestSample();
