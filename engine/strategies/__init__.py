"""Decoding strategies, and which one a request gets."""

from engine.messages import Request
from engine.params import Method
from engine.strategies.base import Strategy
from engine.strategies.beam import Beam
from engine.strategies.contrastive import Contrastive
from engine.strategies.cot import CotDecoding
from engine.strategies.sampling import Sampling
from engine.strategies.search import A_STAR, BEST_FIRST, Search
from engine.strategies.sed import SelfEvaluation
from engine.strategies.stochastic import StochasticBeams


def choose(request: Request) -> Strategy:
    """The strategy a request asks for."""
    params = request.params
    if request.max_tokens == 0:  # nothing is chosen
        return Sampling(params.n, params.n)
    match params.method:
        case Method.BEAM if params.stochastic_beams:
            return StochasticBeams(request)
        case Method.BEAM if params.beam_strategy == "best_first":
            return Search(request, BEST_FIRST)
        case Method.BEAM if params.beam_strategy == "astar":
            return Search(request, A_STAR)
        case Method.BEAM:
            return Beam(request)
        case Method.CONTRASTIVE:
            return Contrastive(request)
        case Method.COT:
            return CotDecoding(request)
        case Method.SED:
            return SelfEvaluation(request)
        case _:
            return Sampling(params.num_sequences, params.n)
