"""What trained experts can say of real images: which they get right, which represent a class, soft labels."""

import warnings
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ddengine.errors import UsageError
from ddengine.nets.core import NetSpec
from ddengine.rng import Rng
from ddengine.types import Task
from expert_buffers.store import ExpertBuffer
from synth.starts import STARTS, start_images

EXPERT_STARTS = ("correct", "representative")
CLUSTERS = 10  # AST
BATCH = 500


def oldest(buffer: ExpertBuffer, network: NetSpec) -> list[int]:
    """The experts with this architecture that were trained longest: their last checkpoints teach."""
    mine = buffer.matching(network)
    longest = max((buffer.epochs(i) for i in mine), default=0)
    return [i for i in mine if buffer.epochs(i) == longest]


def teacher(buffer: ExpertBuffer, number: int, row: int | None, device: torch.device) -> nn.Module:
    """Expert `number` after epoch `row` (None: its last) in eval mode."""
    return buffer.build(number, buffer.epochs(number) if row is None else row).to(device).eval()


@torch.no_grad()
def logits_of(net: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """Logits of model-input images, in batches, on their device."""
    return torch.cat([net(part) for part in x.split(BATCH)])


def start(task: Task, network: NetSpec, name: str, count: int, rng: Rng) -> Float[Tensor, "m c h w"]:
    """`count` start images a class, class by class: any of `synth.starts`, or chosen by experts ("correct":
    DATM, "representative": AST). UsageError as `start_images` has, and where experts get too few right.
    """
    if name in STARTS:
        return start_images(name, task.images, count, rng)
    pick = correct if name == "correct" else representative
    return task.images.model_input(pick(task, network, count, rng)).float().clone()


def correct(task: Task, network: NetSpec, count: int, rng: Rng) -> Int[Tensor, " m"]:
    """Per class `count` images, in random order, that an expert classifies correctly (DATM).

    The next expert is asked only where the first leaves a class short; UsageError where all of them do.
    """
    numbers = oldest(task.experts, network)
    order = torch.randperm(len(numbers), generator=rng.torch("experts")).tolist()
    spec, counts = task.images.spec, task.images.counts
    firsts = torch.tensor([0, *counts]).cumsum(0).tolist()
    chosen: list[list[int]] = [[] for _ in counts]
    for place in order:
        if all(len(found) == count for found in chosen):
            break
        net = teacher(task.experts, numbers[place], None, task.device)
        for c, n in enumerate(counts):
            shuffled = firsts[c] + torch.randperm(n, generator=rng.fold("class", c, place).torch("order"))
            for index in _right(net, task, shuffled, c, count):
                if len(chosen[c]) == count:
                    break
                if index not in chosen[c]:
                    chosen[c].append(index)
    for c, found in enumerate(chosen):
        if len(found) < count:
            raise UsageError(
                f"the experts get {len(found)} images of class '{spec.classes[c]}' right, {count} are needed",
                "Give matcher.start=real, or record experts with full_experts=5",
            )
    return torch.tensor([index for found in chosen for index in found])


def _right(net: nn.Module, task: Task, index: Tensor, label: int, count: int) -> Iterator[int]:
    """Those of `index` that `net` gives the class `label`, read no further than asked."""
    for part in index.split(max(32, 2 * count)):
        predicted = logits_of(net, task.images.model_input(part).to(task.device)).argmax(1).cpu()
        yield from part[predicted == label].tolist()


def representative(task: Task, network: NetSpec, count: int, rng: Rng) -> Int[Tensor, " m"]:
    """Per class `count` images, those nearest the k-means centres of its logits under one expert (AST).

    min(count, 10) clusters share `count` evenly, the remainder goes to the largest, and no image comes twice.
    """
    numbers = oldest(task.experts, network)
    number = numbers[int(torch.randint(len(numbers), (), generator=rng.torch("expert")))]
    net = teacher(task.experts, number, None, task.device)
    picks, first = [], 0
    for c, n in enumerate(task.images.counts):
        parts = torch.arange(first, first + n).split(BATCH)
        logits = [logits_of(net, task.images.model_input(part).to(task.device)).cpu() for part in parts]
        seed = rng.fold("class", c).integer("kmeans") % 2**32
        picks.append(first + _nearest(torch.cat(logits), count, seed))
        first += n
    return torch.cat(picks)


def _nearest(x: Float[Tensor, "n d"], count: int, seed: int) -> Int[Tensor, " count"]:
    with threadpool_limits(limits=1):
        made = KMeans(min(count, CLUSTERS), n_init=3, random_state=seed).fit(x.double().numpy())
    cluster, centres = torch.from_numpy(made.labels_).long(), torch.from_numpy(made.cluster_centers_)
    sizes = torch.bincount(cluster, minlength=len(centres))
    chosen = []
    for c, share in enumerate(shares(sizes.tolist(), count)):
        mine = (cluster == c).nonzero().squeeze(1)
        distance = (x[mine].double() - centres[c]).square().sum(1)
        chosen.append(mine[distance.argsort(stable=True)[:share]])
    return torch.cat(chosen)


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` each cluster gives: equal shares within its size, what is left to the largest."""
    given = [min(size, count // len(sizes)) for size in sizes]
    by_size = sorted(range(len(sizes)), key=lambda c: (-sizes[c], c))
    while sum(given) < count:
        for c in by_size:
            if sum(given) < count and given[c] < sizes[c]:
                given[c] += 1
    return given


def soft_labels(
    buffer: ExpertBuffer, network: NetSpec, x: Float[Tensor, "m c h w"], y: Int[Tensor, " m"]
) -> Float[Tensor, "m k"]:
    """Label logits of images: the mean over the experts that are right for that image (DATM).

    Where none is, the mean logits of its class take their place, with a warning: the published mean is then
    0 / 0. A class without any right answer gets the mean over all experts.
    """
    made = [logits_of(teacher(buffer, i, None, x.device), x) for i in oldest(buffer, network)]
    logits = torch.stack(made)
    right = (logits.argmax(2) == y).to(logits)[:, :, None]
    mean = (logits * right).sum(0) / right.sum(0).clamp(min=1)
    lost = (right.sum(0).squeeze(1) == 0).nonzero().squeeze(1)
    for i in lost.tolist():
        sure = (y == y[i]) & (right.sum(0).squeeze(1) > 0)
        mean[i] = mean[sure].mean(0) if bool(sure.any()) else logits[:, i].mean(0)
    if len(lost):
        warnings.warn(
            f"no expert is right about {len(lost)} of {len(x)} start images: their labels are class means",
            stacklevel=2,
        )
    return mean


def assigned_labels(
    buffer: ExpertBuffer, network: NetSpec, x: Float[Tensor, "m c h w"], row: int
) -> Float[Tensor, "m k"]:
    """Mean probabilities of the experts' checkpoint `row`: what TESLA's label assignment ends with."""
    numbers = buffer.matching(network)
    return torch.stack([logits_of(teacher(buffer, i, row, x.device), x).softmax(1) for i in numbers]).mean(0)
