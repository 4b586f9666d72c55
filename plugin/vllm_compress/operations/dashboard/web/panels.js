// Panels: a chart of every query's lines, with a legend and what the mouse points at.

const STYLES = ["solid", "dashed", "dotted", "mixed"];
let hovered = null;

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
  const when = (data.start + index * data.step) * 1000;
  tip.replaceChildren(el("time", {}, moment(when, "medium")), ...rows);
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
  if ((data.marks || []).some((mark) => names.has(mark.deployment))) {
    box.append(el("p", { className: "needs" }, "Vertical lines: dashed, a rollout moved users; dotted, a server started."));
  }
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
