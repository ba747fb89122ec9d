// The page: takes a picture, shows the answer. The model runs in worker.js.

const part = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let facts;
let requests = 0;
let answers = 0;

worker.onmessage = ({ data: { number, result, error } }) => {
  const { resolve, reject } = waiting.get(number);
  waiting.delete(number);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
};
worker.onerror = (event) => {
  const error = new Error(event.message || "worker.js does not start; this browser is too old");
  for (const { reject } of waiting.values()) reject(error);
};

function send(request) {
  return new Promise((resolve, reject) => {
    waiting.set(++requests, { resolve, reject });
    worker.postMessage({ number: requests, ...request });
  });
}

function status(text, bad = false) {
  part("status").textContent = text;
  part("status").classList.toggle("bad", bad);
}

function probabilities(values, kind) {
  if (facts.output.holds === "softmax" || facts.output.holds === "sigmoid") return values;
  if (kind === "multilabel") return values.map((value) => 1 / (1 + Math.exp(-value)));
  const most = Math.max(...values);
  const powers = values.map((value) => Math.exp(value - most));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/** The first classes of an output, the most probable one first. */
function first(values, kind) {
  const shares = probabilities(values, kind);
  const order = values.map((_, place) => place).sort((a, b) => values[b] - values[a] || a - b);
  return order.slice(0, facts.top).map((place) => ({
    label: facts.labels[place] ?? `class ${place}`,
    probability: shares[place],
    decided: kind === "multilabel" && values[place] >= facts.cut,
  }));
}

function element(name, style, text = "") {
  const node = document.createElement(name);
  node.className = style;
  node.textContent = text;
  return node;
}

function row({ label, probability, decided, color }, place) {
  const item = element("li", facts.output.kind === "multilabel" ? (decided ? "first" : "") : place === 0 ? "first" : "");
  const line = element("div", "row");
  line.append(element("span", "label", decided ? `${label} ✓` : label));
  line.append(element("span", "share", `${(100 * probability).toFixed(1)} %`));
  const track = element("div", "track");
  track.setAttribute("aria-hidden", "true");
  const bar = element("div", "bar");
  bar.style.width = `${100 * probability}%`;
  if (color) bar.style.background = `rgb(${color})`;
  track.append(bar);
  item.append(line, track);
  return item;
}

/** Show the classes of the pixels in colour, over the picture where it is stretched to the input, and their shares. */
function showMask(classes) {
  const { size, resize, crop } = facts.preprocessing;
  const [height, width] = Array.isArray(size) ? size : [size, size];
  const canvas = element("canvas", "mask");
  const colored = new ImageData(width, height);
  const counts = new Map();
  classes.forEach((number, pixel) => {
    counts.set(number, (counts.get(number) ?? 0) + 1);
    colored.data.set([...facts.colors[number % facts.colors.length], 255], 4 * pixel);
  });
  const layer = new OffscreenCanvas(width, height);
  layer.getContext("2d").putImageData(colored, 0, 0);
  const picture = part("picture");
  const stretched = crop === "squash" && String(resize) === String(size);
  canvas.width = stretched ? picture.naturalWidth : width;
  canvas.height = stretched ? picture.naturalHeight : height;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "The picture in the colours of its classes");
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  if (stretched) context.drawImage(picture, 0, 0);
  context.globalAlpha = stretched ? 0.5 : 1;
  context.drawImage(layer, 0, 0, canvas.width, canvas.height);
  const shares = [...counts].sort((a, b) => b[1] - a[1]).map(([number, count]) => ({
    label: facts.labels[number] ?? `class ${number}`,
    probability: count / classes.length,
    decided: false,
    color: facts.colors[number % facts.colors.length],
  }));
  const list = element("ol", "");
  list.append(...shares.slice(0, facts.top).map(row));
  part("answer").replaceChildren(canvas, list);
}

async function show(values) {
  if (facts.output.kind === "pixel_classes") {
    await part("picture").decode();
    showMask(values);
    return;
  }
  if (facts.output.kind === "values") {
    part("answer").replaceChildren(element("p", "", values.map((value) => value.toPrecision(6)).join(" ")));
    return;
  }
  const list = element("ol", "");
  list.append(...first(values, facts.output.kind).map(row));
  part("answer").replaceChildren(list);
}

/** Show a picture and the answer for it. Returns the outputs, or null where there is no answer. */
async function picture(blob, name) {
  const number = requests + 1;
  status(`Reading ${name} …`);
  URL.revokeObjectURL(part("picture").src);
  part("picture").src = URL.createObjectURL(blob);
  part("picture").alt = name;
  part("picture").hidden = false;
  part("invitation").hidden = true;
  let outputs = null;
  try {
    const answer = await send({ blob });
    if (number < requests) return null; // another picture has been dropped meanwhile
    outputs = answer.outputs;
    await show(outputs[0]);
    const { preparing, model } = answer.milliseconds;
    part("times").textContent = `model ${model.toFixed(1)} ms, reading and resizing ${preparing.toFixed(1)} ms`;
    status(answer.transparent ? `${name}: what is transparent in it was read as black` : name);
  } catch (error) {
    if (number < requests) return null;
    part("picture").hidden = true;
    part("invitation").hidden = false;
    part("answer").replaceChildren(element("p", "faint", "No answer."));
    part("times").textContent = "";
    status(`${name}: ${error.message}`, true);
  }
  document.body.dataset.answers = ++answers;
  return outputs;
}

async function sample() {
  try {
    const found = await fetch(facts.sample);
    if (!found.ok) throw new Error(`the server answers ${found.status}`);
    return await picture(await found.blob(), facts.sample);
  } catch (error) {
    status(`${facts.sample}: ${error.message}`, true);
    return null;
  }
}

/** Compare the outputs for the sample picture with those of the artifact. */
async function selftest() {
  const outputs = await sample();
  if (!outputs) return "FAILED: no outputs";
  if (!facts.expected) return "passed: the outputs are finite; the package has no expected answers to compare with";
  const [values, expected] = [outputs.flat(), facts.expected.flat(2)];
  if (facts.output.kind === "pixel_classes") {
    const other = expected.filter((number, pixel) => number !== values[pixel]).length / expected.length;
    const verdict = values.length === expected.length && other <= facts.limit ? "passed" : "FAILED";
    const percent = (share) => `${(100 * share).toPrecision(2)} %`;
    return `${verdict}: ${percent(other)} of the pixels have another class, limit ${percent(facts.limit)}`;
  }
  const largest = Math.max(...expected.map(Math.abs));
  const difference = Math.max(...expected.map((value, place) => Math.abs(value - values[place]))) / largest;
  const verdict = values.length === expected.length && difference <= facts.limit ? "passed" : "FAILED";
  return `${verdict}: largest difference ${difference.toPrecision(2)} of the largest output, limit ${facts.limit}`;
}

function listen() {
  const take = (files) => {
    const file = [...files].find((one) => one.type.startsWith("image/")) ?? files[0];
    if (file) picture(file, file.name);
  };
  part("file").addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = ""; // the same file may be chosen again
  });
  part("sample").addEventListener("click", sample);
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
  const over = (event, inside) => {
    event.preventDefault();
    part("drop").classList.toggle("over", inside);
  };
  for (const name of ["dragenter", "dragover"]) document.addEventListener(name, (event) => over(event, true));
  document.addEventListener("dragleave", (event) => over(event, false));
  document.addEventListener("drop", (event) => {
    over(event, false);
    take(event.dataTransfer.files);
  });
}

async function start() {
  status("Loading the model …");
  try {
    facts = await (await fetch("model.json")).json();
    part("runtime").textContent = await send({ facts, runtime: query.get("runtime") });
  } catch (error) {
    part("runtime").textContent = "not running";
    status(`The model cannot be loaded: ${error.message}`, true);
    document.body.dataset.ready = "no";
    return;
  }
  status("Ready.");
  part("file").disabled = part("sample").disabled = false;
  listen();
  document.body.dataset.ready = "yes";
  if (query.has("selftest")) part("selftest").textContent = `Self-test ${await selftest()}.`;
}

start();
