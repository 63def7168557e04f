"""The tensors of a call and their gradients, in the one order that every layer uses, from the API to the kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from fused_attn.native import _C

Fields = TypeVar("Fields", bound=NamedTuple)
Shape = tuple[int, ...]


def _constructor(kind: type[Fields]) -> Callable[..., Fields]:
    """A function that takes all fields in order and makes ``kind(*fields)``, in a quarter of the time.

    A call makes several named tuples and takes a few microseconds. Compilers cannot trace the function.
    """
    return kind if _C is None else _C.constructor(kind, len(kind._fields))


class Inputs(NamedTuple):
    """All tensors of a call. The numbers of the call, such as the scale and the band, are in `AttentionProblem`.

    The first seven tensors can have gradients. Registered operators and native modules take the tensors in this order.

    query:         (B, H, L, D)
    key:           (B, Hkv, S, D)
    value:         (B, Hkv, S, Dv)
    bias:          (B|1, H|1, L|1, S|1) floating point, added to the scores
    key_bias:      (B, S) floating point, added to the scores of a key: floating-point key padding without its -inf
    relative_bias: (H|1, L + S - 1) floating point; column ``j - i + L - 1`` is added to score (i, j)
    sinks:         (H,) floating point, a logit for each head that joins the softmax denominator only
    seed:          () int64, given where ``dropout_p > 0``
    mask:          (B|1, H|1, L|1, S|1) bool, True = attend
    key_ranges:    (B|1, H|1, L|1, N, 2) int32, begin and end of the N ranges of a query, which sees only keys of its
                   ranges: begin <= j < end. The last two dimensions are contiguous
    key_padding:   (B, S) bool, True = IGNORE; ignored keys may hold NaN
    key_lengths:   (B,) int32; batch entry b has the keys j < key_lengths[b], and all others may hold NaN
    cu_seqlens_q:  (num_sequences + 1,) int32, row offsets of packed queries
    cu_seqlens_k:  (num_sequences + 1,) int32, row offsets of packed keys
    block_table:   (B, pages of an entry) int32; key j of batch entry b is row ``j % page_size`` of page
                   ``block_table[b, j // page_size]``. S is the number of columns times page_size. Entries of the table
                   behind the last key may hold any number

    Rows that are packed or lie in pages have the dimensions that their caller has given, because views of them would
    take longer than a small call. The rows of packed sequences, one after the other, are query (total_q, H, D), key
    (total_k, Hkv, D) and value (total_k, Hkv, Dv). Pages are key (num_pages, page_size, Hkv, D) and value (num_pages,
    page_size, Hkv, Dv).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    key_bias: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    mask: Tensor | None = None
    key_ranges: Tensor | None = None
    key_padding: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None

    def is_shared_grad_required(self) -> bool:
        """True if one of `SHARED` requires a gradient."""
        for x in tuple(self)[SHARED_ITEMS]:  # noqa: SIM110  # any(...) makes a generator, which takes four times as long
            if x is not None and x.requires_grad:
                return True
        return False


inputs_of = _constructor(Inputs)
#: The inputs besides query, key and value of a call that has no others.
NO_OTHERS = tuple(Inputs._field_defaults.values())


class Shapes(NamedTuple):
    """The shape of each of the `Inputs`, under the same name; None for a tensor that the call does not have."""

    query: Shape
    key: Shape
    value: Shape
    bias: Shape | None = None
    key_bias: Shape | None = None
    relative_bias: Shape | None = None
    sinks: Shape | None = None
    seed: Shape | None = None
    mask: Shape | None = None
    key_ranges: Shape | None = None
    key_padding: Shape | None = None
    key_lengths: Shape | None = None
    cu_seqlens_q: Shape | None = None
    cu_seqlens_k: Shape | None = None
    block_table: Shape | None = None


def shapes_of(inputs: Inputs) -> Shapes:
    """The shapes of the tensors of a call."""
    return Shapes._make(None if x is None else x.shape for x in inputs)


#: The inputs that batch entries or heads share, so that their gradients are sums over these.
SHARED = ("bias", "key_bias", "relative_bias", "sinks")
#: The inputs of padded calls that have no batch dimension, and those whose batch dimension may be 1 for all entries.
WITHOUT_BATCH = ("relative_bias", "sinks")
MAY_BROADCAST = ("bias", "mask", "key_ranges")
#: The indices of `SHARED` in `Inputs`, `Gradients` and `Wanted`.
SHARED_ITEMS = slice(3, 3 + len(SHARED))


class Gradients(NamedTuple):
    """The gradients of the first seven `Inputs`, each in the shape and dtype of its input; None if it is not wanted."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None
    key_bias: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None


gradients_of = _constructor(Gradients)


class Wanted(NamedTuple):
    """Which of the `Gradients` a backward call is to compute."""

    query: bool = False
    key: bool = False
    value: bool = False
    bias: bool = False
    key_bias: bool = False
    relative_bias: bool = False
    sinks: bool = False

    @classmethod
    @functools.cache
    def of(cls, *needs_input_grad: bool) -> Wanted:
        """The gradients that torch asks for.

        needs_input_grad: a flag for each argument of an autograd step, as torch gives them. The arguments begin with
            all or the first few of `Inputs`. Flags of further arguments are not read.
        """
        needed = dict(zip(Inputs._fields, needs_input_grad, strict=False))
        return cls(**{name: needed[name] for name in cls._fields if name in needed})

    @property
    def is_any_shared(self) -> bool:
        """Whether the gradient of one of `SHARED` is wanted."""
        return self.bias or self.key_bias or self.relative_bias or self.sinks

    def select(self, grads: Sequence[Tensor]) -> Gradients:
        """`Gradients` with None in place of each entry of grads that is not wanted."""
        return Gradients(*(grad if is_wanted else None for grad, is_wanted in zip(grads, self, strict=True)))


class Saved(NamedTuple):
    """The tensors that backward gets besides the inputs. See `Results` for the shapes of packed problems.

    out:  (B, H, L, Dv), the output of forward
    lse:  (B, H, L), the log-sum-exp of forward
    dout: (B, H, L, Dv), the gradient of out; never None for a backend
    dlse: (B, H, L), the gradient of lse; None = zero
    """

    out: Tensor | None = None
    lse: Tensor | None = None
    dout: Tensor | None = None
    dlse: Tensor | None = None


saved_of = _constructor(Saved)


#: The results of a forward call: out (B, H, L, Dv) in the dtype of the query, and in the accumulate dtype lse (B, H, L)
#: and row_max (B, H, L), the largest logit of each row. An entry that the caller does not need may be None. Packed
#: problems have out (total_q, H, Dv), lse (H, total_q) and row_max (H, total_q).
Results = tuple[Tensor, Tensor | None, Tensor | None]


def shape_of_lse(query: Tensor, is_packed: bool) -> tuple[int, ...]:
    """The shape of lse and row_max: (B, H, L), or (H, total_q) if the queries are packed."""
    if is_packed:
        rows, heads, _ = query.shape
        return heads, rows
    batch, heads, rows, _ = query.shape
    return batch, heads, rows


def take(kind: type[Fields], values: Sequence[Any]) -> tuple[Fields, Sequence[Any]]:
    """Splits values: a named tuple ``kind`` of the first ones, and the remaining values."""
    count = len(kind._fields)
    return kind._make(values[:count]), values[count:]


def gradients_of_arguments(grads: Gradients, saved: Saved | None = None) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments of an autograd step, as its backward returns them to torch.

    The arguments are `Inputs`, then `Saved` if it is given, then others, which have no gradient. Torch wants one entry
    for each argument. It allows further entries that are None.
    """
    if saved is None:
        return grads + _NO_GRADIENTS
    return (*grads, *_NO_GRADIENTS[: len(Inputs._fields) - len(grads)], *saved, *_NO_GRADIENTS)


#: The gradients of the arguments behind the differentiable ones. No autograd step has more than 32 such arguments.
_NO_GRADIENTS: tuple[Tensor | None, ...] = tuple(itertools.repeat(None, 32))
