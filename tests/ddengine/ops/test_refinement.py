import gzip
from dataclasses import replace

import naive_trees
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from ddengine.errors import DDError, UsageError
from ddengine.graphs import Graphs, GraphSpec, joined
from ddengine.ops import refinement
from ddengine.ops.refinement import color_refinement, graph_hashes, row_ids
from ddengine.rng import Rng

PAIRS = ((0, 0), (0, 1), (2, 0), (-7, 10**15))


@st.composite
def labelled(draw, columns=st.integers(0, 2)):
    """(x, edge_index, edge_attr): directed edges, repeated ones and self-loops, nodes without any."""
    n = draw(st.integers(1, 11))
    x = draw(st.lists(st.sampled_from(PAIRS[:2] + PAIRS[3:]), min_size=n, max_size=n))
    node, q = st.integers(0, n - 1), draw(columns)
    edges = draw(st.lists(st.tuples(node, node, st.sampled_from(PAIRS)), max_size=17))
    ends = np.array([edge[:2] for edge in edges], np.int64).reshape(-1, 2).T
    attr = np.array([edge[2][:q] for edge in edges], np.int64).reshape(len(edges), q)
    return np.array(x), ends, attr


def collection(graphs=7, seed=0):
    """Graphs of 1 to 13 nodes with random labels and edges."""
    generator, parts = Rng(seed).numpy("collection"), []
    spec = GraphSpec("noise", ("a", "b"), (3,), (2,))
    for _ in range(graphs):
        n, e = int(generator.integers(1, 14)), int(generator.integers(0, 29))
        parts.append(
            Graphs(
                x=torch.from_numpy(generator.integers(0, 3, (n, 1))),
                edge_index=torch.from_numpy(generator.integers(0, n, (2, e))),
                edge_attr=torch.from_numpy(generator.integers(0, 2, (e, 1))),
                batch=torch.zeros(n, dtype=torch.int64),
                y=torch.tensor([0]),
                spec=spec,
            )
        )
    return joined(parts)


def renumbered(graph, seed):
    """One graph with its nodes and edges in another order."""
    generator = Rng(seed).numpy("order")
    nodes, edges = generator.permutation(len(graph.x)), generator.permutation(graph.edge_index.shape[1])
    place = torch.from_numpy(np.argsort(nodes))
    return replace(
        graph,
        x=graph.x[nodes],
        edge_index=place[graph.edge_index[:, edges]],
        edge_attr=graph.edge_attr[edges],
    )


def same_partition(left, right):
    pairs = len(set(zip(left, right, strict=True)))
    return pairs == len(set(left)) == len(set(right))


@given(labelled(), st.integers(0, 3), st.booleans(), st.integers(0, 5))
@settings(deadline=None, max_examples=150)
def test_colours_are_the_classes_of_isomorphic_trees(graph, hops, degree, salt):
    coloring = color_refinement(*graph, hops=hops, degree=degree, check=True, salt=salt)
    for level, colors in enumerate(coloring.colors):
        trees = naive_trees.trees(*(part.tolist() for part in graph), level, degree)
        assert same_partition(colors.tolist(), trees)
        assert colors.tolist() == naive_trees.first_occurrence(trees)
        assert coloring.representatives[level].tolist() == [
            trees.index(tree) for tree in dict.fromkeys(trees)
        ]
        assert coloring.sizes[level] == len(set(trees))
    if hops:
        assert same_partition(coloring.hashes.tolist(), trees)


def test_small_graphs_with_many_equal_trees_are_told_apart_exactly():
    graphs = collection(67)
    ends, attr = graphs.edge_index.tolist(), graphs.edge_attr.tolist()
    colors = color_refinement(graphs.x, graphs.edge_index, graphs.edge_attr, hops=3).colors
    for level in range(4):
        trees = naive_trees.trees(graphs.x.tolist(), ends, attr, level)
        assert same_partition(colors[level].tolist(), trees)
    assert 3 == colors[0].max() + 1 < colors[1].max() + 1 < colors[2].max() + 1 < len(graphs.x)


def test_tensors_arrays_and_narrow_integers_give_the_same_colours():
    graphs = collection()
    wide = color_refinement(graphs.x, graphs.edge_index, graphs.edge_attr, hops=2)
    narrow = color_refinement(
        graphs.x.numpy().astype(np.uint8),
        graphs.edge_index.numpy().astype(np.int32),
        graphs.edge_attr.to(torch.int16),
        hops=2,
    )
    assert all((a == b).all() for a, b in zip(wide.colors, narrow.colors, strict=True))
    assert (wide.hashes == narrow.hashes).all()


def test_colours_and_hashes_follow_a_renumbering_of_nodes_and_edges():
    graph = collection(1, seed=7)
    nodes = Rng(3).numpy("order").permutation(len(graph.x))
    before = color_refinement(graph.x, graph.edge_index, graph.edge_attr, hops=3)
    other = renumbered(graph, 3)
    after = color_refinement(other.x, other.edge_index, other.edge_attr, hops=3)
    assert len(nodes) == 13 and (after.hashes == before.hashes[nodes]).all()
    for left, right in zip(before.colors, after.colors, strict=True):
        assert same_partition(left[nodes].tolist(), right.tolist())


def test_a_salt_changes_hashes_and_no_colour():
    graphs = collection()
    one, two = (
        color_refinement(graphs.x, graphs.edge_index, graphs.edge_attr, hops=2, salt=salt) for salt in (0, 7)
    )
    assert not set(one.hashes.tolist()) & set(two.hashes.tolist())
    assert all((a == b).all() for a, b in zip(one.colors, two.colors, strict=True))


def degenerate(bits, sound_from):
    """A mix that keeps few bits under salts below `sound_from`."""
    sound = refinement.mix

    def mix(values, salt):
        found = sound(values, salt)
        return found if salt >= sound_from else found >> np.uint64(64 - bits)

    return mix


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_forced_collision_is_found_and_repaired_by_another_salt(monkeypatch, bits):
    graphs = collection(61)
    given = (graphs.x, graphs.edge_index, graphs.edge_attr)
    truth = color_refinement(*given, hops=3)
    monkeypatch.setattr(refinement, "mix", degenerate(bits, sound_from=2))
    wrong = color_refinement(*given, hops=3)
    repaired = color_refinement(*given, hops=3, check=True)
    assert wrong.sizes[-1] < truth.sizes[-1]
    assert repaired.sizes == truth.sizes
    assert all((a == b).all() for a, b in zip(repaired.colors, truth.colors, strict=True))


@pytest.mark.parametrize(
    ("x", "ends", "attr"),
    [
        ([0, 0, 0, 0], [[0, 1], [2, 3]], [[0], [1]]),  # edge labels differ
        ([0, 1, 0, 0], [[0, 1], [2, 3]], [[0], [0]]),  # senders differ
        ([0, 0, 0, 0], [[0, 1, 1], [2, 3, 3]], [[0], [0], [0]]),  # multiplicities differ
        ([0, 1], [[], []], []),  # nodes differ
    ],
)
def test_the_check_sees_every_difference_of_two_trees(monkeypatch, x, ends, attr):
    given = (np.array(x)[:, None], np.array(ends, np.int64), np.array(attr, np.int64).reshape(-1, 1))
    monkeypatch.setattr(refinement, "mix", lambda values, salt: np.zeros_like(values))
    assert color_refinement(*given, hops=1).sizes[-1] == 1
    with pytest.raises(DDError, match="share a hash under each of 8 salts"):
        color_refinement(*given, hops=1, check=True)


def test_equal_codes_of_a_node_and_an_edge_do_not_cancel():
    x, ends = np.array([[5], [2], [9], [9]]), np.array([[0, 1], [2, 3]])
    coloring = color_refinement(x, ends, np.array([[2], [5]]), hops=1)
    assert coloring.sizes == [3, 4]


def test_mix_is_the_finaliser_of_splitmix64():
    stream = refinement.mix(np.uint64(0x9E3779B97F4A7C15) * np.arange(2, dtype=np.uint64), 0)
    assert [hex(word) for word in stream.tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@given(st.lists(st.tuples(*[st.sampled_from((-(2**63), -1, 0, 1, 2**63 - 1))] * 3), max_size=13))
@settings(deadline=None, max_examples=50)
def test_row_ids_are_exact_over_the_whole_range_of_codes(rows):
    ids, firsts = row_ids(np.array(rows, np.int64).reshape(-1, 3))
    assert ids.tolist() == naive_trees.first_occurrence(rows)
    assert firsts.tolist() == [rows.index(row) for row in dict.fromkeys(rows)]


def test_no_nodes_have_no_colours():
    coloring = color_refinement(np.zeros((0, 1), np.int64), np.zeros((2, 0), np.int64), hops=2, check=True)
    assert coloring.sizes == [0, 0, 0] and len(coloring.hashes) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hops": -1}, "hops=-1"),
        ({"edge_index": np.array([[0, 3], [1, 1]])}, r"nodes 0\.\.3"),
        ({"edge_index": np.array([[0, -1], [1, 1]])}, r"nodes -1\.\.1"),
        ({"edge_index": np.zeros((3, 2), np.int64)}, "edge_index"),
        ({"edge_attr": np.zeros((5, 1), np.int64)}, "edge_attr"),
        ({"x": np.zeros(3, np.int64)}, "x"),
        ({"x": np.zeros((3, 1))}, "x|float64"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    fits = {"x": np.zeros((3, 1), np.int64), "edge_index": np.array([[0, 1], [1, 1]]), "hops": 1}
    with pytest.raises((UsageError, TypeCheckError), match=words):
        color_refinement(**{**fits, **change})


def test_graph_hashes_ignore_numbering_edge_order_class_and_company():
    graphs = collection(23)
    hashes = graph_hashes(graphs)
    moved = [renumbered(graphs.take(torch.tensor([i])), i) for i in reversed(range(23))]
    assert (graph_hashes(joined(moved)) == hashes[::-1]).all()
    assert (graph_hashes(replace(graphs, y=1 - graphs.y)) == hashes).all()
    assert [graph_hashes(graph)[0] for graph in moved] == hashes[::-1].tolist()


def test_graph_hashes_are_equal_exactly_where_the_multisets_of_trees_are():
    graphs = collection(53, seed=2)
    parts = [graphs.take(torch.tensor([i])) for i in range(53)]
    for hops in (0, 1, 3):
        trees = [
            tuple(sorted(naive_trees.trees(p.x.tolist(), p.edge_index.tolist(), p.edge_attr.tolist(), hops)))
            for p in parts
        ]
        assert same_partition(graph_hashes(graphs, hops).tolist(), trees)
    assert (graph_hashes(graphs, salt=0) != graph_hashes(graphs, salt=1)).all()


def tu_codes(folder):
    """(x, edge_index, edge_attr) of a set in TU text; a constant node label where it has none."""
    stem = folder / folder.name

    def column(part):
        return np.array(
            (stem.parent / f"{stem.name}_{part}.txt").read_text().replace(",", " ").split(), np.int64
        )

    ends = column("A").reshape(-1, 2).T - 1
    labels = (folder / f"{folder.name}_node_labels.txt").exists()
    x = column("node_labels") if labels else np.zeros_like(column("graph_indicator"))
    edges = (folder / f"{folder.name}_edge_labels.txt").exists()
    return x[:, None], ends, column("edge_labels")[:, None] if edges else None


def ogb_codes(folder):
    """(x, edge_index, edge_attr) of a set in OGB csv; each line of edges is one undirected edge."""
    table = {
        name: np.array(
            gzip.decompress((folder / "raw" / f"{name}.csv.gz").read_bytes()).replace(b",", b" ").split(),
            np.int64,
        )
        for name in ("node-feat", "edge", "edge-feat", "num-node-list", "num-edge-list")
    }
    nodes, edges = table["num-node-list"], table["num-edge-list"]
    ends = table["edge"].reshape(-1, 2).T + np.repeat(nodes.cumsum() - nodes, edges)
    attr = table["edge-feat"].reshape(ends.shape[1], -1)
    return table["node-feat"].reshape(nodes.sum(), -1), np.hstack([ends, ends[::-1]]), np.vstack([attr, attr])


SIZES = {  # colours of levels 0.. with the node label at level 0, and with label and degree
    "MUTAG": ([7, 64, 277, 796, 1453], [13, 134, 536, 1236, 1897]),
    "NCI1": ([37, 292, 4058, 22948, 44508], [69, 994, 12392, 36099, 53765]),
    "PROTEINS": ([3, 297, 20962, 35676, 37940], [33, 7811, 34101, 37686, 38578]),
    "IMDB-BINARY": ([1, 65, 2931, 3595, 3595], [65, 2931, 3595, 3595, 3595]),
    "DD": ([82, 253149, 333017], [415, 328583]),
    "ogbg_molbace": ([73, 1446, 5632], [73, 1446, 5632]),
}


@pytest.mark.parametrize("name", SIZES)
def test_real_sets_have_the_known_numbers_of_colours(graph_sets, name):
    read = ogb_codes if name.startswith("ogbg") else tu_codes
    codes = read(graph_sets / name)
    for degree, sizes in enumerate(SIZES[name]):
        coloring = color_refinement(*codes, hops=len(sizes) - 1, degree=bool(degree), check=name != "DD")
        assert coloring.sizes == sizes
