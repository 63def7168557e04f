"""Allocates results, chooses grids and launches the kernels.

forward: one kernel, and a second one that merges splits if the keys are split
backward: one kernel for dq, one for dk and dv, and one for the gradient of each bias
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import JITFunction
from triton.compiler import CompiledKernel

from fused_attn.attention.inputs import SHARED, Gradients, Inputs, Results, Saved, Wanted, shape_of_lse
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends.base import clear_rows, gradient_of_row_bias, keys_in_band
from fused_attn.backends.triton import configs, decode, tuned
from fused_attn.backends.triton.arguments import (
    NO_MASKS,
    NO_MASKS_KIND,
    Masks,
    Rows,
    Settings,
    kind_of,
    kind_of_pointer,
)
from fused_attn.backends.triton.backward import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel
from fused_attn.backends.triton.bias_gradients import attention_bwd_dbias_kernel, attention_bwd_drelative_bias_kernel
from fused_attn.backends.triton.configs import Config
from fused_attn.backends.triton.decode import Merged, Splits, merge_splits_kernel
from fused_attn.backends.triton.forward import attention_fwd_kernel
from fused_attn.backends.triton.interpreter import is_interpreting

#: The largest number of entries in `Launch.compiled`. Without a limit, a program whose tensors have other strides at
#: every call would add entries without end.
MAX_COMPILED = 64

#: The bytes of keys and values of one L2 group. Slightly less than the L2 cache of an A100 (40 MB) or H100 (50 MB).
L2_BYTES = 32 * 2**20

#: Triton compiles a kernel anew, with a 64-bit argument, if an integer argument is at least this large.
WIDE = 2**31


class Launch(NamedTuple):
    """How a kernel is launched, computed once for each problem. It holds no tensors.

    grid: the number of programs along each axis
    constants: the last arguments of the kernel, which are compile-time constants
    options: Triton's options, such as num_warps
    compiled: the compiled kernel for each key of `_run`
    """

    grid: tuple[int, int, int]
    settings: Settings
    constants: dict[str, bool]
    options: dict[str, object]
    compiled: dict[tuple, CompiledKernel]


class Plan(NamedTuple):
    """The launches of all kernels for one problem. `dbias` is for attn_mask, `drelative_bias` for relative_bias."""

    heads_per_l2_group: int
    num_splits: int
    forward: Launch
    dq: Launch
    dkdv: Launch
    dbias: Launch
    drelative_bias: Launch


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool, needs_max: bool) -> Results:
    query, key, value = _readable(inputs.query, inputs.key, inputs.value)
    out = empty_like_layout(query, problem.value_dim)
    shape = shape_of_lse(query, problem.is_packed)
    heads, rows = shape[-2:]
    lse = query.new_empty(shape, dtype=torch.float32) if needs_lse else None
    row_max = query.new_empty(shape, dtype=torch.float32) if needs_max else None
    results = out, lse, row_max
    if problem.is_packed:
        clear_rows(out)
        clear_rows(lse, row_max, value=float("-inf"))
    if out.numel() == 0 and all(x is None or x.numel() == 0 for x in results):
        return results
    plan = _plan(problem, _is_biased(inputs), _allows_tf32(problem.dtype))
    masks, masks_kind = _masks(problem, inputs)
    kernel_out, kernel_lse, num_rows = out, lse, math.prod(shape)
    splits = None
    if plan.num_splits > 1:
        shape = (plan.num_splits * problem.batch, heads, rows)
        kernel_out = torch.empty((*shape, problem.value_dim), dtype=torch.float32, device=query.device)
        kernel_lse = torch.empty((2, *shape), dtype=torch.float32, device=query.device)
        splits = Splits(kernel_out, kernel_lse)
    is_packed = problem.is_packed
    q, o = Rows.of(query, is_packed), Rows.of(kernel_out, is_packed)
    k, v = (Rows.of_pages(x) if problem.is_paged else Rows.of(x, is_packed) for x in (key, value))
    with _on_device_of(query):
        _run(
            attention_fwd_kernel,
            plan.forward,
            (
                kind_of(q),
                kind_of(k),
                kind_of(v),
                kind_of(o),
                kind_of_pointer(kernel_lse),
                kind_of_pointer(row_max),
                masks_kind,
                rows >= WIDE,
                num_rows >= WIDE,
            ),
            q,
            k,
            v,
            o,
            kernel_lse,
            row_max,
            masks,
            plan.forward.settings,
            problem.seqlen_q,
            problem.seqlen_k,
            rows,
            problem.band.offset,
            plan.heads_per_l2_group,
            plan.num_splits,
            num_rows,
        )
        if splits is not None:
            merge_splits_kernel[(num_rows, 1, 1)](
                splits,
                Merged(Rows.of(out), lse, row_max),
                masks.sinks,
                plan.forward.settings,
                plan.num_splits,
                rows,
                num_rows,
            )
    return results


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    """The wanted gradients; see `Backend.backward`.

    The kernel for dq runs in any case, because it computes delta and the factor, which the other kernels read.
    """
    assert saved.out is not None and saved.dout is not None and saved.lse is not None, "backends get them"
    out, dout, query, key, value = _readable(saved.out, saved.dout, inputs.query, inputs.key, inputs.value)
    dlse = saved.dlse
    dquery = empty_like_layout(query, problem.head_dim) if wanted.query else None
    dkey = empty_like_layout(key, problem.head_dim) if wanted.key else None
    dvalue = empty_like_layout(value, problem.value_dim) if wanted.value else None
    if problem.is_packed:
        clear_rows(dquery, dkey, dvalue)
    if problem.has_key_lengths:
        clear_rows(dkey, dvalue)  # no program visits blocks of keys behind the length of their batch entry
    if query.numel() == 0 or key.numel() == 0:
        return _empty_gradients(inputs, wanted, Gradients(dquery, dkey, dvalue))

    plan = _plan(problem, _is_biased(inputs), _allows_tf32(problem.dtype))
    masks, masks_kind = _masks(problem, inputs)
    lse = saved.lse.contiguous()  # the LSE is an expanded view under some vmaps
    delta = torch.empty_like(lse)
    needs_factor = _is_biased(inputs) or inputs.relative_bias is not None or plan.dq.settings.IS_FLOAT32.value
    # The sum over the keys of a part says nothing about the rounding of the LSE, which is that of all keys.
    factor = (torch.ones_like if problem.is_part else torch.empty_like)(lse) if needs_factor else None
    factor_of_dq = None if problem.is_part else factor
    dsinks = None
    if wanted.sinks:
        dsinks = lse.new_empty((problem.batch, problem.num_heads, _num_blocks(plan.dq, problem)))
    q, k, v, o, dout_rows, dq, dk, dv = (
        Rows.of(x, problem.is_packed) for x in (query, key, value, out, dout, dquery, dkey, dvalue)
    )
    dlse = None if dlse is None else dlse.resolve_neg().contiguous()
    sizes = (problem.seqlen_q, problem.seqlen_k, lse.shape[-1], problem.band.offset)
    with _on_device_of(query):
        lse_kinds = (kind_of_pointer(lse), kind_of_pointer(delta), kind_of_pointer(factor), lse.shape[-1] >= WIDE)
        q_kind, k_kind, v_kind, dout_kind = kind_of(q), kind_of(k), kind_of(v), kind_of(dout_rows)
        shared = (q_kind, k_kind, v_kind, dout_kind, masks_kind, lse_kinds)
        _run(
            attention_bwd_dq_kernel,
            plan.dq,
            (shared, kind_of(o), kind_of(dq), *map(kind_of_pointer, (dlse, factor_of_dq, dsinks))),
            q,
            k,
            v,
            o,
            dout_rows,
            dq,
            lse,
            dlse,
            delta,
            factor_of_dq,
            dsinks,
            masks,
            plan.dq.settings,
            *sizes,
            plan.heads_per_l2_group,
        )
        if wanted.key or wanted.value:
            _run(
                attention_bwd_dkdv_kernel,
                plan.dkdv,
                (shared, kind_of(dk), kind_of(dv)),
                q,
                k,
                v,
                dout_rows,
                dk,
                dv,
                lse,
                delta,
                factor,
                masks,
                plan.dkdv.settings,
                *sizes,
                plan.heads_per_l2_group,
            )
        tensors = (q, k, v, dout_rows, lse, delta, factor)
        dbias = dkey_bias = drelative_bias = None
        if wanted.bias:
            assert inputs.bias is not None and factor is not None, "what is wanted is given"
            if inputs.bias.shape[3] == 1 < problem.seqlen_k and not problem.is_part:
                dbias = gradient_of_row_bias(inputs, lse, dlse, delta * factor)
            else:
                dense = inputs.bias.expand(-1, -1, -1, problem.seqlen_k)
                dbias = _dense_bias_gradient(problem, plan.dbias, dense, tensors, masks, sizes)
                dbias = dbias.sum_to_size(inputs.bias.shape).to(inputs.bias.dtype)
        if wanted.key_bias:
            assert inputs.key_bias is not None, "what is wanted is given"
            as_bias = inputs.key_bias[:, None, None, :]
            dkey_bias = _dense_bias_gradient(problem, plan.dbias, as_bias, tensors, masks, sizes)[:, 0, 0, :]
            dkey_bias = dkey_bias.to(inputs.key_bias.dtype)
        if wanted.relative_bias:
            drelative_bias = _relative_bias_gradient(problem, plan.drelative_bias, inputs, tensors, masks, sizes)
    if dsinks is not None:
        assert inputs.sinks is not None, "what is wanted is given"
        dsinks = dsinks.sum((0, 2)).to(inputs.sinks.dtype)
    return Gradients(dquery, dkey, dvalue, dbias, dkey_bias, drelative_bias, dsinks)


def _is_biased(inputs: Inputs) -> bool:
    """Whether the call has a bias of attn_mask or of the keys."""
    return inputs.bias is not None or inputs.key_bias is not None


def _dense_bias_gradient(problem, launch, bias, tensors, masks, sizes) -> Tensor:
    """The gradient of a bias (B|1, H|1, L|1, S), in its shape, float32.

    tensors, sizes: arguments that the kernels of both biases share; `backward` makes them
    """
    batch, heads, rows, columns = bias.shape
    row_blocks, column_blocks, _ = launch.grid
    sums_rows = rows == 1 < problem.seqlen_q
    shape = (batch, heads, row_blocks if sums_rows else rows, columns)
    dbias = torch.empty(shape, dtype=torch.float32, device=bias.device)
    attention_bwd_dbias_kernel[(row_blocks * column_blocks * heads * batch, 1, 1)](
        *tensors,
        dbias,
        masks,
        launch.settings,
        *sizes,
        problem.batch,
        SUMS_BATCHES=batch < problem.batch,
        SUMS_HEADS=heads < problem.num_heads,
        SUMS_ROWS=sums_rows,
        **launch.options,
    )
    return dbias.sum_to_size(bias.shape)


def _relative_bias_gradient(problem, launch, inputs, tensors, masks, sizes) -> Tensor:
    """The gradient of relative_bias: (H|1, L + S - 1), in the dtype of relative_bias.

    tensors, sizes: arguments that the kernels of both biases share; `backward` makes them
    """
    relative_bias = inputs.relative_bias
    block = launch.settings.BLOCK_N.value
    heads = problem.num_heads
    diagonals = launch.grid[0] // heads
    planes = torch.zeros((2, heads, (diagonals + 1) * block), dtype=torch.float32, device=relative_bias.device)
    attention_bwd_drelative_bias_kernel[launch.grid](
        *tensors,
        planes,
        masks,
        launch.settings,
        *sizes,
        problem.batch,
        **launch.options,
    )
    # Entry x of a plane is the sum for key - query = x - row_blocks * block. Column y of relative_bias is for
    # key - query = y - (L - 1). So column 0 is entry row_blocks * block - (L - 1).
    first = triton.cdiv(problem.seqlen_q, block) * block - (problem.seqlen_q - 1)
    drelative_bias = planes.sum(0)[:, first : first + relative_bias.shape[1]].sum_to_size(relative_bias.shape)
    # A copy even if the dtype is the same, because compiled code expects a contiguous gradient.
    return drelative_bias.to(relative_bias.dtype, copy=True, memory_format=torch.contiguous_format)


def _empty_gradients(inputs: Inputs, wanted: Wanted, grads: Gradients) -> Gradients:
    """The gradients of a call without queries or without keys: all of them are 0.

    grads: the allocated dq, dk and dv
    """
    shared = {name: torch.zeros_like(getattr(inputs, name)) for name in SHARED if getattr(wanted, name)}
    return Gradients(*(None if x is None else x.zero_() for x in grads))._replace(**shared)


@functools.lru_cache(maxsize=4096)
def _plan(problem: AttentionProblem, has_bias: bool, allows_tf32: bool) -> Plan:
    """The launches for a problem.

    has_bias: whether the call has a bias of attn_mask or of the keys. The tiles for both are the same, and with either,
        the scale must not be folded.
    """
    problem = replace(problem, has_bias=has_bias, allows_tf32=allows_tf32)
    seqlen_q, seqlen_k, heads, kv_heads = problem.seqlen_q, problem.seqlen_k, problem.num_heads, problem.num_kv_heads
    group_size = problem.group_size
    kv_bytes = seqlen_k * (problem.head_dim + problem.value_dim) * problem.dtype.itemsize
    fwd, dq, dkdv, bias = (tuned.choose(kernel, problem) for kernel in configs.KERNELS)

    # With few queries, a tile packs all heads of a head group, and several programs divide the keys among themselves.
    packs = group_size > 1 and seqlen_q < fwd.block_m
    rows, num_tile_heads = (seqlen_q * group_size, kv_heads) if packs else (seqlen_q, heads)
    programs = triton.cdiv(rows, fwd.block_m) * num_tile_heads * problem.batch
    num_splits = 1
    if not problem.is_packed and 0 < rows <= fwd.block_m:
        num_keys = keys_in_band(problem, seqlen_q)
        num_splits = problem.num_splits or decode.num_splits(programs, num_keys, _multiprocessors(problem.device))

    square = bias._replace(block_m=bias.block_n)
    diagonals = triton.cdiv(seqlen_q, square.block_m) + triton.cdiv(seqlen_k, square.block_n) - 1
    return Plan(
        max(1, L2_BYTES * group_size // max(kv_bytes, 1)),
        num_splits,
        _launch(problem, fwd, (programs, num_splits, 1), PACK_HEADS=packs, IS_SPLIT=num_splits > 1),
        _launch(problem, dq, (triton.cdiv(seqlen_q, dq.block_m) * heads * problem.batch, 1, 1)),
        _launch(problem, dkdv, (triton.cdiv(seqlen_k, dkdv.block_n) * kv_heads * problem.batch, 1, 1)),
        _launch(problem, bias, (triton.cdiv(seqlen_q, bias.block_m), triton.cdiv(seqlen_k, bias.block_n), 1)),
        _launch(problem, square, (diagonals * heads, 1, 1)),
    )


def _masks(problem: AttentionProblem, inputs: Inputs) -> tuple[Masks, tuple]:
    """The masks of a call, and their kind."""
    if problem.is_plain:
        return NO_MASKS, NO_MASKS_KIND
    masks = Masks.of(inputs)
    return masks, masks.kind


def _allows_tf32(dtype: torch.dtype) -> bool:
    """Whether torch's settings allow products of this dtype to be rounded to TF32."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _launch(problem: AttentionProblem, config: Config, grid: tuple[int, int, int], **constants: bool) -> Launch:
    """The `Launch` of a kernel whose last arguments are `constants`."""
    options: dict[str, object] = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Allows multiply-adds, such as score * unit - maximum in the argument of exp2.
        "enable_fp_fusion": True,
    }
    return Launch(grid, Settings.of(problem, config), constants, options, {})


def _run(kernel: JITFunction, launch: Launch, kinds: tuple, *arguments) -> None:
    """Runs kernel[launch.grid](*arguments, ...). From the second call on, the compiled kernel comes from `launch`.

    Triton itself would inspect every argument to find the compiled kernel, which takes several times as long as the
    rest of a call. The plan fixes most of the inspected properties. So the compiled kernel can be found by `kinds`, the
    properties that are left.

    Args:
        kinds: all properties that Triton compiles a kernel for and that can differ between two calls of one plan:
            `kind_of` of each tensor, and whether an integer is at least `WIDE`
    """
    # Triton compiles a kernel anew for a profiler that instruments it.
    key = (triton.knobs.compilation.instrumentation_mode, kinds)
    compiled = launch.compiled.get(key)
    if compiled is not None:
        compiled[launch.grid](*arguments, *launch.constants.values())
        return
    if len(launch.compiled) >= MAX_COMPILED:
        launch.compiled.clear()
    # In the interpreter, this launch returns None, because nothing is compiled. Then the next call gets here again.
    compiled = kernel[launch.grid](*arguments, **launch.constants, **launch.options)
    if hasattr(compiled, "result"):
        # Under `triton.AsyncCompileMode`, the launch returns a future, which cannot be launched by its grid. The launch
        # has waited for the kernel already.
        compiled = compiled.result()
    launch.compiled[key] = compiled


def _num_blocks(launch: Launch, problem: AttentionProblem) -> int:
    """The number of blocks of queries of one head, in a launch that has a program for each block of each head."""
    return launch.grid[0] // max(problem.batch * problem.num_heads, 1)


def _readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors as kernels can read them: with column stride 1, and without torch's lazy negation.

    Kernels get an address. The negation bit of a tensor, which says that its data is to be negated, would be lost.
    """
    return [x if x.stride(-1) == 1 and not x.is_neg() else _readable_copy(x) for x in tensors]


def _readable_copy(x: Tensor) -> Tensor:
    """See `_readable`. A tensor of one column needs no column stride of 1."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU."""
    if is_interpreting():
        return 4  # a number with which small tests split their keys
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["multiprocessor_count"]


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which Triton launches kernels on the GPU of x. It costs nothing if that is the current GPU."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
