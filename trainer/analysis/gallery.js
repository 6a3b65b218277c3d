"use strict";
// Shows the image and the title of the item of the map under the pointer, or chosen by keys.
(() => {
  const figure = document.getElementById("map");
  if (!figure) return;
  const items = JSON.parse(document.getElementById("map-items").textContent);
  const svg = figure.querySelector("svg");
  const points = [...svg.querySelectorAll("circle")];
  const places = points.map((point) => [point.cx.baseVal.value, point.cy.baseVal.value]);
  const panel = document.getElementById("map-item");
  const tile = panel.querySelector(".tile");
  const [title, note] = panel.querySelectorAll("p");
  let chosen = -1;

  function show(number) {
    if (chosen >= 0) points[chosen].classList.remove("chosen");
    chosen = number;
    points[number].classList.add("chosen");
    const [text, trained, x, y] = items[number];
    tile.hidden = x < 0;
    tile.style.backgroundPosition = `${-x}px ${-y}px`;
    title.textContent = text;
    note.textContent = trained ? `${trained} training interactions` : "not seen in training";
  }

  function next(dx, dy) {
    const [x, y] = places[chosen];
    let best = -1;
    let least = Infinity;
    places.forEach(([px, py], number) => {
      const along = (px - x) * dx + (py - y) * dy;
      const across = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
      const cost = along + 2 * across;
      if (along > 0 && across <= along && cost < least) [best, least] = [number, cost];
    });
    return best;
  }

  svg.addEventListener("pointerover", (event) => {
    const number = points.indexOf(event.target);
    if (number >= 0) show(number);
  });
  svg.addEventListener("focus", () => show(Math.max(chosen, 0)));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!(event.key in step)) return;
    event.preventDefault();
    const number = next(...step[event.key]);
    if (number >= 0) show(number);
  });
  for (const choice of figure.querySelectorAll("input[name=colour]")) {
    choice.addEventListener("change", () => (svg.dataset.colour = choice.value));
  }
  svg.dataset.colour = figure.querySelector("input[name=colour]:checked").value;
})();
