"""The networks: a registry, and builders that draw every weight from a generator of the caller's.

A network class gives its options with `defaults(shape)`, is built as `Class(shape, classes, **options)`, and
its networks have `features(x, tap)` and logits when called (see `core.Network`). torchvision's classifiers go
by their names there, and a network of the user's own by its import path, `my_package.my_module:MyNet` (see
`torchvision_nets` and `imported`); both give logits only, unless the user's has `features`. What goes by its
import path goes by a name where a distribution gives it one in the entry-point group `ddengine.networks`.
"""

import difflib
import re
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddengine import plugins
from ddengine.errors import UsageError, require_positive
from ddengine.nets.classic import VGG11, AlexNet, LeNet
from ddengine.nets.convnet import ConvNet, default_depth
from ddengine.nets.core import (
    NORMS,
    Features,
    Foreign,
    ForeignNetwork,
    NetSpec,
    Network,
    Tap,
    initialise,
    is_import_path,
)
from ddengine.nets.imported import as_network, find_imported, import_network, problem
from ddengine.nets.mlp import MLP
from ddengine.nets.mobile import EfficientNetB0, MobileNetV2, ShuffleNetV2
from ddengine.nets.resnet import ResNet18
from ddengine.nets.vit import ViT

__all__ = [
    "GRAPH_GRID", "GRID", "NETWORKS", "NORMS", "Features", "NetSpec", "Network", "NetworkClass", "Tap",
    "build", "count_parameters", "default_depth", "family", "find_network", "has_batch_norm",
    "import_network", "is_import_path", "reinitialise", "resolve",
]  # fmt: skip

OPTIONS = ("width", "depth", "norm")
SMALLEST = 8  # pixels of the shorter side that every network of ours can take
GRID = ("convnet", "alexnet", "vgg11", "resnet18", "vit")  # across architectures, each of another family
GRAPH_GRID = ("gcn", "gin", "gat", "sage")


@runtime_checkable
class NetworkClass(Protocol):
    """What the registry holds: `defaults` names the options that the network has; calling builds it."""

    def defaults(self, shape: tuple[int, int, int]) -> dict[str, Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module: ...


NETWORKS: dict[str, NetworkClass] = {
    "convnet": ConvNet,
    "mlp": MLP,
    "lenet": LeNet,
    "alexnet": AlexNet,
    "vgg11": VGG11,
    "resnet18": ResNet18,
    "vit": ViT,
    "mobilenet_v2": MobileNetV2,
    "efficientnet_b0": EfficientNetB0,
    "shufflenet_v2": ShuffleNetV2,
}


def find_network(name: str) -> NetworkClass:
    """The network class called `name`: ours, a plug-in's, torchvision's, or one imported before.

    Raises UsageError, which lists the known ones, for a plug-in that does not load, and for an import path
    that `import_network` was not given.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if is_import_path(name):
        return find_imported(name)
    if name in import_module("ddengine.nets.graph").GRAPH_NETWORKS:  # it imports us
        raise UsageError(
            f"network {name} works on graphs; images take: {', '.join(NETWORKS)}",
            "Give one of them, such as network=convnet",
        )
    plugin = plugins.find("networks", name)
    if plugin is not None:
        return as_network(name, plugin.load(problem))
    torchvision = import_module("ddengine.nets.torchvision_nets")  # seconds of import
    if name in torchvision.names():
        return torchvision.torchvision_network(name)
    raise _unknown(name, [*NETWORKS, *(other.name for other in plugins.of("networks"))], torchvision.names())


def _unknown(name: str, listed: list[str], others: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, [*listed, *others], n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    also = "any classifier of torchvision, or your own as MODULE:NAME"
    return UsageError(f"unknown network '{name}'", f"{hint}Known: {', '.join(sorted(listed))}; {also}")


def resolve(spec: NetSpec, shape: tuple[int, int, int]) -> NetSpec:
    """`spec` with the defaults for images of `shape` filled in; options that the network lacks stay None.

    Raises UsageError for an unknown network, an option given that it lacks, and images under 8 pixels.
    """
    require_positive("image channels", shape[0])
    if min(shape[1:]) < SMALLEST:
        raise UsageError(
            f"images of {shape[1]}x{shape[2]} pixels are too small for a network",
            f"Enlarge them to at least {SMALLEST}x{SMALLEST}",
        )
    defaults = find_network(spec.name).defaults(shape)
    given = {key: getattr(spec, key) for key in OPTIONS if getattr(spec, key) is not None}
    untold = "none, unless it tells them by defaults(shape)" if is_import_path(spec.name) else "none"
    for key, value in given.items():
        if key not in defaults:
            raise UsageError(
                f"network.{key}={value} means nothing to network '{spec.name}'",
                f"Leave network.{key} out; its options are: {', '.join(defaults) or untold}",
            )
    return replace(spec, **(defaults | given))


def build(spec: NetSpec, shape: tuple[int, int, int], classes: int, generator: torch.Generator) -> nn.Module:
    """A network for images of `shape` (c, h, w) on the CPU, in train mode, weights drawn from `generator`.

    The same generator state gives the same weights, and no global generator is touched. Raises UsageError
    as `resolve` does, for option values that do not suit the images, and for images that a network which is
    not ours does not take.
    """
    found = find_network(spec.name)
    if isinstance(found, Foreign):
        require_positive("classes", classes)
        return found.built(shape, classes, generator, **_options(resolve(spec, shape)))
    net = _skeleton(spec, shape, classes)
    # not `to_empty`: it loads torch's symbolic shapes, two seconds of import
    return initialise(net._apply(lambda t: torch.empty(t.shape, dtype=t.dtype)), generator)


def reinitialise(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw all weights of `net` again in place: the bits of a fresh `build` without its allocations."""
    if not isinstance(net, ForeignNetwork):
        return initialise(net, generator)
    fresh = build(net.spec, net.shape, net.classes, generator)
    assert isinstance(fresh, ForeignNetwork)
    with torch.no_grad():
        for mine, theirs in zip(_tensors(net), _tensors(fresh), strict=True):
            mine.copy_(theirs)
    net.draws = fresh.draws
    return net


def has_batch_norm(of: NetSpec | nn.Module) -> bool:
    """Whether a network, or any network built from a spec, normalises over the batch."""
    net = _example(of) if isinstance(of, NetSpec) else of
    return any(isinstance(module, _BatchNorm) for module in net.modules())


def count_parameters(net: nn.Module) -> int:
    """Number of weights, buffers not included."""
    return sum(parameter.numel() for parameter in net.parameters())


def family(name: str) -> str:
    """The family of a network, its name up to the first non-letter: "resnet" for resnet18.

    An import path is a family of its own.
    """
    return name if is_import_path(name) else re.split(r"[^a-z]", name, maxsplit=1)[0] or name


def _skeleton(spec: NetSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network without storage, so that its constructors draw nothing."""
    require_positive("classes", classes)
    options = _options(resolve(spec, shape))
    with torch.device("meta"):
        net = find_network(spec.name)(shape, classes, **options)
    for name, _ in net.named_buffers():
        if not isinstance(net.get_submodule(name.rpartition(".")[0]), _BatchNorm):
            raise UsageError(
                f"network '{spec.name}' has the buffer '{name}', which a seeded start cannot fill",
                "Compute it in forward; only batch norm may have buffers",
            )
    return net


def _example(spec: NetSpec) -> nn.Module:
    """Some network of `spec`, not to be used: for images of a size that it takes, whatever its depth."""
    found = find_network(spec.name)
    if not isinstance(found, Foreign):
        return _skeleton(replace(spec, depth=None), (3, 32, 32), 2)
    shape = (3, 224, 224) if found.colour else (3, 32, 32)
    return found(shape, 2, **_options(resolve(spec, shape)))


def _options(full: NetSpec) -> dict[str, Any]:
    return {key: getattr(full, key) for key in OPTIONS if getattr(full, key) is not None}


def _tensors(net: nn.Module) -> list[torch.Tensor]:
    return [*net.parameters(), *net.buffers()]
