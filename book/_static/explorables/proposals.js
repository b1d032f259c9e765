/* Proposals: the label map of a scene as one proposal after the other is pasted into it. */

Explorable.register("proposals", (root, data, ui) => {
  "use strict";
  const { classes, scenes } = data;
  const WAYS = { max: "maximum", sum: "sum" };
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
    label: "Proposals", min: 1, max: scene.boxes.length, value: 1,
    text: (n) => `${n} of ${scene.boxes.length}`, onInput: update,
  });
  const way = ui.choice({
    label: "Merged by", value: "max",
    options: Object.entries(WAYS).map(([value, text]) => ({ value, text })), onChange: update,
  });
  const which = ui.choice({
    label: "Scene", value: 0, list: false,
    options: scenes.map((s, value) => ({ value, text: s.name })), onChange: enter,
  });

  async function over(uri, index) {
    const [photo, labels] = await Promise.all(
      [ui.cut(scene.image, 0, scene.height), ui.cut(uri, index, scene.height)]);
    return ui.blend(photo, labels);
  }

  function enter() {
    scene = scenes[which.value];
    const now = scene;
    ["max", "sum"].forEach((w) => ui.load(scene[w].strip));
    number.input.max = scene.boxes.length;
    photo.draw(scene.image);
    photo.alt(`The photograph: ${scene.name}.`);
    over(scene.truth, 0).then((shown) => {
      if (now !== scene) return;
      truth.draw(shown);
      truth.names(tags(scene.names));
    });
    truth.alt(`The true labels: ${scene.name}.`);
    curve = ui.curve({
      title: "mean IoU by number of proposals", first: 1,
      series: Object.entries(WAYS).map(([w, name]) => ({ name, values: scene[w].miou })),
      onPick: (i) => number.set(i + 1),
    });
    curves.replaceChildren(curve.node);
    number.set(number.value);
  }

  function update() {
    const n = number.value, i = n - 1, w = way.value;
    const { strip, miou, found, names } = scene[w];
    const [x0, y0, x1, y1] = scene.boxes[i];
    const mine = ++turn;
    over(strip, i).then((shown) => {
      if (mine !== turn) return;
      map.draw(shown);
      map.names(tags(names[i]));
      map.boxes([{ x0, y0, x1, y1, kind: "last" }]);
    });
    const many = `${n} proposal${n > 1 ? "s" : ""}`;
    map.alt(`Label map of ${many}, merged by ${WAYS[w]}: ${named(found[i]) || "background only"}. `
      + `The last box is ${x1 - x0} by ${y1 - y0} pixels.`);
    map.caption(`${many}; the box is the last one, × 1.2`);
    curve.set(Object.keys(WAYS).indexOf(w), i);
    legend.set(found[i].map((c) => ({ label: classes[c].name, colour: classes[c].colour })));

    const before = i ? miou[i] - miou[i - 1] : 0;
    const change = !i ? "" : Math.abs(before) < 0.05 ? " The last box changed nothing of that."
      : ` The last box ${before > 0 ? "won" : "lost"} ${Math.abs(before).toFixed(1)} points.`;
    ui.status(`${many}, merged by ${WAYS[w]}: mean IoU ${miou[i].toFixed(1)}\u00a0%.${change} `
      + `The boxes have reached ${scene.reached[i]}\u00a0% of the pixels. `
      + `Found: ${named(found[i]) || "nothing but background"}.`);
  }

  ui.controls(which, way);
  ui.controls(number, ui.play(number, { every: 400 })).classList.add("is-player");
  const aside = ui.element("div", { class: "explorable-aside" }, curves,
    ui.element("div", { class: "maps-pair" }, photo.node, truth.node));
  ui.row(map, aside).classList.add("is-maps");
  ui.row(legend);
  enter();
});
