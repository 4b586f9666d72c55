// What is chosen, kept in the address, and the deployments it leaves.

const RANGES = { 900: "15 min", 3600: "1 h", 21600: "6 h", 86400: "24 h", 604800: "7 days", 2592000: "30 days" };
const REFRESHES = { 5: "5 s", 15: "15 s", 60: "1 min", 0: "off" };
const COLORS = 8;

const $ = (id) => document.getElementById(id);
const SNAPSHOT = JSON.parse($("data").textContent);
const state = { view: "overview", range: "3600", refresh: "15", service: "", hidden: "", a: "", b: "" };
let data = SNAPSHOT;
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

function moment(when, timeStyle) {
  return new Date(when).toLocaleString("en", { dateStyle: "medium", timeStyle, hourCycle: "h23" });
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
