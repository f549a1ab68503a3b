import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import ddengine.neighbours
from ddengine.neighbours import (
    COPY,
    QUANTILES,
    clopper_pearson,
    compare,
    effective_count,
    equal_draw,
    grey,
    nearest,
)
from ddengine.rng import Rng


def pixels(count, name, shape=(3, 5, 7)):
    generator = Rng(5).torch(name)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


def brute(queries, pool, groups):
    distances = torch.cdist(
        queries, pool.flatten(1).double() / 255, compute_mode="donot_use_mm_for_euclid_dist"
    )
    return torch.stack([distances[:, g].min(1).values for g in groups]) / queries.shape[1] ** 0.5


@pytest.mark.parametrize("cells", [1, 211, 2**22])
def test_nearest_is_brute_force_whatever_the_size_of_the_blocks(monkeypatch, cells):
    monkeypatch.setattr(ddengine.neighbours, "CELLS", cells)
    queries, pool = grey(pixels(11, "queries")), pixels(29, "pool")
    groups = [torch.arange(29), torch.tensor([3, 28, 0]), torch.tensor([7])]
    found, places = nearest(queries, pool, groups)
    assert found.shape == places.shape == (3, 11)
    again = (queries - grey(pool[places.flatten()]).reshape(3, 11, -1)).square().mean(2).sqrt()
    assert torch.allclose(again, found)
    assert all(set(mine.tolist()) <= set(group.tolist()) for mine, group in zip(places, groups, strict=True))
    assert torch.allclose(found, brute(queries, pool, groups), rtol=1e-6, atol=0)


def test_a_copy_is_at_zero_exactly_and_an_image_one_level_away_is_not():
    pool = pixels(23, "pool")
    moved = pool[[17]].clone()
    moved[0, 2, 4, 6] ^= 1
    (found,), (places,) = nearest(grey(torch.cat([pool[[22, 0]], moved])), pool, [torch.arange(23)])
    assert places.tolist() == [22, 0, 17]
    assert found[:2].tolist() == [0, 0]
    assert found[2].item() == pytest.approx(1 / 255 / 105**0.5)


def test_equal_draws_hold_as_many_of_each_class_as_the_smaller_side_and_no_image_twice():
    members, controls = torch.tensor([0] * 13 + [1] * 2 + [2] * 7), torch.tensor([0] * 5 + [1] * 3 + [2] * 7)
    mine, theirs = equal_draw(members, controls, [0, 1], Rng(1))
    assert torch.bincount(members[mine]).tolist() == torch.bincount(controls[theirs]).tolist() == [5, 2]
    assert len(mine.unique()) == len(theirs.unique()) == 7
    again, other = (equal_draw(members, controls, [0, 1], Rng(seed))[0] for seed in (1, 2))
    assert torch.equal(again, mine) and not torch.equal(other, mine)


def draws_of(fit, held, count):
    zeros = [torch.zeros(len(x), dtype=torch.long) for x in (fit, held)]
    return [equal_draw(*zeros, [0], Rng(3).fold(i)) for i in range(count)]


def test_a_row_is_counts_quantiles_and_an_exact_test_of_the_distances():
    fit, held, queries = pixels(31, "fit"), pixels(17, "held"), pixels(13, "set")
    queries[:3] = fit[[4, 9, 30]]
    draws = draws_of(fit, held, 3)
    row = compare(grey(queries), fit, held, draws)
    members = brute(grey(queries), fit, [m for m, _ in draws]).numpy()
    controls = brute(grey(queries), held, [c for _, c in draws]).numpy()
    counts = (members < controls).sum(1)
    assert (row["images"], row["copies"], row["pool"]) == (13, 3, 17)
    assert row["nearer"]["counts"] == counts.tolist()
    assert row["nearer"]["share"] == pytest.approx(counts.mean() / 13)
    n = row["nearer"]["effective"]
    test = stats.binomtest(int(counts.mean() / 13 * n + 0.5), n, 0.5)
    assert 1 < n <= 13 and row["nearer"]["p_value"] == pytest.approx(test.pvalue)
    assert row["nearer"]["ci95"] == pytest.approx(clopper_pearson(counts.mean() / 13 * n, n))
    for side, distances in (("members", members), ("control", controls)):
        for name, q in QUANTILES.items():
            want = np.mean([np.quantile(draw, q) for draw in distances])
            assert row["distance"][side][name] == pytest.approx(want, rel=1e-6, abs=1e-7)
    assert row["distance"]["fit"]["min"] == 0 and row["distance"]["fit"]["max"] > COPY


def test_copies_are_found_in_all_of_the_fit_part_also_where_no_draw_has_them():
    fit, held = pixels(37, "fit"), pixels(2, "held")
    row = compare(grey(fit[:29]), fit, held, [(torch.tensor([30, 31]), torch.tensor([0, 1]))])
    assert row["copies"] == 29 and row["nearer"]["share"] < 1


def test_images_of_one_source_are_nearer_to_a_member_half_of_the_time():
    everything = pixels(1200, "one source", (1, 3, 3))
    queries, fit, held = everything[:400], everything[400:900], everything[900:]
    row = compare(grey(queries), fit, held, draws_of(fit, held, 5))
    low, high = row["nearer"]["ci95"]
    assert low < 0.5 < high and row["nearer"]["p_value"] > 0.05
    assert row["copies"] == 0


def test_images_that_share_their_nearest_one_count_less():
    assert effective_count(torch.arange(7)) == 7 and effective_count(torch.zeros(7).long()) == 1
    assert effective_count(torch.tensor([5, 5, 5, 2, 9])) == pytest.approx(25 / (9 + 1 + 1))
    fit, held = pixels(11, "fit"), pixels(11, "held")
    lies = grey(fit[[4] * 90]) + 0.01
    found = compare(lies, fit, held, draws_of(fit, held, 2))["nearer"]
    assert (found["share"], found["effective"], found["p_value"]) == (1, 1, 1)


def test_the_test_rejects_chance_no_more_often_than_it_says_where_a_few_images_are_near_to_many():
    rejected, plain = 0, 0
    for seed in range(100):
        noise = Rng(seed).numpy("noise").integers(0, 256, (300, 1, 16, 16), dtype=np.uint8)
        queries, fit, held = torch.from_numpy(noise).split(100)
        found = compare(grey(queries), fit, held, [(torch.arange(100), torch.arange(100))])["nearer"]
        rejected += found["p_value"] < 0.05
        plain += stats.binomtest(found["counts"][0], 100).pvalue < 0.05
    assert rejected <= 9 < plain  # 5 of 100 are expected at most; 9 are exceeded by chance 1 time in 35


def test_a_set_that_favours_members_is_told_from_chance():
    fit, held = pixels(200, "fit"), pixels(200, "held")
    blurred = (grey(fit[:60]) + grey(pixels(60, "noise"))) / 2
    row = compare(blurred, fit, held, draws_of(fit, held, 2))
    assert row["nearer"]["share"] == 1 and row["nearer"]["p_value"] < 1e-9 and row["copies"] == 0


def test_images_at_one_distance_from_both_are_not_nearer():
    same = pixels(5, "same")
    assert compare(grey(same), same, same, [(torch.arange(5), torch.arange(5))])["nearer"]["counts"] == [0]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_of_whole_counts_are_scipys(pair):
    want = stats.binomtest(*pair).proportion_ci(0.95, method="exact")
    assert clopper_pearson(*pair) == pytest.approx((want.low, want.high), abs=1e-9)


def test_intervals_of_mean_counts_lie_between_those_of_whole_ones():
    low, mid, high = (clopper_pearson(count, 19) for count in (4, 4.5, 5))
    assert low[0] < mid[0] < high[0] and low[1] < mid[1] < high[1]
