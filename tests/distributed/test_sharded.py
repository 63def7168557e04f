"""DTensors in `fused_attention`: on 4 processes, the results are those of one process, whatever is sharded."""

from __future__ import annotations

import re

import pytest
import sharded_jobs
import torch
import torch._dynamo.testing
import torch.distributed as dist
from processes import Team
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_attn import fused_attention

ALL, BATCH, HEADS = Replicate(), Shard(0), Shard(1)
BY_HEAD = Shard(0)

# name: (shape of the mesh, placements by argument, query heads, key heads, batch, options)
CASES = {
    "batch": ((4,), {"query": [BATCH], "key": [BATCH], "value": [BATCH]}, 4, 4, 4, {"is_causal": True}),
    "uneven batch": ((4,), {"query": [BATCH], "key": [BATCH], "value": [BATCH]}, 4, 4, 5, {"dropout_p": 0.3}),
    "batch and heads": (
        (2, 2), {"query": [BATCH, HEADS], "key": [BATCH, HEADS], "value": [BATCH, HEADS], "sinks": [ALL, BY_HEAD]},
        8, 4, 4, {"dropout_p": 0.3, "window_size": (5, 2)},
    ),
    "heads, with a replicated bias": (
        (4,), {"query": [HEADS], "key": [HEADS], "value": [HEADS], "sinks": [ALL], "relative_bias": [BY_HEAD]},
        8, 4, 2, {"dropout_p": 0.3, "is_causal": True},
    ),
    "one key head": ((4,), {"query": [HEADS], "key": [ALL], "value": [ALL]}, 8, 1, 2, {"dropout_p": 0.3}),
    "key heads that the ranks cut": ((4,), {"query": [HEADS], "key": [ALL], "value": [ALL]}, 12, 6, 2, {}),
    "replicated": (
        (2, 2), {"query": [ALL, ALL], "key": [BATCH, ALL], "value": [ALL, ALL], "relative_bias": [ALL, ALL]},
        4, 2, 2, {"softcap": 3.0},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    with Team(4, tmp_path_factory.mktemp("team") / "store") as team:
        yield team


def problem(case: str, generator: torch.Generator):
    _, _, heads, kv_heads, batch, options = CASES[case]
    length = 9

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    tensors = {
        "query": random(batch, heads, length, 16),
        "key": random(batch, kv_heads, length, 16),
        "value": random(batch, kv_heads, length, 16),
        "relative_bias": random(heads, 2 * length - 1),
        "sinks": random(heads),
        "attn_mask": random(heads, 1, length),
        "key_padding_mask": torch.rand(batch, length, generator=generator) < 0.3,
    }
    weights = tensors["query"].detach().cos(), tensors["query"].detach()[..., 0].cos()
    options = {**options, "dropout_seed": 3, "enable_gqa": heads != kv_heads}
    return tensors, weights, options


def expected_of(tensors, weights, options) -> dict[str, torch.Tensor]:
    out, lse = fused_attention(**tensors, return_lse=True, **options)
    loss = (out * weights[0]).sum() + (lse.masked_fill(lse == float("-inf"), 0.0) * weights[1]).sum()
    loss.backward()
    grads = {f"d{name}": x.grad for name, x in tensors.items() if x.requires_grad}
    return {"out": out.detach(), "lse": lse.detach(), **grads}


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_one_process(team, case: str, is_compiled: bool, generator: torch.Generator) -> None:
    if is_compiled and case != "batch and heads":
        pytest.skip("one case is enough, because a trace takes seconds")
    mesh_shape, placements, heads, _, batch, _ = CASES[case]
    tensors, weights, options = problem(case, generator)
    expected = expected_of(tensors, weights, options)
    plain = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    weights = tuple(x.clone() for x in weights)
    for rank, found in enumerate(
        team.run(sharded_jobs.attention, mesh_shape, placements, plain, weights, options, is_compiled)
    ):
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-12, atol=1e-12, msg=lambda m: f"{rank} {name}: {m}")  # noqa: B023
        # Each rank has computed its own part alone.
        shards = torch.tensor(mesh_shape)[[x != ALL for x in placements["query"]]].prod() if case != "replicated" else 2
        assert found["local"].prod() <= -(-batch * heads * 9 * 16 // shards) + heads * 9 * 16


@pytest.fixture
def mesh_of_one_process():
    """A mesh of 4 ranks of which only the first exists. Nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield DeviceMesh("cpu", torch.arange(4))
    dist.destroy_process_group()


def test_compiled_calls_take_other_lengths(mesh_of_one_process, generator: torch.Generator) -> None:
    """One graph for all lengths, whose results are those of eager calls. All ranks share one key head."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_attention, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for length in (9, 12):
        query, key, value = (
            distribute_tensor(
                torch.randn(2, heads, length, 16, generator=generator), mesh_of_one_process, [placement],
                src_data_rank=None,
            )
            for heads, placement in ((8, HEADS), (1, ALL), (1, ALL))
        )  # fmt: skip
        expected, found = (
            function(query, key, value, is_causal=True, enable_gqa=True) for function in (fused_attention, compiled)
        )
        torch.testing.assert_close(found.to_local(), expected.to_local())
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1] > 0


def test_all_ranks_drop_the_same_without_a_seed(team) -> None:
    outs = team.run(sharded_jobs.seedless_dropout)
    assert all(torch.equal(x, outs[0]) for x in outs)


@pytest.mark.parametrize(
    "placements, heads, message",
    [
        ([Shard(2)], 4, "query: expected shards of the batch .*context_parallel_attention"),
        ([Shard(3)], 4, "query: expected shards of the batch .* the head dim"),
        ([Shard(1)], 6, "query: expected a number of heads that 4 ranks can share equally, got 6 heads"),
    ],
    ids=["sequence", "head dim", "heads"],
)
def test_what_cannot_be_shared_is_refused(team, placements, heads: int, message: str) -> None:
    for is_right, result in team.outcomes(sharded_jobs.error_of, placements, heads):
        assert not is_right
        assert re.search(f"ValueError: {message}", result[0]), result[0]
