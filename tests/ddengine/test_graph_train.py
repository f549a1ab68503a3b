from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_graphs

from ddengine.errors import UsageError
from ddengine.graph_train import (
    GraphRecipe,
    accuracy,
    item_weights,
    predicted,
    roc_auc,
    train_graph_networks,
)
from ddengine.nets import NetSpec
from ddengine.nets.graph import build_graph_networks
from ddengine.ops.dag import trees_of
from ddengine.rng import Rng

GIN = NetSpec("gin", width=5, depth=2)
TINY = GraphRecipe(steps=7, lrs=(0.02,))
RNGS = [Rng(3).fold(i) for i in range(3)]


def weighted(soft, seed=0):
    """Trees of eleven random graphs of three classes with unequal weights, their labels hard or soft."""
    trees = trees_of(random_graphs(seed, count=11), 2)
    generator = Rng(seed).torch("labels")
    trees = replace(trees, weight=torch.rand(11, generator=generator) + 0.1)
    if not soft:
        return trees
    return replace(trees, y=torch.rand((11, 3), generator=generator).softmax(1), y_kind="prob")


def weights_by_hand(trees, balance):
    """Item weights one by one: divided by the sum of their class, then by the sum of all."""
    weights = [float(w) for w in trees.weight]
    if balance and trees.y_kind == "class":
        labels = trees.y.tolist()
        sums = {c: sum(w for w, y in zip(weights, labels, strict=True) if y == c) for c in labels}
        weights = [w / sums[y] for w, y in zip(weights, labels, strict=True)]
    return [w / sum(weights) for w in weights]


def trained_by_hand(trees, recipe, lr, rng):
    """One network after the recipe's steps on a loss that is summed item by item and class by class."""
    nets = build_graph_networks(GIN, trees.spec, [rng.torch("weights")], pool=recipe.pool)
    optimiser = torch.optim.Adam(nets.parameters(), lr, weight_decay=recipe.weight_decay)
    weights, classes = weights_by_hand(trees, recipe.balance), range(len(trees.spec.classes))
    for _ in range(recipe.steps):
        p, loss = nets(trees)[0].softmax(1), 0
        for i, w in enumerate(weights):
            for c in classes:
                target = float(trees.y[i, c]) if trees.y_kind == "prob" else float(trees.y[i] == c)
                loss = loss - w * target * p[i, c].log()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return nets


def distance(a, copy, b):
    """The largest difference between network `copy` of `a` and the only network of `b`."""
    theirs = b.state_dict()
    return max(float((v[copy] - theirs[name][0]).abs().max()) for name, v in a.state_dict().items())


@pytest.mark.parametrize(
    ("soft", "balance", "pool"), [*product([False, True], [False, True], ["mean", "sum"])]
)
def test_networks_descend_the_weighted_cross_entropy_of_hard_and_of_soft_labels(soft, balance, pool):
    trees, recipe = weighted(soft), replace(TINY, balance=balance, pool=pool, weight_decay=0.1)
    nets = train_graph_networks(GIN, trees, recipe, 0.02, RNGS[:1])
    assert distance(nets, 0, trained_by_hand(trees, recipe, 0.02, RNGS[0])) < 2e-4
    plain = replace(trees, weight=torch.ones(11))
    assert distance(nets, 0, trained_by_hand(plain, recipe, 0.02, RNGS[0])) > 2e-3


def test_balance_changes_the_training_on_hard_labels_only():
    for soft in (False, True):
        even, odd = (
            train_graph_networks(GIN, weighted(soft), replace(TINY, balance=balance), 0.02, RNGS[:1])
            for balance in (True, False)
        )
        assert (distance(even, 0, odd) == 0) is soft


@pytest.mark.parametrize("seed", range(3))
def test_weights_sum_to_one_and_those_of_classes_that_occur_are_equal_where_balanced(seed):
    for soft, balance in product([False, True], [False, True]):
        trees = weighted(soft, seed)
        found = item_weights(trees, balance)
        assert found.tolist() == pytest.approx(weights_by_hand(trees, balance), rel=1e-5)
        assert float(found.sum()) == pytest.approx(1)
    trees = weighted(False, seed)
    sums = torch.zeros(3).index_add_(0, trees.y, item_weights(trees, True))
    present = len(trees.y.unique())
    assert sums[sums > 0].tolist() == pytest.approx([1 / present] * present)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", ["gin", "gat", "sage"])
def test_networks_trained_together_are_those_trained_alone(name, dropout):
    spec, trees, recipe = NetSpec(name, width=5), weighted(False), replace(TINY, dropout=dropout)
    nets = train_graph_networks(spec, trees, recipe, 0.02, RNGS)
    alone = [train_graph_networks(spec, trees, recipe, 0.02, [rng]) for rng in RNGS]
    found = predicted(nets, nets.plan(trees))  # attention has weights that nothing depends on, so not those
    single = np.concatenate([predicted(one, one.plan(trees)) for one in alone])
    assert found == pytest.approx(single, abs=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.02


def test_the_same_arguments_give_the_same_bits_and_dropout_is_drawn_anew_each_step():
    trees, recipe = weighted(False), replace(TINY, dropout=0.3)
    one, two = (train_graph_networks(GIN, trees, recipe, 0.02, RNGS).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    masks, real = [], torch.rand
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *a, **k: masks.append(real(*a, **k)) or masks[-1])
        train_graph_networks(GIN, trees, replace(recipe, steps=2), 0.02, RNGS[:2])
    assert len(masks) == 4
    assert not any(torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))


def test_the_watch_sees_eval_networks_before_each_step_and_after_the_last():
    trees, seen = weighted(False), []

    def watch(step, nets):
        seen.append((step, nets.training, {k: v.clone() for k, v in nets.state_dict().items()}))

    recipe = replace(TINY, steps=3, dropout=0.5)
    nets = train_graph_networks(GIN, trees, recipe, 0.02, RNGS, watch)
    assert [(step, training) for step, training, _ in seen] == [(i, False) for i in range(4)]
    for steps, _, state in seen:
        part = train_graph_networks(GIN, trees, replace(recipe, steps=steps), 0.02, RNGS).state_dict()
        assert all(torch.equal(part[name], state[name]) for name in part)
    assert not nets.training
    assert not torch.equal(seen[0][2]["classifier.weight"], seen[1][2]["classifier.weight"])


def test_no_steps_leave_the_networks_as_they_were_drawn():
    trees = weighted(True)
    nets = train_graph_networks(GIN, trees, replace(TINY, steps=0), 0.02, RNGS).state_dict()
    fresh = build_graph_networks(GIN, trees.spec, [rng.torch("weights") for rng in RNGS]).state_dict()
    assert all(torch.equal(nets[name], fresh[name]) for name in fresh)


def test_predictions_are_the_probabilities_of_each_network():
    trees = weighted(False)
    nets = train_graph_networks(GIN, trees, TINY, 0.02, RNGS)
    found = predicted(nets, nets.plan(trees))
    assert found.shape == (3, 11, 3)
    assert found.dtype == np.float64
    assert found.sum(2) == pytest.approx(np.ones((3, 11)), abs=1e-6)
    assert found[1] == pytest.approx(nets(trees)[1].softmax(1).detach().numpy(), abs=1e-6)


def test_what_does_not_fit_the_networks_is_refused():
    trees = weighted(False)
    with pytest.raises(UsageError, match="3 layers, the trees 2 hops"):
        train_graph_networks(replace(GIN, depth=3), trees, TINY, 0.02, RNGS)
    with pytest.raises(UsageError, match="gcn needs the degree"):
        train_graph_networks(NetSpec("gcn"), trees, TINY, 0.02, RNGS)
    with pytest.raises(UsageError, match="convnet works on images"):
        train_graph_networks(NetSpec("convnet"), trees, TINY, 0.02, RNGS)


def pairs_won(scores, positive):
    """The part of (positive, negative) pairs in which the positive scores higher; a tie is half a pair."""
    won = [
        (a > b) + (a == b) / 2
        for a, p in zip(scores, positive, strict=True)
        for b, q in zip(scores, positive, strict=True)
        if p and not q
    ]
    return sum(won) / len(won)


SCORES = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=2, max_size=17))
def test_the_area_of_two_classes_counts_pairs_with_ties_as_halves(items):
    scores, positive = zip(*items, strict=True)
    if len(set(positive)) < 2:
        return
    probabilities = np.array([[1 - s, s] for s in scores])
    assert roc_auc(probabilities, torch.tensor(positive).long()) == pytest.approx(
        pairs_won(scores, positive), abs=1e-12
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.tuples(*[SCORES] * 5)), min_size=2, max_size=13))
def test_the_area_of_more_classes_is_the_mean_over_those_that_occur(items):
    y = [label for label, _ in items]
    if len(set(y)) < 2:
        return
    rows = np.array([row for _, row in items])
    areas = [pairs_won(rows[:, c], [label == c for label in y]) for c in sorted(set(y))]
    assert roc_auc(rows, torch.tensor(y)) == pytest.approx(sum(areas) / len(areas), abs=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_probabilities_that_are_not_finite_tell_nothing(bad):
    rows = np.array([[0.1, 0.9], [0.8, 0.2], [bad, 0.5]])
    assert roc_auc(rows, torch.tensor([1, 0, 1])) == 0.5
    assert 0 <= accuracy(rows, torch.tensor([1, 0, 1])) <= 1


def test_accuracy_is_the_part_of_items_whose_class_is_likeliest():
    rows = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    assert accuracy(rows, torch.tensor([0, 2, 1, 2, 0])) == 3 / 5
    assert accuracy(rows, torch.tensor([1, 0, 0, 0, 1])) == 0


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"steps": -1}, "recipe.steps=-1"),
        ({"lrs": ()}, "empty"),
        ({"lrs": (0.1, 0.1)}, "repeats"),
        ({"lrs": (0.1, 0.0)}, "recipe.lrs=0.0"),
        ({"lrs": (float("nan"),)}, "recipe.lrs=nan"),
        ({"weight_decay": -0.5}, "recipe.weight_decay=-0.5"),
        ({"weight_decay": float("inf")}, "recipe.weight_decay=inf"),
        ({"pool": "max"}, "'max'"),
        ({"dropout": 1.0}, "recipe.dropout=1.0"),
        ({"dropout": -0.1}, "recipe.dropout=-0.1"),
        ({"dropout": float("nan")}, "recipe.dropout=nan"),
    ],
    ids=str,
)
def test_recipes_out_of_range_are_refused_with_the_value(wrong, named):
    with pytest.raises(UsageError) as raised:
        GraphRecipe(**wrong)
    assert named in raised.value.cause
    assert raised.value.remedy


def test_a_recipe_spells_all_that_it_holds():
    said = replace(TINY, dropout=0.5).to_dict()
    assert (said["steps"], said["lrs"], said["dropout"], said["balance"]) == (7, [0.02], 0.5, True)
    assert (said["optimiser"], said["weights"], said["batch"]) == ("adam", "last step", "the whole set")
