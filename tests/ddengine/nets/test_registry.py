"""Building by name: defaults, refusals, seeds, and what is known of a network before and after."""

import pickle
import sys

import numpy as np
import plugged
import pool_jobs
import pytest
import torch
from torch import nn

from ddengine.errors import UsageError
from ddengine.nets import (
    NETWORKS,
    NetSpec,
    build,
    family,
    find_network,
    has_batch_norm,
    reinitialise,
    resolve,
)
from ddengine.parallel import job_pool

SMALL = {
    "convnet": NetSpec("convnet", width=5, norm="batch"), "mlp": NetSpec("mlp", width=7),
    "lenet": NetSpec("lenet"), "alexnet": NetSpec("alexnet", width=6, norm="group"),
    "vgg11": NetSpec("vgg11", width=3), "resnet18": NetSpec("resnet18", width=3),
    "vit": NetSpec("vit", width=10, depth=2), "mobilenet_v2": NetSpec("mobilenet_v2", width=3),
    "efficientnet_b0": NetSpec("efficientnet_b0", width=3),
    "shufflenet_v2": NetSpec("shufflenet_v2", width=2),
}  # fmt: skip
SHAPE = (3, 11, 17)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


PLUGINS = """
import torch
from torch import nn


class Plugin(nn.Module):
    @staticmethod
    def defaults(shape):
        return {"width": 11}

    def __init__(self, shape, classes, width):
        super().__init__()
        self.classifier = nn.Linear(shape[0] * width, classes)
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.classifier(x.mean((2, 3)).repeat(1, self.classifier.in_features // x.shape[1]))


def factory(in_channels, num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


value = nn.Linear(3, 5)
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """An installed distribution with a class, a factory, a value, and one of our names."""
    module = "more_networks"
    found = {"plugin": "Plugin", "made": "factory", "value": "value", "gone": "gone", "convnet": "Plugin"}
    entries = {name: f"{module}:{attribute}" for name, attribute in found.items()}
    plugged.install(tmp_path, "more-networks", {"networks": {**entries, "gin": "no:one"}}, PLUGINS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop(module, None)


@pytest.mark.parametrize("name", SMALL)
def test_equal_generators_give_equal_weights_and_others_do_not(name):
    one, two, other = (build(SMALL[name], SHAPE, 5, generator(seed)) for seed in (3, 3, 4))
    assert equal(one, two) and not equal(one, other)
    assert all(t.device.type == "cpu" and t.isfinite().all() for t in one.state_dict().values())


@pytest.mark.parametrize("name", SMALL)
def test_building_leaves_the_global_generators_alone(name):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()
    build(SMALL[name], SHAPE, 5, generator())
    after = np.random.get_state()
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before[1], after[1]) and numpy_before[2:] == after[2:]


@pytest.mark.parametrize("name", SMALL)
def test_a_used_network_drawn_again_equals_a_fresh_build(name):
    net = build(SMALL[name], SHAPE, 5, generator(8))
    net(torch.randn((3, *SHAPE), generator=generator(1))).sum().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    pointers = [p.data_ptr() for p in net.parameters()]
    fresh = build(SMALL[name], SHAPE, 5, generator(9))
    assert not equal(net, fresh)
    assert reinitialise(net, generator(9)) is net and equal(net, fresh)
    assert pointers == [p.data_ptr() for p in net.parameters()]


def test_the_order_of_draws_continues_in_one_generator():
    one = generator(2)
    first, second = (build(SMALL["mlp"], SHAPE, 5, one) for _ in range(2))
    assert not equal(first, second)
    assert equal(first, build(SMALL["mlp"], SHAPE, 5, generator(2)))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("convnet", (3, 32, 32), (128, 3, "instance")),
        ("convnet", (3, 64, 64), (128, 4, "instance")),
        ("convnet", (3, 128, 128), (128, 5, "instance")),
        ("convnet", (1, 8, 64), (128, 2, "instance")),
        ("mlp", (3, 32, 32), (128, 3, None)),
        ("lenet", (3, 32, 32), (None, None, None)),
        ("alexnet", (3, 32, 32), (128, None, "none")),
        ("vgg11", (3, 32, 32), (64, None, "instance")),
        ("resnet18", (3, 32, 32), (64, None, "batch")),
        ("vit", (3, 32, 32), (128, 6, None)),
        ("mobilenet_v2", (3, 32, 32), (32, None, "batch")),
        ("efficientnet_b0", (1, 8, 8), (32, None, "batch")),
        ("shufflenet_v2", (3, 96, 96), (24, None, "batch")),
    ],
)
def test_defaults_are_filled_in_and_stay(name, shape, expected):
    full = resolve(NetSpec(name), shape)
    assert (full.width, full.depth, full.norm) == expected
    assert resolve(full, shape) == full


def test_given_options_outrank_defaults():
    assert resolve(NetSpec("convnet", 9, 2, "none"), (3, 32, 32)) == NetSpec("convnet", 9, 2, "none")
    assert len(build(NetSpec("convnet", 9, 2, "none"), (3, 32, 32), 5, generator()).convs) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (NetSpec("mlp", norm="batch"), r"network.norm=batch means nothing to network 'mlp'\n.*width, depth"),
        (NetSpec("vit", norm="none"), r"network.norm=none means nothing to network 'vit'\n.*width, depth"),
        (NetSpec("lenet", width=9), r"network.width=9 means nothing to network 'lenet'\n.*options are: none"),
        (NetSpec("alexnet", depth=5), r"network.depth=5 means nothing to network 'alexnet'\n.*width, norm"),
        (NetSpec("vgg11", depth=8), r"network.depth=8 means nothing to network 'vgg11'\n.*width, norm"),
        (
            NetSpec("resnet18", depth=18),
            r"network.depth=18 means nothing to network 'resnet18'\n.*width, norm",
        ),
        (
            NetSpec("convnett"),
            r"unknown network 'convnett'\nDid you mean 'convnet'\?.*lenet, mlp, mobilenet_v2",
        ),
    ],
)
def test_unknown_names_and_options_that_mean_nothing_are_refused(spec, message):
    for call in (lambda: resolve(spec, SHAPE), lambda: build(spec, SHAPE, 5, generator())):
        with pytest.raises(UsageError, match=message):
            call()


def test_images_under_eight_pixels_are_refused():
    with pytest.raises(UsageError, match=r"7x9 pixels are too small for a network\nEnlarge"):
        build(NetSpec(), (3, 7, 9), 5, generator())


@pytest.mark.parametrize(("classes", "channels"), [(0, 3), (5, 0)])
def test_no_classes_and_no_channels_are_refused(classes, channels):
    with pytest.raises(UsageError, match="=0 is out of range"):
        build(NetSpec(), (channels, 9, 9), classes, generator())


def test_batch_norm_is_known_from_a_spec_and_from_a_network():
    with_it = {name for name in NETWORKS if has_batch_norm(NetSpec(name))}
    assert with_it == {"resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2"}
    for name, norm, expected in (
        ("convnet", "batch", True),
        ("vgg11", "layer", False),
        ("resnet18", "instance", False),
        ("shufflenet_v2", "group", False),
    ):
        spec = NetSpec(name, width=3, norm=norm)
        assert has_batch_norm(spec) == has_batch_norm(build(spec, SHAPE, 5, generator())) == expected
    assert has_batch_norm(NetSpec("convnet", depth=7, norm="batch")), (
        "a depth for larger images is no obstacle"
    )


def test_family_is_the_name_without_its_numbers():
    names = {
        **{name: name for name in NETWORKS},
        "vgg11": "vgg",
        "resnet18": "resnet",
        "resnet50": "resnet",
        "mobilenet_v2": "mobilenet",
        "efficientnet_b0": "efficientnet",
        "shufflenet_v2": "shufflenet",
        "": "",
    }
    assert {name: family(name) for name in names} == names


def test_networks_of_other_packages_are_built_by_name(plugins):
    assert resolve(NetSpec("plugin"), SHAPE) == NetSpec("plugin", width=11)
    net = build(NetSpec("plugin", width=4), SHAPE, 5, generator())
    assert net.net.classifier.weight.shape == (5, 12) and net.training
    assert equal(net, build(NetSpec("plugin", width=4), SHAPE, 5, generator()))
    assert not equal(net, build(NetSpec("plugin", width=4), SHAPE, 5, generator(1)))
    assert build(NetSpec("made"), SHAPE, 5, generator())(torch.zeros((2, *SHAPE))).shape == (2, 5)
    with pytest.raises(UsageError, match="network.width=4 means nothing to network 'made'"):
        resolve(NetSpec("made", width=4), SHAPE)
    with pytest.raises(UsageError, match=r"Did you mean 'plugin'\?.*made, mlp"):
        find_network("plugins")


def test_a_network_of_another_package_is_found_again_where_it_is_sent(plugins):
    spec, net = NetSpec("plugin", width=4), build(NetSpec("plugin", width=4), SHAPE, 5, generator())
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert equal(pickle.loads(pickle.dumps(net)), net)
    with job_pool(pool_jobs.built, SHAPE, workers=2) as mapped:
        seen = list(mapped([("plugin", 3), ("plugin", 4)]))
    for seed, weights in zip((3, 4), seen, strict=True):
        here = build(NetSpec("plugin"), SHAPE, 5, generator(seed))
        assert torch.equal(here.net.classifier.weight.detach(), weights)


def test_networks_of_other_packages_that_cannot_be_used_are_refused(plugins):
    place = r"\(plug-in of more-networks 1.0, more_networks:\w+\)\nRepair, update or uninstall more-networks"
    with pytest.raises(UsageError, match=f"'value' is a Linear, neither a class nor a function {place}"):
        find_network("value")
    with pytest.raises(UsageError, match=f"network 'gone' does not load: AttributeError: .*'gone' {place}"):
        build(NetSpec("gone"), SHAPE, 5, generator())


def test_a_plug_in_takes_none_of_our_names(plugins):
    assert find_network("convnet") is NETWORKS["convnet"]
    with pytest.raises(UsageError, match="network gin works on graphs"):
        find_network("gin")


def test_a_network_for_graphs_is_refused_for_images_by_what_it_works_on():
    with pytest.raises(UsageError, match="network gin works on graphs; images take: convnet, .*\nGive one"):
        find_network("gin")
