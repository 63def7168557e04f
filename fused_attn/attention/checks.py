"""Checks of arguments. Most checks need only metadata, so a call with cached metadata skips them (see `planning`).

Each check raises TypeError or ValueError. The message names the argument, what was expected, and what came.
"""

from __future__ import annotations

import itertools
import numbers
import sys
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from fused_attn.attention.causal_bias import CausalBiasMeta
from fused_attn.attention.problem import UNBOUNDED


class Meta(NamedTuple):
    """The metadata of a tensor that the checks need. Unlike tensors, equal ones have equal hashes, as caches need."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


#: Where the diagonal of causal masks and windows lies if there are not as many queries as keys.
ALIGNMENTS = UPPER_LEFT, LOWER_RIGHT = "upper_left", "lower_right"
#: The largest `num_splits`, kMaxSplits of csrc/common/attention_params.h.
MAX_SPLITS = 256
#: The largest finite number that a kernel can be given. An int may be larger.
LARGEST_FLOAT = sys.float_info.max

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def meta(name: str, tensor: Tensor) -> Meta:
    """The tensor's metadata. `name` is the argument, for error messages.

    Raises:
        TypeError: the argument is no tensor, or is nested or sparse.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_describe(tensor)}")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    return Meta(tensor.shape, tensor.dtype, tensor.device)


def optional_meta(name: str, tensor: Tensor | None) -> Meta | None:
    """`meta` of an argument that may be None."""
    return None if tensor is None else meta(name, tensor)


def fail(name: str, expected: str, got: object) -> ValueError:
    """The error, to be raised by the caller, that argument `name` should have been `expected` but was `got`."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def wrong_type(name: str, expected: str, got: object) -> TypeError:
    """The error, to be raised by the caller, that argument `name` should have been `expected` but `got` is not."""
    return TypeError(f"{name}: expected {expected}, got {_describe(got)}")


def check_query_key_value(
    query: Meta, key: Meta, value: Meta, min_dim: int, names: tuple[str, str, str] = ("query", "key", "value")
) -> None:
    """Checks that the three have at least min_dim dimensions, equal dtypes and devices, and that head dims agree.

    Batch sizes, heads and lengths are checked elsewhere, because batched, packed and paged inputs differ in these.

    names: the arguments, for error messages
    """
    for name, x in zip(names, (query, key, value), strict=True):
        if len(x.shape) < min_dim:
            raise fail(name, f"at least {min_dim} dimensions", _shape(x))
        _check_floating_point(name, x)
    for name, x in zip(names[1:], (key, value), strict=True):
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {x.dtype}")
        check_device(name, x, query)
    if key.shape[-1] != query.shape[-1]:
        raise fail(names[1], f"the head dim of query, {query.shape[-1]}", _shape(key))
    if query.shape[-1] == 0:
        raise fail("query", "a head dim of at least 1", _shape(query))


def with_heads_and_rows_swapped(query: Meta, key: Meta, value: Meta) -> list[Meta] | None:
    """[query, key, value] with heads and rows exchanged, in case that the caller has passed (..., L, H, D).

    The error message then suggests a transpose. Returns None if this mistake is unlikely.
    """
    if min(len(x.shape) for x in (query, key, value)) < 3:
        return None
    num_heads, num_rows = query.shape[-3:-1]
    # With fewer heads than rows, and key heads that divide the query heads, the caller has forgotten `enable_gqa`, not
    # a transpose.
    if num_heads < num_rows and num_heads % max(key.shape[-3], 1) == 0:
        return None
    return [
        x._replace(shape=torch.Size((*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1])))
        for x in (query, key, value)
    ]


def check_device(name: str, x: Meta, query: Meta) -> None:
    """Checks that x is on the device of query."""
    if x.device != query.device:
        raise fail(name, f"the device of query, {query.device}", x.device)


def check_heads(query: int, key: int, value: int, enable_gqa: bool) -> int:
    """Checks the numbers of heads of query, key and value; returns the number of heads of the output.

    Without GQA, a tensor may have a single head, which is broadcast.
    """
    if enable_gqa:
        if value != key:
            raise fail("value", f"as many heads as key, {key}", f"{value} heads")
        if query % max(key, 1) or key == 0:
            raise fail("key", f"a number of heads that divides the {query} of query (enable_gqa=True)", f"{key} heads")
        return query
    num_heads = max(query, key, value)
    for name, heads in (("query", query), ("key", key), ("value", value)):
        if heads != 1 and heads != num_heads:  # torch.compile does not find a symbolic size in a tuple
            hint = "; enable_gqa=True shares key heads among query heads" if name != "query" else ""
            raise fail(name, f"{num_heads} heads{hint}", f"{heads} heads")
    return num_heads


def check_seqlen(name: str, seqlen: int) -> None:
    """Checks that a length, such as the longest one of a packed call, is an int in [0, 2**62)."""
    check_integer(name, seqlen)
    if seqlen < 0 or (not isinstance(seqlen, torch.SymInt) and seqlen >= 2**62):  # positions have 64 bits
        raise fail(name, "a number of rows in [0, 2**62)", seqlen)


def check_scalars(
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, softcap: float, dtype: torch.dtype
) -> None:
    """Checks the types and ranges of the flags and numbers of a call. dtype: that of the query.

    Kernels compute in float32, or in float64 for float64 tensors. There, a softcap that is too small would become 0,
    which means off, and a number that is too large would become inf.
    """
    limits = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    check_probability("dropout_p", dropout_p)
    check_number("softcap", softcap)
    softcap = _exact(softcap)
    if not 0.0 <= softcap <= LARGEST_FLOAT:
        raise fail("softcap", "a finite number >= 0 (0 = off)", softcap)
    if softcap != 0.0 and not limits.tiny <= softcap <= limits.max:
        raise fail("softcap", f"0 (off), or {limits.tiny:.2e} to {limits.max:.2e} for {dtype} tensors", softcap)
    if scale is not None:
        check_number("scale", scale)
        scale = _exact(scale)
        if not -LARGEST_FLOAT <= scale <= LARGEST_FLOAT:
            raise fail("scale", "a finite number", scale)
        if not -limits.max <= scale <= limits.max:
            raise fail("scale", f"a number from {-limits.max:.2e} to {limits.max:.2e} for {dtype} tensors", scale)


def check_flag(name: str, flag: bool) -> None:
    """Checks that a flag is a bool, of Python or of NumPy."""
    if not isinstance(flag, bool) and not _is_numpy_bool(flag):
        raise wrong_type(name, "a bool", flag)


def check_flags(**flags: bool) -> None:
    """`check_flag` of each flag, by the name of the argument."""
    for name, flag in flags.items():
        check_flag(name, flag)


def check_integer(name: str, x: int, expected: str = "an int") -> None:
    """Checks that x is an int of Python, of NumPy or of a tracer. A bool is none."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt, numbers.Integral)):
        raise wrong_type(name, expected, x)


def check_number(name: str, x: float) -> None:
    """Checks that x is a real number. Bools and tensors are none."""
    if isinstance(x, (bool, Tensor)) or not isinstance(x, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)):
        raise wrong_type(name, "a number", x)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Checks that the kernels can compute with this dtype."""
    expected = f"None or one of {', '.join(map(str, DTYPES))}"
    if not isinstance(dtype, torch.dtype):
        raise wrong_type(name, expected, dtype)
    if dtype not in DTYPES:
        raise fail(name, expected, dtype)


def check_tensor(name: str, x: Tensor) -> None:
    """Checks that x is a tensor, of any kind."""
    if not isinstance(x, Tensor):
        raise wrong_type(name, "a tensor", x)


def check_tensors(**tensors: Tensor | None) -> None:
    """`check_tensor` of each argument that is not None, by its name."""
    for name, x in tensors.items():
        if x is not None:
            check_tensor(name, x)


def check_probability(name: str, p: float) -> None:
    """Checks that p is a number in [0, 1]."""
    check_number(name, p)
    if not 0.0 <= p <= 1.0:
        raise fail(name, "a probability in [0, 1]", p)


def check_window(window_size: Sequence[int] | None) -> tuple[int, int]:
    """Checks the window; returns (left, right), the numbers of keys visible on each side, -1 = all."""
    if window_size is None:
        return UNBOUNDED, UNBOUNDED
    is_pair = isinstance(window_size, Sequence) and len(window_size) == 2
    if not is_pair or not all(is_int(x) and x >= UNBOUNDED for x in window_size):
        raise fail("window_size", "(left, right), two ints >= -1 (-1 = unbounded)", repr(window_size))
    # A side of 2**62 or more is wider than any sequence, so it counts as unbounded. As a number, it could overflow the
    # 64-bit integers in which positions are compared.
    left, right = (int(x) if x < 2**62 else UNBOUNDED for x in window_size)
    return left, right


def check_diagonal_alignment(alignment: str) -> None:
    """Checks that the alignment is one of `ALIGNMENTS`."""
    if not isinstance(alignment, str):
        raise wrong_type("diagonal_alignment", "a string", alignment)
    if alignment not in ALIGNMENTS:
        raise fail("diagonal_alignment", " or ".join(map(repr, ALIGNMENTS)), repr(alignment))


def check_causal_bias(
    bias: CausalBiasMeta, is_causal: bool, alignment: str, seqlen_q: int, seqlen_k: int, has_key_lengths: bool
) -> None:
    """Checks that a causal bias has the lengths of the call and contradicts neither is_causal nor the alignment."""
    if (bias.seqlen_q, bias.seqlen_k) != (seqlen_q, seqlen_k):
        raise fail("attn_mask", f"a causal bias for (L, S) = {(seqlen_q, seqlen_k)}", f"one for {tuple(bias[:2])}")
    if seqlen_q == seqlen_k and not has_key_lengths:
        return  # both alignments are the same diagonal
    if is_causal and bias.is_lower_right and alignment == UPPER_LEFT:
        expected = f"False with a lower-right causal bias as attn_mask, or diagonal_alignment={LOWER_RIGHT!r}"
        raise fail("is_causal", expected, is_causal)
    if alignment == LOWER_RIGHT and not bias.is_lower_right:
        expected = f"{UPPER_LEFT!r} with an upper-left causal bias as attn_mask, if L != S or with key_lengths"
        raise fail("diagonal_alignment", expected, repr(alignment))


def check_attn_mask(mask: Meta, query: Meta, scores: tuple[int, ...]) -> None:
    """Checks the dtype and the device of attn_mask, and that it broadcasts to the shape of the scores."""
    _check_mask_dtype("attn_mask", "attend", mask)
    check_device("attn_mask", mask, query)
    fits = len(mask.shape) <= len(scores) and all(
        _broadcasts(m, n) for m, n in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        hint, without_heads = "", (*scores[:-3], *scores[-2:])
        if tuple(mask.shape) == without_heads:
            hint = "; mask.unsqueeze(-3) gives it a dimension for heads"
        elif tuple(mask.shape) == (*scores[:-3], scores[-1]):
            hint = "; a mask of keys is a key_padding_mask, where True = ignore"
        raise fail("attn_mask", f"a shape broadcastable to (..., H, L, S) = {scores}", _shape(mask) + hint)


def check_padding(mask: Meta, query: Meta, batch_shape: tuple[int, ...], seqlen_k: int) -> None:
    """Checks dtype, device and shape of key_padding_mask."""
    _check_mask_dtype("key_padding_mask", "ignore", mask)
    check_device("key_padding_mask", mask, query)
    expected = (*batch_shape, seqlen_k)
    if tuple(mask.shape) != expected:
        raise fail("key_padding_mask", f"shape (B, S) = {expected}", _shape(mask))


def check_key_lengths(lengths: Meta, query: Meta, batch_shape: tuple[int, ...]) -> None:
    """Checks dtype, device and shape of key_lengths."""
    _check_int32("key_lengths", lengths)
    check_device("key_lengths", lengths, query)
    if tuple(lengths.shape) != tuple(batch_shape):
        raise fail("key_lengths", f"shape (B,) = {tuple(batch_shape)}", _shape(lengths))


def _broadcasts(size: int, other: int) -> bool:
    """Whether a dimension of `size` broadcasts to one of size `other`.

    `size in (1, other)` is wrong in a traced call: dynamo takes a number and a symbolic size for different.
    """
    return size == 1 or size == other


def check_key_ranges(ranges: Meta, query: Meta, rows: tuple[int, ...]) -> None:
    """Checks dtype, device and shape of key_ranges. rows: (..., H, L), the shape of the scores without the keys."""
    _check_int32("key_ranges", ranges)
    check_device("key_ranges", ranges, query)
    *of_rows, count, ends = ranges.shape if len(ranges.shape) >= 2 else (0, 0)
    fits = (
        len(ranges.shape) >= 3
        and (ends == 2 and count > 0)
        and len(of_rows) <= len(rows)
        and all(_broadcasts(m, n) for m, n in zip(reversed(of_rows), reversed(rows), strict=False))
    )
    if not fits:
        raise fail(
            "key_ranges",
            f"a shape (..., L, N, 2) with N > 0 whose dimensions before N broadcast to (..., H, L) = {rows}",
            _shape(ranges),
        )


def check_key_lengths_values(key_lengths: Tensor, seqlen_k: int) -> None:
    """Checks that each length is in [0, seqlen_k]. The tensor is on the CPU."""
    lengths = key_lengths.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= seqlen_k:
        raise fail("key_lengths", f"lengths from 0 to {seqlen_k}, the number of keys", lengths)


def check_block_table(block_table: Meta, query: Meta, batch: int) -> None:
    """Checks dtype, device and shape of block_table."""
    _check_int32("block_table", block_table)
    check_device("block_table", block_table, query)
    if len(block_table.shape) != 2 or block_table.shape[0] != batch:
        expected = f"shape (B, pages of the longest sequence) with B = {batch}, the number of sequences"
        raise fail("block_table", expected, _shape(block_table))


def check_block_table_values(block_table: Tensor, key_lengths: Tensor, page_size: int, num_pages: int) -> None:
    """Checks that the table names a page for each key. The tensors are on the CPU, and the lengths are right."""
    for entry, (row, length) in enumerate(zip(block_table.tolist(), key_lengths.tolist(), strict=True)):
        used = row[: -(-length // page_size)]
        if used and not 0 <= min(used) <= max(used) < num_pages:
            raise fail("block_table", f"numbers of pages from 0 to {num_pages - 1}", f"{used} in row {entry}")


def check_num_splits(num_splits: int | None) -> int:
    """Checks num_splits; returns 0 for None."""
    if num_splits is None:
        return 0
    check_integer("num_splits", num_splits, "None or an int")
    if not 1 <= num_splits <= MAX_SPLITS:
        raise fail("num_splits", f"a number from 1 to {MAX_SPLITS}", num_splits)
    return num_splits


def check_relative_bias(
    bias: Meta, query: Meta, num_heads: int, seqlen_q: int, seqlen_k: int, lengths: str = "L + S"
) -> None:
    """Checks dtype, device and shape of relative_bias. lengths: the names of seqlen_q and seqlen_k, for the message."""
    columns = max(seqlen_q + seqlen_k - 1, 0)
    _check_learned("relative_bias", bias, query)
    sizes = bias.shape
    # Under torch.compile, no tuple with a symbolic size equals one with a number. So the sizes are compared one by one.
    if not (len(sizes) in (1, 2) and sizes[-1] == columns and (len(sizes) == 1 or sizes[0] == num_heads)):
        raise fail(
            "relative_bias",
            f"shape (H, {lengths} - 1) = {(num_heads, columns)} or ({lengths} - 1,) = {(columns,)}",
            _shape(bias),
        )


def check_sinks(sinks: Meta, query: Meta, num_heads: int) -> None:
    """Checks dtype, device and shape of sinks."""
    _check_learned("sinks", sinks, query)
    if tuple(sinks.shape) != (num_heads,):
        raise fail("sinks", f"shape (H,) = {(num_heads,)}", _shape(sinks))


def check_dropout_seed(seed: int | Tensor) -> None:
    """Checks the seed of dropout. A call without dropout checks it, too."""
    expected = "an int or a 0-d int64 tensor"
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise fail("dropout_seed", expected, f"{seed.dtype} of shape {tuple(seed.shape)}")
        return
    check_integer("dropout_seed", seed, expected)
    if not 0 <= seed < 2**63:
        raise fail("dropout_seed", "0 <= seed < 2**63", seed)


def check_cu_seqlens(name: str, cu_seqlens: Meta, query: Meta) -> None:
    """Checks dtype, device and rank of cu_seqlens_q or cu_seqlens_k."""
    _check_int32(name, cu_seqlens)
    check_device(name, cu_seqlens, query)
    if len(cu_seqlens.shape) != 1 or cu_seqlens.shape[0] < 1:
        raise fail(name, "shape (num_sequences + 1,)", _shape(cu_seqlens))


def check_cu_seqlens_values(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Checks that cu_seqlens rises from 0 to `total` rows, and that no sequence is longer than max_seqlen.

    The caller makes sure that cu_seqlens is on the CPU, because reading a tensor on a GPU would make the host wait.
    """
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != total or min(lengths, default=0) < 0:
        raise fail(name, f"offsets that rise from 0 to the number of rows, {total}", offsets)
    if max(lengths, default=0) > max_seqlen:
        raise fail(f"max_seqlen_{name[-1]}", f"at least the longest sequence, {max(lengths)}", max_seqlen)


def _exact(x: float) -> float:
    """A number of another type, such as a float32 of NumPy, as a float of Python.

    A comparison would convert the limits to that type, where they may be infinite.
    """
    return x if isinstance(x, (int, float, torch.SymInt, torch.SymFloat)) else float(x)


def is_int(x: object) -> TypeGuard[int]:
    """Whether x is an int of Python or of NumPy. A bool is none."""
    return isinstance(x, (int, numbers.Integral)) and not isinstance(x, bool)


def _is_numpy_bool(x: object) -> bool:
    """Whether x is a bool of NumPy. This module does not import NumPy, which torch can do without."""
    return type(x).__module__ == "numpy" and type(x).__name__ in ("bool", "bool_")


def _check_int32(name: str, x: Meta) -> None:
    """Checks that x has the dtype int32."""
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {x.dtype}")


def _check_learned(name: str, x: Meta, query: Meta) -> None:
    """Checks the dtype and the device of a learned bias or sink."""
    _check_floating_point(name, x)
    check_device(name, x, query)


def hint_for_integers(name: str) -> str:
    """The end of the error message for a mask of integers: how a tokenizer's attention_mask becomes a padding mask."""
    if not name.endswith("key_padding_mask"):
        return ""
    return "; a tokenizer's attention_mask (1 = token, 0 = padding) becomes one by `attention_mask == 0`"


def _check_mask_dtype(name: str, meaning: str, mask: Meta) -> None:
    """Checks that a mask is bool or floating point. `meaning` says what True means, for the error message."""
    if mask.dtype == torch.bool:
        return
    if not mask.dtype.is_floating_point:
        hint = hint_for_integers(name)
        raise TypeError(f"{name}: expected bool (True = {meaning}) or floating point (added), got {mask.dtype}{hint}")
    _check_floating_point(name, mask)


def _check_floating_point(name: str, x: Meta) -> None:
    """Checks that x has one of `DTYPES`."""
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.dtype not in DTYPES:  # float8 and smaller, for which torch has no arithmetic
        raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, got {x.dtype}")


def _shape(x: Meta) -> str:
    """The shape of x, for an error message."""
    return f"shape {tuple(x.shape)}"


def _describe(x: object) -> str:
    """The type of x and, if short, its value, for an error message."""
    if isinstance(x, (int, float, str, bool, type(None))):
        return f"{type(x).__name__} {x!r}"
    module = type(x).__module__
    return type(x).__qualname__ if module == "builtins" else f"{module}.{type(x).__qualname__}"
