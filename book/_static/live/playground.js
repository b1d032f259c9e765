/* The playground: compose a scene, and see what every stage of the decoder makes of it. */

Explorable.register("playground", (root, data, ui) => {
  "use strict";
  const { element } = ui;
  const { classNames, colours, outlines, network: file, megabytes } = data;
  const scene = LiveScene(data);
  const { SIDE } = scene;
  const INPUT = 64, CONTEXT = 1.2; // as the network was trained, and as its boxes are enlarged
  const LIVELY = 120; // ms; a slower machine waits until the hand rests
  const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
  const percent = (v) => `${Math.round(100 * v)} %`;
  const named = (name) => `${/^[aeiou]/.test(name) ? "an" : "a"} ${name}`;
  const css = ([r, g, b]) => `rgb(${r}, ${g}, ${b})`;

  /* ------------------------------------------------------------------------------ what there is */

  const shape = (name, x, y, size, angle, seed) =>
    ({ label: classNames.indexOf(name), x, y, size, angle, seed });
  const STARTS = { // picked among many colours and grounds, so that the network is right at first
    star: { ground: 5, items: [shape("star", 0.5, 0.5, 0.8, 20, 8)] },
    sizes: {
      ground: 3, items: [shape("square", 0.4, 0.42, 0.62, 20, 3), shape("ring", 0.82, 0.82, 0.22, 0, 4)],
    },
    hidden: {
      ground: 5, items: [shape("triangle", 0.42, 0.5, 0.74, 0, 6), shape("disc", 0.8, 0.5, 0.36, 0, 11)],
    },
    thin: { ground: 4, items: [shape("frame", 0.5, 0.5, 0.8, 15, 3)] },
  };

  const state = { ...start("star"), view: "scene", switches: true, shown: "mean" };
  let painted, box, crop, network = null, seed = 100;

  function start(name) {
    const { ground, items } = STARTS[name];
    return { ground, items: items.map((item) => ({ ...item })), chosen: items.length - 1 };
  }

  const chosen = () => state.items[state.chosen];
  const nameOf = (item) => (item.picture ? "your picture" : classNames[item.label]);

  /* ------------------------------------------------------------------------------ the scene's part */

  const stage = ui.picture({ width: SIDE, height: SIDE, size: 320, alt: "The scene" });
  const board = stage.frame;
  board.classList.add("live-stage");
  board.tabIndex = 0;
  board.setAttribute("role", "application");
  board.setAttribute("aria-label", "The scene. Arrow keys move the chosen shape, plus and minus " +
    "change its size, R turns it, Delete removes it, N chooses the next one.");

  const palette = element("div", { class: "live-palette", role: "group", "aria-label": "Put a shape into the scene" },
    ...outlines.map((outline, i) => paletteButton(outline, i + 1)));

  function paletteButton(outline, label) {
    const canvas = element("canvas", { width: 56, height: 56, "aria-hidden": "true" });
    const pen = canvas.getContext("2d");
    pen.translate(28, 28);
    pen.scale(25, 25);
    pen.fillStyle = "#6f7c8a"; // seen on dark and on light
    scene.fill(pen, outline);
    const button = element("button", { type: "button", "aria-label": `Add ${named(outline.name)}` },
      canvas, element("span", { "aria-hidden": "true" }, outline.name));
    let dragged = null;
    button.addEventListener("click", () => {
      if (dragged === null) add(label);
      dragged = null;
    });
    button.addEventListener("pointerdown", (event) => {
      dragged = null;
      if (event.pointerType !== "touch") button.setPointerCapture(event.pointerId);
    });
    button.addEventListener("pointermove", (event) => {
      if (!button.hasPointerCapture(event.pointerId) || !event.buttons) return;
      const [x, y] = at(event);
      const inside = x > 0 && x < 1 && y > 0 && y < 1;
      if (dragged === null && inside) dragged = add(label, x, y);
      else if (dragged) move(dragged, x, y);
    });
    return button;
  }

  const at = ({ clientX, clientY }) => {
    const { left, top, width, height } = board.getBoundingClientRect();
    return [(clientX - left) / width, (clientY - top) / height];
  };

  const pick = ui.choice({
    label: "Chosen", list: true, options: [{ value: 0, text: "" }],
    onChange: (i) => choose(Number(i)),
  });
  const across = ui.slider({
    label: "Across", min: 0, max: 100, text: (v) => `${v} %`, onInput: (v) => change({ x: v / 100 }),
  });
  const down = ui.slider({
    label: "Down", min: 0, max: 100, text: (v) => `${v} %`, onInput: (v) => change({ y: v / 100 }),
  });
  const size = ui.slider({
    label: "Size", min: 8, max: 130, text: (v) => `${v} % of the scene`,
    onInput: (v) => change({ size: v / 100 }),
  });
  const angle = ui.slider({
    label: "Rotation", min: 0, max: 360, step: 5, text: (v) => `${v}°`,
    onInput: (v) => change({ angle: v }),
  });
  const recolour = ui.button({ label: "Other colours", onClick: () => change({ seed: ++seed }) });
  const remove = ui.button({ label: "Remove", onClick: () => removeChosen() });
  const front = ui.button({
    label: "Bring to the front",
    onClick: () => {
      if (!chosen()) return;
      state.items.push(...state.items.splice(state.chosen, 1));
      choose(state.items.length - 1);
    },
  });
  const reground = ui.button({
    label: "Other ground", onClick: () => { state.ground = (state.ground + 1) % 1000; refresh(); },
  });
  const upload = element("input", { type: "file", accept: "image/*" });
  upload.addEventListener("change", () => takePicture(upload.files[0]));
  const ownPicture = element("label", { class: "explorable-button live-file" },
    upload, element("span", {}, "A picture of your own …"));
  const trouble = element("p", { class: "live-trouble", role: "alert" });

  async function takePicture(found) {
    trouble.textContent = "";
    if (!found) return;
    try {
      const picture = await createImageBitmap(found);
      state.items = state.items.filter((item) => !item.picture);
      state.items.unshift({ picture, label: 0, x: 0.5, y: 0.5, size: 1, angle: 0, seed: 0 });
      choose(0);
    } catch {
      trouble.textContent = `Your browser cannot read ${found.name} as a picture.`;
    }
    upload.value = ""; // the same file may be chosen again
  }

  function add(label, x = 0.5, y = 0.5) {
    const item = { label, x, y, size: 0.45, angle: 0, seed: ++seed };
    state.items.push(item);
    choose(state.items.length - 1);
    return item;
  }

  function removeChosen() {
    if (!chosen()) return;
    state.items.splice(state.chosen, 1);
    choose(state.items.length - 1);
  }

  function choose(i) {
    state.chosen = i;
    refresh();
  }

  function change(fields) {
    if (!chosen()) return;
    Object.assign(chosen(), fields);
    refresh();
  }

  const move = (item, x, y) => {
    Object.assign(item, { x: clamp(x, 0, 1), y: clamp(y, 0, 1) });
    refresh();
  };

  /** The topmost item at a place of the scene; a thin one also a little beside it. */
  function itemAt(x, y) {
    const near = [[0, 0], [3, 0], [-3, 0], [0, 3], [0, -3]];
    for (const [dx, dy] of near) {
      const column = Math.floor(x * SIDE) + dx, row = Math.floor(y * SIDE) + dy;
      if (column < 0 || row < 0 || column >= SIDE || row >= SIDE) continue;
      for (let i = state.items.length - 1; i >= 0; i--) {
        if (painted.covers[i][row * SIDE + column] >= 0.5) return i;
      }
    }
    return -1;
  }

  let grip = null; // the item under the pointer, and where it was taken
  board.addEventListener("touchstart", (event) => {
    // A finger on a shape moves the shape, beside it the page.
    if (itemAt(...at(event.touches[0])) >= 0) event.preventDefault();
  }, { passive: false });
  board.addEventListener("pointerdown", (event) => {
    const [x, y] = at(event), i = itemAt(x, y);
    if (i < 0) return;
    board.focus({ preventScroll: true });
    board.setPointerCapture(event.pointerId);
    const item = state.items[i];
    grip = { item, dx: item.x - x, dy: item.y - y };
    choose(i);
    event.preventDefault();
  });
  board.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    if (grip) move(grip.item, x + grip.dx, y + grip.dy);
    else board.style.cursor = itemAt(x, y) >= 0 ? "grab" : "default";
  });
  ["pointerup", "pointercancel"].forEach((kind) =>
    board.addEventListener(kind, () => (grip = null)));

  board.addEventListener("keydown", (event) => {
    const item = chosen();
    if (!item || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = event.shiftKey ? 0.1 : 0.02;
    const keys = {
      ArrowLeft: () => move(item, item.x - step, item.y),
      ArrowRight: () => move(item, item.x + step, item.y),
      ArrowUp: () => move(item, item.x, item.y - step),
      ArrowDown: () => move(item, item.x, item.y + step),
      "+": () => change({ size: Math.min(item.size + 0.05, 1.3) }),
      "-": () => change({ size: Math.max(item.size - 0.05, 0.08) }),
      r: () => change({ angle: (item.angle + 15) % 360 }),
      n: () => choose((state.chosen + 1) % state.items.length),
      Delete: removeChosen,
      Backspace: removeChosen,
    };
    const act = keys[event.key] || keys[event.key.toLowerCase()];
    if (!act) return;
    event.preventDefault();
    act();
  });

  /* ------------------------------------------------------------------------- what the network does */

  const view = ui.choice({
    label: "The network sees",
    options: [
      { value: "scene", text: "the whole scene" },
      { value: "box", text: "the chosen shape's box × 1.2" },
    ],
    value: "scene",
    onChange: (value) => { state.view = value; refresh(); },
  });
  const switches = ui.toggle({
    label: "Switches", value: true, onChange: (on) => { state.switches = on; ask(); },
  });
  const channel = ui.choice({
    label: "Each picture of the decoder shows",
    options: [
      { value: "mean", text: "the mean of all channels" },
      { value: "strongest", text: "the strongest channel" },
    ],
    onChange: (value) => { state.shown = value; if (last) showStages(); },
  });

  const seen = ui.picture({ width: INPUT, height: INPUT, size: 200, pixelated: true });
  const map = ui.picture({ width: INPUT, height: INPUT, size: 320, pixelated: true, alt: "No label map yet" });
  seen.caption(`What the network sees: ${INPUT} × ${INPUT}`);
  stage.caption("The scene: drag a shape");
  map.caption("What the network makes of it: its label map");
  map.node.hidden = true; // the button that loads the network stands in its place
  const strip = element("div", { class: "live-strip", role: "group", "aria-label": "The decoder's stages" });
  const table = element("table", { class: "live-scores" });
  const loader = element("div", { class: "live-loader" });
  const results = element("div", { class: "live-results" });
  results.hidden = true;
  let stages = [], last = null, waiting = 0, running = false, again = false, pace = 0;

  const loadButton = ui.button({ label: `Load the network (${megabytes}\u00a0MB)`, onClick: loadNetwork });
  const loadText = element("p", { role: "status" },
    "It runs here, in your browser. What you draw or choose does not leave this machine.");
  const bar = element("progress", { max: 1, value: 0, "aria-label": "Loading the network" });
  bar.hidden = true;
  loader.append(loadButton.node, bar, loadText);

  async function loadNetwork() {
    loadButton.node.disabled = true;
    bar.hidden = false;
    loadText.textContent = "Loading …";
    try {
      network = await LiveNetwork.load(file, (share) => (bar.value = share));
      loader.hidden = true;
      map.node.hidden = results.hidden = false;
      const hadFocus = [null, document.body, loadButton.node].includes(document.activeElement);
      await ask(true);
      if (hadFocus) switches.input.focus({ preventScroll: true });
    } catch (error) {
      loadButton.node.disabled = false;
      bar.hidden = true;
      loadText.textContent = `The network could not be loaded: ${error.message}`;
    }
  }

  /** Lets the network look at what there is now; if it is busy, afterwards. */
  function ask(now = false) {
    if (!network) return Promise.resolve();
    window.clearTimeout(waiting);
    if (!now && pace > LIVELY) {
      waiting = window.setTimeout(() => ask(true), 150);
      return Promise.resolve();
    }
    if (running) {
      again = true;
      return Promise.resolve();
    }
    running = true;
    const question = { crop, box, truth: scene.cropLabels(painted.labels, box, INPUT) };
    return network.run(crop, state.switches).then((answer) => {
      running = false;
      pace = answer.milliseconds;
      last = { ...question, ...answer };
      showResult();
      if (again) {
        again = false;
        ask();
      }
    });
  }

  /* ------------------------------------------------------------------------------- what is shown */

  const SCALE = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];

  function shade(value) {
    const place = clamp(value, 0, 1) * (SCALE.length - 1), i = Math.min(Math.floor(place), SCALE.length - 2);
    return SCALE[i].map((v, c) => v + (SCALE[i + 1][c] - v) * (place - i));
  }

  /** An `ImageData` from a function of the pixel's number. */
  function drawn(width, height, colourAt) {
    const image = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) image.data.set([...colourAt(i), 255], 4 * i);
    return image;
  }

  function inOneMap({ data: values, channels, height, width }) {
    const area = height * width, mean = new Float32Array(area);
    let strongest = 0, most = -1;
    for (let c = 0; c < channels; c++) {
      let total = 0;
      for (let i = 0; i < area; i++) {
        total += values[c * area + i];
        mean[i] += values[c * area + i] / channels;
      }
      if (total > most) [most, strongest] = [total, c];
    }
    if (state.shown === "mean") return { values: mean, channel: null };
    return { values: values.subarray(strongest * area, (strongest + 1) * area), channel: strongest };
  }

  function showStages() {
    if (!stages.length) {
      stages = last.stages.map(({ width, height }) =>
        ui.picture({ width, height, size: 112, pixelated: true }));
      strip.append(...stages.map((picture) => picture.node));
    }
    last.stages.forEach((map_, i) => {
      const { values, channel: number } = inOneMap(map_);
      const top = Math.max(...values) || 1;
      const { name, width, height } = map_;
      stages[i].draw(drawn(width, height, (k) => shade(values[k] / top)));
      const what = number === null ? `mean of ${map_.channels} channels` : `channel ${number} of ${map_.channels}`;
      stages[i].caption(`${name} ${width}\u00a0×\u00a0${height}`); // the numbers stay in one line
      stages[i].alt(`${name}, ${width} × ${height}, ${what}; ` +
        `${percent(values.filter((v) => v > top / 2).length / values.length)} of it is brighter than half`);
    });
  }

  function read({ scores: { data: scores, channels }, truth }) {
    const area = INPUT * INPUT, labels = new Uint8Array(area);
    const classes = classNames.map((name, label) => ({
      name, label, pixels: 0, true_: 0, both: 0, best: 0, x: 0, y: 0,
    }));
    for (let i = 0; i < area; i++) {
      let top = 0, sum = 0;
      for (let c = 1; c < channels; c++) if (scores[c * area + i] > scores[top * area + i]) top = c;
      for (let c = 0; c < channels; c++) sum += Math.exp(scores[c * area + i] - scores[top * area + i]);
      for (let c = 0; c < channels; c++) {
        const p = Math.exp(scores[c * area + i] - scores[top * area + i]) / sum;
        if (p > classes[c].best) classes[c].best = p;
      }
      labels[i] = top;
      classes[top].pixels++;
      classes[top].x += i % INPUT;
      classes[top].y += Math.floor(i / INPUT);
      if (truth[i] < channels) classes[truth[i]].true_++;
      if (truth[i] === top) classes[top].both++;
    }
    return { labels, classes, known: !truth.includes(255) || !state.items.some((item) => item.picture) };
  }

  /** A pixel of the class, as near to its centre as there is one. */
  function middle(labels, { label, pixels, x, y }) {
    let best = null, least = Infinity;
    labels.forEach((found, i) => {
      if (found !== label) return;
      const far = (i % INPUT - x / pixels) ** 2 + (Math.floor(i / INPUT) - y / pixels) ** 2;
      if (far < least) [least, best] = [far, i];
    });
    return { x: best % INPUT + 0.5, y: Math.floor(best / INPUT) + 0.5, text: classNames[label] };
  }

  function showResult() {
    const { labels, classes, known } = read(last);
    const area = INPUT * INPUT;
    showStages();
    map.draw(drawn(INPUT, INPUT, (i) => [0, 1, 2].map((c) => {
      const pixel = last.crop[c * area + i];
      return labels[i] === 0 ? pixel : 0.35 * pixel + 0.65 * colours[labels[i]][c];
    })));
    const found = classes.slice(1).filter((c) => c.pixels > 0).sort((a, b) => b.pixels - a.pixels);
    const clear = found.filter((c) => c.pixels >= area / 100);
    map.names(clear.slice(0, 4).map((c) => middle(labels, c)));
    const list = clear.map((c) => `${c.name} ${percent(c.pixels / area)}`).join(", ");
    map.alt(list ? `Label map: ${list}, the rest background` : "Label map: all of it background");
    showTable(classes, known);
    say(clear, classes, known);
    root.dispatchEvent(new CustomEvent("segmented", { bubbles: true }));
  }

  const iou = (c) => c.both / (c.pixels + c.true_ - c.both);

  function showTable(classes, known) {
    const rank = (c) => 1e3 * (c.true_ > 0 && known) + c.pixels + c.best;
    const rows = classes.slice(1).sort((a, b) => rank(b) - rank(a)).slice(0, 5);
    const cell = (text) => element("td", {}, text);
    table.replaceChildren(
      element("caption", {}, "The five strongest classes"),
      element("thead", {}, element("tr", {}, ...["class", "of the picture", "highest probability", "IoU with yours"]
        .map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, ...rows.map((c) => {
        const swatch = element("span", { class: "explorable-swatch", "aria-hidden": "true" });
        swatch.style.background = css(colours[c.label]);
        return element("tr", {}, element("th", { scope: "row" }, swatch, c.name),
          cell(percent(c.pixels / INPUT ** 2)), cell(c.best.toFixed(2)),
          cell(known && c.true_ ? iou(c).toFixed(2) : "–"));
      })));
  }

  function say(clear, classes, known) {
    const sees = clear.length
      ? `The network finds ${clear.map((c) => `${named(c.name)} (${percent(c.pixels / INPUT ** 2)} of what it sees)`).join(" and ")}.`
      : "The network finds nothing but background.";
    const yours = known ? classes.slice(1).filter((c) => c.true_) : [];
    const scores = yours.map((c) => `on your ${c.name} it has an IoU of ${iou(c).toFixed(2)}`).join(", ");
    ui.status(sees + (scores ? ` ${scores[0].toUpperCase()}${scores.slice(1)}.` : "") +
      (state.switches ? "" : " The switches are off.") + ` ${Math.round(last.milliseconds)} ms.`);
  }

  /* --------------------------------------------------------------------------------- redrawing */

  let drawing = 0;

  function refresh() {
    window.cancelAnimationFrame(drawing);
    drawing = window.requestAnimationFrame(redraw);
    update();
  }

  /** What must be right at once: the scene's pixels, and what the controls say. */
  function update() {
    painted = scene.paint(state);
    const item = chosen();
    const around = item && scene.boxOf(painted.covers[state.chosen]);
    box = state.view === "box" && around ? scene.expand(around, CONTEXT) : [0, 0, SIDE, SIDE];
    crop = scene.crop(painted.pixels, box, INPUT);
    const edges = ([x0, y0, x1, y1], kind) => ({ x0, y0, x1, y1, kind });
    stage.boxes([
      ...(state.view === "box" && around ? [edges(box, "context")] : []),
      ...(around ? [edges(around, state.view === "box" ? "main" : "muted")] : []),
    ]);
  }

  function redraw() {
    const { pixels } = painted;
    stage.draw(drawn(SIDE, SIDE, (i) => pixels.subarray(3 * i, 3 * i + 3)));
    const area = INPUT * INPUT;
    seen.draw(drawn(INPUT, INPUT, (i) => [crop[i], crop[area + i], crop[2 * area + i]]));
    const inside = state.items.map(nameOf).join(", ") || "nothing on the ground";
    stage.alt(`The scene, from below to the top: ${inside}`);
    seen.alt(`What the network sees: ${state.view === "box" ? "the box around the chosen shape" : "the whole scene"}`);
    const item = chosen();
    pick.input.replaceChildren(...state.items.map((it, i) =>
      element("option", { value: i }, `${i + 1}: ${nameOf(it)}`)));
    pick.input.selectedIndex = state.chosen;
    pick.input.disabled = !item;
    for (const control of [across, down, size, angle]) control.input.disabled = !item;
    for (const control of [recolour, remove, front]) control.node.disabled = !item;
    if (item) {
      across.show(Math.round(100 * item.x));
      down.show(Math.round(100 * item.y));
      size.show(Math.round(100 * item.size));
      angle.show(item.angle);
    }
    ask();
  }
  pick.input.addEventListener("change", (event) => {
    event.stopImmediatePropagation();
    choose(pick.input.selectedIndex);
  }, true);

  /* ------------------------------------------------------------------------------- on the page */

  const beginning = ui.choice({
    label: "Start from", list: true,
    options: [
      { value: "star", text: "one star" },
      { value: "sizes", text: "a large square and a small ring" },
      { value: "hidden", text: "a triangle, partly hidden" },
      { value: "thin", text: "a frame and its hole" },
    ],
    onChange: (name) => { Object.assign(state, start(name)); refresh(); },
  });

  ui.row(stage.node, loader, map.node).classList.add("live-top");
  ui.row(
    element("div", { class: "explorable-group live-controls" },
      element("div", { class: "live-pair" }, beginning.node, pick.node),
      palette, size.node, angle.node, element("div", { class: "live-pair" }, across.node, down.node),
      element("div", { class: "live-buttons" },
        recolour.node, front.node, remove.node, reground.node, ownPicture),
      trouble));
  ui.controls(view.node);
  results.append(
    element("div", { class: "explorable-row" }, seen.node,
      element("div", { class: "live-table" }, table)),
    element("div", { class: "live-switches" }, switches.node, channel.node),
    strip);
  root.append(results);
  refresh();

  /* For tests, and for the curious in the console:
     document.querySelector(".live-model .explorable-body").liveModel */
  root.liveModel = {
    state, refresh, load: loadNetwork,
    run: (pixels, useSwitches) => network.run(pixels, useSwitches),
    get scene() { return painted; },
    get box() { return box; },
    get crop() { return crop; },
    get result() { return last; },
  };
});
