// Numbers with units, and one line chart as SVG. No state but the cursor that all charts share.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190, LEFT = 50, RIGHT = 6, TOP = 8, BOTTOM = 22;
const SCALES = {
  seconds: [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]],
  ratio: [[0.01, "%"]],
  bytes: [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]],
  watts: [[1e6, "MW"], [1e3, "kW"], [1, "W"], [1e-3, "mW"]],
  joules: [[1e6, "MJ"], [1e3, "kJ"], [1, "J"], [1e-3, "mJ"], [1e-6, "µJ"]],
};
const PLAIN = [[1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];

/** [factor, suffix] that suits values up to `top` of a unit. */
function scaleOf(unit, top) {
  const scales = SCALES[unit] || PLAIN;
  return scales.find(([factor]) => Math.abs(top) >= factor * 0.9995) || scales[scales.length - 1];
}

function digits(value) {
  const size = Math.abs(value);
  return size >= 100 || size === 0 ? 0 : size >= 10 ? 1 : size >= 0.995 ? 2 : size >= 0.0995 ? 3 : 4;
}

/** `1.25 ms`, `97%`, `1.2k`: three digits, and the unit where it is short. */
function format(value, unit) {
  if (value === null || value === undefined) return "–";
  return value === 0 ? "0" : scaled(value, scaleOf(unit, value), unit);
}

function scaled(value, [factor, suffix], unit) {
  const size = value / factor;
  const space = unit in SCALES && suffix !== "%" ? " " : "";
  return Number(size.toFixed(digits(size))).toLocaleString("en") + space + suffix;
}

function formatTime(seconds, span) {
  const date = new Date(seconds * 1000);
  const clock = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  if (span > 86400) Object.assign(clock, { month: "short", day: "numeric" });
  else if (span <= 600) clock.second = "2-digit";
  return date.toLocaleString("en", clock);
}

/** Round steps from 0 that pass `top`, four or so. */
function valueTicks(top, whole) {
  if (!(top > 0)) return [0, 1];
  let step = 10 ** Math.floor(Math.log10(top / 3));
  step *= [1, 2, 2.5, 5, 10].find((factor) => factor * step * 4 >= top) || 10;
  if (whole) step = Math.max(1, Math.ceil(step));
  const count = Math.ceil(top / step - 1e-9);
  return Array.from({ length: count + 1 }, (_, i) => i * step);
}

function timeTicks(start, end, width) {
  const steps = [10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800];
  const room = Math.max(2, Math.floor(width / (end - start > 86400 ? 105 : 75)));
  const step = steps.find((s) => (end - start) / s <= room) || 604800;
  const shift = new Date(end * 1000).getTimezoneOffset() * 60;
  const ticks = [];
  for (let t = Math.ceil((start - shift) / step) * step + shift; t <= end; t += step) ticks.push(t);
  return ticks;
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** `M` and `L` through all values, a new start after every gap; a lone value is a dot. */
function pathOf(values, x, y) {
  let path = "";
  values.forEach((value, i) => {
    if (value === null) return;
    const begins = i === 0 || values[i - 1] === null;
    path += `${begins ? "M" : "L"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    if (begins && (i + 1 === values.length || values[i + 1] === null)) path += "h.1";
  });
  return path;
}

const charts = [];

function moveCursors(index) {
  for (const chart of charts) chart.cursor(index);
}

/** Powers of ten from below the least to above the most, and 2 and 5 between them where few. */
function wideTicks(values) {
  const from = Math.floor(Math.log10(Math.min(...values)));
  const to = Math.max(from + 1, Math.ceil(Math.log10(Math.max(...values)) - 1e-9));
  const between = to - from <= 2 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = from; power < to; power++) for (const factor of between) ticks.push(factor * 10 ** power);
  return [...ticks, 10 ** to];
}

/** The value that a share of all values keeps below. */
function quantileOf(values, share) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(share * (sorted.length - 1))];
}

const RARE = 0.98, FAR = 3;

/** {ticks, top, place, clipped}: `place` maps a value to 0 at the axis' bottom and 1 at its top. */
function axisOf(panel, all) {
  const positive = all.filter((value) => value > 0);
  if (panel.wide && positive.length && all.every((value) => value >= 0)) {
    const ticks = wideTicks(positive);
    const [low, high] = [ticks[0], ticks[ticks.length - 1]];
    const place = (value) => Math.log(Math.max(value, low) / low) / Math.log(high / low);
    return { ticks, top: high, place, clipped: 0 };
  }
  const lowest = Math.min(0, ...all), highest = Math.max(0, ...all);
  // A spike must not flatten what happens the rest of the time.
  const usual = positive.length >= 50 ? quantileOf(positive, RARE) : highest;
  const clipped = !panel.top && highest > FAR * usual ? highest : 0;
  const ticks = valueTicks(panel.top || (clipped ? usual * 1.5 : highest * 1.05) || 1, panel.unit === "count");
  const top = panel.top || ticks[ticks.length - 1];
  if (lowest < 0) ticks.unshift(lowest);
  return { ticks, top, place: (value) => (Math.min(value, top) - lowest) / (top - lowest), clipped };
}

/** Vertical lines where something happened to the deployments that are drawn. */
function drawMarks(marks, x, svg) {
  for (const { deployment, kind, index } of marks) {
    const line = make("line", { class: `mark ${kind}`, x1: x(index), x2: x(index), y1: TOP, y2: HEIGHT - BOTTOM });
    line.append(make("title", {}, `${deployment}: ${kind}`));
    svg.append(line);
  }
}

/**
 * Draw `lines` [{name, kind, color, style, values}] of `panel` into a new SVG of this width.
 * `grid` is {start, end, step, marks}; `onHover(index or null, event)` is called with the mouse.
 */
function drawChart(panel, lines, grid, width, onHover) {
  const all = lines.flatMap((line) => line.values.filter((value) => value !== null));
  const { ticks, top, place, clipped } = axisOf(panel, all);
  const count = Math.round((grid.end - grid.start) / grid.step);
  const x = (i) => LEFT + (i / count) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - place(value) * (HEIGHT - BOTTOM - TOP);
  const svg = make("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  svg.setAttribute("aria-label", `${panel.title}: ${lines.map((line) =>
    `${line.name} ${line.kind} ${format(lastOf(line.values), panel.unit)}`).join(", ")}`);

  for (const tick of ticks.filter((t) => t <= top * 1.0001)) {
    const scale = scaleOf(panel.unit, panel.wide ? tick : top);
    svg.append(
      make("line", { class: tick ? "gridline" : "axis", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }),
      make("text", { x: LEFT - 7, y: y(tick) + 4, "text-anchor": "end" },
        tick === 0 ? "0" : scaled(tick, scale, panel.unit)));
  }
  for (const t of timeTicks(grid.start, grid.end, width - LEFT)) {
    const at = x((t - grid.start) / grid.step);
    const anchor = at > width - 24 ? "end" : at < LEFT + 20 ? "start" : "middle";
    svg.append(make("text", { x: at, y: HEIGHT - 5, "text-anchor": anchor }, formatTime(t, grid.end - grid.start)));
  }
  if (clipped) {
    svg.append(make("text", { class: "clipped", x: width - RIGHT, y: TOP + 8, "text-anchor": "end" },
      `cut off, up to ${format(clipped, panel.unit)}`));
  }
  const names = new Set(lines.map((line) => line.name));
  drawMarks((grid.marks || []).filter((mark) => names.has(mark.deployment)), x, svg);
  const paths = lines.map((line) => {
    const path = make("path", { class: `series ${line.style}`, d: pathOf(line.values, x, y) });
    path.style.stroke = line.color;
    svg.append(path);
    return path;
  });

  const cursor = make("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  charts.push({
    cursor(index) {
      cursor.setAttribute("visibility", index === null ? "hidden" : "visible");
      if (index !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(index));
    },
  });
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) * (width / box.width) - LEFT) / (width - LEFT - RIGHT);
    onHover(Math.round(Math.min(1, Math.max(0, share)) * count), event);
  });
  svg.addEventListener("mouseleave", (event) => onHover(null, event));
  const highlight = (name) => lines.forEach((line, i) =>
    paths[i].classList.toggle("faded", name !== null && line.name !== name));
  return { svg, highlight };
}

function lastOf(values) {
  for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null) return values[i];
  return null;
}

function meanOf(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}
