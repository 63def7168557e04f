"""Calls of the registered operators, and a check of the memory layout of what they return."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fused_attn.attention.inputs import Gradients, Inputs, take
from fused_attn.attention.problem import Scalars

#: The names of `operator_calls`.
CALLS = ("plain", "blhd", "no-grad", "everything", "bias-only", "packed")


def operator_calls(
    backend: str, generator: torch.Generator, dtype: torch.dtype = torch.float32, value_dim: int = 6
) -> dict[str, tuple]:
    """Calls of ``torch.ops.fused_attn.attention``: the positional arguments by the name of a case.

    dtype: of query, key, value and bias. The other tensors are float32.
    """

    def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]

    query, key, value = tensors((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, value_dim), dtype=dtype)
    seed = torch.tensor(3)
    sinks, key_bias, relative = tensors((4,), (2, 7), (4, 11))
    (bias,) = tensors((1, 4, 1, 7), dtype=dtype)
    mask = torch.rand(2, 1, 5, 7, generator=generator) < 0.7
    ranges = torch.randint(0, 8, (1, 4, 5, 2, 2), generator=generator).int()
    padding = torch.arange(7).expand(2, 7) < torch.tensor([[7], [4]])
    packed_q, packed_k, packed_v = tensors((9, 2, 8), (8, 2, 8), (8, 2, 8), dtype=dtype)
    offsets_q, offsets_k = torch.tensor([0, 4, 9]).int(), torch.tensor([0, 5, 8]).int()
    blhd = tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key, value))
    detached = (query.detach(), key.detach(), value.detach())
    everything = Inputs(
        query, key, value, bias, key_bias, relative, sinks, seed, mask, ranges, padding, torch.tensor([7, 6]).int()
    )
    packed = Inputs(packed_q, packed_k, packed_v, cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k)
    plain, causal = Scalars(5, 7, 0.3), Scalars(5, 7, 0.3, band_right=0)
    of_all = Scalars(
        5, 7, 0.3, 2.0, 0.3, 4, 3, 0, True, 2, dropout_batch=1, dropout_head=2, dropout_query=3, dropout_key=8
    )
    return {
        "plain": (*Inputs(query, key, value), *plain, backend, False),
        "blhd": (*Inputs(*blhd), *plain, backend, True),
        "no-grad": (*Inputs(*detached), *causal, backend, False),
        "everything": (*everything, *of_all, backend, True),
        "bias-only": (*Inputs(*detached, bias=bias), *plain, backend, False),
        "packed": (*packed, *Scalars(5, 5, 0.3, band_right=0), backend, True),
    }


def backward_call(args: tuple, has_dlse: bool) -> tuple:
    """The arguments of ``torch.ops.fused_attn.attention_backward`` for all gradients of a call of `operator_calls`."""
    with torch.no_grad():
        out, lse, _ = torch.ops.fused_attn.attention(*args)
    dout = torch.ones_like(out)
    dlse = torch.ones_like(lse) if has_dlse else None
    inputs, others = take(Inputs, args)
    wanted = [x is not None for x in inputs[: len(Gradients._fields)]]
    inputs = (x if x is None else x.detach() for x in inputs)
    return (*inputs, out, lse, dout, dlse, wanted, *others[:-1])


def check_layouts(args: tuple) -> None:
    """The results and the gradients of a call have the shapes, strides and offsets that torch.compile reckons with.

    opcheck compares strides on CUDA devices only.
    """
    with torch.no_grad():
        for operator, own in (
            (torch.ops.fused_attn.attention, args),
            (torch.ops.fused_attn.attention_backward, backward_call(args, has_dlse=True)),
        ):
            with FakeTensorMode() as fake:
                expected = operator(*pytree.tree_map_only(Tensor, fake.from_tensor, own))
            for found, x in zip(operator(*own), expected, strict=True):
                assert layout_of(found) == layout_of(x)


def layout_of(x: Tensor) -> tuple:
    """The shape, the dtype, the offset, and the strides of x. No address depends on the stride of a dimension of 1."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, x.storage_offset(), strides if x.numel() else []
