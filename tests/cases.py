"""The list of test cases that every backend must compute right. The id of a case says what the case tests.

A `Case` consists of sizes, memory layouts and functions that build the optional tensors. `Case.make` makes tensors of a
dtype from it. The numbers are the same at each call.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fused_attn
from fused_attn.attention import inputs as tensors_of_call
from fused_attn.attention.problem import Scalars

INF = float("inf")

Builder = Callable[["Case", torch.dtype, torch.Generator], Tensor]

# The original function, before the fixture `poisoned` replaces it: that one would fill a tensor of 4 GiB with NaN.
_empty = torch.empty


class Inputs(NamedTuple):
    """One call: `function` is called with the keyword arguments ``tensors`` and ``options``, and `reference` too."""

    function: Callable[..., tuple[Tensor, Tensor]]
    reference: Callable[..., tuple[Tensor, Tensor]]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    differentiated: tuple[str, ...]
    dout: Tensor
    dlse: Tensor | None

    def on(self, device: str) -> Inputs:
        """The same call on another device."""
        return self._replace(
            tensors={name: on_device(x, device) for name, x in self.tensors.items()},
            dout=on_device(self.dout, device),
            dlse=None if self.dlse is None else self.dlse.to(device),
        )


@dataclass(frozen=True)
class Case:
    """The description of a call: sizes B, H, L, S, D as in the documentation, layouts, masks and options.

    ``lengths_q`` and ``lengths_k``: the lengths of the sequences of a packed call. ``key_lengths``: the numbers of keys
    of the batch entries. ``page_size``: keys and values lie in pages of so many rows; ``shares_pages``: an entry has
    the pages of the entry before it, as far as both are full. ``edit``: a function that changes the tensors, which it
    gets by name, before the call. ``differentiated``: the names of the inputs whose gradients are checked. None stands
    for all inputs that have one.
    """

    id: str
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    seqlen_q: int = 19
    seqlen_k: int = 23
    head_dim: int = 16
    value_dim: int | None = None
    query_layout: str = "contiguous"
    kv_layout: str = "contiguous"
    dout_layout: str = "contiguous"
    attn_mask: Builder | None = None
    key_padding_mask: Builder | None = None
    key_ranges: Builder | None = None
    relative_bias: Builder | None = None
    sinks: Builder | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    page_size: int | None = None
    shares_pages: bool = False
    shapes: tuple[tuple[int, ...], ...] | None = None
    edit: Callable[[dict[str, Tensor]], None] | None = None
    differentiated: tuple[str, ...] | None = None
    has_dlse: bool = False
    is_quick: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def make(self, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        options = dict(self.options)
        if self.page_size is not None:
            function, reference = fused_attn.fused_attention_paged, oracle.attention_paged
            tensors, out_shape, lse_shape = self._paged(dtype, generator)
            if self.lengths_q is not None:
                options = {"max_seqlen_q": max(self.lengths_q)} | options
        elif self.lengths_q is not None:
            function, reference = fused_attn.fused_attention_varlen, oracle.attention_varlen
            tensors, out_shape, lse_shape = self._packed(dtype, generator)
            options |= {"max_seqlen_q": max(self.lengths_q), "max_seqlen_k": max(self.lengths_k)} | self.options
        else:
            function, reference = fused_attn.fused_attention, oracle.attention
            tensors, out_shape, lse_shape = self._padded(dtype, generator)
        if self.kv_heads is not None and self.page_size is None:
            options["enable_gqa"] = True
        for name in ("attn_mask", "key_padding_mask", "key_ranges", "relative_bias", "sinks"):
            if (build := getattr(self, name)) is not None:
                made = build(self, dtype, generator)
                # A CausalBias describes a mask and holds no data, so it is not copied, converted or differentiated.
                (tensors if type(made) is Tensor else options)[name] = made
        dout = LAYOUTS[self.dout_layout](randn(out_shape, dtype, generator))
        dlse = randn(lse_shape, torch.float32, generator) if self.has_dlse else None
        if self.edit is not None:
            self.edit(tensors)
        differentiated = () if self.page_size is not None else self.differentiated
        if differentiated is None:
            differentiated = tuple(name for name, x in tensors.items() if x.is_floating_point())
        return Inputs(function, reference, tensors, options, differentiated, dout, dlse)

    def _padded(self, dtype, generator):
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        if self.shapes is None:
            query = (self.batch, self.heads, self.seqlen_q, self.head_dim)
            key = (self.batch, kv_heads, self.seqlen_k, self.head_dim)
            value = (*key[:-1], value_dim)
        else:
            query, key, value = self.shapes
        tensors = {
            "query": LAYOUTS[self.query_layout](randn(query, dtype, generator)),
            "key": LAYOUTS[self.kv_layout](randn(key, dtype, generator)),
            "value": LAYOUTS[self.kv_layout](randn(value, dtype, generator)),
        }
        if self.key_lengths is not None:
            tensors["key_lengths"] = torch.tensor(self.key_lengths, dtype=torch.int32)
        lead = query[:-1]
        if self.kv_heads is None:
            lead = torch.broadcast_shapes(query[:-2], key[:-2], value[:-2]) + query[-2:-1]
        return tensors, (*lead, value[-1]), tuple(lead)

    def _packed(self, dtype, generator):
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        total_q, total_k = sum(self.lengths_q), sum(self.lengths_k)
        tensors = {
            "query": randn((total_q, self.heads, self.head_dim), dtype, generator),
            "key": randn((total_k, kv_heads, self.head_dim), dtype, generator),
            "value": randn((total_k, kv_heads, value_dim), dtype, generator),
            "cu_seqlens_q": _offsets(self.lengths_q),
            "cu_seqlens_k": _offsets(self.lengths_k),
        }
        return tensors, (total_q, self.heads, value_dim), (self.heads, total_q)

    def _paged(self, dtype, generator):
        """The pages of all entries in random order, and NaN in pages and rows that belong to no key.

        The table has a column for each page of ``seqlen_k`` keys. Its entries behind the last page name no page.
        """
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        columns = -(-self.seqlen_k // self.page_size)
        used = [-(-length // self.page_size) for length in self.key_lengths]
        order = torch.randperm(sum(used) + 1, generator=generator)[: sum(used)].tolist()  # one page stays free
        table = torch.full((self.batch, columns), -7, dtype=torch.int32)
        pages = [
            torch.full((sum(used) + 1, self.page_size, kv_heads, dim), float("nan"), dtype=dtype)
            for dim in (self.head_dim, value_dim)
        ]
        for entry, length in enumerate(self.key_lengths):
            for column in range(used[entry]):
                rows = min(self.page_size, length - column * self.page_size)
                page = order.pop()
                if self.shares_pages and entry and rows == self.page_size and table[entry - 1, column] >= 0:
                    page = int(table[entry - 1, column])
                table[entry, column] = page
                for x in pages:
                    x[page, :rows] = randn((rows, *x.shape[2:]), dtype, generator)
        is_packed = self.lengths_q is not None
        lead = (sum(self.lengths_q), self.heads) if is_packed else (self.batch, self.heads, self.seqlen_q)
        tensors = {
            "query": LAYOUTS[self.query_layout](randn((*lead, self.head_dim), dtype, generator)),
            "key_pages": LAYOUTS[self.kv_layout](pages[0]),
            "value_pages": LAYOUTS[self.kv_layout](pages[1]),
            "block_table": table,
            "key_lengths": torch.tensor(self.key_lengths, dtype=torch.int32),
        }
        if is_packed:
            tensors["cu_seqlens_q"] = _offsets(self.lengths_q)
        return tensors, (*lead, value_dim), lead[::-1] if is_packed else lead


@functools.lru_cache(maxsize=8)
def expected(case: Case, dtype: torch.dtype) -> oracle.Expected:
    """The result of the oracle.

    It is cached, because the tests of one case on different backends run one after another.
    """
    inputs = case.make(dtype)
    return oracle.expected(
        inputs.reference, inputs.tensors, inputs.options, inputs.differentiated, inputs.dout, inputs.dlse
    )


def run(inputs: Inputs, backend: str | None) -> oracle.Result:
    function = functools.partial(inputs.function, backend=backend, return_lse=True)
    return oracle.evaluate(function, inputs.tensors, inputs.options, inputs.differentiated, inputs.dout, inputs.dlse)


def check(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> oracle.Result:
    """Runs the case, compares the result with the oracle, and returns the result on the CPU."""
    inputs = case.make(dtype)
    result = run(inputs if device == "cpu" else inputs.on(device), backend).cpu()
    oracle.assert_close(result, expected(case, dtype))
    # The output and the gradient of a query that sees no key must be exactly 0. A small number is not enough.
    is_empty = expected(case, dtype).truth.lse == -INF
    rows = result.out if case.lengths_q is None else result.out.transpose(0, 1)
    assert not rows[is_empty].any()
    if result.max is not None:
        assert not result.max.requires_grad
    if case.key_padding_mask is not None:
        mask = inputs.tensors["key_padding_mask"]
        ignored = mask if mask.dtype == torch.bool else mask == -INF
        for name in result.grads.keys() & {"key", "value"}:
            assert not result.grads[name].movedim(-3, 0)[:, ignored].any(), f"d{name} of ignored keys"
    if case.key_lengths is not None:
        behind = torch.arange(case.seqlen_k) >= torch.tensor(case.key_lengths)[:, None]
        for name in result.grads.keys() & {"key", "value"}:
            assert not result.grads[name].transpose(1, 2)[behind].any(), f"d{name} behind the lengths"
    return result


def check_strays(
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    lengths_q: tuple[int, ...] = (70, 0, 5),
    lengths_k: tuple[int, ...] = (40, 3, 33),
    head_dim: int = 64,
    **options,
) -> None:
    """Checks packed rows that belong to no sequence: results must be zero there, lse and max must be -inf.

    These rows stand before the first sequence and behind the last one, and hold NaN in the inputs. The test calls the
    registered operator, as compiled code does, because an eager call on the CPU reads the offsets and refuses such
    rows.
    """
    generator = torch.Generator().manual_seed(0)
    options = {"window": (-1, -1), "dropout_p": 0.0, "needs_max": False, **options}
    first, behind = 3, 140
    owned_q, owned_k = sum(lengths_q), sum(lengths_k)

    def run(first: int, behind: int, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = {name: F.pad(x, (0, 0, 0, 0, first, behind), value=float("nan")).to(device) for name, x in rows.items()}
        leaves = [rows[name].requires_grad_() for name in ("query", "key", "value")]
        offsets = [(_offsets(lengths) + first).to(device) for lengths in (lengths_q, lengths_k)]
        seed = torch.tensor(7, device=device) if options["dropout_p"] else None
        out, lse, row_max = torch.ops.fused_attn.attention(
            *tensors_of_call.Inputs(*leaves, seed=seed, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1]),
            *Scalars(max(lengths_q), max(lengths_k), 0.3, 0.0, options["dropout_p"], *options["window"]),
            backend, options["needs_max"],
        )  # fmt: skip
        gradients = torch.autograd.grad((out, lse), leaves, (rows["dout"], rows["dlse"][..., 0].T.to(lse.dtype)))
        of_rows = {"lse": lse.T} | ({"max": row_max.T} if options["needs_max"] else {})
        return {"out": out, **of_rows, **dict(zip(("dquery", "dkey", "dvalue"), gradients, strict=True))}

    shapes = {
        "query": (owned_q, 4, head_dim), "key": (owned_k, 2, head_dim), "value": (owned_k, 2, head_dim),
        "dout": (owned_q, 4, head_dim), "dlse": (owned_q, 4, 1),
    }  # fmt: skip
    rows = {name: randn(shape, dtype, generator) for name, shape in shapes.items()}
    expected, found = run(0, 0, rows), run(first, behind, rows)
    for name, x in found.items():
        owned = x[first:-behind]
        torch.testing.assert_close(owned, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        strays = torch.cat([x[:first], x[-behind:]])
        assert (strays == (float("-inf") if name in ("lse", "max") else 0.0)).all(), f"strays of {name}"


def check_inference(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Checks a call without gradients and without lse, because a backend may have another kernel for it."""
    inputs = case.make(dtype)
    with torch.no_grad():
        results = inputs.function(**inputs.tensors, **inputs.options, backend=backend)
    out, row_max = results if inputs.options.get("return_max") else (results, None)
    truth, eager, *_ = expected(case, dtype)
    oracle.assert_close(eager._replace(out=out, max=row_max), expected(case, dtype))
    rows = out if case.lengths_q is None else out.transpose(0, 1)
    assert not rows[truth.lse == -INF].any()


def check_overlapping_rows(backend: str, device: str = "cpu") -> None:
    """Windows of a signal, as `Tensor.unfold` gives them: each row begins 8 numbers after the one before."""
    generator = torch.Generator().manual_seed(0)
    signals = (randn((64 + 8 * 69,), torch.float16, generator).to(device) for _ in range(3))
    windows = [x.unfold(0, 64, 8)[None, None] for x in signals]
    out = fused_attn.fused_attention(*windows, backend=backend)
    assert torch.equal(out, fused_attn.fused_attention(*(x.contiguous() for x in windows), backend=backend))


def randn(shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers, drawn in float32 and then rounded, so that they are the same numbers in all dtypes."""
    return torch.randn(shape, generator=generator).to(dtype)


def _offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


# ---- Memory layouts: functions that return the same values with other strides


def on_device(x: Tensor, device: str) -> Tensor:
    """A copy of x on the device with the strides and the alignment of x, and with NaN in the memory around it.

    `Tensor.to` would change the strides.
    """
    if not x.numel():
        return x.to(device)
    extent = x.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    room = torch.full((extent,), float("nan") if x.is_floating_point() else 1, dtype=x.dtype, device=device)
    distinct = x[tuple(slice(None) if stride else slice(1) for stride in x.stride())]
    room.as_strided(distinct.shape, distinct.stride(), x.storage_offset()).copy_(distinct)
    return room.as_strided(x.shape, x.stride(), x.storage_offset())


def _sliced(x: Tensor) -> Tensor:
    """x as a part of a larger tensor of NaN, so that a kernel that reads beyond x gives NaN."""
    room = torch.full([n + 3 for n in x.shape], float("nan"), dtype=x.dtype)
    view = room[tuple(slice(1, 1 + n) for n in x.shape)]
    view.copy_(x)
    return view


def _first_of_two_rows(x: Tensor) -> Tensor:
    """x (B, H, 1, D) in a tensor with two rows and four more columns.

    The strides between heads are those of whole pieces of 16 bytes, but the stride between rows is not.
    """
    room = torch.full((*x.shape[:2], 2, x.shape[3] + 4), float("nan"), dtype=x.dtype)
    room[:, :, :1, : x.shape[3]] = x
    return room[:, :, :1, : x.shape[3]]


def _every_second_column(x: Tensor) -> Tensor:
    room = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    room[..., ::2] = x
    return room[..., ::2]


def _huge_head_stride(x: Tensor) -> Tensor:
    """x with a stride of 2^31 elements between heads.

    Nothing writes to the pages in between, so they take no memory.
    """
    stride = 2**31 + 64
    room = _empty((x.shape[1] - 1) * stride + x[0, 0].numel(), dtype=x.dtype)
    view = room.as_strided(x.shape, (0, stride, x.shape[3], 1))  # batch 1
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "blhd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "lbhd": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "bhdl": lambda x: x.mT.contiguous().mT,
    "sliced": _sliced,
    "first_of_two_rows": _first_of_two_rows,
    "every_second_column": _every_second_column,
    "huge_head_stride": _huge_head_stride,
    "one_batch_expanded": lambda x: x[:1].contiguous().expand(x.shape),
    "one_head_expanded": lambda x: x[:, :1].contiguous().expand(x.shape),
    "one_row_expanded": lambda x: x[:, :, :1].contiguous().expand(x.shape),
    "one_number_expanded": lambda x: x.flatten()[:1].view((1,) * x.dim()).expand(x.shape),
}


# ---- Builders of the optional tensors


def _size(case: Case, shape: str) -> tuple[int, ...]:
    """ "B1LS" -> (batch, 1, seqlen_q, seqlen_k)."""
    sizes = {"B": case.batch, "H": case.heads, "L": case.seqlen_q, "S": case.seqlen_k, "1": 1}
    return tuple(sizes[letter] for letter in shape)


def bool_mask(shape: str, visible: float = 0.7) -> Builder:
    return lambda case, dtype, generator: torch.rand(_size(case, shape), generator=generator) < visible


def float_mask(shape: str, mask_dtype: torch.dtype | None = None, offset: float = 0.0) -> Builder:
    return lambda case, dtype, generator: randn(_size(case, shape), mask_dtype or dtype, generator) + offset


def float_mask_with(fill: Callable[[torch.dtype], float], shape: str = "B1LS", dropped: float = 0.4) -> Builder:
    """A float mask as models write it: 0 where visible, else ``fill(dtype)``. No key is visible to the first query."""

    def build(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        mask = torch.zeros(_size(case, shape), dtype=dtype)
        is_dropped = torch.rand(mask.shape, generator=generator) < dropped
        is_dropped[..., :1, :] = True
        return mask.masked_fill_(is_dropped, fill(dtype))

    return build


def t5_strided_mask(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A float mask (1, H, L, S) whose stride between heads is 1, as T5's lookup in an embedding makes it."""
    return randn((case.seqlen_q, case.seqlen_k, case.heads), dtype, generator).permute(2, 0, 1)[None]


def transposed_mask(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return randn((case.batch, case.heads, case.seqlen_k, case.seqlen_q), dtype, generator).mT


def sliced_mask(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _sliced(randn((case.batch, 1, case.seqlen_q, case.seqlen_k), dtype, generator))


def empty_rows_mask(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    mask = torch.rand(_size(case, "B1LS"), generator=generator) < 0.5
    mask[0, :, ::3] = False
    mask[-1] = False
    return mask


def minus_inf_rows_mask(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    keep = empty_rows_mask(case, dtype, generator)
    return randn(keep.shape, dtype, generator).masked_fill(~keep, -INF)


def checkerboard(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A mask of visible and hidden squares, 64 x 64 entries each: kernels meet hidden, full and partial blocks."""
    row, column = torch.arange(case.seqlen_q) // 64, torch.arange(case.seqlen_k) // 64
    return (row[:, None] + column[None, :]) % 2 == 0


def upper_left(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return causal_upper_left(case.seqlen_q, case.seqlen_k)


def lower_right(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    with warnings.catch_warnings():
        # torch gives NaN for queries that see no key, which exist if L > S. Ours gives 0.
        warnings.simplefilter("ignore")
        return causal_lower_right(case.seqlen_q, case.seqlen_k)


def random_ranges(shape: str, count: int) -> Builder:
    """Ranges of any numbers, also the least and the largest: some are empty, overlap or reach outside of the keys."""

    def build(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        size = (*_size(case, shape), count, 2)
        ranges = torch.randint(-case.seqlen_k // 2 - 1, case.seqlen_k * 3 // 2 + 1, size, generator=generator).int()
        least, largest = -(2**31), 2**31 - 1
        ranges[torch.rand(size[:-1], generator=generator) < 0.1] = torch.tensor([largest, least]).int()
        ranges[torch.rand(size[:-1], generator=generator) < 0.05] = torch.tensor([least, largest]).int()
        return ranges

    return build


def far_ranges(*ranges: tuple[int, int]) -> Builder:
    """All queries of a head see the same ranges."""

    def build(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return torch.tensor(ranges).int()[None]

    return build


def first_and_last(first: int, last: int) -> Builder:
    """Query i sees the first keys, and the last ones up to key i."""

    def build(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        end = torch.arange(case.seqlen_k - case.seqlen_q, case.seqlen_k) + 1
        own = torch.stack([(end - last).clamp(min=0), end], -1)
        return torch.stack([torch.tensor([0, first]).expand_as(own), own], -2).int()

    return build


def documents(*lengths: int) -> Builder:
    """Each query sees the document that it stands in; ``lengths``: those of the documents, which fill the sequence."""

    def build(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        ends = torch.tensor(lengths).cumsum(0)
        number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        return torch.stack([ends[number] - torch.tensor(lengths)[number], ends[number]], -1)[:, None].int()

    return build


def prefix_lm(*prefixes: int) -> Builder:
    """Query i sees the keys up to key i, and the whole prefix of its batch entry. The columns are not contiguous."""

    def build(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        end = torch.maximum(torch.arange(1, case.seqlen_q + 1), torch.tensor(prefixes)[:, None])  # (B, L)
        return torch.stack([torch.zeros_like(end), end]).int().movedim(0, -1)[:, None, :, None]

    return build


def shared_question(question: int, *answers: int) -> Builder:
    """The tokens of each answer see the question, which stands first, and their own answer up to themselves."""

    def build(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        position = torch.arange(case.seqlen_q)
        starts = torch.tensor((0, question, *answers[:-1])).cumsum(0)
        own = starts[torch.searchsorted(starts, position, right=True) - 1]
        first = torch.stack([torch.zeros_like(own), own.clamp(max=question)], -1)
        return torch.stack([first, torch.stack([own, position + 1], -1)], -2).int()

    return build


def padding(*lengths: int) -> Builder:
    """A bool padding mask, True = padding: the first ``lengths[b]`` keys of batch entry b are valid."""

    def build(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return torch.arange(case.seqlen_k)[None, :] >= torch.tensor(lengths)[:, None]

    return build


def scattered_padding(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.rand((case.batch, case.seqlen_k), generator=generator) < 0.5


def float_padding(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A float padding mask: -inf marks padding, and other numbers are added to the logits of their key."""
    mask = randn((case.batch, case.seqlen_k), dtype, generator)
    return mask.masked_fill(torch.rand(mask.shape, generator=generator) < 0.3, -INF)


def loud_padding(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A float padding mask whose largest numbers have no exponential in float32, alone or as a factor of 0."""
    mask = randn((case.batch, case.seqlen_k), dtype, generator)
    mask[:, ::3] += 100.0
    return mask


def zero_or_minus_inf_padding(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    mask = torch.zeros((case.batch, case.seqlen_k), dtype=dtype)
    return mask.masked_fill(torch.rand(mask.shape, generator=generator) < 0.3, -INF)


def per_head_bias(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return randn((case.heads, _columns(case)), dtype, generator)


def shared_bias(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return randn((_columns(case),), dtype, generator)


def float32_bias(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A relative bias in float32 whatever the dtype, as a parameter of a model under mixed precision."""
    return randn((case.heads, _columns(case)), torch.promote_types(dtype, torch.float32), generator)


def t5_bias(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return fused_attn.t5_relative_bias(randn((32, case.heads), dtype, generator), case.seqlen_q, case.seqlen_k)


def alibi(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, case.heads + 1)
    return fused_attn.alibi_bias(slopes.to(dtype), case.seqlen_q, case.seqlen_k)


def _columns(case: Case) -> int:
    if case.lengths_q is not None:
        return case.options.get("max_seqlen_q", max(case.lengths_q)) + max(case.lengths_k) - 1
    return max(case.seqlen_q + case.seqlen_k - 1, 0)


def sink(offset: float = 0.0, sink_dtype: torch.dtype | None = None) -> Builder:
    return lambda case, dtype, generator: randn((case.heads,), sink_dtype or dtype, generator) + offset


# ---- Functions for Case.edit, which change the tensors of a call


def _scale_query(factor: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["query"] = tensors["query"] * factor

    return edit


def _scale_query_and_key(factor: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["query"], tensors["key"] = tensors["query"] * factor, tensors["key"] * factor

    return edit


def _scores_near(score: float) -> Callable[[dict[str, Tensor]], None]:
    """Changes query and key so that every score is near ``score`` at the default scale."""

    def edit(tensors: dict[str, Tensor]) -> None:
        head_dim = tensors["query"].shape[-1]
        size = (abs(score) / head_dim**0.5) ** 0.5
        tensors["query"] = tensors["query"] * 0.1 + size
        tensors["key"] = tensors["key"] * 0.1 + (size if score > 0 else -size)

    return edit


def _nan_in_padding(tensors: dict[str, Tensor]) -> None:
    mask = tensors["key_padding_mask"]
    ignored = mask if mask.dtype == torch.bool else mask == -INF
    for name, poison in (("key", float("nan")), ("value", INF)):
        x = tensors[name].masked_fill(ignored[:, None, :, None], poison)
        x[..., ::2] = x[..., ::2].masked_fill(ignored[:, None, :, None], float("nan"))
        tensors[name] = x


def _nan_behind_lengths(tensors: dict[str, Tensor]) -> None:
    lengths = tensors["key_lengths"]
    for name in ("key", "value"):
        x = tensors[name]
        behind = torch.arange(x.shape[2]) >= lengths[:, None]
        tensors[name] = x.masked_fill(behind[:, None, :, None], float("nan"))


def _scale_both(factor: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["query"], tensors["key"] = tensors["query"] * factor, tensors["key"] * factor

    return edit


def _equal_scores(tensors: dict[str, Tensor]) -> None:
    tensors["query"].fill_(6e6 / tensors["query"].shape[-1] ** 0.5)
    tensors["key"].fill_(1.0)


def _late_key_dominates(tensors: dict[str, Tensor]) -> None:
    """Makes the score of the first key 0, that of one late key 3.5, and all others -32."""
    query, key = (tensors[name].zero_() for name in ("query", "key"))
    query[..., 0], key[..., 0] = 1.0, -32.0
    key[..., 0, 0], key[..., 40, 0] = 0.0, 3.5


def _ascending_scores(tensors: dict[str, Tensor]) -> None:
    """Makes scores rise from key to key for even queries, so that each key is a new maximum, and fall for odd ones."""
    query, key = tensors["query"], tensors["key"]
    direction = 1 - 2.0 * (torch.arange(query.shape[-2]) % 2)
    query[..., 0] = direction * query.shape[-1] ** 0.5
    key[..., 0] = 2.0 * torch.arange(key.shape[-2])


def _equal_keys(tensors: dict[str, Tensor]) -> None:
    tensors["key"] = tensors["key"][..., :1, :].expand(tensors["key"].shape).clone()


# ---- The list of cases

FLOATS = (torch.float32, torch.float64)
COMMON = (torch.float32, torch.bfloat16)

LENGTHS = [
    Case(
        f"length-{length_q}-{length_k}{'-causal' if causal else ''}",
        batch=1,
        seqlen_q=length_q,
        seqlen_k=length_k,
        head_dim=head_dim,
        options={"is_causal": causal},
        has_dlse=True,
        dtypes=dtypes,
        is_quick=is_quick,
    )
    for length_q, length_k, head_dim, causal, dtypes, is_quick in (
        (1, 1, 64, False, Case.dtypes, True),
        (1, 1, 64, True, Case.dtypes, False),
        (113, 203, 64, False, Case.dtypes, False),
        (113, 203, 64, True, Case.dtypes, False),
        (108, 256, 32, True, Case.dtypes, False),
        (239, 1, 64, False, Case.dtypes, False),
        (239, 1, 64, True, Case.dtypes, False),
        (799, 3, 16, False, Case.dtypes, False),
        (799, 3, 16, True, Case.dtypes, False),
        (4096, 8, 16, False, COMMON, False),
        (64, 64, 64, True, Case.dtypes, False),
        (65, 63, 64, True, Case.dtypes, False),
        (128, 65, 64, False, Case.dtypes, False),
        (1023, 1024, 64, True, COMMON, False),
        (1024, 1023, 64, False, COMMON, False),
        (1, 1024, 64, False, COMMON, False),
        (1, 300, 64, True, COMMON, False),
        (2, 300, 128, False, COMMON, False),
        (1, 97, 40, False, COMMON, True),  # S % 32 == 1
        (33, 161, 64, False, COMMON, False),
    )
]

EMPTY = [
    Case("empty-S", seqlen_k=0, has_dlse=True, is_quick=True),
    Case(
        "empty-S-with-everything",
        seqlen_k=0,
        attn_mask=bool_mask("LS"),
        key_padding_mask=padding(0, 0),
        relative_bias=per_head_bias,
        sinks=sink(),
        options={"is_causal": True},
        dtypes=FLOATS,
    ),
    # Without a key, a query sees nothing, whatever its sink: lse is -inf, and no gradient reaches the sink.
    Case("empty-S-sinks", seqlen_k=0, sinks=sink(), has_dlse=True, dtypes=COMMON),
    Case("empty-L", seqlen_q=0, relative_bias=per_head_bias, sinks=sink(), attn_mask=float_mask("HLS"), dtypes=FLOATS),
    Case("empty-L-and-S", seqlen_q=0, seqlen_k=0, dtypes=FLOATS),
    # value_dim is 0: there is no output, but lse has gradients.
    Case("empty-value-dim", value_dim=0, sinks=sink(), has_dlse=True, dtypes=FLOATS),
    Case(
        "empty-batch", batch=0, sinks=sink(), relative_bias=per_head_bias, attn_mask=float_mask("1HLS"), dtypes=FLOATS
    ),
]

HEAD_DIMS = [
    Case(
        f"head-dim-{head_dim}-{value_dim}",
        seqlen_q=70,
        seqlen_k=67,
        head_dim=head_dim,
        value_dim=value_dim,
        options={"is_causal": True},
        is_quick=(head_dim, value_dim) == (64, 64),
    )
    for head_dim, value_dim in (
        (1, 1),
        (8, 8),
        (17, 17),
        (40, 40),
        (64, 64),
        (96, 96),
        (128, 128),
        (256, 256),
        (64, 32),
        (32, 64),
        (192, 128),
        (40, 1),
        (1, 40),
        (72, 80),
        (33, 100),
        (256, 8),
        (63, 65),
        (257, 257),
        (512, 512),
        (512, 64),
        (40, 512),
    )
]

GROUPS = [
    Case("gqa-4-2", heads=4, kv_heads=2, has_dlse=True, is_quick=True),
    Case(
        "gqa-6-2-causal-padded",
        heads=6,
        kv_heads=2,
        seqlen_q=70,
        seqlen_k=70,
        key_padding_mask=padding(40, 70),
        options={"is_causal": True},
    ),
    Case("mqa-8-1", heads=8, kv_heads=1, seqlen_q=5, seqlen_k=130),
    Case("mqa-8-1-decode", heads=8, kv_heads=1, seqlen_q=1, seqlen_k=130, head_dim=64),
    Case(
        "gqa-blhd-bias-per-query-head",
        heads=4,
        kv_heads=2,
        query_layout="blhd",
        kv_layout="blhd",
        attn_mask=float_mask("BHLS"),
        relative_bias=per_head_bias,
        sinks=sink(),
    ),
    Case("gqa-same-heads", heads=2, kv_heads=2),
    Case("gqa-dropout", heads=4, kv_heads=2, options={"dropout_p": 0.3, "dropout_seed": 9}),
]

BANDS = [
    Case(
        f"band-{length_q}-{length_k}-{'causal-' if causal else ''}{left}-{right}",
        batch=1,
        seqlen_q=length_q,
        seqlen_k=length_k,
        options={"is_causal": causal, "window_size": (left, right)},
        has_dlse=True,
        dtypes=COMMON,
        is_quick=(left, right) == (7, 3),
    )
    for length_q, length_k, causal, left, right in (
        (70, 70, False, 7, 3),
        (70, 70, False, 0, 0),
        (70, 70, False, -1, 5),
        (70, 70, False, 5, -1),
        (70, 70, True, 7, 3),
        (70, 70, True, 0, 0),
        (70, 70, True, -1, 0),
        (70, 70, False, -1, -1),
        (70, 200, False, 3, 64),
        (200, 70, False, 3, 64),
        (200, 70, True, 33, -1),
        (300, 300, False, 64, 64),
        (300, 310, True, 127, 0),
        (1, 90, False, 10, 10),
        (90, 1, False, 10, 10),
        (70, 70, False, 1000, 1000),
        (70, 70, False, 3, 2**62),
    )
]
BANDS += [
    Case("causal-bias-upper-left", seqlen_q=70, seqlen_k=90, attn_mask=upper_left, is_quick=True),
    Case("causal-bias-lower-right", seqlen_q=70, seqlen_k=90, attn_mask=lower_right, has_dlse=True),
    Case("causal-bias-lower-right-decode", seqlen_q=1, seqlen_k=90, attn_mask=lower_right),
    Case(
        "causal-bias-lower-right-window",
        seqlen_q=70,
        seqlen_k=190,
        attn_mask=lower_right,
        options={"window_size": (20, -1)},
    ),
    Case(
        "causal-bias-lower-right-padded",
        seqlen_q=70,
        seqlen_k=90,
        attn_mask=lower_right,
        key_padding_mask=padding(80, 3),
    ),
    Case("causal-bias-upper-left-is-causal-too", attn_mask=upper_left, options={"is_causal": True}, dtypes=COMMON),
    Case(
        "causal-bias-lower-right-relative-bias",
        seqlen_q=10,
        seqlen_k=30,
        attn_mask=lower_right,
        relative_bias=per_head_bias,
        dtypes=COMMON,
    ),
]

EMPTY_ROWS = [
    Case("empty-rows-padding", key_padding_mask=padding(0, 23), has_dlse=True, is_quick=True),
    Case("empty-rows-all-padded", key_padding_mask=padding(0, 0), has_dlse=True),
    Case("empty-rows-bool-mask", seqlen_q=70, seqlen_k=67, attn_mask=empty_rows_mask, has_dlse=True),
    Case("empty-rows-minus-inf-mask", seqlen_q=70, seqlen_k=67, attn_mask=minus_inf_rows_mask, has_dlse=True),
    Case("empty-rows-window", seqlen_q=90, seqlen_k=20, options={"window_size": (2, 2)}, has_dlse=True),
    Case("empty-rows-causal-lower-right", seqlen_q=90, seqlen_k=20, attn_mask=lower_right, has_dlse=True),
    Case(
        "empty-rows-causal-left-padded",
        key_padding_mask=lambda case, dtype, generator: torch.arange(23)[None] < 9 + torch.zeros(2, 1),
        options={"is_causal": True},
        has_dlse=True,
    ),
    Case("empty-rows-sinks", key_padding_mask=padding(0, 23), sinks=sink(), has_dlse=True),
    Case("empty-rows-huge-sinks", attn_mask=empty_rows_mask, sinks=sink(50.0), has_dlse=True),
    Case("empty-rows-sinks-lower-right", seqlen_q=90, seqlen_k=20, attn_mask=lower_right, sinks=sink(), has_dlse=True),
    Case("empty-rows-dropout", attn_mask=empty_rows_mask, options={"dropout_p": 0.4, "dropout_seed": 3}, has_dlse=True),
    Case("empty-rows-relative-bias", attn_mask=empty_rows_mask, relative_bias=per_head_bias, has_dlse=True),
]

MASKS = [
    Case(
        f"{kind}-mask-{shape}",
        seqlen_q=70,
        seqlen_k=67,
        heads=3,
        attn_mask=builder(shape),
        dtypes=Case.dtypes if shape == "BHLS" else COMMON,
        is_quick=shape == "B1LS",
    )
    for kind, builder in (("bool", bool_mask), ("float", float_mask))
    for shape in (
        "LS",
        "1S",
        "L1",
        "11",
        "S",
        "HLS",
        "1LS",
        "H1S",
        "B1LS",
        "BHLS",
        "1HLS",
        "11LS",
        "B11S",
        "B1L1",
        "1H1S",
        "BH11",
        "1111",
    )
]
MASKS += [
    Case("float-mask-t5-strides", seqlen_q=70, seqlen_k=67, heads=4, attn_mask=t5_strided_mask),
    Case(
        "float-mask-t5-strides-causal",
        seqlen_q=70,
        seqlen_k=67,
        heads=4,
        attn_mask=t5_strided_mask,
        options={"is_causal": True},
    ),
    Case("float-mask-transposed", seqlen_q=70, seqlen_k=67, attn_mask=transposed_mask),
    Case("float-mask-sliced", seqlen_q=70, seqlen_k=67, attn_mask=sliced_mask),
    Case(
        "float-mask-expanded",
        seqlen_q=70,
        seqlen_k=67,
        attn_mask=lambda case, dtype, generator: randn((70, 67), dtype, generator).expand(2, 2, 70, 67),
    ),
    Case("float-mask-causal", seqlen_q=70, seqlen_k=90, attn_mask=float_mask("BHLS"), options={"is_causal": True}),
    Case(
        "float-mask-window",
        seqlen_q=200,
        seqlen_k=210,
        attn_mask=float_mask("1HLS"),
        options={"window_size": (30, 10)},
        dtypes=COMMON,
    ),
    Case("float-mask-float32", attn_mask=float_mask("BHLS", torch.float32), dtypes=(torch.bfloat16, torch.float16)),
    Case(
        "float-mask-float32-even",
        seqlen_q=70,
        seqlen_k=150,
        attn_mask=float_mask("1HLS", torch.float32),
        dtypes=(torch.bfloat16, torch.float16),
    ),
    Case(
        "float-mask-float32-from-an-odd-column",
        seqlen_k=22,
        attn_mask=lambda case, dtype, generator: torch.randn(2, 2, 19, 24, generator=generator)[..., 1:23],
        dtypes=(torch.bfloat16, torch.float16),
    ),
    Case("float-mask-bfloat16", attn_mask=float_mask("B1LS", torch.bfloat16), dtypes=(torch.float16, torch.float32)),
    Case(
        "float-mask-only-requires-grad",
        seqlen_q=70,
        seqlen_k=67,
        attn_mask=float_mask("BHLS"),
        differentiated=("attn_mask",),
        is_quick=True,
    ),
    Case("float-mask-broadcast-only-requires-grad", attn_mask=float_mask("1H1S"), differentiated=("attn_mask",)),
    Case(
        "float-mask-finfo-min",
        seqlen_q=70,
        seqlen_k=67,
        attn_mask=float_mask_with(lambda dtype: torch.finfo(dtype).min),
    ),
    Case("float-mask-minus-1e4", attn_mask=float_mask_with(lambda dtype: -1e4)),
    Case(
        "float-mask-minus-inf", seqlen_q=70, seqlen_k=67, attn_mask=float_mask_with(lambda dtype: -INF), has_dlse=True
    ),
    Case("float-mask-finfo-min-padding", attn_mask=float_mask_with(lambda dtype: torch.finfo(dtype).min, "B11S")),
    Case("float-mask-nothing-else-requires-grad-but-query", attn_mask=float_mask("BHLS"), differentiated=("query",)),
    Case("bool-mask-causal", seqlen_q=70, seqlen_k=90, attn_mask=bool_mask("BHLS"), options={"is_causal": True}),
    Case(
        "bool-mask-window-sinks",
        seqlen_q=90,
        seqlen_k=90,
        attn_mask=bool_mask("B1LS"),
        sinks=sink(),
        options={"window_size": (40, 3)},
    ),
    Case("bool-mask-blocks", batch=1, seqlen_q=300, seqlen_k=290, head_dim=64, attn_mask=checkerboard, dtypes=COMMON),
    Case("bool-mask-sparse", batch=1, seqlen_q=200, seqlen_k=300, attn_mask=bool_mask("HLS", 0.01), dtypes=COMMON),
    Case(
        "bool-mask-transposed",
        seqlen_q=70,
        seqlen_k=67,
        attn_mask=lambda case, dtype, generator: (torch.rand((67, 70), generator=generator) < 0.6).mT,
    ),
]

PADDING = [
    Case("padding-bool", seqlen_q=70, seqlen_k=67, key_padding_mask=padding(67, 30), has_dlse=True, is_quick=True),
    Case("padding-bool-one-key", seqlen_q=70, seqlen_k=67, key_padding_mask=padding(1, 66)),
    Case("padding-bool-scattered", seqlen_q=70, seqlen_k=300, key_padding_mask=scattered_padding),
    Case("padding-bool-long", seqlen_q=40, seqlen_k=400, head_dim=64, key_padding_mask=padding(130, 64), dtypes=COMMON),
    Case("padding-float", seqlen_q=70, seqlen_k=67, key_padding_mask=float_padding, has_dlse=True),
    Case("padding-float-loud", seqlen_q=5, seqlen_k=7, key_padding_mask=loud_padding, has_dlse=True),
    Case(
        "padding-float-0-or-minus-inf",
        key_padding_mask=zero_or_minus_inf_padding,
        differentiated=("query", "key", "value"),
    ),
    Case("padding-causal", seqlen_q=130, seqlen_k=130, key_padding_mask=padding(100, 64), options={"is_causal": True}),
    Case("padding-bool-mask", seqlen_q=70, seqlen_k=67, key_padding_mask=padding(60, 30), attn_mask=bool_mask("BHLS")),
    Case("padding-float-mask", seqlen_q=70, seqlen_k=67, key_padding_mask=padding(60, 30), attn_mask=float_mask("HLS")),
    Case("padding-float-and-float-mask", key_padding_mask=float_padding, attn_mask=float_mask("LS")),
    Case(
        "padding-float-and-pair-bias",  # as in AlphaFold: one bias for keys, and one for pairs that the batch shares
        heads=4,
        kv_heads=2,
        seqlen_q=70,
        seqlen_k=150,
        head_dim=64,
        key_padding_mask=float_padding,
        attn_mask=float_mask("1HLS"),
        has_dlse=True,
    ),
    Case(
        "padding-float-everything",
        seqlen_q=66,
        seqlen_k=67,
        key_padding_mask=float_padding,
        attn_mask=float_mask("B1LS", torch.float32),
        relative_bias=per_head_bias,
        sinks=sink(),
        options={"softcap": 3.0, "dropout_p": 0.2, "dropout_seed": 3, "is_causal": True, "scale": -0.3},
    ),
    Case(
        "padding-float-and-row-bias",
        key_padding_mask=float_padding,
        attn_mask=float_mask("BHL1"),
        differentiated=("attn_mask", "key_padding_mask"),
    ),
    Case(
        "padding-float-decode",
        seqlen_q=1,
        seqlen_k=1200,
        key_padding_mask=float_padding,
        attn_mask=float_mask("1H1S"),
        dtypes=COMMON,
    ),
    Case(
        "padding-float-and-bool-mask-causal",
        key_padding_mask=float_padding,
        attn_mask=bool_mask("B1LS", 0.9),
        options={"is_causal": True},
    ),
    Case(
        "padding-nan",
        seqlen_q=70,
        seqlen_k=67,
        key_padding_mask=padding(64, 13),
        edit=_nan_in_padding,
        has_dlse=True,
        is_quick=True,
    ),
    Case(
        "padding-nan-scattered",
        seqlen_q=70,
        seqlen_k=200,
        head_dim=64,
        key_padding_mask=scattered_padding,
        edit=_nan_in_padding,
    ),
    Case("padding-nan-float", key_padding_mask=float_padding, edit=_nan_in_padding),
    Case("padding-nan-all", key_padding_mask=padding(0, 5), edit=_nan_in_padding, has_dlse=True),
    Case(
        "padding-nan-causal-gqa-bias-dropout",
        heads=4,
        kv_heads=2,
        seqlen_q=66,
        seqlen_k=66,
        key_padding_mask=padding(64, 1),
        attn_mask=float_mask("BHLS"),
        edit=_nan_in_padding,
        options={"is_causal": True, "dropout_p": 0.2, "dropout_seed": 1},
    ),
    Case("padding-nan-softcap", key_padding_mask=scattered_padding, edit=_nan_in_padding, options={"softcap": 5.0}),
    Case(
        "padding-nan-decode",
        seqlen_q=1,
        seqlen_k=133,
        head_dim=64,
        key_padding_mask=padding(64, 130),
        edit=_nan_in_padding,
    ),
]

NUMERICS = [
    Case(
        "lse-below-minus-88-mask",
        batch=1,
        seqlen_q=192,
        seqlen_k=192,
        attn_mask=float_mask("11LS", offset=-200.0),
        has_dlse=True,
    ),
    Case(
        "lse-below-minus-88-data",
        batch=1,
        seqlen_q=192,
        seqlen_k=192,
        head_dim=64,
        edit=_scores_near(-200.0),
        has_dlse=True,
        is_quick=True,
    ),
    Case(
        "lse-below-minus-88-causal",
        batch=1,
        seqlen_q=64,
        seqlen_k=192,
        head_dim=64,
        edit=_scores_near(-150.0),
        options={"is_causal": True},
    ),
    Case("lse-below-minus-88-decode", seqlen_q=1, seqlen_k=65, head_dim=128, edit=_scores_near(-300.0), has_dlse=True),
    Case("lse-above-88", seqlen_q=66, seqlen_k=66, head_dim=64, edit=_scores_near(300.0), has_dlse=True),
    Case("logits-huge", seqlen_q=70, seqlen_k=67, head_dim=64, edit=_scale_query(200.0), has_dlse=True),
    # Each query attends to one key, and a bias for all queries would add up how much ``out`` is rounded in each delta.
    Case(
        "logits-huge-bias-per-head",
        seqlen_q=133,
        seqlen_k=42,
        head_dim=16,
        attn_mask=float_mask("1H11"),
        sinks=sink(),
        edit=_scale_query(30.0),
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
    ),
    # The largest logits are about 70, 600 and 4000. The rounding error of such a logit changes a weight by far more
    # than the rounding error of the weight itself.
    *(
        Case(
            f"logits-of-randn-times-{factor}",
            batch=1,
            seqlen_q=128,
            seqlen_k=192,
            head_dim=64,
            edit=_scale_query_and_key(factor),
            has_dlse=True,
        )
        for factor in (4, 12, 30)
    ),
    Case(
        "logits-huge-causal-padded",
        seqlen_q=70,
        seqlen_k=70,
        edit=_scale_query(500.0),
        key_padding_mask=padding(70, 33),
        options={"is_causal": True},
    ),
    Case(
        "logits-late",
        seqlen_q=64,
        seqlen_k=64,
        head_dim=8,
        edit=_late_key_dominates,
        options={"scale": 1.0},
        differentiated=(),
    ),
    Case("logits-ascending", seqlen_q=70, seqlen_k=150, edit=_ascending_scores, has_dlse=True, is_quick=True),
    Case(
        "logits-ascending-with-everything",
        heads=4,
        kv_heads=2,
        seqlen_q=70,
        seqlen_k=150,
        head_dim=20,
        value_dim=36,
        edit=_ascending_scores,
        key_padding_mask=scattered_padding,
        attn_mask=float_mask("BHLS"),
        sinks=sink(),
        has_dlse=True,
        options={"window_size": (140, 30), "dropout_p": 0.2, "dropout_seed": 12},
    ),
    Case("logits-tiny", edit=_scale_query(1e-3)),
    Case("logits-equal", seqlen_q=70, seqlen_k=67, edit=_equal_keys),
    Case("scale-zero", options={"scale": 0.0}),
    Case("scale-negative", seqlen_q=70, seqlen_k=67, options={"scale": -0.3}, has_dlse=True),
    Case("scale-one", options={"scale": 1.0}, is_quick=True),
    Case("softcap", seqlen_q=70, seqlen_k=67, options={"softcap": 2.0}, has_dlse=True, is_quick=True),
    Case("softcap-saturated", options={"softcap": 20.0}, edit=_scale_query(100.0)),
    Case(
        "softcap-with-everything",
        heads=4,
        kv_heads=2,
        seqlen_q=70,
        seqlen_k=67,
        key_padding_mask=padding(60, 30),
        attn_mask=float_mask("BHLS"),
        relative_bias=per_head_bias,
        sinks=sink(),
        has_dlse=True,
        options={"softcap": 3.0, "is_causal": True, "window_size": (50, 0), "dropout_p": 0.1, "dropout_seed": 4},
    ),
    Case("sinks", seqlen_q=70, seqlen_k=67, sinks=sink(), has_dlse=True, is_quick=True),
    Case("sinks-huge", sinks=sink(200.0), has_dlse=True),
    Case("sinks-huge-beside-empty-rows", sinks=sink(1500.0), attn_mask=empty_rows_mask, has_dlse=True),
    Case("sinks-very-negative", sinks=sink(-200.0), has_dlse=True),
    Case("sinks-float32", sinks=sink(0.0, torch.float32), dtypes=(torch.bfloat16,)),
    Case("sinks-only-requires-grad", sinks=sink(), differentiated=("sinks",)),
    Case(
        "sinks-causal-padded",
        seqlen_q=130,
        seqlen_k=130,
        sinks=sink(),
        key_padding_mask=padding(100, 64),
        options={"is_causal": True},
    ),
]

RELATIVE = [
    Case("relative-bias-per-head", seqlen_q=70, seqlen_k=67, relative_bias=per_head_bias, has_dlse=True, is_quick=True),
    Case("relative-bias-shared", seqlen_q=70, seqlen_k=67, relative_bias=shared_bias),
    Case("relative-bias-float32", relative_bias=float32_bias, dtypes=(torch.bfloat16, torch.float16)),
    Case("relative-bias-t5", seqlen_q=200, seqlen_k=190, relative_bias=t5_bias, dtypes=COMMON),
    Case(
        "relative-bias-alibi-causal",
        heads=4,
        seqlen_q=70,
        seqlen_k=70,
        relative_bias=alibi,
        options={"is_causal": True},
    ),
    Case("relative-bias-and-float-mask", relative_bias=per_head_bias, attn_mask=float_mask("BHLS")),
    Case(
        "relative-bias-and-bool-mask-padded",
        relative_bias=shared_bias,
        attn_mask=bool_mask("B1LS", 0.9),
        key_padding_mask=padding(20, 11),
    ),
    Case(
        "relative-bias-window",
        seqlen_q=150,
        seqlen_k=170,
        relative_bias=per_head_bias,
        options={"window_size": (20, 20)},
    ),
    Case("relative-bias-decode", seqlen_q=1, seqlen_k=100, relative_bias=per_head_bias),
    Case("relative-bias-only-requires-grad", relative_bias=shared_bias, differentiated=("relative_bias",)),
    Case(
        "relative-bias-strided",
        heads=3,
        relative_bias=lambda case, dtype, generator: randn((41, 3), dtype, generator).t(),
    ),
]

STRIDES = [
    Case(
        "strides-blhd",
        seqlen_q=70,
        seqlen_k=67,
        query_layout="blhd",
        kv_layout="blhd",
        dout_layout="blhd",
        is_quick=True,
    ),
    Case("strides-lbhd", seqlen_q=70, seqlen_k=67, query_layout="lbhd", kv_layout="lbhd", dout_layout="lbhd"),
    Case(
        "strides-sliced",
        seqlen_q=70,
        seqlen_k=67,
        head_dim=17,
        query_layout="sliced",
        kv_layout="sliced",
        dout_layout="sliced",
    ),
    Case(
        "strides-last-dim-2",
        query_layout="every_second_column",
        kv_layout="every_second_column",
        dout_layout="every_second_column",
    ),
    Case(
        "strides-one-query",
        seqlen_q=1,
        seqlen_k=70,
        head_dim=64,
        query_layout="first_of_two_rows",
        dout_layout="first_of_two_rows",
        options={"dropout_p": 0.2, "dropout_seed": 5},
        dtypes=COMMON,
    ),
    Case("strides-one-key", seqlen_q=70, seqlen_k=1, head_dim=64, kv_layout="first_of_two_rows", dtypes=COMMON),
    Case("strides-bhdl", query_layout="bhdl", kv_layout="bhdl", dout_layout="bhdl"),
    Case("strides-0-kv-heads", seqlen_q=70, seqlen_k=97, heads=4, kv_layout="one_head_expanded", is_quick=True),
    Case("strides-0-kv-batch", seqlen_q=70, seqlen_k=65, kv_layout="one_batch_expanded"),
    Case("strides-0-kv-rows", seqlen_k=33, kv_layout="one_row_expanded"),
    Case("strides-0-everything", seqlen_k=33, query_layout="one_number_expanded", kv_layout="one_number_expanded"),
    Case("strides-0-query-batch-dout", seqlen_k=33, query_layout="one_batch_expanded", dout_layout="one_head_expanded"),
    Case("strides-0-dout", seqlen_q=70, seqlen_k=67, dout_layout="one_number_expanded"),
    Case("strides-mixed", seqlen_q=70, seqlen_k=67, query_layout="blhd", kv_layout="contiguous", dout_layout="bhdl"),
    Case(
        "strides-past-2-31",
        batch=1,
        query_layout="huge_head_stride",
        kv_layout="huge_head_stride",
        dout_layout="huge_head_stride",
        dtypes=(torch.bfloat16,),
    ),
    Case(
        "strides-past-2-31-mask",
        batch=1,
        seqlen_q=9,
        seqlen_k=11,
        dtypes=(torch.bfloat16,),
        attn_mask=lambda case, dtype, generator: _huge_head_stride(randn((1, 2, 9, 11), dtype, generator)),
        differentiated=("query", "key", "value"),
    ),
]

RANKS = [
    Case("rank-2", shapes=((19, 16), (23, 16), (23, 8)), has_dlse=True, is_quick=True),
    Case(
        "rank-2-everything",
        batch=1,
        heads=1,
        shapes=((19, 16), (23, 16), (23, 8)),
        attn_mask=float_mask("LS"),
        relative_bias=per_head_bias,
        sinks=sink(),
        options={"is_causal": True},
        dtypes=COMMON,
    ),
    Case("rank-3", shapes=((2, 19, 16), (2, 23, 16), (2, 23, 8)), attn_mask=float_mask("HLS"), has_dlse=True),
    Case("rank-3-gqa", heads=4, kv_heads=2, shapes=((4, 19, 16), (2, 23, 16), (2, 23, 16)), dtypes=COMMON),
    Case("rank-5", shapes=((3, 2, 2, 19, 16), (3, 2, 2, 23, 16), (3, 2, 2, 23, 8)), has_dlse=True),
    Case(
        "rank-5-masks",
        shapes=((3, 2, 2, 19, 16), (3, 2, 2, 23, 16), (3, 2, 2, 23, 8)),
        dtypes=COMMON,
        attn_mask=lambda case, dtype, generator: randn((3, 1, 1, 19, 23), dtype, generator),
        key_padding_mask=lambda case, dtype, generator: torch.rand((3, 2, 23), generator=generator) < 0.3,
        options={"dropout_p": 0.2, "dropout_seed": 8},
    ),
    Case("rank-broadcast-batch", shapes=((3, 2, 19, 16), (1, 2, 23, 16), (3, 2, 23, 8))),
    Case("rank-broadcast-query", shapes=((1, 2, 19, 16), (3, 2, 23, 16), (3, 2, 23, 8)), dtypes=COMMON),
    Case("rank-broadcast-heads", shapes=((2, 3, 19, 16), (2, 1, 23, 16), (2, 1, 23, 8)), dtypes=COMMON),
    Case("rank-broadcast-missing-dims", shapes=((2, 3, 19, 16), (3, 23, 16), (2, 3, 23, 8)), dtypes=COMMON),
    Case(
        "rank-5-gqa",
        heads=4,
        kv_heads=2,
        shapes=((2, 2, 4, 19, 16), (2, 2, 2, 23, 16), (2, 2, 2, 23, 16)),
        dtypes=COMMON,
    ),
]

DROPOUT = [
    Case(
        f"dropout-{p}",
        seqlen_q=70,
        seqlen_k=67,
        options={"dropout_p": p, "dropout_seed": seed},
        has_dlse=True,
        is_quick=p == 0.5,
    )
    for p, seed in ((0.1, 0), (0.5, 2**40 + 12345), (1.0, 7))
] + [
    Case(
        "dropout-masks",
        heads=3,
        seqlen_q=70,
        seqlen_k=67,
        attn_mask=float_mask("BHLS"),
        key_padding_mask=padding(60, 9),
        relative_bias=per_head_bias,
        options={"dropout_p": 0.3, "dropout_seed": 11, "is_causal": True},
    ),
    Case("dropout-sinks", sinks=sink(), options={"dropout_p": 0.3, "dropout_seed": 2**63 - 1}, has_dlse=True),
    Case(
        "dropout-window",
        seqlen_q=200,
        seqlen_k=200,
        options={"dropout_p": 0.2, "dropout_seed": 5, "window_size": (30, 10)},
        dtypes=COMMON,
    ),
    Case("dropout-decode", seqlen_q=1, seqlen_k=131, options={"dropout_p": 0.2, "dropout_seed": 5}, dtypes=COMMON),
]

PACKED = [
    Case("varlen", lengths_q=(5, 70, 1), lengths_k=(9, 67, 3), has_dlse=True, is_quick=True),
    Case("varlen-causal", lengths_q=(70, 5, 130), lengths_k=(70, 5, 130), options={"is_causal": True}, has_dlse=True),
    Case("varlen-causal-unequal", lengths_q=(70, 5, 30), lengths_k=(30, 50, 130), options={"is_causal": True}),
    Case(
        "varlen-uneven",
        heads=4,
        kv_heads=2,
        lengths_q=(3, 300, 0, 40, 1),
        lengths_k=(2, 420, 30, 0, 256),
        head_dim=64,
        options={"is_causal": True},
        has_dlse=True,
    ),
    Case(  # fewer keys than queries, none, a whole block more, and rows of another sequence behind the last key
        "varlen-lower-right",
        lengths_q=(70, 5, 150, 0, 9, 30),
        lengths_k=(30, 50, 410, 7, 0, 160),
        has_dlse=True,
        options={"is_causal": True, "diagonal_alignment": "lower_right"},
        is_quick=True,
    ),
    Case(
        "varlen-lower-right-window-gqa",
        heads=4,
        kv_heads=2,
        lengths_q=(140, 3, 200),
        lengths_k=(400, 130, 90),
        head_dim=64,
        sinks=sink(),
        relative_bias=per_head_bias,
        options={"window_size": (130, 6), "diagonal_alignment": "lower_right"},
    ),
    Case("varlen-empty-sequences", lengths_q=(0, 7, 0, 5, 4, 0), lengths_k=(0, 0, 6, 5, 9, 0), has_dlse=True),
    Case("varlen-nothing", lengths_q=(0, 0), lengths_k=(0, 0), dtypes=FLOATS),
    Case(
        "varlen-gqa-window",
        heads=4,
        kv_heads=2,
        lengths_q=(40, 33),
        lengths_k=(35, 70),
        value_dim=8,
        options={"window_size": (9, 4)},
    ),
    Case(
        "varlen-relative-bias-sinks",
        lengths_q=(5, 30, 8),
        lengths_k=(9, 20, 33),
        relative_bias=per_head_bias,
        sinks=sink(),
        has_dlse=True,
    ),
    Case(
        "varlen-relative-bias-larger-max",
        lengths_q=(5, 30),
        lengths_k=(9, 20),
        relative_bias=shared_bias,
        options={"max_seqlen_q": 64},
        dtypes=COMMON,
    ),
    Case("varlen-dropout", lengths_q=(5, 70, 1), lengths_k=(9, 67, 3), options={"dropout_p": 0.3, "dropout_seed": 21}),
    Case(
        "varlen-softcap-huge-logits",
        lengths_q=(5, 70),
        lengths_k=(70, 9),
        options={"softcap": 30.0},
        edit=_scale_query(50.0),
        dtypes=COMMON,
    ),
    Case(
        "varlen-many",
        lengths_q=(1, 2, 3, 4, 5, 6, 7, 8),
        lengths_k=(8, 7, 6, 5, 4, 3, 2, 1),
        head_dim=40,
        dtypes=COMMON,
    ),
]

KEY_RANGES = [
    Case("ranges", seqlen_q=70, seqlen_k=90, key_ranges=random_ranges("B1L", 2), has_dlse=True, is_quick=True),
    Case("ranges-documents-causal", batch=1, seqlen_q=300, seqlen_k=300, key_ranges=documents(130, 1, 69, 100),
         options={"is_causal": True}),
    Case("ranges-prefix-lm", seqlen_q=150, seqlen_k=150, head_dim=64, key_ranges=prefix_lm(40, 149)),
    Case("ranges-shared-question", batch=1, seqlen_q=280, seqlen_k=280, key_ranges=shared_question(90, 40, 100, 50),
         is_quick=True),
    Case("ranges-heads-gqa", heads=4, kv_heads=2, seqlen_q=67, seqlen_k=130, head_dim=128,
         key_ranges=random_ranges("BHL", 1)),
    Case("ranges-of-heads", heads=3, seqlen_q=40, seqlen_k=70, key_ranges=random_ranges("HL", 3)),
    Case("ranges-of-entries", batch=3, seqlen_q=40, seqlen_k=200, key_ranges=random_ranges("B11", 1)),
    Case("ranges-bool-mask", seqlen_q=70, seqlen_k=67, key_ranges=random_ranges("B1L", 2),
         attn_mask=bool_mask("1HLS", 0.8), has_dlse=True),
    Case("ranges-transposed-mask", seqlen_q=70, seqlen_k=67, key_ranges=random_ranges("1L", 2),
         attn_mask=transposed_mask),
    Case("ranges-bias-window", seqlen_q=90, seqlen_k=110, key_ranges=random_ranges("B1L", 2),
         attn_mask=float_mask("1HLS"), relative_bias=per_head_bias, options={"window_size": (50, 20), "softcap": 5.0}),
    Case("ranges-dropout-sinks", seqlen_q=70, seqlen_k=90, key_ranges=random_ranges("B1L", 2), sinks=sink(),
         options={"dropout_p": 0.3, "dropout_seed": 7}),
    Case("ranges-padding", seqlen_q=70, seqlen_k=90, key_ranges=random_ranges("B1L", 2),
         key_padding_mask=scattered_padding, edit=_nan_in_padding, options={"return_max": True}),
    Case("ranges-key-lengths-lower-right", batch=3, seqlen_q=40, seqlen_k=130, key_lengths=(130, 64, 13),
         key_ranges=random_ranges("B1L", 2), attn_mask=lower_right, edit=_nan_behind_lengths),
    Case("ranges-decode", heads=4, kv_heads=2, batch=3, seqlen_q=1, seqlen_k=900, head_dim=64,
         key_ranges=random_ranges("B1L", 2)),
    Case("ranges-decode-heads", heads=4, kv_heads=2, seqlen_q=3, seqlen_k=700, key_ranges=random_ranges("BHL", 2),
         options={"num_splits": 3}),
    Case("ranges-gap", batch=1, seqlen_q=130, seqlen_k=500, head_dim=64, key_ranges=first_and_last(4, 30)),
    Case("ranges-gap-padding-window", seqlen_q=70, seqlen_k=500, key_ranges=first_and_last(100, 7),
         key_padding_mask=scattered_padding, edit=_nan_in_padding, options={"window_size": (440, 460)}),
    Case("ranges-gaps-bool-mask", seqlen_q=40, seqlen_k=600, attn_mask=bool_mask("11LS", 0.5),
         key_ranges=far_ranges((450, 470), (-9, 3), (200, 100), (130, 131), (590, 700), (900, 950))),
    Case("ranges-many-keys", batch=1, seqlen_q=20, seqlen_k=1500, key_ranges=random_ranges("L", 4)),
]  # fmt: skip

DECODE = [
    Case("decode-20-queries", batch=1, heads=4, kv_heads=2, seqlen_q=20, seqlen_k=300, head_dim=128,
         attn_mask=lower_right, key_padding_mask=scattered_padding, relative_bias=per_head_bias,
         options={"softcap": 5.0, "window_size": (200, 0)}, edit=_nan_in_padding, differentiated=()),
    Case("decode-30-queries", batch=2, heads=2, seqlen_q=30, seqlen_k=200, head_dim=256, attn_mask=bool_mask("B1LS"),
         sinks=sink(), differentiated=()),
]  # fmt: skip

KEY_LENGTHS = [
    Case(
        "key-lengths",
        batch=4,
        key_lengths=(23, 9, 0, 1),
        edit=_nan_behind_lengths,
        has_dlse=True,
        is_quick=True,
    ),
    Case(
        "key-lengths-causal",
        seqlen_q=70,
        seqlen_k=130,
        key_lengths=(130, 61),
        options={"is_causal": True},
        edit=_nan_behind_lengths,
    ),
    Case(
        "key-lengths-lower-right",
        batch=4,
        seqlen_q=40,
        seqlen_k=130,
        key_lengths=(130, 64, 13, 0),
        attn_mask=lower_right,
        edit=_nan_behind_lengths,
        has_dlse=True,
    ),
    Case(
        "key-lengths-lower-right-window-gqa",
        heads=4,
        kv_heads=2,
        batch=3,
        seqlen_q=5,
        seqlen_k=150,
        head_dim=64,
        key_lengths=(150, 129, 3),
        attn_mask=lower_right,
        sinks=sink(),
        options={"window_size": (30, 0), "num_splits": 3},
        edit=_nan_behind_lengths,
    ),
    Case(  # lengths within, at and behind the end of a block of keys
        "key-lengths-lower-right-blocks",
        heads=4,
        kv_heads=2,
        batch=4,
        seqlen_q=200,
        seqlen_k=420,
        key_lengths=(420, 128, 129, 37),
        attn_mask=lower_right,
        key_padding_mask=scattered_padding,
        edit=_nan_behind_lengths,
    ),
    Case(
        "key-lengths-lower-right-window-blocks",
        batch=3,
        seqlen_q=150,
        seqlen_k=400,
        key_lengths=(400, 255, 90),
        attn_mask=lower_right,
        sinks=sink(),
        options={"window_size": (130, 0), "return_max": True},
        edit=_nan_behind_lengths,
        has_dlse=True,
    ),
    Case(
        "key-lengths-lower-right-mask",
        seqlen_q=140,
        seqlen_k=420,
        key_lengths=(410, 130),
        attn_mask=bool_mask("1HLS"),
        options={"is_causal": True, "diagonal_alignment": "lower_right"},
        edit=_nan_behind_lengths,
    ),
    Case(
        "key-lengths-window-lower-right",
        batch=3,
        seqlen_q=70,
        seqlen_k=140,
        key_lengths=(140, 40, 129),
        options={"window_size": (9, 4), "diagonal_alignment": "lower_right"},
        edit=_nan_behind_lengths,
    ),
    Case(
        "key-lengths-window",
        seqlen_q=70,
        seqlen_k=70,
        key_lengths=(70, 40),
        options={"window_size": (9, 4)},
        edit=_nan_behind_lengths,
    ),
    Case(
        "key-lengths-padding-mask-bias",
        seqlen_q=70,
        seqlen_k=67,
        key_lengths=(50, 67),
        attn_mask=bool_mask("B1LS"),
        key_padding_mask=scattered_padding,
        relative_bias=per_head_bias,
        edit=_nan_behind_lengths,
    ),
    Case(
        "key-lengths-float-mask",
        seqlen_q=19,
        key_lengths=(7, 20),
        attn_mask=float_mask("BHLS"),
        edit=_nan_behind_lengths,
        has_dlse=True,
    ),
    Case(
        "key-lengths-float-padding",
        batch=3,
        seqlen_q=40,
        seqlen_k=67,
        key_lengths=(50, 9, 67),
        key_padding_mask=float_padding,
        edit=_nan_behind_lengths,
        has_dlse=True,
    ),
    Case(
        "key-lengths-dropout",
        seqlen_q=70,
        seqlen_k=67,
        key_lengths=(7, 67),
        options={"dropout_p": 0.3, "dropout_seed": 3},
        edit=_nan_behind_lengths,
    ),
]

#: A key more or less than whole pages, sequences of no key and of one, and every size of pages.
PAGED = [
    *(
        Case(
            f"paged-{page_size}-{'decode' if seqlen_q == 1 else seqlen_q}",
            batch=6,
            heads=4,
            kv_heads=2,
            seqlen_q=seqlen_q,
            seqlen_k=2 * page_size + 130,
            page_size=page_size,
            key_lengths=(2 * page_size + 130, page_size, page_size + 1, max(page_size - 1, 0), 1, 0),
            head_dim=64 if page_size == 16 else 24,
            is_quick=page_size == 16,
        )
        for page_size in (1, 16, 64, 100)
        for seqlen_q in (1, 5)
    ),
    Case("paged-causal", batch=3, seqlen_q=40, seqlen_k=150, page_size=16, key_lengths=(150, 41, 7),
         options={"is_causal": True}),
    Case("paged-causal-one-page", batch=3, heads=6, kv_heads=2, seqlen_q=3, seqlen_k=128, page_size=128,
         key_lengths=(128, 3, 50), options={"is_causal": True}, head_dim=80, value_dim=48),
    Case("paged-shared", batch=4, seqlen_q=2, seqlen_k=100, page_size=16, shares_pages=True,
         key_lengths=(100, 48, 70, 20), options={"is_causal": True}),
    Case("paged-window-sinks", batch=2, heads=4, kv_heads=1, seqlen_q=2, seqlen_k=300, page_size=64,
         key_lengths=(300, 130), sinks=sink(), options={"window_size": (50, 0), "softcap": 5.0, "scale": 0.4}),
    Case("paged-padding", batch=2, seqlen_q=1, seqlen_k=96, page_size=32, key_lengths=(90, 40),
         key_padding_mask=scattered_padding),
    Case("paged-splits", batch=3, heads=4, kv_heads=2, seqlen_q=4, seqlen_k=1100, page_size=16, head_dim=64,
         key_lengths=(1100, 513, 2), options={"is_causal": True, "num_splits": 7}),
    Case("paged-heads-before-rows", batch=2, seqlen_q=1, seqlen_k=70, page_size=16, key_lengths=(70, 33),
         kv_layout="blhd"),
    Case("paged-many-queries", batch=2, heads=4, kv_heads=2, seqlen_q=200, seqlen_k=330, page_size=16, head_dim=64,
         key_lengths=(330, 220), options={"is_causal": True}),
    # Pages of which a block of 64 or 128 keys has pieces of 64, 16, 8 and 4 rows. TMA cannot copy the last ones.
    *(
        Case(f"paged-prompts-{page_size}", batch=3, heads=4, kv_heads=2, seqlen_q=140, seqlen_k=seqlen_k,
             page_size=page_size, key_lengths=(seqlen_k, 141, 1), options={"is_causal": True, **options}, **others)
        for page_size, seqlen_k, options, others in (
            (192, 500, {}, {"head_dim": 64}),
            (48, 300, {"window_size": (70, 0)}, {"head_dim": 128, "sinks": sink()}),
            (24, 264, {"softcap": 5.0}, {"head_dim": 40, "key_padding_mask": scattered_padding}),
            (20, 260, {}, {"head_dim": 96}),
        )
    ),
    # Prompts, parts of prompts, single tokens, and sequences without queries or keys, in one call.
    Case("paged-packed", batch=6, heads=4, kv_heads=2, lengths_q=(140, 1, 0, 33, 5, 1), seqlen_k=300, page_size=16,
         key_lengths=(300, 129, 40, 33, 2, 0), head_dim=64, options={"is_causal": True}),
    Case("paged-packed-tokens", batch=4, heads=4, kv_heads=2, lengths_q=(1, 1, 0, 1), seqlen_k=600, page_size=48,
         key_lengths=(600, 77, 5, 0), head_dim=40, sinks=sink(), options={"window_size": (400, 0), "softcap": 3.0}),
    Case("paged-packed-few", batch=3, heads=3, kv_heads=1, lengths_q=(2, 5, 3), seqlen_k=320, page_size=10,
         key_lengths=(320, 5, 200), value_dim=24, options={"is_causal": True, "max_seqlen_q": 7, "num_splits": 3}),
    Case("paged-packed-none", batch=2, lengths_q=(0, 0), seqlen_k=30, page_size=10, key_lengths=(30, 5), dtypes=FLOATS),
    Case("paged-sliced", batch=2, seqlen_q=1, seqlen_k=70, page_size=16, key_lengths=(70, 33), kv_layout="sliced",
         query_layout="every_second_column", dtypes=COMMON),
    # Strides of 0 between the rows or the heads of a page.
    Case("paged-rows-expanded", batch=2, seqlen_q=140, seqlen_k=300, page_size=48, key_lengths=(300, 141), head_dim=64,
         kv_layout="one_head_expanded", options={"is_causal": True}),
    Case("paged-heads-expanded", batch=2, seqlen_q=140, seqlen_k=300, page_size=48, key_lengths=(300, 141), head_dim=64,
         kv_layout="one_row_expanded", options={"is_causal": True}),
    Case("paged-no-pages", batch=2, seqlen_q=3, seqlen_k=0, page_size=4, key_lengths=(0, 0), dtypes=FLOATS),
]  # fmt: skip

# Logits so large that an exponent which is computed in another order of operations is wrong by whole powers of two.
# They are float32 cases: float16 does not hold such inputs, and the CUDA kernels compute the forward pass in bfloat16.
LOGITS_BEYOND_MILLIONS = [
    Case("logits-1e6", seqlen_q=70, seqlen_k=128, head_dim=64, edit=_scale_both(1e3), has_dlse=True),
    Case("logits-1e10", seqlen_q=70, seqlen_k=128, head_dim=64, edit=_scale_both(1e5), has_dlse=True),
    Case("logits-equal-6e6", seqlen_q=128, seqlen_k=128, edit=_equal_scores, options={"is_causal": True}),
]

#: Cases in which only some gradients are wanted, because backends have different kernels for different gradients.
WANTED = [
    *(
        Case(
            f"only-{'-'.join(wanted)}-{head_dim}",
            heads=2,
            kv_heads=1,
            seqlen_q=70,
            seqlen_k=150,
            head_dim=head_dim,
            key_padding_mask=padding(150, 100),
            options={"window_size": (120, 20), "dropout_p": 0.2, "dropout_seed": 5},
            differentiated=wanted,
            dtypes=COMMON,
        )
        for head_dim, wanted in (
            (64, ("query",)),
            (64, ("key", "value")),
            (96, ("query", "value")),
            (96, ("value",)),
            (128, ("query",)),
            (128, ("key",)),
            (128, ("query", "key")),
        )
    ),
    *(
        Case(
            f"only-{'-'.join(wanted)}-varlen",
            lengths_q=(5, 70),
            lengths_k=(135, 9),
            head_dim=64,
            differentiated=wanted,
            dtypes=COMMON,
        )
        for wanted in (("query",), ("key", "value"))
    ),
]

#: Calls that return the largest logit of each row.
MAXIMA = [
    Case("max", seqlen_q=70, seqlen_k=300, head_dim=64, options={"return_max": True}, has_dlse=True, is_quick=True),
    Case(
        "max-everything",
        heads=4,
        kv_heads=2,
        seqlen_q=66,
        seqlen_k=150,
        key_padding_mask=float_padding,
        attn_mask=float_mask("1HLS"),
        relative_bias=per_head_bias,
        sinks=sink(20.0),
        options={"return_max": True, "softcap": 3.0, "dropout_p": 0.5, "dropout_seed": 3},
        edit=_scale_query(5.0),
    ),
    Case(
        "max-empty-rows",
        seqlen_q=140,
        seqlen_k=150,
        attn_mask=empty_rows_mask,
        key_padding_mask=padding(150, 67),
        sinks=sink(),
        options={"return_max": True},
        edit=_nan_in_padding,
        has_dlse=True,
    ),
    Case(
        "max-window",
        seqlen_q=150,
        seqlen_k=40,
        options={"return_max": True, "window_size": (20, 3), "scale": -0.4},
    ),
    Case("max-scale-0", options={"return_max": True, "scale": 0.0}, dtypes=COMMON),
    Case("max-ascending", seqlen_q=70, seqlen_k=300, edit=_ascending_scores, options={"return_max": True}),
    Case("max-far-below-0", attn_mask=float_mask("LS", offset=-150.0), options={"return_max": True}),
    Case("max-no-keys", seqlen_k=0, options={"return_max": True}, dtypes=COMMON),
    Case("max-2d", shapes=((5, 8), (7, 8), (7, 8)), options={"return_max": True}, dtypes=COMMON),
    Case(
        "max-varlen",
        heads=4,
        kv_heads=2,
        lengths_q=(5, 0, 70, 3),
        lengths_k=(9, 4, 67, 0),
        relative_bias=per_head_bias,
        sinks=sink(),
        options={"return_max": True, "is_causal": True},
        has_dlse=True,
    ),
]

CASES: tuple[Case, ...] = (
    *LENGTHS,
    *EMPTY,
    *HEAD_DIMS,
    *GROUPS,
    *BANDS,
    *EMPTY_ROWS,
    *MASKS,
    *PADDING,
    *NUMERICS,
    *RELATIVE,
    *STRIDES,
    *RANKS,
    *DROPOUT,
    *PACKED,
    *DECODE,
    *KEY_RANGES,
    *KEY_LENGTHS,
    *PAGED,
    *WANTED,
    *MAXIMA,
)
assert len({case.id for case in CASES}) == len(CASES), "two cases of one id"
