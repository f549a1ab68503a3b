"""Each operator against its pixel-by-pixel version; siamese, grouped and replayable parameters."""

import math

import naive_dsa
import pytest
import torch
from global_rng import global_rng_untouched
from scipy import stats

from ddengine.errors import UsageError
from ddengine.ops import dsa
from ddengine.ops.dsa import OPS, DsaParams

SIZES = [(5, 7), (11, 8), (8, 8)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n, c, h, w, seed=1, dtype=torch.float64):
    return torch.randn((n, c, h, w), generator=generator(seed), dtype=dtype)


def drawn(op, groups, size, seed=2):
    return dsa.sample(generator(seed), op, groups, size)


def naive(x, params, row):
    """One image under one row of parameters, by the naive operators."""
    op = int(params.op[row])
    numbers = {
        "color": params.colour,
        "crop": params.shift,
        "cutout": params.centre,
        "flip": params.flip[:, None],
        "scale": params.scale,
        "rotate": params.angle[:, None],
    }
    return x if op < 0 else getattr(naive_dsa, OPS[op])(x.clone(), *numbers[OPS[op]][row].tolist())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_each_operator_is_its_definition_pixel_by_pixel(op, size):
    x, params = images(5, 3, *size), drawn(op, 5, size)
    expected = torch.stack([naive(image, params, row) for row, image in enumerate(x)])
    got = dsa.apply(x, params)
    assert got.dtype == x.dtype and not torch.equal(got, x)
    tolerance = 1e-6 if op in ("rotate", "color") else 1e-12  # their factors are rounded to float32
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_a_batch_of_mixed_operators_equals_the_naive_loop_image_by_image():
    x = images(23, 3, 7, 11)
    params = dsa.sample(generator(), dsa.STRATEGY, 23, (7, 11))
    assert set(params.op.tolist()) == set(range(6))
    expected = torch.stack([naive(image, params, row) for row, image in enumerate(x)])
    torch.testing.assert_close(dsa.apply(x, params), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_neutral_parameters_are_the_identity(op):
    x = images(4, 3, 11, 7)
    torch.testing.assert_close(dsa.apply(x, dsa.neutral(4, op, (11, 7))), x, rtol=0, atol=1e-12)


def test_flipping_twice_is_the_identity():
    x = images(3, 2, 5, 7)
    params = dsa.sample(generator(), "flip", 3, (5, 7))
    ones = DsaParams(**{**vars(params), "flip": torch.ones(3, dtype=torch.long)})
    assert torch.equal(dsa.apply(dsa.apply(x, ones), ones), x)


@pytest.mark.parametrize("op", OPS)
def test_the_same_image_leaves_two_batches_bit_identical(op):
    real, synthetic = images(13, 3, 8, 8, dtype=torch.float32), images(3, 3, 8, 8, 7, torch.float32)
    synthetic[2] = real[5]
    params = drawn(op, 1, (8, 8))
    assert torch.equal(dsa.apply(real, params)[5], dsa.apply(synthetic, params)[2])


def test_one_row_serves_the_whole_batch():
    x, params = images(7, 3, 5, 7), drawn("scale", 1, (5, 7))
    assert torch.equal(dsa.apply(x, params), torch.cat([dsa.apply(image[None], params) for image in x]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_by_class_equal_a_loop_over_the_classes(layout):
    x = images(29, 3, 7, 11, dtype=torch.float32).contiguous(memory_format=layout)
    place = torch.randint(13, (29,), generator=generator(3))
    params = dsa.sample(generator(), dsa.STRATEGY, 13, (7, 11))
    together = dsa.apply(x, params, place)
    for c in place.unique():
        alone = dsa.apply(x[place == c], params[c[None]])
        assert torch.equal(together[place == c], alone), OPS[params.op[c]]


def test_stored_parameters_replay_the_same_pixels(tmp_path):
    x, params = images(17, 1, 8, 8), dsa.sample(generator(), dsa.STRATEGY, 17, (8, 8))
    torch.save(vars(params), tmp_path / "params.pt")
    again = DsaParams(**torch.load(tmp_path / "params.pt", weights_only=True))
    assert torch.equal(dsa.apply(x, params), dsa.apply(x, again))


@pytest.mark.parametrize("op", OPS)
def test_gradients_to_the_pixels_are_exact(op):
    x, params = images(2, 3, 5, 7).requires_grad_(), drawn(op, 2, (5, 7))
    assert torch.autograd.gradcheck(lambda x: dsa.apply(x, params), x)


def test_nothing_is_clamped():
    x = 100 * images(1, 1, 8, 8)
    params = dsa.neutral(1, "color", (8, 8))
    bright = DsaParams(**{**vars(params), "colour": torch.tensor([[1.0, 0.5, 1.0]])})
    out = dsa.apply(x, bright)
    assert out.max() > x.max() + 50 and out.min() < x.min() - 50


def test_what_comes_in_from_outside_is_zero():
    ones = torch.ones(20, 1, 32, 32)
    for op in ("crop", "cutout", "scale", "rotate"):
        out = dsa.apply(ones, drawn(op, 20, (32, 32)))
        assert out.min() == 0 and out.max() <= 1 + 1e-6, op


def test_the_input_is_left_as_it_was():
    x = images(23, 3, 7, 11)
    before = x.clone()
    dsa.apply(x, dsa.sample(generator(), dsa.STRATEGY, 23, (7, 11)))
    assert torch.equal(x, before)


def test_operators_are_drawn_uniformly():
    params = dsa.sample(generator(), dsa.STRATEGY, 6000, (8, 8))
    assert stats.chisquare(torch.bincount(params.op, minlength=6)).pvalue > 1e-3
    some = dsa.sample(generator(), "crop_rotate", 6000, (8, 8)).op
    assert set(some.tolist()) == {OPS.index("crop"), OPS.index("rotate")}
    assert stats.chisquare(torch.bincount(some)[[1, 5]]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("size", "shift", "last"),
    [((32, 32), (4, 4), (32, 32)), ((11, 28), (1, 4), (11, 28)), ((5, 13), (1, 2), (4, 12))],
)
def test_whole_numbers_are_uniform_over_their_published_range(size, shift, last):
    params = dsa.sample(generator(5), "crop", 20_000, size)
    for axis in range(2):
        moves, counts = params.shift[:, axis].unique(return_counts=True)
        assert moves.tolist() == list(range(-shift[axis], shift[axis] + 1))
        assert stats.chisquare(counts).pvalue > 1e-3
        centres, counts = params.centre[:, axis].unique(return_counts=True)
        assert centres.tolist() == list(range(last[axis] + 1))
        assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.binomtest(int(params.flip.sum()), 20_000).pvalue > 1e-3


def test_real_numbers_are_uniform_over_their_published_range():
    params = dsa.sample(generator(0), "scale", 20_000, (8, 8))
    ranges = {"colour": (0, 1), "scale": (1 / 1.2, 1.2), "angle": (-math.pi / 12, math.pi / 12)}
    for name, (low, high) in ranges.items():
        for column in getattr(params, name).reshape(20_000, -1).T:
            assert low - 1e-6 <= column.min() and column.max() <= high + 1e-6
            assert stats.kstest(column.double().numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3, (
                name
            )


def test_the_numbers_of_a_row_are_independent_of_each_other():
    params = dsa.sample(generator(8), dsa.STRATEGY, 20_000, (32, 32))
    columns = [
        params.op,
        *params.colour.T,
        *params.shift.T,
        *params.centre.T,
        params.flip,
        *params.scale.T,
        params.angle,
    ]
    correlation = torch.corrcoef(torch.stack([column.double() for column in columns]))
    assert (correlation - torch.eye(len(columns))).abs().max() < 0.03


def test_one_op_shares_the_operator_and_not_its_numbers():
    seen = set()
    for seed in range(40):
        params = dsa.sample(generator(seed), dsa.STRATEGY, 5, (8, 8), one_op=True)
        assert len(set(params.op.tolist())) == 1
        assert len(set(params.angle.tolist())) == 5
        seen.add(int(params.op[0]))
    assert seen == set(range(6))


def test_the_same_generator_draws_the_same_and_no_global_generator_moves():
    with global_rng_untouched():
        first, second = (dsa.sample(generator(4), dsa.STRATEGY, 19, (8, 8)) for _ in range(2))
        dsa.apply(images(19, 1, 8, 8), first)
        dsa.neutral(3, "rotate", (8, 8))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


@pytest.mark.parametrize("strategy", ["none", ""])
def test_no_strategy_leaves_images_alone(strategy):
    x = images(3, 1, 8, 8)
    assert dsa.parse(strategy) == ()
    assert torch.equal(dsa.apply(x, dsa.sample(generator(), strategy, 3, (8, 8))), x)


def test_strategies_are_the_papers_without_a_flip_on_digits():
    assert dsa.parse("color_crop_cutout_flip_scale_rotate") == (0, 1, 2, 3, 4, 5)
    assert dsa.parse("rotate_color") == (5, 0)
    assert dsa.strategy_for("cifar10") == "color_crop_cutout_flip_scale_rotate"
    for name in ("digits", "mnist", "svhn"):
        assert dsa.strategy_for(name) == "color_crop_cutout_scale_rotate"


def test_an_unknown_operator_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"unknown augmentation 'rotat'\nDid you mean 'rotate'\?"):
        dsa.parse("color_rotat")


def test_rows_that_do_not_cover_the_batch_are_refused():
    params = drawn("crop", 3, (8, 8))
    for rows in (None, torch.zeros(4, dtype=torch.long)):
        with pytest.raises((UsageError, TypeError), match=r"augmentation rows|apply"):
            dsa.apply(images(5, 1, 8, 8), params, rows)
