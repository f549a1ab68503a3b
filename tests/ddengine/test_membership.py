import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

from ddengine.membership import advantage, attack, attack_row, auc, label_scores, tpr_at_low_fpr
from ddengine.neighbours import clopper_pearson
from ddengine.rng import Rng
from ddengine.train import accuracy
from ddengine.types import DataSpec, Images

SPEC = DataSpec("toy", (1, 2, 3), ("a", "b", "c"), (0.5,), (0.25,))
levels = st.lists(st.integers(-9, 9), min_size=2, max_size=40).map(lambda v: np.array(v, dtype=np.float64))


def both(members, others):
    return np.r_[np.ones(len(members)), np.zeros(len(others))], np.r_[members, others]


def normal(count, name, shift=0.0):
    return Rng(2).numpy(name).normal(shift, 1, count)


@settings(deadline=None, max_examples=60)
@given(levels, levels)
def test_auc_is_scikit_learns_with_ties(members, others):
    assert auc(members, others) == pytest.approx(roc_auc_score(*both(members, others)))


def naive_tpr(members, others):
    best = 0.0
    for threshold in {*others.tolist(), *members.tolist(), -np.inf}:
        wrong = sum(score > threshold for score in others)
        if 100 * wrong <= len(others):
            best = max(best, sum(score > threshold for score in members) / len(members))
    return best


@settings(deadline=None, max_examples=60)
@given(levels, levels)
def test_few_non_members_allow_no_false_positive(members, others):
    assert tpr_at_low_fpr(members, others) == naive_tpr(members, others)
    assert tpr_at_low_fpr(members, others) == pytest.approx((members > others.max()).mean())


@pytest.mark.parametrize("others", [97, 100, 307, 700])
@pytest.mark.parametrize("decimals", [1, 12])
def test_tpr_is_the_best_of_the_roc_curve_up_to_one_percent(others, decimals):
    inside, outside = normal(211, "in", 1.5).round(decimals), normal(others, "out").round(decimals)
    fpr, tpr, _ = roc_curve(*both(inside, outside), drop_intermediate=False)
    found = tpr_at_low_fpr(inside, outside)
    assert found == pytest.approx(tpr[fpr <= 0.01].max())
    assert found == naive_tpr(inside, outside) and found > 0


def test_one_percent_of_2900_are_29():
    others = np.arange(2900.0)
    assert tpr_at_low_fpr(np.array([2869.5, 2870.5, 2871.0]), others) == pytest.approx(2 / 3)


def test_scores_that_are_all_alike_find_nobody():
    same = np.full(150, -np.inf)
    assert (auc(same, same), tpr_at_low_fpr(same, same), advantage(same, same)) == (0.5, 0.0, 0.0)


def test_advantage_is_one_for_a_perfect_attack_and_negative_where_one_half_misleads():
    assert advantage(np.array([4.0, 5, 6]), np.array([1.0, 2, 3])) == 1
    assert advantage(np.array([3.0, 0]), np.array([0.0, 3])) == -0.5  # by hand: -1 and 0


def test_advantage_agrees_with_a_plain_search_of_thresholds():
    inside, outside = normal(61, "in", 0.7), normal(83, "out")
    total = 0.0
    for fitted in (0, 1):
        a, b = inside[fitted::2], outside[fitted::2]
        scores = sorted({*a, *b})
        cuts = [(low + high) / 2 for low, high in itertools.pairwise(scores)]
        best = max([*cuts, scores[-1]], key=lambda t: ((a > t).mean() - (b > t).mean(), -t))
        a, b = inside[1 - fitted :: 2], outside[1 - fitted :: 2]
        total += (a > best).mean() - (b > best).mean()
    assert advantage(inside, outside) == pytest.approx(total / 2)


def test_advantage_of_guessing_is_zero_on_average_where_the_best_threshold_would_flatter():
    draws = [Rng(seed).numpy("scores").normal(size=(2, 60)) for seed in range(200)]
    found = [advantage(*draw) for draw in draws]
    assert abs(np.mean(found)) < 3 * np.std(found) / 200**0.5
    flattered = [np.max(np.subtract(*roc_curve(*both(*draw))[1::-1])) for draw in draws]
    assert np.mean(flattered) > 0.1


def linear(classes=3):
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, classes))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=Rng(4).torch("linear"))
    return net


def images(count, name):
    generator = Rng(6).torch(name)
    x = torch.randint(0, 256, (count, 1, 2, 3), generator=generator, dtype=torch.uint8)
    return Images(x, torch.randint(0, 3, (count,), generator=generator), SPEC)


def test_scores_are_minus_the_loss_in_eval_mode_and_the_mode_is_kept():
    net, data = linear().train(), images(17, "data")
    scores, right = label_scores(net, data, batch=5)
    assert net.training
    p = net.eval()(data.model_input()).detach().double().softmax(1).numpy()
    assert scores == pytest.approx(np.log(p[np.arange(17), data.y.numpy()]))
    assert right == pytest.approx(accuracy(net, data))


def test_a_network_that_diverged_gives_nothing_away():
    net = linear()
    with torch.no_grad():
        net[2].weight.fill_(torch.nan)
    found = attack(net, images(11, "in"), images(13, "out"))
    assert (found["auc"], found["tpr"], found["advantage"]) == (0.5, 0.0, 0.0)


class Memory(nn.Module):
    """Sure of what it was told, undecided about all else."""

    def __init__(self, told):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.told = {row.numpy().tobytes(): int(y) for row, y in zip(told.model_input(), told.y, strict=True)}

    def forward(self, x):
        known = [self.told.get(row.numpy().tobytes(), 0) for row in x]
        sure = torch.tensor([row.numpy().tobytes() in self.told for row in x])
        return F.one_hot(torch.tensor(known), 3) * 9.0 * sure[:, None] + self.weight


def test_a_network_that_memorised_is_found_out():
    inside, outside = images(19, "in"), images(131, "out")
    found = attack(Memory(inside), inside, outside)
    assert found == {
        "auc": 1,
        "tpr": 1,
        "advantage": 1,
        "accuracy_members": 1,
        "accuracy_others": pytest.approx(accuracy(Memory(inside), outside)),
    }


def test_a_row_is_the_mean_over_networks_with_the_interval_of_one():
    keys = ("auc", "tpr", "advantage", "accuracy_members", "accuracy_others")
    attacks = [
        dict(zip(keys, values, strict=True))
        for values in ((0.5, 0.2, 0.0, 1.0, 0.5), (0.7, 0.3, 0.1, 0.9, 0.6))
    ]
    row = attack_row("full", attacks, 10, 23, 0.01)
    assert row["auc"] == {"mean": pytest.approx(0.6), "std": pytest.approx(0.02**0.5), "values": [0.5, 0.7]}
    assert row["tpr"]["ci95"] == pytest.approx(clopper_pearson(2.5, 10))
    assert row["accuracy"] == {"members": pytest.approx(0.95), "non_members": pytest.approx(0.55)}
    assert (row["networks"], row["members"], row["non_members"], row["lr"]) == (2, 10, 23, 0.01)
