"""The networks: a registry, and builders that draw every weight from a generator of the caller's.

A network class gives its options with `defaults(shape)`, is built as `Class(shape, classes, **options)`, and
its networks have `features(x, tap)` and logits when called (see `core.Network`). Other packages add theirs
through the entry-point group `ddengine.networks`.
"""

import re
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddengine.errors import UsageError, require_positive, unknown
from ddengine.nets.classic import VGG11, AlexNet, LeNet
from ddengine.nets.convnet import ConvNet, default_depth
from ddengine.nets.core import NORMS, Features, NetSpec, Network, Tap, initialise
from ddengine.nets.mlp import MLP
from ddengine.nets.mobile import EfficientNetB0, MobileNetV2, ShuffleNetV2
from ddengine.nets.resnet import ResNet18
from ddengine.nets.vit import ViT

__all__ = [
    "NETWORKS", "NORMS", "Features", "NetSpec", "Network", "NetworkClass", "Tap", "build",
    "count_parameters", "default_depth", "family", "find_network", "has_batch_norm", "reinitialise",
    "resolve",
]  # fmt: skip

GROUP = "ddengine.networks"
OPTIONS = ("width", "depth", "norm")
SMALLEST = 8  # pixels of the shorter side that every network can take


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
    """The network class called `name`, ours or an installed package's (UsageError lists the known ones)."""
    if name in NETWORKS:
        return NETWORKS[name]
    plugins = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in plugins and name in import_module("ddengine.nets.graph").GRAPH_NETWORKS:  # it imports us
        raise UsageError(
            f"network {name} works on graphs; images take: {', '.join(NETWORKS)}",
            "Give one of them, such as network=convnet",
        )
    if name not in plugins:
        raise unknown("network", name, [*NETWORKS, *plugins])
    found = plugins[name].load()
    if not isinstance(found, NetworkClass):
        raise UsageError(
            f"network '{name}' of {plugins[name].value} has no defaults(shape)",
            "Give the class a static method that returns its options, {} for none",
        )
    return found


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
    for key, value in given.items():
        if key not in defaults:
            raise UsageError(
                f"network.{key}={value} means nothing to network '{spec.name}'",
                f"Leave network.{key} out; its options are: {', '.join(defaults) or 'none'}",
            )
    return replace(spec, **(defaults | given))


def build(spec: NetSpec, shape: tuple[int, int, int], classes: int, generator: torch.Generator) -> nn.Module:
    """A network for images of `shape` (c, h, w) on the CPU, in train mode, weights drawn from `generator`.

    The same generator state gives the same weights, and no global generator is touched. Raises UsageError
    as `resolve` does, and for option values that do not suit the images.
    """
    net = _skeleton(spec, shape, classes)
    # not `to_empty`: it loads torch's symbolic shapes, two seconds of import
    return initialise(net._apply(lambda t: torch.empty(t.shape, dtype=t.dtype)), generator)


def reinitialise(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw all weights of `net` again in place: the bits of a fresh `build` without its allocations."""
    return initialise(net, generator)


def has_batch_norm(of: NetSpec | nn.Module) -> bool:
    """Whether a network, or any network built from a spec, normalises over the batch."""
    net = _skeleton(replace(of, depth=None), (3, 32, 32), 2) if isinstance(of, NetSpec) else of
    return any(isinstance(module, _BatchNorm) for module in net.modules())


def count_parameters(net: nn.Module) -> int:
    """Number of weights, buffers not included."""
    return sum(parameter.numel() for parameter in net.parameters())


def family(name: str) -> str:
    """The family of a network, its name up to the first non-letter: "resnet" for resnet18."""
    return re.split(r"[^a-z]", name, maxsplit=1)[0] or name


def _skeleton(spec: NetSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network without storage, so that its constructors draw nothing."""
    require_positive("classes", classes)
    full = resolve(spec, shape)
    options = {key: getattr(full, key) for key in OPTIONS if getattr(full, key) is not None}
    with torch.device("meta"):
        net = find_network(spec.name)(shape, classes, **options)
    for name, _ in net.named_buffers():
        if not isinstance(net.get_submodule(name.rpartition(".")[0]), _BatchNorm):
            raise UsageError(
                f"network '{spec.name}' has the buffer '{name}', which a seeded start cannot fill",
                "Compute it in forward; only batch norm may have buffers",
            )
    return net
