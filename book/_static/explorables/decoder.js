/* The decoder: every layer's map, from a single point to the whole crop. */

Explorable.register("decoder", (root, data, ui) => {
  "use strict";
  const { size, layers, classes, crops } = data;
  const LAST = layers.length - 1;
  const KINDS = ["mean", "strongest", "2nd", "3rd", "4th"];
  const { element } = ui;
  let crop = crops[0], turn = 0;

  const input = ui.picture({ width: size, height: size, size: 160, pixelated: true });
  const map = ui.picture({ width: 1, height: 1, size: 300, pixelated: true });
  map.node.classList.add("is-wide");
  const answer = ui.picture({ width: size, height: size, size: 160, pixelated: true });
  const legend = ui.legend([]);
  const ramp = element("span");
  const most = element("b");
  const scale = element("div", { class: "decoder-scale" }, "0", ramp, most);

  const which = ui.choice({
    label: "Crop", value: 0, list: false,
    options: crops.map((c, value) => ({ value, text: c.name })),
    onChange: () => { crop = crops[which.value]; object.set(strongest()); },
  });
  const switches = ui.toggle({ label: "Switches", value: true, onChange: redraw });
  const layer = ui.slider({
    label: "Layer", min: 0, max: LAST, value: Math.floor(LAST / 2), // a shape, no longer a point
    text: (i) => `${layers[i].name}, ${layers[i].size} × ${layers[i].size}`, onInput: update,
  });
  const channel = ui.choice({
    label: "Channel", value: 0,
    options: KINDS.map((text, value) => ({ value, text })), onChange: redraw,
  });
  const object = ui.choice({
    label: "Class at the last layer", list: true, value: strongest(),
    options: classes.map((c, value) => ({ value, text: c.name })), onChange: redraw,
  });

  /** The class that most of the object's pixels get, if the switches are there. */
  function strongest() {
    return crop.on.found.reduce((best, share, c) => (c && share > crop.on.found[best] ? c : best), 1);
  }

  const way = () => (switches.value ? crop.on : crop.off);
  const shown = (i) => (i === LAST ? object.value : channel.value); // which map of a strip
  const cutOut = (i) => ui.cut(way().strips[i], shown(i), layers[i].size);

  /* ---------------------------------------------------------------------------- the film */

  const film = layers.map(({ size: side }, i) => {
    const canvas = element("canvas", { width: side, height: side });
    return { canvas, node: element("div", { onClick: () => layer.set(i) }, canvas, String(side)) };
  });
  const strip = element("div", { class: "decoder-strip", "aria-hidden": "true" }, ...film);

  async function redraw() {
    const mine = ++turn;
    update();
    const pictures = await Promise.all(layers.map((_, i) => cutOut(i)));
    if (mine !== turn) return;
    film.forEach(({ canvas }, i) => canvas.getContext("2d").putImageData(pictures[i], 0, 0));
  }

  /* ------------------------------------------------------------------------- the pictures */

  function what(i) {
    const { name, channels } = layers[i];
    if (i === LAST) return `probability of “${classes[object.value].name}”`;
    if (channel.value === 0) return `mean of ${channels} channels`;
    return `channel ${crop.channels[i][channel.value - 1] + 1} of ${channels}`;
  }

  function why(i) {
    const { name, size: side } = layers[i];
    if (name === "fc7") return "One point: numbers without a place.";
    if (name === "fc6-deconv") return `A first deconvolution gives the point an extent of ${side} × ${side}.`;
    if (i === LAST) return "The scores of the classes, as probabilities.";
    if (!name.startsWith("unpool")) return "A deconvolution fills the gaps with what its filters have learnt.";
    return switches.value
      ? "Unpooling puts each value where the encoder found its maximum, and 0 around it."
      : "Without switches each value goes to the upper left of its window, wherever it came from.";
  }

  let drawn = 0;
  async function update() {
    const mine = ++drawn, i = layer.value, { name, size: side } = layers[i];
    const { labels, found, bright } = way();
    const list = found.map((share, c) => ({ share, c })).filter(({ share, c }) => c && share >= 1)
      .sort((a, b) => b.share - a.share);
    const words = list.map(({ share, c }) => `${classes[c].name} ${share}\u00a0%`).join(", ") || "background only";
    channel.node.hidden = i === LAST;
    object.node.hidden = i !== LAST;
    film.forEach(({ node }, k) => node.classList.toggle("is-chosen", k === i));

    input.alt(`The crop that the network sees: a ${crop.name}.`);
    input.caption("crop");
    map.alt(`${name}, ${side} by ${side}, ${what(i)}, ${switches.value ? "with" : "without"} switches. `
      + `${bright[i][shown(i)]}\u00a0% of it is brighter than half.`);
    map.caption(`${name}, ${side} × ${side}: ${what(i)}`);
    answer.alt(`The network's answer ${switches.value ? "with" : "without"} switches: ${words}.`);
    answer.caption(`answer ${switches.value ? "with" : "without"} switches`);
    most.textContent = i === LAST ? "1" : "its maximum with switches";
    legend.set(list.map(({ c }) => ({ label: classes[c].name, colour: classes[c].colour })));
    ui.status(`Layer ${i + 1} of ${layers.length}, ${name}: ${side} × ${side}, ${what(i)}, `
      + `${switches.value ? "with" : "without"} switches. ${why(i)} `
      + `${bright[i][shown(i)]}\u00a0% of this map is brighter than half. Answer: ${words}.`);

    input.draw(crop.image);
    const [picture, photo, colours] = await Promise.all(
      [cutOut(i), ui.cut(crop.image, 0, size), ui.cut(labels, 0, size)]);
    if (mine !== drawn) return;
    map.draw(picture);
    answer.draw(ui.blend(photo, colours));
  }

  ramp.style.background = `linear-gradient(to right, ${data.shades.join(", ")})`;
  ui.controls(which, switches);
  const pictures = element("div", { class: "decoder-row" }, input.node, map.node, answer.node);
  const box = element("div", { class: "decoder-film" }, strip, layer.node);
  box.style.setProperty("--layers", layers.length);
  root.append(pictures, scale, box);
  ui.controls(channel, object, ui.play(layer, { every: 700 }));
  ui.row(legend);
  redraw();
});
