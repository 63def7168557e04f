"""Makes the plan of a call from its metadata: checks the arguments, normalises them, and chooses a backend.

Plans are cached. A second call with equal metadata finds its plan in the cache and is not checked again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention import checks, masks
from fused_attn.attention.causal_bias import CausalBiasMeta, causal_bias
from fused_attn.attention.checks import Meta
from fused_attn.attention.inputs import Fields, Shapes
from fused_attn.attention.layout import Layout
from fused_attn.attention.problem import AttentionProblem, Band, Scalars
from fused_attn.backends import dispatch
from fused_attn.backends.base import Backend


class Plan(NamedTuple):
    """All that follows from the metadata of a call.

    problem: the description of the call for the backends
    layout: how query, key and value become (B, heads, rows, columns); None if they have this shape already
    backend: None under compilation, because the operator chooses a backend when the compiled code runs
    """

    problem: AttentionProblem
    layout: Layout | None
    backend: Backend | None


class Arguments(NamedTuple):
    """The metadata of the tensors of `fused_attention`, under the names of its arguments."""

    query: Meta
    key: Meta
    value: Meta
    attn_mask: Meta | None
    relative_bias: Meta | None
    sinks: Meta | None
    key_padding_mask: Meta | None
    key_lengths: Meta | None
    key_ranges: Meta | None


#: The tensors themselves, in the order of `Arguments`.
Tensors = tuple[
    Tensor, Tensor, Tensor,
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None,
]  # fmt: skip


def tensors_of(query: Tensor, key: Tensor, value: Tensor, **others: Tensor | None) -> Tensors:
    """The tensors of a call in the order of `Arguments`, for callers that give only some of them."""
    found: Any = (query, key, value, *[others.get(name) for name in Arguments._fields[3:]])
    return found


#: The metadata of those tensors as a value that can be hashed: a tuple like `Meta` for each tensor.
Metadata = tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]


class Options(NamedTuple):
    """The arguments without contents that the functions share.

    Those of `fused_attention_varlen` end with diagonal_alignment.
    """

    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    window_size: tuple[int, int] | None
    softcap: float
    diagonal_alignment: str = checks.UPPER_LEFT
    num_splits: int | None = None


# The caches are large because batches differ in their lengths. A plan takes a few hundred bytes.
CACHED_PLANS = 4096


class Planner:
    """Finds the plans of one public function. A plan that has been made is found by the metadata of the next call.

    A call on plain tensors of the CPU has a `signature`, bytes that stand for all metadata. The plan of such a call is
    found fastest, in `by_signature`. None, a call without a signature, has no plan. Code that `torch.compile` traces
    must not read `by_signature`: the traced code would be compiled again when the dict changes.

    make: checks the metadata and the options, which it gets in this order, and makes a plan without a backend
    """

    def __init__(self, make: Callable[..., Plan]):
        self._make = make
        # The cache is typed. Otherwise is_causal=1, which is an error, would find the plan of is_causal=True.
        self._cached = functools.lru_cache(CACHED_PLANS, typed=True)(self._with_backend)
        self.by_signature: dict[bytes | None, Plan] = {}

    def find(self, is_compiling: bool, backend: str | None, *arguments) -> Plan:
        """The plan of a call, from the cache if possible.

        is_compiling: `torch.compile` traces the call. Sizes may be symbolic then, so the cache is not asked. No
            backend is chosen.
        backend: the name that the caller has asked for; None = choose one
        arguments: what `make` takes
        """
        if backend is not None and backend not in dispatch.BACKEND_NAMES:
            raise checks.fail("backend", f"None or one of {dispatch.BACKEND_NAMES}", repr(backend))
        if is_compiling:
            return self._make(*arguments)
        try:
            if not modes.is_jit_tracing():  # a trace has bands of its own (`_band`)
                return self._cached(backend, *arguments)
        except TypeError:
            if _can_be_hashed(arguments):
                raise
        # What cannot be hashed is a wrong argument or a symbolic size, as under `make_fx`. For a wrong argument, `make`
        # raises an error that names it. For symbolic sizes, and in a trace, the plan is made without the cache.
        return self._with_backend(backend, *arguments, choose=dispatch.choose.__wrapped__)

    def _with_backend(self, backend: str | None, *arguments, choose=dispatch.choose) -> Plan:
        found = self._make(*arguments)
        return found._replace(backend=choose(found.problem, backend))

    def store(self, signature: bytes, found: Plan) -> None:
        """Keeps the plan of a signature. A full cache is emptied first."""
        if len(self.by_signature) >= CACHED_PLANS:
            self.by_signature.clear()
        self.by_signature[signature] = found

    def clear(self) -> None:
        """Forgets all plans, for tests that change what a backend can do."""
        self.by_signature.clear()
        self._cached.cache_clear()


def _can_be_hashed(arguments: tuple[Any, ...]) -> bool:
    try:
        hash(arguments)
    except TypeError:
        return False
    return True


# ---- Batches of sequences of equal lengths


def plan(is_compiling: bool, tensors: Tensors, options: tuple[Any, ...], backend: str | None) -> Plan:
    """The plan of a call of `fused_attention`, from the cache if possible.

    Args:
        is_compiling: `torch.compile` traces the call, so sizes may be symbolic.
        tensors: the tensors in the order of `Arguments`.
        options: the other arguments in the order of `Options`.
        backend: the name of the backend that the caller has asked for; None = choose one.
    """
    options = _with_checked_window(options)
    try:
        bias, metadata = _metadata(*tensors)
    except (AttributeError, RuntimeError, TypeError):
        # If an argument is no tensor, `checks.meta` raises an error that names it. These checks run only after a
        # failure, because they take as long as finding the plan.
        for name, x in zip(Arguments._fields[:3], tensors[:3], strict=True):
            checks.meta(name, x)
        raise
    return dense.find(is_compiling, backend, metadata, bias, *options)


def _metadata(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *others: Tensor | None
) -> tuple[CausalBiasMeta | None, Metadata]:
    """(the contents of a causal bias that is given as attn_mask, else None; the metadata of the other tensors)."""
    bias = None if attn_mask is None else causal_bias(attn_mask)
    if not (query.layout is key.layout is value.layout is torch.strided):
        raise TypeError("sparse")  # `plan` catches the error and names the argument.
    return bias, (
        (query.shape, query.dtype, query.device),
        (key.shape, key.dtype, key.device),
        (value.shape, value.dtype, value.device),
        None if attn_mask is None or bias is not None else checks.meta("attn_mask", attn_mask),
        *(None if x is None else checks.meta(name, x) for name, x in zip(Arguments._fields[4:], others, strict=True)),
    )


def _dense_plan(metadata: Metadata, bias: CausalBiasMeta | None, *options) -> Plan:
    """Checks all arguments and makes the plan, without a chosen backend. options: the fields of `Options`.

    If the shapes are wrong but would be right as (B, L, H, D), the error message says so.
    """
    arguments, options = Arguments._make(None if x is None else Meta(*x) for x in metadata), Options(*options)
    try:
        return _checked_plan(arguments, bias, options)
    except ValueError as error:
        swapped = checks.with_heads_and_rows_swapped(arguments.query, arguments.key, arguments.value)
        if swapped is None:
            raise
        query, key, value = swapped
        for enable_gqa in (options.enable_gqa, True):
            try:
                others = options._replace(enable_gqa=enable_gqa)
                _checked_plan(arguments._replace(query=query, key=key, value=value), bias, others)
            except (TypeError, ValueError):
                continue
            also = "" if options.enable_gqa or not enable_gqa else ", with enable_gqa=True"
            raise ValueError(
                f"{error}; these shapes would fit as (B, L, H, D), which x.transpose(-3, -2) makes (B, H, L, D){also}"
            ) from None
        raise


def _checked_plan(arguments: Arguments, bias: CausalBiasMeta | None, options: Options) -> Plan:
    """`_dense_plan`, without that hint."""
    query, key, value, attn_mask, relative_bias, sinks, key_padding_mask, key_lengths, key_ranges = arguments
    checks.check_query_key_value(query, key, value, min_dim=2)
    _check_options(options, query.dtype)
    if value.shape[-2] != key.shape[-2]:
        raise checks.fail("value", f"the length of key, {key.shape[-2]}", f"shape {tuple(value.shape)}")

    layout = Layout.of(query.shape, key.shape, value.shape, options.enable_gqa)
    (seqlen_q, head_dim), (seqlen_k, value_dim) = query.shape[-2:], value.shape[-2:]
    if bias is not None:
        checks.check_causal_bias(
            bias, options.is_causal, options.diagonal_alignment, seqlen_q, seqlen_k, key_lengths is not None
        )
    if attn_mask is not None:
        checks.check_attn_mask(attn_mask, query, (*layout.batch_shape, layout.num_heads, seqlen_q, seqlen_k))
    if key_padding_mask is not None:
        checks.check_padding(key_padding_mask, query, layout.batch_shape, seqlen_k)
    if key_lengths is not None:
        checks.check_key_lengths(key_lengths, query, layout.batch_shape)
    if key_ranges is not None:
        checks.check_key_ranges(key_ranges, query, (*layout.batch_shape, layout.num_heads, seqlen_q))
    if relative_bias is not None:
        checks.check_relative_bias(relative_bias, query, layout.num_heads, seqlen_q, seqlen_k)
    if sinks is not None:
        checks.check_sinks(sinks, query, layout.num_heads)
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    is_padding_bool = key_padding_mask is not None and key_padding_mask.dtype == torch.bool
    shapes = Shapes(
        query=(layout.batch, layout.num_heads, seqlen_q, head_dim),
        key=(layout.batch, layout.num_kv_heads, seqlen_k, head_dim),
        value=(layout.batch, layout.num_kv_heads, seqlen_k, value_dim),
        bias=None if is_bool else _shape(attn_mask),
        key_bias=None if is_padding_bool else _shape(key_padding_mask),
        relative_bias=_shape(relative_bias),
        sinks=_shape(sinks),
        mask=_shape(attn_mask) if is_bool else None,
        key_ranges=None if key_ranges is None else (1, 1, 1, *key_ranges.shape[-2:]),
        key_padding=_shape(key_padding_mask),
        key_lengths=_shape(key_lengths),
    )
    problem = _problem(shapes, query, options, seqlen_q, seqlen_k, bias)
    return Plan(problem, None if layout.fits(query.shape, key.shape, value.shape) else layout, None)


dense = Planner(_dense_plan)


# ---- Packed sequences


class PackedArguments(NamedTuple):
    """The metadata of the tensors of `fused_attention_varlen`, under the names of its arguments."""

    query: Meta
    key: Meta
    value: Meta
    cu_seqlens_q: Meta
    cu_seqlens_k: Meta
    relative_bias: Meta | None
    sinks: Meta | None


#: The tensors that `PackedArguments` describes, in the same order.
PackedTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def plan_of_packed(
    is_compiling: bool,
    tensors: PackedTensors,
    max_seqlens: tuple[int, int],
    options: tuple[Any, ...],
    backend: str | None,
) -> Plan:
    """The plan of a call of `fused_attention_varlen`, from the cache if possible. The arguments are those of `plan`.

    tensors: in the order of `PackedArguments`
    max_seqlens: the longest sequence of queries, and that of keys
    """
    metadata, options = _metadata_of_five(PackedArguments, tensors), _with_checked_window(options)
    return packed.find(is_compiling, backend, metadata, *max_seqlens, *options)


def _packed_plan(metadata: PackedArguments, max_seqlen_q: int, max_seqlen_k: int, *options: Any) -> Plan:
    """Checks all arguments and makes the plan, without a chosen backend. options: the fields of `Options`."""
    query, key, value, cu_seqlens_q, cu_seqlens_k, relative_bias, sinks = metadata
    options = Options(*options)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) != 3:
            raise checks.fail(name, "shape (total, heads, head dim)", f"shape {tuple(x.shape)}")
    checks.check_query_key_value(query, key, value, min_dim=3)
    _check_options(options, query.dtype)
    checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query)
    checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query)
    checks.check_seqlen("max_seqlen_q", max_seqlen_q)
    checks.check_seqlen("max_seqlen_k", max_seqlen_k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise checks.fail(
            "cu_seqlens_k", f"the shape of cu_seqlens_q, {tuple(cu_seqlens_q.shape)}", tuple(cu_seqlens_k.shape)
        )
    if value.shape[:2] != key.shape[:2]:
        raise checks.fail("value", f"the rows and heads of key, {tuple(key.shape[:2])}", f"shape {tuple(value.shape)}")
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if checks.check_heads(num_heads, num_kv_heads, num_kv_heads, options.enable_gqa) != num_heads:
        raise checks.fail("key", f"as many heads as query, {num_heads}", f"{num_kv_heads} heads")
    if relative_bias is not None:
        lengths = "max_seqlen_q + max_seqlen_k"
        checks.check_relative_bias(relative_bias, query, num_heads, max_seqlen_q, max_seqlen_k, lengths)
    if sinks is not None:
        checks.check_sinks(sinks, query, num_heads)
    shapes = Shapes(
        query=query.shape,
        key=key.shape,
        value=value.shape,
        relative_bias=_shape(relative_bias),
        sinks=_shape(sinks),
        cu_seqlens_q=cu_seqlens_q.shape,
        cu_seqlens_k=cu_seqlens_k.shape,
    )
    return Plan(_problem(shapes, query, options, max_seqlen_q, max_seqlen_k), None, None)


packed = Planner(_packed_plan)


# ---- Keys and values in pages


class PagedArguments(NamedTuple):
    """The metadata of the tensors of `fused_attention_paged`, under the names of its arguments."""

    query: Meta
    key_pages: Meta
    value_pages: Meta
    block_table: Meta
    key_lengths: Meta
    sinks: Meta | None
    key_padding_mask: Meta | None
    cu_seqlens_q: Meta | None


#: The tensors that `PagedArguments` describes, in the same order.
PagedTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def plan_of_paged(
    is_compiling: bool,
    tensors: PagedTensors,
    max_seqlen_q: int | None,
    options: tuple[Any, ...],
    backend: str | None,
) -> Plan:
    """The plan of a call of `fused_attention_paged`, from the cache if possible. The arguments are those of `plan`.

    tensors: in the order of `PagedArguments`
    """
    metadata, options = _metadata_of_five(PagedArguments, tensors), _with_checked_window(options)
    return paged.find(is_compiling, backend, metadata, max_seqlen_q, *options)


def _paged_plan(metadata: PagedArguments, max_seqlen_q: int | None, *options: Any) -> Plan:
    """Checks all arguments and makes the plan, without a chosen backend. options: the fields of `Options`."""
    query, key_pages, value_pages, block_table, key_lengths, sinks, key_padding_mask, cu_seqlens_q = metadata
    checked = Options(*options)
    rank, dims = 4, "(B, H, L, D), or three dimensions with cu_seqlens_q"
    if cu_seqlens_q is not None:
        rank, dims = 3, "(total_q, H, D), as there is cu_seqlens_q"
    for name, x, expected_rank, expected in (
        ("query", query, rank, dims),
        ("key_pages", key_pages, 4, "(num_pages, page_size, Hkv, D)"),
        ("value_pages", value_pages, 4, "(num_pages, page_size, Hkv, Dv)"),
    ):
        if len(x.shape) != expected_rank:
            raise checks.fail(name, f"shape {expected}", f"shape {tuple(x.shape)}")
    checks.check_query_key_value(query, key_pages, value_pages, 3, names=("query", "key_pages", "value_pages"))
    _check_options(checked, query.dtype)
    if cu_seqlens_q is not None:
        batch, seqlen_q = _packed_queries(query, cu_seqlens_q, max_seqlen_q, key_padding_mask)
    else:
        if max_seqlen_q is not None:
            raise checks.fail("max_seqlen_q", "None without cu_seqlens_q", max_seqlen_q)
        batch, seqlen_q = query.shape[0], query.shape[2]
    num_heads = query.shape[1]
    num_pages, page_size, num_kv_heads, _ = key_pages.shape
    if value_pages.shape[:3] != key_pages.shape[:3]:
        expected = f"the pages, rows and heads of key_pages, {tuple(key_pages.shape[:3])}"
        raise checks.fail("value_pages", expected, f"shape {tuple(value_pages.shape)}")
    if page_size == 0:
        raise checks.fail("key_pages", "pages of at least one row", f"shape {tuple(key_pages.shape)}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        expected = f"a number of heads that divides the {num_heads} of query"
        raise checks.fail("key_pages", expected, f"{num_kv_heads} heads")
    checks.check_block_table(block_table, query, batch)
    checks.check_key_lengths(key_lengths, query, (batch,))
    seqlen_k = block_table.shape[1] * page_size
    if num_pages == 0 and seqlen_k:
        raise checks.fail("key_pages", "at least one page", f"shape {tuple(key_pages.shape)}")
    if sinks is not None:
        checks.check_sinks(sinks, query, num_heads)
    if key_padding_mask is not None:
        checks.check_padding(key_padding_mask, query, (batch,), seqlen_k)
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask: expected bool for paged keys, got {key_padding_mask.dtype}")
    shapes = Shapes(
        query=query.shape,
        key=key_pages.shape,
        value=value_pages.shape,
        sinks=_shape(sinks),
        key_padding=_shape(key_padding_mask),
        key_lengths=key_lengths.shape,
        cu_seqlens_q=_shape(cu_seqlens_q),
        block_table=block_table.shape,
    )
    return Plan(_problem(shapes, query, checked, seqlen_q, seqlen_k), None, None)


def _packed_queries(
    query: Meta, cu_seqlens_q: Meta, max_seqlen_q: int | None, key_padding_mask: Meta | None
) -> tuple[int, int]:
    """Checks the arguments of packed queries over pages. Returns the number of sequences, and the longest one."""
    checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query)
    if max_seqlen_q is None:
        raise checks.fail("max_seqlen_q", "the longest sequence of queries, as there is cu_seqlens_q", None)
    checks.check_seqlen("max_seqlen_q", max_seqlen_q)
    if key_padding_mask is not None:
        raise checks.fail("key_padding_mask", "None with cu_seqlens_q", "a tensor")
    return cu_seqlens_q.shape[0] - 1, max_seqlen_q


paged = Planner(_paged_plan)


# ---- What packed and paged calls share: the first five tensors are required


def _metadata_of_five(kind: type[Fields], tensors: tuple[Tensor | None, ...]) -> Fields:
    """The metadata of a call as a named tuple, `kind`."""
    required: Any = tensors[:5]  # `checks.meta` raises an error for None
    names = kind._fields
    return kind._make((*map(checks.meta, names[:5], required), *map(checks.optional_meta, names[5:], tensors[5:])))


# ---- What all calls share


def _with_checked_window(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in the order of `Options`, with the window as a checked tuple.

    A window may be a list, which cannot be hashed. And the caches do not tell (1.0, 0), which is an error, from (1, 0).
    """
    index = Options._fields.index("window_size")
    window = options[index]
    if window is None:
        return options
    return (*options[:index], checks.check_window(window), *options[index + 1 :])


def _check_options(options: Options, dtype: torch.dtype) -> None:
    """Checks the arguments that are no tensors. dtype: that of the query."""
    checks.check_scalars(
        options.dropout_p, options.is_causal, options.scale, options.enable_gqa, options.softcap, dtype
    )
    checks.check_diagonal_alignment(options.diagonal_alignment)
    checks.check_num_splits(options.num_splits)


def _band(shapes: Shapes, options: Options, bias: CausalBiasMeta | None = None) -> Band:
    """The band of a call. A causal bias makes the call causal, and a lower-right one aligns the diagonal.

    If sequences have lengths of their own, a lower-right diagonal ends at the last key that each of them has. In
    `torch.jit.trace`, all lower-right diagonals are such ones, because a trace may run with other lengths.
    """
    window, is_causal = checks.check_window(options.window_size), options.is_causal or bias is not None
    is_lower_right = options.diagonal_alignment == checks.LOWER_RIGHT or (bias is not None and bias.is_lower_right)
    if not is_lower_right:
        return masks.band_of(is_causal, window)
    if shapes.key_lengths is not None or shapes.cu_seqlens_q is not None or modes.is_jit_tracing():
        return masks.band_of(is_causal, window, is_from_end=True)
    return masks.band_of(is_causal, window, shapes.key[2] - shapes.query[2])


def _problem(
    shapes: Shapes, query: Meta, options: Options, seqlen_q: int, seqlen_k: int, bias: CausalBiasMeta | None = None
) -> AttentionProblem:
    """The problem of a call whose arguments have been checked. The default scale is 1 / sqrt(D)."""
    scalars = Scalars(
        seqlen_q,
        seqlen_k,
        1.0 / math.sqrt(shapes.query[-1]) if options.scale is None else float(options.scale),
        float(options.softcap),
        float(options.dropout_p),
        *_band(shapes, options, bias),
        checks.check_num_splits(options.num_splits),
    )
    return AttentionProblem.of(shapes, query.dtype, query.device, scalars)


def _shape(meta: Meta | None) -> torch.Size | None:
    """The shape of a tensor; None for a tensor that the call does not have."""
    return None if meta is None else meta.shape
