"""Weights of 4 or 8 bits in groups of 32, and products with them on the CPU.

Activations are rounded to 8 bits per group of 32 on the way in, so a group's sum is exact in
integers; see `quantized.h`. A row's result does not depend on the other rows: it has the same bits
in every batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import native

GROUP = 32
_PANEL = 32
_LINE_BYTES = 64
_GROUP_BYTES = {4: 512 + 128, 8: 1024 + 128}  # of a panel


@dataclass(frozen=True, slots=True)
class Groups:
    """A weight [N, K] as d·u + m, a d and an m for each group of 32 along K.

    4 bits: codes u in 0…15, d and m [N, K / 32] float16. 8 bits: codes in 0…255, d float32, and
    m is -128 d.
    """

    bits: int
    codes: Tensor  # [N, K] uint8
    d: Tensor
    m: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Groups":
        """Round a weight [N, K] to 8 bits."""
        groups = weight.float().unflatten(1, (-1, GROUP))
        d = groups.abs().amax(-1) / 127.0
        inverse = torch.where(d > 0, 1.0 / d, 0.0)
        codes = (groups * inverse.unsqueeze(-1)).round_().add_(128.0).to(torch.uint8)
        return cls(8, codes.flatten(1), d, -128.0 * d)

    def reordered(self, order: Tensor) -> "Groups":
        """The rows in another order [N]."""
        return Groups(self.bits, self.codes[order], self.d[order], self.m[order])

    def floats(self) -> Tensor:
        """The weight as it counts, [N, K] float32."""
        codes = self.codes.unflatten(1, (-1, GROUP)).float()
        product: Tensor = codes * self.d.float().unsqueeze(-1) + self.m.float().unsqueeze(-1)
        return product.flatten(1)


def stacked(parts: Sequence[Groups]) -> Groups:
    """Weights above one another; 8 bits if they have different ones."""
    if len(parts) == 1:
        return parts[0]
    if len({part.bits for part in parts}) > 1:
        parts = [part if part.bits == 8 else Groups.of(part.floats()) for part in parts]
    return Groups(
        parts[0].bits,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.d for part in parts]),
        torch.cat([part.m for part in parts]),
    )


class QuantizedLinear:
    """x ↦ x Wᵀ + b with W in groups, laid out for the kernels."""

    def __init__(self, library: native.Library, weight: Groups, bias: Tensor | None = None) -> None:
        self._library = library
        self.out_features, self.in_features = weight.codes.shape
        self.bits = weight.bits
        padding = -self.out_features % _PANEL
        codes, d, m = (
            (torch.nn.functional.pad(part, (0, 0, 0, padding)) if padding else part).contiguous()
            for part in (weight.codes, weight.d, weight.m)
        )
        self._panels = _aligned_bytes(
            (self.out_features + padding)
            // _PANEL
            * (self.in_features // GROUP)
            * _GROUP_BYTES[self.bits]
        )
        self._bias = None if bias is None else torch.nn.functional.pad(bias.float(), (0, padding))
        self.matrix = native.Matrix(
            panels=self._panels.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            n=self.out_features,
            k=self.in_features,
            bits=self.bits,
        )
        self.num_bytes = len(self._panels)
        library.pack(codes.data_ptr(), d.data_ptr(), m.data_ptr(), self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], in x's type."""
        rows = x.reshape(-1, self.in_features).float().contiguous()
        out = rows.new_empty(len(rows), self.out_features)
        self._library.linear(self.matrix, rows.data_ptr(), len(rows), out.data_ptr())
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def _aligned_bytes(size: int) -> Tensor:
    """Uninitialised bytes that begin on a cache line."""
    space = torch.empty(size + _LINE_BYTES, dtype=torch.uint8)
    start = -space.data_ptr() % _LINE_BYTES
    return space[start : start + size]
