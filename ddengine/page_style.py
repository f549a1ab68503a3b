"""How the page of a report looks and what it does: its policy, style sheet and scripts."""

COLOURS = 6  # of runs in one plot; further runs repeat them with dashes
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1b1c1e; --soft: #5c5f64; --line: #dcdddf;
  --fill: #f1f2f3; --rival: #9aa0a8; --heat: #cfe0f8; --s0: #2a6fd6; --s1: #d1580b; --s2: #14875b;
  --s3: #a03ab0; --s4: #8f6f00; --s5: #c22a54; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181a; --ink: #e8e9eb; --soft: #a2a6ac;
  --line: #3a3d41; --fill: #222427; --rival: #767c85; --heat: #24406b; --s0: #6ea8ff; --s1: #ff9a57;
  --s2: #4fc796; --s3: #d98ae6; --s4: #d8b843; --s5: #ff85a3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1rem; }
p { overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
.note { color: var(--soft); font-size: .875rem; margin: .25rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { font-size: .875rem; overflow-wrap: anywhere; }
figcaption strong { margin-right: .5rem; }
.key { white-space: nowrap; margin-right: .75rem; }
.long .key { display: block; white-space: normal; }
.key svg { width: 1.5rem; height: .6rem; margin-right: .35rem; }
.picture img { max-width: 100%; height: auto; background: #fff; }
.scroll { overflow-x: auto; }
pre { padding: .75rem; background: var(--fill); border-radius: .25rem; font-size: .8125rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.card { max-height: 40rem; overflow-y: auto; }
summary { cursor: pointer; font-weight: 600; font-size: 1rem; }
details { margin-top: 1rem; }
details > * + * { margin-top: .5rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap;
  text-align: left; }
td:first-child { white-space: normal; max-width: 14rem; }
.right { text-align: right; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--s0); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td.heat { padding-left: .5rem; padding-right: .5rem; min-width: 6rem; border-right: .5rem solid transparent;
  background: linear-gradient(90deg, var(--heat) var(--part), transparent var(--part)) padding-box; }
.bars { display: grid; grid-template-columns: fit-content(40%) minmax(4rem, 1fr) max-content;
  gap: .35rem .75rem; align-items: center; font-size: .875rem; font-variant-numeric: tabular-nums; }
.bars span { overflow-wrap: anywhere; }
.track { position: relative; height: 1rem; background: var(--fill); }
.bar, .interval { position: absolute; }
.bar { inset: 0 auto 0 0; background: var(--rival); }
.subject { background: var(--s0); }
.interval { top: 25%; height: 50%; border: solid var(--ink); border-width: 0 1.5px; }
.interval::after { content: ""; position: absolute; inset: calc(50% - .75px) 0 auto; height: 1.5px;
  background: var(--ink); }
.sheet { --zoom: 1; font-size: .875rem; }
.sheet.tall { max-height: 44rem; overflow-y: auto; border: solid var(--line); border-width: 1px 0; }
.zoom { display: flex; align-items: center; gap: .5rem; font-size: .875rem; }
.row { display: grid; grid-template-columns: 6.5rem 1fr; gap: .75rem; align-items: center; padding: .3rem 0;
  border-bottom: 1px solid var(--line); }
.row p { margin: 0; }
.row small { display: block; color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 4px; min-width: 0; }
.tile { padding: 0; border: 0; background: none; cursor: zoom-in; line-height: 0; }
.tile img { width: min(calc(var(--tile) * var(--zoom)), 80vw); height: auto; image-rendering: pixelated; }
dialog { padding: 1rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--paper);
  color: var(--ink); width: min(26rem, 94vw); }
dialog::backdrop { background: #000a; }
dialog h2 { margin: 0; padding: 0; border: 0; font-size: 1.125rem; }
dialog p { margin: 0 0 .5rem; }
dialog img { width: 100%; height: auto; max-height: 60vh; object-fit: contain; image-rendering: pixelated; }
dialog form { margin-top: .75rem; text-align: right; }
.plots { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.bars + .scroll { margin-top: 2rem; }
figure > svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); fill: none; }
.curve { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
@media (max-width: 30rem) { dl { display: block; } dd { margin-bottom: .35rem; }
  .row { display: block; } .row p { margin-bottom: .25rem; } .row small { display: inline; } }
"""
SORT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[head.cellIndex].dataset.key;
  const order = (a, b) => key(a) - key(b) || key(a).localeCompare(key(b));
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
};
"""
SHEET = """
const box = document.querySelector("dialog");
const shareLine = ([name, share]) => {
  const said = document.createElement("span"), track = document.createElement("div");
  const bar = document.createElement("div"), value = document.createElement("span");
  said.textContent = name;
  track.className = "track";
  bar.className = "bar subject";
  bar.style.width = 100 * share + "%";
  track.append(bar);
  value.textContent = (100 * share).toFixed(1) + " %";
  return [said, track, value];
};
const enlarge = tile => {
  const row = tile.closest(".row"), shares = JSON.parse(tile.dataset.shares || "[]");
  box.querySelector("h2").textContent = row.getAttribute("aria-label");
  box.querySelector("p").textContent = tile.dataset.name;
  box.querySelector("figure").replaceChildren(tile.firstElementChild.cloneNode());
  box.querySelector(".bars").replaceChildren(...shares.flatMap(shareLine));
  box.shown = tile;
  if (!box.open) box.showModal();
};
for (const tile of document.querySelectorAll(".tile")) tile.onclick = () => enlarge(tile);
if (box) box.onkeydown = event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const tiles = [...box.shown.closest(".sheet").querySelectorAll(".tile")];
  const next = step && tiles[tiles.indexOf(box.shown) + step];
  if (next) enlarge(next);
};
for (const slider of document.querySelectorAll(".zoom input")) slider.oninput = () =>
  slider.closest(".zoom").nextElementSibling.style.setProperty("--zoom", slider.value);
"""
