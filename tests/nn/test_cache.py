"""KVCache returns the keys and values that were written to it, without copying all of them at every step."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

from fused_attn import TransformerDecoder, TransformerDecoderLayer
from fused_attn.nn import FusedMultiheadAttention, SlidingSelfAttentionCache, StaticSelfAttentionCache
from fused_attn.nn.cache import CrossAttentionCache, KVCache, SelfAttentionCache, SlidingKVCache, StaticKVCache


def rows(length: int, batch: int = 2, heads: int = 3, columns: int = 4) -> torch.Tensor:
    return torch.randn(batch, heads, length, columns)


@pytest.mark.quick
@pytest.mark.parametrize("max_length", [None, 64], ids=["growing", "preallocated"])
@pytest.mark.parametrize("lengths", [(1,) * 40, (5, 1, 1, 30, 2), (17, 0, 3)], ids=["ones", "mixed", "empty-step"])
def test_update_returns_all_rows_so_far(lengths, max_length):
    torch.manual_seed(0)
    cache = SelfAttentionCache(max_length)
    keys, values = [], []
    for length in lengths:
        keys.append(rows(length))
        values.append(rows(length, columns=5))
        all_keys, all_values = cache.update(keys[-1], values[-1])
        assert torch.equal(all_keys, torch.cat(keys, dim=2))
        assert torch.equal(all_values, torch.cat(values, dim=2))
        assert cache.length == all_keys.shape[2]


@torch.no_grad()
def test_steps_do_not_copy_the_cache():
    cache = SelfAttentionCache()
    buffers = [cache.update(rows(1), rows(1))[0].untyped_storage().data_ptr() for _ in range(1000)]
    assert sum(a != b for a, b in itertools.pairwise(buffers)) <= 10


@torch.no_grad()
def test_preallocated_buffer_never_moves():
    cache = SelfAttentionCache(max_length=100)
    assert len({cache.update(rows(1), rows(1))[0].data_ptr() for _ in range(100)}) == 1


def test_earlier_views_keep_their_contents():
    cache = SelfAttentionCache()
    first, _ = cache.update(rows(3), rows(3))
    expected = first.clone()
    cache.update(rows(1), rows(1))
    cache.reorder(torch.tensor([1, 1]))
    cache.update(rows(30), rows(30))
    assert torch.equal(first, expected)


def test_gradients_reach_every_step():
    cache = SelfAttentionCache()
    steps = [rows(n).requires_grad_() for n in (2, 1, 3)]
    total = sum((cache.update(step, step)[0] ** 2).sum() for step in steps)
    total.backward()
    for n, step in enumerate(steps):  # the step that writes a row and all later steps read it
        torch.testing.assert_close(step.grad, 2.0 * (len(steps) - n) * step)


def test_steps_with_and_without_gradients_mix():
    cache = SelfAttentionCache()
    steps = [rows(2) for _ in range(4)]
    for n, step in enumerate(steps):
        with torch.set_grad_enabled(n % 2 == 0):
            keys, _ = cache.update(step, step)
    assert torch.equal(keys, torch.cat(steps, dim=2))


@pytest.mark.parametrize("reorders", [False, True])
def test_a_step_without_gradients_leaves_the_graph_of_earlier_rows_alone(reorders: bool) -> None:
    """Rows that are overwritten after a crop must not get the gradient of the rows that take their place."""
    cache, given = SelfAttentionCache(), rows(4).requires_grad_()
    earlier, _ = cache.update(given, given)
    if reorders:
        cache.reorder(torch.tensor([0, 1]))
    cache.crop(2)
    new = rows(1)
    with torch.no_grad():
        cache.update(new, new)
    last = rows(1).requires_grad_()
    keys, _ = cache.update(last, last)
    assert torch.equal(keys, torch.cat((given[:, :, :2], new, last), dim=2))
    older, newest = torch.autograd.grad(keys.sum(), (given, last), allow_unused=True)
    assert older is None and torch.equal(newest, torch.ones_like(last))
    assert torch.equal(torch.autograd.grad(earlier.sum(), given)[0], torch.ones_like(given))


@pytest.mark.parametrize("is_expanded", [False, True], ids=["same-tensor", "expanded"])
def test_rows_after_a_crop_are_not_written_into_tensors_of_the_caller(is_expanded):
    """A step with gradients may keep the tensors that it was given. Here, keys and values are even one tensor."""
    cache, given = SelfAttentionCache(), rows(5)
    if is_expanded:
        given = given[:1].expand(2, -1, -1, -1)
    before, new = given.clone(), rows(3)
    cache.update(given, given)
    cache.crop(2)
    with torch.no_grad():
        keys, values = cache.update(new, -new)
    assert torch.equal(keys, torch.cat((before[:, :, :2], new), dim=2))
    assert torch.equal(values, torch.cat((before[:, :, :2], -new), dim=2))
    assert torch.equal(given, before)


def test_rows_after_a_crop_are_not_written_into_what_autograd_has_saved():
    cache, query = SelfAttentionCache(), torch.ones((), requires_grad=True)
    steps = [rows(2), rows(3)]
    losses = [(query * cache.update(step, step)[0]).sum() for step in steps]
    cache.crop(1)
    with torch.no_grad():
        cache.update(rows(2), rows(2))
    sum(losses).backward()
    torch.testing.assert_close(query.grad, 2 * steps[0].sum() + steps[1].sum())


def test_gradients_of_queries_over_frozen_keys():
    cache, query = SelfAttentionCache(), torch.ones((), requires_grad=True)
    steps = [rows(n) for n in (2, 1, 3)]
    sum((query * cache.update(step, step)[0]).sum() for step in steps).backward()
    torch.testing.assert_close(query.grad, 3 * steps[0].sum() + 2 * steps[1].sum() + steps[2].sum())


@pytest.mark.quick
@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [1], [0, 1, 1, 0]], ids=["swap", "twice", "fewer", "more"])
def test_reorder(indices):
    cache = KVCache(2)
    self_rows, cross_rows = [rows(3), rows(3)], [rows(5), rows(5)]
    for n, layer in enumerate(cache.layers):
        layer.self_attention.update(self_rows[n], -self_rows[n])
        layer.cross_attention.update(cross_rows[n], -cross_rows[n])
    cache.reorder(torch.tensor(indices))
    new = [rows(1, batch=len(indices)) for _ in cache.layers]
    for n, layer in enumerate(cache.layers):
        keys, values = layer.self_attention.update(new[n], -new[n])
        assert torch.equal(keys, torch.cat((self_rows[n][indices], new[n]), dim=2))
        assert torch.equal(values, -keys)
        keys, values = layer.cross_attention.get()
        assert torch.equal(keys, cross_rows[n][indices])
        assert torch.equal(values, -keys)
    assert cache.length == 4


def test_reorder_can_leave_the_memory_alone():
    cache = KVCache(1)
    memory, _ = cache.layers[0].cross_attention.update(rows(5), rows(5))
    cache.reorder(torch.tensor([1, 0]), include_cross_attention=False)
    assert cache.layers[0].cross_attention.get()[0] is memory


def test_reorder_of_an_empty_cache():
    cache = KVCache(1)
    cache.reorder(torch.tensor([1, 0]))
    assert cache.length == 0
    assert cache.layers[0].cross_attention.get() is None


def test_cross_attention_is_filled_once():
    cache = CrossAttentionCache()
    assert cache.is_filled_once and cache.get() is None and cache.length == 0
    key, value = cache.update(rows(5), rows(5, columns=7))
    assert cache.get() == (key, value) and cache.length == 5
    with pytest.raises(RuntimeError, match="filled already"):
        cache.update(rows(5), rows(5))


def test_another_memory_raises():
    cache, memory = CrossAttentionCache(), torch.randn(2, 5, 8)
    memory[0, 4] = float("nan")  # padding may be NaN
    pair = cache.update(rows(5), rows(5), memory)
    for same in (memory, memory.clone(), memory.view(2, 5, 8)):
        assert cache.get(same) == pair
    for other in (memory + 1, memory[:1], memory.double()):
        with pytest.raises(ValueError, match=r"memory: expected .* got "):
            cache.get(other)
    cache.reorder(torch.tensor([1, 1, 0]))
    with pytest.raises(ValueError, match=r"memory: expected batch size 3 and length 5, .*, got shape \(2, 5, 8\)"):
        cache.get(memory)
    reordered = memory[[1, 1, 0]]
    assert cache.get(reordered) is not None
    with pytest.raises(ValueError, match="memory: expected the one"):
        cache.get(reordered + 1)


def test_a_memory_that_was_written_in_place_raises() -> None:
    module, cache = FusedMultiheadAttention(8, 2, batch_first=True).eval(), CrossAttentionCache()
    memory, x = torch.randn(2, 5, 8), torch.randn(2, 1, 8)
    with torch.no_grad():
        expected, _ = module(x, memory, memory, need_weights=False, cache=cache)
        copied = copy.deepcopy(cache)
        state = cache.state()
        written = memory.clone()
        assert cache.get(written) is not None  # the cache compares later memories with this one
        written.mul_(2)
        message = "memory: expected the one that the cache was filled with, got one that was written in place since"
        for other in (written, memory):
            with pytest.raises(ValueError, match=message):
                module(x, other, other, need_weights=False, cache=cache)
        cache.restore(state)
        torch.testing.assert_close(module(x, memory, memory, need_weights=False, cache=cache)[0], expected)
        torch.testing.assert_close(module(x, memory, memory, need_weights=False, cache=copied)[0], expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("is_written", [False, True])
def test_a_copy_knows_whether_the_memory_was_written(copied, is_written: bool) -> None:
    cache, memory = CrossAttentionCache(), torch.randn(2, 4, 8)
    cache.update(torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 8), memory)
    if is_written:
        memory.mul_(2)
    copied_cache = copied(cache)
    if is_written:
        with pytest.raises(ValueError, match="memory: "):
            copied_cache.get(copied_cache._memory)
    else:
        assert copied_cache.get(copied_cache._memory) is not None


def test_reorder_of_a_memory_without_rows() -> None:
    cache = CrossAttentionCache()
    cache.update(torch.randn(2, 1, 0, 8), torch.randn(2, 1, 0, 8), torch.randn(2, 0, 8))
    with pytest.raises(IndexError, match=r"indices: expected numbers of \[0, 2\), got 5"):
        cache.reorder(torch.tensor([0, 5]))


def test_a_memory_of_inference_mode_is_served() -> None:
    """A tensor of inference mode does not count how often it was written."""
    module, cache = FusedMultiheadAttention(8, 2, batch_first=True).eval(), CrossAttentionCache()
    with torch.inference_mode():
        memory, x = torch.randn(2, 5, 8), torch.randn(2, 1, 8)
        first, second = (module(x, memory, memory, need_weights=False, cache=cache)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


def test_len_counts_layers():
    assert len(KVCache(4)) == 4 == len(KVCache(4).layers)
    assert not KVCache(4).layers[0].self_attention.is_filled_once


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (rows(1)[0], rows(1)[0], r"key: expected shape \(B, Hkv, L, D\), got \(3, 1, 4\)"),
        (rows(1), rows(2), r"value: expected shape \(2, 3, 1, 'Dv'\), got \(2, 3, 2, 4\)"),
        (
            rows(1, batch=3),
            rows(1, batch=3),
            r"key: expected shape \(2, 3, L, 4\), as in the cache, got \(3, 3, 1, 4\)",
        ),
        (rows(1), rows(1, columns=5), r"value: expected shape \(2, 3, L, 4\), as in the cache"),
        (rows(1).double(), rows(1), r"key: expected torch.float32 on cpu, as in the cache, got torch.float64"),
        (rows(8), rows(8), r"cache: expected at most max_length=8 rows, got 9"),
    ],
    ids=["rank", "lengths", "batch", "columns", "dtype", "max-length"],
)
def test_errors_of_update_leave_the_cache_as_it_was(key, value, message):
    cache = SelfAttentionCache(max_length=8)
    first = rows(1)
    cache.update(first, first)
    with pytest.raises(ValueError, match=message):
        cache.update(key, value)
    new = rows(1)
    assert torch.equal(cache.update(new, new)[0], torch.cat((first, new), dim=2))


def test_errors_of_arguments():
    with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
        KVCache(0)
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        KVCache(1, max_length=0)
    with pytest.raises(TypeError, match="num_layers: expected an int, got float"):
        KVCache(1.5)
    with pytest.raises(TypeError, match=r"indices: expected a tensor of shape \(B,\), got list"):
        KVCache(1).reorder([0, 1])
    for indices in (torch.zeros(2), torch.zeros(1, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"indices: expected integers of shape \(B,\)"):
            KVCache(1).reorder(indices)


@pytest.mark.parametrize("part", ["self_attention", "cross_attention"])
@pytest.mark.parametrize("kind", ["growing", "static", "sliding"])
@pytest.mark.parametrize("wrong", [2, -1])
@torch.no_grad()
def test_indices_outside_of_the_batch(kind: str, part: str, wrong: int) -> None:
    cache = {"growing": KVCache(1), "static": StaticKVCache(1, 4), "sliding": SlidingKVCache(1, 4)}[kind]
    layer, row = cache.layers[0], rows(1)
    layer.self_attention.append(row, row) if part == "self_attention" else layer.cross_attention.update(row, row)
    with pytest.raises(IndexError, match=rf"indices: expected numbers of \[0, 2\), got {wrong}"):
        cache.reorder(torch.tensor([0, wrong]))


@pytest.mark.parametrize("is_filled", [False, True])
@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"dtype": "float32"}, TypeError, "dtype: expected None or a torch.dtype, got str 'float32'"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a floating-point dtype, got torch.int32"),
        ({"device": 1.5}, TypeError, "device: expected None, a torch.device or the name of one, got float 1.5"),
        ({"device": "nowhere"}, RuntimeError, "nowhere"),
    ],
)
@torch.no_grad()
def test_a_cache_is_moved_only_where_torch_moves_tensors(is_filled, arguments, exception, message) -> None:
    for cache in (KVCache(1), StaticKVCache(1, 4)):
        if is_filled:
            cache.layers[0].self_attention.append(rows(1), rows(1))
        layer = cache.layers[0]
        for moved in (cache, layer.self_attention, layer.cross_attention):
            with pytest.raises(exception, match=message):
                moved.to(**arguments)


CACHES = {
    "growing": SelfAttentionCache,
    "static": lambda: StaticSelfAttentionCache(8),
    "sliding": lambda: SlidingSelfAttentionCache(4),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("rows_q", "rows_k"), [(1, 2), (2, 1), (3, 2)])
def test_a_self_attention_cache_takes_as_many_queries_as_keys(kind: str, rows_q: int, rows_k: int) -> None:
    module, cache = FusedMultiheadAttention(8, 2, batch_first=True).eval(), CACHES[kind]()
    q, k = torch.randn(1, rows_q, 8), torch.randn(1, rows_k, 8)
    with torch.no_grad():
        module(q, q, q, need_weights=False, cache=cache)
        message = f"key: expected as many rows as query, {rows_q}, with a self-attention cache, got {rows_k}"
        with pytest.raises(ValueError, match=message):
            module(q, k, k, need_weights=False, cache=cache)
    assert len(cache) == rows_q


@pytest.mark.parametrize("kind", CACHES)
def test_a_copy_made_in_inference_mode_can_be_written_outside(kind: str) -> None:
    module, y = FusedMultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 1, 8)
    cache = CACHES[kind]()
    with torch.inference_mode():
        module(y, y, y, need_weights=False, cache=cache)
        copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    with torch.no_grad():
        expected, _ = module(y, y, y, need_weights=False, cache=cache)
        for copied in copies:
            assert torch.equal(module(y, y, y, need_weights=False, cache=copied)[0], expected)


def test_a_cross_attention_cache_of_inference_mode_serves_gradients() -> None:
    module, cache = FusedMultiheadAttention(8, 2, batch_first=True).eval(), CrossAttentionCache()
    y, memory = torch.randn(2, 1, 8), torch.randn(2, 3, 8)
    with torch.inference_mode():
        expected, _ = module(y, memory, memory, need_weights=False, cache=cache)
    out, _ = module(y, memory, memory, need_weights=False, cache=cache)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert module.out_proj.weight.grad is not None


def test_an_emptied_cache_takes_another_batch() -> None:
    cache = SelfAttentionCache()
    with torch.no_grad():
        cache.update(torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4))
        cache.crop(0)
        keys, _ = cache.update(torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 4))
    assert keys.shape == (3, 1, 2, 4)


@pytest.mark.parametrize("kind", CACHES)
def test_the_length_of_an_empty_batch(kind: str) -> None:
    cache = CACHES[kind]()
    with torch.no_grad():
        cache.append(torch.randn(0, 1, 1, 4), torch.randn(0, 1, 1, 4))
    assert len(cache) in (0, 1)


@pytest.mark.parametrize("length", [0.0, False])
def test_a_sliding_cache_is_cropped_to_an_int(length) -> None:
    with pytest.raises(TypeError, match="length: expected an int, got"):
        SlidingSelfAttentionCache(4).crop(length)


def test_a_cache_with_gradients_can_be_copied() -> None:
    """torch itself copies no tensor that an operation has made."""
    decoder = TransformerDecoder(TransformerDecoderLayer(16, 2, dropout=0.0, batch_first=True), num_layers=2)
    memory, rows = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    cache = KVCache(2)
    decoder(rows[:, :3], memory, cache=cache)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    with torch.no_grad():
        expected = decoder(rows[:, 3:], memory, cache=cache)
    for found in copies:
        with torch.no_grad():
            found = decoder(rows[:, 3:], memory, cache=found)
        torch.testing.assert_close(found, expected)


def test_a_static_cache_of_different_lengths_tells_that_it_is_full() -> None:
    cache, rows = StaticSelfAttentionCache(4), torch.randn(2, 4, 3, 8)
    cache.append(rows, rows)
    cache.crop(torch.tensor([3, 2]))
    cache.append(rows[:, :, :1], rows[:, :, :1])
    with pytest.raises(ValueError, match=r"^cache: expected at most max_length=4 rows, got 5$"):
        cache.append(rows[:, :, :1], rows[:, :, :1])
    assert cache.length == 4
