"use strict";
// The map: one measure at a time, and the cells under the arrow keys.
const maps = [...document.querySelectorAll(".map")];
const told = document.querySelector(".told");
for (const input of document.querySelectorAll(".switch input")) {
  input.addEventListener("change", () => { for (const map of maps) map.hidden = map.id !== input.value; });
}
for (const map of maps) {
  const rows = [...map.tBodies[0].rows].map((row) => [...row.querySelectorAll("td")]);
  const cells = rows.flat();
  if (!cells.length) continue;
  cells.forEach((cell, at) => { cell.tabIndex = at ? -1 : 0; });
  const go = (cell) => {
    if (!cell) return;
    for (const one of cells) one.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus();
  };
  map.addEventListener("focusin", (event) => { if (event.target.title) told.textContent = event.target.title; });
  map.addEventListener("mouseover", (event) => { if (event.target.title) told.textContent = event.target.title; });
  map.addEventListener("keydown", (event) => {
    const row = rows.findIndex((some) => some.includes(event.target));
    if (row < 0) return;
    const column = rows[row].indexOf(event.target);
    const to = {
      ArrowUp: rows[row - 1]?.[column], ArrowDown: rows[row + 1]?.[column],
      ArrowLeft: rows[row][column - 1], ArrowRight: rows[row][column + 1],
      Home: rows[row][0], End: rows[row].at(-1),
    };
    if (event.key in to) { event.preventDefault(); go(to[event.key]); }
  });
}
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });

// In a file there is no version to go to; the pages of `adapterkit ui` serve this one below its version.
const version = document.getElementById("version");
if (version && location.pathname.endsWith("/verify/")) version.hidden = false;
