"""Random numbers by key."""

import math
import random
import struct

import pytest
import torch
from torch import Tensor

from engine.rng import Domain, derive, gumbel, hash32, uniform
from tests.support.logits import ROW_A

EXTREMES = [0, 1, -1, 42, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), -(2**32) - 7]


def murmur3(data: bytes, seed: int = 0) -> int:
    """MurmurHash3 x86_32 as published, byte by byte."""
    mask = 0xFFFFFFFF
    whole = len(data) & ~3
    h = seed
    for start in range(0, len(data), 4):
        k = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 & mask
        k = (k << 15 | k >> 17) & mask
        h ^= k * 0x1B873593 & mask
        if start < whole:
            h = (h << 13 | h >> 19) & mask
            h = (h * 5 + 0xE6546B64) & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


def column(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_the_reference_itself_gives_the_known_answers() -> None:
    assert [murmur3(data) for data in (b"", b"test", b"hello")] == [0, 0xBA6BD213, 0x248BFA47]


@pytest.mark.parametrize("domain", list(Domain))
def test_the_hash_is_murmurs_of_seed_position_and_id(domain: Domain) -> None:
    rng = random.Random(0)
    keys = [(seed, position, id_) for seed in EXTREMES for position in (0, 7) for id_ in (0, 99)]
    keys += [
        (rng.randrange(-(2**63), 2**63), rng.randrange(2**31), rng.randrange(300_000))
        for _ in range(500)
    ]
    seeds, positions, ids = (column(*part) for part in zip(*keys, strict=True))
    got = hash32(seeds, positions, ids, domain)
    assert got.tolist() == [murmur3(struct.pack("<qII", *key), domain) for key in keys]


@pytest.mark.parametrize(
    ("seed", "position", "hashes", "uniforms", "token", "best"),
    [
        (
            42,
            7,
            "661eb28d 860d65ec 1f1cc266 399e25cc 607ca309",
            [0.398906, 0.523642, 0.121533, 0.225069, 0.376902],
            0,
            2.675300,
        ),
        (
            42,
            8,
            "c784edb3 52137ffa d22d7bfc 67b48c81 659816b1",
            [0.779372, 0.320610, 0.821007, 0.405099, 0.396852],
            1,
            1.950468,
        ),
        (
            0,
            0,
            "8134cdf8 00990201 907177d2 518a6e8e 04ab7c5d",
            [0.504712, 0.002335, 0.564231, 0.318519, 0.018242],
            1,
            7.058697,
        ),
        (
            -1,
            7,
            "58d45c83 099035b2 ab1bdba6 3f18e8a3 fd200eee",
            [0.346990, 0.037357, 0.668394, 0.246474, 0.988770],
            1,
            4.268267,
        ),
    ],
)
def test_golden_values(
    seed: int, position: int, hashes: str, uniforms: list[float], token: int, best: float
) -> None:
    key = column(seed), column(position), torch.arange(5)
    assert hash32(*key).tolist() == [int(word, 16) for word in hashes.split()]
    assert uniform(*key).tolist() == pytest.approx(uniforms, abs=1e-6)
    perturbed = ROW_A + gumbel(uniform(*key))
    assert perturbed.argmax().item() == token
    assert perturbed.max().item() == pytest.approx(best, abs=1e-6)


def test_the_golden_coin() -> None:
    key = column(42), column(7), column(0)
    assert hash32(*key, Domain.COIN).tolist() == [0x69913EAD]
    assert uniform(*key, Domain.COIN).item() == pytest.approx(0.412373, abs=1e-6)


def test_keys_broadcast() -> None:
    seeds, positions, ids = column(1, 2)[:, None], column(5, 6)[:, None], torch.arange(3)
    got = hash32(seeds, positions, ids)
    one_by_one = [
        [hash32(column(s), column(p), column(i)).item() for i in range(3)]
        for s, p in ((1, 5), (2, 6))
    ]
    assert got.tolist() == one_by_one


def test_uniforms_stay_inside_zero_and_one_and_fill_it_evenly() -> None:
    uniforms = uniform(column(3), torch.arange(400)[:, None], torch.arange(250))
    assert uniforms.dtype == torch.float64
    assert uniforms.min() > 0.0
    assert uniforms.max() < 1.0
    counts = torch.histc(uniforms.flatten(), bins=50, min=0.0, max=1.0)
    assert ((counts - 2000) ** 2 / 2000).sum() < 49 + 4 * math.sqrt(2 * 49)


def test_numbers_of_different_domains_are_unrelated() -> None:
    numbers = torch.stack(
        [uniform(column(3), torch.arange(20_000), column(0), domain) for domain in Domain]
    )
    off_diagonal = torch.corrcoef(numbers) - torch.eye(len(Domain), dtype=torch.float64)
    assert off_diagonal.abs().max() < 4 / math.sqrt(20_000)


def test_gumbel_noise_has_its_range_and_its_moments() -> None:
    ends = gumbel(torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([33 * math.log(2), -math.log(33 * math.log(2))])
    noise = gumbel(uniform(column(5), torch.arange(1000)[:, None], torch.arange(200)))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.015)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def splitmix64(state: int) -> int:
    """SplitMix64's output at a state."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def test_derived_seeds_are_two_rounds_of_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first numbers of the published generator
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    for seed in EXTREMES:
        for index in (1, 2, 127):
            assert derive(seed, index) % 2**64 == splitmix64(splitmix64(seed % 2**64) ^ index)


def test_the_first_choice_keeps_the_seed_and_no_other_choice_shares_one() -> None:
    seeds = [*range(-40, 40), 2**63 - 1, -(2**63)]
    assert [derive(seed, 0) for seed in seeds] == seeds
    derived = {derive(seed, index) for seed in seeds for index in range(128)}
    assert len(derived) == 128 * len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in derived)


@pytest.mark.parametrize("domain", [Domain.TOKEN, Domain.EXTRA + 3])
def test_our_kernel_and_torch_give_the_same_hashes(domain: int) -> None:
    seeds, positions = column(*EXTREMES)[:, None], torch.arange(len(EXTREMES))[:, None]
    for ids in (torch.arange(300)[None], torch.arange(3000).reshape(10, 300)):
        by_torch = hash32(seeds, positions, ids, torch.tensor(domain))
        assert torch.equal(hash32(seeds, positions, ids, domain), by_torch)
