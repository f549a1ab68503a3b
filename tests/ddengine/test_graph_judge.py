import json
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from naive_trees import trees as canonical_trees
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tu_folder import random_set, write_tu

from ddengine import graph_bench, graph_judge, judge
from ddengine.data import load, load_graphs
from ddengine.errors import UsageError
from ddengine.graph_judge import GRAPH_ROWS, JudgedGraphs, evaluate_graphs, usual_rows
from ddengine.graph_train import GraphRecipe, accuracy, predicted, roc_auc, train_graph_networks
from ddengine.nets import NetSpec
from ddengine.nets.graph import build_graph_networks
from ddengine.ops.dag import histogram, trees_of
from ddengine.rng import Rng
from synth import DistilledSet, Forest, GraphSubset, Pixels, stored_graphs
from synth.forest import as_stored
from synth.graph_starts import GRAPH_SELECTIONS

GIN = NetSpec("gin", width=4)
SAGE = NetSpec("sage", width=3, depth=1)
TINY = GraphRecipe(steps=3, lrs=(0.01, 0.1))
NETWORKED = ("distilled", "random_bytes", "herding_bytes", "untrained", "full")
KEYS = {"name", "network", "metric", "mean", "std", "n", "ci95", "values", "steps", "bytes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets of random graphs in TU text, of two and of three classes."""
    root = tmp_path_factory.mktemp("sets")
    write_tu(root, "THREE", random_set(91, 1, (4, 0, 7)))
    write_tu(root, "TWO", random_set(83, 2))
    return root


@pytest.fixture(scope="module")
def two(folder):
    return load_graphs("tu", "TWO", root=folder)


@pytest.fixture(scope="module")
def three(folder):
    return load_graphs("tu", "THREE", root=folder)


def packed(synth, dataset):
    recipe = {"network": GIN.to_dict(), "dataset": {"collection": "tu", "name": dataset.spec.name}}
    return DistilledSet.make(synth, recipe=recipe, provenance={"seconds": 1.5, "steps": 2})


def forest(dataset, hops=2, degree=False):
    """Trees of five real graphs of each class as a distilled set."""
    y = dataset.fit.y
    some = torch.cat([(y == c).nonzero().flatten()[:5] for c in range(len(dataset.spec.classes))])
    return packed(Forest.of(trees_of(dataset.fit.take(some), hops, degree=degree)), dataset)


@dataclass
class Run:
    table: dict
    log: list = field(default_factory=list)
    progress: list = field(default_factory=list)

    def row(self, name, metric="accuracy", network="gin"):
        wanted = (name, metric, network)
        (found,) = [r for r in self.table["rows"] if (r["name"], r["metric"], r["network"]) == wanted]
        return found


def judged(distilled, dataset, **changes):
    run = Run({})
    note = lambda done, total: run.progress.append((done, total))
    settings = {"networks": [GIN], "seeds": 2, "recipe": TINY, **changes}
    table = evaluate_graphs(distilled, dataset, log=run.log.append, on_progress=note, **settings)
    return replace(run, table=table.to_json())


@pytest.fixture(scope="module")
def runs(two, three):
    return {
        "TWO": judged(forest(two), two),
        "THREE": judged(forest(three), three, networks=[GIN, SAGE]),
    }


@pytest.fixture
def benches(monkeypatch):
    """The benches of the evaluations that follow."""
    kept, real = [], graph_judge.GraphBench
    monkeypatch.setattr(graph_judge, "GraphBench", lambda *a, **k: kept.append(real(*a, **k)) or kept[-1])
    return kept


@pytest.fixture
def trained(monkeypatch):
    """(trees, networks) of each training that follows, networks with the weights of the last step."""
    kept, real = [], train_graph_networks

    def spy(spec, trees, *rest):
        kept.append((trees, real(spec, trees, *rest)))
        return kept[-1][1]

    monkeypatch.setattr(graph_bench, "train_graph_networks", spy)
    return kept


def timeless(records):
    return [{key: 0 if "seconds" in key else value for key, value in record.items()} for record in records]


def without_test(records):
    return [{key: v for key, v in record.items() if not key.startswith("test_")} for record in records]


@pytest.mark.parametrize("name", ["TWO", "THREE"])
def test_json_has_the_documented_shape_and_survives_a_round_trip(name, runs):
    table = runs[name].table
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert {"protocol", "dataset", "rows", "scores"} <= set(table)
    assert (table["protocol"], table["dataset"]) == ("standard-v1", name)
    scores, key = table["scores"], (table["scores"]["network"], "accuracy")
    means = {row["name"]: row["mean"] for row in table["rows"] if (row["network"], row["metric"]) == key}
    rival = scores["components"]["rows"]["rival"]
    assert scores["ior"] == pytest.approx(means["distilled"] - means[rival])
    assert scores["ars"] is None
    for row in table["rows"]:
        assert set(row) >= KEYS
        assert row["n"] == len(row["values"])
        assert row["mean"] == pytest.approx(np.mean(row["values"]))
        assert all(0 <= value <= 1 for value in row["values"])
        assert row["bytes"]["total"] == sum(v for part, v in row["bytes"].items() if part != "total")
    assert table["recipe"]["steps"] == 3
    assert (table["source_matches"], table["cost"]["seconds"]) == (True, 1.5)


@pytest.mark.parametrize("name", ["TWO", "THREE"])
def test_each_network_and_row_has_an_accuracy_and_an_area(name, runs):
    found = [(row["network"], row["name"], row["metric"]) for row in runs[name].table["rows"]]
    labels = ("logistic, level 0", "logistic, level 1", "logistic, level 2")
    simple = [("logistic", "size_only"), *((label, "wl_logistic") for label in labels)]
    networks = ("gin", "sage") if name == "THREE" else ("gin",)
    pairs = [(net, row) for net in networks for row in NETWORKED] + simple
    assert found == [(*pair, metric) for pair in pairs for metric in ("accuracy", "roc_auc")]
    assert {row["n"] for row in runs[name].table["rows"]} == {1, 2}


def test_every_trained_row_gets_the_same_steps_and_trials_and_the_log_a_record_for_each(runs):
    run = runs["THREE"]
    rows = [row for row in run.table["rows"] if row["name"] in NETWORKED and row["name"] != "untrained"]
    assert {row["steps"] for row in rows} == {3}
    assert {tuple(trial["lr"] for trial in row["trials"]) for row in rows} == {(0.01, 0.1)}
    trials, finals = ([r for r in run.log if r["kind"] == kind] for kind in ("trial", "final"))
    assert (len(trials), len(finals)) == (2 * 4 * 2, 2 * 5 * 2)
    assert all(not any(key.startswith("test_") for key in record) for record in trials)
    assert run.progress[-1] == (36, 36)
    assert [total for _, total in run.progress] == [36] * len(run.progress)


def test_values_are_the_logged_test_scores_of_all_seeds(runs):
    run = runs["TWO"]
    for row in run.table["rows"]:
        if row["name"] not in NETWORKED:
            continue
        mine = [r for r in run.log if (r["network"], r["row"]) == (row["network"], row["name"])]
        finals = [r for r in mine if r["kind"] == "final"]
        assert [r["index"] for r in finals] == [0, 1]
        assert row["values"] == [r[f"test_{row['metric']}"] for r in finals]


@pytest.mark.parametrize("lrs", [(0.0001, 0.05, 0.9), (0.9, 0.05, 0.0001)])
def test_validation_accuracy_alone_chooses_the_rate(lrs, three):
    recipe = GraphRecipe(steps=8, lrs=lrs)
    run = judged(forest(three), three, rows=("random_bytes", "full"), recipe=recipe, seeds=1)
    for row in run.table["rows"]:
        assert row["lr"] == max(row["trials"], key=lambda trial: trial["validation"])["lr"]
    scores = {trial["validation"] for row in run.table["rows"] for trial in row["trials"]}
    assert len(scores) > 1


def shuffled_test(dataset):
    order = torch.randperm(len(dataset.test), generator=Rng(1).torch("labels"))
    return replace(dataset, test=replace(dataset.test, y=dataset.test.y[order]))


@pytest.mark.parametrize("protocol", ["standard-v1", "paper/mirage"])
def test_shuffled_test_labels_change_nothing_but_test_scores(protocol, three, trained):
    rows = ("random_bytes", "untrained", "size_only", "full")
    given = {"protocol": protocol, "recipe": GraphRecipe(steps=4, lrs=(0.02, 0.2)), "seeds": 3, "rows": rows}
    true, false = (judged(forest(three), dataset, **given) for dataset in (three, shuffled_test(three)))
    assert timeless(without_test(true.log)) == timeless(without_test(false.log))
    half = len(trained) // 2
    for (_, mine), (_, theirs) in zip(trained[:half], trained[half:], strict=True):
        a, b = mine.state_dict(), theirs.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a)
    for mine, theirs in zip(true.table["rows"], false.table["rows"], strict=True):
        differ = {key for key in mine if mine[key] != theirs[key]}
        assert differ <= {"mean", "std", "ci95", "values", "train_seconds"}
    values = [[row["values"] for row in run.table["rows"]] for run in (true, false)]
    assert values[0] != values[1]


def test_the_test_part_is_read_only_by_the_final_scores(three, monkeypatch):
    order, real_trees, real_score = [], graph_bench.GraphBench.trees, graph_bench.score_on_test
    spy = lambda self, part, net: order.append(part) or real_trees(self, part, net)
    monkeypatch.setattr(graph_bench.GraphBench, "trees", spy)

    def score(nets, bench, network):
        before = len(order)
        found = real_score(nets, bench, network)
        assert order[before:] == ["test"]
        del order[before:]
        return found

    monkeypatch.setattr(graph_bench, "score_on_test", score)
    judged(forest(three), three, rows=("random_bytes", "full"))
    assert "test" not in order
    assert {"validation", "fit"} == set(order)


def test_two_workers_give_the_bits_of_one(three, runs):
    both = judged(forest(three), three, rows=NETWORKED[1:], workers=2)
    one = [row for row in runs["THREE"].table["rows"] if row["network"] == "gin"]
    assert timeless(both.table["rows"]) == timeless(one)
    assert timeless(both.log) == timeless([r for r in runs["THREE"].log if r["network"] == "gin"])


def test_neither_the_order_of_rows_nor_other_networks_change_a_score(three, runs):
    turned = judged(forest(three), three, rows=[row for row in GRAPH_ROWS[::-1] if row != "wl_logistic"])
    for row in turned.table["rows"]:
        mine = runs["THREE"].row(row["name"], row["metric"], row["network"])
        assert timeless([row]) == timeless([mine])
    names = list(dict.fromkeys(row["name"] for row in turned.table["rows"]))
    assert set(names) == set(NETWORKED) | {"size_only"}
    assert names[:3] == ["distilled", "full", "untrained"]
    other = judged(forest(three), three, seed=1, rows=("full",))
    assert other.row("full", "roc_auc")["values"] != turned.row("full", "roc_auc")["values"]


def naive_ranking(bench, row, index, seed):
    """For each class its graphs in the order in which `row` takes them."""
    counts = histogram(trees_of(bench.fit, 2))
    rng = Rng(seed).fold("judge", "pick", row, index)
    return GRAPH_SELECTIONS[row.removesuffix("_bytes")](counts, bench.fit.y, len(bench.fit), rng)


@pytest.mark.parametrize("name", ["TWO", "THREE"])
def test_rows_of_equal_bytes_fill_the_bytes_of_the_set(name, two, three, benches):
    dataset = {"TWO": two, "THREE": three}[name]
    distilled = forest(dataset)
    run = judged(distilled, dataset, rows=("random_bytes", "herding_bytes"), seeds=3)
    (bench,), total = benches, distilled.nbytes["total"]
    size = lambda index: stored_graphs(bench.fit.take(index), 2, False).nbytes["total"]
    for row, index in [("random_bytes", i) for i in ("trial", 0, 1, 2)] + [("herding_bytes", "trial")]:
        picked = bench.picks[row, None if index == "trial" else index]
        assert size(picked) <= total
        ranking = naive_ranking(bench, row, index, 0)
        for c, order in enumerate(ranking):
            mine = picked[bench.fit.y[picked] == c]
            assert torch.equal(mine, order[: len(mine)])
            assert size(torch.cat([picked, order[len(mine) : len(mine) + 1]])) > total
        assert min(bench.fit.y[picked].bincount()) >= 1
        if index == "trial":
            assert run.row(row)["bytes"]["total"] == size(picked)
            assert run.row(row)["count"] == len(picked)


def test_random_rows_draw_anew_for_each_network_and_herding_once(three, benches, trained):
    judged(forest(three), three, rows=("random_bytes", "random", "herding_bytes"), seeds=2)
    (bench,) = benches
    for row in ("random_bytes", "random"):
        draws = [bench.picks[row, index].sort().values.tolist() for index in (None, 0, 1)]
        assert len({tuple(draw) for draw in draws}) == 3
    assert [key for key in bench.picks if key[0] == "herding_bytes"] == [("herding_bytes", None)]
    sizes = [len(trees) for trees, _ in trained[-5:]]  # two, two and one network of the three rows
    assert sizes[2:] == [15, 15, len(bench.picks["herding_bytes", None])]


def labels_of(graphs, hops, degree):
    """Soft labels that tell how many nodes a graph has."""
    return torch.nn.functional.one_hot(graphs.nodes % 3, 3) * 0.5 + torch.tensor([0.1, 0.1, 0.3])


def test_random_graphs_with_the_labels_of_the_set_pay_for_them_in_its_bytes(three, benches, trained):
    distilled, asked = forest(three), []
    labeler = lambda graphs, hops, degree: (
        asked.append((graphs, hops, degree)) or labels_of(graphs, hops, degree)
    )
    run = judged(distilled, three, rows=("random_same_labels", "random_bytes"), labeler=labeler)
    (bench,), total, row = benches, distilled.nbytes["total"], run.row("random_same_labels")
    assert asked == [(three.fit, 2, False)]
    soft, wanted = as_stored(labels_of(three.fit, 2, False)), {}  # rounded as the set's own are
    for index in (None, 0, 1):
        picked = bench.picks["random_same_labels", index]
        wanted[index] = soft[picked]
        size = lambda i: stored_graphs(three.fit.take(i), 2, False).nbytes["total"] + len(i)  # one byte more
        assert size(picked) <= total
        rest = [i for i in range(len(three.fit)) if i not in picked.tolist()]
        assert any(size(torch.cat([picked, torch.tensor([i])])) > total for i in rest)
        if index is None:
            assert (row["bytes"]["total"], row["count"]) == (size(picked), len(picked))
    seen = [trees.y for trees, _ in trained if trees.y_kind == "prob"]
    assert len(seen) == 2 + 2
    for mine, index in zip(seen, (None, None, 0, 1), strict=True):
        assert torch.equal(mine, wanted[index])
    assert {trees.y_kind for trees, _ in trained} == {"prob", "class"}


def test_rows_follow_the_kind_of_labels():
    assert usual_rows(soft=False) == GRAPH_ROWS
    assert [row for row in usual_rows(soft=True) if row not in GRAPH_ROWS] == ["random_same_labels"]


def test_the_untrained_row_scores_networks_as_they_are_drawn(three, runs, trained):
    run = judged(forest(three), three, rows=("untrained",), seeds=2)
    generators = [Rng(0).fold("judge", "gin", i).torch("weights") for i in range(2)]
    fresh = build_graph_networks(GIN, three.spec, generators).eval()
    probabilities = predicted(fresh, fresh.plan(trees_of(three.test, 2)))
    accuracies, areas = (run.row("untrained", metric) for metric in ("accuracy", "roc_auc"))
    assert accuracies["values"] == [accuracy(p, three.test.y) for p in probabilities]
    assert areas["values"] == [roc_auc(p, three.test.y) for p in probabilities]
    assert (accuracies["steps"], accuracies["count"], accuracies["bytes"]["total"]) == (0, 0, 0)
    assert accuracies["trials"] == []
    last = trained[-1][1].state_dict()
    assert all(torch.equal(last[name], value) for name, value in fresh.state_dict().items())


def colors_of(graphs, level):
    """For each graph how often each of its trees, written out, occurs."""
    found = []
    for i in range(len(graphs)):
        one = graphs.take(torch.tensor([i]))
        given = (one.x.tolist(), one.edge_index.tolist(), one.edge_attr.tolist())
        found.append(Counter(canonical_trees(*given, level)))
    return found


def logistic(parts, dataset):
    """Test accuracy and area of the logistic regression whose penalty does best on validation."""
    best = (-1.0, None)
    for c in (0.01, 0.1, 1.0, 10.0):
        model = LogisticRegression(C=c, max_iter=1000, class_weight="balanced").fit(parts[0], dataset.fit.y)
        right = float(np.mean(model.predict(parts[1]) == dataset.validation.y.numpy()))
        best = max(best, (right, model), key=lambda pair: pair[0])
    model, y = best[1], dataset.test.y.numpy()
    scores, binary = model.predict_proba(parts[2]), len(model.classes_) == 2
    area = roc_auc_score(y, scores[:, 1]) if binary else roc_auc_score(y, scores, multi_class="ovr")
    return float(np.mean(model.predict(parts[2]) == y)), float(area)


@pytest.mark.parametrize("name", ["TWO", "THREE"])
def test_scores_without_networks_are_those_of_scikit_learn(name, two, three, runs):
    dataset = {"TWO": two, "THREE": three}[name]
    graphs = (dataset.fit, dataset.validation, dataset.test)
    sizes = [np.log([[float(n)] for n in part.nodes]) for part in graphs]
    wanted = {("size_only", "logistic"): [size / sizes[0].std() for size in sizes]}
    for level in range(3):
        counts = [colors_of(part, level) for part in graphs]
        known = sorted({tree for graph in counts[0] for tree in graph})
        wanted["wl_logistic", f"logistic, level {level}"] = [
            np.sqrt([[graph[tree] for tree in known] for graph in part]) for part in counts
        ]
    for (row, network), parts in wanted.items():
        right, area = logistic(parts, dataset)
        assert runs[name].row(row, "accuracy", network)["values"] == pytest.approx([right])
        assert runs[name].row(row, "roc_auc", network)["values"] == pytest.approx([area], abs=0.02)
        assert runs[name].row(row, "accuracy", network)["count"] == len(dataset.fit)


def test_the_full_row_is_the_whole_fit_part(two, trained):
    everything = packed(GraphSubset.of(two.fit), two)
    run = judged(everything, two, rows=("full",), seeds=3)
    mine, full = run.row("distilled"), run.row("full")
    assert (mine["values"], mine["trials"]) == (full["values"], full["trials"])
    assert full["count"] == len(two.fit) == len(trained[-1][0])
    assert full["bytes"] == dict(stored_graphs(two.fit, 2, False).nbytes)
    assert len(set(run.row("distilled", "roc_auc")["values"])) > 1


def test_networks_that_need_degrees_are_judged_where_the_set_has_them(two):
    nets = [NetSpec(name, width=4) for name in ("gin", "gcn", "gat", "sage", "gine", "gatv2")]
    run = judged(forest(two, degree=True), two, networks=nets, rows=("full",), seeds=1)
    found = {row["network"] for row in run.table["rows"]}
    assert found == {"gin", "gcn", "gat", "sage", "gine", "gatv2"}
    assert len(run.table["rows"]) == 6 * 2 * 2


def test_judging_leaves_set_and_global_generators_alone(three):
    distilled = forest(three)
    tensors = {name: tensor.clone() for name, tensor in distilled.tensors.items()}
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    judged(distilled, three, rows=("random_bytes", "random", "kcenter", "size_only"), seeds=1)
    assert isinstance(distilled, JudgedGraphs)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in distilled.tensors.items())
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.get_num_threads() == before[2]
    assert (before[1] == np.random.get_state()[1]).all()


def test_one_network_has_no_deviation_and_one_rate_needs_no_trial(three):
    run = judged(forest(three), three, rows=(), seeds=1, recipe=GraphRecipe(steps=2, lrs=(0.1,)))
    row = run.row("distilled")
    assert (row["n"], row["std"], row["ci95"], row["trials"], row["lr"]) == (1, None, None, [], 0.1)


def renamed(dataset, **changes):
    spec = replace(dataset.spec, **changes)
    parts = {part: replace(getattr(dataset, part), spec=spec) for part in ("fit", "validation", "test")}
    return replace(dataset, **parts)


def of_one_class(dataset, part):
    graphs = getattr(dataset, part)
    return replace(dataset, **{part: graphs.take((graphs.y == 1).nonzero().flatten())})


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"networks": [GIN, NetSpec("gcn")]}, "gcn needs the degree"),
        ({"networks": [NetSpec("gin", depth=3)]}, "3 layers, the trees 2 hops"),
        ({"networks": [NetSpec("mlp")]}, "mlp works on images"),
        ({"networks": [NetSpec("gim")]}, "unknown graph network 'gim'"),
        ({"networks": [NetSpec("gin", norm="instance")]}, "network.norm=instance"),
        ({"networks": []}, "empty"),
        ({"networks": [GIN, GIN]}, "repeat"),
        ({"rows": ("full", "herdin")}, "unknown row 'herdin'"),
        ({"rows": ("kmeans",)}, "unknown row 'kmeans'"),
        ({"rows": ("full", "full")}, "repeat"),
        ({"rows": ("random_same_labels",)}, "this one has hard labels"),
        ({"seeds": 0}, "seeds=0"),
        ({"workers": 0}, "workers=0"),
        ({"protocol": "paper"}, "unknown protocol 'paper'"),
        ({"dataset": lambda d: renamed(d, classes=("a", "b", "c"))}, "classes"),
        ({"dataset": lambda d: renamed(d, node_sizes=(5,))}, r"node labels \(3,\)"),
        ({"dataset": lambda d: renamed(d, edge_sizes=(3,))}, "edge labels differ"),
        ({"dataset": lambda d: of_one_class(d, "test")}, "one class only"),
        ({"dataset": lambda d: of_one_class(d, "validation")}, "one class only"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_judged_is_refused_before_anything_is_trained(wrong, match, three, trained):
    distilled, dataset = forest(three), wrong.get("dataset", lambda d: d)(three)
    with pytest.raises(UsageError, match=match):
        judged(distilled, dataset, **{k: v for k, v in wrong.items() if k != "dataset"})
    assert trained == []


def test_gine_is_refused_where_edges_have_no_labels(tmp_path, trained):
    graphs = [{k: v for k, v in graph.items() if k != "edge_labels"} for graph in random_set(61, 3)]
    dataset = load_graphs("tu", "BARE", root=write_tu(tmp_path, "BARE", graphs))
    with pytest.raises(UsageError, match="gine reads edge labels"):
        judged(forest(dataset), dataset, networks=[NetSpec("gine")])
    assert trained == []


def test_graph_networks_judge_no_images():
    digits = load("digits")
    pixels = Pixels(digits.fit.model_input()[:10], digits.fit.y[:10], digits.spec)
    distilled = DistilledSet.make(pixels, recipe={}, provenance={})
    with pytest.raises(UsageError, match="gin"):
        judge.evaluate(distilled, digits, networks=[GIN], seeds=1, rows=())
