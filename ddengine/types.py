"""The core types that all parts share, and the contracts between them.

Letters: n real, m synthetic, k classes, c h w an image, p flat parameters. Graphs have their own module.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.graphs import Graphs
from ddengine.ranks import Ranks
from ddengine.rng import Rng

Metrics = dict[str, Any]
Part = Literal["images", "trees", "labels", "extras"]
LABEL_KINDS = ("class", "prob", "logit")


@dataclass(frozen=True)
class Whitening:
    """A ZCA whitening of flattened images: x -> (x - mean) @ matrix, and back with `inverse`. All float32."""

    mean: Float[Tensor, " d"]
    matrix: Float[Tensor, "d d"]
    inverse: Float[Tensor, "d d"]


@dataclass(frozen=True)
class DataSpec:
    """What images mean: shape (c, h, w), class names in label order, and the way into model-input space.

    Pixels in [0, 1] become model input by (x - mean) / std per channel, or by `zca` where that is set.
    `fingerprint` is the hash of the source data; `licence` is free text, "" when unknown.
    """

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str = ""
    licence: str = ""
    zca: Whitening | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != self.shape[0] or len(self.std) != self.shape[0] or min(self.std) <= 0:
            raise UsageError(
                f"mean {self.mean} and std {self.std} for {self.shape[0]} channels",
                "Give one mean and one positive std for each channel",
            )

    def normalise(self, x: Tensor) -> Float[Tensor, "n c h w"]:
        """Pixels, uint8 or floats in [0, 1], to model-input space (float32)."""
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if self.zca is not None:
            return ((x.flatten(1) - self.zca.mean.to(x)) @ self.zca.matrix.to(x)).reshape(x.shape)
        return (x - _channels(self.mean, x)) / _channels(self.std, x)

    def denormalise(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The inverse of `normalise`, to pixels nominally in [0, 1]; nothing is clamped."""
        if self.zca is not None:
            return (x.flatten(1) @ self.zca.inverse.to(x) + self.zca.mean.to(x)).reshape(x.shape)
        return x * _channels(self.std, x) + _channels(self.mean, x)

    @property
    def preprocessing(self) -> str:
        """ "zca" or "standard"."""
        return "standard" if self.zca is None else "zca"


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


@dataclass(frozen=True)
class Images:
    """Labelled images: `x` [n c h w] as uint8 pixels (real data) or float model input (synthetic data).

    `y` holds class numbers [n] (`y_kind` "class") or a row of probabilities or logits per image [n k].
    Real sets are class-sorted so that a class is one slice; `sorted_by_class` does that.
    """

    x: Tensor
    y: Tensor
    spec: DataSpec
    y_kind: str = "class"

    def __post_init__(self) -> None:
        require(self.y_kind, LABEL_KINDS, "y_kind")
        k = len(self.spec.classes)
        if tuple(self.x.shape[1:]) != self.spec.shape or len(self.x) != len(self.y):
            raise UsageError(
                f"images {tuple(self.x.shape)} and labels {tuple(self.y.shape)} for spec {self.spec.shape}",
                "Give x [n, c, h, w] of the spec's shape and one label for each image",
            )
        if self.y_kind == "class":
            if self.y.ndim != 1 or (len(self.y) and not 0 <= int(self.y.min()) <= int(self.y.max()) < k):
                raise UsageError(f"class labels outside 0..{k - 1}", "Give one class number for each image")
        elif tuple(self.y.shape[1:]) != (k,):
            raise UsageError(f"soft labels of shape {tuple(self.y.shape)}", f"Give labels of shape [n, {k}]")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def classes(self) -> Int[Tensor, " n"]:
        """Hard class of each image: the label, or the largest soft label."""
        return self.y if self.y_kind == "class" else self.y.argmax(1)

    @property
    def counts(self) -> list[int]:
        """Images in each class, in label order."""
        return torch.bincount(self.classes.cpu(), minlength=len(self.spec.classes)).tolist()

    def model_input(self, index: Tensor | slice | None = None) -> Float[Tensor, "n c h w"]:
        """The chosen images in model-input space."""
        x = self.x if index is None else self.x[index]
        return self.spec.normalise(x) if x.dtype == torch.uint8 else x

    def take(self, index: Tensor) -> "Images":
        """The subset at `index`, in that order."""
        read = getattr(self.x, "part", self.x.__getitem__)  # a large part of images on disk stays there
        return replace(self, x=read(index.to(self.x.device)), y=self.y[index.to(self.y.device)])

    def sorted_by_class(self) -> "Images":
        """The same images with equal classes side by side, order inside a class kept."""
        order = self.classes.argsort(stable=True)
        return self if torch.equal(order, torch.arange(len(order))) else self.take(order)

    def to(self, device: torch.device | str) -> "Images":
        """The same images on `device`."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def draw(self, generator: torch.Generator, classes: Sequence[int], per_class: int) -> list[Tensor]:
        """Indices of up to `per_class` images of each class, none twice. Needs class-sorted images."""
        counts = self.counts
        starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        drawn = [starts[c] + torch.randperm(counts[c], generator=generator)[:per_class] for c in classes]
        if ahead := getattr(self.x, "ahead", None):  # images on disk: decoded while something else is done
            ahead(torch.cat(drawn))
        return drawn


@dataclass(frozen=True)
class Budget:
    """How much a synthetic set may hold: images per class, or bytes of images, labels and extras."""

    ipc: int | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        if self.ipc is None and self.nbytes is None:
            raise no_budget()
        if self.ipc is not None and self.nbytes is not None:
            raise UsageError(
                f"a budget needs either ipc or nbytes, not both ipc={self.ipc} and nbytes={self.nbytes}",
                "Leave one out; ipc=null or budget.nbytes=null undoes that of a row",
            )
        require_positive("ipc" if self.nbytes is None else "budget.nbytes", self.ipc or self.nbytes or 0)

    def images_per_class(self, spec: DataSpec) -> int:
        """Images per class: `ipc`, or what `nbytes` leaves at one uint8 image and one label byte each."""
        if self.ipc is not None:
            return self.ipc
        assert self.nbytes is not None
        c, h, w = spec.shape
        each = c * h * w + 8 * c + label_bytes(len(spec.classes))
        ipc = self.nbytes // (each * len(spec.classes))
        if ipc < 1:
            raise UsageError(
                f"budget.nbytes={self.nbytes} is less than one image a class",
                f"Give at least {each * len(spec.classes)} bytes",
            )
        return ipc


def no_budget() -> UsageError:
    """The error for a budget that says nothing."""
    return UsageError("a budget needs either ipc or nbytes", "Give for example ipc=10")


def label_bytes(classes: int) -> int:
    """Bytes of one stored class number."""
    return 1 if classes <= 256 else 2 if classes <= 2**15 else 4


@runtime_checkable
class SynthSet(Protocol):
    """A parametrised synthetic set: free tensors in, labelled images, graphs or trees out."""

    @property
    def spec(self) -> Any: ...

    @property
    def nbytes(self) -> Mapping[str, int]: ...

    def params(self) -> dict[str, Tensor]: ...

    def replace(self, params: Mapping[str, Tensor]) -> "SynthSet": ...

    def decode(self, indices: Tensor | None = None) -> Any: ...


@dataclass(frozen=True)
class Task:
    """All that a matcher may see: the fit part of a real set, the budget, experts, and where to compute.

    There is no field for validation or test data. A budget of None leaves the size to a matcher that knows
    it. `origin` says how the source was loaded (arguments of `ddengine.data.load` or `load_graphs`), so that
    a judge can load the same. `workers` processes may share the work on a CPU; no result depends on them.
    `replicas` draw their own networks or segments at each step; `ranks` are the processes that share them.
    `precision` "auto" is what the matcher and the device serve: `distill` settles it, else it is fp32.
    """

    source: Images | Graphs
    budget: Budget | None
    experts: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    origin: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    replicas: int = 1
    ranks: Ranks = Ranks()

    def __post_init__(self) -> None:
        require_positive("workers", self.workers)
        require_positive("replicas", self.replicas)
        require(self.precision, ("auto", "fp32", "bf16"), "precision")
        counts = self.source.counts
        empty = [name for name, n in zip(self.source.spec.classes, counts, strict=True) if n == 0]
        if empty:
            raise UsageError(
                f"class '{empty[0]}' has no {self.kind[:-1]} to learn from ({len(empty)} empty classes)",
                f"Add {self.kind} to that class or remove it",
            )

    def settled(self, bf16: bool) -> "Task":
        """The task at a precision that is said: for "auto" bf16 on a GPU, if the matcher computes in it."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if bf16 and self.device.type == "cuda" else "fp32")

    @property
    def kind(self) -> str:
        """What the source holds: "images" or "graphs"."""
        return "images" if isinstance(self.source, Images) else "graphs"

    @property
    def images(self) -> Images:
        """The source of a task on images (UsageError for any other)."""
        if not isinstance(self.source, Images):
            raise UsageError("this task has graphs, not images", "Give images or a matcher for graphs")
        return self.source

    @property
    def graphs(self) -> Graphs:
        """The source of a task on graphs (UsageError for any other)."""
        if not isinstance(self.source, Graphs):
            raise UsageError("this task has images, not graphs", "Give graphs or a matcher for images")
        return self.source

    @property
    def ipc(self) -> int:
        """Images per class that the budget allows (UsageError where there is no budget)."""
        if self.budget is None:
            raise no_budget()
        return self.budget.images_per_class(self.images.spec)

    def streams(self, rng: Rng) -> list[Rng]:
        """The stream below `rng` of each replica that this process computes: `rng` itself of the only one."""
        if self.replicas == 1:
            return [rng]
        return [rng.fold("replica", number) for number in self.ranks.dealt(self.replicas)]


@dataclass
class Workspace:
    """What is rebuilt on every start and never saved: the task and data resident on its device."""

    task: Task
    data: Any
    extra: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the user should know of how the run is prepared

    def reduce(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The only collective: the mean over all replicas of what each of them found, such as gradients.

        `parts` are named tensors, one mapping for each of `task.streams`; the sum is taken in replica order.
        """
        return self.task.ranks.mean(parts)

    def close(self) -> None:
        """Release what `prepare` took; what has a `close` of its own is closed."""
        for held in self.extra.values():
            if hasattr(held, "close"):
                held.close()
        self.extra.clear()


@dataclass(frozen=True)
class Accepts:
    """What a matcher can work on: `source` is "images", "graphs" or "any".

    `budget` says whether it must be told how much a set may hold, `plans` that it makes of a budget in bytes
    what fits, whatever number of plain images that would be, `replicas` that its steps average over them.
    """

    source: str = "images"
    experts: bool = False
    batch_norm: bool = False
    bf16: bool = True
    budget: bool = True
    plans: bool = False
    replicas: bool = False


S = TypeVar("S")


@runtime_checkable
class Matcher(Protocol[S]):
    """An algorithm as a frozen value. `step` leaves its input alone and folds its own number into `rng`."""

    @property
    def accepts(self) -> Accepts: ...

    def steps(self, task: Task) -> int: ...

    def prepare(self, task: Task, rng: Rng) -> Workspace: ...

    def init(self, task: Task, rng: Rng) -> S: ...

    def step(self, state: S, work: Workspace, rng: Rng) -> tuple[S, Metrics]: ...

    def finish(self, state: S, work: Workspace, rng: Rng) -> SynthSet: ...


@runtime_checkable
class Evaluated(Protocol):
    """A matcher that tells a judge how to train on its sets: plain JSON values for the manifest's recipe."""

    def evaluation(self, task: Task) -> dict[str, Any]: ...


def fingerprint(x: Tensor, y: Tensor, classes: Sequence[str]) -> str:
    """SHA-256 over class names, labels and pixel bytes: equal for equal data, whatever file it came from."""
    digest = hashlib.sha256("\0".join(classes).encode())
    for tensor in (y.to(torch.int64), x):
        digest.update(str((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def class_order(classes: Sequence[str]) -> str:
    """SHA-256 of the class names in label order: a judge with another order refuses the set."""
    return hashlib.sha256("\0".join(classes).encode()).hexdigest()


def as_source(images: Images) -> Images:
    """The images sorted by class, with a fingerprint of their content where their maker gave none."""
    images = images.sorted_by_class()
    if images.spec.fingerprint:
        return images
    found = fingerprint(images.x, images.y, images.spec.classes)
    return replace(images, spec=replace(images.spec, fingerprint=found))
