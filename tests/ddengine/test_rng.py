"""Random streams are pure functions of seed, path and name."""

import hashlib
from itertools import combinations

import numpy as np
import torch
from global_rng import global_rng_untouched
from hypothesis import given
from hypothesis import strategies as st

from ddengine.rng import Rng

KEYS = st.one_of(st.integers(-(2**40), 2**40), st.text(max_size=5))


def test_the_same_place_gives_the_same_draw():
    for rng in (Rng(3), Rng(3).fold("step", 7), Rng(-5, ("a",))):
        a, b = (torch.rand(5, generator=rng.torch("real")) for _ in range(2))
        assert torch.equal(a, b)
        assert (rng.numpy("real").random(5) == rng.numpy("real").random(5)).all()


def test_the_integer_is_blake2b_of_seed_path_and_name():
    digest = hashlib.blake2b(b"(3, ('step', 7), 'real')", digest_size=8).digest()
    assert Rng(3).fold("step", 7).integer("real") == int.from_bytes(digest, "little") // 2
    generator = torch.Generator().manual_seed(Rng(3).integer("x"))
    assert torch.equal(torch.rand(3, generator=Rng(3).torch("x")), torch.rand(3, generator=generator))
    assert Rng(3).numpy("x").random() == np.random.default_rng(Rng(3).integer("x")).random()


def test_different_places_give_different_draws():
    places = [
        Rng(0),
        Rng(1),
        Rng(0, ("a",)),
        Rng(0, (1,)),
        Rng(0, ("1",)),
        Rng(0, ("a", "b")),
        Rng(0, ("ab",)),
        Rng(-1),
    ]
    integers = {(rng, name): rng.integer(name) for rng in places for name in ("a", "b", "")}
    assert len(set(integers.values())) == len(integers)


@given(st.integers(), st.lists(KEYS, max_size=4), st.text(max_size=5))
def test_folding_one_by_one_is_folding_at_once(seed, keys, name):
    one = Rng(seed)
    for key in keys:
        one = one.fold(key)
    assert one == Rng(seed).fold(*keys) and one.integer(name) == Rng(seed).fold(*keys).integer(name)
    assert 0 <= one.integer(name) < 2**63


def test_folding_leaves_the_parent_alone():
    rng = Rng(0, ("a",))
    before = rng.integer("x")
    rng.fold("b", 3).torch("x")
    assert rng == Rng(0, ("a",)) and rng.integer("x") == before


def test_streams_of_neighbouring_steps_are_uncorrelated():
    draws = [torch.randn(4000, generator=Rng(0).fold("step", i).torch("x")) for i in range(6)]
    for a, b in combinations(draws, 2):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.08


def test_no_global_generator_is_touched():
    with global_rng_untouched():
        torch.rand(3, generator=Rng(0).torch("x"))
        Rng(0).numpy("x").random(3)
