/* Pooling switches: change a number of the input, and its window, its switch and three ways back
   to the input's size light up together. All numbers are computed here, as the package does. */

Explorable.register("switches", (root, data, ui) => {
  "use strict";
  const { element } = ui;
  const SIDE = 4, LOW = -9, HIGH = 9;
  const windowOf = (row, column) => [row >> 1, column >> 1];
  const cells = (side) => Array.from({ length: side * side }, (_, i) => [Math.floor(i / side), i % side]);
  const filled = (side, value) => cells(side).reduce((map, [r, c]) => {
    (map[r] = map[r] || [])[c] = value(r, c);
    return map;
  }, []);

  /* ------------------------------------------------------------------------ the arithmetic */

  function pool(x) {
    const switches = filled(2, (r, c) => {
      let best = 0; // of equal values the first one wins
      for (let place = 1; place < 4; place++) {
        if (at(x, r, c, place) > at(x, r, c, best)) best = place;
      }
      return best;
    });
    return { switches, maxima: filled(2, (r, c) => at(x, r, c, switches[r][c])) };
  }

  const at = (x, r, c, place) => x[2 * r + (place >> 1)][2 * c + (place & 1)];

  const unpool = (maxima, switches) => filled(SIDE, (row, column) => {
    const [r, c] = windowOf(row, column);
    return switches[r][c] === 2 * (row & 1) + (column & 1) ? maxima[r][c] : 0;
  });

  function bilinear(maxima) {
    const blend = (i) => { // the two nearest pooled values of a row, and the second's weight
      const place = Math.min(Math.max((i + 0.5) / 2 - 0.5, 0), 1);
      const low = Math.floor(place);
      return [low, Math.min(low + 1, 1), place - low];
    };
    return filled(SIDE, (row, column) => {
      const [r0, r1, v] = blend(row), [c0, c1, u] = blend(column);
      return (1 - v) * ((1 - u) * maxima[r0][c0] + u * maxima[r0][c1])
        + v * ((1 - u) * maxima[r1][c0] + u * maxima[r1][c1]);
    });
  }

  /* ------------------------------------------------------------------------------- drawing */

  const write = (v) => String(Number(v.toFixed(2))).replace("-", "−");
  const say = (row, column) => `row ${row + 1}, column ${column + 1}`;

  function grid(title, side, extra = "", name = title) {
    const outline = element("div", { class: "switches-window" });
    outline.style.setProperty("--side", side / 2);
    const items = filled(side, () => {
      const fill = element("span", { class: "switches-fill" });
      const number = element("span", { class: "switches-number" });
      return { fill, number, td: element("td", {}, fill, number) };
    });
    const table = element("table", { "aria-label": name },
      element("tbody", {}, ...items.map((row) => element("tr", {}, ...row.map(({ td }) => td)))));
    const cross = element("div", { class: "switches-cross" });
    const note = element("p", {});
    const node = element("div", { class: `switches-map ${side === 2 ? "is-small" : ""} ${extra}` },
      element("div", { class: "switches-title" }, title),
      element("div", { class: "switches-grid" }, table, cross, outline), note);
    return {
      node, items, table, note,
      /** `strength(row, column)`: how strongly a cell is tinted, from 0 to 1. */
      show(values, strength, active) {
        cells(side).forEach(([r, c]) => {
          const { td, number, fill } = items[r][c];
          td.dataset.value = values[r][c];
          number.textContent = write(values[r][c]);
          const [wr, wc] = side === 2 ? [r, c] : windowOf(r, c);
          const near = wr === active[0] && wc === active[1] ? 0.85 : 0.3;
          fill.style.setProperty("--strength", near * strength(r, c));
        });
        outline.style.setProperty("--row", active[0]);
        outline.style.setProperty("--column", active[1]);
      },
    };
  }

  const input = grid("input", SIDE, "is-input");
  const maxima = grid("maxima", 2);
  const switches = grid("switches", 2, "is-code");
  const ways = {
    unpooled: grid("with switches", SIDE, "", "unpooled with switches"),
    corner: grid("without switches", SIDE, "", "unpooled without switches"),
    bilinear: grid("bilinear", SIDE, "", "bilinear upsampling"),
  };

  /* ----------------------------------------------------------------------------- the state */

  let x = data.values.map((row) => [...row]);
  let selected = [1, 0];
  let looked = null; // the window under the mouse

  function update() {
    const pooled = pool(x);
    const corner = filled(2, () => 0);
    const maps = {
      unpooled: unpool(pooled.maxima, pooled.switches),
      corner: unpool(pooled.maxima, corner),
      bilinear: bilinear(pooled.maxima),
    };
    const active = looked || windowOf(...selected);
    const isPeak = (row, column) => {
      const [r, c] = windowOf(row, column);
      return pooled.switches[r][c] === 2 * (row & 1) + (column & 1);
    };
    input.show(x, (r, c) => (isPeak(r, c) ? 1 : 0), active);
    maxima.show(pooled.maxima, () => 1, active);
    switches.show(pooled.switches, () => 1, active);
    const strongest = Math.max(1, ...pooled.maxima.flat().map(Math.abs));
    const strengths = {
      unpooled: (r, c) => (isPeak(r, c) ? 1 : 0),
      corner: (r, c) => (r % 2 || c % 2 ? 0 : 1),
      bilinear: (r, c) => Math.abs(maps.bilinear[r][c]) / strongest,
    };
    for (const [name, way] of Object.entries(ways)) {
      way.show(maps[name], strengths[name], active);
      const back = cells(SIDE).filter(([r, c]) => isPeak(r, c) && maps[name][r][c] === x[r][c]);
      way.note.textContent = `${back.length} of 4 maxima are back in place`;
    }
    for (const [r, c] of cells(SIDE)) {
      const { td } = input.items[r][c];
      const chosen = r === selected[0] && c === selected[1];
      td.tabIndex = chosen ? 0 : -1;
      if (chosen) td.setAttribute("aria-current", "true");
      else td.removeAttribute("aria-current");
      td.setAttribute("aria-valuenow", x[r][c]);
      td.setAttribute("aria-valuetext", `${x[r][c]}${isPeak(r, c) ? ", its window’s maximum" : ""}`);
    }
    const [row, column] = selected;
    const [r, c] = windowOf(row, column);
    const place = pooled.switches[r][c];
    valueSlider.label(`Number in ${say(row, column)}`);
    valueSlider.show(x[row][column]);
    placeSlider.show(place);
    describe(active, pooled, maps);
  }

  function describe([r, c], pooled, maps) {
    const peak = pooled.maxima[r][c], place = pooled.switches[r][c];
    const row = 2 * r + (place >> 1), column = 2 * c + (place & 1);
    const name = `${r ? "lower" : "upper"} ${c ? "right" : "left"}`;
    const byte = place.toString(2).padStart(8, "0");
    const lands = place ? `${say(2 * r, 2 * c)}` : "the same place, by luck";
    ui.status(
      `The ${name} window’s maximum, ${write(peak)}, stands in ${say(row, column)}: place ${place}, `
      + `the byte ${byte}. With the switch, unpooling puts it back there. Without, it lands in `
      + `${lands}. Bilinear upsampling has ${write(maps.bilinear[row][column])} there.`
    );
  }

  function change([row, column], value) {
    x[row][column] = Math.min(Math.max(Math.round(value), LOW), HIGH);
    update();
  }

  function select(cell, focus) {
    selected = cell;
    walk.stop();
    update();
    if (focus) input.items[cell[0]][cell[1]].td.focus();
  }

  /** Swaps the selected window’s maximum with what stands at a place of that window. */
  function move(place) {
    const [r, c] = windowOf(...selected);
    const from = pool(x).switches[r][c];
    const cell = (p) => [2 * r + (p >> 1), 2 * c + (p & 1)];
    const [r0, c0] = cell(from), [r1, c1] = cell(place);
    [x[r0][c0], x[r1][c1]] = [x[r1][c1], x[r0][c0]];
    selected = [r1, c1];
    update();
  }

  /* ---------------------------------------------------------------------------- the input */

  input.note.textContent = "Drag a number, or select it and use arrow keys.";
  input.table.setAttribute("role", "group");
  input.table.setAttribute("aria-label", "input, sixteen numbers to change");
  input.table.querySelectorAll("tbody, tr").forEach((n) => n.setAttribute("role", "presentation"));
  for (const cell of cells(SIDE)) {
    const [row, column] = cell;
    const { td } = input.items[row][column];
    td.setAttribute("role", "spinbutton");
    td.setAttribute("aria-label", say(row, column));
    td.setAttribute("aria-valuemin", LOW);
    td.setAttribute("aria-valuemax", HIGH);
    td.append(element("span", { class: "switches-place", "aria-hidden": "true" },
      String(2 * (row & 1) + (column & 1))));

    let drag = null;
    td.addEventListener("pointerdown", (event) => {
      select(cell, true);
      event.preventDefault();
      td.setPointerCapture(event.pointerId);
      drag = { x: event.clientX, y: event.clientY, value: x[row][column] };
    });
    td.addEventListener("pointermove", (event) => {
      if (!drag) return;
      // A finger that moves up or down scrolls the page, a mouse does not.
      const up = event.pointerType === "mouse" ? drag.y - event.clientY : 0;
      change(cell, drag.value + (event.clientX - drag.x + up) / 12);
    });
    ["pointerup", "pointercancel"].forEach((kind) =>
      td.addEventListener(kind, () => (drag = null)));

    td.addEventListener("focus", () => {
      if (selected[0] !== row || selected[1] !== column) select(cell);
    });

    td.addEventListener("keydown", (event) => {
      const value = x[row][column];
      const values = {
        ArrowUp: value + 1, ArrowDown: value - 1, PageUp: value + 3, PageDown: value - 3,
        Home: LOW, End: HIGH, "-": -value,
      };
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      if (step) {
        const next = (SIDE * row + column + step + SIDE * SIDE) % (SIDE * SIDE);
        select([Math.floor(next / SIDE), next % SIDE], true);
      } else if (event.key in values) change(cell, values[event.key]);
      else if (/^\d$/.test(event.key)) change(cell, Number(event.key));
      else return;
      event.preventDefault();
    });
  }

  [input, maxima, switches, ...Object.values(ways)].forEach((map) => {
    map.items.forEach((row, r) => row.forEach(({ td }, c) => {
      const look = (value) => (event) => {
        if (event.pointerType !== "mouse" || event.buttons) return;
        looked = value;
        update();
      };
      td.addEventListener("pointerenter", look(row.length === 2 ? [r, c] : windowOf(r, c)));
      td.addEventListener("pointerleave", look(null));
    }));
  });

  /* -------------------------------------------------------------------------- the controls */

  const valueSlider = ui.slider({
    label: "Number", min: LOW, max: HIGH, text: write, onInput: (v) => change(selected, v),
  });
  const placeSlider = ui.slider({
    label: "Its window’s maximum is at", min: 0, max: 3,
    text: (p) => `${p}, ${["upper left", "upper right", "lower left", "lower right"][p]}`,
    onInput: move,
  });
  const walk = ui.play(placeSlider, { label: "Walk", pause: "Stop", every: 900 });
  const shuffle = ui.button({
    label: "Shuffle",
    onClick: () => {
      x = filled(SIDE, () => Math.floor(10 * Math.random()));
      update();
    },
  });
  const reset = ui.button({
    label: "Reset",
    onClick: () => {
      x = data.values.map((row) => [...row]);
      select([1, 0]);
    },
  });

  ui.row(input, ui.group(maxima, switches)).classList.add("is-switches");
  ui.controls(valueSlider, placeSlider);
  ui.controls(walk, shuffle, reset);
  ui.row(...Object.values(ways)).classList.add("is-switches");
  update();

  /* For tests, and for whoever plays in the console. */
  root.explorable = { set(values) { x = values.map((row) => [...row]); update(); } };
});
