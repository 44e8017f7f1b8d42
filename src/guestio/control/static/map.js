// A map of addresses: cells of equal size, zoomed from 2^64 bytes to a page.

import { bytes, count, duration, element, fillKey, hex, seconds } from "./format.js";
import { get } from "./link.js";
import { colors, heatColor, prepare } from "./plot.js";

const CELL_BITS = 10; // 1024 cells
const CELLS = 1 << CELL_BITS;
const LEAST_BITS = 12; // a page
const ZOOM_BITS = 4;
const LABELS = 138;
const REFRESH = 2000;

const LAYERS = {
  addresses: [
    ["access", "Permission"], ["density", "Mapped"], ["target", "Target"],
    ["age", "Age"], ["hits", "Hits"],
  ],
  memory: [["dirty", "Dirty"], ["density", "Present"]],
};

const ACCESS = { r: "read", w: "write", rw: "both" };

export class AddressMap {
  constructor(place, explain) {
    this.of = place.dataset.of;
    this.explain = explain;
    this.start = 0n;
    this.bits = 64;
    this.layer = LAYERS[this.of][0][0];
    this.found = null;
    this.before = null; // dirty pages by cell, of the look before
    this.hot = new Set();
    this.selected = null;
    this.visible = false;
    this.fitted = false;
    this.asking = 0;
    this.refreshed = 0;
    this.build(place);
    new IntersectionObserver(([entry]) => {
      this.visible = entry.isIntersecting;
      if (this.visible) this.refresh();
    }, { rootMargin: "200px" }).observe(place);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  build(place) {
    const name = this.of === "memory" ? "Guest memory" : "I/O address space";
    const button = (text, label, act) => {
      const made = element("button", { type: "button", textContent: text, title: label });
      made.setAttribute("aria-label", label);
      made.addEventListener("click", act);
      return made;
    };
    this.path = element("ol", { className: "path" });
    this.path.setAttribute("aria-label", "Zoom");
    this.goto = element("input", {
      size: 18, placeholder: "0xfffff000", spellcheck: false, autocomplete: "off",
    });
    this.goto.setAttribute("aria-label", `Go to an address of ${name}`);
    const form = element("form", { className: "bar push" }, this.goto, element("button", { textContent: "Go" }));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.goTo(this.goto.value.trim());
    });
    const layers = LAYERS[this.of].map(([layer, text]) => {
      const made = button(text, `Color by ${text.toLowerCase()}`, () => this.show(layer));
      made.dataset.layer = layer;
      return made;
    });
    this.layers = element("span", { className: "bar", role: "group" }, ...layers);
    this.layers.setAttribute("aria-label", "Color");
    this.canvas = element("canvas", { tabIndex: 0, role: "application" });
    this.canvas.setAttribute("aria-label", name);
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("click", (event) => {
      const index = this.indexAt(event);
      if (index !== null) this.select(index);
    });
    this.canvas.addEventListener("dblclick", (event) => {
      const index = this.indexAt(event);
      if (index !== null) this.zoomTo(index);
    });
    this.legend = element("p", { className: "key" });
    this.note = element("p", { className: "empty" });
    this.read = element("output", { className: "read" });
    this.read.setAttribute("aria-live", "polite");
    place.append(
      element("div", { className: "bar" }, this.layers,
        button("Fit", "Zoom to all that is mapped", () => this.fit()),
        button("+", "Zoom in", () => this.zoomTo(this.selected)),
        button("\u2212", "Zoom out", () => this.zoomOut()),
        button("\u25C0", "The window before", () => this.move(-1n)),
        button("\u25B6", "The window after", () => this.move(1n)),
        form),
      this.path, this.canvas, this.note, this.legend, this.read);
    this.mark();
  }

  get cell() {
    return 1n << BigInt(this.bits - CELL_BITS);
  }

  get columns() {
    return this.canvas.clientWidth < 600 ? 32 : 64;
  }

  show(layer) {
    this.layer = layer;
    this.mark();
    this.refresh();
  }

  mark() {
    for (const each of this.layers.children) {
      each.setAttribute("aria-pressed", each.dataset.layer === this.layer);
    }
  }

  // Another server, or another moment: nothing of before holds.
  forget() {
    this.found = this.before = this.selected = null;
    this.hot.clear();
    this.fitted = false;
    this.refresh();
  }

  view(start, bits) {
    this.bits = Math.min(Math.max(bits, LEAST_BITS), 64);
    this.start = (start >> BigInt(this.bits)) << BigInt(this.bits);
    this.before = this.selected = null;
    this.hot.clear();
    return this.refresh();
  }

  fit() {
    if (!this.found?.extent) return this.view(0n, 64);
    const [low, high] = this.found.extent.map(BigInt);
    let bits = LEAST_BITS;
    while (low >> BigInt(bits) !== high >> BigInt(bits)) bits += 1;
    return this.view(low, bits);
  }

  zoomTo(index) {
    const at = index ?? this.found?.cells.index[0] ?? 0;
    return this.view(this.start + BigInt(at) * this.cell, this.bits - ZOOM_BITS);
  }

  zoomOut() {
    return this.view(this.start, this.bits + ZOOM_BITS);
  }

  move(windows) {
    const next = this.start + (windows << BigInt(this.bits));
    if (next >= 0n && next < 1n << 64n) this.view(next, this.bits);
  }

  goTo(text) {
    let address;
    try {
      address = BigInt(text);
    } catch {
      address = -1n;
    }
    if (text === "" || address < 0n || address >= 1n << 64n) {
      this.read.textContent = "An address is a number below 2^64, such as 4096 or 0x1000.";
      return;
    }
    this.view(address, Math.min(this.bits, 22)).then(() => {
      this.select(Number((address - this.start) / this.cell));
      this.canvas.focus();
    });
  }

  indexAt(event) {
    const { offsetX, offsetY } = event;
    const [column, row] = [
      Math.floor((offsetX - this.left) / this.size[0]), Math.floor(offsetY / this.size[1]),
    ];
    if (column < 0 || column >= this.columns || row < 0 || row >= CELLS / this.columns) return null;
    return row * this.columns + column;
  }

  select(index) {
    this.selected = Math.min(Math.max(index, 0), CELLS - 1);
    this.draw();
  }

  key(event) {
    const at = this.selected ?? 0;
    const first = this.selected === null;
    const steps = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns,
    };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in steps) {
      const next = first ? at : at + steps[event.key];
      if (next >= 0 && next < CELLS) this.select(next);
    } else if (event.key === "Enter" || event.key === "+" || event.key === "=") this.zoomTo(this.selected);
    else if (event.key === "-" || event.key === "Backspace") this.zoomOut();
    else if (event.key === "Home") this.fit();
    else if (event.key === "PageDown") this.move(1n);
    else if (event.key === "PageUp") this.move(-1n);
    else if (event.key === "e") this.explainSelected();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  explainSelected() {
    if (this.selected === null) return;
    const length = this.cell < 1n << 20n ? this.cell : 1n << 20n;
    this.explain(this.start + BigInt(this.selected) * this.cell, length);
  }

  // Called each second; asks again if it is seen and its last answer is old.
  tick() {
    if (this.visible && performance.now() - this.refreshed > REFRESH) this.refresh();
  }

  async refresh() {
    const turn = ++this.asking;
    this.refreshed = performance.now();
    const more = { age: "&age", hits: "&hits" }[this.layer] ?? "";
    const window = `address=${this.start}&length=${1n << BigInt(this.bits)}&parts=${CELLS}`;
    let found;
    const asked = performance.now();
    try {
      found = await get(`/map?${window}&of=${this.of}${more}`);
    } catch {
      return; // the status says that the server is gone
    }
    if (turn !== this.asking) return;
    this.canvas.dataset.answerMs = (performance.now() - asked).toFixed(1);
    this.found = found;
    if (!this.fitted && found.extent) {
      this.fitted = true;
      await this.fit();
      return;
    }
    this.warm(found);
    this.draw();
  }

  // Which cells were written since the look before.
  warm(found) {
    if (!found.dirty_pages) return;
    const now = new Map(found.cells.index.map((index, i) => [index, found.dirty_pages[i]]));
    this.hot.clear();
    if (this.before) {
      for (const [index, pages] of now) if (pages > (this.before.get(index) ?? 0)) this.hot.add(index);
    }
    this.before = now;
  }

  share(i) {
    const { mapped_bytes: mapped, unseen_bytes: unseen } = this.found.cells;
    return Number(mapped[i]) / Math.max(Number(this.cell) - Number(unseen[i]), 1);
  }

  // The fill of each cell, and what the colors mean.
  painter(palette) {
    const { cells } = this.found;
    const { named, heat } = palette;
    const steps = [0.15, 0.36, 0.58, 0.79, 1].map((share) => heatColor(heat, share));
    const scale = (text) => [[steps, text]];
    const ramp = (share) => heatColor(heat, 0.15 + 0.85 * share);
    if (this.layer === "access") {
      return [
        (i) => named(ACCESS[cells.access[i]] ?? "mixed"),
        [[named("read"), "read"], [named("write"), "write"], [named("both"), "read and write"],
          [named("mixed"), "several of them"]],
      ];
    }
    if (this.layer === "target") {
      const tops = cells.target.map((target) => Number(target));
      const [low, high] = [Math.min(...tops), Math.max(...tops)];
      return [
        (i) => ramp(high > low ? (tops[i] - low) / (high - low) : 1),
        scale(`target from ${hexOf(cells.target, low)} to ${hexOf(cells.target, high)}`),
      ];
    }
    if (this.layer === "age") {
      const ages = this.found.age_s ?? [];
      const oldest = Math.max(...ages.filter((age) => age !== null), 1e-3);
      return [
        (i) => (ages[i] === null || ages[i] === undefined ? named("edge") : ramp(1 - ages[i] / oldest)),
        [...scale(`mapped ${seconds(oldest)} ago to just now`),
          [named("edge"), `before that, or not recorded (recorded for ${duration(this.found.recorded_s)})`]],
      ];
    }
    if (this.layer === "hits") {
      const hits = this.found.hits ?? [];
      const most = Math.max(...hits, 1);
      return [
        (i) => (hits[i] ? ramp(Math.sqrt(hits[i] / most)) : named("edge")),
        [...scale(`1 to ${count(most)} buffers of requests in ${seconds(this.found.hits_s)}`),
          [named("edge"), "none"]],
      ];
    }
    if (this.layer === "dirty") {
      const dirty = this.found.dirty_pages;
      const pages = Math.max(Number(this.cell) / 4096, 1);
      return [
        (i) => (dirty?.[i] ? ramp(dirty[i] / pages) : named("edge")),
        [...scale(pages > 1 ? `1 to ${count(pages)} pages of a cell written` : "page written"), [named("edge"), "not written"],
          [named("hot"), "written since the last look (outlined)"]],
      ];
    }
    return [(i) => ramp(this.share(i)), scale("share of a cell that is there, up to all of it")];
  }

  draw() {
    const columns = this.columns;
    const rows = CELLS / columns;
    const height = rows * (columns === 64 ? 17 : 11);
    this.canvas.style.setProperty("height", `${height}px`);
    const begun = performance.now();
    const place = prepare(this.canvas, height);
    if (!place) return;
    const { context, width } = place;
    const palette = colors();
    this.left = columns === 64 ? LABELS : 0;
    this.size = [(width - this.left) / columns, height / rows];
    const [wide, high] = this.size;
    const gap = wide > 6 ? 1 : 0.5;
    const box = (index) => [
      this.left + (index % columns) * wide, Math.floor(index / columns) * high,
      wide - gap, high - gap,
    ];
    context.fillStyle = palette.named("void");
    for (let index = 0; index < CELLS; index += 1) context.fillRect(...box(index));
    let drawn = 0;
    let legend = [];
    const known = this.found && BigInt(this.found.address) === this.start
      && BigInt(this.found.length_bytes) === 1n << BigInt(this.bits);
    if (known) {
      const [color, key] = this.painter(palette);
      legend = key;
      this.found.cells.index.forEach((index, i) => {
        context.fillStyle = color(i);
        context.fillRect(...box(index));
        drawn += 1;
      });
      context.strokeStyle = palette.named("hot");
      context.lineWidth = 2;
      for (const index of this.hot) {
        const [x, y, w, h] = box(index);
        context.strokeRect(x + 1, y + 1, w - 2, h - 2);
      }
    }
    if (this.left) {
      context.font = "11px ui-monospace, 'DejaVu Sans Mono', monospace";
      context.fillStyle = palette.named("quiet");
      context.textAlign = "right";
      context.textBaseline = "middle";
      for (let row = 0; row < rows; row += 1) {
        const address = this.start + BigInt(row * columns) * this.cell;
        context.fillText(hex(address), this.left - 8, (row + 0.5) * high);
      }
    }
    if (this.selected !== null) {
      const [x, y, w, h] = box(this.selected);
      context.strokeStyle = palette.named("card");
      context.lineWidth = 4;
      context.strokeRect(x, y, w, h);
      context.strokeStyle = palette.named("focus");
      context.lineWidth = 2;
      context.strokeRect(x, y, w, h);
    }
    Object.assign(this.canvas.dataset, {
      cells: drawn,
      entries: known ? this.found.entries : 0,
      drawMs: (performance.now() - begun).toFixed(2),
      draws: Number(this.canvas.dataset.draws ?? 0) + 1,
      bits: this.bits,
      start: hex(this.start),
    });
    fillKey(this.legend, legend);
    this.describe(known);
  }

  describe(known) {
    const steps = [];
    for (let bits = 64; bits > this.bits; bits -= ZOOM_BITS) steps.push(bits);
    // All of it, and the nearest ones.
    steps.splice(1, Math.max(steps.length - 4, 0));
    this.path.replaceChildren(...steps.map((bits) => {
      const made = element("button", { type: "button", textContent: bytes(1n << BigInt(bits)) });
      made.setAttribute("aria-label", `Zoom out to ${bytes(1n << BigInt(bits))}`);
      made.addEventListener("click", () => this.view(this.start, bits));
      return element("li", {}, made);
    }), element("li", { ariaCurrent: "true", textContent:
      `${bytes(1n << BigInt(this.bits))} from ${hex(this.start)}, ${bytes(this.cell)} a cell` }));
    this.note.textContent = known ? this.noteText() : "";
    const text = known ? this.cellText() : "";
    if (this.read.dataset.said !== text) {
      this.read.dataset.said = text;
      this.read.replaceChildren(text);
      if (this.selected !== null && known) {
        const button = element("button", { type: "button", textContent: "Explain" });
        button.addEventListener("click", () => this.explainSelected());
        this.read.append(" ", button);
      }
    }
  }

  noteText() {
    const { found } = this;
    const one = found.entries === 1;
    const what = this.of === "memory" ? `piece${one ? "" : "s"} of memory` : `mapping${one ? "" : "s"}`;
    const all = `${count(found.entries)} ${what} in all`;
    const unseen = found.cells.unseen_bytes.some((n) => n > 0);
    const parts = [all];
    if (!found.entries) return this.of === "memory" ? "No memory is shared." : "Nothing is mapped.";
    if (this.of === "addresses" && !found.translated) parts.push("addresses are physical, as no IOMMU is in front");
    if (this.of === "memory" && !found.dirty_pages) parts.push("written pages are not counted: start the server with --track-dirty");
    if (!found.cells.index.length) parts.push("none of them in this window");
    if (unseen) parts.push("of crowded cells the first 64 mappings are looked at: zoom in for all");
    return `${parts.join("; ")}.`;
  }

  cellText() {
    if (this.selected === null) return "";
    const { found } = this;
    const first = this.start + BigInt(this.selected) * this.cell;
    const where = `${hex(first)} to ${hex(first + this.cell - 1n)}`;
    const i = found.cells.index.indexOf(this.selected);
    if (i < 0) return `${where}: nothing is mapped.`;
    const { cells } = found;
    const parts = [
      cells.unseen_bytes[i] > 0 ? `more than ${cells.entries[i]} mappings` : `${cells.entries[i]} mapping${cells.entries[i] === 1 ? "" : "s"}`,
      `${(100 * this.share(i)).toFixed(this.share(i) < 0.1 ? 2 : 0)} % mapped`,
      `access ${cells.access[i].replaceAll("+", " and ")}`,
      `${hex(cells.address[i])} leads to ${hex(cells.target[i])}`,
    ];
    if (found.age_s) parts.push(found.age_s[i] === null ? "no mapping was recorded" : `mapped ${seconds(found.age_s[i])} ago`);
    if (found.hits) parts.push(`${count(found.hits[i])} hits`);
    if (found.dirty_pages) parts.push(`${count(found.dirty_pages[i])} pages written`);
    return `${where}: ${parts.join(", ")}.`;
  }
}

// The exact number among some that a rounded one stands for.
function hexOf(exact, rounded) {
  return hex(exact.find((n) => Number(n) === rounded) ?? rounded);
}
