"""Modes and tracers that record operators must see attention, and a mode around a call must not change its result."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode

from fused_attn import (
    FusedMultiheadAttention,
    Transformer,
    alibi_bias,
    fused_attention,
    fused_attention_varlen,
    t5_relative_bias,
)
from fused_attn.partial import attention_partial

pytestmark = pytest.mark.quick


def inputs(*shape: int, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_(**options) for _ in range(3)]


def test_jit_trace_records_attention():
    first, second = inputs(1, 2, 5, 8, requires_grad=False), inputs(1, 2, 5, 8, requires_grad=False)
    second = [x + 1 for x in second]
    traced = torch.jit.trace(fused_attention, first, check_trace=False)
    assert torch.equal(traced(*second), fused_attention(*second))


@pytest.mark.parametrize("window_size", [None, (3, 2)])
def test_a_lower_right_diagonal_in_a_trace_follows_the_lengths(window_size: tuple[int, int] | None):
    def call(x: torch.Tensor) -> torch.Tensor:
        is_causal = window_size is None
        return fused_attention(
            x[:, :, -2:], x, x, is_causal=is_causal, window_size=window_size, diagonal_alignment="lower_right"
        )

    call(torch.randn(1, 2, 5, 8))  # the plan of this call is not that of the trace
    traced = torch.jit.trace(call, torch.randn(1, 2, 5, 8))
    for length in (4, 9, 64):
        x = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(traced(x), call(x))


def test_a_trace_checks_the_columns_of_a_relative_bias():
    bias = torch.randn(2, 9)
    traced = torch.jit.trace(lambda x: fused_attention(x, x, x, relative_bias=bias), torch.randn(1, 2, 5, 8))
    with pytest.raises(RuntimeError, match=r"relative_bias: expected shape .* with 7 columns, got shape \(2, 9\)"):
        traced(torch.randn(1, 2, 4, 8))


def test_a_trace_makes_biases_of_its_own_lengths():
    """torch makes tensors of the lengths in a trace."""
    slopes, table = torch.rand(2), torch.randn(32, 2)

    def call(x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-2]
        bias = alibi_bias(slopes, length, length) + t5_relative_bias(table, length, length)
        return fused_attention(x, x, x, relative_bias=bias)

    traced = torch.jit.trace(call, torch.randn(1, 2, 5, 8))
    for length in (4, 9, 64, 0):
        x = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(traced(x), call(x))


@pytest.mark.parametrize("is_training", [True, False])
def test_jit_trace_checks_the_module(is_training: bool):
    """torch traces a second time without gradients, and compares the graphs."""

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = FusedMultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    module = Caller().train(is_training)
    traced = torch.jit.trace(module, (torch.randn(2, 10, 32),))
    x = torch.randn(3, 7, 32)
    torch.testing.assert_close(traced(x), module(x))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("is_training", [True, False])
def test_jit_trace_checks_layers(is_training: bool, norm_first: bool):
    """The check compares the names of values, too, which depend on every size that is read."""
    module = Transformer(32, 4, 2, 1, 64, dropout=0.0, norm_first=norm_first, batch_first=True).train(is_training)
    traced = torch.jit.trace(module, (torch.randn(2, 10, 32), torch.randn(2, 5, 32)))
    src, tgt = torch.randn(3, 7, 32), torch.randn(3, 9, 32)
    torch.testing.assert_close(traced(src, tgt), module(src, tgt))


def test_tensors_that_another_process_still_sends(backend: str):
    """`AsyncCollectiveTensor` waits for its contents in the first operator that reads it."""
    pending = AsyncCollectiveTensor
    leaves, mask, sinks = inputs(1, 2, 5, 8), torch.randn(1, 2, 5, 5), torch.randn(2)
    padding, dout = torch.tensor([[False] * 4 + [True]]), torch.randn(1, 2, 5, 8)
    results = []
    for wrap in (pending, torch.Tensor.clone):
        out = fused_attention(*leaves, wrap(mask), key_padding_mask=wrap(padding), sinks=wrap(sinks), backend=backend)
        _, vjp = torch.func.vjp(lambda x: fused_attention(x, x, x, backend=backend), leaves[0].detach())
        part, lse = attention_partial(wrap(leaves[0].detach()), *leaves[1:], backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, wrap(dout)), *vjp(wrap(dout)), part, lse])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(torch.as_tensor(found + 0), expected)


def test_make_fx_records_attention():
    first = inputs(1, 2, 5, 8, requires_grad=False)
    graph = make_fx(lambda q, k, v: fused_attention(q, k, v, is_causal=True))(*first)
    second = [x + 1 for x in first]
    assert torch.equal(graph(*second), fused_attention(*second, is_causal=True))


def varlen(query, key, value):
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return fused_attention_varlen(query, key, value, offsets, offsets, 3, 3)


def padded(query, key, value):
    """Attention with a float padding mask that is computed from the inputs."""
    hidden = value[:, 0, :, 0] > 0.5
    return fused_attention(
        query, key, value, key_padding_mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    )


TRACED = {
    "causal": lambda *args: fused_attention(*args, is_causal=True),
    "varlen": varlen,
    "padded": padded,
    "grad": torch.func.grad(lambda *args: fused_attention(*args).square().sum()),
    "vmap": torch.func.vmap(lambda *args: fused_attention(*args, backend="cpu")),
    "module": lambda query, key, value: MODULE(*(x.flatten(0, 1) for x in (query, key, value))),
}
MODULE = FusedMultiheadAttention(8, 2, batch_first=True)


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic", "pre_dispatch"])
def test_make_fx(name: str, mode: str):
    """The traced graph gives the right result for new inputs.

    If the tracer missed the kernel, out would be uninitialised.
    """
    if mode == "pre_dispatch" and name in ("grad", "vmap"):
        pytest.skip("torch raises AssertionError for operators that are not its own")
    options = {"pre_dispatch": True} if mode == "pre_dispatch" else {"tracing_mode": mode}
    first = inputs(1, 2, 5, 8, requires_grad=False)
    graph = make_fx(TRACED[name], _allow_non_fake_inputs=True, **options)(*first)
    second = [x + 1 for x in first]
    torch.testing.assert_close(graph(*second), TRACED[name](*second))


def test_make_fx_with_symbolic_sizes_serves_other_sizes():
    graph = make_fx(TRACED["causal"], tracing_mode="symbolic")(*inputs(1, 2, 5, 8, requires_grad=False))
    others = inputs(3, 2, 7, 8, requires_grad=False)
    assert torch.equal(graph(*others), TRACED["causal"](*others))


def test_make_fx_with_symbolic_sizes_traces_second_derivatives():
    def second(query, key, value):
        query = query.detach().requires_grad_()
        (grad,) = torch.autograd.grad(fused_attention(query, key, value).square().sum(), query, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), query)[0]

    args = inputs(1, 2, 5, 8, requires_grad=False)
    torch.testing.assert_close(make_fx(second, tracing_mode="symbolic")(*args)(*args), second(*args))


def test_a_function_mode_sees_the_functions():
    seen = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    args = inputs(1, 2, 5, 8)
    with Watching():
        out, packed = fused_attention(*args), varlen(*args)
    assert {fused_attention, fused_attention_varlen} <= set(seen)
    assert torch.equal(out, fused_attention(*args)) and torch.equal(packed, varlen(*args))


def test_a_subclass_stays_one():
    class Named(torch.Tensor):
        pass

    args = [x.detach().as_subclass(Named) for x in inputs(1, 2, 5, 8)]
    out = fused_attention(*args)
    assert type(out) is type(torch.nn.functional.scaled_dot_product_attention(*args)) is Named
    plain = [x.as_subclass(torch.Tensor) for x in args]
    assert torch.equal(out.as_subclass(torch.Tensor), fused_attention(*plain))
    assert type(fused_attention(*plain, causal_lower_right(5, 5))) is torch.Tensor


@pytest.mark.parametrize("name", ["varlen", "padded", "grad", "vmap"])
def test_fake_tensors_of(name: str):
    args = inputs(1, 2, 5, 8, requires_grad=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = TRACED[name](*(mode.from_tensor(x) for x in args))
    assert found.shape == TRACED[name](*args).shape


def test_fake_tensors():
    with FakeTensorMode() as mode:
        query, key, value = (mode.from_tensor(x) for x in inputs(1, 2, 5, 8, requires_grad=False))
        assert fused_attention(query, key, value).shape == (1, 2, 5, 8)


def test_parameters_are_plain_enough():
    query, key, value = (torch.nn.Parameter(x.detach()) for x in inputs(1, 2, 5, 8))
    grads = torch.autograd.grad(fused_attention(query, key, value).sum(), (query, key, value))
    expected = torch.autograd.grad(fused_attention(query, key, value, backend="reference").sum(), (query, key, value))
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right)


def test_default_device_is_not_the_tensors_device():
    query, key, value = inputs(1, 2, 5, 8)
    bias = torch.zeros(5, 5, requires_grad=True)
    expected = torch.autograd.grad(fused_attention(query, key, value, bias).sum(), (query, bias))
    torch.set_default_device("meta")
    try:
        actual = torch.autograd.grad(fused_attention(query, key, value, bias).sum(), (query, bias))
    finally:
        torch.set_default_device(None)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_meta_tensors_have_shapes():
    query, key, value = (x.to("meta") for x in inputs(1, 2, 5, 8))
    assert fused_attention(query, key, value).shape == (1, 2, 5, 8)


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8)], ids=str)
def test_backward_of_nothing(shape):
    leaves = inputs(*shape)
    fused_attention(*leaves).sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves)


def test_forward_of_nothing_transposed():
    empty = torch.randn(0, 4, 8, 5).transpose(-1, -2)
    assert fused_attention(empty, empty, empty).shape == (0, 4, 5, 8)


def test_causal_bias_of_another_size_is_refused():
    query, key, value = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    with pytest.raises(ValueError, match=r"attn_mask: expected a causal bias for .*\(1, 6\), got one for \(1, 5\)"):
        fused_attention(query, key, value, causal_lower_right(1, 5))


def test_half_precision_masks_are_not_added_in_half_precision():
    query, key, value = (x.half() for x in inputs(1, 1, 4, 16, requires_grad=False))
    large = torch.full((4, 4), 60000.0).half()
    out = fused_attention(query, key, value, large, key_padding_mask=torch.full((1, 4), 60000.0).half())
    assert out.isfinite().all()


def test_vmap_over_float_padding():
    x, padding = torch.randn(3, 2, 4, 8, 16), torch.zeros(3, 2, 8)
    padding[:, :, 5:] = float("-inf")

    def attention(x, padding):
        return fused_attention(x, x, x, key_padding_mask=padding)

    batched = torch.func.vmap(attention)(x, padding)
    torch.testing.assert_close(batched, torch.stack([attention(*pair) for pair in zip(x, padding, strict=True)]))


def test_checks_do_not_depend_on_earlier_calls():
    query, key, value = inputs(1, 2, 5, 8, requires_grad=False)
    fused_attention(query, key, value, is_causal=True)
    with pytest.raises(TypeError, match="is_causal: expected a bool, got int 1"):
        fused_attention(query, key, value, is_causal=1)
