"""The attention loss against the papers' sums value by value, its derivatives, invariances and limits."""

import inspect
import math

import naive_matching
import pytest
import torch
from torch import nn

import matchers
from ddengine.errors import UsageError
from ddengine.nets.convnet import ConvNet
from ddengine.nets.core import NetSpec, initialise
from matchers.attention import (
    AttentionMatching,
    AttentionOptions,
    Statistics,
    attention_map,
    attention_matching_loss,
    image_statistics,
    mmd_term,
)
from matchers.descent import group_means

POWERS = [1, 1.5, 2, 4]
REFUSED = (UsageError, TypeError)  # TypeError where annotations are checked


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def means(rows, labels, classes):
    """Class means, a few images at a time."""
    pieces = zip(rows.split(2), labels.split(2), strict=True)
    return group_means((([values], place) for values, place in pieces), classes)[0]


def tiny_network(norm, seed=0):
    net = ConvNet((1, 4, 5), 3, 3, 2, norm)
    return initialise(net, torch.Generator().manual_seed(seed)).double().requires_grad_(False)


@pytest.mark.parametrize("p", POWERS)
def test_map_is_the_papers_sum(p):
    f = randn(3, 5, 7, 11)
    expected = torch.tensor(naive_matching.attention_map(f.tolist(), p), dtype=torch.float64)
    torch.testing.assert_close(attention_map(f, p), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("p", POWERS)
def test_loss_is_the_papers_sum_over_classes_and_layers(p):
    classes, m, n = 3, torch.tensor([0, 0, 1, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 2, 2, 0, 1, 1, 2, 2])
    real = [randn(11, 5, 7, 3, seed=1), randn(11, 2, 3, 5, seed=2)]
    synthetic = [randn(7, 5, 7, 3, seed=3), randn(7, 2, 3, 5, seed=4)]
    psi = randn(11, 13, seed=5), randn(7, 13, seed=6)
    sides = [
        Statistics(
            tuple(means(attention_map(f, p), labels, classes) for f in layers), means(e, labels, classes)
        )
        for layers, e, labels in ((real, psi[0], n), (synthetic, psi[1], m))
    ]
    listed = [[f.tolist() for f in layers] for layers in (real, synthetic)]
    sam = naive_matching.spatial_attention_matching(listed[0], n.tolist(), listed[1], m.tolist(), classes, p)
    mmd = naive_matching.mean_distance(psi[0].tolist(), n.tolist(), psi[1].tolist(), m.tolist(), classes)
    assert math.isclose(mmd_term(sides[0].embedding, sides[1].embedding), mmd, rel_tol=1e-10)
    assert math.isclose(attention_matching_loss(*sides), 100 * (sam + 0.01 * mmd), rel_tol=1e-10)
    assert math.isclose(
        attention_matching_loss(*sides, 0.02, 7, 0.3), 7 * (0.3 * sam + 0.02 * mmd), rel_tol=1e-10
    )
    assert math.isclose(attention_matching_loss(*sides, 1, 1, 0), mmd, rel_tol=1e-10)


@pytest.mark.parametrize("p", POWERS)
def test_gradient_of_the_map_is_exact(p):
    f = randn(2, 3, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: attention_map(f, p), f)


def test_gradient_of_the_loss_is_exact():
    real = Statistics((randn(3, 7), randn(3, 5, seed=1)), randn(3, 11, seed=2))
    inputs = [randn(3, 7, seed=3), randn(3, 5, seed=4), randn(3, 11, seed=5)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda a, b, e: attention_matching_loss(real, Statistics((a, b), e)), inputs
    )


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_gradient_of_the_loss_to_the_pixels_is_exact(p, norm):
    net, labels = tiny_network(norm), torch.tensor([0, 0, 1])

    def statistics(x, labels):
        maps, embedding = image_statistics(net, x, p, layers=(0, 1))
        return Statistics(tuple(means(m, labels, 2) for m in maps), means(embedding, labels, 2))

    target = statistics(randn(5, 1, 4, 5, seed=1), torch.tensor([0, 0, 1, 1, 1]))
    x = randn(3, 1, 4, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_matching_loss(target, statistics(x, labels)), x)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_map_ignores_positive_scale(p, dtype, tolerance):
    f = randn(3, 5, 7, 11, dtype=dtype)
    for scale in (1e-3, 0.1, 17.0, 1e3):
        torch.testing.assert_close(
            attention_map(scale * f, p), attention_map(f, p), rtol=tolerance, atol=tolerance
        )


def test_map_ignores_the_order_and_the_sign_of_channels():
    f = randn(3, 5, 7, 11)
    torch.testing.assert_close(attention_map(f[:, [3, 0, 4, 1, 2]]), attention_map(f), rtol=1e-14, atol=0)
    torch.testing.assert_close(attention_map(-f, 1.5), attention_map(f, 1.5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("p", POWERS)
def test_constant_map_has_one_value_and_unit_norm(p):
    z = attention_map(torch.full((2, 3, 5, 7), 0.3, dtype=torch.float64), p)
    torch.testing.assert_close(z, torch.full((2, 35), 1 / math.sqrt(35), dtype=torch.float64))


@pytest.mark.parametrize("p", POWERS)
def test_zero_map_stays_zero_with_a_finite_gradient(p):
    f = randn(3, 5, 7, 11)
    f[1] = 0
    f.requires_grad_()
    z = attention_map(f, p)
    assert not z[1].any() and torch.allclose(z[[0, 2]].norm(dim=1), torch.ones(2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(z.sum(), f)
    assert gradient.isfinite().all() and gradient[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [300, 10_000])
def test_large_power_leaves_the_strongest_place_alone(p, dtype):
    f = 5 * randn(3, 5, 7, 11, dtype=dtype)
    f[:, 2, 4, 6] = 30 + f.amax((1, 2, 3))
    z = attention_map(f, p)
    one_hot = torch.zeros(7, 11, dtype=dtype)
    one_hot[4, 6] = 1
    torch.testing.assert_close(z, one_hot.flatten().expand(3, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_computed_in_float32(dtype):
    f = (1000 * randn(2, 3, 5, 7)).to(dtype)  # whose fourth power is far outside of float16
    z = attention_map(f)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, attention_map(f.double()).float())


@pytest.mark.parametrize("p", POWERS)
def test_distance_of_mean_maps_lies_between_zero_and_two(p):
    for seed in range(5):
        real, synthetic = (attention_map(randn(7, 3, 5, 3, seed=s), p).mean(0) for s in (seed, seed + 50))
        assert 0 <= (real - synthetic).square().sum() <= 2


def test_disjoint_one_hot_maps_are_the_farthest():
    f = torch.zeros(2, 1, 3, 5, dtype=torch.float64)
    f[0, 0, 0, 1] = f[1, 0, 2, 4] = 7
    z, none = attention_map(f), torch.zeros(1, 2, dtype=torch.float64)
    sides = [Statistics((row[None],), none) for row in z]
    assert attention_matching_loss(*sides, scale=1) == 2


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_order_and_repetition_inside_a_class_change_nothing(norm):
    net, x = tiny_network(norm), randn(5, 1, 4, 5)
    labels = torch.tensor([0, 0, 1, 1, 1])

    def statistics(index):
        maps, embedding = image_statistics(net.train(), x[index])
        return [means(rows, labels[index], 2) for rows in (*maps, embedding)]

    straight = statistics(torch.arange(5))
    for index in ([1, 0, 4, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]):
        for a, b in zip(straight, statistics(torch.tensor(index)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_one_spatial_permutation_of_both_sides_changes_nothing():
    real, synthetic = randn(3, 35), randn(3, 35, seed=1)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(3))
    embeddings = randn(3, 11, seed=2), randn(3, 11, seed=3)
    straight = attention_matching_loss(
        Statistics((real,), embeddings[0]), Statistics((synthetic,), embeddings[1])
    )
    permuted = attention_matching_loss(
        Statistics((real[:, order],), embeddings[0]), Statistics((synthetic[:, order],), embeddings[1])
    )
    torch.testing.assert_close(permuted, straight, rtol=1e-13, atol=0)


def test_synthetic_equal_to_real_has_no_loss_and_no_gradient():
    net, x = tiny_network("instance"), randn(4, 1, 4, 5)
    labels = torch.tensor([0, 0, 1, 1])
    free = x.clone().requires_grad_()
    sides = []
    for images in (x, free):
        maps, embedding = image_statistics(net, images)
        sides.append(Statistics(tuple(means(m, labels, 2) for m in maps), means(embedding, labels, 2)))
    loss = attention_matching_loss(*sides)
    (gradient,) = torch.autograd.grad(loss, free)
    assert loss == 0 and not gradient.any()


def test_layers_are_all_but_the_last_unless_named():
    net, x = (
        initialise(ConvNet((2, 8, 8), 3, 3, 3, "none"), torch.Generator().manual_seed(0)),
        randn(3, 2, 8, 8).float(),
    )
    named, _ = image_statistics(net, x, layers=(0, 1, 2))
    assert [m.shape[1] for m in named] == [64, 16, 4]
    default, embedding = image_statistics(net, x)
    assert len(default) == 2 and all(torch.equal(a, b) for a, b in zip(default, named[:2], strict=True))
    swapped, _ = image_statistics(net, x, layers=(2, 0))
    assert torch.equal(swapped[0], named[2]) and torch.equal(swapped[1], named[0])
    none, same = image_statistics(net, x, layers=())
    assert none == [] and torch.equal(same, embedding)


def test_maps_are_taken_after_the_norm_and_the_relu_and_the_embedding_after_the_pool():
    net, x = tiny_network("instance"), randn(3, 1, 4, 5)
    first = net.norms[0](net.convs[0](x)).clamp(min=0)
    second = net.norms[1](net.convs[1](nn.functional.avg_pool2d(first, 2))).clamp(min=0)
    (found,), embedding = image_statistics(net, x, 2)
    z = first.square().sum(1).flatten(1)
    torch.testing.assert_close(found, z / z.norm(dim=1, keepdim=True))
    torch.testing.assert_close(embedding, nn.functional.avg_pool2d(second, 2).flatten(1))


@pytest.mark.parametrize("layers", [(2,), (0, 5), (-1,)])
def test_layers_that_the_network_lacks_are_refused(layers):
    with pytest.raises(UsageError, match=r"layers=.*\nThe network has ReLU layers 0 to 1"):
        image_statistics(tiny_network("none"), randn(3, 1, 4, 5), layers=layers)


def test_wrong_shapes_and_powers_are_refused():
    with pytest.raises(REFUSED, match=r"feature maps|f: "):
        attention_map(randn(3, 5, 7))
    for p in (0.5, math.nan, math.inf):
        with pytest.raises(UsageError, match="attention power p="):
            attention_map(randn(2, 3, 5, 7), p)
    good, other = Statistics((randn(3, 7),), randn(3, 5)), Statistics((randn(3, 8),), randn(3, 5))
    with pytest.raises(UsageError, match=r"real statistics \(3, 7\) against synthetic \(3, 8\)"):
        attention_matching_loss(good, other)
    with pytest.raises(UsageError, match="1 real and 0 synthetic attention layers"):
        attention_matching_loss(good, Statistics((), randn(3, 5)))
    with pytest.raises(REFUSED, match=r"real statistics|synthetic"):
        mmd_term(randn(3, 5), randn(2, 5))


def test_traced_by_the_compiler_is_the_same():
    def loss(real, f, psi, e):
        z = inspect.unwrap(attention_map)(f, 4)
        return inspect.unwrap(attention_matching_loss)(Statistics((real,), psi), Statistics((z,), e))

    inputs = [
        attention_map(randn(3, 5, 7, 11)),
        randn(3, 5, 7, 11, seed=1),
        randn(3, 13, seed=2),
        randn(3, 13, seed=3),
    ]
    inputs = [x.float() for x in inputs]
    inputs[1].requires_grad_()
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        value = function(*inputs)
        results.append((value.detach(), *torch.autograd.grad(value, inputs[1])))
    for straight, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, straight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("variant", "values"),
    [("paper", (4, 8000, 128, "constant")), ("released", (1, 20_000, 64, "drop"))],
)
def test_variants_fill_in_what_is_not_given(variant, values):
    o = AttentionOptions(variant).resolved()
    assert (o.p, o.steps, o.real_per_class, o.schedule) == values
    assert (o.scale, o.mmd_weight, o.lr, o.momentum) == (100, 0.01, 1, 0.5)
    mine = AttentionOptions(variant, steps=7, p=3.0, schedule="cosine").resolved()
    assert (mine.p, mine.steps, mine.real_per_class, mine.schedule) == (3, 7, values[2], "cosine")


def test_a_matcher_shows_what_its_variant_decides():
    made = matchers.make("attention", variant="released", steps=7)
    assert made == AttentionMatching(AttentionOptions("released", steps=7))
    assert (made.options.p, made.options.steps, made.options.real_per_class, made.network.norm) == (
        1,
        7,
        64,
        "batch",
    )
    assert matchers.make("attention").network.norm is None
    given = matchers.make("attention", NetSpec(norm="instance"), variant="released")
    assert given.network.norm == "instance"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "papr"}, r"unknown matcher.variant 'papr'\nDid you mean 'paper'\?"),
        ({"p": 0.5}, "matcher.p=0.5 is out of range"),
        ({"sam_weight": -1.0}, "matcher.sam_weight=-1.0"),
        ({"mmd_weight": math.inf}, "matcher.mmd_weight=inf"),
        ({"scale": 0.0}, "matcher.scale=0.0"),
        ({"steps": 0}, "matcher.steps=0"),
        ({"chunk": -3}, "matcher.chunk=-3"),
        ({"lr": math.nan}, "matcher.lr=nan"),
        ({"start": "reel"}, r"unknown matcher.start 'reel'\nDid you mean 'real'\?"),
        ({"schedule": "cosin"}, "unknown matcher.schedule 'cosin'"),
        ({"augment": "crop_flop"}, r"unknown augmentation 'flop'"),
        ({"codec": "jpeg"}, "unknown matcher.codec 'jpeg'"),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        AttentionOptions(**options)
