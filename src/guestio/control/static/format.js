// Numbers as people read them. What comes from a server is only ever set as text, never as HTML.

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (n) => grouped.format(n);

export function short(n) {
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (n >= size) return `${(n / size).toFixed(n / size < 10 ? 1 : 0)}${unit}`;
  }
  return n >= 10 || Number.isInteger(n) ? n.toFixed(0) : n.toFixed(1);
}

export function seconds(s) {
  if (s >= 60) return `${count(s)} s`;
  for (const [unit, size] of [["s", 1], ["ms", 1e-3], ["\u00b5s", 1e-6]]) {
    if (s >= size) return `${(s / size).toPrecision(s / size >= 100 ? 3 : 2)} ${unit}`;
  }
  return s > 0 ? `${(s * 1e9).toFixed(0)} ns` : "0 s";
}

export function duration(s) {
  if (s < 60) return `${s.toFixed(0)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

// A number of bytes, which may be a BigInt.
export function bytes(n) {
  let unit = 0;
  let value = Number(n);
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${Number.isInteger(value) || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${UNITS[unit]}`;
}

export const hex = (n) => `0x${n.toString(16)}`;

// JSON whose integers may have 64 bits: those that a double cannot hold become BigInts.
export function parse(text) {
  return JSON.parse(text, (_, value, context) =>
    typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) && context?.source
      ? BigInt(context.source)
      : value);
}

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria-") || key === "role" || key === "for") made.setAttribute(key, value);
    else if (key === "data") Object.assign(made.dataset, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

// Fills a table, keeping rows and cells that are there already, so that a selection stays.
export function fill(table, columns, rows) {
  const head = table.tHead;
  if (head.rows.length === 0 && columns.length) {
    const row = head.insertRow();
    for (const { name, number } of columns) {
      row.append(element("th", { scope: "col", textContent: name, className: number ? "num" : "" }));
    }
  }
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, i) => {
    const row = body.rows[i] ?? body.insertRow();
    cells.forEach((cell, at) => {
      const { text, className = "" } = typeof cell === "object" ? cell : { text: cell };
      const place = row.cells[at] ?? row.insertCell();
      const wanted = `${columns[at]?.number ? "num " : ""}${className}`.trim();
      if (place.textContent !== String(text)) place.textContent = text;
      if (place.className !== wanted) place.className = wanted;
    });
  });
}

// A key to colors: [[color or colors, text]...].
export function fillKey(place, items) {
  place.replaceChildren(...items.map(([colors, text]) => {
    const list = Array.isArray(colors) ? colors : [colors];
    const swatches = list.map((color) => {
      const swatch = element("i", { ariaHidden: "true" });
      swatch.style.setProperty("background", color);
      return swatch;
    });
    const group = list.length > 1 ? element("span", { className: "steps" }, ...swatches) : swatches[0];
    return element("span", {}, group, text);
  }));
}
