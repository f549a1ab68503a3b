import gzip

import pytest
import torch
from tu_folder import write_ogb

from ddengine.data import load_graphs
from ddengine.data.ogb import read_ogb
from ddengine.errors import UsageError

GRAPHS = [
    {
        "y": 1,
        "n": 3,
        "edges": [(0, 1), (2, 1)],
        "node_labels": [(5, 0.5), (6, 1), (5, 2)],
        "edge_labels": [7, 8],
    },
    {"y": 0, "n": 1, "edges": [], "node_labels": [(2, 1.25)], "edge_labels": []},
    {"y": 1, "n": 2, "edges": [(1, 0)], "node_labels": [(6, 3), (6, 3)], "edge_labels": [9]},
]
PARTS = ([2], [0], [1])


@pytest.mark.parametrize("place", ["ogbg_x", ".", "graphs/ogbg_x", "ogb/ogbg_x"])
@pytest.mark.parametrize("name", ["ogbg_x", "ogbg-x"])
def test_every_edge_becomes_two_messages_with_one_label(tmp_path, place, name):
    write_ogb(tmp_path / place, GRAPHS, PARTS)
    raw = read_ogb(tmp_path, name)
    assert raw.name == "ogbg-x"
    assert raw.edge_index.tolist() == [[0, 1, 2, 1, 5, 4], [1, 0, 1, 2, 4, 5]]
    assert raw.edge_labels.tolist() == [[7], [7], [8], [8], [9], [9]]
    assert raw.batch.tolist() == [0, 0, 0, 1, 2, 2]
    assert (raw.y.tolist(), raw.classes) == ([1, 0, 1], ("0", "1"))
    assert [part.tolist() for part in raw.parts] == [[2], [0], [1]]


def test_integer_columns_are_labels_and_others_attributes(tmp_path):
    raw = read_ogb(write_ogb(tmp_path, GRAPHS, PARTS), "ogbg-x")
    assert raw.node_labels.tolist() == [[5], [6], [5], [2], [6], [6]]
    assert raw.node_attributes.flatten().tolist() == [0.5, 1, 2, 1.25, 3, 3]
    assert raw.edge_attributes is None


def test_a_set_without_features_has_none(tmp_path):
    bare = [{key: graph[key] for key in ("y", "n", "edges")} for graph in GRAPHS]
    raw = read_ogb(write_ogb(tmp_path, bare, PARTS), "ogbg-x")
    assert raw.node_labels is raw.node_attributes is raw.edge_labels is raw.edge_attributes is None


def test_counts_of_zero_are_a_set_without_edges(tmp_path):
    graphs = [
        dict(g, edges=[], edge_labels=[], node_labels=list(range(g["n"])), y=i % 2)
        for i, g in enumerate(GRAPHS * 2)
    ]
    write_ogb(tmp_path, graphs, ([0, 1], [2, 3], [4, 5]))
    raw = read_ogb(tmp_path, "ogbg-x")
    assert raw.edge_index.shape == (2, 0)
    assert raw.edge_labels is raw.edge_attributes is None
    made = load_graphs("ogb", "ogbg-x", root=tmp_path)
    assert made.notes == ("no graph has an edge",)
    assert made.spec.edge_sizes == ()


BAD = {
    "several tasks": ("raw/graph-label", "1,0\n0,1\n1,1\n", "graph-label.csv.gz has 2 tasks"),
    "an empty label": ("raw/graph-label", "1\n\n1\n", "graph-label.csv.gz lacks the labels of 1 of 3 graphs"),
    "a NaN label": (
        "raw/graph-label",
        "nan\nnan\n1\n",
        "graph-label.csv.gz lacks the labels of 2 of 3 graphs",
    ),
    "too few labels": (
        "raw/graph-label",
        "1\n0\n",
        "graph-label.csv.gz has 2 rows where num-node-list.csv.gz",
    ),
    "too many counts": (
        "raw/num-edge-list",
        "2\n0\n1\n0\n",
        "num-edge-list.csv.gz has 4 rows where num-node-list",
    ),
    "a graph without nodes": ("raw/num-node-list", "3\n0\n3\n", "num-node-list.csv.gz: row 2 holds 0"),
    "edges that do not add up": (
        "raw/num-edge-list",
        "2\n1\n1\n",
        "edge.csv.gz has 3 rows where num-edge-list.csv.gz",
    ),
    "edges that are gone": ("raw/edge", "", "edge.csv.gz is empty"),
    "edges where none are counted": (
        "raw/num-edge-list",
        "0\n0\n0\n",
        "edge.csv.gz has 3 rows where num-edge-list.csv.gz makes it 0",
    ),
    "a node of another graph": (
        "raw/edge",
        "0,1\n2,1\n2,0\n",
        "edge.csv.gz: row 3 names node 2 of a graph of 2 nodes",
    ),
    "features that do not add up": (
        "raw/node-feat",
        "5,1\n",
        "node-feat.csv.gz has 1 rows where num-node-list.csv.gz",
    ),
    "edge features that do not": (
        "raw/edge-feat",
        "5\n",
        "edge-feat.csv.gz has 1 rows where edge.csv.gz makes it 3",
    ),
    "an index outside": ("split/scaffold/test", "3\n", "test.csv.gz names graph 3, outside 0..2"),
    "parts that overlap": ("split/scaffold/test", "1\n2\n", "scaffold names graph 2 more than once"),
    "no part": ("split/scaffold/valid", None, "cannot read .*valid.csv.gz: No such file"),
    "no labels": ("raw/graph-label", None, "cannot read .*graph-label.csv.gz: No such file"),
    "no edges": (
        "raw/edge",
        None,
        "'ogbg-x' is not at .*looked for raw/edge.csv.gz in ogbg_x, ., .*never downloaded",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_file_row_and_remedy(tmp_path, case):
    part, text, cause = BAD[case]
    path = write_ogb(tmp_path, GRAPHS, PARTS) / f"{part}.csv.gz"
    path.unlink()
    if text is not None:
        path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(UsageError, match=cause) as error:
        read_ogb(tmp_path, "ogbg-x")
    assert "\n" not in error.value.cause
    assert error.value.remedy


@pytest.mark.parametrize(
    "damage", [lambda b: b"plain text", lambda b: b[:-9], lambda b: b[:20] + b"\xff" * 30 + b[50:]]
)
def test_a_damaged_archive_is_named(tmp_path, damage):
    path = write_ogb(tmp_path, GRAPHS * 40, (list(range(118)), [118], [119])) / "raw" / "node-feat.csv.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match="cannot read .*node-feat.csv.gz: ") as error:
        read_ogb(tmp_path, "ogbg-x")
    assert "\n" not in error.value.cause


@pytest.mark.parametrize("schemes", [(), ("scaffold", "random")])
def test_exactly_one_scheme_of_parts_is_needed(tmp_path, schemes):
    folder = write_ogb(tmp_path, GRAPHS, PARTS)
    (folder / "split" / "scaffold").rename(folder / "spare")
    for scheme in schemes:
        (folder / "split" / scheme).mkdir()
    with pytest.raises(
        UsageError, match=f"one splitting scheme, it holds {', '.join(sorted(schemes)) or 'none'}"
    ):
        read_ogb(tmp_path, "ogbg-x")


def test_the_official_parts_are_used_and_are_the_only_ones(tmp_path):
    graphs = [dict(g, node_labels=list(range(g["n"])), y=i % 2) for i, g in enumerate(GRAPHS * 3)]
    made = load_graphs("ogb", "ogbg-x", root=write_ogb(tmp_path, graphs, ([0, 1, 2, 4], [3, 8], [5, 6])))
    assert [len(part) for part in (made.fit, made.validation, made.test)] == [4, 2, 2]
    assert made.notes == ("1 of 9 graphs are in no part of the official split: left out",)
    assert made.test.nodes.tolist() == [graphs[6]["n"], graphs[5]["n"]]
    with pytest.raises(UsageError, match="split=1: ogbg-x has an official split"):
        load_graphs("ogb", "ogbg-x", root=tmp_path, split=1)


def test_a_class_that_a_part_lacks_is_named(tmp_path):
    graphs = [dict(g, node_labels=list(range(g["n"])), y=i % 2) for i, g in enumerate(GRAPHS * 3)]
    write_ogb(tmp_path, graphs, ([0, 1, 2, 4], [3, 8], [6]))
    with pytest.raises(UsageError, match="class '1' of ogbg-x has no graph in the test part"):
        load_graphs("ogb", "ogbg-x", root=tmp_path)


def test_molbace_lists_no_edge_in_both_directions(graph_sets):
    raw = read_ogb(graph_sets, "ogbg-molbace")
    listed = raw.edge_index[:, ::2].sort(0).values
    assert listed.shape[1] == 55768
    assert listed.unique(dim=1).shape[1] == 55768
    assert torch.equal(raw.edge_labels[::2], raw.edge_labels[1::2])
