// Draws buckets.html. State lives in the form and in `at`; everything else follows from them.
"use strict";

const get = (id) => document.getElementById(id);
const at = { row: 5, column: 8 };
const TRAINED_RATIO = 1.9;

function number(id) {
  const input = get(id), value = Number(input.value);
  const inside = Math.min(Number(input.max), Math.max(Number(input.min), value || 0));
  return id === "ratio" ? inside : Math.round(inside);
}

function state() {
  const height = number("height"), width = number("width");
  at.row = Math.min(Math.max(at.row, 0), height - 1);
  at.column = Math.min(Math.max(at.column, 0), width - 1);
  const clip = get("index").value === "clip";
  return { method: get("method").value, ratio: number("ratio"), clip, height, width };
}

// Neighbouring buckets get colours far apart, so that every border is seen.
function colour(place) {
  return `hsl(${(place * 222.5) % 360} 55% ${68 + (place % 3) * 8}%)`;
}

// Blue for what is taken off a logit, white for 0, red for what is added.
function heatColour(value, most) {
  const part = most ? Math.max(-1, Math.min(1, value / most)) : 0;
  const end = part < 0 ? [33, 102, 172] : [178, 24, 43];
  const mixed = end.map((c) => Math.round(247 + (c - 247) * Math.abs(part)));
  return `rgb(${mixed.join(" ")})`;
}

function cells(grid, height, width) {
  if (grid.dataset.size !== `${height}x${width}`) {
    grid.dataset.size = `${height}x${width}`;
    grid.style.gridTemplateColumns = `repeat(${width}, 1fr)`;
    grid.replaceChildren(...Array.from({ length: height * width }, (_, n) => {
      const cell = document.createElement("div");
      cell.className = "cell";
      cell.dataset.row = Math.floor(n / width);
      cell.dataset.column = n % width;
      return cell;
    }));
  }
  const query = at.row * width + at.column;
  [...grid.children].forEach((cell, n) => cell.classList.toggle("query", n === query));
  return [...grid.children];
}

function drawBuckets(map, { method, ratio, clip, height, width }) {
  const labels = map.map((ids) => ids.join(","));
  const used = [...new Set(labels)].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  cells(get("buckets"), height, width).forEach((cell, n) => {
    cell.textContent = width <= 20 ? labels[n] : "";
    cell.dataset.bucket = labels[n];
    cell.style.background = colour(used.indexOf(labels[n]));
  });
  const spec = `rpe-${Number.isInteger(ratio) ? ratio.toFixed(1) : ratio}-${method}-ctx-1-k`;
  get("said").textContent =
    `${spec}${clip ? ",index=clip" : ""}: query at row ${at.row}, column ${at.column} of ${height}x${width}; ` +
    `its keys fall into ${used.length} buckets, the table has ${tableSize(method, ratio)}.`;
}

function drawHeat(map, { method, ratio, clip, height, width }) {
  const there = method === "product" && ratio === TRAINED_RATIO && !clip;
  get("shown").hidden = !there;
  get("without").hidden = there;
  if (!there) return;
  const table = TRAINED.layers[get("layer").value][get("head").value];
  const most = Math.max(...TRAINED.layers.flat(2).map(Math.abs));
  cells(get("heat"), height, width).forEach((cell, n) => {
    const value = table[map[n][0]];
    cell.dataset.value = value;
    cell.title = value.toFixed(2);
    cell.style.background = heatColour(value, most);
  });
  get("low").textContent = (-most).toFixed(2);
  get("high").textContent = `+${most.toFixed(2)}`;
  get("heat").ariaLabel = `Learned bias of layer ${get("layer").value}, head ${get("head").value}`;
}

function draw() {
  const now = state();
  const map = bucketMap(now.method, now.ratio, now.height, now.width, at.row, at.column, now.clip);
  drawBuckets(map, now);
  drawHeat(map, now);
}

function point(event) {
  const under = document.elementFromPoint(event.clientX, event.clientY);
  const cell = (under || event.target).closest(".cell");
  if (!cell) return;
  Object.assign(at, { row: Number(cell.dataset.row), column: Number(cell.dataset.column) });
  draw();
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function move(event) {
  const step = STEPS[event.key];
  if (!step) return;
  event.preventDefault();
  at.row += step[0];
  at.column += step[1];
  draw();
}

for (const [id, many] of [["layer", TRAINED.layers.length], ["head", TRAINED.layers[0].length]]) {
  get(id).append(...Array.from({ length: many }, (_, n) => new Option(n, n)));
}
get("source").textContent =
  `Numbers that ${TRAINED.spec} learned, added to the logits: ${TRAINED.command}, averaged weights after ${TRAINED.epoch} epochs, ` +
  `${TRAINED.accuracy} % of held-out digits right (${TRAINED.hardware}). It was trained on ${TRAINED.grid.join("x")} patches: larger offsets never occurred, ` +
  `and numbers that only they use are still 0.`;
document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (e) => e.preventDefault()));
document.querySelectorAll("input, select").forEach((input) => input.addEventListener("input", draw));
for (const id of ["buckets", "heat"]) {
  for (const kind of ["pointerdown", "pointermove"]) get(id).addEventListener(kind, point);
}
get("buckets").addEventListener("keydown", move);
get("back").addEventListener("click", () => {
  Object.assign(get("method"), { value: "product" });
  Object.assign(get("ratio"), { value: TRAINED_RATIO });
  Object.assign(get("index"), { value: "piecewise" });
  draw();
});
draw();
