"""Images by class: which go together, and the class means of statistics that arrive in pieces."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.types import SynthSet
from synth.compensated import Compensated
from synth.factored import Factored


def groups(classes: int, per_class: int, chunk: int, together: bool) -> Iterator[Int[Tensor, " g"]]:
    """Consecutive classes in groups of at most `chunk` images (at least one class); all if `together`.

    `per_class` is the most images that a class has.
    """
    yield from torch.arange(classes).split(classes if together else max(1, chunk // per_class))


def members(classes: Int[Tensor, " n"], count: int) -> list[Tensor]:
    """The indices of each of `count` classes in a label vector."""
    return [(classes.cpu() == c).nonzero().squeeze(1) for c in range(count)]


def classes_of(synth: SynthSet) -> Int[Tensor, " n"]:
    """The class of every image of a set, of composites and cells without making them."""
    if isinstance(synth, Factored):
        return synth.classes
    return synth.composites().classes if isinstance(synth, Compensated) else synth.decode().classes


def listing(picks: list[Tensor], group: Int[Tensor, " g"]) -> tuple[Tensor, Tensor]:
    """The picked indices of the classes in `group`, class after class, and each one's place in `group`."""
    chosen = [picks[c] for c in group.tolist()]
    place = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(p) for p in chosen]))
    return torch.cat(chosen), place


def group_means(
    pieces: Iterator[tuple[list[Tensor], Int[Tensor, " n"]]], count: int
) -> list[Float[Tensor, "g _"]]:
    """Class means of per-image statistics that arrive in pieces, each with its images' places in the group.

    Every class needs an image: one without has the mean 0.
    """
    sums: list[Tensor] = []
    numbers = torch.zeros(count)
    for values, place in pieces:
        member = F.one_hot(place, count).T
        numbers += member.sum(1)
        added = [member.to(v) @ v for v in values]  # a product, not a scatter: the same bits on every run
        sums = [s + a for s, a in zip(sums, added, strict=True)] if sums else added
    return [s / numbers.clamp(min=1).to(s)[:, None] for s in sums]
