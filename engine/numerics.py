"""Row-wise reductions whose result for a row does not depend on how many rows there are.

Library reductions split a single long row over threads but give many rows a thread each, and so
round differently; these first reduce blocks of the vocabulary, which is the same work either way.
On CPU they are single passes of our kernels; what is written here in torch is their reference, and
runs everywhere else.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from engine.kernels import native
from engine.messages import Listed, Pair

BLOCK = 256  # tokens per block of the vocabulary
NEG_INF = float("-inf")


def integers(values: ArrayLike, device: str = "cpu") -> Tensor:
    """Numbers in lists as int64. torch's own way takes three to five times as long as numpy's.

    To a GPU they are copied from pinned memory, for which nobody waits.
    """
    host = torch.from_numpy(np.array(values, dtype=np.int64))
    return host if device == "cpu" else host.pin_memory().to(device, non_blocking=True)


def listed(make: Callable[[int, float], Pair], ids: Tensor, values: Tensor) -> list[Listed[Pair]]:
    """Rows of ids [n, K] int64 and values [n, K] float32 or float64, on the host."""
    rows = zip(ids.to(torch.int32).cpu().numpy(), values.cpu().numpy(), strict=True)
    return [Listed(make, row.tobytes(), numbers.tobytes()) for row, numbers in rows]


def kernels(logits: Tensor) -> native.Library | None:
    """What takes the place of torch for rows of logits like these, if anything does."""
    fits = logits.is_cpu and logits.dtype == torch.float32 and logits.stride(1) == 1
    return native.LIBRARY if fits else None


def pick(logits: Tensor, index: Tensor | None) -> Tensor:
    """With an `index` [r] int64 a copy of those rows, else all."""
    return logits if index is None else logits.index_select(0, index)


def blocked(x: Tensor, fill: float) -> Tensor:
    """[R, V] as [R, ceil(V / 256), 256], the end padded with `fill`."""
    size = x.shape[-1]
    if size % BLOCK:
        x = F.pad(x, (0, -size % BLOCK), value=fill)
    blocks: Tensor = x.unflatten(-1, (-1, BLOCK))
    return blocks


def scan(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of each row [R], NaN if it holds one, and the lowest id that has it [R].

    `torch.argmax` does not say which of equal entries it returns. Here the first block that
    reaches the maximum is found, then the first entry in it.
    """
    if (library := kernels(logits)) is not None:
        return library.scan(logits)
    blocks = blocked(logits, NEG_INF)
    block_max = blocks.amax(-1)
    top = block_max.amax(-1, keepdim=True)
    block = _first(block_max == top)
    inside = blocks[torch.arange(len(block), device=block.device), block]
    return top[:, 0], block * BLOCK + _first(inside == top)


def within(values: Tensor) -> Tensor:
    """In place: infinities as the largest and the lowest float."""
    largest = torch.finfo(torch.float32).max
    return values.clamp_(-largest, largest)


def bounded(logits: Tensor) -> Tensor:
    """The rows with +inf as the largest float."""
    return logits.clamp(max=torch.finfo(torch.float32).max)


def known_finite(values: Tensor) -> bool:
    """Are all of these numbers finite? Not known of a GPU's: asking would mean waiting for it."""
    return values.is_cpu and all(map(math.isfinite, values.tolist()))


def block_masses(
    logits: Tensor, temperature: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over blocks of 256 tokens, with e = exp((z - top) / temperature).

    temperature [R]; with an `index` [R] int64 those of some of the rows. Returns top [R], Σe [R, B]
    and Σe·(z - top) [R, B]; dropped (-inf) entries count nothing. A row needs a finite entry.
    """
    if (library := kernels(logits)) is not None:
        return library.measure(logits, 1.0 / temperature, index)
    logits = pick(logits, index)
    top, _ = scan(logits)
    z = logits - top.unsqueeze(1)
    e = (z / temperature.unsqueeze(1)).exp_()
    moments = torch.where(e > 0, e * z, 0.0)
    return top, blocked(e, 0.0).sum(-1), blocked(moments, 0.0).sum(-1)


def summarise(logits: Tensor, temperature: Tensor, index: Tensor | None = None) -> Tensor:
    """ln Σ exp(z / T) and the entropy in nats of softmax(z / T), [2, R, 1] float64.

    temperature is [R]; with an `index` [R] int64 those of some of the rows. A row needs a finite
    entry.
    """
    if (library := kernels(logits)) is not None:
        return library.summarise(logits, temperature.contiguous(), index)
    top, mass, moment = block_masses(logits, temperature, index)
    total = mass.double().sum(1)
    scaled = within(top / temperature).double()
    entropy = total.log() - moment.double().sum(1) / total / temperature
    return torch.stack((total.log() + scaled, entropy)).unsqueeze(2)


def moments(logits: Tensor) -> Tensor:
    """ln Σ exp z of each row, and of its softmax entropy in nats and varentropy in nats².

    [3, R, 1] float64. A row needs a finite entry.
    """
    if (library := kernels(logits)) is not None:
        return library.moments(logits)
    top = logits.amax(1, keepdim=True).double()
    below = (logits.double() - top).clamp_(min=-1e30)  # 0 times infinity is no number
    mass = below.exp()
    total = row_sum(mass)
    mean = row_sum(mass * below) / total
    varentropy = row_sum(mass * (below - mean).square_()) / total
    return torch.stack((total.log() + top, total.log() - mean, varentropy))


def rank(
    logits: Tensor, width: int, temperature: Tensor, index: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """`best` and `summarise`, in one pass over the rows if possible."""
    if (library := kernels(logits)) is None:
        return best(logits, width, index), summarise(logits, temperature, index)
    return library.rank(logits, min(width, logits.shape[1]), temperature.contiguous(), index)


def log_sum_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """ln Σ exp of each row, as its largest entry and what remains: [R, 1] float32 each."""
    top, mass, _ = block_masses(logits, torch.ones(len(logits), device=logits.device))
    return top.unsqueeze(1), mass.double().sum(1, keepdim=True).log_().float()


def count_finite(logits: Tensor, index: Tensor | None = None) -> Tensor:
    """How many entries of each row are not -inf, [R, 1] int64."""
    if (library := kernels(logits)) is not None:
        return library.count(logits, index).unsqueeze(1)
    return (pick(logits, index) > NEG_INF).sum(1, keepdim=True)


def log_softmax(logits: Tensor) -> Tensor:
    """The logprobs of each row, [R, V] float32; one without a finite entry stays as it is."""
    if (library := kernels(logits)) is not None:
        return library.log_softmax(logits)
    top, rest = log_sum_exp(logits)
    # One after the other: where logits are large, their sum has too few digits in float32.
    return torch.where(logits > NEG_INF, logits - top - rest, NEG_INF)


def finite(values: Tensor) -> Tensor:
    """As float32, what is beyond ±1e30 as that: later stages can still multiply it."""
    return values.clamp(-1e30, 1e30).float()


def row_sum(x: Tensor) -> Tensor:
    """The sum of each row, [..., 1] float64, accumulated over blocks."""
    return blocked(x, 0.0).sum(-1).double().sum(-1, keepdim=True)


def divergence(logits: Tensor, others: Tensor, index: Tensor) -> Tensor:
    """The Jensen-Shannon divergence in nats between each row and some others, [R, M] float64.

    others [N, V]; index [R, M] int64 says which. Each row needs a finite entry.
    """
    if (library := kernels(logits)) is not None and kernels(others) is not None:
        return library.divergence(logits, others, index)
    half, own = _half_of(logits)
    halves, its = _half_of(others[index].flatten(0, 1))
    average = halves.view(*index.shape, -1) + half.unsqueeze(1)
    # The smallest number, because 0 times its logarithm is 0.
    nats = average.clamp(min=torch.finfo(average.dtype).tiny).log_().mul_(average)
    return -row_sum(nats).squeeze(-1) - (own.unsqueeze(1) + its.view(index.shape)) / 2


def _half_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Half of each probability [n, V], and the entropy [n] float64 of the whole."""
    top, mass, moment = block_masses(logits, torch.ones_like(logits[:, 0]))
    total = mass.double().sum(1)
    entropy = total.log() - moment.double().sum(1) / total
    return (logits - top.unsqueeze(1)).exp_().div_(2.0 * total.float().unsqueeze(1)), entropy


def deviation(logits: Tensor, index: Tensor | None = None) -> Tensor:
    """The population standard deviation of each row's finite entries, [R, 1].

    With an index [R] int64 those of some of the rows.
    """
    if (library := kernels(logits)) is not None:
        return library.deviation(logits, index).unsqueeze(1)
    logits = pick(logits, index)
    alive = logits > NEG_INF
    count = row_sum(alive.float())
    mean = (row_sum(torch.where(alive, logits, 0.0)) / count).float()
    variance = row_sum(torch.where(alive, logits - mean, 0.0).square_()) / count
    return variance.sqrt_().float()


def cut_(logits: Tensor, temperature: Tensor, floor: Tensor) -> None:
    """In place: entries for which z / temperature is below the row's floor become -inf.

    temperature and floor are [R] float32.
    """
    if (library := kernels(logits)) is not None:
        library.cut(logits, temperature.contiguous(), floor.contiguous())
    else:
        below = logits / temperature.unsqueeze(1) < floor.unsqueeze(1)
        logits.masked_fill_(below, NEG_INF)


def best(logits: Tensor, width: int, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `width` largest entries of each row and their ids: descending, equal ones by lowest id.

    With an index [R] int64 those of some of the rows.

    `torch.topk` promises nothing about equal entries, so the order among them is mended, and a
    row with equals across the border is sorted whole.
    """
    width = min(width, logits.shape[1])
    if (library := kernels(logits)) is not None:
        return library.select(logits, width, index)
    logits = pick(logits, index)
    if width == logits.shape[1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    values, ids = logits.topk(width + 1)
    tied = (values[:, -1] == values[:, -2]).nonzero().squeeze(1)
    ids, order = ids[:, :width].sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    if len(tied):
        whole, whole_ids = logits[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], ids[tied] = whole[:, :width], whole_ids[:, :width]
    return values, ids


def _first(mask: Tensor) -> Tensor:
    """The index of the first True of each row, [R]; 0 if there is none."""
    size = mask.shape[-1]
    index = torch.arange(size, device=mask.device)
    first = torch.where(mask, index, size).amin(-1)
    return first.remainder(size)
