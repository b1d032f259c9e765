/* Scenes in the manner of `deconvnet/shapes.py`: cut-out shapes lie on a textured ground, with a
   shadow, a bevelled edge, light and a little noise. Everything is computed pixel by pixel from
   seeds, so that a scene looks the same in every browser and while it is dragged.

       const scene = LiveScene({ outlines });
       const { pixels, labels } = scene.paint({ ground: 3, items });    // 192 x 192
       const crop = scene.crop(pixels, [x0, y0, x1, y1], 64);           // as the package cuts it
*/

window.LiveScene = function (data) {
  "use strict";

  const { outlines } = data; // of `book/live/scene.json`
  const SIDE = 192; // px, within the range of the data set's pictures
  const AREA = SIDE * SIDE;
  const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

  /* ---------------------------------------------------------------------------- random numbers */

  /** Numbers from 0 to 1 that depend on the seed alone (mulberry32). */
  function generator(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  function hash(x, y, seed) {
    let h = Math.imul(x, 374761393) ^ Math.imul(y, 668265263) ^ Math.imul(seed, 2246822519);
    h = Math.imul(h ^ (h >>> 13), 1274126177);
    return ((h ^ (h >>> 16)) >>> 0) / 2147483648 - 1;
  }

  /** Smooth noise between -1 and 1 with features of one unit. */
  function noise(x, y, seed) {
    const i = Math.floor(x), j = Math.floor(y);
    const u = (x - i) ** 2 * (3 - 2 * (x - i)), v = (y - j) ** 2 * (3 - 2 * (y - j));
    const upper = hash(i, j, seed) * (1 - u) + hash(i + 1, j, seed) * u;
    const lower = hash(i, j + 1, seed) * (1 - u) + hash(i + 1, j + 1, seed) * u;
    return upper * (1 - v) + lower * v;
  }

  const fractal = (x, y, seed) =>
    noise(x, y, seed) + noise(2 * x, 2 * y, seed + 1) / 2 + noise(4 * x, 4 * y, seed + 2) / 4;

  /* ---------------------------------------------------------------------- colours and surfaces */

  const HUES = [0.02, 0.07, 0.1, 0.14, 0.3, 0.42, 0.55, 0.6];

  function rgb(hue, saturation, value) {
    return [5, 3, 1].map((n) => {
      const k = (n + hue * 6) % 6;
      return value * (1 - saturation * clamp(Math.min(k, 4 - k), 0, 1));
    });
  }

  function colour(random, muted) {
    const hue = random() < 0.3 ? random() : HUES[Math.floor(random() * HUES.length)];
    return muted
      ? rgb(hue, 0.05 + 0.4 * random(), 0.35 + 0.45 * random())
      : rgb(hue, 0.3 + 0.5 * random(), 0.3 + 0.6 * random());
  }

  function near(random, base, spread) {
    const shift = spread * (random() < 0.5 ? -1 : 1) * (0.5 + random());
    return base.map((v) => clamp(v + shift + 0.5 * spread * (random() - 0.5), 0.05, 0.98));
  }

  const PATTERNS = [
    (u, v, seed) => 0.5 + Math.sin(6.283 * u + 0.6 * noise(u / 3, v / 3, seed)), // stripes
    (u, v) => 4 * Math.sin(3.142 * u) * Math.sin(3.142 * v) + 0.5, // checks
    (u, v) => 3 * (Math.cos(6.283 * u) + Math.cos(6.283 * v) - 0.7), // dots
    (u, v, seed) => 0.5 + 0.35 * Math.sin(6.283 * (u + 0.8 * noise(u / 4, v / 8, seed))) +
      0.25 * noise(5 * u, v / 2, seed), // grain of wood
    (u, v, seed) => 0.5 + 0.5 * Math.sin(3 * fractal(u / 2.5, v / 2.5, seed)), // marble
    (u, v, seed) => 0.5 + 0.6 * fractal(u / 1.5, v / 1.5, seed), // mottle
    (u, v, seed) => 0.5 + 0.6 * fractal(u / 1.5, v / 1.5, seed),
    (u) => u / 14 + 0.5, // ramp
  ];

  /** A function from a place to a colour: two colours, a pattern, a touch of noise. */
  function surface(random, colours) {
    const pattern = PATTERNS[Math.floor(random() * PATTERNS.length)];
    const angle = 6.283 * random(), period = 6 + 20 * random();
    const seed = Math.floor(random() * 1e6), speckle = 0.01 + 0.04 * random();
    const cos = Math.cos(angle) / period, sin = Math.sin(angle) / period;
    const [a, b] = colours;
    return (x, y, out) => {
      const share = clamp(pattern(cos * x + sin * y, cos * y - sin * x, seed), 0, 1);
      const grain = 1 + speckle * (noise(x / 2, y / 2, seed) + noise(x / 7, y / 7, seed + 9));
      for (let c = 0; c < 3; c++) out[c] = (a[c] + (b[c] - a[c]) * share) * grain;
    };
  }

  const grounds = new Map(); // seed -> its canvas, colours and light

  function ground(seed) {
    if (!grounds.has(seed)) grounds.set(seed, makeGround(generator(7919 * seed + 1)));
    return grounds.get(seed);
  }

  function makeGround(random) {
    const first = colour(random, true);
    const one = surface(random, [first, near(random, first, 0.12)]);
    const second = random() < 0.5 ? near(random, first, 0.25) : colour(random, true);
    const two = surface(random, [second, near(random, second, 0.12)]);
    const single = random() < 0.45;
    const turn = 6.283 * random(), seed = Math.floor(random() * 1e6);
    const edge = SIDE * (random() - 0.5) * 0.5;
    const lamp = 6.283 * random();
    const canvas = new Float32Array(3 * AREA), a = [0, 0, 0], b = [0, 0, 0];
    for (let y = 0, i = 0; y < SIDE; y++) {
      for (let x = 0; x < SIDE; x++, i += 3) {
        const u = Math.cos(turn) * (x - SIDE / 2) + Math.sin(turn) * (y - SIDE / 2);
        const side = single ? 0 : clamp(u - edge + 4 * noise(x / 30, y / 30, seed), 0, 1);
        one(x, y, a);
        two(x, y, b);
        for (let c = 0; c < 3; c++) canvas[i + c] = a[c] + (b[c] - a[c]) * side;
      }
    }
    return {
      canvas, light: [Math.cos(lamp), Math.sin(lamp)],
      gradient: 0.3 * random(), vignette: 0.2 * random(), seed,
    };
  }

  /* -------------------------------------------------------------------------------- the shapes */

  const board = document.createElement("canvas");
  board.width = board.height = SIDE;
  const pen = board.getContext("2d", { willReadFrequently: true });

  /** Traces polygons of the shape's own coordinates into a drawing context. */
  function trace(context, polygons) {
    for (const polygon of polygons) {
      context.beginPath();
      polygon.forEach(([x, y]) => context.lineTo(x, y));
      context.closePath();
      context.fill();
    }
  }

  /** Fills an outline, whose farthest point is 1 from the origin, with the current colour. */
  function fill(context, { solids, holes }) {
    trace(context, solids);
    context.globalCompositeOperation = "destination-out";
    trace(context, holes);
    context.globalCompositeOperation = "source-over";
  }

  function place(item) {
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, SIDE, SIDE);
    pen.translate(item.x * SIDE, item.y * SIDE);
    pen.rotate((item.angle * Math.PI) / 180);
  }

  /** The share of each pixel that an item covers. */
  function coverOf(item) {
    place(item);
    pen.scale((item.size * SIDE) / 2, (item.size * SIDE) / 2);
    pen.fillStyle = "#fff";
    fill(pen, outlines[item.label - 1]);
    const { data } = pen.getImageData(0, 0, SIDE, SIDE);
    const cover = new Float32Array(AREA);
    for (let i = 0; i < AREA; i++) cover[i] = data[4 * i + 3] / 255;
    return cover;
  }

  /** A running mean over 2r + 1 pixels, along both axes, twice: close to a Gaussian. */
  function blur(map, radius) {
    const r = Math.max(1, Math.round(radius));
    let from = map;
    for (let pass = 0; pass < 4; pass++) {
      const to = new Float32Array(AREA), step = pass % 2 ? SIDE : 1, next = pass % 2 ? 1 : SIDE;
      for (let line = 0; line < SIDE; line++) {
        const start = line * next;
        let sum = 0;
        for (let i = -r; i < SIDE; i++) {
          if (i + r < SIDE) sum += from[start + (i + r) * step];
          if (i - r - 1 >= 0) sum -= from[start + (i - r - 1) * step];
          if (i >= 0) to[start + i * step] = sum / (2 * r + 1);
        }
      }
      from = to;
    }
    return from;
  }

  function layShape(canvas, labels, item, light) {
    const random = generator(104729 * item.seed + 17);
    const base = colour(random, false);
    const paint = surface(random, [base, random() < 0.6 ? near(random, base, 0.15) : colour(random)]);
    const extent = item.size * SIDE;
    const distance = 1 + random() * (1 + 0.05 * extent), darkness = 0.25 + 0.3 * random();
    const slope = 1 + 0.02 * extent, height = 0.6 + 0.5 * random();
    const cover = coverOf(item), shadow = blur(cover, 0.6 * distance), soft = blur(cover, slope);
    const dx = Math.round(light[0] * distance), dy = Math.round(light[1] * distance);
    const turn = (-item.angle * Math.PI) / 180, cos = Math.cos(turn), sin = Math.sin(turn);
    const dye = [0, 0, 0];
    for (let y = 0, i = 0; y < SIDE; y++) {
      for (let x = 0; x < SIDE; x++, i++) {
        const sx = x + dx, sy = y + dy;
        const dark = sx >= 0 && sx < SIDE && sy >= 0 && sy < SIDE ? shadow[sy * SIDE + sx] : 0;
        if (dark > 0) for (let c = 0; c < 3; c++) canvas[3 * i + c] *= 1 - darkness * dark;
        if (cover[i] === 0) continue;
        const px = x - item.x * SIDE, py = y - item.y * SIDE;
        paint(cos * px - sin * py, sin * px + cos * py, dye);
        const right = soft[i + (x + 1 < SIDE ? 1 : 0)] - soft[i - (x > 0 ? 1 : 0)];
        const down = soft[i + (y + 1 < SIDE ? SIDE : 0)] - soft[i - (y > 0 ? SIDE : 0)];
        const bevel = 1 - clamp(height * slope * (light[0] * right + light[1] * down), -0.5, 0.5);
        for (let c = 0; c < 3; c++) {
          canvas[3 * i + c] += (dye[c] * bevel - canvas[3 * i + c]) * cover[i];
        }
        if (cover[i] >= 0.5) labels[i] = item.label;
      }
    }
    return cover;
  }

  /** A picture of the reader's own; `item.size` 1 fills the scene. */
  function layPicture(canvas, labels, item) {
    const { width, height } = item.picture;
    const scale = (item.size * SIDE) / Math.min(width, height);
    place(item);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(item.picture, (-width * scale) / 2, (-height * scale) / 2,
      width * scale, height * scale);
    const { data } = pen.getImageData(0, 0, SIDE, SIDE);
    const cover = new Float32Array(AREA);
    for (let i = 0; i < AREA; i++) {
      cover[i] = data[4 * i + 3] / 255;
      for (let c = 0; c < 3; c++) {
        canvas[3 * i + c] += (data[4 * i + c] / 255 - canvas[3 * i + c]) * cover[i];
      }
      if (cover[i] >= 0.5) labels[i] = 255; // nobody knows what is in it
    }
    return cover;
  }

  /** Light falls on the scene, and the sensor adds its noise. */
  function photograph(canvas, { light, gradient, vignette, seed }) {
    const pixels = new Uint8ClampedArray(3 * AREA);
    for (let y = 0, i = 0; y < SIDE; y++) {
      for (let x = 0; x < SIDE; x++, i += 3) {
        const u = (2 * x) / SIDE - 1, v = (2 * y) / SIDE - 1;
        const bright = (1 + gradient * (light[0] * u + light[1] * v)) *
          (1 - (vignette * (u * u + v * v)) / 2);
        for (let c = 0; c < 3; c++) {
          const value = canvas[i + c] * bright;
          const grain = 0.015 * Math.sqrt(clamp(value, 0.05, 1)) * 1.7 * hash(x, 3 * y + c, seed);
          pixels[i + c] = 255 * (value + grain);
        }
      }
    }
    return pixels;
  }

  /** Paints a scene.
      Items lie on top of those before: `{label, x, y, size, angle, seed}`, with the centre and the
      diameter as shares of the scene's side and the angle in degrees, or with a `picture`.
      Returns `pixels` (RGB, pixel by pixel), the true `labels`, and every item's `cover`. */
  function paint({ ground: seed, items }) {
    const base = ground(seed);
    const canvas = base.canvas.slice(), labels = new Uint8Array(AREA);
    const covers = items.map((item) => item.picture
      ? layPicture(canvas, labels, item) : layShape(canvas, labels, item, base.light));
    // A photograph brings its own light and noise.
    const plain = items.some((item) => item.picture)
      ? { ...base, gradient: 0, vignette: 0 } : base;
    return { pixels: photograph(canvas, plain), labels, covers };
  }

  /** The box around what an item covers, `[x0, y0, x1, y1]`, half open; null if it is outside. */
  function boxOf(cover) {
    let x0 = SIDE, y0 = SIDE, x1 = 0, y1 = 0;
    for (let i = 0; i < AREA; i++) {
      if (cover[i] < 0.5) continue;
      const x = i % SIDE, y = Math.floor(i / SIDE);
      x0 = Math.min(x0, x); x1 = Math.max(x1, x + 1);
      y0 = Math.min(y0, y); y1 = Math.max(y1, y + 1);
    }
    return x0 < x1 ? [x0, y0, x1, y1] : null;
  }

  function expand([x0, y0, x1, y1], factor) {
    const grow = (low, high) => [-1, 1].map((side) =>
      Math.round((low + high) / 2 + (side * factor * (high - low)) / 2));
    const [left, right] = grow(x0, x1), [top, bottom] = grow(y0, y1);
    return [left, top, right, bottom];
  }

  /** For each of `size` cells over `length` pixels from `start`: which pixels count, how much.
      Bilinear, and the mean over an area where two taps would skip pixels; what lies outside the
      picture counts as 0. As `deconvnet.aggregation.cut_crops`. */
  function taps(start, length, size) {
    return Array.from({ length: size }, (_, cell) => {
      const found = [];
      const add = (pixel, weight) => {
        const at = start + pixel;
        if (weight > 0 && at >= 0 && at < SIDE) found.push([at, weight]);
      };
      const ratio = length / size;
      if (length > 2 * size) {
        const low = cell * ratio, high = low + ratio;
        for (let pixel = Math.floor(low); pixel < high; pixel++) {
          add(pixel, (Math.min(high, pixel + 1) - Math.max(low, pixel)) / ratio);
        }
      } else {
        const centre = Math.max((cell + 0.5) * ratio - 0.5, 0);
        const pixel = Math.min(Math.floor(centre), length - 1), share = centre - pixel;
        add(pixel, 1 - share);
        add(Math.min(pixel + 1, length - 1), share);
      }
      return found;
    });
  }

  /** Cuts a box out and warps it to a square: `Uint8Array [3 * size * size]`, by planes. */
  function crop(pixels, [x0, y0, x1, y1], size) {
    const rows = taps(y0, y1 - y0, size), columns = taps(x0, x1 - x0, size);
    const out = new Uint8Array(3 * size * size);
    for (let c = 0; c < 3; c++) {
      rows.forEach((row, r) => columns.forEach((column, k) => {
        let sum = 0;
        for (const [y, wy] of row) {
          for (const [x, wx] of column) sum += wy * wx * pixels[3 * (y * SIDE + x) + c];
        }
        out[(c * size + r) * size + k] = Math.round(sum);
      }));
    }
    return out;
  }

  /** The same for labels, by the nearest pixel; 255 outside. */
  function cropLabels(labels, [x0, y0, x1, y1], size) {
    const out = new Uint8Array(size * size).fill(255);
    for (let r = 0; r < size; r++) {
      for (let k = 0; k < size; k++) {
        const y = Math.floor(y0 + ((r + 0.5) * (y1 - y0)) / size);
        const x = Math.floor(x0 + ((k + 0.5) * (x1 - x0)) / size);
        if (x >= 0 && y >= 0 && x < SIDE && y < SIDE) out[r * size + k] = labels[y * SIDE + x];
      }
    }
    return out;
  }

  return { SIDE, paint, boxOf, expand, crop, cropLabels, fill };
};
