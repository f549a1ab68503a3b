import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.preprocessing import KBinsDiscretizer

from ddengine.data.discretise import discretise
from ddengine.errors import UsageError


def normal(n: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(3, [1.0, 20.0, 0.01][:columns], (n, columns)))


def marked(n: int, inside: int) -> torch.Tensor:
    return torch.arange(n) < inside


def test_quantile_codes_are_those_of_scikit_learn():
    x, fit = normal(211, 3), marked(211, 157)
    made = discretise(x, fit, "quantile", 5)
    theirs = KBinsDiscretizer(5, encode="ordinal", strategy="quantile", quantile_method="inverted_cdf")
    theirs.fit(x[fit].numpy())
    ends = np.stack(theirs.bin_edges_)  # a bin of theirs begins where one of ours ends
    expected = np.stack([np.searchsorted(ends[c][1:-1], x[:, c].numpy()) for c in range(3)], 1)
    assert made.sizes == (5, 5, 5)
    assert (made.codes.numpy() == expected).all()


@pytest.mark.parametrize("method", ["quantile", "kmeans"])
def test_a_code_stands_for_the_mean_of_its_standardised_rows_in_the_fit_part(method):
    x, fit = normal(97, 3), marked(97, 71)
    made = discretise(x, fit, method, 4)
    z = (x - x[fit].mean(0)) / x[fit].std(0, correction=0)
    lost, total = 0.0, float(z[fit].square().sum())
    for c, table in enumerate(made.values):
        own = z if method == "kmeans" else z[:, c : c + 1]
        for code in range(len(table)):
            rows = own[fit & (made.codes[:, c] == code)]
            assert torch.allclose(rows.mean(0).float(), table[code], atol=1e-6)
            lost += float((rows - rows.mean(0)).square().sum())
    assert made.lost == pytest.approx(lost / total, rel=1e-9)
    assert 0 < made.lost < 1


def test_kmeans_is_as_good_as_scikit_learns_own():
    x, fit = normal(151, 3), torch.ones(151, dtype=torch.bool)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    best = KMeans(6, n_init=20, random_state=0).fit(z).inertia_ / np.square(z).sum()
    assert discretise(x, fit, "kmeans", 6).lost < best * 1.05


@pytest.mark.parametrize("method", ["quantile", "kmeans"])
def test_codes_are_fitted_on_the_fit_part_alone(method):
    x, fit = normal(97, 2), marked(97, 71)
    moved = torch.where(fit[:, None], x, x * 100)
    ours, theirs = discretise(x, fit, method, 4), discretise(moved, fit, method, 4)
    assert torch.equal(ours.codes[fit], theirs.codes[fit])
    assert all(torch.equal(a, b) for a, b in zip(ours.values, theirs.values, strict=True))


@pytest.mark.parametrize("method", ["quantile", "kmeans"])
def test_the_order_of_rows_changes_nothing(method):
    x, fit = normal(127, 3), torch.arange(127) % 3 > 0
    order = torch.from_numpy(np.random.default_rng(5).permutation(127))
    plain, moved = discretise(x, fit, method, 7), discretise(x[order], fit[order], method, 7)
    assert torch.equal(plain.codes[order], moved.codes)
    assert all(torch.equal(a, b) for a, b in zip(plain.values, moved.values, strict=True))


def test_few_distinct_values_keep_one_code_each_and_lose_nothing():
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0], [5.0], [9.0]])
    made = discretise(x, torch.ones(6, dtype=torch.bool), "quantile", 3)
    assert made.codes.flatten().tolist() == [0, 0, 0, 0, 1, 2]
    assert made.lost == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", ["quantile", "kmeans"])
def test_a_constant_column_is_one_code_of_value_zero(method):
    made = discretise(torch.full((7, 1), 0.1), marked(7, 5), method, 4)
    assert made.sizes == (1,)
    assert made.values[0].tolist() == [[0.0]]
    assert made.lost == 0


@given(
    st.lists(st.tuples(st.sampled_from([-1.5, 0.0, 0.1, 1e6]), st.floats(-9, 9)), min_size=2, max_size=40),
    st.integers(1, 40), st.integers(2, 9), st.sampled_from(["quantile", "kmeans"]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_every_code_has_a_row_in_the_fit_part(rows, inside, bins, method):
    x = torch.tensor(rows, dtype=torch.float64)
    fit = marked(len(x), min(inside, len(x)))
    made = discretise(x, fit, method, bins)
    for c, size in enumerate(made.sizes):
        assert 1 <= size <= bins
        assert made.codes[fit][:, c].unique().tolist() == list(range(size))
        assert 0 <= int(made.codes[:, c].min()) <= int(made.codes[:, c].max()) < size
    assert 0 <= made.lost <= 1 + 1e-9


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"method": "median"}, "unknown dataset.discretise 'median'"),
        ({"bins": 1}, "dataset.bins=1 is out of range"),
        ({"fit": marked(5, 0)}, "no row of attributes lies in the fit part"),
    ],
)
def test_wrong_options_are_refused(options, cause):
    with pytest.raises(UsageError, match=cause):
        discretise(**{"attributes": normal(5, 1), "fit": marked(5, 3), "method": "quantile", **options})
