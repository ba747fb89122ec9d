// From the pixels of a picture to the input of the network, value for value as Pillow and convnext-export compute it.
// The resizing that a canvas does by itself differs between browsers and does not smooth before it makes smaller.

const MOST_PIXELS = 100_000_000;
const BITS = 22; // of a weight behind the binary point, as in Pillow

const FILTERS = {
  box: { reach: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { reach: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  hamming: { reach: 1, weight: (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0) },
  bicubic: { reach: 2, weight: cubic },
  lanczos: { reach: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

// Keys, "Cubic convolution interpolation for digital image processing", with a = -0.5.
function cubic(x) {
  const t = Math.abs(x);
  if (t < 1) return (1.5 * t - 2.5) * t * t + 1;
  return t < 2 ? ((-0.5 * t + 2.5) * t - 4) * t + 2 : 0;
}

// Python's round: halves go to the even number.
function round(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 !== 0) ? below + 1 : below;
}

const pair = (size) => (Array.isArray(size) ? size : [size, size]);

/** Width and height that a picture is resized to. */
export function resizedSize(width, height, { crop, resize }) {
  const [tall, wide] = pair(resize);
  if (crop === "squash") return [wide, tall];
  let size;
  if (crop === "center" && !Array.isArray(resize)) {
    const short = Math.min(width, height);
    size = [Math.trunc((resize * width) / short), Math.trunc((resize * height) / short)];
  } else {
    const ratios = [width / wide, height / tall];
    const ratio = crop === "border" ? Math.max(...ratios) : Math.min(...ratios);
    size = [round(width / ratio), round(height / ratio)];
  }
  if (!(size[0] * size[1] > 0 && size[0] * size[1] <= MOST_PIXELS)) {
    throw new Error(`${width} × ${height} pixels: too long and thin to resize`);
  }
  return size;
}

/** For each place of the output the first place of the input it is computed from, and the weights. */
function weightsOf(from, to, filter) {
  const scale = from / to;
  const spread = Math.max(scale, 1); // made smaller, each place is an average of all that fall into it
  const reach = filter.reach * spread;
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const end = Math.min(from, Math.trunc(centre + reach + 0.5));
    const values = [];
    for (let at = first; at < end; at++) values.push(filter.weight((at - centre + 0.5) * (1 / spread)));
    const sum = values.reduce((total, value) => total + value, 0);
    const whole = values.map((value) => Math.trunc((value / sum) * 2 ** BITS + (value < 0 ? -0.5 : 0.5)));
    return { first, weights: Int32Array.from(whole) };
  });
}

/** One pass over the rows or the columns: `step` leads along a line, `next` from a line to the next one.
 *
 * The products of a sum stay below 2^31, in whole numbers as in Pillow, which is also what a browser computes fastest. */
function resample(source, target, lines, places, channels, reading, writing) {
  for (let line = 0; line < lines; line++) {
    for (let place = 0; place < places.length; place++) {
      const { first, weights } = places[place];
      const taps = weights.length;
      const start = line * reading.next + first * reading.step;
      const end = line * writing.next + place * writing.step;
      for (let channel = 0; channel < channels; channel++) {
        let sum = 1 << (BITS - 1);
        for (let tap = 0, at = start + channel; tap < taps; tap++, at += reading.step) {
          sum = (sum + Math.imul(source[at], weights[tap])) | 0;
        }
        target[end + channel] = sum >> BITS; // a Uint8ClampedArray keeps it within 0 to 255
      }
    }
  }
  return target;
}

// Summed up, as in Pillow: a product would be rounded otherwise.
function nearestPlaces(from, to) {
  const scale = from / to;
  const places = [];
  for (let at = scale / 2; places.length < to; at += scale) places.push(Math.trunc(at));
  return places;
}

function nearest({ data, width, height, channels }, [wide, tall]) {
  const target = new Uint8ClampedArray(wide * tall * channels);
  const columns = nearestPlaces(width, wide);
  let at = 0;
  for (const row of nearestPlaces(height, tall)) {
    for (const column of columns) {
      const start = (row * width + column) * channels;
      for (let channel = 0; channel < channels; channel++) target[at++] = data[start + channel];
    }
  }
  return { data: target, width: wide, height: tall, channels };
}

/** A picture with rows of another width. */
function withWidth({ data, width, height, channels }, wide, filter) {
  const target = new Uint8ClampedArray(wide * height * channels);
  const reading = { step: channels, next: width * channels };
  const writing = { step: channels, next: wide * channels };
  resample(data, target, height, weightsOf(width, wide, filter), channels, reading, writing);
  return { data: target, width: wide, height, channels };
}

/** A picture with columns of another height. */
function withHeight({ data, width, height, channels }, tall, filter) {
  const target = new Uint8ClampedArray(width * tall * channels);
  const lines = { step: width * channels, next: channels };
  resample(data, target, width, weightsOf(height, tall, filter), channels, lines, lines);
  return { data: target, width, height: tall, channels };
}

/**
 * A picture at another size. A picture is {data, width, height, channels}, its channels side by side. Some versions of
 * Pillow resize the columns first where the height shrinks by more than twice as many pixels as the width.
 */
export function resized(picture, [wide, tall], interpolation, mayBeginWithColumns = false) {
  if (interpolation === "nearest") return nearest(picture, [wide, tall]);
  const { width, height } = picture;
  const filter = FILTERS[interpolation];
  const rows = (one) => (wide === width ? one : withWidth(one, wide, filter));
  const columns = (one) => (tall === height ? one : withHeight(one, tall, filter));
  const columnsFirst = mayBeginWithColumns && height - tall > Math.max(0, 2 * (width - wide));
  return columnsFirst ? rows(columns(picture)) : columns(rows(picture));
}

/** The centre of a picture; a side that is too short is filled up with the mean colour. */
export function cropped(picture, { size, offset, mean }) {
  const [tall, wide] = pair(size);
  const { channels } = picture;
  const colour = mean.map((value) => round(255 * value));
  const target = new Uint8ClampedArray(wide * tall * channels);
  const [left, top] = [picture.width - wide, picture.height - tall].map((spare) => {
    if (spare < 0) return -Math.trunc(-spare / 2);
    return offset === "floor" ? Math.trunc(spare / 2) : round(spare / 2);
  });
  for (let y = 0, at = 0; y < tall; y++) {
    for (let x = 0; x < wide; x++) {
      const [column, row] = [x + left, y + top];
      const inside = column >= 0 && column < picture.width && row >= 0 && row < picture.height;
      const start = (row * picture.width + column) * channels;
      for (let channel = 0; channel < channels; channel++) {
        target[at++] = inside ? picture.data[start + channel] : colour[channel];
      }
    }
  }
  return { data: target, width: wide, height: tall, channels };
}

/** The pixels of a canvas (RGBA) with the channels of the network: RGB, or grey by ITU-R 601-2 luma. */
export function inColour({ data, width, height }, channels) {
  const count = width * height;
  const target = new Uint8ClampedArray(count * channels);
  for (let pixel = 0; pixel < count; pixel++) {
    const [red, green, blue] = [data[4 * pixel], data[4 * pixel + 1], data[4 * pixel + 2]];
    if (channels === 1) {
      target[pixel] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    } else {
      target[3 * pixel] = red;
      target[3 * pixel + 1] = green;
      target[3 * pixel + 2] = blue;
    }
  }
  return { data: target, width, height, channels };
}

/** The input of the network for one picture: Float32Array, or Uint8Array where it takes pixels as they are. */
export function normalised({ data, width, height, channels }, { mean, std, layout, color, input }) {
  const count = width * height;
  const target = input === "uint8" ? new Uint8Array(count * channels) : new Float32Array(count * channels);
  const single = Math.fround;
  for (let channel = 0; channel < channels; channel++) {
    const scale = single(single(1 / 255) / single(std[channel]));
    const shift = single(single(mean[channel]) / single(std[channel]));
    const place = color === "BGR" ? channels - 1 - channel : channel;
    for (let pixel = 0; pixel < count; pixel++) {
      const value = data[pixel * channels + channel];
      const at = layout === "NHWC" ? pixel * channels + place : place * count + pixel;
      if (input === "uint8") target[at] = value;
      else target[at] = input === "float01" ? value / 255 : single(value * scale) - shift;
    }
  }
  return target;
}

/** From the pixels of a canvas to the input of the network. */
export function preprocess(pixels, preprocessing) {
  const picture = inColour(pixels, preprocessing.mean.length);
  const size = resizedSize(picture.width, picture.height, preprocessing);
  const { interpolation, may_begin_with_columns: mayBeginWithColumns } = preprocessing;
  return normalised(
    cropped(resized(picture, size, interpolation, mayBeginWithColumns), preprocessing),
    preprocessing,
  );
}
