"""ZCA whitening of images, fitted once on the fit part by kornia; the inverse is kept for decoding."""

from math import prod

from jaxtyping import Float
from kornia.enhance import zca_mean
from torch import Tensor

from ddengine.errors import UsageError, require_positive
from ddengine.types import Whitening

EPS = 0.1  # added to the eigenvalues of the covariance of pixels in [0, 1], as MTT and DataDAM do
LIMIT = 12_288  # 64x64x3: beyond it the d x d matrices take more than 600 MB each and hours to factorise


def check_dimensions(shape: tuple[int, int, int]) -> None:
    """Refuse images (c, h, w) with more than 12,288 values (UsageError)."""
    if prod(shape) > LIMIT:
        raise UsageError(
            f"ZCA of images {shape} needs a {prod(shape)} x {prod(shape)} matrix; the limit is {LIMIT}",
            "Use dataset.preprocessing=standard, or smaller images by dataset.size=N",
        )


def fit_zca(x: Float[Tensor, "n c h w"], eps: float = EPS) -> Whitening:
    """The whitening W = U (S + eps)^(-1/2) U^T of pixels in [0, 1] and its inverse, on flattened images.

    U S U^T is the covariance over images (divisor n - 1). Raises UsageError for fewer than two images,
    for a non-positive eps and for images of more than 12,288 values.
    """
    require_positive("eps", eps)
    check_dimensions((x.shape[1], x.shape[2], x.shape[3]))
    if len(x) < 2:
        raise UsageError(f"ZCA needs two images or more, got {len(x)}", "Use dataset.preprocessing=standard")
    matrix, mean, inverse = zca_mean(x.flatten(1).float(), eps=float(eps), return_inverse=True)
    assert inverse is not None
    return Whitening(mean[0], matrix, inverse)
