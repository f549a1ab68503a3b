"""Training one fresh network on labelled images: the recipe of `standard-v1`, or one that a set brings.

The result is a pure function of (network, images, recipe, rate, rng): batches, weights and augmentation are
named streams, and a batch depends on the seed and the step alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from ddengine.composites import Composites
from ddengine.errors import ArtefactError, UsageError, require, require_positive
from ddengine.nets import build
from ddengine.nets.core import NetSpec
from ddengine.ops import dsa, kd
from ddengine.ops.batches import augmented, augmented_items, layout, resident, targets_of
from ddengine.ops.memory import keep_freed_memory
from ddengine.rng import Rng
from ddengine.types import Images

PRECISIONS = ("fp32", "bf16")
SCHEDULES = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
    "drop": lambda done: 1.0 if done < 0.5 else 0.1,  # and the optimiser starts anew there, as in DC's code
}
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, lr, r, fused: torch.optim.SGD(
        p, lr, r.momentum, weight_decay=r.weight_decay, fused=fused
    ),
    "adamw": lambda p, lr, r, fused: torch.optim.AdamW(p, lr, weight_decay=r.weight_decay, fused=fused),
}
LOSSES = ("ce", "kl")
RATE_MAX = 1e6
AUGMENT_MODES = {
    "batch": "one operator per batch, numbers per image",
    "item": "every operator in turn, numbers per image and epoch",
}
Probe = Callable[[nn.Module, int], None]  # the network in train mode, and the steps that it has taken
Labeler = Callable[[Tensor], Tensor]  # images in model-input space [n c h w] -> logits [n k]


@dataclass(frozen=True)
class Recipe:
    """How every network of every row is trained: `steps` optimiser steps, whatever the row.

    `lrs` are the trials among which validation accuracy chooses; `batch_size` is cut to the size of the set;
    `augment` is a DSA string or "none", applied as AUGMENT_MODES say. The defaults are the field's (DC, DSA,
    DM, DataDAM). Loss "kl" is KL at `temperature` (times its square where `squared`) on labels that are
    logits; class numbers and probabilities get cross-entropy under either loss. `mix` mixes each item with
    its partner at a Beta(mix_alpha, mix_alpha) share of its own, labels in the space that they have. `ema` is
    the decay of an average of the weights and batch-norm statistics, which is then scored; 0 is the last
    step's. Momentum is SGD's. Raises UsageError for a value out of range.
    """

    steps: int = 500
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    batch_size: int = 256
    augment: str = dsa.STRATEGY
    optimiser: str = "sgd"
    loss: str = "ce"
    temperature: float | int = 1.0
    squared: bool = True
    mix: str = "none"
    mix_alpha: float | int = 0.8
    augment_mode: str = "batch"
    ema: float | int = 0.0

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size"):
            value = getattr(self, key)
            require_positive(f"recipe.{key}", value)
            if not isinstance(value, int):
                raise UsageError(f"recipe.{key}={value} is not a whole number", "Give a whole number")
        if not self.lrs or len(set(self.lrs)) < len(self.lrs):
            raise UsageError(f"recipe.lrs={list(self.lrs)} is empty or repeats", "Give different rates")
        for lr in self.lrs:
            require_positive("recipe.lrs", lr)
            if lr > RATE_MAX:
                raise UsageError(f"recipe.lrs={list(self.lrs)} is out of range", f"Give at most {RATE_MAX:g}")
        for key in ("temperature", "mix_alpha"):
            require_positive(f"recipe.{key}", getattr(self, key))
        require_positive("recipe.weight_decay", self.weight_decay, zero=True)
        for key in ("momentum", "ema"):
            if not 0 <= getattr(self, key) < 1:
                raise UsageError(f"recipe.{key}={getattr(self, key)} is out of range", f"Give 0 <= {key} < 1")
        for key, known in CHOICES.items():
            require(getattr(self, key), known, f"recipe.{key}")
        dsa.parse(self.augment)

    def to_dict(self) -> dict[str, Any]:
        """The recipe fully spelled, as plain JSON values."""
        weights = "average over steps" if self.ema else "last step"
        spelled = {"augment_mode": AUGMENT_MODES[self.augment_mode], "weights": weights}
        return asdict(self) | {"lrs": list(self.lrs)} | spelled


CHOICES = {
    "schedule": tuple(SCHEDULES),
    "optimiser": tuple(OPTIMISERS),
    "loss": LOSSES,
    "mix": ("none", *kd.MIX),
    "augment_mode": tuple(AUGMENT_MODES),
}


def recipe_of(manifest: Mapping[str, Any], dataset: str, base: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that a set's manifest asks for: its recipe.train over `base` and the defaults for `dataset`.

    Raises ArtefactError naming a field that is unknown, of another type or out of range.
    """
    given = (manifest.get("recipe") or {}).get("train", {})
    if not isinstance(given, Mapping):
        raise _refused(f"recipe.train={given}")
    known = {field.name: field.default for field in fields(Recipe)}
    for key, value in given.items():
        if key not in known or not is_like(value, known[key]):
            raise _refused(f"recipe.train.{key}={value}")
    values: dict[str, Any] = {"augment": dsa.strategy_for(dataset), **(base or {})}
    try:
        values |= {key: _as(value, known[key]) for key, value in given.items()}
        return Recipe(**values)
    except (UsageError, OverflowError) as error:
        said = error.cause if isinstance(error, UsageError) else error
        raise _refused(f"in recipe.train: {said}") from error


def _refused(what: str) -> ArtefactError:
    return ArtefactError(f"the set's manifest has {what}", "Make the set again with this version of ddengine")


def is_like(value: Any, default: Any) -> bool:
    """Whether a JSON value has the type of a field's default: any number for a float, a list for rates."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(is_like(item, default[0]) for item in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _as(value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        return tuple(map(float, value))
    return float(value) if isinstance(default, float) else value


def batch_orders(rng: Rng, images: int, batch: int, steps: int) -> Int[Tensor, "steps batch"]:
    """Which images each step takes: reshuffled passes over the set, laid end to end and cut into batches.

    Row s depends on (rng, images, batch, s) only, so fewer steps are a prefix of more; place p of the whole
    lies in pass p // images.
    """
    passes = math.ceil(steps * batch / images)
    orders = [torch.randperm(images, generator=rng.torch(f"pass-{number}")) for number in range(passes)]
    return torch.cat(orders)[: steps * batch].reshape(steps, batch)


def train(
    spec: NetSpec,
    images: Images | Composites,
    recipe: Recipe,
    lr: float,
    rng: Rng,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    labeler: Labeler | None = None,
    probe: Probe | None = None,
) -> nn.Module:
    """One fresh network after `recipe.steps` steps at rate `lr`, on `device`, whatever became of its loss.

    With `labeler`, which must compute there, its logits on each augmented and mixed batch are the labels, and
    the loss is KL. `probe` is called after every step. A loss that is not finite is no error: the network
    then scores at chance. Precision "bf16" is autocast with float32 weights and loss. Raises UsageError for
    an empty set or an unknown precision.
    """
    require(precision, PRECISIONS, "precision")
    if not len(images):
        raise UsageError("there is no image to train on", "Give a set with at least one image")
    place, shape = torch.device(device), images.spec.shape
    if place.type == "cpu":
        keep_freed_memory()
    net = build(spec, shape, len(images.spec.classes), rng.torch("weights"))
    net = net.to(device=place, memory_format=layout(place, net)).train()  # type: ignore[call-overload]
    stream = _Stream.of(resident(images, place), recipe, rng)
    optimiser = optimiser_for(net.parameters(), lr, recipe, place)
    average = {name: tensor.clone() for name, tensor in net.state_dict().items()} if recipe.ema else {}
    for step in range(recipe.steps):
        if starts_anew(recipe, step):
            optimiser = optimiser_for(net.parameters(), lr, recipe, place)
        optimiser.param_groups[0]["lr"] = lr * SCHEDULES[recipe.schedule](step / recipe.steps)
        x, labels = stream.batch(step)
        x = x.contiguous(memory_format=layout(place, net))
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(x)
        labels = labels if labeler is None else _asked(labeler, x)
        optimiser.zero_grad()
        _loss(logits.float(), labels, recipe, stream.soft or labeler is not None).backward()
        optimiser.step()
        _follow(average, net.state_dict(), recipe.ema, step)
        if probe is not None:
            probe(net, step + 1)
    if average:
        net.load_state_dict(average)
    return net


def optimiser_for(
    params: Iterable[Any], lr: float, recipe: Recipe, place: torch.device
) -> torch.optim.Optimizer:
    """The recipe's optimiser of `params`, tensors or groups of them, as one kernel for all on the CPU.

    There the default takes up to four times as long (AdamW), which small networks notice.
    """
    return OPTIMISERS[recipe.optimiser](params, lr, recipe, place.type == "cpu" or None)


def starts_anew(recipe: Recipe, step: int) -> bool:
    """Whether the optimiser forgets what it remembers before `step`."""
    return recipe.schedule == "drop" and step == math.ceil(recipe.steps / 2)


@torch.no_grad()
def _asked(labeler: Labeler, x: Tensor) -> Tensor:
    return labeler(x).float()


def _loss(logits: Tensor, labels: Tensor, recipe: Recipe, soft: bool) -> Tensor:
    if soft:
        return kd.kd_loss(logits, labels, recipe.temperature, recipe.squared)
    return F.cross_entropy(logits, labels)


@dataclass(frozen=True, eq=False)
class _Stream:
    """The batches of one training: `orders` and `epochs` [steps batch] on the CPU, `labels` by image.

    `soft` says that the labels are logits to be matched by KL.
    """

    data: Images | Composites
    labels: Tensor
    soft: bool
    orders: Tensor
    epochs: Tensor
    recipe: Recipe
    rng: Rng

    @staticmethod
    def of(data: Images | Composites, recipe: Recipe, rng: Rng) -> "_Stream":
        soft = recipe.loss == "kl" and data.y_kind == "logit"
        orders = batch_orders(rng.fold("batches"), len(data), min(recipe.batch_size, len(data)), recipe.steps)
        epochs = torch.arange(orders.numel()).reshape(orders.shape) // len(data)
        labels = (data.y.float() if soft else targets_of(data)).to(data.y.device)
        return _Stream(data, labels, soft, orders, epochs, recipe, rng)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images in model-input space and labels of a step; one operator for a batch acts on mixed images."""
        index, epoch, recipe = self.orders[step], self.epochs[step], self.recipe
        x, labels = self._view(index, epoch), self.labels[index.to(self.labels.device)]
        if recipe.mix != "none":
            items = self.rng.fold("items")
            partner = kd.partners(items, epoch, index, len(self.data))
            u = kd.mix_numbers(items, epoch, index)
            lam = kd.lambdas(u[:, 0], recipe.mix_alpha).to(x.device)
            x, lam = kd.MIX[recipe.mix](x, self._view(partner, epoch), lam, u[:, 1:].to(x.device))
            others = self.labels[partner.to(self.labels.device)]
            labels = kd.mixed_labels(labels, others, lam, len(self.data.spec.classes))
        if recipe.augment_mode == "batch":
            x = augmented(x, recipe.augment, self.rng.fold("augment", step))
        return x, labels

    def _view(self, index: Tensor, epoch: Tensor) -> Tensor:
        x = self.data.model_input(index.to(self.labels.device))
        if self.recipe.augment_mode == "batch":
            return x
        return augmented_items(x, self.recipe.augment, self.rng.fold("items"), epoch, index)


@torch.no_grad()
def _follow(average: dict[str, Tensor], now: Mapping[str, Tensor], decay: float, step: int) -> None:
    """Move `average` in place to the mean of all steps' weights so far, each `decay` of the next one's."""
    for name, tensor in average.items():
        if tensor.is_floating_point():
            tensor.lerp_(now[name], (1 - decay) / (1 - decay ** (step + 1)))
        else:
            tensor.copy_(now[name])


def accuracy(net: nn.Module, images: Images, batch: int = 500) -> float:
    """The fraction of `images` that `net` classifies correctly in eval mode (0..1); its mode is kept."""
    device, training = next(net.parameters()).device, net.training
    data = resident(images, device)
    classes, right = data.classes, torch.zeros((), dtype=torch.long, device=device)
    net.eval()
    with torch.no_grad():
        for start in range(0, len(data), batch):
            part = slice(start, start + batch)
            x = data.model_input(part).contiguous(memory_format=layout(device, net))
            right += (net(x).argmax(1) == classes[part]).sum()
    net.train(training)
    return right.item() / len(data)
