"""torchvision's classifiers by name: their own weights bit for bit, from a generator of ours."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from global_rng import global_rng_untouched
from torch import nn

from ddengine import catalog
from ddengine.errors import UsageError
from ddengine.nets import (
    GRAPH_GRID,
    GRID,
    NETWORKS,
    NetSpec,
    build,
    count_parameters,
    family,
    find_network,
    has_batch_norm,
    reinitialise,
    resolve,
)
from ddengine.nets.graph import GRAPH_NETWORKS
from ddengine.nets.torchvision_nets import names
from ddengine.ops.batches import layout

CLASSES = 7
# the smallest of each family that has a constructor, buffers, bare parameters or draws of its own
SAMPLE = [
    "convnext_tiny", "densenet121", "mnasnet0_5", "mobilenet_v3_small", "regnet_x_400mf",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_v2_t",
]  # fmt: skip
SMALL = ["mobilenet_v3_small", "squeezenet1_1"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own(name: str, seed: int, **options) -> nn.Module:
    """torchvision's network as torchvision makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = list(a.state_dict().values()), list(b.state_dict().values())
    return len(first) == len(second) and all(map(torch.equal, first, second))


def images(n: int, shape: tuple[int, int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn((n, *shape), generator=generator(seed))


@pytest.mark.parametrize("name", SAMPLE)
def test_weights_and_buffers_are_torchvisions_and_training_draws_from_no_global_generator(name):
    with global_rng_untouched():
        net = build(NetSpec(name), (3, 32, 32), CLASSES, generator(5))
    assert equal(net, own(name, 5)) and net.training
    with global_rng_untouched():
        logits = net(images(3, (3, 32, 32)))
        loss = F.cross_entropy(logits, torch.tensor([0, 6, 3]))
        loss.backward()
    assert logits.shape == (3, CLASSES) and loss.isfinite()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


def test_another_seed_gives_other_weights_and_one_generator_goes_on():
    one = generator(2)
    first, second = (build(NetSpec("squeezenet1_1"), (3, 32, 32), CLASSES, one) for _ in range(2))
    assert equal(first, build(NetSpec("squeezenet1_1"), (3, 32, 32), CLASSES, generator(2)))
    assert not equal(first, second)
    assert not torch.equal(one.get_state(), generator(2).get_state())


def test_bare_parameters_start_as_torchvision_has_them():
    net = build(NetSpec("convnext_tiny"), (3, 32, 32), CLASSES, generator())
    scales = [p for name, p in net.named_parameters() if name.endswith("layer_scale")]
    assert len(scales) == 18 and all((p == 1e-6).all() for p in scales)


def test_vision_transformers_are_built_for_the_size_of_the_images():
    net = build(NetSpec("vit_b_32"), (3, 64, 64), CLASSES, generator(5))
    parameters = {name.removeprefix("net."): p.detach() for name, p in net.named_parameters()}
    assert parameters["encoder.pos_embedding"].shape == (1, 1 + 4, 768)
    assert parameters["encoder.pos_embedding"].std().item() == pytest.approx(0.02, rel=0.1)
    fan_in = 3 * 32 * 32  # of a patch; torchvision draws it from a normal cut off at two
    assert parameters["conv_proj.weight"].std().item() == pytest.approx(fan_in**-0.5, rel=0.2)
    assert not parameters["class_token"].any() and not parameters["heads.head.weight"].any()
    assert net.eval()(images(2, (3, 64, 64))).shape == (2, CLASSES)


@pytest.mark.parametrize("name", SMALL)
def test_grey_images_are_three_equal_channels(name):
    net = build(NetSpec(name), (1, 64, 64), CLASSES, generator(5)).eval()
    x = images(2, (1, 64, 64))
    expected = own(name, 5).eval()(x.repeat(1, 3, 1, 1))
    np.testing.assert_allclose(net(x).detach(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_give_one_tensor_in_training(name):
    side = 75 if name == "inception_v3" else 32
    net = build(NetSpec(name), (3, side, side), CLASSES, generator())
    assert net(images(2, (3, side, side))).shape == (2, CLASSES)
    assert not any("aux" in key for key in net.state_dict())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "inception_v3",
            (3, 32, 32),
            "'inception_v3' takes images from 75x75 pixels on; these are 32x32\n.*=75",
        ),
        (
            "squeezenet1_1",
            (3, 9, 40),
            "'squeezenet1_1' takes images from 17x17 pixels on; these are 9x40\n.*=17",
        ),
        ("vit_b_16", (3, 40, 40), "two equal sides that 16 divides; these are 40x40\n.*dataset.size=48"),
        ("vit_b_16", (3, 32, 48), "two equal sides that 16 divides; these are 32x48\n.*dataset.size=48"),
        ("maxvit_t", (3, 64, 64), "sides that 224 divides; these are 64x64\n.*dataset.size=224"),
        ("squeezenet1_1", (2, 32, 32), "takes 1 or 3 channels, the images have 2\n"),
        ("squeezenet1_1", (3, 7, 32), "7x32 pixels are too small for a network\n"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_the_size_that_does(name, shape, message):
    with global_rng_untouched(), pytest.raises(UsageError, match=message) as raised:
        build(NetSpec(name), shape, CLASSES, generator())
    assert "\n" not in raised.value.cause


def test_the_smallest_size_named_is_the_smallest_that_works():
    with pytest.raises(UsageError, match="from 17x17"):
        build(NetSpec("squeezenet1_1"), (3, 16, 16), CLASSES, generator())
    net = build(NetSpec("squeezenet1_1"), (3, 17, 17), CLASSES, generator())
    assert net(images(2, (3, 17, 17))).shape == (2, CLASSES)


def test_a_batch_of_another_size_is_refused():
    net = build(NetSpec("squeezenet1_1"), (3, 32, 32), CLASSES, generator())
    with pytest.raises(UsageError, match=r"\(3, 40, 40\) do not fit a network built for \(3, 32, 32\)"):
        net(images(2, (3, 40, 40)))


@pytest.mark.parametrize(("key", "value"), [("width", 9), ("depth", 3), ("norm", "group")])
def test_options_mean_nothing_to_them(key, value):
    spec = replace(NetSpec("squeezenet1_1"), **{key: value})
    with pytest.raises(UsageError, match=f"network.{key}={value} means nothing to network 'squeezenet1_1'"):
        resolve(spec, (3, 32, 32))
    assert resolve(NetSpec("squeezenet1_1"), (3, 32, 32)) == NetSpec("squeezenet1_1")


def test_feature_maps_are_refused_by_the_name_of_the_network():
    net = build(NetSpec("squeezenet1_1"), (3, 32, 32), CLASSES, generator())
    with pytest.raises(UsageError, match="network 'squeezenet1_1' gives logits only.*\n.*network=convnet"):
        net.features(images(2, (3, 32, 32)))


@pytest.mark.parametrize("name", SMALL)
def test_a_used_network_drawn_again_equals_a_fresh_build(name):
    net = build(NetSpec(name), (3, 32, 32), CLASSES, generator(8))
    net(images(3, (3, 32, 32))).sum().backward()
    pointers = [p.data_ptr() for p in net.parameters()]
    fresh = build(NetSpec(name), (3, 32, 32), CLASSES, generator(9))
    assert not equal(net, fresh)
    assert reinitialise(net, generator(9)) is net and equal(net, fresh)
    assert pointers == [p.data_ptr() for p in net.parameters()]


def test_copies_and_pickles_are_the_same_network():
    net = build(NetSpec("squeezenet1_1"), (3, 32, 32), CLASSES, generator(8)).eval()
    x = images(2, (3, 32, 32))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.spec == net.spec and torch.equal(other(x), net(x))


@pytest.mark.parametrize("name", ["regnet_x_400mf", "swin_v2_t"])
def test_their_layout_is_known_without_storage(name):
    with torch.device("meta"):
        net = find_network(name)((3, 32, 32), CLASSES)
    assert all(t.device.type == "meta" for t in net.state_dict().values())
    assert count_parameters(net) == count_parameters(own(name, 0))


def test_batch_norm_is_known_from_a_spec_and_from_a_network():
    expected = {"mobilenet_v3_small": True, "squeezenet1_1": False, "convnext_tiny": False}
    with global_rng_untouched():
        assert {name: has_batch_norm(NetSpec(name)) for name in expected} == expected
    net = build(NetSpec("mobilenet_v3_small"), (3, 32, 32), CLASSES, generator())
    assert has_batch_norm(net) and layout(torch.device("cpu"), net) == torch.channels_last


def test_our_own_networks_win_and_all_other_classifiers_are_found():
    ours = {name for name in names() if name in NETWORKS}
    assert ours == {"alexnet", "efficientnet_b0", "mobilenet_v2", "resnet18", "vgg11"}
    assert all(find_network(name) is NETWORKS[name] for name in ours)
    assert all(find_network(name).defaults((3, 32, 32)) == {} for name in set(names()) - ours)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "r3d_18", "quantized_resnet50"])
def test_networks_that_classify_no_images_are_unknown(name):
    with pytest.raises(UsageError, match=f"unknown network '{name}'"):
        find_network(name)


def test_unknown_names_get_the_nearest_of_torchvisions_too():
    with pytest.raises(
        UsageError, match=r"unknown network 'resnet5O'\nDid you mean 'resnet50'\?.*MODULE:NAME"
    ):
        find_network("resnet5O")


def test_the_listing_counts_them_and_names_the_other_ways():
    rows = {name: (origin, text) for name, origin, text in catalog.listing("networks")}
    assert rows["TORCHVISION_NAME"][0] == "torchvision"
    assert f" {len(names())} classifiers" in rows["TORCHVISION_NAME"][1]
    assert "my_nets:MyNet" in rows["MODULE:NAME"][1]


def test_grids_name_networks_of_ours_that_are_of_different_families():
    assert set(GRID) <= set(NETWORKS) and set(GRAPH_GRID) <= set(GRAPH_NETWORKS)
    assert len({family(name) for name in GRID}) == len(GRID) == 5 and len(set(GRAPH_GRID)) == 4
