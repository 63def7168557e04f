"""The native calls for linear layers give what torch's linear layers give, and are used for nothing else."""

from __future__ import annotations

import functools
import time

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
    native_linear,
)
from tests.nn.native_calls import count_calls

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the native extension is not built")

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets an entry with each native call. Small weights are multiplied natively, too."""
    monkeypatch.setattr(native_linear, "FEWEST_WEIGHTS", 0)
    return count_calls(monkeypatch, native_linear, "linear", "finish_rows")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 256), (16, 33)], ids=str)
@pytest.mark.parametrize("features", [1, 7, 40])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_equals_torch(shape, features, has_bias, dtype, native):
    torch.manual_seed(0)
    module = nn.Linear(shape[1], features, bias=has_bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    out = native_linear.call(module, x[:, None])
    assert native and out.shape == (shape[0], 1, features) and out.dtype == dtype
    expected = nn.functional.linear(x.double(), module.weight.double(), module.bias.double() if has_bias else None)
    assert (out[:, 0].double() - expected).abs().max() <= TOLERANCE[dtype] * (1.0 + expected.abs().max())


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(native):
    module, x = nn.Linear(70, 50), torch.randn(16, 70)
    rows = torch.cat([native_linear.call(module, row[None]) for row in x])
    assert torch.equal(rows, native_linear.call(module, x)) and len(native) == 17


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
    torch.testing.assert_close(native_linear.call(module, x), expected)
    assert not native


def test_tensors_of_another_kind_are_left_to_torch(native):
    weight, bias = torch.randn(4, 4), torch.randn(4)
    x = torch.randn(2, 4)
    native_linear.linear(x, weight, bias)
    with torch.no_grad():
        for other in (torch.randn(17, 4), torch.randn(4, 2).t(), torch.randn(0, 4), x.to("meta")):
            native_linear.linear(other, weight.to(other.device), bias.to(other.device))
        native_linear.linear(x, torch.randn(4, 4).t(), bias)
        native_linear.linear(x, weight, bias.as_subclass(Subclass))
        with torch.autocast("cpu", torch.bfloat16):
            assert native_linear.linear(x, weight, bias).dtype == torch.bfloat16
        assert not native
        with pytest.raises(RuntimeError):
            native_linear.linear(x.double(), weight, bias)
        native_linear.linear(x, weight, bias)
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
    for rows in (native_linear.MOST_ROWS, 2, native_linear.MOST_ROWS + 1):
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
            cpu._C.linear(*arguments[:3], False, None, None, None, 0.0, arguments[3], 1)
    for position, name, wrong in (
        (4, "residual", torch.randn(2, 4)),
        (5, "norm_weight", torch.randn(4)),
        (6, "norm_bias", torch.randn(3).double()),
        (8, "out", torch.empty(3, 2)),
    ):
        whole = [x, weight, bias, True, torch.randn(2, 3), torch.ones(3), None, 1e-5, out, 1]
        cpu._C.linear(*whole)
        whole[position] = wrong
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            cpu._C.linear(*whole)


# ---- Many rows: what follows a product of torch


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("features", [1, 7, 16, 40, 130])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_finish_rows(has_bias, relu, has_residual, has_norm, features, dtype):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 2, 9, features, dtype=dtype)
    bias, weight, norm_bias = torch.randn(3, features, dtype=dtype)
    before = x.clone()
    exact = x.double() + bias.double() if has_bias else x.double()
    exact = exact.relu() if relu else exact
    exact = exact + residual.double() if has_residual else exact
    if has_norm:
        exact = nn.functional.layer_norm(exact, (features,), weight.double(), norm_bias.double(), 0.1)
    norm = (weight, norm_bias, 0.1) if has_norm else (None, None, 0.0)
    arguments = bias if has_bias else None, relu, residual if has_residual else None, *norm
    out = torch.full_like(x, float("nan"))
    cpu._C.finish_rows(x, *arguments, out, 2)
    assert (out.double() - exact).abs().max() <= TOLERANCE[dtype] * (1.0 + exact.abs().max())
    assert torch.equal(x, before)
    cpu._C.finish_rows(x, *arguments, x, 1)
    assert torch.equal(x, out)


def test_relu_keeps_nan():
    x = torch.tensor([[float("nan"), -1.0, 2.0]])
    cpu._C.finish_rows(x, None, True, None, None, None, 0.0, x, 1)
    torch.testing.assert_close(x, torch.tensor([[float("nan"), 0.0, 2.0]]), equal_nan=True)


def test_errors_of_finish_rows():
    for position, name, wrong in (
        (0, "x", torch.randn(())),
        (0, "x", torch.ones(2, 3, dtype=torch.int64)),
        (0, "x", torch.randn(3, 2).t()),
        (1, "bias", torch.randn(2)),
        (3, "residual", torch.randn(2, 4)),
        (4, "norm_weight", torch.randn(4)),
        (5, "norm_bias", torch.randn(3).double()),
        (7, "out", torch.empty(3, 2)),
        (7, "out", torch.empty(3, 2).t()),
    ):
        whole = [torch.randn(2, 3), torch.randn(3), True, torch.randn(2, 3), torch.ones(3), None, 1e-5, None, 1]
        whole[7] = torch.empty(2, 3)
        cpu._C.finish_rows(*whole)
        whole[position] = wrong
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            cpu._C.finish_rows(*whole)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_many_rows(has_bias, dtype, native):
    """torch multiplies, and a native call does the rest."""
    torch.manual_seed(0)
    module = nn.Linear(24, 64, bias=has_bias, dtype=dtype)
    x, residual = torch.randn(2, 150, 24, dtype=dtype), torch.randn(2, 150, 64, dtype=dtype)
    native_linear.call(module, x)
    assert not native, "with nothing else to do, torch's own call is as fast"
    assert native_linear.native_call(module, x, takes_many=False) is None
    step = native_linear.native_call(module, x, takes_many=True, relu=True, residual=residual)
    module.weight.data = module.weight.data.clone().mul_(2)  # a parameter may change between two runs
    out = step.run()
    assert native == ["finish_rows"]
    bias = module.bias.double() if has_bias else None
    exact = nn.functional.linear(x.double(), module.weight.double(), bias).relu() + residual.double()
    assert (out.double() - exact).abs().max() <= TOLERANCE[dtype] * (1.0 + exact.abs().max())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_a_layer_of_many_rows(activation, norm_first, native):
    layer = TransformerEncoderLayer(
        32, 4, 64, activation=activation, norm_first=norm_first, batch_first=True, dtype=torch.float64
    ).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, mask = torch.randn(2, 50, 32, dtype=torch.float64), torch.randn(50, 50) > 1  # a mask no native call takes
    with torch.enable_grad():
        expected = layer(x, mask).detach()
    assert not native
    torch.testing.assert_close(layer(x, mask), expected)
    assert native == ["finish_rows"] * (2 if norm_first else 3)  # those of the feed-forward block, and a residual


@pytest.mark.parametrize("frozen", [None, "norm1", "linear2", "self_attn"])
def test_a_layer_of_many_rows_in_training(frozen):
    """A checkpoint computes the layer without gradients first. The bits are those of the call with gradients."""
    layer = TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    if frozen is not None:
        layer.get_submodule(frozen).eval()
    x = torch.randn(4, 300, 64)
    with torch.no_grad():
        out = layer(x)
    assert torch.equal(out, layer(x))


@torch.no_grad()
def test_parameters_of_other_shapes_are_left_to_torch():
    """torch broadcasts a bias of one row."""
    layer = TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    layer.linear1.bias = nn.Parameter(layer.linear1.bias[None])
    with torch.enable_grad():
        expected = layer(torch.ones(4, 300, 64))
    torch.testing.assert_close(layer(torch.ones(4, 300, 64)), expected)
    layer.norm2.weight = nn.Parameter(torch.ones(1, 64))
    with pytest.raises(RuntimeError, match="Expected weight to be of same shape"):  # torch's error
        layer(torch.ones(4, 300, 64))


# ---- Tiles of AMX


@pytest.fixture(params=["amx", "avx512_bf16"])
def isa(request: pytest.FixtureRequest):
    """Runs a test on two instruction sets, of which only AMX has tiles."""
    if request.param not in cpu._C.cpu_isas():
        pytest.skip(f"needs a processor with {request.param}")
    before = cpu._C.cpu_isa()
    cpu._C.select_cpu_isa(request.param)
    yield request.param
    cpu._C.select_cpu_isa(before)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 15, 16, 17, 32, 33, 100, native_linear.MOST_ROWS_OF_TILES])
@pytest.mark.parametrize(("features", "out_features"), [(32, 32), (64, 33), (96, 47), (256, 1000), (33, 64), (64, 31)])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_bfloat16_rows(rows, features, out_features, has_bias, isa, native):
    torch.manual_seed(0)
    module = nn.Linear(features, out_features, bias=has_bias, dtype=torch.bfloat16)
    x = torch.randn(rows, features, dtype=torch.bfloat16)
    out = native_linear.call(module, x)
    exact = nn.functional.linear(x.double(), module.weight.double(), module.bias.double() if has_bias else None)
    size = x.double().abs() @ module.weight.double().abs().t() + 1
    rounding = 2.0**-8 * exact.abs() + 2.0**-20 * size  # that of the output, and those of the sums in float32
    assert ((out.double() - exact).abs() <= rounding).all()
    has_tiles = isa == "amx" and features % 32 == 0 and out_features >= 32
    assert len(native) == (rows <= (native_linear.MOST_ROWS_OF_TILES if has_tiles else native_linear.MOST_ROWS))


@torch.no_grad()
def test_more_rows_than_tiles_are_worth_are_left_to_torch(isa, native):
    module = nn.Linear(64, 64, dtype=torch.bfloat16)
    native_linear.call(module, torch.randn(native_linear.MOST_ROWS_OF_TILES + 1, 64, dtype=torch.bfloat16))
    assert not native


@pytest.mark.skipif("amx" not in (cpu._C.cpu_isas() if cpu._C else ()), reason="needs a processor with AMX")
@torch.no_grad()
def test_a_row_of_tiles_does_not_depend_on_the_others(native):
    module, x = nn.Linear(64, 50, dtype=torch.bfloat16), torch.randn(70, 64, dtype=torch.bfloat16)
    whole = native_linear.call(module, x)
    for first, count in ((0, 3), (5, 16), (20, 33), (60, 10)):
        assert torch.equal(native_linear.call(module, x[first : first + count]), whole[first : first + count])
    assert len(native) == 5


@torch.no_grad()
def test_no_memory_behind_the_tensors_is_used(isa, native):
    """The tensors are views of larger ones, which hold NaN around them."""

    def inside(*shape: int) -> Tensor:
        whole = torch.full((shape[0] + 2, *shape[1:]), float("nan"), dtype=torch.bfloat16)
        return whole[1:-1].normal_()

    x, weight, bias, out = inside(19, 64), inside(47, 64), inside(47), inside(19, 47)
    expected = nn.functional.linear(x.float(), weight.float(), bias.float())
    cpu._C.linear(x, weight, bias, False, None, None, None, 0.0, out, 2)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    assert out._base[0].isnan().all() and out._base[-1].isnan().all()


# ---- Small weights


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_small_weights_of_float32_are_left_to_torch(dtype, monkeypatch):
    calls = count_calls(monkeypatch, native_linear, "linear")
    x = torch.randn(4, 256, dtype=dtype)
    native_linear.call(nn.Linear(256, 8, dtype=dtype), x)
    assert len(calls) == (dtype in (torch.float16, torch.bfloat16))
    native_linear.call(nn.Linear(256, native_linear.FEWEST_WEIGHTS // 256, dtype=dtype), x)
    assert calls


@pytest.mark.timing
@pytest.mark.skipif("amx" not in (cpu._C.cpu_isas() if cpu._C else ()), reason="needs a processor with AMX")
@torch.no_grad()
def test_tiles_are_much_faster_than_torch():
    """On one thread, because a noisy machine takes longer to wake threads than to multiply."""
    module, x = nn.Linear(256, 1024, dtype=torch.bfloat16), torch.randn(16, 256, dtype=torch.bfloat16)
    times: dict[str, list[float]] = {"torch": [], "native": []}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(200):
            for name, function in (("torch", module), ("native", functools.partial(native_linear.call, module))):
                start = time.perf_counter()
                function(x)
                times[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    assert min(times["native"]) * 1.3 < min(times["torch"])
