// Opens the model and answers pictures, beside the page, which stays responsive meanwhile.
import { preprocess } from "./pixels.js";

const MOST_PIXELS = 100_000_000;
const MOST_THREADS = 4;
let facts, session, runtime;

const within = (path) => new URL(path, import.meta.url).href;

/** Whether there is a WebGPU of the kind that is wanted. One that is computed on the CPU is slower than WebAssembly. */
async function hasWebGpu(wanted) {
  if (wanted === "wasm") return false;
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    const slow = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter;
    return Boolean(adapter) && (!slow || wanted === "webgpu");
  } catch {
    return false;
  }
}

/** Open the model on WebGPU, or on the CPU where there is no WebGPU or it does not run the model. */
async function open({ runtime: wanted }) {
  const model = await fetched(facts.file);
  if (await hasWebGpu(wanted)) {
    try {
      return await opened("webgpu", model);
    } catch (error) {
      console.warn(`WebGPU does not run this model: ${error.message}`);
    }
  }
  return await opened("wasm", model);
}

async function opened(provider, model) {
  const ort = await import(within(`runtime/ort.${provider}.min.mjs`));
  ort.env.wasm.wasmPaths = within("runtime/");
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1) : 1;
  ort.env.logLevel = "error";
  runtime = ort;
  session = await ort.InferenceSession.create(model, { executionProviders: [provider] });
  await run(new (facts.input.dtype === "uint8" ? Uint8Array : Float32Array)(size(facts.input.shape)));
  const threads = ort.env.wasm.numThreads;
  return provider === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"}`;
}

async function fetched(path) {
  const answer = await fetch(within(path));
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  return new Uint8Array(await answer.arrayBuffer());
}

const size = (shape) => shape.slice(1).reduce((product, side) => product * side, 1);

/** The outputs for one input, each a list of numbers. A fixed batch is filled with the same picture. */
async function run(values) {
  const { name, shape, dtype } = facts.input;
  const batch = shape[0];
  const filled = new values.constructor(batch * values.length);
  for (let place = 0; place < batch; place++) filled.set(values, place * values.length);
  const results = await session.run({ [name]: new runtime.Tensor(dtype, filled, shape) });
  const { data, dims } = results[facts.output.name]; // of the first picture alone
  return [Array.from(data.slice(0, size(dims)))];
}

async function pixelsOf(blob) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, options);
  } catch {
    throw new Error("this file is no picture that the browser can read");
  }
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) throw new Error(`${width} × ${height} pixels, more than ${MOST_PIXELS}`);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

async function answer({ blob }) {
  const start = performance.now();
  const pixels = await pixelsOf(blob);
  const transparent = pixels.data.some((value, place) => place % 4 === 3 && value < 255);
  const input = preprocess(pixels, facts.preprocessing);
  const ready = performance.now();
  const outputs = await run(input);
  if (outputs.some((values) => values.some((value) => !Number.isFinite(value)))) {
    throw new Error("the outputs are not finite");
  }
  const end = performance.now();
  return { outputs, transparent, milliseconds: { preparing: ready - start, model: end - ready } };
}

let last = Promise.resolve(); // one at a time, in order
self.onmessage = ({ data: { number, ...request } }) => {
  last = last.then(async () => {
    try {
      if (request.facts) facts = request.facts;
      self.postMessage({ number, result: await (request.facts ? open(request) : answer(request)) });
    } catch (error) {
      self.postMessage({ number, error: error.message ?? String(error) });
    }
  });
};
