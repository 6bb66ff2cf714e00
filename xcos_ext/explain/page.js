"use strict";
// One pair: whatever cell is pointed at lights up on both faces and in every map.
(() => {
  const data = JSON.parse(document.querySelector("script.data").textContent);
  const rows = data.s.length, columns = data.s[0].length;
  const grids = [...document.querySelectorAll("svg.grid")];
  const readout = document.getElementById("readout");
  const idle = readout.textContent;
  const svg = "http://www.w3.org/2000/svg";
  let kept = null; // a cell or part that stays lit after a click
  let last = [0, 0];

  const minus = (text) => text.replace("-", "\u2212");
  const signed = (value, digits) => minus((value > 0 ? "+" : "") + value.toFixed(digits));

  function light(cells, part) {
    for (const grid of grids) {
      grid.querySelectorAll(".frame").forEach((frame) => frame.remove());
      for (const kind of ["dark", "light"]) {
        for (const [row, column] of cells) {
          const frame = document.createElementNS(svg, "rect");
          frame.setAttribute("class", "frame " + kind);
          frame.setAttribute("x", column * 100);
          frame.setAttribute("y", row * 100);
          frame.setAttribute("width", 100);
          frame.setAttribute("height", 100);
          grid.append(frame);
        }
      }
    }
    document.querySelectorAll("[data-part]").forEach((element) => {
      element.classList.toggle("lit", part !== null && Number(element.dataset.part) === part);
    });
  }

  function total(cells, values) {
    return cells.reduce((sum, [row, column]) => sum + values[row][column], 0);
  }

  function describe(cells, head, mean) {
    const w = total(cells, data.w), c = total(cells, data.c);
    const s = total(cells, data.s) / cells.length;
    let text = `${head}: ${mean} ${minus(s.toFixed(3))}, attention W ${(100 * w).toFixed(1)} %, `;
    text += (data.decided ? "contribution " : "W\u00b7S ") + signed(c, 4);
    if (data.decided) text += c > 0 ? ", for the same person" : c < 0 ? ", against the same person" : "";
    return text + ".";
  }

  function show(target) {
    if (target === null) {
      light([], null);
      readout.textContent = idle;
    } else if (target.part !== undefined) {
      const cells = [];
      data.parts.forEach((line, row) => line.forEach((part, column) => part === target.part && cells.push([row, column])));
      light(cells, target.part);
      readout.textContent = describe(cells, `${data.names[target.part]}, ${cells.length} cells`, "mean S");
    } else {
      const [row, column] = (last = target.cell);
      const part = data.parts[row][column];
      light([[row, column]], part);
      readout.textContent = describe([[row, column]], `Row ${row + 1}, column ${column + 1}, ${data.names[part]}`, "similarity S");
    }
  }

  const same = (a, b) => a !== null && b !== null && JSON.stringify(a) === JSON.stringify(b);

  function cellOf(event) {
    const at = event.target.closest && event.target.closest("[data-at]");
    return at ? { cell: at.dataset.at.split(",").map(Number) } : null;
  }

  for (const grid of grids) {
    grid.addEventListener("pointermove", (event) => { if (kept === null && event.pointerType !== "touch") show(cellOf(event)); });
    grid.addEventListener("pointerleave", () => { if (kept === null) show(null); });
    grid.addEventListener("click", (event) => {
      const cell = cellOf(event);
      kept = same(cell, kept) ? null : cell;
      show(kept);
    });
    grid.addEventListener("focus", () => { if (kept === null && grid.matches(":focus-visible")) show({ cell: last }); });
    grid.addEventListener("blur", () => { if (kept === null) show(null); });
    grid.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (event.key === "Home") last = [last[0], 0];
      else if (event.key === "End") last = [last[0], columns - 1];
      else if (step) last = [Math.min(Math.max(last[0] + step[0], 0), rows - 1), Math.min(Math.max(last[1] + step[1], 0), columns - 1)];
      else return;
      event.preventDefault();
      kept = null;
      show({ cell: last });
    });
  }
  document.querySelectorAll("[data-part]").forEach((element) => {
    const target = { part: Number(element.dataset.part) };
    element.addEventListener("pointerenter", () => { if (kept === null) show(target); });
    element.addEventListener("pointerleave", () => { if (kept === null) show(null); });
    element.addEventListener("focus", () => { if (kept === null) show(target); });
    element.addEventListener("blur", () => { if (kept === null) show(null); });
    element.addEventListener("click", () => { kept = same(target, kept) ? null : target; show(kept); });
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") { kept = null; show(null); } });

  // Colours of a map laid over both faces.
  function tint(name) {
    const colours = new Map();
    if (name) {
      document.querySelectorAll(`svg.grid.${name} .cell`).forEach((cell) => {
        colours.set(cell.dataset.at, cell.querySelector("rect").getAttribute("fill"));
      });
    }
    document.querySelectorAll("svg.grid.face").forEach((face) => {
      face.classList.toggle("tinted", Boolean(name));
      face.querySelectorAll(".cell").forEach((cell) => { cell.style.fill = colours.get(cell.dataset.at) || ""; });
    });
  }
  document.querySelectorAll("input[name=overlay]").forEach((input) => {
    input.addEventListener("change", () => { if (input.checked) tint(input.value); });
  });
})();
