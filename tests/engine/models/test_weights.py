"""Checkpoints: one file or many, and everything that can be wrong with them, in a line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ModelUnavailable
from engine.models.weights import Weights
from tests.support import tiny
from tests.support.engines import tiny_core
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
