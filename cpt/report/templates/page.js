// What the page can do beyond being read: hover read-outs, zoom, hidden runs, another horizontal axis, sorted and
// filtered tables, light and dark. Without it the page is whole: every figure stands there as SVG, drawn by
// cpt/report/plot_svg.py by the same rules. Text from files only ever enters as text, never as markup.
"use strict";
(() => {
const WIDTH = 460, LETTER = 6.7, BUCKETS = 330, MOST_RAW = 4, MOST_NAMES = 8, MOST_DOTS = 500, LABEL_CHARS = 16;
const MARKERS = ["o", "s", "^", "D", "v", "P"], CROSS = "m-4-4l8 8m0-8l-8 8";
const SHAPES = {
  o: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", s: "M-4.5-4.5h9v9h-9z", "^": "M0-5.8L5.4 4.2h-10.8z",
  D: "M0-6L6 0L0 6L-6 0z", v: "M0 5.8L5.4-4.2h-10.8z",
  P: "M-1.9-5.5h3.8v3.6h3.6v3.8h-3.6v3.6h-3.8v-3.6h-3.6v-3.8h3.6z",
};
const PLACES = [[9, -8], [-9, -8], [9, 18], [-9, 18], [11, 4], [-11, 4], [9, -22], [-9, -22], [9, 32], [-9, 32]];
const PREFIXES = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
const AXES = { tokens: "tokens seen", step: "step", hours: "hours since the start" };
const HINT = " Point at a figure to read it, drag to zoom, double-click to go back; with the keyboard: arrows, +, −, Escape.";
const page = JSON.parse(document.getElementById("report-data").textContent);
const hidden = new Set();
const panels = [];
let across = "tokens";
let numbers = null;

// ---- numbers -------------------------------------------------------------------------------------------------------

function column([at, count]) {
  if (!numbers) {
    const text = atob(page.floats);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    numbers = new Float32Array(bytes.buffer);
  }
  return numbers.subarray(at, at + count);
}

function after(sorted, value) { // the first place whose entry is larger
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle + 1; else high = middle;
  }
  return low;
}

function between(from, to, value) { // linear interpolation, flat beyond the ends
  const i = after(from, value);
  if (i === 0) return to[0];
  if (i === from.length) return to[to.length - 1];
  const part = (value - from[i - 1]) / (from[i] - from[i - 1]);
  return to[i - 1] + part * (to[i] - to[i - 1]);
}

function converted(run, tokens) {
  const [at, steps, hours] = page.runs[run].knots.map(column);
  const to = across === "step" ? steps : hours;
  return at.length ? Float64Array.from(tokens, (value) => between(at, to, value)) : tokens;
}

function stepAt(run, value) {
  const [tokens, steps, hours] = page.runs[run].knots.map(column);
  if (!tokens.length) return NaN;
  return across === "step" ? value : between(across === "hours" ? hours : tokens, steps, value);
}

// ---- axes: the same rules as in plot_svg.py ------------------------------------------------------------------------

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => size * factor).find((each) => each >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-6); n <= Math.floor(high / step + 1e-6); n++) found.push(n * step);
  return found;
}

function scaled(value) {
  const [size, unit] = PREFIXES.find(([each]) => Math.abs(value) >= each) || [1, ""];
  const shown = value / size, digits = Math.abs(shown) >= 100 || !unit ? 0 : Math.abs(shown) >= 10 ? 1 : 2;
  return `${shown.toFixed(digits)} ${unit}`.trim();
}

function prefixed(value, step) {
  const [size, unit] = PREFIXES.find(([each]) => Math.abs(value) >= each) || [1, ""];
  const text = (value / size).toFixed(Math.max(0, -Math.floor(Math.log10(step / size) + 1e-9)));
  return `${text.includes(".") ? text.replace(/\.?0+$/, "") : text} ${unit}`.trim();
}

function tickText(value, step, kind) {
  if (kind === "share") { value *= 100; step *= 100; }
  let text;
  if (Math.abs(value) < step * 1e-6) text = "0";
  else if (kind === "tokens" || Math.abs(value) >= 1000) text = prefixed(value, step);
  else if (step < 1e-5) text = value.toExponential(1);
  else text = value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  return text.replace("-", "\u2212") + (kind === "share" ? "%" : "");
}

function labelled([low, high], kind, wanted) {
  const values = ticks(low, high, wanted);
  const step = values.length > 1 ? values[1] - values[0] : Math.max(high - low, 1e-12);
  return values.map((value) => [value, tickText(value, step, kind)]);
}

function exact(value, kind) { // for the read-out
  if (!Number.isFinite(value)) return "\u2013";
  if (kind === "share") return `${(value * 100).toFixed(1)}%`;
  if (kind === "tokens" || Math.abs(value) >= 1000) return scaled(value);
  if (Math.abs(value) < 0.01 && value) return value.toExponential(2).replace("-", "\u2212");
  return value.toFixed(3).replace("-", "\u2212");
}

const xKind = (plot) => plot.x.kind === "tokens" && across !== "tokens" ? "number" : plot.x.kind;
const xLabel = (plot) => plot.x.kind === "tokens" && plot.x.label ? AXES[across] : plot.x.label;
const short = (text) => [...text].length <= LABEL_CHARS ? text : `${[...text].slice(0, LABEL_CHARS - 1).join("")}…`;
const classes = (run) => run < 0 ? "ink" : `r${run % 6} d${Math.floor(run / 6) % 4}`;
const markup = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

function loaded(plot) { // the visible series as columns, in the chosen horizontal axis
  return plot.series.filter((item) => item.run < 0 || !hidden.has(item.run)).map((item) => {
    const convert = plot.x.kind === "tokens" && across !== "tokens" && item.run >= 0;
    const x = column(item.x);
    const rest = Object.fromEntries(["low", "high", "left", "right", "steps"].filter((name) => item[name])
      .map((name) => [name, column(item[name])]));
    return { ...item, ...rest, x: convert ? converted(item.run, x) : x, y: column(item.y) };
  });
}

function range(plot, series, axis) {
  const spec = plot[axis];
  if (spec.limits && !(axis === "x" && spec.kind === "tokens")) return spec.limits;
  let low = Infinity, high = -Infinity;
  const see = (values) => {
    for (const value of values || []) if (Number.isFinite(value)) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  };
  for (const item of series) {
    see(item[axis]);
    see(axis === "x" ? item.left : item.low);
    see(axis === "x" ? item.right : item.high);
  }
  if (plot.origin || spec.fromZero) see([0]);
  if (low > high) return [0, 1];
  if (high - low < 1e-12 * Math.max(1, Math.abs(high))) {
    [low, high] = [low - 0.5 * Math.max(Math.abs(low), 1e-6), high + 0.5 * Math.max(Math.abs(high), 1e-6)];
  }
  const margin = axis === "x" && spec.kind === "tokens" ? 0 : (plot.origin ? 0.08 : 0.05) * (high - low);
  return [spec.fromZero && low >= 0 ? low : low - margin, high + margin];
}

function frameOf(panel, series) {
  const plot = panel.plot;
  const x = panel.view ? panel.view.x : range(plot, series, "x");
  const y = panel.view ? panel.view.y : range(plot, series, "y");
  const texts = labelled(y, plot.y.kind, rows(plot)).map(([, text]) => text.length);
  const named = series.filter((item) => ["line", "held_out"].includes(item.style) && item.x.length);
  const names = hasNames(series) ? named.map((item) => short(item.label).length) : [];
  const frame = {
    x, y, left: 32 + LETTER * Math.max(3, ...texts), top: plot.marks.length ? 20 : 10,
    right: WIDTH - 10 - Math.max(0, ...names) * (LETTER + 0.4), bottom: plot.height - 44,
  };
  frame.across = (value) => frame.left + (value - x[0]) / (x[1] - x[0]) * (frame.right - frame.left);
  frame.down = (value) => Math.min(9999, Math.max(-9999,
    frame.bottom - (value - y[0]) / (y[1] - y[0]) * (frame.bottom - frame.top)));
  frame.held = (value) => Math.min(frame.bottom + 2, Math.max(frame.top - 2, frame.down(value)));
  return frame;
}

const rows = (plot) => Math.max(3, Math.round(plot.height / 58));
const runsOf = (series) => new Set(series.filter((item) => item.run >= 0).map((item) => item.run));
const hasNames = (series) => runsOf(series).size > 1 && runsOf(series).size <= MOST_NAMES;
const hasDots = (series) => series.reduce((sum, item) =>
  sum + (["held_out", "path"].includes(item.style) ? item.x.length : 0), 0) <= MOST_DOTS;

// ---- drawing -------------------------------------------------------------------------------------------------------

function seen(item, [low, high]) { // places worth drawing: in view, and of a long curve the ends of every bucket
  const n = item.x.length;
  if (item.style === "path" || item.style === "front" || item.style === "goal") return [...Array(n).keys()];
  const from = Math.max(0, after(item.x, low) - 2), to = Math.min(n, after(item.x, high) + 2);
  if (to - from <= 4 * BUCKETS) return Array.from({ length: to - from }, (_, i) => from + i);
  const kept = [], width = (item.x[to - 1] - item.x[from]) / BUCKETS || 1;
  for (let start = from; start < to;) {
    const bucket = Math.floor((item.x[start] - item.x[from]) / width);
    let end = start, least = start, most = start;
    while (end < to && Math.floor((item.x[end] - item.x[from]) / width) === bucket) {
      if (item.y[end] < item.y[least]) least = end;
      if (item.y[end] > item.y[most]) most = end;
      end++;
    }
    kept.push(...[...new Set([start, least, most, end - 1])].sort((a, b) => a - b));
    start = end;
  }
  return kept;
}

function drawSeries(item, frame, dots, few) {
  const at = seen(item, frame.x), parts = [];
  const place = (i) => `${frame.across(item.x[i]).toFixed(1)} ${frame.down(item.y[i]).toFixed(1)}`;
  const last = item.x.length - 1, [endX, endY] = [frame.across(item.x[last]), frame.down(item.y[last])];
  const crossing = () => {
    if (item.left && item.left.length === 1) {
      parts.push(`<path class="interval" d="M${frame.across(item.left[0])} ${endY}H${frame.across(item.right[0])}"/>`);
    }
    if (item.low && item.low.length === 1) {
      parts.push(`<path class="interval" d="M${endX} ${frame.down(item.low[0])}V${frame.down(item.high[0])}"/>`);
    }
  };
  if (item.style === "goal") {
    crossing();
    return `${parts.join("")}<circle class="open" cx="${endX}" cy="${endY}" r="5"/>`;
  }
  if (few && item.low && item.low.length === item.x.length && at.length > 1) {
    const edge = (values, order) => order.map((i) => `${frame.across(item.x[i]).toFixed(1)} ${frame.down(values[i]).toFixed(1)}`);
    const around = [...edge(item.high, at), ...edge(item.low, [...at].reverse())];
    parts.push(`<path class="band" d="M${around.join("L")}Z"/>`);
  }
  if (item.style === "crossed") parts.push(`<path class="crosses" d="${at.map((i) => `M${place(i)}${CROSS}`).join("")}"/>`);
  else if (item.style === "front") {
    const steps = at.slice(1).map((i) => `H${frame.across(item.x[i]).toFixed(1)}V${frame.down(item.y[i]).toFixed(1)}`);
    parts.push(`<path class="curve" d="M${place(0)}${steps.join("")}"/>`);
  } else if (at.length > 1) parts.push(`<path class="curve" d="M${at.map(place).join("L")}"/>`);
  if (dots && ["held_out", "path"].includes(item.style)) {
    parts.push(`<path class="dots" d="${at.map((i) => `M${place(i)}h0`).join("")}"/>`);
  }
  if (item.style === "path") {
    parts.push(`<path class="end" transform="translate(${endX} ${endY})" d="${SHAPES[MARKERS[item.run % 6]]}"/>`);
    crossing();
  }
  return parts.join("");
}

function drawAxes(plot, frame) {
  const parts = [];
  for (const [value, text] of labelled(frame.y, plot.y.kind, rows(plot))) {
    const y = frame.down(value).toFixed(1), zero = plot.origin && text === "0" ? " zero" : "";
    parts.push(`<path class="grid${zero}" d="M${frame.left.toFixed(1)} ${y}H${frame.right.toFixed(1)}"/>`);
    parts.push(`<text class="tick" text-anchor="end" x="${(frame.left - 6).toFixed(1)}" y="${+y + 4}">${text}</text>`);
  }
  for (const [value, text] of labelled(frame.x, xKind(plot), 5)) {
    const x = frame.across(value).toFixed(1);
    if (plot.origin && text === "0") parts.push(`<path class="grid zero" d="M${x} ${frame.top}V${frame.bottom}"/>`);
    parts.push(`<text class="tick" text-anchor="middle" x="${x}" y="${frame.bottom + 17}">${text}</text>`);
  }
  const middle = (frame.left + frame.right) / 2, centre = (frame.top + frame.bottom) / 2;
  parts.push(`<text class="axis" text-anchor="middle" x="${middle}" y="${plot.height - 8}">${markup(xLabel(plot))}</text>`);
  parts.push(`<text class="axis" text-anchor="middle" transform="translate(12 ${centre}) rotate(-90)">${markup(plot.y.label)}</text>`);
  return parts.join("");
}

function drawMarks(plot, frame) {
  let last = -Infinity;
  const placed = plot.marks.filter((mark) => !hidden.has(mark.run)).map((mark) => {
    const convert = plot.x.kind === "tokens" && across !== "tokens" && mark.run >= 0;
    return { ...mark, x: convert ? converted(mark.run, [mark.x])[0] : mark.x };
  });
  return placed.sort((a, b) => a.x - b.x).filter((mark) => mark.x >= frame.x[0] && mark.x <= frame.x[1]).map((mark) => {
    const x = frame.across(mark.x);
    let letter = "";
    if (x - last >= 10) {
      letter = `<text class="name" text-anchor="middle" x="${x}" y="${frame.top - 5}">${markup(mark.symbol)}</text>`;
      last = x;
    }
    return `<g class="mark ${classes(mark.run)}"><title>${markup(mark.text)}</title>` +
      `<path d="M${x} ${frame.top}V${frame.bottom}"/>${letter}</g>`;
  }).join("");
}

const nameTag = (x, y, text, run, anchor) => `<text class="name ${classes(run)}" text-anchor="${anchor}" ` +
  `x="${x.toFixed(1)}" y="${y.toFixed(1)}">${markup(text)}</text>`;

function namesRight(series, frame) {
  const ends = new Map();
  for (const item of series) {
    if (!["line", "held_out"].includes(item.style) || !item.x.length || item.run < 0) continue;
    const value = item.y[Math.max(0, after(item.x, frame.x[1]) - 1)];
    ends.set(item.run, [frame.held(value), short(item.label) + (value > frame.y[1] ? " ↑" : "")]);
  }
  const wanted = [...ends].map(([run, [y, text]]) => ({ run, y: Math.round(y * 10) / 10, text }));
  wanted.sort((a, b) => a.y - b.y || a.run - b.run);
  const places = [];
  for (const { y } of wanted) places.push(Math.max(y, places.length ? places[places.length - 1] + 14 : frame.top));
  const surplus = places.length ? Math.max(0, places[places.length - 1] - frame.bottom) : 0;
  return wanted.map(({ run, text }, i) => nameTag(frame.right + 5, places[i] - surplus + 4, text, run, "start")).join("");
}

function namesBeside(plot, series, frame) {
  const ends = series.filter((item) => ["path", "goal"].includes(item.style) && item.x.length).map((item) => {
    const last = item.x.length - 1;
    return [frame.across(item.x[last]), frame.down(item.y[last]), item];
  });
  const taken = ends.map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
  for (const [x, y, item] of ends) {
    if (item.left) taken.push([frame.across(item.left[0]), y - 1, frame.across(item.right[0]), y + 1]);
    if (item.low) taken.push([x - 1, frame.down(item.high[0]), x + 1, frame.down(item.low[0])]);
  }
  const [zeroX, zeroY] = [frame.across(0), frame.down(0)];
  taken.push([zeroX - 5, zeroY - 5, zeroX + 8 + LETTER * plot.origin.length, zeroY + 20]);
  const outermost = [Math.min(...ends.map(([x]) => x)), Math.min(...ends.map(([, y]) => y))];
  const found = [];
  for (const [x, y, item] of ends) {
    if (ends.length > MOST_NAMES && x > outermost[0] && y > outermost[1]) continue;
    if (x < frame.left - 1 || x > frame.right + 1 || y < frame.top - 1 || y > frame.bottom + 1) continue;
    const text = short(item.label), width = LETTER * text.length + 3;
    for (const [dx, dy] of PLACES) {
      const left = dx > 0 ? x + dx : x + dx - width, box = [left, y + dy - 11, left + width, y + dy + 3];
      const inside = box[0] >= frame.left && box[2] <= WIDTH && box[1] >= 0 && box[3] <= frame.bottom;
      if (inside && !taken.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3])) {
        taken.push(box);
        found.push(nameTag(x + dx, y + dy, text, item.run, dx > 0 ? "start" : "end"));
        break;
      }
    }
  }
  return found.join("");
}

function draw(panel) {
  const plot = panel.plot, series = loaded(plot), frame = frameOf(panel, series);
  const few = runsOf(series).size <= MOST_RAW, dots = hasDots(series);
  const drawn = series.filter((item) => item.x.length && (item.style !== "raw" || few)).map((item) =>
    `<g class="series ${item.style} ${classes(item.run)}">${drawSeries(item, frame, dots, few)}</g>`);
  const parts = [drawAxes(plot, frame), drawMarks(plot, frame)];
  const edge = panel.view ? 0 : 6, width = frame.right - frame.left + 2 * edge, height = frame.bottom - frame.top + 6;
  const box = `x="${frame.left - edge}" y="${frame.top - 3}" width="${width}" height="${height}"`;
  parts.push(`<clipPath id="${panel.id}-clip"><rect ${box}/></clipPath><g clip-path="url(#${panel.id}-clip)">${drawn.join("")}</g>`);
  const [zeroX, zeroY] = [frame.across(0), frame.down(0)];
  const zeroInside = zeroX >= frame.left && zeroX <= frame.right && zeroY >= frame.top && zeroY <= frame.bottom;
  if (plot.origin && zeroInside) {
    parts.push(`<circle class="origin" cx="${zeroX}" cy="${zeroY}" r="4"/>`);
    parts.push(`<text class="name ink" x="${zeroX + 7}" y="${zeroY + 16}">${markup(plot.origin)}</text>`);
  }
  if (series.some((item) => ["path", "goal"].includes(item.style))) parts.push(namesBeside(plot, series, frame));
  else if (hasNames(series)) parts.push(namesRight(series, frame));
  panel.group.innerHTML = `${parts.join("")}<g class="cursor"></g>`;
  panel.frame = frame;
  panel.series = series;
  panel.stale = false;
}

const ready = (panel) => { if (panel.stale || !panel.frame) draw(panel); return panel; };

function redrawAll() { // what is on the screen now, the rest one by one
  for (const panel of panels) panel.stale = true;
  const height = window.innerHeight;
  const near = panels.filter((panel) => {
    const box = panel.svg.getBoundingClientRect();
    return box.bottom > 0 && box.top < height;
  });
  near.forEach(ready);
  const next = () => {
    const panel = panels.find((each) => each.stale);
    if (panel) { draw(panel); requestAnimationFrame(next); }
  };
  requestAnimationFrame(next);
}

// ---- pointer and keys ----------------------------------------------------------------------------------------------

function element(tag, fields = {}, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...children);
  return made;
}

function nearest(panel, x, y) { // of a trade-off picture: [series, place] of the closest point
  let best = null, least = 40 ** 2;
  for (const item of panel.series) {
    if (item.style !== "path" && item.style !== "goal") continue;
    for (let i = 0; i < item.x.length; i++) {
      const off = (panel.frame.across(item.x[i]) - x) ** 2 + (panel.frame.down(item.y[i]) - y) ** 2;
      if (off < least) { least = off; best = [item, i]; }
    }
  }
  return best;
}

function readColumn(panel, value) { // of curves: what every visible run has at one place
  const found = [];
  for (const item of panel.series) {
    if (!["line", "held_out", "plan"].includes(item.style) || !item.x.length) continue;
    let i = after(item.x, value);
    if (i > 0 && (i === item.x.length || value - item.x[i - 1] < item.x[i] - value)) i--;
    const span = (panel.frame.x[1] - panel.frame.x[0]) * 0.02;
    if (item.style === "plan" || Math.abs(item.x[i] - value) <= span) found.push([item, i]);
    else if (item.style === "line" && value >= item.x[0] && value <= item.x[item.x.length - 1]) found.push([item, i]);
  }
  return found;
}

const WORDS = { line: "", held_out: ", held out", plan: ", planned" };

function show(panel, head, lines, dots, at) {
  const box = panel.readout;
  box.replaceChildren(element("b", { textContent: head }), ...lines.map(([run, label, value]) =>
    element("div", { className: run < 0 ? "ink" : classes(run) }, element("i"), element("span", { textContent: label }),
      element("span", { className: "value", textContent: value }))));
  box.hidden = false;
  const figure = panel.figure.getBoundingClientRect(), svg = panel.svg.getBoundingClientRect();
  const scale = svg.width / WIDTH, x = svg.left - figure.left + at[0] * scale, y = svg.top - figure.top + (at[1] + panel.offset) * scale;
  const flip = x + box.offsetWidth + 16 > figure.width;
  box.style.left = `${Math.max(0, flip ? x - box.offsetWidth - 12 : x + 12)}px`;
  box.style.top = `${Math.max(0, y - box.offsetHeight / 2)}px`;
  panel.group.querySelector(".cursor").innerHTML = dots;
}

function point(panel, item, i) {
  const [x, y] = [panel.frame.across(item.x[i]), panel.frame.down(item.y[i])];
  const step = item.steps ? `step ${Math.round(item.steps[i]).toLocaleString("en")}` : item.style === "goal" ? "as planned" : "";
  const lines = [[item.run, panel.plot.x.label.replace(/ \(.*/, ""), exact(item.x[i], panel.plot.x.kind)],
    [item.run, panel.plot.y.label.replace(/ \(.*/, ""), exact(item.y[i], panel.plot.y.kind)]];
  const head = `${page.runs[item.run]?.label ?? item.label}${step ? `, ${step}` : ""}`;
  show(panel, head, lines, `<circle class="at ${classes(item.run)}" cx="${x}" cy="${y}" r="7"/>`, [x, y]);
  panel.cursor = [item.run, i];
}

function line(panel, value) {
  const frame = panel.frame, kind = xKind(panel.plot);
  const found = readColumn(panel, value).map(([item, i]) => ({ item, i, y: item.y[i] }));
  found.sort((a, b) => b.y - a.y);
  const shown = found.slice(0, 14);
  const lines = shown.map(({ item, y }) => [item.run, item.label + WORDS[item.style], exact(y, panel.plot.y.kind)]);
  if (found.length > shown.length) lines.push([-1, `and ${found.length - shown.length} more`, ""]);
  const x = frame.across(value), only = runsOf(panel.series).size === 1 ? [...runsOf(panel.series)][0] : -1;
  const step = only >= 0 && across !== "step" ? stepAt(only, value) : NaN;
  const head = `${exact(value, kind)} ${across === "tokens" ? "tokens" : "h"}`;
  const dots = found.map(({ item, i, y }) =>
    `<circle class="at ${classes(item.run)}" cx="${frame.across(item.x[i])}" cy="${frame.held(y)}" r="4"/>`).join("");
  const title = across === "step" ? `step ${Math.round(value).toLocaleString("en")}`
    : head + (Number.isFinite(step) ? `, step ${Math.round(step).toLocaleString("en")}` : "");
  show(panel, title, lines, `<path class="hair" d="M${x} ${frame.top}V${frame.bottom}"/>${dots}`, [x, (frame.top + frame.bottom) / 2]);
  panel.cursor = value;
}

function hover(panel, x, y) {
  ready(panel);
  const { left, right, top, bottom, x: [low, high] } = panel.frame;
  if (x < left - 6 || x > right + 6 || y < top - 6 || y > bottom + 12) return clear(panel);
  if (panel.plot.origin) {
    const found = nearest(panel, x, y);
    return found ? point(panel, ...found) : clear(panel);
  }
  line(panel, Math.min(high, Math.max(low, low + (x - left) / (right - left) * (high - low))));
}

function clear(panel) {
  panel.readout.hidden = true;
  const cursor = panel.group.querySelector(".cursor");
  if (cursor) cursor.innerHTML = "";
}

function zoom(panel, view) {
  for (const each of panels) { // those of one figure go together
    const same = each.figure === panel.figure && each.plot.x.kind === panel.plot.x.kind;
    if (each === panel) each.view = view;
    else if (same) each.view = view && { x: view.x, y: range(each.plot, ready(each).series, "y") };
    else continue;
    draw(each);
  }
  panel.reset.hidden = !view;
  clear(panel);
}

function zoomBy(panel, factor) {
  const { x, y } = ready(panel).frame, plane = Boolean(panel.plot.origin);
  const around = ([low, high], middle) => [middle - (middle - low) * factor, middle + (high - middle) * factor];
  const centre = !plane && typeof panel.cursor === "number" ? panel.cursor : (x[0] + x[1]) / 2;
  zoom(panel, { x: around(x, centre), y: plane ? around(y, (y[0] + y[1]) / 2) : y });
}

function place(panel, event) { // of the pointer, in units of the panel
  const matrix = panel.group.getScreenCTM();
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
  return [at.x, at.y];
}

function dragged(panel, from, to) {
  const { left, right, top, bottom, x, y } = panel.frame;
  const hold = (value, low, high) => Math.min(high, Math.max(low, value));
  const [a, b] = [from[0], to[0]].map((value) => hold(value, left, right)).sort((p, q) => p - q);
  const [c, d] = [from[1], to[1]].map((value) => hold(value, top, bottom)).sort((p, q) => p - q);
  const toX = (value) => x[0] + (value - left) / (right - left) * (x[1] - x[0]);
  const toY = (value) => y[0] + (bottom - value) / (bottom - top) * (y[1] - y[0]);
  if (b - a < 6) return;
  zoom(panel, { x: [toX(a), toX(b)], y: d - c < 24 ? y : [toY(d), toY(c)] });
}

function key(panel, event) {
  ready(panel);
  const plane = panel.plot.origin, step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const turn = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (event.key === "+" || event.key === "=") zoomBy(panel, 0.6);
  else if (event.key === "-") zoomBy(panel, 1 / 0.6);
  else if (event.key === "Escape" || event.key === "0") { zoom(panel, null); panel.cursor = null; }
  else if (step && plane) walk(panel, step, 0);
  else if (turn && plane) walk(panel, 0, turn);
  else if (step) {
    const [low, high] = panel.frame.x, now = typeof panel.cursor === "number" ? panel.cursor : (low + high) / 2;
    line(panel, Math.min(high, Math.max(low, now + step * (high - low) / 60)));
  } else return;
  event.preventDefault();
}

function walk(panel, along, turn) { // from point to point of a path, and from run to run
  const paths = panel.series.filter((item) => item.style === "path");
  if (!paths.length) return;
  const [run, i] = Array.isArray(panel.cursor) ? panel.cursor : [paths[0].run, 0];
  const at = Math.max(0, paths.findIndex((item) => item.run === run));
  const item = paths[(at + turn + paths.length) % paths.length];
  point(panel, item, Math.min(item.x.length - 1, Math.max(0, turn ? item.x.length - 1 : i + along)));
}

function watch(panel) {
  const { group, svg } = panel;
  let from = null, box = null;
  // Panels of one figure share an svg: the pointer's height tells which one is meant.
  const mine = (event) => { const [, y] = place(panel, event); return y >= 0 && y <= panel.plot.height; };
  svg.addEventListener("pointermove", (event) => {
    if (from) {
      const to = place(panel, event);
      box.setAttribute("x", Math.min(from[0], to[0]));
      box.setAttribute("y", panel.frame.top);
      box.setAttribute("width", Math.abs(to[0] - from[0]));
      box.setAttribute("height", panel.frame.bottom - panel.frame.top);
      if (Math.abs(to[1] - from[1]) >= 24) {
        box.setAttribute("y", Math.min(from[1], to[1]));
        box.setAttribute("height", Math.abs(to[1] - from[1]));
      }
    } else if (mine(event)) hover(panel, ...place(panel, event));
    else clear(panel);
  });
  svg.addEventListener("pointerleave", () => clear(panel));
  svg.addEventListener("pointerdown", (event) => {
    if (!mine(event) || event.button !== 0) return;
    if (event.pointerType === "touch") return hover(panel, ...place(panel, event)); // a finger scrolls the page
    ready(panel);
    from = place(panel, event);
    svg.setPointerCapture(event.pointerId);
    box = document.createElementNS(svg.namespaceURI, "rect");
    box.setAttribute("class", "selection");
    group.append(box);
    event.preventDefault();
    svg.focus({ preventScroll: true });
  });
  svg.addEventListener("pointerup", (event) => {
    if (!from) return;
    const start = from;
    from = null;
    box.remove();
    dragged(panel, start, place(panel, event));
  });
  svg.addEventListener("pointercancel", () => { from = null; if (box) box.remove(); });
  svg.addEventListener("dblclick", (event) => { if (mine(event)) zoom(panel, null); });
}

function startFigures() {
  for (const [name, plots] of Object.entries(page.charts)) {
    const figure = document.getElementById(name), svg = figure.querySelector("svg");
    const readout = element("div", { className: "readout", hidden: true });
    readout.setAttribute("role", "status");
    const reset = element("button", { type: "button", className: "reset", hidden: true, textContent: "Reset zoom" });
    svg.after(readout, reset);
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("aria-keyshortcuts", "ArrowLeft ArrowRight + - Escape");
    const own = [...svg.querySelectorAll("g.plot")].map((group, i) => ({
      plot: plots[i], group, svg, figure, readout, reset, id: `${name}-${i}`, view: null, stale: true, cursor: null,
      offset: plots.slice(0, i).reduce((sum, plot) => sum + plot.height, 0),
    }));
    panels.push(...own);
    own.forEach(watch);
    reset.addEventListener("click", () => zoom(own[0], null));
    svg.addEventListener("keydown", (event) => key(own[0], event));
    svg.addEventListener("blur", () => own.forEach(clear));
  }
}

// ---- toolbar: runs, horizontal axis, theme -------------------------------------------------------------------------

function setHidden(run, hide) {
  if (hide) hidden.add(run); else hidden.delete(run);
  for (const each of document.querySelectorAll(`[data-run="${run}"]`)) each.classList.toggle("off", hide);
}

function startToolbar() {
  const bar = document.querySelector(".toolbar");
  for (const entry of bar.querySelectorAll(".legend li")) {
    const run = Number(entry.dataset.legend);
    const button = element("button", { type: "button", title: "Hide or show; double-click: only this run" }, ...entry.childNodes);
    button.setAttribute("aria-pressed", "true");
    entry.replaceChildren(button);
    button.addEventListener("click", () => { setHidden(run, !hidden.has(run)); press(); redrawAll(); });
    button.addEventListener("dblclick", () => {
      for (let i = 0; i < page.runs.length; i++) setHidden(i, i !== run);
      press();
      redrawAll();
    });
  }
  const press = () => {
    for (const entry of bar.querySelectorAll(".legend li")) {
      entry.firstChild.setAttribute("aria-pressed", String(!hidden.has(Number(entry.dataset.legend))));
    }
    all.hidden = !hidden.size;
  };
  const all = element("button", { type: "button", className: "all", textContent: "Show all runs", hidden: true });
  all.addEventListener("click", () => { for (const run of [...hidden]) setHidden(run, false); press(); redrawAll(); });
  const axis = element("select", { className: "axis-choice" }, ...Object.entries(AXES).filter(([name]) =>
    name !== "hours" || page.runs.every((run) => run.hours)).map(([value, text]) => element("option", { value, textContent: text })));
  axis.addEventListener("change", () => {
    across = axis.value;
    for (const panel of panels) if (panel.plot.x.kind === "tokens") { panel.view = null; panel.reset.hidden = true; panel.cursor = null; }
    redrawAll();
  });
  const theme = element("button", { type: "button", className: "theme" });
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  name();
  const choices = element("div", { className: "choices" }, all);
  if (panels.some((panel) => panel.plot.x.kind === "tokens")) choices.append(element("label", {}, "Horizontal axis ", axis));
  choices.append(theme);
  bar.append(choices);
  const star = document.querySelector(".star figcaption, .charts figcaption");
  if (star) star.append(element("span", { className: "hint", textContent: HINT }));
  bar.classList.add("live");
}

// ---- tables --------------------------------------------------------------------------------------------------------

const valueOf = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent.trim();

function sortBy(table, index, heads) {
  const rising = heads[index].getAttribute("aria-sort") !== "ascending";
  const body = table.tBodies[0], order = [...body.rows];
  const asNumber = (text) => text === "" || text === "\u2013" ? NaN : Number(text);
  const numeric = order.every((row) => { const text = valueOf(row, index); return text === "\u2013" || text === "" || Number.isFinite(Number(text)); });
  const compare = numeric
    ? (a, b) => { // what is unknown stands last, whichever way
      const [x, y] = [a, b].map((row) => asNumber(valueOf(row, index)));
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return rising ? x - y : y - x;
    }
    : (a, b) => valueOf(a, index).localeCompare(valueOf(b, index), "en", { numeric: true }) * (rising ? 1 : -1);
  order.sort(compare);
  body.append(...order);
  heads.forEach((head, i) => head.setAttribute("aria-sort", i === index ? (rising ? "ascending" : "descending") : "none"));
}

function startSorting(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    head.setAttribute("aria-sort", "none");
    const button = element("button", { type: "button", className: "sort" }, ...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => sortBy(table, i, heads));
  });
}

function startFilters(table) {
  const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
  const search = element("input", { type: "search", placeholder: "Filter", size: 16 });
  search.setAttribute("aria-label", `Filter ${table.dataset.noun}`);
  const told = element("span", { className: "told" });
  told.setAttribute("role", "status");
  const selects = heads.map((head, i) => [head, i]).filter(([head]) => head.dataset.choose !== undefined).map(([head, i]) => {
    const values = [...new Set(rows.map((row) => row.cells[i].textContent.trim()))].sort();
    const title = head.textContent.trim();
    const select = element("select", {}, element("option", { value: "", textContent: `${title}: all` }),
      ...values.map((value) => element("option", { value, textContent: value })));
    select.setAttribute("aria-label", title);
    select.dataset.column = i;
    return values.length > 1 ? select : null;
  }).filter(Boolean);
  const apply = () => {
    const wanted = search.value.trim().toLowerCase();
    let left = 0;
    for (const row of rows) {
      const fits = (!wanted || row.textContent.toLowerCase().includes(wanted)) && selects.every((select) =>
        !select.value || row.cells[select.dataset.column].textContent.trim() === select.value);
      row.hidden = !fits;
      left += fits;
    }
    told.textContent = `${left.toLocaleString("en")} of ${rows.length.toLocaleString("en")} ${table.dataset.noun}`;
  };
  [search, ...selects].forEach((each) => each.addEventListener("input", apply));
  apply();
  table.closest(".scroll").before(element("div", { className: "filters" }, search, ...selects, told));
}

startFigures();
startToolbar();
for (const table of document.querySelectorAll("table[data-noun]")) { startFilters(table); startSorting(table); }
const opened = []; // for the printer
window.addEventListener("beforeprint", () => {
  opened.push(...document.querySelectorAll("details.printed:not([open])"));
  for (const each of opened) each.open = true;
});
window.addEventListener("afterprint", () => { for (const each of opened.splice(0)) each.open = false; });
document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
