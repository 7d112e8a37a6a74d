"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const byId = (id) => document.getElementById(id);
  const COLORS = ["#2456b8", "#c25700", "#17692f", "#7b2d9b", "#a51616", "#00707c", "#6d4c2f"];
  const SHADES = data.iou.map((_, i) => `hsl(${225 - 16 * i} 70% ${34 + 1.5 * i}%)`);
  const box = { left: 58, top: 10, width: 448, height: 320 };
  const fixed = (value) => (value === null || value === undefined ? "unknown" : value.toFixed(3));

  function node(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const x = (value) => box.left + box.width * value;
  const y = (value) => box.top + box.height * (1 - value);

  function axes(holder, label, across, up) {
    const svg = node("svg", { viewBox: "0 0 520 378", role: "img", "aria-label": label });
    for (let i = 0; i <= 5; i += 1) {
      const at = i / 5;
      svg.append(node("line", { x1: x(0), x2: x(1), y1: y(at), y2: y(at), stroke: "#dfe3e8" }));
      svg.append(node("line", { x1: x(at), x2: x(at), y1: y(0), y2: y(1), stroke: "#dfe3e8" }));
      svg.append(node("text", { x: x(0) - 7, y: y(at) + 4, "text-anchor": "end" }, at.toFixed(1)));
      svg.append(node("text", { x: x(at), y: y(0) + 18, "text-anchor": "middle" }, at.toFixed(1)));
    }
    svg.append(node("rect", { x: x(0), y: y(1), width: box.width, height: box.height, fill: "none", stroke: "#6c747e" }));
    svg.append(node("text", { x: x(0.5), y: 371, "text-anchor": "middle" }, across));
    svg.append(node("text", { x: 15, y: y(0.5), "text-anchor": "middle", transform: `rotate(-90 15 ${y(0.5)})` }, up));
    holder.replaceChildren(svg);
    return svg;
  }

  function legend(holder, entries) {
    holder.replaceChildren(...entries.map(([name, color]) => {
      const item = document.createElement("li");
      const dot = document.createElement("span");
      dot.className = "dot";
      dot.style.background = color;
      item.append(dot, name);
      return item;
    }));
  }

  function option(select, value, text) {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    select.append(made);
  }

  // Precision in thousandths at 101 levels of recall; null for a class without objects.
  const curve = (run, name, iou) => run.curves[name] && run.curves[name][iou];

  function meanCurve(run, name) {
    const curves = run.curves[name];
    if (!curves) return null;
    return curves[0].map((_, i) => curves.reduce((sum, one) => sum + one[i], 0) / curves.length);
  }

  function line(svg, points, color) {
    if (!points) return;
    const reached = points.findIndex((value) => value === 0);
    const shown = points.slice(0, reached < 0 ? points.length : reached);
    const path = shown.map((value, i) => `${x(i / 100).toFixed(1)},${y(value / 1000).toFixed(1)}`);
    if (shown.length && shown.length < points.length) path.push(`${x((shown.length - 1) / 100).toFixed(1)},${y(0)}`);
    svg.append(node("polyline", { points: path.join(" "), fill: "none", stroke: color, "stroke-width": 2.2 }));
  }

  const average = (points) => (points ? points.reduce((sum, one) => sum + one, 0) / points.length / 1000 : null);

  function drawCurves() {
    const name = Number(byId("pr-class").value);
    const choice = byId("pr-iou").value;
    const recall = Number(byId("pr-recall").value);
    const title = data.names[name];
    const lines = choice === "each"
      ? data.iou.map((iou, i) => [`IoU ${iou.toFixed(2)}`, curve(data.runs[0], name, i), SHADES[i]])
      : data.runs.map((run, i) => [
        run.name, choice === "mean" ? meanCurve(run, name) : curve(run, name, Number(choice)), COLORS[i % COLORS.length]]);
    const where = byId("pr-iou").selectedOptions[0].textContent;
    const label = `Precision by recall, ${title}, ${where}`;
    const svg = axes(byId("pr-chart"), label, "recall", "precision");
    lines.forEach(([, points, color]) => line(svg, points, color));
    svg.append(node("line", { x1: x(recall / 100), x2: x(recall / 100), y1: y(0), y2: y(1), stroke: "#15181c", "stroke-dasharray": "4 3" }));
    legend(byId("pr-legend"), lines.map(([text, points, color]) => [`${text}: AP ${fixed(average(points))}`, color]));
    const read = lines.map(([text, points]) => `${text} ${points ? fixed(points[recall] / 1000) : "unknown"}`);
    byId("pr-read").textContent = `At recall ${(recall / 100).toFixed(2)}, precision: ${read.join(", ")}.`;
  }

  function drawCalibration() {
    const one = data.calibration[Number(byId("calibration-class").value)];
    const svg = axes(byId("calibration-chart"), `Reliability diagram, ${one.name}`, "score", "precision");
    const most = Math.max(...one.counts, 1);
    const width = 1 / one.counts.length;
    one.counts.forEach((count, i) => {
      const tall = 0.25 * box.height * (count / most);
      svg.append(node("rect", { x: x(i * width) + 2, y: y(0) - tall, width: box.width * width - 4, height: tall, fill: "#cfd5dd" }));
    });
    svg.append(node("line", { x1: x(0), y1: y(0), x2: x(1), y2: y(1), stroke: "#6c747e", "stroke-dasharray": "5 4" }));
    const points = one.counts.map((count, i) => (count ? [one.scores[i], one.precision[i], count] : null)).filter(Boolean);
    svg.append(node("polyline", {
      points: points.map(([a, b]) => `${x(a)},${y(b)}`).join(" "), fill: "none", stroke: "#2456b8", "stroke-width": 2 }));
    points.forEach(([a, b, count]) => {
      const dot = node("circle", { cx: x(a), cy: y(b), r: 5, fill: "#2456b8" });
      dot.append(node("title", {}, `score ${fixed(a)}, precision ${fixed(b)}, ${count} detections`));
      svg.append(dot);
    });
    const total = one.counts.reduce((sum, count) => sum + count, 0);
    byId("calibration-read").textContent = `Expected calibration error ${fixed(one.error)}, ${total} detections.`;
    byId("calibration-rows").replaceChildren(...one.counts.map((count, i) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = `${(i * width).toFixed(1)} to ${((i + 1) * width).toFixed(1)}`;
      row.append(head);
      for (const value of [count, count ? fixed(one.scores[i]) : "\u2013", count ? fixed(one.precision[i]) : "\u2013"]) {
        const cell = document.createElement("td");
        cell.textContent = value;
        row.append(cell);
      }
      return row;
    }));
  }

  function sortTable(button) {
    const table = button.closest("table");
    const column = Number(button.dataset.column);
    const head = button.closest("th");
    const rising = head.getAttribute("aria-sort") === "descending" || (column === 0 && !head.hasAttribute("aria-sort"));
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const value = (row) => row.cells[column].firstElementChild.dataset.value;
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === ""); // unknown ones last, either way
      const order = column === 0 ? a.localeCompare(b) : Number(a) - Number(b);
      return rising ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }

  data.names.forEach((name, i) => option(byId("pr-class"), i, name));
  data.iou.forEach((iou, i) => option(byId("pr-iou"), i, `IoU ${iou.toFixed(2)}`));
  option(byId("pr-iou"), "mean", "mean over IoU 0.50 to 0.95");
  option(byId("pr-iou"), "each", "each IoU, one line");
  for (const id of ["pr-class", "pr-iou", "pr-recall"]) byId(id).addEventListener("input", drawCurves);
  drawCurves();
  if (data.calibration) {
    data.calibration.forEach((one, i) => option(byId("calibration-class"), i, one.name));
    byId("calibration-class").addEventListener("input", drawCalibration);
    drawCalibration();
  }
  for (const button of document.querySelectorAll("button.sort")) button.addEventListener("click", () => sortTable(button));
})();
