"""Networks of the user's own by import path: what is called how, seeds, processes, and what is refused."""

import copy
import os
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from torch import nn

import synth
from ddengine.errors import UsageError
from ddengine.nets import (
    NetSpec,
    Network,
    build,
    family,
    find_network,
    has_batch_norm,
    import_network,
    imported,
    is_import_path,
    reinitialise,
    resolve,
)
from ddengine.parallel import job_pool

SHAPE, CLASSES = (3, 11, 13), 5

NETS = """
import random
import json
import numpy as np
import synth
import torch
from torch import nn

torch.manual_seed(77)
np.random.seed(77)
random.seed(77)
FOUND = synth.__file__, json.__file__


class Usual(nn.Module):
    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 7, 3)
        self.norm = nn.BatchNorm2d(7)
        self.bare = nn.Parameter(torch.tensor(np.random.normal(size=3)).float() + random.gauss(0, 1))
        self.last = nn.Linear(7, num_classes)
        self.register_buffer("table", torch.arange(7.0), persistent=False)

    def forward(self, x):
        z = self.norm(self.conv(x)).relu().mean((2, 3)) * self.table
        return self.last(nn.functional.dropout(z, 0.5, self.training)) + self.bare.sum()


class Sized(nn.Module):
    def __init__(self, channels, img_size, classes):
        super().__init__()
        h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.last = nn.Linear(channels * h * w, classes)

    def forward(self, x):
        return self.last(x.flatten(1))


class Full(nn.Module):
    @staticmethod
    def defaults(shape):
        return {"width": shape[0] + 1, "norm": "none"}

    def __init__(self, shape, classes, width, norm):
        super().__init__()
        self.conv, self.last = nn.Conv2d(shape[0], width, 3), nn.Linear(width, classes)

    def features(self, x, tap=None):
        z = self.conv(x).relu()
        return z.mean((2, 3)), [] if tap is None else [tap(0, z)]

    def forward(self, x):
        return self.last(self.features(x)[0])


def factory(num_classes):
    return Usual(num_classes=num_classes)


class Lazy(nn.Module):
    def __init__(self, classes, **more):
        super().__init__()
        self.last = nn.LazyLinear(classes)

    def forward(self, x):
        return self.last(x.flatten(1))


class Holder:
    Inner = Usual


class Wide(Usual):
    def __init__(self, num_classes):
        super().__init__(num_classes + 1)


class Auxiliary(Usual):
    def forward(self, x):
        return (super().forward(x),) * 2 if self.training else super().forward(x)


class Odd(Usual):
    def __init__(self, num_classes, patches):
        super().__init__(num_classes)


class Options(Usual):
    @staticmethod
    def defaults(shape):
        return {"heads": 3}


class Breaks(Usual):
    def __init__(self, num_classes):
        raise ValueError("no\\nsuch thing")


class BreaksLater(Usual):
    def forward(self, x):
        raise ValueError("too narrow")


class Frozen(Usual):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.requires_grad_(False)


class Undefined(Usual):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Leaves(Usual):
    def __init__(self, num_classes):
        raise SystemExit(0)


class LeavesLater(Usual):
    def forward(self, x):
        raise SystemExit(4)


class Embedded(Usual):
    def features(self, x, tap):
        return None


class Pooled(Usual):
    def features(self, x, tap):
        return x.mean(), []


def nothing(num_classes):
    return None


def weightless(num_classes):
    return nn.Flatten()


made = nn.Linear(3, 5)
number = 3
"""
JOBS = """
import os
import torch
from ddengine.nets import build

def rebuilt(net, spec):
    x = torch.ones((3, 3, 11, 13))
    made = build(spec, (3, 11, 13), 5, torch.Generator().manual_seed(4))
    return os.getpid(), made(x).tolist(), net(x).tolist()
"""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int, shape: tuple[int, int, int] = SHAPE, seed: int = 1) -> torch.Tensor:
    return torch.randn((n, *shape), generator=generator(seed))


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = ([*net.parameters(), *net.buffers()] for net in (a, b))
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder of a user: networks, and files named as ours and as Python's own."""
    place = tmp_path / "mine"
    (place / "package").mkdir(parents=True)
    (place / "my_nets.py").write_text(NETS)
    (place / "package" / "inner.py").write_text("from my_nets import Usual as Net")
    (place / "broken.py").write_text("import torch\n1 / 0")
    (place / "leaves.py").write_text("raise SystemExit(3)")
    (place / "needs.py").write_text("import not_there_either")
    for name in ("synth", "json", "ddengine", "torch"):
        (place / f"{name}.py").write_text("raise AssertionError('a decoy was imported')")
    monkeypatch.chdir(place)
    monkeypatch.setattr(imported, "_given", {})
    before = set(sys.modules)
    yield place
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("my_nets", "package"):
            del sys.modules[name]


def made(name: str, seed: int = 4, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    import_network(name)
    return build(NetSpec(name), shape, CLASSES, generator(seed))


@pytest.mark.parametrize("name", ["Usual", "Sized", "Full", "factory", "Lazy", "Holder.Inner"])
@pytest.mark.parametrize("shape", [SHAPE, (3, 9, 9)], ids=str)
def test_what_a_constructor_asks_for_by_name_is_given(name, shape):
    net = made(f"my_nets:{name}", shape=shape)
    assert net(images(4, shape)).shape == (4, CLASSES) and net.training


def test_channels_are_given_where_there_is_a_default_too():
    assert made("my_nets:Usual", shape=(2, 9, 9)).net.conv.in_channels == 2


def test_modules_in_packages_of_the_folder_are_found_and_hide_nothing():
    path, finders = list(sys.path), list(sys.meta_path)
    assert made("package.inner:Net")(images(2)).shape == (2, CLASSES)
    assert (sys.path, sys.meta_path) == (path, finders) and str(Path.cwd()) not in path
    ours, pythons = sys.modules["my_nets"].FOUND
    assert ours == synth.__file__ and str(Path.cwd()) not in pythons


def test_equal_seeds_give_equal_networks_and_others_do_not():
    one, two, other = (made("my_nets:Usual", seed) for seed in (4, 4, 5))
    assert equal(one, two)
    others = dict(other.named_parameters())
    same = {name for name, p in one.named_parameters() if torch.equal(p, others[name])}
    assert same == {"net.norm.weight", "net.norm.bias"}


def test_weights_are_those_of_the_constructor_under_the_generators_state():
    net = made("my_nets:Usual", 4)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(4)
        assert torch.equal(net.net.conv.weight, nn.Conv2d(3, 7, 3).weight)


def test_import_build_and_training_leave_the_global_generators_alone():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    net = made("my_nets:Usual")
    net(images(3)).sum().backward()
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_dropout_follows_the_seed_and_not_the_global_generator():
    one, two, other = (made("my_nets:Usual", seed) for seed in (4, 4, 5))
    other.load_state_dict(one.state_dict())
    x = images(31)
    with global_rng_untouched():
        first = one(x)
        torch.rand(3, generator=generator())
        assert torch.equal(first, two(x))
        assert not torch.equal(one(x), first) and not torch.equal(other(x), first)
    assert torch.equal(one.eval()(x), one(x))


def test_a_used_network_drawn_again_equals_a_fresh_build_in_its_dropout_too():
    net, fresh, x = made("my_nets:Usual", 4), made("my_nets:Usual", 9), images(31)
    net(x)
    assert reinitialise(net, generator(9)) is net and equal(net, fresh)
    assert torch.equal(net(x), fresh(x))


def test_options_are_those_that_defaults_names():
    import_network("my_nets:Full")
    spec = NetSpec("my_nets:Full")
    assert resolve(spec, SHAPE) == NetSpec("my_nets:Full", width=4, norm="none")
    net = build(NetSpec("my_nets:Full", width=9), SHAPE, CLASSES, generator())
    assert net.net.conv.out_channels == 9
    with pytest.raises(UsageError, match="network.depth=2 means nothing to network 'my_nets:Full'"):
        resolve(NetSpec("my_nets:Full", depth=2), SHAPE)
    import_network("my_nets:Usual")
    with pytest.raises(UsageError, match="network.width=2 means nothing to network 'my_nets:Usual'"):
        resolve(NetSpec("my_nets:Usual", width=2), SHAPE)


def test_feature_maps_come_from_a_network_that_has_them():
    full, usual = made("my_nets:Full"), made("my_nets:Usual")
    assert isinstance(full, Network)
    embedding, taps = full.features(images(2), lambda level, z: (level, tuple(z.shape)))
    assert embedding.shape == (2, 4) and taps == [(0, (2, 4, 9, 11))]
    with pytest.raises(UsageError, match="network 'my_nets:Usual' gives logits only"):
        usual.features(images(2))


def test_batch_norm_is_known_and_a_path_is_a_family():
    import_network("my_nets:Usual")
    assert has_batch_norm(NetSpec("my_nets:Usual")) and not has_batch_norm(made("my_nets:Full"))
    assert family("my_nets:Usual") == "my_nets:Usual" != family("my_nets:Full")
    assert is_import_path("my_nets:Usual") and not is_import_path("resnet18")


def test_copies_and_pickles_are_the_same_network():
    net = made("my_nets:Usual")
    x = images(31)
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    expected = net(x)
    assert all(torch.equal(other(x), expected) and other.spec == net.spec for other in copies)


def test_a_worker_process_imports_it_from_where_this_process_did(tmp_path, monkeypatch):
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "rebuild_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(jobs)
    from rebuild_jobs import rebuilt

    net = made("my_nets:Usual")
    with job_pool(rebuilt, net, 2) as results:
        [(process, made_there, sent_there)] = results([NetSpec("my_nets:Usual")])
    expected = net(torch.ones((3, *SHAPE))).tolist()
    assert process != os.getpid() and made_there == sent_there == expected


def test_only_what_was_given_is_imported(folder):
    (folder / "evil_nets.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Net: pass")
    for call in (
        lambda: find_network("evil_nets:Net"),
        lambda: resolve(NetSpec("evil_nets:Net"), SHAPE),
        lambda: build(NetSpec("evil_nets:Net"), SHAPE, CLASSES, generator()),
        lambda: has_batch_norm(pickle.loads(pickle.dumps(NetSpec("evil_nets:Net")))),
    ):
        with pytest.raises(
            UsageError, match="'evil_nets:Net' .*\nGive network=evil_nets:Net yourself"
        ) as raised:
            call()
        assert "\n" not in raised.value.cause
    with pytest.raises(UsageError, match="'os:abort'"):
        find_network("os:abort")
    assert not (folder / "ran").exists() and "evil_nets" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_nets:Usuall",
            r"no 'Usuall' in .*my_nets.py\nDid you mean 'Usual'\? There is: .*Full, .*factory",
        ),
        ("my_nets:Holder.Inne", r"no 'Inne' in .*\nDid you mean 'Inner'\?"),
        ("my_net:Usual", r"there is no module 'my_net'\n.*mine"),
        ("package.other:Usual", r"there is no module 'package.other'\n.*mine"),
        ("broken:Net", "it fails with ZeroDivisionError: division by zero\n"),
        ("leaves:Net", "it fails with SystemExit: 3\n"),
        ("needs:Net", "it fails with ModuleNotFoundError: No module named 'not_there_either'\n"),
        ("my_nets:", "is not an import path\nWrite MODULE:NAME"),
        (":Net", "is not an import path"),
        ("a/b:Net", "is not an import path"),
        ("..my_nets:Net", "is not an import path"),
        ("my_nets:Net:more", "is not an import path"),
        ("__main__:Net", "lies in the main program"),
        ("my_nets:made", "'my_nets:made' is a Linear, neither a class nor a function"),
        ("my_nets:number", "'my_nets:number' is a int, neither a class nor a function"),
    ],
)
def test_paths_that_lead_to_no_network_are_refused(name, message):
    with pytest.raises(UsageError, match=message) as raised:
        import_network(name)
    assert "\n" not in raised.value.cause


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Wide", r"'my_nets:Wide' gives \(2, 6\) for 2 images of 5 classes\n.*\(2, 5\)"),
        ("Odd", "needs 'patches', which means nothing here\n.*num_classes, in_channels"),
        ("Options", "has the defaults {'heads': 3}\n.*width, depth and norm"),
        ("Breaks", r"classes it fails \(ValueError: no such thing\)"),
        ("BreaksLater", r"fails on two images of \(3, 11, 13\): ValueError: too narrow\n"),
        ("Frozen", "has no weight that may be trained: all have requires_grad=False"),
        ("Undefined", "gives logits of blank images that are not finite"),
        ("Leaves", r"classes it fails \(SystemExit: 0\)"),
        ("LeavesLater", r"fails on two images of .*sys.exit\(4\)"),
        ("nothing", "makes a NoneType that is no module with weights"),
        ("weightless", "makes a Flatten that is no module with weights"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(name, message):
    import_network(f"my_nets:{name}")
    with pytest.raises(UsageError, match=message) as raised:
        build(NetSpec(f"my_nets:{name}"), SHAPE, CLASSES, generator())
    assert "\n" not in raised.value.cause


@pytest.mark.parametrize(("name", "given"), [("Embedded", "NoneType"), ("Pooled", "no matrix")])
def test_features_that_are_no_embedding_of_each_image_are_refused(name, given):
    with pytest.raises(UsageError, match=f"features of network 'my_nets:{name}' gives {given}\n.*embedding"):
        made(f"my_nets:{name}").features(images(3), lambda z: z)


def test_an_output_of_training_that_is_no_tensor_is_refused():
    net = made("my_nets:Auxiliary")
    with pytest.raises(UsageError, match="'my_nets:Auxiliary' gives tuple for 3 images of 5 classes"):
        net(images(3))


def test_an_installed_module_serves_as_well_as_a_file():
    net = made("ddengine.nets.mlp:MLP")
    assert net.net.features(images(2)).embedding.shape == (2, 128)
    assert net(images(2)).shape == (2, CLASSES)
