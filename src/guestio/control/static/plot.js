// Charts over time, drawn on a canvas: lines, and a heat map of latencies.

import { seconds, short } from "./format.js";

export const LENGTH = 240; // samples that are kept, one a second
const SPANS = [60, 120, LENGTH]; // how many of them are shown: as few as do

const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;

export function colors() {
  const style = getComputedStyle(document.documentElement);
  const named = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    named,
    heat: [0, 1, 2, 3, 4, 5].map((i) => rgb(named(`heat-${i}`))),
  };
}

const rgb = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));

// A color of the heat scale; share is from 0 to 1.
export function heatColor(heat, share) {
  const at = Math.min(Math.max(share, 0), 1) * (heat.length - 1);
  const low = Math.min(Math.floor(at), heat.length - 2);
  const part = at - low;
  const mixed = heat[low].map((c, i) => Math.round(c + (heat[low + 1][i] - c) * part));
  return `rgb(${mixed.join(",")})`;
}

// Fits a canvas to its place and the screen's pixels; null while it has no size.
export function prepare(canvas, height = canvas.clientHeight) {
  const width = canvas.clientWidth;
  if (!width || !height) return null;
  const scale = window.devicePixelRatio || 1;
  const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== wide || canvas.height !== high) {
    canvas.width = wide;
    canvas.height = high;
  }
  const context = canvas.getContext("2d", { alpha: true });
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  return { context, width, height };
}

// A round number that is not smaller, for the top of a scale.
function roundUp(n) {
  const power = 10 ** Math.floor(Math.log10(n));
  return [1, 2, 5, 10].find((step) => step * power >= n * 0.999) * power;
}

class Plot {
  constructor(canvas, readout) {
    this.canvas = canvas;
    this.readout = readout;
    this.samples = [];
    this.at = null; // the sample that is read; null for the latest
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.select(null));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  add(sample) {
    this.samples.push(sample);
    if (this.samples.length > LENGTH) {
      this.samples.shift();
      if (this.at !== null) this.at = Math.max(this.at - 1, 0);
    }
    this.draw();
  }

  clear() {
    this.samples = [];
    this.at = null;
    this.draw();
  }

  select(at) {
    this.at = at;
    this.draw();
  }

  key(event) {
    const last = this.samples.length - 1;
    const at = this.at ?? last;
    if (event.key === "ArrowLeft") this.select(Math.max(at - 1, 0));
    else if (event.key === "ArrowRight") this.select(at + 1 >= last ? null : at + 1);
    else if (event.key === "Home") this.select(0);
    else if (event.key === "End" || event.key === "Escape") this.select(null);
    else return;
    event.preventDefault();
  }

  point(event) {
    const { width } = this.canvas.getBoundingClientRect();
    const slot = Math.floor((event.offsetX - LEFT) / ((width - LEFT - RIGHT) / this.shown));
    const at = slot - (this.shown - this.samples.length);
    this.select(at >= 0 && at < this.samples.length ? at : null);
  }

  get shown() {
    return SPANS.find((span) => span >= this.samples.length) ?? LENGTH;
  }

  // Where sample i is.
  x(i, width) {
    const step = (width - LEFT - RIGHT) / this.shown;
    return LEFT + (this.shown - this.samples.length + i) * step;
  }

  axes(context, width, height, palette, marks) {
    context.strokeStyle = palette.named("grid");
    context.fillStyle = palette.named("quiet");
    context.lineWidth = 1;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const [y, text] of marks) {
      context.beginPath();
      context.moveTo(LEFT, Math.round(y) + 0.5);
      context.lineTo(width - RIGHT, Math.round(y) + 0.5);
      context.stroke();
      context.fillText(text, LEFT - 6, y);
    }
    context.textBaseline = "alphabetic";
    const step = (width - LEFT - RIGHT) / this.shown;
    for (const part of width < 500 ? [0, 2, 4] : [0, 1, 2, 3, 4]) {
      const ago = (part * this.shown) / 4;
      context.textAlign = part === 0 ? "right" : part === 4 ? "left" : "center";
      context.fillText(ago ? `\u2212${ago} s` : "now", width - RIGHT - ago * step, height - 5);
    }
  }

  cursor(context, width, height, palette) {
    if (this.at === null) return;
    const x = Math.round(this.x(this.at + 0.5, width)) + 0.5;
    context.strokeStyle = palette.named("focus");
    context.beginPath();
    context.moveTo(x, TOP);
    context.lineTo(x, height - BOTTOM);
    context.stroke();
  }

  draw() {
    const place = prepare(this.canvas);
    if (place) this.paint(place.context, place.width, place.height, colors());
    const sample = this.samples[this.at ?? this.samples.length - 1];
    const said = sample ? this.say(sample) : "";
    const ago = this.at === null ? 0 : this.samples.length - 1 - this.at;
    this.readout.textContent = said + (ago ? `, ${ago} s ago` : "");
  }
}

// Samples are {name: value}; series are {name: [color, label]}.
export class Lines extends Plot {
  constructor(canvas, readout, series, unit) {
    super(canvas, readout);
    this.series = series;
    this.unit = unit;
  }

  used() {
    const used = Object.keys(this.series).filter((name) => this.samples.some((s) => s[name] > 0));
    return used.length ? used : Object.keys(this.series).slice(0, 1);
  }

  say(sample) {
    return this.used()
      .map((name) => `${this.series[name][1]} ${short(sample[name] ?? 0)}`).join(", ") + this.unit;
  }

  paint(context, width, height, palette) {
    const used = this.used();
    const most = Math.max(1, ...this.samples.map((s) => Math.max(...used.map((n) => s[n] ?? 0))));
    const top = roundUp(most);
    const y = (value) => height - BOTTOM - (value / top) * (height - BOTTOM - TOP);
    this.axes(context, width, height, palette, [0, 0.5, 1].map((s) => [y(top * s), short(top * s)]));
    used.forEach((name, kind) => {
      context.strokeStyle = palette.named(this.series[name][0]);
      context.lineWidth = 1.8;
      // Told apart without their color, too.
      context.setLineDash([[], [6, 3], [2, 2]][kind % 3]);
      context.beginPath();
      this.samples.forEach((sample, i) => {
        const [px, py] = [this.x(i + 0.5, width), y(sample[name] ?? 0)];
        if (i) context.lineTo(px, py);
        else context.moveTo(px, py);
      });
      context.stroke();
    });
    context.setLineDash([]);
    this.cursor(context, width, height, palette);
  }
}

// Samples are {buckets: Map of the upper end in seconds to a count, p50, p99}.
export class Heat extends Plot {
  say(sample) {
    if (!sample.p99) return "no request";
    return `half within ${seconds(sample.p50)}, 99 % within ${seconds(sample.p99)}`;
  }

  paint(context, width, height, palette) {
    const ends = this.samples.flatMap((sample) => [...sample.buckets.keys()]);
    // An octave to a row.
    const low = ends.length ? Math.log2(Math.min(...ends)) - 1 : Math.log2(1e-6);
    const high = Math.max(ends.length ? Math.log2(Math.max(...ends)) : Math.log2(1e-3), low + 4);
    const row = (height - TOP - BOTTOM) / (high - low);
    const y = (log) => height - BOTTOM - (log - low) * row;
    const step = (width - LEFT - RIGHT) / this.shown;
    const marks = [];
    for (let power = -8; power <= 2; power += 1) {
      const log = Math.log2(10 ** power);
      if (log >= low && log <= high) marks.push([y(log), seconds(10 ** power).replace(".0", "")]);
    }
    let cells = 0;
    this.samples.forEach((sample, i) => {
      const total = [...sample.buckets.values()].reduce((sum, n) => sum + n, 0);
      const left = this.x(i, width);
      for (const [end, n] of sample.buckets) {
        context.fillStyle = heatColor(palette.heat, 0.15 + 0.85 * Math.sqrt(n / total));
        context.fillRect(left, y(Math.log2(end)), step + 0.5, row + 0.5);
        cells += 1;
      }
    });
    this.axes(context, width, height, palette, marks);
    for (const [name, dash] of [["p50", []], ["p99", [4, 3]]]) {
      context.strokeStyle = palette.named(name === "p50" ? "ink" : "hot");
      context.lineWidth = 1.5;
      context.setLineDash(dash);
      context.beginPath();
      let begun = false;
      this.samples.forEach((sample, i) => {
        if (!sample[name]) {
          begun = false;
          return;
        }
        const [px, py] = [this.x(i + 0.5, width), y(Math.log2(sample[name]))];
        if (begun) context.lineTo(px, py);
        else context.moveTo(px, py);
        begun = true;
      });
      context.stroke();
    }
    context.setLineDash([]);
    this.cursor(context, width, height, palette);
    this.canvas.dataset.cells = cells;
  }
}

// The time that a share of the requests took at most: within an octave, by straight line.
export function quantile(buckets, share) {
  const total = [...buckets.values()].reduce((sum, n) => sum + n, 0);
  let seen = 0;
  for (const [end, n] of [...buckets].sort((a, b) => a[0] - b[0])) {
    if (seen + n >= share * total && n) return end / 2 + (end / 2) * ((share * total - seen) / n);
    seen += n;
  }
  return 0;
}
