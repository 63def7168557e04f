"""Generation token by token, and attention of one query over a cache: ``python -m benchmarks generation``.

Four tables:

- "generation": greedy generation with an encoder-decoder model. Ours, torch.nn without a cache, the best loop with a
  cache that a user of torch.nn can write, and a model of Hugging Face transformers of the same sizes with SDPA and a
  static cache. The first three have the same parameters, and must generate the same tokens.
- "step": the time of one step against the number of tokens in the cache, for the loop and for ours.
- "cache": attention of one query over S rows of a cache: ours over a static cache and over pages of 64 and of 16 rows,
  torch's SDPA, and on a GPU cuDNN and FlashAttention-3. Rates are compared with the rate of the machine: of a large
  copy on a GPU; on a CPU, of a sum over the same bytes in the same rounds.
- "serving": a step of a server over pages, with prompts and single tokens in one call (serving.py).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import machine, rivals, serving, session, timing
from benchmarks.accuracy import Reference
from benchmarks.cases import Case
from benchmarks.conventions import OURS
from benchmarks.inputs import DTYPES, Inputs
from benchmarks.rivals import reason
from benchmarks.rows import Row, select
from benchmarks.session import Session
from fused_attn import Seq2SeqTransformer, fused_attention, fused_attention_paged
from fused_attn.nn import generation
from fused_attn.nn.seq2seq import sinusoidal_positions

VOCABULARY = 8192
TABLES = ("generation", "step", "cache", "serving")
#: torch.nn without a cache, a loop with a cache, and transformers.
TORCH, LOOP, TRANSFORMERS = "torch", "torch-cache", "transformers-static"
TRANSFORMERS_PACKAGE = "transformers"
#: The rows of a page in the table "cache". Each page size is an implementation of its own.
PAGED = {f"{OURS}-pages-{rows}": rows for rows in (64, 16)}
#: The rivals of the table "cache", by device. On a CPU, torch has one kernel.
CACHE_RIVALS = {"cuda": ("torch", "torch-cudnn", "flash_attn3"), "cpu": ("torch",)}
#: The query heads that share a key head in the table "cache".
GROUPS = (1, 4)
CACHE_SECONDS = 4.0
#: The call that reads all keys and values, and nothing else.
SUM = "sum"


class CacheSize(NamedTuple):
    """The query heads, the head dim and the lengths of the table "cache", whose batch size is 1."""

    heads: int
    head_dim: int
    lengths: tuple[int, ...]


#: A CPU gets 8 of the 32 heads of a GPU. The longest caches are larger than the cache of any CPU and GPU.
CACHES = {
    "cuda": CacheSize(32, 128, (128, 512, 2048, 4096, 8192, 65536)),
    "cpu": CacheSize(8, 128, (128, 512, 2048, 8192, 65536)),
}
QUICK_CACHES = {"cuda": CacheSize(4, 64, (64, 128)), "cpu": CacheSize(4, 32, (64, 128))}


@dataclass(frozen=True)
class CacheCase(Case):
    """A case of the table "cache". group: the number of query heads that share a key head"""

    group: int = 1

    @property
    def kv_heads(self) -> int:
        return self.heads // self.group


class Size(NamedTuple):
    """new_tokens: of the table "generation"; lengths: tokens in the cache, of the table "step" """

    batch: int
    source: int
    d_model: int
    heads: int
    layers: int
    new_tokens: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.source, *self.new_tokens, *self.lengths)


SIZES = {
    "cuda": Size(32, 256, 1024, 16, 6, (32, 128, 512), (128, 512, 2048, 8192)),
    "cpu": Size(4, 256, 256, 4, 2, (32, 128), (128, 512, 2048, 8192)),
}
QUICK_SIZES = {"cuda": Size(4, 32, 128, 2, 2, (8,), (8, 16)), "cpu": Size(2, 16, 64, 2, 1, (8,), (8, 16))}


class Loop:
    """Greedy generation with plain operators of torch, on the parameters of a `Seq2SeqTransformer`.

    The keys and values of the memory are computed once. Those of the target are written into buffers of the final
    length. Each step reads the filled part of the buffers, and makes no mask for it.
    """

    def __init__(self, model: Seq2SeqTransformer, heads: int) -> None:
        self.model, self.heads = model, heads
        self.positions = sinusoidal_positions(model.max_len, model.d_model, dtype=model.generator.weight.dtype)
        self.positions = self.positions.to(model.generator.weight.device)

    def start(self, src: Tensor, length: int) -> None:
        memory, padding = self.model.encode(src)
        self.mask = padding.logical_not()[:, None, None]
        self.memory_rows, self.rows = [], []
        for layer in self.model.decoder.layers:
            cross = layer.multihead_attn
            weight, bias = (x[self.model.d_model :] for x in (cross.in_proj_weight, cross.in_proj_bias))
            keys, values = self._heads(F.linear(memory, weight, bias), 2)
            self.memory_rows.append((keys.contiguous(), values.contiguous()))
            shape = (src.shape[0], self.heads, length, self.model.d_model // self.heads)
            self.rows.append((memory.new_zeros(shape), memory.new_zeros(shape)))

    def step(self, token: Tensor, position: int) -> Tensor:
        """The logits (B, V) after a token (B,) at a position."""
        model = self.model
        x = model.tgt_embedding(token)[:, None] * math.sqrt(model.d_model) + self.positions[position]
        for layer, (keys, values), memory_rows in zip(model.decoder.layers, self.rows, self.memory_rows, strict=True):
            own, cross = layer.self_attn, layer.multihead_attn
            q, k, v = self._heads(F.linear(x, own.in_proj_weight, own.in_proj_bias), 3)
            keys[:, :, position : position + 1], values[:, :, position : position + 1] = k, v
            out = scaled_dot_product_attention(q, keys[:, :, : position + 1], values[:, :, : position + 1])
            x = layer.norm1(x + own.out_proj(out.transpose(1, 2).flatten(2)))
            weight, bias = (p[: model.d_model] for p in (cross.in_proj_weight, cross.in_proj_bias))
            (q,) = self._heads(F.linear(x, weight, bias), 1)
            out = scaled_dot_product_attention(q, *memory_rows, attn_mask=self.mask)
            x = layer.norm2(x + cross.out_proj(out.transpose(1, 2).flatten(2)))
            x = layer.norm3(x + layer.linear2(layer.activation(layer.linear1(x))))
        return model.generator(x[:, 0])

    def generate(self, src: Tensor, count: int) -> Tensor:
        self.start(src, count)
        tokens = [src.new_full(src.shape[:1], self.model.sos_id)]
        for position in range(count):
            tokens.append(_likeliest(self.model, self.step(tokens[-1], position)))
        return torch.stack(tokens[1:], dim=1)

    def _heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """`count` tensors (B, H, L, D) of x (B, L, count * H * D)."""
        return x.view(*x.shape[:2], count, self.heads, -1).transpose(1, 3).unbind(2)


class TorchModel(nn.Module):
    """The encoder and decoder of torch.nn with the parameters of a `Seq2SeqTransformer`. It has no cache."""

    def __init__(self, model: Seq2SeqTransformer, size: Size) -> None:
        super().__init__()
        self.model = model
        weight = model.generator.weight
        options = {"dropout": 0.0, "batch_first": True, "device": weight.device, "dtype": weight.dtype}
        sizes = (size.d_model, size.heads, 4 * size.d_model)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(*sizes, **options), size.layers)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, **options), size.layers)
        self.encoder.load_state_dict(model.encoder.state_dict())
        self.decoder.load_state_dict(model.decoder.state_dict())
        self.eval()

    def generate(self, src: Tensor, count: int) -> Tensor:
        model, padding = self.model, src == self.model.pad_id
        positions = sinusoidal_positions(
            model.max_len, model.d_model, device=src.device, dtype=model.generator.weight.dtype
        )
        scale = math.sqrt(model.d_model)
        memory = self.encoder(
            model.src_embedding(src) * scale + positions[: src.shape[1]], src_key_padding_mask=padding
        )
        causal = torch.ones(count, count, dtype=torch.bool, device=src.device).triu(1)
        tokens = src.new_full((src.shape[0], 1), model.sos_id)
        for end in range(1, count + 1):
            x = model.tgt_embedding(tokens) * scale + positions[:end]
            x = self.decoder(
                x, memory, tgt_mask=causal[:end, :end], tgt_is_causal=True, memory_key_padding_mask=padding
            )
            tokens = torch.cat((tokens, _likeliest(model, model.generator(x[:, -1]))[:, None]), dim=1)
        return tokens[:, 1:]


def _likeliest(model: Seq2SeqTransformer, logits: Tensor) -> Tensor:
    for token in (model.pad_id, model.sos_id):  # a list of both would be a tensor on the CPU, which a GPU waits for
        logits[:, token] = -math.inf
    return logits.argmax(dim=-1)


def _model(size: Size, device: torch.device, dtype: torch.dtype) -> Seq2SeqTransformer:
    """A model that never generates <eos>, so that every target has the wanted length."""
    torch.manual_seed(0)
    model = Seq2SeqTransformer(
        VOCABULARY, VOCABULARY, size.d_model, size.heads, size.layers, size.layers, 4 * size.d_model, dropout=0.0,
        max_len=size.longest + 1, device=device, dtype=dtype,
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.generator.bias[model.eos_id] = -1e4
    return model


def _source(size: Size, device: torch.device) -> Tensor:
    """(B, S) tokens, half of whose rows end with padding."""
    src = torch.randint(3, VOCABULARY, (size.batch, size.source), generator=torch.Generator().manual_seed(0))
    src[::2, size.source * 3 // 4 :] = 0
    return src.to(device)


def _transformers(size: Size, src: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """Greedy generation with BART of transformers at these sizes, with SDPA and a static cache."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY, d_model=size.d_model, encoder_layers=size.layers, decoder_layers=size.layers,
        encoder_attention_heads=size.heads, decoder_attention_heads=size.heads, encoder_ffn_dim=4 * size.d_model,
        decoder_ffn_dim=4 * size.d_model, activation_function="relu", max_position_embeddings=1024, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = BartForConditionalGeneration(config).to(src.device, dtype).eval()
    mask = (src != 0).long()
    return lambda count: model.generate(
        src, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        cache_implementation="static", disable_compile=True,
    )  # fmt: skip


@torch.no_grad()
def generation_rows(size: Size, device: torch.device, dtype: str, count: int, rounds: int, seconds: float) -> list[Row]:
    """The table "generation" for one number of new tokens."""
    model, src = _model(size, device, DTYPES[dtype]), _source(size, device)
    loop, torch_model = Loop(model, size.heads), TorchModel(model, size)
    calls: dict[str, timing.Call] = {
        OURS: lambda: model.generate(src, count),
        LOOP: lambda: loop.generate(src, count),
        TORCH: lambda: torch_model.generate(src, count),
    }
    about = {"benchmark": "generation", "table": "generation", "batch": size.batch, "length": size.source}
    about |= {"d_model": size.d_model, "heads": size.heads, "layers": size.layers, "new_tokens": count, "dtype": dtype}
    rows = {name: about | {"implementation": name} for name in (*calls, TRANSFORMERS)}
    tokens: dict[str, Any] = {name: call() for name, call in calls.items()}
    for name, found in tokens.items():
        rows[name]["same_tokens"] = (found == tokens[TORCH]).double().mean().item()
    try:
        version = importlib.metadata.version(TRANSFORMERS_PACKAGE)
        rows[TRANSFORMERS] |= {"package": TRANSFORMERS_PACKAGE, "version": version}
        transformers_generate = _transformers(size, src, DTYPES[dtype])
        calls[TRANSFORMERS] = lambda: transformers_generate(count)
        calls[TRANSFORMERS]()
    except Exception as error:  # transformers may be missing, and raises exceptions of any class.
        calls.pop(TRANSFORMERS, None)
        rows[TRANSFORMERS]["cannot"] = reason(error)
    _measure(rows, calls, timing.timer_for(device, waits=True), rounds, seconds)
    for row in rows.values():
        if "median_ms" in row:
            row["tokens_per_s"] = size.batch * count / (row["median_ms"] * 1e-3)
            row["ms_per_token"] = row["median_ms"] / count
    return list(rows.values())


@torch.no_grad()
def step_rows(size: Size, device: torch.device, dtype: str, count: int, rounds: int, seconds: float) -> list[Row]:
    """The table "step": one step, whose token is token number `count` of its target."""
    model, src = _model(size, device, DTYPES[dtype]), _source(size, device)
    loop = Loop(model, size.heads)
    loop.start(src, count)
    token = src[:, 0].clone()
    prefix = torch.randint(3, VOCABULARY, (size.batch, count - 1), device=device)
    search = generation.Search(model, src, prefix, generation.Settings(max_new_tokens=1))
    search.start_cache(size.layers)
    position, cache = search.position.clone(), search.cache

    def ours() -> None:
        search.position.copy_(position)
        cache.crop(position)
        search.step()

    def theirs() -> None:
        _likeliest(model, loop.step(token, count - 1))

    calls: dict[str, timing.Call] = {OURS: ours, LOOP: theirs}
    if device.type == "cuda":
        calls[OURS] = timing.graph_of(lambda: ours, device)
    about = {"benchmark": "generation", "table": "step", "batch": size.batch, "length": count, "d_model": size.d_model}
    about |= {"heads": size.heads, "layers": size.layers, "dtype": dtype}
    rows = {name: about | {"implementation": name} for name in calls}
    _measure(rows, calls, timing.timer_for(device, waits=True), rounds, seconds)
    return list(rows.values())


@torch.no_grad()
def cache_rows(
    case: CacheCase, device: torch.device, copy_rate: float | None, rounds: int, seconds: float
) -> list[Row]:
    """The table "cache" for one case.

    copy_rate: bytes per second of a large copy, in GB/s; None = the calls take turns with a sum over the same bytes
    """
    inputs = Inputs(case, device)
    reference = Reference(inputs)
    query, keys, values = inputs.qkv
    lengths = torch.full((case.batch,), case.length, dtype=torch.int32, device=device)
    options: dict[str, Any] = {"enable_gqa": case.group > 1}
    calls: dict[str, timing.Call] = {OURS: lambda: fused_attention(query, keys, values, key_lengths=lengths, **options)}
    for name, page_size in PAGED.items():
        pages = _pages_of(inputs, page_size)
        calls[name] = lambda pages=pages: fused_attention_paged(query, *pages, lengths)
    about = {"benchmark": "generation", "table": "cache", "shape": list(case.shape), "kv_heads": case.kv_heads}
    about |= {"dtype": case.dtype}
    rows: dict[str, Row] = {}
    for name in (*calls, *CACHE_RIVALS[device.type]):
        rows[name] = about | {"implementation": name}
        try:
            if name not in calls:
                rows[name] |= rivals.version_of(name)
                prepared = rivals.fastest(name, inputs)
                rows[name]["given"] = prepared.given
                calls[name] = rivals.call_of(prepared, inputs)
            error = reference.error({"out": calls[name]()})
        except Exception as problem:  # Packages raise exceptions of any class.
            calls.pop(name, None)
            rows[name]["cannot"] = reason(problem)
            continue
        rows[name] |= {"error": error, "allowed": reference.allowed_error(), "is_right": reference.is_right(error)}
        if not rows[name]["is_right"]:
            del calls[name]
    if copy_rate is None:
        # A sum over bfloat16 converts. So the same bytes are summed as float32.
        words = [x.view(torch.float32) for x in (keys, values)]
        rows[SUM] = {}
        calls[SUM] = lambda: [x.sum() for x in words]
    timer = timing.WarmTimer() if device.type == "cpu" else timing.timer_for(device)
    _measure(rows, calls, timer, rounds, seconds)
    moved = case.fewest_bytes(keys.element_size()) / 1e6
    rate = {"copy_gb_per_s": copy_rate} if copy_rate else {"read_gb_per_s": moved / rows.pop(SUM)["median_ms"]}
    for row in rows.values():
        if "median_ms" in row:
            row |= rate | {"gb_per_s": moved / row["median_ms"]}
            row["machine_fraction"] = row["gb_per_s"] / next(iter(rate.values()))
    return list(rows.values())


def _pages_of(inputs: Inputs, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(key pages, value pages, block table) with the keys and values of the case. The order of the pages is random."""
    case = inputs.case
    table = torch.randperm(case.batch * case.length // page_size, device=inputs.device).view(case.batch, -1)
    pages = []
    for x in inputs.qkv[1:]:
        rows = x.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)  # (pages, Hkv, rows of a page, D)
        found = torch.empty_like(rows, memory_format=torch.contiguous_format)
        found[table.flatten()] = rows
        pages.append(found.transpose(1, 2))
    return pages[0], pages[1], table.int()


def _measure(rows: dict[str, Row], calls: dict[str, timing.Call], timer, rounds: int, seconds: float) -> None:
    """Times the calls in turns, and adds the times to their rows."""
    drop = lambda name, error: rows[name].update(failed=reason(error))  # noqa: E731
    times = timing.measure_those_that_can(calls, timer, rounds, seconds, drop)
    for name, fields in timing.fields_of(times).items():
        rows[name] |= fields | {"timing": timer.kind}


RUNS = {"generation": generation_rows, "step": step_rows}


def describe(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        if "median_ms" not in row:
            why = row.get("failed") or row.get("cannot") or f"WRONG: {row['error']:.1e}"
            cells.append(f"{row['implementation']} {why}")
            continue
        cell = f"{row['implementation']} {row['median_ms']:.3f} ms"
        cell += f" {row['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in row else ""
        cell += f" {row['gb_per_s']:.1f} GB/s, {row['machine_fraction']:.2f}" if "gb_per_s" in row else ""
        cell += f" ({row['over_ours']:.2f} x ours)" if "over_ours" in row else ""
        cells.append(cell)
    return " | ".join(cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser, quick="a small model and few tokens")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE",
                        help=f"some of {', '.join(TABLES)} (all)")  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    run = Session(arguments)
    size = (QUICK_SIZES if run.is_quick else SIZES)[run.device.type]
    limits = session.limits(arguments, quick=(3, 0.5), full=(20, 10.0))
    caches = (QUICK_CACHES if run.is_quick else CACHES)[run.device.type]
    mixes = (serving.QUICK_MIXES if run.is_quick else serving.MIXES)[run.device.type]
    lengths = {"generation": size.new_tokens, "step": size.lengths, "cache": caches.lengths, "serving": mixes}
    copy_rate = functools.cache(lambda: machine.copy_gb_per_s(run.device, run.is_quick))
    done = [_step_of(row) for row in select(run.earlier, benchmark="generation")]
    todo = [
        (table, dtype, length, group)
        for dtype in run.dtypes
        for table in arguments.only
        for length in lengths[table]
        for group in (GROUPS if table == "cache" else (1,))
        if (table, dtype, length, group) not in done
    ]
    for table, dtype, length, group in run.steps(todo, lambda step: f"{step[0]} {step[1]} {step[2]}"):
        if table == "cache":
            case = CacheCase(1, caches.heads, length, caches.head_dim, "decode", dtype, "forward", group)
            rate = copy_rate() if run.device.type == "cuda" else None
            rows = cache_rows(case, run.device, rate, limits[0], min(limits[1], CACHE_SECONDS))
        elif table == "serving":
            timer = timing.WarmTimer() if run.device.type == "cpu" else timing.timer_for(run.device)
            bounds = {"timer": timer, "rounds": limits[0], "seconds": min(limits[1], CACHE_SECONDS)}
            measure = functools.partial(_measure, **bounds)
            rows = serving.serving_rows(length, mixes[length], run.device, dtype, measure)
        else:
            rows = RUNS[table](size, run.device, dtype, length, *limits)
        label = f"{table} {length} {dtype}" + (f", {group} heads share keys" if group > 1 else "")
        run.record(rows, f"{label} | {describe(rows)}")
    ours = select(run.rows, implementation=OURS)
    is_exact = run.dtypes == ["float32"]
    wrong = [row for row in ours if "failed" in row or not row.get("is_right", True)]
    return 1 if wrong or (is_exact and any(row.get("same_tokens", 1.0) != 1.0 for row in ours)) else 0


def _step_of(row: Row) -> tuple[str, str, int | str, int]:
    """(table, dtype, length or mix, query heads that share a key head) of a row."""
    if row["table"] == "serving":
        return row["table"], row["dtype"], row["mix"], 1
    if row["table"] != "cache":
        return row["table"], row["dtype"], row["new_tokens" if row["table"] == "generation" else "length"], 1
    return row["table"], row["dtype"], row["shape"][2], row["shape"][1] // row["kv_heads"]
