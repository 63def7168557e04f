"""Attention of a server's step over pages: the table "serving" of ``python -m benchmarks generation``.

In a step, some sequences read their prompt, or a part of it, and the others get one token. A mix says how many queries
and keys each sequence has. Ours is one call with packed queries. The rivals:

- ours with a call for each sequence
- torch: for each sequence, its pages are gathered, and `scaled_dot_product_attention` gets a lower-right causal mask;
  the heads of a single query that share a key head become rows of one head if torch is faster so
- FlashAttention-3 with packed queries and the same pages (on a GPU)
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import accuracy, timing
from benchmarks.conventions import OURS
from benchmarks.inputs import DTYPES
from benchmarks.rivals import flash_module, reason, seconds_of, version_of
from benchmarks.rows import Row
from fused_attn import fused_attention_paged

#: Ours with a call for each sequence.
EACH = f"{OURS}-each"
TORCH, FLASH = "torch", "flash_attn3"
PAGE_SIZE = 16
HEAD_DIM = 128
GROUP = 4  # query heads that share a key head


class Mix(NamedTuple):
    """queries, keys: of each sequence; the queries are the last ones of the keys"""

    heads: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]


def _mixes(heads: int, sequences: int, prompt: int, cached: int) -> dict[str, Mix]:
    """The mixes by name, for so many sequences, prompts of about `prompt` tokens, and caches of `cached` tokens."""
    prompts = tuple(prompt * share // 4 for share in (1, 2, 4, 6))
    tokens = (1,) * (sequences - 1)
    return {
        "tokens": Mix(heads, (1, *tokens), (cached,) * sequences),
        "prompts": Mix(heads, prompts, prompts),
        "a prompt and tokens": Mix(heads, (prompt, *tokens), (prompt, *(cached,) * len(tokens))),
        "a part of a prompt and tokens": Mix(heads, (prompt // 4, *tokens), (cached,) * sequences),
    }


MIXES = {"cuda": _mixes(32, 128, 2048, 4096), "cpu": _mixes(16, 16, 256, 1024)}
QUICK_MIXES = {device: _mixes(4, 3, 8, 40) for device in MIXES}


class Step:
    """The tensors of a step. The order of the pages is random."""

    def __init__(self, mix: Mix, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        pages = [-(-keys // PAGE_SIZE) for keys in mix.keys]
        order = torch.randperm(sum(pages), generator=generator).int().split(pages)
        table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
        self.mix = mix
        self.query = random(sum(mix.queries), mix.heads, HEAD_DIM)
        self.keys, self.values = (random(sum(pages), PAGE_SIZE, mix.heads // GROUP, HEAD_DIM) for _ in range(2))
        self.table = table.to(device)
        self.lengths = torch.tensor(mix.keys, dtype=torch.int32, device=device)
        self.offsets = torch.tensor([0, *itertools.accumulate(mix.queries)], dtype=torch.int32, device=device)

    def ours(self) -> Tensor:
        return fused_attention_paged(
            self.query, self.keys, self.values, self.table, self.lengths, is_causal=True,
            cu_seqlens_q=self.offsets, max_seqlen_q=max(self.mix.queries),
        )  # fmt: skip

    def each(self) -> Tensor:
        outs = []
        for n, query in enumerate(self.query.split(self.mix.queries)):
            rows = self.keys, self.values, self.table[n : n + 1], self.lengths[n : n + 1]
            out = fused_attention_paged(query.transpose(0, 1)[None], *rows, is_causal=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def torch(self, is_grouped: bool = False) -> Tensor:
        """is_grouped: the heads of a single query that share a key head become rows of one head, which is a view"""
        outs = []
        for n, query in enumerate(self.query.split(self.mix.queries)):
            count = self.mix.keys[n]
            pages = self.table[n, : -(-count // PAGE_SIZE)]
            key, value = (x[pages].flatten(0, 1)[:count].transpose(0, 1)[None] for x in (self.keys, self.values))
            # One query sees all keys. Without a mask, torch has more kernels to choose from.
            mask = causal_lower_right(query.shape[0], count) if query.shape[0] > 1 else None
            query = query.transpose(0, 1)[None]
            if is_grouped and mask is None:
                rows = query.view(1, key.shape[1], GROUP, HEAD_DIM)
                out = scaled_dot_product_attention(rows, key, value).view(query.shape)
            else:
                out = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def flash(self) -> Tensor:
        module = importlib.import_module(flash_module(3).module)
        out = module.flash_attn_with_kvcache(
            self.query, self.keys, self.values, cache_seqlens=self.lengths, page_table=self.table,
            cu_seqlens_q=self.offsets, max_seqlen_q=max(self.mix.queries), causal=True,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    def exact(self) -> Tensor:
        """The output in float64, by torch."""
        wide = copy.copy(self)
        wide.query, wide.keys, wide.values = (x.double() for x in (self.query, self.keys, self.values))
        return wide.torch()


def _torch_ways(step: Step) -> dict[str, timing.Call]:
    """The ways to call torch, by what it is given."""
    ways: dict[str, timing.Call] = {"enable_gqa": step.torch}
    if 1 in step.mix.queries:
        ways[f"heads of single queries as rows {(1, step.mix.heads // GROUP, GROUP, HEAD_DIM)}"] = partial(
            step.torch, is_grouped=True
        )
    return ways


#: Times calls in turns, and adds the times to their rows.
Measure = Callable[[dict[str, Row], dict[str, timing.Call]], None]


@torch.no_grad()
def serving_rows(name: str, mix: Mix, device: torch.device, dtype: str, measure: Measure) -> list[Row]:
    """The rows of one mix."""
    step = Step(mix, device, DTYPES[dtype])
    exact = step.exact()
    sizes = exact.abs().amax(-1)

    def error_of(out: Tensor) -> float:
        """The largest error of a row, in units of the row's largest entry."""
        return float(((out.double() - exact).abs().amax(-1) / sizes).max())

    allowed = accuracy.allowed(error_of(step.torch()), DTYPES[dtype])
    about = {
        "benchmark": "generation", "table": "serving", "mix": name, "sequences": len(mix.queries), "heads": mix.heads,
        "kv_heads": mix.heads // GROUP, "head_dim": HEAD_DIM, "page_size": PAGE_SIZE, "queries": sum(mix.queries),
        "keys": sum(mix.keys), "dtype": dtype,
    }  # fmt: skip
    ways = _torch_ways(step)
    torch_given = min(ways, key=lambda given: seconds_of(ways[given], device))
    calls: dict[str, timing.Call] = {OURS: step.ours, EACH: step.each, TORCH: ways[torch_given]}
    if device.type == "cuda":
        calls[FLASH] = step.flash
    rows: dict[str, Row] = {}
    others = {TORCH: version_of(TORCH) | {"given": torch_given}, FLASH: version_of(FLASH)}
    for implementation, call in list(calls.items()):
        rows[implementation] = about | {"implementation": implementation} | others.get(implementation, {})
        try:
            error = error_of(call())
        except Exception as problem:  # Packages raise exceptions of any class.
            rows[implementation]["cannot"] = reason(problem)
            del calls[implementation]
            continue
        is_right = error <= allowed  # False for NaN
        rows[implementation] |= {"error": error, "allowed": allowed, "is_right": is_right}
        if not is_right:
            del calls[implementation]
    measure(rows, calls)
    return list(rows.values())
