from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from ddengine import stacked
from ddengine.composites import Composites
from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.judge import evaluate
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.stacked import run_stacked, stacks, train_stacked
from ddengine.train import Recipe, train
from synth import DistilledSet, Pixels

NETS = {
    "convnet": NetSpec("convnet", width=7, depth=2),
    "grouped": NetSpec("convnet", width=8, depth=2, norm="group"),
    "mlp": NetSpec("mlp", width=11),
    "lenet": NetSpec("lenet"),
    "alexnet": NetSpec("alexnet", width=6),
    "resnet18": NetSpec("resnet18", width=4, norm="layer"),  # maps of 2x2 pixels are too few for instances
    "vit": NetSpec("vit", width=8, depth=1),
    "shufflenet_v2": NetSpec("shufflenet_v2", width=5, norm="layer"),
}
SGD = Recipe(steps=5, lrs=(0.01,), batch_size=13, augment="color_crop_scale")
KD = Recipe(steps=4, lrs=(0.01,), batch_size=11, augment="crop_flip", augment_mode="item", optimiser="adamw",
            weight_decay=0.1, loss="kl", temperature=3.0, mix="mixup", ema=0.6)  # fmt: skip
RATES, RNGS = (0.03, 0.001, 0.03), (Rng(3), Rng(4).fold("judge", 2), Rng(5))


@pytest.fixture(scope="module")
def few():
    fit = load("digits").fit
    return fit.take(torch.arange(0, len(fit), 59))


def soft(images, kind="logit", seed=0):
    logits = 3 * torch.randn(len(images), 10, generator=Rng(seed).torch("logits"))
    return replace(images, y=logits if kind == "logit" else logits.softmax(1), y_kind=kind)


def assert_alike(spec, images, recipe, lrs=RATES, rngs=RNGS, precision="fp32", tolerance=1e-4):
    sets = images if isinstance(images, list) else [images] * len(rngs)
    nets = train_stacked(spec, images, recipe, lrs, rngs, "cpu", precision)
    assert len(nets) == len(rngs) and all(net.training for net in nets)
    for net, own, lr, rng in zip(nets, sets, lrs, rngs, strict=True):
        alone = train(spec, own, recipe, lr, rng, precision=precision).state_dict()
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(tensor, alone[name], rtol=10 * tolerance, atol=tolerance, msg=name)
    return nets


@pytest.mark.parametrize("name", NETS)
def test_networks_at_once_become_what_each_becomes_alone(few, name):
    nets = assert_alike(NETS[name], few, SGD)
    first, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in (nets[0], nets[2]))
    assert (first - other).abs().max() > 0.01  # they are not one network three times


@pytest.mark.parametrize("name", ["alexnet", "mlp"])  # AdamW blows up a norm's rounded-off bias gradients
@pytest.mark.parametrize("kind", ["class", "prob", "logit"])
def test_distillation_with_mixes_averages_and_adamw_is_the_same_at_once(few, name, kind):
    assert_alike(NETS[name], few if kind == "class" else soft(few, kind), KD, lrs=(0.01, 0.001, 0.003))


@pytest.mark.parametrize(
    "change",
    [{"mix": "cutmix", "augment_mode": "batch"}, {"schedule": "constant", "squared": False},
     {"schedule": "drop", "optimiser": "sgd"}, {"schedule": "drop"}, {"ema": 0.0, "loss": "ce"},
     {"batch_size": 500, "augment": "none"}],
)  # fmt: skip
def test_every_part_of_a_recipe_is_the_same_at_once(few, change):
    assert_alike(NETS["mlp"], soft(few), replace(KD, **change), lrs=(0.01, 0.001, 0.003))


def test_momentum_and_decay_are_each_networks_own(few):
    recipe = replace(SGD, steps=12, momentum=0.95, weight_decay=0.3, augment="none")
    assert_alike(NETS["mlp"], few, recipe, lrs=(0.05, 0.002, 0.01))


def test_each_network_may_have_a_set_of_its_own(few):
    others = [few, few.take(torch.arange(len(few)).flip(0)), replace(few, y=9 - few.y)]
    assert_alike(NETS["convnet"], others, SGD)


def test_composites_and_whitened_pixels_train_at_once(few):
    u = torch.randn(2, 1, *few.spec.shape, generator=Rng(0).torch("u")) / 5
    group = torch.tensor([0] * 5 + [1] * 4)
    labels = soft(few.take(torch.arange(18))).y
    assert_alike(NETS["mlp"], Composites(few.x[:9], u, group, labels, few.spec, "logit"), KD)
    fit = load("digits", preprocessing="zca").fit
    assert_alike(NETS["mlp"], fit.take(torch.arange(0, len(fit), 61)), SGD)


def test_bf16_at_once_is_near_bf16_alone(few):
    assert_alike(NETS["convnet"], few, SGD, precision="bf16", tolerance=3e-3)
    half, full = (
        train_stacked(NETS["convnet"], few, SGD, (0.03,), RNGS[:1], "cpu", p) for p in ("bf16", "fp32")
    )
    assert not torch.equal(half[0].classifier.weight, full[0].classifier.weight)


def test_a_network_that_diverges_leaves_the_others_alone(few):
    recipe = replace(SGD, steps=20, augment="none")
    nets = train_stacked(NETS["mlp"], few, recipe, (0.01, 1e6), RNGS[:2], "cpu")
    assert not all(bool(p.isfinite().all()) for p in nets[1].parameters())
    alone = train(NETS["mlp"], few, recipe, 0.01, RNGS[0])
    torch.testing.assert_close(nets[0].state_dict(), alone.state_dict(), rtol=1e-3, atol=1e-5)


def test_the_same_call_gives_the_same_bits_and_touches_no_global_generator(few):
    before = torch.get_rng_state()
    first, second = (train_stacked(NETS["convnet"], few, SGD, RATES, RNGS, "cpu") for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_batch_norm_and_networks_of_others_do_not_stack(few):
    batched = NetSpec("convnet", width=5, depth=2, norm="batch")
    assert all(stacks(spec) for spec in NETS.values())
    assert not stacks(batched) and not stacks(NetSpec("resnet18"))
    assert not stacks(NetSpec("my_package.nets:Net"))
    with pytest.raises(UsageError, match="convnet"):
        train_stacked(batched, few, SGD, RATES, RNGS, "cpu")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"lrs": (0.1,)}, "1 rates"), ({"rngs": ()}, "0 rngs"), ({"precision": "fp16"}, "fp16")],
)
def test_arguments_that_do_not_go_together_are_refused(few, wrong, match):
    given = {"spec": NETS["mlp"], "images": few, "recipe": SGD, "lrs": RATES, "rngs": RNGS, "device": "cpu"}
    with pytest.raises(UsageError, match=match):
        train_stacked(**given | wrong)


def test_sets_that_differ_in_size_or_labels_and_empty_ones_are_refused(few):
    empty = few.take(torch.arange(0))
    for sets, match in (
        ([few, few, few.take(torch.arange(7))], "differ"),
        ([few, few, soft(few)], "differ"),
        (empty, "no image"),
    ):
        with pytest.raises(UsageError, match=match):
            train_stacked(NETS["mlp"], sets, SGD, RATES, RNGS, "cpu")


@pytest.mark.parametrize("net", [NETS["convnet"], NetSpec("convnet", width=5, depth=2, norm="batch")])
def test_a_table_made_at_once_is_the_table_made_one_by_one(few, monkeypatch, net):
    digits = load("digits")
    dataset = replace(digits, fit=few, test=digits.test.take(torch.arange(97)))
    given = DistilledSet.make(Pixels(few.model_input(), few.y, few.spec, "class"), recipe={}, provenance={})
    options = {"networks": [net], "seeds": 3, "rows": ("random", "full", "distilled_plain")}
    recipe = replace(SGD, lrs=(0.01, 0.03))
    alone = evaluate(given, dataset, **options, recipe=recipe)
    stacks_made = []
    monkeypatch.setattr(stacked, "job_pool", None)
    monkeypatch.setattr(
        stacked, "train_stacked", lambda *a: stacks_made.append(len(a[4])) or train_stacked(*a)
    )
    monkeypatch.setattr(
        "ddengine.judge.judging", lambda bench, workers: nullcontext(partial(run_stacked, bench))
    )
    at_once = evaluate(given, dataset, **options, recipe=recipe)
    assert stacks_made == ([] if net.norm == "batch" else [2, 2, 2, 2, 3, 3, 3, 3])
    for mine, other in zip(at_once.rows, alone.rows, strict=True):
        assert (mine.name, mine.count, mine.steps) == (other.name, other.count, other.steps)
        assert mine.values == pytest.approx(other.values, abs=0.021)  # two of 97 images may turn over
        tried = [[t["validation"] for t in row.trials] for row in (mine, other)]
        assert tried[0] == pytest.approx(tried[1], abs=0.021)
