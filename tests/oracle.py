"""The oracle: an independent dense implementation of attention, with which the results of kernels are compared.

The formula uses no code of `fused_attn`. Masks follow the documentation of the arguments, and Philox follows its paper.
Only the rule that says how large the error of a kernel may be belongs to the package (`fused_attn.tolerance`).
`attention` computes in the dtype of its query. In float64 its result is the true value. In the dtype under test its
result has the error of eager PyTorch, to which the error of a kernel is compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from fused_attn import tolerance
from fused_attn.tolerance import largest

MINUS_INF = float("-inf")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: int | None = None,
    diagonal_alignment: str = "upper_left",
    num_splits: int | None = None,
    first_sequence: int = 0,
    watch: dict[str, float] | None = None,
    return_max: bool = False,
) -> tuple[Tensor, ...]:
    """(out, lse), or with return_max (out, lse, max), as `fused_attn.fused_attention` defines them.

    ``first_sequence``: the batch index of entry 0 in the counter of dropout. ``watch``: a dict that receives the
    largest score and, when backward runs, the largest gradient of a weight. ``num_splits`` changes no value.
    """
    if query.dim() == 2:  # without a head dimension there is one head
        results = attention(
            query[None],
            key[None],
            value[None],
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            key_padding_mask=key_padding_mask,
            key_ranges=key_ranges,
            window_size=window_size,
            softcap=softcap,
            relative_bias=relative_bias,
            sinks=sinks,
            dropout_seed=dropout_seed,
            diagonal_alignment=diagonal_alignment,
            first_sequence=first_sequence,
            watch=watch,
            return_max=return_max,
        )
        return tuple(x[0] for x in results)

    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    is_lower_right = diagonal_alignment == "lower_right"
    if isinstance(attn_mask, CausalBias):
        is_causal, is_lower_right = True, is_lower_right or attn_mask.variant == CausalVariant.LOWER_RIGHT
        attn_mask = None
    offset = 0
    if is_lower_right:
        offset = (seqlen_k if key_lengths is None else key_lengths.numpy()[:, None, None, None]) - seqlen_q
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(group, dim=-3) for x in (key, value))

    row, column = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None, :]
    visible = np.ones((seqlen_q, seqlen_k), dtype=bool)
    if is_causal:
        visible = visible & (column <= row + offset)
    if window_size is not None:
        left, right = window_size
        if left != -1:
            visible = visible & (column >= row + offset - left)
        if right != -1:
            visible = visible & (column <= row + offset + right)
    visible = torch.from_numpy(visible)

    if key_ranges is not None:
        begin, end = key_ranges.long()[..., None].unbind(-2)  # (..., L, N, 1)
        key_number = torch.from_numpy(column)
        visible = visible & ((begin <= key_number) & (key_number < end)).any(-2)
    if key_lengths is not None:
        is_key = torch.from_numpy(column) < key_lengths[:, None]  # (B, S)
        visible = visible & is_key[:, None, None, :]
        # Rows behind the last key may be NaN, as padding may.
        key, value = (torch.where(is_key[:, None, :, None], x, torch.zeros((), dtype=x.dtype)) for x in (key, value))

    padding_bias = None
    if key_padding_mask is not None:
        ignored = key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask == MINUS_INF
        visible = visible & ~ignored[..., None, None, :]
        # Values of padding keys may be NaN, and 0 * NaN would be NaN.
        key, value = (torch.where(ignored[..., None, :, None], torch.zeros((), dtype=x.dtype), x) for x in (key, value))
        if key_padding_mask.dtype != torch.bool:
            padding_bias = torch.where(ignored, 0.0, key_padding_mask)[..., None, None, :]

    scores = (query @ key.mT) * (query_scale(query) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(scores.dtype)
    if padding_bias is not None:
        scores = scores + padding_bias.to(scores.dtype)
    if relative_bias is not None:
        scores = scores + relative_bias[..., torch.from_numpy(column - row + seqlen_q - 1)].to(scores.dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    scores = torch.where(visible, scores, MINUS_INF)

    # The sink is an additional column of logits. Without sinks, its logit is -inf.
    sink = torch.full((1, 1, 1), MINUS_INF, dtype=scores.dtype)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None]
    logits = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], dim=-1)
    is_empty = ~(scores > MINUS_INF).any(-1, keepdim=True)
    logits = torch.where(is_empty, 0.0, logits)
    weights = torch.where(is_empty, 0.0, torch.softmax(logits, dim=-1)[..., :-1])
    wide = logits if logits.dtype == torch.float64 else logits.float()
    lse = torch.where(is_empty[..., 0], MINUS_INF, torch.logsumexp(wide, dim=-1))
    if watch is not None:
        # A mask with finfo.min makes scores huge, but these scores have no effect on the result, so they do not count.
        note = scores.detach()
        watch["score"] = max(watch["score"], largest(torch.where(note.abs() < 1e5, note, 0.0)))
        if weights.requires_grad:
            weights.register_hook(lambda grad: watch.update(weight_grad=max(watch["weight_grad"], largest(grad))))
    if dropout_p:
        heads = weights.shape[-3]
        batch = math.prod(weights.shape[:-3])
        keep = dropout_keep(dropout_seed, dropout_p, first_sequence, batch, heads, seqlen_q, seqlen_k)
        rounded = min(round(dropout_p * 65536), 65535) / 65536  # the share of the numbers of 16 bits that drop an entry
        factor = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - rounded)
        weights = weights * torch.from_numpy(keep).reshape(weights.shape) * factor
    if not return_max:
        return weights @ value, lse
    wide = scores.detach().to(lse.dtype)
    row_max = wide.amax(-1) if seqlen_k else torch.full_like(lse.detach(), MINUS_INF)
    return weights @ value, lse, row_max


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    relative_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """(out (total_q, H, Dv), lse (H, total_q)), and with return_max max (H, total_q), as
    `fused_attn.fused_attention_varlen` defines them.

    Calls `attention` for each sequence.
    """
    outs, of_rows = [], []
    rows, columns = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(rows) - 1):
        q = query[rows[n] : rows[n + 1]].transpose(0, 1)
        k, v = (x[columns[n] : columns[n + 1]].transpose(0, 1) for x in (key, value))
        bias = None
        if relative_bias is not None and q.shape[1] and k.shape[1]:
            # The bias for distance d is in column d + max_seqlen_q - 1. `attention` wants it in column d + L - 1.
            first = max_seqlen_q - q.shape[1]
            bias = relative_bias[..., first : first + q.shape[1] + k.shape[1] - 1]
        out, *others = attention(
            q, k, v, None, dropout_p, is_causal, scale, enable_gqa, relative_bias=bias, first_sequence=n, **options
        )
        outs.append(out.transpose(0, 1))
        of_rows.append(others)
    return torch.cat(outs), *(torch.cat(parts, dim=-1) for parts in zip(*of_rows, strict=True))


def attention_paged(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    key_lengths: Tensor,
    *,
    is_causal: bool = False,
    window_size: tuple[int, int] | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse), as `fused_attn.fused_attention_paged` defines them.

    Calls `attention` for each batch entry with its own keys. The mask of an entry is made here, row by row. With
    cu_seqlens_q, each sequence is a call with one batch entry.
    """
    if cu_seqlens_q is not None:
        results = [
            attention_paged(
                query[begin:end].transpose(0, 1)[None], key_pages, value_pages, block_table[n : n + 1],
                key_lengths[n : n + 1], is_causal=is_causal, window_size=window_size, **options,
            )
            for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist()))
        ]  # fmt: skip
        outs, lses = zip(*results, strict=True)
        return torch.cat([out[0].transpose(0, 1) for out in outs]), torch.cat([lse[0] for lse in lses], dim=-1)
    page_size = key_pages.shape[1]
    left, right = (-1, -1) if window_size is None else window_size
    right = 0 if is_causal else right
    outs, lses = [], []
    for entry, length in enumerate(key_lengths.tolist()):
        rows = [(int(block_table[entry, j // page_size]), j % page_size) for j in range(length)]
        pages, places = (
            (torch.tensor(column, dtype=torch.long) for column in zip(*rows, strict=True)) if rows else ((), ())
        )
        k, v = ((x[pages, places] if rows else x.reshape(-1, *x.shape[2:])[:0]).transpose(0, 1)
                for x in (key_pages, value_pages))  # fmt: skip
        mask = torch.ones(query.shape[2], length, dtype=torch.bool)
        for i in range(query.shape[2]):
            position = length - query.shape[2] + i
            for j in range(length):
                is_near = (left == -1 or j >= position - left) and (right == -1 or j <= position + right)
                is_valid = key_padding_mask is None or not key_padding_mask[entry, j]
                mask[i, j] = is_near and is_valid
        out, lse = attention(query[entry], k, v, mask, enable_gqa=True, **options)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


# ---- Dropout


def philox4x32_7(counter: np.ndarray, seed: int) -> np.ndarray:
    """The random words (..., 4) uint32 for counters (..., 4) uint32, after Salmon et al., SC 2011, section 3.2."""
    x = counter.astype(np.uint64)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    low = np.uint64(0xFFFFFFFF)
    for _ in range(7):
        p0 = x[..., 0] * np.uint64(0xD2511F53)
        p1 = x[..., 2] * np.uint64(0xCD9E8D57)
        x = np.stack(
            [
                (p1 >> np.uint64(32)) ^ x[..., 1] ^ np.uint64(k0),
                p1 & low,
                (p0 >> np.uint64(32)) ^ x[..., 3] ^ np.uint64(k1),
                p0 & low,
            ],
            axis=-1,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x.astype(np.uint32)


def dropout_keep(
    seed: int, p: float, first_sequence: int, batch: int, heads: int, rows: int, columns: int
) -> np.ndarray:
    """Which weights survive dropout: (batch, heads, rows, columns) bool."""
    groups = (columns + 7) // 8
    counter = np.zeros((batch, heads, rows, groups, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(groups)
    counter[..., 1] = np.arange(rows)[:, None]
    counter[..., 2] = np.arange(heads)[:, None, None]
    counter[..., 3] = (first_sequence + np.arange(batch))[:, None, None, None]
    words = philox4x32_7(counter, seed)
    numbers = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(batch, heads, rows, 8 * groups)[..., :columns]
    return numbers >= min(round(p * 2**16), 2**16 - 1)


# ---- Comparison of a result with the oracle


class Result(NamedTuple):
    """The results of a call by name: out, lse, max if the call asks for it, and the gradients of its inputs."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]
    max: Tensor | None = None

    def cpu(self) -> Result:
        row_max = None if self.max is None else self.max.cpu()
        return Result(self.out.cpu(), self.lse.cpu(), {name: grad.cpu() for name, grad in self.grads.items()}, row_max)

    def items(self) -> list[tuple[str, Tensor]]:
        row_max = [] if self.max is None else [("max", self.max)]
        grads = [(f"d{name}", grad) for name, grad in self.grads.items()]
        return [("out", self.out), ("lse", self.lse), *row_max, *grads]


class Expected(NamedTuple):
    """The results that a kernel should have, with their errors.

    ``noise``: for each result, the rounding error that no algorithm avoids on these inputs (`tolerance.noise`).
    """

    truth: Result
    eager: Result
    dtype: torch.dtype
    noise: dict[str, float]


def evaluate(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    differentiated: tuple[str, ...],
    dout: Tensor,
    dlse: Tensor | None,
    *,
    materialize_grads: bool = False,
) -> Result:
    """Runs forward, and backward of the loss <out, dout> + <lse, dlse>, but for the entries of lse that are -inf.

    ``materialize_grads``: the gradient of a tensor that the function has not used is zero. In packed calls without any
    score, the true function uses no bias.
    """
    leaves = {name: x.detach().requires_grad_(name in differentiated) for name, x in tensors.items()}
    out, lse, *row_max = function(**leaves, **options)
    if not differentiated:
        return Result(out, lse, {}, *row_max)
    outputs, cotangents = [out], [dout]
    if dlse is not None:
        outputs.append(lse)
        cotangents.append(dlse.to(lse.dtype))
    grads = torch.autograd.grad(
        outputs, [leaves[name] for name in differentiated], cotangents, materialize_grads=materialize_grads
    )
    return Result(out.detach(), lse.detach(), dict(zip(differentiated, grads, strict=True)), *row_max)


def expected(
    function: Callable[..., tuple[Tensor, Tensor]],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    differentiated: tuple[str, ...],
    dout: Tensor,
    dlse: Tensor | None,
) -> Expected:
    """The true result (float64) and the eager result (in the dtype under test) of the same inputs."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    watch = {"score": 0.0, "weight_grad": 0.0}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for many small operations, one thread is fastest
    try:
        watched = options | {"watch": watch}
        truth = evaluate(function, wide, watched, differentiated, dout.double(), dlse, materialize_grads=True)
        eager = evaluate(function, tensors, options, differentiated, dout, dlse, materialize_grads=True)
    finally:
        torch.set_num_threads(threads)
    scale = options.get("scale")
    noise = tolerance.noise(
        eager.out.dtype,
        dict(truth.items()),
        {name.removesuffix("_pages"): x for name, x in wide.items()},
        dout,
        dlse,
        scale=query_scale(wide["query"]) if scale is None else scale,
        dropout_p=options.get("dropout_p", 0.0),
        largest_score=watch["score"],
        largest_weight_grad=watch["weight_grad"],
    )
    return Expected(truth, eager, tensors["query"].dtype, noise)


def query_scale(query: Tensor) -> float:
    return 1.0 / math.sqrt(query.shape[-1])


def assert_close(actual: Result, expected: Expected) -> None:
    """Asserts that the errors of out, lse and every gradient are within the bounds of `tolerance`."""
    problems = []
    truth = dict(expected.truth.items())
    eager = dict(expected.eager.items())
    assert [name for name, _ in actual.items()] == list(truth)
    largest_lse = largest(expected.truth.lse)
    for name, ours in actual.items():
        ref = truth[name]
        if ours.shape != ref.shape:
            problems.append(f"{name}: shape {tuple(ours.shape)}, expected {tuple(ref.shape)}")
            continue
        wanted_dtype = _dtype_of(name, expected)
        if ours.dtype != wanted_dtype:
            problems.append(f"{name}: {ours.dtype}, expected {wanted_dtype}")
        ours = ours.double()
        finite = ref.isfinite()
        if not ((ours == ref) | finite).all():
            problems.append(f"{name}: not -inf where it should be")
        if not (ours.isfinite() | ~finite).all():
            bad = (~ours.isfinite() & finite).nonzero()
            problems.append(f"{name}: {len(bad)} of {ours.numel()} entries are not finite, first at {bad[0].tolist()}")
            continue
        error = torch.where(finite, ours - ref, 0.0).abs()
        yardstick = torch.where(finite, eager[name].double() - ref, 0.0).abs().nan_to_num(posinf=0.0)
        floor = tolerance.floor(expected.dtype, wanted_dtype, largest(ref), expected.noise[name], largest_lse)
        for measure in tolerance.measures(error, yardstick, floor):
            if not measure.is_right:
                where = np.unravel_index(int(error.argmax()), error.shape)
                problems.append(
                    f"{name}: {measure.name} error {measure.error:.3e} > {measure.allowed:.3e} "
                    f"(eager {measure.yardstick:.3e}); "
                    f"worst at {tuple(map(int, where))}: {ours[where]:.6g}, expected {ref[where]:.6g}"
                )
                break
    assert not problems, "\n" + "\n".join(problems)


def _dtype_of(name: str, expected: Expected) -> torch.dtype:
    if name in ("lse", "max"):
        return torch.float64 if expected.dtype == torch.float64 else torch.float32
    return dict(expected.eager.items())[name].dtype
