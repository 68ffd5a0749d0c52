"""Matrix products with weights packed once for the CPU.

On CPU, oneDNN multiplies by weights it has laid out itself two to three times as fast as
`F.linear` at the batch sizes of decoding, and its result for a row does not depend on the number
of rows, which `F.linear`'s does. A single row would go through other code and differ in its last
bits, so it is computed as two. Elsewhere this is `F.linear`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_TYPICAL_ROWS = 32  # what the packed layout is optimised for
_TILE = 32  # rows of every product, where a row's bits must not depend on their number


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Has oneDNN kernels for this type on this machine?"""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class Linear:
    """x ↦ x Wᵀ + b, with W [N, K] and b [N] or None.

    With `pack`, W is copied into oneDNN's layout where that is possible, and the original is let
    go; without, oneDNN reads W as it is, which is slower but shares its memory. If it is
    `batch_invariant`, every product is one of 32 rows, padded with zeros.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        pack: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        self.in_features = weight.shape[1]
        self.out_features = weight.shape[0]
        self.bias = bias
        self._batch_invariant = batch_invariant
        self._onednn = can_pack(weight.dtype, weight.device)
        if self._onednn and pack:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        if not self._batch_invariant:
            return self._product(x)
        rows = x.reshape(-1, self.in_features)
        padded = F.pad(rows, (0, 0, 0, -len(rows) % _TILE))
        product = torch.cat([self._product(tile) for tile in padded.split(_TILE)])
        return product[: len(rows)].view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        if not self._onednn:
            return F.linear(x, self.weight, self.bias)
        if x.numel() == self.in_features:
            both = self._product(x.reshape(1, -1).expand(2, -1).contiguous())
            return both[0].view(*x.shape[:-1], self.out_features)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "none", [], ""
        )
        return product
