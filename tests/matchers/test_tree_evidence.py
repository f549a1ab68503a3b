"""What trees say of classes: against features written out tree by tree, and where one tree makes a class."""

import warnings
from collections import Counter
from dataclasses import replace

import naive_trees
import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from random_graphs import random_graphs, same_bits
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

import matchers
from ddengine.errors import UsageError
from ddengine.graph_train import GraphRecipe, accuracy, predicted, train_graph_networks
from ddengine.graphs import Graphs, GraphSpec
from ddengine.nets import NetSpec
from ddengine.ops.dag import closed, histogram, trees_of
from ddengine.rng import Rng
from ddengine.types import Budget, Task
from matchers.tree_evidence import FOLDS, PENALTIES, SPREAD, evidence_set, tree_frequency, tree_scores

COUNT = 31


def collection(seed, classes, count=COUNT, **options):
    """Random graphs whose classes, in mixed order, differ in their edges."""
    graphs = random_graphs(seed, count=count, classes=classes, edge_sizes=(2,), **options)
    few = graphs.edges.argsort(stable=True)
    y = torch.empty(count, dtype=torch.int64)
    y[few] = torch.arange(count) * classes // count
    y[::5] = torch.arange(len(y[::5])) % classes
    return replace(graphs, y=y)


def colors_by_level(graphs, hops, degree):
    """The colour of each node at levels 0..hops: written-out trees, numbered as they first come."""
    nested = (graphs.x.tolist(), graphs.edge_index.tolist(), graphs.edge_attr.tolist())
    return [
        naive_trees.first_occurrence(naive_trees.trees(*nested, level, degree)) for level in range(hops + 1)
    ]


def one_hot_nodes(graphs, hops, degree):
    """[nodes, colours of all levels]: ones at a node's colours."""
    levels = [np.eye(max(ids) + 1)[ids] for ids in colors_by_level(graphs, hops, degree)]
    return np.hstack(levels)


def shares(graphs, nodes):
    """[graphs, colours of all levels]: how much of a graph each colour is, by a loop over its nodes."""
    found = np.zeros((len(graphs), nodes.shape[1]))
    for row, graph in zip(nodes, graphs.batch.tolist(), strict=True):
        found[graph] += row
    return found * (1 / graphs.nodes.numpy())[:, None]


def fitted(x, y, penalty):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=penalty, max_iter=1000, class_weight="balanced")
        return model.fit(sparse.csr_array(x), y)


def by_hand(graphs, hops, degree=False):
    """The model that cross-validation chooses, its accuracy, and features of graphs and of nodes."""
    nodes = one_hot_nodes(graphs, hops, degree)
    x, y, seen = shares(graphs, nodes), graphs.y.numpy(), Counter()
    part = []
    for c in y.tolist():
        part.append(seen[c] % FOLDS)
        seen[c] += 1
    part = np.array(part)
    right = {}
    for penalty in PENALTIES:
        each = []
        for left_out in range(FOLDS):
            model = fitted(x[part != left_out], y[part != left_out], penalty)
            said = model.predict(x[part == left_out])
            each.append(sum(said == y[part == left_out]) / len(said))
        right[penalty] = sum(each) / FOLDS
    best = max(PENALTIES, key=lambda penalty: (right[penalty], -penalty))
    return fitted(x, y, best), right[best], x, nodes


def centred(model, features):
    """The model's logits with mean 0 over the classes."""
    logits = model.decision_function(features)
    logits = np.stack([-logits / 2, logits / 2], 1) if logits.ndim == 1 else logits
    return logits - logits.mean(1, keepdims=True)


def test_frequency_is_the_mean_over_classes_of_a_colors_share_of_nodes():
    graphs = collection(1, 3)
    color, y = colors_by_level(graphs, 2, False)[-1], graphs.y[graphs.batch].tolist()
    expected = np.zeros(max(color) + 1)
    for c in range(3):
        members = [color[i] for i in range(len(color)) if y[i] == c]
        for k in members:
            expected[k] += 1 / len(members) / 3
    found = tree_frequency(trees_of(graphs, 2)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert abs(found.sum() - 1) < 1e-12


@pytest.mark.parametrize(
    ("classes", "hops", "degree"), [(2, 0, False), (2, 2, False), (3, 2, False), (3, 1, True)]
)
def test_scores_are_the_logits_of_the_model_at_each_node_but_for_their_scale(classes, hops, degree):
    graphs = collection(classes + hops, classes)
    model, right, _, nodes = by_hand(graphs, hops, degree)
    trees = trees_of(graphs, hops, degree=degree)
    scores, found_right = tree_scores(trees)
    expected, color = centred(model, nodes), colors_by_level(graphs, hops, degree)[-1]
    table = np.zeros(scores.shape)
    table[color] = expected
    scale = np.average(np.abs(table).mean(1), weights=tree_frequency(trees).numpy())
    np.testing.assert_allclose(scores.numpy(), table * SPREAD / scale, atol=1e-8)
    assert found_right == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_score_of_a_graph_is_the_mean_of_its_nodes_scores(classes):
    graphs = collection(7, classes)
    model, _, x, _ = by_hand(graphs, 2)
    trees = trees_of(graphs, 2)
    scores = tree_scores(trees)[0].numpy()
    found = (histogram(trees) @ scores) / graphs.nodes.numpy()[:, None]
    expected = centred(model, x)
    scale = np.linalg.norm(found) / np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected * scale, atol=1e-8)
    assert (found.argmax(1) == model.predict(x)).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_have_mean_0_for_each_tree_and_the_spread_of_the_constant(classes):
    trees = trees_of(collection(3, classes), 2)
    scores = tree_scores(trees)[0].numpy()
    assert scores.shape == (trees.dag.sizes[-1], classes)
    np.testing.assert_allclose(scores.sum(1), 0, atol=1e-12)
    spread = sum(f * abs(row).mean() for f, row in zip(tree_frequency(trees).numpy(), scores, strict=True))
    assert spread == pytest.approx(SPREAD, rel=1e-9)


def test_scores_are_the_same_bits_every_time_and_draw_nothing():
    trees = trees_of(collection(4, 3), 2)
    with global_rng_untouched():
        first, second = tree_scores(trees), tree_scores(trees)
    assert torch.equal(first[0], second[0]) and first[1] == second[1]


def test_a_class_of_fewer_graphs_than_parts_is_refused():
    graphs = replace(collection(5, 3), y=torch.tensor([0, 1] * 14 + [2, 0, 2]))
    with pytest.raises(
        UsageError, match="3 classes, 'class 2' with 2 graphs: .* of 3 graphs each"
    ) as refused:
        tree_scores(trees_of(graphs, 1))
    assert "\n" not in refused.value.cause + refused.value.remedy
    assert len(tree_scores(trees_of(graphs, 1), folds=2)[0]) == trees_of(graphs, 1).dag.sizes[-1]


def test_one_class_alone_and_no_parts_are_refused():
    trees = trees_of(random_graphs(1, count=7, classes=1), 1)
    with pytest.raises(UsageError, match="1 classes, 'class 0' with 7 graphs"):
        tree_scores(trees)
    with pytest.raises(UsageError, match="folds=0 is out of range"):
        tree_scores(trees, folds=0)


@pytest.fixture(scope="module")
def evidence():
    """Trees with their scores and frequencies, and seven colours in mixed order."""
    trees = trees_of(collection(6, 3), 2)
    return trees, tree_scores(trees)[0], tree_frequency(trees), torch.tensor([31, 2, 17, 5, 23, 3, 11])


def test_labels_are_the_softmax_of_the_scores(evidence):
    trees, scores, _, chosen = evidence
    made = evidence_set(*evidence)
    expected = [[np.exp(s) / np.exp(row).sum() for s in row] for row in scores[chosen.sort().values].numpy()]
    np.testing.assert_allclose(made.y.numpy(), expected, atol=1e-6)
    assert made.y_kind == "prob" and made.spec is trees.spec


@pytest.mark.parametrize("weighted", [True, False])
def test_weights_follow_frequency_and_have_mean_1(evidence, weighted):
    made, rates = evidence_set(*evidence, weighted), evidence[2][evidence[3].sort().values].numpy()
    expected = rates / rates.mean() if weighted else np.ones(7)
    np.testing.assert_allclose(made.weight.numpy(), expected, rtol=1e-5)
    assert made.weight.mean().item() == pytest.approx(1, abs=1e-6)


def test_items_are_single_trees_and_no_color_is_left_that_none_needs(evidence):
    trees, chosen = evidence[0], evidence[3].sort().values
    made = evidence_set(*evidence)
    for values, expected in ((made.item, range(7)), (made.color, range(7)), (made.count, [1] * 7)):
        assert values.tolist() == list(expected)
    assert same_bits(closed(made), made) and sum(made.dag.sizes) < sum(trees.dag.sizes)

    def roots(dag, color):
        for level in reversed(dag.levels):
            color = level.own[color]
        return dag.x[color]

    assert torch.equal(roots(made.dag, made.color), roots(trees.dag, chosen))
    received = [
        torch.zeros(len(d.levels[-1].own), dtype=torch.int64).index_add(
            0, d.levels[-1].row, d.levels[-1].times
        )
        for d in (made.dag, trees.dag)
    ]
    assert torch.equal(received[0], received[1][chosen])


def test_the_order_of_the_chosen_trees_does_not_matter(evidence):
    assert same_bits(evidence_set(*evidence[:3], evidence[3].sort().values), evidence_set(*evidence))


def ring(generator, apart):
    """Labels of a ring of 9 to 13 nodes with two marked ones, side by side or three apart or more."""
    n = int(torch.randint(9, 14, (1,), generator=generator))
    far = int(torch.randint(3, n - 2, (1,), generator=generator)) if apart else 1
    start = int(torch.randint(0, n, (1,), generator=generator))
    return [int(i in (start, (start + far) % n)) for i in range(n)]


def rings(seed, count):
    """Rings whose class is whether a marked node has a marked neighbour: their labels alone tell nothing."""
    g, starts, x, ends = torch.Generator().manual_seed(seed), [], [], []
    for i in range(count):
        labels = ring(g, apart=bool(i % 2))
        starts.append(len(labels))
        pairs = [(len(x) + j, len(x) + (j + 1) % len(labels)) for j in range(len(labels))]
        ends += pairs + [(b, a) for a, b in pairs]
        x += labels
    spec = GraphSpec("rings", ("together", "apart"), (2,))
    none, batch = torch.zeros((len(ends), 0), dtype=torch.int64), torch.arange(count)
    return Graphs(
        torch.tensor(x)[:, None],
        torch.tensor(ends).T,
        none,
        batch.repeat_interleave(torch.tensor(starts)),
        batch % 2,
        spec,
    ).sorted_by_class()


def test_the_tree_that_decides_a_class_speaks_loudest_for_it():
    graphs = rings(0, 60)
    trees = trees_of(graphs, 1)
    scores, right = tree_scores(trees)
    assert right == 1 and tree_scores(trees_of(graphs, 0))[1] < 0.75
    written = naive_trees.trees(graphs.x.tolist(), graphs.edge_index.tolist(), [[]] * len(graphs.x) * 2, 1)
    number = dict(zip(written, naive_trees.first_occurrence(written), strict=True))
    leaf = {label: ((), ((label,), ())) for label in (0, 1)}
    together, apart = ((1,), (leaf[0], leaf[1])), ((1,), (leaf[0], leaf[0]))
    assert int(scores[:, 0].argmax()) == number[together]
    assert scores[number[together], 0] > 0.5 and scores[number[apart], 1] > 0.5


def test_networks_that_learn_from_the_evidence_alone_classify_fresh_graphs():
    task = Task(rings(1, 60), Budget(ipc=2))
    spec = NetSpec("gin", width=16, depth=1)
    matcher, rng = matchers.make("computation_tree", spec), Rng(0)
    work = matcher.prepare(task, rng)
    state, _ = matcher.step(matcher.init(task, rng), work, rng)
    distilled = matcher.finish(state, work, rng)
    assert len(distilled.decode()) == 4 and distilled.nbytes["total"] < 60
    nets = train_graph_networks(
        spec, distilled.decode(), GraphRecipe(steps=150), 0.02, [Rng(seed) for seed in range(2)]
    )
    fresh = trees_of(rings(2, 100), 1)
    rights = [accuracy(each, fresh.y) for each in predicted(nets, nets.plan(fresh))]
    assert len(rights) == 2 and min(rights) > 0.9
