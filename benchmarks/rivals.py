"""Who computes a case. Each is imported only when asked; what it cannot do it says by raising, and a row records it.

Every rival is asked in the way that is fastest for it. What it needs once for many calls (a mask, a block mask, a dense
bias from a table) is made beforehand and is no part of its time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fused_attn
from benchmarks.conventions import OURS
from benchmarks.inputs import Inputs


class Cannot(Exception):
    """A rival has no way to compute the case."""


class Prepared(NamedTuple):
    """forward: computes the output, (B, H, L, D) or (total, H, D); leaves: what it differentiates."""

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]


class Rival(NamedTuple):
    """prepare raises what it likes where the case is not for it; package: whose version a row records."""

    prepare: Callable[[Inputs], Prepared]
    package: str


def call_of(prepared: Prepared, inputs: Inputs) -> Callable[[], Any]:
    """What is timed: the output, or the gradients."""
    forward, leaves, dout = prepared.forward, list(prepared.leaves.values()), inputs.dout
    direction = inputs.case.direction
    if direction == "forward":

        def without_grad() -> Tensor:
            with torch.no_grad():
                return forward()

        return without_grad
    if direction == "backward":
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, dout)


def results_of(prepared: Prepared, inputs: Inputs) -> dict[str, Tensor]:
    """What is checked: the output and, where the case has a backward, every gradient by name."""
    if inputs.case.direction == "forward":
        with torch.no_grad():
            return {"out": prepared.forward()}
    out = prepared.forward()
    grads = torch.autograd.grad(out, list(prepared.leaves.values()), inputs.dout)
    results = {"out": out.detach()} | dict(zip(prepared.leaves, grads, strict=True))
    if inputs.case.mask == "relative-bias" and results["bias"].dim() == 4:
        results["bias"] = _sums_of_diagonals(results["bias"])
    return results


def _sums_of_diagonals(dense: Tensor) -> Tensor:
    """(1, H, L, S) -> (H, L + S - 1), by distance."""
    _, heads, rows, keys = dense.shape
    sums = torch.zeros(heads, rows + keys - 1, dtype=torch.float64, device=dense.device)
    for row in range(rows):
        first = rows - 1 - row
        sums[:, first : first + keys] += dense[0, :, row]
    return sums


# ---- fused_attn


def _ours(inputs: Inputs) -> Prepared:
    case = inputs.case
    if case.is_packed:
        longest = max(case.lengths)

        def packed() -> Tensor:
            return fused_attn.fused_attention_varlen(
                inputs.query, inputs.key, inputs.value, inputs.cu_seqlens, inputs.cu_seqlens, longest, longest,
                is_causal=True,
            )  # fmt: skip

        return Prepared(packed, inputs.leaves)
    options = our_options(inputs)
    query, key, value = inputs.query, inputs.key, inputs.value
    return Prepared(lambda: fused_attn.fused_attention(query, key, value, **options), inputs.leaves)


def our_options(inputs: Inputs) -> dict[str, Any]:
    case = inputs.case
    options: dict[str, Any] = {}
    if case.window is not None:
        options["window_size"] = (case.window - 1, 0)
    elif case.is_causal:
        options["is_causal"] = True
    if inputs.padding is not None:
        options["key_padding_mask"] = inputs.padding
    if case.kv_heads != case.heads:
        options["enable_gqa"] = True
    if inputs.bias is not None:
        options["attn_mask" if case.mask == "bias" else "relative_bias"] = inputs.bias
    return options


# ---- torch


def _torch(inputs: Inputs, backend: str | None = None) -> Prepared:
    """F.scaled_dot_product_attention, as it chooses or with one of its backends."""
    case = inputs.case
    if case.is_packed:
        raise Cannot("scaled_dot_product_attention takes no packed sequences; torch-varlen is for them")
    leaves = inputs.leaves
    options: dict[str, Any] = {}
    if case.kv_heads != case.heads:
        options["enable_gqa"] = True
    if case.is_padded and not case.is_causal:
        options["attn_mask"] = (~inputs.padding)[:, None, None, :].contiguous()
    elif case.is_padded or case.window is not None:
        options["attn_mask"] = inputs.visible()
    elif case.is_causal:
        options["is_causal"] = True
    if case.mask == "bias":
        options["attn_mask"] = inputs.bias
    elif case.mask == "relative-bias":
        options["attn_mask"] = inputs.dense_bias()
        leaves = leaves | {"bias": options["attn_mask"]}
    query, key, value = inputs.query, inputs.key, inputs.value
    if backend is None:
        return Prepared(lambda: scaled_dot_product_attention(query, key, value, **options), leaves)

    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = getattr(SDPBackend, backend)

    def named() -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(query, key, value, **options)

    # Once, because torch says only in warnings why a backend cannot.
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        try:
            named()
        except RuntimeError as error:
            if "kernel" not in str(error) and "backend" not in str(error):
                raise
            reasons = [str(warning.message).partition(" (Triggered")[0] for warning in caught]
            raise Cannot("; ".join(reasons) or str(error)) from error
    return Prepared(named, leaves)


def _torch_varlen(inputs: Inputs) -> Prepared:
    from torch.nn.attention.varlen import varlen_attn

    if not inputs.case.is_packed:
        raise Cannot("for packed sequences only")
    # `is_causal` became a window in later versions.
    options = {"window_size": (-1, 0)}
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        options = {"is_causal": True}
    cu_seqlens, longest = inputs.cu_seqlens, max(inputs.case.lengths)
    query, key, value = inputs.query, inputs.key, inputs.value
    return Prepared(
        lambda: varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options), inputs.leaves
    )


def _flex(inputs: Inputs) -> Prepared:
    """FlexAttention, compiled for the case's shapes; the block mask is made once."""
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A backward that is timed by itself runs again and again on one graph.
    torch._functorch.config.donated_buffer = False
    # Every case is compiled anew; what was compiled before only counts towards a limit.
    torch._dynamo.reset()
    case = inputs.case
    query, key, value = inputs.query, inputs.key, inputs.value
    if case.is_packed:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    mask_mod = _flex_mask(inputs)
    block_mask = None
    if mask_mod is not None:
        batch = case.batch if case.is_padded else None
        block_mask = create_block_mask(mask_mod, batch, None, query.shape[2], key.shape[2], device=query.device)
    score_mod = None
    if inputs.bias is not None:
        bias, last_row = inputs.bias, case.seqlen_q - 1
        if case.mask == "bias":

            def score_mod(score, batch, head, row, column):
                return score + bias[0, head, row, column]

        else:

            def score_mod(score, batch, head, row, column):
                return score + bias[head, column - row + last_row]

    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    is_grouped = case.kv_heads != case.heads

    def forward() -> Tensor:
        out = compiled(query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=is_grouped)
        return out[0].transpose(0, 1) if case.is_packed else out

    return Prepared(forward, inputs.leaves)


def _flex_mask(inputs: Inputs) -> Callable | None:
    case = inputs.case
    if case.is_packed:
        total = sum(case.lengths)
        sequence = torch.repeat_interleave(torch.arange(case.batch, device=inputs.device), inputs.lengths)
        assert sequence.shape == (total,)
        return lambda batch, head, row, column: (sequence[row] == sequence[column]) & (column <= row)
    lengths, window = inputs.lengths, case.window
    if case.is_padded and case.is_causal:
        return lambda batch, head, row, column: (column <= row) & (column < lengths[batch])
    if case.is_padded:
        return lambda batch, head, row, column: column < lengths[batch]
    if window is not None:
        return lambda batch, head, row, column: (column <= row) & (column > row - window)
    return (lambda batch, head, row, column: column <= row) if case.is_causal else None


# ---- packages


def _flash(inputs: Inputs, module: str) -> Prepared:
    """flash_attn of any generation: rows before heads, causal aligned to the lower right."""
    package = importlib.import_module(module)
    case = inputs.case
    if inputs.bias is not None:
        raise Cannot("it has no bias with a gradient")
    if case.is_padded and case.is_causal:
        raise Cannot("it has no key padding; packed keys would move its causal diagonal, which ends at the last key")
    options: dict[str, Any] = {"causal": case.is_causal}
    if case.window is not None:
        options["window_size"] = (case.window - 1, 0)
    if not case.is_packed and not case.is_padded:
        return _rows_first(inputs, lambda q, k, v: package.flash_attn_func(q, k, v, **options))
    function = package.flash_attn_varlen_func
    query_lengths = torch.tensor((0, *case.query_lengths), device=inputs.device)
    key_lengths = torch.tensor((0, *case.lengths), device=inputs.device)
    options |= {
        "cu_seqlens_q": query_lengths.cumsum(0).to(torch.int32),
        "cu_seqlens_k": key_lengths.cumsum(0).to(torch.int32),
        "max_seqlen_q": max(case.query_lengths),
        "max_seqlen_k": max(case.lengths),
    }
    # The generations differ in which of these they take.
    accepted = inspect.signature(function).parameters
    options = {name: value for name, value in options.items() if name in accepted}
    if case.is_packed:
        query, key, value = inputs.query, inputs.key, inputs.value
        return Prepared(lambda: _first(function(query, key, value, **options)), inputs.leaves)
    # Its way to say padding: keys packed for each call, which is part of its time.
    kept = (~inputs.padding).flatten().nonzero().squeeze(1)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.flatten(0, 1).index_select(0, kept) for x in (k, v))
        out = _first(function(q.flatten(0, 1), k, v, **options))
        return out.unflatten(0, (case.batch, case.seqlen_q))

    return _rows_first(inputs, padded)


def _xformers(inputs: Inputs) -> Prepared:
    ops = importlib.import_module("xformers.ops")
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")
    case = inputs.case
    leaves, bias = inputs.leaves, None
    if case.is_packed:
        bias = biases.BlockDiagonalCausalMask.from_seqlens(list(case.lengths))
        query, key, value = (x[None] for x in (inputs.query, inputs.key, inputs.value))
        return Prepared(lambda: ops.memory_efficient_attention(query, key, value, attn_bias=bias)[0], leaves)
    if case.window is not None:
        bias = biases.LowerTriangularFromBottomRightLocalAttentionMask(case.window)
    elif case.is_padded and case.is_causal:
        bias = torch.zeros(inputs.visible().shape, dtype=inputs.query.dtype, device=inputs.device)
        bias = bias.masked_fill(~inputs.visible(), float("-inf")).expand(case.batch, case.heads, -1, -1)
    elif case.is_padded:
        bias = biases.BlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen=[case.seqlen_q] * case.batch, kv_padding=case.length, kv_seqlen=list(case.lengths)
        )
    elif case.is_causal:
        bias = biases.LowerTriangularMask()
    elif inputs.bias is not None:
        dense = inputs.bias if case.mask == "bias" else inputs.dense_bias()
        leaves = leaves | {"bias": dense}
        bias = dense.expand(case.batch, -1, -1, -1)
    group = case.heads // case.kv_heads
    is_flat = case.is_padded and not case.is_causal

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            q = q.unflatten(2, (case.kv_heads, group))
            k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
            return ops.memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3)
        if is_flat:
            q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
            return ops.memory_efficient_attention(q, k, v, attn_bias=bias)[0].unflatten(0, (case.batch, case.seqlen_q))
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias)

    return _rows_first(inputs, attention)._replace(leaves=leaves)


def _rows_first(inputs: Inputs, function: Callable[[Tensor, Tensor, Tensor], Any]) -> Prepared:
    """For functions of (B, L, H, D)."""
    query, key, value = inputs.query, inputs.key, inputs.value

    def forward() -> Tensor:
        return _first(function(*(x.transpose(1, 2) for x in (query, key, value)))).transpose(1, 2)

    return Prepared(forward, inputs.leaves)


def _first(returned: Any) -> Tensor:
    """Some versions return (out, lse)."""
    return returned[0] if isinstance(returned, tuple) else returned


RIVALS: dict[str, Rival] = {
    OURS: Rival(_ours, "fused_attn"),
    "torch": Rival(_torch, "torch"),
    "torch-flash": Rival(lambda inputs: _torch(inputs, "FLASH_ATTENTION"), "torch"),
    "torch-efficient": Rival(lambda inputs: _torch(inputs, "EFFICIENT_ATTENTION"), "torch"),
    "torch-cudnn": Rival(lambda inputs: _torch(inputs, "CUDNN_ATTENTION"), "torch"),
    "torch-varlen": Rival(_torch_varlen, "torch"),
    "flex": Rival(_flex, "torch"),
    "flash_attn2": Rival(lambda inputs: _flash(inputs, "flash_attn"), "flash_attn"),
    "flash_attn3": Rival(lambda inputs: _flash(inputs, "flash_attn_interface"), "flash_attn_3"),
    "flash_attn4": Rival(lambda inputs: _flash(inputs, "flash_attn.cute"), "flash-attn-4"),
    "xformers": Rival(_xformers, "xformers"),
    # Last, because it needs most memory.
    "torch-math": Rival(lambda inputs: _torch(inputs, "MATH"), "torch"),
}


def reason(error: BaseException) -> str:
    """One line for a row."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return text if isinstance(error, Cannot) else f"{type(error).__name__}: {text}"


def version_of(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(RIVALS[name].package)
    return None
