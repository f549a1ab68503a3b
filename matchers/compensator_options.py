"""Options of compensators and their family, and how a network is trained on what they make."""

import re
from dataclasses import dataclass

from ddengine.errors import UsageError, require, require_positive
from matchers.bn_statistics import WEIGHTINGS
from synth.compensated import COMPENSATOR_CODECS
from synth.labels import LABEL_CODECS, check_topk
from synth.starts import SELECTIONS

RECOVER = ("compensator", "noise", "none", "images", "crops")
LABELS = ("hard", "static", "dynamic")
SMALL = 64  # pixels of the shorter side up to which images are small: no crops, one image in a collage
KD = {  # the released validator, in steps; the loss times T^2, which its AdamW hardly notices
    "optimiser": "adamw", "lrs": [5e-4, 1e-3, 2e-3], "weight_decay": 0.01, "batch_size": 64, "steps": 2000,
    "loss": "kl", "mix": "mixup", "mix_alpha": 0.8, "augment_mode": "item",
}  # fmt: skip


@dataclass(frozen=True)
class CompensatorOptions:
    """Options of the `compensator` matcher; the defaults are the released CIFAR settings.

    `recover`: compensator, or a rival (see above). `labels`: hard, static (stored logits in `label_codec`) or
    dynamic (the teachers are stored and asked in training; `count_teachers` says whether their bytes count
    against the budget, they are always stated). `groups` of sheets share compensators (None: one a sheet, as
    published). `teachers` and `label_teachers` are numbers of experts (None: all). `weighting` of the layers
    is "released" or "normalised" (comparable between architectures); `jitter` pixels of roll (None: an eighth
    of the side); `crop` the smallest area of a crop (1: none), `flip` mirrors, one view for a batch;
    `class_batch` images of a group a step (None: all); `chunk` bounds the images in one forward pass, at
    least one group. `start` is how real images are chosen; `parts` is RDED's collage (None: 1 up to 64
    pixels, 2 above); `fraction` fills what the budget leaves with a partial sheet.
    """

    recover: str = "compensator"
    labels: str = "static"
    groups: int | None = None
    teachers: tuple[int, ...] | None = None
    label_teachers: tuple[int, ...] | None = None
    steps: int = 1000
    lr: float | int = 0.25
    ce_weight: float | int = 1.0
    r_bn: float | int = 1.0
    first_weight: float | int = 10.0
    weighting: str = "released"
    jitter: int | None = None
    crop: float | int = 1.0
    flip: bool = False
    class_batch: int | None = None
    chunk: int = 256
    start: str = "random"
    parts: int | None = None
    temperature: float | int = 30.0
    label_codec: str = "int8"
    codec: str = "int8"
    fraction: bool = True
    count_teachers: bool = True

    def __post_init__(self) -> None:
        _refuse_topk(self.label_codec, self.temperature)
        allowed = {
            "recover": RECOVER, "labels": LABELS, "weighting": WEIGHTINGS, "start": SELECTIONS,
            "label_codec": LABEL_CODECS, "codec": COMPENSATOR_CODECS,
        }  # fmt: skip
        for key, values in allowed.items():
            require(getattr(self, key), values, f"matcher.{key}")
        for key in ("steps", "groups", "class_batch", "chunk", "parts", "jitter"):
            value = getattr(self, key)
            if value is not None and key != "jitter":
                require_positive(f"matcher.{key}", value)
            if not isinstance(value, int | None) or isinstance(value, bool):
                raise UsageError(f"matcher.{key}={value} is not a whole number", "Give a whole number")
        _refuse_needless(self)
        for key in ("lr", "temperature"):
            require_positive(f"matcher.{key}", getattr(self, key))
        for key in ("ce_weight", "r_bn", "first_weight", "jitter"):
            require_positive(f"matcher.{key}", getattr(self, key) or 0, zero=True)
        if self.ce_weight == 0 and self.r_bn == 0:
            raise UsageError("matcher.ce_weight and matcher.r_bn are both 0", "Give one of them")
        if not 0 < self.crop <= 1:
            raise UsageError(f"matcher.crop={self.crop} is out of range", "Give 0 < crop <= 1")
        for key in ("teachers", "label_teachers"):
            numbers = getattr(self, key)
            if numbers is not None and (not numbers or len(set(numbers)) < len(numbers)):
                raise UsageError(
                    f"matcher.{key}={list(numbers)} is empty or repeats", "Give different experts"
                )


def _refuse_needless(o: CompensatorOptions) -> None:
    """Refuse options that mean nothing beside the others (UsageError)."""
    shared, still = o.recover in ("compensator", "noise"), o.recover in ("none", "crops")
    needless = {
        "groups": o.groups is not None and not shared,
        "class_batch": o.class_batch is not None and still,
        "start": o.start != "random" and o.recover == "crops",
        "parts": o.parts is not None and o.recover != "crops",
    }
    for key, found in needless.items():
        if found:
            raise UsageError(f"matcher.{key} means nothing with matcher.recover={o.recover}", "Leave it out")
    if o.label_teachers is not None and o.labels == "hard":
        raise UsageError("matcher.label_teachers means nothing with matcher.labels=hard", "Leave it out")
    if not o.count_teachers and o.labels != "dynamic":
        raise UsageError("matcher.count_teachers=false needs matcher.labels=dynamic", "Leave it out")


def _refuse_topk(codec: str, temperature: float | int) -> None:
    """Labels of the k largest logits, such as "top5", are no codec of stored sets (UsageError says why)."""
    found = re.fullmatch(r"top([1-9]\d{0,4})", codec)
    if found is None:
        return
    check_topk(int(found[1]), temperature)
    raise UsageError(
        f"matcher.label_codec={codec}: sets store every logit, since they are trained on at any temperature",
        "Give matcher.label_codec=int4, half a byte a class",
    )
