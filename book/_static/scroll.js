// A box that scrolls sideways, as a wide table on a phone, can be reached and scrolled by keyboard.
// A picture of plots scrolls there too, since shrunk to a phone's width nobody could read it; and
// the sidebar shows where the reader is. Its arrows, which unfold a page's parts, say so.
(() => {
  const showPlace = () => {
    const here = document.querySelector(".bd-sidebar-primary li.current.active > a, .bd-sidebar-primary li.current > a.current");
    const sidebar = here?.closest(".bd-sidebar-primary");
    if (!sidebar) return;
    const { top, bottom } = here.getBoundingClientRect(), frame = sidebar.getBoundingClientRect();
    if (top < frame.top || bottom > Math.min(frame.bottom, innerHeight))
      sidebar.scrollTop += (top + bottom) / 2 - (frame.top + Math.min(frame.bottom, innerHeight)) / 2;
  };
  const nameArrows = () => {
    for (const arrow of document.querySelectorAll(".bd-sidebar-primary summary")) {
      const page = arrow.closest("li").querySelector("a").textContent.trim();
      arrow.setAttribute("aria-label", `Parts of "${page}"`);
    }
  };
  const boxes = ".pst-scrollable-table-container, .cell_output, div.math, mjx-container[display]";
  const LEGIBLE = 560; // pixels, for a picture that was drawn at 600 or more
  const widen = () => {
    for (const picture of document.querySelectorAll(".bd-content .cell_output img"))
      if (picture.naturalWidth >= 600) picture.style.minWidth = innerWidth < 600 ? `${LEGIBLE}px` : "";
  };
  const mark = () => {
    widen();
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    }
  };
  addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    mark();
  });
  addEventListener("DOMContentLoaded", nameArrows);
  addEventListener("load", showPlace); // after the theme has scrolled the sidebar to where it was
  addEventListener("resize", mark);
})();
