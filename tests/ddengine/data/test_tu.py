import builtins
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tu_folder import random_set, write_tu

from ddengine.data import load_graphs
from ddengine.data.tu import read_tu
from ddengine.errors import UsageError

GRAPHS = [
    {"y": 1, "n": 3, "edges": [(0, 1), (1, 0), (1, 2)], "node_labels": [4, 0, 4], "edge_labels": [7, 7, 2]},
    {"y": -1, "n": 2, "edges": [(1, 0)], "node_labels": [9, 4], "edge_labels": [2]},
]


@pytest.mark.parametrize("place", ["S", "S/raw", ".", "raw", "graphs/S", "TUDataset/S/raw"])
@pytest.mark.parametrize("comma", [",", ", "])
def test_what_is_written_is_read_from_every_place(tmp_path, place, comma):
    write_tu(tmp_path / place, "S", GRAPHS, comma)
    raw = read_tu(tmp_path, "S")
    assert raw.edge_index.tolist() == [[0, 1, 1, 4], [1, 0, 2, 3]]
    assert raw.batch.tolist() == [0, 0, 0, 1, 1]
    assert (raw.y.tolist(), raw.classes) == ([1, 0], ("-1", "1"))
    assert raw.node_labels.tolist() == [[4], [0], [4], [9], [4]]
    assert raw.edge_labels.tolist() == [[7], [7], [2], [2]]
    assert raw.node_attributes is None
    assert raw.edge_attributes is None


def test_labels_and_attributes_may_have_several_columns(tmp_path):
    graphs = [
        dict(
            g,
            node_labels=[(v, 2) for v in g["node_labels"]],
            node_attributes=[(0.5, -v) for v in range(g["n"])],
        )
        for g in GRAPHS
    ]
    raw = read_tu(write_tu(tmp_path, "S", graphs), "S")
    assert raw.node_labels.tolist() == [[4, 2], [0, 2], [4, 2], [9, 2], [4, 2]]
    assert raw.node_attributes.tolist() == [[0.5, 0], [0.5, -1], [0.5, -2], [0.5, 0], [0.5, -1]]


def test_nodes_listed_in_any_order_are_put_beside_their_graph(tmp_path):
    folder = write_tu(tmp_path, "S", GRAPHS)
    (folder / "S_graph_indicator.txt").write_text("2\n1\n1\n2\n1\n")
    (folder / "S_node_labels.txt").write_text("9\n4\n0\n4\n4\n")
    (folder / "S_A.txt").write_text("2,3\n3,2\n3,5\n4,1\n")
    raw, plain = read_tu(folder, "S"), read_tu(write_tu(tmp_path / "plain", "S", GRAPHS), "S")
    for part in ("edge_index", "batch", "node_labels", "edge_labels", "y"):
        assert torch.equal(getattr(raw, part), getattr(plain, part)), part


def test_integers_written_as_floats_and_blank_last_lines_are_read(tmp_path):
    folder = write_tu(tmp_path, "S", GRAPHS)
    (folder / "S_node_labels.txt").write_text("4.0\n0.0\n4.0\n9.0\n4.0\n\n\n")
    assert read_tu(folder, "S").node_labels.flatten().tolist() == [4, 0, 4, 9, 4]


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_blank_edge_files_are_a_set_without_edges(tmp_path, text):
    folder = write_tu(tmp_path, "S", [dict(g, edges=[], edge_labels=[]) for g in random_set(30)])
    for part in ("A", "edge_labels", "edge_attributes"):
        (folder / f"S_{part}.txt").write_text(text)
    raw = read_tu(folder, "S")
    assert raw.edge_index.shape == (2, 0)
    assert raw.edge_labels is raw.edge_attributes is None
    made = load_graphs("tu", "S", root=folder, download=False)
    assert made.notes == ("no graph has an edge",)
    assert made.spec.edge_sizes == ()
    assert sum(len(part) for part in (made.fit, made.validation, made.test)) == 30


def test_a_set_with_another_count_than_published_is_noted(tmp_path):
    assert read_tu(write_tu(tmp_path, "MUTAG", GRAPHS), "MUTAG").notes == (
        "MUTAG has 2 graphs here, 188 as published: this is other data",
    )


BAD = {
    "a missing file": ("graph_labels", None, "S_graph_labels.txt is missing"),
    "text": ("A", "1,2\n2,one\n2,3\n5,4\n", "S_A.txt: row 2 holds 'one', which is no number"),
    "ragged rows": ("A", "1,2\n2,1,3\n2,3\n5,4\n", "S_A.txt: row 2 has 3 columns, the rows before it have 2"),
    "a node that is not there": ("A", "1,2\n2,1\n2,6\n5,4\n", "S_A.txt: row 3 names node 6, outside 1..5"),
    "a node 0": ("A", "1,2\n2,1\n2,3\n0,4\n", "S_A.txt: row 4 names node 0, outside 1..5"),
    "an edge between graphs": (
        "A",
        "1,2\n2,1\n2,4\n5,4\n",
        "S_A.txt: row 3 joins node 2 of graph 1 to node 4 of graph 2",
    ),
    "one column of edges": ("A", "1\n2\n3\n4\n", "S_A.txt has 1 columns"),
    "edges gone, their labels left": ("A", "", "S_A.txt is empty"),
    "empty labels": ("graph_labels", "", "S_graph_labels.txt is empty"),
    "edge labels gone": ("edge_labels", "", "S_edge_labels.txt is empty"),
    "a blank file": ("graph_indicator", "\n \n", "S_graph_indicator.txt is empty"),
    "a short indicator": (
        "graph_indicator",
        "1\n1\n2\n2\n",
        "S_node_labels.txt has 5 rows where S_graph_indicator.txt",
    ),
    "a graph without nodes": (
        "graph_indicator",
        "1\n1\n1\n3\n3\n",
        "counts graphs up to 3, S_graph_labels.txt has 2 rows",
    ),
    "a gap in graph numbers": (
        "graph_indicator",
        "2\n2\n2\n2\n2\n",
        "S_graph_indicator.txt: graph 1 of 2 has no node",
    ),
    "a graph 0": (
        "graph_indicator",
        "0\n1\n1\n2\n2\n",
        "S_graph_indicator.txt is no column of graph numbers from 1",
    ),
    "too many classes": ("graph_labels", "1\n-1\n1\n", "S_graph_indicator.txt: graph 3 of 3 has no node"),
    "classes of two columns": ("graph_labels", "1,1\n-1,1\n", "S_graph_labels.txt has 2 columns"),
    "real targets": ("graph_labels", "1.5\n-1\n", "S_graph_labels.txt: row 1 holds 1.5 where an integer"),
    "missing edge labels": (
        "edge_labels",
        "1\n2\n3\n",
        "S_edge_labels.txt has 3 rows where S_A.txt makes it 4",
    ),
    "real node labels": (
        "node_labels",
        "1\n2\n0.25\n1\n1\n",
        "S_node_labels.txt: row 3 holds 0.25 where an integer",
    ),
    "huge labels": (
        "node_labels",
        "1\n2\n1e300\n1\n1\n",
        "S_node_labels.txt: row 3 holds 1e\\+300 where an integer",
    ),
    "NaN": (
        "node_attributes",
        "1,1\n2,nan\n1,1\n1,1\n1,1\n",
        "S_node_attributes.txt: row 2 holds nan in column 2",
    ),
    "infinity": ("edge_attributes", "1\n2\n1\n-inf\n", "S_edge_attributes.txt: row 4 holds -inf in column 1"),
    "underscores": ("node_labels", "1\n2\n1_0\n1\n1\n", "row 3 holds '1_0', which is no number"),
    "terminal codes": ("node_labels", "1\n2\n\x1b[31m\n1\n1\n", "row 3 holds '\\\\x1b\\[31m'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_file_row_and_remedy(tmp_path, case):
    part, text, cause = BAD[case]
    path = write_tu(tmp_path, "S", GRAPHS) / f"S_{part}.txt"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=cause) as error:
        read_tu(tmp_path, "S")
    assert "\n" not in error.value.cause
    assert error.value.remedy
    assert "\n" not in error.value.remedy


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = write_tu(tmp_path, "S", GRAPHS)
    (folder / "S_A.txt").unlink()
    (folder / "S_A.txt").mkdir()
    with pytest.raises(UsageError, match="S_A.txt is missing"):
        read_tu(tmp_path, "S")


def test_a_set_that_is_nowhere_names_the_folders_looked_in(tmp_path):
    with pytest.raises(UsageError, match="looked for X_A.txt in X, X/raw, ., raw, graphs/X") as error:
        read_tu(tmp_path, "X")
    assert "downloading is switched off" in error.value.cause


def test_without_torch_geometric_a_download_names_the_install_line(tmp_path, monkeypatch):
    plain = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("torch_geometric"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r'pip install "ddengine\[graph\]"'):
        read_tu(tmp_path, "X", download=True)


def _fake(monkeypatch, fetch):
    module = types.ModuleType("torch_geometric.datasets")
    module.TUDataset = fetch
    monkeypatch.setitem(sys.modules, "torch_geometric", types.ModuleType("torch_geometric"))
    monkeypatch.setitem(sys.modules, "torch_geometric.datasets", module)


def test_a_set_is_fetched_once_and_then_read_in_place(tmp_path, monkeypatch):
    asked = []

    def fetch(root, name):
        asked.append(name)
        print("Downloading")
        write_tu(Path(root) / name / "raw", name, GRAPHS)

    _fake(monkeypatch, fetch)
    assert [len(read_tu(tmp_path, "X", download=True).y) for _ in range(2)] == [2, 2]
    assert asked == ["X"]


@pytest.mark.parametrize(
    ("fetch", "cause"),
    [
        (lambda root, name: {}["gone\n404"], "the download failed \\('gone"),
        (lambda root, name: None, "the download is incomplete"),
    ],
)
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, fetch, cause):
    _fake(monkeypatch, fetch)
    with pytest.raises(UsageError, match=cause) as error:
        read_tu(tmp_path, "X", download=True)
    assert "\n" not in error.value.cause


@pytest.mark.parametrize("name", ["MUTAG", "IMDB-BINARY", "random"])
def test_edges_labels_and_classes_are_those_of_torch_geometric(graph_sets, tmp_path, name):
    datasets = pytest.importorskip("torch_geometric.datasets")
    raw_folder = tmp_path / name / "raw"
    if name == "random":
        write_tu(raw_folder, name, random_set(31))
    else:
        shutil.copytree(graph_sets / name, raw_folder)
    theirs = datasets.TUDataset(str(tmp_path), name)
    ours = read_tu(tmp_path, name)
    counts = torch.bincount(ours.batch)
    assert counts.tolist() == [graph.num_nodes for graph in theirs]
    assert ours.y.tolist() == [int(graph.y) for graph in theirs]
    starts = counts.cumsum(0) - counts
    ends = torch.cat([graph.edge_index + start for graph, start in zip(theirs, starts, strict=True)], 1)
    order = np.lexsort((ours.edge_index[1], ours.edge_index[0]))  # torch_geometric sorts edges so
    assert torch.equal(ours.edge_index[:, order], ends)
    if name == "IMDB-BINARY":
        assert ours.node_labels is ours.edge_labels is theirs[0].x is theirs[0].edge_attr is None
        return
    assert torch.equal(ours.node_labels[:, 0], torch.cat([graph.x for graph in theirs]).argmax(1))
    assert torch.equal(ours.edge_labels[order, 0], torch.cat([graph.edge_attr for graph in theirs]).argmax(1))
