"""The Llama-shaped decoder: Llama, SmolLM2, Mistral, Qwen2, Qwen3.

Attention with rotary positions and grouped heads, a gated SiLU feed-forward, RMS norms before
each. Layers differ from a family to the next only in what their weights hold: biases, and norms
of queries and keys (Qwen3).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import Attention
from engine.attention.torch_paged import LayerCache
from engine.kernels.linear import Linear
from engine.kernels.quantized import QuantizedLinear
from engine.models.base import ForwardInput, Head, KVShape, Query, RowByRow


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The numbers that make a decoder."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    context_len: int
    windows: tuple[int | None, ...]  # per layer: how many of the latest tokens it sees
    inv_freq: Tensor  # [head_dim / 2] float32: the angle each pair turns per position
    rope_scale: float = 1.0  # factor on the rotated vectors (YaRN)


Product = Linear | QuantizedLinear


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's weights. Queries, keys and values are one product, gate and up another.

    The pairs that rotary positions turn stand next to each other in each head, so that turning is
    one complex product; `paired` brings weights into that order.
    """

    attention_norm: Tensor  # [H]
    qkv: Product  # H -> (Hq + 2 Hkv) · D
    out: Product  # Hq · D -> H
    mlp_norm: Tensor  # [H]
    gate_up: Product  # H -> 2 I
    down: Product  # I -> H
    query_norm: Tensor | None = None  # [D]
    key_norm: Tensor | None = None


class Decoder:
    """Runs the layers over one step's tokens."""

    def __init__(
        self,
        config: DecoderConfig,
        embedding: Tensor,  # [V, H]
        layers: list[DecoderLayer],
        norm: Tensor,  # [H]
        head: Head,
        batch_invariant: bool = False,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.silu = RowByRow(F.silu) if batch_invariant else F.silu
        self.dtype = norm.dtype
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.context_len = config.context_len
        shape = KVShape(config.num_kv_heads, config.head_dim, config.head_dim)
        self.kv_shapes = [shape] * len(layers)
        self.has_lens = True

    def forward(
        self, inputs: ForwardInput, cache: list[LayerCache], attention: Attention
    ) -> Tensor:
        """The final hidden states, [T, H]."""
        config = self.config
        angles = inputs.positions.unsqueeze(1) * config.inv_freq
        turns = torch.polar(torch.full_like(angles, config.rope_scale), angles).unsqueeze(1)
        x = F.embedding(inputs.token_ids, self.embedding).to(self.dtype)
        if inputs.replaced is not None and inputs.inputs is not None:
            x[inputs.replaced] = inputs.inputs.to(self.dtype)
        probe, states = inputs.probe, []
        for layer, layer_cache, window in zip(self.layers, cache, config.windows, strict=True):
            q, k, v = self._project(layer, self._normed(x, layer.attention_norm), turns)
            if probe is not None:
                states.append(x[probe.rows].float())
                probe.queries.append(Query(q[probe.rows], config.head_dim**-0.5, window))
            attended = attention.attend(
                q,
                k,
                v,
                layer_cache,
                inputs.attention,
                scale=config.head_dim**-0.5,
                window=window,
            )
            x = x + layer.out(attended.flatten(1))
            gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
            x = x + layer.down(self.silu(gate).mul_(up))
        if probe is not None:
            probe.states = torch.stack([*states, x[probe.rows].float()])
        return self._normed(x, self.norm)

    def final_norm(self, states: Tensor) -> Tensor:
        """What a probe kept of a layer [*, H] as hidden states that `logits` takes."""
        return self._normed(states.to(self.dtype), self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, H] to logits [R, V] float32."""
        return self.head(hidden)

    def _project(
        self, layer: DecoderLayer, x: Tensor, turns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D], the first two turned by position."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = layer.qkv(x).unflatten(1, (heads + 2 * kv_heads, self.config.head_dim))
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = qk.split([heads, kv_heads], dim=1)
            qk = torch.cat(
                (self._normed(q, layer.query_norm), self._normed(k, layer.key_norm)), dim=1
            )
        pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
        qk = torch.view_as_real(pairs * turns).flatten(-2).to(self.dtype)
        q, k = qk.split([heads, kv_heads], dim=1)
        return q, k, v

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)


def paired(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head so that (i, i + D/2), which turn together, are neighbours.

    weight is [heads · D, ...] in the checkpoint's order.
    """
    halves: Tensor = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)
