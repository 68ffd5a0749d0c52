"""The kernels' decoder against the one in torch, over the same quantised weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from engine.kernels import native
from engine.kernels.quantized import Groups
from engine.models import llama
from engine.models.cpu_decoder import CpuDecoder
from engine.models.decoder import Decoder
from engine.models.load import load_config
from engine.models.weights import GROUPS_FILE, Weights
from tests.support import tiny
from tests.support.engines import request, run, tiny_core
from tests.support.kernels import libraries
from tests.support.packed import packed_logits, packed_states

PROMPTS = [
    [(index * step + 5) % 120 + 3 for index in range(length)]
    for length, step in ((1, 1), (6, 7), (13, 11), (22, 3), (70, 5))
]
LIBRARIES = pytest.mark.parametrize(
    "library", libraries(), ids=lambda library: f"isa {library.isa}"
)


def hf_model(family: str, **changes: int) -> Any:
    """A family's random model, wide enough for the kernels; norms and biases included.

    With smaller weights than elsewhere: large ones make attention so sharp that it passes on
    every rounding enlarged.
    """
    name, values = tiny.LLAMA_SHAPED[family]
    sizes = {"hidden_size": 128, "initializer_range": 0.1} | changes
    config = getattr(transformers, f"{name}Config")(**values | sizes)
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in hf.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return hf


def loaded(folder: Path, library: native.Library, cache: torch.dtype) -> CpuDecoder:
    model = llama.load(load_config(folder), Weights(folder, torch.float32, "cpu"), cache, library)
    assert isinstance(model, CpuDecoder)
    return model


def reference(model: CpuDecoder, hf: Any) -> Decoder:
    """The same layers, run by torch; only the products are the kernels'."""
    layers, norm = model.layers, model.norm
    table: Tensor = hf.get_input_embeddings().weight.data
    tied = hf.config.tie_word_embeddings
    embedding = Groups.of(table).floats() if tied else table.bfloat16().float()
    return Decoder(model.config, embedding, layers, norm, model.head)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@LIBRARIES
@pytest.mark.parametrize("family", tiny.LLAMA_SHAPED)
def test_every_family_equals_the_decoder_in_torch(
    family: str, library: native.Library, tmp_path: Path
) -> None:
    hf = hf_model(family)
    model = loaded(tiny.save(hf, tmp_path), library, torch.float32)
    got = torch.cat(packed_logits(model, PROMPTS))
    want = torch.cat(packed_logits(reference(model, hf), PROMPTS))
    # Another order of sums now and then rounds an activation to the neighbouring code.
    assert distance(got, want) < 0.015


@pytest.mark.parametrize("family", tiny.LLAMA_SHAPED)
@torch.inference_mode()
def test_every_family_is_close_to_transformers(family: str, tmp_path: Path) -> None:
    hf = hf_model(family)
    core, _ = tiny_core(tiny.save(hf, tmp_path), quantization="int8")
    assert isinstance(core.model, CpuDecoder)
    for ids, got in zip(PROMPTS, packed_logits(core.model, PROMPTS), strict=True):
        # 8 bits for weights and activations, through two layers.
        assert distance(got, hf(torch.tensor([ids])).logits[0]) < 0.06


@LIBRARIES
def test_a_cache_of_bfloat16_costs_little(library: native.Library, tmp_path: Path) -> None:
    folder = tiny.save(hf_model("qwen3"), tmp_path)
    narrow = packed_logits(loaded(folder, library, torch.bfloat16), PROMPTS)
    wide = packed_logits(loaded(folder, library, torch.float32), PROMPTS)
    assert not torch.equal(torch.cat(narrow), torch.cat(wide))
    assert distance(torch.cat(narrow), torch.cat(wide)) < 0.04


@LIBRARIES
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [3, 16])
def test_a_sequence_has_the_same_bits_alone_and_packed(
    block_size: int, cache: torch.dtype, library: native.Library, tmp_path: Path
) -> None:
    model = loaded(tiny.save(hf_model("mistral-sliding"), tmp_path), library, cache)
    together = packed_logits(model, PROMPTS, block_size)
    for ids, want in zip(PROMPTS, together, strict=True):
        (alone,) = packed_logits(model, [ids])
        assert torch.equal(alone, want)


@LIBRARIES
@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_what_nobody_reads_changes_nothing_that_is_read(
    family: str, library: native.Library, tmp_path: Path
) -> None:
    model = loaded(tiny.save(hf_model(family), tmp_path), library, torch.bfloat16)
    want, kept = packed_states(model, PROMPTS)
    ends = torch.tensor([len(ids) for ids in PROMPTS]).cumsum(0) - 1
    for rows in (ends, torch.tensor([3]), torch.arange(8, 40), torch.arange(len(want))):
        got, cache = packed_states(model, PROMPTS, read=rows)
        assert torch.equal(got[rows], want[rows])
        assert bool(got.isnan().any()) == (len(rows) < len(want))  # the rest was left out
        for one, other in zip(cache, kept, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding"])
def test_the_text_does_not_depend_on_the_step_budget(family: str, tmp_path: Path) -> None:
    folder = tiny.save(hf_model(family), tmp_path)
    texts = []
    for budget, crowd in ((256, 8), (8, 8), (2, 1)):
        core, _ = tiny_core(
            folder, quantization="int8", max_batch_tokens=budget, max_num_seqs=crowd
        )
        requests = [
            request(core, ids, str(index), max_tokens=12, ignore_eos=True)
            for index, ids in enumerate(PROMPTS)
        ]
        results = run(core, *requests)
        texts.append([results.ids(str(index)) for index in range(len(PROMPTS))])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, True),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, False),  # heads of 16
        ({"intermediate_size": 100}, False),
        ({"hidden_size": 144, "head_dim": 32}, False),
    ],
)
def test_other_shapes_are_left_to_torch(
    changes: dict[str, int], runs: bool, tmp_path: Path
) -> None:
    hf = hf_model("llama", **changes)
    core, _ = tiny_core(tiny.save(hf, tmp_path), quantization="int8")
    assert isinstance(core.model, CpuDecoder) is runs
    with torch.inference_mode():
        want = hf(torch.tensor(PROMPTS[2:3])).logits[0]
    assert distance(packed_logits(core.model, PROMPTS[2:3])[0], want) < 0.06


@LIBRARIES
def test_bringing_codes_into_order_leaves_the_threads_as_they_were(
    library: native.Library, tmp_path: Path
) -> None:
    folder = tiny.save(hf_model("llama"), tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    groups = Groups.of(Weights(folder, torch.float32, "cpu").take(name, (128, 96)))
    parts = {f"{name}.codes": groups.codes, f"{name}.d": groups.d.half()}
    save_file(parts, folder / GROUPS_FILE)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loaded(folder, library, torch.float32)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
