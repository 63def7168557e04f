"""Modules against those of torch.nn that they replace: ``python -m benchmarks modules``.

Both sides of a case have the same parameters, and the same inputs with padding. They are checked first, in eval mode,
against torch's module in float64 (outputs of real tokens, and the gradients of inputs and of all parameters), and
then timed in training mode, with dropout, in turns.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from benchmarks import machine, memory, timing
from benchmarks.cases import uniform_lengths
from benchmarks.conventions import OURS
from benchmarks.inputs import DTYPES
from benchmarks.progress import progress
from benchmarks.rivals import reason
from benchmarks.rows import Row, Writer, read, select

KINDS = ("seq2seq", "encoder-layer", "attention", "decoder-layer", "generation")
DROPOUT = 0.1
VOCABULARY = 8192
#: Copies of an implementation that `torch.compile` has compiled.
COMPILED = "-compiled"


class Size(NamedTuple):
    """tokens: in a batch of the longest sequences; layers: of encoder and of decoder."""

    tokens: int
    length: int
    d_model: int
    heads: int
    layers: int
    new_tokens: int

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.length)


SIZES = {"cuda": Size(32768, 1024, 1024, 16, 6, 128), "cpu": Size(1024, 256, 256, 4, 2, 32)}
QUICK_SIZES = {"cuda": Size(8192, 1024, 512, 8, 2, 32), "cpu": Size(128, 64, 64, 2, 1, 8)}
CHECKED_BATCH = 2


class Model(nn.Module):
    """Token ids to logits around a `torch.nn.Transformer`, or ours: all that differs between the two is that."""

    def __init__(self, transformer: nn.Transformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.embedding = nn.Embedding(VOCABULARY, transformer.d_model)
        self.generator = nn.Linear(transformer.d_model, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor, causal: Tensor) -> Tensor:
        hidden = self.transformer(
            self.embedding(source),
            self.embedding(target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            tgt_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.generator(hidden)


class Workload:
    """A kind of module at a size: torch's and ours with one set of parameters, and what is run on them."""

    def __init__(self, kind: str, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.kind, self.size, self.device, self.dtype = kind, size, device, dtype
        torch.manual_seed(0)
        theirs, ours = _pair(kind, size)
        ours.load_state_dict(theirs.state_dict())
        self.modules = {OURS: ours.to(device, dtype), "torch": theirs.to(device, dtype)}
        self.causal = causal_mask(size.length, device)

    @property
    def num_tokens(self) -> int:
        """Real ones: padding is no work that anybody asked for."""
        return sum(self._lengths(self.size.batch))

    def inputs(self, batch: int) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (batch, self.size.length)
        lengths = torch.tensor(self._lengths(self.size.batch)[:batch], device=self.device)
        inputs = {"padding": torch.arange(self.size.length, device=self.device) >= lengths[:, None]}
        if self.kind == "seq2seq":
            for name in ("source", "target", "labels"):
                inputs[name] = torch.randint(VOCABULARY, shape, generator=generator, device=self.device)
            return inputs
        for name in ("x", "memory", "dout"):
            x = torch.randn(*shape, self.size.d_model, generator=generator, device=self.device)
            inputs[name] = x.to(self.dtype)
        return inputs

    def _lengths(self, batch: int) -> tuple[int, ...]:
        return uniform_lengths(batch, self.size.length)

    def forward(self, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        padding, causal = inputs["padding"], self.causal
        if self.kind == "seq2seq":
            return module(inputs["source"], inputs["target"], padding, causal)
        x = inputs["x"]
        if self.kind == "attention":
            return module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        if self.kind == "encoder-layer":
            return module(x, src_key_padding_mask=padding)
        return module(
            x, inputs["memory"], tgt_mask=causal, tgt_key_padding_mask=padding, memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )  # fmt: skip

    def results(self, module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        """Outputs of real tokens and all gradients, in eval mode, of the first sequences."""
        inputs = self.inputs(min(CHECKED_BATCH, self.size.batch))
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        leaves = list(module.parameters())
        if "x" in inputs:
            leaves.append(inputs["x"].requires_grad_())
        module.eval()
        out = self.forward(module, inputs)
        kept = ~inputs["padding"]
        if self.kind == "seq2seq":
            loss = F.cross_entropy(out[kept], inputs["labels"][kept], reduction="sum")
            grads = torch.autograd.grad(loss, leaves)
        else:
            grads = torch.autograd.grad(out[kept], leaves, inputs["dout"][kept])
        module.train()
        return [out[kept].detach(), *grads]

    def step(self, module: nn.Module, forward: Callable | None = None) -> Callable[[], Any]:
        """One training step: forward and backward, of the whole model with the optimizer."""
        inputs = self.inputs(self.size.batch)
        forward = forward or self.forward
        kept = ~inputs["padding"]
        if self.kind != "seq2seq":
            inputs["x"].requires_grad_()
            dout = inputs["dout"] * kept[:, :, None]
            leaves = [inputs["x"], *module.parameters()]
            return lambda: torch.autograd.grad(forward(module, inputs), leaves, dout)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
        labels = inputs["labels"].masked_fill(~kept, -100)

        def train() -> None:
            optimizer.zero_grad()
            F.cross_entropy(forward(module, inputs).flatten(0, 1).float(), labels.flatten()).backward()
            optimizer.step()

        return train


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Bool like the padding, True = masked: torch merges the two without a conversion."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _pair(kind: str, size: Size) -> tuple[nn.Module, nn.Module]:
    """torch's, ours."""
    common = {"dropout": DROPOUT, "batch_first": True}
    if kind == "attention":
        arguments = (size.d_model, size.heads)
        return nn.MultiheadAttention(*arguments, **common), fused_attn.FusedMultiheadAttention(*arguments, **common)
    if kind in ("encoder-layer", "decoder-layer"):
        name = "TransformerEncoderLayer" if kind == "encoder-layer" else "TransformerDecoderLayer"
        arguments = (size.d_model, size.heads, 4 * size.d_model)
        return getattr(nn, name)(*arguments, **common), getattr(fused_attn, name)(*arguments, **common)
    arguments = (size.d_model, size.heads, size.layers, size.layers, 4 * size.d_model)
    return Model(nn.Transformer(*arguments, **common)), Model(fused_attn.Transformer(*arguments, **common))


def errors_of(workload: Workload) -> tuple[dict[str, float | str], float | None]:
    """By implementation the largest error of any result, relative to that tensor's largest entry, or why there are no
    results; and what is allowed."""
    exact = copy.deepcopy(workload.modules["torch"]).double()
    truth = workload.results(exact, torch.float64)
    errors: dict[str, float | str] = {}
    for name, module in workload.modules.items():
        # Packages raise what they like; KeyboardInterrupt is no Exception.
        try:
            results = workload.results(module, workload.dtype)
        except Exception as error:
            errors[name] = reason(error)
            continue
        # Per tensor, relative to its own size; the key bias has a gradient that is exactly zero in exact arithmetic.
        parts = [_relative(x, y, truth) for x, y in zip(results, truth, strict=True)]
        errors[name] = max(parts) if all(part == part for part in parts) else float("inf")
    return errors, _allowed(errors["torch"], workload.dtype)


def _allowed(error_of_torch: float | str, dtype: torch.dtype) -> float | None:
    """None without torch's error, the yardstick."""
    return None if isinstance(error_of_torch, str) else 2.0 * error_of_torch + 4.0 * torch.finfo(dtype).eps


def _relative(x: Tensor, truth: Tensor, all_truths: list[Tensor]) -> float:
    # A tensor much smaller than the rest is rounding of larger ones, which it is measured by.
    size = max(truth.abs().max().item(), 1e-3 * max(y.abs().max().item() for y in all_truths))
    return (x.double() - truth).abs().max().item() / size


def _row(kind: str, size: Size, dtype: str, name: str) -> Row:
    return {
        "benchmark": "modules",
        "module": kind,
        "batch": size.batch,
        "length": size.length,
        "d_model": size.d_model,
        "heads": size.heads,
        "layers": size.layers if kind in ("seq2seq", "generation") else 1,
        "dtype": dtype,
        "implementation": name,
    }


def run_kind(
    kind: str, size: Size, device: torch.device, dtype: str, compiles: bool, rounds: int, seconds: float
) -> list[Row]:
    """One row for each implementation, timed if it is right."""
    if kind == "generation":
        return run_generation(size, device, dtype, rounds, seconds)
    workload = Workload(kind, size, device, DTYPES[dtype])
    errors, allowed = errors_of(workload)
    rows, calls = {}, {}
    for name, module in workload.modules.items():
        fields = _verdict(errors[name], allowed)
        rows[name] = _row(kind, size, dtype, name) | fields
        if not fields.get("is_right"):
            continue
        calls[name] = workload.step(module)
        if compiles:
            torch._dynamo.reset()
            rows[name + COMPILED] = _row(kind, size, dtype, name + COMPILED) | fields
            # Packages raise what they like; KeyboardInterrupt is no Exception.
            try:
                calls[name + COMPILED] = _compiled_step(workload, module)
            except Exception as error:
                rows[name + COMPILED]["cannot"] = reason(error)
    _time(calls, timing.timer_for(device), rounds, seconds, rows, workload.num_tokens)
    if device.type == "cuda":
        for name, call in calls.items():
            rows[name]["peak_mib"] = _peak_mib(call, device)
    return list(rows.values())


def _compiled_step(workload: Workload, module: nn.Module) -> timing.Call:
    call = workload.step(module, torch.compile(workload.forward))
    call()
    return call


def _verdict(error: float | str, allowed: float | None) -> Row:
    """error: of the results, or why there are none."""
    if isinstance(error, str):
        return {"cannot": error}
    if allowed is None:
        return {"error": error, "cannot": "torch has no results, whose error is the yardstick"}
    return {"error": error, "allowed": allowed, "is_right": error <= allowed}


def _time(
    calls: dict[str, timing.Call], timer: timing.Timer, rounds: int, seconds: float, rows: dict[str, Row], tokens: int
) -> None:
    """Adds times to the rows; calls that fail go, and their rows say why. tokens: of one call."""

    def drop(name: str, error: Exception) -> None:
        rows[name]["failed"] = reason(error)

    measured = timing.measure_those_that_can(calls, timer, rounds, seconds, drop)
    for name, times in measured.times.items():
        rows[name] |= timing.times_of(times)
        rows[name]["tokens_per_s"] = tokens / (rows[name]["median_ms"] * 1e-3)


def _peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Beyond what is allocated anyway: parameters, optimizer state, inputs."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / memory.MIB


class Generation:
    """Greedy decoding with one set of parameters: ours with a KV cache, and torch's, whose decoder has none and so
    computes the whole target again for each token."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device = size, device
        torch.manual_seed(0)
        theirs, ours = _pair("seq2seq", size)
        ours.load_state_dict(theirs.state_dict())
        self.models = {OURS: ours.to(device, dtype).eval(), "torch": theirs.to(device, dtype).eval()}
        generator = torch.Generator(device).manual_seed(0)
        self.source, self.target = (
            torch.randint(VOCABULARY, (size.batch, length), generator=generator, device=device)
            for length in (size.length, size.new_tokens)
        )
        lengths = torch.tensor(uniform_lengths(size.batch, size.length), device=device)
        self.padding = torch.arange(size.length, device=device) >= lengths[:, None]

    @torch.no_grad()
    def logits(self, name: str, model: Model, batch: int, target: Tensor | None = None) -> Tensor:
        """(B, N, V), from which each new token is chosen. target (B, N): take these instead of the likeliest."""
        transformer, padding = model.transformer, self.padding[:batch]
        memory = transformer.encoder(model.embedding(self.source[:batch]), src_key_padding_mask=padding)
        cache = fused_attn.KVCache(self.size.layers) if name == OURS else None
        tokens = self.target[:batch, :1]
        logits = []
        for step in range(1, self.size.new_tokens + 1):
            if cache is not None:
                x = model.embedding(tokens[:, -1:])
                hidden = transformer.decoder(x, memory, memory_key_padding_mask=padding, cache=cache)
            else:
                causal = causal_mask(step, self.device)
                hidden = transformer.decoder(
                    model.embedding(tokens), memory, tgt_mask=causal, memory_key_padding_mask=padding,
                    tgt_is_causal=True,
                )  # fmt: skip
            logits.append(model.generator(hidden[:, -1]))
            following = logits[-1].argmax(dim=-1) if target is None else target[:, step - 1]
            tokens = torch.cat([tokens, following[:, None]], dim=1)
        return torch.stack(logits, dim=1)

    def errors(self) -> dict[str, float | str]:
        """Or why there are no results. Of the logits along one random target, of the first sequences."""
        batch = min(CHECKED_BATCH, self.size.batch)
        target = self.target[:batch]
        exact = copy.deepcopy(self.models["torch"]).double()
        truth = self.logits("torch", exact, batch, target)
        errors: dict[str, float | str] = {}
        for name, model in self.models.items():
            # Packages raise what they like; KeyboardInterrupt is no Exception.
            try:
                errors[name] = _relative(self.logits(name, model, batch, target), truth, [truth])
            except Exception as error:
                errors[name] = reason(error)
        return errors


def run_generation(size: Size, device: torch.device, dtype: str, rounds: int, seconds: float) -> list[Row]:
    generation = Generation(size, device, DTYPES[dtype])
    errors = generation.errors()
    allowed = _allowed(errors["torch"], DTYPES[dtype])
    rows, calls = {}, {}
    for name, model in generation.models.items():
        fields = {"new_tokens": size.new_tokens} | _verdict(errors[name], allowed)
        rows[name] = _row("generation", size, dtype, name) | fields
        if fields.get("is_right"):
            calls[name] = lambda name=name, model=model: generation.logits(name, model, size.batch)
    # The host's part belongs to it: a token is chosen before the next one is computed.
    timer = timing.CpuTimer() if device.type == "cpu" else timing.WallTimer(device)
    _time(calls, timer, rounds, seconds, rows, size.batch * size.new_tokens)
    return list(rows.values())


def describe(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        if "median_ms" in row:
            cell = f"{row['implementation']} {row['median_ms']:.2f} ms {row['tokens_per_s']:.0f} tokens/s"
            cells.append(cell + (f" {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""))
        elif why := row.get("failed") or row.get("cannot"):
            cells.append(f"{row['implementation']} {'failed' if 'failed' in row else 'cannot'}: {why}")
        else:
            cells.append(f"{row['implementation']} WRONG: {row['error']:.1e}, allowed {row['allowed']:.1e}")
    return " | ".join(cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small modules, not compiled: under a minute")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, help="at most so many rounds a case (default 20, with --quick 3)")
    parser.add_argument("--seconds", type=float, help="at most so long a case (default 5, with --quick 0.5)")
    parser.add_argument("--threads", type=int, help="of a CPU; default: torch's")
    parser.add_argument("--minutes", type=float, help="begin no case after this time")
    parser.add_argument("--resume", action="store_true", help="leave out what --out has rows of")
    parser.add_argument("--commit", help="what rows say where the source tree has no history")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")


def main(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    size = (QUICK_SIZES if arguments.quick else SIZES)[device.type]
    rounds = arguments.rounds or (3 if arguments.quick else 20)
    seconds = arguments.seconds or (0.5 if arguments.quick else 5.0)
    compiles = not (arguments.no_compile or arguments.quick)
    dtypes = arguments.dtype or (["bfloat16"] if device.type == "cuda" else ["float32"])
    todo = [(kind, dtype) for kind in arguments.only for dtype in dtypes]
    if arguments.resume and arguments.out is not None and arguments.out.exists():
        wanted = OURS + COMPILED if compiles else OURS
        done = {
            (row["module"], row["dtype"])
            for row in select(read(arguments.out), benchmark="modules")
            if row["implementation"] == wanted or (row["module"] == "generation" and row["implementation"] == OURS)
        }
        todo = [one for one in todo if one not in done]
    writer = Writer(arguments.out, machine.about(device, arguments.commit))
    print(" | ".join(f"{name} {value}" for name, value in writer.about.items()), flush=True)
    end = float("inf") if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    with progress(len(todo)) as advance:
        for number, (kind, dtype) in enumerate(todo):
            if time.monotonic() >= end:
                print(f"time is up: {len(todo) - number} of {len(todo)} modules not run", flush=True)
                break
            # Packages raise what they like; KeyboardInterrupt is no Exception.
            try:
                rows = run_kind(kind, size, device, dtype, compiles, rounds, seconds)
            except Exception as error:
                rows = [_row(kind, size, dtype, OURS) | {"cannot": reason(error)}]
            writer.record(rows)
            print(f"{kind} {dtype} | {describe(rows)}", flush=True)
            advance(kind)
    ours = select(writer.rows, implementation=OURS)
    return 0 if all(row.get("is_right") and "failed" not in row for row in ours) else 1
