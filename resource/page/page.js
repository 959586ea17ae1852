"use strict";
// Sorting, filtering and drawing. All words of others come in as JSON and leave through textContent or plain().
const charts = JSON.parse(document.getElementById("charts").textContent);
const byId = (id) => document.getElementById(id);
const narrow = () => window.innerWidth < 600;

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
// Plotly reads some tags in its texts: none of them may come from a record.
function plain(text) { return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\n/g, "<br>"); }

function trace(series, panel, shown) {
  const keep = series.x.map((_, i) => !series.cells.length || !shown || shown.has(series.cells[i]));
  const pick = (values) => values.filter((_, i) => keep[i]);
  const color = colour("--" + series.colour);
  const words = panel.lanes.length > 0;
  const found = {
    name: plain(series.name), x: pick(series.x), y: pick(series.y).map((v) => (words ? plain(v) : v)),
    text: pick(series.hover.length ? series.hover : series.x.map(() => series.name)).map(plain),
    // Open marks: those that lie under others are seen.
    marker: { color, symbol: series.shape + (series.kind !== "points" ? "" : series.shape === "x" ? "-thin-open" : "-open"), size: panel.bare ? 6 : narrow() ? 8 : 9, line: { width: panel.bare ? 1 : 1.6, color } },
    customdata: pick(series.cells),
  };
  const at = `${plain(panel.x_label)} %{x:.4~g}` + (words ? "" : `<br>${plain(panel.y_label)} %{y:.4~g}`);
  found.hovertemplate = `%{text}<br>${at}<extra></extra>`;
  if (series.kind === "bars") {
    return Object.assign(found, { type: "bar", orientation: "h", marker: { color }, texttemplate: "%{x:.1f}", textposition: "outside", cliponaxis: false });
  }
  found.type = "scatter";
  if (series.kind === "points") { found.mode = "markers"; return found; }
  found.mode = series.marked ? "lines+markers" : "lines";
  Object.assign(found.marker, { size: 7, line: { width: 0 } });
  found.line = { color, width: 1.6, dash: series.kind === "dotted" ? "dot" : "solid" };
  return found;
}

function gridTrace(grid, width) {
  const words = 7 * Math.max(...grid.rows.map((row) => row.length)); // about as wide as the longest name of a row
  const written = (width - words - (narrow() ? 20 : 90)) / grid.columns.length >= 22;
  return {
    type: "heatmap", z: grid.values, x: grid.columns.map(plain), y: grid.rows.map(plain), zmin: 0, zmax: 100, xgap: 1, ygap: 1,
    colorscale: [0, 0.5, 1].map((at, n) => [at, colour("--scale-" + n)]),
    texttemplate: written ? "%{z:.0f}" : "", hovertemplate: "%{y}<br>class %{x}: %{z:.2f} %<extra></extra>",
    colorbar: { thickness: 10, title: { text: "%", side: "right" }, outlinecolor: colour("--line") }, showscale: !narrow(),
  };
}

// Round numbers on a logarithmic axis: 1, 2 and 5 of each decade where there are few of them.
function decades(values) {
  const low = Math.floor(Math.log10(Math.min(...values))), high = Math.ceil(Math.log10(Math.max(...values)));
  const tickvals = [];
  for (let k = low; k <= high; k++) for (const m of high - low > 3 ? [1] : [1, 2, 5]) tickvals.push(m * 10 ** k);
  return { tickvals, ticktext: tickvals.map((v) => v.toLocaleString("en")), tickmode: "array" };
}

function layout(panel) {
  const line = colour("--line");
  const axis = (label) => ({ title: { text: plain(label), standoff: 8 }, gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: narrow() });
  const rows = panel.grid ? panel.grid.rows.length : panel.lanes.length;
  const bars = panel.series.filter((s) => s.kind === "bars").length;
  const found = {
    height: panel.grid ? 140 + 24 * rows : rows ? 110 + rows * (bars ? 12 + 11 * bars : 26) : panel.large ? 420 : 280,
    margin: { l: 48, r: 14, t: narrow() ? 8 : 28, b: 44 }, showlegend: false, hovermode: "closest", dragmode: narrow() ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink"), size: 12 }, bargap: 0.25,
    xaxis: axis(panel.x_label), yaxis: axis(panel.y_label),
    hoverlabel: { bgcolor: colour("--field"), font: { color: colour("--ink") }, align: "left" },
    modebar: { bgcolor: colour("--paper"), color: colour("--soft"), activecolor: colour("--link") },
  };
  const last = Math.max(...panel.series.flatMap((s) => s.x.filter(Number.isFinite)));
  if (panel.x_label.startsWith("epoch") && last <= 8) found.xaxis.dtick = 1;
  if (panel.x_range) found.xaxis.range = panel.x_range;
  if (panel.y_range) found.yaxis.range = panel.y_range;
  if (panel.cut !== null) {
    found.shapes = [{ type: "line", x0: panel.cut, x1: panel.cut, yref: "paper", y0: 0, y1: 1, line: { color: colour("--ink"), width: 1.4, dash: "dash" } }];
    found.annotations = [{ x: panel.cut, yref: "paper", y: 1, text: "cut " + panel.cut.toFixed(2), showarrow: false, xanchor: "left", yanchor: "top", xshift: 3 }];
  }
  if (panel.log_x) Object.assign(found.xaxis, { type: "log" }, decades(panel.series.flatMap((s) => s.x)));
  if (panel.lanes.length) {
    Object.assign(found.yaxis, { type: "category", categoryorder: "array", categoryarray: panel.lanes.map(plain), range: [panel.lanes.length - 0.5, -0.5] });
  }
  if (panel.grid) {
    Object.assign(found.xaxis, { type: "category", tickangle: -45, showgrid: false });
    Object.assign(found.yaxis, { type: "category", autorange: "reversed", showgrid: false });
    for (const side of [found.xaxis, found.yaxis]) Object.assign(side, { showline: true, mirror: true }); // an empty cell looks like the paper
  }
  if (panel.bare) {
    Object.assign(found.margin, { l: 4, r: 4, b: 4 });
    for (const side of [found.xaxis, found.yaxis]) Object.assign(side, { showticklabels: false, showgrid: false, zeroline: false, showline: true, mirror: true });
  }
  return found;
}

const config = {
  displaylogo: false, showSendToCloud: false, plotlyServerURL: "", responsive: true, toImageButtonOptions: { format: "svg" },
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // plotly's own choice offers to upload the chart
};

function draw(figure, shown) {
  const panels = charts[figure.dataset.chart];
  const place = figure.querySelector(".panels");
  while (place.children.length < panels.length) { // all boxes before the first chart, which takes the width that it finds
    const box = document.createElement("div"), heading = document.createElement("h4"), plot = document.createElement("div");
    heading.textContent = panels[place.children.length].title;
    heading.hidden = !heading.textContent;
    plot.className = "plot";
    box.append(heading, plot);
    place.append(box);
  }
  const traces = panels.map((panel) => (panel.grid ? [gridTrace(panel.grid, place.clientWidth)] : panel.series.map((series) => trace(series, panel, shown))));
  panels.forEach((panel, i) => { // every box is shown or hidden before the first chart is drawn, for what is shown sets the width of all
    place.children[i].hidden = shown && panel.series.some((s) => s.cells.length) && traces[i].every((t) => !t.x.length);
  });
  panels.forEach((panel, i) => {
    const box = place.children[i];
    if (box.hidden) Plotly.purge(box.lastChild);
    else Plotly.react(box.lastChild, traces[i], layout(panel), { ...config, displayModeBar: narrow() ? false : "hover" });
  });
  figure.querySelector(".nothing").hidden = [...place.children].some((box) => !box.hidden);
}

// --- tables and filters ------------------------------------------------------------------------------------------

function sortBy(heading) {
  const table = heading.closest("table"), body = table.tBodies[0], column = heading.cellIndex;
  const falling = heading.getAttribute("aria-sort") === "ascending";
  table.classList.add("sorted"); // lines between blocks would mean nothing now
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const value = (row) => row.cells[column].dataset.v ?? "";
  const numeric = heading.classList.contains("number");
  const compare = (a, b) => {
    const [u, v] = [value(a), value(b)];
    if (u === "" || v === "") return (u === "") - (v === ""); // what is missing stays at the end
    const order = numeric ? Number(u) - Number(v) : u.localeCompare(v, undefined, { numeric: true });
    return falling ? -order : order;
  };
  body.append(...[...body.rows].sort(compare));
}

const selects = [...document.querySelectorAll("#filters select")];

function filter() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = new Set();
  let total = 0;
  for (const row of document.querySelectorAll("#means tbody tr, #runs tbody tr")) {
    const text = [row.textContent, ...[...row.cells].map((cell) => cell.title), ...selects.map((s) => row.dataset[s.name])].join(" ").toLowerCase();
    const notRun = row.classList.contains("not-run");
    const fits = words.every((word) => text.includes(word)) && selects.every((s) => !s.value || row.dataset[s.name] === s.value);
    row.hidden = !fits || (notRun && !byId("not-run").checked);
    if (row.dataset.cell !== undefined) {
      total += 1;
      if (!row.hidden) shown.add(Number(row.dataset.cell));
    }
  }
  for (const name of ["means", "runs"]) byId(name).querySelector(".nothing").hidden = [...byId(name).querySelectorAll("tbody tr")].some((row) => !row.hidden);
  byId("count").textContent = `${shown.size} of ${total} models`;
  for (const figure of document.querySelectorAll("main > figure[data-chart]")) draw(figure, shown);
}

function pickRecord() {
  for (const article of document.querySelectorAll("#one article")) {
    article.hidden = article.dataset.record !== byId("record").value;
    if (!article.hidden) for (const figure of article.querySelectorAll("figure[data-chart]")) draw(figure, null);
  }
}

function drawAll() { filter(); pickRecord(); }

for (const heading of document.querySelectorAll("thead th")) heading.querySelector("button").addEventListener("click", () => sortBy(heading));
byId("filters").addEventListener("input", filter);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("record").addEventListener("change", pickRecord);
let wasNarrow = narrow();
window.addEventListener("resize", () => { if (narrow() !== wasNarrow) { wasNarrow = narrow(); drawAll(); } });
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
document.documentElement.dataset.ready = "yes";
