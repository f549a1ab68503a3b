import ast
import colorsys
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from global_rng import global_rng_untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from torch import nn

from ddengine import robust
from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build
from ddengine.ops.whiten import fit_zca
from ddengine.rng import Rng
from ddengine.robust import (
    CORRUPTIONS,
    LEVELS,
    calibration_error,
    corrupted,
    corruption_accuracy,
    per_class_accuracy,
    pgd,
    pgd_accuracy,
    probabilities,
)
from ddengine.train import accuracy
from ddengine.types import DataSpec, Images

EPSILON = 8 / 255


def pictures(count, channels=3, size=(11, 13), seed=0):
    """uint8 images [n c h w] with structure at several scales, some pixels at both ends."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(0.5, 0.35, (count, channels, 3, 4)))
    smooth = F.interpolate(coarse, size=size, mode="bilinear")
    x = smooth + torch.from_numpy(rng.normal(0, 0.06, smooth.shape))
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def spec_of(x, classes=5, zca=False):
    c, h, w = x.shape[1:]
    names = tuple(f"class {i}" for i in range(classes))
    whitening = fit_zca(x.float() / 255) if zca else None
    return DataSpec("toy", (c, h, w), names, (0.4, 0.5, 0.6)[:c], (0.2, 0.3, 0.25)[:c], zca=whitening)


def labelled(count=29, channels=3, size=(11, 13), classes=5, zca=False, seed=0):
    x = pictures(count, channels, size, seed)
    y = torch.from_numpy(np.random.default_rng(seed + 1).integers(classes, size=count))
    return Images(x, y, spec_of(x, classes, zca))


def as_input(images):
    return replace(images, x=images.model_input())


def convnet(images, norm="batch"):
    net = build(NetSpec("convnet", width=6, depth=2, norm=norm), images.spec.shape, 5, Rng(3).torch("w"))
    net.train()
    with torch.no_grad():
        net(images.model_input())  # batch norm's running statistics leave their start
    return net


def linear(images, classes, seed=4):
    head = nn.utils.skip_init(nn.Linear, math.prod(images.spec.shape), classes)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(np.random.default_rng(seed).normal(0, 0.1, head.weight.shape)))
        head.bias.copy_(torch.linspace(-0.1, 0.1, classes))
    return nn.Sequential(nn.Flatten(), head)


class Recorder(nn.Module):
    """A network that keeps a copy of what it is shown."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.net(x)


# probabilities, calibration, classes


def test_probabilities_are_the_softmax_in_eval_mode():
    images = labelled()
    net = convnet(images)
    p = probabilities(net, images, batch=7)
    net.eval()
    with torch.no_grad():
        wanted = net(images.spec.normalise(images.x)).double().softmax(1)
    torch.testing.assert_close(p.double(), wanted, rtol=1e-4, atol=1e-6)
    assert p.dtype == torch.float32
    assert (p.argmax(1) == images.y).double().mean().item() == pytest.approx(accuracy(net, images))


def test_a_network_that_diverged_scores_at_chance_everywhere():
    images = labelled(count=47)
    net = linear(images, 5)
    with torch.no_grad():
        net[1].weight.fill_(math.nan)
    p = probabilities(net, images)
    assert torch.equal(p, torch.full((47, 5), 0.2))
    chance = accuracy(net, images)
    assert chance == images.counts[0] / 47
    assert (p.argmax(1) == images.y).double().mean().item() == pytest.approx(chance)
    assert calibration_error(p, images.y) == pytest.approx(abs(chance - 0.2), abs=1e-6)
    assert corruption_accuracy(net, images, ["contrast"], 1, Rng(0)) == {"contrast": chance}
    assert pgd_accuracy(net, images, Rng(0), steps=2) == chance


def test_a_network_comes_back_in_the_modes_it_came_in():
    images = labelled()
    net = convnet(images).train()
    frozen = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    next(net.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    wanted = [parameter.requires_grad for parameter in net.parameters()]
    probabilities(net, images)
    corruption_accuracy(net, images, ["contrast"], 2, Rng(0))
    pgd_accuracy(net, images, Rng(0), steps=2)
    assert [module.training for module in net.modules()] == modes
    assert not frozen.training
    assert [parameter.requires_grad for parameter in net.parameters()] == wanted
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_network_that_fails_still_comes_back_in_its_mode():
    images = labelled(channels=1)
    net = convnet(labelled()).train()
    for score in (lambda: probabilities(net, images), lambda: pgd_accuracy(net, images, Rng(0))):
        with pytest.raises(UsageError):
            score()
        assert all(module.training for module in net.modules())
        assert all(parameter.requires_grad for parameter in net.parameters())


def test_calibration_error_by_hand():
    p = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.30, 0.70], [0.62, 0.38]])
    y = torch.tensor([0, 1, 1, 0])
    # five bins: (0.8, 1] has accuracy 1/2 at mean confidence 0.935, (0.6, 0.8] accuracy 1 at 0.66
    assert calibration_error(p, y, bins=5) == pytest.approx(0.5 * 0.435 + 0.5 * 0.34, abs=1e-6)
    assert calibration_error(torch.eye(3), torch.tensor([0, 1, 2])) == 0
    assert calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == 1


@given(st.integers(1, 61), st.integers(2, 7), st.integers(1, 17), st.integers(0, 10**6), st.booleans())
@settings(deadline=None, max_examples=50)
def test_calibration_error_agrees_with_a_loop_over_bins(n, k, bins, seed, on_edges):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(k, 0.7), n)
    if on_edges:
        p[:, 0], p[:, 1:] = 1.0, 0.0
        p[:, 0] = np.maximum(rng.integers(0, bins + 1, n) / bins, 1 / k)
        p[:, 1] = 1 - p[:, 0]
    y = rng.integers(k, size=n)
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i in range(n) if (m - 1) / bins < p[i].max() <= m / bins]
        if inside:
            right = sum(int(p[i].argmax()) == y[i] for i in inside) / len(inside)
            sure = sum(p[i].max() for i in inside) / len(inside)
            total += len(inside) / n * abs(right - sure)
    found = calibration_error(torch.from_numpy(p), torch.from_numpy(y), bins)
    assert found == pytest.approx(total, abs=1e-9)
    assert 0 <= found <= 1


def test_per_class_accuracy_counts_each_class_and_leaves_empty_ones_out():
    p = torch.eye(4)[torch.tensor([0, 0, 1, 3, 3, 1, 0])]
    y = torch.tensor([0, 0, 0, 3, 1, 1, 1])
    assert per_class_accuracy(p, y, 4) == [2 / 3, 1 / 3, None, 1.0]


def test_class_accuracies_weighted_by_counts_are_the_accuracy():
    images = labelled(count=83)
    net = convnet(images)
    of = per_class_accuracy(probabilities(net, images), images.y, 5)
    mean = sum(a * n for a, n in zip(of, images.counts, strict=True)) / len(images)
    assert mean == pytest.approx(accuracy(net, images))


# corruptions


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["uint8", "float", "zca"])
def test_a_corruption_keeps_shape_kind_labels_and_range(name, channels, kind):
    images = labelled(channels=channels, zca=kind == "zca")
    images = images if kind == "uint8" else as_input(images)
    before = images.x.clone()
    for severity in (1, 5):
        found = corrupted(images, name, severity, Rng(1))
        assert found.x.dtype == images.x.dtype
        assert found.x.shape == images.x.shape
        assert torch.equal(found.y, images.y)
        assert not torch.equal(found.x, images.x)
        pixels = found.x.float() / 255 if kind == "uint8" else found.spec.denormalise(found.x)
        assert pixels.min() >= -1e-3
        assert pixels.max() <= 1 + 1e-3
    assert torch.equal(images.x, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("zca", [False, True])
def test_uint8_and_model_input_are_corrupted_alike(name, zca):
    images = labelled(zca=zca)
    pixels = corrupted(images, name, 3, Rng(1)).x / 255
    found = corrupted(as_input(images), name, 3, Rng(1))
    torch.testing.assert_close(found.spec.denormalise(found.x), pixels, rtol=0, atol=0.5 / 255 + 2e-3)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (29, 31)])
def test_each_severity_moves_images_further_than_the_one_before(name, channels, size):
    images = labelled(count=17, channels=channels, size=size)
    moved = [
        (corrupted(images, name, severity, Rng(1)).x.double() - images.x).abs().mean().item()
        for severity in range(1, 6)
    ]
    assert moved == sorted(moved)
    assert moved[0] < 0.7 * moved[4]


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("float_input", [False, True])
def test_the_same_rng_gives_the_same_bits_whatever_the_batch(name, float_input):
    images = labelled(count=23)
    images = as_input(images) if float_input else images
    whole = corrupted(images, name, 4, Rng(1)).x
    with global_rng_untouched():
        for batch in (1, 5, 22):
            assert torch.equal(corrupted(images, name, 4, Rng(1), batch=batch).x, whole)
    few = corrupted(images.take(torch.arange(9)), name, 4, Rng(1)).x
    assert torch.equal(few, whole[:9])


def test_noise_differs_between_seeds_and_images():
    grey = torch.full((2, 3, 11, 13), 128, dtype=torch.uint8)
    images = Images(grey, torch.zeros(2, dtype=torch.long), spec_of(grey))
    first, second = (corrupted(images, "gaussian_noise", 3, Rng(seed)).x for seed in (1, 2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("severity", [1, 5])
def test_noise_is_normal_of_the_level_given(severity):
    x = torch.full((7, 3, 41, 37), 0.5, dtype=torch.float64)
    noise = CORRUPTIONS["gaussian_noise"](x, severity, Rng(6).torch("n")) - x
    level = LEVELS["gaussian_noise"][severity - 1]
    assert stats.kstest(noise.flatten().numpy() / level, "norm").pvalue > 0.01
    assert noise.std().item() == pytest.approx(level, rel=0.02)


@pytest.mark.parametrize("severity", [1, 4, 5])
def test_blur_is_scipys_gaussian_filter(severity):
    x = pictures(3).double() / 255
    sigma = LEVELS["gaussian_blur"][severity - 1]
    wanted = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4)
    found = CORRUPTIONS["gaussian_blur"](x, severity, Rng(0).torch("n"))
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=0, atol=1e-6)


def test_contrast_scales_the_distance_from_each_channels_mean():
    x = pictures(3).double() / 255
    found = CORRUPTIONS["contrast"](x, 3, Rng(0).torch("n"))
    for i in range(3):
        for c in range(3):
            plane = x[i, c].numpy()
            wanted = plane.mean() + 0.4 * (plane - plane.mean())
            np.testing.assert_allclose(found[i, c].numpy(), np.clip(wanted, 0, 1), atol=1e-12)


def test_brightness_raises_the_value_of_hsv():
    x = pictures(2, size=(5, 7)).double() / 255
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 1.0
    found = CORRUPTIONS["brightness"](x, 4, Rng(0).torch("n"))
    for i, row, column in np.ndindex(2, 5, 7):
        h, s, v = colorsys.rgb_to_hsv(*x[i, :, row, column].tolist())
        wanted = colorsys.hsv_to_rgb(h, s, min(v + 0.2, 1))
        np.testing.assert_allclose(found[i, :, row, column].numpy(), wanted, atol=1e-5)
    grey = x[:, :1]
    found = CORRUPTIONS["brightness"](grey, 4, Rng(0).torch("n"))
    torch.testing.assert_close(found, (grey + 0.2).clamp(max=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (28, 64), (8, 8)])  # no centre at an edge, where Pillow rounds
@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_is_pillows_box_filter_down_and_up(size, severity):
    x = pictures(2, channels=1, size=size).float() / 255
    found = CORRUPTIONS["pixelate"](x, severity, Rng(0).torch("n"))
    level, (h, w) = LEVELS["pixelate"][severity - 1], size
    for image, mine in zip(x, found, strict=True):
        small = Image.fromarray(image[0].numpy()).resize(
            (int(w * level), int(h * level)), Image.Resampling.BOX
        )
        wanted = np.asarray(small.resize((w, h), Image.Resampling.BOX))
        np.testing.assert_allclose(mine[0].numpy(), wanted, atol=1e-6)


def test_pixelate_gives_a_centre_at_an_edge_to_the_lower_box():
    x = torch.tensor([0.2, 0.6, 0.9]).expand(1, 1, 3, 3)
    found = CORRUPTIONS["pixelate"](x, 1, Rng(0).torch("n"))  # two boxes: {0.2, 0.6} and {0.9}
    torch.testing.assert_close(found, torch.tensor([0.4, 0.9, 0.9]).expand(1, 1, 3, 3))


def test_corruption_accuracy_is_the_accuracy_on_the_corrupted_images():
    images = labelled(count=61)
    net = convnet(images)
    images = replace(images, y=probabilities(net, images).argmax(1))
    found = corruption_accuracy(net, images, ["contrast", "gaussian_noise"], 5, Rng(2))
    assert found == {
        name: accuracy(net, corrupted(images, name, 5, Rng(2))) for name in ("contrast", "gaussian_noise")
    }
    assert min(found.values()) < 1


# attacks


def worst_case(images, net, epsilon):
    """The accuracy of a linear two-class network when every pixel takes its worst value (float64)."""
    weight, bias = net[1].weight.double().detach().numpy(), net[1].bias.double().detach().numpy()
    spec, x = images.spec, images.x.numpy().reshape(len(images), -1) / 255
    if spec.zca is None:
        each = images.x[0, 0].numel()
        mean, std = (np.repeat(values, each) for values in (spec.mean, spec.std))
        weight, bias = weight / std, bias - (weight / std) @ mean
    else:
        matrix, mean = (getattr(spec.zca, key).double().numpy() for key in ("matrix", "mean"))
        weight = weight @ matrix.T
        bias = bias - weight @ mean
    right = 0
    for pixels, y in zip(x, images.y.tolist(), strict=True):
        slope = weight[y] - weight[1 - y]
        low, high = np.clip(pixels - epsilon, 0, 1), np.clip(pixels + epsilon, 0, 1)
        right += slope @ np.where(slope > 0, low, high) + bias[y] - bias[1 - y] > 0
    return right / len(images)


@pytest.mark.parametrize("zca", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("epsilon", [1 / 255, EPSILON])
def test_a_linear_network_under_attack_has_the_accuracy_of_its_worst_case(zca, channels, epsilon):
    images = labelled(count=211, channels=channels, classes=2, zca=zca)
    net = linear(images, 2)
    images = replace(images, y=probabilities(net, images).argmax(1))  # so that only the attack errs
    found = pgd_accuracy(net, images, Rng(0), epsilon=epsilon)
    assert found == worst_case(images, net, epsilon)
    assert 0 < found < 1 or epsilon == EPSILON
    assert found < 1


@pytest.mark.parametrize("float_input", [False, True])
@pytest.mark.parametrize("zca", [False, True])
def test_an_attack_of_no_size_gives_the_clean_accuracy(float_input, zca):
    images = labelled(count=67, zca=zca)
    images = as_input(images) if float_input else images
    net = convnet(images, norm="instance")
    guess = probabilities(net, images).argmax(1)
    images = replace(images, y=torch.where(torch.arange(67) % 3 == 0, (guess + 1) % 5, guess))
    clean = accuracy(net, images)
    assert 0.5 < clean < 0.8
    assert pgd_accuracy(net, images, Rng(0), epsilon=0) == clean
    assert pgd_accuracy(net, images, Rng(0)) < clean


def test_the_attack_stays_in_the_ball_and_among_pixels():
    x = pictures(19)
    x[0], x[1] = 0, 255
    plain = DataSpec("toy", (3, 11, 13), tuple("abcde"), (0.0,) * 3, (1.0,) * 3)
    images = Images(x, torch.arange(19) % 5, plain)
    net = Recorder(linear(images, 5))
    pgd_accuracy(net, images, Rng(0), epsilon=EPSILON, step=3 / 255, steps=4, batch=19)
    pixels, moves = x / 255, []
    assert len(net.seen) == 4 + 2
    for seen in net.seen:
        assert seen.min() >= 0
        assert seen.max() <= 1
        moves.append((seen - pixels).abs().amax().item())
        assert moves[-1] <= EPSILON + 1e-6
    assert moves[0] > 0.9 * EPSILON
    assert sum(torch.equal(seen, pixels) for seen in net.seen) == 1
    inner = (pixels - 0.5).abs() < 0.5 - EPSILON - 1e-3
    start = ((net.seen[0] - pixels) / EPSILON)[inner]
    assert stats.kstest(start.numpy(), "uniform", args=(-1, 2)).pvalue > 0.01
    step = (net.seen[1] - net.seen[0]).abs()
    assert step.max().item() == pytest.approx(3 / 255, abs=1e-6)


def test_more_steps_raise_the_loss():
    images = labelled(count=31)
    net = convnet(images).eval()
    x, start = images.x / 255, torch.rand(images.x.shape, generator=Rng(5).torch("s"))
    losses = []
    for steps in (0, 1, 3, 10):
        at = pgd(
            lambda pixels: net(images.spec.normalise(pixels)),
            x,
            images.y,
            start,
            epsilon=EPSILON,
            step=2 / 255,
            steps=steps,
        )
        assert not at.requires_grad
        losses.append(F.cross_entropy(net(images.spec.normalise(at)), images.y).item())
    assert losses == sorted(losses)
    assert losses[3] > losses[0] + 0.02


def test_the_attack_depends_on_rng_alone_and_not_on_the_batch():
    images = labelled(count=37)
    starts = []
    with global_rng_untouched():
        for seed, batch in ((0, 250), (0, 5), (1, 250)):
            net = Recorder(linear(images, 5))
            pgd_accuracy(net, images, Rng(seed), steps=2, batch=batch)
            starts.append(torch.cat(net.seen[::4]))
    torch.testing.assert_close(starts[0], starts[1], rtol=0, atol=0)
    assert not torch.equal(starts[0], starts[2])
    net = convnet(images)
    found = {pgd_accuracy(net, images, Rng(0), batch=batch) for batch in (250, 37, 11)}
    assert len(found) == 1


def test_an_image_that_is_wrong_without_attack_is_wrong_under_it():
    images = labelled(count=97)
    net = convnet(images)
    right = probabilities(net, images).argmax(1) == images.y
    wrong = images.take((~right).nonzero().flatten())
    assert len(wrong) > 50
    assert pgd_accuracy(net, wrong, Rng(0), epsilon=1.0, step=1e-6, steps=1) == 0


def test_soft_labels_are_attacked_by_their_largest_class():
    images = labelled(count=41)
    net = convnet(images)
    soft = replace(images, y=F.one_hot(images.y, 5) * 3.0, y_kind="logit")
    assert pgd_accuracy(net, soft, Rng(0), steps=3) == pgd_accuracy(net, images, Rng(0), steps=3)


# refusals


def test_what_is_out_of_range_is_refused():
    images = labelled(count=3)
    net = convnet(images)
    none = images.take(torch.arange(0))
    for key, value in (("epsilon", -0.1), ("step", 0), ("steps", 0), ("epsilon", math.nan)):
        with pytest.raises(UsageError, match=key):
            pgd_accuracy(net, images, Rng(0), **{key: value})
    with pytest.raises(UsageError, match="bins"):
        calibration_error(torch.eye(3), torch.arange(3), bins=0)
    for score in (
        lambda: probabilities(net, none),
        lambda: pgd_accuracy(net, none, Rng(0)),
        lambda: corruption_accuracy(net, none, ["contrast"], 1, Rng(0)),
        lambda: calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
    ):
        with pytest.raises(UsageError, match="images=0"):
            score()


def test_an_unknown_corruption_or_severity_is_refused():
    images = labelled(count=3)
    with pytest.raises(UsageError, match=r"unknown corruption 'gaussian_nois'\n.*gaussian_noise"):
        corrupted(images, "gaussian_nois", 1, Rng(0))
    for severity in (0, 6):
        with pytest.raises(UsageError, match=f"unknown severity '{severity}'"):
            corrupted(images, "contrast", severity, Rng(0))


def test_brightness_refuses_images_that_are_neither_grey_nor_rgb():
    with pytest.raises(UsageError, match="images of 2 channels"):
        corrupted(labelled(count=3, channels=2), "brightness", 1, Rng(0))


def test_the_module_imports_kornia_inside_functions_only():
    tree = ast.parse(Path(robust.__file__).read_text())
    top = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert "from ddengine.rng import Rng" in top
    assert not [line for line in top if "kornia" in line]
