"""Modules against those of torch.nn that they replace: ``python -m benchmarks modules``.

Ours and torch's have the same parameters, and get the same inputs with padding. First they are compared, in eval mode,
with torch's module in float64: the outputs of valid tokens, and the gradients of inputs and of all parameters. Then
they are timed in turns, in training steps with dropout. `benchmarks.generation` measures the generation of tokens.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from benchmarks import accuracy, memory, session, timing
from benchmarks.cases import uniform_lengths
from benchmarks.conventions import OURS
from benchmarks.inputs import DTYPES
from benchmarks.rivals import reason
from benchmarks.rows import Row, select
from benchmarks.session import Session

#: The names of the layers, in torch.nn and in fused_attn.
LAYERS = {"encoder-layer": "TransformerEncoderLayer", "decoder-layer": "TransformerDecoderLayer"}
#: "seq2seq" trains a whole encoder-decoder model.
KINDS = ("seq2seq", "encoder-layer", "attention", "decoder-layer")
DROPOUT = 0.1
VOCABULARY = 8192
#: The end of the name of an implementation under `torch.compile`.
COMPILED = "-compiled"
#: The comparison with float64 takes this many sequences of the batch.
CHECKED_BATCH = 2


class Size(NamedTuple):
    """tokens: batch size times length; layers: of the encoder, and of the decoder"""

    tokens: int
    length: int
    d_model: int
    heads: int
    layers: int

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.length)


SIZES = {"cuda": Size(32768, 1024, 1024, 16, 6), "cpu": Size(1024, 256, 256, 4, 2)}
QUICK_SIZES = {"cuda": Size(8192, 1024, 512, 8, 2), "cpu": Size(128, 64, 64, 2, 1)}


class Model(nn.Module):
    """Token ids to logits around a `torch.nn.Transformer` or ours. All other layers are torch's in both cases."""

    def __init__(self, transformer: nn.Transformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.embedding = nn.Embedding(VOCABULARY, transformer.d_model)
        self.generator = nn.Linear(transformer.d_model, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor, causal: Tensor) -> Tensor:
        hidden = self.transformer(
            self.embedding(source), self.embedding(target), tgt_mask=causal, tgt_is_causal=True,
            src_key_padding_mask=padding, tgt_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return self.generator(hidden)


def _module(kind: str, size: Size, package: Any) -> nn.Module:
    """A module of torch.nn or of fused_attn, by `package`."""
    common = {"dropout": DROPOUT, "batch_first": True}
    if kind == "attention":
        name = "MultiheadAttention" if package is nn else "FusedMultiheadAttention"
        return getattr(package, name)(size.d_model, size.heads, **common)
    if kind in LAYERS:
        return getattr(package, LAYERS[kind])(size.d_model, size.heads, 4 * size.d_model, **common)
    sizes = (size.d_model, size.heads, size.layers, size.layers, 4 * size.d_model)
    return Model(package.Transformer(*sizes, **common))


class Workload:
    """Torch's module and ours of one kind, with the same parameters, and the inputs for both."""

    def __init__(self, kind: str, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.kind, self.size, self.dtype = kind, size, dtype
        torch.manual_seed(0)
        theirs, ours = _module(kind, size, nn), _module(kind, size, fused_attn)
        ours.load_state_dict(theirs.state_dict())
        self.modules = {OURS: ours.to(device, dtype), "torch": theirs.to(device, dtype)}
        # torch merges a bool mask with the bool padding without a conversion. True means hidden, as in torch.nn.
        self.causal = torch.ones(size.length, size.length, dtype=torch.bool, device=device).triu(1)
        lengths = uniform_lengths(size.batch, size.length)
        # Padding does not count: nobody asked for work on padding.
        self.num_tokens = sum(lengths)
        generator = torch.Generator(device).manual_seed(0)
        shape = (size.batch, size.length)
        position = torch.arange(size.length, device=device)
        self.inputs = {"padding": position >= torch.tensor(lengths, device=device)[:, None]}
        for name in ("source", "target", "labels"):
            self.inputs[name] = torch.randint(VOCABULARY, shape, generator=generator, device=device)
        for name in ("x", "memory", "dout"):
            self.inputs[name] = torch.randn(*shape, size.d_model, generator=generator, device=device).to(dtype)

    def forward(self, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        padding, causal, x = inputs["padding"], self.causal, inputs["x"]
        if self.kind == "attention":
            return module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        if self.kind == "encoder-layer":
            return module(x, src_key_padding_mask=padding)
        if self.kind == "decoder-layer":
            masks = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}
            return module(x, inputs["memory"], tgt_mask=causal, tgt_is_causal=True, **masks)
        return module(inputs["source"], inputs["target"], padding, causal)

    def results(self, module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        """What is compared with float64, in eval mode: the outputs of valid tokens and all gradients."""
        inputs = {name: x[:CHECKED_BATCH].detach() for name, x in self.inputs.items()}
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        module.eval()
        valid, leaves = ~inputs["padding"], list(module.parameters())
        if self.kind != "seq2seq":
            leaves.append(inputs["x"].requires_grad_())
        out = self.forward(module, inputs)[valid]
        if self.kind == "seq2seq":
            grads = torch.autograd.grad(F.cross_entropy(out, inputs["labels"][valid], reduction="sum"), leaves)
        else:
            grads = torch.autograd.grad(out, leaves, inputs["dout"][valid])
        module.train()
        return [out.detach(), *grads]

    def step(self, module: nn.Module, forward: Callable | None = None) -> timing.Call:
        """The call that is timed: a step of the optimizer for "seq2seq", and forward and backward otherwise.

        forward: in place of `self.forward`, such as its compiled version
        """
        inputs, forward = self.inputs, forward or self.forward
        valid = ~inputs["padding"]
        if self.kind != "seq2seq":
            dout = inputs["dout"] * valid[:, :, None]
            leaves = [inputs["x"].requires_grad_(), *module.parameters()]
            return lambda: torch.autograd.grad(forward(module, inputs), leaves, dout)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
        labels = inputs["labels"].masked_fill(~valid, -100)

        def train() -> None:
            optimizer.zero_grad()
            F.cross_entropy(forward(module, inputs).flatten(0, 1).float(), labels.flatten()).backward()
            optimizer.step()

        return train


def _error(workload: Workload, module: nn.Module, truth: list[Tensor]) -> float | str:
    """The largest error of any result, relative to the largest entry of its tensor. If the module fails, the reason.

    A tensor far smaller than the others is judged by their size, because it consists of their rounding errors: the
    gradient of the bias of keys, for example, is 0 in exact arithmetic.
    """
    try:
        results = workload.results(module, workload.dtype)
    except Exception as error:  # Modules raise exceptions of any class.
        return reason(error)
    largest = max(y.abs().max().item() for y in truth)
    errors = [
        (x.double() - y).abs().max().item() / max(y.abs().max().item(), 1e-3 * largest)
        for x, y in zip(results, truth, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("inf")


def run_kind(
    kind: str, size: Size, device: torch.device, dtype: str, compiles: bool, rounds: int, seconds: float
) -> list[Row]:
    """Compares and times the modules of one kind. Returns one row for each implementation; a wrong one has no time.

    compiles: also time each module under `torch.compile`
    """
    workload = Workload(kind, size, device, DTYPES[dtype])
    truth = workload.results(copy.deepcopy(workload.modules["torch"]).double(), torch.float64)
    errors = {name: _error(workload, module, truth) for name, module in workload.modules.items()}
    rows: dict[str, Row] = {}
    calls: dict[str, timing.Call] = {}
    # torch limits how often one function is compiled. A reset between the modules would throw ours away.
    torch._dynamo.reset()
    for name, module in workload.modules.items():
        fields = _verdict(errors[name], errors["torch"], workload.dtype)
        rows[name] = _row(kind, size, dtype, name) | fields
        if not fields.get("is_right"):
            continue
        calls[name] = workload.step(module)
        if compiles:
            rows[name + COMPILED] = _row(kind, size, dtype, name + COMPILED) | fields
            try:
                calls[name + COMPILED] = call = workload.step(module, torch.compile(workload.forward))
                call()
            except Exception as error:  # torch.compile raises exceptions of any class.
                calls.pop(name + COMPILED, None)
                rows[name + COMPILED]["cannot"] = reason(error)

    def drop(name: str, error: Exception) -> None:
        rows[name]["failed"] = reason(error)

    timer = timing.timer_for(device)
    times = timing.measure_those_that_can(calls, timer, rounds, seconds, drop)
    for name, fields in timing.fields_of(times).items():
        rows[name] |= fields | {"tokens_per_s": workload.num_tokens / (fields["median_ms"] * 1e-3)}
        if device.type == "cuda":
            rows[name]["peak_mib"] = _peak_mib(calls[name], device)
    return list(rows.values())


def _row(kind: str, size: Size, dtype: str, name: str) -> Row:
    about = {"benchmark": "modules", "module": kind, "batch": size.batch, "length": size.length}
    about |= {"d_model": size.d_model, "heads": size.heads, "layers": size.layers if kind == "seq2seq" else 1}
    return about | {"dtype": dtype, "implementation": name}


def _verdict(error: float | str, error_of_torch: float | str, dtype: torch.dtype) -> Row:
    """The fields of a row about correctness. An error that is a text is the reason why there are no results."""
    if isinstance(error, str):
        return {"cannot": error}
    if isinstance(error_of_torch, str):
        return {"error": error, "cannot": "torch has no results, whose error is the yardstick"}
    allowed = accuracy.allowed(error_of_torch, dtype)
    return {"error": error, "allowed": allowed, "is_right": error <= allowed}


def _peak_mib(call: timing.Call, device: torch.device) -> float:
    """The peak memory of a call, without parameters, optimizer state and inputs, which are allocated before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / memory.MIB


def describe(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        if "median_ms" in row:
            cell = f"{row['median_ms']:.2f} ms {row['tokens_per_s']:.0f} tokens/s"
            cell += f" {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""
        elif why := row.get("failed") or row.get("cannot"):
            cell = f"{'failed' if 'failed' in row else 'cannot'}: {why}"
        else:
            cell = f"WRONG: {row['error']:.1e}, allowed {row['allowed']:.1e}"
        cells.append(f"{row['implementation']} {cell}")
    return " | ".join(cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser, quick="small modules, not compiled")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
                        help=f"some of {', '.join(KINDS)} (all)")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")


def main(arguments: argparse.Namespace) -> int:
    run = Session(arguments)
    size = (QUICK_SIZES if run.is_quick else SIZES)[run.device.type]
    limits = session.limits(arguments, quick=(3, 0.5), full=(20, 5.0))
    done = {(row["module"], row["dtype"], row["implementation"]) for row in select(run.earlier, benchmark="modules")}
    compiles = not (arguments.no_compile or run.is_quick)
    last = OURS + COMPILED if compiles else OURS
    todo = [(kind, dtype) for kind in arguments.only for dtype in run.dtypes if (kind, dtype, last) not in done]
    for kind, dtype in run.steps(todo, " ".join):
        try:
            rows = run_kind(kind, size, run.device, dtype, compiles, *limits)
        except Exception as error:  # Modules raise exceptions of any class.
            rows = [_row(kind, size, dtype, OURS) | {"cannot": reason(error)}]
        run.record(rows, f"{kind} {dtype} | {describe(rows)}")
    ours = select(run.rows, implementation=OURS)
    return 0 if all(row.get("is_right") and "failed" not in row for row in ours) else 1
