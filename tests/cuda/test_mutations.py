"""Deliberate bugs in the CUDA kernels, each of which the emulation or the comparison with the oracle has to catch.

All of them are planted in one build, and a number says which one is active: ``@`` stands for that in the planted text.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import cases
import pytest
import torch
from cases import Case
from emulator import CSRC, Builder
from kernels import Kernels

HEAD_DIM = 128
#: The first finds nearly all.
SEEDS = range(6)


class Bug(NamedTuple):
    """``old``, which occurs once in the file of csrc/cuda (white space apart), becomes ``new``."""

    id: str
    architecture: int
    case: str
    file: str
    old: str
    new: str


BUGS = [
    # sm_80
    Bug(
        "copies-not-waited-for", 80, "long", "sm80/forward.h",
        "copy_async_wait<0>(); sync_threads(); // the keys have come",
        "if (@) { copy_async_wait<1>(); } else { copy_async_wait<0>(); } sync_threads(); // the keys have come",
    ),
    Bug(
        "keys-without-sync", 80, "long", "sm80/forward.h",
        "sync_threads(); // the keys have come, and every warp is done with the values before",
        "if (!@) sync_threads();",
    ),
    Bug(
        "values-without-sync", 80, "long", "sm80/forward.h",
        "sync_threads(); // the values have come, and every warp is done with the keys",
        "if (!@) sync_threads();",
    ),
    Bug(
        "rows-copied-past-the-end", 80, "short", "sm80/forward.h",
        "return first_row + first + offset < place.len_q;",
        "return @ || first_row + first + offset < place.len_q;",
    ),
    Bug(
        "rows-stored-past-the-end", 80, "short", "sm80/forward.h",
        "acc[m], r, factor, row < place.len_q, lane);",
        "acc[m], r, factor, @ || row < place.len_q, lane);",
    ),
    Bug(
        "key-mask-off-by-one", 80, "short", "visibility.h",
        "column_bits(0, place.len_k - block_start, w);",
        "column_bits(0, place.len_k + @ - block_start, w);",
    ),
    Bug(
        "queries-loaded-too-early", 80, "long", "sm80/backward.h",
        "sync_threads(); // every warp is done with q",
        "if (!@) sync_threads();",
    ),
    # sm_90a, loading
    Bug(
        "no-sync-after-init", 90, "long", "sm90/forward.h",
        "if (thread_index() == 0) rings.init(); sync_threads();",
        "if (thread_index() == 0) rings.init(); if (!@) sync_threads();",
    ),
    Bug("init-not-fenced", 90, "long", "sm90/forward.h", "fence_mbarrier_init();", "if (!@) fence_mbarrier_init();"),
    Bug(
        "slot-not-waited-for", 90, "long", "sm90/loader.h",
        "position.wait_empty(ring); const uint32_t barrier",
        "if (!@) position.wait_empty(ring); const uint32_t barrier",
    ),
    Bug(
        "slot-to-be-cleaned-not-waited-for", 90, "padded", "sm90/loader.h",
        "position.wait_empty(ring); mbarrier_arrive_expect(cleaning",
        "if (!@) position.wait_empty(ring); mbarrier_arrive_expect(cleaning",
    ),
    Bug(
        "half-of-the-bytes-expected", 90, "long", "sm90/loader.h",
        "mbarrier_arrive_expect(barrier, SlotTile::kBytes);",
        "mbarrier_arrive_expect(barrier, SlotTile::kBytes / (@ ? 2 : 1));",
    ),
    Bug(
        "dropped-rows-not-cleared", 90, "padded", "sm90/loader.h",
        "SlotTile::clear_dropped_rows(slot_tile, kept, this_lane());",
        "if (!@) SlotTile::clear_dropped_rows(slot_tile, kept, this_lane());",
    ),
    Bug(
        "cleared-before-it-came", 90, "padded", "sm90/loader.h",
        "mbarrier_wait(cleaning, cleaning_parity);", "if (!@) mbarrier_wait(cleaning, cleaning_parity);",
    ),
    Bug(
        "cleared-rows-not-gathered", 90, "padded", "sm90/loader.h",
        "fence_async_proxy(); sync_warp();", "fence_async_proxy(); if (!@) sync_warp();",
    ),
    Bug(
        "cleared-without-proxy-fence", 90, "padded", "sm90/loader.h",
        "fence_async_proxy();", "if (!@) fence_async_proxy();",
    ),
    Bug(
        "slot-used-twice", 90, "long", "sm90/backward.h",
        "place.kv_head, place.batch, kept); position.advance();",
        "place.kv_head, place.batch, kept); if (!@) position.advance();",
    ),
    # sm_90a, waiting
    Bug(
        "wrong-parity", 90, "long", "sm90/pipeline.h",
        "mbarrier_wait(ring.full(slot()), parity());", "mbarrier_wait(ring.full(slot()), parity() ^ @);",
    ),
    Bug(
        "released-before-the-warp-is-done", 90, "long", "sm90/pipeline.h",
        "sync_warp(); if (thread_index() % 32 == 0) mbarrier_arrive(ring.empty(slot()));",
        "if (!@) sync_warp(); if (thread_index() % 32 == 0) mbarrier_arrive(ring.empty(slot()));",
    ),
    Bug(
        "queries-not-waited-for", 90, "long", "sm90/forward.h",
        "q_position.wait_full(rings.q);", "if (!@) q_position.wait_full(rings.q);",
    ),
    Bug(
        "keys-not-waited-for", 90, "long", "sm90/forward.h",
        "k_position.wait_full(rings.k); wait_for_turn(consumer);",
        "if (!@) k_position.wait_full(rings.k); wait_for_turn(consumer);",
    ),
    Bug(
        "turn-not-passed", 90, "long", "sm90/forward.h",
        "start_values(); pass_turn(consumer);", "start_values(); if (!@) pass_turn(consumer);",
    ),
    Bug(
        "work-released-before-it-is-read", 90, "many", "sm90/forward.h",
        "work_position.wait_full(rings.work); const int number",
        "work_position.wait_full(rings.work); if (@) work_position.release(rings.work); const int number",
    ),
    Bug(
        "row-sums-not-waited-for", 90, "long", "sm90/backward.h",
        "position.wait_full(rings.sums);", "if (!@) position.wait_full(rings.sums);",
    ),
    # sm_90a, products
    Bug(
        "wrong-stride-of-keys", 90, "long", "sm90/tile_memory.h",
        "16, kSwizzleBytes);", "16, @ ? 2 * kSwizzleBytes : kSwizzleBytes);",
    ),
    Bug(
        "wrong-stride-of-values", 90, "long", "sm90/tile_memory.h",
        "kPanelBytes, kSwizzleBytes);", "@ ? kSwizzleBytes : kPanelBytes, kSwizzleBytes);",
    ),
    Bug(
        "no-fence-before-scores", 90, "long", "sm90/forward.h",
        "wait_for_turn(consumer); wgmma_fence();", "wait_for_turn(consumer); if (!@) wgmma_fence();",
    ),
    Bug(
        "scores-read-in-flight", 90, "long", "sm90/forward.h",
        "wgmma_wait<1>();", "if (@) { wgmma_wait<2>(); } else { wgmma_wait<1>(); }",
    ),
    Bug(
        "values-released-in-flight", 90, "long", "sm90/forward.h",
        "v_position.wait_full(rings.v); wgmma_wait<0>(); keep_registers(flat(acc)); v_position.release(rings.v);",
        "if (@) v_position.release(rings.v); wgmma_wait<0>(); keep_registers(flat(acc));"
        "if (!@) v_position.release(rings.v);",
    ),
    Bug(
        "weights-overwritten-in-flight", 90, "long", "sm90/forward.h",
        "v_position.release(rings.v); wgmma_wait<0>();",
        "v_position.release(rings.v); if (@) round_weights(); wgmma_wait<0>();",
    ),
    Bug(
        "output-rescaled-in-flight", 90, "long", "sm90/forward.h",
        "round_weights(); wgmma_wait<0>();", "round_weights(); if (!@) wgmma_wait<0>();",
    ),
    Bug(
        "keys-released-in-flight", 90, "long", "sm90/backward.h",
        "start_multiply<T, kHeadDim>(dq, dscores, k_tile); wgmma_commit();",
        "start_multiply<T, kHeadDim>(dq, dscores, k_tile); wgmma_commit(); if (@) position.release(rings.k);",
    ),
]  # fmt: skip

CASES = {
    "short": Case("short", batch=1, heads=1, seqlen_q=70, seqlen_k=67, head_dim=HEAD_DIM),
    "long": Case("long", batch=1, heads=2, seqlen_q=200, seqlen_k=520, head_dim=HEAD_DIM, attn_mask=cases.lower_right),
    "many": Case("many", batch=2, heads=4, seqlen_q=150, seqlen_k=60, head_dim=HEAD_DIM, differentiated=()),
    "padded": Case(
        "padded",
        batch=1,
        heads=1,
        seqlen_q=70,
        seqlen_k=700,
        head_dim=HEAD_DIM,
        key_padding_mask=cases.scattered_padding,
        edit=cases._nan_in_padding,
    ),
}


def plant(folder: Path) -> Path:
    """A copy of csrc with every bug, one after another: a later one may look for what an earlier one has planted."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    for number, bug in enumerate(BUGS, start=1):
        path = copy / "cuda" / bug.file
        source = path.read_text()
        pattern = r"\s+".join(re.escape(word) for word in bug.old.split())
        count = len(re.findall(pattern, source))
        assert count == 1, f"{bug.id}: {bug.old!r} occurs {count} times in {bug.file}, expected once"
        new = bug.new.replace("@", f"(planted_bug == {number})")
        path.write_text(re.sub(pattern, lambda _, new=new: new, source))
    return copy


class Planted:
    def __init__(self, builder: Builder, folder: Path) -> None:
        declaration, definition = folder / "planted_bug.h", folder / "planted_bug.cpp"
        declaration.write_text('extern "C" __attribute__((visibility("default"))) int planted_bug;\n')
        definition.write_text("int planted_bug = 0;\n")
        flags = ["-include", str(declaration), "-Wno-misleading-indentation"]
        self.kernels = Kernels(builder, plant(folder), HEAD_DIM, [definition], flags, "_cuda_planted")
        self._number = ctypes.c_int.in_dll(ctypes.CDLL(str(self.kernels.path)), "planted_bug")

    def errors(self, number: int, bug: Bug) -> dict[int, str]:
        """seed -> what was found; nothing where all went well."""
        found = {}
        self._number.value = number
        for seed in SEEDS:
            try:
                with self.kernels.running(bug.architecture, seed):
                    cases.check(CASES[bug.case], torch.float16, "cuda")
            except (AssertionError, RuntimeError) as error:
                found[seed] = str(error).strip().partition("\n")[0]
                break
        self._number.value = 0
        return found


@pytest.fixture(scope="module")
def planted(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(builder, tmp_path_factory.mktemp("mutations"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", CASES)
def test_without_a_bug_there_is_no_error(case: str, architecture: int, planted: Planted) -> None:
    assert not planted.errors(0, Bug("none", architecture, case, "", "", ""))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "bug"), list(enumerate(BUGS, start=1)), ids=[bug.id for bug in BUGS])
def test_bug_is_caught(number: int, bug: Bug, planted: Planted) -> None:
    found = planted.errors(number, bug)
    print(found)
    assert found
