"""What a finished network is worth beyond its accuracy: calibration, classes, corruptions, attacks.

Everything is a function of (network, images, rng); the network comes back as it was given.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddengine.errors import UsageError, require, require_positive
from ddengine.ops.batches import layout, resident
from ddengine.rng import Rng
from ddengine.train import accuracy
from ddengine.types import DataSpec, Images

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
SEVERITIES = (1, 2, 3, 4, 5)
# Hendrycks and Dietterich (ICLR 2019): the released settings of CIFAR-10-C, for images of 32 x 32
LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation in pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor on the distance from the mean
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the value of HSV
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # factor on height and width
}


@contextmanager
def _judged(net: nn.Module) -> Iterator[None]:
    """`net` in eval mode and without parameters to derive by; each module and parameter is put back after."""
    modes = [(module, module.training) for module in net.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    net.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, grad in wanted:
            parameter.requires_grad_(grad)


def probabilities(net: nn.Module, images: Images, batch: int = 500) -> Float[Tensor, "n k"]:
    """The class probabilities that `net` gives each image in eval mode, float32 on the CPU.

    Uniform where a logit is not finite: a network that diverged knows nothing.
    """
    require_positive("images", len(images))
    device = next(net.parameters()).device
    data, found = resident(images, device), []
    with _judged(net), torch.no_grad():
        for start in range(0, len(data), batch):
            x = data.model_input(slice(start, start + batch))
            found.append(net(x.contiguous(memory_format=layout(device, net))).float().softmax(1).cpu())
    p = torch.cat(found)
    return p.where(p.isfinite().all(1, keepdim=True), 1 / p.shape[1])


def calibration_error(p: Float[Tensor, "n k"], y: Int[Tensor, " n"], bins: int = 15) -> float:
    """Expected calibration error in [0, 1] of probabilities against class numbers.

    The largest probability is binned by equal widths, each open below (Guo et al., "On Calibration of Modern
    Neural Networks", ICML 2017, equation 3). Raises UsageError for no images or no bins.
    """
    require_positive("images", len(p))
    require_positive("bins", bins)
    confidence, predicted = p.double().max(1)
    place = torch.bucketize(confidence, torch.arange(1, bins, device=p.device, dtype=torch.float64) / bins)
    gap = (predicted == y.to(p.device)).double() - confidence
    return torch.bincount(place, weights=gap, minlength=bins).abs().sum().item() / len(p)


def per_class_accuracy(p: Float[Tensor, "n k"], y: Int[Tensor, " n"], classes: int) -> list[float | None]:
    """The fraction of each class's images whose largest probability is theirs; None where there are none."""
    right = p.argmax(1).cpu() == y.cpu()
    total = torch.bincount(y.cpu(), minlength=classes).tolist()
    hits = torch.bincount(y.cpu()[right], minlength=classes).tolist()
    return [hit / count if count else None for hit, count in zip(hits, total, strict=True)]


def _level(name: str, severity: int) -> float:
    require(severity, SEVERITIES, "severity")
    return LEVELS[name][severity - 1]


def gaussian_noise(
    x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Normal noise on each value, by one draw for each in turn: batches one after another agree with all."""
    u = torch.rand(x.shape, generator=generator).double() + 2**-25  # off 0, where the quantile is infinite
    noise = torch.special.ndtri(u).to(x)
    return (x + _level("gaussian_noise", severity) * noise).clamp(0, 1)


def gaussian_blur(
    x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """A Gaussian filter cut at four standard deviations; the edge is repeated outwards."""
    from kornia.filters import gaussian_blur2d  # kornia takes long to import

    sigma = _level("gaussian_blur", severity)
    return gaussian_blur2d(x, 2 * int(4 * sigma + 0.5) + 1, (sigma, sigma), "replicate").clamp(0, 1)


def contrast(
    x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Each channel of each image drawn towards its mean."""
    mean = x.mean((2, 3), keepdim=True)
    return (mean + _level("contrast", severity) * (x - mean)).clamp(0, 1)


def brightness(
    x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """The value of HSV raised, of RGB or grey images; UsageError for other numbers of channels."""
    from kornia.color import hsv_to_rgb, rgb_to_hsv

    if x.shape[1] not in (1, 3):
        raise UsageError(f"images of {x.shape[1]} channels have no brightness", "Give 1 or 3 channels")
    level = _level("brightness", severity)
    if x.shape[1] == 1:
        return (x + level).clamp(0, 1)
    hue, saturation, value = rgb_to_hsv(x).unbind(1)
    return hsv_to_rgb(torch.stack([hue, saturation, (value + level).clamp(max=1)], 1)).clamp(0, 1)


def pixelate(
    x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Sampled down by means over boxes and back up to the nearest box, as Pillow's BOX filter does."""
    level = _level("pixelate", severity)
    rows, columns = (_coarse(size, max(1, int(size * level))).to(x.device) for size in x.shape[2:])
    return (rows @ x.double() @ columns.T).to(x.dtype).clamp(0, 1)


def _coarse(size: int, fewer: int) -> Float[Tensor, "size size"]:
    """The matrix that takes an axis of `size` values to `fewer` and back."""
    return _boxes(fewer, size) @ _boxes(size, fewer)


def _boxes(size: int, to: int) -> Float[Tensor, "to size"]:
    """Means over the values of an axis whose centres lie in each of `to` boxes, the lower edge left out.

    Whole numbers, so that no rounding decides on a centre at an edge: apart is the distance times 2 to.
    """
    apart = (2 * torch.arange(size) + 1) * to - (2 * torch.arange(to)[:, None] + 1) * size
    inside = ((apart > -max(size, to)) & (apart <= max(size, to))).double()
    return inside / inside.sum(1, keepdim=True)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "gaussian_blur": gaussian_blur,
    "contrast": contrast,
    "brightness": brightness,
    "pixelate": pixelate,
}


def _pixels(images: Images, part: slice) -> Tensor:
    """The images of `part` as floats in [0, 1]; what model input lies outside is clipped."""
    x = images.x[part]
    return x.float() / 255 if x.dtype == torch.uint8 else images.spec.denormalise(x).clamp(0, 1)


def corrupted(images: Images, name: str, severity: int, rng: Rng, batch: int = 100) -> Images:
    """The images under corruption `name` of CORRUPTIONS at severity 1..5, stored as they were.

    Pixels are rounded to the nearest uint8, model input stays float. The noise of image i is a function of
    (rng, name, i), the same at each severity and whatever the batch. Raises UsageError for an unknown name or
    severity.
    """
    require(name, CORRUPTIONS, "corruption")
    data = resident(images, images.x.device)
    generator, out = rng.fold("corruption").torch(name), torch.empty_like(images.x)
    for start in range(0, len(data), batch):
        part = slice(start, start + batch)
        pixels = CORRUPTIONS[name](_pixels(data, part), severity, generator)
        out[part] = (pixels * 255).round() if out.dtype == torch.uint8 else data.spec.normalise(pixels)
    return replace(images, x=out)


def corruption_accuracy(
    net: nn.Module, images: Images, names: Iterable[str], severity: int, rng: Rng
) -> dict[str, float]:
    """The fraction of `images` that `net` classifies correctly under each of the corruptions `names`."""
    require_positive("images", len(images))
    with _judged(net):
        return {name: accuracy(net, corrupted(images, name, severity, rng)) for name in names}


def pgd(
    logits: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    start: Float[Tensor, "n c h w"],
    *,
    epsilon: float | int,
    step: float | int,
    steps: int,
) -> Float[Tensor, "n c h w"]:
    """Pixels within `epsilon` of `x` and within [0, 1] after `steps` signed ascents of the cross-entropy.

    `start` holds numbers in [0, 1) that place the first point in the ball (Madry et al., "Towards Deep
    Learning Models Resistant to Adversarial Attacks", ICLR 2018, section 2.1).
    """
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    at = (x + epsilon * (2 * start - 1)).clamp(low, high)
    for _ in range(steps):
        at.requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(logits(at), y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, at)
        at = (at.detach() + step * slope.sign()).clamp(low, high)
    return at


def pgd_accuracy(
    net: nn.Module,
    images: Images,
    rng: Rng,
    *,
    epsilon: float | int = 8 / 255,
    step: float | int = 2 / 255,
    steps: int = 10,
    batch: int = 250,
) -> float:
    """The fraction of `images` that `net` classifies correctly both as they are and after `pgd` on pixels.

    `epsilon` and `step` are parts of the pixel range; 8/255 and 2/255 are what Madry et al. take on CIFAR-10.
    The start of image i is a function of (rng, i). Raises UsageError for no images or a number out of range.
    """
    require_positive("images", len(images))
    require_positive("epsilon", epsilon, zero=True)
    require_positive("step", step)
    require_positive("steps", steps)
    device = next(net.parameters()).device
    data, generator = resident(images, device), rng.torch("pgd")
    logits, classes, right = _from_pixels(net, data.spec, device), data.classes.long(), 0
    with _judged(net), torch.no_grad():
        for first in range(0, len(data), batch):
            part = slice(first, first + batch)
            x, y = _pixels(data, part), classes[part]
            start = torch.rand(x.shape, generator=generator).to(x)
            attacked = pgd(logits, x, y, start, epsilon=epsilon, step=step, steps=steps)
            stands = (logits(x).argmax(1) == y) & (logits(attacked).argmax(1) == y)
            right += int(stands.sum())
    return right / len(data)


def _from_pixels(net: nn.Module, spec: DataSpec, device: torch.device) -> Callable[[Tensor], Tensor]:
    place = layout(device, net)
    return lambda pixels: net(spec.normalise(pixels).contiguous(memory_format=place)).float()
