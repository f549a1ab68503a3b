import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ddengine.ops.counter import philox, uniform
from ddengine.rng import Rng

VECTORS = [  # Random123, kat_vectors: counter, key, words
    ((0,) * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
WORDS = st.integers(0, 2**32 - 1)


def naive(key, counter):
    """The published rounds in Python's unbounded integers."""
    c, k = list(counter), [key % 2**32, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second % 2**32, first >> 32 ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox(key, torch.tensor([counter])).tolist() == [[int(word, 16) for word in words.split()]]


@given(st.integers(0, 2**64 - 1), st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_philox_equals_the_rounds_in_unbounded_integers(key, counters):
    assert philox(key, torch.tensor(counters)).tolist() == [naive(key, counter) for counter in counters]


def numbers(epoch, index, columns=7, rng=Rng(5, ("a",)), name="x"):
    return uniform(rng, name, torch.tensor(epoch), torch.tensor(index), columns)


def test_a_number_is_the_upper_24_bits_of_its_word():
    key, found = Rng(5, ("a",)).integer("x"), numbers([3], [11])
    words = [word for block in range(2) for word in naive(key, (11, block, 3, 0))]
    assert found.tolist() == [[(word >> 8) / 2**24 for word in words[:7]]]
    assert found.dtype == torch.float32 and float(found.max()) < 1


def test_an_item_has_its_numbers_whatever_the_batch_and_its_order():
    epochs, indices = [0, 0, 4, 1, 4], [7, 0, 7, 7, 2**31]
    whole = numbers(epochs, indices)
    assert whole.unique().numel() == 35
    for i in range(5):
        assert torch.equal(numbers(epochs[i : i + 1], indices[i : i + 1])[0], whole[i])
    assert torch.equal(numbers(epochs[::-1], indices[::-1]), whole.flip(0))


def test_a_column_does_not_depend_on_how_many_there_are():
    assert torch.equal(numbers([2], [3], 9)[:, :3], numbers([2], [3], 3))


def test_seed_path_and_name_each_give_other_numbers():
    places = [(Rng(5, ("a",)), "x"), (Rng(6, ("a",)), "x"), (Rng(5, ("b",)), "x"), (Rng(5, ("a",)), "y")]
    found = torch.cat([numbers([1], [2], 4, rng, name) for rng, name in places])
    assert found.unique().numel() == 16


def test_the_numbers_are_uniform_and_their_columns_independent():
    index = torch.arange(4001)
    u = uniform(Rng(0), "x", torch.zeros_like(index), index, 5).double()
    for column in u.t():
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    assert (torch.corrcoef(u.t()) - torch.eye(5)).abs().max() < 5 / 4001**0.5
