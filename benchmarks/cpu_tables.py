"""What the CPU kernels promise beside the table of masks, for ``python -m benchmarks cpu``.

Each function measures one table and returns its rows, ours with the `ratio` of torch's time to ours. Both sides run in
turns, as everywhere here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fused_attn
import fused_attn.nn.attention
from benchmarks import timing
from benchmarks.conventions import OURS, ROOT
from benchmarks.inputs import DTYPES
from benchmarks.rows import Row
from benchmarks.timing import Call
from fused_attn.attention.causal_bias import causal_bias
from fused_attn.backends.cpu import _C

FEATURE_SHAPE = (1, 8, 2048, 64)
NARROW_VALUES = 32
DROPOUT = 0.1
ISA_SHAPES = ((2, 8, 128, 64), (2, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128))
MODULE_SIZES = ((1, 8, 64, 4), (8, 32, 64, 4), (1, 4, 256, 4))  # batch, length, features, heads
READ_BYTES = 2**28  # far above any cache
STEPS = 200

#: Cases in which torch leaves its fused kernel; `DROPOUT` and `NARROW_VALUES` are their sizes.
FEATURES = ("bias with gradient", "dropout", "narrow values", "3-D")


def read_gb_per_s() -> float:
    """What the threads of a sum read from main memory."""
    x = torch.ones(READ_BYTES // 4)
    timer = timing.CpuTimer()
    return READ_BYTES / min(timer.seconds(x.sum, 1) for _ in range(10)) * 1e-9


def run_features(dtype_name: str, arguments: argparse.Namespace) -> list[Row]:
    """Forward, with gradients to come, where torch falls back to the formula, which stores all scores."""
    dtype = DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)
    batch, heads, length, _ = FEATURE_SHAPE

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, key, value = (randn(*FEATURE_SHAPE) for _ in range(3))
    narrow, bias = randn(batch, heads, length, NARROW_VALUES), randn(length, length).requires_grad_()
    # The error is not measured: torch's random numbers are others.
    calls: dict[str, tuple[tuple[Tensor, ...], dict]] = {
        "bias with gradient": ((query, key, value), {"attn_mask": bias}),
        "dropout": ((query, key, value), {"dropout_p": DROPOUT}),
        "narrow values": ((query, key, narrow), {}),
        "3-D": ((query[0], key[0], value[0]), {}),
    }
    rows = []
    for feature in FEATURES:
        tensors, options = calls[feature]
        functions = {OURS: fused_attn.fused_attention, "torch": scaled_dot_product_attention}
        found = compare({name: _call(function, tensors, options) for name, function in functions.items()}, arguments)
        about = {"benchmark": "cpu-features", "shape": list(FEATURE_SHAPE), "mask": feature, "dtype": dtype_name}
        rows += [about | {"direction": "forward"} | row for row in found]
        _show(f"{feature} {dtype_name}", found)
    return rows


def _call(function: Callable, tensors: tuple[Tensor, ...], options: dict) -> Call:
    return lambda: function(*tensors, **options)


def run_modules(arguments: argparse.Namespace) -> list[Row]:
    """Small modules against torch.nn.MultiheadAttention, which in eval mode has a path of its own without gradients."""
    rows = []
    for batch, length, features, heads in MODULE_SIZES:
        ours = fused_attn.FusedMultiheadAttention(features, heads, batch_first=True)
        theirs = nn.MultiheadAttention(features, heads, batch_first=True)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(batch, length, features)
        for is_training in (False, True):
            calls = {
                name: _module_call(module.train(is_training), x) for name, module in ((OURS, ours), ("torch", theirs))
            }
            found = compare(calls, arguments)
            direction = "training forward" if is_training else "inference"
            about = {"benchmark": "cpu-module", "batch": batch, "length": length, "d_model": features, "heads": heads}
            rows += [about | {"mask": "none", "dtype": "float32", "direction": direction} | row for row in found]
            _show(f"module {batch}x{length}x{features} {direction}", found)
    return rows


def _module_call(module: nn.Module, x: Tensor) -> Call:
    def call() -> None:
        with torch.set_grad_enabled(module.training):
            module(x, x, x, need_weights=False)

    return call


def run_isas(arguments: argparse.Namespace) -> list[Row]:
    """Ours with each instruction set against the best that this machine has, in float32."""
    best = _C.cpu_isa()
    rows = []
    try:
        for shape in ISA_SHAPES:
            leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
            dout = torch.randn(shape)

            def forward(isa: str, leaves=leaves) -> None:
                _C.select_cpu_isa(isa)
                with torch.no_grad():
                    fused_attn.fused_attention(*leaves)

            def both(isa: str, leaves=leaves, dout=dout) -> None:
                _C.select_cpu_isa(isa)
                torch.autograd.grad(fused_attn.fused_attention(*leaves), leaves, dout)

            for direction, run in (("forward", forward), ("forward+backward", both)):
                calls = {isa: (lambda isa=isa, run=run: run(isa)) for isa in _C.cpu_isas()}
                times, _ = timing.measure(calls, timing.CpuTimer(), arguments.rounds, arguments.seconds)
                for isa in calls:
                    ratios = [a / b for a, b in zip(times[best], times[isa], strict=True)]
                    low, ratio, high = timing.quartiles(ratios)
                    rows.append(
                        {"benchmark": "cpu-isa", "shape": list(shape), "mask": "none", "dtype": "float32"}
                        | {"direction": direction, "implementation": isa, "best_isa": best}
                        | timing.times_of(times[isa])
                        | {"speed": ratio, "speed_q1": low, "speed_q3": high}
                    )
                    print(f"{isa:12} {shape!s:18} {direction:17} {ratio:5.2f} of the speed of {best}", flush=True)
    finally:
        _C.select_cpu_isa(best)
    return rows


def run_training_step(arguments: argparse.Namespace) -> list[Row]:
    """Steps of examples/train_g2p.py on its own batches: as it is, and with torch's attention in the same model."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import train_g2p

        dictionary = train_g2p.load_dictionary()
    except ImportError as error:
        print(f"no training step: {error} (pip install -e '.[examples]')", file=sys.stderr)
        return []
    finally:
        sys.path.pop(0)
    words, _, _ = train_g2p.split(dictionary, 0)
    examples = train_g2p.Examples.of(words, dictionary)
    batches = train_g2p.batches(examples, seed=0)[: 20 if arguments.quick else STEPS]
    options = argparse.Namespace(seed=0, backend=None, device="cpu")
    runs = {}
    for name in (OURS, "torch"):
        torch.manual_seed(0)
        runs[name] = train_g2p.Run(options)
    attention = {OURS: fused_attn.fused_attention, "torch": _as_fused_attention}

    times: dict[str, list[float]] = {name: [] for name in runs}
    first_losses = {}
    for number, rows in enumerate(batches):
        batch = examples.select(rows)
        for name in list(runs)[:: 1 if number % 2 else -1]:
            with mock.patch.object(fused_attn.nn.attention, "fused_attention", attention[name]):
                start = time.perf_counter()
                loss = _step(train_g2p, runs[name], batch)
                times[name].append(time.perf_counter() - start)
            first_losses.setdefault(name, loss)
    if abs(first_losses[OURS] - first_losses["torch"]) > 1e-5 * first_losses["torch"]:
        raise RuntimeError(f"the losses of the first step differ: {first_losses}")
    warm = {name: seconds[len(seconds) // 10 :] for name, seconds in times.items()}
    found = _rows_of(warm)
    _show("training step of examples/train_g2p.py", found)
    about = {"benchmark": "cpu-step", "mask": "causal+padded", "dtype": "float32", "direction": "training step"}
    return [about | row for row in found]


def _step(example, run, batch) -> float:
    run.optimizer.zero_grad()
    loss = example.loss_of(run.model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), example.MAX_GRADIENT_NORM)
    run.optimizer.step()
    return loss.item()


def _as_fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask=None, *, is_causal: bool, key_padding_mask: Tensor | None,
    scale: float, dropout_p: float, **unused,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention with the arguments that a module of ours gives without its own extensions."""
    if attn_mask is not None and causal_bias(attn_mask) is not None:
        attn_mask, is_causal = None, True
    if key_padding_mask is not None:
        visible = ~key_padding_mask[:, None, None, :]
        if is_causal:
            rows, keys = query.shape[2], key.shape[2]
            visible, is_causal = visible & torch.ones(rows, keys, dtype=torch.bool).tril(), False
        attn_mask = visible if attn_mask is None else attn_mask & visible
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


def compare(calls: dict[str, Call], arguments: argparse.Namespace) -> list[Row]:
    times, _ = timing.measure(calls, timing.CpuTimer(), arguments.rounds, arguments.seconds)
    return _rows_of(times)


def _rows_of(times: dict[str, list[float]]) -> list[Row]:
    rows = [{"implementation": name} | timing.times_of(seconds) for name, seconds in times.items()]
    low, ratio, high = timing.quartiles([b / a for a, b in zip(times[OURS], times["torch"], strict=True)])
    next(row for row in rows if row["implementation"] == OURS).update(ratio=ratio, ratio_q1=low, ratio_q3=high)
    return rows


def _show(label: str, rows: list[Row]) -> None:
    ours, theirs = (next(row for row in rows if row["implementation"] == name) for name in (OURS, "torch"))
    print(
        f"{label:52} {ours['median_ms']:9.3f} {theirs['median_ms']:9.3f}   {ours['ratio']:5.2f} "
        f"[{ours['ratio_q1']:.2f}, {ours['ratio_q3']:.2f}]",
        flush=True,
    )
