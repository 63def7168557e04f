"""Tables beside those of cases.py: features, small modules, layers, instruction sets, a training step, overhead.

``python -m benchmarks attention --tables cpu`` measures them after the tables of cases.py. They are for a CPU, but
``--tables overhead`` also measures what a call on a GPU costs the host. A table is a function that takes the arguments
of the command and yields lists of rows, one list for each comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention

import fused_attn
import fused_attn.nn.attention
from benchmarks import timing
from benchmarks.conventions import OUR_BACKENDS, OURS, ROOT
from benchmarks.inputs import DTYPES
from benchmarks.rows import Row

FUNCTIONS = {OURS: fused_attn.fused_attention, "torch": scaled_dot_product_attention}
FEATURE_SHAPE, QUICK_FEATURE_SHAPE = (1, 8, 2048, 64), (1, 8, 512, 64)
NARROW_VALUES, DROPOUT = 32, 0.1
ISA_SHAPES = ((2, 8, 128, 64), (2, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128))
MODULE_SIZES = ((1, 8, 64, 4), (8, 32, 64, 4), (1, 4, 256, 4))  # batch, length, features, heads
LAYER_SIZES = ((1, 16, 256, 4), (8, 32, 128, 4), (1, 128, 768, 12), (8, 256, 256, 8), (4, 512, 512, 8))
QUICK_LAYER_SIZES = ((1, 16, 64, 4),)
OVERHEAD_SHAPE = (1, 2, 4, 8)
GPU_OVERHEAD_SHAPE = (1, 2, 256, 64)  # with fewer queries, the kernels for decoding run
STEP_BATCHES = 8


def _compare(
    about: Row,
    calls: dict[str, timing.Call],
    arguments: argparse.Namespace,
    ours: str = OURS,
    timer: timing.Timer | None = None,
) -> list[Row]:
    """Times the calls in turns, and returns a row for each. `about` has the fields that the rows share."""
    times = timing.measure(calls, timer or timing.CpuTimer(), arguments.rounds, arguments.seconds)
    fields = timing.fields_of(times, ours)
    return [about | {"implementation": name, "best_ms": min(times[name]) * 1e3} | fields[name] for name in calls]


def features(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Forward, while gradients are recorded, of cases that torch's fused kernel does not support. torch then computes
    the formula, which stores all scores.

    Errors are not measured, because torch's dropout draws other random numbers than ours.
    """
    batch, heads, length, _ = shape = QUICK_FEATURE_SHAPE if arguments.quick else FEATURE_SHAPE
    for dtype in arguments.dtype or ("float32", "bfloat16")[: 1 if arguments.quick else None]:
        randn = partial(torch.randn, dtype=DTYPES[dtype])
        query, key, value = (randn(*shape) for _ in range(3))
        bias = randn(length, length).requires_grad_()
        inputs = {
            "bias with gradient": ((query, key, value), {"attn_mask": bias}),
            "dropout": ((query, key, value), {"dropout_p": DROPOUT}),
            "narrow values": ((query, key, randn(batch, heads, length, NARROW_VALUES)), {}),
            "3-D": ((query[0], key[0], value[0]), {}),
        }
        for feature, (tensors, options) in inputs.items():
            about = {"benchmark": "features", "shape": list(shape), "mask": feature, "dtype": dtype}
            calls = {name: partial(function, *tensors, **options) for name, function in FUNCTIONS.items()}
            yield _compare(about | {"direction": "forward"}, calls, arguments)


def small_modules(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """FusedMultiheadAttention and torch.nn.MultiheadAttention on small inputs, in training and in eval mode.

    In eval mode without gradients, torch's module takes a special native path.
    """
    for (batch, length, features, heads), training in itertools.product(MODULE_SIZES, (False, True)):
        ours = fused_attn.FusedMultiheadAttention(features, heads, batch_first=True).train(training)
        theirs = nn.MultiheadAttention(features, heads, batch_first=True).train(training)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(batch, length, features)
        about = {"benchmark": "small-modules", "batch": batch, "length": length, "d_model": features, "heads": heads}
        about |= {"mask": "none", "dtype": "float32", "direction": "training forward" if training else "inference"}
        modules = {OURS: ours, "torch": theirs}
        calls = {name: partial(module, x, x, x, need_weights=False) for name, module in modules.items()}
        with torch.set_grad_enabled(training):
            yield _compare(about, calls, arguments)


def layers(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Encoder layers, ours and torch's, in training with dropout, and in eval mode without gradients.

    A training step is forward and backward, with the gradients of x and of all parameters. In training, half of each
    sequence but the first is padding. In eval mode there is no padding, whose rows torch's fast path does not compute.
    """
    dtypes = arguments.dtype or ("float32", "bfloat16")[: 1 if arguments.quick else None]
    sizes = QUICK_LAYER_SIZES if arguments.quick else LAYER_SIZES
    for dtype, (batch, length, width, heads), training in itertools.product(dtypes, sizes, (True, False)):
        made = {
            name: package.TransformerEncoderLayer(width, heads, 4 * width, DROPOUT, batch_first=True)
            for name, package in ((OURS, fused_attn), ("torch", nn))
        }
        made["torch"].load_state_dict(made[OURS].state_dict())
        x = torch.randn(batch, length, width, dtype=DTYPES[dtype], requires_grad=training)
        is_padding = torch.zeros(batch, length, dtype=torch.bool)
        is_padding[1:, length // 2 :] = True
        dout = torch.randn_like(x)

        def train(layer: nn.Module, x=x, dout=dout, is_padding=is_padding) -> None:
            torch.autograd.grad(layer(x, src_key_padding_mask=is_padding), [x, *layer.parameters()], dout)

        calls: dict[str, timing.Call] = {}
        for name, layer in made.items():
            layer.to(x.dtype).train(training)
            calls[name] = partial(train, layer) if training else partial(layer, x)
        about = {"benchmark": "layers", "batch": batch, "length": length, "d_model": width, "heads": heads}
        about |= {"mask": "padding" if training else "none", "dtype": dtype}
        about |= {"direction": "training" if training else "inference"}
        with torch.set_grad_enabled(training):
            yield _compare(about, calls, arguments)


def isa(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Our kernels for each instruction set of this machine. The field "speed" is the time of the best instruction set
    divided by the time of this one."""
    from fused_attn import _C

    best = _C.cpu_isa()
    shapes = ISA_SHAPES[: 1 if arguments.quick else None]
    try:
        for shape, direction in itertools.product(shapes, ("forward", "forward+backward")):
            leaves = [torch.randn(shape, requires_grad=direction != "forward") for _ in range(3)]
            dout = torch.randn(shape)

            def run(isa: str, leaves=leaves, dout=dout) -> None:
                _C.select_cpu_isa(isa)
                out = fused_attn.fused_attention(*leaves)
                if out.requires_grad:
                    torch.autograd.grad(out, leaves, dout)

            about = {"benchmark": "isa", "shape": list(shape), "mask": "none", "dtype": "float32"}
            about |= {"direction": direction, "best_isa": best}
            calls = {isa: partial(run, isa) for isa in _C.cpu_isas()}
            rows = _compare(about, calls, arguments, ours=best)
            yield [row | {"speed": 1.0 / row.get("over_ours", 1.0)} for row in rows]
    finally:
        _C.select_cpu_isa(best)


def step(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Training steps of examples/train_g2p.py, with our attention and with torch's in the same model."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import train_g2p

        dictionary = train_g2p.load_dictionary()
    except ImportError as error:
        print(f"no training step: {error} (pip install -e '.[examples]')", file=sys.stderr)
        return
    finally:
        sys.path.pop(0)
    examples = train_g2p.Examples.of(train_g2p.split(dictionary, 0)[0], dictionary)
    batches = [examples.select(rows) for rows in train_g2p.batches(examples, seed=0)[:STEP_BATCHES]]
    losses = {}

    def steps(name: str, attention: Callable) -> timing.Call:
        torch.manual_seed(0)
        run = train_g2p.Run(argparse.Namespace(seed=0, backend=None, device="cpu"))

        def call() -> None:
            with mock.patch.object(fused_attn.nn.attention, "fused_attention", attention):
                for batch in batches:
                    run.optimizer.zero_grad()
                    loss = train_g2p.loss_of(run.model, batch)
                    loss.backward()
                    nn.utils.clip_grad_norm_(run.model.parameters(), train_g2p.MAX_GRADIENT_NORM)
                    run.optimizer.step()
                    losses.setdefault(name, loss.item())

        call()
        return call

    calls = {OURS: steps(OURS, fused_attn.fused_attention), "torch": steps("torch", _torch_in_a_module)}
    if abs(losses[OURS] - losses["torch"]) > 1e-5 * losses["torch"]:
        raise RuntimeError(f"the losses of the first step differ: {losses}")
    about = {"benchmark": "step", "mask": "causal+padded", "dtype": "float32", "direction": "training step"}
    yield _compare(about | {"steps": STEP_BATCHES}, calls, arguments)


def _torch_in_a_module(
    query: Tensor, key: Tensor, value: Tensor, attn_mask=None, *, is_causal: bool, key_padding_mask: Tensor | None,
    scale: float, dropout_p: float, **unused: object,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention with the arguments that our modules pass to `fused_attention`."""
    is_causal = is_causal or isinstance(attn_mask, CausalBias)
    if key_padding_mask is None:
        return scaled_dot_product_attention(query, key, value, None, dropout_p, is_causal, scale=scale)
    visible = ~key_padding_mask[:, None, None, :]
    if is_causal:
        visible = visible & torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    return scaled_dot_product_attention(query, key, value, visible, dropout_p, scale=scale)


def overhead(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """A call on tiny tensors, whose time is the overhead of a call. The field "best_ms", the shortest time, is what
    counts, because other programs can only make a call slower.

    On a GPU, the time is that in which the host launches the kernels. Each GPU backend of ours that can run has a row.
    """
    device = torch.device(arguments.device)
    is_gpu = device.type == "cuda"
    shape, dtype = (GPU_OVERHEAD_SHAPE, "bfloat16") if is_gpu else (OVERHEAD_SHAPE, "float32")
    timer = timing.HostTimer(device) if is_gpu else None
    query, key, value, dout = (torch.randn(shape, dtype=DTYPES[dtype], device=device) for _ in range(4))
    functions = FUNCTIONS | _functions_of_backends(query) if is_gpu else FUNCTIONS
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    kinds = {
        "forward": lambda function: function(query, key, value),
        "forward with grad": lambda function: function(*leaves),
        "forward+backward": lambda function: torch.autograd.grad(function(*leaves), leaves, dout),
    }
    many = argparse.Namespace(rounds=10_000, seconds=2.0 * arguments.seconds)
    for direction, kind in kinds.items():
        about = {"benchmark": "overhead", "shape": list(shape), "mask": "none", "dtype": dtype}
        calls = {name: partial(kind, function) for name, function in functions.items()}
        yield _compare(about | {"direction": direction}, calls, many, timer=timer)


def _functions_of_backends(query: Tensor) -> dict[str, Callable]:
    """`fused_attention` on each GPU backend that can run a call like this."""
    functions = {}
    for name, backend in OUR_BACKENDS.items():
        with contextlib.suppress(ValueError):  # The backend is not installed, or does not support this GPU.
            fused_attn.explain(query, query, query, backend=backend)
            functions[name] = partial(fused_attn.fused_attention, backend=backend)
    return functions


TABLES = {
    "features": features,
    "small-modules": small_modules,
    "layers": layers,
    "isa": isa,
    "step": step,
    "overhead": overhead,
}


def describe(rows: list[Row]) -> str:
    """One line: the sizes, then the shortest time of each implementation, then the ratios to ours."""
    first = rows[0]
    about = [str(first[name]) for name in ("shape", "batch", "length", "d_model", "dtype", "mask") if name in first]
    cells = [f"{row['implementation']} {row['best_ms']:.4f} ms" for row in rows]
    cells += [f"{row['implementation']} takes {row['over_ours']:.2f}x" for row in rows if "over_ours" in row]
    return " | ".join([f"{' '.join(about)} {first['direction']}", *cells])
