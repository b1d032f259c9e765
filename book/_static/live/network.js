/* The network in the reader's browser. Nothing is loaded before `load` is called, and then only
   from the book's own folder, by classic scripts, as a page from disk must; see
   `book/_ext/live_model.py`, which wrote them.

       const network = await LiveNetwork.load("shapes-deconvnet.onnx", (done) => ...);
       const { scores, stages } = await network.run(pixels, true);
*/

(function () {
  "use strict";

  const HERE = new URL(".", document.currentScript.src).href;
  const WASM = "ort-wasm-simd.wasm";
  const files = {}; // name -> base64 of gzipped bytes, put there by the scripts

  function loadScript(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = HERE + name;
      script.onload = () => resolve();
      script.onerror = () => reject(new Error(`the file _static/live/${name} cannot be read`));
      document.head.append(script);
    });
  }

  async function unpacked(name) {
    await loadScript(`${name}.js`);
    const text = atob(files[name]);
    delete files[name];
    const packed = Uint8Array.from(text, (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  /** Loads runtime and network, telling `progress` the share that is done. */
  async function load(name, progress = () => {}) {
    if (!("WebAssembly" in window) || !("DecompressionStream" in window)) {
      throw new Error("this browser is too old: it needs WebAssembly and DecompressionStream, " +
        "which Chrome and Firefox have since 2023 and Safari since version 16.4");
    }
    progress(0.05);
    await loadScript("ort.wasm.min.js");
    progress(0.1);
    const wasm = await unpacked(WASM);
    progress(0.5);
    const bytes = await unpacked(name);
    progress(0.75);
    const { ort } = window;
    const address = URL.createObjectURL(new Blob([wasm], { type: "application/wasm" }));
    ort.env.wasm.numThreads = 1; // more would need headers that a page from disk has not
    ort.env.wasm.proxy = false;
    ort.env.wasm.wasmPaths = { [WASM]: address };
    ort.env.logLevel = "error";
    const session = await ort.InferenceSession.create(new Uint8Array(bytes), {
      executionProviders: ["wasm"], graphOptimizationLevel: "all",
    });
    URL.revokeObjectURL(address);
    progress(1);
    return wrap(session, ort);
  }

  function wrap(session, ort) {
    const stageNames = session.outputNames.filter((name) => name !== "scores");
    let last = Promise.resolve(); // the session does one thing at a time

    async function once(pixels, useSwitches) {
      const side = Math.sqrt(pixels.length / 3);
      const started = performance.now();
      const outputs = await session.run({
        images: new ort.Tensor("uint8", pixels, [1, 3, side, side]),
        use_switches: new ort.Tensor("bool", [useSwitches], []),
      });
      const map = (name) => {
        const [, channels, height, width] = outputs[name].dims;
        return { name, channels, height, width, data: outputs[name].data };
      };
      return {
        scores: map("scores"), stages: stageNames.map(map),
        milliseconds: performance.now() - started,
      };
    }

    /** `pixels`: `Uint8Array [3 * S * S]`, RGB by planes. Maps are `Float32Array`, channel by
        channel, with their sizes. */
    function run(pixels, useSwitches = true) {
      last = last.catch(() => null).then(() => once(pixels, useSwitches));
      return last;
    }
    return { run };
  }

  window.LiveNetwork = { files, load };
})();
