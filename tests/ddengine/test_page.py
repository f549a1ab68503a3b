import base64
import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from ddengine.compare import Comparison, Pair
from ddengine.page import page
from ddengine.page_style import SORT

HOSTILE = '<script>alert("x")</script>\n\x1b[31m&\'"'
VOID = {"meta", "img", "br", "link", "hr", "input"}


def row(name, network, mean, ci95=(0.5, 0.625), **changes):
    base = {"name": name, "network": network, "mean": mean, "std": 0.013, "ci95": ci95, "n": 3, "lr": 0.01}
    return base | {"values": [mean] * 3, "steps": 17, "bytes": {"total": 1234}} | changes


def sheet(label="ant", name="image 1", shares=(), png="cGl4ZWxz", more=0):
    """A sheet of one tile a class, of which `more` images are left out."""
    tile = {"name": name, "png": png, "shares": [list(share) for share in shares]}
    rows = [{"label": label, "total": 1 + more, "tiles": [tile]} for label in (label, "bee", "cat")]
    return {"size": [49, 63], "rows": rows}


TABLE = {
    "dataset": "digits",
    "protocol": "standard-v1",
    "seed": 7,
    "rows": [
        row("distilled", "convnet", 0.875, [0.8125, 1.25]),
        row("random", "convnet", 0.625, [-0.5, 0.75]),
        row("full", "convnet", 0.9375, None, std=None, n=1),
    ],
}


def run(path="runs/a", **changes):
    """What a report is given of a finished and evaluated run."""
    dataset = {"name": "digits", "shape": [1, 5, 7], "preprocessing": "standard"}
    options = {"steps": 30, "window": {"min": 2, "max": None}, "follow_width": True}
    identity = {
        "matcher": {"type": "matchers.some.Matcher", "options": options, "network": None},
        "dataset": dataset,
        "budget": {"ipc": 1, "nbytes": None},
        "seed": 3,
        "precision": "fp32",
    }
    manifest = {
        "dataset": {"classes": ["ant", "bee", "cat"]},
        "recipe": {"network": {"name": "convnet", "width": 4}},
        "provenance": {"steps": 30, "seconds": 1.5},
        "count": 3,
        "kind": "pixels",
        "y_kind": "class",
        "budget": {"images": 105, "labels": 3, "extras": 24, "total": 132},
    }
    base = {"path": path, "run": identity, "table": TABLE, "set": manifest}
    base |= {"curves": {"loss": [[10, 8.0], [20, 4.0], [30, 2.0]], "lr": [[10, 1.0], [20, 1.0], [30, 1.0]]}}
    base |= {"preview": "cGl4ZWxz", "sheet": None, "card": "# A card\n\nof two lines"}
    base |= {"commands": {"distill": "ddengine distill a", "evaluate": None}}
    return base | changes


class Page(HTMLParser):
    """Elements in the order of the document, as (tag, attributes, text inside)."""

    def __init__(self, document):
        super().__init__()
        self.found, self.open = [], []
        self.feed(document)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        entry = [tag, dict(attributes), ""]
        self.found.append(entry)
        if tag not in VOID:
            self.open.append(entry)

    def handle_startendtag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for entry in self.open:
            entry[2] += data

    def all(self, tag, kind=None):
        return [
            e for e in self.found if e[0] == tag and (kind is None or kind in e[1].get("class", "").split())
        ]

    def texts(self, tag, kind=None):
        return [entry[2] for entry in self.all(tag, kind)]


def points(polyline):
    return [tuple(map(float, pair.split(","))) for pair in polyline[1]["points"].split()]


def test_page_is_one_balanced_document_that_asks_for_nothing():
    document = page([run(), run("runs/b")])
    parsed = Page(document)
    assert document.startswith("<!doctype html>\n")
    assert "://" not in document
    assert not parsed.all("link")
    assert parsed.found[0][1] == {"lang": "en"}
    assert [e[1]["src"] for e in parsed.all("img")] == ["data:image/png;base64,cGl4ZWxz"] * 2
    assert not [e for e in parsed.found if e[0] != "img" and {"src", "href"} & e[1].keys()]
    assert "default-src 'none'" in str(parsed.all("meta"))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        e[1] for e in parsed.all("meta")
    ]
    assert "prefers-color-scheme: dark" in parsed.texts("style")[0]


def test_settings_stand_in_pairs():
    parsed = Page(page([run()]))
    found = dict(zip(parsed.texts("dt"), parsed.texts("dd"), strict=True))
    assert found["dataset"] == "digits, images of 1x5x7, standard"
    assert found["classes"] == "3: ant, bee, cat"
    assert found["options"] == "steps 30, window.min 2, follow_width true"
    assert found["network"] == "name convnet, width 4"
    assert found["budget"] == "ipc 1"
    assert found["size"] == "3 images (pixels, labels: class)"
    assert found["bytes"] == "images 105, labels 3, extras 24, total 132"
    assert found["made in"] == "30 steps on ?, threads ?"


def test_table_has_the_cells_and_the_numbers_that_it_is_sorted_by():
    parsed = Page(page([run()]))
    cells, keys = parsed.texts("td"), [e[1]["data-key"] for e in parsed.all("td")]
    assert parsed.texts("th")[:8] == parsed.texts("button")[:8]
    assert parsed.texts("th")[:4] == ["set", "network", "accuracy %", "95 % interval"]
    assert cells[:8] == ["distilled", "convnet", "87.5 ± 1.3", "81.2 to 125.0", "3", "0.01", "17", "1,234"]
    assert keys[:8] == ["distilled", "convnet", "0.875", "0.8125", "3", "0.01", "17", "1234"]
    assert keys[16:20] == ["full", "convnet", "0.9375", "-1"]


def test_bars_follow_the_rows_and_stay_in_the_track():
    parsed = Page(page([run()]))
    bars = [e[1] for e in parsed.all("div", "bar")]
    assert [bar["style"] for bar in bars] == ["width:87.50%", "width:62.50%", "width:93.75%"]
    assert ["subject" in bar["class"] for bar in bars] == [True, False, False]
    intervals = [e[1]["style"] for e in parsed.all("div", "interval")]
    assert intervals == ["left:81.25%;width:18.75%", "left:0.00%;width:75.00%"]


def test_bars_name_the_network_where_there_are_two():
    rows = [row("distilled", "convnet", 0.5), row("distilled", "mlp", 0.25)]
    parsed = Page(page([run(table=TABLE | {"rows": rows})]))
    names = [text for text in parsed.texts("span") if text.startswith("distilled")]
    assert names == ["distilled, convnet", "distilled, mlp"]


def test_a_curve_has_a_point_for_each_line_of_the_log_on_the_axes():
    parsed = Page(page([run()]))
    loss, lr = parsed.all("polyline")
    assert points(loss) == [(58, 12), (193, pytest.approx(110.7, abs=0.05)), (328, 160)]
    assert {y for _, y in points(lr)} == {86}
    labels = parsed.texts("text")
    assert labels == ["8", "2", "step 10", "30", "1", "1", "step 10", "30"]


def test_runs_share_a_plot_its_axes_and_a_legend():
    other = run("runs/b", curves={"loss": [[10, 14.0], [50, 2.0]], "gap": [[50, 0.0]]})
    parsed = Page(page([run(), other]))
    assert [e[1]["aria-label"] for e in parsed.all("svg") if "aria-label" in e[1]] == [
        "loss by step",
        "lr by step",
        "gap by step",
    ]
    first, second, lr, gap = parsed.all("polyline")
    assert [e[1]["stroke"] for e in (first, second, lr, gap)] == [f"var(--s{n})" for n in (0, 1, 0, 1)]
    assert points(first) == [(58, 86), (125.5, pytest.approx(135.3, abs=0.05)), (193, 160)]
    assert points(second) == [(58, 12), (328, 160)]
    assert (len(points(lr)), points(gap)) == (3, [(193, 86)])
    assert parsed.texts("p", "long") == ["runs/aruns/b"]


def test_runs_beyond_the_colours_are_told_apart_by_dashes():
    parsed = Page(page([run(f"runs/{n}", curves={"loss": [[10, n]]}) for n in range(14)]))
    strokes = [(e[1]["stroke"], e[1].get("stroke-dasharray")) for e in parsed.all("polyline")]
    assert len(strokes) == len(set(strokes)) == 14


def rich(said):
    """What a run may have beside: every text in it is `said`."""
    scored = {"hlr": 0.25, "ior": -0.125, "lrs": 0.2689, "ars": None}
    parts = {"accuracies": {said: 0.5}, "rows": {said: said}, "weight": 0.5, "missing": {said: [said]}}
    scores = {**scored, "network": said, "networks": {said: scored}, "components": parts}
    more = {"ece": 0.0625, "worst_class": 0.25, "per_class": [0.5, None, 1.0], "robust": {said: 0.125}}
    rows = [row("distilled", said, 0.5, **more), row(said, said, 0.5)]
    table = TABLE | {"dataset": said, "protocol": said, "rows": rows, "scores": scores}
    found = run(said, table=table, preview=said, sheet=sheet(said, said, [(said, 0.5)], said, 2), card=said)
    found["run"] = {
        "matcher": {"type": said, "options": {said: said}},
        "dataset": {"name": said, "shape": [1, 5, 7], "preprocessing": said},
        "budget": {said: said},
        "seed": said,
        "experts": said,
    }
    found["set"] = found["set"] | {
        "dataset": {"classes": [said] * 3},
        "recipe": {"network": {said: said}},
        "provenance": {"steps": said, "device": said, "versions": {said: said}, "seconds": said},
    }
    found["curves"] = {said: [[10, 1.0]]}
    found["commands"] = {"distill": said, "evaluate": said}
    return found


def test_everything_from_files_is_escaped():
    pairs = [
        Pair(said, said, said, (Comparison(said, said, (0.5,), (0.25,), {}),)) for said in ("a", HOSTILE)
    ]
    safe = Page(page([rich("a")] * 2, pairs[0]))
    document = page([rich(HOSTILE)] * 2, pairs[1])
    parsed = Page(document)
    assert [e[0] for e in parsed.all("script")] == ["script"]
    assert [e[0] for e in parsed.found] == [e[0] for e in safe.found]
    assert [list(e[1]) for e in parsed.found] == [list(e[1]) for e in safe.found]
    assert "\x1b" not in document
    assert parsed.texts("h2")[1] == '<script>alert("x")</script>\\n\\x1b[31m&\'"'
    assert json.loads(parsed.all("button", "tile")[0][1]["data-shares"]) == [[HOSTILE, 0.5]]


def test_tiles_stand_in_rows_of_their_class_and_open_in_a_dialog():
    tiled = run(preview=None, sheet=sheet(shares=[("bee", 0.75), ("ant", 0.25)], more=4))
    parsed = Page(page([tiled]))
    rows = [e[1]["aria-label"] for e in parsed.all("div", "row")]
    assert rows == ["class ant", "class bee", "class cat"]
    assert parsed.texts("small") == ["4 more"] * 3
    (picture, *others) = [e[1] for e in parsed.all("img")]
    assert (picture["alt"], picture["width"], picture["height"]) == ("ant, image 1", "49", "63")
    assert len(others) == 2
    assert any("3 shown, 12 more" in said for said in parsed.texts("p", "note"))
    assert json.loads(parsed.all("button", "tile")[0][1]["data-shares"]) == [["bee", 0.75], ["ant", 0.25]]
    assert len(parsed.all("dialog")) == 1
    assert not Page(page([run()])).all("dialog")


def test_a_preview_stands_alone_or_folded_under_the_tiles():
    composed = run(sheet=sheet())
    composed["set"] = composed["set"] | {"kind": "compensated"}
    parsed = Page(page([composed]))
    assert len(parsed.all("img")) == 4
    assert parsed.texts("summary")[0] == "Bases by class, and what compensators add to some of them"
    assert Page(page([run()])).texts("summary") == ["Data card"]
    none = Page(page([run(preview=None)]))
    assert any(said.startswith("No picture: it is larger") for said in none.texts("p"))


def test_many_classes_scroll_in_themselves_and_those_without_room_are_counted():
    many = sheet()
    many["rows"] = many["rows"] * 9 + [{"label": "dog", "total": 6, "tiles": []}] * 2
    parsed = Page(page([run(sheet=many)]))
    assert "tall" in parsed.all("div", "sheet")[0][1]["class"]
    assert parsed.all("div", "sheet")[0][1]["tabindex"] == "0"
    assert "2 classes are not shown." in parsed.texts("p")
    assert "tall" not in Page(page([run(sheet=sheet())])).all("div", "sheet")[0][1]["class"]


def test_scores_measures_classes_and_costs_are_tables():
    found = rich("ant")
    found["set"]["dataset"] = {"classes": ["ant", "bee", "cat"]}
    found["set"]["provenance"] = {"seconds": 1.25, "peak_memory_bytes": 3 << 20}
    parsed = Page(page([found]))
    heads, cells = parsed.texts("th"), parsed.texts("td")
    assert heads[9:13] == ["HLR", "IOR", "LRS", "ARS"]
    assert [c for c in cells if c.startswith(("0.25", "-0.12", "0.26"))] == ["0.250", "-0.125", "0.269"]
    heat = [(e[2], e[1]["style"]) for e in parsed.all("td", "heat")]
    assert heat == [("50.0", "--part:50.0%"), ("-", "--part:0.0%"), ("100.0", "--part:100.0%")]
    assert heads[-4:] == ["total bytes", "distil s", "peak MiB", "train s"]
    assert cells[-12:-6] == ["distilled", "ant", "1,234", "1.2", "3.0", "-"]


def test_a_card_is_folded_and_shown_as_it_is():
    parsed = Page(page([run(card="# <b>A</b>\n\n- one & two")]))
    assert parsed.texts("pre", "card") == ["# <b>A</b>\n\n- one & two"]
    assert not Page(page([run(card=None)])).all("details")


def test_a_pair_comes_first_and_a_refused_one_says_why():
    pair = Pair("a", "b", "digits, p, seed 3", (Comparison("mlp", "accuracy", (0.5, 0.75), (0.25, 0.5), {}),))
    parsed = Page(page([run(), run()], pair))
    assert parsed.texts("h2")[:2] == ["A against B", "runs/a"]
    assert parsed.texts("strong")[0] == "mlp: A above B by 25.0 points"
    assert parsed.texts("td")[:6] == ["mlp", "accuracy", "62.5", "37.5", "+25.0", "+25.0 to +25.0"]
    refused = Page(page([run(), run()], Pair("a", "b", refused="other seeds")))
    assert refused.texts("p")[0] == "other seeds"


def test_a_run_that_is_not_evaluated_or_not_finished_says_so():
    parsed = Page(
        page([run("my run", table=None), run(table=None, set=None, preview=None, card=None, curves={})])
    )
    said = parsed.texts("p")
    assert said[:2] == [
        "not evaluated yet: ddengine evaluate 'my run'",
        "not finished: repeat its distill command",
    ]
    assert len(parsed.all("img")) == 1
    assert [text for text in parsed.texts("h3") if "Bytes" in text] == ["Bytes and cost"]
    assert Page(page([run(curves={})])).texts("h2") == ["runs/a"]


def test_commands_are_shown_and_what_no_command_says_is_named():
    parsed = Page(page([run()]))
    assert parsed.texts("code") == [
        "ddengine distill a",
        "# evaluate: made from Python or by the demo: no command line says this",
    ]


@pytest.mark.parametrize(
    ("column", "clicks", "order"),
    [(2, 1, "b c a"), (2, 2, "a c b"), (0, 1, "a b c"), (0, 2, "c b a"), (7, 1, "c a b")],
)
@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
def test_a_click_on_a_header_sorts_by_its_column(column, clicks, order, tmp_path):
    rows = [
        row("a", "mlp", 0.9, bytes={"total": 1000}),
        row("b", "mlp", 0.1, bytes={"total": 20000}),
        row("c", "mlp", 0.5, bytes={"total": 300}),
    ]
    parsed = Page(page([run(table=TABLE | {"rows": rows})]))
    keys = [e[1]["data-key"] for e in parsed.all("td")]
    table = [keys[i : i + 8] for i in range(0, 24, 8)]
    fake = f"""
const rows = {table}.map(keys => ({{ cells: keys.map(key => ({{ dataset: {{ key }} }})) }}));
const body = {{ rows, append(...sorted) {{ this.rows = sorted; }} }};
const heads = rows[0].cells.map((_, cellIndex) => ({{ cellIndex, said: {{}},
  closest: () => ({{ tBodies: [body] }}), getAttribute(name) {{ return this.said[name] ?? null; }},
  setAttribute(name, value) {{ this.said[name] = value; }},
  removeAttribute(name) {{ delete this.said[name]; }} }}));
heads.forEach(head => head.parentNode = {{ children: heads }});
const buttons = heads.map(parentNode => ({{ parentNode }}));
const document = {{ querySelectorAll: () => buttons }};
{SORT}
for (let i = 0; i < {clicks}; i++) buttons[{column}].onclick();
console.log(JSON.stringify([body.rows.map(row => row.cells[0].dataset.key), heads.map(h => h.said)]));
"""
    (tmp_path / "page.js").write_text(fake)
    words = ["node", tmp_path / "page.js"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    said = [{} for _ in range(8)]
    said[column] = {"aria-sort": "ascending" if clicks == 1 else "descending"}
    assert json.loads(done.stdout) == [order.split(), said]


def test_the_picture_comes_back_from_the_page():
    (image,) = Page(page([run(preview=base64.b64encode(b"\x89PNG\x00").decode())])).all("img")
    assert base64.b64decode(image[1]["src"].partition(",")[2]) == b"\x89PNG\x00"
    assert image[1]["alt"] == "the distilled images, one row a class: ant, bee, cat"
