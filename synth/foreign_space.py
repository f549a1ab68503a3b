"""What the values of foreign images are, told or inferred, and the way into a dataset's model-input space."""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import UsageError
from ddengine.types import DataSpec
from synth.foreign_files import Found

SPACES = ("auto", "normalised", "pixels", "zca")
NEAR = 0.25  # values that leave [0, 1] by less could be pixels that were not clamped, or low contrast
FULL = 0.9  # pixels in [0, 1] reach this somewhere
ASK = "Say what they are: normalised, pixels or zca"


def model_input(path: Path, found: Found, spec: DataSpec, space: str) -> tuple[Tensor, tuple[str, ...]]:
    """The images in the spec's model-input space (float32), and notes on how they came there.

    `space` "auto" takes what the file tells, else what the range of values does. Raises UsageError where
    what was asked for cannot be, or the space cannot be told.
    """
    x = found.x
    if x.dtype == torch.uint8:
        if space not in ("auto", "pixels"):
            raise UsageError(f"{path} holds uint8 pixels, which are not {space}", "Leave that out")
        return spec.normalise(x), (f"uint8 pixels are brought to model input as those of '{spec.name}' are",)
    if space == "auto" and found.made_with is not None:
        return _told_input(x, found.made_with, spec)
    inferred: tuple[str, ...] = ()
    if space == "auto" and found.space:
        space = found.space
    elif space == "auto":
        space, evidence = infer_space(x, spec.zca is not None)
        inferred = (evidence,)
    way = {"pixels": _pixel_input, "normalised": _normalised_input, "zca": _whitened_input}[space]
    made, how = way(x, spec)
    return made, (*inferred, *how)


def infer_space(x: Float[Tensor, "n c h w"], whitened: bool) -> tuple[str, str]:
    """What the values of float images are, and the evidence (UsageError where they could be two things).

    `whitened` says that model input is whitened. Values far outside [0, 1] on the negative side are model
    input; values that fill [0, 1] and never leave it are pixels.
    """
    low, high = float(x.min()), float(x.max())
    if low < -NEAR or (low < 0 and high > 1 + NEAR):
        space = "zca" if whitened else "normalised"
        return space, f"values from {low:.3g} to {high:.3g} lie outside [0, 1]: no pixels but model input"
    if low >= 0 and FULL < high <= 1:
        return "pixels", f"values from {low:.3g} to {high:.3g} fill [0, 1]: pixels"
    raise UsageError(f"values from {low:.3g} to {high:.3g} may be pixels or model input", ASK)


def _pixel_input(x: Tensor, spec: DataSpec) -> tuple[Tensor, tuple[str, ...]]:
    low, high = float(x.min()), float(x.max())
    if low < -1 or high > 2:
        raise UsageError(
            f"values from {low:.3g} to {high:.3g} are no pixels in [0, 1]",
            "Divide pixels up to 255 by that or store them as uint8; or say that they are model input",
        )
    how = f"pixels are brought to model input as those of '{spec.name}' are"
    kept = f"; those from {low:.3g} to {high:.3g} are kept, not clamped" if low < 0 or high > 1 else ""
    return spec.normalise(x), (f"{how}{kept}",)


def _normalised_input(x: Tensor, spec: DataSpec) -> tuple[Tensor, tuple[str, ...]]:
    mean, std = ([round(v, 4) for v in values] for values in (spec.mean, spec.std))
    how = f"taken as normalised with the mean {mean} and std {std} of '{spec.name}'"
    if spec.zca is None:
        return x, (how,)
    return spec.normalise(replace(spec, zca=None).denormalise(x)), (how, "whitened as the dataset is")


def _whitened_input(x: Tensor, spec: DataSpec) -> tuple[Tensor, tuple[str, ...]]:
    if spec.zca is None:
        raise UsageError(
            f"ZCA-whitened images for '{spec.name}', which is not whitened", "Give dataset.preprocessing=zca"
        )
    how = "taken as ZCA-whitened by the dataset's matrix, computed again from its fit part"
    return x, (how,)


def _told_input(x: Tensor, made_with: DataSpec, spec: DataSpec) -> tuple[Tensor, tuple[str, ...]]:
    """Images of a file that tells its mean, std and whitening: themselves where these are the spec's."""
    if _same_space(made_with, spec):
        return x, ()
    how = "the file tells another mean, std or whitening than the dataset's: brought over by way of pixels"
    return spec.normalise(made_with.denormalise(x)), (how,)


def _same_space(a: DataSpec, b: DataSpec) -> bool:
    if a.zca is None or b.zca is None:
        return a.zca is b.zca and (a.mean, a.std) == (b.mean, b.std)
    pairs = ((a.zca.mean, b.zca.mean), (a.zca.matrix, b.zca.matrix), (a.zca.inverse, b.zca.inverse))
    return all(torch.equal(left, right.to(left)) for left, right in pairs)
