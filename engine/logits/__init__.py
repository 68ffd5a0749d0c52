"""The stages of the logits pipeline, in the order in which they act."""

from engine.logits.allowed_tokens import AllowedTokens
from engine.logits.bad_words import BadWords
from engine.logits.cutoffs import EpsilonCutoff, EtaCutoff
from engine.logits.logit_bias import LogitBias
from engine.logits.min_p import MinP
from engine.logits.min_tokens import MinTokens
from engine.logits.no_repeat_ngram import NoRepeatNgram
from engine.logits.penalties import Penalties
from engine.logits.stage import Stage
from engine.logits.temperature import Temperature
from engine.logits.top_k import TopK
from engine.logits.top_n_sigma import TopNSigma
from engine.logits.top_p import TopP
from engine.logits.typical_p import TypicalP

STAGES: tuple[type[Stage], ...] = (
    # In units of the model's logits, so before temperature; biases first, as in all peers.
    LogitBias,
    Penalties,
    # Bans: -inf absorbs, so nothing before can undo them. Soft ones are lifted last first.
    AllowedTokens,
    MinTokens,
    BadWords,
    NoRepeatNgram,
    # From here on, sampled rows only.
    Temperature,
    TopNSigma,
    MinP,
    TopK,
    TypicalP,
    TopP,
    EpsilonCutoff,
    EtaCutoff,
)
