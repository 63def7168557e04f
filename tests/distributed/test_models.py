"""Models that several processes share by torch's own ways: the losses, gradients and checkpoints of one process."""

from __future__ import annotations

import re

import model_jobs
import pytest
import torch
from processes import Team

from fused_attn import Transformer
from fused_attn.distributed import tensor_parallel_plan


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    with Team(2, tmp_path_factory.mktemp("team") / "store") as team:
        yield team


@pytest.fixture(scope="module")
def team_of_4(tmp_path_factory):
    with Team(4, tmp_path_factory.mktemp("team") / "store") as team:
        yield team


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """The losses of one process."""
    return model_jobs.train("alone")


#: How ranks share the model and the batch, with the number of ranks.
KINDS = {"ddp": 2, "fsdp": 2, "tp": 2, "hsdp": 4, "fsdp and tp": 4, "ddp and tp": 4}
OPTIONS = [(kind, options) for kind in KINDS for options in ((), ("mixed", "checkpoint"))]
OPTIONS += [("fsdp", ("compile",)), ("fsdp", ("mixed", "checkpoint", "compile"))]


@pytest.mark.parametrize("kind, options", OPTIONS, ids=lambda x: x if isinstance(x, str) else "+".join(x) or "plain")
def test_losses_are_those_of_one_process(team, team_of_4, alone, kind: str, options: tuple[str, ...]) -> None:
    tolerance = 2e-2 if "mixed" in options else 1e-5  # bfloat16 has 8 bits
    ranks = team if KINDS[kind] == 2 else team_of_4
    for losses in ranks.run(model_jobs.train, kind, options):
        assert losses == pytest.approx(alone, rel=tolerance)
    assert alone[-1] < 0.95 * alone[0]


def test_checkpoints_interchange(team, tmp_path) -> None:
    for first, second, third in team.run(model_jobs.checkpoints, str(tmp_path)):
        torch.testing.assert_close(second, first)
        assert torch.equal(third, first)


@pytest.mark.parametrize("options", [{}, {"rotary": True, "num_kv_heads": 2}, {"kdim": 16, "vdim": 16}], ids=str)
def test_attention_with_shared_heads(team, options) -> None:
    for expected, found in team.run(model_jobs.parallel_attention, options):
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 1}, "device_mesh: expected a number of ranks that divides num_heads=1, got 2 ranks"),
        ({"num_kv_heads": 1}, "device_mesh: expected a number of ranks that divides num_kv_heads=1, got 2 ranks"),
        ({"add_bias_kv": True}, "module: expected one without add_bias_kv"),
        ({}, "need_weights: expected False in a module whose heads are shared by ranks"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(team, options, message: str) -> None:
    for is_right, result in team.outcomes(model_jobs.attention_error, options):
        assert not is_right
        assert re.match(f"ValueError: {message}", result[0]), result


def test_plan_names_all_layers() -> None:
    model = torch.nn.ModuleDict({"inner": Transformer(32, 4, 1, 2, 64, norm_first=True)})
    plan = tensor_parallel_plan(model)
    layers = {"encoder.layers.0": 2, "decoder.layers.0": 3, "decoder.layers.1": 3}  # and their number of norms
    expected = {"inner", "inner.encoder.norm", "inner.decoder.norm"}
    for layer, norms in layers.items():
        names = ["self_attn", "linear1", "linear2", *(f"norm{n + 1}" for n in range(norms))]
        names += ["multihead_attn"] if norms == 3 else []
        expected |= {f"inner.{layer}.{name}" for name in names}
    assert set(plan) == expected
    with pytest.raises(ValueError, match="module: expected a module that contains a FusedMultiheadAttention"):
        tensor_parallel_plan(torch.nn.Linear(2, 2))
