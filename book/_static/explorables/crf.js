/* The dense CRF: how a label map changes with each iteration, for a small grid of settings. */

Explorable.register("crf", (root, data, ui) => {
  "use strict";
  const { classes, scenes, iterations, gaussian_weights: weights, sigmas_rgb: sigmas } = data;
  const list = (names) =>
    names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.slice(-1)}`;
  const named = (labels) => list(labels.map((i) => classes[i].name));
  const tags = (names) => names.map(([label, x, y]) => ({ x, y, text: classes[label].name }));
  let scene = scenes[0], curve = null, turn = 0;

  const size = { width: scene.width, height: scene.height };
  const map = ui.picture({ ...size, size: 360, pixelated: true });
  const photo = ui.picture({ ...size, size: 160, caption: "the photograph" });
  const truth = ui.picture({ ...size, size: 160, pixelated: true, caption: "the truth" });
  const curves = ui.element("div");
  const legend = ui.legend([]);

  const number = ui.slider({
    label: "Iterations", min: 0, max: iterations, value: 0,
    text: (n) => (n ? `${n} of ${iterations}` : "0, the networks alone"), onInput: update,
  });
  const weight = ui.choice({
    label: "Gaussian kernel: weight", value: data.default[0],
    options: weights.map((value) => ({ value, text: value ? String(value) : "0, off" })),
    onChange: change,
  });
  const sigma = ui.choice({
    label: "Bilateral kernel: width in grey levels", value: data.default[1],
    options: sigmas.map((value) => ({ value, text: value === null ? "off" : String(value) })),
    onChange: change,
  });
  const which = ui.choice({
    label: "Scene", value: 0, list: false,
    options: scenes.map((s, value) => ({ value, text: s.name })), onChange: enter,
  });

  const setting = () =>
    scene.settings[weights.indexOf(weight.value) * sigmas.length + sigmas.indexOf(sigma.value)];

  async function over(uri, index) {
    const [ground, labels] = await Promise.all(
      [ui.cut(scene.image, 0, scene.height), ui.cut(uri, index, scene.height)]);
    return ui.blend(ground, labels);
  }

  function enter() {
    scene = scenes[which.value];
    const now = scene;
    photo.draw(scene.image);
    photo.alt(`The photograph: ${scene.name}.`);
    over(scene.truth, 0).then((shown) => {
      if (now !== scene) return;
      truth.draw(shown);
      truth.names(tags(scene.names));
    });
    truth.alt(`The true labels: ${scene.name}.`);
    change();
  }

  function change() {
    const { miou } = setting();
    const networks = miou.map(() => miou[0]);
    curve = ui.curve({
      title: "mean IoU by iteration",
      series: [{ name: "with the CRF", values: miou }, { name: "networks alone", values: networks }],
      onPick: (i) => number.set(i),
    });
    curves.replaceChildren(curve.node);
    update();
  }

  function update() {
    const n = number.value, { strip, miou, found, names, changed } = setting();
    const mine = ++turn;
    over(strip, n).then((shown) => {
      if (mine !== turn) return;
      map.draw(shown);
      map.names(tags(names[n]));
    });
    const after = n ? `after ${n} iteration${n > 1 ? "s" : ""}` : "of the networks alone";
    map.alt(`Label map ${after}: ${named(found[n]) || "background only"}.`);
    map.caption(n ? after : "the networks alone, no CRF yet");
    curve.set(0, n);
    legend.set(found[n].map((c) => ({ label: classes[c].name, colour: classes[c].colour })));

    const gain = miou[n] - miou[0];
    const verdict = !n ? "" : Math.abs(gain) < 0.05 ? ", as much as before"
      : `, ${Math.abs(gain).toFixed(1)} points ${gain > 0 ? "more" : "less"} than the networks alone`;
    const moved = n ? ` Iteration ${n} changed ${changed[n].toFixed(1)}\u00a0% of the pixels.` : "";
    const gone = found[0].filter((c) => !found[n].includes(c));
    const lost = gone.length ? ` No longer found: ${named(gone)}.` : "";
    ui.status(`Label map ${after}: mean IoU ${miou[n].toFixed(1)}\u00a0%${verdict}.${moved} `
      + `Found: ${named(found[n]) || "nothing but background"}.${lost}`);
  }

  ui.controls(which);
  ui.controls(weight, sigma);
  ui.controls(number, ui.play(number, { every: 700 })).classList.add("is-player");
  const pair = ui.element("div", { class: "maps-pair" }, photo.node, truth.node);
  const aside = ui.element("div", { class: "explorable-aside" }, curves, pair);
  ui.row(map, aside).classList.add("is-maps");
  ui.row(legend);
  enter();
});
