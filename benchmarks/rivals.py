"""The implementations that compute a case: `fused_attn`, torch, and other packages, which are rivals.

- A package is imported only when its rival is prepared.
- A rival that cannot compute a case raises an exception, whose text becomes the field "cannot" of a row.
- A rival is called in the way that is fastest for it. The field "given" of a row names the masks that it was given.
- What a user makes once for many calls (a mask, a block mask, a dense bias from a relative one) is made before the
  call and does not count in its time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Collection
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fused_attn
from benchmarks import timing
from benchmarks.cases import DENSE_MASKS, QUERIES, Case
from benchmarks.conventions import OUR_BACKENDS, OURS, SKIPPING
from benchmarks.inputs import Inputs

#: The field "problem" of a row whose implementation computes less than the case.
IGNORES_PADDING = "causal alone: right only in rows that are no padding"
LEAVES_PADDING_OUT = "packed beforehand: rows of padding are not computed, and packing takes no part of the time"
LEAVES_QUERIES_OUT = "a mask leaves padded queries out"
#: Seconds. A call that takes longer is run once, and not four times, to choose between two ways of calling.
LONG_CALL = 0.2


class Cannot(Exception):
    """An implementation cannot compute the case. The message says why."""


class Prepared(NamedTuple):
    """An implementation with the tensors of a case.

    forward: computes the output, (B, H, L, D) or (total, H, D)
    leaves: the tensors whose gradients are computed, by name
    given: the masks and flags that the implementation is given, in words
    problem: what the implementation computes, if that is less than the case
    dout: the gradient of the output, if its layout differs from that of the case
    to_case_layout: brings the output and the gradients into the layout of the case, in which they are checked
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    given: str
    problem: str | None = None
    dout: Tensor | None = None
    to_case_layout: Callable[[Tensor], Tensor] = lambda x: x


class Rival(NamedTuple):
    """How an implementation is called.

    prepare: raises an exception of any class if the implementation cannot compute the case
    packages: the packages that may bring the implementation; a row has the version of the installed one
    others: other ways to call it, which may take less time and more memory
    is_for: whether the implementation is meant for a case
    """

    prepare: Callable[[Inputs], Prepared]
    packages: tuple[str, ...]
    others: tuple[Callable[[Inputs], Prepared], ...] = ()
    is_for: Callable[[Case], bool] = lambda case: True


def fastest(name: str, inputs: Inputs) -> Prepared:
    """An implementation, prepared in that of its ways whose call takes the least time.

    If no way can compute the case, the exception of the first way is raised.
    """
    rival = RIVALS[name]
    ways, errors = [], []
    for prepare in (rival.prepare, *rival.others):
        try:
            ways.append(prepare(inputs))
        except Exception as error:  # Packages raise exceptions of any class.
            errors.append(error)
    if not ways:
        raise errors[0]
    return ways[0] if len(ways) == 1 else min(ways, key=partial(_seconds, inputs=inputs))


def _seconds(prepared: Prepared, inputs: Inputs) -> float:
    """The time of one call; infinite if the call fails. The later check reports the failure."""
    try:
        return seconds_of(call_of(prepared, inputs), inputs.device)
    except Exception:
        return float("inf")


def seconds_of(call: timing.Call, device: torch.device) -> float:
    """The time by which one of several ways to call an implementation is chosen."""
    timer = timing.timer_for(device, waits=True)
    first = timer.seconds(call, 1)
    return first if first > LONG_CALL else min(timer.seconds(call, 1) for _ in range(3))


def call_of(prepared: Prepared, inputs: Inputs) -> Callable[[], Any]:
    """The call that is timed. By the direction of the case, it computes the output, the gradients, or both."""
    forward, leaves = prepared.forward, list(prepared.leaves.values())
    dout = inputs.dout if prepared.dout is None else prepared.dout
    if inputs.case.direction == "forward":
        return torch.no_grad()(forward)
    if inputs.case.direction == "backward":
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, dout)


def results_of(prepared: Prepared, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors that are checked, by name: "out" and, unless the direction is forward, the gradients."""
    with torch.set_grad_enabled(inputs.case.direction != "forward"):
        out = prepared.forward()
    results = {"out": out.detach()}
    if inputs.case.direction != "forward":
        dout = inputs.dout if prepared.dout is None else prepared.dout
        grads = torch.autograd.grad(out, list(prepared.leaves.values()), dout)
        results |= dict(zip(prepared.leaves, grads, strict=True))
    results = {name: prepared.to_case_layout(x) for name, x in results.items()}
    if inputs.case.mask == "relative-bias" and "bias" in results and results["bias"].dim() == 4:
        results["bias"] = _sums_of_diagonals(results["bias"])
    return results


def _sums_of_diagonals(dense: Tensor) -> Tensor:
    """The gradient of a relative bias from that of a dense bias: (1, H, L, S) -> (H, L + S - 1), float64.

    Entry j - i + L - 1 of the result is the sum over all queries i and keys j with this distance.
    """
    _, heads, rows, keys = dense.shape
    row, column = torch.arange(rows, device=dense.device), torch.arange(keys, device=dense.device)
    distance = (column - row[:, None] + rows - 1).flatten()
    sums = torch.zeros(heads, rows + keys - 1, dtype=torch.float64, device=dense.device)
    return sums.index_add_(1, distance, dense[0].flatten(1).double())


# ---- fused_attn


def _ours(inputs: Inputs, backend: str | None = None) -> Prepared:
    tensors, options = inputs.qkv, our_options(inputs)
    function = fused_attn.fused_attention
    if inputs.case.is_packed:
        longest = max(inputs.case.lengths)
        tensors += (inputs.cu_seqlens, inputs.cu_seqlens, longest, longest)
        function = fused_attn.fused_attention_varlen
    given = ", ".join(["cu_seqlens"] * inputs.case.is_packed + list(options)) or "nothing"
    return Prepared(partial(function, *tensors, **options, backend=backend), inputs.leaves, given)


def _ours_without_padded_queries(inputs: Inputs) -> Prepared:
    """Our call with a mask that leaves padded queries out: what a caller gets who does not read their outputs."""
    _check_padding_is_unread(inputs.case)
    options = our_options(inputs) | {"attn_mask": ~inputs.padding[:, None, :, None]}
    call = partial(fused_attn.fused_attention, *inputs.qkv, **options)
    return Prepared(call, inputs.leaves, ", ".join(options), LEAVES_QUERIES_OUT)


def _check_padding_is_unread(case: Case) -> None:
    """Raises Cannot if the gradients of the case include those of outputs in rows of padding."""
    if case.direction != "forward" and not case.is_causal:
        raise Cannot("the case takes a loss in rows of padding")


def our_backend(inputs: Inputs) -> str | None:
    """The backend that runs when the user names none; None if the case is packed, because `explain` takes no packed
    tensors."""
    if inputs.case.is_packed:
        return None
    return fused_attn.explain(*inputs.qkv, **our_options(inputs)).chosen


def backends_of(name: str, inputs: Inputs) -> set[str]:
    """The GPU backends (values of OUR_BACKENDS) that may run when this implementation is called."""
    if name not in (OURS, SKIPPING):
        return {OUR_BACKENDS[name]} if name in OUR_BACKENDS else set()
    chosen = our_backend(inputs) if name == OURS else None
    return set(OUR_BACKENDS.values()) if chosen is None else {chosen}


def able_backends(inputs: Inputs, refused: Collection[str] = ()) -> list[str]:
    """The names in OUR_BACKENDS of those backends that can compute the case. With fewer than two, the list is empty:
    then there is nothing to compare. Refused backends are not called."""
    able = []
    for name, backend in OUR_BACKENDS.items():
        try:
            if inputs.case.is_packed:
                if backend not in refused:  # `explain` takes no packed tensors, so the call itself has to tell.
                    with torch.no_grad():
                        _ours(inputs, backend).forward()
            else:
                fused_attn.explain(*inputs.qkv, **our_options(inputs), backend=backend)
        except ValueError:  # The backend does not support the case, or is not installed.
            continue
        except Exception:  # The kernel supports the case, and has failed. Its row will say so.
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
    if case.mask == "blocks":
        options["attn_mask"] = inputs.visible()
    if case.mask == "shared-question":
        options["key_ranges"] = inputs.key_ranges()
    if case.dropout_p:
        options |= {"dropout_p": case.dropout_p, "dropout_seed": inputs.dropout_seed}
    others = {"softcap": case.softcap or None, "sinks": inputs.sinks}
    return options | {name: x for name, x in others.items() if x is not None}


# ---- torch


def _torch(inputs: Inputs, backend: str | None = None, has_float_mask: bool = False) -> Prepared:
    """F.scaled_dot_product_attention.

    Args:
        backend: a name in `SDPBackend`; None lets torch choose.
        has_float_mask: convert a bool mask to a float mask beforehand. Otherwise torch converts it within each call.
    """
    case = inputs.case
    if case.is_packed:
        raise Cannot("scaled_dot_product_attention takes no packed sequences; torch-varlen is for them")
    if case.mask in ("softcap", "sinks"):
        raise Cannot(f"scaled_dot_product_attention has no {case.mask}")
    leaves = inputs.leaves
    options: dict[str, Any] = {"dropout_p": case.dropout_p} if case.dropout_p else {}
    if case.kv_heads != case.heads:
        options["enable_gqa"] = True
    if case.is_padded and not case.is_causal:
        options["attn_mask"] = (~inputs.padding)[:, None, None, :].contiguous()
    elif case.is_padded or case.window is not None or case.mask in DENSE_MASKS:
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
        zeros = torch.zeros(mask.shape, dtype=inputs.query.dtype, device=mask.device)
        options["attn_mask"] = mask = zeros.masked_fill(~mask, float("-inf"))
    given = ", ".join(options) or "nothing"
    if mask is not None:
        given = f"{str(mask.dtype).removeprefix('torch.')} attn_mask {tuple(mask.shape)}"
    return _sdpa(inputs, backend, leaves, options, given)


def _torch_grouped(inputs: Inputs, backend: str | None = None) -> Prepared:
    """F.scaled_dot_product_attention of single queries whose heads share key heads. The heads of a group become rows
    of one head, which is a view. torch need not repeat the keys then, as some of its kernels do with `enable_gqa`."""
    case = inputs.case
    if case.kv_heads == case.heads or case.seqlen_q != 1 or case.mask != "decode":
        raise Cannot("no heads of single queries share key heads")

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(case.batch, case.kv_heads, -1, x.shape[-1])

    given = f"heads as rows {tuple(grouped(inputs.query).shape)}"
    plain = _sdpa(inputs, backend, inputs.leaves, {}, given, grouped)
    return plain._replace(forward=lambda: plain.forward().view(case.batch, case.heads, 1, case.value_dim))


def _torch_causal_only(inputs: Inputs) -> Prepared:
    """A causal mask without the padding mask, as in many decoders. The padding stands at the end of a sequence, so no
    valid query sees it, and the loss leaves out the rows of padding."""
    return _sdpa(inputs, None, inputs.leaves, {"is_causal": True}, "is_causal")._replace(problem=IGNORES_PADDING)


def _sdpa(
    inputs: Inputs, backend: str | None, leaves: dict[str, Tensor], options: dict[str, Any], given: str,
    view: Callable[[Tensor], Tensor] = lambda x: x,
) -> Prepared:  # fmt: skip
    """F.scaled_dot_product_attention with these options, on a backend by name or on the one that torch chooses.

    view: of the query, before each call
    """

    def chosen() -> Tensor:
        query, key, value = inputs.qkv
        return scaled_dot_product_attention(view(query), key, value, **options)

    if backend is None:
        return Prepared(chosen, leaves, given)

    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = getattr(SDPBackend, backend)

    def named() -> Tensor:
        with sdpa_kernel(kernel):
            return chosen()

    # torch says only in warnings why a backend cannot run. This call collects them.
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


def _torch_varlen(inputs: Inputs) -> Prepared:
    from torch.nn.attention.varlen import varlen_attn

    # Later versions of torch have `window_size` in place of `is_causal`.
    has_window = "window_size" in inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if has_window else {"is_causal": True}
    bounds = *[inputs.cu_seqlens] * 2, *[max(inputs.case.lengths)] * 2
    given = f"cu_seqlens, {next(iter(options))}"
    return Prepared(partial(varlen_attn, *inputs.qkv, *bounds, **options), inputs.leaves, given)


def _flex(inputs: Inputs) -> Prepared:
    """FlexAttention, compiled for the shapes of the case. The block mask is made beforehand."""
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # The timed backward runs many times on the graph of one forward, whose buffers must survive.
    torch._functorch.config.donated_buffer = False
    # torch limits how often one function is compiled. The limit counts anew for each case.
    torch._dynamo.reset()
    case = inputs.case
    if case.mask in ("sinks", "dropout"):
        raise Cannot(f"flex_attention has no {case.mask}")
    query, key, value = (x.transpose(0, 1)[None] if case.is_packed else x for x in inputs.qkv)
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

    elif case.softcap:

        def score_mod(score, batch, head, row, column):
            return case.softcap * torch.tanh(score / case.softcap)

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
    if case.mask in DENSE_MASKS:
        visible = inputs.visible()[0, 0]
        return lambda batch, head, row, column: visible[row, column]
    return (lambda batch, head, row, column: column <= row) if case.is_causal else None


# ---- packages


class FlashModule(NamedTuple):
    """A module with FlashAttention's functions, and the package on PyPI that brings the module."""

    module: str
    package: str
    has_backward: bool = True


#: The modules of each generation of FlashAttention. The first installed one is called.
FLASH = {
    2: (FlashModule("flash_attn", "flash_attn"),),
    3: (
        FlashModule("flash_attn_interface", "flash_attn_3"),
        FlashModule("fa3_fwd_interface", "fa3-fwd", has_backward=False),
    ),
    4: (FlashModule("flash_attn.cute", "flash-attn-4"),),
}


def _flash_package(inputs: Inputs, generation: int) -> ModuleType:
    """The installed module of a generation. Raises Cannot if the module has no function for the case."""
    found = flash_module(generation)
    package = importlib.import_module(found.module)
    if inputs.case.direction != "forward" and not found.has_backward:
        raise Cannot(f"{found.package} has the forward alone")
    if inputs.bias is not None:
        raise Cannot("it has no bias with a gradient")
    if inputs.case.mask in DENSE_MASKS:
        raise Cannot("it has no dense mask")
    return package


def flash_module(generation: int) -> FlashModule:
    """The first installed module of a generation; the first of all if none is installed."""
    modules = FLASH[generation]
    return next((one for one in modules if _is_installed(one.module)), modules[0])


def _is_installed(module: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):  # The parent package is missing; the module has no spec.
        return module in sys.modules or importlib.util.find_spec(module) is not None
    return False


def _flash(inputs: Inputs, generation: int) -> Prepared:
    """FlashAttention. Its functions take (B, L, H, D), and their causal mask is aligned to the lower right corner.

    They take no padding mask. For padding without a causal mask, each call packs the valid keys, and the packing counts
    in the time. With a causal mask that would shift the diagonal, so only the causal mask is given, as in
    `_torch_causal_only`.
    """
    package = _flash_package(inputs, generation)
    case = inputs.case
    options: dict[str, Any] = {"causal": case.is_causal}
    if case.window is not None:
        options["window_size"] = (case.window - 1, 0)
    problem = IGNORES_PADDING if case.is_padded and case.is_causal else None
    function = package.flash_attn_func
    if problem or not (case.is_packed or case.is_padded):
        if case.mask in QUERIES and "num_splits" in inspect.signature(function).parameters:
            options["num_splits"] = 0  # FlashAttention chooses the number of splits; its default is one split.
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        features = {"softcap": case.softcap or None, "dropout_p": case.dropout_p or None}
        features = {name: x for name, x in (features | {"learnable_sink": inputs.sinks}).items() if x is not None}
        # Each generation of FlashAttention has some of these parameters.
        if lacking := features.keys() - inspect.signature(function).parameters:
            raise Cannot(f"it has no {', '.join(lacking)}")
        options, given = options | features, ", ".join([given, *features])
        prepared = _rows_first(inputs, lambda q, k, v: function(q, k, v, **options), given)
        return prepared._replace(problem=problem)
    function = _flash_varlen(package, inputs, case.query_lengths)
    if case.is_packed:
        return Prepared(partial(function, *inputs.qkv), inputs.leaves, "cu_seqlens, causal")
    valid = (~inputs.padding).flatten().nonzero().squeeze(1)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.flatten(0, 1).index_select(0, valid) for x in (k, v))
        return function(q.flatten(0, 1), k, v).unflatten(0, (case.batch, case.seqlen_q))

    return _rows_first(inputs, padded, "cu_seqlens, keys packed in each call")


def _flash_packed(inputs: Inputs, generation: int) -> Prepared:
    """FlashAttention on a batch that the caller has packed once for the whole model: no tensor has padding."""
    package = _flash_package(inputs, generation)
    case = inputs.case
    _check_padding_is_unread(case)
    valid = (~inputs.padding).flatten().nonzero().squeeze(1)

    def packed(x: Tensor) -> Tensor:
        """(B, H, L, D) -> (total, H, D)"""
        return x.detach().transpose(1, 2).flatten(0, 1)[valid].requires_grad_(x.requires_grad)

    def padded(x: Tensor) -> Tensor:
        """(total, H, D) -> (B, H, L, D)"""
        rows = x.new_zeros(case.batch * case.length, *x.shape[1:]).index_copy(0, valid, x)
        return rows.unflatten(0, (case.batch, case.length)).transpose(1, 2)

    leaves = {name: packed(x) for name, x in inputs.leaves.items()}
    function = _flash_varlen(package, inputs, case.lengths)
    return Prepared(
        partial(function, *leaves.values()), leaves, "cu_seqlens", LEAVES_PADDING_OUT, packed(inputs.dout), padded
    )


def _flash_varlen(
    package: ModuleType, inputs: Inputs, query_lengths: tuple[int, ...]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlashAttention's function for packed tensors (total, H, D), with the options of the case."""
    case, function = inputs.case, package.flash_attn_varlen_func
    starts = [
        torch.tensor((0, *lengths), device=inputs.device).cumsum(0).to(torch.int32)
        for lengths in (query_lengths, case.lengths)
    ]
    options = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "causal": case.is_causal}
    options |= {"max_seqlen_q": max(query_lengths), "max_seqlen_k": max(case.lengths)}
    # Each generation of FlashAttention has some of these parameters.
    accepted = inspect.signature(function).parameters
    options = {name: value for name, value in options.items() if name in accepted}
    return lambda q, k, v: _first(function(q, k, v, **options))


def _rows_first(inputs: Inputs, function: Callable[[Tensor, Tensor, Tensor], Any], given: str) -> Prepared:
    """A function that takes and returns (B, L, H, D), on the (B, H, L, D) tensors of the case."""

    def forward() -> Tensor:
        return _first(function(*(x.transpose(1, 2) for x in inputs.qkv))).transpose(1, 2)

    return Prepared(forward, inputs.leaves, given)


def _first(returned: Any) -> Tensor:
    """The output. Some versions of FlashAttention return the log-sum-exp besides."""
    return returned[0] if isinstance(returned, tuple) else returned


def _packages_of(generation: int) -> tuple[str, ...]:
    return tuple(one.package for one in FLASH[generation])


def _is_padded(case: Case) -> bool:
    return case.is_padded


def _backend_of_torch(backend: str | None) -> Rival:
    others = partial(_torch, backend=backend, has_float_mask=True), partial(_torch_grouped, backend=backend)
    return Rival(partial(_torch, backend=backend), ("torch",), others)


RIVALS: dict[str, Rival] = {
    OURS: Rival(_ours, ("fused_attn",)),
    **{name: Rival(partial(_ours, backend=backend), ("fused_attn",)) for name, backend in OUR_BACKENDS.items()},
    SKIPPING: Rival(_ours_without_padded_queries, ("fused_attn",), is_for=lambda case: case.is_padded),
    "torch": _backend_of_torch(None),
    "torch-flash": _backend_of_torch("FLASH_ATTENTION"),
    "torch-efficient": _backend_of_torch("EFFICIENT_ATTENTION"),
    "torch-cudnn": _backend_of_torch("CUDNN_ATTENTION"),
    "torch-causal-only": Rival(_torch_causal_only, ("torch",), is_for=lambda case: case.is_causal and case.is_padded),
    "torch-varlen": Rival(_torch_varlen, ("torch",), is_for=lambda case: case.is_packed),
    "flex": Rival(_flex, ("torch",)),
    **{f"flash_attn{n}": Rival(partial(_flash, generation=n), _packages_of(n)) for n in FLASH},
    **{
        f"flash_attn{n}-packed": Rival(partial(_flash_packed, generation=n), _packages_of(n), (), _is_padded)
        for n in (3, 4)
    },
    # torch-math is the last, because it needs the most memory: `timing.measure_those_that_can` drops the last one.
    "torch-math": _backend_of_torch("MATH"),
}


def reason(error: BaseException) -> str:
    """The text of an exception in one line, for a row."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return text if isinstance(error, Cannot) else f"{type(error).__name__}: {text}"


def version_of(name: str) -> dict[str, str | None]:
    """The fields "package" and "version" of a row. The version is None if no package is installed."""
    packages = RIVALS[name].packages
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return {"package": package, "version": importlib.metadata.version(package)}
    return {"package": packages[0], "version": None}
