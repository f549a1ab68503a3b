"""Named random generators: the same seed and path always give the same draw; no global RNG is touched."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Rng:
    """A place in a tree of random streams.

    `seed` is the root; `path` are the keys folded in so far. A generator depends on both and on its
    name alone, so a run can be resumed at any step without stored generator state.
    """

    seed: int
    path: tuple[str | int, ...] = ()

    def fold(self, *keys: str | int) -> "Rng":
        """The stream below this one named by `keys`."""
        return Rng(self.seed, self.path + keys)

    def integer(self, name: str) -> int:
        """A 63-bit integer that is a pure function of (seed, path, name): BLAKE2b of their repr."""
        digest = hashlib.blake2b(repr((self.seed, self.path, name)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def torch(self, name: str) -> torch.Generator:
        """A fresh CPU generator for torch draws."""
        return torch.Generator().manual_seed(self.integer(name))

    def numpy(self, name: str) -> np.random.Generator:
        """A fresh numpy generator."""
        return np.random.default_rng(self.integer(name))
