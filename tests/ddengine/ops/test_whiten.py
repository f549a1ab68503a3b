import numpy as np
import pytest
import torch

from ddengine.errors import UsageError
from ddengine.ops.whiten import fit_zca
from ddengine.types import DataSpec


def images(n: int = 211, shape: tuple[int, int, int] = (3, 2, 5), seed: int = 0) -> torch.Tensor:
    """Correlated pixels in [0, 1]."""
    rng = np.random.default_rng(seed)
    d = int(np.prod(shape))
    z = rng.standard_normal((n, d)) @ rng.standard_normal((d, d))
    return torch.from_numpy(1 / (1 + np.exp(-z))).float().reshape(n, *shape)


def reference(x: torch.Tensor, eps: float) -> tuple[np.ndarray, np.ndarray]:
    flat = x.double().flatten(1).numpy()
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
    return mean, vectors @ np.diag((values + eps) ** -0.5) @ vectors.T


@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_whitening_equals_the_eigendecomposition_in_float64(eps):
    x = images()
    ours = fit_zca(x, eps)
    mean, matrix = reference(x, eps)
    assert np.allclose(ours.mean, mean, atol=1e-5)
    assert np.allclose(ours.matrix, matrix, atol=1e-3 * np.abs(matrix).max())
    assert np.allclose(ours.inverse, np.linalg.inv(matrix), atol=1e-4)


def test_unwhitening_undoes_whitening():
    x = images()
    spec = DataSpec("s", (3, 2, 5), ("a", "b"), (0.0,) * 3, (1.0,) * 3, zca=fit_zca(x))
    assert torch.allclose(spec.denormalise(spec.normalise(x)), x, atol=1e-5)
    other = images(17, seed=1)
    assert torch.allclose(spec.denormalise(spec.normalise(other)), other, atol=1e-5)


def test_whitened_covariance_is_the_identity_up_to_eps():
    x = images()
    for eps, tolerance in ((1e-6, 1e-3), (0.1, None)):
        zca = fit_zca(x, eps)
        white = (x.flatten(1) - zca.mean) @ zca.matrix
        found = np.linalg.eigvalsh(np.cov(white.double().numpy(), rowvar=False))
        values = np.linalg.eigvalsh(np.cov(x.double().flatten(1).numpy(), rowvar=False))
        assert np.allclose(found, values / (values + eps), atol=1e-3)
        if tolerance is not None:
            assert np.allclose(found, 1, atol=tolerance)


def test_the_matrix_is_symmetric_so_that_whitened_images_look_like_images():
    matrix = fit_zca(images()).matrix
    assert torch.allclose(matrix, matrix.T, atol=1e-5)


def test_fewer_images_than_pixels_are_whitened_too():
    x = images(11)
    zca = fit_zca(x)
    assert torch.allclose(zca.matrix @ zca.inverse, torch.eye(30), atol=1e-4)


def test_what_cannot_be_whitened_is_refused_with_the_reason():
    with pytest.raises(UsageError, match=r"12291 x 12291 matrix.*\n.*preprocessing=standard"):
        fit_zca(torch.zeros(2, 3, 17, 241))
    with pytest.raises(UsageError, match="two images or more, got 1"):
        fit_zca(torch.zeros(1, 1, 2, 2))
    with pytest.raises(UsageError, match="eps=0.0 is out of range"):
        fit_zca(images(), 0.0)
