"""With `batch_invariant` a request's logprobs have the same bits in whatever company it comes."""

import random
from pathlib import Path
from typing import Any

import pytest

from engine.core import EngineCore
from engine.errors import ModelUnavailable
from engine.messages import Token
from engine.models.cpu_decoder import CpuDecoder
from tests.support import tiny
from tests.support.engines import request, run, tiny_core

SAMPLED = {"temperature": 1.1, "top_p": 0.95, "repetition_penalty": 1.2}
WATCHED: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": 3},
    "greedy, long": {"prompt": 90},
    "sampled": {"prompt": 17, "seed": 5} | SAMPLED,
    "sampled, one token": {"prompt": 1, "seed": 6} | SAMPLED,
}
ODD = {"intermediate_size": 100}  # not a whole number of vectors
MODELS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"dtype": "float32"}, ODD),
    ("llama", {"dtype": "bfloat16"}, {}),
    ("qwen3", {"dtype": "float32", "quantization": "int8"}, {}),
    ("gemma2", {"dtype": "float32"}, ODD),
    ("gemma3", {"dtype": "bfloat16"}, {}),
    ("phi", {"dtype": "float32"}, {}),
]


def load(folder: Path, **config: Any) -> EngineCore:
    settings = {"batch_invariant": True, "max_num_seqs": 64, "kv_cache_memory": 1 << 25}
    return tiny_core(folder, **(settings | config))[0]


def ask(core: EngineCore, *names: str) -> dict[str, list[Token]]:
    """What requests give when they come together: the watched ones, and others by number."""
    requests = []
    for name in names:
        rng = random.Random(name)
        params = {"prompt": rng.randint(1, 60), "seed": 0} | WATCHED.get(name, SAMPLED)
        ids = [rng.randrange(3, tiny.VOCAB) for _ in range(params.pop("prompt"))]
        options = {"max_tokens": 12, "ignore_eos": True, "logprobs": 3} | params
        requests.append(request(core, ids, name, **options))
    results = run(core, *requests)
    assert not results.failed
    return {name: list(results.choices[name, 0].tokens) for name in names}


@pytest.mark.parametrize(
    ("family", "config", "changes"), MODELS, ids=[f"{one[0]} {one[1]['dtype']}" for one in MODELS]
)
def test_logprobs_have_the_same_bits_alone_and_among_63_others(
    family: str, config: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny.save(tiny.hf_model(family, **changes), tmp_path)
    core = load(folder, prefix_cache=False, **config)
    want: dict[str, list[Token]] = {}
    for name in WATCHED:
        want |= ask(core, name)
    assert all(len(tokens) == 12 for tokens in want.values())
    # In small steps, so that prompts come in pieces; the second time out of the cache.
    core = load(folder, max_batch_tokens=70, **config)
    for _ in range(2):
        others = [str(number) for number in range(64 - len(WATCHED))]
        got = ask(core, *others[:30], *WATCHED, *others[30:])
        assert {name: got[name] for name in WATCHED} == want
    # In a cache so small that some have to give up their blocks, and are computed anew.
    core = load(folder, prefix_cache=False, **config | {"kv_cache_memory": 1 << 18})
    got = ask(core, *others[:30], *WATCHED, *others[30:])
    assert core.scheduler.num_preemptions > 0
    assert {name: got[name] for name in WATCHED} == want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_model_whose_products_are_not_ours_is_refused(
    family: str, dtype: str, tmp_path: Path
) -> None:
    folder = tiny.save(tiny.hf_model(family), tmp_path)
    with pytest.raises(ModelUnavailable, match=f"--batch-invariant: {family} computes products"):
        load(folder, dtype=dtype)


def test_quantised_weights_need_no_other_model(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("llama"), tmp_path)
    plain, invariant = (
        load(folder, quantization="int8", batch_invariant=wish) for wish in (False, True)
    )
    assert type(plain.model) is type(invariant.model)
    if isinstance(plain.model, CpuDecoder):
        assert ask(plain, *WATCHED) == ask(invariant, *WATCHED)
