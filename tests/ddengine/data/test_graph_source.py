import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_graphs
from tu_folder import random_set, renumbered, write_ogb, write_tu

from ddengine import data
from ddengine.data import load_graphs, raw_graphs
from ddengine.data.graph_source import assemble_graphs, split_graphs
from ddengine.data.graph_split import content
from ddengine.data.raw_graphs import RawGraphs
from ddengine.data.tu import read_tu
from ddengine.errors import UsageError
from ddengine.graphs import Graphs
from synth import schema


def load(folder, graphs: list[dict], **options):
    return load_graphs("tu", "S", root=write_tu(folder, "S", graphs), download=False, **options)


def parts(made) -> tuple[Graphs, Graphs, Graphs]:
    return made.fit, made.validation, made.test


def members(part: Graphs) -> list[tuple[int, int]]:
    """The (class, content) of each graph, whatever order they have."""
    return sorted(zip(part.y.tolist(), content(part).tolist(), strict=True))


def path_graph(n: int, y: int) -> dict:
    ends = [(v, v + 1) for v in range(n - 1)]
    return {"y": y, "n": n, "edges": ends + [(b, a) for a, b in ends], "node_labels": [0] * n}


# --- the six published sets


def test_the_published_sets_have_their_published_counts(graph_sets):
    expected = {  # graphs, nodes, directed edges, classes, node codes, edge codes
        ("tu", "MUTAG"): (188, 3371, 7442, {"-1": 63, "1": 125}, (7,), (4,)),
        ("tu", "NCI1"): (4110, 122747, 265506, {"0": 2053, "1": 2057}, (37,), ()),
        ("tu", "PROTEINS"): (1113, 43471, 162088, {"1": 663, "2": 450}, (3,), ()),
        ("tu", "DD"): (1178, 334925, 1686092, {"1": 691, "2": 487}, (82,), ()),
        ("tu", "IMDB-BINARY"): (1000, 19773, 193062, {"0": 500, "1": 500}, (65,), ()),
        ("ogb", "ogbg-molbace"): (1513, 51577, 111536, {"0": 822, "1": 691}, None, None),
    }
    isolated = {"NCI1": 428, "PROTEINS": 5, "MUTAG": 0}
    for (collection, name), (g, n, e, classes, node_codes, edge_codes) in expected.items():
        made = load_graphs(collection, name, root=graph_sets, download=False)
        counts = np.sum([part.counts for part in parts(made)], axis=0)
        assert dict(zip(made.spec.classes, counts.tolist(), strict=True)) == classes, name
        assert sum(len(part) for part in parts(made)) == g
        assert sum(len(part.x) for part in parts(made)) == n
        assert sum(part.edge_index.shape[1] for part in parts(made)) == e
        assert made.spec.codes_from == ("degree" if name == "IMDB-BINARY" else "labels")
        if node_codes is None:
            assert [len(part) for part in parts(made)] == [1210, 151, 152]
            rates = [part.counts[1] / len(part) for part in parts(made)]
            assert rates == pytest.approx([0.40, 0.86, 0.53], abs=0.005)
            assert (len(made.spec.node_sizes), len(made.spec.edge_sizes)) == (9, 3)
            assert len(made.fit.x.unique(dim=0)) <= 73
        else:
            assert (made.spec.node_sizes, made.spec.edge_sizes) == (node_codes, edge_codes)
        if name in isolated:
            alone = [
                (p.degree + torch.bincount(p.edge_index[0], minlength=len(p.x)) == 0) for p in parts(made)
            ]
            assert sum(int(mask.sum()) for mask in alone) == isolated[name]


def test_nci1_is_read_within_seconds(graph_sets):
    start = time.process_time()
    read_tu(graph_sets, "NCI1")
    assert time.process_time() - start < 1


# --- parts


@pytest.mark.parametrize("split", [0, 1, 7])
def test_a_tenth_of_each_class_is_held_out_twice(tmp_path, split):
    made = load(tmp_path, random_set(90, classes=(0, 1, 5)), split=split)
    assert [part.counts for part in parts(made)] == [[24] * 3, [3] * 3, [3] * 3]
    assert made.spec.classes == ("0", "1", "5")


@given(st.integers(0, 99), st.integers(0, 3))
@settings(deadline=None, max_examples=8)
def test_numbering_of_graphs_and_nodes_changes_no_part_and_no_fingerprint(tmp_path_factory, seed, split):
    graphs, rng = random_set(41, seed), np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("s")
    plain = load(folder / "a", graphs, split=split)
    moved = load(folder / "b", [renumbered(graphs[i], rng) for i in rng.permutation(41)], split=split)
    assert [members(part) for part in parts(plain)] == [members(part) for part in parts(moved)]
    assert plain.spec.fingerprint == moved.spec.fingerprint
    for a, b in zip(parts(plain), parts(moved), strict=True):
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.nodes, b.nodes)


def test_splits_of_other_numbers_are_other_parts_of_the_same_graphs(tmp_path):
    graphs = random_set(83)
    made = [load(tmp_path, graphs, split=split) for split in range(3)]
    everything = [sorted(m for part in parts(one) for m in members(part)) for one in made]
    assert everything[0] == everything[1] == everything[2]
    tests = [set(members(one.test)) for one in made]
    assert tests[0] != tests[1] != tests[2] != tests[0]
    assert len({one.spec.fingerprint for one in made}) == 3


def test_a_part_is_sorted_by_class_and_content(tmp_path):
    for part in parts(load(tmp_path, random_set(83))):
        keys = list(zip(part.y.tolist(), content(part).tolist(), strict=True))
        assert keys == sorted(keys)


def test_another_label_is_another_fingerprint(tmp_path):
    graphs = random_set(40)
    plain = load(tmp_path, graphs).spec.fingerprint
    for key in ("node_labels", "edge_labels"):
        changed = [dict(graph) for graph in graphs]
        changed[7][key] = [2 - v for v in changed[7][key]]
        assert load(tmp_path, changed).spec.fingerprint != plain
    assert load(tmp_path, [dict(g, y=3 if g["y"] == 1 else -1) for g in graphs]).spec.fingerprint != plain


@given(st.lists(st.integers(1, 9), min_size=3, max_size=12), st.integers(0, 9))
@settings(deadline=None, max_examples=15)
def test_equal_graphs_of_a_class_stay_in_one_part(tmp_path_factory, copies, split):
    rng = np.random.default_rng(split)
    many = [path_graph(n, 0) for n, times in enumerate(copies, 1) for _ in range(times)]
    other = [path_graph(n, 1) for n in range(20, 30)]
    graphs = [renumbered(graph, rng) for graph in many + other]
    made = load(tmp_path_factory.mktemp("s"), graphs, split=split)
    held = [set(members(part)) for part in parts(made)]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    assert all(min(part.counts) >= 1 for part in parts(made))
    assert [part.counts[1] for part in parts(made)] == [8, 1, 1]


def test_the_cut_moves_to_the_nearer_end_of_a_group(tmp_path):
    graphs = [path_graph(n, 0) for n in range(1, 21) for _ in range(4)] + [
        path_graph(n, 1) for n in range(30, 40)
    ]
    assert [part.counts[0] for part in parts(load(tmp_path, graphs))] == [64, 8, 8]
    graphs = [path_graph(n, 0) for n in range(1, 11) for _ in range(7)] + [
        path_graph(n, 1) for n in range(30, 40)
    ]
    assert [part.counts[0] for part in parts(load(tmp_path, graphs))] == [56, 7, 7]


# --- codes


def test_labels_become_dense_codes_in_their_own_order(tmp_path):
    graphs = [
        dict(graph, node_labels=[(90 - 40 * v, 3) for v in graph["node_labels"]]) for graph in random_set(30)
    ]
    made, raw = load(tmp_path, graphs), random_set(30)
    assert made.spec.node_sizes == (3, 1)
    codes = sum(np.bincount(part.x[:, 0], minlength=3) for part in parts(made))
    assert codes.tolist() == np.bincount([2 - v for graph in raw for v in graph["node_labels"]]).tolist()


def test_missing_node_labels_are_in_degrees_and_large_ones_share_a_code(tmp_path):
    def star(leaves: int, y: int) -> dict:
        return {"y": y, "n": leaves + 1, "edges": [(v, 0) for v in range(1, leaves + 1)]}

    made = load(tmp_path, [star(n, n % 2) for n in (3, 4, 5, 6, 99, 100, 101, 102, 103, 104)])
    assert made.spec.codes_from == "degree"
    assert made.spec.node_sizes == (8,)  # 0, 3, 4, 5, 6, 99, 100 and more
    for part in parts(made):
        centres = part.x[part.degree > 0, 0]
        assert torch.equal(centres == 7, part.degree[part.degree > 0] > 100)
    assert made.notes == (
        "some edges run one way only: messages follow them from the first node to the second",
        "nodes have no labels: their in-degree is their label",
        "in-degrees above 100 share one label: 4 of 637 nodes",
    )


def test_self_loops_are_left_out_and_repeated_edges_kept_with_notes(tmp_path):
    graphs = random_set(30)
    before = sum(len(graph["edges"]) for graph in graphs)
    first = next(graph for graph in graphs if graph["edges"])
    (u, v), mark = first["edges"][0], first["edge_labels"][0]
    first["edges"] += [(2, 2), (u, v), (v, u), (0, 0)]
    first["edge_labels"] += [0, mark, mark, 1]
    made = load(tmp_path, graphs)
    assert sum(part.edge_index.shape[1] for part in parts(made)) == before + 2
    assert made.notes == (
        "2 self-loops are left out: layers that need one at each node add it",
        "2 edges repeat one before them and are kept, as messages that arrive again",
    )
    assert all((part.edge_index[0] != part.edge_index[1]).all() for part in parts(made))


# --- continuous attributes


def with_attributes(count: int = 60, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        dict(
            graph,
            node_attributes=[tuple(row) for row in rng.normal(size=(graph["n"], 3)).tolist()],
            edge_attributes=rng.normal(size=len(graph["edges"])).tolist(),
        )
        for graph in random_set(count, seed)
    ]


def test_continuous_attributes_are_refused_with_reason_and_remedy(tmp_path):
    with pytest.raises(UsageError, match="3 continuous node attributes and 1 continuous edge") as error:
        load(tmp_path, with_attributes())
    assert error.value.remedy == "Give dataset.discretise=quantile or kmeans, or none to leave them out"


def test_left_out_attributes_leave_the_labels(tmp_path):
    made = load(tmp_path, with_attributes(), discretise="none")
    plain = load(tmp_path / "plain", random_set(60))
    assert made.notes == ("3 continuous node attributes and 1 continuous edge attributes are left out",)
    assert made.spec.fingerprint == plain.spec.fingerprint
    assert torch.equal(made.fit.x, plain.fit.x)
    bare = [{k: g[k] for k in ("y", "n", "edges", "node_attributes")} for g in with_attributes()]
    made = load(tmp_path / "bare", bare, discretise="none")
    assert made.spec.codes_from == "degree"


@pytest.mark.parametrize(("method", "sizes"), [("quantile", (3, 5, 5, 5)), ("kmeans", (3, 5))])
def test_attributes_become_codes_whose_values_networks_see(tmp_path, method, sizes):
    made = load(tmp_path, with_attributes(), discretise=method, bins=5)
    assert (made.spec.node_sizes, made.spec.discretised) == (sizes, method)
    assert made.spec.edge_sizes == (2, 5)
    assert made.spec.node_values[0] is None
    assert made.spec.width == 3 + 3
    assert made.spec.edge_width == 2 + 1
    features = made.spec.features(made.fit.x)[:, 3:]
    assert features.mean(0).abs().max() < 1e-5
    used = [column.unique().tolist() for column in made.fit.x.T]
    assert used == [list(range(size)) for size in sizes]
    assert any(f"by {method}, which lose" in note and "node" in note for note in made.notes)
    assert any(f"by {method}, which lose" in note and "edge" in note for note in made.notes)


@pytest.mark.parametrize("method", ["quantile", "kmeans"])
def test_discretised_sets_do_not_depend_on_numbering(tmp_path, method):
    graphs, rng = with_attributes(41), np.random.default_rng(3)
    plain = load(tmp_path / "a", graphs, discretise=method)
    moved = load(tmp_path / "b", [renumbered(graphs[i], rng) for i in rng.permutation(41)], discretise=method)
    assert plain.spec.fingerprint == moved.spec.fingerprint
    assert [members(part) for part in parts(plain)] == [members(part) for part in parts(moved)]
    for a, b in zip(plain.spec.node_values, moved.spec.node_values, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_attributes_alone_are_labels_enough(tmp_path):
    bare = [{k: g[k] for k in ("y", "n", "edges", "node_attributes")} for g in with_attributes()]
    made = load(tmp_path, bare, discretise="quantile", bins=4)
    assert (made.spec.codes_from, made.spec.node_sizes) == ("labels", (4, 4, 4))


def test_a_method_without_attributes_is_noted(tmp_path):
    made = load(tmp_path, random_set(30), discretise="kmeans")
    assert made.notes == ("nothing to discretise: S has labels only",)
    assert made.spec.discretised == "none"


# --- refusals


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"collection": "ut"}, "unknown graph collection 'ut'\nDid you mean 'tu'"),
        ({"name": ""}, "'' is no name of a graph set"),
        ({"name": "../S"}, "'../S' is no name of a graph set"),
        ({"discretise": "quantiles"}, "unknown dataset.discretise 'quantiles'\nDid you mean 'quantile'"),
        ({"bins": 1}, "dataset.bins=1 is out of range"),
        ({"split": -1}, "dataset.split=-1 is out of range"),
        ({"name": "T"}, "'T' is not at"),
    ],
)
def test_a_wrong_option_is_one_line_and_a_remedy(tmp_path, options, cause):
    root = write_tu(tmp_path, "S", random_set(30))
    with pytest.raises(UsageError, match=cause) as error:
        load_graphs(**{"collection": "tu", "name": "S", "root": root, "download": False, **options})
    assert error.value.remedy
    assert "\n" not in error.value.cause


def test_one_class_is_refused(tmp_path):
    with pytest.raises(UsageError, match="S has one class, '4'\nGive graphs of two classes"):
        load(tmp_path, random_set(30, classes=(4,)))


def test_a_class_of_two_different_graphs_cannot_be_divided(tmp_path):
    graphs = [path_graph(n % 2 + 2, 0) for n in range(30)] + [path_graph(n, 1) for n in range(2, 20)]
    with pytest.raises(UsageError, match="class '0' has 2 different graphs, too few for three parts"):
        load(tmp_path, graphs)


def test_a_collection_of_ones_own_is_split_or_refused_like_a_loaded_one():
    graphs = random_graphs(5, count=60, edge_sizes=(2,), directed=True, classes=2)
    made, other = split_graphs(graphs), split_graphs(graphs, split=3)
    together = sorted(m for part in parts(made) for m in members(part))
    assert together == members(graphs) == sorted(m for part in parts(other) for m in members(part))
    assert sum(part.edge_index.shape[1] for part in parts(made)) == graphs.edge_index.shape[1]
    assert (graphs.edge_index[0] == graphs.edge_index[1]).any()
    assert made.spec.fingerprint != other.spec.fingerprint
    assert made.spec == replace(graphs.spec, fingerprint=made.spec.fingerprint)
    with pytest.raises(UsageError, match="split=-1 is out of range"):
        split_graphs(graphs, split=-1)
    with pytest.raises(UsageError, match="class 'class 2' has 0 different graphs, too few for three parts"):
        split_graphs(replace(graphs, spec=replace(graphs.spec, classes=("class 0", "class 1", "class 2"))))
    with pytest.raises(UsageError, match="random has one class, 'a'"):
        split_graphs(replace(graphs, y=graphs.y * 0, spec=replace(graphs.spec, classes=("a",))))
    wide = replace(graphs.spec, edge_sizes=(2,) * 257)
    with pytest.raises(UsageError, match="random has 257 edge label columns, more than 256"):
        split_graphs(replace(graphs, edge_attr=graphs.edge_attr.repeat(1, 257), spec=wide))


def wide_set(labels: int, attributes: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        dict(
            graph,
            node_labels=[(0,) * (labels - 1) + (v,) for v in graph["node_labels"]],
            node_attributes=[
                tuple(row) for row in rng.normal(size=(graph["n"], attributes)).round(2).tolist()
            ],
        )
        for graph in random_set(30)
    ]


def test_attributes_that_make_too_many_columns_are_refused_with_the_way_out(tmp_path):
    graphs = wide_set(2, 255)
    with pytest.raises(
        UsageError, match="quantile makes 257 node label columns of S, more than 256"
    ) as error:
        load(tmp_path, graphs, discretise="quantile")
    assert "dataset.discretise=kmeans" in error.value.remedy
    assert len(load(tmp_path, graphs, discretise="kmeans", bins=2).spec.node_sizes) == 3
    fits = load(tmp_path / "fits", wide_set(2, 254), discretise="quantile", bins=2)
    assert len(fits.spec.node_sizes) == 256


@pytest.mark.parametrize(("labels", "method"), [(257, "none"), (256, "kmeans"), (256, "quantile")])
def test_too_many_label_columns_are_refused(tmp_path, labels, method):
    with pytest.raises(UsageError, match="S has 257 node label columns, more than 256\nKeep 256 or fewer"):
        load(tmp_path, wide_set(labels, 1), discretise=method)


def test_the_limit_of_columns_is_that_of_the_stored_form():
    assert raw_graphs.COLUMNS_MAX == schema.COLUMNS_MAX


def test_self_loops_alone_are_no_edges(tmp_path):
    graphs = [dict(g, edges=[(0, 0)], edge_labels=[1]) for g in random_set(30)]
    made = load(tmp_path, graphs)
    assert made.notes[-1] == "no graph has an edge"
    assert made.spec.edge_sizes == ()


# --- the module


def test_the_collections_can_be_listed_without_torch():
    code = (
        "import sys, ddengine.data as d; d.describe('tu'); d.GRAPH_COLLECTIONS; "
        "assert not {'torch', 'numpy', 'torch_geometric', 'sklearn'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all("dataset.name=NAME" in data.describe(name) for name in data.GRAPH_COLLECTIONS)


def test_graphs_of_a_program_are_divided_like_those_of_files(tmp_path):
    write_tu(tmp_path, "S", random_set(50))
    raw = read_tu(tmp_path, "S")
    assert isinstance(raw, RawGraphs)
    assert assemble_graphs(raw).spec.fingerprint == load_graphs("tu", "S", root=tmp_path).spec.fingerprint


def test_both_collections_read_the_same_graphs(tmp_path):
    graphs = random_set(30)
    one_way = [
        dict(g, edges=g["edges"][::2], edge_labels=g["edge_labels"][::2]) for g in graphs
    ]  # a random set lists both directions side by side
    write_ogb(tmp_path / "o", one_way, (list(range(20)), list(range(20, 25)), list(range(25, 30))))
    tu, ogb = load(tmp_path / "t", graphs), load_graphs("ogb", "ogbg-x", root=tmp_path / "o")
    both = [sorted(m for part in parts(made) for m in members(part)) for made in (tu, ogb)]
    assert both[0] == both[1]
