"""Random numbers by key, not by state.

A number depends only on (seed, position, id, domain), so a draw is the same alone or in a batch,
on CPU or GPU, before or after a preemption. The hash is MurmurHash3 x86_32 of the seed's and the
position's and the id's little-endian bytes, with the domain as hash seed (the construction of
vLLM's GPU sampler).
"""

from enum import IntEnum

import torch
from torch import Tensor

from engine.kernels import native

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


class Domain(IntEnum):
    """What a number is for; numbers of different domains are independent."""

    TOKEN = 0  # the noise of each token
    COIN = 1  # whether a stage that acts at random acts
    BLOCK = 2  # the noise of each block of the vocabulary
    EXTRA = 16  # of the further draws of a step, counted up from here


def hash32(
    seeds: Tensor, positions: Tensor, ids: Tensor, domain: int | Tensor = Domain.TOKEN
) -> Tensor:
    """The 32-bit hash of each (seed, position, id), as int64 in [0, 2^32).

    Arguments are int64 and broadcast against each other.
    """
    if isinstance(domain, int) and ids.is_cpu and (library := native.LIBRARY) is not None:
        seeds, positions, ids = torch.broadcast_tensors(seeds, positions, ids)
        return library.hash(seeds.contiguous(), positions.contiguous(), ids.contiguous(), domain)
    h = torch.as_tensor(domain, dtype=torch.int64, device=ids.device)
    for word in (seeds & _MASK, (seeds >> 32) & _MASK, positions & _MASK, ids & _MASK):
        k = (word * 0xCC9E2D51) & _MASK
        k = ((k << 15) | (k >> 17)) & _MASK
        h = h ^ ((k * 0x1B873593) & _MASK)
        h = ((h << 13) | (h >> 19)) & _MASK
        h = (h * 5 + 0xE6546B64) & _MASK
    h = h ^ 16  # the number of bytes hashed
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def uniform(
    seeds: Tensor, positions: Tensor, ids: Tensor, domain: int | Tensor = Domain.TOKEN
) -> Tensor:
    """Numbers in (0, 1), float64, all multiples of 2^-33."""
    return (hash32(seeds, positions, ids, domain).double() + 0.5) * 2.0**-32


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise, float64 in [-3.14, 22.88].

    Written with log1p so that the winning tail (a uniform near 0) keeps its resolution.
    """
    return -torch.log(-torch.log1p(-uniforms))


def winner(values: Tensor, seeds: Tensor, positions: Tensor, ids: Tensor, domain: int) -> Tensor:
    """The place of the largest sum of value and Gumbel noise in each row [R, K], [R, 1] int64.

    seeds and positions are [R], ids [R, K] or [1, K], int64. An entry of -inf never wins.
    """
    if values.is_cpu and (library := native.LIBRARY) is not None:
        values = values.contiguous()
        return library.winner(values, seeds.contiguous(), positions.contiguous(), ids, domain)
    noise = gumbel(uniform(seeds.unsqueeze(1), positions.unsqueeze(1), ids, domain))
    return (values + noise).argmax(dim=1, keepdim=True)


def derive(seed: int, index: int) -> int:
    """The seed of choice `index` of a request with this seed, an int64.

    Choice 0 keeps the seed. The others must not be `seed + index`: choice 1 of seed 7 would then
    repeat choice 0 of seed 8. Two rounds of SplitMix64 (Steele et al., 2014) mix the pair.
    """
    if index == 0:
        return seed
    mixed = _splitmix64(_splitmix64(seed & (1 << 64) - 1) ^ index)
    return mixed - (1 << 64) if mixed >= 1 << 63 else mixed


def _splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x + _GOLDEN) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
