"""Who computes a case. Each is imported only when asked; what it cannot do it says by raising, and a row records it.

Every rival is asked in the way that is fastest for it, and a row says what it was given. What it needs once for many
calls (a mask, a block mask, a dense bias from a table) is made beforehand and is no part of its time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fused_attn
from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.conventions import OUR_BACKENDS, OURS
from benchmarks.inputs import Inputs

#: How a row marks an implementation that was asked for less than the case.
IGNORES_PADDING = "causal alone: right only in rows that are no padding"
#: Seconds of a call beyond which its first one tells enough to choose between two ways of asking.
LONG_CALL = 0.2


class Cannot(Exception):
    """A rival has no way to compute the case."""


class Prepared(NamedTuple):
    """forward: computes the output, (B, H, L, D) or (total, H, D); leaves: what it differentiates.

    given: the masks that it was given, in words
    problem: what it computes if that is not the case, but what users compute instead
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    given: str
    problem: str | None = None


class Rival(NamedTuple):
    """prepare raises what it likes where it cannot compute the case.

    package: whose version a row records
    other: another way to ask, which takes more memory and may take less time
    is_for: cases for which asking makes sense
    """

    prepare: Callable[[Inputs], Prepared]
    package: str
    other: Callable[[Inputs], Prepared] | None = None
    is_for: Callable[[Case], bool] = lambda case: True


def fastest(name: str, inputs: Inputs) -> Prepared:
    """A rival asked in the way that takes it least time. Raises what the first way raises, if none can."""
    rival = RIVALS[name]
    if rival.other is None:
        return rival.prepare(inputs)
    # Packages raise what they like; KeyboardInterrupt is no Exception.
    try:
        first = rival.prepare(inputs)
    except Exception as error:
        try:
            return rival.other(inputs)
        except Exception:
            raise error from None
    try:
        other = rival.other(inputs)
    except Exception:
        return first
    return min((first, other), key=partial(_seconds, inputs=inputs))


def _seconds(prepared: Prepared, inputs: Inputs) -> float:
    """Of about one call; infinite if it fails, which the check will show."""
    timer = timing.WallTimer(inputs.device) if inputs.device.type == "cuda" else timing.CpuTimer()
    try:
        call = call_of(prepared, inputs)
        first = timer.seconds(call, 1)
        return first if first > LONG_CALL else min(timer.seconds(call, 1) for _ in range(3))
    except Exception:
        return float("inf")


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


def _ours(inputs: Inputs, backend: str | None = None) -> Prepared:
    case = inputs.case
    if case.is_packed:
        longest = max(case.lengths)

        def packed() -> Tensor:
            return fused_attn.fused_attention_varlen(
                inputs.query, inputs.key, inputs.value, inputs.cu_seqlens, inputs.cu_seqlens, longest, longest,
                is_causal=True, backend=backend,
            )  # fmt: skip

        return Prepared(packed, inputs.leaves, "cu_seqlens, is_causal")
    options = our_options(inputs)
    query, key, value = inputs.query, inputs.key, inputs.value
    return Prepared(
        lambda: fused_attn.fused_attention(query, key, value, **options, backend=backend),
        inputs.leaves,
        ", ".join(options) or "nothing",
    )


def our_backend(inputs: Inputs) -> str | None:
    """Which kernel ours is, where `explain` can tell."""
    if inputs.case.is_packed:
        return None
    return fused_attn.explain(inputs.query, inputs.key, inputs.value, **our_options(inputs)).chosen


def able_backends(inputs: Inputs) -> list[str]:
    """Those of `OUR_BACKENDS` that can compute the case; none if there are fewer than two to compare."""
    able = []
    for name, backend in OUR_BACKENDS.items():
        try:
            if inputs.case.is_packed:  # which `explain` knows nothing of; the call itself refuses what it cannot
                with torch.no_grad():
                    _ours(inputs, backend).forward()
            else:
                options = our_options(inputs)
                fused_attn.explain(inputs.query, inputs.key, inputs.value, **options, backend=backend)
        except ValueError:  # also where there is no such backend
            continue
        except Exception:  # a kernel that breaks has a row that says so
            pass
        able.append(name)
    return able if len(able) > 1 else []


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


def _torch(inputs: Inputs, backend: str | None = None, has_float_mask: bool = False) -> Prepared:
    """F.scaled_dot_product_attention, as it chooses or with one of its backends.

    has_float_mask: a bool mask is made a float one beforehand, as torch otherwise does within each call.
    """
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
    mask = options.get("attn_mask")
    if has_float_mask:
        if mask is None or mask.dtype != torch.bool:
            raise Cannot("there is no bool mask to convert")
        options["attn_mask"] = mask = _as_float(mask, inputs.query.dtype)
    given = ", ".join(options) or "nothing"
    if mask is not None:
        given = f"{_name_of(mask.dtype)} attn_mask {tuple(mask.shape)}"
    return _sdpa(inputs, backend, leaves, options, given)


def _torch_causal_only(inputs: Inputs) -> Prepared:
    """What is common for decoders: padding comes last, so no real token sees it, and the loss ignores its rows."""
    options = {"is_causal": True}
    return _sdpa(inputs, None, inputs.leaves, options, "is_causal")._replace(problem=IGNORES_PADDING)


def _sdpa(
    inputs: Inputs, backend: str | None, leaves: dict[str, Tensor], options: dict[str, Any], given: str
) -> Prepared:
    query, key, value = inputs.query, inputs.key, inputs.value
    if backend is None:
        return Prepared(lambda: scaled_dot_product_attention(query, key, value, **options), leaves, given)

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
    return Prepared(named, leaves, given)


def _as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torch_varlen(inputs: Inputs) -> Prepared:
    from torch.nn.attention.varlen import varlen_attn

    # `is_causal` became a window in later versions.
    options = {"window_size": (-1, 0)}
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        options = {"is_causal": True}
    cu_seqlens, longest = inputs.cu_seqlens, max(inputs.case.lengths)
    query, key, value = inputs.query, inputs.key, inputs.value
    return Prepared(
        lambda: varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options),
        inputs.leaves,
        f"cu_seqlens, {next(iter(options))}",
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

    given = [name for name, x in (("block_mask", block_mask), ("score_mod", score_mod)) if x is not None]
    return Prepared(forward, inputs.leaves, ", ".join(given) or "nothing")


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
    options: dict[str, Any] = {"causal": case.is_causal}
    if case.window is not None:
        options["window_size"] = (case.window - 1, 0)
    # It has no key padding, and packed keys would move its causal diagonal, which ends at the last key.
    problem = IGNORES_PADDING if case.is_padded and case.is_causal else None
    function = package.flash_attn_func
    if problem or not (case.is_packed or case.is_padded):
        if case.mask == "decode" and "num_splits" in inspect.signature(function).parameters:
            options["num_splits"] = 0  # as many as it finds best; its default is one
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        prepared = _rows_first(inputs, lambda q, k, v: function(q, k, v, **options), given)
        return prepared._replace(problem=problem)
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
        return Prepared(lambda: _first(function(query, key, value, **options)), inputs.leaves, "cu_seqlens, causal")
    # Its way to say padding: keys packed for each call, which is part of its time.
    kept = (~inputs.padding).flatten().nonzero().squeeze(1)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.flatten(0, 1).index_select(0, kept) for x in (k, v))
        out = _first(function(q.flatten(0, 1), k, v, **options))
        return out.unflatten(0, (case.batch, case.seqlen_q))

    return _rows_first(inputs, padded, "cu_seqlens, keys packed in each call")


def _xformers(inputs: Inputs) -> Prepared:
    ops = importlib.import_module("xformers.ops")
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")
    case = inputs.case
    leaves, bias = inputs.leaves, None
    if case.is_packed:
        bias = biases.BlockDiagonalCausalMask.from_seqlens(list(case.lengths))
        query, key, value = (x[None] for x in (inputs.query, inputs.key, inputs.value))
        return Prepared(
            lambda: ops.memory_efficient_attention(query, key, value, attn_bias=bias)[0], leaves, type(bias).__name__
        )
    if case.window is not None:
        bias = biases.LowerTriangularFromBottomRightLocalAttentionMask(case.window)
    elif case.is_padded and case.is_causal:
        bias = _as_float(inputs.visible(), inputs.query.dtype).expand(case.batch, case.heads, -1, -1)
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

    given = f"{_name_of(bias.dtype)} bias {tuple(bias.shape)}" if isinstance(bias, Tensor) else type(bias).__name__
    return _rows_first(inputs, attention, given if bias is not None else "nothing")._replace(leaves=leaves)


def _rows_first(inputs: Inputs, function: Callable[[Tensor, Tensor, Tensor], Any], given: str) -> Prepared:
    """For functions of (B, L, H, D)."""
    query, key, value = inputs.query, inputs.key, inputs.value

    def forward() -> Tensor:
        return _first(function(*(x.transpose(1, 2) for x in (query, key, value)))).transpose(1, 2)

    return Prepared(forward, inputs.leaves, given)


def _first(returned: Any) -> Tensor:
    """Some versions return (out, lse)."""
    return returned[0] if isinstance(returned, tuple) else returned


def _backend_of_torch(backend: str | None) -> Rival:
    return Rival(partial(_torch, backend=backend), "torch", partial(_torch, backend=backend, has_float_mask=True))


RIVALS: dict[str, Rival] = {
    OURS: Rival(_ours, "fused_attn"),
    **{name: Rival(partial(_ours, backend=backend), "fused_attn") for name, backend in OUR_BACKENDS.items()},
    "torch": _backend_of_torch(None),
    "torch-flash": _backend_of_torch("FLASH_ATTENTION"),
    "torch-efficient": _backend_of_torch("EFFICIENT_ATTENTION"),
    "torch-cudnn": _backend_of_torch("CUDNN_ATTENTION"),
    "torch-causal-only": Rival(
        _torch_causal_only, "torch", is_for=lambda case: case.is_causal and case.is_padded
    ),
    "torch-varlen": Rival(_torch_varlen, "torch", is_for=lambda case: case.is_packed),
    "flex": Rival(_flex, "torch"),
    "flash_attn2": Rival(partial(_flash, module="flash_attn"), "flash_attn"),
    "flash_attn3": Rival(partial(_flash, module="flash_attn_interface"), "flash_attn_3"),
    "flash_attn4": Rival(partial(_flash, module="flash_attn.cute"), "flash-attn-4"),
    "xformers": Rival(_xformers, "xformers"),
    # Last, because it needs most memory.
    "torch-math": _backend_of_torch("MATH"),
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
