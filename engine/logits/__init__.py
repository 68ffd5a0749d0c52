"""The stages of the logits pipeline, in the order in which they act."""

from engine.logits.adapt_temperature import AdaptTemperature
from engine.logits.allowed_tokens import AllowedTokens
from engine.logits.bad_words import BadWords
from engine.logits.contrastive_decoding import ContrastiveDecoding
from engine.logits.cutoffs import EpsilonCutoff, EtaCutoff
from engine.logits.dola import Dola
from engine.logits.dry import Dry
from engine.logits.entropix import Entropix
from engine.logits.entropy_temperature import EntropyTemperature
from engine.logits.eos_length import EosLengthPenalty, ExponentialDecayLengthPenalty
from engine.logits.guidance import Guidance
from engine.logits.kl_temperature import KlTemperature
from engine.logits.logit_bias import LogitBias
from engine.logits.min_p import MinP
from engine.logits.min_tokens import MinTokens
from engine.logits.mirostat import Mirostat
from engine.logits.no_repeat_ngram import NoRepeatNgram
from engine.logits.normalise import Normalise
from engine.logits.penalties import Penalties
from engine.logits.stage import Stage
from engine.logits.temperature import Temperature
from engine.logits.tfs import TailFree
from engine.logits.top_a import TopA
from engine.logits.top_h import TopH
from engine.logits.top_k import TopK
from engine.logits.top_n_sigma import TopNSigma
from engine.logits.top_p import TopP
from engine.logits.typical_p import TypicalP
from engine.logits.xtc import Xtc

STAGES: tuple[type[Stage], ...] = (
    Normalise,
    # Combinations of whole distributions, which want them as the models gave them.
    Guidance,
    ContrastiveDecoding,
    Dola,
    # In units of the model's logits, so before temperature; biases first, as in all peers.
    LogitBias,
    Penalties,
    Dry,
    EosLengthPenalty,
    ExponentialDecayLengthPenalty,
    # Bans: -inf absorbs, so nothing before can undo them. Soft ones are lifted last first.
    AllowedTokens,
    MinTokens,
    BadWords,
    NoRepeatNgram,
    # From here on, sampled rows only. Temperatures before truncation, as in vLLM and transformers.
    EntropyTemperature,
    KlTemperature,
    AdaptTemperature,
    Temperature,
    TopNSigma,
    MinP,
    TopK,
    TypicalP,
    TailFree,
    TopA,
    TopH,
    TopP,
    EpsilonCutoff,
    EtaCutoff,
    Mirostat,
    Xtc,
    Entropix,
)

# Other orders of the filters, so that users of these programs get what they are used to. Filters
# that a program does not have stand next to their relatives.
ORDERS: dict[str, tuple[type[Stage], ...]] = {
    "hf": (
        EntropyTemperature,
        KlTemperature,
        AdaptTemperature,
        Temperature,
        TopNSigma,
        TopH,
        TopK,
        TopP,
        MinP,
        TypicalP,
        TailFree,
        TopA,
        EpsilonCutoff,
        EtaCutoff,
        Mirostat,
        Xtc,
        Entropix,
    ),
    "llama.cpp": (
        TopNSigma,
        TopK,
        TailFree,
        TypicalP,
        TopP,
        MinP,
        TopA,
        TopH,
        EpsilonCutoff,
        EtaCutoff,
        Xtc,
        EntropyTemperature,
        KlTemperature,
        AdaptTemperature,
        Temperature,
        Mirostat,
        Entropix,
    ),
}
