"""Batches of labelled images on a device: what training an expert, a student or a judged network shares."""

from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddengine.composites import Composites
from ddengine.nets import has_batch_norm
from ddengine.ops import dsa
from ddengine.ops.counter import uniform
from ddengine.rng import Rng
from ddengine.types import Images

Set = TypeVar("Set", bound=Images | Composites)


def targets_of(images: Images | Composites) -> Tensor:
    """What cross-entropy is taken against: class numbers [n], or probabilities [n k] for soft labels."""
    if images.y_kind == "class":
        return images.y.long()
    return images.y.float().softmax(1) if images.y_kind == "logit" else images.y.float()


def layout(device: torch.device, net: nn.Module | None = None) -> torch.memory_format:
    """channels_last on a GPU, and on the CPU for a `net` with batch norm.

    Measured on the CPU: those are 1.3 to 1.7 times as fast with it, networks with GroupNorm half as fast.
    """
    fast = device.type == "cuda" or (net is not None and has_batch_norm(net))
    return torch.channels_last if fast else torch.contiguous_format


def augmented(x: Float[Tensor, "n c h w"], strategy: str, rng: Rng) -> Float[Tensor, "n c h w"]:
    """A batch under DSA in evaluation mode: one operator for the batch, its numbers drawn for each image."""
    if not dsa.parse(strategy):
        return x
    size = (x.shape[2], x.shape[3])
    return dsa.apply(x, dsa.sample(rng.torch("dsa"), strategy, len(x), size, one_op=True))


def augmented_items(
    x: Float[Tensor, "n c h w"],
    strategy: str,
    rng: Rng,
    epoch: Int[Tensor, " n"],
    index: Int[Tensor, " n"],
) -> Float[Tensor, "n c h w"]:
    """The items `index` of a set, each under every operator of a DSA string in turn.

    The numbers of an item are a function of (rng, epoch[i], index[i]) alone, whatever else is in the batch.
    """
    if not dsa.parse(strategy):
        return x
    u = uniform(rng, "dsa", epoch.cpu(), index.cpu(), dsa.NUMBERS)
    none = torch.full((len(x),), dsa.NONE)
    return dsa.in_turn(x, dsa.numbers(none, u, (x.shape[2], x.shape[3])), strategy)


def resident(images: Set, device: torch.device) -> Set:
    """The images on `device` with their whitening beside them, so that no batch carries a matrix across."""
    zca = images.spec.zca
    if zca is not None:
        there = replace(zca, **{key: getattr(zca, key).to(device) for key in ("mean", "matrix", "inverse")})
        images = replace(images, spec=replace(images.spec, zca=there))
    return images.to(device)  # type: ignore[return-value]
