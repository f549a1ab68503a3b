"""What every network has: a spec, feature maps through one interface, seeded initial weights."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddengine.errors import UsageError, require, require_positive

NORMS = ("instance", "batch", "group", "layer", "none")
Tap = Callable[[int, Tensor], Any]


class Features(NamedTuple):
    """`embedding` is the flattened trunk output [n d]; `taps` is what the tap returned for each ReLU map."""

    embedding: Tensor
    taps: list[Any]


@runtime_checkable
class Network(Protocol):
    """A network gives logits when called and, through `features`, what lies under them."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def features(self, x: Tensor, tap: Tap | None = None) -> Features: ...


@dataclass(frozen=True)
class NetSpec:
    """Which network to build; `None` means the network's own default (README, table of networks)."""

    name: str = "convnet"
    width: int | None = None
    depth: int | None = None
    norm: str | None = None

    def __post_init__(self) -> None:
        for key in ("width", "depth"):
            value = getattr(self, key)
            if value is not None:
                require_positive(f"network.{key}", value)
        if self.norm is not None:
            require(self.norm, NORMS, "network.norm")

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return asdict(self)


def normalisation(norm: str, channels: int) -> nn.Module:
    """The layer named `norm` for maps of `channels`; "instance" is GroupNorm(C, C, affine) as in DC."""
    if norm == "instance":
        return nn.GroupNorm(channels, channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(channels, 4), channels)
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    require(norm, NORMS, "network.norm")
    return nn.Identity()


def initialise(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw all weights of `net` in place from a CPU `generator`: PyTorch's default scheme, Kaiming-uniform
    with a = sqrt(5) for convolutions and linear layers (weights and biases uniform in +-1/sqrt(fan_in)),
    ones and zeros for norms, N(0, .02) for embeddings held as bare parameters.
    """
    with torch.no_grad():
        for module in net.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert isinstance(weight, Tensor)
                bound = 1 / math.sqrt(weight[0].numel())
                _uniform(weight, bound, generator)
                if module.bias is not None:
                    _uniform(module.bias, bound, generator)
            elif isinstance(module, nn.MultiheadAttention):
                assert module.in_proj_weight is not None
                _uniform(module.in_proj_weight, math.sqrt(6 / sum(module.in_proj_weight.shape)), generator)
                nn.init.zeros_(module.in_proj_bias)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm | _BatchNorm):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.fill_(1.0 if name == "weight" else 0.0)
                if isinstance(module, _BatchNorm):
                    module.reset_running_stats()
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(_cpu(parameter).normal_(0, 0.02, generator=generator))
    return net


def _uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    tensor.copy_(_cpu(tensor).uniform_(-bound, bound, generator=generator))


def _cpu(like: Tensor) -> Tensor:
    return torch.empty(like.shape, device="cpu", dtype=torch.float32)


def grows(shape: tuple[int, int, int]) -> bool:
    """Whether the first convolution pads 28-pixel grey images to 32, as the papers' networks do."""
    return shape == (1, 28, 28)


def check_input(x: Float[Tensor, "n c h w"], shape: tuple[int, int, int]) -> None:
    """Refuse a batch whose images are not of `shape` (UsageError)."""
    if tuple(x.shape[1:]) != shape:
        raise UsageError(
            f"images of shape {tuple(x.shape[1:])} do not fit a network built for {shape}",
            "Build the network with the shape of the images (c, h, w)",
        )
