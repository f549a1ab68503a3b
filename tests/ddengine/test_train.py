import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build
from ddengine.ops import dsa
from ddengine.rng import Rng
from ddengine.train import Recipe, accuracy, batch_orders, targets_of, train
from ddengine.types import Images

SMALL = NetSpec("convnet", width=7, depth=2)
MLP = NetSpec("mlp", width=11)
QUICK = Recipe(steps=3, lrs=(0.01,), batch_size=13, augment="color_crop_scale")


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def few(digits):
    return digits.fit.take(torch.arange(0, len(digits.fit), 29))


def flat(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def test_each_pass_shows_every_image_once():
    orders = batch_orders(Rng(3), images=11, batch=4, steps=13).flatten()
    for start in range(0, 44, 11):
        assert sorted(orders[start : start + 11].tolist()) == list(range(11))


def test_a_batch_depends_on_seed_and_step_only():
    long, short = batch_orders(Rng(3), 11, 4, 13), batch_orders(Rng(3), 11, 4, 5)
    assert torch.equal(long[:5], short)
    assert not torch.equal(long, batch_orders(Rng(4), 11, 4, 13))


def test_training_follows_momentum_sgd_under_a_cosine_by_hand(few):
    recipe = Recipe(steps=4, lrs=(0.05,), batch_size=17, augment="none")
    rng = Rng(5)
    net = build(MLP, few.spec.shape, 10, rng.torch("weights"))
    weights = dict(net.named_parameters())
    speed = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step, index in enumerate(batch_orders(rng.fold("batches"), len(few), 17, 4)):
        loss = F.nll_loss(net(few.spec.normalise(few.x[index])).log_softmax(1), few.y[index])
        slopes = torch.autograd.grad(loss, list(weights.values()))
        lr = 0.05 * (1 + math.cos(math.pi * step / 4)) / 2
        with torch.no_grad():
            for (name, w), slope in zip(weights.items(), slopes, strict=True):
                speed[name] = 0.9 * speed[name] + slope + 5e-4 * w
                w -= lr * speed[name]
    torch.testing.assert_close(flat(train(MLP, few, recipe, 0.05, rng)), flat(net), rtol=1e-4, atol=1e-6)


def test_same_seed_gives_same_bits_and_another_seed_does_not(few):
    first, second = (flat(train(SMALL, few, QUICK, 0.01, Rng(1))) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, flat(train(SMALL, few, QUICK, 0.01, Rng(2))))


def test_global_generators_are_untouched(few):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    accuracy(train(SMALL, few, QUICK, 0.01, Rng(1)), few)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_one_hot_soft_labels_train_as_hard_labels_do(few):
    soft = replace(few, y=F.one_hot(few.y, 10).float(), y_kind="prob")
    hard = flat(train(SMALL, few, QUICK, 0.03, Rng(1)))
    torch.testing.assert_close(flat(train(SMALL, soft, QUICK, 0.03, Rng(1))), hard, rtol=1e-4, atol=1e-6)


def test_logit_labels_mean_their_softmax(few):
    logits = torch.randn(len(few), 10, generator=Rng(0).torch("logits"))
    as_logits = replace(few, y=logits, y_kind="logit")
    assert torch.allclose(targets_of(as_logits), logits.exp() / logits.exp().sum(1, keepdim=True))
    as_probs = replace(few, y=logits.softmax(1), y_kind="prob")
    nets = [train(SMALL, images, QUICK, 0.03, Rng(1)) for images in (as_logits, as_probs)]
    assert torch.equal(flat(nets[0]), flat(nets[1]))


def test_pixels_and_their_model_input_train_alike(few):
    floats = replace(few, x=few.model_input())
    nets = [train(SMALL, images, QUICK, 0.01, Rng(1)) for images in (few, floats)]
    assert torch.equal(flat(nets[0]), flat(nets[1]))


def test_whitened_pixels_train_as_their_whitened_floats():
    fit = load("digits", preprocessing="zca").fit
    few = fit.take(torch.arange(0, len(fit), 29))
    floats = replace(few, x=few.model_input())
    nets = [train(MLP, images, replace(QUICK, augment="none"), 0.01, Rng(1)) for images in (few, floats)]
    torch.testing.assert_close(flat(nets[0]), flat(nets[1]), rtol=1e-4, atol=1e-5)


def test_augmentation_changes_what_is_learned(few):
    plain = flat(train(SMALL, few, replace(QUICK, augment="none"), 0.01, Rng(1)))
    assert not torch.equal(plain, flat(train(SMALL, few, QUICK, 0.01, Rng(1))))


def test_training_on_real_digits_learns(digits):
    net = train(MLP, digits.fit, Recipe(steps=150, augment="none"), 0.1, Rng(0))
    assert accuracy(net, digits.validation) > 0.8


def test_a_diverged_network_scores_without_an_error(few):
    net = train(MLP, few, replace(QUICK, steps=30), 1e9, Rng(1))
    assert not all(bool(parameter.isfinite().all()) for parameter in net.parameters())
    assert 0 <= accuracy(net, few) <= 0.5


def test_bf16_training_keeps_float32_weights_near_those_of_fp32(few):
    half = flat(train(SMALL, few, QUICK, 0.01, Rng(1), precision="bf16"))
    full = flat(train(SMALL, few, QUICK, 0.01, Rng(1)))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.01)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 640).reshape(64, 10).sin())
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x.flatten(1)) @ self.weight


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_accuracy_counts_right_answers_in_eval_mode_for_any_batch(few, batch):
    net = Linear().train()
    logits = few.spec.normalise(few.x).flatten(1) @ net.weight.detach()
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, few.y, strict=True))
    assert accuracy(net, few, batch) == right / len(few)
    assert net.training


def test_digits_are_not_mirrored_and_clothes_are():
    for name in ("digits", "mnist", "svhn"):
        assert dsa.strategy_for(name) == "color_crop_cutout_scale_rotate"
    assert dsa.strategy_for("fashion_mnist") == "color_crop_cutout_flip_scale_rotate"


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"batch_size": -1}, {"lrs": ()}, {"lrs": (0.1, 0.1)}, {"lrs": (0.1, -1.0)},
        {"momentum": 1.0}, {"weight_decay": -1e-4}, {"weight_decay": math.nan}, {"schedule": "staircase"},
        {"augment": "mirror"},
    ],
)  # fmt: skip
def test_a_recipe_refuses_values_out_of_range(wrong):
    with pytest.raises(UsageError):
        Recipe(**wrong)


def test_a_broken_number_of_steps_is_refused():
    with pytest.raises((UsageError, TypeError), match="steps"):  # TypeError where annotations are checked
        Recipe(steps=2.5)


def test_an_empty_set_or_an_unknown_precision_is_refused(few):
    empty = Images(few.x[:0], few.y[:0], few.spec)
    with pytest.raises(UsageError, match="no image"):
        train(MLP, empty, QUICK, 0.01, Rng(0))
    with pytest.raises(UsageError, match="fp16"):
        train(MLP, few, QUICK, 0.01, Rng(0), precision="fp16")
