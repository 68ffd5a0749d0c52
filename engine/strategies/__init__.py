"""Decoding strategies, and which one a request gets."""

from engine.params import SamplingParams
from engine.strategies.base import Strategy
from engine.strategies.sampling import Sampling


def choose(params: SamplingParams) -> Strategy:
    """The strategy these parameters ask for."""
    return Sampling(params.num_sequences, params.n)
