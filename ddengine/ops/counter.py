"""Random numbers by counter: each is a function of a key and a place, so none depends on what else is drawn.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) in 64-bit integers.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.rng import Rng

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the two words of the key grow by between rounds
WORD = 0xFFFFFFFF


def philox(key: int, counters: Int[Tensor, "n 4"]) -> Int[Tensor, "n 4"]:
    """Four 32-bit words for each counter of four 32-bit words, as int64 on the counters' device.

    The low word of the 64-bit `key` is the first of Random123's two.
    """
    c0, c1, c2, c3 = counters.long().unbind(1)
    for number in range(ROUNDS):
        k0, k1 = ((key >> shift) + number * WEYL[i] & WORD for i, shift in enumerate((0, 32)))
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return torch.stack([c0, c1, c2, c3], 1)


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product, from halves of `word` whose products fit in 63 bits."""
    low, high = factor * (word & 0xFFFF), factor * (word >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & WORD


def uniform(
    rng: Rng, name: str, epoch: Int[Tensor, " n"], index: Int[Tensor, " n"], columns: int
) -> Float[Tensor, "n columns"]:
    """Numbers in [0, 1) for the items `index` in their passes `epoch`, multiples of 2^-24 in float32.

    Row i is a function of (rng, name, epoch[i], index[i]) and its column alone, whatever the batch. Epochs
    and indices lie under 2^32.
    """
    blocks = torch.arange(-(-columns // 4), device=index.device)
    zero = torch.zeros_like(blocks)
    places = [torch.cartesian_prod(index.long(), blocks), torch.cartesian_prod(epoch.long(), zero)]
    words = philox(rng.integer(name), torch.cat(places, 1))  # (index, block, epoch, 0)
    return ((words >> 8).float() * 2.0**-24).reshape(len(index), -1)[:, :columns]
