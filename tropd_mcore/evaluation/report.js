// The interactive parts of the page: values under the pointer, and smoothed lines. No network, no storage.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const HALF = 4; // neighbours on each side of a smoothed value
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  const text = (value, form) => {
    if (value === null) return "–";
    if (form === "share") return `${Number((100 * value).toPrecision(4))}%`;
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3) : String(Number(value.toPrecision(5)));
  };

  const nearest = (steps, wanted) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= wanted) low = middle; else high = middle;
    }
    return wanted - steps[low] <= steps[high] - wanted ? low : high;
  };

  const fill = (plot, index) => {
    const head = document.createElement("b");
    head.textContent = `step ${plot.steps[index]}`;
    const rows = plot.lines.map((line) => {
      const row = document.createElement("div");
      const mark = document.createElement("i");
      mark.className = `swatch ${line.hue}`;
      row.append(mark, `${line.label}: ${text(line.values[index], plot.form)}`);
      return row;
    });
    tip.replaceChildren(head, ...rows);
  };

  const watch = (svg) => {
    const plot = JSON.parse(svg.dataset.plot);
    const box = svg.viewBox.baseVal, grid = svg.querySelector("line.grid");
    const left = Number(grid.getAttribute("x1")), right = Number(grid.getAttribute("x2"));
    const [first, last] = plot.ends;
    const hair = document.createElementNS(SVG, "line");
    hair.setAttribute("class", "hair");
    hair.setAttribute("y1", "8");
    hair.setAttribute("y2", String(box.height - 34));
    let shown = -1;

    const show = (index) => {
      shown = index;
      const x = left + ((right - left) * (plot.steps[index] - first)) / (last - first);
      hair.setAttribute("x1", x);
      hair.setAttribute("x2", x);
      svg.append(hair);
      fill(plot, index);
      tip.hidden = false;
      const area = svg.getBoundingClientRect(), scale = area.width / box.width;
      const at = area.left + x * scale, width = tip.offsetWidth;
      const beside = at + 14 + width < document.documentElement.clientWidth ? at + 14 : at - 14 - width;
      tip.style.left = `${Math.max(4, beside) + window.scrollX}px`;
      tip.style.top = `${area.top + 14 + window.scrollY}px`;
    };
    const hide = () => { hair.remove(); tip.hidden = true; shown = -1; };

    svg.addEventListener("pointermove", (event) => {
      const area = svg.getBoundingClientRect();
      const x = ((event.clientX - area.left) * box.width) / area.width;
      show(nearest(plot.steps, first + ((x - left) * (last - first)) / (right - left)));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (!move) return;
      event.preventDefault();
      const from = shown < 0 ? (move > 0 ? -1 : plot.steps.length) : shown;
      show(Math.min(plot.steps.length - 1, Math.max(0, from + move)));
    });
  };

  // The mean height of a point and its neighbours in the same range without gaps. Drawn heights are averaged, so on a
  // logarithmic axis this is the geometric mean.
  const smoothed = (points) => points.map(([x], index) => {
    const part = points.slice(Math.max(0, index - HALF), index + HALF + 1);
    return [x, part.reduce((sum, [, y]) => sum + y, 0) / part.length];
  });

  const smooth = (on) => {
    document.querySelectorAll("polyline.smoothed").forEach((line) => line.remove());
    document.querySelectorAll("svg[data-plot] polyline.line").forEach((line) => {
      line.classList.toggle("faint", on);
      if (!on) return;
      const copy = line.cloneNode();
      const points = line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number));
      copy.setAttribute("points", smoothed(points).map((pair) => pair.map((n) => n.toFixed(1)).join(",")).join(" "));
      copy.classList.remove("faint");
      copy.classList.add("smoothed");
      line.after(copy);
    });
  };

  document.querySelectorAll("svg[data-plot]").forEach(watch);
  const box = document.getElementById("smooth");
  if (box) {
    box.closest("p").hidden = false;
    box.addEventListener("change", () => smooth(box.checked));
    smooth(box.checked);
  }
})();
