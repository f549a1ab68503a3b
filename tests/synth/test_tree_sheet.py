"""The picture of a set of graphs or trees."""

import warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from PIL import Image

from ddengine.errors import UsageError
from ddengine.graphs import Graphs, GraphSpec
from ddengine.ops.dag import take, trees_of
from ddengine.rng import Rng
from synth.sketches import graph_cells, spring_layout, tree_cells
from synth.tree_sheet import CELL, COLORS, tree_sheet

HOSTILE = [
    "$x^2_",
    "$\\frac{",
    "<b>&amp;",
    "w" * 200,
    "two\nlines\t\x1b[31m",
    "分子类",
    "\udcff",
    "",
    "__init__",
    "%s{0}",
]


def rings(classes=("a", "b"), each=3, sizes=(5, 6, 7), codes=4):
    """Rings with a tail and an isolated node, of random codes."""
    generator, parts, batch, start = Rng(1).numpy("rings"), [], [], 0
    for graph in range(len(classes) * each):
        n = sizes[graph % len(sizes)]
        ring = [(start + i, start + (i + 1) % (n - 2)) for i in range(n - 3)]
        parts += [*ring, (start + n - 3, start), (start, start + n - 2)]
        batch += [graph] * n
        start += n
    ends = torch.tensor([*parts, *((b, a) for a, b in parts)]).T
    return Graphs(
        x=torch.from_numpy(generator.integers(0, codes, (start, 1))),
        edge_index=ends,
        edge_attr=torch.zeros((ends.shape[1], 0), dtype=torch.int64),
        batch=torch.tensor(batch),
        y=torch.arange(len(classes)).repeat_interleave(each),
        spec=GraphSpec("rings", tuple(classes), (codes,)),
    )


def picture(decoded, folder):
    """The sheet as pixels, after a look at its file."""
    path = folder / "sheet.png"
    tree_sheet(decoded, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as image:
        assert not image.info and image.mode == "RGB"
        return np.asarray(image)


def boxes(pixels):
    """How many boxes of items stand below one another, and how many beside one another."""
    inside = (pixels == [int(CELL[i : i + 2], 16) for i in (1, 3, 5)]).all(2)
    return tuple(
        int((np.diff(inside.mean(axis) > 0.1, prepend=False) == 1).sum() + 1) // 2 for axis in (1, 0)
    )


def holds(pixels, color):
    return bool((pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(2).any())


FORMS = [lambda graphs: graphs, lambda graphs: trees_of(graphs, 2), lambda graphs: trees_of(graphs, 0)]


@pytest.mark.parametrize("form", FORMS, ids=["graphs", "trees", "no hops"])
def test_every_class_has_a_row_of_its_items_and_their_codes_have_colours(form, tmp_path):
    pixels = picture(form(rings(("a", "b", "c"), 4)), tmp_path)
    assert boxes(pixels) == (3, 4)
    assert [holds(pixels, color) for color in COLORS] == [True] * 4 + [False] * 2
    height, width = pixels.shape[:2]
    assert 3 * 150 < height < 3 * 180 + 90 and 4 * 170 < width < 4 * 250 + 150


@pytest.mark.parametrize("form", FORMS, ids=["graphs", "trees", "no hops"])
def test_the_same_set_gives_the_same_bytes_and_another_set_does_not(form, tmp_path):
    matplotlib_settings = dict(matplotlib.rcParams)
    tree_sheet(form(rings()), tmp_path / "a.png")
    matplotlib.rcParams["lines.linewidth"], matplotlib.rcParams["text.hinting"] = 9, "none"
    matplotlib.rcParams["path.sketch"] = (9.0, 9.0, 9.0)
    try:
        tree_sheet(form(rings()), tmp_path / "b.png")
    finally:
        matplotlib.rcParams.update(matplotlib_settings)
    tree_sheet(form(rings(sizes=(5, 6, 8))), tmp_path / "c.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("form", FORMS[:2], ids=["graphs", "trees"])
def test_odd_names_of_classes_and_sets_are_drawn_as_they_are_without_a_warning(form, tmp_path):
    for names in (HOSTILE[:5], HOSTILE[5:]):
        graphs = rings(names, 1)
        graphs = replace(graphs, spec=replace(graphs.spec, name=names[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            odd = picture(form(graphs), tmp_path)
        assert boxes(odd) == (5, 1) and odd.shape[1] == 560
        rows = odd[34 : 34 + 5 * ((odd.shape[0] - 34) // 5)].reshape(5, -1, odd.shape[1], 3)
        assert (rows[:, :, :132].min((1, 2, 3)) < 128).all(), "each row has a label"


def test_dollars_do_not_make_mathematics(tmp_path):
    pixels = {name: picture(rings((name, "b")), tmp_path) for name in ("$x$", "x")}
    ink = {name: int((shown[34:180, :132] < 200).sum()) for name, shown in pixels.items()}
    assert ink["$x$"] > ink["x"]


def test_further_classes_are_counted_but_not_drawn(tmp_path):
    eight = picture(rings("abcdefgh", 1), tmp_path)
    eleven = picture(rings("abcdefghijk", 1), tmp_path)
    assert boxes(eight) == boxes(eleven) == (8, 1)
    assert eleven.shape[0] - eight.shape[0] == 20
    assert (eleven[-46:-26] < 128).any()


def test_items_of_the_largest_weight_are_shown_first_and_the_first_of_equals(tmp_path):
    graphs = rings(("a",), 9)
    weights = torch.tensor([1.0, 5.0, 1.0, 2.0, 5.0, 1.0, 1.0, 1.0, 3.0])
    trees = replace(trees_of(graphs, 2), weight=weights)
    shown = take(trees, torch.tensor([1, 4, 8, 3, 0, 2]))
    codes = np.arange(len(shown.dag.x))
    names = [cell.marks[0][2] for cell in tree_cells(shown, codes, [1, 4, 8, 3, 0, 2])]
    assert names[:3] == ["item 1, weight 5", "item 4, weight 5", "item 8, weight 3"]
    whole = picture(trees, tmp_path)
    moved = weights.clone()
    moved[[5, 6, 7]] = 0.5
    assert boxes(whole) == (1, 6)
    assert (picture(replace(trees, weight=moved), tmp_path) == whole).all(), (
        "what is not shown changes nothing"
    )
    moved[5] = 9
    assert (picture(replace(trees, weight=moved), tmp_path) != whole).any()


def test_soft_labels_put_an_item_into_its_likeliest_class(tmp_path):
    hard = trees_of(rings(("a", "b"), 2), 1)
    soft = replace(hard, y=torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.0, 1.0]]), y_kind="prob")
    changed = (picture(hard, tmp_path) != picture(soft, tmp_path)).reshape(
        picture(hard, tmp_path).shape[0], -1
    )
    rows = np.flatnonzero(changed.any(1))
    assert len(rows), "a soft label is said in the second line of an item's box"
    assert len(rows) < 40, "and nothing else changes: the rows of the classes hold the same items"
    codes = np.arange(len(soft.dag.x))
    said = [cell.marks[1][2] for cell in tree_cells(soft, codes, range(4))]
    assert [text.partition(",")[0] for text in said] == [
        "label 90 %",
        "label 60 %",
        "label 80 %",
        "label 100 %",
    ]


def test_a_class_without_items_has_an_empty_row(tmp_path):
    graphs = rings(("a", "b", "c"), 2).take(torch.tensor([0, 1, 4, 5]))
    for decoded in (graphs, trees_of(graphs, 1)):
        pixels = picture(decoded, tmp_path)
        assert boxes(pixels) == (2, 2) and pixels.shape[0] > 3 * 150


def test_one_graph_of_one_node_is_a_set(tmp_path):
    one = rings(("a",), 1).take(torch.tensor([0]))
    alone = Graphs(one.x[:1], one.edge_index[:, :0], one.edge_attr[:0], one.batch[:1], one.y, one.spec)
    for decoded in (alone, trees_of(alone, 0), trees_of(alone, 3)):
        assert boxes(picture(decoded, tmp_path)) == (1, 1)


def star(leaves, codes):
    """One star with `leaves` leaves of codes 1, 2, ..., `codes` - 1 in turn."""
    out = torch.arange(1, leaves + 1)
    ends = torch.stack([torch.cat([out, 0 * out]), torch.cat([0 * out, out])])
    none = torch.zeros((2 * leaves, 0), dtype=torch.int64)
    x = torch.cat([torch.zeros(1, dtype=torch.int64), out % (codes - 1) + 1])[:, None]
    spec = GraphSpec("star", ("a",), (codes,))
    return Graphs(
        x, ends, none, torch.zeros(leaves + 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), spec
    )


def only_cell(graphs, hops):
    trees = trees_of(graphs, hops)
    (cell,) = tree_cells(trees, trees.dag.x[:, 0].numpy(), [0])
    return cell


def test_equal_branches_are_drawn_once_with_their_number():
    cell = only_cell(star(22, 3), 1)
    said = [mark[2] for mark in cell.marks]
    # Trees of a leaf of code 1, of a leaf of code 2 (11 each), and of the centre with its 11 + 11 leaves.
    assert len(cell.nodes) == 2 + 2 + 3 and len(cell.lines) == 1 + 1 + 2
    assert sorted(text[1:] for text in said[2:]) == ["1", "11", "11", "11", "11"]


def test_children_stand_below_their_parents_and_nodes_apart():
    cell = only_cell(star(6, 7), 2)
    assert (cell.lines[:, 3] > cell.lines[:, 1]).all()
    assert len(np.unique(cell.nodes[:, :2], axis=0)) == len(cell.nodes)


def centre(leaves):
    """The tree of one hop around the centre of a star of distinct leaves, as the only tree of an item."""
    trees = trees_of(star(leaves, leaves + 1), 1)
    chosen = trees.dag.levels[0].own[trees.color] == trees.dag.x[:, 0].argmin()
    parts = {name: getattr(trees, name)[chosen] for name in ("item", "color", "count")}
    (cell,) = tree_cells(replace(trees, **parts), trees.dag.x[:, 0].numpy(), [0])
    return cell


def test_trees_of_more_than_40_nodes_are_cut_and_say_so():
    whole, cut = centre(39), centre(40)
    assert len(whole.nodes) == 40 and "…" not in [mark[2] for mark in whole.marks]
    assert len(cut.nodes) == 1 + 10 and "…" in [mark[2] for mark in cut.marks]


def test_graphs_of_more_than_60_nodes_are_counted(tmp_path):
    for leaves, drawn in ((59, 60), (60, 0)):
        graphs = star(leaves, 3)
        (cell,) = graph_cells(graphs, graphs.x[:, 0].numpy(), [0])
        assert len(cell.nodes) == drawn
        assert (f"{leaves + 1} nodes" in [mark[2] for mark in cell.marks]) == (drawn == 0)
    assert picture(star(316, 3), tmp_path).shape[0] < 300


@pytest.mark.parametrize("n", [1, 2, 3, 8, 60])
def test_layouts_draw_paths_straight_and_edges_of_length_one(n):
    at = spring_layout(n, np.array([(i, i + 1) for i in range(n - 1)], int).reshape(-1, 2))
    assert at.shape == (n, 2) and np.isfinite(at).all()
    assert np.abs(at[:, 1]).max() < 0.05 * n
    assert np.allclose(np.linalg.norm(np.diff(at, axis=0), axis=1), 1, atol=0.1)


def test_layouts_draw_rings_as_rings():
    at = spring_layout(12, np.array([(i, (i + 1) % 12) for i in range(12)]))
    radius = np.linalg.norm(at - at.mean(0), axis=1)
    assert radius.std() < 0.01 * radius.mean()


def test_layouts_keep_components_apart():
    pairs = np.array([(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)])
    at = spring_layout(8, pairs)
    apart = np.linalg.norm(at[:, None] - at[None], axis=2) + 9 * np.eye(8)
    assert apart.min() > 0.5
    assert apart[:3, 3:6].min() > max(apart[0, 1], apart[3, 4])


def test_more_codes_than_colours_share_one_look(tmp_path):
    pixels = picture(rings(("a",), 6, sizes=(40,), codes=50), tmp_path)
    assert all(holds(pixels, color) for color in COLORS)
    assert pixels.shape[1] < 1300


def test_only_the_file_asked_for_is_written_and_global_generators_rest(tmp_path, monkeypatch):
    tree_sheet(rings(), tmp_path / "warm.png")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with global_rng_untouched():
        for form in FORMS:
            tree_sheet(form(rings()), tmp_path / "sheet.png")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cwd", "sheet.png", "warm.png"]
    with pytest.raises(UsageError, match="missing"):
        tree_sheet(rings(), tmp_path / "missing" / "sheet.png")


def test_pyplot_is_neither_used_nor_changed(tmp_path):
    before = dict(matplotlib.rcParams)
    tree_sheet(trees_of(rings(), 2), tmp_path / "sheet.png")
    assert dict(matplotlib.rcParams) == before
