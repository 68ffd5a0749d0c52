"""Checkpoints: read and not mapped, and all that can be wrong with them, in a line."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ModelUnavailable
from engine.models.weights import Weights
from tests.support import tiny
from tests.support.engines import request, run, tiny_core
from tests.support.packed import packed_logits

PROMPT = [5, 9, 33, 12, 77]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# One that the fast path runs, one that `transformers` does; and a weight of each.
FAMILIES = pytest.mark.parametrize("family", ["llama", "phi"])
DOWN = {
    "llama": "model.layers.1.mlp.down_proj.weight",
    "phi": "model.layers.1.mlp.fc2.weight",
}


def saved(family: str, folder: Path) -> Path:
    return tiny.save(tiny.hf_model(family), folder)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        tiny_core(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@FAMILIES
def test_a_checkpoint_in_many_files_is_the_same_model(family: str, tmp_path: Path) -> None:
    hf = tiny.hf_model(family)
    one, many = tiny.save(hf, tmp_path / "one"), tiny.save(hf, tmp_path / "many")
    (many / SINGLE).unlink()
    hf.save_pretrained(many, max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 5
    rows = [packed_logits(tiny_core(folder)[0].model, [PROMPT])[0] for folder in (one, many)]
    assert torch.equal(*rows)


def old_form(folder: Path) -> Path:
    """The same checkpoint as it was kept before safetensors."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


FORMS = pytest.mark.parametrize(
    ("family", "dtype", "form"),
    [
        ("llama", "float32", None),
        ("llama-tied", "bfloat16", None),
        ("llama", "auto", None),  # quantised, where there are kernels
        ("phi", "float32", None),
        ("gpt2", "bfloat16", None),
        ("gemma3", "float32", None),
        ("phi", "float32", old_form),
    ],
)


@FORMS
def test_nothing_stays_mapped_or_open_once_a_model_is_loaded(
    family: str, dtype: str, form: Callable[[Path], Path] | None, tmp_path: Path
) -> None:
    folder = saved(family, tmp_path)
    core, _ = tiny_core(folder if form is None else form(folder), dtype=dtype)
    assert core.tokenizer.hf
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    links = [Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd")]
    assert not [link for link in links if link.is_symlink() and tmp_path in link.resolve().parents]


def cut(file: Path) -> None:
    os.truncate(file, 0)


def overwritten(file: Path) -> None:
    with file.open("r+b") as out:
        out.write(b"\xff" * file.stat().st_size)


def replaced(file: Path) -> None:
    new = file.with_name("new")
    new.write_bytes(b"\xff" * file.stat().st_size)
    new.replace(file)


@FORMS
@pytest.mark.parametrize("spoil", [cut, overwritten, replaced, Path.unlink])
def test_what_happens_to_the_files_does_not_reach_a_running_engine(
    family: str,
    dtype: str,
    form: Callable[[Path], Path] | None,
    spoil: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    folder = saved(family, tmp_path)
    core, _ = tiny_core(folder if form is None else form(folder), dtype=dtype, prefix_cache=False)

    def answer() -> tuple[list[int], list[float | None]]:
        results = run(core, request(core, [5, 6, 7], logprobs=0, ignore_eos=True))
        tokens = results.choices["r", 0].tokens
        return [token.id for token in tokens], [token.logprob for token in tokens]

    before = answer()
    for file in folder.iterdir():
        spoil(file)
    assert answer() == before


def test_what_config_and_weights_take_is_read_before_much_is_taken(tmp_path: Path) -> None:
    folder = saved("phi", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for change, reason in (
        ({"vocab_size": 10**4}, r"would be \[10000"),
        ({"num_hidden_layers": 12}, r"with this config\.json the model has \d+ weights, and the"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert re.search(reason, refusal(folder))


@FAMILIES
def test_a_missing_tensor_is_named(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)
    edit(folder, lambda tensors: tensors.pop(DOWN[family]))
    assert refusal(folder) == f"the checkpoint has no tensor {DOWN[family]!r}"


@FAMILIES
def test_a_tensor_of_another_shape_is_named(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)
    edit(folder, lambda tensors: tensors.update({DOWN[family]: torch.zeros(64, 88)}))
    assert refusal(folder) == (
        f"tensor {DOWN[family]!r} is [64, 88]; with this config.json it would be [64, 96]"
    )


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    extra = {f"model.layers.2.{name}": torch.zeros(1) for name in "dbace"}
    edit(folder, lambda tensors: tensors.update(extra))
    assert refusal(folder) == (
        "the model has no place for model.layers.2.a, model.layers.2.b, model.layers.2.c and 2 more"
    )


def test_tensors_that_old_checkpoints_hold_besides_are_let_pass(tmp_path: Path) -> None:
    folder = saved("llama-tied", tmp_path)
    edit(
        folder,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),  # tied, twice
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
            }
        ),
    )
    want = packed_logits(tiny_core(saved("llama-tied", tmp_path / "plain"))[0].model, [PROMPT])
    assert torch.equal(packed_logits(tiny_core(folder)[0].model, [PROMPT])[0], want[0])


@FAMILIES
@pytest.mark.parametrize("content", [b"", b"no tensors", None], ids=["empty", "nonsense", "cut"])
def test_a_broken_file_is_named(family: str, content: bytes | None, tmp_path: Path) -> None:
    file = saved(family, tmp_path) / SINGLE
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    assert f"{file} cannot be read" in refusal(tmp_path)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def with_header(file: Path, header: bytes, tensors: bytes, length: int | None = None) -> None:
    size = (len(header) if length is None else length).to_bytes(8, "little")
    file.write_bytes(size + header + tensors)


LIES: list[tuple[dict[str, Any], str]] = [
    ({"shape": [64, 97]}, "contradicts itself about tensor"),
    ({"shape": [-64, -96]}, "contradicts itself about tensor"),
    ({"shape": [64.0, 96]}, "TypeError"),
    ({"shape": None}, "TypeError"),
    ({"dtype": "F16"}, "contradicts itself about tensor"),
    ({"dtype": "X8"}, "KeyError: 'X8'"),
    ({"data_offsets": [0, 1 << 60]}, "contradicts itself about tensor"),
    ({"data_offsets": [1 << 60, (1 << 60) + 64 * 96 * 4]}, "leaves a gap before tensor"),
    ({"data_offsets": [4, 4 + 64 * 96 * 4]}, "leaves a gap before tensor"),
    ({"data_offsets": [-4, 64 * 96 * 4 - 4]}, "leaves a gap before tensor"),
    ({"data_offsets": [0]}, "not enough values"),
    ({"data_offsets": "ab"}, "TypeError"),
]


@FAMILIES
@pytest.mark.parametrize(("lie", "reason"), LIES, ids=str)
def test_a_header_that_lies_is_refused(
    family: str, lie: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    file = saved(family, tmp_path) / SINGLE
    header, tensors = header_of(file)
    header[DOWN[family]] |= lie
    with_header(file, json.dumps(header).encode(), tensors)
    message = refusal(tmp_path)
    assert message.startswith(f"{file} cannot be read: ")
    assert reason in message


@pytest.mark.parametrize(
    ("header", "length", "reason"),
    [
        (b"{}", 1 << 60, "and its header alone would have 1152921504606846976"),
        (b"[" * 100_000, None, "RecursionError"),
        (b"[]", None, "its header is no object"),
        (b"\xff\xfe", None, "Expecting value"),
        (b"{}", None, "it has 30 bytes, and would have 10"),
    ],
    ids=["long", "deep", "a list", "no text", "without tensors"],
)
def test_a_header_that_is_none_is_refused(
    header: bytes, length: int | None, reason: str, tmp_path: Path
) -> None:
    file = saved("llama", tmp_path) / SINGLE
    with_header(file, header, bytes(20), length)
    message = refusal(tmp_path)
    assert message.startswith(f"{file} cannot be read: ")
    assert reason in message


def test_a_file_that_gets_shorter_while_it_is_read_is_named(tmp_path: Path) -> None:
    file = saved("llama", tmp_path) / SINGLE
    weights = Weights(tmp_path, torch.float32, "cpu")
    os.truncate(file, header_of(file)[0][DOWN["llama"]]["data_offsets"][0])
    with pytest.raises(ModelUnavailable, match=f"{file} cannot be read: it ends at byte"):
        weights.take(DOWN["llama"], (64, 96))


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"codes": torch.zeros(64, 64, dtype=torch.uint8)}, "codes' is [64, 64]; with this"),
        ({"codes": torch.zeros(64, 96)}, "codes' is torch.float32; it would be torch.uint8"),
        ({"d": torch.zeros(64, 3)}, "d' is torch.float32; it would be torch.float16"),
        ({"d": torch.zeros(64, 2, dtype=torch.float16)}, "d' is [64, 2]; with this"),
        ({"d": None}, "groups.safetensors has no tensor"),
    ],
)
def test_codes_that_kernels_would_read_wrongly_are_refused(
    lie: dict[str, Tensor | None], reason: str, tmp_path: Path
) -> None:
    folder = saved("llama", tmp_path)
    parts: dict[str, Tensor | None] = {
        "codes": torch.zeros(64, 96, dtype=torch.uint8),
        "d": torch.zeros(64, 3, dtype=torch.float16),
    }
    groups = {
        f"{DOWN['llama']}.{part}": tensor
        for part, tensor in (parts | lie).items()
        if tensor is not None
    }
    save_file(groups, folder / "groups.safetensors")
    weights = Weights(folder, torch.float32, "cpu")
    with pytest.raises(ModelUnavailable) as caught:
        weights.groups(DOWN["llama"], (64, 96))
    assert reason in str(caught.value)


@FAMILIES
def test_an_index_that_names_what_a_file_lacks_is_refused(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)
    weight_map = dict.fromkeys([*load_file(folder / SINGLE), "model.extra"], SINGLE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert refusal(folder) == f"{folder / SINGLE} has no tensor 'model.extra', which {INDEX} names"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut"])
def test_a_broken_file_of_the_old_form_is_named(content: bytes, tmp_path: Path) -> None:
    folder = old_form(saved("phi", tmp_path))
    file = folder / "pytorch_model.bin"
    file.write_bytes(content)
    assert refusal(folder).startswith(f"{file} cannot be read: ")


@FAMILIES
def test_a_missing_file_of_several_is_named(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)
    (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map[DOWN[family]] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert "model-00002-of-00002.safetensors" in refusal(folder)


@FAMILIES
@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_broken_index_is_refused(family: str, content: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(content)
    assert f"{folder / INDEX} cannot be read" in refusal(folder)


def test_a_folder_without_weights_says_what_it_should_hold(tmp_path: Path) -> None:
    (saved("llama", tmp_path) / SINGLE).unlink()
    assert refusal(tmp_path) == f"{tmp_path} holds neither {SINGLE} nor {INDEX}"


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "nonsense"}', "{}"])
def test_a_folder_without_a_usable_config_is_refused(content: str | None, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert refusal(folder).startswith(f"no usable config.json in {tmp_path}: ")


def test_each_tensor_is_taken_once_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    values = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    save_file(values, tmp_path / SINGLE)
    weights = Weights(tmp_path, torch.bfloat16, "cpu")
    assert "a" in weights
    assert weights.take("a", (2,)).dtype == torch.bfloat16
    assert "a" not in weights
    assert weights.maybe("a", (2,)) is None
    with pytest.raises(ModelUnavailable, match="no tensor 'a'"):
        weights.take("a", (2,))
    with pytest.raises(ModelUnavailable, match="no place for b"):
        weights.check_all_used()
    assert torch.equal(weights.take("b", (1, 1), torch.float32), values["b"])
    weights.check_all_used()
