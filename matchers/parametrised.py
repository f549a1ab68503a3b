"""What a pixel matcher moves (`synth=...`): free pixels, grids of small images, or bases and compensators.

The gradient of a loss flows through `decode` into all free tensors. All cells of a grid have its class, and a
base and its composites have one; a compensator is shared by all classes of a group of sheets.
"""

from dataclasses import dataclass, replace
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
from synth.factored import Factored, factor_problem, reduced
from synth.pixels import CODECS

FORMS: dict[str, tuple[str, ...]] = {  # each with the options that are its own
    "pixels": (),
    "factored": ("factor",),
    "compensated": ("compensators", "groups", "rate"),
}
FACTOR = 2  # cells to a side of a grid: IDC's for small images
REMEDY = "Give a larger ipc or budget.nbytes, or fewer matcher.synth.compensators"
START = 0.2  # deviation of compensators at the start, in model input: equal ones would stay equal


@dataclass(frozen=True)
class FormOptions:
    """What is free: "pixels"; "factored", grids of `factor` x `factor` down-scaled images (None: 2); or
    "compensated" with `compensators` for each of at most `groups` of sheets.

    A compensator's rate is the matcher's times `rate`: it follows the gradients of all its composites.
    """

    name: str = "pixels"
    factor: int | None = None
    compensators: int = 2
    groups: int = 1
    rate: float | int = 0.1

    def __post_init__(self) -> None:
        """Fill in what the form decides, so that a manifest tells what was really used."""
        require(self.name, FORMS, "synth")
        for form, keys in FORMS.items():
            for key in keys:
                self._check(form, key, getattr(self, key))
        if self.name == "factored" and self.factor is None:
            object.__setattr__(self, "factor", FACTOR)

    def _check(self, form: str, key: str, value: float | int | None) -> None:
        usual = self.__dataclass_fields__[key].default
        if value is not None:
            require_positive(f"matcher.synth.{key}", value)
            if key != "rate" and not isinstance(value, int):
                raise UsageError(f"matcher.synth.{key}={value} is not a whole number", "Give a whole number")
        if self.name != form and value != usual:
            raise UsageError(f"matcher.synth.{key}={value} and synth is {self.name}", f"Give synth={form}")

    def relative_rate(self, tensor: str) -> float:
        """The rate of a free tensor over that of pixels."""
        return float(self.rate) if tensor == "compensators" else 1.0

    @property
    def cells(self) -> int:
        """Images that a stored one is decoded to, compensators apart."""
        return (self.factor or 1) ** 2


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
    """Images to start from in each class: free pixels, the cells of grids, or bases, of which the last sheet
    may lack classes. UsageError where a class has fewer images than there are cells.
    """
    if o.name != "compensated":
        return _cells_of_a_class(task, o)
    made = sheet_plan(task, o, codec, beside)
    return made.sheets + (made.last > 0)


def _cells_of_a_class(task: Task, o: FormOptions) -> int:
    least, filled = min(task.images.counts), task.ipc * o.cells
    if o.name == "factored":
        if wrong := factor_problem(o.factor or 1, task.images.spec):
            raise UsageError(f"matcher.synth.factor={o.factor}: {wrong}", "Give a smaller factor")
        if filled > least:
            raise UsageError(
                f"{task.ipc} images a class start from {filled} at matcher.synth.factor={o.factor}, and the "
                f"smallest class has {least}",
                "Give a smaller ipc or a smaller factor",
            )
    return filled


def count(task: Task, o: FormOptions, codec: str, beside: Beside = Beside()) -> int:
    """Images that the set will decode to."""
    if o.name != "compensated":
        return task.ipc * o.cells * len(task.images.spec.classes)
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
    if o.name == "factored":
        assert o.factor is not None
        return Factored(reduced(x, o.factor), labels[:: o.cells], spec, o.factor, codec=codec)
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
    if isinstance(synth, Factored):
        shared = synth.labels if y_kind == "class" else labels
        return replace(synth, labels=shared, y_kind=y_kind, student_lr=rate)
    assert isinstance(synth, Compensated)
    if y_kind == "class":
        return replace(synth, student_lr=rate)
    logits = labels if y_kind == "logit" else labels.clamp(min=torch.finfo(labels.dtype).tiny).log()
    return replace(synth, labels=logits, label_codec="fp16", student_lr=rate)


def with_labels(synth: SynthSet, logits: Float[Tensor, "n k"]) -> SynthSet:
    """The set with label logits, which are free from then on."""
    if isinstance(synth, Pixels | Factored):
        return replace(synth, labels=logits, y_kind="logit")
    assert isinstance(synth, Compensated)
    return replace(synth, labels=logits, label_codec="fp16")
