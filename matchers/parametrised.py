"""What a pixel matcher moves: free pixels, or bases and the compensators that they share (`synth=...`).

The gradient of a loss flows through `decode` into all free tensors. A base and its composites have one class;
a compensator is shared by all classes of a group of sheets.
"""

from dataclasses import dataclass, fields, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.rng import Rng
from ddengine.types import SynthSet, Task, no_budget
from matchers.sheets import groups_of, places
from synth import Pixels
from synth.budget import SheetPlan, nominal_bytes, plan
from synth.compensated import Compensated
from synth.pixels import CODECS

FORMS = ("pixels", "compensated")
REMEDY = "Give a larger ipc or budget.nbytes, or fewer matcher.synth.compensators"
START = 0.2  # deviation of compensators at the start, in model input: equal ones would stay equal


@dataclass(frozen=True)
class FormOptions:
    """What is free: "pixels", or "compensated" with `compensators` for each of at most `groups` of sheets.

    A compensator's rate is the matcher's times `rate`: it follows the gradients of all its composites.
    """

    name: str = "pixels"
    compensators: int = 2
    groups: int = 1
    rate: float | int = 0.1

    def __post_init__(self) -> None:
        require(self.name, FORMS, "synth")
        for key in ("compensators", "groups", "rate"):
            require_positive(f"matcher.synth.{key}", getattr(self, key))
        for key in ("compensators", "groups"):
            if not isinstance(getattr(self, key), int):
                raise UsageError(
                    f"matcher.synth.{key}={getattr(self, key)} is not a whole number", "Give a whole number"
                )

        usual = all(getattr(self, f.name) == f.default for f in fields(self))
        if self.name == "pixels" and not usual:
            raise UsageError("matcher.synth has options and synth is pixels", "Give synth=compensated")

    def factor(self, tensor: str) -> float:
        """The rate of a free tensor over that of pixels."""
        return float(self.rate) if tensor == "compensators" else 1.0


@dataclass(frozen=True)
class Beside:
    """Bytes beside bases and compensators: `fixed` ones, and those of each composite's soft label."""

    fixed: int = 0
    labels: int = 0


def sheet_plan(task: Task, o: FormOptions, codec: str, beside: Beside = Beside()) -> SheetPlan:
    """The sheets of free bases that the budget holds beside their compensators (else UsageError)."""
    if task.budget is None:
        raise no_budget()
    spec = task.images.spec
    affine = 8 * spec.shape[0] if codec == "uint8" else 0
    image = prod(spec.shape) * CODECS[codec].itemsize + affine
    nominal = nominal_bytes(task.budget, spec)
    return plan(
        nominal, spec, o.compensators, o.groups, beside.labels, beside.fixed, image,
        limit=min(task.images.counts), remedy=REMEDY,
    )  # fmt: skip


def per_class(task: Task, o: FormOptions, codec: str, beside: Beside = Beside()) -> int:
    """Images to start from in each class: free pixels, or bases of which the last sheet may lack classes."""
    if o.name == "pixels":
        return task.ipc
    made = sheet_plan(task, o, codec, beside)
    return made.sheets + (made.last > 0)


def count(task: Task, o: FormOptions, codec: str, beside: Beside = Beside()) -> int:
    """Images that the set will decode to."""
    if o.name == "pixels":
        return task.ipc * len(task.images.spec.classes)
    made = sheet_plan(task, o, codec, beside)
    return (made.sheets * len(task.images.spec.classes) + made.last) * (o.compensators + 1)


def form(
    task: Task, x: Float[Tensor, "m c h w"], o: FormOptions, codec: str, rng: Rng, beside: Beside = Beside()
) -> SynthSet:
    """The hard-labelled set that starts at `x`, `per_class` images class by class, on their device."""
    spec = task.images.spec
    classes = len(spec.classes)
    labels = torch.arange(classes, device=x.device).repeat_interleave(len(x) // classes)
    if o.name == "pixels":
        return Pixels(x, labels, spec, codec=codec)
    made = sheet_plan(task, o, codec, beside)
    label, sheet = places(made, classes, rng)
    index = (label * (len(x) // classes) + sheet).to(x.device)
    shape = (made.groups, o.compensators, *spec.shape)
    drawn = START * torch.randn(shape, generator=rng.torch("compensators")).to(x)
    group = groups_of(made, sheet).to(x.device)
    return Compensated(x[index], labels[index], drawn, group, spec, base_codec=codec)


def pulled_back(synth: SynthSet, gradient: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
    """The gradient for the free tensors of the images, from that for the images themselves."""
    free = {k: v.detach().requires_grad_() for k, v in synth.params().items() if k != "labels"}
    x = synth.replace(free).decode().x
    return dict(zip(free, torch.autograd.grad(x, list(free.values()), gradient), strict=True))


def finished(synth: SynthSet, rate: float, labels: Tensor, y_kind: str) -> SynthSet:
    """The set with the student's rate and with these labels: class numbers, logits or probabilities."""
    if isinstance(synth, Pixels):
        return replace(synth, labels=labels, y_kind=y_kind, student_lr=rate)
    assert isinstance(synth, Compensated)
    if y_kind == "class":
        return replace(synth, student_lr=rate)
    logits = labels if y_kind == "logit" else labels.clamp(min=torch.finfo(labels.dtype).tiny).log()
    return replace(synth, labels=logits, label_codec="fp16", student_lr=rate)


def with_labels(synth: SynthSet, logits: Float[Tensor, "n k"]) -> SynthSet:
    """The set with label logits, which are free from then on."""
    if isinstance(synth, Pixels):
        return replace(synth, labels=logits, y_kind="logit")
    assert isinstance(synth, Compensated)
    return replace(synth, labels=logits, label_codec="fp16")
