// The page: what is chosen (kept in the address), the data, tables and panels.

const RANGES = { 900: "15 min", 3600: "1 h", 21600: "6 h", 86400: "24 h", 604800: "7 days", 2592000: "30 days" };
const REFRESHES = { 5: "5 s", 15: "15 s", 60: "1 min", 0: "off" };
const STYLES = ["solid", "dashed", "dotted", "mixed"];
const COLORS = 8;

const $ = (id) => document.getElementById(id);
const SNAPSHOT = JSON.parse($("data").textContent);
const state = { view: "overview", range: "3600", refresh: "15", service: "", hidden: "", a: "", b: "" };
let data = SNAPSHOT;
let hovered = null;
let trouble = "";

/** An element with properties, attributes (`aria-…`, `style`) and children; text is never markup. */
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "style") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function readAddress() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (name in state) state[name] = value;
  }
}

function choose(changes) {
  Object.assign(state, changes);
  const kept = Object.entries(state).filter(([, value]) => value !== "");
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  draw();
}

// Deployments.

const services = () => [...new Set(data.deployments.map((d) => d.labels.service || ""))].sort();
const ofService = () => data.deployments.filter((d) => !state.service || d.labels.service === state.service);
const hidden = () => new Set(state.hidden.split(",").filter(Boolean));

function colorOf(name) {
  return `var(--c${data.deployments.findIndex((d) => d.name === name) % COLORS})`;
}

/** The two of A against B: as chosen, else `full` and another one of its service. */
function pair() {
  const names = ofService();
  const first = names.find((d) => d.name === state.a)
    || names.find((d) => d.labels.variant === "full" && d.name !== state.b)
    || names.find((d) => d.name !== state.b) || names[0];
  const rest = names.filter((d) => d !== first);
  const second = rest.find((d) => d.name === state.b)
    || rest.find((d) => d.labels.service === first.labels.service) || rest[0];
  return [first, second];
}

/** What charts draw: [{name, shown, color}]. */
function drawn() {
  if (state.view === "ab") {
    return pair().filter(Boolean).map((d, i) => ({ name: d.name, color: `var(--c${i})`, shown: `${"AB"[i]} ${d.name}` }));
  }
  const off = hidden();
  return ofService().filter((d) => !off.has(d.name)).map((d) => ({ name: d.name, color: colorOf(d.name), shown: d.name }));
}

function toggle(name, alone) {
  let off = hidden();
  if (alone) {
    const others = ofService().map((d) => d.name).filter((other) => other !== name);
    off = new Set(others.every((other) => off.has(other)) && !off.has(name) ? [] : others);
  } else if (!off.delete(name)) off.add(name);
  choose({ hidden: [...off].join(",") });
}

// Panels.

const byMean = (one, other) => meanOf(other.values) - meanOf(one.values);

function linesOf(panel, deployments) {
  const kinds = [];
  const lines = [];
  for (const { name, color, shown } of deployments) {
    for (const query of panel.queries) {
      for (const line of query.lines.filter((l) => l.labels.deployment === name).sort(byMean)) {
        const labelled = /\{\{(\w+)\}\}/.exec(query.legend);
        const kind = labelled ? line.labels[labelled[1]] || "" : query.legend;
        if (labelled && !(Math.max(...line.values) > 0) && query.lines.length > 2) continue;
        if (!kinds.includes(kind)) kinds.push(kind);
        const style = labelled ? STYLES[kinds.indexOf(kind) % STYLES.length] : query.style;
        lines.push({ name, shown, color, kind, style, values: line.values });
      }
    }
  }
  return { lines, kinds: kinds.map((kind) => ({ kind, style: lines.find((l) => l.kind === kind).style })) };
}

function drawPanel(panel, deployments, grid) {
  const card = el("article", { className: "panel" });
  grid.append(card);
  const { lines, kinds } = linesOf(panel, deployments);
  const unit = ["requests/s", "tokens/s"].includes(panel.unit) ? panel.unit : "";
  const key = el("span", { className: "kinds" });
  if (kinds.length > 1) {
    for (const { kind, style } of kinds) {
      const sample = make("svg", { viewBox: "0 0 22 8" }, make("path", { class: `series ${style}`, d: "M2 4h18" }));
      key.append(el("span", {}, sample, kind));
    }
  }
  card.append(el("header", {}, el("h3", { title: panel.help }, panel.title),
    el("span", { className: "unit" }, unit), key));
  if (!lines.some((line) => lastOf(line.values) !== null)) {
    card.append(el("div", { className: "empty" }, deployments.length ? "No data in this time" : "No deployment is chosen"));
    return;
  }
  const width = Math.max(280, card.clientWidth - 28);
  const { svg, highlight } = drawChart(panel, lines, data, width, (index, event) => hover(panel, lines, index, event));
  const legend = el("ul", { className: "legend" });
  for (const { name, color, shown } of deployments) {
    const mine = lines.filter((line) => line.name === name);
    if (!mine.length) continue;
    const values = el("span", { className: "values" });
    mine.forEach((line, i) => values.append(i ? " · " : "", line.kind ? `${line.kind} ` : "",
      el("b", {}, format(lastOf(line.values), panel.unit))));
    const item = el("li", { style: `--color: ${color}` }, el("i"), shown, values);
    item.addEventListener("mouseenter", () => highlight(name));
    item.addEventListener("mouseleave", () => highlight(null));
    legend.append(item);
  }
  card.append(svg, legend);
}

function hover(panel, lines, index, event) {
  hovered = index;
  moveCursors(index);
  const tip = $("tip");
  const there = index === null ? [] : lines.filter((line) => line.values[index] !== null);
  tip.hidden = !there.length;
  if (tip.hidden) return;
  there.sort((one, other) => other.values[index] - one.values[index]);
  const rows = there.slice(0, 14).map((line) => el("div", { style: `--color: ${line.color}` }, el("i"),
    `${line.shown} ${line.kind}`, el("b", {}, format(line.values[index], panel.unit))));
  const when = new Date((data.start + index * data.step) * 1000);
  tip.replaceChildren(el("time", {}, when.toLocaleString("en", { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" })), ...rows);
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - width - 16 : event.clientX + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(innerHeight - height - 4, event.clientY + 16))}px`;
}

function drawPanels() {
  const box = el("div");
  charts.length = 0;
  $("panels").replaceChildren(box);
  const deployments = drawn();
  const names = new Set(deployments.map((d) => d.name));
  for (const section of data.sections) {
    const empty = (panel) => panel.needs && deployments.length
      && !panel.queries.some((q) => q.lines.some((l) => names.has(l.labels.deployment)));
    const grid = el("div", { className: "grid" });
    box.append(el("h2", {}, section.title), grid);
    section.panels.filter((panel) => !empty(panel)).forEach((panel) => drawPanel(panel, deployments, grid));
    const missing = section.panels.filter(empty);
    for (const needs of new Set(missing.map((panel) => panel.needs))) {
      const titles = missing.filter((panel) => panel.needs === needs).map((panel) => panel.title);
      box.append(el("p", { className: "needs" }, `${titles.join(", ")}: not shown, needs ${needs}.`));
    }
  }
  if (hovered !== null) moveCursors(hovered);
}

// Tables.

const lineOf = (query, name) => query.lines.find((line) => line.labels.deployment === name);

/** [{title, query, unit, better}] of every query that tables show. */
function headlines() {
  const facts = data.facts.map((query) => ({ title: query.headline, query, unit: query.unit, better: "" }));
  const panels = data.sections.flatMap((section) => section.panels);
  return facts.concat(panels.flatMap((panel) => panel.queries.filter((query) => query.headline)
    .map((query) => ({ title: query.headline, query, unit: panel.unit, better: panel.better }))))
    .filter(({ query }) => query.lines.length);
}

function describe(deployment) {
  const labels = deployment.labels;
  const parts = [labels.service, labels.variant, labels.formats === "none" ? "not compressed" : labels.formats];
  if (labels.bits_per_weight) parts.push(`${labels.bits_per_weight} bits per weight`);
  if (Number(labels.sparsity) > 0) parts.push(`sparsity ${labels.sparsity}`);
  parts.push(labels.device_type, (labels.base_model || "").split("/").pop(), deployment.here ? "" : "gone");
  return parts.filter((part, i) => part && parts.indexOf(part) === i).join(" · ");
}

function drawOverview() {
  const columns = headlines().filter((column) => !column.title.endsWith("p50"));
  const head = el("tr", {}, el("th", {}, "Deployment"), ...columns.map((column) => el("th", {}, column.title)));
  const off = hidden();
  const rows = ofService().map((deployment) => {
    const name = deployment.name;
    const who = el("button", { className: "who", "aria-pressed": String(!off.has(name)), style: `--color: ${colorOf(name)}` },
      el("i"), el("span", {}, el("b", {}, name), el("small", {}, describe(deployment))));
    who.addEventListener("click", (event) => toggle(name, event.shiftKey));
    return el("tr", {}, el("td", {}, who), ...columns.map(({ query, unit }) => {
      const line = lineOf(query, name);
      const value = line ? line.values[line.values.length - 1] : null;
      return el("td", { className: value === null ? "none" : "" }, format(value, unit));
    }));
  });
  $("table").replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

function drawChoice() {
  if (state.view !== "ab") return $("choose").replaceChildren();
  const [a, b] = pair();
  const select = (key, chosen, badge) => {
    const options = ofService().map((d) => el("option", { value: d.name, selected: d === chosen }, d.name));
    const box = el("select", { "aria-label": badge }, ...options);
    box.addEventListener("change", () => {
      const [one, other] = [a.name, b && b.name];
      const same = box.value === (key === "a" ? other : one);
      choose(same ? { a: other, b: one } : { a: one, b: other || "", [key]: box.value });
    });
    return el("label", {}, el("span", { className: "badge", style: `background: var(--c${key === "a" ? 0 : 1})` }, badge), " ", box);
  };
  const swap = el("button", { className: "swap", disabled: !b }, "⇄ swap");
  swap.addEventListener("click", () => choose({ a: b.name, b: a.name }));
  $("choose").replaceChildren(select("a", a, "A"), select("b", b, "B"), swap);
}

/** Means over the moments that both have a value for; over each one's own if there are none. */
function meansOf(query, a, b) {
  const [one, other] = [a, b].map((d) => (lineOf(query, d.name) || { values: [] }).values);
  const both = one.map((value, i) => value !== null && i in other && other[i] !== null);
  const shared = both.some(Boolean) ? (values) => values.filter((_, i) => both[i]) : (values) => values;
  return [meanOf(shared(one)), meanOf(shared(other))];
}

/** How B differs from A: shares in percentage points, all else in percent. */
function changeOf(a, b, unit, better) {
  if (a === null || b === null) return el("td", { className: "none" }, "–");
  if (a === b) return el("td", { className: "none" }, "the same");
  const points = unit === "ratio";
  if (!points && a === 0) return el("td", { className: "none" }, "from 0");
  const change = points ? b - a : b / a - 1;
  const size = Math.abs(change);
  const good = !better || size < (points ? 0.001 : 0.01) ? "" : (change < 0) === (better === "lower") ? "good" : "bad";
  const share = Math.min(50, size * 50);
  const bar = el("i", { style: `width: ${share}%; left: ${change < 0 ? 50 - share : 50}%` });
  const text = size >= 10 && !points ? `${format(b / a, "count")} times`
    : `${change > 0 ? "+" : "−"}${(size * 100).toFixed(size < 0.1 ? 1 : 0)}${points ? " points" : "%"}`;
  return el("td", {}, el("div", { className: `change ${good}` }, el("b", {}, text), el("span", { className: "track" }, bar)));
}

function drawComparison() {
  const [a, b] = pair();
  if (!b) {
    $("table").replaceChildren(el("p", { className: "empty" }, "It takes two deployments to compare."));
    return;
  }
  const rows = Object.entries(data.info_labels)
    .filter(([label]) => a.labels[label] !== b.labels[label])
    .map(([label, title]) => el("tr", {}, el("td", {}, title), el("td", {}, a.labels[label] || "–"),
      el("td", {}, b.labels[label] || "–"), el("td")));
  for (const { title, query, unit, better } of headlines()) {
    const [one, other] = meansOf(query, a, b);
    if (one === null && other === null) continue;
    rows.push(el("tr", {}, el("td", {}, title), el("td", {}, format(one, unit)), el("td", {}, format(other, unit)),
      changeOf(one, other, unit, better)));
  }
  const badge = (i) => el("span", { className: "badge", style: `background: var(--c${i})` }, "AB"[i]);
  const head = el("tr", {}, el("th", { title: "Of the moments that both have a value for" }, `Mean over ${rangeText()}`), el("th", {}, badge(0), ` ${a.name}`),
    el("th", {}, badge(1), ` ${b.name}`), el("th", {}, "B against A"));
  $("table").replaceChildren(el("table", { className: "compare" }, el("thead", {}, head), el("tbody", {}, ...rows)));
}

// The rest of the page.

function rangeText() {
  const seconds = data.end - data.start;
  return RANGES[seconds] || (seconds >= 3600 ? `${+(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 60)} min`);
}

function drawAlerts() {
  const order = { firing: 0, pending: 1 };
  const shown = [...data.alerts].sort((one, other) => order[one.state] - order[other.state]
    || (one.labels.severity || "").localeCompare(other.labels.severity || ""));
  const open = new Set([...document.querySelectorAll(".alert[open]")].map((alert) => alert.dataset.key));
  $("alerts").replaceChildren(...shown.map((alert) => {
    const key = JSON.stringify(alert.labels);
    const severity = alert.state === "pending" ? "pending" : alert.labels.severity || "firing";
    const since = new Date(alert.activeAt);
    const item = el("details", { className: `alert ${severity}`, open: open.has(key) },
      el("summary", {}, el("b", {}, severity), alert.annotations.summary || alert.labels.alertname,
        el("time", {}, `since ${since.toLocaleString("en", { dateStyle: "medium", timeStyle: "short", hourCycle: "h23" })}`)),
      el("p", {}, alert.annotations.description || ""));
    item.dataset.key = key;
    return item;
  }));
}

function drawControls() {
  const names = services();
  if (state.service && !names.includes(state.service)) state.service = "";
  fill($("service"), { "": "all", ...Object.fromEntries(names.filter(Boolean).map((name) => [name, name])) }, state.service);
  $("service-box").hidden = names.length < 2;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", String(tab.dataset.view === state.view));
  }
}

function fill(select, options, chosen) {
  select.replaceChildren(...Object.entries(options).map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
  select.value = chosen;
}

function draw() {
  const problem = trouble || (data ? data.problem : "");
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
  if (!data) return;
  drawControls();
  drawAlerts();
  const empty = !ofService().length;
  for (const id of ["choose", "table", "panels"]) $(id).hidden = empty;
  if (empty) return;
  drawChoice();
  if (state.view === "ab") drawComparison(); else drawOverview();
  drawPanels();
}

// Data: in the page itself, or from the server it came from.

let timer = 0;
let asked = 0;

async function refresh() {
  clearTimeout(timer);
  const mine = ++asked;
  const status = $("status");
  status.className = "busy";
  try {
    const answer = await fetch(`data?seconds=${encodeURIComponent(state.range)}`, { signal: AbortSignal.timeout(60000) });
    const got = await answer.json();
    if (mine !== asked) return;
    if (got.error) throw new Error(got.error);
    data = got;
    trouble = "";
    status.className = "";
    status.textContent = new Date().toLocaleTimeString("en", { hourCycle: "h23" });
    status.title = `Prometheus at ${data.prometheus}`;
  } catch (problem) {
    if (mine !== asked) return;
    status.className = "late";
    const lost = problem instanceof TypeError || problem.name === "TimeoutError";
    trouble = (lost ? "vllm-compress dashboard does not answer." : problem.message)
      + (data ? "\nWhat is below is old." : "");
  }
  draw();
  if (Number(state.refresh)) timer = setTimeout(refresh, Number(state.refresh) * 1000);
}

function start() {
  readAddress();
  const stored = (() => { try { return localStorage.getItem("theme"); } catch { return null; } })();
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = stored || system;
  $("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try { localStorage.setItem("theme", next); } catch { /* a page without storage forgets it */ }
  });
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.addEventListener("click", () => choose({ view: tab.dataset.view }));
  }
  $("service").addEventListener("change", () => choose({ service: $("service").value }));
  addEventListener("hashchange", () => { readAddress(); draw(); });
  let resized = 0;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 120); });
  if (SNAPSHOT) {
    fill($("range"), { 0: rangeText() }, "0");
    $("range").disabled = true;
    $("refresh-box").hidden = true;
    $("status").textContent = `as of ${new Date(data.end * 1000).toLocaleString("en", { dateStyle: "medium", timeStyle: "short", hourCycle: "h23" })}`;
    draw();
    return;
  }
  $("status").textContent = "loading";
  fill($("range"), RANGES, state.range);
  fill($("refresh"), REFRESHES, state.refresh);
  $("range").addEventListener("change", () => { choose({ range: $("range").value }); refresh(); });
  $("refresh").addEventListener("change", () => { choose({ refresh: $("refresh").value }); refresh(); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && Number(state.refresh)) refresh(); });
  refresh();
}

start();
