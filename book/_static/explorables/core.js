/* What all explorables share: how one is started, and controls that mouse, touch, keyboard and
   screen readers can use. No framework; pages that have no explorable do not load it.

   An explorable is a function that fills a root element from data:

       Explorable.register("decoder", (root, data, ui) => { ... });

   `data` is what `python -m deconvnet.explorables` wrote. Every helper of `ui` returns a handle
   whose `node` is its element; `ui.row(...)` lays handles out and appends them to the root. */

(function () {
  "use strict";

  const SVG = "http://www.w3.org/2000/svg";
  let used = 0;
  const unique = (stem) => `explorable-${stem}-${++used}`;
  const stillness = window.matchMedia("(prefers-reduced-motion: reduce)");

  /* ------------------------------------------------------------------------------- starting */

  function register(name, make) {
    const start = () => {
      const figures = document.querySelectorAll(`figure[data-explorable="${name}"]`);
      figures.forEach((figure) => begin(figure, make));
    };
    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
    else start();
  }

  function begin(figure, make) {
    const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    const root = element("div", { class: "explorable-body" });
    const still = figure.querySelector("img");
    make(root, data, helpers(root)); // if it throws, the static picture stays
    still.hidden = true;
    figure.insertBefore(root, still);
    figure.classList.add("is-live");
  }

  /* -------------------------------------------------------------------------------- elements */

  function fill(node, properties, children) {
    for (const [name, value] of Object.entries(properties || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2).toLowerCase(), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) {
        node.setAttribute(name, value);
      }
    }
    node.append(...children.map((child) => (child && child.node) || child));
    return node;
  }

  /** An HTML element: `element("p", {class: "x", onClick: f}, "text", another)`. */
  const element = (tag, properties, ...children) =>
    fill(document.createElement(tag), properties, children);

  /** The same for SVG. */
  const svg = (tag, properties, ...children) =>
    fill(document.createElementNS(SVG, tag), properties, children);

  /* -------------------------------------------------------------------------------- pictures */

  const loaded = new Map(); // data URI -> Promise of its decoded picture

  function load(uri) {
    if (!loaded.has(uri)) {
      const image = new Image();
      const ready = new Promise((resolve, reject) => {
        image.onload = () => resolve(image);
        image.onerror = () => reject(new Error("a picture of an explorable cannot be decoded"));
      });
      image.src = uri;
      loaded.set(uri, { image, ready });
    }
    return loaded.get(uri);
  }

  /** The label of each pixel of a palette PNG, by its colour: `Uint8Array`, row by row. */
  async function labels(uri, palette) {
    const image = await load(uri).ready;
    const canvas = element("canvas", { width: image.width, height: image.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, image.width, image.height);
    const label = new Map(palette.map(([r, g, b], i) => [(r << 16) | (g << 8) | b, i]));
    const found = new Uint8Array(data.length / 4);
    for (let i = 0; i < found.length; i++) {
      const colour = (data[4 * i] << 16) | (data[4 * i + 1] << 8) | data[4 * i + 2];
      found[i] = label.has(colour) ? label.get(colour) : 255;
    }
    return found;
  }

  function picture({ width, height, alt = "", caption = "", pixelated = false, size }) {
    const canvas = element("canvas", {
      width, height, role: "img", "aria-label": alt, class: pixelated ? "is-pixelated" : null,
    });
    const overlay = svg("svg", {
      viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true",
    });
    const names = element("div", { class: "explorable-names", "aria-hidden": "true" });
    const frame = element("div", { class: "explorable-frame" }, canvas, overlay, names);
    frame.style.aspectRatio = `${width} / ${height}`;
    const text = element("p", { class: "explorable-caption" }, caption);
    const node = element("div", { class: "explorable-picture" }, frame, text);
    node.style.setProperty("--size", `${size || width}px`);
    let wanted = 0;

    function resize(w, h) {
      if (canvas.width === w && canvas.height === h) return;
      canvas.width = w;
      canvas.height = h;
      overlay.setAttribute("viewBox", `0 0 ${w} ${h}`);
      frame.style.aspectRatio = `${w} / ${h}`;
    }

    /** Draws a data URI (any size: the picture takes it over) or an `ImageData`. Resolves when
        it is seen; of several calls the last one wins, however long each takes to decode. */
    function draw(source) {
      const turn = ++wanted;
      const context = canvas.getContext("2d");
      if (source instanceof ImageData) {
        resize(source.width, source.height);
        context.putImageData(source, 0, 0);
        return Promise.resolve();
      }
      const { image, ready } = load(source);
      const paint = () => {
        if (turn !== wanted) return;
        resize(image.naturalWidth, image.naturalHeight);
        context.clearRect(0, 0, canvas.width, canvas.height);
        context.drawImage(image, 0, 0);
      };
      if (image.complete && image.naturalWidth) {
        paint();
        return Promise.resolve();
      }
      return ready.then(paint);
    }

    /** Boxes in the picture's pixels; `kind`: "main", "context", "muted" or "last". */
    function boxes(list) {
      overlay.replaceChildren(
        ...list.flatMap(({ x0, y0, x1, y1, kind = "main" }) =>
          ["edge", "line"].map((part) =>
            svg("rect", {
              x: x0, y: y0, width: x1 - x0, height: y1 - y0,
              class: `explorable-box is-${kind} is-${part}`,
            })
          )
        )
      );
    }

    /** Names on the picture: `[{x, y, text}]`, in its pixels. */
    function write(list) {
      names.replaceChildren(
        ...list.map(({ x, y, text: name }) => {
          const tag = element("span", {}, name);
          tag.style.left = `${(100 * x) / canvas.width}%`;
          tag.style.top = `${(100 * y) / canvas.height}%`;
          const shift = x < canvas.width / 6 ? "-15%" : x > (5 * canvas.width) / 6 ? "-85%" : "-50%";
          tag.style.transform = `translate(${shift}, -50%)`;
          return tag;
        })
      );
      spread();
    }

    /** Moves a name that would lie on another one up or down. */
    function spread() {
      const placed = [];
      for (const tag of names.children) {
        tag.style.marginTop = "";
        const home = tag.getBoundingClientRect();
        const area = frame.getBoundingClientRect();
        const apart = (dy) => placed.every((p) =>
          home.right < p.left || home.left > p.right
          || home.bottom + dy < p.top || home.top + dy > p.bottom);
        const inside = (dy) => home.top + dy >= area.top && home.bottom + dy <= area.bottom;
        const step = home.height + 2;
        const dy = [0, 0.5, -0.5, 1, -1, 2, -2]
          .map((k) => k * step).find((d) => apart(d) && (!d || inside(d))) || 0;
        tag.style.marginTop = `${dy}px`;
        placed.push({
          left: home.left, right: home.right, top: home.top + dy, bottom: home.bottom + dy,
        });
      }
    }
    new ResizeObserver(spread).observe(frame);

    return {
      node, canvas, frame, overlay, draw, boxes, names: write,
      alt: (value) => canvas.setAttribute("aria-label", value),
      caption: (value) => text.replaceChildren(value),
    };
  }

  /** Number `index` of a strip, pictures of one height below each other: `ImageData`. */
  async function cut(uri, index, height) {
    const image = await load(uri).ready;
    const canvas = element("canvas", { width: image.naturalWidth, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, -index * height);
    return context.getImageData(0, 0, canvas.width, height);
  }

  /** Labels laid over a photograph; black, the background, lets it through. */
  function blend(photo, labels, strength = 0.6) {
    const shown = new ImageData(new Uint8ClampedArray(photo.data), photo.width, photo.height);
    for (let i = 0; i < shown.data.length; i += 4) {
      if (!labels.data[i] && !labels.data[i + 1] && !labels.data[i + 2]) continue;
      for (let c = i; c < i + 3; c++) {
        shown.data[c] += strength * (labels.data[c] - shown.data[c]);
      }
    }
    return shown;
  }

  /* ---------------------------------------------------------------------------------- curves */

  /** Curves over the steps of a slider: `series` is `[{name, values}]`, in percent. The handle's
      `set(number, index)` picks a curve and a place on it; a pointer on the curves calls `onPick`
      with an index. The words of the slider and the status say the same, so this is not read out. */
  function curve({ title, series, first = 0, onPick }) {
    const W = 320, H = 150, left = 34, right = 34, top = 12, bottom = 22;
    const count = series[0].values.length;
    const highest = Math.max(...series.flatMap((s) => s.values));
    const ceiling = Math.max(20, 20 * Math.ceil(highest / 20));
    const x = (i) => left + ((W - left - right) * i) / Math.max(count - 1, 1);
    const y = (v) => H - bottom - ((H - top - bottom) * v) / ceiling;
    const write = (at, up, anchor, text, kind = "") =>
      svg("text", { x: at, y: up, "text-anchor": anchor, class: `explorable-tick ${kind}` }, text);
    const grid = [0, ceiling / 2, ceiling].flatMap((v) => [
      svg("line", { x1: left, x2: W - right, y1: y(v), y2: y(v), class: "explorable-grid" }),
      write(left - 6, y(v) + 4, "end", v === ceiling ? `${v} %` : v),
    ]);
    const ends = [0, count - 1].map((i) =>
      write(x(i), H - 5, i ? "end" : "start", first + i));
    const lines = series.map(({ values }) =>
      svg("polyline", {
        points: values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" "),
        class: "explorable-line-of",
      }));
    const cursor = svg("line", { y1: top, y2: H - bottom, class: "explorable-cursor" });
    const dot = svg("circle", { r: 5, class: "explorable-dot" });
    const value = write(0, 0, "start", "", "is-value");
    const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, "aria-hidden": "true" },
      ...grid, ...ends, cursor, ...lines, dot, value);
    const keys = series.map((s) => element("li", {}, s.name));
    const node = element("div", { class: "explorable-curve" },
      element("p", { class: "explorable-caption" }, title), drawing,
      series.length > 1 ? element("ul", { "aria-hidden": "true" }, ...keys) : "");

    const pick = (event) => {
      const area = drawing.getBoundingClientRect();
      const at = (W * (event.clientX - area.left)) / area.width;
      const index = Math.round(((at - left) / (W - left - right)) * (count - 1));
      if (onPick) onPick(Math.min(Math.max(index, 0), count - 1));
    };
    drawing.addEventListener("pointerdown", (event) => {
      drawing.setPointerCapture(event.pointerId);
      pick(event);
    });
    drawing.addEventListener("pointermove", (event) => event.buttons && pick(event));

    return {
      node,
      set(number, index) {
        lines.forEach((line, i) => line.classList.toggle("is-chosen", i === number));
        keys.forEach((key, i) => key.classList.toggle("is-chosen", i === number));
        drawing.insertBefore(lines[number], dot); // on top of the others
        const v = series[number].values[index];
        [cursor, dot].forEach((part, i) => {
          (i ? ["cx"] : ["x1", "x2"]).forEach((name) => part.setAttribute(name, x(index)));
        });
        dot.setAttribute("cy", y(v));
        const leftwards = index > 0.8 * count;
        value.setAttribute("x", x(index) + (leftwards ? -9 : 9));
        value.setAttribute("text-anchor", leftwards ? "end" : "start");
        value.setAttribute("y", Math.max(y(v) - 8, top + 4));
        value.textContent = `${v.toFixed(1)} %`;
      },
    };
  }

  /* -------------------------------------------------------------------------------- controls */

  function helpers(root) {
    const live = element("p", { class: "explorable-status", role: "status", "aria-live": "polite" });
    let spoken = 0;

    /** Says in one sentence what is seen now; shown below the figure, read out when it rests. */
    function status(text) {
      if (!live.parentNode) root.append(live);
      window.clearTimeout(spoken);
      // A slider that is dragged says only where it stops.
      if (!live.textContent) live.textContent = text;
      else spoken = window.setTimeout(() => (live.textContent = text), 120);
    }

    function slider({ label, min, max, step = 1, value = min, text = String, onInput }) {
      const id = unique("slider");
      // Not an <output>: that would be read out besides the slider's own value and the status.
      const output = element("span", { class: "explorable-value", "aria-hidden": "true" });
      const input = element("input", { type: "range", id, min, max, step, value });
      const show = () => {
        const shown = text(Number(input.value));
        output.textContent = shown;
        input.setAttribute("aria-valuetext", shown);
        const share = (input.value - input.min) / (input.max - input.min || 1);
        input.style.setProperty("--filled", `${100 * share}%`);
      };
      input.addEventListener("input", () => {
        show();
        if (onInput) onInput(Number(input.value));
      });
      show();
      const words = element("label", { for: id }, label);
      const head = element("div", { class: "explorable-head" }, words, output);
      const node = element("div", { class: "explorable-slider" }, head, input);
      return {
        node, input,
        get value() { return Number(input.value); },
        label: (name) => (words.textContent = name),
        /** Moves the slider as a reader would. */
        set(v) {
          input.value = v;
          input.dispatchEvent(new Event("input", { bubbles: true }));
        },
        /** Moves it without telling anybody. */
        show(v) {
          input.value = v;
          show();
        },
      };
    }

    function choice({ label, options, value = options[0].value, onChange, list }) {
      const tell = (v) => onChange && onChange(v);
      if (list || (list === undefined && options.length > 5)) {
        const id = unique("choice");
        const select = element("select", { id },
          ...options.map((o) => element("option", { value: String(o.value) }, o.text)));
        const find = () => options[select.selectedIndex].value;
        const index = (v) => options.findIndex((o) => o.value === v);
        select.selectedIndex = index(value);
        select.addEventListener("change", () => tell(find()));
        const node = element("div", { class: "explorable-select" },
          element("label", { for: id }, label), select);
        return {
          node, input: select,
          get value() { return find(); },
          set(v) { this.show(v); tell(v); },
          show: (v) => (select.selectedIndex = index(v)),
        };
      }
      const name = unique("choice");
      const inputs = options.map((o) => {
        const input = element("input", { type: "radio", name, value: String(o.value) });
        input.checked = o.value === value;
        input.addEventListener("change", () => tell(o.value));
        return input;
      });
      const labels = options.map((o, i) =>
        element("label", { title: o.title }, inputs[i], element("span", {}, o.text)));
      const lines = new Map(); // options may stand in several lines, each with a name
      options.forEach((o, i) => lines.set(o.group, [...(lines.get(o.group) || []), labels[i]]));
      const node = element("fieldset", { class: "explorable-choice" },
        element("legend", {}, label),
        ...[...lines].map(([group, members]) =>
          element("div", { class: "explorable-options" },
            ...(group ? [element("span", { class: "explorable-line" }, group)] : []), ...members)));
      return {
        node, inputs,
        get value() { return options[inputs.findIndex((input) => input.checked)].value; },
        set(v) { this.show(v); tell(v); },
        show: (v) => (inputs[options.findIndex((o) => o.value === v)].checked = true),
      };
    }

    function toggle({ label, value = false, onChange }) {
      const input = element("input", { type: "checkbox", role: "switch" });
      input.checked = value;
      input.addEventListener("change", () => onChange && onChange(input.checked));
      const node = element("label", { class: "explorable-toggle" }, input,
        element("span", { class: "explorable-track", "aria-hidden": "true" }),
        element("span", {}, label));
      return {
        node, input,
        get value() { return input.checked; },
        set(v) { input.checked = v; if (onChange) onChange(v); },
        show: (v) => (input.checked = v),
      };
    }

    function button({ label, onClick }) {
      const node = element("button", { type: "button", class: "explorable-button" }, label);
      node.addEventListener("click", () => onClick());
      return { node };
    }

    /** A button that moves a slider from its place to the end, step by step. It is left out for
        readers who asked for less motion. */
    function play(target, { label = "Play", pause = "Pause", every = 500 } = {}) {
      let timer = 0;
      const stop = () => {
        window.clearInterval(timer);
        timer = 0;
        node.textContent = label;
      };
      const advance = () => {
        const next = target.value + Number(target.input.step);
        if (next > Number(target.input.max)) stop();
        else target.set(next);
      };
      const { node } = button({
        label,
        onClick: () => {
          if (timer) return stop();
          if (target.value >= Number(target.input.max)) target.set(Number(target.input.min));
          node.textContent = pause;
          timer = window.setInterval(advance, every);
        },
      });
      // Whoever takes the slider has the slider.
      ["pointerdown", "keydown"].forEach((kind) => target.input.addEventListener(kind, stop));
      const hide = () => { stop(); node.hidden = stillness.matches; };
      stillness.addEventListener("change", hide);
      hide();
      return { node, stop };
    }

    /** Names beside their colours: `[{label, colour}]`. */
    function legend(entries) {
      const node = element("ul", { class: "explorable-legend" });
      const set = (list) =>
        node.replaceChildren(
          ...list.map(({ label, colour }) => {
            const swatch = element("span", { class: "explorable-swatch", "aria-hidden": "true" });
            swatch.style.background = colour;
            return element("li", {}, swatch, label);
          })
        );
      set(entries);
      return { node, set };
    }

    const group = (...parts) => element("div", { class: "explorable-group" }, ...parts);
    const controls = (...parts) => {
      const node = element("div", { class: "explorable-row is-controls" }, ...parts);
      root.append(node);
      return node;
    };
    const row = (...parts) => {
      const node = element("div", { class: "explorable-row" }, ...parts);
      root.append(node);
      return node;
    };

    return {
      element, svg, load, labels, cut, blend, picture, curve, slider, choice, toggle, button, play,
      legend, status, group, controls, row,
    };
  }

  window.Explorable = { register };
})();
