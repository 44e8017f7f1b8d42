// Requests over time, with their misses, mappings and interrupts, from events of the server.

import { bytes, count, element, fillKey, hex, seconds } from "./format.js";
import { Refused, events } from "./link.js";
import { colors, prepare } from "./plot.js";

const MOST = 3000; // events that are kept
const BURST = 400; // events of a capture
const BURST_TIME = 2000;
const FOLLOWED = 2; // seconds that are shown while it follows
const LANES = 32; // requests of a queue side by side
const LEFT = 92;
const BAR = 7;
const OPERATIONS = ["other", "read", "write", "flush"];
const COLORS = ["other", "read", "write", "mixed"];
const MARKS = {
  miss: "\u25BC", update: "\u25B2", invalidate: "\u2715", refused: "!", evicted: "\u2193",
  dma_map: "\u25B2", dma_unmap: "\u2715", domain_map: "\u25B2", domain_unmap: "\u2715", fault: "!", stalled: "\u25A0", failed: "!",
};

export class Timeline {
  constructor(canvas, parts) {
    this.canvas = canvas;
    this.parts = parts; // {frame, none, key, read, note, capture, follow}
    this.clear();
    this.stop = null;
    this.used = false; // whether anything was captured, or followed
    this.span = null; // seconds from the end that are shown; null for all
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("click", (event) => this.click(event));
    parts.capture.addEventListener("click", () => this.listen(false));
    parts.follow.addEventListener("click", () => {
      if (this.following) this.end();
      else this.listen(true);
    });
    new ResizeObserver(() => this.draw()).observe(parts.frame);
    // The first time that it is seen, and there is something to see.
    const seen = new IntersectionObserver(([entry]) => {
      if (!entry.isIntersecting || document.documentElement.dataset.state !== "live") return;
      seen.disconnect();
      if (!this.used) this.listen(false);
    });
    seen.observe(parts.frame.parentElement);
  }

  clear() {
    this.events = [];
    this.requests = [];
    this.lost = 0;
    this.selected = null;
    this.draw();
  }

  get following() {
    return this.parts.follow.getAttribute("aria-pressed") === "true";
  }

  end() {
    this.stop?.abort();
    this.stop = null;
    this.parts.follow.setAttribute("aria-pressed", "false");
    this.parts.capture.disabled = false;
  }

  async listen(follow) {
    this.used = true;
    this.end();
    this.clear();
    const stop = this.stop = new AbortController();
    const { note, capture } = this.parts;
    this.parts.follow.setAttribute("aria-pressed", follow);
    capture.disabled = true;
    note.textContent = follow ? "following" : "capturing";
    const timer = follow ? 0 : setTimeout(() => stop.abort(), BURST_TIME);
    let pending = 0;
    try {
      for await (const { event, data } of events("/events?groups=requests,translations", stop.signal)) {
        if (event === "lost") this.lost += data.records;
        else {
          this.events.push(data);
          if (this.events.length > MOST) this.events.splice(0, this.events.length - MOST);
          if (!follow && this.events.length >= BURST) break;
        }
        if (follow && !pending) {
          pending = requestAnimationFrame(() => {
            pending = 0;
            this.show(FOLLOWED);
          });
        }
      }
    } catch (error) {
      if (error instanceof Refused) note.textContent = error.message;
    } finally {
      clearTimeout(timer);
      stop.abort();
    }
    if (this.stop !== stop && this.stop !== null) return; // another one has begun
    this.end();
    this.show(follow ? FOLLOWED : null);
  }

  show(span) {
    this.span = span;
    const last = this.events.at(-1)?.time_s ?? 0;
    const from = span === null ? -Infinity : last - span;
    this.requests = join(this.events.filter((event) => event.time_s >= from));
    if (this.selected !== null) this.selected = Math.min(this.selected, this.requests.length - 1);
    const lost = this.lost ? `, ${count(this.lost)} more were too many` : "";
    this.parts.note.textContent = `${this.following ? "following: " : ""}${count(this.events.length)} events${lost}`;
    this.draw();
  }

  range() {
    const shown = this.span === null ? this.events : this.events.filter(
      (event) => event.time_s >= this.events.at(-1).time_s - this.span);
    const first = Math.min(...shown.map((event) => event.time_s), ...this.requests.map((r) => r.from));
    const last = shown.at(-1)?.time_s ?? 0;
    return [first, Math.max(last, first + 1e-6)];
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.requests.length) return;
    const [first, last] = this.range();
    const at = this.selected;
    if (event.key === "ArrowRight") this.select(at === null ? 0 : at + 1);
    else if (event.key === "ArrowLeft") this.select(at === null ? this.requests.length - 1 : at - 1);
    else if (event.key === "+" || event.key === "=") this.show((last - first) / 2);
    else if (event.key === "-") this.show(this.span === null ? null : this.span * 2);
    else if (event.key === "Home") this.show(null);
    else if (event.key === "Escape") this.select(null);
    else return;
    event.preventDefault();
  }

  select(at) {
    this.selected = at === null ? null : Math.min(Math.max(at, 0), this.requests.length - 1);
    this.draw();
  }

  click(event) {
    const near = this.requests.findIndex(({ box }) => box
      && event.offsetX >= box[0] - 2 && event.offsetX <= box[0] + box[2] + 2
      && event.offsetY >= box[1] - 1 && event.offsetY <= box[1] + box[3] + 1);
    this.select(near < 0 ? null : near);
  }

  draw() {
    const { none, key, read } = this.parts;
    const shown = this.events.length > 0;
    none.hidden = shown;
    this.canvas.hidden = !shown;
    key.hidden = !shown;
    read.textContent = "";
    if (!shown) return;
    const [first, last] = this.range();
    const queues = new Map();
    for (const request of this.requests) {
      if (!queues.has(request.queue)) queues.set(request.queue, []);
      queues.get(request.queue).push(request);
    }
    const lanes = new Map();
    let top = 44;
    for (const number of [...queues.keys()].sort((a, b) => a - b)) {
      const used = place(queues.get(number));
      lanes.set(number, [top, used]);
      top += 16 + used * (BAR + 1) + 8;
    }
    const height = top + 18;
    this.canvas.style.setProperty("height", `${height}px`);
    const prepared = prepare(this.canvas, height);
    if (!prepared) return;
    const { context, width } = prepared;
    const palette = colors();
    const { named } = palette;
    const x = (time) => LEFT + ((time - first) / (last - first)) * (width - LEFT - 8);
    this.scale(context, width, height, named, first, last);
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillStyle = named("quiet");
    context.fillText("translations", 0, 22);
    // What concerns translations is one lane, as it belongs to no queue.
    const marked = { miss: "other", update: "both", invalidate: "mixed", refused: "bad", evicted: "warn", dma_map: "both", dma_unmap: "mixed", domain_map: "both", domain_unmap: "mixed", fault: "bad" };
    let marks = 0;
    for (const event of this.events) {
      if (event.time_s < first || !(event.what in marked)) continue;
      const row = { miss: 12, update: 22, dma_map: 22, domain_map: 22 }[event.what] ?? 33;
      context.fillStyle = named(marked[event.what]);
      if (event.what === "update" && event.took_s) {
        context.globalAlpha = 0.35;
        context.fillRect(x(event.time_s - event.took_s), row - 2, Math.max(x(event.time_s) - x(event.time_s - event.took_s), 1), 4);
        context.globalAlpha = 1;
      }
      context.textAlign = "center";
      context.fillText(MARKS[event.what], x(event.time_s), row);
      marks += 1;
    }
    for (const [number, [lane, used]] of lanes) {
      context.textAlign = "left";
      context.fillStyle = named("quiet");
      context.fillText(`queue ${number}`, 0, lane + 8);
      context.fillText("interrupts", 0, lane + 16 + used * (BAR + 1) + 1);
      context.fillStyle = named("void");
      context.fillRect(LEFT, lane + 4, width - LEFT - 8, used * (BAR + 1) + 3);
      for (const request of queues.get(number)) {
        const [from, to] = [x(request.from), x(request.to)];
        request.box = [from, lane + 5 + Math.min(request.lane, LANES - 1) * (BAR + 1), Math.max(to - from, 1.5), BAR];
        context.fillStyle = named(request.failed ? "bad" : COLORS[request.operation]);
        // Waiting in the ring is lighter than being served.
        if (request.taken) {
          context.globalAlpha = 0.4;
          context.fillRect(from, request.box[1], Math.max(x(request.taken) - from, 0), BAR);
          context.globalAlpha = 1;
          context.fillRect(x(request.taken), request.box[1], Math.max(to - x(request.taken), 1.5), BAR);
        } else context.fillRect(...request.box);
      }
      context.strokeStyle = named("ink");
      context.lineWidth = 1;
      for (const event of this.events) {
        if (event.what !== "interrupt" || event.queue !== number || event.time_s < first) continue;
        const at = Math.round(x(event.time_s)) + 0.5;
        context.beginPath();
        context.moveTo(at, lane + 9 + used * (BAR + 1));
        context.lineTo(at, lane + 19 + used * (BAR + 1));
        context.stroke();
      }
    }
    if (this.selected !== null && this.requests[this.selected]?.box) {
      const request = this.requests[this.selected];
      const [bx, by, bw, bh] = request.box;
      context.strokeStyle = named("focus");
      context.lineWidth = 2;
      context.strokeRect(bx - 2, by - 2, bw + 4, bh + 4);
      read.textContent = text(request);
    } else {
      read.textContent = `${count(this.requests.length)} requests in ${seconds(last - first)}; arrows select one.`;
    }
    this.canvas.setAttribute("aria-label",
      `Time line: ${this.requests.length} requests of ${queues.size} queues in ${seconds(last - first)}`);
    Object.assign(this.canvas.dataset, { requests: this.requests.length, marks });
    fillKey(key, [
      ...[1, 2, 3, 0].map((kind) => [named(COLORS[kind]), OPERATIONS[kind]]),
      [named("bad"), "failed"],
    ]);
    key.append(...["\u25BC miss", "\u25B2 update or map", "\u2715 invalidate or unmap", "| interrupt"].map(
      (words) => element("span", { textContent: words })));
  }

  scale(context, width, height, named, first, last) {
    const span = last - first;
    const rough = span / Math.max(Math.floor((width - LEFT) / 110), 1);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    context.fillStyle = named("quiet");
    context.strokeStyle = named("grid");
    context.textBaseline = "alphabetic";
    context.textAlign = "center";
    for (let at = 0; at <= span; at += step) {
      const px = Math.round(LEFT + (at / span) * (width - LEFT - 8)) + 0.5;
      context.beginPath();
      context.moveTo(px, 4);
      context.lineTo(px, height - 16);
      context.stroke();
      if (px < width - 24) context.fillText(`+${seconds(at)}`, px, height - 4);
    }
  }
}

// Requests made of their events; those that are not over, or whose beginning is not known, too.
function join(list) {
  const open = new Map();
  const done = [];
  for (const event of list) {
    if (event.head === undefined) continue;
    const name = `${event.queue}:${event.head}`;
    if (event.what === "taken") {
      open.set(name, {
        queue: event.queue, head: event.head, taken: event.time_s, from: event.time_s - (event.took_s ?? 0),
        to: event.time_s, readable: event.length ?? 0, writable: event.detail ?? 0, address: event.address ?? 0,
        operation: 0, failed: false, over: false,
      });
      done.push(open.get(name));
      continue;
    }
    const request = open.get(name);
    if (event.what === "served" && request) {
      request.served = event.time_s;
      request.to = event.time_s;
    } else if (event.what === "failed" && request) request.failed = true;
    else if (event.what === "completed") {
      const from = event.time_s - (event.took_s ?? 0);
      const ended = request ?? { queue: event.queue, head: event.head, from, failed: false };
      ended.to = event.time_s;
      ended.over = true;
      ended.written = event.length ?? 0;
      ended.operation = { r: 1, w: 2, rw: 3 }[event.access] ?? 0;
      if (!request) done.push(ended);
      open.delete(name);
    }
  }
  return done.sort((a, b) => a.from - b.from);
}

// Gives each request a lane in which no other one is at that time; how many there are.
function place(requests) {
  const ends = [];
  for (const request of requests) {
    let lane = ends.findIndex((end) => end <= request.from);
    if (lane < 0) lane = Math.min(ends.length, LANES - 1);
    request.lane = lane;
    ends[lane] = Math.max(ends[lane] ?? 0, request.to);
  }
  return Math.max(ends.length, 1);
}

function text(request) {
  const parts = [`queue ${request.queue}, head ${request.head}: ${OPERATIONS[request.operation]}`];
  if (request.readable !== undefined) {
    parts.push(`gave ${bytes(request.readable)} to read and ${bytes(request.writable)} to write, from ${hex(request.address)} on`);
  }
  if (request.taken) parts.push(`waited ${seconds(request.taken - request.from)}`);
  if (request.taken && request.served) parts.push(`served in ${seconds(request.served - request.taken)}`);
  if (request.over) parts.push(`given back after ${seconds(request.to - request.from)}`);
  else parts.push("not given back yet");
  if (request.failed) parts.push("failed");
  return `${parts.join("; ")}.`;
}
