"""torchvision's image classifiers by their names there, with torchvision's own initial weights.

Nothing is downloaded. They are as published but for what draws in training, dropout and random depth, which
are left out so that a training is a function of its seed alone, and for the auxiliary heads of GoogLeNet and
Inception, which have a loss of their own. Grey images are given as three equal channels.
"""

from functools import cache, partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from ddengine.errors import UsageError, one_line
from ddengine.nets.core import Foreign, ForeignNetwork

AUXILIARY = ("googlenet", "inception_v3")
MAXVIT_STEP = 224  # five halvings, and windows of 7 by 7 that must fit each of the four stages
LARGEST = 224  # pixels of a side that every one of them takes


@cache
def names() -> list[str]:
    """torchvision's names of its classifiers, not of detection, segmentation, video or quantised networks."""
    return torchvision.models.list_models(module=torchvision.models)


def torchvision_network(name: str) -> Foreign:
    """The network class called `name` in torchvision; it has no options."""
    return Foreign(name, partial(_make, name), lambda shape: {}, _refusal, stays_random=False, colour=True)


def _make(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    if shape[0] not in (1, 3):
        raise UsageError(
            f"network '{name}' is torchvision's and takes 1 or 3 channels, the images have {shape[0]}",
            "Give a network of ours, such as network=convnet",
        )
    given: dict[str, Any] = {"weights": None, "num_classes": classes, **_sized(name, *shape[1:])}
    if name in AUXILIARY:
        given |= {"aux_logits": False, "init_weights": True}
    place = torch.get_default_device()
    try:
        net = torchvision.models.get_model(name, **given)
    except NotImplementedError:  # RegNet computes its widths with tensors, which have no values on "meta"
        with torch.device("cpu"):
            net = torchvision.models.get_model(name, **given).to(place)
    return _without_draws(net)


def _sized(name: str, height: int, width: int) -> dict[str, Any]:
    """What a constructor must know of the images' size (UsageError where it does not take it)."""
    if name.startswith("maxvit"):
        if height % MAXVIT_STEP or width % MAXVIT_STEP:
            raise _wrong_size(name, height, width, f"with sides that {MAXVIT_STEP} divides", MAXVIT_STEP)
        return {"input_size": (height, width)}
    if name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        if height != width or height % patch:
            least = -(-max(height, width) // patch) * patch
            raise _wrong_size(name, height, width, f"with two equal sides that {patch} divides", least)
        return {"image_size": height}
    return {}


def _wrong_size(name: str, height: int, width: int, rule: str, size: int) -> UsageError:
    return UsageError(
        f"network '{name}' takes images {rule}; these are {height}x{width}",
        f"Give dataset.size={size}, or a network of ours, such as network=convnet",
    )


def _refusal(net: ForeignNetwork, error: Exception) -> UsageError:
    """Why a network fails on its images: they are too small for its strides, if larger ones are well."""
    name, (_, height, width) = net.spec.name, net.shape
    if min(height, width) < LARGEST and (least := _least(net.net, min(height, width))) is not None:
        return _wrong_size(name, height, width, f"from {least}x{least} pixels on", least)
    said = one_line(f"{type(error).__name__}: {error}")[:200]
    return UsageError(f"network '{name}' fails on images of {height}x{width} pixels: {said}", "Resize them")


def _least(net: nn.Module, above: int) -> int | None:
    """The smallest side, over `above`, of a square image that `net` takes, by bisection; None for none."""
    low, high = above, LARGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _takes(net, middle) else (middle, high)
    return high if _takes(net, high) else None


def _takes(net: nn.Module, side: int) -> bool:
    try:
        with torch.no_grad():
            net(torch.zeros((2, 3, side, side)))
    except (RuntimeError, ValueError):
        return False
    return True


def _without_draws(net: nn.Module) -> nn.Module:
    """`net` with nothing in the place of its dropout and random depth, in place."""
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout | StochasticDepth):
                setattr(module, name, nn.Identity())
    return net
