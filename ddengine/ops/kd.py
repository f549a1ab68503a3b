"""Knowledge distillation: the loss on soft labels, and mixed images with numbers that belong to each item."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.special import betaincinv
from torch import Tensor, nn

from ddengine.composites import Composites
from ddengine.ops.batches import resident
from ddengine.ops.counter import uniform
from ddengine.rng import Rng
from ddengine.types import Images

Mix = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def kd_loss(
    student: Float[Tensor, "n k"],
    teacher: Float[Tensor, "n k"],
    temperature: float | int,
    squared: bool = True,
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of two sets of logits, mean over the batch.

    Source: Hinton et al. 2015. Without `squared` the factor T^2 is left out, as INFER's code does.
    """
    mine, theirs = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    found = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    return found * temperature**2 if squared else found


def mean_logits(teachers: Sequence[nn.Module], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """The mean of the teachers' logits (not of their probabilities) on images in model-input space."""
    return torch.stack([teacher(x) for teacher in teachers]).mean(0)


def placed(teachers: Sequence[nn.Module], device: torch.device | str) -> list[nn.Module]:
    """The teachers on `device`: copies of them where that is not the CPU."""
    there = torch.device(device)
    return [net if there.type == "cpu" else copy.deepcopy(net).to(there) for net in teachers]


@torch.no_grad()
def soft_labels(
    teachers: Sequence[nn.Module], images: Images | Composites, device: torch.device | str, batch: int = 500
) -> Float[Tensor, "n k"]:
    """The teachers' mean logits on `images` as they are, computed on `device` in float32; on the CPU."""
    nets, data = placed(teachers, device), resident(images, torch.device(device))
    starts = range(0, len(data), batch)
    return torch.cat([mean_logits(nets, data.model_input(slice(i, i + batch))).cpu() for i in starts])


def mixed_labels(
    first: Tensor, second: Tensor, lam: Float[Tensor, " n"], classes: int
) -> Float[Tensor, "n k"]:
    """lam * first + (1 - lam) * second: rows of logits or of probabilities [n k] in their own space.

    Class numbers [n] are taken as probabilities of one class. INFER's static labels mix logits.
    """
    if not first.is_floating_point():
        first, second = (F.one_hot(y.long(), classes).to(lam.dtype) for y in (first, second))
    return first * lam[:, None] + second * (1 - lam[:, None])


def lambdas(u: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
    """Beta(alpha, alpha) numbers as the quantiles of uniform ones; alpha > 0."""
    return torch.from_numpy(betaincinv(alpha, alpha, u.double().cpu().numpy())).to(u)


def partners(rng: Rng, epoch: Int[Tensor, " n"], index: Int[Tensor, " n"], images: int) -> Int[Tensor, " n"]:
    """What each item is mixed with: an epoch's permutation of the whole set of `images`, taken at `index`."""
    found = torch.empty_like(index)
    for number in epoch.unique().tolist():
        here = epoch == number
        order = torch.randperm(images, generator=rng.torch(f"partners-{number}"))
        found[here] = order.to(index)[index[here]]
    return found


def mix_numbers(rng: Rng, epoch: Int[Tensor, " n"], index: Int[Tensor, " n"]) -> Float[Tensor, "n 3"]:
    """An item's own uniform numbers for mixing: for its lambda, and the middle of its box (down, right)."""
    return uniform(rng, "mix", epoch, index, 3)


def mixup(
    first: Float[Tensor, "n c h w"],
    second: Float[Tensor, "n c h w"],
    lam: Float[Tensor, " n"],
    centre: Float[Tensor, "n 2"],
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"]]:
    """lam * first + (1 - lam) * second, and lam (Zhang et al., ICLR 2018); `centre` is not used."""
    share = lam[:, None, None, None]
    return first * share + second * (1 - share), lam


def cutmix(
    first: Float[Tensor, "n c h w"],
    second: Float[Tensor, "n c h w"],
    lam: Float[Tensor, " n"],
    centre: Float[Tensor, "n 2"],
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"]]:
    """`first` with a box of `second`, and the share of the image that is left to `first`.

    The box has sqrt(1 - lam) of each side, rounded down, around the pixel at `centre` (in [0, 1), down and
    right), and is cut at the image's edge (Yun et al., ICCV 2019).
    """
    inside = []
    for axis, length in enumerate(first.shape[2:]):
        size = (length * (1 - lam).sqrt()).long()
        low = (centre[:, axis] * length).long() - size // 2
        place = torch.arange(length, device=first.device)
        inside.append((place >= low[:, None]) & (place < (low + size)[:, None]))
    box = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(box, second, first), 1 - box.to(lam).mean((1, 2, 3))


MIX: dict[str, Mix] = {"mixup": mixup, "cutmix": cutmix}
