import json
import math
from dataclasses import replace

import naive_experts
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from ddengine.errors import UsageError
from expert_buffers import ParamSpec
from expert_buffers.recipes import (
    RECIPES,
    ExpertRecipe,
    climb,
    find_recipe,
    gradient_penalty,
    gsam_direction,
    loss_scale,
    orthogonal_part,
    rate,
    sgd_step,
)


def draw(*shape, name=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(name), dtype=torch.float64)


@pytest.fixture(scope="module")
def problem():
    """A tanh network in float64: its gradient as a function of flat weights, and weights."""
    net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    spec, x, y = ParamSpec.of(net), draw(7, 5), torch.tensor([0, 1, 1, 0, 1, 0, 0])

    def gradient(w):
        leaf = w.detach().requires_grad_()
        loss = F.cross_entropy(functional_call(net, spec.unflatten(leaf), (x,)), y)
        return torch.autograd.grad(loss, leaf)[0]

    return gradient, draw(sum(spec.sizes), name=1)


@pytest.mark.parametrize(("rho", "alpha"), [(0.01, 0.3), (0.7, 0.0), (2.0, 1.7)])
def test_gsam_is_that_of_its_formulas_number_by_number(problem, rho, alpha):
    gradient, w = problem
    naive = naive_experts.gsam(
        lambda v: gradient(torch.tensor(v, dtype=w.dtype)).tolist(), w.tolist(), rho, alpha
    )
    found = gsam_direction(gradient, w, rho, alpha)
    torch.testing.assert_close(found, torch.tensor(naive, dtype=w.dtype), rtol=1e-12, atol=1e-14)


def test_gsam_without_radius_is_one_plain_gradient(problem):
    gradient, w = problem
    calls = []
    found = gsam_direction(lambda at: calls.append(at) or gradient(at), w, 0.0, 0.4)
    assert torch.equal(found, gradient(w))
    assert len(calls) == 1


def test_gsam_without_alpha_is_adaptive_sam(problem):
    gradient, w = problem
    assert torch.equal(gsam_direction(gradient, w, 0.3, 0.0), gradient(w + climb(w, gradient(w), 0.3)))


def test_what_gsam_takes_away_is_orthogonal_to_the_gradient_above(problem):
    gradient, w = problem
    above = gradient(w + climb(w, gradient(w), 0.5))
    taken = (above - gsam_direction(gradient, w, 0.5, 0.8)) / 0.8
    assert taken.norm() > 0.01 * above.norm()
    assert abs(taken @ above) < 1e-15
    torch.testing.assert_close(taken, orthogonal_part(gradient(w), above))


def test_orthogonal_to_nothing_is_everything():
    g = draw(11)
    assert torch.equal(orthogonal_part(g, torch.zeros(11, dtype=g.dtype)), g)


def test_the_climb_has_length_rho_where_each_weight_is_measured_by_itself(problem):
    gradient, w = problem
    step = climb(w, gradient(w), 0.03)
    assert (step / w.abs()).norm().item() == pytest.approx(0.03, rel=1e-9)
    assert step @ gradient(w) > 0
    assert not climb(w, torch.zeros_like(w), 0.03).any()


@pytest.fixture(scope="module")
def smooth():
    """A small convolutional network on images of 3 channels, 5 x 4 pixels, in float64."""
    net = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(40, 7)).double()
    spec = ParamSpec.of(net)
    return lambda w, x: functional_call(net, spec.unflatten(w), (x,)), draw(sum(spec.sizes), name=2)


def test_gradient_penalty_is_a_loop_over_pixels(smooth):
    logits, w = smooth
    x = draw(2, 3, 5, 4, name=3)
    naive = naive_experts.gradient_penalty(lambda images: logits(w, images).sum(), x)
    assert gradient_penalty(lambda images: logits(w, images).double(), x).item() == pytest.approx(naive, 2e-6)


def test_gradient_penalty_has_a_gradient_with_respect_to_the_weights(smooth, monkeypatch):
    logits, w = smooth
    x = draw(2, 3, 5, 4, name=4)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # else the sum is taken in float32
    assert gradcheck(lambda at: gradient_penalty(lambda images: logits(at, images), x), w.requires_grad_())


def test_gradient_penalty_vanishes_where_every_pixel_has_slope_one():
    weights = torch.tensor([0.6, 0.0, -0.8])[:, None, None]
    x = draw(2, 3, 5, 4).float()
    assert gradient_penalty(lambda images: images * weights, x).item() == pytest.approx(0, abs=1e-12)
    assert gradient_penalty(lambda images: 3 * images * weights, x).item() == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_steps_are_those_of_torch_sgd(momentum, weight_decay):
    leaf = draw(13).float().requires_grad_()
    w, velocity = leaf.detach().clone(), None
    optimiser = torch.optim.SGD([leaf], 0.03, momentum, weight_decay=weight_decay)
    for step in range(7):
        leaf.grad = draw(13, name=step).float()
        w, velocity = sgd_step(w, leaf.grad.clone(), velocity, 0.03, momentum, weight_decay)
        optimiser.step()
    torch.testing.assert_close(w, leaf.detach(), rtol=1e-6, atol=0)
    assert (velocity is None) == (momentum == 0)


def test_rate_drops_once_and_the_loss_scale_ends_at_one():
    ast = RECIPES["ast"]
    assert [rate(ast, e) for e in (0, 26, 27, 49)] == [0.003, 0.003, 0.6 * 0.003, 0.6 * 0.003]
    assert [loss_scale(ast.loss_ramp, e) for e in (0, 1, 9, 10, 49)] == [0.5, 0.55, 0.95, 1.0, 1.0]
    assert {rate(RECIPES["mtt"], e) for e in range(50)} == {0.01}
    assert loss_scale((), 0) == 1


def test_recipes_are_found_by_name_and_a_miss_names_the_nearest():
    assert find_recipe("ftd") is RECIPES["ftd"]
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    own = ExpertRecipe("mine", lr=0.5)
    assert find_recipe(own) is own
    with pytest.raises(UsageError, match="'mtd'.*\n.*'(mtt|ftd)'"):
        find_recipe("mtd")


def test_plain_values_leave_the_nominal_length_out_and_spell_the_augmentation():
    resolved = RECIPES["ast"].resolved("digits")
    assert resolved.augment == "color_crop_cutout_scale_rotate"
    assert RECIPES["ast"].resolved("cifar10").augment == "color_crop_cutout_flip_scale_rotate"
    assert replace(RECIPES["ast"], augment="none").resolved("digits").augment == "none"
    assert resolved.to_dict() == replace(resolved, epochs=7).to_dict()
    assert json.loads(json.dumps(resolved.to_dict())) == resolved.to_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-3),
        ("batch_size", 0),
        ("epochs", 0),
        ("rho", -0.01),
        ("alpha", math.inf),
        ("loss_ramp", (0.5, 0.0)),
        ("penalty", -2.0),
        ("lr_drop", 0.0),
        ("lr_drop_epoch", 0),
        ("augment", "color_swirl"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(UsageError, match="swirl" if key == "augment" else rf"^recipe\.{key}"):
        ExpertRecipe(**{key: value})


@pytest.mark.parametrize("epochs", [1, 7, 10])
def test_a_cosine_rate_is_torchs_annealing_by_epoch_to_zero(epochs):
    recipe = replace(RECIPES["squeeze"], epochs=epochs)
    leaf = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.SGD([leaf], recipe.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=epochs)
    for epoch in range(epochs):
        assert rate(recipe, epoch) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9)
        optimiser.step()
        scheduler.step()
    assert (rate(recipe, 0), rate(recipe, epochs), rate(recipe, 3 * epochs)) == (0.1, 0.0, 0.0)


def test_a_rate_that_drops_falls_along_the_same_cosine():
    recipe = ExpertRecipe(lr=0.4, epochs=3, schedule="cosine", lr_drop=0.5, lr_drop_epoch=1)
    found = [rate(recipe, epoch) for epoch in range(3)]
    assert found == pytest.approx([0.4, 0.2 * 0.75, 0.2 * 0.25], rel=1e-12)


def test_squeeze_has_the_released_values_and_few_epochs():
    squeeze = RECIPES["squeeze"]
    assert (squeeze.lr, squeeze.momentum, squeeze.weight_decay, squeeze.batch_size) == (0.1, 0.9, 5e-4, 128)
    assert (squeeze.schedule, squeeze.epochs, squeeze.augment) == ("cosine", 10, "mild")
    assert (squeeze.rho, squeeze.penalty, squeeze.loss_ramp) == (0.0, 0.0, ())


@pytest.mark.parametrize(
    ("dataset", "augment"),
    [("digits", "crop"), ("mnist", "crop"), ("svhn", "crop"), ("cifar10", "crop_flip"), ("own", "crop_flip")],
)
def test_mild_augmentation_drops_the_flip_on_digits(dataset, augment):
    resolved = RECIPES["squeeze"].resolved(dataset)
    assert resolved == replace(RECIPES["squeeze"], augment=augment)
    assert resolved.resolved("cifar10") == resolved


def test_plain_values_have_the_length_where_the_rate_follows_it():
    resolved = RECIPES["squeeze"].resolved("digits")
    values = resolved.to_dict()
    assert (values["epochs"], values["schedule"]) == (10, "cosine")
    assert replace(resolved, epochs=7).to_dict() == {**values, "epochs": 7}
    assert json.loads(json.dumps(values)) == values
    assert not {"epochs", "schedule"} & set(RECIPES["mtt"].to_dict())


def test_an_unknown_schedule_is_refused_by_name():
    with pytest.raises(UsageError, match=r"unknown recipe\.schedule 'linear'.*\n.*'?constant"):
        ExpertRecipe(schedule="linear")
