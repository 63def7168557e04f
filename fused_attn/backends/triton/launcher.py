"""Allocates, chooses grids and launches. One launch for forward (two where keys are split), at least two for backward."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fused_attn.backends.base import Gradients, Wanted, empty_like_layout
from fused_attn.backends.triton import configs, decode
from fused_attn.backends.triton.arguments import NO_MASKS, Masks, Rows, Settings
from fused_attn.backends.triton.backend import is_interpreting
from fused_attn.backends.triton.backward import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel
from fused_attn.backends.triton.bias_gradients import attention_bwd_dbias_kernel, attention_bwd_dtable_kernel
from fused_attn.backends.triton.configs import Config
from fused_attn.backends.triton.decode import merge_splits_kernel
from fused_attn.backends.triton.forward import attention_fwd_kernel
from fused_attn.masks import MaskSpec
from fused_attn.problem import AttentionProblem

#: Keys and values of the heads that run side by side are to stay in the L2 cache: a little below the 40 MB of an A100
#: and the 50 MB of an H100.
L2_BYTES = 32 * 2**20


class Launch(NamedTuple):
    """What a kernel needs besides tensors, worked out once per problem.

    grid: number of programs along each axis
    options: compile-time arguments, with Triton's own
    """

    grid: tuple[int, int, int]
    options: dict[str, object]


class Plan(NamedTuple):
    settings: Settings
    units_per_section: int
    forward: Launch
    num_splits: int
    dq: Launch
    dkdv: Launch
    bias: Config


def forward(
    problem: AttentionProblem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    mask: MaskSpec,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    query, key, value = _readable(query, key, value)
    out = empty_like_layout(query, problem.value_dim)
    batch, heads, rows, _ = query.shape
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=query.device) if needs_lse else None
    if out.numel() == 0 and (lse is None or lse.numel() == 0):
        return out, lse
    plan = _plan(problem)
    masks = NO_MASKS if problem.is_plain else Masks.of(sinks, seed, mask)
    kernel_out, kernel_lse, num_rows = out, lse, batch * heads * rows
    if plan.num_splits > 1:
        shape = (plan.num_splits * batch, heads, rows)
        kernel_out = torch.empty((*shape, problem.value_dim), dtype=torch.float32, device=query.device)
        kernel_lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    with _on_device_of(query):
        attention_fwd_kernel[plan.forward.grid](
            Rows.of(query, problem.is_packed),
            Rows.of(key, problem.is_packed),
            Rows.of(value, problem.is_packed),
            Rows.of(kernel_out, problem.is_packed),
            kernel_lse,
            masks,
            plan.settings,
            problem.seqlen_q,
            problem.seqlen_k,
            rows,
            problem.band.offset,
            plan.units_per_section,
            plan.num_splits,
            num_rows,
            **plan.forward.options,
        )
        if plan.num_splits > 1:
            block_m = 16
            merge_splits_kernel[(triton.cdiv(num_rows, block_m), 1, 1)](
                kernel_out,
                kernel_lse,
                Rows.of(out),
                lse,
                masks.sinks,
                heads,
                plan.num_splits,
                rows,
                num_rows,
                VALUE_DIM=problem.value_dim,
                BLOCK_DV=configs.padded_head_dim(problem.value_dim),
                BLOCK_M=block_m,
            )
    return out, lse


def backward(
    problem: AttentionProblem,
    wanted: Wanted,
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    mask: MaskSpec,
) -> Gradients:
    dout, query, key, value = _readable(dout, query, key, value)
    wants_query, wants_key, wants_value, wants_bias, wants_relative_bias, wants_sinks = wanted
    plan = _plan(problem)
    masks = NO_MASKS if problem.is_plain else Masks.of(sinks, seed, mask)
    accumulate = {"dtype": torch.float32, "device": query.device}
    dquery = empty_like_layout(query, problem.head_dim) if wants_query else None
    dkey = empty_like_layout(key, problem.head_dim) if wants_key else None
    dvalue = empty_like_layout(value, problem.value_dim) if wants_value else None
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return _empty_gradients(wanted, dquery, dkey, dvalue, mask, sinks)

    delta = torch.empty(lse.shape, **accumulate)
    dsinks = None
    if wants_sinks:
        dsinks = torch.empty((problem.batch, problem.num_heads, _num_blocks(plan.dq, problem)), **accumulate)
    q, k, v, grad = (Rows.of(x, problem.is_packed) for x in (query, key, value, dout))
    sizes = (problem.seqlen_q, problem.seqlen_k, lse.shape[2], problem.band.offset)
    with _on_device_of(query):
        attention_bwd_dq_kernel[plan.dq.grid](
            q,
            k,
            v,
            Rows.of(out, problem.is_packed),
            grad,
            Rows.of(dquery, problem.is_packed),
            lse,
            None if dlse is None else dlse.resolve_neg().contiguous(),
            delta,
            dsinks,
            masks,
            plan.settings,
            *sizes,
            plan.units_per_section,
            **plan.dq.options,
        )
        if wants_key or wants_value:
            attention_bwd_dkdv_kernel[plan.dkdv.grid](
                q,
                k,
                v,
                grad,
                Rows.of(dkey, problem.is_packed),
                Rows.of(dvalue, problem.is_packed),
                lse,
                delta,
                masks,
                plan.settings,
                *sizes,
                plan.units_per_section,
                **plan.dkdv.options,
            )
        shared = (q, k, v, grad, lse, delta)
        dbias = _dense_bias_gradient(problem, plan, mask.bias, shared, masks, sizes) if wants_bias else None
        dtable = (
            _table_gradient(problem, plan, mask.relative_bias, shared, masks, sizes) if wants_relative_bias else None
        )
    return Gradients(
        dquery, dkey, dvalue, dbias, dtable, None if dsinks is None else dsinks.sum((0, 2)).to(sinks.dtype)
    )


def _dense_bias_gradient(problem, plan, bias, shared, masks, sizes) -> Tensor:
    """(B|1, H|1, L|1, S|1), of the bias's dtype."""
    batch, heads, rows, columns = bias.shape
    config = plan.bias
    row_blocks, column_blocks = (
        triton.cdiv(problem.seqlen_q, config.block_m),
        triton.cdiv(problem.seqlen_k, config.block_n),
    )
    sums_rows, sums_columns = rows == 1 < problem.seqlen_q, columns == 1 < problem.seqlen_k
    dbias = torch.empty(
        (batch, heads, row_blocks if sums_rows else rows, column_blocks if sums_columns else columns),
        dtype=torch.float32,
        device=bias.device,
    )
    attention_bwd_dbias_kernel[(row_blocks * column_blocks, heads, batch)](
        *shared,
        dbias,
        masks,
        plan.settings,
        *sizes,
        problem.batch,
        SUMS_BATCHES=batch < problem.batch,
        SUMS_HEADS=heads < problem.num_heads,
        SUMS_ROWS=sums_rows,
        SUMS_COLUMNS=sums_columns,
        **_options(problem, config),
    )
    return dbias.sum_to_size(bias.shape).to(bias.dtype)


def _table_gradient(problem, plan, table, shared, masks, sizes) -> Tensor:
    """(H|1, L + S - 1), of the table's dtype."""
    block = plan.bias.block_n
    row_blocks, column_blocks = triton.cdiv(problem.seqlen_q, block), triton.cdiv(problem.seqlen_k, block)
    diagonals = row_blocks + column_blocks - 1
    planes = torch.zeros((2, problem.num_heads, (diagonals + 1) * block), dtype=torch.float32, device=table.device)
    options = _options(problem, plan.bias)
    del options["BLOCK_M"], options["BLOCK_N"]
    attention_bwd_dtable_kernel[(diagonals, problem.num_heads, 1)](
        *shared, planes, masks, plan.settings, *sizes, problem.batch, BLOCK=block, **options
    )
    first = row_blocks * block - (problem.seqlen_q - 1)
    dtable = planes.sum(0)[:, first : first + table.shape[1]]
    return dtable.sum_to_size(table.shape).to(table.dtype)


def _empty_gradients(wanted, dquery, dkey, dvalue, mask, sinks) -> Gradients:
    """Without any score, or any column to score, every gradient is 0."""

    def zeros(is_wanted, like):
        return torch.zeros_like(like) if is_wanted else None

    return Gradients(
        *(None if x is None else x.zero_() for x in (dquery, dkey, dvalue)),
        zeros(wanted.bias, mask.bias),
        zeros(wanted.relative_bias, mask.relative_bias),
        zeros(wanted.sinks, sinks),
    )


@functools.lru_cache(maxsize=4096)
def _plan(problem: AttentionProblem) -> Plan:
    settings = Settings.of(problem)
    kv_bytes = problem.seqlen_k * (problem.head_dim + problem.value_dim) * problem.dtype.itemsize
    units_per_section = max(1, L2_BYTES * settings.group_size // max(kv_bytes, 1))
    fwd, dq, dkdv, bias = (configs.choose(kernel, problem) for kernel in configs.KERNELS)

    # Few queries: all heads of a group share a tile, and several programs the keys of a head.
    packs = settings.group_size > 1 and problem.seqlen_q < fwd.block_m
    rows, units = problem.seqlen_q, problem.num_heads
    if packs:
        rows, units = rows * settings.group_size, problem.num_kv_heads
    programs = triton.cdiv(rows, fwd.block_m) * units * problem.batch
    num_splits = 1
    if not problem.is_packed and rows <= fwd.block_m:
        num_splits = decode.num_splits(max(programs, 1), problem.seqlen_k, _multiprocessors(problem.device))
    dq_programs = triton.cdiv(problem.seqlen_q, dq.block_m) * problem.num_heads * problem.batch
    dkdv_programs = triton.cdiv(problem.seqlen_k, dkdv.block_n) * problem.num_kv_heads * problem.batch
    return Plan(
        settings,
        units_per_section,
        Launch((programs, num_splits, 1), {**_options(problem, fwd), "PACK_HEADS": packs, "IS_SPLIT": num_splits > 1}),
        num_splits,
        Launch((dq_programs, 1, 1), _options(problem, dq)),
        Launch((dkdv_programs, 1, 1), _options(problem, dkdv)),
        bias,
    )


def _options(problem: AttentionProblem, config: Config) -> dict[str, object]:
    return {
        "HEAD_DIM": problem.head_dim,
        "VALUE_DIM": problem.value_dim,
        "BLOCK_D": configs.padded_head_dim(problem.head_dim),
        "BLOCK_DV": configs.padded_head_dim(problem.value_dim),
        "PRECISION": "ieee",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # exp2(score * unit - maximum) is meant to be one multiply-add.
        "enable_fp_fusion": True,
    }


def _num_blocks(launch: Launch, problem: AttentionProblem) -> int:
    return launch.grid[0] // (problem.batch * problem.num_heads)


def _readable(*tensors: Tensor) -> list[Tensor]:
    """Kernels see the data alone: no lazy negation, and columns next to each other."""
    tensors = [x.resolve_neg() for x in tensors]
    return [x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in tensors]


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter has none; enough to split the keys of small cases
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    if is_interpreting() or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
