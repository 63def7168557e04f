"""The native product for few rows gives what torch's linear layers give, and is used for nothing else."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fused_attn.backends import cpu
from fused_attn.nn import (
    FusedMultiheadAttention,
    Transformer,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    few_rows,
)
from tests.nn.native_calls import count_calls

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the native extension is not built")

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets an entry with each native product. Small weights are multiplied natively, too."""
    monkeypatch.setattr(few_rows, "FEWEST_WEIGHTS", 0)
    return count_calls(monkeypatch, few_rows, "linear")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 256), (16, 33)], ids=str)
@pytest.mark.parametrize("features", [1, 7, 40])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_equals_torch(shape, features, has_bias, dtype, native):
    torch.manual_seed(0)
    module = nn.Linear(shape[1], features, bias=has_bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    out = few_rows.call(module, x[:, None])
    assert native and out.shape == (shape[0], 1, features) and out.dtype == dtype
    expected = nn.functional.linear(x.double(), module.weight.double(), module.bias.double() if has_bias else None)
    assert (out[:, 0].double() - expected).abs().max() <= TOLERANCE[dtype] * (1.0 + expected.abs().max())


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(native):
    module, x = nn.Linear(70, 50), torch.randn(16, 70)
    rows = torch.cat([few_rows.call(module, row[None]) for row in x])
    assert torch.equal(rows, few_rows.call(module, x)) and len(native) == 17


class Subclass(Tensor):
    pass


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(module):
    module.register_forward_hook(lambda each, inputs, out: 2 * out)


def replaced(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change", [hooked, replaced, None], ids=["hook", "forward", "subclass"])
@torch.no_grad()
def test_modules_of_another_kind_are_called(change, native):
    module = nn.Linear(4, 4) if change else Doubled(4, 4)
    x = torch.randn(2, 4)
    expected = 2 * nn.functional.linear(x, module.weight, module.bias)
    if change:
        change(module)
    torch.testing.assert_close(few_rows.call(module, x), expected)
    assert not native


def test_tensors_of_another_kind_are_left_to_torch(native):
    weight, bias = torch.randn(4, 4), torch.randn(4)
    x = torch.randn(2, 4)
    few_rows.linear(x, weight, bias)
    with torch.no_grad():
        for other in (torch.randn(17, 4), torch.randn(4, 2).t(), torch.randn(0, 4), x.to("meta")):
            few_rows.linear(other, weight.to(other.device), bias.to(other.device))
        few_rows.linear(x, torch.randn(4, 4).t(), bias)
        few_rows.linear(x, weight, bias.as_subclass(Subclass))
        with torch.autocast("cpu", torch.bfloat16):
            assert few_rows.linear(x, weight, bias).dtype == torch.bfloat16
        assert not native
        with pytest.raises(RuntimeError):
            few_rows.linear(x.double(), weight, bias)
        few_rows.linear(x, weight, bias)
    assert len(native) == 1


OPTIONS = {"dim_feedforward": 12, "batch_first": True}
COMPILED = {
    "packed weights": (FusedMultiheadAttention(8, 2, batch_first=True), lambda each, x: each(x, x, x)[0]),
    "separate weights": (
        FusedMultiheadAttention(8, 2, kdim=8, vdim=6, batch_first=True),
        lambda each, x: each(x, x, x[..., :6], need_weights=False)[0],
    ),
    "memory": (
        FusedMultiheadAttention(8, 2, batch_first=True),
        lambda each, x: (lambda memory: each(x, memory, memory, need_weights=False)[0])(2 * x),
    ),
    "encoder layer": (TransformerEncoderLayer(8, 2, **OPTIONS), lambda each, x: each(x)),
    "decoder layer": (TransformerDecoderLayer(8, 2, **OPTIONS), lambda each, x: each(x, x)),
    "transformer": (Transformer(8, 2, 1, 1, **OPTIONS), lambda each, x: each(x, x)),
}


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_torch_compile_makes_one_graph_for_any_number_of_rows(name, native):
    module, function = COMPILED[name]
    module.eval()
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(functools.partial(function, module), fullgraph=True, backend=graphs, dynamic=True)
    for rows in (few_rows.MOST_ROWS, 2, few_rows.MOST_ROWS + 1):
        x = torch.randn(1, rows, 8)
        out = compiled(x)
        assert not native
        torch.testing.assert_close(out, function(module, x))
        native.clear()
    assert graphs.frame_count == 1
    compiled(torch.randn(1, 1, 8))  # torch compiles a size of 1 anew, also in one graph
    assert graphs.frame_count == 2 and not native


def test_errors_of_the_native_call():
    x, weight, bias = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)
    out = torch.empty(2, 3)
    for arguments, message in (
        ((x[0, 0], weight, bias, out), "x: expected at least 1 dimension, got 0"),
        ((x[0], weight, bias, out), r"out: expected shape \(3,\), got shape \(2, 3\)"),
        ((x, weight, bias, out.double()), "out: expected float32, got float64"),
        ((x, weight, bias[:2], out), r"bias: expected shape \(3,\), got shape \(2,\)"),
        ((x, weight[:, :3], bias, out), r"weight: expected shape \(3, 4\), got shape \(3, 3\)"),
        ((x, weight.t().contiguous().t(), bias, out), "weight: expected a contiguous tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu._C.linear(*arguments[:3], None, None, None, 0.0, arguments[3], 1)
    for position, name, wrong in (
        (3, "residual", torch.randn(2, 4)),
        (4, "norm_weight", torch.randn(4)),
        (5, "norm_bias", torch.randn(3).double()),
        (7, "out", torch.empty(3, 2)),
    ):
        whole = [x, weight, bias, torch.randn(2, 3), torch.ones(3), None, 1e-5, out, 1]
        cpu._C.linear(*whole)
        whole[position] = wrong
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            cpu._C.linear(*whole)
