// The inspector: asks a server each second what it is doing, and shows it.

import {
  bytes, count, duration, element, fill, fillKey, hex, seconds, short,
} from "./format.js";
import { featureOf, protocolFeatureOf } from "./features.js";
import { Refused, events, get, useToken } from "./link.js";
import { AddressMap } from "./map.js";
import { Heat, Lines, colors, heatColor, quantile } from "./plot.js";
import { Timeline } from "./timeline.js";

const EVERY = 1000;
const KEPT_EVENTS = 200;
const THEMES = ["auto", "light", "dark"];
const OPERATIONS = ["read", "write", "flush", "other"];

const at = (id) => document.getElementById(id);
const root = document.documentElement;

let paused = false;
let last = null; // the status before
let failures = 0;
let timer = 0;
let listening = null;

// What is shown.

const iops = new Lines(at("iops"), at("iops-read"), {
  read: ["read", "read"], write: ["write", "write"], flush: ["mixed", "flush"], other: ["other", "other"],
}, " a second");
const depth = new Lines(at("depth"), at("depth-read"), {
  depth: ["read", "in flight"], held: ["write", "held by the device"],
}, "");
const latency = new Heat(at("latency"), at("latency-read"));
const maps = [...document.querySelectorAll(".map")].map((place) => new AddressMap(place, explain));
const timeline = new Timeline(at("timeline"), {
  frame: at("timeline-frame"), none: at("timeline-none"), key: at("timeline-key"),
  read: at("timeline-read"), note: at("capture-note"), capture: at("capture"), follow: at("follow"),
});
const happened = [];

function say(state, text) {
  root.dataset.state = state;
  if (at("state").textContent !== text) at("state").textContent = text;
}

// What the operations of all queues have taken, as {operation: count} and {end: count}.
function totals(status) {
  const byOperation = {};
  const buckets = new Map();
  for (const queue of status.queues) {
    for (const [operation, measured] of Object.entries(queue.latency)) {
      byOperation[operation] = (byOperation[operation] ?? 0) + measured.count;
      for (const [end, n] of measured.buckets) buckets.set(end, (buckets.get(end) ?? 0) + n);
    }
  }
  return { byOperation, buckets };
}

function sum(list, name) {
  return list.reduce((total, each) => total + each[name], 0);
}

function addSamples(status) {
  const span = status.time_s - last.time_s;
  if (span <= 0) return null;
  const [now, before] = [totals(status), totals(last)];
  const rate = {};
  for (const [name, n] of Object.entries(now.byOperation)) {
    rate[name] = Math.max(n - (before.byOperation[name] ?? 0), 0) / span;
  }
  if (!status.queues.length) rate.other = status.rates.requests ?? 0;
  const buckets = new Map();
  for (const [end, n] of now.buckets) {
    const grown = n - (before.buckets.get(end) ?? 0);
    if (grown > 0) buckets.set(end, grown);
  }
  const sample = { buckets, p50: quantile(buckets, 0.5), p99: quantile(buckets, 0.99) };
  iops.add(rate);
  depth.add({ depth: sum(status.queues, "depth"), held: sum(status.queues, "held") });
  latency.add(sample);
  for (const chart of [iops, depth, latency]) {
    chart.canvas.setAttribute("aria-label", `${chart.canvas.id}: ${chart.readout.textContent}`);
  }
  return {
    requests: Math.max(done(status) - done(last), 0) / span,
    moved: Math.max(sum(status.queues, "bytes") - sum(last.queues, "bytes"), 0) / span,
    interrupts: Math.max(sum(status.queues, "notifications") - sum(last.queues, "notifications"), 0) / span,
    ...sample,
  };
}

const done = (status) => (status.queues.length ? sum(status.queues, "completed") : status.counts.requests ?? 0);

function showTiles(status, now) {
  const faults = Object.values(status.faults).reduce((total, n) => total + n, 0);
  const { iotlb, dirty } = status;
  const tiles = [
    ["Requests", now ? short(now.requests) : "\u2013", "a second"],
    ["Throughput", now ? (now.moved / 1e6).toFixed(1) : "\u2013", "MB/s"],
    ["Latency p50", now?.p50 ? seconds(now.p50) : "\u2013", ""],
    ["Latency p99", now?.p99 ? seconds(now.p99) : "\u2013", ""],
    ["In flight", count(sum(status.queues, "depth")), "requests"],
    ["Interrupts", now ? short(now.interrupts) : "\u2013", "a second"],
  ];
  if (iotlb) {
    tiles.push(["Translations", count(iotlb.entries), "entries"],
      ["IOTLB hit rate", (iotlb.hit_rate * 100).toFixed(1), "%"]);
    if (iotlb.miss_latency.count) tiles.push(["Misses pending", count(iotlb.pending), ""]);
  }
  if (dirty.tracked) tiles.push(["Dirty pages", count(dirty.pages), `${short(dirty.pages_per_s)} a second`]);
  tiles.push(["Completed", count(done(status)), "in all"], ["Faults", count(faults), "", faults > 0]);
  const place = at("tiles");
  while (place.children.length > tiles.length) place.lastChild.remove();
  tiles.forEach(([name, value, unit, bad], i) => {
    const tile = place.children[i] ?? place.appendChild(element("div", {}, element("dt"), element("dd")));
    tile.className = bad ? "bad" : "";
    tile.dataset.name = name;
    tile.children[0].textContent = name;
    tile.children[1].replaceChildren(value, element("small", { textContent: unit }));
  });
}

const QUEUE_COLUMNS = ["Queue", "State", "Size", "Index", "Depth", "Held", "Taken", "Completed", "Requests/s", "MB/s", "Interrupts/s", "p50", "p99", "Longest"]
  .map((name, i) => ({ name, number: i > 1 }));

function stateOf(queue) {
  if (queue.broken !== null) return { text: `broken: ${queue.broken}`, className: "bad" };
  if (!queue.running) return { text: queue.enabled ? "idle" : "off", className: "zero" };
  return queue.stalled ? `stalled for ${seconds(queue.stalled_s)}` : "running";
}

function showQueues(status) {
  const taking = (queue, name) => {
    const all = queue.latency_all;
    return all.count ? seconds(all[name]) : "\u2013";
  };
  at("queues-none").hidden = status.queues.length > 0;
  at("queue-table").hidden = status.queues.length === 0;
  fill(at("queue-table"), QUEUE_COLUMNS, status.queues.map((queue) => [
    queue.index, stateOf(queue), count(queue.size), count(queue.next_avail), count(queue.depth),
    count(queue.held), count(queue.taken), count(queue.completed), short(queue.rates.requests_per_s),
    (queue.rates.bytes_per_s / 1e6).toFixed(1), short(queue.rates.notifications_per_s),
    taking(queue, "p50_s"), taking(queue, "p99_s"), taking(queue, "max_s"),
  ]));
}

const spoken = (name) => name.replaceAll("_", " ");

function showCounts(status) {
  const numbered = [{ name: "Count" }, { name: "In all", number: true }, { name: "A second", number: true }];
  fill(at("fault-table"), [{ name: "Fault" }, { name: "In all", number: true }, { name: "A second", number: true }],
    Object.entries(status.faults).map(([name, n]) => [
      spoken(name), { text: count(n), className: n ? "bad" : "zero" },
      { text: short(status.rates[name] ?? 0), className: n ? "" : "zero" },
    ]));
  fill(at("count-table"), numbered, Object.entries(status.counts).map(([name, n]) => [
    spoken(name), { text: count(n), className: n ? "" : "zero" }, { text: short(status.rates[name] ?? 0), className: n ? "" : "zero" },
  ]));
  fill(at("budget-table"), [{ name: "Limit" }, { name: "Used", number: true }, { name: "At most", number: true }],
    Object.entries(status.budgets).map(([name, { used, limit }]) => [
      spoken(name), { text: count(used), className: used >= limit ? "bad" : "" }, count(limit),
    ]));
}

function showNames(place, names, lookUp) {
  const shown = names.join(" ");
  if (place.dataset.shown === shown) return;
  place.dataset.shown = shown;
  place.replaceChildren(...names.map((name) => {
    const { name: whole, section, url } = lookUp(name);
    const label = url
      ? element("a", { href: url, target: "_blank", rel: "noopener noreferrer", textContent: whole })
      : whole;
    return element("li", { data: { name } }, label, element("span", { textContent: section && ` ${section}` }));
  }));
}

function showPeer(status) {
  const { peer, device, process } = status;
  at("device").textContent = `${device.kind} over ${device.transport}`;
  at("where").textContent = `${device.path || "a descriptor"}, process ${process.pid}, up ${duration(process.uptime_s)}`
    + (peer ? `, peer ${peer.number} for ${duration(peer.connected_s)}` : "");
  document.title = `${device.kind} \u2013 guestio`;
  showNames(at("features"), peer?.features ?? [], featureOf);
  at("features-none").hidden = Boolean(peer?.features.length);
  showNames(at("protocol-features"), peer?.protocol_features ?? [], protocolFeatureOf);
  at("protocol").hidden = !peer?.protocol_features.length;
  at("driver-status").textContent = peer?.status.length ? `Device status: ${peer.status.join(", ")}` : "";
  at("foot").textContent = `guestio ${status.version}; server started ${new Date(process.started * 1000).toLocaleString()}; `
    + `recorded now: ${status.trace.groups.join(", ") || "nothing"}`;
}

async function showRules(status) {
  at("rules").hidden = status.rules === null;
  if (status.rules === null) return;
  try {
    const rules = await get("/fault");
    at("rules-none").hidden = rules.length > 0;
    at("rule-table").hidden = rules.length === 0;
    fill(at("rule-table"), [{ name: "Number", number: true }, { name: "Rule" }, { name: "Matched", number: true }, { name: "Struck", number: true }],
      rules.map((rule) => [rule.number, rule.rule, count(rule.matched), count(rule.struck)]));
  } catch { /* asked for again with the next status */ }
}

// Rare events, which are recorded anyway.

function showEvents() {
  at("events-none").hidden = happened.length > 0;
  at("event-table").hidden = happened.length === 0;
  const { time_s: now = 0 } = last ?? {};
  fill(at("event-table"), [{ name: "Ago", number: true }, { name: "Event" }, { name: "Times", number: true }, { name: "Queue", number: true }, { name: "Address" }, { name: "Length", number: true }, { name: "Detail", number: true }],
    happened.map((event) => [
      seconds(Math.max(now - event.time_s, 0)), spoken(event.what), { text: count(event.times), className: event.times > 1 ? "" : "zero" }, event.queue ?? "",
      { text: event.address ? hex(event.address) : "", className: "mono" },
      event.length ? count(event.length) : "", event.detail ? (event.detail > 4096 ? hex(event.detail) : count(event.detail)) : "",
    ]));
}

async function listen() {
  if (listening) return;
  const mine = listening = new AbortController();
  try {
    for await (const { event, data } of events("/events?groups=life", mine.signal)) {
      if (event !== "message") continue;
      const { what, queue, detail } = data;
      const before = happened[0];
      if (before && before.what === what && before.queue === queue && before.detail === detail) {
        happened[0] = { ...data, times: before.times + 1 };
      } else happened.unshift({ ...data, times: 1 });
      if (happened.length > KEPT_EVENTS) happened.length = KEPT_EVENTS;
    }
  } catch { /* asked for again with the next status */ } finally {
    mine.abort();
    if (listening === mine) listening = null;
  }
}

function hush() {
  listening?.abort();
  listening = null;
}

// Explanations.

async function explain(address, length) {
  at("explain-address").value = hex(address);
  at("explain-length").value = String(length);
  at("faults").scrollIntoView();
  await showExplanation(address, length);
}

async function showExplanation(address, length) {
  const place = at("explanation");
  const line = (text, name = "p") => element(name, { textContent: text });
  try {
    const found = await get(`/explain?address=${address}&length=${length}`);
    const lines = [
      line(`${hex(found.address)}, ${bytes(found.length_bytes)}, ${found.translated ? "translated by an IOMMU" : "physical"}`),
      line(`A read ${found.read}.`), line(`A write ${found.write}.`),
    ];
    if (found.pending) lines.push(line("Its translation is asked for, and not answered yet."));
    if (found.mapped.length) {
      const table = element("table", {}, element("thead"), element("tbody"));
      fill(table, [{ name: "Mapped" }, { name: "Bytes", number: true }, { name: "Leads to" }, { name: "Access" }, { name: "Since", number: true }],
        found.mapped.map((each) => [
          { text: hex(each.address), className: "mono" }, bytes(each.length_bytes),
          { text: hex(each.target), className: "mono" }, each.access || "none",
          each.since_s === null ? "not recorded" : seconds(each.since_s),
        ]));
      lines.push(element("div", { className: "scroll" }, table));
    }
    if (found.last.length) {
      const table = element("table", {}, element("thead"), element("tbody"));
      fill(table, [{ name: "Ago", number: true }, { name: "What happened" }, { name: "Address" }, { name: "Bytes", number: true }, { name: "Access" }],
        found.last.map((each) => [
          seconds(Math.max((last?.time_s ?? each.time_s) - each.time_s, 0)), spoken(each.what),
          { text: hex(each.address), className: "mono" }, bytes(each.length_bytes), each.access,
        ]));
      lines.push(element("div", { className: "scroll short" }, table));
    } else lines.push(line("Nothing is recorded about it."));
    if (found.translated && !found.recorded_s) lines.push(line("Changes of translations are recorded from now on: ask again."));
    place.replaceChildren(element("div", { className: "explained" }, ...lines));
  } catch (error) {
    place.replaceChildren(element("p", { className: "empty", textContent: error.message }));
  }
}

at("explain-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const numbers = ["explain-address", "explain-length"].map((id) => at(id).value.trim());
  if (numbers.every((text) => /^(0x[0-9a-f]+|[0-9]+)$/i.test(text))) showExplanation(...numbers);
  else at("explanation").replaceChildren(element("p", { className: "empty", textContent: "A number is decimal, or 0x and hexadecimal." }));
});

// Once a second.

function forget() {
  last = null;
  happened.length = 0;
  for (const chart of [iops, depth, latency]) chart.clear();
  timeline.clear();
  for (const map of maps) map.forget();
}

async function look() {
  timer = 0;
  if (paused || document.hidden) return;
  try {
    const status = await get("/status");
    if (paused) return;
    if (last && (last.process.started !== status.process.started || last.process.pid !== status.process.pid)) forget();
    else if (failures && last) for (const map of maps) map.refresh();
    failures = 0;
    const now = last && addSamples(status);
    last = status;
    say(status.peer ? "live" : "idle", status.peer ? "live" : "no front-end");
    showPeer(status);
    showTiles(status, now);
    showQueues(status);
    showCounts(status);
    showEvents();
    showRules(status);
    for (const map of maps) map.tick();
    listen();
    at("tokens").hidden = true;
    root.dataset.updates = Number(root.dataset.updates ?? 0) + 1;
  } catch (error) {
    failures += 1;
    hush();
    const needed = error instanceof Refused && error.status === 401;
    if (!paused) say(needed ? "token" : "gone", needed ? "a token is needed" : "the server does not answer; trying again");
    at("tokens").hidden = !needed;
    if (needed) return;
    if (!(error instanceof Refused || error instanceof TypeError || error instanceof DOMException)) console.error(error);
  }
  again(Math.min(EVERY * Math.max(failures, 1), 2 * EVERY));
}

function again(after) {
  clearTimeout(timer);
  timer = setTimeout(look, after);
}

// Controls.

function pause(to) {
  paused = to;
  at("pause").setAttribute("aria-pressed", paused);
  at("pause").textContent = paused ? "Go on" : "Pause";
  if (paused) {
    hush();
    timeline.end();
    say("paused", "paused");
  } else {
    // What happened meanwhile is no sample of a second.
    last = null;
    again(0);
  }
}

function useTheme(name) {
  if (name === "auto") delete root.dataset.theme;
  else root.dataset.theme = name;
  at("theme").textContent = `Theme: ${name}`;
  try {
    localStorage.setItem("guestio-theme", name);
  } catch { /* it is not kept */ }
  redraw();
}

function redraw() {
  const { heat, named } = colors();
  const steps = [0.15, 0.36, 0.58, 0.79, 1].map((share) => heatColor(heat, share));
  fillKey(at("latency-key"), [[steps, "few to all requests of a second"], [named("ink"), "half of them (p50)"], [named("hot"), "99 % of them (p99, dashed)"]]);
  for (const each of [iops, depth, latency, timeline, ...maps]) each.draw();
}

let theme = "auto";
try {
  theme = THEMES.find((name) => name === localStorage.getItem("guestio-theme")) ?? "auto";
} catch { /* as the system */ }

const sections = [...document.querySelectorAll("main > section")];
document.querySelector(".sections").append(...sections.map((section, i) => element("a", { href: `#${section.id}` },
  element("kbd", { textContent: i + 1, ariaHidden: "true" }), section.querySelector("h2").textContent)));

function nextTheme() {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  useTheme(theme);
}

function help() {
  at("keys").hidden = !at("keys").hidden;
  at("help").setAttribute("aria-expanded", !at("keys").hidden);
}

at("pause").addEventListener("click", () => pause(!paused));
at("theme").addEventListener("click", nextTheme);
at("help").addEventListener("click", help);
at("tokens").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(at("token").value);
  at("token").value = "";
  again(0);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
  if (event.key === "p") pause(!paused);
  else if (event.key === "t") nextTheme();
  else if (event.key === "?") help();
  else if (/^[1-9]$/.test(event.key) && sections[event.key - 1]) {
    const section = sections[event.key - 1];
    section.scrollIntoView();
    section.querySelector("h2").tabIndex = -1;
    section.querySelector("h2").focus({ preventScroll: true });
  } else return;
  event.preventDefault();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    hush();
    timeline.end();
  } else if (!paused) again(0);
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

useTheme(theme);
look();
