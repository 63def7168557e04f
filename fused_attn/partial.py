"""Attention in parts: for a sequence whose keys, or queries, do not lie in one place.

`attention_partial` computes the attention of some queries to some keys, `merge` joins the results of several key
parts, and `attention_partial_backward` computes the gradients of one part from the merged result. Offsets say where the
part lies in the whole attention, so that all parts together hide, bias and drop the same entries as one call would.

>>> import torch
>>> from fused_attn import fused_attention
>>> from fused_attn.partial import attention_partial, merge
>>> query, key, value = torch.randn(3, 1, 2, 8, 16).unbind()
>>> parts = [
...     attention_partial(query, k, v, key_offset=offset, is_causal=True)
...     for k, v, offset in zip(key.split(4, 2), value.split(4, 2), (0, 4))
... ]
>>> out, lse = merge(*zip(*parts))
>>> torch.testing.assert_close(out, fused_attention(query, key, value, is_causal=True))
"""

from __future__ import annotations

import functools
from collections.abc import Container, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn import modes, planning, running
from fused_attn.attention import checks, formula, masks
from fused_attn.attention.dropout import GROUP, seed_tensor
from fused_attn.attention.inputs import Gradients, Inputs, Results, Saved, Wanted
from fused_attn.attention.problem import NO_ORIGIN, AttentionProblem, DropoutOrigin
from fused_attn.backends import dispatch, events


class PackedRows(NamedTuple):
    """Which rows belong to which packed sequence, as in `fused_attention_varlen`.

    cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32
    max_seqlen_q, max_seqlen_k: at least the longest of these sequences
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


#: Offsets are below this number, so that kernels add positions in 32 bits, and Philox counts them.
_LIMIT = 2**30


@dataclass(frozen=True, kw_only=True)
class PartialOptions:
    """The options of a part. Those without a comment have the meaning that they have in `fused_attention`."""

    query_offset: int = 0  # the position of the first query in the whole sequence of queries
    key_offset: int = 0  # the position of the first key in the whole sequence of keys
    batch_offset: int = 0  # the number of the first batch entry, or of the first packed sequence, which dropout counts
    head_offset: int = 0  # the number of the first query head, which dropout counts
    #: The number of queries of the whole attention, or the max_seqlen_q of whole packed sequences. relative_bias needs
    #: the number: its column ``j - i + seqlen_q - 1`` is added to score (i, j). Default: as many queries as keys.
    seqlen_q: int | None = None
    attn_mask: Tensor | None = None  # broadcastable to (B, H, L, S) of this part
    dropout_p: float = 0.0
    dropout_seed: int | Tensor | None = None  # required with dropout_p, because all parts need the same seed
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    key_padding_mask: Tensor | None = None  # (B, S) of this part
    window_size: tuple[int, int] | None = None
    softcap: float = 0.0
    relative_bias: Tensor | None = None  # of the whole attention
    num_splits: int | None = None
    backend: str | None = None
    #: Sequences that stand one after another in the rows of one batch entry. Each of them begins with its own first
    #: query and key, so query_offset and key_offset are 0. Masks and num_splits are refused.
    packed: PackedRows | None = None

    @classmethod
    def of(cls, function: str, given: dict, refused: Container[str] = ()) -> PartialOptions:
        """The options that a caller has given by name.

        function: the name of the called function, for the error
        refused: options that this function does not take. The caller has checked that none of them is given
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            taken = ", ".join(name for name in known if name not in refused)
            raise TypeError(f"{function}: expected options among {taken}, got {', '.join(unknown)}")
        return cls(**given)

    def of_call(self) -> planning.Options:
        """The options of a call. The offsets of a part say where its diagonal lies, so the alignment is the default."""
        return planning.Options(
            self.dropout_p, self.is_causal, self.scale, self.enable_gqa, self.window_size, self.softcap,
            num_splits=self.num_splits,
        )  # fmt: skip


def attention_partial(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The attention of these queries to these keys alone, in the form that `merge` takes. Differentiable.

    Args:
        query: (B, H, L, D), the queries from position ``query_offset`` on.
        key: (B, Hkv, S, D), the keys from position ``key_offset`` on.
        value: (B, Hkv, S, Dv).
        options: see `PartialOptions`. Sinks are no option: `join_sinks` adds them once, after `merge`.

    Returns:
        out (B, H, L, Dv), float32 (float64 for float64 inputs); lse (B, H, L) of the same dtype, natural logarithm. The
        kernel rounds the out of a part to the dtype of the query, once. A row that sees none of these keys has out 0
        and lse -inf.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    out, lse = attend(query, key, value, PartialOptions.of("attention_partial", options))
    return out.to(lse.dtype), lse


def attend(
    query: Tensor, key: Tensor, value: Tensor, options: PartialOptions, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_partial` with an out of the query's dtype. Sinks are right only if all keys are here."""
    out, lse, _ = results(query, key, value, options, sinks, return_max=False)
    assert lse is not None, "it was asked for"
    return out, lse


def results(
    query: Tensor, key: Tensor, value: Tensor, options: PartialOptions, sinks: Tensor | None, return_max: bool
) -> Results:
    """All results of a part, out of the query's dtype. See `attend`."""
    problem, inputs, _, _ = _planned(query, key, value, options, sinks)
    chosen = None if torch.compiler.is_compiling() else dispatch.choose(problem, options.backend)
    is_direct = modes.is_direct() and not modes.is_observed(inputs)
    found = running.run(problem, chosen, options.backend, is_direct, inputs, return_lse=True, return_max=return_max)
    if options.packed is None:
        return found
    out, lse, row_max = found
    assert lse is not None, "it was asked for"
    return _with_batch(out), lse[None], None if row_max is None else row_max[None]


def attention_partial_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    into: Gradients | None = None,
    wanted: Wanted | None = None,
    **options,
) -> Gradients:
    """The gradients that one part of the keys contributes, without autograd.

    The probs of the part follow from the lse of the whole row, so every part gets the merged out and lse, after
    `join_sinks` if there are sinks. The sum of the contributions of all parts is the gradient.

    Args:
        dout: (B, H, L, Dv), the gradient of the merged out.
        query: (B, H, L, D), as in `attention_partial`; likewise key, value and options.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        out: (B, H, L, Dv), the merged out.
        lse: (B, H, L), the merged lse.
        dlse: (B, H, L), the gradient of the merged lse; None = zero.
        into: gradients of the types that this function returns. The contributions are added to these tensors, in place.
            Where there is None, the contribution is returned and not added.
        wanted: which gradients are computed; default: all that there are.
        options: see `PartialOptions`.

    Returns:
        `Gradients` query, key, value and, with a relative bias or a floating-point attn_mask or key_padding_mask,
        relative_bias (the gradient of the whole one), bias and key_bias. All are float32 (float64 for float64 inputs).
        Those that are not wanted are None.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    saved = Saved(out=out, lse=lse, dout=dout, dlse=dlse)
    chosen = PartialOptions.of("attention_partial_backward", options)
    for name, x, kind in (("wanted", wanted, Wanted), ("into", into, Gradients)):
        if x is not None and not isinstance(x, kind):
            raise checks.wrong_type(name, f"None or {kind.__name__}", x)
    return backward(query, key, value, saved, chosen, wanted or Wanted(*(True for _ in Wanted._fields)), into)


@torch.no_grad()
def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    options: PartialOptions,
    wanted: Wanted,
    into: Gradients | None = None,
) -> Gradients:
    """`attention_partial_backward` with the merged results and their gradients in `saved`."""
    problem, inputs, columns, added = _planned(query, key, value, options)
    problem = _as_part(problem)
    backend = dispatch.choose(problem, options.backend)
    rows = tuple(query.shape[:3])
    of_outputs = (*rows, problem.value_dim)
    for name, x, shape in zip(Saved._fields, saved, (of_outputs, rows, of_outputs, rows), strict=True):
        if x is not None:
            _check_shape(name, x, shape)
    assert saved.out is not None and saved.lse is not None and saved.dout is not None, "a caller gives these"
    out, lse, dout = saved.out.to(query.dtype), saved.lse.to(problem.accumulate_dtype), saved.dout.to(query.dtype)
    saved = Saved(out, lse, dout, saved.dlse)
    if options.packed is not None:
        saved = Saved(_packed(out), lse[0], _packed(dout), None if saved.dlse is None else saved.dlse[0])
    wanted = Wanted(*(a and x is not None for a, x in zip(wanted, inputs, strict=False)))
    # The reference backend computes out and lse again, which would be those of this part alone.
    kernel = formula.backward_from_saved if backend.is_composite else events.named(backend).backward
    found = kernel(problem, inputs, saved, wanted)
    found = Gradients(*(None if x is None else x.to(problem.accumulate_dtype) for x in found))
    if options.packed is not None:
        of_rows = {name: getattr(found, name) for name in ("query", "key", "value")}
        found = found._replace(**{name: None if x is None else _with_batch(x) for name, x in of_rows.items()})
    if added:
        found = _without_added_keys(found, added)
    sums = Gradients() if into is None else into
    relative_bias = options.relative_bias
    for name, x, sum_ in zip(Gradients._fields, found, sums, strict=True):
        if x is not None and sum_ is not None:
            whole = relative_bias if name == "relative_bias" and relative_bias is not None else x
            _check_shape(f"into.{name}", sum_, whole.shape)
    if found.relative_bias is not None and relative_bias is not None:
        total = sums.relative_bias
        if total is None:
            total = found.relative_bias.new_zeros(relative_bias.shape)
        part = total[..., columns]
        part += found.relative_bias.reshape(part.shape)
        found, sums = found._replace(relative_bias=total), sums._replace(relative_bias=None)
    return Gradients(*(x if sum_ is None or x is None else sum_.add_(x) for x, sum_ in zip(found, sums, strict=True)))


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins the parts of the same queries over different keys. Differentiable.

    Each part weighs exp(lse of the part - lse of the whole row). The parts may come from `fused_attention`, too, with
    ``return_lse=True``. Those of packed rows are out (total, H, Dv) and lse (H, total): pass ``lse.t()``. If total is
    H, no check can find a forgotten ``lse.t()``.

    Args:
        outs: (B, H, L, Dv) of each part, or (..., Dv).
        lses: (B, H, L) of each part, or (...); -inf for rows that saw no key of the part.

    Returns:
        out (B, H, L, Dv) and lse (B, H, L) of the whole. A row that saw no key in any part has out 0 and lse -inf. out
        has the dtype of outs and lses together, so it is float32 for parts in bfloat16.

    Raises:
        ValueError: there are no parts, as many outs as lses were expected, or a shape does not fit.
    """
    if not outs or len(outs) != len(lses):
        raise checks.fail("lses", f"one for each of the outs, and at least one; there are {len(outs)} outs", len(lses))
    for i, (part, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_shape(f"outs[{i}]", part, outs[0].shape)
        _check_shape(f"lses[{i}]", lse, outs[0].shape[:-1], " (of packed rows, pass lse.t())")
    each = torch.stack(tuple(lses))  # (parts, B, H, L)
    row_max = each.detach().amax(0)
    is_empty = row_max == float("-inf")
    weights = torch.exp(each - row_max.masked_fill(is_empty, 0.0))
    total = weights.sum(0).masked_fill(is_empty, 1.0)
    lse = (row_max.masked_fill(is_empty, 0.0) + total.log()).masked_fill(is_empty, float("-inf"))
    weights = (weights / total).unsqueeze(-1)
    out = outs[0] * weights[0]
    for other, weight in zip(outs[1:], weights[1:], strict=True):
        out = out + other * weight
    return out, lse


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of a merged attention with the sinks (H,) in the denominator of the softmax. Differentiable.

    A row that saw no key keeps out 0 and lse -inf, as in `fused_attention`.

    Args:
        out: (B, H, L, Dv). Of packed rows (total, H, Dv), pass ``out.transpose(0, 1)[None]``.
        lse: (B, H, L). Of packed rows (H, total), pass ``lse[None]``; after `merge`, ``lse.t()[None]``.
        sinks: (H,).

    Returns:
        out (B, H, L, Dv) and lse (B, H, L).

    Raises:
        ValueError: a shape does not fit.
    """
    if out.dim() != 4:
        of_packed = " (of packed rows, pass out.transpose(0, 1)[None], and lse as (1, H, total))" * (out.dim() == 3)
        raise checks.fail("out", "shape (B, H, L, Dv)", f"shape {tuple(out.shape)}{of_packed}")
    _check_shape("lse", lse, out.shape[:-1], " (pass lse as (1, H, total), too)")
    _check_shape("sinks", sinks, out.shape[1:2])
    is_empty = lse == float("-inf")
    sink = sinks.to(lse.dtype)[:, None]
    joined = torch.logaddexp(lse.masked_fill(is_empty, 0.0), sink)
    weight = torch.exp(lse.masked_fill(is_empty, 0.0) - joined)
    return out * weight.unsqueeze(-1), joined.masked_fill(is_empty, float("-inf"))


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], if_transposed: str = "") -> None:
    """Checks the shape of one of the results of parts. Without the check, a dimension of 1 would broadcast.

    if_transposed: added to the message if the last two dimensions are exchanged
    """
    if x.shape != shape:
        is_transposed = x.dim() >= 2 and x.mT.shape == shape
        raise checks.fail(name, f"shape {tuple(shape)}", f"shape {tuple(x.shape)}{if_transposed * is_transposed}")


def check_rank_4(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks that query, key and value are tensors of four dimensions."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise checks.fail(name, "a tensor (B, heads, rows, columns)", getattr(x, "shape", type(x).__name__))


def _planned(
    query: Tensor, key: Tensor, value: Tensor, options: PartialOptions, sinks: Tensor | None = None
) -> tuple[AttentionProblem, Inputs, slice, int]:
    """(the problem, its tensors, the columns of the relative bias that belong to the part, keys added in front)."""
    check_rank_4(query, key, value)
    for name in ("query_offset", "key_offset", "batch_offset", "head_offset"):
        offset = getattr(options, name)
        if not checks.is_int(offset) or not 0 <= offset < _LIMIT:
            raise checks.fail(name, f"an int from 0 to {_LIMIT - 1}", repr(offset))
    if options.seqlen_q is not None:
        checks.check_seqlen("seqlen_q", options.seqlen_q)
    if options.packed is not None and not isinstance(options.packed, PackedRows):
        raise checks.wrong_type("packed", "PackedRows", options.packed)
    checks.optional_meta("relative_bias", options.relative_bias)  # before its columns are read
    for name in ("attn_mask", "key_padding_mask"):
        checks.check_tensors(**{name: getattr(options, name)})  # before keys are added
    seed = None
    if options.dropout_seed is not None:
        checks.check_dropout_seed(options.dropout_seed)
    if options.dropout_p:
        if options.dropout_seed is None:
            raise checks.fail("dropout_seed", "a seed, which all parts share", "None")
        seed = seed_tensor(options.dropout_seed, query.device)
    is_compiling = torch.compiler.is_compiling()
    added = options.key_offset % GROUP if options.dropout_p and key.shape[2] else 0
    packed = options.packed
    if packed is not None:
        _check_packed(query, key, value, options, packed)
    elif added:
        key, value, options = _with_added_keys(key, value, options, added)
    lengths = (query.shape[2], key.shape[2]) if packed is None else (packed.max_seqlen_q, packed.max_seqlen_k)
    columns = (
        slice(0) if options.relative_bias is None else _columns(*lengths, options.relative_bias.shape[-1], options)
    )
    relative_bias = None if options.relative_bias is None else options.relative_bias[..., columns]
    if packed is None:
        tensors = planning.tensors_of(
            query, key, value, attn_mask=options.attn_mask, relative_bias=relative_bias, sinks=sinks,
            key_padding_mask=options.key_padding_mask,
        )  # fmt: skip
        problem = planning.plan(is_compiling, tensors, options.of_call(), options.backend).problem
    else:
        query, key, value = _packed(query), _packed(key), _packed(value)
        of_packed = (query, key, value, *packed[:2], relative_bias, sinks)
        problem = planning.plan_of_packed(is_compiling, of_packed, lengths, options.of_call(), options.backend).problem
    origin = DropoutOrigin(options.batch_offset, options.head_offset, options.query_offset, options.key_offset)
    problem = (_move if is_compiling else _moved)(problem, origin)
    bias, key_bias, mask, key_padding = masks.score_masks(problem, options.attn_mask, options.key_padding_mask, None)
    inputs = Inputs(
        query,
        key,
        value,
        bias=bias,
        key_bias=key_bias,
        relative_bias=masks.with_head_dim(relative_bias),
        sinks=sinks,
        seed=seed,
        mask=mask,
        key_padding=key_padding,
        cu_seqlens_q=None if packed is None else packed.cu_seqlens_q.contiguous(),
        cu_seqlens_k=None if packed is None else packed.cu_seqlens_k.contiguous(),
    )
    return problem, inputs, columns, added


def _packed(x: Tensor) -> Tensor:
    """Rows (1, heads, total, columns) as packed rows (total, heads, columns)."""
    return x[0].transpose(0, 1)


def _with_batch(rows: Tensor) -> Tensor:
    """Packed rows (total, heads, columns) as (1, heads, total, columns)."""
    return rows.transpose(0, 1)[None]


def _check_packed(query: Tensor, key: Tensor, value: Tensor, options: PartialOptions, packed: PackedRows) -> None:
    """Checks what the plan of packed tensors does not check."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.shape[0] != 1:
            raise checks.fail(name, "one batch entry with packed rows", f"{x.shape[0]}")
    for name in ("query_offset", "key_offset", "attn_mask", "key_padding_mask", "num_splits"):
        if getattr(options, name) is not getattr(PartialOptions, name):
            raise checks.fail(name, f"{getattr(PartialOptions, name)} with packed rows", "another value")
    for name, offsets, x, longest in (
        ("cu_seqlens_q", packed.cu_seqlens_q, query, packed.max_seqlen_q),
        ("cu_seqlens_k", packed.cu_seqlens_k, key, packed.max_seqlen_k),
    ):
        checks.check_cu_seqlens(name, checks.meta(name, offsets), checks.meta("query", query))
        checks.check_seqlen(f"max_seqlen_{name[-1]}", longest)
        if modes.can_read(offsets):
            checks.check_cu_seqlens_values(name, offsets, x.shape[2], longest)


def _with_added_keys(
    key: Tensor, value: Tensor, options: PartialOptions, count: int
) -> tuple[Tensor, Tensor, PartialOptions]:
    """The part with `count` hidden keys in front.

    A kernel draws the dropout of `GROUP` neighbouring keys at once, and the kernels of GPUs draw it for the first of
    their keys on. So the first key of a part becomes the first one of its group.
    """
    key, value = (F.pad(x, (0, 0, count, 0)) for x in (key, value))
    padding, mask = options.key_padding_mask, options.attn_mask
    if padding is None:
        padding = torch.zeros(key.shape[0], key.shape[2] - count, dtype=torch.bool, device=key.device)
    padding = F.pad(padding, (count, 0), value=True if padding.dtype == torch.bool else float("-inf"))
    if mask is not None and mask.dim() and mask.shape[-1] > 1:
        mask = F.pad(mask, (count, 0))
    first = options.key_offset - count
    return key, value, replace(options, key_padding_mask=padding, attn_mask=mask, key_offset=first)


def _without_added_keys(grads: Gradients, count: int) -> Gradients:
    """The gradients of a part without those of `_with_added_keys`."""
    key, value, bias, key_bias = grads.key, grads.value, grads.bias, grads.key_bias
    return grads._replace(
        key=None if key is None else key[:, :, count:],
        value=None if value is None else value[:, :, count:],
        bias=bias if bias is None or bias.shape[-1] == 1 else bias[..., count:],
        key_bias=None if key_bias is None else key_bias[:, count:],
    )


def _columns(seqlen_q: int, seqlen_k: int, count: int, options: PartialOptions) -> slice:
    """The columns of the whole relative bias that the scores of a part use. They form the relative bias of the part.

    seqlen_q, seqlen_k: the numbers of queries and keys of the part
    count: the number of columns of the whole relative bias
    """
    whole_q = options.seqlen_q
    if whole_q is None:
        if count % 2 == 0:
            raise checks.fail("seqlen_q", f"an int, as relative_bias has an even number of columns, {count}", "None")
        whole_q = (count + 1) // 2
    # Column 0 of the part belongs to its last query and its first key.
    first = options.key_offset - (options.query_offset + seqlen_q - 1) + whole_q - 1
    last = first + max(seqlen_q + seqlen_k - 1, 0)
    if first == last:
        return slice(0)  # no queries or no keys, which may stand behind the last column
    if first < 0 or last > count:
        raise checks.fail(
            "relative_bias", f"the L + S - 1 columns of the whole attention, of which this part uses {first} to {last}",
            f"{count} columns",
        )  # fmt: skip
    return slice(first, last)


def _move(problem: AttentionProblem, origin: DropoutOrigin) -> AttentionProblem:
    """The problem of a part whose first query and key stand at the positions of origin."""
    band = problem.band
    if not band.is_unbounded:
        band = band._replace(offset=band.offset + origin.query - origin.key)
    return replace(problem, band=band, dropout_origin=origin if problem.dropout_p else NO_ORIGIN)


_moved = functools.lru_cache(maxsize=4096)(_move)


@functools.lru_cache(maxsize=4096)
def _as_part(problem: AttentionProblem) -> AttentionProblem:
    """The problem of a backward that gets the out and lse of whole rows. The same object for the same problem."""
    return replace(problem, is_part=True)
