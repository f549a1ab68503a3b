"""The mobile networks are torchvision's on large images, keep the resolution of small ones, draw nothing."""

from functools import partial

import pytest
import torch
import torchvision
from global_rng import global_rng_untouched
from torch import nn
from torchvision.models.efficientnet import EfficientNet, _efficientnet_conf
from torchvision.ops import StochasticDepth

from ddengine.nets import NetSpec, build, count_parameters

NAMES = ("mobilenet_v2", "efficientnet_b0", "shufflenet_v2")
RENAMED = {"trunk.": "features.", "classifier.": "classifier.1."}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(name, shape=(3, 32, 32), classes=7, **options):
    return build(NetSpec(name, **options), shape, classes, generator())


def images(n, shape, seed=1):
    return torch.randn((n, *shape), generator=generator(seed))


def maps(net, shape, n=2):
    return net.features(images(n, shape), lambda level, z: tuple(z.shape[1:])).taps


def halved_efficientnet(num_classes):
    setting, last = _efficientnet_conf("efficientnet_b0", width_mult=0.5, depth_mult=1.0)
    return EfficientNet(setting, 0.0, num_classes=num_classes, last_channel=last)


def theirs(name, classes, of=None):
    """Torchvision's network without storage, drawing nothing."""
    makers = {
        "mobilenet_v2": torchvision.models.mobilenet_v2,
        "efficientnet_b0": torchvision.models.efficientnet_b0,
        "shufflenet_v2": torchvision.models.shufflenet_v2_x1_0,
    }
    with torch.device("meta"):
        return (of or makers[name])(num_classes=classes)


def as_torchvision(name, net, target):
    """`target` with the weights and statistics of `net`, without its dropout and stochastic depth."""
    renamed = {"classifier.": "fc."} if name == "shufflenet_v2" else RENAMED
    state = {}
    for key, value in net.state_dict().items():
        old = next((old for old in renamed if key.startswith(old)), "")
        state[renamed.get(old, "") + key.removeprefix(old)] = value.clone()
    target.load_state_dict(state, strict=True, assign=True)
    for module in target.modules():
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0.0
    return target


def moved(net):
    """Statistics and norms away from where they start, so that a mistake in them shows."""
    draws = generator(2)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.add_(0.3 * torch.rand(tensor.shape, generator=draws))
    return net


@pytest.mark.parametrize("name", NAMES)
def test_large_networks_compute_what_torchvisions_do_with_the_same_weights(name):
    shape = (3, 96, 96)
    net = moved(network(name, shape, 1000))
    same = as_torchvision(name, net, theirs(name, 1000))
    x = images(2, shape)
    with torch.no_grad():
        torch.testing.assert_close(net(x), same(x))
        statistics = zip(net.buffers(), same.buffers(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in statistics)
        torch.testing.assert_close(net.eval()(x), same.eval()(x))


HALVES = {
    "mobilenet_v2": (16, partial(torchvision.models.mobilenet_v2, width_mult=0.5)),
    "efficientnet_b0": (16, halved_efficientnet),
    "shufflenet_v2": (12, partial(torchvision.models.ShuffleNetV2, [4, 8, 4], [12, 58, 116, 232, 512])),
}


@pytest.mark.parametrize("name", NAMES)
def test_half_the_width_is_torchvisions_network_of_half_the_channels(name):
    width, of = HALVES[name]
    net = moved(network(name, (3, 67, 73), 5, width=width))
    same = as_torchvision(name, net, theirs(name, 5, of))
    x = images(2, (3, 67, 73))
    with torch.no_grad():
        torch.testing.assert_close(net(x), same(x))


@pytest.mark.parametrize("name", NAMES)
def test_small_networks_have_the_weights_of_large_ones(name):
    small, large = (network(name, shape, width=8) for shape in ((3, 32, 32), (3, 96, 96)))
    state = large.state_dict()
    assert {key: value.shape for key, value in small.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }
    assert count_parameters(small) == count_parameters(large)


SIDES = {
    "mobilenet_v2": [32] * 3 + [16] * 4 + [8] * 6 + [4] * 14 + [2] * 8,
    "efficientnet_b0": [32] * 3 + [16] * 4 + [8] * 4 + [4] * 12 + [2] * 10,
    "shufflenet_v2": [32, 16, 32] + [16] * 7 + [8, 16] + [8] * 15 + [4, 8] + [4] * 8,
}


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_small_images_start_whole_and_halve_with_each_stride(name):
    seen = maps(network(name, width=8), (3, 32, 32))
    assert [z[1:] for z in seen] == [(side, side) for side in SIDES[name]]


@pytest.mark.parametrize("name", NAMES)
def test_no_stride_leaves_one_pixel_and_64_pixels_are_small(name):
    for shape, first, last in [
        ((1, 8, 9), (8, 9), (2, 3)),
        ((1, 28, 28), (28, 28), (4, 4) if name == "shufflenet_v2" else (2, 2)),
        ((2, 11, 71), (11, 71), (2, 9)),
        ((3, 64, 71), (64, 71), (8, 9) if name == "shufflenet_v2" else (4, 5)),
        ((3, 65, 71), (33, 36), (3, 3)),
    ]:
        seen = maps(network(name, shape, width=4), shape)
        assert (seen[0][1:], seen[-1][1:]) == (first, last), shape


@pytest.mark.parametrize(
    ("name", "levels"), [("mobilenet_v2", 35), ("efficientnet_b0", 33), ("shufflenet_v2", 37)]
)
def test_maps_are_the_outputs_of_the_activations_in_order(name, levels):
    net, kept = network(name, width=8), []
    for module in net.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6 | nn.SiLU):
            module.register_forward_hook(lambda module, given, z: kept.append(z) if z.shape[2] > 1 else None)
    seen = net.features(images(2, (3, 32, 32)), lambda level, z: (level, z)).taps
    assert [level for level, _ in seen] == list(range(levels))
    assert len(kept) == levels and all(a is b for a, (_, b) in zip(kept, seen, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_norm_gives_is_not_overwritten(name):
    net, given = network(name, width=8), []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, x, z: given.append((z, z.clone())))
    net(images(2, (3, 32, 32)))
    assert len(given) > 40 and all(torch.equal(z, kept) for z, kept in given)


@pytest.mark.parametrize("name", NAMES)
def test_training_draws_nothing_and_is_the_same_twice(name):
    net, x = network(name, width=8), images(3, (3, 32, 32))
    with global_rng_untouched():
        first, second = net(x), net(x)
        first.sum().backward()
    assert net.training and torch.equal(first, second)
    assert not any(isinstance(module, nn.Dropout) for module in net.modules())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["instance", "none"])
def test_another_norm_takes_the_place_of_every_batch_norm(name, norm):
    x, net = images(2, (3, 16, 16)).double(), network(name, (3, 16, 16), width=8, norm=norm).double()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    norms = sum(isinstance(module, nn.GroupNorm) for module in net.modules())
    whole = network(name, (3, 16, 16), width=8)
    replaced = sum(isinstance(module, nn.BatchNorm2d) for module in whole.modules())
    assert norms == (0 if norm == "none" else replaced) and replaced > 40
    alone = torch.cat([net(image[None]) for image in x])
    torch.testing.assert_close(net(x), alone, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "width", "channels"),
    [
        ("mobilenet_v2", 32, (32, 1280)),
        ("mobilenet_v2", 5, (5, 1280)),
        ("mobilenet_v2", 48, (48, 1920)),
        ("efficientnet_b0", 32, (32, 1280)),
        ("efficientnet_b0", 8, (8, 320)),
        ("efficientnet_b0", 5, (5, 192)),
        ("shufflenet_v2", 24, (24, 1024)),
        ("shufflenet_v2", 12, (12, 512)),
        ("shufflenet_v2", 5, (5, 213)),
    ],
)
def test_width_is_the_channels_of_the_stem_and_scales_the_rest(name, width, channels):
    net = network(name, (1, 8, 8), width=width)
    seen = maps(net, (1, 8, 8))
    assert (seen[0][0], seen[-1][0]) == channels
    assert net.classifier.in_features == channels[1]
