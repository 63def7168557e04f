"""Dropout between the blocks of a layer: the native one drops the documented elements, and stands in for no other."""

from __future__ import annotations

import time

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fused_attn.attention import dropout
from fused_attn.backends import cpu
from fused_attn.nn import Seq2SeqTransformer, TransformerDecoderLayer, TransformerEncoderLayer, element_dropout
from tests.nn.native_calls import count_calls

_C = cpu._C
pytestmark = pytest.mark.skipif(_C is None, reason="the native extension is not built")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SEED = torch.tensor(0x299F31D0A4093822)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets an entry with each native call."""
    return count_calls(monkeypatch, element_dropout, "dropout", "relu_dropout_backward")


def run(x: Tensor, p: float, threads: int = 2) -> Tensor:
    out = torch.full_like(x, float("nan"))
    _C.dropout(x, out, SEED, p, False, threads)
    return out


def factors(seed: Tensor, p: float, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies a tensor of this shape by: 0, or 1 / (1 - p)."""
    return element_dropout.survivors(seed, p, shape).to(dtype) * dropout.scale(p)


# ---- The kernel


@pytest.mark.parametrize("isa", [] if _C is None else _C.cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 5, 64, 511, 512, 513, 8191, 100_003])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_the_kernel_multiplies_by_the_factors(isa, dtype, elements, p):
    before = _C.cpu_isa()
    _C.select_cpu_isa(isa)
    try:
        x = torch.randn(elements, generator=torch.Generator().manual_seed(0), dtype=dtype)
        one, two = run(x, p, threads=1), run(x, p, threads=2)
    finally:
        _C.select_cpu_isa(before)
    lanes = torch.float64 if dtype == torch.float64 else torch.float32
    expected = x.to(lanes) * factors(SEED, p, x.shape, lanes)
    assert torch.equal(one, expected.to(dtype)) and torch.equal(one, two)
    assert p < 1 or not one.any()


def test_the_factors_come_from_the_words_that_the_docstring_names():
    found = factors(SEED, 0.5, torch.Size([10, 100]), torch.float64).flatten()
    for e in (0, 1, 2, 127, 128, 511, 512, 999):
        words = oracle.philox4x32_7(np.array([e // 512, e // 2 % 64, 0, 0], dtype=np.uint32), int(SEED))
        number = int(words[e // 128 % 4]) >> 16 if e % 2 else int(words[e // 128 % 4]) & 0xFFFF
        assert found[e] == (2.0 if number >= dropout.threshold(0.5) else 0.0)


def test_every_element_is_dropped_as_often_as_the_others():
    p, calls = 0.2, 400
    kept = torch.zeros(1024)
    seed = torch.empty((), dtype=torch.int64)
    for i in range(calls):
        out = torch.empty(1024)
        _C.dropout(torch.ones(1024), out, seed.fill_(i), p, False, 1)
        kept += out != 0
    assert abs(kept.mean() / calls - (1 - p)) < 4 * (p * (1 - p) / (1024 * calls)) ** 0.5
    deviations = (kept / calls - (1 - p)) / (p * (1 - p) / calls) ** 0.5
    assert deviations.abs().max() < 5 and 0.9 < deviations.std() < 1.1


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_dropped_infinities_are_not_hidden(value):
    out = run(torch.full((1000,), value), 0.5)
    assert not out.isfinite().any() and out.isnan().sum() > 400


def test_denormal_numbers_survive():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((1000,), torch.finfo(dtype).smallest_normal / 4, dtype=dtype)
        assert set(run(x, 0.5).double().unique().tolist()) == {0.0, 2 * x[0].item()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(4, dtype=torch.int64)}, "x: expected float32, float64, float16 or bfloat16, got int64"),
        ({"x": torch.ones(4, 4).t()}, "x: expected a contiguous tensor"),
        ({"out": torch.ones(2, 2)}, r"out: expected shape \(4,\), got shape \(2, 2\)"),
        ({"out": torch.ones(5)}, r"out: expected shape \(4,\), got shape \(5,\)"),
        ({"out": torch.ones(4, dtype=torch.float64)}, "out: expected float32, got float64"),
        ({"seed": torch.tensor(1, dtype=torch.int32)}, "seed: expected int64, got int32"),
        ({"seed": torch.tensor([1])}, r"seed: expected shape \(\), got shape \(1,\)"),
        ({"seed": None}, "seed"),
        ({"p": 1.5}, "dropout_p: expected a probability, got 1.5"),
        ({"p": float("nan")}, "dropout_p: expected a probability"),
        ({"threads": 0}, "num_threads: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_of_the_kernel_are_named(arguments, message):
    given = {"x": torch.ones(4), "out": torch.ones(4), "seed": SEED, "p": 0.5, "relu": False, "threads": 1} | arguments
    if given["x"].shape != (4,):
        given["out"] = torch.ones(given["x"].shape)
    with pytest.raises((ValueError, TypeError), match=message):
        _C.dropout(*given.values())


# ---- Calls of a module


def reference(p: float, x: Tensor) -> Tensor:
    """What `element_dropout.call` computes next, in plain PyTorch."""
    return x * factors(dropout.draw_seed(x.device), p, x.shape, x.dtype)


LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 30, 40),
    "transposed": lambda: torch.randn(30, 4, 40).transpose(0, 1),
    "strided": lambda: torch.randn(4, 30, 80)[..., ::2],
    "expanded": lambda: torch.randn(30, 40).expand(4, 30, 40),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients(layout, native):
    module = nn.Dropout(0.3)
    x = LAYOUTS[layout]().requires_grad_()
    dout = LAYOUTS[layout]()
    torch.manual_seed(1)
    out = element_dropout.call(module, x)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert len(native) == 2  # forward and backward
    torch.manual_seed(1)
    expected = reference(0.3, x)
    assert torch.equal(out, expected) and torch.equal(dx, torch.autograd.grad(expected, x, dout)[0])
    assert not torch.equal(out, element_dropout.call(module, x))  # every call drops other elements


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_relu(layout, dtype, native):
    module = nn.Dropout(0.3)
    x = LAYOUTS[layout]().to(dtype).detach().requires_grad_()
    dout = LAYOUTS[layout]().to(dtype)
    torch.manual_seed(1)
    out = element_dropout.call_after_relu(module, x)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert native == ["dropout", "relu_dropout_backward"]
    torch.manual_seed(1)
    lanes = torch.float64 if dtype == torch.float64 else torch.float32
    kept = factors(dropout.draw_seed(x.device), 0.3, x.shape, lanes)
    assert torch.equal(out, (x.relu().to(lanes) * kept).to(dtype))
    assert torch.equal(dx, (dout.to(lanes) * kept * (x > 0)).to(dtype))


def test_after_relu_the_result_alone_is_kept(native):
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = element_dropout.call_after_relu(nn.Dropout(0.1), torch.randn(5000, requires_grad=True))
    assert [x.data_ptr() for x in kept] == [out.data_ptr()]


def test_nan_and_infinity_after_relu(native):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0, -1.0] * 500, requires_grad=True)
    torch.manual_seed(2)
    out = element_dropout.call_after_relu(nn.Dropout(0.5), x)
    torch.manual_seed(2)
    expected = reference(0.5, x.relu())
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.isfinite().all() and not dx.view(-1, 5)[:, [2, 4]].any()


def test_gradients_of_gradients_after_relu(native):
    x = torch.randn(1100, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    out = element_dropout.call_after_relu(nn.Dropout(0.4), x)
    (dx,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    torch.manual_seed(2)
    factors = reference(0.4, torch.ones_like(x))
    torch.testing.assert_close(second, 6 * x.relu() * factors**3)


def test_a_batch_of_gradients_after_relu():
    x = torch.randn(1100, requires_grad=True)
    out = element_dropout.call_after_relu(nn.Dropout(0.4), x)
    douts = torch.randn(3, 1100)
    (batched,) = torch.autograd.grad(out, x, douts, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, x, dout, retain_graph=True)[0] for dout in douts]
    torch.testing.assert_close(batched, torch.stack(each))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_extreme_probabilities_after_relu(p):
    x = torch.randn(1100, requires_grad=True)
    out = element_dropout.call_after_relu(nn.Dropout(p), x)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, x.relu() * (1 - p)) and torch.equal(dx, (x > 0) * (1 - p))


def test_other_calls_after_relu(native):
    x = torch.randn(2000)
    assert torch.equal(element_dropout.call_after_relu(nn.Dropout(0.3).eval(), x), x.relu())
    assert torch.equal(element_dropout.call_after_relu(hooked(nn.Dropout(0.0)), x), x.relu() + 1)
    assert torch.equal(element_dropout.call_after_relu(nn.Identity(), x), x.relu())
    assert not native


def test_errors_of_the_backward_after_relu():
    whole = [torch.ones(4), torch.ones(4), torch.ones(4), 0.5, 1]
    _C.relu_dropout_backward(*whole)
    for position, wrong, message in (
        (0, torch.ones(4, dtype=torch.int64), "x: expected float32, float64, float16 or bfloat16, got int64"),
        (1, torch.ones(5), r"out: expected shape \(4,\), got shape \(5,\)"),
        (2, torch.ones(2, 2), r"result: expected shape \(4,\), got shape \(2, 2\)"),
        (2, torch.ones(8)[::2], "result: expected a contiguous tensor"),
        (3, -0.1, "dropout_p: expected a probability"),
        (4, 0, "num_threads: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.relu_dropout_backward(*whole[:position], wrong, *whole[position + 1 :])


def test_no_gradient_no_graph(native):
    module = nn.Dropout(0.3)
    assert element_dropout.call(module, torch.randn(2000)).grad_fn is None
    with torch.no_grad():
        assert element_dropout.call(module, torch.randn(2000, requires_grad=True)).grad_fn is None
    assert len(native) == 2


def test_gradients_of_gradients(native):
    x = torch.randn(1100, dtype=torch.float64, requires_grad=True)

    def drop(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        return element_dropout.call(module, x)

    module = nn.Dropout(0.4)
    (dx,) = torch.autograd.grad(drop(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    torch.manual_seed(2)
    factors = reference(0.4, torch.ones_like(x))
    torch.testing.assert_close(second, 6 * x * factors**3)
    assert len(native) == 4  # two passes forward, of which the second is a backward, and their two backwards


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_of_gradients(dtype):
    x = torch.randn(1100, dtype=dtype, requires_grad=True)
    out = element_dropout.call(nn.Dropout(0.1), x)
    douts = torch.randn(3, 1100, dtype=dtype)
    (batched,) = torch.autograd.grad(out, x, douts, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, x, dout, retain_graph=True)[0] for dout in douts]
    torch.testing.assert_close(batched, torch.stack(each), rtol=0, atol=0)


def test_a_lazily_negated_gradient():
    x = torch.randn(1100, requires_grad=True)
    out = element_dropout.call(nn.Dropout(0.4), x)
    dout = torch.randn(1100)
    negated = torch.complex(torch.zeros(1100), -dout).conj().imag
    assert negated.is_neg()
    (dx,) = torch.autograd.grad(out, x, dout, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, x, negated)[0], dx)


def test_nothing_of_the_size_of_the_input_is_kept():
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        element_dropout.call(nn.Dropout(0.1), torch.randn(5000, requires_grad=True))
    assert [x.numel() for x in kept] == [1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_drop_the_same_elements(use_reentrant):
    layer = TransformerEncoderLayer(32, 4, 64, dropout=0.3, batch_first=True)
    x = torch.randn(2, 40, 32, requires_grad=True)
    found = []
    for run_layer in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        x.grad = None
        torch.manual_seed(3)
        run_layer(x).square().sum().backward()
        found.append(x.grad.clone())
    assert torch.equal(*found)


# ---- What runs as torch's own module


class OtherDropout(nn.Dropout):
    pass


class Subclass(Tensor):
    pass


def hooked(module: nn.Dropout) -> nn.Dropout:
    module.register_forward_hook(lambda module, arguments, out: out + 1)
    return module


def replaced(module: nn.Dropout) -> nn.Dropout:
    module.forward = lambda x: x + 1
    return module


OTHERS = {
    "eval": lambda: (nn.Dropout(0.3).eval(), torch.randn(2000)),
    "p is 0": lambda: (nn.Dropout(0.0), torch.randn(2000)),
    "in place": lambda: (nn.Dropout(0.3, inplace=True), torch.randn(2000)),
    "subclass of the module": lambda: (OtherDropout(0.3), torch.randn(2000)),
    "identity": lambda: (nn.Identity(), torch.randn(2000)),
    "hook": lambda: (hooked(nn.Dropout(0.3)), torch.randn(2000)),
    "its own forward": lambda: (replaced(nn.Dropout(0.3)), torch.randn(2000)),
    "few elements": lambda: (nn.Dropout(0.3), torch.randn(element_dropout.FEWEST_ELEMENTS - 1)),
    "no elements": lambda: (nn.Dropout(0.3), torch.randn(0, 4)),
    "tensor subclass": lambda: (nn.Dropout(0.3), torch.randn(2000).as_subclass(Subclass)),
    "nested": lambda: (nn.Dropout(0.3), torch.nested.nested_tensor([torch.randn(20, 60), torch.randn(30, 60)])),
    "sparse": lambda: (nn.Dropout(0.3), torch.randn(40, 50).to_sparse()),
    "negated": lambda: (nn.Dropout(0.3), torch.randn(2000, dtype=torch.complex64).conj().imag),
    "complex": lambda: (nn.Dropout(0.3), torch.randn(2000, dtype=torch.complex64)),
    "meta": lambda: (nn.Dropout(0.3), torch.empty(2000, device="meta")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_run_the_module_itself(name, native):
    def drop(call) -> Tensor:
        torch.manual_seed(4)
        return call(*OTHERS[name]())

    try:
        expected = drop(lambda module, x: module(x))
    except RuntimeError as error:  # torch cannot do this
        with pytest.raises(type(error)):
            drop(element_dropout.call)
    else:
        out = drop(element_dropout.call)
        assert type(out) is type(expected)
        if not (out.is_nested or out.is_sparse or out.is_meta):
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert not native


def test_a_probability_that_is_none_is_refused_as_torch_refuses_it(native):
    module = nn.Dropout(0.3)
    module.p = 1.5
    with pytest.raises(ValueError, match=r"dropout probability has to be between 0 and 1, but got 1\.5"):
        element_dropout.call(module, torch.randn(2000))
    assert not native


def test_transforms_and_modes_run_the_module_itself(native):
    module, x = nn.Dropout(0.3), torch.randn(2, 2000)
    torch.vmap(lambda x: element_dropout.call(module, x), randomness="different")(x)
    torch.func.grad(lambda x: element_dropout.call(module, x).sum())(x)
    torch.func.jvp(lambda x: element_dropout.call(module, x), (x,), (x,))
    with FakeTensorMode() as mode:
        assert element_dropout.call(module, mode.from_tensor(x)).shape == x.shape
    assert not native


def test_a_patch_of_the_class_is_called(native, monkeypatch):
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x + 1)
    x = torch.randn(2000)
    assert torch.equal(element_dropout.call(nn.Dropout(0.3), x), x + 1)
    assert torch.equal(element_dropout.call(nn.Dropout(0.3).eval(), x), x + 1)
    assert torch.equal(element_dropout.call_after_relu(nn.Dropout(0.3), x), x.relu() + 1)
    assert not native


def test_a_compiled_layer_has_no_graph_break():
    layer = TransformerEncoderLayer(32, 4, 64, dropout=0.3, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 40, 32)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# ---- Layers


def decoder_layer(**options) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = TransformerDecoderLayer(32, 4, 64, dropout=0.3, batch_first=True, dtype=torch.float64, **options)
    return layer, (torch.randn(2, 40, 32, dtype=torch.float64), torch.randn(2, 50, 32, dtype=torch.float64))


def encoder_layer(**options) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = TransformerEncoderLayer(32, 4, 64, dropout=0.3, batch_first=True, dtype=torch.float64, **options)
    return layer, (torch.randn(2, 40, 32, dtype=torch.float64),)


def seq2seq() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(5)
    model = Seq2SeqTransformer(50, 50, 32, 4, 1, 1, 64, dropout=0.3).double()
    return model, (torch.randint(3, 50, (2, 40)), torch.randint(3, 50, (2, 40)))


LAYERS = {
    "encoder": (encoder_layer, 3),
    "encoder, norm first, gelu": (lambda: encoder_layer(norm_first=True, activation=F.gelu), 3),
    "decoder": (decoder_layer, 4),
    "decoder, norm first": (lambda: decoder_layer(norm_first=True), 4),
    "seq2seq": (seq2seq, 2 + 3 + 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_apply_it_to_each_block(name, native, monkeypatch):
    make, count = LAYERS[name]
    layer, inputs = make()

    def losses_and_gradients() -> list[Tensor]:
        torch.manual_seed(6)
        loss = layer(*inputs).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)]

    found = losses_and_gradients()
    assert len(native) == 2 * count  # forward and backward
    monkeypatch.setattr(element_dropout, "call", lambda module, x: reference(module.p, x))
    monkeypatch.setattr(element_dropout, "call_after_relu", lambda module, x: reference(module.p, x.relu()))
    for mine, expected in zip(found, losses_and_gradients(), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_keeps_little_for_backward(norm_first):
    """12 numbers of each feature: x, query, key, value, the attention, and the input of each of the other modules."""
    features, tokens = 32, 80
    layer = TransformerEncoderLayer(features, 4, 4 * features, 0.1, batch_first=True, norm_first=norm_first)
    x = torch.randn(2, tokens // 2, features, requires_grad=True)
    kept: dict[int, Tensor] = {}
    parameters = {p.data_ptr() for p in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
    ):
        layer(x)
    sizes = [x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in parameters]
    large = sum(size for size in sizes if size >= tokens * features * 4)
    assert large == 12 * tokens * features * 4


def test_the_blocks_of_a_layer_can_be_replaced():
    class Doubled(TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return 2 * super()._ff_block(x)

    torch.manual_seed(7)
    layer = Doubled(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    x = torch.randn(2, 40, 32)
    attended = x + layer._sa_block(layer.norm1(x), None, None)
    hidden = layer.linear2(F.relu(layer.linear1(layer.norm2(attended))))
    torch.testing.assert_close(layer(x), attended + 2 * hidden)


@pytest.mark.timing
def test_it_is_much_faster_than_torch():
    module, x = nn.Dropout(0.1), torch.randn(1 << 20)
    times: dict[str, list[float]] = {"torch": [], "native": []}
    for _ in range(7):
        for name, function in (("torch", module), ("native", lambda x: element_dropout.call(module, x))):
            start = time.perf_counter()
            function(x)
            times[name].append(time.perf_counter() - start)
    assert min(times["native"]) * 3 < min(times["torch"])


@pytest.mark.parametrize("change", ["hook", "module"])
def test_a_linear_layer_may_overwrite_its_input(change):
    """After relu and dropout, backward needs the result, so nothing may overwrite it."""
    layer = TransformerEncoderLayer(64, 4, 256, dropout=0.2, batch_first=True)
    if change == "hook":
        layer.linear2.register_forward_pre_hook(lambda module, inputs: (inputs[0].mul_(2),))
    else:
        layer.linear2 = nn.Sequential(nn.Hardtanh(inplace=True), layer.linear2)
    layer(torch.randn(2, 8, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_result_that_hooks_have_stored_in_another_order():
    x = torch.randn(40, 50, requires_grad=True)
    strided = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.t().contiguous().t())
    torch.manual_seed(0)
    with strided:
        element_dropout.call_after_relu(nn.Dropout(0.3), x).sum().backward()
    found, x.grad = x.grad, None
    torch.manual_seed(0)
    element_dropout.call_after_relu(nn.Dropout(0.3), x).sum().backward()
    assert torch.equal(found, x.grad)
