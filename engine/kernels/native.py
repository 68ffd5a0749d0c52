"""Our own C++ kernels for the CPU, compiled when the package is installed, if a compiler is there.

They run in the OpenMP threads that torch has already started: the library is linked against none,
and finds torch's when it is loaded after it. The variable LOGITMILL_KERNELS chooses what is used:
`auto`, `off`, or the vector width in bits to stay within, which leaves out products of bfloat16.
"""

import ctypes
import logging
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch  # loads the OpenMP runtime, too
from torch import Tensor

log = logging.getLogger(__name__)


class Matrix(Structure):
    """Structures of types.h: pointers, then sizes in elements."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("bits", c_int64),
    )


class Attention(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("spans", c_void_p),
        ("blocks", c_void_p),
        ("num_spans", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("value_dim", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),
        ("scale", c_float),
    )


class AttendArgs(Structure):
    _fields_ = (
        ("attention", Attention),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
    )


class Layer(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
    )


class Decoder(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("norm", c_void_p),
        ("inv_freq", c_void_p),
        ("embedding", c_void_p),
        ("head", Matrix),
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("block_size", c_int64),
        ("cache_bytes", c_int64),
        ("eps", c_float),
        ("scale", c_float),
        ("rope_scale", c_float),
    )


class CacheTensor(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("heads", c_int64),
        ("block_size", c_int64),
        ("token_bytes", c_int64),
    )


class Rows(Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("index", c_void_p),
        ("count", c_int64),
        ("vocab", c_int64),
        ("stride", c_int64),
    )


class Choice(Structure):
    _fields_ = (
        ("rows", Rows),
        ("lanes", c_void_p),
        ("positions", c_void_p),
        ("greedy", c_void_p),
        ("common", c_void_p),
        ("seeds", c_void_p),
        ("temperature", c_void_p),
        ("min_p", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("top", c_void_p),
        ("ids", c_void_p),
        ("late", c_void_p),
    )


class Counts(Structure):
    _fields_ = (
        ("tokens", c_void_p),
        ("prompt_lengths", c_void_p),
        ("windows", c_void_p),
        ("slots", c_void_p),
        ("ids", c_void_p),
        ("seen", c_void_p),
        ("generated", c_void_p),
        ("sizes", c_void_p),
        ("context", c_int64),
        ("vocab", c_int64),
    )


class Penalties(Structure):
    _fields_ = (
        ("repetition", c_void_p),
        ("frequency", c_void_p),
        ("presence", c_void_p),
        ("prompt", c_void_p),
    )


class Matches(Structure):
    _fields_ = (("tokens", c_void_p), ("lengths", c_void_p), ("context", c_int64))


class Dry(Structure):
    _fields_ = (
        ("tokens", c_void_p),
        ("matches", c_void_p),
        ("longest", c_void_p),
        ("breakers", c_void_p),
        ("multiplier", c_void_p),
        ("base", c_void_p),
        ("allowed", c_void_p),
        ("last_n", c_void_p),
        ("context", c_int64),
        ("vocab", c_int64),
    )


class Candidates(Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("unsure", c_void_p),
        ("tail", c_void_p),
        ("whole", c_void_p),
        ("active", c_void_p),
        ("rows", c_int64),
        ("k", c_int64),
        ("kept", c_void_p),
        ("flags", c_void_p),
    )


class Step(Structure):
    _fields_ = (
        ("decoder", POINTER(Decoder)),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("spans", c_void_p),
        ("blocks", c_void_p),
        ("num_tokens", c_int64),
        ("num_spans", c_int64),
        ("hidden", c_void_p),
        ("scratch", c_void_p),
        ("probed", c_void_p),
        ("num_probed", c_int64),
        ("states", c_void_p),
        ("queries", c_void_p),
        ("replaced", c_void_p),
        ("inputs", c_void_p),
        ("read", c_void_p),
        ("num_read", c_int64),
    )


# Of candidates before a filter: their logits [R, K], which rows [R] are unsure, have their tails,
# and are whole, and on which the filter acts [R, 1]. After it: the same without the last.
Before = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
After = tuple[Tensor, Tensor, Tensor, Tensor]


class Library:
    """The compiled kernels, for one instruction set."""

    def __init__(self, path: Path, isa: int | None = None) -> None:
        """Raises OSError or AttributeError if the file is no such library, or an older one."""
        self._dll = ctypes.CDLL(str(path))
        for name, returned in (
            ("isa", c_int64),
            ("attend", ctypes.c_bool),
            ("scratch_bytes", c_int64),
            ("forward", None),
            ("linear", None),
            ("copy_blocks", None),
            ("scan", None),
            ("measure", None),
            ("summarise", None),
            ("update_summaries", None),
            ("moments", None),
            ("log_softmax", None),
            ("divergence", None),
            ("deviation", None),
            ("select", None),
            ("cut", None),
            ("count", None),
            ("probs", None),
            ("count_tokens", None),
            ("penalise", None),
            ("extend_matches", None),
            ("find_matches", None),
            ("penalise_matches", None),
            ("choose", None),
            ("keep", None),
            ("keep_above", ctypes.c_bool),
            ("keep_first", None),
            ("keep_mass", None),
            ("typical", None),
            ("bent", None),
            ("hash", None),
            ("winner", None),
            ("pack", None),
        ):
            getattr(self._dll, f"logitmill_{name}").restype = returned
        widest = self._dll.logitmill_isa()
        self.isa = widest if isa is None else min(isa, widest)
        self._isa = c_int64(self.isa)

    def attend(self, args: AttendArgs, element_size: int) -> bool:
        """Run paged attention; False if the shapes are not supported, and nothing was done."""
        return bool(
            self._dll.logitmill_attend(self._isa, ctypes.byref(args), c_int64(element_size))
        )

    def scratch_bytes(self, step: Step) -> int:
        """The memory `forward` needs for a step."""
        return int(self._dll.logitmill_scratch_bytes(self._isa, ctypes.byref(step)))

    def forward(self, step: Step) -> None:
        """Run all layers of a decoder."""
        self._dll.logitmill_forward(self._isa, ctypes.byref(step))

    def linear(self, matrix: Matrix, x: int, num_rows: int, out: int) -> None:
        """Multiply rows by a matrix; x and out are addresses."""
        self._dll.logitmill_linear(
            self._isa,
            ctypes.byref(matrix),
            c_void_p(x),
            c_int64(num_rows),
            c_void_p(out),
        )

    def copy_blocks(self, tensors: Sequence[Tensor], copies: Tensor) -> None:
        """Copy the first tokens of blocks in all tensors [N, heads, block size, D] of a cache.

        copies [n, 3] int64 holds source, target and number of tokens.
        """
        cache = (CacheTensor * len(tensors))(
            *(
                CacheTensor(t.data_ptr(), t.shape[1], t.shape[2], t.shape[3] * t.itemsize)
                for t in tensors
            )
        )
        count = c_int64(len(tensors))
        self._dll.logitmill_copy_blocks(cache, count, _address(copies), c_int64(len(copies)))

    def scan(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest entry of each row [R], NaN if it holds one, and the lowest id with it [R]."""
        top = torch.empty(len(logits))
        ids = torch.empty(len(logits), dtype=torch.int64)
        self._dll.logitmill_scan(self._isa, _rows(logits), _address(top), _address(ids))
        return top, ids

    def measure(
        self, logits: Tensor, factor: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The largest entry of each row [R], and Σe and Σe·(z - top) of each block of 256, [R, B].

        e = exp(factor·(z - top)); factor is [R] float32, contiguous. With an index [R] int64, here
        and elsewhere, those of some of the rows.
        """
        blocks = -(-logits.shape[1] // 256)
        top = torch.empty(len(factor))
        mass, moment = torch.empty(len(factor), blocks), torch.empty(len(factor), blocks)
        self._dll.logitmill_measure(
            self._isa,
            _rows(logits, index),
            _address(factor),
            _address(top),
            _address(mass),
            _address(moment),
        )
        return top, mass, moment

    def summarise(self, logits: Tensor, temperature: Tensor, index: Tensor | None = None) -> Tensor:
        """ln Σ exp(z / T) of each row and the entropy of softmax(z / T), [2, R, 1] float64.

        temperature is [R] float32, contiguous.
        """
        summary = torch.empty(2, len(temperature), 1, dtype=torch.float64)
        self._dll.logitmill_summarise(
            self._isa, _rows(logits, index), _address(temperature), _address(summary)
        )
        return summary

    def update_summaries(
        self,
        logits: Tensor,
        index: Tensor | None,
        temperature: Tensor,
        whole: Tensor,
        candidates: Tensor | None,
        known: tuple[Tensor, Tensor],
    ) -> Tensor:
        """`summarise` of the rows of the logits that are `whole` [R], and of others' candidates.

        These are [R, K]; None: all rows are whole. `known` are the temperatures [R] for which the
        rows' own was computed, and what came out [2, R, 1]; both are kept up.
        """
        summary = torch.empty(2, len(temperature), 1, dtype=torch.float64)
        self._dll.logitmill_update_summaries(
            self._isa,
            _rows(logits, index),
            _address(temperature),
            _address(whole),
            None if candidates is None else _address(candidates),
            c_int64(0 if candidates is None else candidates.shape[1]),
            *(_address(its) for its in known),
            _address(summary),
        )
        return summary

    def moments(self, logits: Tensor) -> Tensor:
        """ln Σ exp z of each row, its entropy and its varentropy in nats, [3, R, 1] float64."""
        out = torch.empty(3, len(logits), 1, dtype=torch.float64)
        self._dll.logitmill_moments(self._isa, _rows(logits), _address(out))
        return out

    def log_softmax(self, logits: Tensor) -> Tensor:
        """The logprobs of each row, [R, V]."""
        out = torch.empty(logits.shape)
        self._dll.logitmill_log_softmax(self._isa, _rows(logits), _address(out))
        return out

    def divergence(self, logits: Tensor, others: Tensor, index: Tensor) -> Tensor:
        """The Jensen-Shannon divergence in nats between each row and some others, [R, M] float64.

        others [N, V]; index [R, M] int64 says which.
        """
        out = torch.empty(index.shape, dtype=torch.float64)
        self._dll.logitmill_divergence(
            self._isa, _rows(logits), _rows(others, index.flatten()), _address(out)
        )
        return out

    def deviation(self, logits: Tensor, index: Tensor | None = None) -> Tensor:
        """The population standard deviation of each row's finite entries, [R]."""
        out = torch.empty(len(logits if index is None else index))
        self._dll.logitmill_deviation(self._isa, _rows(logits, index), _address(out))
        return out

    def cut(self, logits: Tensor, temperature: Tensor, floor: Tensor) -> None:
        """In place: entries for which z / temperature is below the floor become -inf.

        temperature and floor are [R] float32, contiguous.
        """
        self._dll.logitmill_cut(self._isa, _rows(logits), _address(temperature), _address(floor))

    def count(self, logits: Tensor, index: Tensor | None = None) -> Tensor:
        """How many entries of each row are not -inf, [R] int64."""
        out = torch.empty(len(logits if index is None else index), dtype=torch.int64)
        self._dll.logitmill_count(self._isa, _rows(logits, index), _address(out))
        return out

    def probs(self, logits: Tensor, total: Tensor) -> Tensor:
        """exp(logits - total) of candidates [R, K] float32; total [R, 1] float64."""
        out = torch.empty(logits.shape)
        self._dll.logitmill_probs(
            self._isa, _address(logits), _address(total), *_sizes(logits), _address(out)
        )
        return out

    def count_tokens(self, counts: Counts, lanes: Tensor, positions: Tensor) -> None:
        """Count the tokens of lanes [n] at these positions [n], both int64."""
        self._dll.logitmill_count_tokens(
            self._isa,
            ctypes.byref(counts),
            _address(lanes),
            _address(positions),
            c_int64(len(lanes)),
        )

    def penalise(
        self, logits: Tensor, lanes: Tensor, counts: Counts, columns: Sequence[Tensor]
    ) -> None:
        """In place: lower what has occurred; lanes [R] int64.

        The columns [L] are the repetition, frequency and presence penalties, float32, and whether
        the first also looks at the prompt, bool.
        """
        penalties = Penalties(*(_address(column) for column in columns))
        self._dll.logitmill_penalise(
            self._isa,
            _rows(logits),
            _address(lanes),
            ctypes.byref(counts),
            ctypes.byref(penalties),
        )

    def extend_matches(
        self, matches: Matches, lanes: Tensor, positions: Tensor, broken: Tensor | None
    ) -> None:
        """Take in lanes' [n] tokens at these positions [n], int64.

        `broken` [n] bool: no match goes on there; None: all do.
        """
        self._dll.logitmill_extend_matches(
            self._isa,
            ctypes.byref(matches),
            _address(lanes),
            _address(positions),
            None if broken is None else _address(broken),
            c_int64(len(lanes)),
        )

    def find_matches(self, matches: Matches, lane: int, length: int, reach: int) -> None:
        """Those of a lane's first `length` tokens, none longer than `reach`."""
        self._dll.logitmill_find_matches(
            self._isa, ctypes.byref(matches), c_int64(lane), c_int64(length), c_int64(reach)
        )

    def penalise_matches(self, logits: Tensor, lanes: Tensor, positions: Tensor, dry: Dry) -> None:
        """In place: lower tokens that would extend a match; lanes, positions [R] int64."""
        self._dll.logitmill_penalise_matches(
            self._isa, _rows(logits), _address(lanes), _address(positions), ctypes.byref(dry)
        )

    def choose(
        self, logits: Tensor, lanes: Tensor, positions: Tensor, columns: Choice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The largest entry of each row, NaN if it holds one, and a token, [R] both.

        Last which rows are late, [R] bool: their tokens are still to be chosen, and what stands
        there is the lowest id with the largest entry. lanes, positions [R] int64; the columns are
        what `choice` made.
        """
        top, ids = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int64)
        late = torch.empty(len(logits), dtype=torch.bool)
        columns.rows = _rows_of(logits)
        columns.lanes, columns.positions = _address(lanes), _address(positions)
        columns.top, columns.ids, columns.late = _address(top), _address(ids), _address(late)
        self._dll.logitmill_choose(self._isa, ctypes.byref(columns))
        return top, ids, late

    def keep(self, before: Before, mask: Tensor, inside: Tensor) -> After:
        """Keep where a mask [R, K] says so; `inside` [R, 1]: that does not depend on the tail."""
        assert mask.dtype == inside.dtype == torch.bool
        candidates, after = _candidates(before)
        self._dll.logitmill_keep(self._isa, candidates, _address(mask), _address(inside))
        return after

    def keep_above(
        self, before: Before, floor: Tensor, best: Tensor, temperature: Tensor
    ) -> tuple[After, Tensor | None]:
        """Keep what is not below `floor` [R, 1].

        best [R, K] are the logits as they came; nothing in a tail is above the last of them by the
        temperature [R]. Also in which rows [R] the tail stays, but is to be cut at the floor; None:
        in no row.
        """
        assert floor.dtype == best.dtype == temperature.dtype == torch.float32
        candidates, after = _candidates(before)
        cut = torch.empty_like(before[1])
        args = _address(floor), _address(best), _address(temperature), _address(cut)
        any_cut = self._dll.logitmill_keep_above(self._isa, candidates, *args)
        return after, cut if any_cut else None

    def keep_first(self, before: Before, count: Tensor) -> After:
        """Keep the `count` [R, 1] int64 best ones that are left."""
        assert count.dtype == torch.int64
        candidates, after = _candidates(before)
        self._dll.logitmill_keep_first(self._isa, candidates, _address(count))
        return after

    def keep_mass(self, before: Before, probs: Tensor, limit: Tensor) -> After:
        """Keep those above which no more than a mass of `limit` [R, 1] is ranked."""
        assert probs.dtype == limit.dtype == torch.float32
        candidates, after = _candidates(before)
        args = _address(probs), _address(limit)
        self._dll.logitmill_keep_mass(self._isa, candidates, *args)
        return after

    def typical(
        self,
        logits: Tensor,
        probs: Tensor,
        ids: Tensor,
        total: Tensor,
        entropy: Tensor,
        limit: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates [R, K] nearest to `entropy` in surprise that have mass `limit`.

        Of equally near ones the lowest ids. Returns a mask, the mass of all candidates [R, 1], and
        how far from the entropy the farthest one is that is kept [R, 1]. total, entropy and limit
        are [R, 1] float32.
        """
        keep = torch.empty(logits.shape, dtype=torch.bool)
        mass, farthest = torch.empty_like(total), torch.empty_like(total)
        self._dll.logitmill_typical(
            self._isa,
            _address(logits),
            _address(probs),
            _address(ids),
            *_sizes(logits),
            _address(total),
            _address(entropy),
            _address(limit),
            _address(keep),
            _address(mass),
            _address(farthest),
        )
        return keep, mass, farthest

    def bent(
        self, logits: Tensor, probs: Tensor, limit: Tensor, tail: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates [R, K] before their curve has done the part `limit` of its bending.

        Returns a mask, whether it is certain where there is a `tail` [R] bool, [R, 1], and whether
        the curve bends at all, [R, 1]. limit is [R, 1] float64.
        """
        keep = torch.empty(logits.shape, dtype=torch.bool)
        inside, curve = torch.empty(2, len(logits), 1, dtype=torch.bool)
        self._dll.logitmill_bent(
            self._isa,
            _address(logits),
            _address(probs),
            *_sizes(logits),
            _address(limit),
            _address(tail),
            _address(keep),
            _address(inside),
            _address(curve),
        )
        return keep, inside, curve

    def hash(self, seeds: Tensor, positions: Tensor, ids: Tensor, domain: int) -> Tensor:
        """`engine.rng.hash32` of int64 tensors of one shape, all contiguous."""
        out = torch.empty_like(ids)
        self._dll.logitmill_hash(
            self._isa,
            _address(seeds),
            _address(positions),
            _address(ids),
            c_int64(ids.numel()),
            c_int64(domain),
            _address(out),
        )
        return out

    def winner(
        self, values: Tensor, seeds: Tensor, positions: Tensor, ids: Tensor, domain: int
    ) -> Tensor:
        """`engine.rng.winner` of values [R, K] float32 or float64.

        seeds and positions are [R] int64, ids [R, K] int64; one row of them may stand for all.
        """
        assert ids.stride(1) == 1
        place = torch.empty(len(values), 1, dtype=torch.int64)
        self._dll.logitmill_winner(
            self._isa,
            _address(values),
            ctypes.c_bool(values.dtype == torch.float64),
            c_void_p(ids.data_ptr()),
            c_int64(ids.stride(0) if len(ids) > 1 else 0),
            _address(seeds),
            _address(positions),
            *_sizes(values),
            c_int64(domain),
            _address(place),
        )
        return place

    def select(self, logits: Tensor, k: int, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k largest entries of each row and their ids, [R, k]; equal ones by lowest id.

        With an index [R] int64 those of some of the rows.
        """
        values, ids = _best_of(logits if index is None else index, k)
        self._dll.logitmill_select(
            self._isa,
            _rows(logits, index),
            c_int64(k),
            None,
            _address(values),
            _address(ids),
            None,
        )
        return values, ids

    def rank(
        self, logits: Tensor, k: int, temperature: Tensor, index: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """`select` and `summarise` in one pass over the rows."""
        values, ids = _best_of(temperature, k)
        summary = torch.empty(2, len(temperature), 1, dtype=torch.float64)
        self._dll.logitmill_select(
            self._isa,
            _rows(logits, index),
            c_int64(k),
            _address(temperature),
            _address(values),
            _address(ids),
            _address(summary),
        )
        return (values, ids), summary

    def pack(self, codes: int, d: int, m: int, matrix: Matrix) -> None:
        """Fill a matrix's panels from codes; codes, d and m are addresses."""
        self._dll.logitmill_pack(
            c_void_p(codes),
            c_void_p(d),
            c_void_p(m),
            c_int64(-(-matrix.n // 32) * 32),
            c_int64(matrix.k),
            c_int64(matrix.bits),
            c_void_p(matrix.panels),
        )


def choice(**columns: Tensor) -> Choice:
    """What `choose` needs to know of each lane, [L]; the tensors must outlive what is made here.

    Whether it is `greedy`, and whether it has only `common` filters, which are the others: its
    seed, temperature, ln `min_p`, `top_k`, and as `top_p` the largest mass that may stand above a
    token.
    """
    return Choice(**{name: _address(column) for name, column in columns.items()})


def _address(tensor: Tensor) -> c_void_p:
    assert tensor.is_contiguous()
    return c_void_p(tensor.data_ptr())


def _sizes(tensor: Tensor) -> tuple[c_int64, c_int64]:
    return c_int64(tensor.shape[0]), c_int64(tensor.shape[1])


def _rows(logits: Tensor, index: Tensor | None = None) -> Any:
    return ctypes.byref(_rows_of(logits, index))


def _rows_of(logits: Tensor, index: Tensor | None = None) -> Rows:
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    count, vocab = logits.shape
    at = None
    if index is not None:
        assert index.dtype == torch.int64
        count, at = len(index), _address(index)
    return Rows(logits.data_ptr(), at, count, vocab, logits.stride(0))


def _candidates(before: Before) -> tuple[Any, After]:
    """What a filter of candidates reads, and what it writes."""
    logits, unsure, tail, whole, active = before
    kept = torch.empty_like(logits)
    flags = torch.empty(3, len(logits), dtype=torch.bool)
    args = Candidates(
        *(_address(its) for its in (logits, unsure, tail, whole, active)),
        len(logits),
        logits.shape[1],
        _address(kept),
        _address(flags),
    )
    unsure, tail, whole = flags.unbind()
    return ctypes.byref(args), (kept, unsure, tail, whole)


def _best_of(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.empty(len(rows), k), torch.empty(len(rows), k, dtype=torch.int64)


CHOICES = ("auto", "off", "0", "256", "512")


def _load() -> Library | None:
    wanted = os.environ.get("LOGITMILL_KERNELS", "auto")
    if wanted not in CHOICES:
        raise ValueError(f"LOGITMILL_KERNELS must be one of {', '.join(CHOICES)}, got {wanted!r}")
    if wanted == "off":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu{suffix}")
        if path.exists():
            try:
                return Library(path, None if wanted == "auto" else int(wanted))
            except (OSError, AttributeError) as error:
                log.warning("the CPU kernels cannot be loaded: %s", error)
    return None


LIBRARY = _load()
