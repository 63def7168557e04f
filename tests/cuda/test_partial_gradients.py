"""Backward calls that want the gradients of some inputs only. These gradients must be those of the call that wants all,
bit for bit.

On Hopper, one kernel computes all gradients up to head dim 128, whatever is wanted. The calls go to the backend itself,
because no public function takes a dense mask beside packed sequences.
"""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import torch
from kernels import Kernels
from torch import Tensor

from fused_attn.attention.inputs import Inputs, Saved, Shapes, Wanted
from fused_attn.attention.problem import AttentionProblem, Scalars
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import workspace as cuda_workspace

HEADS, KV_HEADS = 2, 1
#: The lengths of sequences, or of batch entries, which are all equal.
LENGTHS = {False: ((150,), (270,)), True: ((150, 0, 70, 5), (270, 30, 140, 0))}
NAMES = ("query", "key", "value")
WANTED = [("query",), ("key",), ("value",), ("key", "value"), ("query", "value")]


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_packed: bool, watch: dict | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the oracle, for sequences one after another, or for batch entries."""
    outs, lses = [], []
    begin_q = begin_k = 0
    for n, (length_q, length_k) in enumerate(zip(*LENGTHS[is_packed], strict=True)):
        rows, columns = slice(begin_q, begin_q + length_q), slice(begin_k, begin_k + length_k)
        q, k, v = query[n], key[n], value[n]
        if is_packed:
            q, k, v = (x[part].transpose(0, 1) for x, part in ((query, rows), (key, columns), (value, columns)))
        out, lse = oracle.attention(
            q,
            k,
            v,
            None if mask is None else mask[n, :, :length_q, :length_k],
            is_causal=mask is None,
            enable_gqa=True,
            watch=watch,
        )
        outs.append(out)
        lses.append(lse)
        if is_packed:
            begin_q, begin_k = begin_q + length_q, begin_k + length_k
    if not is_packed:
        return torch.stack(outs), torch.stack(lses)
    return torch.cat(outs, dim=1).transpose(0, 1), torch.cat(lses, dim=1)


class Call:
    """A call with grouped heads; with a dense mask that leaves out whole blocks, or else with a causal mask."""

    def __init__(self, head_dim: int, dtype: torch.dtype, has_mask: bool, is_packed: bool, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(head_dim)
        lengths_q, lengths_k = LENGTHS[is_packed]
        total_q, total_k = sum(lengths_q), sum(lengths_k)

        def rows(heads: int, count: int) -> Tensor:
            shape = (count, heads) if is_packed else (len(lengths_q), heads, count)
            return torch.randn(*shape, head_dim, generator=generator).to(dtype)

        self.tensors: dict[str, Any] = {
            "query": rows(HEADS, total_q),
            "key": rows(KV_HEADS, total_k),
            "value": rows(KV_HEADS, total_k),
            "mask": None,
        }
        self.dout = rows(HEADS, total_q)
        if has_mask:
            mask = torch.rand(len(lengths_q), HEADS, max(lengths_q), max(lengths_k), generator=generator) < 0.8
            mask[:, 0, 64:128, 128:256] = False
            mask[:, 1, :64, :128] = False
            mask[:, 1, :, 256:] = True
            self.tensors["mask"] = mask
        offsets = {}
        if is_packed:
            offsets = {
                name: torch.tensor([0, *lengths]).cumsum(0).int()
                for name, lengths in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k))
            }
        self.is_packed = is_packed
        inputs = Inputs(*(self.tensors[name] for name in NAMES), mask=self.tensors["mask"], **offsets)
        self.inputs = Inputs(*(None if x is None else x.to(device) for x in inputs))
        shapes = Shapes(*(None if x is None else x.shape for x in self.inputs))
        scalars = Scalars(
            max(lengths_q), max(lengths_k), scale=oracle.query_scale(self.dout), **{} if has_mask else {"band_right": 0}
        )
        self.problem = AttentionProblem.of(shapes, dtype, self.inputs.query.device, scalars)

    @functools.cached_property
    def expected(self) -> oracle.Expected:
        tensors = {name: x for name, x in self.tensors.items() if x is not None}
        options = {"is_packed": self.is_packed} | ({} if "mask" in tensors else {"mask": None})
        return oracle.expected(attention, tensors, options, NAMES, self.dout, None)

    def forward(self) -> tuple[Tensor, Tensor]:
        out, lse, _ = cuda.forward(self.problem, self.inputs, needs_lse=True, needs_max=False)
        assert lse is not None
        return out, lse

    def gradients(self, out: Tensor, lse: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        saved = Saved(out, lse, dout=self.dout.to(out.device))
        grads = cuda.backward(self.problem, self.inputs, saved, Wanted(**dict.fromkeys(wanted, True)))
        return {name: grad for name, grad in zip(NAMES, grads, strict=False) if grad is not None}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("has_mask", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
@pytest.mark.usefixtures("poisoned")
def test_some_gradients_are_those_of_all(
    is_packed: bool, has_mask: bool, head_dim: int, dtype: torch.dtype, kernels: Kernels
) -> None:
    """In any order of threads, and on any number of multiprocessors."""
    call = Call(head_dim, dtype, has_mask, is_packed)
    with kernels.running(90):
        out, lse = call.forward()
        complete = call.gradients(out, lse, NAMES)
    oracle.assert_close(oracle.Result(out, lse, complete), call.expected)
    for seed, wanted in enumerate(WANTED, start=1):
        with kernels.running(90, seed, resident_blocks=(1, 2, 8)[seed % 3]):
            grads = call.gradients(out, lse, wanted)
            # Only the fused backward copies tiles by TMA: those of dq, which it adds to their sums.
            assert (kernels.statistics.tma_stores > 0) == ("query" in wanted)
        assert grads.keys() == set(wanted)
        for name, grad in grads.items():
            assert torch.equal(grad, complete[name]), f"{name} of {wanted}"


@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_no_memory_for_sums_that_nobody_wants(is_packed: bool, kernels: Kernels) -> None:
    call = Call(64, torch.float16, has_mask=True, is_packed=is_packed)
    with kernels.running(90):
        sizes = {
            wanted: cuda_workspace.workspace(call.problem, call.inputs, Wanted(**dict.fromkeys(wanted, True))).numel()
            for wanted in (NAMES, *WANTED)
        }
    assert sizes[NAMES] == sizes[("query",)] == sizes[("query", "value")]
    assert sizes[("key",)] == sizes[("value",)] == sizes[("key", "value")]
    sums_of_dq = call.tensors["query"].numel()
    assert sizes[NAMES] - sizes[("key",)] >= sums_of_dq
