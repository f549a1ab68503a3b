"""What every network has: a spec, feature maps through one interface, seeded initial weights."""

import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddengine.errors import UsageError, require, require_positive

NORMS = ("instance", "batch", "group", "layer", "none")
Tap = Callable[[int, Tensor], Any]
_LENDING = threading.RLock()


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

    def __reduce__(self) -> tuple[Callable[..., "NetSpec"], tuple[Any, ...]]:
        """For a worker process, which imports a network of the user's from where this process did."""
        if not is_import_path(self.name):
            return NetSpec, astuple(self)
        imported = import_module("ddengine.nets.imported")  # it imports us
        return imported.received, (astuple(self), imported.folder_of(self.name))


def is_import_path(name: str) -> bool:
    """Whether a network's name says where to import it from, as `my_package.my_module:MyNet` does."""
    return ":" in name


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
                    drawn = _cpu(parameter).normal_(0, 0.02, generator=generator)
                    parameter.copy_(drawn, non_blocking=True)
    return net


def _uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    tensor.copy_(_cpu(tensor).uniform_(-bound, bound, generator=generator), non_blocking=True)


def _cpu(like: Tensor) -> Tensor:
    """Room for draws, from which a GPU copies while the next ones are made."""
    return torch.empty(like.shape, device="cpu", dtype=torch.float32, pin_memory=like.is_cuda)


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


@contextmanager
def lent(generator: torch.Generator, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, torch's global CPU generator is in the state of `generator`, which goes on where it ends; that
    of a CUDA `device` is seeded from it. Both are as before at the end.
    """
    # Constructors take no generator, and RegNet's and many users' cannot run on "meta", so weights could not
    # be drawn afterwards. The lock keeps out other networks; nothing else of ours draws from a global
    # generator, and a thread of the user's that does so at this moment changes the draws but breaks nothing.
    place = torch.device(device)
    cuda = []
    if place.type == "cuda":
        cuda = [torch.cuda.current_device() if place.index is None else place.index]
    with _LENDING, torch.random.fork_rng(cuda):
        torch.set_rng_state(generator.get_state())
        for index in cuda:
            seed = int(torch.randint(2**62, (), device="cpu"))
            torch.cuda.default_generators[index].manual_seed(seed)
        try:
            yield
        finally:
            generator.set_state(torch.get_rng_state())


class ForeignNetwork(nn.Module):
    """A network that is not ours: logits of images of `shape`, one channel given thrice where `grey`.

    `draws`, if there is one, is what its dropout and the like draw from in training.
    """

    def __init__(
        self, net: nn.Module, spec: NetSpec, shape: tuple[int, int, int], classes: int, grey: bool
    ) -> None:
        super().__init__()
        self.net, self.spec, self.shape, self.classes, self.grey = net, spec, shape, classes, grey
        self.draws: torch.Generator | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The spec comes first: a worker process imports the user's module by it, then finds the classes."""
        state = None if self.draws is None else self.draws.get_state().numpy().tobytes()
        return {"spec": self.spec, **self.__dict__, "draws": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The generator comes as bytes: its own pickle does not reach a process that was spawned."""
        super().__setstate__(state)
        if state["draws"] is not None:
            self.draws = torch.Generator()
            self.draws.set_state(torch.frombuffer(bytearray(state["draws"]), dtype=torch.uint8))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits; UsageError where the network gives anything else."""
        check_input(x, self.shape)
        x = x.expand(-1, 3, -1, -1) if self.grey else x
        if self.training and self.draws is not None:
            with lent(self.draws, x.device):
                logits = self.net(x)
        else:
            logits = self.net(x)
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != (len(x), self.classes):
            raise UsageError(
                f"network '{self.spec.name}' gives {found} for {len(x)} images of {self.classes} classes",
                f"Let it give logits of shape {(len(x), self.classes)}",
            )
        return logits

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """The network's own `features(x, tap)`; UsageError where it has none."""
        own = getattr(self.net, "features", None)
        if not inspect.isroutine(own) or "tap" not in inspect.signature(own).parameters:
            raise UsageError(
                f"network '{self.spec.name}' gives logits only, and here feature maps are matched",
                "Give a network that has features(x, tap), such as network=convnet",
            )
        check_input(x, self.shape)
        found = own(x, tap)
        pair = isinstance(found, tuple) and len(found) == 2
        if not pair or not isinstance(found[0], Tensor) or found[0].ndim != 2 or len(found[0]) != len(x):
            given = type(found).__name__ if not pair else list(getattr(found[0], "shape", [])) or "no matrix"
            raise UsageError(
                f"features of network '{self.spec.name}' gives {given}",
                "Let it give an embedding [n, d] and the list of what tap returned",
            )
        return Features(*found)


def _untrainable(net: nn.Module, logits: Tensor) -> str | None:
    """What keeps a network that gave these logits of blank images from being trained, in words."""
    if not any(parameter.requires_grad for parameter in net.parameters()):
        return "has no weight that may be trained: all have requires_grad=False"
    return None if bool(logits.isfinite().all()) else "gives logits of blank images that are not finite"


@dataclass(frozen=True)
class Foreign:
    """A network class whose constructor draws its own weights and fills its own buffers.

    `make(shape, classes, **options)` gives the network, `options(shape)` their defaults, `refusal` the error
    for images that it does not take; `stays_random` says that it may draw in training too; grey images are
    given to it as three equal channels where `colour`.
    """

    name: str
    make: Callable[..., nn.Module]
    options: Callable[[tuple[int, int, int]], dict[str, Any]]
    refusal: Callable[[ForeignNetwork, Exception], UsageError]
    stays_random: bool
    colour: bool

    def defaults(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return self.options(shape)

    def __call__(self, shape: tuple[int, int, int], classes: int, **options: Any) -> ForeignNetwork:
        """The network with the weights of one fixed seed, unchecked."""
        with lent(torch.Generator()):
            return self._wrapped(shape, classes, options)

    def built(
        self, shape: tuple[int, int, int], classes: int, generator: torch.Generator, **options: Any
    ) -> ForeignNetwork:
        """The network in train mode, drawn from `generator`, after it gave logits of two blank images.

        Raises UsageError for images that it does not take and for an output that is not [n classes].
        """
        with lent(generator):
            net = self._wrapped(shape, classes, options).eval()
            try:
                with torch.no_grad():
                    logits = net(torch.zeros((2, *shape)))
            except UsageError:
                raise
            except SystemExit as error:
                raise self.refusal(net, RuntimeError(f"sys.exit({error.code!r})")) from error
            except Exception as error:
                raise self.refusal(net, error) from error
            if wrong := _untrainable(net, logits):
                raise UsageError(f"network '{self.name}' {wrong}", "Let it make one that can be trained")
            if self.stays_random:
                seed = int(torch.randint(2**62, (), device="cpu"))
                net.draws = torch.Generator().manual_seed(seed)
        return net.train()

    def _wrapped(self, shape: tuple[int, int, int], classes: int, options: dict[str, Any]) -> ForeignNetwork:
        net, grey = self.make(shape, classes, **options), self.colour and shape[0] == 1
        return ForeignNetwork(net, NetSpec(self.name, **options), shape, classes, grey)
