"""Where synthetic images start, and subsets of real images: class-balanced, driven by named generators.

Every selection takes class-sorted images and returns the indices of `ipc` distinct images per class, class
by class in label order. Distances are Euclidean between flattened images in model-input space. Only one
class at a time is turned into floats.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from ddengine.errors import UsageError, require_positive, unknown
from ddengine.rng import Rng
from ddengine.types import Images

MINIBATCH_ABOVE = 5000  # images in a class above which k-means works on mini-batches

Selection = Callable[[Images, int, Rng], Tensor]


def random(source: Images, ipc: int, rng: Rng) -> Int[Tensor, " m"]:
    """`ipc` images of each class, uniformly without replacement. Raises UsageError when a class has fewer."""
    return torch.cat([first + _draw(n, ipc, rng.fold(c)) for c, first, n in _balanced(source, ipc)])


def random_total(source: Images, count: int, rng: Rng) -> Int[Tensor, " m"]:
    """`count` images in all, spread over the classes as evenly as their sizes allow.

    What does not divide evenly goes to classes drawn at random. With `count` = ipc * k this is `random`.
    Raises UsageError when the source holds fewer than `count`.
    """
    require_positive("count", count)
    if count > len(source):
        raise UsageError(f"count={count} of {len(source)} images", f"Give at most {len(source)}")
    quota = _quota(torch.tensor(source.counts), count, rng.torch("remainder")).tolist()
    return torch.cat([first + _draw(n, quota[c], rng.fold(c)) for c, first, n in _classes(source)])


def herding(source: Images, ipc: int, rng: Rng) -> Int[Tensor, " m"]:
    """Greedy herding (Welling, 2009): each image brings the mean of those chosen closest to the class mean.

    Deterministic: `rng` is not used. Raises UsageError when a class has fewer than `ipc` images.
    """
    classes = _balanced(source, ipc)
    return torch.cat([first + _herd(_features(source, first, n), ipc) for _, first, n in classes])


def kcenter(source: Images, ipc: int, rng: Rng) -> Int[Tensor, " m"]:
    """Greedy k-centre: the image nearest the class mean, then always the one farthest from those chosen.

    Deterministic: `rng` is not used. Raises UsageError when a class has fewer than `ipc` images.
    """
    classes = _balanced(source, ipc)
    return torch.cat([first + _spread(_features(source, first, n), ipc) for _, first, n in classes])


def kmeans(source: Images, ipc: int, rng: Rng) -> Int[Tensor, " m"]:
    """The distinct real images nearest the `ipc` k-means centres of each class (scikit-learn, k-means++).

    Classes of more than 5000 images use mini-batch k-means. Runs on one thread, so that the sums inside
    have one order. Raises UsageError when a class has fewer than `ipc` images.
    """
    parts = []
    for c, first, n in _balanced(source, ipc):
        x = _features(source, first, n)
        parts.append(first + _nearest_distinct(x, _centres(x, ipc, rng.fold(c).integer("kmeans") % 2**32)))
    return torch.cat(parts)


def _balanced(source: Images, ipc: int) -> Iterator[tuple[int, int, int]]:
    """`_classes`, after every class was found to hold `ipc` images."""
    require_positive("ipc", ipc)
    counts = source.counts
    for name, n in zip(source.spec.classes, counts, strict=True):
        if ipc > n:
            raise UsageError(
                f"ipc={ipc} is more than class '{name}' has: {n} images",
                f"Give an ipc of at most {min(counts)}, or add images to that class",
            )
    return _classes(source)


def _classes(source: Images) -> Iterator[tuple[int, int, int]]:
    """Number, first index and size of each class of a class-sorted source."""
    labels, first = source.classes, 0
    if not bool((labels[1:] >= labels[:-1]).all()):
        raise UsageError("the source is not sorted by class", "Call sorted_by_class() on the images first")
    for c, n in enumerate(source.counts):
        yield c, first, n
        first += n


def _features(source: Images, first: int, n: int) -> Tensor:
    return source.model_input(slice(first, first + n)).flatten(1).float()


def _draw(n: int, count: int, rng: Rng) -> Tensor:
    return torch.randperm(n, generator=rng.torch("random"))[:count]


def _quota(room: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """How many images each class gives: equal shares, capped by `room`, the remainder drawn."""
    quota = torch.zeros_like(room)
    while (left := count - int(quota.sum())) > 0:
        free = (quota < room).nonzero().squeeze(1)
        if left < len(free):
            quota[free[torch.randperm(len(free), generator=generator)[:left]]] += 1
        else:
            quota[free] = torch.minimum(quota[free] + left // len(free), room[free])
    return quota


def _herd(x: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
    # With the class mean at 0, |sum + x|^2 differs between candidates only by |x|^2 + 2 x.sum.
    x = x - x.mean(0)
    cost = x.square().sum(1)
    chosen = []
    for _ in range(count):
        pick = int(cost.argmin())
        chosen.append(pick)
        cost += 2 * (x @ x[pick])
        cost[pick] = torch.inf
    return torch.tensor(chosen, dtype=torch.long)


def _spread(x: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
    chosen = [int((x - x.mean(0)).square().sum(1).argmin())]
    distance = torch.full((len(x),), torch.inf, device=x.device)
    while len(chosen) < count:
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
        distance[chosen[-1]] = -1
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen[:count], dtype=torch.long)


def _centres(x: Float[Tensor, "n d"], count: int, seed: int) -> Float[Tensor, "m d"]:
    method = KMeans if len(x) <= MINIBATCH_ABOVE else MiniBatchKMeans
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than centres is fine here
        fitted = method(n_clusters=count, n_init=3, random_state=seed).fit(x.cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(x)


def _nearest_distinct(x: Float[Tensor, "n d"], centres: Float[Tensor, "m d"]) -> Int[Tensor, " m"]:
    taken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    chosen = []
    for centre in centres:
        pick = int((x - centre).square().sum(1).masked_fill(taken, torch.inf).argmin())
        taken[pick] = True
        chosen.append(pick)
    return torch.tensor(chosen, dtype=torch.long)


def _noise(source: Images, ipc: int, rng: Rng) -> Tensor:
    require_positive("ipc", ipc)
    shape = (ipc * len(source.spec.classes), *source.spec.shape)
    return torch.randn(shape, generator=rng.torch("noise")).to(source.x.device)


def _real(selection: Selection, source: Images, ipc: int, rng: Rng) -> Tensor:
    return source.model_input(selection(source, ipc, rng)).float().clone()


SELECTIONS: dict[str, Selection] = {
    "random": random,
    "herding": herding,
    "kmeans": kmeans,
    "kcenter": kcenter,
}
STARTS: dict[str, Selection] = {
    "noise": _noise,
    "real": partial(_real, random),
    "kmeans": partial(_real, kmeans),
    "herding": partial(_real, herding),
    "kcenter": partial(_real, kcenter),
}


def start_images(name: str, source: Images, ipc: int, rng: Rng) -> Float[Tensor, "m c h w"]:
    """`ipc` start images per class in label order, float32 in model-input space, on the source's device.

    "noise" is N(0, 1); "real" is a random draw; "kmeans", "herding" and "kcenter" are those selections.
    Raises UsageError for another name, and when a class has fewer than `ipc` images.
    """
    if name not in STARTS:
        raise unknown("start", name, STARTS)
    return STARTS[name](source, ipc, rng)
