"""Attention over shards of a sequence: on 2, 3 and 4 processes, the results are those of one process."""

from __future__ import annotations

import itertools
import math
import time

import jobs
import plan_jobs
import pytest
import torch
from processes import Team

from fused_attn import fused_attention, fused_attention_varlen
from fused_attn.attention.masks import band_of
from fused_attn.distributed.blocks import Documents, SharedScores, blocks
from fused_attn.distributed.cost import Machine, Method, Workload, cost
from fused_attn.distributed.rates import Rates
from fused_attn.distributed.sequence import Sharding
from fused_attn.distributed.traffic import ring_elements, ulysses_elements
from fused_attn.partial import PartialOptions

MESHES = {"2": (2,), "3": (3,), "4": (4,), "2x2": (2, 2)}
DIM = 16

# name: (L, S, query heads, key heads, options, further tensors)
CASES = {
    "causal": (37, 37, 12, 12, {"is_causal": True}, ()),
    "window, sinks and grouped heads": (
        61, 61, 12, 6, {"is_causal": True, "enable_gqa": True, "window_size": (9, 3)}, ("sinks",),
    ),
    "other keys with padding and a relative bias": (50, 37, 12, 12, {"softcap": 2.0}, ("padding", "relative_bias")),
    "shared relative bias and float padding": (24, 24, 12, 12, {"scale": 0.3}, ("float padding", "shared bias")),
    "dropout with everything": (
        64, 64, 12, 4, {"enable_gqa": True, "dropout_p": 0.3, "dropout_seed": 5, "is_causal": True},
        ("sinks", "padding", "relative_bias"),
    ),
    "a shard that is all padding": (32, 32, 12, 12, {}, ("padded rank",)),
    "shorter than the ranks": (5, 3, 12, 12, {"is_causal": True}, ()),
}  # fmt: skip


@pytest.fixture(scope="module", params=MESHES)
def mesh(request, tmp_path_factory):
    """(the shape of a mesh, the processes that form it)."""
    shape = MESHES[request.param]
    world = torch.Size(shape).numel()
    with Team(world, tmp_path_factory.mktemp("team") / "store") as team:
        yield shape, team


def problem(case: str, generator: torch.Generator, dtype: torch.dtype = torch.float64):
    """(tensors by the names of arguments, weights of out and lse in the loss, options)."""
    seqlen_q, seqlen_k, heads, kv_heads, options, further = CASES[case]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    tensors = {
        "query": random(2, heads, seqlen_q, DIM),
        "key": random(2, kv_heads, seqlen_k, DIM),
        "value": random(2, kv_heads, seqlen_k, DIM),
    }
    if "sinks" in further:
        tensors["sinks"] = random(heads)
    if "relative_bias" in further:
        tensors["relative_bias"] = random(heads, seqlen_q + seqlen_k - 1)
    if "shared bias" in further:
        tensors["relative_bias"] = random(seqlen_q + seqlen_k - 1)
    for x in tensors.values():
        x.requires_grad_()
    if "padding" in further or "padded rank" in further:
        padding = torch.rand(2, seqlen_k, generator=generator) < 0.3
        padding[1, seqlen_k // 2 :] = True
        if "padded rank" in further:  # rank 0 of two holds the first and the last quarter
            padding[:, : seqlen_k // 4] = padding[:, -(seqlen_k // 4) :] = True
        tensors["key_padding_mask"] = padding
    if "float padding" in further:
        tensors["key_padding_mask"] = random(2, seqlen_k)
    weights = random(*tensors["query"].shape), random(*tensors["query"].shape[:3])
    return tensors, weights, options


def expected_of(tensors, weights, options) -> dict[str, torch.Tensor]:
    """The results of one process, by name."""
    out, lse = fused_attention(**tensors, return_lse=True, **options)
    loss = (out * weights[0]).sum() + (lse.masked_fill(lse == float("-inf"), 0.0) * weights[1]).sum()
    loss.backward()
    grads = {f"d{name}": x.grad for name, x in tensors.items() if x.grad is not None}
    return {"out": out.detach(), "lse": lse.detach(), **grads}


def unsharded(name: str, shards: list[torch.Tensor], tensors) -> torch.Tensor:
    """The whole tensor from the shards of all ranks. What all ranks hold is the same on all, and one is returned."""
    owner = {"out": "query", "lse": "query"}.get(name, name.removeprefix("d"))
    if owner not in jobs.SEQUENCE_DIM:
        assert all(torch.equal(x, shards[0]) for x in shards)
        return shards[0]
    sharding = Sharding.of(tensors[owner].shape[2], len(shards))
    whole = torch.full((*shards[0].shape[:2], sharding.length, *shards[0].shape[3:]), float("nan")).to(shards[0].dtype)
    for rank, shard in enumerate(shards):
        for begin, end, at in sharding.segments(rank):
            whole[:, :, begin:end] = shard[:, :, at : at + end - begin]
    return whole


def methods(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("ring", "ulysses") if len(shape) == 1 else ("auto",)


@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_one_process(mesh, case: str, generator: torch.Generator) -> None:
    shape, team = mesh
    tensors, weights, options = problem(case, generator)
    expected = expected_of(tensors, weights, options)
    plain = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    for method in methods(shape):
        results = team.run(jobs.attention, shape, method, plain, weights, options)
        for name, x in expected.items():
            found = unsharded(name, [result[name] for result in results], tensors)
            torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12, msg=lambda m: f"{method} {name}: {m}")  # noqa: B023


# name: (lengths of the query documents, of the key documents, query heads, key heads, options, further tensors)
PACKED_CASES = {
    "causal": ((0, 21, 3, 0, 30, 7, 11), None, 12, 12, {"is_causal": True}, ()),
    "window, sinks and grouped heads": (
        (5, 50, 9, 1), None, 12, 4, {"is_causal": True, "enable_gqa": True, "window_size": (9, 3)}, ("sinks",),
    ),
    "both directions and dropout": (
        (13, 40, 2, 5, 3), None, 12, 12, {"dropout_p": 0.3, "dropout_seed": 5, "softcap": 2.0}, ("relative_bias",),
    ),
    "other keys with everything": (
        (10, 0, 31, 8), (17, 9, 0, 25), 12, 6,
        {"enable_gqa": True, "dropout_p": 0.3, "dropout_seed": 5, "is_causal": True}, ("sinks", "relative_bias"),
    ),
    "shorter than the ranks": ((1, 2), None, 12, 12, {"window_size": (1, 0)}, ()),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED_CASES)
def test_packed_results_are_those_of_one_process(mesh, case: str, generator: torch.Generator) -> None:
    """Documents of all lengths begin and end anywhere in the shards."""
    shape, team = mesh
    lengths_q, lengths_k, heads, kv_heads, options, further = PACKED_CASES[case]
    lengths_k = lengths_k or lengths_q
    (total_q, total_k), longest = (sum(lengths_q), sum(lengths_k)), (max(lengths_q) + 2, max(lengths_k))
    offsets = (
        *(torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (lengths_q, lengths_k)),
        *longest,
    )
    shapes = {"query": (total_q, heads, DIM), "key": (total_k, kv_heads, DIM), "value": (total_k, kv_heads, DIM)}
    shapes |= {"sinks": (heads,)} if "sinks" in further else {}
    shapes |= {"relative_bias": (heads, sum(longest) - 1)} if "relative_bias" in further else {}
    tensors = {name: torch.randn(x, dtype=torch.float64, generator=generator) for name, x in shapes.items()}
    weights = torch.randn(shapes["query"], dtype=torch.float64), torch.randn(heads, total_q, dtype=torch.float64)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    query, key, value, *more = leaves.values()
    out, lse = fused_attention_varlen(
        query, key, value, *offsets, return_lse=True, **dict(zip([*leaves][3:], more, strict=True)), **options
    )
    ((out * weights[0]).sum() + (lse.masked_fill(lse == float("-inf"), 0.0) * weights[1]).sum()).backward()
    expected = {"out": out.detach(), "lse": lse.detach().t(), **{f"d{name}": x.grad for name, x in leaves.items()}}
    for method in (*methods(shape), "auto") if shape == (2,) else methods(shape):
        results = team.run(jobs.packed_attention, shape, method, tensors, weights, offsets, options)
        for name, x in expected.items():
            shards = [result[name] for result in results]
            found = shards[0]
            if name not in ("dsinks", "drelative_bias"):
                sharding = Sharding.of(x.shape[0], len(shards))
                found = torch.full_like(x, float("nan"))
                for shard, segments in zip(shards, map(sharding.segments, range(len(shards))), strict=True):
                    for begin, end, at in segments:
                        found[begin:end] = shard[at : at + end - begin]
            torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12, msg=lambda m: f"{method} {name}: {m}")  # noqa: B023


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (6, 2)], ids=str)
def test_blocks_hold_every_visible_score_once(world: int, window: tuple[int, int]) -> None:
    """The blocks of all pairs of ranks, for documents that have other queries than keys. Positions count in them."""
    lengths = (0, 9, 2, 30, 0, 1, 14), (3, 0, 17, 25, 2, 8, 6)
    documents = Documents(*(tuple(itertools.accumulate(x, initial=0)) for x in lengths))
    sharded = [Sharding.of(offsets[-1], world) for offsets in documents]
    scores = SharedScores(*sharded, band_of(False, window), True, documents)
    found = []  # (document, position of the query, position of the key)
    for rank, owner in itertools.product(range(world), repeat=2):
        for block in blocks(scores, rank, owner):
            inside = block.documents or Documents(*((0, x.stop - x.start) for x in (block.query_rows, block.key_rows)))
            for number, (queries, keys) in enumerate(zip(*map(itertools.pairwise, inside), strict=True)):
                for i, j in itertools.product(range(queries[1] - queries[0]), range(keys[1] - keys[0])):
                    found.append((block.first_document + number, block.query_offset + i, block.key_offset + j))
    left, right = (side if side >= 0 else 99 for side in window)
    visible = [
        (number, i, j)
        for number, (queries, keys) in enumerate(zip(*lengths, strict=True))
        for i, j in itertools.product(range(queries), range(keys))
        if -left <= j - i <= right
    ]
    assert sorted(x for x in found if -left <= x[2] - x[1] <= right) == visible


def test_offsets_of_inference_serve_training() -> None:
    sharding = Sharding.of(11, 1)
    scores = SharedScores(sharding, sharding, band_of(True, (-1, -1)), True, Documents((0, 4, 11), (0, 4, 11)))
    found = []
    for is_inference in (True, False):
        with torch.inference_mode(is_inference):
            found.append(scores.whole().options(PartialOptions(), torch.device("cpu")).packed)
    assert found[0] is found[1]
    assert found[0].max_seqlen_q == 7
    assert not found[0].cu_seqlens_q.is_inference()


def test_documents_within_a_shard_send_nothing() -> None:
    """Four documents, each as long as a chunk: nobody needs keys of another rank. One row more, and few are sent."""
    sharding, band = Sharding.of(64, 2), band_of(False, (-1, -1))
    for offsets, sent in (((0, 16, 32, 48, 64), 0), ((0, 17, 64), None)):
        scores = SharedScores(sharding, sharding, band, True, Documents(offsets, offsets))
        elements = ring_elements(scores, (1, 1, 0, 1), (1, 1, 0, 0))
        # Rank 0 holds the rows 0:16 and 48:64. Of the second document, rank 1 holds 17:48. Both need all of these.
        assert elements == ([0, 0] if sent == 0 else [32, 32])


def test_repeats_have_equal_bits(mesh, generator: torch.Generator) -> None:
    shape, team = mesh
    tensors, weights, options = problem("dropout with everything", generator, torch.float32)
    for method in methods(shape):
        first, second = (team.run(jobs.attention, shape, method, tensors, weights, options) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a if name != "bytes"), method


def test_autocast_casts_query_key_and_value(mesh) -> None:
    """As for `fused_attention`. Inputs may have different dtypes then."""
    shape, team = mesh
    for method in methods(shape):
        for pairs in team.run(jobs.under_autocast, shape, method):
            for found, expected in pairs:
                assert found.dtype == torch.bfloat16
                torch.testing.assert_close(found, expected)


def test_bytes_are_those_of_the_plan(mesh, generator: torch.Generator) -> None:
    shape, team = mesh
    if len(shape) == 2:
        pytest.skip("the plan knows meshes of one dimension")
    for case in ("causal", "window, sinks and grouped heads"):
        tensors, weights, options = problem(case, generator)
        band = band_of(True, options.get("window_size", (-1, -1)))
        seqlen_q, seqlen_k = tensors["query"].shape[2], tensors["key"].shape[2]
        scores = SharedScores(Sharding.of(seqlen_q, *shape), Sharding.of(seqlen_k, *shape), band, needs_positions=False)
        shapes = [tensors[name].shape for name in ("query", "key", "value")]
        ring = team.run(jobs.attention, shape, "ring", tensors, weights, options, True)
        assert [result["bytes"] for result in ring] == [8 * n for n in ring_elements(scores, *shapes[1:])]
        ulysses = team.run(jobs.attention, shape, "ulysses", tensors, weights, options, True)
        lse = [8 * 2 * 12 // shape[0] * (seqlen_q - scores.query.rows(rank)) for rank in range(*shape)]
        planned = [8 * n for n in ulysses_elements(scores, *shapes)]
        assert [result["bytes"] for result in ulysses] == [a + b for a, b in zip(planned, lse, strict=True)]


WORKLOADS = {
    "causal": Workload(128, 2, 12, 6, 16, 1, "float32", band_of(True, (-1, -1))),
    "window": Workload(128, 2, 12, 6, 16, 1, "bfloat16", band_of(True, (20, -1))),
    "as many key heads": Workload(128, 2, 12, 12, 16, 1, "bfloat16", band_of(True, (-1, -1))),
    "a length that is no multiple": Workload(109, 2, 12, 6, 16, 1, "float32", band_of(True, (-1, -1))),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_bytes_and_memory_are_those_of_the_planned_step(mesh, name: str) -> None:
    """What `python -m fused_attn.distributed plan` says of a layer, about forward and backward."""
    shape, team = mesh
    world = torch.Size(shape).numel()
    machine, rates = Machine(8, 1.0, 1.0, 0.0, 0.0, 1.0), Rates.constant(1.0, 1.0)
    for method in methods(shape):
        planned_as = Method(*shape) if len(shape) == 2 else Method(world, 1) if method == "ring" else Method(1, world)
        planned = cost(WORKLOADS[name], machine, rates, planned_as)
        # In backward, too, gloo may keep a tensor for a moment after its message, but never less than the step needs.
        # So the least of several peaks counts, of each rank for itself.
        least, runs = [math.inf] * world, 0
        while runs < 50 and planned.buffers != max(least):
            found, runs = team.run(plan_jobs.used, WORKLOADS[name], shape, method), runs + 1
            assert planned.sent_forward == max(x["forward"] for x in found), method
            assert planned.sent_backward == max(x["backward"] for x in found), method
            assert planned.saved == max(x["saved"] for x in found), method
            least = [min(so_far, x["buffers"]) for so_far, x in zip(least, found, strict=True)]
        assert planned.buffers == max(least), method


def test_window_sends_no_keys_that_nobody_sees() -> None:
    """With 4 ranks and a window of 8 before each query, a rank sends the last 8 rows of its chunks at most."""
    sharding = Sharding.of(1024, 4)
    scores = SharedScores(sharding, sharding, band_of(True, (8, 0)), needs_positions=False)
    assert max(ring_elements(scores, (1, 1, 0, 1), (1, 1, 0, 0))) <= 2 * 8


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_gradients_that_nobody_wants_are_not_sent(mesh, method: str) -> None:
    shape, team = mesh
    if shape != (2,):
        pytest.skip("as with two ranks")
    everything = team.run(jobs.wanted_gradients, method, ("query", "key", "value"))
    # In backward, the keys travel again. The gradients of keys, and of values, have half of their size each.
    for names, size in ((("query",), 1.0), (("value",), 1.5), (("query", "key", "value"), 2.0)):
        results = team.run(jobs.wanted_gradients, method, names)
        for all_of, some in zip(everything, results, strict=True):
            for name in ("query", "key", "value"):
                assert (some[name] is None) == (name not in names)
                assert some[name] is None or torch.equal(some[name], all_of[name])
        if method == "ring":
            assert sum(x["backward"] for x in results) == size * sum(x["forward"] for x in results) > 0


def test_batches_there_and_back(mesh) -> None:
    shape, team = mesh
    if len(shape) == 2:
        pytest.skip("as with one dimension")
    batch = {
        "tokens": torch.arange(37),
        "labels": torch.arange(74).view(2, 37),
        "name": "a text",
        "whole": torch.ones(3),
    }
    cu_seqlens = torch.tensor([0, 5, 5, 30, 37], dtype=torch.int32)
    results = team.run(jobs.batch_there_and_back, batch, {"tokens": 0, "labels": 1}, cu_seqlens)
    position = torch.cat([torch.arange(x) for x in (5, 25, 7)])
    for shard, whole, positions in results:
        assert torch.equal(shard["labels"], batch["labels"][:, shard["tokens"]])
        assert torch.equal(positions, position[shard["tokens"]])
        assert all(torch.equal(whole[name], batch[name]) for name in ("tokens", "labels", "whole"))
        assert shard["name"] == whole["name"] == "a text"


def test_different_options_raise_on_all_ranks(mesh) -> None:
    shape, team = mesh
    if len(shape) == 2:
        pytest.skip("as with one dimension")
    for is_right, result in team.outcomes(jobs.options_differ):
        assert not is_right
        assert "is_causal: expected the same on all ranks, got True on rank 0, False on rank 1" in result[0]


@pytest.mark.parametrize("name", jobs.WRONG_CALLS)
def test_wrong_calls_raise_on_all_ranks(mesh, name: str) -> None:
    shape, team = mesh
    if shape != (2,):
        pytest.skip("as with two ranks")
    for is_right, result in team.outcomes(jobs.wrong_call, name):
        assert not is_right
        assert jobs.WRONG_CALLS[name] in result[0]


def test_other_ranks_raise_when_one_dies(tmp_path) -> None:
    """Nobody hangs: the ranks that wait for the dead one raise within the time limit of the process group."""
    with Team(3, tmp_path / "store", timeout=10.0) as team:
        team.run(jobs.warm_up)
        start = time.monotonic()
        outcomes = team.outcomes(jobs.one_rank_dies)
        assert time.monotonic() - start < 60.0
    assert [is_right for is_right, _ in outcomes] == [False] * 3
    assert outcomes[1][1][0] == "the process has ended"
    for rank in (0, 2):
        assert "RuntimeError" in outcomes[rank][1][0] or "DistBackendError" in outcomes[rank][1][0]
