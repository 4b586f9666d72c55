// The page: alerts, controls, and the data, in the page itself or from the server it came from.

let timer = 0;
let asked = 0;

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
    const item = el("details", { className: `alert ${severity}`, open: open.has(key) },
      el("summary", {}, el("b", {}, severity), alert.annotations.summary || alert.labels.alertname,
        el("time", {}, `since ${moment(alert.activeAt, "short")}`)),
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
  const all = Object.entries(options);
  select.replaceChildren(...all.map(([value, text]) => el("option", { value }, text)));
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
    $("status").textContent = `as of ${moment(data.end * 1000, "short")}`;
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
