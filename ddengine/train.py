"""Training one fresh network on labelled images: the recipe of `standard-v1`.

The result is a pure function of (network, images, recipe, rate, rng): batches, weights and augmentation are
named streams, and a batch depends on the seed and the step alone.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from ddengine.errors import UsageError, require, require_positive
from ddengine.nets import build
from ddengine.nets.core import NetSpec
from ddengine.ops import dsa
from ddengine.ops.batches import augmented, layout, resident, targets_of
from ddengine.rng import Rng
from ddengine.types import Images

PRECISIONS = ("fp32", "bf16")
SCHEDULES = {"cosine": lambda done: (1 + math.cos(math.pi * done)) / 2, "constant": lambda done: 1.0}


@dataclass(frozen=True)
class Recipe:
    """How every network of every row is trained: SGD over `steps` batches, last-step weights.

    `lrs` are the trials among which validation accuracy chooses; `batch_size` is cut to the size of the set;
    `augment` is a DSA string or "none" (one operator a batch, numbers a sample). Momentum and weight decay
    are the field's (DC, DSA, DM, DataDAM). Raises UsageError for a value out of range.
    """

    steps: int = 500
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    batch_size: int = 256
    augment: str = dsa.STRATEGY

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
        require_positive("recipe.weight_decay", self.weight_decay, zero=True)
        if not 0 <= self.momentum < 1:
            raise UsageError(f"recipe.momentum={self.momentum} is out of range", "Give 0 <= momentum < 1")
        require(self.schedule, SCHEDULES, "recipe.schedule")
        dsa.parse(self.augment)

    def to_dict(self) -> dict[str, Any]:
        """The recipe fully spelled, as plain JSON values."""
        mode = "one operator per batch, numbers per image"
        fixed = {"optimiser": "sgd", "weights": "last step", "augment_mode": mode}
        return asdict(self) | {"lrs": list(self.lrs)} | fixed


def batch_orders(rng: Rng, images: int, batch: int, steps: int) -> Int[Tensor, "steps batch"]:
    """Which images each step takes: reshuffled passes over the set, laid end to end and cut into batches.

    Row s depends on (rng, images, batch, s) only, so fewer steps are a prefix of more.
    """
    passes = math.ceil(steps * batch / images)
    orders = [torch.randperm(images, generator=rng.torch(f"pass-{number}")) for number in range(passes)]
    return torch.cat(orders)[: steps * batch].reshape(steps, batch)


def train(
    spec: NetSpec,
    images: Images,
    recipe: Recipe,
    lr: float,
    rng: Rng,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> nn.Module:
    """One fresh network after `recipe.steps` steps at rate `lr`, on `device`, whatever became of its loss.

    A loss that is not finite is no error: the network then scores at chance. Precision "bf16" is autocast
    with float32 weights and loss. Raises UsageError for an empty set or an unknown precision.
    """
    require(precision, PRECISIONS, "precision")
    if not len(images):
        raise UsageError("there is no image to train on", "Give a set with at least one image")
    place, shape = torch.device(device), images.spec.shape
    net = build(spec, shape, len(images.spec.classes), rng.torch("weights"))
    net = net.to(device=place, memory_format=layout(place)).train()  # type: ignore[call-overload]
    data, targets = resident(images, place), targets_of(images).to(place)
    orders = batch_orders(rng.fold("batches"), len(data), min(recipe.batch_size, len(data)), recipe.steps)
    optimiser = torch.optim.SGD(net.parameters(), lr, recipe.momentum, weight_decay=recipe.weight_decay)
    for step, index in enumerate(orders.to(place)):
        optimiser.param_groups[0]["lr"] = lr * SCHEDULES[recipe.schedule](step / recipe.steps)
        x = augmented(data.model_input(index), recipe.augment, rng.fold("augment", step))
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(x.contiguous(memory_format=layout(place)))
        optimiser.zero_grad()
        F.cross_entropy(logits.float(), targets[index]).backward()
        optimiser.step()
    return net


def accuracy(net: nn.Module, images: Images, batch: int = 500) -> float:
    """The fraction of `images` that `net` classifies correctly in eval mode (0..1); its mode is kept."""
    device, training = next(net.parameters()).device, net.training
    data = resident(images, device)
    classes, right = data.classes, torch.zeros((), dtype=torch.long, device=device)
    net.eval()
    with torch.no_grad():
        for start in range(0, len(data), batch):
            part = slice(start, start + batch)
            x = data.model_input(part).contiguous(memory_format=layout(device))
            right += (net(x).argmax(1) == classes[part]).sum()
    net.train(training)
    return right.item() / len(data)
