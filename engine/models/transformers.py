"""Any other decoder: run by its own `transformers` code, with our paged attention plugged in.

Hugging Face's models hand queries, keys and values of each layer to an attention function chosen
by name. Ours writes them to the paged cache and attends there, so a step's tokens of many
sequences can be packed into one row of tokens with explicit positions. Whatever a model does
outside that function (mixing tokens, say) would break this, so a model is tried at start against
its own plain forward pass, and refused if the two differ.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from engine.attention import Attention, choose_attention
from engine.attention.torch_paged import LayerCache, Span
from engine.errors import ModelUnavailable
from engine.kernels.linear import Linear
from engine.models.base import ForwardInput, Head, KVShape, Query, RowByRow, head_dtype
from engine.models.weights import old_files, unread_tensors

_NAME = "logitmill"
_KNOWN_LAYERS = {"full_attention", "sliding_attention", "attention"}
_CHANGES_SCORES = ("s_aux", "position_bias", "alibi")  # arguments we do not compute
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class _Attend(Protocol):
    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, Dk]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - ours follows from positions alone
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function registered with `transformers`; it works for the model that owns `module`."""
    step: _Step = module.logitmill_step  # type: ignore[assignment]
    strange = [name for name in _CHANGES_SCORES if options.get(name) is not None]
    if strange:
        raise ModelUnavailable(
            f"{step.kind} computes attention with {strange[0]}, which is not supported"
        )
    assert step.attend is not None
    attended = step.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
    )
    return attended.unsqueeze(0), None


@dataclass
class _Step:
    """How this step attends. Every module of a model holds the model's one instance of this.

    Passing it as an argument would be plainer, but not all of `transformers`' layers pass what
    they do not know on to the attention function.
    """

    kind: str  # the model's, for messages
    attend: _Attend | None = None


AttentionInterface.register(_NAME, _attention)


@dataclass
class _Shapes:
    """Stands in for attention once, to learn what each layer keeps of a token."""

    seen: dict[int, KVShape]
    windows: set[int | None]

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,  # noqa: ARG002
        window: int | None,
        softcap: float | None,  # noqa: ARG002
    ) -> Tensor:
        self.seen[layer] = KVShape(k.shape[1], k.shape[2], v.shape[2])
        self.windows.add(window)
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])


class TransformersModel:
    """A Hugging Face causal language model behind the engine's two calls."""

    def __init__(
        self,
        folder: Path,
        config: Any,
        dtype: torch.dtype,
        device: str,
        batch_invariant: bool = False,
    ) -> None:
        """Load and try it. Raises ModelUnavailable with the reason if it cannot be served."""
        text = config.get_text_config(decoder=True)
        kind = config.model_type
        _refuse_by_config(config, text)
        model = _load(folder, config, dtype)
        if getattr(model, "_is_stateful", False):
            raise ModelUnavailable(f"{kind} keeps a state instead of keys and values")
        self._model = model.to(device).eval()
        self._step = _Step(kind)
        self._device = device
        self.dtype = dtype
        self.vocab_size = int(text.vocab_size)
        self.hidden_size = int(text.hidden_size)
        self._softcap = getattr(text, "final_logit_softcapping", None)
        self._factor = getattr(text, "logit_scale", None) or 1.0
        self._factor /= getattr(text, "logits_scaling", None) or 1.0
        head = model.get_output_embeddings()
        tied = head.weight is model.get_input_embeddings().weight
        wide = head.weight.data.to(head_dtype(dtype, device))
        self._head = Head(wide, head.bias, tied, batch_invariant)
        for module in model.modules():
            module.logitmill_step = self._step
            ours = None if module is head else _ours(kind, module, batch_invariant)
            if ours is not None:
                module.forward = ours
        self.kv_shapes = self._try(kind, text)
        self.context_len = _context_len(text)

    @torch.inference_mode()
    def forward(
        self, inputs: ForwardInput, cache: list[LayerCache], attention: Attention
    ) -> Tensor:
        """The final hidden states, [T, H]."""

        def paged(
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            scale: float,
            window: int | None,
            softcap: float | None,
        ) -> Tensor:
            if inputs.probe is not None:
                kept = q[inputs.probe.rows]
                inputs.probe.queries.append(Query(kept, scale, window, softcap))
            return attention.attend(
                q,
                k,
                v,
                cache[layer],
                inputs.attention,
                scale=scale,
                window=window,
                softcap=softcap,
            )

        return self._run(inputs, paged)

    def final_norm(self, states: Tensor) -> Tensor:
        """What a probe kept of a layer [*, H] as hidden states that `logits` takes."""
        assert self._norm is not None
        normed: Tensor = self._norm(states.to(self.dtype))
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, H] to logits [R, V] float32, with the family's own scalings."""
        logits = self._head(hidden)
        if self._factor != 1.0:
            logits = logits * self._factor
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def _run(self, inputs: ForwardInput, paged: _Attend) -> Tensor:
        self._step.attend = paged
        ids, probe = inputs.token_ids.unsqueeze(0), inputs.probe
        tokens = {"input_ids": ids}
        if inputs.replaced is not None and inputs.inputs is not None:
            embeds = self._model.get_input_embeddings()(ids)
            embeds[0, inputs.replaced] = inputs.inputs.to(embeds.dtype)
            tokens = {"inputs_embeds": embeds}
        last: list[Tensor] = []
        hook = None
        if probe is not None and self._norm is not None:
            hook = self._norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        output = self._model.base_model(
            **tokens,
            position_ids=inputs.positions.unsqueeze(0),
            use_cache=False,
            output_hidden_states=probe is not None,
        )
        if hook is not None and probe is not None:
            hook.remove()
            # Hugging Face's last one has been through the final norm.
            states = [*output.hidden_states[:-1], last[-1]]
            probe.states = torch.stack([state[0, probe.rows].float() for state in states])
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _final_norm(self, ids: Tensor) -> nn.Module | None:
        """The module whose output the model's last hidden states are; None if there is none."""
        outputs: list[tuple[nn.Module, Any]] = []
        hooks = [
            module.register_forward_hook(lambda m, _, out: outputs.append((m, out)))
            for module in self._model.base_model.modules()
            if "norm" in type(module).__name__.lower()
        ]
        last = self._model.base_model(ids).last_hidden_state
        for hook in hooks:
            hook.remove()
        same = [
            module
            for module, out in outputs
            if isinstance(out, Tensor) and out.data_ptr() == last.data_ptr()
        ]
        return same[-1] if same else None

    @torch.inference_mode()
    def _try(self, kind: str, text: Any) -> list[KVShape]:
        """Run two packed sequences both ways; returns what each layer keeps of a token."""
        lengths = (5, 3)
        span = min(self.vocab_size - 1, 97)
        ids = (torch.arange(sum(lengths), device=self._device) * 13 + 1) % span
        parts = ids.split(lengths)
        wanted = torch.cat([self._model(part.unsqueeze(0)).logits[0] for part in parts])
        self._norm = self._final_norm(parts[0].unsqueeze(0))
        self.has_lens = self._norm is not None

        try:
            self._model.set_attn_implementation(_NAME)
        except (ValueError, KeyError) as error:
            raise _outside_interface(kind) from error
        positions = torch.cat([torch.arange(length, device=self._device) for length in lengths])
        shapes = _Shapes({}, set())
        self._run(ForwardInput(ids, positions, None), shapes)
        if sorted(shapes.seen) != list(range(text.num_hidden_layers)):
            raise _outside_interface(kind)
        window = getattr(text, "sliding_window", None)
        if window is not None and shapes.windows == {None} and _slides(text):
            raise ModelUnavailable(f"{kind} does not tell the attention function its window")
        kv_shapes = [shapes.seen[layer] for layer in range(text.num_hidden_layers)]

        attention = choose_attention(8, self._device)
        cache = [_small_cache(shape, wanted.dtype, self._device) for shape in kv_shapes]
        plan = attention.plan([Span(0, length, [i]) for i, length in enumerate(lengths)])
        got = self.logits(self.forward(ForwardInput(ids, positions, plan), cache, attention))
        difference = float((got - wanted.float()).abs().max() / wanted.float().abs().max())
        if not difference <= _TOLERANCE[self.dtype]:
            raise ModelUnavailable(
                f"{kind} gives other logits with paged attention (relative difference "
                f"{difference:.1e}), so its results would be wrong"
            )
        return kv_shapes


def _load(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    kind = config.model_type
    tensors = _state_dict(folder)
    try:
        with torch.device("meta"):  # takes no memory
            outline = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _refuse_by_shape(outline, tensors)
        with _quiet():
            model, found = type(outline).from_pretrained(
                None,
                config=outline.config,
                state_dict=tensors,
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, in a line
            )
    except ModelUnavailable:
        raise
    except Exception as error:  # of any kind: a config.json may say anything
        reason = str(error).strip().split("\n")[0]
        raise ModelUnavailable(f"{kind} cannot be loaded: {reason}") from error
    # Both are filled with random numbers, and a warning.
    for name, ours, wanted in sorted(found["mismatched_keys"]):
        raise _misshapen(name, ours, wanted)
    for name in sorted(found["missing_keys"]):
        raise ModelUnavailable(f"the checkpoint has no tensor {name!r}")
    return model


def _refuse_by_shape(outline: nn.Module, tensors: dict[str, Any]) -> None:
    """Refuse what is found to be wrong before memory is taken for all that a config.json asks for.

    Not all is, because some families' tensors get other names and shapes on the way.
    """
    wanted = outline.state_dict()
    for name in sorted(tensors.keys() & wanted.keys()):
        if tuple(tensors[name].shape) != tuple(wanted[name].shape):
            raise _misshapen(name, tensors[name].shape, wanted[name].shape)
    size = sum(parameter.numel() for parameter in outline.parameters())
    found = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if size > 2 * found:
        raise ModelUnavailable(
            f"with this config.json the model has {size} weights, and the checkpoint has {found}"
        )


def _misshapen(name: str, shape: Sequence[int], wanted: Sequence[int]) -> ModelUnavailable:
    return ModelUnavailable(
        f"tensor {name!r} is {list(shape)}; with this config.json it would be {list(wanted)}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables and bars of `transformers`: what is wrong is told in one line."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.enable_progress_bar()
        transformers.logging.set_verbosity(before)


def _state_dict(folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint, which `transformers` itself would leave mapped to the files."""
    if not (old := old_files(folder)):
        return dict(unread_tensors(folder))
    tensors: dict[str, Any] = {}
    for file in old:
        try:
            tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except Exception as error:  # of any kind: it is a program for a small machine
            reason = str(error).strip().partition("\n")[0]
            raise ModelUnavailable(f"{file} cannot be read: {reason}") from error
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _refuse_by_config(config: Any, text: Any) -> None:
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelUnavailable(f"{kind} is an encoder-decoder; only decoders are served")
    others = set(getattr(text, "layer_types", None) or ()) - _KNOWN_LAYERS
    if others:
        raise ModelUnavailable(
            f"{kind} has layers that are not served: {', '.join(sorted(others))}"
        )


def _ours(kind: str, module: nn.Module, batch_invariant: bool) -> Linear | RowByRow | None:
    """What computes in place of a module's own code, if anything does.

    Raises ModelUnavailable for products that nothing here computes, if they are to be
    `batch_invariant`: that a few tokens come out the same would not say that all do.
    """
    if type(module) is nn.Linear:
        # Reads the weight where it is, so that nothing is held twice.
        return Linear(module.weight, module.bias, pack=False, batch_invariant=batch_invariant)
    if not batch_invariant:
        return None
    matrices = [one for one in module.parameters(recurse=False) if one.dim() > 1]
    if matrices and not isinstance(module, nn.Embedding):
        raise ModelUnavailable(
            f"--batch-invariant: {kind} computes products in a {type(module).__name__} of its own, "
            "which may depend on the batch, so it cannot be served with it"
        )
    is_activation = type(module).__module__ in ("transformers.activations", nn.SiLU.__module__)
    return RowByRow(module.forward) if is_activation else None


def _outside_interface(kind: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{kind} computes attention in its own code, not through transformers' attention interface"
    )


def _slides(text: Any) -> bool:
    types = getattr(text, "layer_types", None)
    if types is not None:
        return "sliding_attention" in types
    return bool(getattr(text, "use_sliding_window", True))


def _context_len(text: Any) -> int:
    """The longest sequence whose positions mean the same at every length."""
    rope = getattr(text, "rope_parameters", None) or {}
    longest = int(text.max_position_embeddings)
    if rope.get("rope_type") == "longrope":
        # Past this, other angles apply to the whole batch: one long sequence would change all.
        return min(longest, int(rope.get("original_max_position_embeddings", longest)))
    return longest


def _small_cache(shape: KVShape, dtype: torch.dtype, device: str) -> LayerCache:
    def blocks(dim: int) -> Tensor:
        return torch.zeros(2, shape.heads, 8, dim, dtype=dtype, device=device)

    return LayerCache(blocks(shape.key_dim), blocks(shape.value_dim))
