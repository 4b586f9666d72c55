// Tables: every deployment now, or A against B over the time shown.

const lineOf = (query, name) => query.lines.find((line) => line.labels.deployment === name);

/** [{title, query, unit, better}] of every query that tables show. */
function headlines() {
  const facts = data.facts.map((query) => ({ title: query.headline, query, unit: query.unit, better: "" }));
  const panels = data.sections.flatMap((section) => section.panels);
  return facts.concat(panels.flatMap((panel) => panel.queries.filter((query) => query.headline)
    .map((query) => ({ title: query.headline, query, unit: panel.unit, better: panel.better }))))
    .filter(({ query }) => query.lines.length);
}

function summaryOf(deployment) {
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
    const who = el("button", {
      className: "who",
      title: "Click: show or hide. Shift and click: only this one.",
      "aria-pressed": String(!off.has(name)),
      style: `--color: ${colorOf(name)}`,
    }, el("i"), el("span", {}, el("b", {}, name), el("small", {}, summaryOf(deployment))));
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
    const style = `background: var(--c${key === "a" ? 0 : 1})`;
    return el("label", {}, el("span", { className: "badge", style }, badge), " ", box);
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
  const head = el("tr", {},
    el("th", { title: "Of the moments that both have a value for" }, `Mean over ${rangeText()}`),
    el("th", {}, badge(0), ` ${a.name}`), el("th", {}, badge(1), ` ${b.name}`), el("th", {}, "B against A"));
  $("table").replaceChildren(el("table", { className: "compare" }, el("thead", {}, head), el("tbody", {}, ...rows)));
}
