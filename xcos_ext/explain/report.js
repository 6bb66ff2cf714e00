"use strict";
// Many pairs: numbers of all are unpacked once, pictures and rows only of the pairs that are shown.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const EACH = 20; // pairs on a page
  const settings = JSON.parse(document.querySelector("script.settings").textContent);
  const summary = JSON.parse(document.querySelector("script.summary").textContent);
  const [rows, columns] = settings.cells;
  const cells = rows * columns;
  const threshold = settings.threshold;
  const decided = threshold !== null;
  const origin = decided ? threshold : 0;

  // --- what the page holds

  const names = [], whyNot = new Map();
  for (const block of document.querySelectorAll("script.names")) {
    const part = JSON.parse(block.textContent);
    for (const [place, reason] of Object.entries(part.why)) whyNot.set(names.length + Number(place), reason);
    for (const name of part.names) names.push(name);
  }
  const count = summary.pairs;
  const first = new Int32Array(count), second = new Int32Array(count), line = new Int32Array(count);
  const score = new Float64Array(count).fill(NaN), rate = new Float64Array(count).fill(NaN);
  const genuine = new Int8Array(count).fill(-1);
  const packed = new Uint16Array(count * 2 * cells);
  const labels = [], reasons = new Map(), identical = new Map(), unlike = new Set();
  {
    let at = 0;
    for (const block of document.querySelectorAll("script.pairs")) {
      const part = JSON.parse(block.textContent);
      const bytes = atob(part.maps);
      const base = at * 2 * cells;
      for (let i = 0; 2 * i < bytes.length; i++) packed[base + i] = bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8);
      for (const [place, reason] of Object.entries(part.why)) reasons.set(at + Number(place), reason);
      for (const [place, what] of Object.entries(part.identical)) identical.set(at + Number(place), what);
      for (const place of part.unlike) unlike.add(at + place);
      part.a.forEach((a, i) => {
        first[at + i] = a;
        second[at + i] = part.b[i];
        line[at + i] = part.line[i];
        if (part.score[i] !== null) score[at + i] = part.score[i];
        if (part.fmr[i] !== null) rate[at + i] = part.fmr[i];
        if (part.genuine[i] !== null) genuine[at + i] = part.genuine[i];
        labels.push(part.labels[i]);
      });
      at += part.a.length;
      block.remove();
    }
  }
  const jpegs = [...document.querySelectorAll("script.jpegs")].map((block) => [Number(block.dataset.first), block]);
  const split = new Map(); // blocks that were cut into pictures, the last few
  function picture(number) {
    let low = 0, high = jpegs.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (jpegs[middle][0] <= number) low = middle; else high = middle - 1;
    }
    let lines = split.get(low);
    if (!lines) {
      lines = jpegs[low][1].textContent.split("\n");
      split.set(low, lines);
      if (split.size > 64) split.delete(split.keys().next().value);
    }
    const found = lines[number - jpegs[low][0]];
    return found ? "data:image/jpeg;base64," + found : null;
  }
  const S = (pair, cell) => packed[pair * 2 * cells + cell] / 32767.5 - 1;
  const W = (pair, cell) => packed[pair * 2 * cells + cells + cell] / 65535;
  const C = (pair, cell) => W(pair, cell) * (S(pair, cell) - origin);
  const values = { s: S, w: W, c: C };
  const compared = (pair) => !Number.isNaN(score[pair]);
  const same = (pair) => score[pair] >= threshold;
  const wrong = (pair) => decided && compared(pair) && genuine[pair] >= 0 && same(pair) !== (genuine[pair] === 1);

  // --- small helpers

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  function shape(name, attributes = {}, ...children) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  const number = (value) => value.toLocaleString("en");
  const counted = (n, what) => `${number(n)} ${what}${n === 1 ? "" : "s"}`;
  const minus = (text) => text.replace("-", "\u2212");
  const fixed = (value, digits) => { const text = value.toFixed(digits); return minus(Number(text) === 0 ? text.replace("-", "") : text); };
  const signed = (value, digits) => (Number(value.toFixed(digits)) > 0 ? "+" : "") + fixed(value, digits);
  const percent = (share) => 100 * share < 9.95 ? `${Number((100 * share).toPrecision(2))} %` : `${(100 * share).toFixed(0)} %`;
  const colour = (stops, low, high) => {
    const rgb = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
    return (value) => {
      const place = Math.min(Math.max((value - low) / (high - low), 0), 1) * (rgb.length - 1);
      const index = Math.min(Math.floor(place), rgb.length - 2);
      return "#" + rgb[index].map((a, i) => Math.round(a + (rgb[index + 1][i] - a) * (place - index)).toString(16).padStart(2, "0")).join("");
    };
  };

  // One scale for all pairs, so that they can be compared; one pair in a hundred may saturate.
  function high(of) {
    const most = new Float64Array(summary.compared);
    let n = 0;
    for (let pair = 0; pair < count; pair++) {
      if (!compared(pair)) continue;
      for (let cell = 0; cell < cells; cell++) most[n] = Math.max(most[n], Math.abs(of(pair, cell)));
      n++;
    }
    most.sort();
    return Math.max(most[Math.floor(0.99 * (n - 1))] || 0, 1e-6);
  }
  const span = Math.max(1 - origin, 0.05), highW = high(W), highC = high(C);
  const scales = {
    s: colour(settings.rdbu, origin - span, origin + span),
    w: colour(settings.ylgn, 0, highW),
    c: colour(settings.rdbu, -highC, highC),
  };
  const titles = { s: "similarity S", w: "attention W", c: decided ? "contribution" : "W\u00b7S" };
  const written = {
    s: (value) => fixed(value, 3),
    w: (value) => `${(100 * value).toFixed(1)} %`,
    c: (value) => signed(value, 4),
  };

  function grid(kind, content) {
    return shape("svg", { class: `grid ${kind}`, viewBox: `0 0 ${columns * 100} ${rows * 100}`, "aria-hidden": "true" }, ...content);
  }
  function squares(fill) {
    const made = [];
    for (let cell = 0; cell < cells; cell++) {
      const [x, y] = [(cell % columns) * 100, Math.floor(cell / columns) * 100];
      const square = shape("rect", { class: "cell", "data-at": cell, x, y, width: 100, height: 100 });
      if (fill) square.setAttribute("fill", fill(cell));
      made.push(square);
    }
    return made;
  }
  function frame(svg, cell) {
    svg.querySelectorAll(".frame").forEach((old) => old.remove());
    if (cell === null) return;
    for (const kind of ["dark", "light"]) {
      svg.append(shape("rect", { class: `frame ${kind}`, x: (cell % columns) * 100, y: Math.floor(cell / columns) * 100, width: 100, height: 100 }));
    }
  }
  const cellName = (cell) => `row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}, ${settings.part_names[settings.parts[cell]]}`;

  // --- choosing and sorting

  const state = { show: "all", text: "", sort: "list", map: "c", cell: Math.floor(cells / 2), down: false, page: 0 };
  let view = [];
  const kinds = {
    all: ["all pairs", () => true],
    genuine: ["genuine: one person, says the list", (pair) => genuine[pair] === 1],
    impostor: ["impostor: different people, says the list", (pair) => genuine[pair] === 0],
    unknown: ["the list does not say", (pair) => genuine[pair] < 0],
    wrong: ["verdict against the list", wrong],
    failed: ["not compared", (pair) => !compared(pair)],
  };
  const sorts = { list: "order of the list", score: "score" };
  if (decided) sorts.margin = "distance to the threshold";
  sorts.cell = "a cell: choose it on the grid";

  function matches(pair) {
    if (!kinds[state.show][1](pair)) return false;
    if (!state.text) return true;
    const hay = [names[first[pair]], names[second[pair]], ...labels[pair]].join("\n").toLowerCase();
    return hay.includes(state.text);
  }
  function key(pair) {
    if (state.sort === "list") return pair;
    if (!compared(pair)) return NaN;
    if (state.sort === "score") return score[pair];
    if (state.sort === "margin") return Math.abs(score[pair] - threshold);
    return values[state.map](pair, state.cell);
  }
  function choose() {
    view = [];
    for (let pair = 0; pair < count; pair++) if (matches(pair)) view.push(pair);
    const keys = new Map(view.map((pair) => [pair, key(pair)]));
    const sign = state.down ? -1 : 1;
    view.sort((i, j) => {
      const a = keys.get(i), b = keys.get(j);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b) || i - j; // those without a score come last
      return sign * (a - b) || i - j;
    });
    state.page = 0;
    drawHistogram();
    drawPicker();
    drawPage();
  }

  const controls = document.getElementById("controls");
  function field(word, control) {
    return element("label", { class: "field" }, element("span", {}, word), control);
  }
  function select(options, value, changed) {
    const made = element("select");
    for (const [name, word] of Object.entries(options)) made.append(element("option", { value: name }, word));
    made.value = value;
    made.addEventListener("change", () => changed(made.value));
    return made;
  }
  const totals = Object.fromEntries(Object.keys(kinds).map((kind) => [kind, 0]));
  for (let pair = 0; pair < count; pair++) for (const kind in kinds) totals[kind] += kinds[kind][1](pair) ? 1 : 0;
  const shown = Object.fromEntries(
    Object.entries(kinds).filter(([kind]) => kind === "all" || totals[kind]).map(([kind, [word]]) => [kind, `${word} (${number(totals[kind])})`])
  );
  const search = element("input", { type: "search", placeholder: "part of a name or label" });
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.text = search.value.trim().toLowerCase(); choose(); }, 150);
  });
  const order = select(sorts, state.sort, (value) => { state.sort = value; choose(); });
  const direction = element("button", { type: "button" });
  const turn = () => { direction.textContent = state.down ? "\u2193 falling" : "\u2191 rising"; };
  direction.addEventListener("click", () => { state.down = !state.down; turn(); choose(); });
  turn();
  const map = select({ c: titles.c, s: titles.s, w: titles.w }, state.map, (value) => { state.map = value; sortByCell(); });
  const picker = element("div");
  const picked = element("p");
  const histogram = element("div");
  function sortByCell() {
    if (state.sort !== "cell") { state.sort = order.value = "cell"; }
    choose();
  }
  picker.addEventListener("click", (event) => {
    const at = event.target.closest("[data-at]");
    if (!at) return;
    state.cell = Number(at.dataset.at);
    sortByCell();
  });
  picker.addEventListener("keydown", (event) => {
    const moved = moveBy(event, state.cell);
    if (moved === null) return;
    event.preventDefault();
    state.cell = moved;
    sortByCell();
    picker.querySelector("svg").focus();
  });
  function moveBy(event, cell) {
    const [row, column] = [Math.floor(cell / columns), cell % columns];
    switch (event.key) {
      case "ArrowUp": return row > 0 ? cell - columns : cell;
      case "ArrowDown": return row < rows - 1 ? cell + columns : cell;
      case "ArrowLeft": return column > 0 ? cell - 1 : cell;
      case "ArrowRight": return column < columns - 1 ? cell + 1 : cell;
      default: return null;
    }
  }
  function drawPicker() {
    const mean = new Float64Array(cells);
    let n = 0;
    for (const pair of view) {
      if (!compared(pair)) continue;
      n++;
      for (let cell = 0; cell < cells; cell++) mean[cell] += values[state.map](pair, cell);
    }
    for (let cell = 0; cell < cells; cell++) mean[cell] /= Math.max(n, 1);
    const most = mean.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-9);
    // Means are smaller than single pairs' values: a scale of their own, but for S, which has a meaning.
    const scale = { s: scales.s, w: colour(settings.ylgn, 0, most), c: colour(settings.rdbu, -most, most) }[state.map];
    const svg = grid("picker", squares((cell) => scale(mean[cell])));
    svg.setAttribute("role", "application");
    svg.setAttribute("tabindex", "0");
    svg.removeAttribute("aria-hidden");
    svg.setAttribute("aria-label", `Mean ${titles[state.map]} of the pairs found. Arrow keys choose the cell to sort by.`);
    frame(svg, state.cell);
    picker.replaceChildren(svg);
    picked.textContent = `Mean of ${counted(n, "pair")}. Chosen: ${cellName(state.cell)}, mean ${written[state.map](mean[state.cell])}.`;
  }

  function drawHistogram() {
    const width = 420, height = 248, middle = 130, bins = 60;
    let low = decided ? threshold - 0.05 : 0, top = decided ? threshold + 0.05 : 0.1;
    for (let pair = 0; pair < count; pair++) {
      if (compared(pair)) { low = Math.min(low, score[pair]); top = Math.max(top, score[pair]); }
    }
    const wide = (top - low) / bins;
    const sums = { genuine: new Int32Array(bins), impostor: new Int32Array(bins), unknown: new Int32Array(bins) };
    for (const pair of view) {
      if (!compared(pair)) continue;
      const kind = genuine[pair] === 1 ? "genuine" : genuine[pair] === 0 ? "impostor" : "unknown";
      sums[kind][Math.min(Math.floor((score[pair] - low) / wide), bins - 1)]++;
    }
    const most = Math.max(1, ...sums.genuine, ...sums.impostor, ...sums.unknown);
    const place = (value) => ((value - low) / (top - low)) * width;
    const content = [];
    for (const [kind, up] of [["unknown", true], ["genuine", true], ["impostor", false]]) {
      sums[kind].forEach((n, bin) => {
        if (!n) return;
        const tall = Math.max((n / most) * (up ? middle - 6 : 84), 1);
        content.push(shape("rect", { class: kind, x: (bin * width) / bins + 0.5, y: up ? middle - tall : middle + 1, width: width / bins - 1, height: tall }));
      });
    }
    content.push(shape("path", { class: "axis", d: `M0 ${middle}H${width}` }));
    if (decided) {
      content.push(shape("path", { class: "rule", d: `M${place(threshold)} 0V216` }));
      // A line of its own, so that it meets neither end's number, and to the side that has room.
      const x = place(threshold), anchor = x < 60 ? "start" : x > width - 60 ? "end" : "middle";
      content.push(shape("text", { x, y: 231, "text-anchor": anchor }, `threshold ${fixed(threshold, 2)}`));
    }
    content.push(shape("text", { x: 0, y: 244 }, fixed(low, 2)));
    content.push(shape("text", { x: width, y: 244, "text-anchor": "end" }, fixed(top, 2)));
    const svg = shape("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Scores of the pairs found" }, ...content);
    const legend = element("p", { class: "key" });
    for (const [kind, word] of [["genuine", "genuine"], ["impostor", "impostor"], ["unknown", "not said"]]) {
      if (totals[kind]) legend.append(element("span", {}, shape("svg", { viewBox: "0 0 10 10" }, shape("rect", { class: kind, width: 10, height: 10 })), word));
    }
    histogram.replaceChildren(svg, legend);
  }

  function legend(name, low, top, scale, ticks) {
    const width = 300, steps = 48, content = [];
    for (let i = 0; i < steps; i++) {
      content.push(shape("rect", { x: (i * width) / steps, y: 0, width: width / steps + 0.5, height: 9, fill: scale(low + ((i + 0.5) / steps) * (top - low)) }));
    }
    ticks.forEach(([value, word], i) => {
      const x = ((value - low) / (top - low)) * width;
      content.push(shape("text", { x, y: 22, "text-anchor": i === 0 ? "start" : i === ticks.length - 1 ? "end" : "middle" }, word));
    });
    return element("div", {}, name, shape("svg", { class: "legend", viewBox: "-1 0 302 26", "aria-hidden": "true" }, ...content));
  }
  controls.append(
    element("div", {},
      field("show", select(shown, "all", (value) => { state.show = value; choose(); })),
      field("find", search),
      element("div", { class: "row" }, field("sort by", order), direction),
      field("value of the cell", map)),
    element("div", {}, element("h2", {}, "Scores of the pairs found"), histogram),
    element("div", { class: "picker" }, picker, picked),
    element("div", { class: "legends" },
      legend("similarity S", origin - span, origin + span, scales.s, [[origin - span, fixed(origin - span, 2)], [origin, decided ? `threshold ${fixed(origin, 2)}` : "0"], [origin + span, fixed(origin + span, 2)]]),
      legend("attention W", 0, highW, scales.w, [[0, "0 %"], [highW, `${(100 * highW).toFixed(0)} % or more`]]),
      legend(titles.c, -highC, highC, scales.c, [[-highC, `${fixed(-highC, 3)}${decided ? ": against" : ""}`], [0, "0"], [highC, `${decided ? "for: " : ""}${signed(highC, 3)}`]])),
  );
  controls.hidden = false;

  // --- the pairs

  const list = document.getElementById("pairs");
  function face(pair, side) {
    const which = side === "A" ? first[pair] : second[pair];
    const uri = picture(which);
    const content = uri
      ? [shape("image", { href: uri, width: columns * 100, height: rows * 100, preserveAspectRatio: "none" }), ...squares(null)]
      : [shape("rect", { class: "missing", width: columns * 100, height: rows * 100 }),
         shape("text", { x: columns * 50, y: rows * 50, "font-size": 0.08 * columns * 100, fill: "currentColor" }, "no picture")];
    const caption = element("figcaption", { title: names[which] }, `${side} `, element("bdi", {}, names[which].split("/").pop() || names[which]));
    return element("figure", {}, caption, grid("face", content));
  }
  function parts(pair) {
    const sums = new Map();
    for (let cell = 0; cell < cells; cell++) {
      const part = settings.parts[cell];
      sums.set(part, (sums.get(part) || 0) + C(pair, cell));
    }
    const most = Math.max(...[...sums.values()].map(Math.abs));
    const said = (sign) => [...sums].filter(([, sum]) => sign * sum > 0.05 * most).sort((a, b) => sign * (b[1] - a[1]))
      .map(([part, sum]) => `${settings.part_names[part]} ${signed(sum, 3)}`).join(", ");
    const [plus, less] = [said(1), said(-1)];
    return (plus ? `For the same person: ${plus}. ` : "") + (less ? `Against: ${less}.` : "");
  }
  function drawPair(pair, rank) {
    const top = element("div", { class: "top" }, element("span", { class: "place" }, `${number(rank)}.`));
    const made = element("article", { class: "pair", "data-pair": pair }, top);
    const soft = [];
    if (compared(pair)) {
      if (decided) top.append(element("b", { class: same(pair) ? "same" : "different" }, same(pair) ? "same person" : "different people"));
      top.append(element("span", {}, `score ${fixed(score[pair], 4)}`));
      if (decided) top.append(element("span", {}, `margin ${signed(score[pair] - threshold, 4)}`));
      if (!Number.isNaN(rate[pair])) soft.push(`false match rate at this score ${rate[pair] < 0 ? "below " : ""}${percent(Math.abs(rate[pair]))}`);
    } else {
      top.append(element("b", {}, "not compared"));
    }
    if (genuine[pair] >= 0) top.append(element("span", { class: "chip" }, genuine[pair] ? "genuine" : "impostor"));
    if (wrong(pair)) top.append(element("span", { class: "chip wrong" }, same(pair) ? "false match" : "false non-match"));
    if (identical.has(pair)) top.append(element("span", { class: "chip" }, `${identical.get(pair)}: says nothing about the person`));
    if (unlike.has(pair)) top.append(element("span", { class: "chip" }, "not like a face: says nothing about a person"));
    labels[pair].forEach((value, i) => { if (value) soft.push(`${settings.labels[i]}: ${value}`); });
    if (line[pair]) soft.push(`line ${line[pair]}`);
    if (reasons.has(pair)) made.append(element("p", { class: "reason" }, reasons.get(pair)));
    const panels = element("div", { class: "panels" }, face(pair, "A"), face(pair, "B"));
    if (compared(pair)) {
      for (const name of ["s", "w", "c"]) {
        panels.append(element("figure", {}, element("figcaption", {}, titles[name]), grid(name, squares((cell) => scales[name](values[name](pair, cell))))));
      }
      panels.setAttribute("tabindex", "0");
      panels.setAttribute("role", "application");
      panels.setAttribute("aria-label", `Maps of pair ${rank}. Arrow keys move from cell to cell.`);
    }
    made.append(panels);
    if (compared(pair)) {
      made.append(element("p", { class: "readout", role: "status" }, decided ? parts(pair) : ""));
    }
    if (soft.length) made.append(element("p", { class: "soft" }, soft.join(" \u00b7 ")));
    return made;
  }
  function point(article, cell) {
    article.querySelectorAll("svg.grid").forEach((svg) => frame(svg, cell));
    const pair = Number(article.dataset.pair);
    const readout = article.querySelector(".readout");
    if (!readout) return;
    article.dataset.cell = cell === null ? "" : cell;
    readout.textContent = cell === null
      ? (decided ? parts(pair) : "")
      : `${cellName(cell)}: `.replace(/^r/, "R") + ["s", "w", "c"].map((name) => `${titles[name]} ${written[name](values[name](pair, cell))}`).join(", ");
  }
  let lit = null;
  function follow(event) {
    const at = event.target.closest("[data-at]");
    const article = at && at.closest(".pair");
    if (lit && lit !== article) point(lit, null);
    lit = article;
    if (article && article.dataset.cell !== at.dataset.at) point(article, Number(at.dataset.at));
  }
  list.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") follow(event); });
  list.addEventListener("click", follow);
  list.addEventListener("pointerleave", () => { if (lit) point(lit, null); lit = null; });
  list.addEventListener("keydown", (event) => {
    const article = event.target.classList.contains("panels") && event.target.closest(".pair");
    if (!article) return;
    if (event.key === "Escape") return point(article, null);
    const moved = moveBy(event, Number(article.dataset.cell || Math.floor(cells / 2)));
    if (moved === null) return;
    event.preventDefault();
    if (lit && lit !== article) point(lit, null);
    lit = article;
    point(article, moved);
  });

  const pagers = [...document.querySelectorAll(".pager")];
  function drawPage() {
    const pages = Math.max(Math.ceil(view.length / EACH), 1);
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const start = state.page * EACH;
    lit = null;
    list.replaceChildren(...view.slice(start, start + EACH).map((pair, i) => drawPair(pair, start + i + 1)));
    document.getElementById("found").textContent =
      `${number(view.length)} of ${number(count)} pairs, by ${state.sort === "cell" ? `${titles[state.map]} of ${cellName(state.cell)}` : sorts[state.sort]}, ${state.down ? "falling" : "rising"}.`;
    pagers.forEach((pager, which) => {
      const go = (word, page, off) => {
        const button = element("button", { type: "button" }, word);
        button.disabled = off;
        button.addEventListener("click", () => { state.page = page; drawPage(); if (which) document.getElementById("found").scrollIntoView(); });
        return button;
      };
      pager.replaceChildren(
        go("First", 0, state.page === 0), go("Previous", state.page - 1, state.page === 0),
        element("span", {}, `page ${number(state.page + 1)} of ${number(pages)}`),
        go("Next", state.page + 1, state.page === pages - 1), go("Last", pages - 1, state.page === pages - 1),
      );
      pager.hidden = pages === 1;
    });
  }

  // --- the head

  const said = [`${counted(summary.pairs, "pair")}, ${number(summary.compared)} compared`];
  if (summary.failed) said[0] += `, ${number(summary.failed)} could not be`;
  said[0] += ".";
  if (decided) {
    said.push(`${number(summary.same)} same person, ${number(summary.different)} different people, at threshold ${fixed(threshold, 4)}${settings.given ? " (given, not the model's own)" : ""}.`);
  } else {
    said.push("The model knows no threshold (it is not calibrated): no verdicts.");
  }
  if (decided && summary.impostor) said.push(`${number(summary.false_matches)} of ${number(summary.impostor)} impostor pairs match.`);
  if (decided && summary.genuine) said.push(`${number(summary.false_non_matches)} of ${number(summary.genuine)} genuine pairs do not.`);
  document.getElementById("counts").textContent = said.join(" ");
  const about = [`Model ${settings.model.name}, fingerprint ${settings.model.fingerprint}`, `attention ${settings.model.attention}`];
  if (settings.calibration) {
    about.push(`false match rates from ${settings.calibration}`);
  } else {
    about.push("not calibrated: no false match rates");
  }
  about.push(`parts of the face by the alignment template`, `xcos_ext ${settings.version}`);
  document.getElementById("about").textContent = about.join("; ") + ".";
  choose();
  document.body.dataset.ready = "yes";
})();
