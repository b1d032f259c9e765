// A box that scrolls sideways, as a wide table on a phone, can be reached and scrolled by keyboard.
(() => {
  const boxes = ".pst-scrollable-table-container, .cell_output, div.math, mjx-container[display]";
  const mark = () => {
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    }
  };
  addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    mark();
  });
  addEventListener("resize", mark);
})();
