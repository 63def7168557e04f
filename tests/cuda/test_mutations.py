"""Deliberate bugs in the CUDA kernels, each of which the emulation or the comparison with the oracle has to catch.

All of them are planted in one build, and a number says which one is active: ``@`` stands for that in the planted text.
"""

from __future__ import annotations

import contextlib
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
from kernels import Kernels, dividing_gradients, running_both_kinds

HEAD_DIM = 128
#: On Hopper, backward takes two kernels with this head dim: one for dq, one for dk and dv.
LARGE_HEAD_DIM = 256
#: On Hopper, the gradient of a bias has a ring of four slots with this head dim, of three with 128 and of two with 256.
SMALL_HEAD_DIM = 64
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
        "return first_row + first + offset < head_slice.seqlen_q;",
        "return @ || first_row + first + offset < head_slice.seqlen_q;",
    ),
    Bug(
        "rows-stored-past-the-end", 80, "short", "sm80/forward.h",
        "acc[m], r, factor, is_row, p.out.columns, lane);",
        "acc[m], r, factor, @ || is_row, p.out.columns, lane);",
    ),
    Bug(
        "key-mask-off-by-one", 80, "short", "visibility.h",
        "column_bits(0, head_slice.seqlen_k - block_start, w);",
        "column_bits(0, head_slice.seqlen_k + @ - block_start, w);",
    ),
    Bug(
        "queries-loaded-too-early", 80, "long", "sm80/backward.h",
        "sync_threads(); // every warp is done with q",
        "if (!@) sync_threads();",
    ),
    # Preparation
    Bug(
        "keys-listed-before-their-padding-is-packed", 90, "hole", "preparation.h",
        "sync_threads(); return sm90::list_key_blocks", "if (!@) sync_threads(); return sm90::list_key_blocks",
    ),
    Bug(
        "ranks-counted-before-the-padding-is-packed", 90, "hole", "preparation.h",
        "sync_threads(); if (warp > 0) return;", "if (!@) sync_threads(); if (warp > 0) return;",
    ),
    Bug(
        "words-of-padding-swapped", 80, "padded", "preparation.h",
        "if (lane == w) own = word;", "if (lane == (w ^ @)) own = word;",
    ),
    Bug(
        "blocks-of-padding-counted-in-ranks", 90, "hole", "preparation.h",
        "warp_ballot(any != 0);", "warp_ballot(@ || any != 0);",
    ),
    Bug(
        "key-blocks-of-two-heads-in-one-place", 90, "long", "tile_scheduler.h",
        "block * heads_here + head - first_head;", "block * heads_here + (@ ? 0 : head - first_head);",
    ),
    Bug(
        "tile-counter-not-reset", 90, "long", "preparation.h",
        "p.tile_counter != nullptr) store_global", "p.tile_counter != nullptr && !@) store_global",
    ),
    Bug(
        "limit-of-memory-without-tiles-of-a-bias", 90, "biased-tiles", "sm90/launchers.h",
        "shape.shared_bytes = Plan::kBytesWithoutBias; // The kernel is persistent:",
        "shape.shared_bytes = Plan::kBytesWithoutBias; if (@) shape.most_shared_bytes = Plan::kBytesWithoutBias; //",
    ),
    # sm_90a, loading
    Bug(
        "no-sync-after-init", 90, "long", "sm90/forward.h",
        "if (thread_index() == 0) rings.init(); sync_threads();",
        "if (thread_index() == 0) rings.init(); if (!@) sync_threads();",
    ),
    Bug(
        "init-not-fenced", 90, "long", "sm90/forward_plan.h",
        "fence_mbarrier_init();", "if (!@) fence_mbarrier_init();",
    ),
    Bug(
        "values-that-nobody-waits-for", 90, "long", "sm90/forward_loading.h",
        "if (boxes.what == 0) return; load_keys(note, boxes);",
        "if (boxes.what == 0) { if (@) load_values(before); return; } load_keys(note, boxes);",
    ),
    Bug(
        "slot-not-waited-for", 90, "long", "sm90/loader.h",
        "position.wait_empty(ring); also.store(); const uint32_t barrier",
        "if (!@) position.wait_empty(ring); also.store(); const uint32_t barrier",
    ),
    Bug(
        "slot-to-be-cleaned-not-waited-for", 90, "padded", "sm90/loader.h",
        "position.wait_empty(ring); also.store(); mbarrier_arrive_expect(cleaning",
        "if (!@) position.wait_empty(ring); also.store(); mbarrier_arrive_expect(cleaning",
    ),
    Bug(
        "half-of-the-bytes-expected", 90, "long", "sm90/loader.h",
        "mbarrier_arrive_expect(barrier, SlotTile::kBytes + also.bytes);",
        "mbarrier_arrive_expect(barrier, SlotTile::kBytes / (@ ? 2 : 1) + also.bytes);",
    ),
    Bug(
        "invalid-rows-not-cleared", 90, "padded", "sm90/loader.h",
        "SlotTile::clear_invalid_rows(slot_tile, valid, this_lane());",
        "if (!@) SlotTile::clear_invalid_rows(slot_tile, valid, this_lane());",
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
        "slot-used-twice", 90, "large-dq", "sm90/backward.h",
        "head_slice.kv_head, head_slice.batch}, valid); position.advance();",
        "head_slice.kv_head, head_slice.batch}, valid); if (!@) position.advance();",
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
        "k_position.wait_full(rings.k);", "if (!@) k_position.wait_full(rings.k);",
    ),
    Bug(
        "tile-note-released-before-it-is-read", 90, "many", "sm90/forward.h",
        "store(tile); release(rings.tiles, tile_position);",
        "if (@) release(rings.tiles, tile_position); store(tile); if (!@) release(rings.tiles, tile_position);",
    ),
    Bug(
        "tile-note-changed-while-it-is-read", 90, "many", "sm90/forward_planning.h",
        "sync_warp(); // all lanes have read it",
        "if (!@) sync_warp();",
    ),
    Bug(
        "key-note-stored-after-it-was-announced", 90, "long", "sm90/forward_planning.h",
        "sync_warp(); // the note is complete\nif (lane == 0) mbarrier_arrive(rings.notes.full(note_position.slot()));",
        "if (!@) sync_warp(); if (lane == 0) mbarrier_arrive(rings.notes.full(note_position.slot()));",
    ),
    Bug(
        "key-note-freed-before-it-is-read", 90, "longest", "sm90/forward_loading.h",
        "if (++notes_in_use <= Plan::kStages + 1) return;",
        "if (++notes_in_use <= (@ ? 0 : Plan::kStages + 1)) return;",
    ),
    Bug(
        "last-values-not-loaded", 90, "many", "sm90/forward_loading.h",
        "if (boxes.what & Boxes::kIsLast) load_values(note);",
        "if (!@ && boxes.what & Boxes::kIsLast) load_values(note);",
    ),
    Bug(
        "padding-not-seen-by-views", 90, "padded", "sm90/forward_planning.h",
        "range.is_within_band(block) && valid.all()", "range.is_within_band(block) && (@ || valid.all())",
    ),
    Bug(
        "unseen-block-not-passed-on", 90, "diagonal", "sm90/forward.h",
        "if (view.has(View::kIsLast)) return release(rings.q, q_position);",
        "if (!@ && view.has(View::kIsLast)) return release(rings.q, q_position);",
    ),
    Bug(
        "row-statistics-not-waited-for", 90, "large-dkdv", "sm90/backward.h",
        "position.wait_full(rings.statistics); GPU_UNROLL", "if (!@) position.wait_full(rings.statistics); GPU_UNROLL",
    ),
    Bug(
        "row-statistics-not-waited-for-general", 90, "large-relative", "sm90/backward.h",
        "position.wait_full(rings.statistics); if", "if (!@) position.wait_full(rings.statistics); if",
    ),
    # sm_90a, products
    Bug(
        "wrong-stride-of-keys", 90, "long", "sm90/tile_memory.h",
        "16, kGroupBytes) +", "16, @ ? 2 * kGroupBytes : kGroupBytes) +",
    ),
    Bug(
        "wrong-stride-of-values", 90, "long", "sm90/tile_memory.h",
        "kPanelBytes, kGroupBytes) +", "@ ? kGroupBytes : kPanelBytes, kGroupBytes) +",
    ),
    Bug(
        "no-fence-before-scores", 90, "long", "sm90/forward.h",
        "wgmma_fence(); start_multiply_transposed", "if (!@) wgmma_fence(); start_multiply_transposed",
    ),
    Bug(
        "scores-read-in-flight", 90, "long", "sm90/forward.h",
        "wgmma_wait<1>();", "if (@) { wgmma_wait<2>(); } else { wgmma_wait<1>(); }",
    ),
    Bug(
        "values-released-in-flight", 90, "long", "sm90/forward.h",
        "wgmma_wait<0>(); // before the probabilities are overwritten\n"
        "keep_registers(flat(acc)); release(rings.v, v_position);",
        "if (@) release(rings.v, v_position); wgmma_wait<0>(); // before the probabilities are overwritten\n"
        "keep_registers(flat(acc)); if (!@) release(rings.v, v_position);",
    ),
    Bug(
        "probs-overwritten-in-flight", 90, "long", "sm90/forward.h",
        "wgmma_wait<0>(); // before the probabilities are overwritten\n",
        "if (@) softmax.template try_probs<T>(scores, p.scale_log2, dropout_keep, probs);"
        "wgmma_wait<0>(); // before the probabilities are overwritten\n",
    ),
    Bug(
        "output-stored-in-flight", 90, "long", "sm90/forward.h",
        "start_values(); wgmma_wait<0>();", "start_values(); if (!@) wgmma_wait<0>();",
    ),
    Bug(
        "output-overwritten-while-it-is-stored", 90, "many", "sm90/forward.h",
        "wait_for_store(); sync_warp();", "if (!@) wait_for_store(); sync_warp();",
    ),
    Bug(
        "output-stored-without-proxy-fence", 90, "many", "sm90/forward.h",
        "fence_async_proxy(); sync_warp(); // all lanes have written",
        "if (!@) fence_async_proxy(); sync_warp(); // all lanes have written",
    ),
    Bug(
        "output-stored-before-it-is-written", 90, "many", "sm90/forward.h",
        "sync_warp(); // all lanes have written", "if (!@) sync_warp();",
    ),
    Bug(
        "output-not-read-when-the-block-ends", 90, "many", "sm90/forward.h",
        "} wait_for_store(); } };", "} if (!@) wait_for_store(); } };",
    ),
    Bug(
        "rows-of-the-next-sequence-overwritten", 90, "packed", "sm90/forward.h",
        "warp_row + kWarpRows <= head_slice.seqlen_q;", "@ || warp_row + kWarpRows <= head_slice.seqlen_q;",
    ),
    # Probabilities without a maximum
    Bug(
        "reference-raised-without-rescaling-the-output", 90, "rising", "sm90/forward.h",
        "scale_rows(acc, rescale);", "if (!@) scale_rows(acc, rescale);",
    ),
    Bug(
        "reference-raised-without-rescaling-the-output-80", 80, "rising", "sm80/forward.h",
        "scale_rows(acc[m], rescale);", "if (!@) scale_rows(acc[m], rescale);",
    ),
    Bug(
        "reference-raised-without-rescaling-the-sums", 90, "rising", "softmax.h",
        "row_sum[r] = row_sum[r] * rescale[r] + sum[r];", "row_sum[r] = row_sum[r] * (@ ? 1.0f : rescale[r]) + sum[r];",
    ),
    Bug(
        "overflow-not-noticed", 90, "rising", "softmax.h",
        "return !(sum <= kLargestSum) && row_sum[r] == row_sum[r];",
        "return !@ && !(sum <= kLargestSum) && row_sum[r] == row_sum[r];",
    ),
    Bug(
        "keys-released-in-flight", 90, "large-dq", "sm90/backward.h",
        "start_multiply<T, kHeadDim>(dq, dscores, k_tile); wgmma_commit();",
        "start_multiply<T, kHeadDim>(dq, dscores, k_tile); wgmma_commit(); if (@) position.release(rings.k);",
    ),
    # sm_90a, fused backward
    Bug(
        "turn-not-waited-for", 90, "long", "sm90/fused_backward_dq.h",
        "wait_until_equal(p.dq_turns + turn.sum, turn.number);",
        "if (!@) wait_until_equal(p.dq_turns + turn.sum, turn.number);",
    ),
    Bug(
        "turn-off-by-one", 90, "long", "sm90/key_blocks.h",
        "key_blocks)) - b.rank_after();", "key_blocks)) - b.rank_after() + @;",
    ),
    Bug(
        "first-blocks-of-keys-taken-first", 90, "long", "sm90/key_blocks.h",
        "p.batch, p.heads_per_l2_group, /*last_first=*/true);", "p.batch, p.heads_per_l2_group, /*last_first=*/!@);",
    ),
    Bug(
        "blocks-of-padding-counted", 90, "hole", "sm90/key_blocks.h",
        "return p.key_ranks == nullptr ? n :", "return @ || p.key_ranks == nullptr ? n :",
    ),
    Bug(
        "tiles-counted-beyond-the-last-block", 90, "hole", "sm90/key_blocks.h",
        "min(last_key_block<kBlockM>(band, m) + 1, key_blocks)",
        "min(last_key_block<kBlockM>(band, m) + 1, key_blocks + @)",
    ),
    Bug(
        "first-addition-onto-nothing", 90, "long", "sm90/fused_backward_dq.h",
        "if (turn.number == 0) {", "if (turn.number == 0 && !@) {",
    ),
    Bug(
        "no-fence-after-the-turn", 90, "long", "sm90/fused_backward_dq.h",
        "fence_async_proxy_global(); GPU_UNROLL for (int group",
        "if (!@) fence_async_proxy_global(); GPU_UNROLL for (int group",
    ),
    Bug(
        "no-fence-before-the-next-turn", 90, "long", "sm90/fused_backward_dq.h",
        "fence_async_proxy_global(); add_release", "if (!@) fence_async_proxy_global(); add_release",
    ),
    Bug(
        "next-turn-before-it-is-added", 90, "long", "sm90/fused_backward_dq.h",
        "tma_store_wait<0>(); if", "if (!@) tma_store_wait<0>(); if",
    ),
    Bug(
        "tile-of-dq-freed-too-early", 90, "long", "sm90/fused_backward_dq.h",
        "tma_store_wait_read<1>();", "if (!@) tma_store_wait_read<1>();",
    ),
    Bug(
        "tile-of-dq-added-without-proxy-fence", 90, "long", "sm90/fused_backward_dq.h",
        "step / 2 & 1); fence_async_proxy();", "step / 2 & 1); if (!@) fence_async_proxy();",
    ),
    Bug(
        "tile-of-dq-not-waited-for", 90, "long", "sm90/fused_backward.h",
        "mbarrier_wait(rings.dq_empty + 8 * group,", "if (!@) mbarrier_wait(rings.dq_empty + 8 * group,",
    ),
    Bug(
        "dscores-read-without-proxy-fence", 90, "long", "sm90/fused_backward.h",
        "i / 2 & 1); fence_async_proxy();", "i / 2 & 1); if (!@) fence_async_proxy();",
    ),
    Bug(
        "dscores-of-the-other-warpgroup-not-waited-for", 90, "long", "sm90/fused_backward.h",
        "mbarrier_wait(rings.dscores + i % 2 * 8,", "if (!@) mbarrier_wait(rings.dscores + i % 2 * 8,",
    ),
    Bug(
        "dout-released-in-flight", 90, "long", "sm90/fused_backward.h",
        "wgmma_wait<1>(); keep_registers(flat(dv));",
        "if (@) { wgmma_wait<2>(); } else { wgmma_wait<1>(); } keep_registers(flat(dv));",
    ),
    Bug(
        "keys-not-released", 90, "long", "sm90/fused_backward.h",
        "if constexpr (kIsLast) key_position.release(rings.k);",
        "if (!@) { if constexpr (kIsLast) key_position.release(rings.k); }",
    ),
    Bug(
        "mask-of-a-tile-forgotten", 90, "long", "sm90/key_blocks.h",
        "(b.is_whole(tile_) ? 0 : kHasMask)", "(@ || b.is_whole(tile_) ? 0 : kHasMask)",
    ),
    # sm_90a, general fused backward
    Bug(
        "skipped-tiles-counted", 90, "masked-blocks", "sm90/mask_steps.h",
        "mask_contents<kBlockM, kKeyBlock>(p.mask, head_slice, tile * kBlockM, n * kKeyBlock).has_visible();",
        "(@ || mask_contents<kBlockM, kKeyBlock>(p.mask, head_slice, tile * kBlockM, n * kKeyBlock).has_visible());",
    ),
    Bug(
        "turns-of-a-mask-off-by-one", 90, "masked-blocks", "sm90/mask_steps.h",
        "later + count_bits(visited & low_bits(lane)));", "later + count_bits(visited & low_bits(lane + @)));",
    ),
    Bug(
        "blocks-of-padding-counted-under-a-mask", 90, "masked-hole", "sm90/mask_steps.h",
        "key_rank(p, batch, n + 1) != key_rank(p, batch, n) &&",
        "(@ || key_rank(p, batch, n + 1) != key_rank(p, batch, n)) &&",
    ),
    Bug(
        "listed-step-without-its-mask", 90, "masked-blocks", "sm90/mask_steps.h",
        "tile | (has_mask ? kHasMask : 0)", "tile | (has_mask && !@ ? kHasMask : 0)",
    ),
    Bug(
        "steps-counted-before-all-lanes-have-read", 90, "masked-blocks", "sm90/mask_steps.h",
        "sync_warp(); // all lanes have read the KeyBlock", "if (!@) sync_warp();",
    ),
    Bug(
        "step-read-from-the-next-list", 90, "masked-blocks", "sm90/key_blocks.h",
        "mask_steps_of<kBlockM>(p, b.program()) + index_);", "mask_steps_of<kBlockM>(p, b.program() ^ @) + index_);",
    ),
    Bug(
        "words-of-a-key-swapped", 90, "masked", "sm90/fused_backward.h",
        "load_global(masked + w);", "load_global(masked + (@ ? w ^ 1 : w));",
    ),
    Bug(
        "softcap-without-derivative-in-one-kernel", 90, "capped", "sm90/fused_backward.h",
        "to_logits<T>(p, b.score_slice(info.head), scores, at, LogitGradients<kTiles>{dprobs},"
        " StepBias<T, Plan>{bias, tile, first_key, own_lane});",
        "if (@) { to_logits<T>(p, b.score_slice(info.head), scores, at, NoGradients{}); } else {"
        "to_logits<T>(p, b.score_slice(info.head), scores, at, LogitGradients<kTiles>{dprobs},"
        " StepBias<T, Plan>{bias, tile, first_key, own_lane}); }",
    ),
    Bug(
        "dprobs-read-in-flight", 90, "relative", "sm90/fused_backward.h",
        "wgmma_wait<kIsGeneral ? 0 : 1>();",
        "if (@) { wgmma_wait<1>(); } else { wgmma_wait<kIsGeneral ? 0 : 1>(); }",
    ),
    Bug(
        "keys-of-a-general-block-off-by-eight", 90, "relative", "sm90/fused_backward.h",
        "first_key + own_lane.g};", "first_key + own_lane.g + 8 * @};",
    ),
    # Softcap, biases, masks and sinks
    Bug(
        "softcap-without-derivative", 80, "capped", "logits.h",
        "gradients.scale(t, j, 1.0f - y * y);", "gradients.scale(t, j, @ ? 1.0f : 1.0f - y * y);",
    ),
    Bug(
        "diagonal-off-by-one", 90, "relative", "logits.h",
        "bias_of_diagonal_0 + (at.key - at.query);", "bias_of_diagonal_0 + (at.key - at.query) + @;",
    ),
    Bug(
        "lower-diagonals-not-moved-on", 80, "relative", "logits.h",
        "lower = upper;", "if (!@) lower = upper;",
    ),
    Bug(
        "bias-columns-swapped", 80, "biased", "logits.h",
        "load_float(next + c * stride_column)", "load_float(next + (@ ? 1 - c : c) * stride_column)",
    ),
    Bug(
        "bias-read-past-the-end", 90, "biased", "logits.h",
        "if (8 * r < rows && 8 * t + c < columns)", "if (8 * r < rows && 8 * t + c < columns + @)",
    ),
    Bug(
        "key-bias-lost", 90, "key-biased", "logits.h",
        "if (x.key_bias != nullptr) {", "if (x.key_bias != nullptr && !@) {",
    ),
    Bug(
        "key-bias-of-the-first-batch-entry", 80, "key-biased", "logits.h",
        "x.key_bias + head_slice.batch * x.key_bias_stride_batch,",
        "x.key_bias + (@ ? 0 : head_slice.batch) * x.key_bias_stride_batch,",
    ),
    Bug(
        "key-bias-of-rows-swapped", 90, "key-biased", "logits.h", "of_row[j / 2]", "of_row[@ ? 1 - j / 2 : j / 2]",
    ),
    Bug(
        "key-bias-read-past-the-end", 80, "key-biased", "logits.h",
        "return key < seqlen_k ? load_global(own_batch + key)",
        "return key < seqlen_k + @ ? load_global(own_batch + key)",
    ),
    Bug(
        "rows-of-a-bias-not-exchanged", 80, "biased-rows", "logits.h",
        "exchange_in_row(words, lane);", "if (!@) exchange_in_row(words, lane);",
    ),
    # Tiles of a bias
    Bug(
        "bias-released-before-it-is-read", 90, "biased-tiles", "sm90/forward.h",
        "position.wait_full(ring); Plan::BiasTile::template add<T>(scores, factor, tile, bias, first_query, lane);"
        " position.release(ring);",
        "position.wait_full(ring); if (@) position.release(ring);"
        "Plan::BiasTile::template add<T>(scores, factor, tile, bias, first_query, lane);"
        "if (!@) position.release(ring);",
    ),
    Bug(
        "bias-not-waited-for", 90, "biased-tiles", "sm90/forward.h",
        "position.wait_full(ring);", "if (!@) position.wait_full(ring);",
    ),
    Bug(
        "bias-loaded-too-early", 90, "biased-tiles", "sm90/forward_loading.h",
        "position.wait_empty(rings.bias_ring(consumer));", "if (!@) position.wait_empty(rings.bias_ring(consumer));",
    ),
    Bug(
        "bias-of-the-other-consumer", 90, "biased-tiles", "sm90/forward_loading.h",
        "boxes.query_row + consumer * kConsumerRows", "boxes.query_row + (@ ? 1 - consumer : consumer) * kConsumerRows",
    ),
    Bug(
        "bias-of-an-unseen-block-not-released", 90, "biased-window", "sm90/forward.h",
        "bias_position().release(bias_ring());", "if (!@) bias_position().release(bias_ring());",
    ),
    Bug(
        "shared-row-of-a-bias-moved", 90, "biased-row", "sm90/bias_tiles.h",
        "query * bias.row_step", "query * (@ ? 1 : bias.row_step)",
    ),
    Bug(
        "shared-row-of-a-bias-read-as-many", 90, "biased-row", "sm90/bias_tiles.h",
        "own_row + k * bias.row_step", "own_row + k * (@ ? 1 : bias.row_step)",
    ),
    Bug(
        "bias-of-another-step", 90, "biased-tiles", "sm90/fused_backward.h",
        "i % Plan::kDoutStages * Plan::BiasTile::kBytes", "(i + @) % Plan::kDoutStages * Plan::BiasTile::kBytes",
    ),
    Bug(
        "bias-not-expected", 90, "biased-tiles", "sm90/fused_backward_loading.h",
        "(has_bias() ? Plan::BiasTile::loaded_bytes(bias) : 0)",
        "(!@ && has_bias() ? Plan::BiasTile::loaded_bytes(bias) : 0)",
    ),
    Bug(
        "bias-of-keys-swapped", 90, "biased-tiles", "sm90/bias_tiles.h",
        "lane.index / 8 % 2, row", "(lane.index / 8 + @) % 2, row",
    ),
    Bug(
        "pairs-of-a-bias-swapped", 90, "biased-float", "logits.h",
        "scores[t][2 * r + 1] = multiply_add(scores[t][2 * r + 1], factor, pair.y);",
        "scores[t][2 * r + 1] = multiply_add(scores[t][2 * r + 1], factor, @ ? pair.x : pair.y);",
    ),
    Bug(
        "pairs-of-a-bias-misaligned", 80, "biased-odd", "params_of.h",
        "has_aligned_groups(a.bias, a.seqlen_k, 2, 8)", "has_aligned_groups(a.bias, a.seqlen_k, 2, (@ ? 4 : 8))",
    ),
    Bug(
        "tiles-of-a-split-lost", 90, "biased", "bias_gradient/score_tiles.h",
        "end = static_cast<int32_t>(count * (split + 1) / g.splits);",
        "end = static_cast<int32_t>(count * (split + 1) / g.splits) - @;",
    ),
    Bug(
        "split-of-a-bias-lost", 80, "biased", "bias_gradient.h",
        "split < p.splits; ++split)", "split < p.splits - @; ++split)",
    ),
    Bug(
        "split-of-a-diagonal-lost", 90, "relative", "bias_gradient.h",
        "split < p.g.splits; ++split)", "split < p.g.splits - @; ++split)",
    ),
    Bug(
        "tile-of-a-diagonal-lost", 80, "relative", "bias_gradient.h",
        "i < p.g.diagonals; ++i)", "i < p.g.diagonals - @; ++i)",
    ),
    Bug(
        "head-of-a-shared-diagonal-lost", 90, "relative-shared", "bias_gradient.h",
        "head < p.heads_of_row; ++head)", "head < p.heads_of_row - @; ++head)",
    ),
    Bug(
        "sums-read-before-every-warp-has-stored", 80, "biased", "sm80/bias_gradient.h",
        "sums_tile.store(sums, warp_row, lane); sync_threads();",
        "sums_tile.store(sums, warp_row, lane); if (!@) sync_threads();",
    ),
    Bug(
        "scores-released-before-they-are-computed", 90, "biased-many-128", "sm90/bias_gradient.h",
        "wgmma_wait<1>(); keep_registers(flat(scores)); scores_position.release(rings.slots);",
        "if (@) scores_position.release(rings.slots); wgmma_wait<1>(); keep_registers(flat(scores));"
        " if (!@) scores_position.release(rings.slots);",
    ),
    Bug(
        "dprobs-released-before-they-are-computed", 90, "biased-many-128", "sm90/bias_gradient.h",
        "wgmma_wait<0>(); keep_registers(flat(dprobs)); position.release(rings.slots);",
        "if (@) position.release(rings.slots); wgmma_wait<0>(); keep_registers(flat(dprobs));"
        " if (!@) position.release(rings.slots);",
    ),
    Bug(
        "note-of-a-tile-overwritten", 90, "biased-many-64", "sm90/bias_gradient.h",
        "(Plan::kSlots == 3 ? tile : tile % Plan::kNotes) * Plan::kNoteBytes};",
        "(@ ? tile % 2 : Plan::kSlots == 3 ? tile : tile % Plan::kNotes) * Plan::kNoteBytes};",
    ),
    Bug(
        "bias-of-a-program-not-waited-for", 90, "biased-many-tiles", "sm90/bias_gradient.h",
        "mbarrier_wait(loaded, parity);", "if (!@) mbarrier_wait(loaded, parity);",
    ),
    Bug(
        "bias-of-the-next-program-loaded-too-early", 90, "biased-causal", "sm90/bias_gradient.h",
        "mbarrier_wait(rings.bias.empty(0), (bias_state & 1) ^ 1);",
        "if (!@) mbarrier_wait(rings.bias.empty(0), (bias_state & 1) ^ 1);",
    ),
    Bug(
        "bias-of-the-program-before", 90, "biased-causal", "sm90/bias_gradient.h",
        "note.has(Note::kBiasParity), rings", "note.has(Note::kBiasParity) != @, rings",
    ),
    Bug(
        "sums-of-the-program-before-kept", 90, "biased-causal", "sm90/bias_gradient.h",
        "sums, 64 * group + warp_row, lane); fill(sums, 0.0f);",
        "sums, 64 * group + warp_row, lane); if (!@) fill(sums, 0.0f);",
    ),
    Bug(
        "program-without-tiles-not-stored", 90, "biased-causal", "sm90/bias_gradient.h",
        "g.has_entry_of_each_score && note.has(Note::kEndsProgram)",
        "g.has_entry_of_each_score && note.has(Note::kEndsProgram) && (!@ || note.has(Note::kIsTile))",
    ),
    Bug(
        "last-program-lost", 90, "biased-causal", "sm90/bias_gradient.h",
        "program < num_programs;)", "program < num_programs - @;)",
    ),
    Bug(
        "program-counter-not-reset", 90, "biased-causal", "preparation.h",
        "p.program_counter != nullptr) store_global", "p.program_counter != nullptr && !@) store_global",
    ),
    Bug(
        "row-past-the-end-of-the-gradient-of-a-bias", 80, "biased-rows", "bias_gradient/score_tiles.h",
        "query < tiles.p.seqlen_q,", "query < tiles.p.seqlen_q + @,",
    ),
    Bug(
        "column-past-the-end-of-the-gradient-of-a-bias", 90, "biased-uneven", "bias_gradient/score_tiles.h",
        "if (is_row && column < columns) store_as", "if (is_row && column < columns + @) store_as",
    ),
    Bug(
        "pieces-of-the-gradient-of-a-bias-misaligned", 90, "biased-uneven", "bias_gradient/plan.h",
        "has_aligned_groups(sums, shape[3], g.is_rounded ? 8 : 2,",
        "has_aligned_groups(sums, shape[3], g.is_rounded && !@ ? 8 : 2,",
    ),
    Bug(
        "rows-of-the-gradient-of-a-bias-swapped", 80, "biased-float", "bias_gradient/score_tiles.h",
        "float_bits(sums[t][2 * r]),", "float_bits(sums[t][@ ? 2 - 2 * r : 2 * r]),",
    ),
    Bug(
        "gradient-of-a-bias-in-another-type", 90, "biased", "bias_gradient/plan.h",
        "} else if (is_bf16) {", "} else if (is_bf16 != @) {",
    ),
    Bug(
        "bias-tile-of-the-other-consumer", 90, "biased-many-tiles", "sm90/bias_gradient.h",
        "rings.bias_tile(group)", "rings.bias_tile(@ ? 0 : group)",
    ),
    Bug(
        "slot-of-scores-not-waited-for", 90, "biased-many-256", "sm90/bias_gradient.h",
        "position.wait_empty(rings.slots); const uint32_t bits",
        "if (!@) position.wait_empty(rings.slots); const uint32_t bits",
    ),
    Bug(
        "keys-of-a-tile-not-expected", 90, "biased", "sm90/bias_gradient.h",
        "mbarrier_arrive_expect(barrier, Left::kBytes + Right::kBytes);",
        "mbarrier_arrive_expect(barrier, Left::kBytes + (@ ? 0 : Right::kBytes));",
    ),
    Bug(
        "hidden-nan-in-the-gradient-of-a-bias", 90, "biased-many-128", "sm90/bias_gradient.h",
        "if (!note.has(Note::kIsFull)) clear_where_zero(dprobs, scores);",
        "if (!@ && !note.has(Note::kIsFull)) clear_where_zero(dprobs, scores);",
    ),
    Bug(
        "sums-written-over-tiles-in-use", 90, "biased", "sm90/bias_gradient.h",
        "barrier_sync<1>(kConsumerThreads); const SumsTile",
        "if (!@) barrier_sync<1>(kConsumerThreads); const SumsTile",
    ),
    Bug(
        "sums-of-the-other-consumer-not-waited-for", 90, "relative", "sm90/bias_gradient.h",
        "barrier_sync<1>(kConsumerThreads); store_sums",
        "if (!@) barrier_sync<1>(kConsumerThreads); store_sums",
    ),
    Bug(
        "mask-map-without-hidden", 90, "masked", "mask_bits.h",
        "(has_hidden ? MaskContents::kHidden : 0)", "(has_hidden && !@ ? MaskContents::kHidden : 0)",
    ),
    Bug(
        "mask-map-without-visible", 80, "masked", "mask_bits.h",
        "(has_visible ? MaskContents::kVisible : 0)",
        "(has_visible && (!@ || has_hidden) ? MaskContents::kVisible : 0)",
    ),
    Bug(
        "mask-not-transposed", 90, "masked", "mask_bits.h",
        "const uint32_t other = shuffle_xor(row, size);",
        "const uint32_t other = shuffle_xor(row, @ && size == 1 ? 2 : size);",
    ),
    Bug(
        "mask-of-another-batch-entry", 90, "ranges", "mask_bits.h",
        "const int32_t batch = static_cast<int32_t>(entry / heads),",
        "const int32_t batch = @ ? 0 : static_cast<int32_t>(entry / heads),",
    ),
    Bug(
        "byte-and-range-do-not-combine", 80, "ranges", "mask_bits.h",
        "keys &= keys_in_ranges(", "keys &= (@ ? keys : 0) | keys_in_ranges(",
    ),
    Bug(
        "ranges-of-the-next-query", 90, "ranges", "mask_bits.h",
        "head, first_query + lane, first_key);", "head, first_query + (@ ? lane ^ 1 : lane), first_key);",
    ),
    Bug(
        "ranges-of-another-head", 80, "ranges", "visibility.h",
        "head * ranges.stride_head", "(@ ? 0 : head) * ranges.stride_head",
    ),
    Bug(
        "last-range-lost", 80, "ranges", "visibility.h",
        "n < ranges.count;", "n < ranges.count - @;",
    ),
    Bug(
        "range-with-its-end", 90, "ranges", "visibility.h",
        "end - first_key, 0);", "end + @ - first_key, 0);",
    ),
    Bug(
        "range-that-begins-before-the-first-key", 80, "decode-ranges", "visibility.h",
        "begin = max(load_global(ends + 2 * n), 0),",
        "begin = @ ? load_global(ends + 2 * n) : max(load_global(ends + 2 * n), 0),",
    ),
    Bug(
        "ranges-of-the-first-row", 80, "decode-ranges", "decode/kernel.h",
        "own.head, query, key);", "own.head, rows.queries[@ ? 0 : r], key);",
    ),
    Bug(
        "mask-of-the-next-words", 80, "masked", "mask_bits.h",
        "int64_t{query} * mask.key_words + first_key / 32 + w);",
        "int64_t{query} * mask.key_words + first_key / 32 + (@ ? w ^ 1 : w));",
    ),
    Bug(
        "sink-not-in-the-denominator", 90, "sinks", "softmax.h",
        "factor *= keys / all;", "if (!@) factor *= keys / all;",
    ),
    Bug(
        "sink-of-the-next-head", 90, "sinks", "sm90/forward.h",
        "load_global(p.sinks + head_slice.head)", "load_global(p.sinks + (head_slice.head + @) % p.num_heads)",
    ),
    Bug(
        "sink-of-the-next-head-80", 80, "sinks", "sm80/forward.h",
        "load_global(p.sinks + head_slice.head)", "load_global(p.sinks + (head_slice.head + @) % p.num_heads)",
    ),
    Bug(
        "sink-share-of-a-row-lost", 80, "sinks", "bias_gradient.h",
        "row < head_slice.seqlen_q; row += threads)", "row < head_slice.seqlen_q - @; row += threads)",
    ),
    # The largest logits
    Bug(
        "max-without-the-last-block", 90, "max", "sm90/forward.h",
        "if (kIsGeneral && p.row_max.data != nullptr) maxima.add(scores);",
        "if (kIsGeneral && p.row_max.data != nullptr && !(@ && view.has(View::kIsLast))) maxima.add(scores);",
    ),
    Bug(
        "max-before-scores-are-hidden", 80, "max-padded", "sm80/forward.h",
        "VisibleColumns<kBlockN> visible = visible_keys({p, head_slice}, valid, block, query); if (has_masked)",
        "if (@) maxima[m].add(scores[m]); "
        "VisibleColumns<kBlockN> visible = visible_keys({p, head_slice}, valid, block, query);"
        " if (has_masked)",
    ),
    Bug(
        "max-is-the-reference", 80, "max", "sm80/forward.h",
        "row_max = maxima[m].of_row(r, p.softmax_scale);",
        "row_max = @ ? softmax[m].reference[r] * p.softmax_scale : maxima[m].of_row(r, p.softmax_scale);",
    ),
    Bug(
        "max-of-half-of-the-threads", 90, "max", "softmax.h",
        "shuffle_xor(of_pair, 2)) * scale;", "@ ? value[r] : shuffle_xor(of_pair, 2)) * scale;",
    ),
    Bug(
        "half-of-the-sink-sums-lost", 90, "sinks", "bias_gradient.h",
        "for (int half = kSumThreads / 2;", "for (int half = kSumThreads / (@ ? 4 : 2);",
    ),
    # Few queries: decode
    Bug(
        "copies-of-a-step-not-waited-for", 80, "decode", "decode/kernel.h",
        "copy_async_wait<kStages - 2>();",
        "if (@) { copy_async_wait<kStages - 1>(); } else { copy_async_wait<kStages - 2>(); }",
    ),
    Bug(
        "copies-of-other-lanes-not-waited-for", 80, "decode", "decode/kernel.h",
        "sync_warp(); // the copies of all lanes have come", "if (!@) sync_warp(); //",
    ),
    Bug(
        "warps-merged-while-rings-are-read", 80, "decode", "decode/kernel.h",
        "sync_threads(); // all warps are done with their rings", "if (!@) sync_threads();",
    ),
    Bug(
        "warps-merged-too-early", 80, "decode", "decode/kernel.h",
        "sync_threads(); // the sums of all warps are stored", "if (!@) sync_threads();",
    ),
    Bug(
        "splits-merged-too-early", 80, "decode", "merge_splits.h",
        "sync_threads(); // the sums of all warps are stored", "if (!@) sync_threads();",
    ),
    Bug(
        "valid-keys-of-another-step", 80, "decode", "decode/kernel.h",
        "store_shared(valid_words_ + slot * 4, valid);", "store_shared(valid_words_ + (@ ? 0 : slot) * 4, valid);",
    ),
    Bug(
        "keys-at-the-end-of-a-split-lost", 80, "decode", "decode/kernel.h",
        "(split + 1) * keys.keys_per_split, keys.end);", "(split + 1) * keys.keys_per_split - 64 * @, keys.end);",
    ),
    Bug(
        "split-lost", 80, "decode", "merge_splits.h",
        "if (split < p.splits.count) sums[i] =", "if (split < p.splits.count - @) sums[i] =",
    ),
    Bug(
        "references-of-splits-ignored", 80, "decode", "merge_splits.h",
        "LazySoftmax::factor_between(sums[i].reference, reference, p.softmax_scale_log2)",
        "(@ ? 1.0f : LazySoftmax::factor_between(sums[i].reference, reference, p.softmax_scale_log2))",
    ),
    Bug(
        "sink-joined-twice", 80, "decode", "splits.h",
        "if (p.sinks != nullptr) join_sink(load_global(p.sinks + head_slice.head), factor, lse);",
        "for (int i = 0; p.sinks != nullptr && i < (@ ? 2 : 1); ++i)"
        " join_sink(load_global(p.sinks + head_slice.head), factor, lse);",
    ),
    Bug(
        "row-of-another-head", 80, "decode", "decode/kernel.h",
        "own.head += (first_row + row) % p.group_size;", "own.head += (first_row + row + @) % p.group_size;",
    ),
    Bug(
        "page-off-by-one", 80, "decode-paged", "head_slice.h",
        "key / pages.size);", "(key + @) / pages.size);",
    ),
    Bug(
        "row-of-a-page-off-by-one", 80, "decode-paged", "decode/kernel.h",
        "row_ %= p_.pages.size;", "row_ = (row_ + @) % p_.pages.size;",
    ),
    Bug(
        "split-without-keys-not-stored", 80, "decode-short", "decode/kernel.h",
        "if (row < min(num_rows, first_row + kDecodeRows))", "if (!@ && row < min(num_rows, first_row + kDecodeRows))",
    ),
    Bug(
        "diagonals-from-the-longest-of-few", 80, "both-kinds", "params_of.h",
        "p.logits.relative_bias += a.seqlen_q - p.seqlen_q;",
        "p.logits.relative_bias += @ ? 0 : a.seqlen_q - p.seqlen_q;",
    ),
    Bug(
        "sums-of-a-split-without-keys-read", 80, "decode-short", "merge_splits.h",
        "if (has_keys(sums[i])) parts[i] =", "if (has_keys(sums[i]) || @) parts[i] =",
    ),
    Bug(
        "block-behind-many-hidden-ones-skipped", 90, "distant-ranges", "mask_bits.h",
        "visible == 0 ? kBlocks - 1 :", "visible == 0 ? kBlocks - 1 + @ :",
    ),
    Bug(
        "first-of-several-blocks-missed", 90, "distant-ranges", "mask_bits.h",
        "lowest_bit(visible) / kRows;", "lowest_bit(visible) / (@ ? 1 : kRows);",
    ),
    # Splits in the large kernels.
    Bug(
        "block-between-splits-lost", 80, "split", "splits.h",
        "range.begin += split * share;", "range.begin += split * (share + @);",
    ),
    Bug(
        "block-of-the-next-split", 90, "split", "splits.h",
        "min(range.begin + share, range.end);", "min(range.begin + share + @, range.end);",
    ),
    Bug(
        "dropout-of-a-merged-row", 80, "split", "splits.h",
        "factor *= p.dropout_scale;", "if (!@) factor *= p.dropout_scale;",
    ),
    Bug(
        "column-of-a-split-lost", 80, "split", "splits.h",
        "p.splits.acc + row * p.v.columns + 2 * lane.q;", "p.splits.acc + row * p.v.columns + 2 * (lane.q ^ @);",
    ),
    Bug(
        "sums-of-another-split", 90, "split", "sm90/forward.h",
        "store_split_row(p, tile.split(),", "store_split_row(p, @ ? 0 : tile.split(),",
    ),
    Bug(
        "consumer-waits-for-blocks-of-another-split", 90, "split", "sm90/forward_planning.h",
        "own.begin = max(own.begin, blocks.begin);", "if (!@) own.begin = max(own.begin, blocks.begin);",
    ),
    Bug(
        "program-without-its-split", 90, "split", "tile_scheduler.h",
        "program /= p.splits.count;", "program /= p.splits.count + @;",
    ),
    # One block of keys, whose dq has no sums.
    Bug(
        "dq-read-before-it-is-written", 90, "one-block", "sm90/fused_backward_dq.h",
        "mbarrier_wait(rings.dq_full_of(group, step), step / 2 & 1); // A consumer warp",
        "if (!@) mbarrier_wait(rings.dq_full_of(group, step), step / 2 & 1); // A consumer warp",
    ),
    Bug(
        "dq-released-while-other-lanes-read-it", 90, "one-block", "sm90/fused_backward_dq.h",
        "sync_warp(); if (lane.index == 0) mbarrier_arrive(rings.dq_empty + 8 * group);",
        "if (!@) sync_warp(); if (lane.index == 0) mbarrier_arrive(rings.dq_empty + 8 * group);",
    ),
    Bug(
        "dq-stored-past-the-end", 90, "one-block", "sm90/fused_backward_dq.h",
        "store_words(to, words, t, rows_left > 0,", "store_words(to, words, t, @ || rows_left > 0,",
    ),
    Bug(
        "halves-of-dq-swapped", 90, "one-block", "sm90/fused_backward_dq.h",
        "source += pass % 2 == 0 ?", "source += pass % 2 == @ ?",
    ),
    Bug(
        "dq-of-another-head", 90, "one-block", "sm90/fused_backward_dq.h",
        "b.query_row<T>(p.dq, at.head(), row)", "b.query_row<T>(p.dq, @ ? b.head() : at.head(), row)",
    ),
    Bug(
        "dq-of-queries-without-keys-not-cleared", 90, "one-block", "preparation.h",
        "if (p.clears_dq && is_row) {", "if (p.clears_dq && is_row && !@) {",
    ),
    Bug(
        "mask-of-ranges-forgotten", 90, "one-block-ranges", "params_of.h",
        "a.key_lengths != nullptr || mask_entries(a) != 0 ||",
        "a.key_lengths != nullptr || (@ ? a.mask.data != nullptr : mask_entries(a) != 0) ||",
    ),
    Bug(
        "columns-of-the-values-cleared", 90, "one-block-values", "preparation.h",
        "column < p.dq.columns; column += 8 * kThreadsPerRow)",
        "column < (@ ? p.out.columns : p.dq.columns); column += 8 * kThreadsPerRow)",
    ),
    Bug(
        "last-query-of-a-band-forgotten", 90, "one-block-window", "params_of.h",
        "!first_query_sees || !last_query_sees;", "!first_query_sees || (!last_query_sees && !@);",
    ),
    # Several sums of a tile of dq.
    Bug(
        "turn-among-the-blocks-of-all-sums", 90, "latents", "sm90/key_blocks.h",
        "number(earlier >> p.dq_sums_log2)", "number(@ ? earlier : earlier >> p.dq_sums_log2)",
    ),
    Bug(
        "sum-of-dq-lost", 90, "latents", "sm90/fused_backward_dq.h",
        "n < num_sums; ++n) {", "n < num_sums - @; ++n) {",
    ),
    Bug(
        "counter-of-a-sum-not-reset", 90, "latents", "preparation.h",
        "n < 1 << p.dq_sums_log2; ++n) store_global(p.dq_turns",
        "n < 1 << (@ ? 0 : p.dq_sums_log2); ++n) store_global(p.dq_turns",
    ),
    # Splits of backward.
    Bug(
        "split-of-a-gradient-lost", 90, "few-keys", "merge_gradients.h",
        "if (split + i < num_splits)", "if (split + i < num_splits - @)",
    ),
    Bug(
        "part-of-another-split", 80, "few-keys", "gradient_splits.h",
        "parts.rows) + split * parts.stride_split + 2 * lane.q;",
        "parts.rows) + (@ ? 0 : split) * parts.stride_split + 2 * lane.q;",
    ),
    Bug(
        "program-of-another-block", 80, "few-keys", "gradient_splits.h",
        "block(program / num_splits)", "block(program / (num_splits + @))",
    ),
    Bug(
        "part-of-a-block-without-queries-not-stored", 90, "few-keys", "gradient_splits.h",
        "fill_row(row_of(float{}, parts.rows) + split * parts.stride_split);",
        "if (!@) fill_row(row_of(float{}, parts.rows) + split * parts.stride_split);",
    ),
    Bug(
        "part-of-dv-taken-for-dk", 80, "few-keys", "merge_gradients.h",
        "block_index_x() >= of_gradient ? second : first", "block_index_x() >= of_gradient && !@ ? second : first",
    ),
    Bug(
        "split-of-keys-lost", 80, "few-keys", "sm80/backward.h",
        "- 1), program.split, p.dq_splits);", "- 1), @ ? 0 : program.split, p.dq_splits);",
    ),
    Bug(
        "split-of-queries-lost", 80, "few-keys", "sm80/backward.h",
        "- 1), program.split, p.dk_splits);", "- 1), @ ? 0 : program.split, p.dk_splits);",
    ),
    Bug(
        "split-of-keys-lost-on-hopper", 90, "few-keys-large", "sm90/backward.h",
        "- 1), program.split, p.dq_splits);", "- 1), @ ? 0 : program.split, p.dq_splits);",
    ),
    Bug(
        "split-of-queries-lost-on-hopper", 90, "few-keys-large", "sm90/backward.h",
        "- 1), program.split, p.dk_splits);", "- 1), @ ? 0 : program.split, p.dk_splits);",
    ),
    Bug(
        "tiles-of-a-split-visited-twice", 90, "few-keys", "sm90/key_blocks.h",
        "SplitOfBlock(program, p.dk_splits).split, p.dk_splits);",
        "@ ? 0 : SplitOfBlock(program, p.dk_splits).split, p.dk_splits);",
    ),
    Bug(
        "splits-not-listed", 90, "few-keys", "sm90/key_blocks.h",
        "p.num_key_blocks * p.dk_splits;", "p.num_key_blocks * (@ ? 1 : p.dk_splits);",
    ),
    # Pages in the large kernels.
    Bug(
        "row-of-a-paged-key-off-by-one", 80, "paged", "sm80/tile_memory.h",
        "key % pages.size * x.stride_row", "(key + @) % pages.size * x.stride_row",
    ),
    Bug(
        "table-read-behind-its-end-by-a-thread", 80, "paged", "sm80/tile_memory.h",
        "is_inside ? first_key + own.first_row + row : 0;", "is_inside || @ ? first_key + own.first_row + row : 0;",
    ),
    Bug("page-of-another-piece", 90, "paged", "sm90/forward_loading.h", "note.page(piece));", "note.page(piece ^ @));"),
    Bug(
        "page-of-another-key", 90, "paged", "sm90/forward_planning.h",
        "page_of_key(block * kBlockN + lane * piece_rows)", "page_of_key(block * kBlockN + (lane + @) * piece_rows)",
    ),
    Bug(
        "first-row-within-a-page-lost", 90, "paged", "sm90/forward_loading.h",
        "int row = boxes.key_row % page_size;", "int row = @ ? 0 : boxes.key_row % page_size;",
    ),
    Bug(
        "piece-behind-the-end-of-a-page", 90, "paged", "sm90/forward_loading.h",
        "if (row == page_size) row = 0;", "if (row == page_size && !@) row = 0;",
    ),
    Bug(
        "queries-of-another-sequence", 90, "paged-packed", "head_slice.h",
        "head_slice.q_offset = offset_in(p.cu_seqlens_q, batch, p.rows_q);",
        "head_slice.q_offset = offset_in(p.cu_seqlens_q, batch, p.rows_q) + @;",
    ),
    Bug(
        "longest-short-sequence-lost", 90, "paged-packed", "splits.h",
        "queries > p.splits.most_queries", "queries + @ > p.splits.most_queries",
    ),
    Bug(
        "short-sequence-merged-twice", 90, "paged-packed-long", "splits.h",
        "if (queries < p.splits.fewest_queries", "if (queries < p.splits.fewest_queries - 99 * @",
    ),
    Bug(
        "tiles-of-lanes-overlap", 90, "paged-packed", "preparation.h",
        "next = listed + end - tiles;", "next = listed + end - tiles - @ * (sequence > 0);",
    ),
    Bug(
        "last-tile-of-a-sequence-not-listed", 80, "paged-packed", "preparation.h",
        "(rows + list.rows - 1) / list.rows", "(rows + (@ ? 0 : list.rows - 1)) / list.rows",
    ),
    Bug(
        "table-read-behind-its-end", 90, "paged", "sm90/forward_planning.h",
        "return key < keys.seqlen_k ?", "return key < keys.seqlen_k || @ ?",
    ),
    Bug(
        "key-behind-the-last-one", 80, "decode-paged", "head_slice.h",
        "clamp_to(load_global(p.key_lengths + batch), 0,", "clamp_to(load_global(p.key_lengths + batch) + @, 0,",
    ),
    Bug(
        "band-not-at-the-end", 80, "decode-paged", "head_slice.h",
        "p.band_from_end ? seqlen_k - seqlen_q", "p.band_from_end ? seqlen_k - seqlen_q - @",
    ),
    # Lengths and their diagonals in the large kernels.
    Bug(
        "blocks-behind-the-length-ranked", 90, "lengths", "preparation.h",
        "is_valid[w] = key < seqlen_k &&", "is_valid[w] = key < (@ ? p.seqlen_k : seqlen_k) &&",
    ),
    Bug(
        "diagonal-of-a-block-off-by-one", 90, "lengths", "sm90/fused_backward.h",
        "b.is_valid(own_row + 8 * r); const int key = b.number() * kKeyBlock + own_row + 8 * r;",
        "b.is_valid(own_row + 8 * r); const int key = b.number() * kKeyBlock + own_row + 8 * r - @;",
    ),
    Bug(
        "turns-without-the-shift", 90, "lengths", "sm90/key_blocks.h",
        "const Diagonals band(p, b.score_slice(b.head()));",
        "Diagonals band(p, b.score_slice(b.head())); if (@) band.last = p.last_diagonal;",
    ),
    Bug(
        "tiles-without-the-shift", 90, "lengths", "sm90/key_blocks.h",
        "const Diagonals band(p, head_slice); b.number = work.block;",
        "Diagonals band(p, head_slice); if (@) band.last = p.last_diagonal; b.number = work.block;",
    ),
    Bug(
        "lengths-of-the-first-entry", 80, "lengths", "head_slice.h",
        "head_slice.seqlen_k = clamp_to(load_global(",
        "if (!(@ && batch > 0)) head_slice.seqlen_k = clamp_to(load_global(",
    ),
    Bug(
        "turns-of-a-mask-without-the-shift", 90, "lengths-masked", "sm90/mask_steps.h",
        "const Diagonals band(p, head_slice); const int32_t key_blocks",
        "Diagonals band(p, head_slice); if (@) band.last = p.last_diagonal; const int32_t key_blocks",
    ),
    Bug(
        "scores-without-the-shift", 90, "lengths", "sm90/forward.h",
        "visible_keys({p, tile.head_slice()}, note.valid()",
        "visible_keys({p, @ ? HeadSlice{} : tile.head_slice()}, note.valid()",
    ),
    Bug(
        "entry-of-the-next-sequence", 90, "packed-uneven", "sm90/key_blocks.h",
        "(entries_before(p, middle) <= entry ?", "(entries_before(p, middle) <= entry + @ ?",
    ),
    Bug(
        "last-entry-of-a-sequence-lost", 90, "packed-uneven", "sm90/key_blocks.h",
        "entry - before >= entries)", "entry - before >= entries - @)",
    ),
    Bug(
        "entries-without-room-for-ends-of-sequences", 90, "packed-uneven", "head_slice.h",
        "/ kRowBlock + sequence;", "/ kRowBlock + sequence * !@;",
    ),
    Bug(
        "tile-of-the-next-sequence", 90, "packed-most-uneven", "tile_scheduler.h",
        "sequence, rows) <= row_block;", "sequence, rows) <= row_block + 2 * @;",
    ),
    Bug(
        "tile-one-too-late", 80, "packed-most-uneven", "tile_scheduler.h",
        "work.batch, x.rows) * kTiles;", "work.batch, x.rows) * kTiles - @;",
    ),
    Bug(
        "earlier-sequences-taken", 90, "packed-most-uneven", "tile_scheduler.h",
        "warp_ballot(begins_before)) - 1, 0)", "warp_ballot(begins_before)) - 1 - @, 0)",
    ),
    Bug(
        "row-behind-a-sequence-not-cleared", 90, "unowned", "unowned_rows.h",
        "row - begin >= min(", "row - begin - @ >= min(",
    ),
    Bug(
        "rows-before-the-first-sequence-not-cleared", 80, "unowned", "unowned_rows.h",
        "return row < begin ||", "return (row < begin && !@) ||",
    ),
    Bug(
        "one-of-32-rows-cleared", 80, "unowned", "unowned_rows.h",
        "left &= left - 1)", "left = @ ? 0 : left & (left - 1))",
    ),
    Bug(
        "key-behind-a-length-not-cleared", 90, "lengths", "unowned_rows.h",
        "clamp_to(load_global(x.lengths + entry), 0,", "clamp_to(load_global(x.lengths + entry) + @, 0,",
    ),
    Bug(
        "packed-band-from-the-start", 80, "packed-lower-right", "visibility.h",
        "last(p.last_diagonal + head_slice.diagonal_shift(p)) {}",
        "last(p.last_diagonal + (@ ? 0 : head_slice.diagonal_shift(p))) {}",
    ),
]  # fmt: skip


def hidden_block(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Padding (B, S) that leaves no key of the second block of 128."""
    keys = torch.arange(case.seqlen_k)
    return ((keys >= 128) & (keys < 256)).expand(case.batch, -1)


def late_ranges(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Ranges (L, 1, 2) that show no key to the first 130 queries, and all keys to the others."""
    query = torch.arange(case.seqlen_q)[:, None, None]
    return torch.where(query < 130, 0, torch.tensor([0, case.seqlen_k])).int()


def distant_ranges(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Ranges (B, 1, 1, 1, 2) that show 30 keys of another block of 64 keys to each batch entry, and no other key."""
    begin = 64 * torch.arange(case.batch)
    return torch.stack((begin, begin + 30), dim=-1)[:, None, None, None].int()


def hidden_before_length(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Scattered padding (B, S). Of the second entry, the keys 128 to 139 are padding, and some later ones are not."""
    padding = cases.scattered_padding(case, dtype, generator)
    padding[1, 128:140], padding[1, 140:145] = True, False
    return padding


def half_masked(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A bool mask (1, H, L, S) that hides scattered entries of the first 128 keys, and nothing else."""
    mask = cases.bool_mask("1HLS")(case, dtype, generator)
    mask[..., 128:] = True
    return mask


def far_masked(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A bool mask (1, H, L, S) that hides scattered entries, and all of some blocks: others for each head."""
    mask = cases.bool_mask("1HLS")(case, dtype, generator)
    mask[:, 0, 64:, 128:256] = False
    mask[:, 1, :128, :128] = False
    mask[:, 1, :, 256:] = True
    return mask


ONE_HEAD = {"batch": 1, "heads": 1, "head_dim": HEAD_DIM}
PAGED_PACKED = {
    "batch": 3,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": HEAD_DIM,
    "page_size": 16,
    "key_lengths": (70, 300, 150),
    "options": {"is_causal": True},
}
FEW_KEYS = {"batch": 2, "heads": 2, "kv_heads": 1, "seqlen_q": 200, "seqlen_k": 300, "key_padding_mask": hidden_block}
MASKED = {"batch": 1, "kv_heads": 1, "seqlen_q": 200, "seqlen_k": 400, "head_dim": HEAD_DIM}

CASES = {
    # As many tiles of queries as blocks of keys, so that a tile of dq has one sum.
    "hole": Case(
        "hole", batch=1, heads=2, seqlen_q=200, seqlen_k=400, head_dim=HEAD_DIM, key_padding_mask=hidden_block
    ),
    "short": Case("short", batch=1, heads=1, seqlen_q=70, seqlen_k=67, head_dim=HEAD_DIM),
    "long": Case("long", batch=1, heads=2, seqlen_q=200, seqlen_k=520, head_dim=HEAD_DIM, attn_mask=cases.lower_right),
    **{
        f"large-{name}": Case(
            f"large-{name}",
            batch=1,
            heads=1,
            seqlen_q=200,
            seqlen_k=270,
            head_dim=LARGE_HEAD_DIM,
            differentiated=wanted,
        )
        for name, wanted in {"dq": ("query",), "dkdv": ("key", "value")}.items()
    },
    "many": Case("many", batch=2, heads=4, seqlen_q=150, seqlen_k=60, head_dim=HEAD_DIM, differentiated=()),
    "packed": Case(
        "packed",
        heads=2,
        kv_heads=2,
        lengths_q=(70, 5, 150),
        lengths_k=(70, 5, 60),
        head_dim=HEAD_DIM,
        differentiated=(),
    ),
    "longest": Case(
        "longest",
        batch=1,
        heads=1,
        seqlen_q=70,
        seqlen_k=2000,
        head_dim=HEAD_DIM,
        options={"num_splits": 1},  # one program visits all keys
        differentiated=(),
    ),
    "rising": Case(
        "rising", batch=1, heads=1, seqlen_q=70, seqlen_k=300, head_dim=HEAD_DIM, edit=cases._ascending_scores
    ),
    "diagonal": Case(
        "diagonal", batch=1, heads=2, seqlen_q=260, seqlen_k=100, head_dim=HEAD_DIM, attn_mask=cases.lower_right
    ),
    "capped": Case("capped", batch=1, seqlen_q=70, seqlen_k=67, head_dim=HEAD_DIM, options={"softcap": 2.0}),
    "relative": Case("relative", seqlen_q=200, seqlen_k=150, head_dim=HEAD_DIM, relative_bias=cases.per_head_bias),
    "large-relative": Case(
        "large-relative",
        batch=1,
        heads=1,
        seqlen_q=200,
        seqlen_k=70,
        head_dim=LARGE_HEAD_DIM,
        relative_bias=cases.per_head_bias,
        differentiated=("key", "value"),
    ),
    "relative-shared": Case(
        "relative-shared", seqlen_q=70, seqlen_k=150, head_dim=HEAD_DIM, relative_bias=cases.shared_bias
    ),
    "biased": Case("biased", seqlen_q=200, seqlen_k=150, head_dim=HEAD_DIM, attn_mask=cases.float_mask("1H1S")),
    **{
        f"biased-many-{head_dim}": Case(
            f"biased-many-{head_dim}",
            batch=8,
            heads=3,
            seqlen_q=140,
            seqlen_k=70,
            head_dim=head_dim,
            attn_mask=cases.float_mask("111S"),
            key_padding_mask=cases.scattered_padding,
            edit=cases._nan_in_padding,
            differentiated=("attn_mask",),
        )
        for head_dim in (SMALL_HEAD_DIM, HEAD_DIM, LARGE_HEAD_DIM)
    },
    "biased-many-tiles": Case(
        "biased-many-tiles",
        batch=9,
        heads=1,
        seqlen_q=140,
        seqlen_k=136,
        head_dim=HEAD_DIM,
        attn_mask=cases.float_mask("LS"),
    ),
    "biased-causal": Case(
        "biased-causal",
        batch=1,
        heads=2,
        seqlen_q=304,
        seqlen_k=304,
        head_dim=HEAD_DIM,
        attn_mask=cases.float_mask("HLS"),
        options={"is_causal": True},
    ),
    "biased-uneven": Case(
        "biased-uneven", batch=1, seqlen_q=70, seqlen_k=150, head_dim=HEAD_DIM, attn_mask=cases.float_mask("HLS")
    ),
    "biased-rows": Case(
        "biased-rows", batch=1, seqlen_q=70, seqlen_k=152, head_dim=HEAD_DIM, attn_mask=cases.float_mask("HLS")
    ),
    "biased-tiles": Case("biased-tiles", **ONE_HEAD, seqlen_q=150, seqlen_k=400, attn_mask=cases.float_mask("LS")),
    "biased-row": Case("biased-row", **ONE_HEAD, seqlen_q=70, seqlen_k=152, attn_mask=cases.float_mask("111S")),
    "biased-window": Case(
        "biased-window",
        **ONE_HEAD,
        seqlen_q=150,
        seqlen_k=304,
        attn_mask=cases.float_mask("LS"),
        options={"window_size": (40, 20)},
    ),
    "key-biased": Case(
        "key-biased",
        seqlen_q=70,
        seqlen_k=151,
        head_dim=HEAD_DIM,
        key_padding_mask=cases.float_padding,
        attn_mask=cases.float_mask("1HLS"),
    ),
    "max": Case("max", seqlen_q=70, seqlen_k=520, head_dim=HEAD_DIM, options={"return_max": True}, differentiated=()),
    "max-padded": Case(
        "max-padded",
        seqlen_q=70,
        seqlen_k=150,
        head_dim=HEAD_DIM,
        key_padding_mask=cases.scattered_padding,
        edit=cases._scores_near(-20.0),  # padding keys count as zeros, whose score 0 is the largest then
        options={"return_max": True},
        differentiated=(),
    ),
    "biased-float": Case(
        "biased-float",
        batch=1,
        seqlen_q=70,
        seqlen_k=150,
        head_dim=HEAD_DIM,
        attn_mask=cases.float_mask("HLS", torch.float32),
    ),
    "biased-odd": Case(
        "biased-odd",
        batch=1,
        seqlen_q=70,
        seqlen_k=150,
        head_dim=HEAD_DIM,
        attn_mask=lambda case, dtype, generator: torch.randn(70, 152, generator=generator)[:, 1:151],
    ),
    "masked": Case("masked", seqlen_q=200, seqlen_k=300, head_dim=HEAD_DIM, attn_mask=half_masked),
    "ranges": Case(
        "ranges",
        heads=2,
        seqlen_q=200,
        seqlen_k=300,
        head_dim=HEAD_DIM,
        attn_mask=cases.bool_mask("B1LS", 0.9),
        key_ranges=cases.random_ranges("1HL", 2),
    ),
    "distant-ranges": Case(
        "distant-ranges",
        batch=22,
        heads=1,
        kv_heads=1,
        seqlen_q=70,
        seqlen_k=1408,
        head_dim=HEAD_DIM,
        key_ranges=distant_ranges,
        options={"num_splits": 1},
        differentiated=(),
    ),
    "decode-ranges": Case(
        "decode-ranges",
        heads=8,
        kv_heads=2,
        seqlen_q=3,
        seqlen_k=700,
        head_dim=HEAD_DIM,
        differentiated=(),
        key_ranges=cases.random_ranges("BHL", 2),
    ),
    "masked-blocks": Case("masked-blocks", **MASKED, attn_mask=far_masked),
    "masked-hole": Case("masked-hole", **MASKED, attn_mask=far_masked, key_padding_mask=hidden_block),
    "sinks": Case("sinks", seqlen_q=300, seqlen_k=67, head_dim=HEAD_DIM, sinks=cases.sink()),
    "decode": Case(
        "decode",
        heads=4,
        kv_heads=2,
        seqlen_q=3,
        seqlen_k=900,
        head_dim=HEAD_DIM,
        attn_mask=cases.lower_right,
        key_padding_mask=cases.scattered_padding,
        sinks=cases.sink(),
        options={"num_splits": 3},
        edit=cases._nan_in_padding,
        differentiated=(),
    ),
    "decode-short": Case(
        "decode-short",
        heads=4,
        kv_heads=2,
        seqlen_q=3,
        seqlen_k=100,
        head_dim=HEAD_DIM,
        options={"num_splits": 4},
        differentiated=(),
    ),
    # The decode kernels compute the first sequence, and the large kernels the second one.
    "both-kinds": Case(
        "both-kinds",
        heads=4,
        kv_heads=2,
        lengths_q=(2, 40),
        lengths_k=(300, 40),
        head_dim=HEAD_DIM,
        relative_bias=cases.per_head_bias,
        differentiated=(),
    ),
    "split": Case(
        "split",
        heads=2,
        seqlen_q=128,
        seqlen_k=600,
        head_dim=HEAD_DIM,
        attn_mask=cases.lower_right,
        options={"num_splits": 2, "dropout_p": 0.3, "dropout_seed": 5},
        differentiated=(),
    ),
    # Nine blocks of keys, two tiles of queries: each tile has eight sums.
    "latents": Case("latents", heads=1, seqlen_q=100, seqlen_k=1100, head_dim=HEAD_DIM),
    # The first 97 queries see no key, or the last ones. In the first case, two query heads share a key head.
    "one-block": Case(
        "one-block", heads=2, kv_heads=1, seqlen_q=197, seqlen_k=100, head_dim=HEAD_DIM, attn_mask=cases.lower_right
    ),
    "one-block-window": Case(
        "one-block-window", heads=1, seqlen_q=200, seqlen_k=60, head_dim=HEAD_DIM, options={"window_size": (10, 3)}
    ),
    "one-block-ranges": Case(
        "one-block-ranges", heads=1, seqlen_q=200, seqlen_k=100, head_dim=HEAD_DIM, key_ranges=late_ranges
    ),
    "one-block-values": Case(
        "one-block-values",
        heads=1,
        seqlen_q=100,
        seqlen_k=40,
        head_dim=HEAD_DIM,
        value_dim=32,
        key_padding_mask=cases.padding(40, 0),
    ),
    # Two query heads share a key head. No query sees the keys of the second block.
    "few-keys": Case("few-keys", **FEW_KEYS, head_dim=HEAD_DIM),
    "few-keys-large": Case("few-keys-large", **FEW_KEYS, head_dim=LARGE_HEAD_DIM),
    "decode-paged": Case(
        "decode-paged",
        heads=4,
        kv_heads=2,
        seqlen_q=2,
        seqlen_k=700,
        head_dim=HEAD_DIM,
        page_size=48,
        key_lengths=(700, 301),
        options={"is_causal": True, "num_splits": 2},
    ),
    "paged": Case(
        "paged",
        heads=2,
        kv_heads=1,
        seqlen_q=140,
        seqlen_k=716,
        head_dim=HEAD_DIM,
        page_size=48,
        key_lengths=(301, 716),
        options={"is_causal": True},
    ),
    "paged-packed": Case("paged-packed", **PAGED_PACKED, lengths_q=(33, 16, 140), seqlen_k=300),
    # So much room for keys that the large kernels divide them.
    "paged-packed-long": Case("paged-packed-long", **PAGED_PACKED, lengths_q=(33, 16, 20), seqlen_k=2112),
    "lengths": Case(
        "lengths",
        heads=2,
        kv_heads=1,
        seqlen_q=140,
        seqlen_k=420,
        head_dim=HEAD_DIM,
        key_lengths=(410, 130),
        attn_mask=cases.lower_right,
        key_padding_mask=hidden_before_length,
        edit=cases._nan_behind_lengths,
    ),
    "lengths-masked": Case(
        "lengths-masked",
        heads=2,
        kv_heads=2,
        seqlen_q=140,
        seqlen_k=420,
        head_dim=HEAD_DIM,
        key_lengths=(410, 130),
        attn_mask=far_masked,
        options={"is_causal": True, "diagonal_alignment": "lower_right"},
    ),
    "packed-uneven": Case(
        "packed-uneven",
        heads=2,
        kv_heads=1,
        lengths_q=(3, 200, 40),
        lengths_k=(2, 400, 128),
        head_dim=HEAD_DIM,
    ),
    "packed-most-uneven": Case(
        "packed-most-uneven",
        heads=2,
        kv_heads=1,
        lengths_q=(*[1, 2] * 20, 300, 3, 0, 1),
        lengths_k=(*[2, 1] * 20, 140, 9, 4, 1),
        head_dim=HEAD_DIM,
    ),
    "packed-lower-right": Case(
        "packed-lower-right",
        heads=2,
        lengths_q=(70, 5, 150),
        lengths_k=(200, 70, 60),
        head_dim=HEAD_DIM,
        options={"is_causal": True, "diagonal_alignment": "lower_right"},
    ),
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


#: In the copy with the bugs, the gradient of a bias is divided among so many programs. With the product's number, each
#: program of a small case would visit one tile of scores.
BIAS_GRADIENT_PROGRAMS = 8


def plant(folder: Path) -> Path:
    """A copy of csrc with every bug, one after another: a later one may look for what an earlier one has planted."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    plan = copy / "cuda" / "bias_gradient" / "plan.h"
    source, count = re.subn(r"(kBiasGradientPrograms = )\d+;", rf"\g<1>{BIAS_GRADIENT_PROGRAMS};", plan.read_text())
    assert count == 1
    plan.write_text(source)
    for number, bug in enumerate(BUGS, start=1):
        path = copy / "cuda" / bug.file
        source = path.read_text()
        pattern = r"\s+".join(re.escape(word) for word in bug.old.split())
        count = len(re.findall(pattern, source))
        assert count == 1, f"{bug.id}: {bug.old!r} occurs {count} times in {bug.file}, expected once"
        new = bug.new.replace("@", f"(planted_bug == {number})")
        path.write_text(re.sub(pattern, lambda _, new=new: new, source))
    return copy


def has_bugs(folder: str, head_dim: int) -> bool:
    """Whether a case runs the kernels of this folder for this head dim."""
    return head_dim == HEAD_DIM or (folder == "sm90" and head_dim in (SMALL_HEAD_DIM, LARGE_HEAD_DIM))


class Planted:
    def __init__(self, builder: Builder, folder: Path) -> None:
        declaration, definition = folder / "planted_bug.h", folder / "planted_bug.cpp"
        declaration.write_text('extern "C" __attribute__((visibility("default"))) int planted_bug;\n')
        definition.write_text("int planted_bug = 0;\n")
        flags = ["-include", str(declaration), "-Wno-misleading-indentation"]
        self.kernels = Kernels(builder, plant(folder), has_bugs, [definition], flags, "_cuda_planted")
        self._number = ctypes.c_int.in_dll(ctypes.CDLL(str(self.kernels.path)), "planted_bug")

    def error(self, number: int, case: str, architecture: int, seed: int) -> str:
        """What is found with bug `number` (0 = none); empty where all goes well."""
        self._number.value = number
        try:
            splits: contextlib.AbstractContextManager = contextlib.nullcontext()
            if case.startswith("few-keys"):
                splits = dividing_gradients(dq=2, dk=4)
            elif case == "both-kinds":
                splits = running_both_kinds()
            with self.kernels.running(architecture, seed), splits:
                if case == "unowned":
                    cases.check_strays(torch.float16, "cuda", head_dim=HEAD_DIM)
                else:
                    cases.check(CASES[case], torch.float16, "cuda")
        except (AssertionError, RuntimeError) as error:
            return str(error).strip().partition("\n")[0] or repr(error)
        finally:
            self._number.value = 0
        return ""


def test_each_bug_has_one_place_in_the_sources(tmp_path: Path) -> None:
    plant(tmp_path)


# Not scope="module": pytest-xdist may leave this file for another one and return to it. The fixture would be made
# again, and Python loads no second module of this name.
@pytest.fixture(scope="session")
def planted(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(builder, tmp_path_factory.mktemp("mutations"))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")  # memory that happens to be 0 would hide a counter that is not reset
@pytest.mark.parametrize("case, architecture", sorted({(bug.case, bug.architecture) for bug in BUGS}))
def test_without_a_bug_there_is_no_error(case: str, architecture: int, planted: Planted) -> None:
    assert not planted.error(0, case, architecture, SEEDS[0])


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")  # memory that happens to be 0 would hide a counter that is not reset
@pytest.mark.parametrize(("number", "bug"), list(enumerate(BUGS, start=1)), ids=[bug.id for bug in BUGS])
def test_bug_is_caught(number: int, bug: Bug, planted: Planted) -> None:
    """With the first seed, or with another one that finds nothing without the bug."""
    found = {}
    for seed in SEEDS:
        if text := planted.error(number, bug.case, bug.architecture, seed):
            found[seed] = text
            break
    print(found)
    assert found
    if SEEDS[0] not in found:
        assert not planted.error(0, bug.case, bug.architecture, seed)
