"""What experts say of real images, against every expert asked about every image."""

import warnings

import pytest
import torch
import toy_experts
import trained_experts

from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.types import Budget, Task
from matchers import teachers

NET = NetSpec("convnet", width=4, depth=2)
OTHER = NetSpec("convnet", width=3, depth=1)


@pytest.fixture(scope="module")
def source():
    digits = load("digits").fit
    return digits.take(torch.arange(0, len(digits), 5))


@pytest.fixture(scope="module")
def buffer(source, tmp_path_factory):
    """Experts 0, 2 and 4 with NET, the last for fewer epochs; 1 and 3 with another network."""
    walks = [
        trained_experts.trained(source, network, epochs, seed)
        for seed, (network, epochs) in enumerate([(NET, 2), (OTHER, 3), (NET, 2), (OTHER, 1), (NET, 1)])
    ]
    return toy_experts.write(
        tmp_path_factory.mktemp("experts") / "buffer", walks, (NET, OTHER), spec=source.spec
    )


@pytest.fixture(scope="module")
def untrained(source, tmp_path_factory):
    """Experts that have learned nothing."""
    walks = [toy_experts.walk(NET, 2, seed, 1e-3, source.spec) for seed in range(2)]
    return toy_experts.write(tmp_path_factory.mktemp("untrained") / "buffer", walks, (NET,), spec=source.spec)


def all_logits(buffer, numbers, x, row=None):
    """Logits [e n k] of experts, one image at a time as far as the network is concerned."""
    with torch.no_grad():
        nets = [buffer.build(i, buffer.epochs(i) if row is None else row).eval() for i in numbers]
        return torch.stack([net(x) for net in nets])


def test_the_experts_of_the_network_that_were_trained_longest_teach(buffer):
    assert teachers.oldest(buffer, NET) == [0, 2] and teachers.oldest(buffer, OTHER) == [1]
    assert teachers.oldest(buffer, NetSpec("mlp")) == []


@pytest.mark.parametrize("ipc", [1, 7])
def test_correct_images_are_right_distinct_and_of_their_class(buffer, source, ipc):
    picks = teachers.correct(Task(source, Budget(ipc), buffer), NET, ipc, Rng(3))
    assert len(picks) == 10 * ipc == len(set(picks.tolist()))
    assert torch.equal(source.y[picks], torch.arange(10).repeat_interleave(ipc))
    says = all_logits(buffer, [0, 2], source.model_input(picks)).argmax(2)
    assert (says == source.y[picks]).any(0).all()
    other = teachers.correct(Task(source, Budget(ipc), buffer), NET, ipc, Rng(4))
    assert not torch.equal(other, picks)


def test_the_next_expert_fills_what_the_first_leaves_short(buffer, source):
    right = all_logits(buffer, [0, 2], source.model_input()).argmax(2) == source.y
    each = [torch.bincount(source.y[row], minlength=10) for row in (right[0], right[1], right.any(0))]
    ipc = int(each[2].min())
    assert ipc > min(int(e.min()) for e in each[:2])  # so that no single expert is enough
    picks = teachers.correct(Task(source, Budget(ipc), buffer), NET, ipc, Rng(3))
    assert right.any(0)[picks].all() and len(set(picks.tolist())) == 10 * ipc
    with pytest.raises(UsageError, match=rf"get {ipc} images of class '\d' right, {ipc + 1} are needed"):
        teachers.correct(Task(source, Budget(ipc + 1), buffer), NET, ipc + 1, Rng(3))


def test_experts_that_know_too_little_are_told_with_a_remedy(untrained, source):
    with pytest.raises(UsageError, match=r"right, 7 are needed\nGive matcher.start=real, or record"):
        teachers.correct(Task(source, Budget(7), untrained), NET, 7, Rng(3))


@pytest.mark.parametrize("ipc", [1, 7, 10, 25])
def test_representatives_are_as_many_as_asked_distinct_and_of_their_class(buffer, source, ipc):
    task = Task(source, Budget(ipc), buffer)
    picks = teachers.representative(task, NET, ipc, Rng(3))
    assert len(picks) == 10 * ipc == len(set(picks.tolist()))
    assert torch.equal(source.y[picks], torch.arange(10).repeat_interleave(ipc))
    assert torch.equal(teachers.representative(task, NET, ipc, Rng(3)), picks)


def test_one_representative_is_nearest_the_mean_logits_of_its_class(buffer, source):
    picks = teachers.representative(Task(source, Budget(1), buffer), NET, 1, Rng(3))
    logits = all_logits(buffer, [0, 2], source.model_input()).double()
    nearest = []
    for expert in logits:
        rows = [(source.y == c).nonzero().squeeze(1) for c in range(10)]
        nearest.append([int(r[(expert[r] - expert[r].mean(0)).norm(dim=1).argmin()]) for r in rows])
    assert picks.tolist() in nearest


def test_a_start_from_experts_is_their_images(buffer, source):
    task = Task(source, Budget(2), buffer)
    for name, pick in (("correct", teachers.correct), ("representative", teachers.representative)):
        found = teachers.start(task, NET, name, 2, Rng(3))
        assert torch.equal(found, source.model_input(pick(task, NET, 2, Rng(3))))
    assert teachers.start(task, NET, "real", 2, Rng(3)).shape == (20, 1, 8, 8)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([5, 3, 2], 7, [3, 2, 2]),
        ([10, 1, 1], 9, [7, 1, 1]),
        ([4, 4, 4], 5, [2, 2, 1]),
        ([1, 9, 2, 5], 4, [1, 1, 1, 1]),
        ([13], 7, [7]),
    ],
)
def test_shares_are_even_within_the_sizes_and_the_largest_gets_the_rest(sizes, count, expected):
    assert teachers.shares(sizes, count) == expected


def test_shares_give_all_that_is_asked_for_whatever_the_sizes():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(1, 9, (7,), generator=generator).tolist()
        count = int(torch.randint(1, sum(sizes) + 1, (), generator=generator))
        found = teachers.shares(sizes, count)
        assert sum(found) == count and all(0 <= f <= s for f, s in zip(found, sizes, strict=True))


def test_soft_labels_are_the_mean_logits_of_the_experts_that_are_right(buffer, source):
    logits = all_logits(buffer, [0, 2], source.model_input())
    right = (logits.argmax(2) == source.y).tolist()
    known = torch.tensor([i for i in range(len(source)) if right[0][i] or right[1][i]])
    found = teachers.soft_labels(buffer, NET, source.model_input(known), source.y[known])
    counted = set()
    for row, i in zip(found, known.tolist(), strict=True):
        voices = [logits[e, i] for e in range(2) if right[e][i]]
        counted.add(len(voices))
        torch.testing.assert_close(row, sum(voices) / len(voices), rtol=1e-4, atol=1e-5)
    assert counted == {1, 2}


def test_an_image_that_no_expert_gets_right_has_the_mean_label_of_its_class(buffer, source):
    x = source.model_input(torch.arange(0, len(source), 3))
    says = all_logits(buffer, [0, 2], x).argmax(2)
    y = says[0].clone()
    lost = next(i for i in range(len(y)) if (y == y[i]).sum() > 1)
    label = next(c for c in range(10) if c not in says[:, lost] and (y == c).any())
    y[lost] = label
    with pytest.warns(UserWarning, match=rf"no expert is right about 1 of {len(y)} start images"):
        found = teachers.soft_labels(buffer, NET, x, y)
    others = (y == label) & (torch.arange(len(y)) != lost)
    assert found.isfinite().all()
    torch.testing.assert_close(found[lost], found[others].mean(0))


def test_a_class_that_no_expert_knows_has_the_mean_over_all_of_them(untrained, source):
    x = source.model_input(torch.arange(7))
    logits = all_logits(untrained, [0, 1], x)
    never = next(c for c in range(10) if not (logits.argmax(2) == c).any())
    with pytest.warns(UserWarning, match="about 7 of 7"):
        found = teachers.soft_labels(untrained, NET, x, torch.full((7,), never))
    torch.testing.assert_close(found, logits.mean(0))


def test_there_is_no_warning_where_every_image_is_known(buffer, source):
    picks = teachers.correct(Task(source, Budget(2), buffer), NET, 2, Rng(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = teachers.soft_labels(buffer, NET, source.model_input(picks), source.y[picks])
    assert torch.equal(found.argmax(1), source.y[picks])


@pytest.mark.parametrize("row", [0, 1])
def test_assigned_labels_are_mean_probabilities_at_one_epoch(buffer, source, row):
    x = source.model_input(torch.arange(13))
    found = teachers.assigned_labels(buffer, NET, x, row)
    expected = all_logits(buffer, [0, 2, 4], x, row).exp()
    expected = (expected / expected.sum(2, keepdim=True)).mean(0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(13))


def test_a_teacher_of_no_named_epoch_is_at_its_last(buffer, source):
    x = source.model_input(torch.arange(5))
    last, first = (teachers.teacher(buffer, 0, row, torch.device("cpu")) for row in (None, 0))
    assert not last.training
    torch.testing.assert_close(teachers.logits_of(last, x), all_logits(buffer, [0], x, 2)[0])
    assert not torch.allclose(teachers.logits_of(first, x), teachers.logits_of(last, x))
