"""The global generators of torch, numpy and Python, watched."""

import random
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

DRAWS = (
    "seed",
    "random",
    "uniform",
    "randint",
    "randrange",
    "choice",
    "choices",
    "sample",
    "shuffle",
    "gauss",
)


@contextmanager
def global_rng_untouched():
    """Fails when what runs inside draws from or seeds a global generator.

    Python's is guarded call by call and not by its state: the checks of annotations draw bits from it.
    """

    def refuse(*args, **kwargs):
        raise AssertionError("Python's global generator was used")

    before = torch.get_rng_state(), np.random.get_state()
    with mock.patch.multiple(random, **dict.fromkeys(DRAWS, refuse)):
        yield
    assert torch.equal(torch.get_rng_state(), before[0]), "torch's global generator moved"
    after = np.random.get_state()
    assert (after[1] == before[1][1]).all() and after[2:] == before[1][2:], "numpy's global generator moved"
