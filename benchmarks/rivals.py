"""Who computes a case. A rival is imported only when asked. It raises what it cannot do, and a row records that.

Every rival is asked in the way that is fastest for it, and a row says what it was given. What it needs once for many
calls (a mask, a block mask, a dense bias from a table) is made beforehand and is no part of its time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
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
LEAVES_PADDING_OUT = "packed beforehand: rows of padding are not computed, and packing takes no part of the time"
#: Seconds. Of longer calls, one is enough to choose between two ways of asking.
LONG_CALL = 0.2


class Cannot(Exception):
    """A rival has no way to compute the case."""


class Prepared(NamedTuple):
    """A rival with the tensors of a case.

    forward: computes the output, (B, H, L, D) or (total, H, D)
    leaves: the tensors that it differentiates

    given: the masks that it was given, in words
    problem: what it computes if that is not the case, but what users compute instead
    dout: the gradient of its output, if that has another layout than the case's
    as_in_the_case: brings its output and its gradients back into the case's layout, for the check
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    given: str
    problem: str | None = None
    dout: Tensor | None = None
    as_in_the_case: Callable[[Tensor], Tensor] = lambda x: x


class Rival(NamedTuple):
    """prepare raises what it likes where it cannot compute the case.

    packages: of which the installed one's version is recorded in a row
    other: another way to ask, which takes more memory and may take less time
    is_for: cases for which asking makes sense
    """

    prepare: Callable[[Inputs], Prepared]
    packages: tuple[str, ...]
    other: Callable[[Inputs], Prepared] | None = None
    is_for: Callable[[Case], bool] = lambda case: True


def fastest(name: str, inputs: Inputs) -> Prepared:
    """A rival asked in the way that takes it least time. Raises what the first way raises, if none can."""
    rival = RIVALS[name]
    ways, errors = [], []
    for prepare in filter(None, (rival.prepare, rival.other)):
        # Packages raise what they like; KeyboardInterrupt is no Exception.
        try:
            ways.append(prepare(inputs))
        except Exception as error:
            errors.append(error)
    if not ways:
        raise errors[0]
    return ways[0] if len(ways) == 1 else min(ways, key=partial(_seconds, inputs=inputs))


def _seconds(prepared: Prepared, inputs: Inputs) -> float:
    """The time of about one call; infinite if the call fails, which the check will show."""
    timer = timing.timer_for(inputs.device, waits=True)
    try:
        call = call_of(prepared, inputs)
        first = timer.seconds(call, 1)
        return first if first > LONG_CALL else min(timer.seconds(call, 1) for _ in range(3))
    except Exception:
        return float("inf")


def call_of(prepared: Prepared, inputs: Inputs) -> Callable[[], Any]:
    """The call that is timed. It computes the output, or the gradients, or both."""
    forward, leaves = prepared.forward, list(prepared.leaves.values())
    dout = inputs.dout if prepared.dout is None else prepared.dout
    if inputs.case.direction == "forward":
        return torch.no_grad()(forward)
    if inputs.case.direction == "backward":
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, dout)


def results_of(prepared: Prepared, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors that are checked: the output and, where the case has a backward, every gradient by name."""
    with torch.set_grad_enabled(inputs.case.direction != "forward"):
        out = prepared.forward()
    results = {"out": out.detach()}
    if inputs.case.direction != "forward":
        dout = inputs.dout if prepared.dout is None else prepared.dout
        grads = torch.autograd.grad(out, list(prepared.leaves.values()), dout)
        results |= dict(zip(prepared.leaves, grads, strict=True))
    results = {name: prepared.as_in_the_case(x) for name, x in results.items()}
    if inputs.case.mask == "relative-bias" and "bias" in results and results["bias"].dim() == 4:
        results["bias"] = _sums_of_diagonals(results["bias"])
    return results


def _sums_of_diagonals(dense: Tensor) -> Tensor:
    """The sums of a (1, H, L, S) tensor over entries of one distance j - i, (H, L + S - 1)."""
    _, heads, rows, keys = dense.shape
    row, column = torch.arange(rows, device=dense.device), torch.arange(keys, device=dense.device)
    distance = (column - row[:, None] + rows - 1).flatten()
    sums = torch.zeros(heads, rows + keys - 1, dtype=torch.float64, device=dense.device)
    return sums.index_add_(1, distance, dense[0].flatten(1).double())


# ---- fused_attn


def _ours(inputs: Inputs, backend: str | None = None) -> Prepared:
    tensors, options = (inputs.query, inputs.key, inputs.value), our_options(inputs)
    function = fused_attn.fused_attention
    if inputs.case.is_packed:
        longest = max(inputs.case.lengths)
        tensors += (inputs.cu_seqlens, inputs.cu_seqlens, longest, longest)
        function = fused_attn.fused_attention_varlen
    given = ", ".join(["cu_seqlens"] * inputs.case.is_packed + list(options)) or "nothing"
    return Prepared(lambda: function(*tensors, **options, backend=backend), inputs.leaves, given)


def our_backend(inputs: Inputs) -> str | None:
    """The backend that ours chooses; None for packed sequences, which `explain` does not know."""
    if inputs.case.is_packed:
        return None
    return fused_attn.explain(inputs.query, inputs.key, inputs.value, **our_options(inputs)).chosen


def backends_of(name: str, inputs: Inputs) -> set[str]:
    """Those of `OUR_BACKENDS` that may run when this implementation is asked."""
    if name != OURS:
        return {OUR_BACKENDS[name]} if name in OUR_BACKENDS else set()
    chosen = our_backend(inputs)
    return set(OUR_BACKENDS.values()) if chosen is None else {chosen}


def able_backends(inputs: Inputs) -> list[str]:
    """Those of `OUR_BACKENDS` that can compute the case; empty if fewer than two can."""
    able = []
    for name, backend in OUR_BACKENDS.items():
        try:
            if (
                inputs.case.is_packed
            ):  # `explain` does not know them, but the call itself refuses what it cannot compute
                with torch.no_grad():
                    _ours(inputs, backend).forward()
            else:
                options = our_options(inputs)
                fused_attn.explain(inputs.query, inputs.key, inputs.value, **options, backend=backend)
        except ValueError:  # also where there is no such backend
            continue
        except Exception:  # a kernel that breaks is able, and has a row that says what happened
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
    """F.scaled_dot_product_attention with the backend that it chooses, or with a given one.

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
    """What many decoders do: padding comes last, so no real token sees it, and the loss ignores the rows of padding."""
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

    # One call now, because torch says why a backend cannot run, and says so only in warnings.
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

    # Later versions have a window in place of `is_causal`.
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

    # A backward that is timed by itself runs many times on one graph.
    torch._functorch.config.donated_buffer = False
    # torch limits how much one function may be compiled; each case starts anew.
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
        bias, last_row, is_dense = inputs.bias, case.seqlen_q - 1, case.mask == "bias"

        def score_mod(score, batch, head, row, column):
            return score + (bias[0, head, row, column] if is_dense else bias[head, column - row + last_row])

    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    is_grouped = case.kv_heads != case.heads

    def forward() -> Tensor:
        out = compiled(query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=is_grouped)
        return out[0].transpose(0, 1) if case.is_packed else out

    given = [name for name, x in (("block_mask", block_mask), ("score_mod", score_mod)) if x is not None]
    return Prepared(forward, inputs.leaves, ", ".join(given) or "nothing")


def _flex_mask(inputs: Inputs) -> Callable | None:
    case, lengths, window = inputs.case, inputs.lengths, inputs.case.window
    if case.is_packed:
        sequence = torch.repeat_interleave(torch.arange(case.batch, device=inputs.device), lengths)
        return lambda batch, head, row, column: (sequence[row] == sequence[column]) & (column <= row)
    if case.is_padded and case.is_causal:
        return lambda batch, head, row, column: (column <= row) & (column < lengths[batch])
    if case.is_padded:
        return lambda batch, head, row, column: column < lengths[batch]
    if window is not None:
        return lambda batch, head, row, column: (column <= row) & (column > row - window)
    return (lambda batch, head, row, column: column <= row) if case.is_causal else None


# ---- packages


class FlashModule(NamedTuple):
    """A module that has flash_attn, and the package that brings the module."""

    module: str
    package: str
    has_backward: bool = True


#: By generation of FlashAttention. The first module that is installed is asked.
FLASH = {
    2: (FlashModule("flash_attn", "flash_attn"),),
    3: (
        FlashModule("flash_attn_interface", "flash_attn_3"),
        FlashModule("fa3_fwd_interface", "fa3-fwd", has_backward=False),
    ),
    4: (FlashModule("flash_attn.cute", "flash-attn-4"),),
}


def _flash_package(inputs: Inputs, generation: int) -> ModuleType:
    modules = FLASH[generation]
    found = next((one for one in modules if _is_installed(one.module)), modules[0])
    package = importlib.import_module(found.module)
    if inputs.case.direction != "forward" and not found.has_backward:
        raise Cannot(f"{found.package} has the forward alone")
    if inputs.bias is not None:
        raise Cannot("it has no bias with a gradient")
    return package


def _is_installed(module: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):  # a missing parent package; a module without a spec
        return module in sys.modules or importlib.util.find_spec(module) is not None
    return False


def _flash(inputs: Inputs, generation: int) -> Prepared:
    """flash_attn takes (B, L, H, D) and aligns its causal mask to the lower right."""
    package = _flash_package(inputs, generation)
    case = inputs.case
    options: dict[str, Any] = {"causal": case.is_causal}
    if case.window is not None:
        options["window_size"] = (case.window - 1, 0)
    # flash_attn has no key padding. Packing the keys would move its causal diagonal, which ends at the last key.
    problem = IGNORES_PADDING if case.is_padded and case.is_causal else None
    function = package.flash_attn_func
    if problem or not (case.is_packed or case.is_padded):
        if case.mask == "decode" and "num_splits" in inspect.signature(function).parameters:
            options["num_splits"] = 0  # 0: flash_attn chooses the number; its default is 1
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        prepared = _rows_first(inputs, lambda q, k, v: function(q, k, v, **options), given)
        return prepared._replace(problem=problem)
    function = _flash_varlen(package, inputs, case.query_lengths)
    if case.is_packed:
        query, key, value = inputs.query, inputs.key, inputs.value
        return Prepared(lambda: function(query, key, value), inputs.leaves, "cu_seqlens, causal")
    # For flash_attn, padding means packed keys. They are packed in each call, which is part of its time.
    kept = (~inputs.padding).flatten().nonzero().squeeze(1)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.flatten(0, 1).index_select(0, kept) for x in (k, v))
        return function(q.flatten(0, 1), k, v).unflatten(0, (case.batch, case.seqlen_q))

    return _rows_first(inputs, padded, "cu_seqlens, keys packed in each call")


def _flash_packed(inputs: Inputs, generation: int) -> Prepared:
    """A caller packs a padded batch once for the whole model, so that no tensor has padding."""
    package = _flash_package(inputs, generation)
    case = inputs.case
    if case.direction != "forward" and not case.is_causal:
        raise Cannot("the case takes a loss in rows of padding, which are not there when packed")
    kept = (~inputs.padding).flatten().nonzero().squeeze(1)

    def packed(x: Tensor) -> Tensor:
        """(B, H, L, D) -> (total, H, D)"""
        return x.detach().transpose(1, 2).flatten(0, 1)[kept].requires_grad_(x.requires_grad)

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros(case.batch * case.length, *x.shape[1:]).index_copy(0, kept, x)
        return rows.unflatten(0, (case.batch, case.length)).transpose(1, 2)

    leaves = {name: packed(x) for name, x in inputs.leaves.items()}
    function = _flash_varlen(package, inputs, case.lengths)
    return Prepared(
        lambda: function(*leaves.values()), leaves, "cu_seqlens", LEAVES_PADDING_OUT, packed(inputs.dout), padded
    )


def _flash_varlen(
    package: ModuleType, inputs: Inputs, query_lengths: tuple[int, ...]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of packed (total, H, D) queries, keys and values."""
    case, function = inputs.case, package.flash_attn_varlen_func
    starts = [
        torch.tensor((0, *lengths), device=inputs.device).cumsum(0).to(torch.int32)
        for lengths in (query_lengths, case.lengths)
    ]
    options = {
        "cu_seqlens_q": starts[0],
        "cu_seqlens_k": starts[1],
        "max_seqlen_q": max(query_lengths),
        "max_seqlen_k": max(case.lengths),
        "causal": case.is_causal,
    }
    # The generations of flash_attn accept different ones of these options.
    accepted = inspect.signature(function).parameters
    options = {name: value for name, value in options.items() if name in accepted}
    return lambda q, k, v: _first(function(q, k, v, **options))


def _rows_first(inputs: Inputs, function: Callable[[Tensor, Tensor, Tensor], Any], given: str) -> Prepared:
    """For functions of (B, L, H, D)."""
    query, key, value = inputs.query, inputs.key, inputs.value

    def forward() -> Tensor:
        return _first(function(*(x.transpose(1, 2) for x in (query, key, value)))).transpose(1, 2)

    return Prepared(forward, inputs.leaves, given)


def _first(returned: Any) -> Tensor:
    """The output, which some versions return together with the log-sum-exp."""
    return returned[0] if isinstance(returned, tuple) else returned


def _packages_of(generation: int) -> tuple[str, ...]:
    return tuple(one.package for one in FLASH[generation])


def _backend_of_torch(backend: str | None) -> Rival:
    return Rival(partial(_torch, backend=backend), ("torch",), partial(_torch, backend=backend, has_float_mask=True))


RIVALS: dict[str, Rival] = {
    OURS: Rival(_ours, ("fused_attn",)),
    **{name: Rival(partial(_ours, backend=backend), ("fused_attn",)) for name, backend in OUR_BACKENDS.items()},
    "torch": _backend_of_torch(None),
    "torch-flash": _backend_of_torch("FLASH_ATTENTION"),
    "torch-efficient": _backend_of_torch("EFFICIENT_ATTENTION"),
    "torch-cudnn": _backend_of_torch("CUDNN_ATTENTION"),
    "torch-causal-only": Rival(_torch_causal_only, ("torch",), is_for=lambda case: case.is_causal and case.is_padded),
    "torch-varlen": Rival(_torch_varlen, ("torch",), is_for=lambda case: case.is_packed),
    "flex": Rival(_flex, ("torch",)),
    **{
        f"flash_attn{generation}": Rival(partial(_flash, generation=generation), _packages_of(generation))
        for generation in FLASH
    },
    **{
        f"flash_attn{generation}-packed": Rival(
            partial(_flash_packed, generation=generation), _packages_of(generation), is_for=lambda case: case.is_padded
        )
        for generation in (3, 4)
    },
    # This one is last, because it needs most memory.
    "torch-math": _backend_of_torch("MATH"),
}


def reason(error: BaseException) -> str:
    """The error in one line, for a row."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return text if isinstance(error, Cannot) else f"{type(error).__name__}: {text}"


def version_of(name: str) -> dict[str, str | None]:
    """The fields of a row that name the package and its version; None if it is not installed."""
    packages = RIVALS[name].packages
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return {"package": package, "version": importlib.metadata.version(package)}
    return {"package": packages[0], "version": None}
