"""Compares what each primitive does with layouts from another source (cute.py).

The primitives run in the emulation, and on a GPU if there is one.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import cute
import emulator
import gpu
import pytest
import torch
from emulator import EARLY, LATE, EmulationError

KERNELS = Path(__file__).parent / "fragments.cu"
DTYPES = {True: torch.bfloat16, False: torch.float16}


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def fragments(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> emulator.Library | gpu.GpuLibrary:
    """The kernels of fragments.cu, as a library for the emulation or for the GPU."""
    if request.param == "gpu":
        return gpu.library(KERNELS, tmp_path_factory)
    return request.getfixturevalue("builder").library([KERNELS])


@pytest.fixture(autouse=True)
def fresh(fragments: emulator.Library | gpu.GpuLibrary) -> None:
    """Before each test: default options, and the same random numbers."""
    fragments.start()
    torch.manual_seed(0)


def small_integers(*shape: int) -> torch.Tensor:
    """Random integers. Their products, and sums of these, are exact in every dtype of the tests, whatever the order."""
    return torch.randint(-4, 5, shape).float()


def gather(matrix: torch.Tensor, layout: cute.Layout) -> torch.Tensor:
    """The registers of all threads, [thread][value], that hold a matrix in this layout."""
    threads, values = layout.sizes
    flat = matrix.t().reshape(-1)  # column-major
    return torch.stack([torch.stack([flat[layout(t, v)] for v in range(values)]) for t in range(threads)])


def scatter(fragment: torch.Tensor, layout: cute.Layout, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `gather`: the matrix that the registers `fragment` [thread][value] hold."""
    flat = torch.full((rows * columns,), float("nan"))
    for t in range(fragment.shape[0]):
        for v in range(fragment.shape[1]):
            flat[layout(t, v)] = fragment[t, v]
    return flat.reshape(columns, rows).t()


def as_pairs(fragment: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Packs [thread][value] to registers [thread][register] of two 16-bit values. The first value is the lower half."""
    return fragment.to(dtype).contiguous().view(torch.int32)


@pytest.mark.parametrize("is_bf16", [True, False])
def test_mma(fragments, is_bf16):
    a, b, c = small_integers(16, 16), small_integers(16, 8), small_integers(16, 8)
    registers_a = as_pairs(gather(a, cute.MMA_A), DTYPES[is_bf16])
    registers_b = as_pairs(gather(b.t(), cute.MMA_B), DTYPES[is_bf16])
    sums = gather(c, cute.MMA_C)
    fragments.call(
        "mma", is_bf16, *map(fragments.buffer, (registers_a, registers_b)), fragments.buffer(sums, is_writable=True)
    )
    assert torch.equal(scatter(sums, cute.MMA_C, 16, 8), a @ b + c)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_load_matrix(fragments, matrices, is_transposed):
    stored = torch.arange(32 * 8, dtype=torch.int16).reshape(4, 8, 8)  # matrix, row, column
    rows = torch.randperm(32)  # where each row lies in shared memory
    image = torch.empty(32, 8, dtype=torch.int16)
    image[rows] = stored.reshape(32, 8)
    offsets = (16 * rows).int()
    registers = torch.zeros(32, matrices, dtype=torch.int32)
    fragments.call(
        "load_matrix",
        matrices,
        is_transposed,
        fragments.buffer(image),
        image.numel() * 2,
        fragments.buffer(offsets),
        fragments.buffer(registers, is_writable=True),
    )
    got = registers.view(torch.int16).reshape(32, matrices, 2)
    for lane in range(32):
        for matrix in range(matrices):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                expected = stored[matrix, column, row] if is_transposed else stored[matrix, row, column]
                assert got[lane, matrix, half] == expected


@pytest.mark.parametrize("is_transposed", [False, True])
def test_store_matrix(fragments, is_transposed):
    stored = torch.arange(32 * 8, dtype=torch.int16).reshape(4, 8, 8)
    rows = torch.randperm(32)
    offsets = (16 * rows).int()
    registers = torch.empty(32, 4, 2, dtype=torch.int16)
    for lane in range(32):
        for matrix in range(4):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                registers[lane, matrix, half] = (
                    stored[matrix, column, row] if is_transposed else stored[matrix, row, column]
                )
    image = torch.full((32, 8), -1, dtype=torch.int16)
    fragments.call(
        "store_matrix",
        is_transposed,
        fragments.buffer(registers),
        fragments.buffer(offsets),
        fragments.buffer(image, is_writable=True),
        image.numel() * 2,
    )
    assert torch.equal(image[rows], stored.reshape(32, 8))


# ---- wgmma

STEPS = 8  # products of 16 along k, together a head dim of 128


def operand(
    matrix: torch.Tensor, is_mn_major: bool, start: int, row_bytes: int = 128
) -> tuple[dict[int, torch.Tensor], list[int], int]:
    """A matrix (mn, 128) as TMA would write it to shared memory from the address `start` on, in boxes with rows of
    `row_bytes` bytes, 128 or 64, swizzled by as many.

    Returns {address: element}, the descriptors of the steps along k, and the address after the last byte.
    """
    mn, k = matrix.shape
    places, descriptors = {}, []
    width, stride = row_bytes // 2, 8 * row_bytes
    if is_mn_major:  # boxes of `width` along mn and all of k
        leading = row_bytes * k
        starts = [start + step * 16 * row_bytes for step in range(STEPS)]
        layout = cute.mn_major(leading, stride, mn, row_bytes)
        end = start + leading * -(-mn // width)
    else:  # boxes of all of mn and `width` along k
        leading = 0
        starts = [start + 16 * step // width * row_bytes * mn + 16 * step % width * 2 for step in range(STEPS)]
        layout = cute.k_major(stride, mn, row_bytes)
        end = start + 2 * k * mn
    for step, at in enumerate(starts):
        for i in range(mn):
            for j in range(16):
                places[cute.swizzle(at + 2 * layout(i, j), row_bytes)] = matrix[i, 16 * step + j]
        descriptors.append({128: 1, 64: 2}[row_bytes] << 62 | (stride >> 4) << 32 | (leading >> 4) << 16 | at >> 4)
    return places, descriptors, end


def run_wgmma(fragments, is_bf16, n, trans_a, trans_b, is_a_in_registers=False, row_bytes=(128, 128)):
    """Multiplies a (64, 128) by the transpose of b (n, 128) with wgmma, and compares the result with torch."""
    dtype = DTYPES[is_bf16]
    a, b = small_integers(64, 128), small_integers(n, 128)
    places, a_descriptors, end = ({}, [0] * STEPS, 0) if is_a_in_registers else operand(a, trans_a, 0, row_bytes[0])
    b_places, b_descriptors, end = operand(b, trans_b, end, row_bytes[1])
    image = torch.full((end // 2,), float("nan"), dtype=dtype)
    for byte, value in (places | b_places).items():
        image[byte // 2] = value
    registers = None
    if is_a_in_registers:
        steps = [as_pairs(gather(a[:, 16 * step : 16 * step + 16], cute.WGMMA_A), dtype) for step in range(STEPS)]
        registers = torch.stack(steps)
    d = torch.zeros(128, n // 2)
    fragments.call(
        "wgmma",
        is_bf16,
        n,
        trans_a,
        trans_b,
        fragments.buffer(image),
        2 * image.numel(),
        fragments.buffer(registers),
        fragments.buffer(torch.tensor(a_descriptors, dtype=torch.uint64)),
        fragments.buffer(torch.tensor(b_descriptors, dtype=torch.uint64)),
        STEPS,
        fragments.buffer(d, is_writable=True),
    )
    assert torch.equal(scatter(d, cute.wgmma_c(n), 64, n), a @ b.t())


@pytest.mark.parametrize("n", [64, 80, 96, 128, 176, 192, 256])
@pytest.mark.parametrize("trans_b", [False, True])
def test_wgmma_widths(fragments, n, trans_b):
    run_wgmma(fragments, True, n, False, trans_b)


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("trans_a", [False, True])
@pytest.mark.parametrize("timing", [EARLY, LATE])
def test_wgmma_transposition(fragments, timing, trans_a, trans_b):
    fragments.start(timing=timing)
    run_wgmma(fragments, False, 128, trans_a, trans_b)


@pytest.mark.parametrize("n, trans_a, trans_b", [(32, False, True), (64, False, False), (64, True, True)])
@pytest.mark.parametrize("row_bytes", [(64, 128), (128, 64), (64, 64)], ids=str)
def test_wgmma_of_panels_of_32_columns(fragments, row_bytes, n, trans_a, trans_b):
    """The fused backward multiplies keys in such panels: as the left factor of scores, and as the right one of dq."""
    run_wgmma(fragments, True, n, trans_a, trans_b, row_bytes=row_bytes)


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("n, is_bf16", [(64, True), (128, False), (256, True)])
def test_wgmma_from_registers(fragments, n, is_bf16, trans_b):
    run_wgmma(fragments, is_bf16, n, False, trans_b, is_a_in_registers=True)


@pytest.mark.parametrize(
    "leading, stride, expected",
    [
        # What Triton emits for 128 x 128 operands on sm_90. The first row is for q and k, contiguous along k of the
        # product. The second row is for v, contiguous along n.
        (0, 1024, 0x4000004000000000),
        (16384, 1024, 0x4000004004000000),
    ],
)
@pytest.mark.parametrize("offset", [0, 32, 64, 96, 2048, 8192, 16384, 16384 + 32])  # of Triton's steps along k, m
def test_descriptors_are_those_of_triton(fragments, leading, stride, expected, offset):
    out = torch.zeros(1, dtype=torch.int64)
    fragments.call("descriptor", offset, leading, stride, fragments.buffer(out, is_writable=True))
    assert out.item() == expected + (offset >> 4)


# ---- TMA

ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
LOAD, STORE, REDUCE = range(3)


def run_tma(fragments, operation, tensor, box, swizzle, coordinates, image):
    """Runs one TMA operation. `tensor` has dimensions [c3][c2][c1][c0]; `box` and `coordinates` begin with c0."""
    fragments.call(
        "tma",
        operation,
        fragments.buffer(tensor, is_writable=operation != LOAD),
        ELEMENTS[tensor.dtype],
        (ctypes.c_int64 * 4)(*reversed(tensor.shape)),
        (ctypes.c_int64 * 4)(*(stride * tensor.element_size() for stride in reversed(tensor.stride()))),
        (ctypes.c_int * 4)(*box),
        swizzle,
        (ctypes.c_int * 4)(*coordinates),
        fragments.buffer(image, is_writable=operation == LOAD),
        image.numel() * image.element_size(),
    )


def box_of(tensor: torch.Tensor, box: list[int], coordinates: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The contents (rows, columns) of a box, with zeros outside of the tensor, and which elements are inside of it."""
    rows, inside = [], []
    for c3 in range(coordinates[3], coordinates[3] + box[3]):
        for c2 in range(coordinates[2], coordinates[2] + box[2]):
            for c1 in range(coordinates[1], coordinates[1] + box[1]):
                at = [(c3, c2, c1, c0) for c0 in range(coordinates[0], coordinates[0] + box[0])]
                inside.append([all(0 <= i < size for i, size in zip(i4, tensor.shape, strict=True)) for i4 in at])
                rows.append([tensor[i4] if ok else 0.0 for i4, ok in zip(at, inside[-1], strict=True)])
    return torch.tensor(rows, dtype=tensor.dtype), torch.tensor(inside)


def swizzled(rows: torch.Tensor, swizzle: int) -> torch.Tensor:
    """The bytes of shared memory that hold the rows of a box.

    A swizzle of 128 bytes permutes chunks by three bits of the address, one of 64 bytes by two, one of 32 bytes by one.
    """
    mask = {0: 0, 32: 0b001, 64: 0b011, 128: 0b111}[swizzle]
    data = rows.contiguous().view(torch.uint8).reshape(-1, 16)
    image = torch.empty_like(data)
    for chunk in range(len(data)):
        image[chunk ^ (chunk >> 3 & mask)] = data[chunk]
    return image.view(rows.dtype).reshape(-1)


BOXES = [
    (torch.bfloat16, [64, 16, 1, 1], 128, [0, 0, 0, 0]),
    (torch.bfloat16, [64, 16, 1, 1], 128, [64, 8, 1, 1]),
    (torch.float16, [32, 8, 2, 1], 64, [0, 4, 0, 1]),
    (torch.float16, [16, 8, 1, 2], 32, [16, 0, 1, 0]),
    (torch.float32, [8, 4, 1, 1], 0, [4, 2, 1, 1]),
    (torch.float32, [32, 4, 1, 1], 128, [0, 2, 1, 1]),
    (torch.bfloat16, [64, 16, 1, 1], 128, [0, 15, 1, 1]),  # beyond the last row
    (torch.bfloat16, [64, 16, 1, 1], 128, [32, 0, 0, 1]),  # beyond the last column
    (torch.bfloat16, [64, 16, 1, 1], 128, [0, 0, 2, 0]),  # no such head: nothing but zeros
]
#: Boxes that begin before the tensor, which may be read and not be written.
BOXES_BEFORE = [
    (torch.bfloat16, [64, 16, 1, 1], 128, [0, -5, 0, 0]),
    (torch.float32, [32, 4, 1, 1], 128, [0, -3, 1, 1]),
    (torch.bfloat16, [64, 16, 1, 1], 128, [-32, 0, 0, 0]),
    (torch.bfloat16, [64, 16, 1, 2], 128, [0, 0, 1, -1]),
]


def tensor_of(dtype: torch.dtype) -> torch.Tensor:
    return small_integers(2, 2, 20, 80 if dtype != torch.float32 else 32).to(dtype)


@pytest.mark.parametrize("dtype, box, swizzle, coordinates", [*BOXES, *BOXES_BEFORE])
def test_tma_load(fragments, dtype, box, swizzle, coordinates):
    tensor = tensor_of(dtype)
    rows, _ = box_of(tensor, box, coordinates)
    image = torch.full((rows.numel(),), float("nan"), dtype=dtype)
    run_tma(fragments, LOAD, tensor, box, swizzle, coordinates, image)
    assert torch.equal(image, swizzled(rows, swizzle))


@pytest.mark.parametrize("operation", [STORE, REDUCE], ids=["store", "reduce"])
@pytest.mark.parametrize("dtype, box, swizzle, coordinates", BOXES)
def test_tma_write(fragments, operation, dtype, box, swizzle, coordinates):
    tensor = tensor_of(dtype)
    rows, inside = box_of(tensor, box, coordinates)
    written, target = small_integers(*rows.shape).to(dtype), tensor.clone()
    run_tma(fragments, operation, target, box, swizzle, coordinates, swizzled(written, swizzle))
    expected = torch.where(inside, written + rows if operation == REDUCE else written, 0)
    assert torch.equal(box_of(target, box, coordinates)[0], expected)
    # Nothing outside of the box has changed: after the box is restored, the tensor is as it was.
    fragments.start()
    run_tma(fragments, STORE, target, box, swizzle, coordinates, swizzled(rows, swizzle))
    assert torch.equal(target, tensor)


def run_tma_on_the_gpu(path, *arguments):
    run_tma(gpu.GpuLibrary(path), *arguments)


@pytest.mark.parametrize(
    "operation, dtype, box, swizzle, coordinates, message",
    [
        *(
            pytest.param(operation, *box, r"only a box that is read may begin before the tensor", id=f"{name}-{box[3]}")
            for operation, name in ((STORE, "store"), (REDUCE, "reduce"))
            for box in BOXES_BEFORE
        ),
        *(
            pytest.param(
                operation, torch.bfloat16, [64, 16, 1, 1], 128, [4, 0, 0, 0],
                r"coordinate 0 is 4, which is 8 bytes, not a multiple of 16", id=f"{name}-unaligned",
            )
            for operation, name in ((LOAD, "load"), (STORE, "store"), (REDUCE, "reduce"))
        ),
    ],
)  # fmt: skip
def test_boxes_that_the_hardware_refuses(fragments, operation, dtype, box, swizzle, coordinates, message):
    tensor = tensor_of(dtype)
    image = torch.zeros_like(box_of(tensor, box, [0, 0, 0, 0])[0]).reshape(-1)
    arguments = (operation, tensor, box, swizzle, coordinates, image)
    if isinstance(fragments, gpu.GpuLibrary):
        error = gpu.error_in_another_process(run_tma_on_the_gpu, fragments.path, *arguments)
        assert "illegal instruction" in error
    else:
        with pytest.raises(EmulationError, match=message):
            run_tma(fragments, *arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stride": 81}, r"dimension 1: stride of 162 bytes, expected a multiple of 16"),
        ({"box": [64, 257, 1, 1]}, r"dimension 1: box of 257, expected 1 to 256"),
        ({"box": [4, 8, 1, 1]}, r"rows have 8 bytes, expected a multiple of 16"),
        ({"box": [72, 8, 1, 1]}, r"rows have 144 bytes, more than the swizzle's span of 128"),
        ({"swizzle": 256}, r"swizzle of 256 bytes"),
        ({"offset": 1}, r"address is not a multiple of 16"),
    ],
)
def test_tensor_maps_that_the_hardware_refuses(fragments, change, message):
    if "offset" in change and isinstance(fragments, gpu.GpuLibrary):
        pytest.skip("what is copied to the GPU is aligned there")
    memory = torch.zeros(2 * 2 * 20 * 81 + 8, dtype=torch.bfloat16)
    columns = change.get("stride", 80)
    tensor = memory[change.get("offset", 0) :].as_strided((2, 2, 20, 80), (40 * columns, 20 * columns, columns, 1))
    image = torch.zeros(64 * 8, dtype=torch.bfloat16)
    with pytest.raises(EmulationError, match=message):
        run_tma(
            fragments, LOAD, tensor, change.get("box", [64, 8, 1, 1]), change.get("swizzle", 128), [0, 0, 0, 0], image
        )


@pytest.mark.parametrize("operation", [STORE, REDUCE])
@pytest.mark.parametrize("first, count", [(0, 64), (4, 4), (20, 40)])
def test_bulk_copies(fragments, operation, first, count):
    """A bulk copy moves all of its bytes and no others, from any multiple of 16 bytes on."""
    source, destination = small_integers(count), small_integers(64)
    expected = destination.clone()
    expected[first : first + count] = source + (destination[first : first + count] if operation == REDUCE else 0)
    whole = fragments.buffer(destination, is_writable=True)
    fragments.call("bulk", operation, fragments.buffer(source), ctypes.c_void_p(whole.value + 4 * first), 4 * count)
    assert torch.equal(destination, expected)


def test_the_source_of_a_bulk_store_is_free_once_it_is_read(fragments):
    rows = torch.full((20, 32), float("nan"))
    fragments.call("reused_source", fragments.buffer(rows, is_writable=True), len(rows))
    assert torch.equal(rows, torch.arange(20 * 32.0).view(20, 32))


@pytest.mark.parametrize("seed", range(3))
def test_sums_in_a_fixed_order(fragments, seed):
    """The sums are equal, bit by bit, to additions in the order of the turns, whichever block runs first."""
    blocks = 16
    fragments.start(seed, resident_blocks=blocks)
    rows = torch.randn(blocks, 32) * 10.0 ** torch.arange(-3, 5).repeat(2)[:, None]
    order = torch.randperm(blocks)
    turns = torch.empty(blocks, dtype=torch.int32)
    turns[order] = torch.arange(blocks, dtype=torch.int32)
    sums = torch.full((32,), float("nan"))
    fragments.call(
        "ordered_sums",
        blocks,
        fragments.buffer(rows),
        fragments.buffer(turns),
        fragments.buffer(sums, is_writable=True),
        fragments.buffer(torch.zeros(1, dtype=torch.int32), is_writable=True),
    )
    expected = rows[order[0]].clone()
    for block in order[1:]:
        expected += rows[block]
    assert torch.equal(sums, expected)
    assert not torch.equal(rows.sum(0), expected)  # so the test would notice another order


@pytest.mark.parametrize("is_bf16", [True, False])
def test_arithmetic(fragments, is_bf16):
    x = torch.randn(32) * 8
    x[:4] = torch.tensor([0.0, 1.0, float("inf"), 70000.0])
    out = torch.zeros(11, 32, dtype=torch.int32)
    fragments.call("arithmetic", is_bf16, fragments.buffer(x), fragments.buffer(out, is_writable=True))
    floats, following = out.view(torch.float32), x.roll(-1)
    # Error bounds of the PTX manual for ex2.approx and lg2.approx: 2^-22, relative (lg2: outside of [0.5, 2]).
    torch.testing.assert_close(floats[0], x.double().exp2().float(), rtol=2**-21, atol=0)
    positive = x > 0
    torch.testing.assert_close(floats[1][positive], x[positive].log2(), rtol=2**-21, atol=2**-21)
    low, high = x.to(DTYPES[is_bf16]), following.to(DTYPES[is_bf16])
    assert torch.equal(out[2], torch.stack([low, high], 1).view(torch.int32).reshape(32))
    assert torch.equal(floats[3], low.float())
    assert torch.equal(floats[4], high.float())
    assert torch.equal(floats[5], x[torch.arange(32) ^ 5])
    bits = [int(b) & 0xFFFFFFFF for b in x.view(torch.int32)]
    assert [int(w) & 0xFFFFFFFF for w in out[6]] == [b * 0xD2511F53 >> 32 for b in bits]
    assert out[7].tolist() == [1] * 32  # one lane holds infinity
    assert torch.equal(floats[8], torch.maximum(x, following))
    assert floats[9:].isnan().all()
