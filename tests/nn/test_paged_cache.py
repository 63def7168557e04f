"""`PagedKVCache` behaves as a plain list of rows for each sequence, whatever pages it shares."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fused_attn import PagedKVCache, fused_attention, fused_attention_paged
from fused_attn.nn import OutOfPages

pytestmark = pytest.mark.quick

HEADS, DIM, VALUE_DIM = 2, 4, 3


def make(num_pages: int, page_size: int, **options) -> PagedKVCache:
    return PagedKVCache(num_pages, page_size, HEADS, DIM, VALUE_DIM, **options)


def rows(batch: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, HEADS, count, DIM), torch.randn(batch, HEADS, count, VALUE_DIM)


def contents(cache: PagedKVCache, sequence: int) -> tuple[Tensor, Tensor]:
    """The keys (Hkv, length, D) and values of a sequence, read through its table."""
    table, lengths = cache.table([sequence])
    length = int(lengths[0])
    places = torch.arange(length)
    page, row = table[0].long()[places // cache.page_size], places % cache.page_size
    return cache.key_pages[page, row].transpose(0, 1), cache.value_pages[page, row].transpose(0, 1)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("seed", range(6))
def test_random_operations_against_plain_lists(page_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    choose = random.Random(seed)
    num_pages = choose.choice((40, 12))
    cache, plain = make(num_pages, page_size), {}
    refused = 0
    for _ in range(120):
        operation = choose.choice(("add", "append", "append", "append", "fork", "crop", "free", "reorder"))
        known = list(plain)
        if operation == "add" and len(known) < 5:
            plain[cache.add()] = (torch.empty(HEADS, 0, DIM), torch.empty(HEADS, 0, VALUE_DIM))
        elif operation == "append" and known:
            chosen = choose.sample(known, choose.randint(1, len(known)))
            lengths = [choose.randint(0, 2 * page_size) for _ in chosen]
            is_packed = choose.random() < 0.5
            if not is_packed:
                lengths = [lengths[0]] * len(chosen)
            new = [rows(1, length) for length in lengths]
            keys, values = (torch.cat([x[n][0] for x in new], 1).transpose(0, 1) for n in (0, 1))  # packed
            if not is_packed:
                keys, values = (torch.cat([x[n] for x in new]) for n in (0, 1))
            try:
                cache.append(chosen, keys, values, lengths if is_packed else None)
            except OutOfPages:
                refused += 1
            else:
                for sequence, own in zip(chosen, new, strict=True):
                    plain[sequence] = tuple(
                        torch.cat((old, x[0]), 1) for old, x in zip(plain[sequence], own, strict=True)
                    )
        elif operation == "fork" and known and len(known) < 7:
            source = choose.choice(known)
            plain[cache.fork(source)] = plain[source]
        elif operation == "crop" and known:
            sequence = choose.choice(known)
            length = choose.randint(0, plain[sequence][0].shape[1])
            cache.crop(sequence, length)
            plain[sequence] = tuple(x[:, :length] for x in plain[sequence])
        elif operation == "free" and known and choose.random() < 0.5:
            sequence = choose.choice(known)
            cache.free(sequence)
            del plain[sequence]
        elif operation == "reorder" and len(known) > 1:
            beams = known[:2]
            indices = [choose.randint(0, 1) for _ in range(2)]
            new_beams = cache.reorder(beams, indices)
            kept = [plain.pop(beam) for beam in beams]
            plain |= {beam: kept[index] for beam, index in zip(new_beams, indices, strict=True)}
        assert len(cache) == len(plain)
        for sequence, (keys, values) in plain.items():
            found_keys, found_values = contents(cache, sequence)
            assert torch.equal(found_keys, keys) and torch.equal(found_values, values)
            assert cache.length(sequence) == keys.shape[1]
        used = {page for sequence in plain for page in cache._pages[sequence]}
        assert len(used) + cache.num_free_pages == num_pages
    assert refused or num_pages == 40
    for sequence in list(plain):
        cache.free(sequence)
    assert len(cache) == 0 and cache.num_free_pages == num_pages


def test_a_page_is_copied_when_one_of_its_sequences_writes() -> None:
    cache = make(4, 4)
    first = cache.add()
    cache.append([first], *rows(1, 6))
    second = cache.fork(first)
    assert cache.num_free_pages == 2
    cache.append([first, second], *rows(2, 1))  # one of the two keeps the page
    assert cache.num_free_pages == 1
    cache.append([first, second], *rows(2, 1))
    assert cache.num_free_pages == 1


def test_too_few_pages_change_nothing() -> None:
    cache = make(3, 2)
    first, second = cache.add(), cache.add()
    cache.append([first, second], *rows(2, 1))
    before = [contents(cache, x) for x in (first, second)]
    with pytest.raises(OutOfPages, match="expected 2 free pages for 2 more rows of 2 sequences, got 1 of 3"):
        cache.append([first, second], *rows(2, 2))
    for sequence, (keys, values) in zip((first, second), before, strict=True):
        found = contents(cache, sequence)
        assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    cache.append([first], *rows(1, 3))
    assert cache.num_free_pages == 0


def test_decoding_equals_a_contiguous_cache(backend: str) -> None:
    torch.manual_seed(0)
    cache = make(20, 4)
    sequences = [cache.add() for _ in range(3)]
    for sequence, length in zip(sequences, (7, 0, 12), strict=True):
        cache.append([sequence], *rows(1, length))
    for _ in range(3):
        cache.append(sequences, *rows(3, 1))
        query = torch.randn(3, 4, 1, DIM)
        out = fused_attention_paged(
            query, cache.key_pages, cache.value_pages, *cache.table(sequences), is_causal=True, backend=backend
        )
        for n, sequence in enumerate(sequences):
            keys, values = (x[None] for x in contents(cache, sequence))
            expected = fused_attention(query[n : n + 1], keys, values, enable_gqa=True, backend="reference")
            torch.testing.assert_close(out[n : n + 1], expected)


def test_prompts_and_tokens_in_one_call(backend: str) -> None:
    """A step of a server: two sequences begin, one reads a further part of its prompt, one gets a token."""
    torch.manual_seed(0)
    cache, lengths = make(40, 4), (9, 1, 5, 1)
    sequences = [cache.add() for _ in lengths]
    cache.append(sequences[2:], *rows(2, 6))
    keys, values = (x[0].transpose(0, 1) for x in rows(1, sum(lengths)))
    cache.append(sequences, keys, values, lengths)
    query = torch.randn(sum(lengths), 4, DIM)
    cu_seqlens = torch.tensor([0, 9, 10, 15, 16], dtype=torch.int32)
    out, lse = fused_attention_paged(
        query, cache.key_pages, cache.value_pages, *cache.table(sequences), is_causal=True, return_lse=True,
        cu_seqlens_q=cu_seqlens, max_seqlen_q=9, backend=backend,
    )  # fmt: skip
    assert out.shape == (16, 4, VALUE_DIM) and lse.shape == (4, 16)
    for sequence, own, own_out in zip(sequences, query.split(lengths), out.split(lengths), strict=True):
        key, value = (x[None] for x in contents(cache, sequence))
        expected = fused_attention(
            own.transpose(0, 1)[None], key, value, is_causal=True, enable_gqa=True,
            diagonal_alignment="lower_right", backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(own_out, expected[0].transpose(0, 1))


def test_moves() -> None:
    cache = make(3, 2)
    sequence = cache.add()
    cache.append([sequence], *rows(1, 3))
    keys, values = contents(cache, sequence)
    assert cache.to(dtype=torch.float64) is cache
    assert torch.equal(contents(cache, sequence)[0], keys.double())
    assert torch.equal(contents(cache, sequence)[1], values.double())
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point dtype, got torch\.int32"):
        cache.to(dtype=torch.int32)
    assert cache.to("meta").key_pages.device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: make(0, 2), "num_pages: expected an int of at least 1, got 0"),
        (lambda cache: make(2, True), "page_size: expected an int of at least 1, got True"),
        (lambda cache: cache.length(7), "sequence: expected one of the 1 sequences of the cache, got 7"),
        (lambda cache: cache.free(7), "sequence: expected one of"),
        (lambda cache: cache.crop(0, 3), "length: expected 0 to 2, got 3"),
        (lambda cache: cache.append([0, 0], *rows(2, 1)), r"sequences: expected each sequence once, got \[0, 0\]"),
        (lambda cache: cache.append([0], *rows(2, 1)), r"key: expected shape \(1, 2, L, 4\), got \(2, 2, 1, 4\)"),
        (lambda cache: cache.append([0], rows(1, 1)[0], rows(1, 2)[1]), "value: expected as many rows as key, 1"),
        (lambda cache: cache.append([0], rows(1, 1)[0].double(), rows(1, 1)[1]), "key: expected torch.float32 on cpu"),
        (lambda cache: cache.append([0], rows(1, 1)[0].requires_grad_(), rows(1, 1)[1]), "key: expected a tensor with"),
    ],
)
def test_errors(call, message: str) -> None:
    cache = make(4, 2)
    cache.append([cache.add()], *rows(1, 2))
    with pytest.raises(ValueError, match=message):
        call(cache)


def test_a_dtype_without_kernels_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected None or one of torch.float16, .*, got str 'float16'"):
        PagedKVCache(4, 2, 2, 4, dtype="float16")
    with pytest.raises(ValueError, match=r"dtype: expected None or one of torch.float16, .*, got torch.int8"):
        PagedKVCache(4, 2, 2, 4, dtype=torch.int8)


def test_a_refused_reorder_changes_nothing() -> None:
    cache = make(4, 2)
    beams = [cache.add(), cache.add()]
    cache.append(beams, *rows(2, 3))
    for sequences, indices in ((beams, [0, 2]), (beams, [-1, 0]), ([beams[0], 9], [0, 0]), ([beams[0]] * 2, [0, 1])):
        with pytest.raises(ValueError, match=r"indices: expected numbers of \[0, 2\)|sequences?: expected"):
            cache.reorder(sequences, indices)
        assert len(cache) == 2 and cache.num_free_pages == 0
        assert [cache.length(beam) for beam in beams] == [3, 3]


def test_messages_for_wrong_numbers() -> None:
    cache = make(4, 2)
    beams = [cache.add(), cache.add()]
    for indices, found in (([0.0, 1.0], r"float 0\.0"), ([[0], [1]], r"list \[0\]")):
        with pytest.raises(TypeError, match=f"indices: expected ints, got {found}"):
            cache.reorder(beams, indices)
    packed = [x[0].transpose(0, 1) for x in rows(1, 3)]
    with pytest.raises(TypeError, match=r"lengths: expected a list of ints, got \[1\.5, 1\.5\]"):
        cache.append(beams, *packed, [1.5, 1.5])
    for lengths in ([3], [1, 1, 1], [4, -1]):
        with pytest.raises(
            ValueError, match="lengths: expected a number of rows of at least 0 for each of the 2 sequences, got"
        ):
            cache.append(beams, *packed, lengths)
    with pytest.raises(ValueError, match=r"got \(3, 2, 4\); packed rows need lengths"):
        cache.append(beams, *packed)
    with pytest.raises(ValueError, match=r"key: expected shape \(2, 2, 4\), as the lengths add up to 2, got \(3, 2, 4"):
        cache.append(beams, *packed, [1, 1])
    with pytest.raises(OutOfPages, match="expected 5 free pages for 1 to 8 more rows of 2 sequences, got 4 of 4"):
        cache.append(beams, *(x[0].transpose(0, 1) for x in rows(1, 9)), [8, 1])
    assert cache.num_free_pages == 4
    for sequences in (0, None, [[0]], torch.tensor([0, 1])):
        with pytest.raises(TypeError, match="sequences: expected a list of ints, got"):
            cache.reorder(sequences, [0])
    assert len(cache) == 2


@pytest.mark.parametrize("call", range(3))
def test_an_interrupted_append_changes_no_sequence(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The numbers of the pages go to the device three times: twice to copy a shared page, then to write the rows."""
    cache = make(8, 2)
    first = cache.add()
    cache.append([first], *rows(1, 3))
    second = cache.fork(first)
    before, on_device, calls = contents(cache, first), PagedKVCache._on_device, iter(range(9))

    def interrupt(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return on_device(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PagedKVCache, "_on_device", interrupt)
        cache.append([second], *rows(1, 4))
    assert cache.num_free_pages == 6 - (call == 2)  # the copy of the shared page stays
    new = rows(1, 1)
    cache.append([second], *new)
    for x, y, z in zip(contents(cache, second), before, new, strict=True):
        torch.testing.assert_close(x, torch.cat((y, z[0]), dim=1))
    cache.append([first], *rows(1, 1))
    for x, y in zip(contents(cache, second), before, strict=True):
        torch.testing.assert_close(x[:, :3], y)


@pytest.mark.parametrize("is_inference", [False, True])
def test_a_table_is_made_again_only_if_pages_change(is_inference: bool) -> None:
    """The time that the host takes for a token does not grow with the number of pages."""
    cache = PagedKVCache(num_pages=12, page_size=4, num_kv_heads=1, head_dim=8)
    sequences = [cache.add(), cache.add()]
    tables = []

    def step() -> torch.Tensor:
        cache.append(sequences, torch.ones(2, 1, 1, 8), torch.ones(2, 1, 1, 8))
        table, lengths = cache.table(sequences)
        assert lengths.tolist() == [cache.length(sequence) for sequence in sequences]
        assert table.tolist() == [cache._pages[sequence] for sequence in sequences]
        return table

    with torch.inference_mode(is_inference):
        tables = [step() for _ in range(9)]
        assert len({id(table) for table in tables}) == 3  # with 1, 2 and 3 pages
        tables[-1].zero_()  # what a caller does with a table changes no later one
        assert step() is not tables[-1]
        cache.crop(sequences[0], 3)
        cache.append(sequences[:1], torch.ones(1, 1, 7, 8), torch.ones(1, 1, 7, 8))
        step()
        beam = cache.fork(sequences[1])
        cache.append([beam], torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8))  # copies the last page
        step()
        assert cache.table([beam])[0].tolist() == [cache._pages[beam]]
        assert cache.table(sequences[::-1])[0].tolist() == [cache._pages[sequence] for sequence in sequences[::-1]]
