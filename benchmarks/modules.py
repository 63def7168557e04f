"""Modules against those of torch.nn that they replace: ``python -m benchmarks modules``.

Both sides of a case have the same parameters, and the same inputs with padding. They are checked first, in eval mode,
against torch's module in float64: outputs of real tokens, and the gradients of inputs and of all parameters. They are
then timed in training mode, with dropout, in turns.
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

#: The names of the layers in torch.nn and in ours.
LAYERS = {"encoder-layer": "TransformerEncoderLayer", "decoder-layer": "TransformerDecoderLayer"}
KINDS = ("seq2seq", "encoder-layer", "attention", "decoder-layer")
DROPOUT = 0.1
VOCABULARY = 8192
#: Copies of an implementation that `torch.compile` has compiled.
COMPILED = "-compiled"
CHECKED_BATCH = 2


class Size(NamedTuple):
    """tokens: in a batch of the longest sequences; layers: of encoder and of decoder."""

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
    """Token ids to logits around a `torch.nn.Transformer`, or ours: nothing else differs between the two."""

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
    """package: torch.nn or fused_attn."""
    common = {"dropout": DROPOUT, "batch_first": True}
    if kind == "attention":
        name = "MultiheadAttention" if package is nn else "FusedMultiheadAttention"
        return getattr(package, name)(size.d_model, size.heads, **common)
    if kind in LAYERS:
        return getattr(package, LAYERS[kind])(size.d_model, size.heads, 4 * size.d_model, **common)
    sizes = (size.d_model, size.heads, size.layers, size.layers, 4 * size.d_model)
    return Model(package.Transformer(*sizes, **common))


class Workload:
    """A kind of module at a size: torch's and ours with one set of parameters, and what is run on them."""

    def __init__(self, kind: str, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.kind, self.size, self.device, self.dtype = kind, size, device, dtype
        torch.manual_seed(0)
        theirs, ours = _module(kind, size, nn), _module(kind, size, fused_attn)
        ours.load_state_dict(theirs.state_dict())
        self.modules = {OURS: ours.to(device, dtype), "torch": theirs.to(device, dtype)}
        # Bool like the padding, True = masked: torch merges the two without a conversion.
        self.causal = torch.ones(size.length, size.length, dtype=torch.bool, device=device).triu(1)
        lengths = uniform_lengths(size.batch, size.length)
        self.num_tokens = sum(lengths)  # real ones: padding is no work that anybody asked for
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
        """Outputs of real tokens and all gradients, in eval mode, of the first sequences."""
        inputs = {name: x[:CHECKED_BATCH].detach() for name, x in self.inputs.items()}
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        leaves = list(module.parameters())
        if self.kind != "seq2seq":
            leaves.append(inputs["x"].requires_grad_())
        out = self.forward(module.eval(), inputs)
        kept = ~inputs["padding"]
        if self.kind == "seq2seq":
            loss = F.cross_entropy(out[kept], inputs["labels"][kept], reduction="sum")
            grads = torch.autograd.grad(loss, leaves)
        else:
            grads = torch.autograd.grad(out[kept], leaves, inputs["dout"][kept])
        module.train()
        return [out[kept].detach(), *grads]

    def step(self, module: nn.Module, forward: Callable | None = None) -> timing.Call:
        """One training step: forward and backward, of the whole model with the optimizer."""
        inputs, forward = self.inputs, forward or self.forward
        kept = ~inputs["padding"]
        if self.kind != "seq2seq":
            dout = inputs["dout"] * kept[:, :, None]
            leaves = [inputs["x"].requires_grad_(), *module.parameters()]
            return lambda: torch.autograd.grad(forward(module, inputs), leaves, dout)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
        labels = inputs["labels"].masked_fill(~kept, -100)

        def train() -> None:
            optimizer.zero_grad()
            F.cross_entropy(forward(module, inputs).flatten(0, 1).float(), labels.flatten()).backward()
            optimizer.step()

        return train


def _error(workload: Workload, module: nn.Module, truth: list[Tensor]) -> float | str:
    """The largest error of any result, relative to that tensor's largest entry; or why there are no results."""
    # Packages raise what they like; KeyboardInterrupt is no Exception.
    try:
        results = workload.results(module, workload.dtype)
    except Exception as error:
        return reason(error)
    # A tensor much smaller than the rest is rounding of larger ones, which it is measured by: the key bias has a
    # gradient that is exactly zero in exact arithmetic.
    largest = max(y.abs().max().item() for y in truth)
    errors = [
        (x.double() - y).abs().max().item() / max(y.abs().max().item(), 1e-3 * largest)
        for x, y in zip(results, truth, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("inf")


def run_kind(
    kind: str, size: Size, device: torch.device, dtype: str, compiles: bool, rounds: int, seconds: float
) -> list[Row]:
    """One row for each implementation, timed if it is right."""
    workload = Workload(kind, size, device, DTYPES[dtype])
    truth = workload.results(copy.deepcopy(workload.modules["torch"]).double(), torch.float64)
    errors = {name: _error(workload, module, truth) for name, module in workload.modules.items()}
    rows: dict[str, Row] = {}
    calls: dict[str, timing.Call] = {}
    for name, module in workload.modules.items():
        fields = _verdict(errors[name], errors["torch"], workload.dtype)
        rows[name] = _row(kind, size, dtype, name) | fields
        if not fields.get("is_right"):
            continue
        calls[name] = workload.step(module)
        if compiles:
            torch._dynamo.reset()
            rows[name + COMPILED] = _row(kind, size, dtype, name + COMPILED) | fields
            # Packages raise what they like; KeyboardInterrupt is no Exception.
            try:
                calls[name + COMPILED] = call = workload.step(module, torch.compile(workload.forward))
                call()
            except Exception as error:
                calls.pop(name + COMPILED, None)
                rows[name + COMPILED]["cannot"] = reason(error)

    def drop(name: str, error: Exception) -> None:
        rows[name]["failed"] = reason(error)

    times = timing.measure_those_that_can(calls, timing.timer_for(device), rounds, seconds, drop)
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
    """Errors are those of the results, or why there are none."""
    if isinstance(error, str):
        return {"cannot": error}
    if isinstance(error_of_torch, str):
        return {"error": error, "cannot": "torch has no results, whose error is the yardstick"}
    allowed = accuracy.allowed(error_of_torch, dtype)
    return {"error": error, "allowed": allowed, "is_right": error <= allowed}


def _peak_mib(call: timing.Call, device: torch.device) -> float:
    """Beyond what is allocated anyway: parameters, optimizer state, inputs."""
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
    session.add_arguments(parser, "small modules, not compiled")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")


def main(arguments: argparse.Namespace) -> int:
    run = Session(arguments)
    size = (QUICK_SIZES if run.is_quick else SIZES)[run.device.type]
    compiles = not (arguments.no_compile or run.is_quick)
    limits = arguments.rounds or (3 if run.is_quick else 20), arguments.seconds or (0.5 if run.is_quick else 5.0)
    done = {(row["module"], row["dtype"], row["implementation"]) for row in select(run.earlier, benchmark="modules")}
    todo = [
        (kind, dtype)
        for kind in arguments.only
        for dtype in run.dtypes
        if (kind, dtype, OURS + COMPILED if compiles else OURS) not in done
    ]
    for kind, dtype in run.steps(todo, " ".join):
        # Packages raise what they like; KeyboardInterrupt is no Exception.
        try:
            rows = run_kind(kind, size, run.device, dtype, compiles, *limits)
        except Exception as error:
            rows = [_row(kind, size, dtype, OURS) | {"cannot": reason(error)}]
        run.record(rows, f"{kind} {dtype} | {describe(rows)}")
    ours = select(run.rows, implementation=OURS)
    return 0 if all(row.get("is_right") and "failed" not in row for row in ours) else 1
