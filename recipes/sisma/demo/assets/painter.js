// The mask painter. The board holds class ids, not colours: a brush sets whole pixels, so edges are never blended.
const [rows, columns] = props.size, classes = props.brushes, storage = "ssmgen-mask-" + props.store;
const find = (what) => element.querySelector(what);
const canvas = find("canvas"), context = canvas.getContext("2d"), width = find("input"), widthLabel = find("output");
const image = context.createImageData(columns, rows);
let labels = new Uint8Array(rows * columns), brush = classes.length > 1 ? 1 : 0, tool = "brush";
let past = [], future = [], last = null;
canvas.width = columns;
canvas.height = rows;

function toText(ids) {
  const runs = [];
  for (let start = 0, i = 1; i <= ids.length; i++) {
    if (i === ids.length || ids[i] !== ids[start]) { runs.push(ids[start] + "x" + (i - start)); start = i; }
  }
  return rows + "x" + columns + " " + runs.join(",");
}

function fromText(text) {
  const [size, runs] = (text || "").split(" ");
  if (size !== rows + "x" + columns || !runs) return null;
  const ids = new Uint8Array(rows * columns);
  let at = 0;
  for (const run of runs.split(",")) {
    const [label, count] = run.split("x").map(Number);
    if (label >= classes.length) return null;
    ids.fill(label, at, at += count);
  }
  return at === ids.length ? ids : null;
}

function drawOn(target, ids, pixels) {
  for (let i = 0; i < ids.length; i++) {
    const colour = classes[ids[i]].colour;
    pixels.data.set([colour[0], colour[1], colour[2], 255], 4 * i);
  }
  target.putImageData(pixels, 0, 0);
}

function show() {
  drawOn(context, labels, image);
  const counts = new Array(classes.length).fill(0);
  labels.forEach((label) => counts[label]++);
  const used = counts.filter((count) => count > 0).length;
  find(".count").textContent = used + " of " + classes.length + " classes on the mask, " + columns + " x " + rows + " pixels";
  element.querySelectorAll(".brushes button").forEach((button, i) => {
    button.classList.toggle("chosen", i === brush);
    button.setAttribute("aria-pressed", i === brush);
    button.querySelector(".pixels").textContent = counts[i] || "";
  });
  element.querySelectorAll("[data-tool]").forEach((button) => {
    button.classList.toggle("chosen", button.dataset.tool === tool);
    button.setAttribute("aria-pressed", button.dataset.tool === tool);
  });
  find("[data-act=undo]").disabled = past.length === 0;
  find("[data-act=redo]").disabled = future.length === 0;
  widthLabel.textContent = width.value;
}

// Give the mask to gradio, and keep a copy for the next page load.
function publish() {
  const text = toText(labels);
  show();
  props.value = text;
  try { localStorage.setItem(storage, text); } catch (error) { /* storage is full or forbidden: the mask is not saved */ }
  trigger("change");
}

function remember() {
  past.push(labels.slice());
  if (past.length > 50) past.shift();
  future = [];
}

function replace(ids) {
  remember();
  labels = ids;
  publish();
}

function pixelAt(event) {
  const box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
  return [Math.floor(x * columns), Math.floor(y * rows)];
}

function stamp(x, y) {
  const diameter = Number(width.value), radius = diameter / 2, from = Math.floor((diameter - 1) / 2);
  for (let row = y - from; row < y - from + diameter; row++) {
    for (let column = x - from; column < x - from + diameter; column++) {
      const dx = column - (x - from) + 0.5 - radius, dy = row - (y - from) + 0.5 - radius;
      const inside = row >= 0 && row < rows && column >= 0 && column < columns;
      if (inside && dx * dx + dy * dy <= radius * radius) labels[row * columns + column] = brush;
    }
  }
}

function line([x0, y0], [x1, y1]) {
  const steps = Math.max(Math.abs(x1 - x0), Math.abs(y1 - y0), 1);
  for (let i = 0; i <= steps; i++) stamp(Math.round(x0 + (x1 - x0) * i / steps), Math.round(y0 + (y1 - y0) * i / steps));
}

function fill([x, y]) {
  const old = labels[y * columns + x], waiting = [y * columns + x];
  if (old === brush) return;
  while (waiting.length) {
    const at = waiting.pop();
    if (labels[at] !== old) continue;
    labels[at] = brush;
    if (at % columns > 0) waiting.push(at - 1);
    if (at % columns < columns - 1) waiting.push(at + 1);
    if (at >= columns) waiting.push(at - columns);
    if (at < columns * (rows - 1)) waiting.push(at + columns);
  }
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  const at = pixelAt(event);
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  if (tool === "pick") { brush = labels[at[1] * columns + at[0]]; tool = "brush"; return show(); }
  remember();
  if (tool === "fill") { fill(at); return publish(); }
  canvas.setPointerCapture(event.pointerId);
  line(at, at);
  last = at;
  drawOn(context, labels, image);
});
canvas.addEventListener("pointermove", (event) => {
  if (!last) return;
  for (const each of event.getCoalescedEvents?.() || [event]) {
    const at = pixelAt(each);
    line(last, at);
    last = at;
  }
  drawOn(context, labels, image);
});
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => { if (last) { last = null; publish(); } });
}
element.addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || !["z", "y"].includes(event.key)) return;
  event.preventDefault();
  act(event.key === "z" ? "undo" : "redo");
});

function act(name) {
  if (name === "clear") return replace(new Uint8Array(rows * columns));
  const [from, to] = name === "undo" ? [past, future] : [future, past];
  if (from.length === 0) return;
  to.push(labels.slice());
  labels = from.pop();
  publish();
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.tool) { tool = button.dataset.tool; show(); }
  if (button.dataset.act) act(button.dataset.act);
  if (button.dataset.brush) { brush = Number(button.dataset.brush); if (tool === "pick") tool = "brush"; show(); }
  if (button.dataset.example) replace(fromText(props.examples[Number(button.dataset.example)]));
});
width.max = Math.max(8, Math.round(Math.min(rows, columns) / 5));
width.value = Math.max(2, Math.round(Math.min(rows, columns) / 16));
width.addEventListener("input", show);

for (const each of classes) {
  const button = document.createElement("button"), swatch = document.createElement("span");
  const name = document.createElement("span"), pixels = document.createElement("span");
  button.type = "button";
  button.dataset.brush = each.id;
  button.title = each.id + " " + each.class;
  swatch.className = "swatch";
  swatch.style.background = "rgb(" + each.colour.join(",") + ")";
  name.className = "name";
  name.textContent = each.name;
  pixels.className = "pixels";
  button.append(swatch, name, pixels);
  find(".brushes").append(button);
}
props.examples.forEach((text, i) => {
  const button = document.createElement("button"), small = document.createElement("canvas");
  button.type = "button";
  button.dataset.example = i;
  button.title = "Start from example " + (i + 1);
  button.setAttribute("aria-label", button.title);
  small.width = columns;
  small.height = rows;
  drawOn(small.getContext("2d"), fromText(text), new ImageData(columns, rows));
  button.append(small);
  find(".examples").append(button);
});

watch("value", () => {
  const ids = fromText(props.value), current = toText(labels);
  if (!ids) props.value = current;
  else if (props.value !== current) replace(ids);
});

let saved = null;
try { saved = fromText(localStorage.getItem(storage)); } catch (error) { /* storage is forbidden: nothing was saved */ }
labels = saved || fromText(props.examples[0]) || labels;
publish();
