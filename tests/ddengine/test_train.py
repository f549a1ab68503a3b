import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddengine.train
from ddengine.composites import Composites
from ddengine.data import load
from ddengine.errors import ArtefactError, UsageError
from ddengine.nets import NetSpec, build
from ddengine.ops import dsa, kd
from ddengine.rng import Rng
from ddengine.train import Recipe, accuracy, batch_orders, recipe_of, targets_of, train
from ddengine.types import Images

SMALL = NetSpec("convnet", width=7, depth=2)
MLP = NetSpec("mlp", width=11)
BATCHED = NetSpec("convnet", width=5, depth=2, norm="batch")
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
        {"augment": "mirror"}, {"optimiser": "adam"}, {"loss": "mse"}, {"temperature": 0.0}, {"mix": "cutup"},
        {"mix_alpha": -1.0}, {"augment_mode": "pixel"}, {"ema": 1.0},
    ],
)  # fmt: skip
def test_a_recipe_refuses_values_out_of_range(wrong):
    with pytest.raises(UsageError):
        Recipe(**wrong)


def test_the_default_recipe_is_that_of_the_published_results():
    assert Recipe().to_dict() == {
        "steps": 500, "lrs": [0.003, 0.01, 0.03], "momentum": 0.9, "weight_decay": 0.0005,
        "schedule": "cosine", "batch_size": 256, "augment": dsa.STRATEGY, "optimiser": "sgd",
        "weights": "last step",
        "augment_mode": "one operator per batch, numbers per image", "loss": "ce", "temperature": 1.0,
        "squared": True, "mix": "none", "mix_alpha": 0.8, "ema": 0.0,
    }  # fmt: skip


def test_a_manifest_recipe_fills_in_what_it_says_and_no_more():
    train_as = {"optimiser": "adamw", "lrs": [1, 0.001], "temperature": 20, "squared": False, "loss": "kl"}
    found = recipe_of({"recipe": {"train": train_as}}, "mnist")
    expected = Recipe(lrs=(1.0, 0.001), optimiser="adamw", temperature=20.0, squared=False, loss="kl",
                      augment=dsa.strategy_for("mnist"))  # fmt: skip
    assert found == expected and type(found.temperature) is float
    assert recipe_of({"recipe": None}, "cifar10") == recipe_of({}, "cifar10") == Recipe()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"warmup": 3}, "recipe.train.warmup=3"), ({"steps": "many"}, "recipe.train.steps=many"),
        ({"steps": 2.5}, "steps=2.5"), ({"lrs": 0.1}, "lrs=0.1"), ({"lrs": ["a"]}, "lrs="),
        ({"squared": 1}, "squared=1"), ({"ema": True}, "ema=True"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"mix": "mixdown"}, "recipe.mix 'mixdown'"), ([1], "recipe.train="),
    ],
)  # fmt: skip
def test_a_manifest_recipe_that_makes_no_sense_is_refused_by_name(wrong, match):
    with pytest.raises(ArtefactError, match=match):
        recipe_of({"recipe": {"train": wrong}}, "digits")


def teacher_of(few, seed=7):
    return build(SMALL, few.spec.shape, 10, Rng(seed).torch("weights")).eval()


def soft(few, scale=4.0):
    logits = scale * torch.randn(len(few), 10, generator=Rng(0).torch("logits"))
    return replace(few, y=logits, y_kind="logit")


KD = Recipe(steps=3, lrs=(0.001,), batch_size=11, augment="crop_flip", augment_mode="item", optimiser="adamw",
            weight_decay=0.01, loss="kl", temperature=5.0, mix="mixup", ema=0.0)  # fmt: skip


def by_hand(spec, images, recipe, lr, rng, labeler=None):
    """The whole of a KD training item by item, in torch's own optimiser; returns the weights of each step."""
    net = build(spec, images.spec.shape, 10, rng.torch("weights")).train()
    make = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.SGD
    optimiser = make(net.parameters(), lr, weight_decay=recipe.weight_decay)
    n, items, states = len(images), rng.fold("items"), []
    orders = batch_orders(rng.fold("batches"), n, recipe.batch_size, recipe.steps)

    def seen(epoch, i):
        at = torch.tensor([epoch]), torch.tensor([i])
        return dsa.in_turn(images.model_input(at[1]), numbers(items, *at), recipe.augment)[0]

    for step in range(recipe.steps):
        x, y = [], []
        for place, i in enumerate(orders[step].tolist()):
            epoch = (step * recipe.batch_size + place) // n
            at = torch.tensor([epoch]), torch.tensor([i])
            j = int(torch.randperm(n, generator=items.torch(f"partners-{epoch}"))[i])
            lam = float(kd.lambdas(kd.mix_numbers(items, *at)[:, 0], recipe.mix_alpha))
            x.append(lam * seen(epoch, i) + (1 - lam) * seen(epoch, j))
            label = images.y if images.y_kind == "logit" else F.one_hot(images.y, 10).float()
            y.append(lam * label[i] + (1 - lam) * label[j])
        x, y = torch.stack(x), torch.stack(y)
        optimiser.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        logits, t = net(x), recipe.temperature
        if labeler is not None:
            y = labeler(x).detach()
        p = y if images.y_kind == "class" and labeler is None else (y / t).softmax(1)
        if images.y_kind == "class" and labeler is None:
            loss = -(p * logits.log_softmax(1)).sum(1).mean()
        else:
            loss = t * t * (p * (p.log() - (logits / t).log_softmax(1))).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        states.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    return states


def numbers(items, epoch, index):
    u = ddengine.ops.counter.uniform(items, "dsa", epoch, index, 11)
    return dsa.numbers(torch.tensor([-1]), u, (8, 8))


def assert_state(net, expected, atol=1e-5):
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("kind", ["logits", "classes", "teacher"])
def test_distillation_training_follows_adamw_on_mixed_items_by_hand(few, kind):
    few = few.take(torch.arange(17))  # a batch spans two passes
    images = soft(few) if kind == "logits" else few
    labeler = teacher_of(few) if kind == "teacher" else None
    states = by_hand(MLP, images, KD, 0.01, Rng(3), labeler)
    assert_state(train(MLP, images, KD, 0.01, Rng(3), labeler=labeler), states[-1])


def test_a_constant_of_each_row_of_logit_labels_changes_nothing(few):
    images = soft(few)
    shifted = replace(images, y=images.y + torch.arange(len(few))[:, None])
    recipe = replace(KD, mix="cutmix", temperature=20.0, optimiser="sgd")
    nets = [train(SMALL, each, recipe, 0.01, Rng(1)) for each in (images, shifted)]
    torch.testing.assert_close(flat(nets[0]), flat(nets[1]), rtol=1e-3, atol=1e-4)


def test_without_the_square_the_gradient_is_as_much_smaller(few):
    images, recipe = soft(few), replace(KD, optimiser="sgd", momentum=0.0, weight_decay=0.0, temperature=4.0)
    plain = train(SMALL, images, replace(recipe, squared=False), 0.16, Rng(1))
    torch.testing.assert_close(
        flat(train(SMALL, images, recipe, 0.01, Rng(1))), flat(plain), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("mode", ["batch", "item"])
def test_every_mix_and_mode_trains_and_differs_from_the_others(few, mix, mode):
    recipe = replace(KD, mix=mix, augment_mode=mode)
    found = flat(train(SMALL, soft(few), recipe, 0.01, Rng(1)))
    other = flat(
        train(SMALL, soft(few), replace(recipe, mix="mixup" if mix != "mixup" else "none"), 0.01, Rng(1))
    )
    assert bool(found.isfinite().all()) and not torch.equal(found, other)


def test_what_an_item_becomes_does_not_depend_on_the_batch_size(few, monkeypatch):
    few, seen = few.take(torch.arange(13)), {}
    for batch in (4, 6):
        recipe = replace(KD, batch_size=batch, steps=12, mix="cutmix")
        stream = ddengine.train._Stream.of(soft(few), recipe, Rng(5))
        batches = [stream.batch(step) for step in range(recipe.steps)]
        seen[batch] = [torch.cat(part) for part in zip(*batches, strict=True)]
    for mine, theirs in zip(seen[4], seen[6], strict=True):
        torch.testing.assert_close(mine, theirs[: len(mine)], rtol=0, atol=1e-6)
    assert not torch.equal(seen[6][0][:13].sum(0), seen[6][0][13:26].sum(0))


def test_the_average_is_that_of_the_steps_weights_and_statistics(few):
    images, recipe = few.take(torch.arange(17)), replace(KD, steps=4, ema=0.7, optimiser="sgd", momentum=0.0)
    states = by_hand(BATCHED, images, recipe, 0.01, Rng(3))
    shares = [0.7 ** (3 - step) for step in range(4)]
    expected = {
        name: sum(share * state[name] for share, state in zip(shares, states, strict=True)) / sum(shares)
        if tensor.is_floating_point() else tensor
        for name, tensor in states[-1].items()
    }  # fmt: skip
    net = train(BATCHED, images, recipe, 0.01, Rng(3))
    assert_state(net, expected)
    assert any("running_mean" in name for name in expected)
    assert net.training


def test_composites_train_as_their_images_do(few):
    bases, u = few.x[:9], torch.randn(2, 1, *few.spec.shape, generator=Rng(0).torch("u")) / 5
    logits = soft(few.take(torch.arange(18))).y
    made = Composites(bases, u, torch.tensor([0] * 5 + [1] * 4), logits, few.spec, "logit")
    images = made.take(torch.arange(18))
    for recipe in (QUICK, KD):
        nets = [train(SMALL, each, recipe, 0.01, Rng(1)) for each in (made, images)]
        assert torch.equal(flat(nets[0]), flat(nets[1]))


def test_a_labeler_sees_each_augmented_batch_once_without_a_gradient(few):
    seen = []

    def labeler(x):
        seen.append((x.shape[0], torch.is_grad_enabled()))
        return x.flatten(1)[:, :10]

    train(SMALL, few, replace(KD, steps=5), 0.01, Rng(1), labeler=labeler)
    assert seen == [(11, False)] * 5


def test_distillation_in_bf16_keeps_float32_weights_near_those_of_fp32(few):
    half, full = (flat(train(SMALL, soft(few), KD, 0.001, Rng(1), precision=p)) for p in ("bf16", "fp32"))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.01)


def test_a_broken_number_of_steps_is_refused():
    with pytest.raises((UsageError, TypeError), match="steps"):  # TypeError where annotations are checked
        Recipe(steps=2.5)


def test_an_empty_set_or_an_unknown_precision_is_refused(few):
    empty = Images(few.x[:0], few.y[:0], few.spec)
    with pytest.raises(UsageError, match="no image"):
        train(MLP, empty, QUICK, 0.01, Rng(0))
    with pytest.raises(UsageError, match="fp16"):
        train(MLP, few, QUICK, 0.01, Rng(0), precision="fp16")
