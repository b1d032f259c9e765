/* Instance-wise examples: choose an object or a proposal of a scene, and see what is cut out of it
   and how either stage of training labels the crop. */

Explorable.register("instances", (root, data, ui) => {
  "use strict";
  const { width, height, resize, boxes, context } = data;
  const objects = boxes.filter((b) => b.rank === null);
  const STAGES = ["stage 1", "stage 2"];

  /* The scene has a margin, because enlarged boxes reach beyond it. */
  const beyond = boxes.flatMap(({ cuts: { warped: { box: [x0, y0, x1, y1] } } }) =>
    [-x0, -y0, x1 - width, y1 - height]);
  const MARGIN = Math.max(0, ...beyond) + 4;
  const scene = ui.picture({
    width: width + 2 * MARGIN, height: height + 2 * MARGIN, size: 330,
    caption: `the scene, the box, and the box × ${context} (dashed)`,
  });
  scene.frame.classList.add("instances-scene");
  ui.load(data.image).ready.then((image) =>
    scene.canvas.getContext("2d").drawImage(image, MARGIN, MARGIN));
  const shifted = ([x0, y0, x1, y1], kind) =>
    ({ x0: x0 + MARGIN, y0: y0 + MARGIN, x1: x1 + MARGIN, y1: y1 + MARGIN, kind });

  const small = { width: resize, height: resize, size: 144, pixelated: true };
  const crop = ui.picture(small);
  const stages = STAGES.map(() => ui.picture(small));

  const title = (b) => (b.rank === null ? b.object : `proposal ${b.rank}`);
  const choice = ui.choice({
    label: "What is cut out", value: 0, list: false,
    options: boxes.map((b, i) => ({
      value: i,
      text: b.rank === null ? b.object : `${b.rank}`,
      group: b.rank === null ? "object" : "proposal no.",
    })),
    onChange: update,
  });
  choice.inputs.forEach((input, i) => input.setAttribute("aria-label", title(boxes[i])));
  const shape = ui.choice({
    label: "Shape of the box", value: "warped",
    options: [
      { value: "warped", text: "kept, then warped (paper)" },
      { value: "square", text: "made square first (release)" },
    ],
    onChange: update,
  });

  const list = (names) =>
    names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.slice(-1)}`;
  const percent = (share) => `${share < 0.095 ? (100 * share).toFixed(1) : Math.round(100 * share)} %`;
  const sides = ([x0, y0, x1, y1]) => `${x1 - x0} × ${y1 - y0}`;
  const shareOf = (b) => data.shares[objects.findIndex((o) => o.object === b.object)];

  /** What a stage makes of this box, in a few words. */
  function verdict(b, stage) {
    if (b.rank === null) {
      if (stage === 1) return "takes proposals only";
      return b.difficult ? "leaves it out: it is marked difficult" : "trains on it";
    }
    if (stage === 0) return "takes objects’ boxes only";
    const enough = b.iou >= data.min_overlap;
    const iou = `IoU ${b.iou.toFixed(2)} ${enough ? "≥" : "<"} ${data.min_overlap}`;
    return `${enough ? "trains on it" : "leaves it out"}: ${iou}`;
  }

  function update() {
    const b = boxes[choice.value];
    const cut = b.cuts[shape.value];
    const others = objects.filter((o) => o !== b).map((o) => shifted(o.box, "muted"));
    scene.boxes([...others, shifted(cut.box, "context"), shifted(b.box, "main")]);
    scene.alt(`The scene with the ${list(objects.map((o) => o.object))}; boxed: ${title(b)}.`);

    crop.draw(cut.crop);
    crop.caption(ui.element("span", {}, ui.element("b", {}, "the crop"), ` ${resize} × ${resize} pixels`));
    crop.alt(`The crop around ${title(b)}.`);
    stages.forEach((picture, i) => {
      const { labels, names, classes } = cut.stages[i];
      picture.draw(labels);
      picture.names(names);
      picture.caption(ui.element("span", {}, ui.element("b", {}, STAGES[i]), ` ${verdict(b, i)}`));
      picture.alt(`Labels in ${STAGES[i]}: ${classes.length ? `${list(classes)} on background` : "background only"}.`);
    });

    const [one, two] = cut.stages.map((s) => list(s.classes) || "nothing but background");
    const who = b.rank === null
      ? `The ${b.object}.`
      : `Proposal ${b.rank}, which overlaps the ${b.object} with an IoU of ${b.iou.toFixed(2)}.`;
    const outside = cut.box[0] < 0 || cut.box[1] < 0 || cut.box[2] > width || cut.box[3] > height;
    ui.status(
      `${who} Its box of ${sides(b.box)} pixels grows to ${sides(cut.box)} and becomes `
      + `${resize} × ${resize}. The ${b.object} covers ${percent(shareOf(b))} of the scene and `
      + `${percent(cut.share)} of the crop. Labelled in stage 1: ${one}; in stage 2: ${two}.`
      + (outside ? " Outside the scene: black, and void." : "")
    );
  }

  /* A click into the scene takes the smallest box around that point, an object's first; another
     click at the same point takes the next one. */
  let clicked = [-99, -99];
  scene.frame.addEventListener("click", (event) => {
    const area = scene.canvas.getBoundingClientRect();
    const x = ((event.clientX - area.left) / area.width) * (width + 2 * MARGIN) - MARGIN;
    const y = ((event.clientY - area.top) / area.height) * (height + 2 * MARGIN) - MARGIN;
    const size = ({ box: [x0, y0, x1, y1] }) => (x1 - x0) * (y1 - y0);
    const around = boxes
      .filter(({ box: [x0, y0, x1, y1] }) => x0 <= x && x < x1 && y0 <= y && y < y1)
      .sort((a, b) => (a.rank !== null) - (b.rank !== null) || size(a) - size(b));
    if (!around.length) return;
    const again = Math.hypot(x - clicked[0], y - clicked[1]) < 3;
    const next = again ? (around.indexOf(boxes[choice.value]) + 1) % around.length : 0;
    clicked = [x, y];
    choice.set(boxes.indexOf(around[next]));
  });

  boxes.forEach((b) => Object.values(b.cuts).forEach((cut) => {
    [cut.crop, ...cut.stages.map((s) => s.labels)].forEach(ui.load);
  }));
  ui.controls(choice);
  ui.controls(shape);
  const crops = ui.element("div", { class: "instances-crops" }, crop, ...stages);
  ui.row(scene, crops).classList.add("is-instances");
  ui.row(ui.legend(data.legend));
  update();
});
