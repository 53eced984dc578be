// Comfort only: every page works without this file.
"use strict";

function copyButton(target, text, place) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy: " + text);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(target);
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  place.append(button);
}

for (const block of document.querySelectorAll("pre[data-copy]")) {
  copyButton(block.querySelector("code"), block.textContent, block);
}

// A lineage wider than the screen starts at the version that the page is about.
for (const box of document.querySelectorAll(".scroll")) {
  const root = box.querySelector(".node.root");
  if (root && box.scrollWidth > box.clientWidth) {
    const inside = root.getBoundingClientRect().left - box.getBoundingClientRect().left;
    box.scrollLeft = inside - (box.clientWidth - root.getBoundingClientRect().width) / 2;
  }
}

// What can be scrolled on shows that there is more.
for (const box of document.querySelectorAll(".scroll")) {
  const mark = () => box.classList.toggle("cut", box.scrollLeft + box.clientWidth < box.scrollWidth - 4);
  box.addEventListener("scroll", mark, { passive: true });
  addEventListener("resize", mark, { passive: true });
  mark();
}

// Keys: "/" searches, j and k walk through a list, Escape leaves the search.
document.addEventListener("keydown", (event) => {
  const search = document.getElementById("q");
  if (event.key === "Escape" && document.activeElement === search) search.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
  if (event.key === "/") {
    event.preventDefault();
    search.focus();
    search.select();
  }
  if (event.key === "j" || event.key === "k") {
    const links = [...document.querySelectorAll("table.list td.name a, .relatives a")];
    const next = links.indexOf(document.activeElement) + (event.key === "j" ? 1 : -1);
    if (links.length) links[Math.max(0, Math.min(links.length - 1, next))].focus();
  }
});
