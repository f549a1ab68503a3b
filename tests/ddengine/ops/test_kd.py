import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import nn

from ddengine.errors import UsageError
from ddengine.ops import dsa, kd
from ddengine.ops.batches import augmented_items
from ddengine.rng import Rng


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def pair(n=5, k=7):
    return drawn(n, k, seed=1, scale=3.0), drawn(n, k, seed=2, scale=3.0)


@pytest.mark.parametrize("temperature", [0.7, 1, 4.0, 20])
def test_the_loss_is_the_relative_entropy_of_softened_probabilities(temperature):
    student, teacher = pair()
    p, q = (special.softmax(z.numpy() / temperature, axis=1) for z in (teacher, student))
    expected = special.rel_entr(p, q).sum(1).mean()
    assert float(kd.kd_loss(student, teacher, temperature, squared=False)) == pytest.approx(expected)
    assert float(kd.kd_loss(student, teacher, temperature)) == pytest.approx(expected * temperature**2)


def test_the_loss_equals_torchs_divergence_from_probabilities():
    student, teacher = pair()
    theirs = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(kd.kd_loss(student, teacher, 3.0, squared=False), theirs)


def test_the_loss_is_zero_for_equal_logits_up_to_a_constant_of_each_row_and_only_then():
    student, teacher = pair()
    shift = drawn(5, 1, seed=3, scale=10.0)
    assert abs(float(kd.kd_loss(teacher + shift, teacher, 2.0))) < 1e-14
    moved = teacher.clone()
    moved[4, 6] += 0.01
    assert float(kd.kd_loss(moved, teacher, 2.0)) > 1e-9
    torch.testing.assert_close(kd.kd_loss(student + shift, teacher, 2.0), kd.kd_loss(student, teacher, 2.0))


def test_a_high_temperature_leaves_the_mean_square_of_centred_differences():
    student, teacher = pair()
    d = teacher - student
    limit = (d - d.mean(1, keepdim=True)).square().sum(1).mean() / (2 * 7)
    errors = [abs(float(kd.kd_loss(student, teacher, t)) / float(limit) - 1) for t in (1e2, 1e3, 1e4)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_the_gradient_of_the_loss_is_right_to_student_and_teacher():
    student, teacher = (z.requires_grad_() for z in pair(3, 5))
    for squared in (True, False):
        loss = lambda s, z, squared=squared: kd.kd_loss(s, z, 2.5, squared)
        assert torch.autograd.gradcheck(loss, (student, teacher))


def test_logits_of_another_shape_are_refused():
    with pytest.raises((TypeError, RuntimeError)):
        kd.kd_loss(drawn(5, 7), drawn(5, 6), 1.0)


def test_teachers_are_averaged_in_logits_and_not_in_probabilities():
    teachers = [nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval() for _ in range(3)]
    for seed, teacher in enumerate(teachers):
        with torch.no_grad():
            teacher[1].weight.copy_(drawn(5, 12, seed=seed))
    x = drawn(4, 3, 2, 2, seed=9).float()
    expected = sum(x.flatten(1) @ t[1].weight.T + t[1].bias for t in teachers) / 3
    torch.testing.assert_close(kd.mean_logits(teachers, x), expected)


def test_a_share_of_one_gives_the_first_label_and_of_zero_the_second():
    first, second = pair(2)
    lam = torch.tensor([1.0, 0.0], dtype=torch.float64)
    mixed = kd.mixed_labels(first, second, lam, 7)
    assert torch.equal(mixed[0], first[0]) and torch.equal(mixed[1], second[1])
    half = kd.mixed_labels(first, second, torch.full((2,), 0.25, dtype=torch.float64), 7)
    torch.testing.assert_close(half, 0.25 * first + 0.75 * second)


def test_mixed_class_numbers_are_probabilities():
    lam = torch.tensor([0.3, 0.8, 1.0])
    mixed = kd.mixed_labels(torch.tensor([0, 2, 1]), torch.tensor([1, 2, 0]), lam, 3)
    torch.testing.assert_close(mixed, torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha):
    index = torch.arange(3001)
    lam = kd.lambdas(kd.mix_numbers(Rng(3), torch.full_like(index, 2), index)[:, 0], alpha)
    assert float(lam.min()) >= 0 and float(lam.max()) <= 1
    assert stats.kstest(lam.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_partners_of_an_epoch_are_a_permutation_of_the_whole_set_whatever_the_batch():
    index = torch.arange(23)
    first, second = (kd.partners(Rng(1), torch.full_like(index, e), index, 23) for e in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(23))
    assert not torch.equal(first, second) and not torch.equal(first, index)
    epoch, some = torch.tensor([1, 0, 0, 1]), torch.tensor([22, 5, 22, 5])
    expected = torch.stack([second[22], first[5], first[22], second[5]])
    assert torch.equal(kd.partners(Rng(1), epoch, some, 23), expected)


def test_mixup_is_the_convex_sum_of_images():
    first, second, lam = drawn(3, 2, 5, 7), drawn(3, 2, 5, 7, seed=4), torch.tensor([1.0, 0.0, 0.3]).double()
    mixed, share = kd.mixup(first, second, lam, torch.zeros(3, 2))
    assert torch.equal(mixed[0], first[0]) and torch.equal(mixed[1], second[1]) and torch.equal(share, lam)
    torch.testing.assert_close(mixed[2], 0.3 * first[2] + 0.7 * second[2])


def naive_cutmix(first, second, lam, centre):
    """Box by box and pixel by pixel."""
    (_, h, w), out, inside = first.shape, first.clone(), 0
    sides = [int(length * math.sqrt(1 - lam)) for length in (h, w)]
    low = [int(centre[axis] * length) - sides[axis] // 2 for axis, length in enumerate((h, w))]
    for row in range(h):
        for column in range(w):
            if low[0] <= row < low[0] + sides[0] and low[1] <= column < low[1] + sides[1]:
                out[:, row, column] = second[:, row, column]
                inside += 1
    return out, 1 - inside / (h * w)


@given(st.lists(st.tuples(*[st.floats(0, 0.99)] * 3), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_cutmix_pastes_a_box_and_its_share_is_what_is_left(draws):
    n, draws = len(draws), torch.tensor(draws, dtype=torch.float64)
    first, second = drawn(n, 2, 7, 11), drawn(n, 2, 7, 11, seed=5)
    mixed, share = kd.cutmix(first, second, draws[:, 0], draws[:, 1:])
    for i in range(n):
        expected, left = naive_cutmix(first[i], second[i], float(draws[i, 0]), draws[i, 1:].tolist())
        assert torch.equal(mixed[i], expected) and float(share[i]) == pytest.approx(left)


def test_a_share_of_one_cuts_nothing_out():
    first, second = drawn(2, 3, 5, 7), drawn(2, 3, 5, 7, seed=5)
    mixed, share = kd.cutmix(first, second, torch.ones(2).double(), torch.full((2, 2), 0.5))
    assert torch.equal(mixed, first) and share.tolist() == [1, 1]


STRATEGY = "color_crop_cutout_flip_scale_rotate"


def test_items_go_through_all_operators_in_turn_with_their_own_numbers():
    x, index = drawn(5, 3, 16, 12).float(), torch.tensor([4, 0, 9, 2, 7])
    epoch = torch.tensor([0, 1, 0, 3, 1])
    whole = augmented_items(x, STRATEGY, Rng(2), epoch, index)
    for i in range(5):
        at = slice(i, i + 1)
        alone = augmented_items(x[at], STRATEGY, Rng(2), epoch[at], index[at])
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-6)
    order = torch.tensor([3, 1, 4, 0, 2])
    again = augmented_items(x[order], STRATEGY, Rng(2), epoch[order], index[order])
    torch.testing.assert_close(again, whole[order], rtol=0, atol=1e-6)
    one_by_one = x
    for name in STRATEGY.split("_"):
        one_by_one = augmented_items(one_by_one, name, Rng(2), epoch, index)
    assert torch.equal(one_by_one, whole)
    assert not torch.equal(augmented_items(x, STRATEGY, Rng(2), epoch + 1, index), whole)
    assert torch.equal(augmented_items(x, "none", Rng(2), epoch, index), x)


def test_a_crop_of_items_moves_each_by_up_to_an_eighth_of_the_side_and_fills_with_zeros():
    index = torch.arange(600)
    x = torch.zeros(600, 1, 16, 16)
    x[:, 0, 8, 8] = 1
    places = augmented_items(x, "crop", Rng(0), torch.zeros_like(index), index).flatten(1)
    assert places.sum(1).tolist() == [1] * 600
    rows, columns = places.argmax(1) // 16, places.argmax(1) % 16
    assert sorted(set(rows.tolist())) == sorted(set(columns.tolist())) == [6, 7, 8, 9, 10]
    assert np.corrcoef(rows.numpy(), columns.numpy())[0, 1] == pytest.approx(0, abs=0.2)
    flipped = augmented_items(x, "flip", Rng(0), torch.zeros_like(index), index)[:, 0, 8, 7].mean()
    assert 0.4 < float(flipped) < 0.6


def test_rows_of_numbers_that_do_not_cover_the_batch_are_refused():
    rows = dsa.sample(torch.Generator().manual_seed(0), "flip", 3, (8, 8))
    with pytest.raises(UsageError, match="3 augmentation rows for 2 images"):
        dsa.in_turn(drawn(2, 3, 8, 8), rows, "flip")
