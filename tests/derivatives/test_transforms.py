"""`fused_attention` works under PyTorch's transforms: compile, export, functorch, autocast, checkpoint, copies."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable

import cases
import pytest
import torch
from cases import CASES, Case
from conftest import poison
from operator_calls import CALLS, backward_call, check_layouts, operator_calls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fused_attn
from fused_attn.derivatives import transforms

CASE = {case.id: case for case in CASES}


def tensors(generator, *shapes, dtype=torch.float32, requires_grad=True) -> list[Tensor]:
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def qkv(generator, dtype=torch.float32, length=13) -> list[Tensor]:
    return tensors(generator, *((2, 2, length, 8),) * 3, dtype=dtype)


# ---- torch.compile and torch.export

COMPILED = [
    "padding-causal",
    "float-mask-causal",
    "relative-bias-per-head",
    "sinks",
    "dropout-0.5",
    "gqa-4-2",
    "strides-blhd",
    "softcap-with-everything",
    "rank-3",
    "rank-2",
    "rank-broadcast-batch",
    "varlen-causal",
    "padding-float",
    "bool-mask-B1LS",
    "causal-bias-lower-right",
    "empty-S",
    "float-mask-only-requires-grad",
    "padding-nan",
    "empty-rows-bool-mask",
    "float-mask-t5-strides",
    "band-70-70-7-3",
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str, compiler: str, backend: str) -> None:
    case = CASE[name]
    inputs = case.make(torch.float32)
    compiled = torch.compile(inputs.function, fullgraph=True, backend=compiler)
    result = cases.run(inputs._replace(function=compiled), backend)
    expected = cases.run(inputs, backend)
    for (what, ours), (_, eager) in zip(result.items(), expected.items(), strict=True):
        assert ours.stride() == eager.stride() or what.startswith("d"), f"strides of {what}"
        # A kernel gives the same bits. For the reference, autograd may add gradients in another order.
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.quick)])
def test_compile_inductor(backend: str, dynamic: bool, generator: torch.Generator) -> None:
    def model(query, key, value, ignored, bias):
        out = fused_attn.fused_attention(
            query * 2, key, value, bias, is_causal=True, key_padding_mask=ignored, backend=backend
        )
        return out.sin()

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for length in (13, 17, 20) if dynamic else (13,):
        args = qkv(generator, length=length)
        ignored = torch.arange(length).expand(2, -1) >= torch.tensor([[length], [5]])
        bias = torch.randn(2, length, length, generator=generator, requires_grad=True)
        inputs = (*args, bias)
        ours, expected = compiled(*args, ignored, bias), model(*args, ignored, bias)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), rtol=1e-5, atol=1e-5
        )


def test_compile_does_not_recompile_for_each_length(backend: str, generator: torch.Generator) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(fused_attn.fused_attention, fullgraph=True, dynamic=True, backend=counter)
    for length in (11, 12, 13, 14, 25):
        compiled(*qkv(generator, length=length), is_causal=True, backend=backend)
    assert counter.frame_count == 1


def test_compile_draws_new_dropout_each_call(backend: str, generator: torch.Generator) -> None:
    query, key, value = qkv(generator)
    compiled = torch.compile(fused_attn.fused_attention, fullgraph=True, backend="aot_eager")
    first = compiled(query, key, value, dropout_p=0.5, backend=backend)
    second = compiled(query, key, value, dropout_p=0.5, backend=backend)
    assert not torch.equal(first, second)


class _Module(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, ignored: Tensor) -> Tensor:
        return fused_attn.fused_attention(
            query, key, value, is_causal=True, key_padding_mask=ignored, backend=self.backend
        )


@pytest.mark.quick
def test_export_save_load(backend: str, generator: torch.Generator) -> None:
    length = torch.export.Dim("length", min=2, max=4096)
    module = _Module(backend)
    example = (*tensors(generator, *((2, 2, 13, 8),) * 3, requires_grad=False), torch.zeros(2, 13, dtype=torch.bool))
    program = torch.export.export(module, example, dynamic_shapes=({2: length},) * 3 + ({1: length},))
    assert "fused_attn.attention" in program.graph_module.code
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    for n in (13, 29):
        args = (*tensors(generator, *((2, 2, n, 8),) * 3, requires_grad=False), torch.arange(n).expand(2, n) > 9)
        torch.testing.assert_close(loaded(*args), module(*args))


class _RelativeModule(torch.nn.Module):
    def forward(self, query: Tensor, table: Tensor, slopes: Tensor) -> Tensor:
        length = query.shape[2]
        bias = fused_attn.t5_relative_bias(table, length, length) + fused_attn.alibi_bias(slopes, length, length)
        return fused_attn.fused_attention(query, query, query, relative_bias=bias)


def test_export_of_a_relative_bias(generator: torch.Generator) -> None:
    """The number of columns follows from a symbolic length."""

    def arguments(length: int) -> tuple[Tensor, ...]:
        return tuple(tensors(generator, (2, 2, length, 8), (32, 2), (2,), requires_grad=False))

    shapes = ({2: torch.export.Dim("length", min=2, max=4096)}, None, None)
    module = _RelativeModule()
    exported = torch.export.export(module, arguments(13), dynamic_shapes=shapes).module()
    for length in (13, 29):
        args = arguments(length)
        torch.testing.assert_close(exported(*args), module(*args))


# ---- The registered operators


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_forward(name: str, backend: str, generator: torch.Generator) -> None:
    args = operator_calls(backend, generator)[name]
    outcome = torch.library.opcheck(torch.ops.fused_attn.attention, args)
    assert set(outcome.values()) == {"SUCCESS"} and len(outcome) >= 4


@pytest.mark.parametrize("name", ["plain", "blhd", "everything", "packed"])
@pytest.mark.parametrize("has_dlse", [False, True])
def test_opcheck_backward(name: str, has_dlse: bool, backend: str, generator: torch.Generator) -> None:
    args = backward_call(operator_calls(backend, generator)[name], has_dlse)
    # The derivative of the backward operator is not checked here. The tests of double backward below check it.
    outcome = torch.library.opcheck(torch.ops.fused_attn.attention_backward, args)
    assert set(outcome.values()) == {"SUCCESS"} and len(outcome) >= 4


@pytest.mark.parametrize("name", CALLS)
def test_results_lie_in_memory_as_compiled_code_expects(name: str, backend: str, generator: torch.Generator) -> None:
    check_layouts(operator_calls(backend, generator)[name])


# ---- functorch, forward mode, double backward


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention by torch's operators, whose derivatives are those to expect."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1) @ value


def ours(backend: str):
    return lambda query, key, value: fused_attn.fused_attention(query, key, value, is_causal=True, backend=backend)


@pytest.mark.quick
def test_func_grad(backend: str, generator: torch.Generator) -> None:
    args = [x.detach() for x in qkv(generator, torch.float64)]
    for function in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        results = [
            function(lambda *a, f=f: f(*a).square().sum(), argnums=(0, 1, 2))(*args) for f in (ours(backend), plain)
        ]
        torch.testing.assert_close(*results)


@pytest.mark.quick
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (1, 0, 2), (None, 3, 0)])
def test_vmap(backend: str, in_dims, generator: torch.Generator) -> None:
    args = [x.detach() for x in tensors(generator, *((2, 2, 5, 8),) * 3, dtype=torch.float64)]
    args = [x if d is None else torch.stack([x, 2 * x, -x]).movedim(0, d) for x, d in zip(args, in_dims, strict=True)]
    torch.testing.assert_close(*(torch.func.vmap(f, in_dims)(*args) for f in (ours(backend), plain)))
    grads = [
        torch.func.vmap(torch.func.grad(lambda *a, f=f: f(*a).square().sum(), argnums=(0, 1, 2)), in_dims)(*args)
        for f in (ours(backend), plain)
    ]
    torch.testing.assert_close(*grads)


def _shared_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """The further tensors of a call of (2, 2, 5, 8)."""
    begin = torch.randint(0, 3, (1, 2, 5, 1), generator=generator)
    return {
        "attn_mask": torch.rand(1, 2, 5, 5, generator=generator) < 0.8,
        "bias": torch.randn(2, 1, 5, 5, generator=generator),
        "key_ranges": torch.stack((begin, begin + 3), dim=-1).int(),
        "key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5]),
        "key_bias": torch.randn(2, 5, generator=generator),
        "key_lengths": torch.tensor([5, 4]).int(),
        "relative_bias": torch.randn(2, 9, generator=generator),
        "sinks": torch.randn(2, generator=generator),
    }


@pytest.mark.quick
@pytest.mark.parametrize("is_vmapped", [False, True], ids=["shared", "vmapped"])
@pytest.mark.parametrize("name", _shared_tensors(torch.Generator()))
def test_vmap_with_a_further_tensor(
    name: str, is_vmapped: bool, backend: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All entries are one call, if none has a relative bias or sinks of its own and no mask would be copied."""
    args = [x.detach() for x in tensors(generator, *((3, 2, 2, 5, 8),) * 3)]
    further = _shared_tensors(generator)[name]
    if is_vmapped:  # the last dimension, because kernels need some tensors in the usual order
        dim = 2 if further.dim() >= 4 else -1
        further = torch.stack([further, further.roll(1, dim), further.flip(dim)], dim=-1)
    in_dims = (0, 0, 0, -1 if is_vmapped else None)
    calls = []
    monkeypatch.setattr(transforms.modes, "is_observed", lambda tensors: calls.append(tensors) and False)

    def attend(query: Tensor, key: Tensor, value: Tensor, further: Tensor) -> Tensor:
        given = {{"bias": "attn_mask", "key_bias": "key_padding_mask"}.get(name, name): further}
        return fused_attn.fused_attention(query, key, value, backend=backend, **given)

    def loss(*given: Tensor) -> Tensor:
        return attend(*given).sin().sum()

    found = torch.func.vmap(attend, in_dims)(*args, further)
    number_of_calls = len(calls)
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), in_dims)(*args, further)
    entries = [(*(x[n] for x in args), further[..., n] if is_vmapped else further) for n in range(3)]
    torch.testing.assert_close(found, torch.stack([attend(*entry) for entry in entries]))
    expected = [torch.func.grad(loss, (0, 1, 2))(*entry) for entry in entries]
    torch.testing.assert_close(grads, tuple(map(torch.stack, zip(*expected, strict=True))))
    if backend != "reference":
        separate = ("attn_mask", "relative_bias", "sinks") if is_vmapped else ("bias",)
        assert number_of_calls == (3 if name in separate else 1)


@pytest.mark.quick
def test_jvp_is_exact(backend: str, generator: torch.Generator) -> None:
    primals = [x.detach() for x in qkv(generator, torch.float64)]
    tangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in primals]
    out, tangent = torch.func.jvp(ours(backend), tuple(primals), tuple(tangents))
    expected_out, expected = torch.func.jvp(plain, tuple(primals), tuple(tangents))
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(tangent, expected)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
        dual = torch.autograd.forward_ad.unpack_dual(ours(backend)(*duals)).tangent
    torch.testing.assert_close(dual, expected)


@pytest.mark.quick
def test_double_backward(backend: str, generator: torch.Generator) -> None:
    args = qkv(generator, torch.float64)
    results = []
    for f in (ours(backend), plain):
        grads = torch.autograd.grad(f(*args).square().sum(), args, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), args))
    torch.testing.assert_close(*results)


@pytest.mark.quick
def test_double_backward_of_sinks_where_a_row_sees_no_key(backend: str, generator: torch.Generator) -> None:
    """A row that sees no key adds nothing to any derivative, and no NaN."""
    args = qkv(generator, torch.float64, length=2)
    (sinks,) = tensors(generator, (args[0].shape[1],), dtype=torch.float64)
    mask = torch.tensor([[False, False], [True, True]])

    def second(query: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        leaves = (*args, sinks)
        out = fused_attn.fused_attention(query, *args[1:], mask, sinks=sinks, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    torch.testing.assert_close(second(args[0], mask), second(args[0][:, :, 1:], mask[1:]))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.quick
def test_double_backward_of_lse_alone(backend: str, generator: torch.Generator) -> None:
    """Under a mode, which sees operators, as without one."""
    args = qkv(generator, torch.float64)

    def second() -> tuple[Tensor, ...]:
        _, lse = fused_attn.fused_attention(*args, return_lse=True, backend=backend)
        grads = torch.autograd.grad(lse.sum(), args[:2], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), args[:2])

    expected = second()
    with Watching():
        torch.testing.assert_close(second(), expected)


@pytest.mark.quick
def test_third_derivatives(backend: str, generator: torch.Generator) -> None:
    """Under a mode, which sees operators, as without one."""

    def third(function) -> tuple[Tensor, ...]:
        loss = function(*args).square().sum()
        for _ in range(3):
            grads = torch.autograd.grad(loss, args, create_graph=True)
            loss = sum(g.square().sum() for g in grads)
        return grads

    args = qkv(generator, torch.float64, length=5)
    expected = third(plain)
    torch.testing.assert_close(third(ours(backend)), expected)
    with Watching():
        torch.testing.assert_close(third(ours(backend)), expected)


@pytest.mark.parametrize("in_dims", [(None, 0, None), (None, None, 0), (0, 0, 0), (0, None, None)])
def test_vmap_over_pages(backend: str, in_dims: tuple, generator: torch.Generator) -> None:
    """Each entry has pages of its own, which the same block table names."""
    table, lengths = torch.tensor([[0, 1, 2], [3, 4, 0]]).int(), torch.tensor([5, 3]).int()

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return fused_attn.fused_attention_paged(query, keys, values, table, lengths, backend=backend)

    args = [x.detach() for x in tensors(generator, (3, 2, 4, 1, 8), (3, 5, 2, 4, 8), (3, 5, 2, 4, 8))]
    args = [x[0] if dim is None else x for x, dim in zip(args, in_dims, strict=True)]
    entries = [[x if dim is None else x[n] for x, dim in zip(args, in_dims, strict=True)] for n in range(3)]
    torch.testing.assert_close(torch.vmap(attend, in_dims)(*args), torch.stack([attend(*entry) for entry in entries]))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.vmap])
def test_compiled_transforms(transform, backend: str, generator: torch.Generator) -> None:
    (query,) = tensors(generator, (2, 1, 2, 3, 4), dtype=torch.float64, requires_grad=False)
    query = query if transform is torch.func.vmap else query[0]

    def attention(query: Tensor) -> Tensor:
        out = ours(backend)(query, query, query)
        return out if transform is torch.func.vmap else out.square().sum()

    function = transform(attention)
    torch.testing.assert_close(torch.compile(function, backend="aot_eager")(query), function(query))


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_compiled_transforms_of_any_length(transform, dynamic, backend: str, generator: torch.Generator) -> None:
    def attention(query: Tensor) -> Tensor:
        query = query.transpose(1, 2)  # whose memory order the output follows
        out = ours(backend)(query, query, query)
        return out if transform is torch.func.vmap else out.square().sum()

    function = transform(attention)
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)
    for length in (5, 6, 9):
        (query,) = tensors(generator, (2, 1, length, 2, 8), dtype=torch.float64, requires_grad=False)
        query = query if transform is torch.func.vmap else query[0]
        torch.testing.assert_close(compiled(query), function(query))


def test_torch_compiles_after_a_test_with_poisoned_memory() -> None:
    def compile_and_run(function: Callable[[Tensor], Tensor]) -> None:
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(2))

    with pytest.MonkeyPatch.context() as monkeypatch, poison(monkeypatch):
        torch._dynamo.reset()
        compile_and_run(lambda x: x + 1)
    compile_and_run(lambda x: x + torch.empty_strided((2,), (1,)).shape[0])


# ---- Transforms older than torch.func: gradients of several outputs at once


def packed(backend: str):
    offsets = torch.tensor([0, 3, 4, 7], dtype=torch.int32)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fused_attn.fused_attention_varlen(query, key, value, offsets, offsets, 3, 3, backend=backend)

    return function


def biased(backend: str):
    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, table: Tensor, sinks: Tensor):
        return fused_attn.fused_attention(
            query, key, value, bias, dropout_p=0.3, dropout_seed=5, relative_bias=table, sinks=sinks, return_lse=True,
            backend=backend,
        )  # fmt: skip

    return function


def in_module(backend: str):
    torch.manual_seed(0)
    module = fused_attn.FusedMultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, backend=backend)
    return lambda query, key, value: module(query, key, value)


FUNCTIONS = {
    "function": (ours, [(1, 2, 4, 3)] * 3),
    "varlen": (packed, [(7, 2, 3)] * 3),
    "biased": (biased, [(2, 2, 3, 4)] * 3 + [(1, 2, 1, 3), (2, 5), (2,)]),
    "module": (in_module, [(2, 3, 8)] * 3),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_gradients(name: str, backend: str, generator: torch.Generator) -> None:
    make, shapes = FUNCTIONS[name]
    inputs = tensors(generator, *shapes, dtype=torch.float64)
    outputs = make(backend)(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for chosen in (outputs, outputs[:1], outputs[1:]):
        if not chosen:
            continue
        batch = [torch.randn((3, *x.shape), generator=generator, dtype=torch.float64) for x in chosen]
        found = torch.autograd.grad(
            chosen, inputs, batch, is_grads_batched=True, retain_graph=True, materialize_grads=True
        )
        loop = [
            torch.autograd.grad(chosen, inputs, dout, retain_graph=True, materialize_grads=True)
            for dout in zip(*batch, strict=True)
        ]
        expected = tuple(torch.stack(x) for x in zip(*loop, strict=True))
        # Where no gradient flows, torch returns zeros that are not batched.
        found = tuple(x.expand_as(y) for x, y in zip(found, expected, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_vectorized_jacobian_and_hessian(name: str, strategy: str, backend: str, generator: torch.Generator) -> None:
    make, shapes = FUNCTIONS[name]
    inputs = tuple(tensors(generator, *shapes, dtype=torch.float64, requires_grad=False))
    function = make(backend)

    def loss(*args: Tensor) -> Tensor:
        outputs = function(*args)
        return sum(x.square().sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))

    functional = torch.autograd.functional
    results = [functional.jacobian(function, inputs)]
    results.append(functional.jacobian(function, inputs, vectorize=True, strategy=strategy))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    results = [functional.hessian(loss, inputs)]
    results.append(functional.hessian(loss, inputs, vectorize=True, outer_jacobian_strategy=strategy))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_double_backward_compiled(backend: str, generator: torch.Generator) -> None:
    """torch.compile does not support double backward, and must raise instead of returning a wrong gradient."""
    args = qkv(generator, torch.float64)
    compiled = torch.compile(ours(backend), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(*args).square().sum(), args, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), args)


# ---- Autocast, checkpoint, modes, copies


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    args = qkv(generator)
    mask = torch.randn(13, 13, generator=generator, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out = fused_attn.fused_attention(*args, attn_mask=mask, backend=backend)
        theirs = torch.nn.functional.scaled_dot_product_attention(*args, attn_mask=mask)
    assert out.dtype == theirs.dtype == dtype
    explicit = fused_attn.fused_attention(*(x.to(dtype) for x in args), attn_mask=mask, backend=backend)
    assert torch.equal(out, explicit)
    leaves = (*args, mask)
    grads, expected = (torch.autograd.grad(x.float().sum(), leaves) for x in (out, explicit))
    assert [g.dtype for g in grads] == [torch.float32] * 4
    for ours_, theirs_ in zip(grads, expected, strict=True):
        assert torch.equal(ours_, theirs_)


@pytest.mark.quick
def test_autocast_leaves_float64_alone(backend: str, generator: torch.Generator) -> None:
    args = qkv(generator, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_attn.fused_attention(*args, backend=backend).dtype == torch.float64


def test_autocast_compiled(backend: str, generator: torch.Generator) -> None:
    args = qkv(generator)
    compiled = torch.compile(ours(backend), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(*args), ours(backend)(*args)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    grads = torch.autograd.grad(out.float().sum(), args)
    assert [g.dtype for g in grads] == [torch.float32] * 3


@pytest.mark.quick
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend: str, use_reentrant: bool, generator: torch.Generator) -> None:
    """Gradients are right with dropout as well, because the recomputation draws the seed of the first run."""
    args = qkv(generator)

    def block(query, key, value):
        return fused_attn.fused_attention(query, key, value, dropout_p=0.5, is_causal=True, backend=backend).sin()

    results = []
    for call in (block, lambda *a: checkpoint(block, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        loss = call(*args).square().sum()
        for x in args:
            x.grad = None
        loss.backward()
        results.append((loss, *(x.grad for x in args)))
    for plain_, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain_, checkpointed)


@pytest.mark.quick
def test_selective_checkpoint(backend: str, generator: torch.Generator) -> None:
    """A policy sees attention as one operator, and can decide that its outputs are kept and not recomputed."""
    seen = set()

    def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
        seen.add(operator)
        is_ours = operator is torch.ops.fused_attn.attention.default
        return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE

    args = qkv(generator)
    expected = torch.autograd.grad(ours(backend)(*args).sin().sum(), args)
    out = checkpoint(
        lambda *args: ours(backend)(*args).sin(), *args, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(out.sum(), args), expected)
    assert backend == "reference" or torch.ops.fused_attn.attention.default in seen


@pytest.mark.quick
def test_inference_mode(backend: str, generator: torch.Generator) -> None:
    args = qkv(generator)
    expected = ours(backend)(*args)
    with torch.inference_mode():
        assert torch.equal(ours(backend)(*args), expected)


def test_saved_tensors_hooks_and_in_place_changes(backend: str, generator: torch.Generator) -> None:
    """If the caller overwrites an input between forward and backward, autograd must raise an error."""
    query, key, value = qkv(generator)
    with torch.autograd.graph.save_on_cpu():
        out = ours(backend)(query, key, value)
    torch.autograd.grad(out.sum(), (query, key, value))
    changed = key * 1.0
    out = ours(backend)(query, changed, value)
    changed.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensors_hooks_may_return_other_strides(backend: str, generator: torch.Generator) -> None:
    """A hook that packs tensors in its own way returns the right numbers, but not always in the same memory order."""
    args = qkv(generator)

    def results() -> Tensor:
        out, lse = fused_attn.fused_attention(*args, is_causal=True, return_lse=True, backend=backend)
        return out.sin().sum() + lse.sum()

    expected = torch.autograd.grad(results(), args)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.mT.contiguous().mT if x.dim() > 1 else x):
        changed = results()
    torch.testing.assert_close(torch.autograd.grad(changed, args), expected)


def test_every_set_of_inputs_that_require_grad(backend: str, generator: torch.Generator) -> None:
    """A gradient does not depend on which other gradients are wanted, and gradients that nobody wants are None."""
    case = Case(
        "subset",
        heads=2,
        seqlen_q=9,
        attn_mask=cases.float_mask("1HLS"),
        relative_bias=cases.per_head_bias,
        sinks=cases.sink(),
    )
    full = cases.run(case.make(torch.float64), backend)
    names = tuple(full.grads)
    for size in (1, 2):
        for subset in itertools.combinations(names, size):
            result = cases.run(case.make(torch.float64)._replace(differentiated=subset), backend)
            for name in subset:
                torch.testing.assert_close(result.grads[name], full.grads[name], rtol=1e-12, atol=1e-12)


def test_deepcopy_and_pickle(backend: str) -> None:
    """A module can still be copied and pickled after it has called attention."""
    module = _Module(backend)
    x = torch.randn(1, 1, 4, 8)
    module(x, x, x, torch.zeros(1, 4, dtype=torch.bool))
    copied = copy.deepcopy(module)
    torch.save(copied, io.BytesIO())
    ignored = torch.zeros(1, 4, dtype=torch.bool)
    assert torch.equal(copied(x, x, x, ignored), module(x, x, x, ignored))


@pytest.mark.quick
def test_gradient_accumulates_into_grad(backend: str, generator: torch.Generator) -> None:
    args = qkv(generator)
    for _ in range(2):
        ours(backend)(*args).sum().backward()
    once = torch.autograd.grad(ours(backend)(*args).sum(), args)
    for x, grad in zip(args, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * grad)
