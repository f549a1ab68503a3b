"""The page of a report in a browser: what it shows, what it does, and that it asks for nothing."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from ddengine.compare import pair_of
from ddengine.page import page
from ddengine.rng import Rng
from ddengine.runs import Run
from ddengine.types import DataSpec
from synth import Compensated, DistilledSet, Pixels

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is there")
QUIET = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
QUIET += " disable-component-update disable-sync disable-dev-shm-usage enable-logging=stderr dump-dom"
CLASSES = ("ant", "bee", "a class with quite a long name, <b>as some have</b>")
SPEC = DataSpec("toy", (3, 5, 7), CLASSES, (0.5,) * 3, (0.25,) * 3)
ABOUT = "const found = {}; addEventListener('load', () => { %s; document.body.insertAdjacentHTML("
ABOUT += "'beforeend', '<pre id=found></pre>'); document.getElementById('found').textContent = "
ABOUT += "JSON.stringify(found); });"


def browse(folder, document, probe, scheme=1):
    """What the script `probe` found on the loaded page, and what the browser's console said."""
    (folder / "page.html").write_text(document.replace("</body>", f"<script>{ABOUT % probe}</script></body>"))
    flags = [f"--{flag}" for flag in QUIET.split()]
    flags += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--window-size=1000,900"]
    flags.append(f"--blink-settings=preferredColorScheme={scheme}")
    done = subprocess.run(
        [CHROMIUM, *flags, (folder / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found)), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def row(name, mean, total, network="convnet"):
    head = {"name": name, "network": network, "metric": "accuracy", "mean": mean, "std": 0.0125, "n": 2}
    values = [mean - 0.01, mean + 0.01]
    more = {"ece": 0.0625, "worst_class": 0.25, "per_class": [0.5, None, 1.0], "robust": {"blur": 0.125}}
    cost = {"steps": 17, "bytes": {"images": total, "total": total}, "train_seconds": 2.5, "lr": 0.01}
    return head | {"ci95": [mean - 0.1, mean + 0.1], "values": values, "network_spec": {}} | more | cost


def table(shift):
    rows = [row("distilled", 0.5 + shift, 9000), row("random", 0.25, 20000), row("full", 0.75, 1000)]
    scored = {"hlr": 0.25, "ior": 0.125, "lrs": 0.25, "ars": None}
    scores = scored | {"network": "convnet", "networks": {"convnet": scored}}
    scores["components"] = {"accuracies": {"subject": 0.5}, "rows": {"subject": "distilled"}}
    head = {"dataset": "toy", "protocol": "standard-v1", "seed": 7, "recipe": {"steps": 17}}
    return head | {"rows": rows, "scores": scores, "cost": {"seconds": 1.5}}


def shown(folder, name, synth, shift):
    """A run as a page gets it, of a set that was saved and read."""
    made = DistilledSet.make(synth, recipe={}, provenance={"seconds": 1.5, "steps": 3})
    saved = made.save(folder / name)
    identity = {
        "matcher": {"type": "some.Matcher", "options": {"an_option_of_some_length": "x" * 90}},
        "dataset": {"name": "toy", "shape": [3, 5, 7]},
        "budget": {"ipc": 4},
    }
    curves = {"loss": [(1, 4.0), (2, 2.0), (3, 1.0)]}
    commands = {"distill": f"ddengine distill {'option=value ' * 20}", "evaluate": "ddengine evaluate a"}
    preview, card = (saved / "preview.png").read_bytes(), (saved / "README.md").read_text()
    made = DistilledSet.load(saved)
    return Run(folder / name, identity, table(shift), curves, made, preview, card, commands).shown(2)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """The page of a pair of runs: pixels with soft labels, and bases with compensators."""
    folder, draw = tmp_path_factory.mktemp("runs"), Rng(3)
    x = torch.rand(12, 3, 5, 7, generator=draw.torch("x")) - 0.5
    shares = torch.tensor([[0.75, 0.25, 0.0], [0.125, 0.625, 0.25], [0.0, 0.25, 0.75]]).repeat(4, 1)
    bases = torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8, generator=draw.torch("bases"))
    added = torch.rand(1, 2, 3, 5, 7, generator=draw.torch("added")) * 0.25
    classes, group = torch.tensor([0, 0, 1, 1, 2, 2]), torch.zeros(6, dtype=torch.int64)
    composed = Compensated(bases, classes, added, group, SPEC)
    runs = [shown(folder, "pixels", Pixels(x, shares, SPEC, "prob"), 0.125)]
    runs.append(shown(folder, "composed", composed, 0.0))
    return page(runs, pair_of(runs))


PROBE = """
const all = path => [...document.querySelectorAll(path)], first = path => document.querySelector(path);
const press = key => box.dispatchEvent(new KeyboardEvent("keydown", { key }));
const told = () => [first("dialog h2").textContent, first("dialog p").textContent, box.open];
found.images = all("img").map(image => image.naturalWidth);
found.requests = performance.getEntriesByType("resource").map(entry => entry.name)
  .filter(name => !name.startsWith("data:"));
const ours = all("table").find(table => table.textContent.includes("95 % interval") &&
  table.textContent.includes("random"));
const order = () => [...ours.tBodies[0].rows].map(row => row.cells[0].textContent);
const click = column => { ours.tHead.rows[0].cells[column].firstChild.click(); return order(); };
found.sorted = [order(), click(7), click(7), click(0)];
found.sorts = [...ours.tHead.rows[0].cells].map(cell => cell.getAttribute("aria-sort"));
const tiles = all(".tile"), wide = () => first(".tile img").getBoundingClientRect().width;
found.tiles = [tiles.length, tiles[0].tagName, wide()];
tiles[1].focus();
found.focused = document.activeElement === tiles[1];
tiles[1].click();
found.opened = [...told(), all("dialog .bars > span").map(span => span.textContent).join(" ")];
found.enlarged = [first("dialog img").naturalWidth > 0, first("dialog img").alt];
press("ArrowRight"); press("ArrowRight"); press("ArrowRight");
found.moved = told();
press("ArrowLeft");
found.back = told();
first("dialog button").click();
found.closed = !box.open;
const slider = first(".zoom input");
slider.value = 3; slider.dispatchEvent(new Event("input"));
found.zoomed = wide();
found.colours = [getComputedStyle(document.body), getComputedStyle(first(".note"))]
  .map(style => [style.color, getComputedStyle(document.body).backgroundColor]);
found.unnamed = all("img:not([alt])").length + all("button").filter(button => !button.textContent &&
  !button.querySelector("img[alt]")).length;
found.heads = all("h1, h2, h3").map(head => +head.tagName[1]);
"""


def luminance(colour):
    """Relative luminance by WCAG 2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(pair):
    low, high = sorted(map(luminance, pair))
    return (high + 0.05) / (low + 0.05)


def test_the_page_shows_sorts_opens_and_zooms_without_an_error(document, tmp_path):
    assert not re.search(r"https?://|(?:src|href)=\"(?!data:)", document)
    found, said = browse(tmp_path, document, PROBE)
    assert said == []
    assert found["requests"] == []
    assert len(found["images"]) == 12 + 18 + 1 and min(found["images"]) > 0
    names = ["distilled", "random", "full"]
    assert found["sorted"] == [
        names,
        ["full", "distilled", "random"],
        ["random", "distilled", "full"],
        sorted(names),
    ]
    assert found["sorts"] == ["ascending", *[None] * 7]
    assert found["tiles"][:2] == [30, "BUTTON"] and found["tiles"][2] >= 48
    assert found["focused"]
    assert found["opened"] == ["class ant", "image 2", True, "ant 75.0 % bee 25.0 % " + CLASSES[2] + " 0.0 %"]
    assert found["enlarged"] == [True, "ant, image 2"]
    assert found["moved"] == ["class bee", "image 1", True]
    assert found["back"] == ["class ant", "image 4", True]
    assert found["closed"]
    assert found["zoomed"] == pytest.approx(3 * found["tiles"][2], abs=1)
    assert found["unnamed"] == 0
    assert found["heads"][0] == 1 and found["heads"].count(1) == 1
    assert luminance(found["colours"][0][1]) > 0.8
    assert min(map(contrast, found["colours"])) >= 4.5


NARROW = """
const inside = document.querySelector("iframe").contentDocument;
const held = element => element.parentElement.closest(".scroll, pre, dialog, .sheet.tall");
found.width = [inside.documentElement.clientWidth, inside.documentElement.scrollWidth];
found.wide = [...inside.body.querySelectorAll("*")].filter(element => !held(element) &&
  element.getBoundingClientRect().right > 360.5).map(element => element.outerHTML.slice(0, 80));
found.colours = [getComputedStyle.call(window, inside.body), inside.querySelector(".note")]
  .map(part => part.color || getComputedStyle(part).color);
found.paper = getComputedStyle(inside.body).backgroundColor;
found.elements = inside.body.querySelectorAll("*").length;
"""


def test_the_page_fits_a_phone_and_is_dark_where_that_is_preferred(document, tmp_path):
    frame = f'<iframe style="width:360px;height:800px;border:0" srcdoc="{html.escape(document)}"></iframe>'
    found, said = browse(tmp_path, f"<!doctype html><body>{frame}</body>", NARROW, scheme=0)
    assert said == []
    assert found["elements"] > 300
    assert found["wide"] == []
    assert found["width"][1] <= found["width"][0] <= 360
    assert luminance(found["paper"]) < 0.05
    assert min(contrast((colour, found["paper"])) for colour in found["colours"]) >= 4.5


def test_a_page_that_asks_for_something_is_noticed(document, tmp_path):
    asks = document.replace("</main>", '<img alt="" src="https://example.invalid/a.png"></main>')
    found, said = browse(tmp_path, asks, "found.images = [...document.images].map(i => i.naturalWidth)")
    assert 0 in found["images"]
    assert any("Content Security Policy" in line for line in said)
