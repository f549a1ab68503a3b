import builtins

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot
from tu_folder import random_set, write_tu

from ddengine.data import load_graphs, split_graphs
from ddengine.data.graph_split import content
from ddengine.data.pyg import from_pyg, to_pyg
from ddengine.errors import UsageError

Data = pytest.importorskip("torch_geometric.data").Data


def data(graph: dict, **changes) -> Data:
    edges = torch.tensor(graph["edges"], dtype=torch.long).reshape(-1, 2).T
    parts = {
        "x": torch.tensor(graph["node_labels"]),
        "edge_index": edges,
        "edge_attr": torch.tensor(graph["edge_labels"], dtype=torch.long),
        "y": torch.tensor([graph["y"]]),
    }
    return Data(**{**parts, **changes})


@pytest.fixture
def made(tmp_path):
    return load_graphs("tu", "S", root=write_tu(tmp_path, "S", random_set(41)))


@pytest.mark.parametrize("known", [True, False])
def test_a_round_trip_changes_nothing(made, known):
    graphs = made.fit
    back = from_pyg(to_pyg(graphs), spec=graphs.spec if known else None)
    for part in ("x", "edge_index", "edge_attr", "batch", "y"):
        assert torch.equal(getattr(back, part), getattr(graphs, part)), part
    assert back.spec.node_sizes == graphs.spec.node_sizes


def test_a_part_keeps_the_codes_of_its_spec(made):
    few = made.fit.take(torch.tensor([3]))
    back = from_pyg(to_pyg(few), spec=made.spec)
    assert back.spec is made.spec
    assert torch.equal(back.x, few.x)
    assert torch.equal(back.y, few.y)


def test_edges_in_any_order_go_to_their_graph(made):
    graphs = made.validation
    order = torch.from_numpy(np.random.default_rng(0).permutation(graphs.edge_index.shape[1]))
    mixed = type(graphs)(
        graphs.x, graphs.edge_index[:, order], graphs.edge_attr[order], graphs.batch, graphs.y, graphs.spec
    )
    listed = to_pyg(mixed)
    assert [graph.num_edges for graph in listed] == graphs.edges.tolist()
    assert (content(from_pyg(listed, spec=graphs.spec)) == content(graphs)).all()


@pytest.mark.parametrize("form", ["codes", "column", "one-hot", "gaps"])
def test_labels_are_read_in_every_form(form):
    graphs = random_set(7)
    listed = [data(graph) for graph in graphs]
    expected = from_pyg(listed)
    for graph in listed:
        if form == "column":
            graph.x, graph.edge_attr = graph.x[:, None], graph.edge_attr[:, None]
        if form == "one-hot":
            graph.x, graph.edge_attr = one_hot(graph.x, 9).float(), one_hot(graph.edge_attr, 4).double()
        if form == "gaps":
            graph.x = graph.x * 10 - 5
    found = from_pyg(listed)
    for part in ("x", "edge_index", "edge_attr", "y"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    assert found.spec.node_sizes == (3,)
    assert found.spec.classes == ("-1", "1")


def test_graphs_without_labels_have_their_degree():
    bare = [data(graph, x=None, edge_attr=None, num_nodes=graph["n"]) for graph in random_set(7)]
    found = from_pyg(bare)
    assert found.spec.codes_from == "degree"
    assert found.spec.edge_sizes == ()
    degrees, codes = found.degree.unique(return_inverse=True)
    assert torch.equal(found.x[:, 0], codes)
    assert found.spec.node_sizes == (len(degrees),)
    assert to_pyg(found)[0].edge_attr is None


def test_self_loops_are_left_out_and_nodes_without_edges_kept():
    lone = Data(x=torch.tensor([1, 2]), y=torch.tensor(0), edge_index=None)
    loop = Data(
        x=torch.tensor([2, 1, 1]), y=torch.tensor([[1]]), edge_index=torch.tensor([[0, 1, 2], [1, 1, 0]])
    )
    found = from_pyg([lone, loop])
    assert found.edge_index.tolist() == [[2, 4], [3, 2]]
    assert found.nodes.tolist() == [2, 3]


@pytest.mark.parametrize("form", ["codes", "column", "one-hot"])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("nothing", [None, torch.zeros(0), torch.zeros(0, 9, dtype=torch.long)])
def test_a_graph_without_edges_has_no_edge_labels_to_give(form, place, nothing):
    listed = [data(graph) for graph in random_set(7)]
    if form != "codes":
        for graph in listed:
            columns = one_hot(graph.edge_attr, 4).double() if form == "one-hot" else graph.edge_attr[:, None]
            graph.edge_attr = columns
    expected = from_pyg(listed)
    lone = Data(x=torch.tensor([0, 2]), y=torch.tensor([1]), edge_attr=nothing)
    found = from_pyg([*listed[:place], lone, *listed[place:]])
    assert torch.equal(found.edge_attr, expected.edge_attr)
    assert found.spec.edge_sizes == expected.spec.edge_sizes == (2,)
    assert found.edges[place] == 0
    assert from_pyg([lone]).spec.edge_sizes == ()


def test_an_edgeless_graph_with_edge_labels_is_refused():
    lone = Data(x=torch.tensor([0, 2]), y=torch.tensor([1]), edge_attr=torch.tensor([1, 1, 0]))
    with pytest.raises(UsageError, match="graph 1: edge_attr has 3 rows for 0 edges"):
        from_pyg([data(GRAPH), lone])


def test_edgeless_graphs_keep_the_edge_codes_of_a_given_spec(made):
    lone = Data(x=torch.tensor([0, 2]), y=torch.tensor([1]))
    back = from_pyg([lone], spec=made.spec)
    assert back.edge_attr.shape == (0, 1)
    assert back.spec is made.spec


def test_too_many_label_columns_are_refused():
    wide = data(GRAPH, x=torch.zeros(N, 257, dtype=torch.long))
    with pytest.raises(UsageError, match="pyg has 257 node label columns, more than 256\nKeep 256 or fewer"):
        from_pyg([wide])
    one_hots = from_pyg([data(GRAPH, x=one_hot(torch.zeros(N, dtype=torch.long), 300).float())])
    assert one_hots.spec.node_sizes == (1,)


def test_graphs_of_a_program_are_split_as_the_same_graphs_in_files(made):
    graphs = from_pyg([data(graph) for graph in random_set(41)])
    found = split_graphs(graphs)
    assert found.spec.fingerprint == made.spec.fingerprint
    for ours, theirs in zip(
        (found.fit, found.validation, found.test), (made.fit, made.validation, made.test), strict=True
    ):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.edge_index, theirs.edge_index)
        assert torch.equal(ours.y, theirs.y)


def test_datasets_of_torch_geometric_are_those_of_our_reader(tmp_path):
    from torch_geometric.datasets import TUDataset

    write_tu(tmp_path / "S" / "raw", "S", random_set(31))
    theirs = from_pyg(TUDataset(str(tmp_path), "S"))
    ours = load_graphs("tu", "S", root=tmp_path)
    keys = np.concatenate([content(part) for part in (ours.fit, ours.validation, ours.test)])
    assert sorted(keys.tolist()) == sorted(content(theirs).tolist())


GRAPH = random_set(1)[0]
N = GRAPH["n"]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"x": torch.rand(N, 3)}, "x holds floats that are not one-hot"),
        ({"x": torch.ones(N)}, "x holds floats that are not one-hot"),
        ({"x": torch.zeros(N, 3)}, "x holds floats that are not one-hot"),
        ({"edge_attr": torch.rand(len(GRAPH["edges"]), 1)}, "edge_attr holds floats that are not one-hot"),
        ({"x": torch.zeros(N, 2, 2, dtype=torch.long)}, "graph 0: x has another shape"),
        (
            {"x": torch.zeros(N + 1, dtype=torch.long), "num_nodes": N},
            f"graph 0: x has {N + 1} rows for {N} nodes",
        ),
        ({"edge_attr": torch.zeros(1, dtype=torch.long)}, "graph 0: edge_attr has 1 rows"),
        (
            {"edge_index": torch.tensor([[0], [N]]), "edge_attr": None},
            "graph 0: edge_index \\(2, 1\\) does not join",
        ),
        ({"y": None}, "graph 0 has no y"),
        ({"y": torch.tensor([0.5])}, "graph 0 has y of type torch.float32"),
        ({"y": torch.tensor([0, 1])}, "graph 0 has y of type torch.int64 and shape \\(2,\\)"),
        ({"x": torch.zeros(0, dtype=torch.long)}, "graph 0 has no node"),
    ],
)
def test_what_does_not_fit_is_refused(changes, cause):
    with pytest.raises(UsageError, match=cause) as error:
        from_pyg([data(GRAPH, **changes)])
    assert "\n" not in error.value.cause
    assert error.value.remedy


def test_a_list_of_nothing_or_of_mixed_graphs_is_refused(made):
    with pytest.raises(UsageError, match="pyg holds no graph"):
        from_pyg([])
    with pytest.raises(UsageError, match="graph 1: edge_attr has another shape or type than graph 0's"):
        from_pyg([data(GRAPH), data(GRAPH, edge_attr=None)])
    with pytest.raises(UsageError, match="no node labels to be codes"):
        from_pyg([data(GRAPH, x=None, num_nodes=N)], spec=made.spec)
    with pytest.raises(UsageError, match="node label column 0 holds codes outside 0..2"):
        from_pyg([data(GRAPH, x=torch.full((N,), 3), y=torch.tensor(0))], spec=made.spec)


def test_without_torch_geometric_the_install_line_is_named(made, monkeypatch):
    plain = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("torch_geometric"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r'pip install "ddengine\[graph\]"'):
        to_pyg(made.fit)
