"""The Llama-shaped decoder on the CPU: quantised weights, one call of our kernels a step."""

import ctypes
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import Attention
from engine.attention.torch_paged import LayerCache
from engine.kernels import native
from engine.kernels.quantized import GROUP, QuantizedLinear
from engine.models.base import ForwardInput, KVShape, Query
from engine.models.decoder import DecoderConfig, DecoderLayer

_MAX_DIM = 256  # of a head, in the kernels
_MAX_SHARING = 16  # query heads of one key-value head


def can_run(config: DecoderConfig, inner: int) -> bool:
    """Do the kernels run a decoder of this shape, whose feed-forward is `inner` wide?"""
    return (
        all(width % GROUP == 0 for width in (config.hidden_size, config.head_dim, inner))
        and config.head_dim <= _MAX_DIM
        and config.num_heads // config.num_kv_heads <= _MAX_SHARING
    )


class CpuDecoder:
    """Runs the layers of `engine.models.decoder.Decoder`, which is the reference, in one call.

    All linears are `QuantizedLinear`; between them everything is float32. Keys and values are kept
    in `dtype`, float32 or bfloat16.
    """

    def __init__(
        self,
        library: native.Library,
        config: DecoderConfig,
        layers: list[DecoderLayer],
        norm: Tensor,  # [H] float32
        head: QuantizedLinear,
        embedding: Tensor | None,  # [V, H] bfloat16; None: the head's rows
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.context_len = config.context_len
        shape = KVShape(config.num_kv_heads, config.head_dim, config.head_dim)
        self.kv_shapes = [shape] * len(layers)
        self.has_lens = True
        self._library = library
        self.head = head
        self.norm = norm
        self._inv_freq = config.inv_freq.contiguous()
        self.layers = layers
        self._embedding = embedding  # which the kernels point to
        self._layers = (native.Layer * len(layers))(
            *(_layer(layer, window) for layer, window in zip(layers, config.windows, strict=True))
        )
        self._decoder = native.Decoder(
            layers=self._layers,
            norm=norm.data_ptr(),
            inv_freq=self._inv_freq.data_ptr(),
            embedding=None if embedding is None else embedding.data_ptr(),
            head=head.matrix,
            num_layers=len(layers),
            hidden=config.hidden_size,
            inner=layers[0].down.in_features,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            dim=config.head_dim,
            cache_bytes=dtype.itemsize,
            eps=config.norm_eps,
            scale=config.head_dim**-0.5,
            rope_scale=config.rope_scale,
        )
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._cache: list[LayerCache] | None = None

    def forward(
        self,
        inputs: ForwardInput,
        cache: list[LayerCache],
        attention: Attention,  # noqa: ARG002 - the kernels do it themselves
    ) -> Tensor:
        """The final hidden states, [T, H] float32."""
        if cache is not self._cache:
            self._point_to(cache)
        shape = len(inputs.token_ids), self.config.hidden_size
        # Rows that are left out must not look like an answer to whoever reads them by mistake.
        hidden = torch.empty(shape) if inputs.read is None else torch.full(shape, math.nan)
        step = native.Step(
            decoder=ctypes.pointer(self._decoder),
            token_ids=inputs.token_ids.data_ptr(),
            positions=inputs.positions.data_ptr(),
            spans=inputs.attention.spans.data_ptr(),
            blocks=inputs.attention.blocks.data_ptr(),
            num_tokens=len(inputs.token_ids),
            num_spans=len(inputs.attention.spans),
            hidden=hidden.data_ptr(),
        )
        if inputs.read is not None:
            step.read, step.num_read = inputs.read.data_ptr(), len(inputs.read)
        pointed_to = [self._probe(step, inputs), self._replace(step, inputs)]
        needed = self._library.scratch_bytes(step)
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        step.scratch = self._scratch.data_ptr()
        self._library.forward(step)
        del pointed_to
        return hidden

    def _point_to(self, cache: list[LayerCache]) -> None:
        for layer, kept in zip(self._layers, cache, strict=True):
            layer.keys, layer.values = kept.keys.data_ptr(), kept.values.data_ptr()
        self._decoder.block_size = cache[0].keys.shape[2]
        self._cache = cache

    def _probe(self, step: native.Step, inputs: ForwardInput) -> list[Tensor]:
        """Make room for what a probe wants; returns what must live until the step is over."""
        probe = inputs.probe
        if probe is None:
            return []
        config, count = self.config, len(probe.rows)
        probed = _places(probe.rows, len(inputs.token_ids))
        layers = len(self._layers)
        probe.states = torch.empty(layers + 1, count, config.hidden_size)
        queries = torch.empty(layers, count, config.num_heads, config.head_dim)
        scale = config.head_dim**-0.5
        probe.queries = [
            Query(q, scale, window) for q, window in zip(queries, config.windows, strict=True)
        ]
        step.probed, step.num_probed = probed.data_ptr(), count
        step.states, step.queries = probe.states.data_ptr(), queries.data_ptr()
        return [probed, queries]

    def _replace(self, step: native.Step, inputs: ForwardInput) -> list[Tensor]:
        if inputs.replaced is None or inputs.inputs is None:
            return []
        replaced = _places(inputs.replaced, len(inputs.token_ids))
        values = inputs.inputs.float().contiguous()
        step.replaced, step.inputs = replaced.data_ptr(), values.data_ptr()
        return [replaced, values]

    def final_norm(self, states: Tensor) -> Tensor:
        """What a probe kept of a layer [*, H] as hidden states that `logits` takes."""
        return F.rms_norm(states, self.norm.shape, self.norm, self.config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, H] to logits [R, V] float32."""
        return self.head(hidden)


def _places(rows: Tensor, count: int) -> Tensor:
    """For each of `count` tokens, where it stands in `rows`, or -1."""
    places = torch.full((count,), -1)
    places[rows] = torch.arange(len(rows))
    return places


def _layer(layer: DecoderLayer, window: int | None) -> native.Layer:
    fields: dict[str, Any] = {"window": window or 0}
    for name in ("qkv", "out", "gate_up", "down"):
        fields[name] = getattr(layer, name).matrix
    for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm"):
        norm: Tensor | None = getattr(layer, name)
        fields[name] = None if norm is None else norm.data_ptr()
    return native.Layer(**fields)
