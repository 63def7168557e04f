"""The emulation reports each bug of the small kernels in `detectors.cu`, in words that say what is wrong.

It reports nothing for the kernels without a bug.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from emulator import EARLY, LATE, Builder, EmulationError, Library

SEEDS = range(6)

#: kernels of detectors.cu without a bug, and what they are the counterpart of
CORRECT = [
    "ordered_exchange",
    "lanes_with_sync_warp",
    "store_after_many_ordered_readers",
    "ordered_by_arrival",
    "ping_pong",
    "all_shared_memory",
    "threads_write_halves_of_a_word",
    "threads_exchange_in_global",
    "warp_reads_before_it_writes",
    "block_passes_on",
    "blocks_in_order",
    "waiting_for_a_neighbour",
    "work_by_a_counter",
    "mbarrier_hands_over",
    "copies_in_order",
    "tma_round_trip",
    "sums_in_turn",
    "box_read_by_loads",
    "box_read_by_a_bulk_load",
    "box_read_by_tma",
    "sum_onto_stored_values",
    "source_reused_after_wait_read",
    "slot_stored_and_freed",
    "wgmma_in_order",
    "wgmma_fenced_by_its_reader",
    "wgmma_onto_forgotten_registers",
    "forgotten_registers",
    "registers_within_budget",
]

# In a race, the report names the access that happens to come second. So some patterns allow either of two accesses.
UNORDERED = (
    r"RACE: load_shared at shared offset \d+ reads what is not ordered after the write of thread \d+"
    r"|RACE: store_shared at shared offset \d+ is not ordered after the read of thread \d+"
)

UNORDERED_IN_GLOBAL = (
    r"RACE: load_global reads .* thread \d+ .* of the same block wrote: nothing"
    r"|RACE: store_global .* that thread \d+ .* of the same block has read: nothing"
)

#: Which step is missing between a bulk store of one block and an access of another.
NO_TURN = r"no add_release of that block has been acquired by a wait_until_equal"
NO_WAIT = r"that block's add_release does not come after a tma_store_wait for the bulk store"
SOURCE_ALONE = r"tma_store_wait_read has waited for the bulk store's source alone, and no tma_store_wait for its compl"
NO_WRITERS_FENCE = r"no fence_async_proxy_global lies between that block's tma_store_wait and its add_release"
NO_READERS_FENCE = r"no fence_async_proxy_global lies between the wait_until_equal and this access by the async proxy"

#: kernel -> what the report has to say
BUGS = {
    "load_without_sync": UNORDERED,
    "store_without_sync": UNORDERED,
    "lanes_without_sync_warp": UNORDERED,
    "shuffle_orders_no_memory": r"RACE: load_shared .* write of thread \d+ \(warp 0\)",
    "store_after_many_readers": r"thread 127, .*RACE: store_shared .* is not ordered after the read of thread",
    "store_after_arrival": UNORDERED,
    "shared_out_of_range": r"store_shared: bytes 1024 to 1027 of shared memory, which has 1024",
    "shared_misaligned": r"load_shared: shared address \d+ is not a multiple of 16",
    "too_much_shared_memory": r"launch: 232464 bytes of shared memory, more than the 232448 of a block",
    "global_out_of_range": r"thread 31, .*store_global: 4 bytes .* that reach 4 bytes past the end of .* 16384",
    "copy_of_nothing_misaligned": r"copy_async_16: global address 0x\w+ is not a multiple of 16",
    "global_misaligned": r"load_global: global address 0x\w+ is not a multiple of 16",
    "global_read_only": r"store_global: to a buffer in global memory that the kernel is only to read",
    "raw_access_to_global": r"thread \d+, .*access to memory past the primitives",
    "raw_access_to_shared": r"thread \d+, .*access to memory past the primitives",
    "stack_overflow": r"thread \d+, .*stack overflowed",
    "spinning_on_another_block": r"load_global: .* again and again. Nobody else runs",
    "blocks_write_the_same": r"block 1, .*RACE: store_global to global memory that block number 0 .* writes too",
    "blocks_add_to_the_same": r"block 1, .*RACE: atomic_add to global memory that block number 0 .* also adds to: no ",
    "block_reads_what_another_wrote": r"block 1, .*RACE: load_global reads global memory that block number 0 .* wrote",
    "threads_write_the_same": r"RACE: store_global .* thread \d+ \(warp \d\) of the same block writes too: nothing",
    "thread_writes_what_another_has_read": UNORDERED_IN_GLOBAL,
    "threads_write_the_same_half": r"RACE: store_global .* thread \d+ .* of the same block writes too: nothing",
    "thread_reads_what_another_wrote": UNORDERED_IN_GLOBAL,
    "counted_before_all_have_written": r"block 1, .*load_global .*block's add_release does not come after the access"
    rf"|block 1, .*load_global .*{NO_TURN}",
    "read_by_one_that_has_not_waited": rf"block 1, .*RACE: load_global .*{NO_TURN}"
    r"|block 0, .*RACE: store_global .*",
    "written_after_it_was_counted": r"block 1, .*RACE: load_global .*that block's add_release does not come after",
    "waiting_for_a_later_block": r"(?s)block 0, .*DEADLOCK.*threads 0 wait in wait_until_equal: the counter at byte 0 "
    r"of a buffer of 64 in global memory is 0 and waited for to become 2; 2 blocks .* 1 later ones, which may be what "
    r"it waits.*block 1, .*become 1; 2 blocks",
    "sync_in_half_a_warp": r"(?s)DEADLOCK.*threads 0-15 wait in sync_threads: 16 of 32 lanes of warp 0 arrived",
    "sync_in_a_part_of_the_block": r"(?s)DEADLOCK.*threads 0-63 wait in sync_threads: 0: 64 of 96 threads arrived",
    "barriers_of_different_number": r"(?s)DEADLOCK.*threads 0-31 wait in barrier_sync: 1: 32 .*threads 32-63 .* 2: 32",
    "barrier_with_different_counts": r"barrier_sync: (64|96) threads at barrier 1, at which others expect (64|96)",
    "arrival_that_nobody_waits_for": r"the block ended with barrier 1: 32 of 64 threads arrived",
    "shuffle_in_half_a_warp": r"(?s)DEADLOCK.*threads 0-15 wait in shuffle_xor: 16 of 32 lanes of warp 0 arrived",
    "lanes_in_different_operations": r"DIVERGENCE: \w+, while \d+ other lanes of the warp are in \w+",
    "mbarrier_not_waited_for": UNORDERED,
    "mbarrier_without_init": r"mbarrier_arrive: there is no initialised mbarrier at shared offset 0",
    "mbarrier_initialised_twice": r"mbarrier_init: the mbarrier at shared offset 0 is already initialised",
    "mbarrier_init_without_sync": r"mbarrier_arrive(: there is no initialised| .* not ordered after the mbarrier_init)",
    "mbarrier_wrong_parity": r"(?s)DEADLOCK.*threads 0-63 wait in mbarrier_wait for parity 1 .*: 1 phases complete",
    "mbarrier_too_many_arrivals": r"mbarrier_arrive at shared offset 0: more than the 2 arrivals of a phase",
    "store_over_an_mbarrier": r"RACE: store_shared at shared offset 4 touches an mbarrier, initialised by thread 0",
    "bytes_that_never_come": r"ended with the mbarrier .* in the middle of a phase: .* 16 bytes are missing",
    "copy_read_before_its_wait": r"RACE: load_shared .* touches the destination of a copy in flight, issued by thread",
    "copy_wait_too_weak": r"RACE: load_shared .* touches the destination of a copy in flight, issued by thread",
    "copy_of_another_thread_without_sync": r"RACE: load_shared .*(copy in flight|not ordered after the write of thread)"
    r"|RACE: copy_async_16 .* not ordered after the read of thread",
    "copy_without_a_wait": r"the thread ended before its copy_async_16 were waited for",
    "tma_load_not_waited_for": r"RACE: load_shared .*(copy in flight, issued|after the write of) (by )?a TMA load"
    r"|RACE: tma_load .* is not ordered after the read of thread",
    "tma_load_that_nobody_waits_for": r"no thread has waited for the last TMA load of the mbarrier at shared",
    "tma_load_wrong_mbarrier_waited_for": r"RACE: load_shared .* (in flight, issued by|after the write of) a TMA load",
    "tma_without_fence_mbarrier_init": r"uses the mbarrier at shared offset 1024, and no fence_mbarrier_init follows",
    "tma_over_what_is_still_read": r"RACE: tma_load .* is not ordered after the read of thread"
    r"|RACE: load_shared .* touches the destination of a copy in flight"
    r"|the phase after the one waited for completed too",
    "tma_store_without_proxy_fence": r"RACE: tma_store .* no fence_async_proxy lies between it and the write of thread",
    "tma_store_source_overwritten": r"RACE: store_shared .* is not ordered after the read of a bulk store of warp 0",
    "tma_store_without_a_wait": r"thread 0, .*the thread ended before its tma stores were waited for",
    "tma_misaligned": r"tma_load: shared address \d+ is not a multiple of 1024",
    "tma_misaligned_for_rows_of_64_bytes": r"tma_load: shared address \d+ is not a multiple of 512",
    "tma_store_before_the_tensor": r"tma_store: coordinate 1 is -5: only a box that is read may begin before",
    "tma_reduce_before_the_tensor": r"tma_reduce_add: coordinate 3 is -1: only a box that is read may begin before",
    "tma_begins_within_a_chunk": r"tma_load: coordinate 0 is 2, which is 8 bytes, not a multiple of 16",
    "tma_expects_half_the_bytes": r"DEADLOCK|ended with the mbarrier .* in the middle of a phase: .* -512 bytes",
    "sums_without_a_turn": rf"RACE: bulk_\w+ to global memory that block number \d .*: {NO_TURN}",
    "sums_with_the_same_turn": rf"RACE: bulk_\w+ .*: {NO_TURN}"
    r"|(?s:DEADLOCK.* is 1 and waited for to become 0, which it has passed)",
    "sums_with_a_turn_too_late": r"(?s)block 0, .*DEADLOCK.* is 0 and waited for to become 1; .*block 1, .* become 2; ",
    "sums_not_counted": r"(?s)block 2, .*DEADLOCK.* is 1 and waited for to become 2$",
    "sums_without_fence_before": rf"block 1, .*RACE: bulk_reduce_add_f32 .*block number 0 .*: {NO_READERS_FENCE}",
    "sums_without_a_wait": rf"block 1, .*RACE: bulk_reduce_add_f32 .*block number 0 .* writes too: {NO_WAIT}",
    "sums_whose_source_is_waited_for": rf"block 1, .*RACE: bulk_reduce_add_f32 .*block number 0 .*: .*{SOURCE_ALONE}",
    "sums_without_fence_after": rf"block 1, .*RACE: bulk_reduce_add_f32 .*block number 0 .*: {NO_WRITERS_FENCE}",
    "sums_from_the_last_block_on": r"(?s)block 0, .*DEADLOCK.* become 2; 2 blocks run .* 1 later ones, which may",
    "box_not_fenced_by_its_writer": rf"block 1, .*RACE: load_global reads .* block number 0 .*: {NO_WRITERS_FENCE}",
    "box_not_complete": rf"block 1, .*RACE: load_global reads .* block number 0 .*: .*{SOURCE_ALONE}",
    "box_not_fenced_before_a_bulk_load": rf"block 1, .*RACE: bulk_load reads .* block number 0 .*: {NO_READERS_FENCE}",
    "box_not_fenced_before_tma": rf"block 1, .*RACE: tma_load reads .* block number 0 .*: {NO_READERS_FENCE}",
    "sum_onto_stored_values_without_fence": rf"block 1, .*RACE: bulk_reduce_add_f32 .* writes too: {NO_READERS_FENCE}",
    "fence_of_another_thread": rf"block 1, 0, 0; thread 32, .*RACE: bulk_reduce_add_f32 .*: {NO_READERS_FENCE}",
    "own_bulk_store_read_too_early": r"RACE: load_global .* a bulk store of warp 0 of the same block .* no tma_store_w",
    "own_sums_in_any_order": r"RACE: bulk_reduce_add_f32 .* a bulk store of warp 0 of the same block also adds to: no",
    "slot_without_fence_of_its_reader": r"RACE: bulk_store .* no fence_async_proxy lies between it and the write of",
    "slot_freed_too_early": r"RACE: store_shared .* is not ordered after the read of a bulk store of warp 1",
    "wgmma_not_fenced_by_its_reader": r"RACE: wgmma_ss .* no fence_async_proxy lies between it and the write of thread",
    "wgmma_fenced_before_its_wait": r"RACE: wgmma_ss .* no fence_async_proxy lies between it and the write of thread",
    "wgmma_accumulates_onto_forgotten_registers": r"wgmma_ss: accumulates onto register 0 of thread 0, which was forg",
    "registers_forgotten_in_flight": r"forget_registers: of accumulators that are in flight",
    "wgmma_without_proxy_fence": r"RACE: wgmma_ss .* no fence_async_proxy lies between it and the write of thread",
    "wgmma_without_fence": r"wgmma_ss: no wgmma_fence since the last commit or wait",
    "wgmma_second_group_without_fence": r"wgmma_ss: no wgmma_fence since the last commit or wait",
    "wgmma_accumulators_touched": r"thread 0 wrote accumulator 0 while it was in flight",
    "wgmma_accumulators_touched_in_a_chain": r"thread 0 wrote accumulator 0 while it was in flight",
    "wgmma_operand_registers_touched": r"wgmma_rs: thread 0 changed the registers of a while it was in flight",
    "wgmma_source_overwritten": r"RACE: store_shared .* is not ordered after the read of wgmma of warpgroup 0",
    "wgmma_wait_is_of_a_warp": r"RACE: store_shared .* is not ordered after the read of wgmma of warpgroup 0",
    "wgmma_without_a_wait": r"the block ended with wgmma in flight",
    "wgmma_with_different_descriptors": r"wgmma_ss: the threads of the warpgroup have different descriptors",
    "wgmma_in_an_incomplete_warpgroup": r"wgmma_fence: the block has 160 threads, so that this warpgroup is incomplete",
    "wgmma_descriptor_within_the_swizzle": r"wgmma_ss: a descriptor starts at .*, within the 1024 bytes",
    "wgmma_descriptor_within_the_swizzle_of_64_bytes": r"wgmma_ss: a descriptor starts at .*, within the 512 bytes",
    "registers_above_budget": r"(?s)DEADLOCK.*increase_registers: a warpgroup wants 240 registers a thread",
    "registers_of_one_warp": r"the block ended with 256 registers a thread in warp 1 and 24 in warp 0",
    "registers_increased_by_a_decrease": r"decrease_registers: to 240, from 168 registers",
}


@pytest.fixture(scope="module")
def detectors(builder: Builder) -> Library:
    return builder.library([Path(__file__).parent / "detectors.cu"])


def run(detectors: Library, kernel: str, seed: int = 0, **options) -> torch.Tensor:
    """Runs a kernel of detectors.cu with fresh memory, and returns the 4096 floats that the kernel may write."""
    detectors.start(seed, **options)
    memory = torch.zeros(4096)
    detectors.call(
        "detect",
        kernel.encode(),
        detectors.buffer(memory, is_writable=True),
        detectors.buffer(torch.zeros(1024)),
        detectors.buffer(torch.zeros(16, dtype=torch.int32), is_writable=True),
    )
    return memory


@pytest.mark.parametrize("kernel", CORRECT)
def test_nothing_is_reported_without_a_bug(detectors, kernel):
    for seed in SEEDS:
        run(detectors, kernel, seed)


@pytest.mark.parametrize("kernel", BUGS)
def test_bug_is_reported(detectors, kernel):
    for seed in SEEDS:
        with pytest.raises(EmulationError) as error:
            run(detectors, kernel, seed)
        assert re.search(BUGS[kernel], str(error.value)), f"seed {seed}: {error.value}"


def test_every_kernel_is_run(detectors):
    """No kernel of detectors.cu is missing in the lists of this file."""
    source = (Path(__file__).parent / "detectors.cu").read_text()
    kernels = set(re.findall(r"^(?:KERNEL|ADD_IN_TURN|HAND_OVER)\((\w+),", source, re.MULTILINE))
    assert kernels == {*CORRECT, *BUGS, *CYCLES}


def test_turns_alternate(detectors):
    for seed in SEEDS:
        assert run(detectors, "ping_pong", seed)[:8].tolist() == [1, 2] * 4


def test_blocks_side_by_side_share_the_work(detectors):
    assert set(run(detectors, "work_by_a_counter")[:12].tolist()) == {1, 2}
    assert set(run(detectors, "work_by_a_counter", resident_blocks=3)[:12].tolist()) == {1, 2, 3}
    assert set(run(detectors, "work_by_a_counter", resident_blocks=1)[:12].tolist()) == {1}


def test_sums_are_in_turn(detectors):
    """Blocks may wait for blocks that start later, if all of them are resident at the same time."""
    for seed in SEEDS:
        assert run(detectors, "sums_in_turn", seed, resident_blocks=1)[:32].tolist() == [3] * 32
        assert run(detectors, "sums_from_the_last_block_on", seed, resident_blocks=3)[:32].tolist() == [3] * 32


@pytest.mark.parametrize("timing", [EARLY, LATE])
def test_what_a_bulk_store_has_read_is_what_it_writes(detectors, timing):
    assert run(detectors, "source_reused_after_wait_read", timing=timing)[:64].tolist() == [1] * 64


def test_forgotten_registers_are_nan(detectors):
    assert run(detectors, "forgotten_registers")[:32].isnan().all()
    assert run(detectors, "forgotten_registers", poison=False)[:32].tolist() == [2] * 32


def test_schedules_are_drawn_from_the_seed(detectors):
    def first_race(seed: int) -> str:
        """The report of the race that this seed finds."""
        with pytest.raises(EmulationError) as error:
            run(detectors, "load_without_sync", seed)
        return str(error.value)

    races = [first_race(seed) for seed in SEEDS]
    assert races == [first_race(seed) for seed in SEEDS]
    assert len(set(races)) > 1


def test_relaxed_wgmma_completion(detectors):
    run(detectors, "wgmma_wait_is_of_a_warp", strict_wgmma=False)


def test_races_pass_unseen_when_told_so(detectors):
    run(detectors, "load_without_sync", race_detection=False)


def test_sums_in_any_order_when_told_so(detectors):
    run(detectors, "blocks_add_to_the_same", ordered_sums=False)


def test_fewer_registers_at_launch(detectors):
    with pytest.raises(EmulationError, match="a warpgroup wants 240 registers"):
        run(detectors, "registers_within_budget", registers_per_thread=160)
    with pytest.raises(EmulationError, match="384 threads of 176 registers are more than the 65536"):
        run(detectors, "registers_within_budget", registers_per_thread=170)


def test_an_error_leaves_nothing_behind(detectors):
    """After a launch that ended with a fault, the next launch works."""
    for kernel in ("raw_access_to_global", "stack_overflow", "sync_in_half_a_warp"):
        with pytest.raises(EmulationError):
            run(detectors, kernel)
        run(detectors, "ordered_exchange")


#: kernel -> (cycles that its one access to shared memory takes, cycles that it would take without bank conflicts)
CYCLES = {
    "consecutive_words": (1, 1),
    "words_128_bytes_apart": (32, 1),
    "vectors_64_bytes_apart": (16, 4),
    "matrix_rows_128_bytes_apart": (32, 4),
    "matrix_rows_swizzled": (4, 4),
}


@pytest.mark.parametrize("kernel", CYCLES)
def test_bank_conflicts(detectors, kernel):
    run(detectors, kernel, count_bank_conflicts=True)
    statistics = detectors.statistics
    assert statistics.shared_accesses == 1
    assert (statistics.shared_wavefronts, statistics.ideal_wavefronts) == CYCLES[kernel]
