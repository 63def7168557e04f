"""The backend of the CUDA C++ kernels (csrc/cuda), which run in half precision on NVIDIA GPUs."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_attn import architectures, driver, native
from fused_attn.attention import dropout
from fused_attn.attention.checks import MAX_SPLITS
from fused_attn.attention.inputs import SHARED, Gradients, Inputs, Results, Saved, Wanted
from fused_attn.attention.memory_order import empty_like_layout
from fused_attn.attention.problem import UNBOUNDED, AttentionProblem
from fused_attn.backends.base import clear_rows, gpu_reasons, native_numbers


def why_not_installed(error: ImportError) -> str:
    """A text for users: why ``fused_attn._cuda`` could not be imported, and what to do about it."""
    command = native.install_command(FUSED_ATTN_CUDA="ON")
    remedy = f"on a machine with an NVIDIA driver, {command} gets nvcc and builds them"
    return native.why_missing("_cuda", "nvcc", error, remedy)


try:
    import fused_attn._cuda as _kernels
except ImportError as error:
    # The package may have been installed without nvcc. The other backends work, and `info` shows this text.
    _kernels = None
    missing = why_not_installed(error)
else:
    missing = ""

name = "cuda"
is_composite = False

Tensors = TypeVar("Tensors", Inputs, Saved)

DTYPES = (torch.float16, torch.bfloat16)
#: Head dims that have kernels of their own. Another head dim runs in the next larger kernel, which reads zeros in place
#: of the missing columns. Queries of 192 columns with values of 128 have kernels, too.
HEAD_DIMS = (64, 96, 128, 256)
HEAD_DIM_STEP = 8
MIN_CAPABILITY = (8, 0)
#: The kernels for sm_90a load keys in pieces of this many rows, kLeastPieceRows of csrc/cuda/tiles.h.
PAGE_STEP = 8
#: The longest sequence, kMaxRows of csrc/cuda/params.h. Kernels count rows in 32 bits.
MAX_ROWS = 2**29


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    """Why the CUDA kernels cannot run the problem; empty if they can."""
    reasons = []
    if problem.device.type != device_type():
        reasons.append(f"the tensors are on {problem.device}, expected {device_type()}")
    elif (reason := build_reason(problem)) is not None:
        reasons.append(reason)
    reasons += gpu_reasons(problem, MIN_CAPABILITY)
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype {problem.dtype} is none of {', '.join(map(str, DTYPES))}")
    for dim in dict.fromkeys((problem.head_dim, problem.value_dim)):
        if not 0 < dim <= HEAD_DIMS[-1] or dim % HEAD_DIM_STEP != 0:
            reasons.append(f"head dim {dim} is no multiple of {HEAD_DIM_STEP} up to {HEAD_DIMS[-1]}")
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_ROWS:
        reasons.append(f"more than {MAX_ROWS} rows")
    if problem.dropout_origin.key % dropout.GROUP != 0:
        reasons.append(
            f"dropout numbers the keys from {problem.dropout_origin.key} on, expected a multiple of {dropout.GROUP}"
        )
    return reasons


def build_reason(problem: AttentionProblem) -> str | None:
    """Why this installation has no kernels for the GPU of the problem, and what to do about it; None if it has.

    Another installation would have the kernels, so `dispatch` warns if another backend runs for this reason alone.
    """
    if _kernels is None:
        return missing
    capability = problem.capability
    if problem.device.type != "cuda" or capability is None or capability < MIN_CAPABILITY:
        return None
    built = architectures.parsed(_kernels.build_info()["architectures"])
    if architectures.way_on(built, capability) is None:
        # The GPUs of capability 9.x have kernels of their own. All others run those of the setting 80.
        command = native.install_command(FUSED_ATTN_CUDA_ARCHITECTURES="90" if capability[0] == 9 else "80")
        return (
            f"the CUDA kernels have been built for {', '.join(map(str, built))}, expected sm_{capability[0]}"
            f"{capability[1]}; on the machine with the GPU, {command} builds them for it"
        )
    has_odd_pages = problem.page_size % PAGE_STEP != 0
    if has_odd_pages and _architecture(problem, key_splits(problem)) == 80 and all(x.name == "90a" for x in built):
        command = native.install_command(FUSED_ATTN_CUDA_ARCHITECTURES="80,90")
        return (
            f"the CUDA kernels have been built for {', '.join(map(str, built))} alone, expected sm_80, too, for pages "
            f"of {problem.page_size} rows, which are no multiple of {PAGE_STEP}; {command} builds both"
        )
    return _device_reason(problem)


def device_type() -> str:
    """The type of device that the kernels run on: "cuda", or "cpu" for the module in which tests emulate a GPU."""
    return getattr(_kernels, "device_type", "cuda")


def forward(problem: AttentionProblem, inputs: Inputs, needs_lse: bool, needs_max: bool) -> Results:
    """The results of the call. lse and row_max are float32, or None if they are not needed."""
    # The decode kernels know no maxima.
    splits = KeySplits(large=_large_splits(problem)) if needs_max else key_splits(problem)
    if splits.decode and inputs.key_bias is not None:
        inputs = _with_key_bias_in_bias(inputs)
    inputs = _readable_inputs(problem, inputs)
    query = inputs.query
    out = empty_like_layout(query, problem.value_dim)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if needs_lse else None
    row_max = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if needs_max else None
    results = out, lse, row_max
    has_no_keys = 0 in (inputs.key.numel(), problem.seqlen_k)
    if problem.is_packed or has_no_keys:
        clear_rows(out)
        clear_rows(lse, row_max, value=float("-inf"))
    # CUDA refuses to launch a grid without blocks.
    if has_no_keys or 0 in (out.numel(), problem.batch, problem.seqlen_q):
        return results
    workspace = _workspace(problem, inputs, wanted=None, splits=splits)
    _kernels.forward(inputs, results, _config(problem), *splits, _architecture(problem, splits), workspace)
    return results


def backward(problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients:
    """The wanted gradients, each in the shape and dtype of its input."""
    if wanted.bias and _is_bias_without_effect(problem, inputs):
        others = backward(problem, inputs, saved, wanted._replace(bias=False))
        return others._replace(bias=_gradient_by_lse_alone(inputs, saved))
    read = _readable_inputs(problem, inputs)
    saved = _readable(saved, "out", "dout")
    query, key, value = read.query, read.key, read.value
    grads = Gradients(
        empty_like_layout(query, problem.head_dim) if wanted.query else None,
        empty_like_layout(key, problem.head_dim) if wanted.key else None,
        empty_like_layout(value, problem.value_dim) if wanted.value else None,
        *(_empty_shared_gradients(inputs, wanted) if wanted.is_any_shared else ()),
    )
    # The kernels write no row that belongs to no sequence, and no row behind the length of a batch entry.
    if problem.is_packed:
        clear_rows(*grads[:3])
    elif problem.has_key_lengths:
        clear_rows(*grads[1:3])
    if 0 in (query.numel(), key.numel(), problem.batch, problem.seqlen_q, problem.seqlen_k):
        return _in_dtypes_of(inputs, Gradients(*(None if dx is None else dx.zero_() for dx in grads)))
    assert saved.lse is not None, "backward needs the lse of forward"
    saved = saved._replace(
        lse=saved.lse.contiguous(),  # under vmap, lse can be an expanded view
        dlse=None if saved.dlse is None else saved.dlse.resolve_neg(),
    )
    splits = gradient_splits(problem, query.shape[2], key.shape[2])
    workspace = _workspace(problem, read, wanted, gradient_splits=splits)
    _kernels.backward(read, saved, grads, _config(problem), *splits, _device_architecture(problem), workspace)
    return _in_dtypes_of(inputs, grads) if wanted.is_any_shared else grads


def _with_key_bias_in_bias(inputs: Inputs) -> Inputs:
    """The same call for the decode kernels, which read one dense bias: at head dim 256, they have no register left for
    a second one. There are few queries, so the sum of both biases is small.
    """
    assert inputs.key_bias is not None, "the caller has one"
    key_bias = inputs.key_bias[:, None, None]
    bias = key_bias if inputs.bias is None else inputs.bias.float() + key_bias
    return inputs._replace(bias=bias, key_bias=None)


def _is_bias_without_effect(problem: AttentionProblem, inputs: Inputs) -> bool:
    """Whether the bias moves all logits of a row alike. The softmax does not change then, and lse moves by the bias.

    The other keys of a part have other logits.
    """
    if inputs.bias is None or inputs.bias.shape[3] != 1:
        return False
    return not (problem.has_sinks or problem.is_packed or problem.is_part)


def _gradient_by_lse_alone(inputs: Inputs, saved: Saved) -> Tensor:
    """The gradient of a bias without effect on the softmax: dlse, summed to the bias's shape; 0 for empty rows.

    The kernel would find the same as a sum of rounding errors that nearly cancel.
    """
    bias, lse, dlse = inputs.bias, saved.lse, saved.dlse
    assert bias is not None and lse is not None, "the caller has asked for the gradient"
    if dlse is None:
        return torch.zeros_like(bias)
    seen = dlse.masked_fill(lse == float("-inf"), 0.0)
    return seen.sum_to_size(bias.shape[:3]).unsqueeze(3).to(bias.dtype)


def _empty_shared_gradients(inputs: Inputs, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of `SHARED`, in the shapes of the inputs. Kernels sum these gradients in float32.

    They write them as float32, too, except the one of bias. It may be as large as the scores, so it gets the dtype of
    the query if bias has this dtype.
    """

    def empty(name: str) -> Tensor | None:
        if not getattr(wanted, name):
            return None
        x, query = getattr(inputs, name), inputs.query
        dtype = query.dtype if name == "bias" and x.dtype == query.dtype else torch.float32
        return torch.empty(x.shape, dtype=dtype, device=query.device)

    return tuple(empty(name) for name in SHARED)


def _in_dtypes_of(inputs: Inputs, grads: Gradients) -> Gradients:
    """The gradients, converted to the dtypes of their inputs, if kernels have written them as float32."""
    pairs = zip(inputs, grads, strict=False)
    return Gradients(*(None if x is None or dx is None else dx.to(x.dtype) for x, dx in pairs))


def _architecture(problem: AttentionProblem, splits: KeySplits) -> int:
    """The architecture whose kernels run forward: that of the device, unless its kernels cannot load the pages."""
    loads_pages = not splits.large or problem.page_size % PAGE_STEP == 0
    return _device_architecture(problem) if loads_pages else 80


def _device_architecture(problem: AttentionProblem) -> int:
    """The architecture of the fastest kernels: 90 on compute capability 9.0 if the binary has them, else 80.

    The kernels for 90 (sm_90a) use instructions that only Hopper has. The kernels for 80 run on every later GPU.
    """
    return 90 if problem.capability == (9, 0) and _has_hopper_kernels() else 80


@functools.cache
def _has_hopper_kernels() -> bool:
    """Whether the binary has the kernels for sm_90a."""
    return any(built.name == "90a" for built in architectures.parsed(_kernels.build_info()["architectures"]))


def _device_reason(problem: AttentionProblem) -> str | None:
    """Why the kernels cannot run on the GPU of the problem.

    None means that they can, or that nobody can know: the GPU that the problem describes is not in this machine.
    """
    if problem.device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if problem.device.index is None else problem.device.index
    is_here = index < torch.cuda.device_count() and torch.cuda.get_device_capability(index) == problem.capability
    return _unusable_reason(index) if is_here else None


@functools.cache
def _unusable_reason(index: int) -> str | None:
    """Why the driver cannot load the kernels on GPU number `index`, or None. The driver is asked once.

    A driver refuses kernels if it is older than the nvcc that has built them.
    """
    with torch.cuda.device(index):  # torch restores the current device, also where the process has no context
        reason = _kernels.unusable_reason(index)
    if not reason:
        return None
    return (
        f"the driver refuses the CUDA kernels: {reason} (driver: {driver.driver()}; the kernels were built by "
        f"{_kernels.build_info()['compiler']}); update the driver, or build the kernels with an nvcc that the driver "
        f"supports: {native.install_command()} on this machine"
    )


def _readable_inputs(problem: AttentionProblem, inputs: Inputs) -> Inputs:
    """The inputs in the form that kernels read.

    query, key and value are as `_readable` returns them. bias has the dtype of the problem or float32, with any
    strides. The other `inputs.SHARED` are contiguous float32.
    """
    inputs = _readable(inputs, "query", "key", "value")
    if inputs.key_lengths is not None:
        table = inputs.block_table
        table = None if table is None else table.contiguous()
        inputs = inputs._replace(key_lengths=inputs.key_lengths.contiguous(), block_table=table)
    if not problem.has_shared:
        return inputs
    bias = inputs.bias
    if bias is not None:
        bias = bias.resolve_neg()
        bias = bias if bias.dtype == problem.dtype else bias.float()

    def small(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.resolve_neg().float().contiguous()

    return inputs._replace(
        bias=bias,
        key_bias=small(inputs.key_bias),
        relative_bias=small(inputs.relative_bias),
        sinks=small(inputs.sinks),
    )


def _readable(tensors: Tensors, *names: str) -> Tensors:
    """The tuple with its tensors `names` in the form that kernels read; see `_with_readable_rows`.

    If no tensor changes, the tuple itself is returned, because making a new tuple takes longer than all the checks.
    """
    changed = {}
    for name in names:
        x = getattr(tensors, name)
        readable = _with_readable_rows(x)
        if readable is not x:
            changed[name] = readable
    return tensors._replace(**changed) if changed else tensors


def _with_readable_rows(x: Tensor) -> Tensor:
    """x (B, H, rows, columns), or a copy if kernels cannot read x as it is.

    - Kernels read a row in pieces of 16 bytes. So rows must be contiguous and begin at multiples of 16 bytes.
    - Each row must have an address of its own, so the rows must not be expanded.
    - Kernels read the memory and do not know torch's flag for a negation that has not been carried out.
    """
    x = x.resolve_neg()
    is_expanded = x.stride(2) == 0 and x.shape[2] > 1
    is_aligned = (
        not is_expanded
        and x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1)
    )
    # Not .contiguous(): it returns a contiguous tensor itself, even if its memory begins at no multiple of 16 bytes.
    return x if is_aligned and x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


class KeySplits(NamedTuple):
    """Into how many parts each kind of forward kernel divides the keys of a row; 0 = no kernel of this kind runs.

    If both kinds run, the decode kernels compute the sequences of a packed call that have few queries.
    """

    decode: int = 0
    large: int = 1


UNDIVIDED = KeySplits()


class GradientSplits(NamedTuple):
    """How many programs share the work for a block of rows of a gradient: for dq each visits a part of the keys, for dk
    and dv each visits a part of the queries. The fused backward of sm_90a has no blocks of dq.
    """

    dq: int = 1
    dk: int = 1


UNDIVIDED_GRADIENTS = GradientSplits()

#: The decode kernels have tiles of this many rows: a row is a query of one of the heads of a head group.
DECODE_ROWS = 16
#: With more tiles than this for a head group, the large kernels run. Each tile reads all keys, though most of them from
#: the L2 cache, and makes little use of the tensor cores.
MAX_DECODE_TILES = 2
#: A program of the decode kernels for fewer keys than this would spend its time waiting for the first ones.
MIN_KEYS_PER_SPLIT = 256

#: With a fixed number of splits, the large kernels divide keys for at most this many queries. The number may be more
#: than the device has use for, and the sums of the splits take memory and time.
MAX_QUERIES_OF_FIXED_SPLITS = 128
#: Tiles of the large kernels have about this many queries.
LARGE_TILE_ROWS = 128


#: The fused backward has blocks of this many keys, and the other kernels for dk and dv have blocks of KEY_BLOCK keys.
FUSED_KEY_BLOCK = 128
KEY_BLOCK = 64
#: The large kernels visit about this many rows in a step.
STEP_ROWS = 64
#: Estimates in steps, not measured: to start a program and to store its sums, and to launch the kernel that merges
#: them. This kernel reads the sums of several splits in the time of a step. With head dim 128 on an H100, a step takes
#: about 0.9 us in forward and 1.5 us in backward.
STEPS_OF_PART = 8
STEPS_OF_MERGING = 8
SPLITS_MERGED_IN_A_STEP = 4
#: With more programs than this for each one that can run at a time, the last round of them matters little.
ENOUGH_ROUNDS = 4


def decode_tiles(problem: AttentionProblem) -> int:
    """How many tiles of rows the decode kernels have for each head group; 0 = these kernels do not run."""
    most_rows = MAX_DECODE_TILES * DECODE_ROWS
    group_size = problem.num_heads // max(problem.num_kv_heads, 1)
    if problem.dropout_p > 0.0 or group_size > most_rows:
        return 0
    if (rows := problem.seqlen_q * group_size) <= most_rows:
        return -(-rows // DECODE_ROWS)
    # The tokens and the prompts of a server share a call. Packed calls without pages are rather those of training,
    # whose sequences are long.
    return MAX_DECODE_TILES if problem.is_packed and problem.is_paged else 0


def key_splits(problem: AttentionProblem) -> KeySplits:
    """The kernels that run forward, and into how many parts they divide the keys of each row.

    The numbers follow from shapes, the band and the device alone, never from lengths or masks.
    """
    tiles = decode_tiles(problem)
    if not tiles:
        return KeySplits(large=_large_splits(problem))
    rows = problem.seqlen_q * (problem.num_heads // problem.num_kv_heads)
    is_mixed = rows > MAX_DECODE_TILES * DECODE_ROWS
    return KeySplits(_decode_splits(problem, tiles), _large_splits(problem) if is_mixed else 0)


def _decode_splits(problem: AttentionProblem, tiles: int) -> int:
    """The splits of the decode kernels, which have `tiles` tiles of rows for each head group."""
    if problem.num_splits:
        return problem.num_splits
    programs = max(problem.batch * problem.num_kv_heads * tiles, 1)
    most = _keys_in_band(problem, problem.seqlen_q) // MIN_KEYS_PER_SPLIT
    return max(1, min(_splits_of_programs(programs, _resident_programs(problem)), most))


def _large_splits(problem: AttentionProblem) -> int:
    """The splits of the large kernels. Without splits, each tile of queries has one program."""
    if problem.num_splits:
        # The longest sequence of a packed call must not decide about the bits of the other ones.
        has_few = problem.seqlen_q <= MAX_QUERIES_OF_FIXED_SPLITS and not problem.is_packed
        return problem.num_splits if has_few else 1
    tiles = problem.batch * problem.num_heads * -(-problem.seqlen_q // LARGE_TILE_ROWS)
    steps = -(-_keys_in_band(problem, LARGE_TILE_ROWS) // STEP_ROWS)
    return _splits_of_steps(tiles, steps, 1, _resident_large_programs(problem, _runs_on_hopper(problem)))


def gradient_splits(problem: AttentionProblem, rows_q: int, rows_k: int) -> GradientSplits:
    """How many programs share the work for a block of rows of a gradient.

    The numbers follow from shapes, the band and the device alone, never from lengths or masks.

    rows_q, rows_k: the rows of a head of query and key; of all sequences if the problem is packed
    """
    is_hopper = _device_architecture(problem) == 90
    kv_heads, group_size = problem.num_kv_heads, problem.num_heads // max(problem.num_kv_heads, 1)
    resident = _resident_large_programs(problem, is_hopper)

    def splits_of(heads: int, rows: int, longest: int, block: int, visited: int, step_rows: int, repeats: int) -> int:
        blocks = problem.batch * -(-longest // block)
        if problem.is_packed:
            blocks = min(blocks, rows // block + problem.batch)
        return _splits_of_steps(heads * blocks, -(-visited // step_rows), step_rows // STEP_ROWS * repeats, resident)

    if is_fused_backward(problem):
        # The kernel for head dim 64 visits 128 queries at a time.
        visited, step_rows = _queries_in_band(problem, FUSED_KEY_BLOCK), 128 if problem.head_dim <= 64 else STEP_ROWS
        return GradientSplits(
            dk=splits_of(kv_heads, rows_k, problem.seqlen_k, FUSED_KEY_BLOCK, visited, step_rows, group_size)
        )
    query_block = 128 if is_hopper else 64
    keys, queries = _keys_in_band(problem, query_block), _queries_in_band(problem, KEY_BLOCK)
    return GradientSplits(
        dq=splits_of(problem.num_heads, rows_q, problem.seqlen_q, query_block, keys, STEP_ROWS, 1),
        dk=splits_of(kv_heads, rows_k, problem.seqlen_k, KEY_BLOCK, queries, STEP_ROWS, group_size),
    )


def is_fused_backward(problem: AttentionProblem) -> bool:
    """Whether one kernel computes dq, dk and dv: on sm_90a, with head dims up to 128."""
    return _device_architecture(problem) == 90 and max(problem.head_dim, problem.value_dim) <= 128


@functools.lru_cache(maxsize=4096)
def _splits_of_steps(blocks: int, visits: int, steps_of_visit: int, resident: int) -> int:
    """How many programs should share the `visits` of each of `blocks` blocks of rows, by an estimate of the time.

    All programs take equally long, and run in rounds of `resident` programs. This serves the large forward kernels and
    backward. The decode kernels wait for memory instead: see `_splits_of_programs`.

    steps_of_visit: how many steps a visit takes; they are not divided
    """
    blocks = max(blocks, 1)
    most = min(ENOUGH_ROUNDS * resident // blocks, visits, MAX_SPLITS)

    def time(splits: int) -> int:
        rounds, steps = -(-blocks * splits // resident), -(-visits // splits) * steps_of_visit
        if splits == 1:
            return rounds * steps
        return rounds * (steps + STEPS_OF_PART) + STEPS_OF_MERGING + splits // SPLITS_MERGED_IN_A_STEP

    return min(range(1, most + 1), key=time, default=1)


def _keys_in_band(problem: AttentionProblem, queries: int) -> int:
    """How many keys a block of so many neighbouring queries sees by the band, at most."""
    band, offset = problem.band, _offset_of_band(problem)
    begin = 0 if band.left == UNBOUNDED else max(offset - band.left, 0)
    end = problem.seqlen_k if band.right == UNBOUNDED else min(problem.seqlen_q + offset + band.right, problem.seqlen_k)
    return _within_band(problem, end - begin, min(queries, problem.seqlen_q))


def _queries_in_band(problem: AttentionProblem, keys: int) -> int:
    """How many queries see a block of so many neighbouring keys by the band, at most."""
    band, offset = problem.band, _offset_of_band(problem)
    begin = 0 if band.right == UNBOUNDED else max(-offset - band.right, 0)
    end = problem.seqlen_q if band.left == UNBOUNDED else min(problem.seqlen_k - offset + band.left, problem.seqlen_q)
    return _within_band(problem, end - begin, min(keys, problem.seqlen_k))


def _offset_of_band(problem: AttentionProblem) -> int:
    shift = problem.seqlen_k - problem.seqlen_q if problem.band.is_from_end else 0
    return problem.band.offset + shift


def _within_band(problem: AttentionProblem, rows: int, block: int) -> int:
    """The most of these rows that a block of rows of the other side meets: both diagonals bound them."""
    band = problem.band
    if UNBOUNDED not in (band.left, band.right):
        rows = min(rows, band.left + band.right + block)
    return max(rows, 0)


def _splits_of_programs(programs: int, resident: int) -> int:
    """How many splits make the best use of a device on which `resident` programs run at a time.

    If all programs run at once, all of them get the same share of the memory's bandwidth and end together. Otherwise a
    last round of few programs leaves bandwidth unused, the less so the more rounds there are.
    """
    if programs <= resident:
        return min(resident // programs, MAX_SPLITS)
    # For each number of splits, the share of all rounds that its programs use.
    used = {n: programs * n / (resident * -(-programs * n // resident)) for n in range(1, 5)}
    return next((n for n, share in used.items() if share >= 0.9), max(used, key=lambda n: used[n]))


def _resident_programs(problem: AttentionProblem) -> int:
    """How many programs of the decode kernels run at a time: their shared memory allows two for a multiprocessor of
    compute capability 9.0, and one on smaller ones.
    """
    return _multiprocessors(problem.device) * (2 if _runs_on_hopper(problem) else 1)


def _resident_large_programs(problem: AttentionProblem, is_hopper: bool) -> int:
    """How many programs of the other kernels run at a time. Those for sm_90a take a multiprocessor each. Two of those
    for sm_80 share one, with head dims up to 128.
    """
    return _multiprocessors(problem.device) * (2 if not is_hopper and problem.head_dim <= 128 else 1)


def _runs_on_hopper(problem: AttentionProblem) -> bool:
    """Whether the kernels for sm_90a run; True if there is no GPU in this machine."""
    is_here = problem.device.type == "cuda" and torch.cuda.is_available()
    return not is_here or _device_architecture(problem) == 90


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; those of an H100 if there is none in this machine."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=4096)
def _config(problem: AttentionProblem) -> Any:
    """The numbers of a problem as the native module takes them, converted once for each problem."""
    return _kernels.Config(**native_numbers(problem))


def _workspace(
    problem: AttentionProblem,
    inputs: Inputs,
    wanted: Wanted | None,
    splits: KeySplits = UNDIVIDED,
    gradient_splits: GradientSplits = UNDIVIDED_GRADIENTS,
) -> Tensor | None:
    """Uninitialised memory for intermediate results of a call, float32; None if the call needs none.

    wanted: the wanted gradients of a backward call; None for forward
    """
    relative_bias = inputs.relative_bias
    size = _workspace_bytes(
        problem,
        inputs.query.shape,
        wanted,
        splits,
        gradient_splits,
        inputs.key.shape[2],
        0 if relative_bias is None else relative_bias.shape[0],
        _mask_entries(inputs),
        None if inputs.bias is None or wanted is None or not wanted.bias else inputs.bias.shape,
    )
    return torch.empty(size // 4, dtype=torch.float32, device=inputs.query.device) if size else None


def _mask_entries(inputs: Inputs) -> int:
    """How many (L, S) masks the mask (B|1, H|1, ...) and the ranges of keys make; 0 without both.

    A dimension of batch entries or heads that is expanded counts once.
    """
    masks = [x for x in (inputs.mask, inputs.key_ranges) if x is not None]
    if not masks:
        return 0
    return math.prod(max(1 if x.stride(dim) == 0 else x.shape[dim] for x in masks) for dim in (0, 1))


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(
    problem: AttentionProblem,
    query_shape: torch.Size,
    wanted: Wanted | None,
    splits: KeySplits,
    gradient_splits: GradientSplits,
    rows_k: int,
    relative_bias_heads: int,
    mask_entries: int,
    dbias_shape: torch.Size | None,
) -> int:
    """The size of the workspace in bytes, as the native module computes it.

    query_shape: (B, H, L, D), with B = 1 for packed problems
    wanted: the wanted gradients of a backward call; None for forward
    rows_k: the rows of the key tensor
    relative_bias_heads: the heads of relative_bias; 0 without one
    mask_entries: see `_mask_entries`
    dbias_shape: the shape of the gradient of bias; None if it is not wanted
    """
    batch_entries, num_heads, rows_q, _ = query_shape
    return _kernels.workspace_bytes(
        architecture=_architecture(problem, splits),
        is_backward=wanted is not None,
        wants_dquery=wanted is not None and wanted.query,
        wants_dkey=wanted is not None and wanted.key,
        wants_dvalue=wanted is not None and wanted.value,
        batch=problem.batch,
        batch_entries=batch_entries,
        num_heads=num_heads,
        num_kv_heads=problem.num_kv_heads,
        rows_q=rows_q,
        rows_k=rows_k,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        head_dim=problem.head_dim,
        is_packed=problem.is_packed,
        has_key_padding=problem.has_key_padding,
        relative_bias_heads=relative_bias_heads,
        mask_entries=mask_entries,
        dbias_shape=dbias_shape,
        wants_dkey_bias=wanted is not None and wanted.key_bias,
        wants_drelative_bias=wanted is not None and wanted.relative_bias,
        decode_splits=splits.decode,
        large_splits=splits.large,
        dq_splits=gradient_splits.dq,
        dk_splits=gradient_splits.dk,
        value_dim=problem.value_dim,
    )
