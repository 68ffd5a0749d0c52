"""What lm-evaluation-harness sends to a completions server, and what it computes of the answer."""

import inspect
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from engine.core import EngineCore
from engine.prepare import ModelInfo
from engine.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.engines import tiny_core
from tests.support.servers import live_server, make_app
from tests.support.wire import COMPLETIONS

Pair = tuple[list[int], list[int]]  # context and continuation
EOS = 2
TOLERANCE = 1e-3  # of a summed logprob


@pytest.fixture(scope="module")
def reference() -> Any:
    """The served tiny model in `transformers`."""
    return tiny.hf_model("llama")


# -- the harness' side


def loglikelihoods(
    client: httpx.Client, pairs: Sequence[Pair], **changes: Any
) -> list[tuple[float, bool]]:
    """The sum of each continuation's logprobs, and whether it is the greedy one."""
    body = {
        "model": "tiny",
        "prompt": [context + continuation for context, continuation in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    response = client.post(COMPLETIONS, json=body | changes)
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=itemgetter("index"))
    results = []
    for (context, continuation), choice in zip(pairs, choices, strict=True):
        generated = changes.get("max_tokens", 1)
        length = len(context) + len(continuation) + generated
        assert all(len(array) == length for array in choice["logprobs"].values())
        where = slice(len(context), -1 if generated else None)
        own = choice["logprobs"]["token_logprobs"][where]
        tops = choice["logprobs"]["top_logprobs"][where]
        is_greedy = all(value == max(top.values()) for value, top in zip(own, tops, strict=True))
        results.append((sum(own), is_greedy))
    return results


def expected(model: Any, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """The same from the logits of `transformers`."""
    results = []
    for context, continuation in pairs:
        ids = torch.tensor([context + continuation])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(context) - 1 : -1].double()
        logprobs = torch.log_softmax(logits, dim=-1)
        target = torch.tensor(continuation)
        total = logprobs.gather(1, target.unsqueeze(1)).sum().item()
        results.append((total, bool((logits.argmax(dim=-1) == target).all())))
    return results


def agree(got: Sequence[tuple[float, bool]], want: Sequence[tuple[float, bool]]) -> None:
    assert [total for total, _ in got] == pytest.approx([t for t, _ in want], abs=TOLERANCE)
    assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in want]


def greedy(model: Any, context: list[int], length: int) -> list[int]:
    """The model's own continuation, which need not end at an end token."""
    ids = list(context)
    with torch.inference_mode():
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


@pytest.fixture(scope="module")
def pairs(reference: Any) -> list[Pair]:
    """Contexts and continuations of many lengths, some of them greedy."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        drawn: list[int] = torch.randint(3, tiny.VOCAB, (count,), generator=generator).tolist()
        return drawn

    pairs = [(some(context), some(length)) for context, length in
             ((1, 1), (1, 9), (7, 1), (30, 3), (3, 60), (120, 2), (200, 55))]  # fmt: skip
    contexts = [some(length) for length in (1, 4, 20, 60)]
    return pairs + [(context, greedy(reference, context, 4)) for context in contexts]


# -- the tiny model


def test_a_batch_of_different_lengths_is_scored_as_in_transformers(
    client: httpx.Client, reference: Any, pairs: list[Pair]
) -> None:
    want = expected(reference, pairs)

    agree(loglikelihoods(client, pairs), want)

    flags = [is_greedy for _, is_greedy in want]
    assert flags.count(True) >= 4
    assert flags.count(False) >= 4


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens": 0, "logprobs": 10}, {"max_tokens": 0}, {"logprobs": 5}, {"logprobs": 0}],
)
def test_older_request_shapes_give_the_same_sums(
    client: httpx.Client, reference: Any, pairs: list[Pair], changes: dict[str, Any]
) -> None:
    got = loglikelihoods(client, pairs, **changes)

    want = expected(reference, pairs)
    if changes.get("logprobs") == 0:  # only the reported token: greedy or not cannot be told
        want = [(total, True) for total, _ in want]
    agree(got, want)


def test_concurrent_batches_do_not_disturb_each_other(
    client: httpx.Client, reference: Any, pairs: list[Pair]
) -> None:
    want = expected(reference, pairs)
    with ThreadPoolExecutor(8) as pool:
        batches = [pool.submit(loglikelihoods, client, pairs[first:]) for first in range(8)]
        for first, batch in enumerate(batches):
            agree(batch.result(), want[first:])


def test_the_generated_token_may_be_the_end_of_the_sequence(
    client: httpx.Client, reference: Any
) -> None:
    prompts = torch.randint(3, tiny.VOCAB, (4000, 6), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ending = reference(prompts).logits[:, -1].argmax(dim=-1) == EOS
    pairs = [(ids[:2], ids[2:]) for ids in prompts[ending].tolist()]
    assert pairs

    agree(loglikelihoods(client, pairs), expected(reference, pairs))
    ends = client.post(
        COMPLETIONS,
        json={
            "prompt": pairs[0][0] + pairs[0][1],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "echo": True,
        },
    ).json()["choices"][0]
    assert ends["finish_reason"] == "stop"
    assert ends["logprobs"]["tokens"][-1] == "</s>"


def test_characters_may_be_split_between_context_and_continuation(
    client: httpx.Client, tokenizer: Tokenizer, reference: Any
) -> None:
    ids = tokenizer.encode("a 😀é€ b😀", add_special_tokens=False)
    pairs = [(ids[:cut], ids[cut:]) for cut in range(1, len(ids))]

    agree(loglikelihoods(client, pairs), expected(reference, pairs))


def test_special_tokens_in_a_prompt_are_scored_like_any_other(
    client: httpx.Client, reference: Any
) -> None:
    pairs = [([1, 68], [2, 0, 1, 69]), ([2], [2, 2])]

    agree(loglikelihoods(client, pairs), expected(reference, pairs))


def test_generation_tasks_get_the_greedy_text_up_to_the_first_stop(
    client: httpx.Client, tokenizer: Tokenizer, reference: Any
) -> None:
    context = tokenizer.encode("the hen in the", add_special_tokens=False)
    ids = greedy(reference, context, 32)
    text = tokenizer.decode(ids[: ids.index(EOS)] if EOS in ids else ids)
    until = [text[8:10], "\n\n", "Question:", "Q:", "</div>", "never" * 9]
    body = {
        "model": "tiny",
        "prompt": [context],
        "max_tokens": 32,
        "temperature": 0,
        "stop": [*until, "</s>"],
        "seed": 1234,
        "do_sample": False,
    }

    response = client.post(COMPLETIONS, json=body, headers={"Authorization": "Bearer x"})

    assert response.status_code == 200
    (choice,) = response.json()["choices"]
    assert choice["text"] == text[: text.index(until[0])]


# -- the real model


class Real:
    """A server with the real model, which counts the rows of logits it projects at once."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        self.dtype = dtype
        self.rows: list[int] = []

    def load(self) -> tuple[EngineCore, ModelInfo]:
        options = {"block_size": 16, "kv_cache_memory": "512MiB", "threads": os.cpu_count()}
        core, info = tiny_core(self.folder, dtype=self.dtype, **options)
        project = core.model.logits

        def counted(hidden: torch.Tensor) -> torch.Tensor:
            self.rows.append(len(hidden))
            return project(hidden)

        core.model.logits = counted  # type: ignore[method-assign]
        return core, info

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        with (
            live_server(make_app(self.load)) as url,
            httpx.Client(base_url=url, trust_env=False, timeout=600) as client,
        ):
            yield client


@pytest.fixture(scope="module")
def real(real_folder: Path) -> Real:
    return Real(real_folder, "float32")


@pytest.fixture(scope="module")
def real_client(real: Real) -> Iterator[httpx.Client]:
    with real.client() as client:
        yield client


def real_reference(folder: Path, dtype: torch.dtype) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


QUESTIONS = [
    ("Question: What is the capital of France?\nAnswer:", [" Paris", " London", " 🍅 Paris"]),
    ("The sun rises in the", [" east", " west", " east and sets in the west."]),
    ("2 + 2 =", [" 4", " 5", " four"]),
    ("An emoji: 🙂", ["🙃", " is fun", "🙂🙂"]),
]


@pytest.mark.slow
def test_the_real_model_scores_questions_as_in_transformers(
    real_client: httpx.Client, real_folder: Path
) -> None:
    tokenizer = Tokenizer(real_folder)
    model = real_reference(real_folder, torch.float32)
    pairs = [
        (tokenizer.encode(question), tokenizer.encode(answer, add_special_tokens=False))
        for question, answers in QUESTIONS
        for answer in answers
    ]

    agree(loglikelihoods(real_client, pairs), expected(model, pairs))
    agree(loglikelihoods(real_client, pairs, max_tokens=0, logprobs=10), expected(model, pairs))


def long_ids(folder: Path, length: int) -> list[int]:
    """Tokens of ordinary English prose, found in a docstring."""
    text = inspect.getdoc(transformers.GenerationConfig) or ""
    ids = Tokenizer(folder).encode(text * 3)
    assert len(ids) >= length
    return ids[:length]


def perplexities(client: httpx.Client, ids: list[int], model: Any) -> tuple[float, float]:
    """The perplexity of a text by the server's numbers, and by those of `transformers`."""
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
    first, *logprobs = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert len(logprobs) == len(ids) - 1
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    return math.exp(-sum(logprobs) / len(logprobs)), math.exp(loss.item())


@pytest.mark.slow
def test_perplexity_in_float32_equals_that_of_transformers(
    real_client: httpx.Client, real_folder: Path
) -> None:
    model = real_reference(real_folder, torch.float32)

    ours, theirs = perplexities(real_client, long_ids(real_folder, 1600), model)

    assert ours == pytest.approx(theirs, rel=0.001)


@pytest.mark.slow
def test_perplexity_in_bfloat16_equals_that_of_transformers(real_folder: Path) -> None:
    model = real_reference(real_folder, torch.bfloat16)
    with Real(real_folder, "bfloat16").client() as client:
        ours, theirs = perplexities(client, long_ids(real_folder, 1600), model)

    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.slow
def test_scoring_a_long_prompt_projects_few_rows_at_a_time(
    real: Real, real_client: httpx.Client, real_folder: Path
) -> None:
    real.rows.clear()
    body = {"prompt": long_ids(real_folder, 4096), "max_tokens": 1, "echo": True, "logprobs": 5}

    (choice,) = real_client.post(COMPLETIONS, json=body).json()["choices"]

    assert len(choice["logprobs"]["token_logprobs"]) == 4097
    assert sum(real.rows) == 4096  # each once: all but the last, and that one to draw from
    assert max(real.rows) <= 512
