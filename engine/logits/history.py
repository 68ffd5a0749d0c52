"""The tokens each row has so far, and how often each of them occurs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.types import Rows


@dataclass(frozen=True, slots=True)
class History:
    """Prompt and output of each row, padded to the longest.

    Past a row's own length `ids` holds whatever the lane held before, always valid ids.
    """

    ids: Tensor  # [R, C] int64
    index: Tensor  # [1, C]
    lengths: Tensor  # [R, 1]
    prompt_lengths: Tensor  # [R, 1]

    @classmethod
    def of(cls, lanes: Lanes, rows: Rows) -> "History":
        ids = lanes.tokens[rows.lanes, : rows.max_len].long()
        return cls(
            ids,
            torch.arange(rows.max_len, device=ids.device).unsqueeze(0),
            (rows.positions + 1).unsqueeze(1),
            lanes.prompt_lengths[rows.lanes].unsqueeze(1),
        )

    @property
    def written(self) -> Tensor:
        """Which entries belong to the row, [R, C]."""
        return self.index < self.lengths

    @property
    def generated(self) -> Tensor:
        """Which entries are its output, [R, C]."""
        return self.written & (self.index >= self.prompt_lengths)

    def count(self, mask: Tensor, vocab_size: int) -> Tensor:
        """For each entry, how many entries inside `mask` [R, C] hold the same token: [R, C] int32.

        Entries of equal token get equal counts, whether or not they are inside the mask, so
        values computed from them may be scattered back in any order. Only the touched places of
        the [R, V] table are ever written or read.
        """
        table = torch.empty(
            len(self.ids), vocab_size, dtype=torch.int32, device=self.ids.device
        ).scatter_(1, self.ids, 0)
        return table.scatter_add_(1, self.ids, mask.int()).gather(1, self.ids)
