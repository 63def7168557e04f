"""Reads the machine code (SASS) of the built kernels: they must not spill, and must use the instructions that they were
written for. Needs no GPU.

`python tests/cuda/test_binary.py` prints a table of all kernels.
"""

from __future__ import annotations

import collections
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fused_attn.backends.cuda import hardware

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "cmake"))
import checked_nvcc  # noqa: E402

#: architecture -> instructions that each of its large kernels must have: products, loads, and on sm_90a setmaxnreg
PURPOSE = {
    "sm_80": {"HMMA", "LDSM", "LDGSTS"},
    "sm_90": {"HMMA", "LDSM", "LDGSTS"},  # decode
    "sm_90a": {"HGMMA", "UTMALDG", "USETMAXREG"},
}

#: What the table counts: matrix instructions, copies, moved registers, and accesses to local memory.
INSTRUCTIONS = ("HMMA", "HGMMA", "LDGSTS", "LDSM", "STSM", "UTMALDG", "UTMASTG", "UTMAREDG", "USETMAXREG", "LDL", "STL")


#: The most instructions of a step of the forward kernel for sm_90a. A step visits 128 keys, so a thread computes 64
#: exponentials in it. With head dim 192 there are four more products, and so four more pairs of descriptors.
MOST_INSTRUCTIONS = 345
MOST_INSTRUCTIONS_192 = 382
#: How many registers forward moves to uniform registers between the instructions of a product, for head dims with more
#: descriptors than uniform registers. With 192, these are no descriptors, but what a consumer sees of the next block.
MOST_MOVED_FORWARD = {192: 2, 256: 11}
#: The same for the fused backward, for each head dim. 584, 405 and 427 were counted when these limits were set.
MOST_INSTRUCTIONS_BACKWARD = {64: 600, 96: 420, 128: 440}
#: The same for the general fused backward, in a step that uses no feature, of 64 queries. 397, 419 and 437 were counted
#: when these limits were set. A relative bias adds 100 instructions, a mask 152, a softcap 377.
MOST_INSTRUCTIONS_GENERAL_BACKWARD = {64: 410, 96: 432, 128: 450}

#: The most instructions of a step of the general kernels for sm_90a that reads tiles of a dense bias. 583, 562, 569,
#: 387 and 434 (forward, 64 keys with the last two), 527, 546 and 565 (fused backward) were counted when these limits
#: were set. Steps that read the bias from global memory took 737, 730, 741 and, with head dim 256, 540 (forward), 699,
#: 720 and 738.
MOST_INSTRUCTIONS_BIAS = {
    "forward": {64: 595, 96: 580, 128: 585, 192: 400, 256: 450},
    "fused_backward": {64: 545, 96: 562, 128: 580},
}

#: The instructions of a step of the other kernels, for each head dim, as counted when this table was made. (Values have
#: 128 columns with head dim 192.) A step of a general kernel uses no feature. If one warpgroup sums dk and another one
#: dv, the step is that of dv.
COUNTED_INSTRUCTIONS = {
    "sm80 forward": {64: 509, 96: 342, 128: 398, 192: 447, 256: 651},
    "sm80 query_gradient": {64: 416, 96: 475, 128: 580, 192: 691, 256: 495},
    "sm80 key_gradient": {64: 490, 96: 334, 128: 398, 192: 468, 256: 364},
    "sm90 query_gradient": {192: 291, 256: 319},
    "sm90 key_gradient": {192: 341, 256: 390},
    "sm80 forward general": {64: 560, 96: 393, 128: 448, 192: 496, 256: 701},
    "sm80 query_gradient general": {64: 434, 96: 503, 128: 603, 192: 725, 256: 526},
    "sm80 key_gradient general": {64: 588, 96: 413, 128: 483, 192: 528, 256: 423},
    "sm90 forward general": {64: 372, 96: 370, 128: 376, 192: 274, 256: 312},
    "sm90 query_gradient general": {192: 349, 256: 304},
    "sm90 key_gradient general": {192: 221, 256: 187},
    "sm80 bias_gradient": {64: 346, 96: 396, 128: 449, 192: 510, 256: 401},
    "sm90 bias_gradient": {64: 486, 96: 504, 128: 516, 192: 527, 256: 421},
}
#: How often a step may read global memory. On sm_80, the kernel for dq reads which keys are valid. The kernels for the
#: gradient of a bias read the row statistics of two rows. All others read nothing but tiles.
MOST_READS = {"sm80 query_gradient": 2, "sm80 bias_gradient": 4, "sm90 bias_gradient": 4}
#: A step may have more instructions than counted, by this factor.
MORE_INSTRUCTIONS = 1.03

#: The most instructions of a step of the decode kernel: those that start the copies of a later step, and the others. A
#: step visits 16 keys with all 16 rows of a tile. 224, 218, 261, 294 and 158, 200, 221, 278 were counted when these
#: limits were set. Memory is the bound as long as both take fewer cycles than the copies: an H200 reads the 8 KiB of a
#: step at head dim 128 in about 400 cycles of a multiprocessor, which can issue four instructions in each.
MOST_INSTRUCTIONS_DECODE = {64: (240, 170), 96: (235, 215), 128: (280, 240), 256: (315, 300)}


#: The most registers of a thread of the preparation kernel. With 40, a multiprocessor has room for 12 blocks of 128
#: threads, which hide the time of their loads.
MOST_REGISTERS_PREPARATION = 40

#: A line of machine code: the address, the text, and in the text the name of the instruction.
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+((?:@!?\w+\s+)?([A-Z0-9_]+).*?)\s*;")
#: An instruction that another one than the next may follow: its predicate, and the address of the other one.
JUMP = re.compile(r"(@!?U?P\w+ )?(?:EXIT|RET|BRA)\b.*?(0x[0-9a-f]+)?$")
#: An instruction that writes to a register: its number. It is the first operand, or comes after a predicate.
WRITTEN = re.compile(r"(?:@!?\w+\s+)?[A-Z0-9_]+\S*\s+(?:U?PT?\w*, )?R(\d+)\b")


class Kernel(NamedTuple):
    """What cuobjdump says about one kernel."""

    architecture: str
    name: str
    registers: int  # registers of a thread at launch
    stack: int  # bytes of a stack frame
    local: int  # bytes of local memory
    instructions: dict[str, int]  # how often each instruction occurs
    overlapped: int  # see overlapped_exponentials
    step: list[str]  # see steady_step
    bias_step: list[str]  # the same for a step that reads a tile of a dense bias (sm_90a)
    copies: list[str]  # see copies_after_wait
    narrow_stores: int  # stores of 4 bytes to global memory
    moved_in_products: list[int]  # for each product with wgmma: see moved_in_products
    touched_in_flight: list[str]  # see touched_in_flight
    registers_of_roles: list[tuple[int, int]]  # see registers_of_roles


def cuobjdump() -> str:
    """The path of cuobjdump: the one on the PATH, or the one in the triton wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    found = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not found or not found.exists():
        pytest.skip("needs cuobjdump, which comes with CUDA and with triton")
    return str(found)


def readable(symbol: str) -> str:
    """`_ZN10fused_attn3gpu4sm8014forward_kernelINS0_5f16_tELi64ELb0EEEv...` -> `sm80 forward_kernel<f16, 64, 0>`"""
    names = []
    rest = symbol.removeprefix("_ZN")
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        names.append(rest[match.end() : end])
        rest = rest[end:]
    arguments = re.findall(r"\d(b?f16)_t|L[a-z](\d+)E", rest.partition("EEEv")[0] + "E")
    template = ", ".join(dtype or number for dtype, number in arguments)
    return " ".join(name for name in names if name not in ("fused_attn", "gpu")) + (f"<{template}>" if template else "")


def kernels() -> list[Kernel]:
    """Reads all kernels of the installed module with cuobjdump: their instructions, and their registers and memory."""
    module = importlib.util.find_spec("fused_attn._cuda")
    if module is None:
        pytest.skip("installed without nvcc, so that there is no fused_attn._cuda")

    def dump(option: str) -> str:
        return subprocess.run([cuobjdump(), option, module.origin], capture_output=True, text=True, check=True).stdout

    counts, codes = {}, {}
    architecture, function, code = "", collections.Counter(), []
    for line in dump("-sass").splitlines():
        if match := INSTRUCTION.match(line):
            address, text, name = match.groups()
            function[name] += 1
            code.append((int(address, 16), text))
        elif "arch = " in line:
            architecture = line.partition("arch = ")[2].strip()
        elif "Function : " in line:
            symbol = line.partition("Function : ")[2].strip()
            function = counts.setdefault((architecture, symbol), collections.Counter())
            code = codes.setdefault((architecture, symbol), [])

    found = {}
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            numbers = map(int, match.groups())
            code = codes.get((architecture, symbol), [])
            texts = [text for _, text in code]
            found[architecture, symbol] = Kernel(
                architecture,
                readable(symbol),
                *numbers,
                counts.get((architecture, symbol), {}),
                overlapped_exponentials(texts),
                steady_step(code),
                steady_step(code, r"\bLDSM\b") if architecture == "sm_90a" else [],
                copies_after_wait(texts),
                sum("STG.E " in text for text in texts),
                moved_in_products(texts),
                touched_in_flight(code) if counts.get((architecture, symbol), {}).get("HGMMA") else [],
                registers_of_roles(code),
            )
    return sorted(found.values(), key=lambda kernel: kernel[:2])


def overlapped_exponentials(texts: list[str]) -> int:
    """How many exponentials are computed while a product still runs: those between the wait for all products but one
    and the wait for the last one.
    """
    most, here = 0, None
    for text in texts:
        if "WARPGROUP.DEPBAR" in text:
            most = max(most, here or 0)
            here = 0 if re.search(r"gsb0, 0x1\b", text) else None
        elif here is not None and "MUFU.EX2" in text:
            here += 1
    return most


def moved_in_products(texts: list[str]) -> list[int]:
    """For each product with wgmma, how many registers are moved to uniform registers between its instructions.

    A product is a commit group. Its last HGMMA is marked with gsb0.
    """
    products = re.findall(r"HGMMA.*?gsb0", "\n".join(texts), re.DOTALL)
    return [product.count("R2UR") for product in products]


def following_ones(code: list[tuple[int, str]]) -> list[list[int]]:
    """For each instruction, the numbers of the instructions that may follow it."""
    index = {address: i for i, (address, _) in enumerate(code)}

    def of(i: int) -> list[int]:
        text = code[i][1]
        following = [i + 1] if i + 1 < len(code) else []
        if any(name in text for name in ("EXIT", "RET", "BRA")) and (match := JUMP.match(text)):
            target = [index[int(match[2], 16)]] if match[2] else []
            return target + (following if match[1] or "DIV" in text else [])
        return following

    return [of(i) for i in range(len(code))]


def touched_in_flight(code: list[tuple[int, str]]) -> list[str]:
    """The instructions that name an accumulator, or write to a register of the left factor, of a product with wgmma
    that is not complete yet, on some way through the code. Other instructions of the same product may name its
    accumulators.

    Accumulators begin at multiples of 8, and four registers of a left factor at multiples of 4. So the first register
    that an instruction names, or writes to, tells what it touches.
    """
    following, found = following_ones(code), set()
    named = [{int(number) for number in re.findall(r"\bR(\d+)", text)} for _, text in code]
    written = [{int(match[1])} if (match := WRITTEN.match(text)) else set() for _, text in code]
    # The number of an instruction; the registers of each product that is complete when a wait says so, the oldest
    # first; those of the product that is being started. Of a left factor, registers may be read.
    start = (0, (), frozenset())
    seen, queue = {start}, [start]
    while queue:
        i, products, started = queue.pop()
        text = code[i][1]
        if match := re.search(r"\bHGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+))?", text):
            first, factor = int(match[2]), int(match[3] or 0)
            own = range(first, first + int(match[1]) // 2)
            assert first % 8 == 0 and factor % 4 == 0, text
            for x, may_be_read in (x for product in products for x in product):
                is_overwritten = x != own and (first in x or x.start in own)
                if is_overwritten or (factor in x and not may_be_read):
                    found.add(text)
            started |= {(own, False)} | ({(range(factor, factor + 4), True)} if match[3] else set())
            if "gsb0" in text:
                products, started = (*products, started), frozenset()
        elif match := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", text):
            products = products[max(len(products) - int(match[1], 16), 0) :]
        else:
            for x, may_be_read in (x for product in (*products, started) for x in product):
                if any(register in x for register in (written[i] if may_be_read else named[i])):
                    found.add(text)
        assert len(products) < 8, "products are started in a loop, and none is waited for"
        for after in following[i]:
            state = (after, products, started)
            if state not in seen:
                seen.add(state)
                queue.append(state)
    return sorted(found)


def registers_of_roles(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """For each setmaxnreg: how many registers a thread has from there on, and how many it uses."""
    following, found = following_ones(code), []
    for i, (_, text) in enumerate(code):
        if (match := re.search(r"USETMAXREG\.\S+ .*?(0x[0-9a-f]+)$", text)) is None:
            continue
        seen, queue = set(), [i]
        while queue:
            for after in following[queue.pop()]:
                if after not in seen:
                    seen.add(after)
                    queue.append(after)
        used = max((int(n) for j in seen for n in re.findall(r"\bR(\d+)", code[j][1])), default=-1) + 1
        found.append((int(match[1], 16), used))
    return found


def steady_step(code: list[tuple[int, str]], through: str = "") -> list[str]:
    """The instructions of one round of the main loop, when no entry has to be masked.

    The loop contains the wait for all products but one, or on sm_80 the wait for copies. The result is the shortest
    cycle of instructions through this wait. Code that runs in some rounds only, such as masks and the end of the loop,
    makes a longer cycle. With ``through``, it is the shortest cycle that also has an instruction with this pattern.
    """
    texts = [text for _, text in code]

    def tree(start: int, edges: list[list[int]]) -> dict[int, int]:
        """For each instruction that can be reached from ``start``: the one before it on a shortest way."""
        before, queue = {}, collections.deque([start])
        while queue:
            i = queue.popleft()
            for following in edges[i]:
                if following not in before:
                    before[following] = i
                    queue.append(following)
        return before

    def way_to(end: int, before: dict[int, int], start: int) -> list[int]:
        """The numbers of the instructions from ``start`` to the one before ``end``."""
        way = [before[end]]
        while way[-1] != start:
            way.append(before[way[-1]])
        return way[::-1]

    following = following_ones(code)
    preceding: list[list[int]] = [[] for _ in texts]
    for i, ends in enumerate(following):
        for end in ends:
            preceding[end].append(i)
    middles = {i for i, text in enumerate(texts) if through and re.search(through, text)}
    shortest: list[int] = []
    # Kernels with wgmma, and decode, have waits of the later kinds in other loops. The last kind is for the backward of
    # sm_90a in two general kernels, which always wait for all products.
    waits = (
        r"WARPGROUP.DEPBAR.LE gsb0, 0x1\b",
        r"^DEPBAR.LE SB0, 0x[1-9]",
        r"^DEPBAR.LE SB0, 0x0\b",
        r"WARPGROUP.DEPBAR.LE gsb0, 0x0\b",
    )
    found = ([i for i, text in enumerate(texts) if "DEPBAR" in text and re.search(wait, text)] for wait in waits)
    for start in next(filter(None, found), []):
        before, after = tree(start, following), tree(start, preceding) if through else {}
        ways = [way_to(start, before, start)] if not through and start in before else []
        for middle in middles & before.keys() & after.keys():
            back = way_to(middle, after, start)[::-1]
            ways.append([*way_to(middle, before, start), middle, *back[:-1]])
        shortest = min(filter(None, [shortest, *ways]), key=len, default=[])
    return [texts[i] for i in shortest]


def copies_after_wait(texts: list[str]) -> list[str]:
    """The instructions between the wait for all copies but some and the next instruction that reads a tile."""
    waits = (i for i, text in enumerate(texts) if re.search(r"^DEPBAR.LE SB0, 0x[1-9]", text))
    rest = texts[next(waits, len(texts)) :]
    return rest[: next((i for i, text in enumerate(rest) if "LDSM" in text), len(rest))]


@pytest.fixture(scope="session")
def built() -> list[Kernel]:
    """All kernels. On a machine with a GPU, a build has by default only the kernels for that GPU."""
    found = kernels()
    if torch.cuda.is_available() and (architectures := hardware.module.build_info()["architectures"]) != "80,90a-real":
        pytest.skip(f"needs a build for all architectures, not for {architectures}")
    return found


@pytest.mark.slow
def test_no_kernel_uses_local_memory(built):
    print(table(built))
    assert len(built) > 10
    assert not [kernel for kernel in built if kernel.stack or kernel.local]
    assert not [kernel for kernel in built if kernel.instructions.get("LDL") or kernel.instructions.get("STL")]


@pytest.mark.slow
def test_loads_and_stores_name_their_memory(built):
    """LD, ST and ATOM find out at run time whether an address lies in global or in shared memory. Each such access is
    slower, and waits for both kinds of memory.
    """
    for kernel in built:
        assert not {"LD", "ST", "ATOM"} & kernel.instructions.keys(), f"{kernel.architecture} {kernel.name}"


@pytest.mark.slow
def test_kernels_use_the_instructions_that_they_are_for(built):
    main = [kernel for kernel in built if re.search(r"(forward|gradient|decode)_kernel", kernel.name)]
    assert {kernel.architecture for kernel in main} == PURPOSE.keys()
    for kernel in main:
        missing = {name for name in PURPOSE[kernel.architecture] if not kernel.instructions.get(name)}
        assert not missing, f"{kernel.architecture} {kernel.name} has no {missing}"


@pytest.mark.slow
def test_rows_are_stored_16_bytes_at_a_time(built):
    """nvcc would split some of these stores into four (store_global in primitives_ptx.h).

    Forward stores the log-sum-exp and the largest logit of up to four rows in each thread, 4 bytes at a time.
    """
    for kernel in built:
        if re.search(r" (query_gradient|key_gradient|fused_backward)_kernel<", kernel.name):
            assert kernel.narrow_stores == 0, kernel.name
        elif " forward_kernel<" in kernel.name:
            assert kernel.narrow_stores <= 8, f"{kernel.name}: {kernel.narrow_stores} stores of 4 bytes"


@pytest.mark.slow
def test_softmax_runs_while_the_tensor_cores_do(built):
    """In plain kernels of the backward, exponentials are computed while a product runs.

    ptxas tends to move a wait for products up, to the branch before, which would end the overlap. A general kernel
    waits for all products first, because it multiplies the gradients of the probs by the derivative of the softcap.
    """
    hopper = [kernel for kernel in built if kernel.architecture == "sm_90a" and kernel.instructions.get("HGMMA")]
    for kernel in hopper:
        # In these kernels, one consumer computes exponentials while the products of another one run.
        if "forward" in kernel.name or "fused_backward" in kernel.name:
            continue
        if kernel.name.endswith(", 0>") or "bias_gradient" in kernel.name:
            assert kernel.overlapped >= 28, f"{kernel.name}: {kernel.overlapped} exponentials overlap with products"


def assert_lean(name: str, step: list[str], most: int, most_moved: int) -> None:
    """Checks a step of the forward kernel: any instruction besides products keeps the tensor cores waiting."""
    assert 0 < len(step) <= most, f"{name}: {len(step)} instructions, expected at most {most}"
    assert not [text for text in step if re.search(r"\b(LDG|LDL|STL)\b", text)], f"{name} reads global memory"
    # The step begins with the wait. Then it releases slots, computes exponentials, and starts the two products.
    first_exponential = next(i for i, text in enumerate(step) if "MUFU.EX2" in text)
    late = [text for text in step[first_exponential:] if "SYNCS.ARRIVE" in text]
    assert not late, f"{name} releases a slot after the exponentials have begun"
    assert sum("SYNCS.ARRIVE" in text for text in step) == 2, f"{name}: keys and values are released once each"
    products = re.split(r"WARPGROUP\.ARRIVE", "\n".join(step))[1:]
    assert len(products) == 2
    for product in products:
        between = product[product.index("HGMMA") : product.rindex("HGMMA")]
        moved = between.count("R2UR")
        assert moved <= most_moved, f"{name} moves {moved} registers to uniform registers between products"


@pytest.mark.slow
def test_forward_steps_are_lean(built):
    forward = [kernel for kernel in built if kernel.architecture == "sm_90a" and "forward_kernel" in kernel.name]
    without_dropout = [kernel for kernel in forward if kernel.name.endswith(", 0>")]
    assert len(without_dropout) == 10
    for kernel in without_dropout:
        head_dim = int(re.search(r", (\d+), ", kernel.name)[1])
        most = MOST_INSTRUCTIONS_192 if head_dim == 192 else MOST_INSTRUCTIONS
        assert_lean(kernel.name, kernel.step, most, MOST_MOVED_FORWARD.get(head_dim, 0))


@pytest.mark.slow
def test_fused_backward_steps_are_lean(built):
    """A step has five products, and computes no descriptor between them."""
    fused = [kernel for kernel in built if " fused_backward_kernel" in kernel.name]
    assert len(fused) == 2 * len(MOST_INSTRUCTIONS_BACKWARD) + 2 * len(MOST_INSTRUCTIONS_GENERAL_BACKWARD)
    for kernel in fused:
        head_dim, is_general = re.search(r", (\d+), (\d)>", kernel.name).groups()
        limits = MOST_INSTRUCTIONS_GENERAL_BACKWARD if is_general == "1" else MOST_INSTRUCTIONS_BACKWARD
        most = limits[int(head_dim)]
        assert 0 < len(kernel.step) <= most, f"{kernel.name}: {len(kernel.step)} instructions, expected at most {most}"
        assert not [text for text in kernel.step if re.search(r"\b(LDG|LDL|STL)\b", text)], kernel.name
        products = re.split(r"WARPGROUP\.ARRIVE", "\n".join(kernel.step))[1:]
        assert len(products) == 5
        for product in products:
            assert "R2UR" not in product[product.index("HGMMA") : product.rindex("HGMMA")], kernel.name
        # Four arrivals: queries and dout are released, dscores are complete, and the part of dq is complete.
        assert sum("SYNCS.ARRIVE" in text for text in kernel.step) == 4


@pytest.mark.slow
def test_steps_with_tiles_of_a_bias_are_lean(built):
    """They read the bias from shared memory alone: a load from global memory would keep the warp waiting."""
    found = set()
    for kernel in built:
        match = re.fullmatch(r"sm90 (forward|fused_backward)_kernel<(b?f16), (\d+)(?:, \d+)?, 1>", kernel.name)
        if match is None:
            continue
        found.add(match.groups())
        step, most = kernel.bias_step, MOST_INSTRUCTIONS_BIAS[match[1]][int(match[3])]
        assert 0 < len(step) <= most, f"{kernel.name}: {len(step)} instructions, expected at most {most}"
        assert not [text for text in step if re.search(r"\b(LDG|LDL|STL)\b", text)], kernel.name
    assert len(found) == 2 * sum(map(len, MOST_INSTRUCTIONS_BIAS.values()))


@pytest.mark.slow
def test_steps_of_the_other_kernels_are_lean(built):
    found = set()
    for kernel in built:
        match = re.fullmatch(r"(sm[89]0 \w+)_kernel<(\w+), (\d+)(?:, \d\d+)?(?:, (\d))?>", kernel.name)
        name = match and match[1] + (" general" if match[4] == "1" else "")
        if name not in COUNTED_INSTRUCTIONS:
            continue
        found.add((name, match[2], match[3]))
        most = MORE_INSTRUCTIONS * COUNTED_INSTRUCTIONS[name][int(match[3])]
        assert 0 < len(kernel.step) <= most, f"{kernel.name}: {len(kernel.step)} instructions, expected at most {most}"
        reads = [text for text in kernel.step if re.search(r"\bLDG\b", text)]
        assert len(reads) <= MOST_READS.get(match[1], 0), f"{kernel.name} reads global memory: {reads}"
    assert len(found) == 2 * sum(map(len, COUNTED_INSTRUCTIONS.values()))


@pytest.mark.slow
def test_no_descriptor_is_computed_between_products(built):
    """In all code of a kernel, but for forward with large head dims, which needs more uniform registers than there are.

    The general fused backward moves one descriptor in the first product of a block of keys, outside of its loop. The
    kernel for the gradient of a bias waits for its tiles more than for its products.
    """
    hopper = [kernel for kernel in built if kernel.moved_in_products]
    # dtypes x (variants x (forward, fused backward, two other backwards), gradient of a bias)
    assert len(hopper) == 2 * (2 * (5 + 3 + 2 * 2) + 5)
    for kernel in hopper:
        forward = re.search(r"sm90 forward_kernel<\w+, (\d+),", kernel.name)
        most = MOST_MOVED_FORWARD.get(int(forward[1]), 0) if forward else 0
        if re.search(r"fused_backward_kernel<.*, 1>|bias_gradient", kernel.name):
            most = 2
        assert max(kernel.moved_in_products) <= most, f"{kernel.name}: {kernel.moved_in_products} registers moved"


@pytest.mark.slow
def test_many_threads_of_the_preparation_fit(built):
    preparation = [kernel for kernel in built if "preparation_kernel" in kernel.name]
    assert len(preparation) == 2 * 2 * 2  # architectures, dtypes, tiles of dq
    for kernel in preparation:
        assert kernel.registers <= MOST_REGISTERS_PREPARATION, f"{kernel.architecture} {kernel.name}"


@pytest.mark.slow
def test_decode_copies_a_later_step_before_it_computes(built):
    """In decode, all copies of a step are started between the wait for an earlier step and the first product."""
    decode = [kernel for kernel in built if " decode_kernel" in f" {kernel.name}"]
    assert len(decode) == 2 * 2 * len(MOST_INSTRUCTIONS_DECODE)
    for kernel in decode:
        head_dim = int(re.search(r", (\d+)>", kernel.name)[1])
        most_copies, most = MOST_INSTRUCTIONS_DECODE[head_dim]
        copies = sum("LDGSTS" in text for text in kernel.copies)
        assert copies == 2 * 16 * head_dim * 2 // (32 * 16), f"{kernel.name}: {copies} copies"
        assert not [text for text in kernel.copies if re.search(r"MUFU.EX2|HMMA", text)], kernel.name
        assert len(kernel.copies) <= most_copies, f"{kernel.name}: {len(kernel.copies)} instructions start copies"
        assert 0 < len(kernel.step) <= most, f"{kernel.name}: {len(kernel.step)} instructions, expected at most {most}"
        assert sum("HMMA" in text for text in kernel.step) == head_dim // 4, kernel.name


@pytest.mark.slow
def test_host_code_calls_no_device_function():
    """In the host's copy of a device function, nvcc puts a call of exit, which ends the process without a word. Within
    some templates, nvcc reports no error for a call of such a function.
    """
    module = importlib.util.find_spec("fused_attn._cuda")
    if module is None or shutil.which("nm") is None:
        pytest.skip("needs fused_attn._cuda, and nm of the GNU binutils")
    command = ["nm", "--dynamic", "--undefined-only", module.origin]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "malloc" in symbols and not re.search(r"\bU exit\b", symbols)


@pytest.mark.slow
def test_registers_can_be_shared_out(built):
    """A thread starts with 168 registers in a block of three warpgroups, and with 128 in a block of four.

    setmaxnreg then moves them between the warpgroups (fits_registers in sm90/loader.h).
    """
    for kernel in built:
        if kernel.instructions.get("USETMAXREG"):
            assert kernel.registers in (128, 168), kernel
            assert len(kernel.registers_of_roles) == 2, kernel.name
            for registers, used in kernel.registers_of_roles:
                assert 0 < used <= registers, f"{kernel.name}: {used} of {registers} registers"


@pytest.mark.slow
def test_no_accumulator_is_touched_in_flight(built):
    hopper = [kernel for kernel in built if kernel.instructions.get("HGMMA")]
    assert hopper
    assert not {kernel.name: kernel.touched_in_flight for kernel in hopper if kernel.touched_in_flight}


PRODUCT = [
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x20",
    "HGMMA.64x16x16.F32 R8, gdesc[UR4], R8",
    "HGMMA.64x16x16.F32 R8, R24, gdesc[UR8].tnspB, R8, gsb0",
    "FADD R0, R1, R2",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "FADD R0, R15, R16",
    "@P0 BRA 0x10",
    "EXIT",
]


@pytest.mark.parametrize(
    ("line", "text", "found"),
    [
        (3, PRODUCT[3], False),
        (3, "FADD R0, R15, R2", True),
        (3, "FADD R0, R16, R2", False),
        (3, "LDS.64 R14, [R1]", True),
        (3, "HGMMA.64x16x16.F32 R8, gdesc[UR4], R8, gsb0", False),
        (3, "HGMMA.64x16x16.F32 R16, R8, gdesc[UR4].tnspB, R16, gsb0", True),
        (3, "FADD R26, R1, R2", True),
        (3, "LDS.64 R26, [R1]", True),
        (3, "SHFL.BFLY PT, R27, R1, 0x1, 0x1f", True),
        (3, "FADD R28, R24, R27", False),
        (3, "STS.128 [R24], R24", False),
        (3, "HGMMA.64x16x16.F32 R24, gdesc[UR4], !UPT, gsb0", True),
        (3, "HGMMA.64x32x16.F32 R16, gdesc[UR4], !UPT, gsb0", True),
        (4, "WARPGROUP.DEPBAR.LE gsb0, 0x1", True),
        (4, "@P0 BRA 0x60", True),
    ],
)
def test_accumulators_in_flight_are_found(line, text, found):
    texts = [*PRODUCT[:line], text, *PRODUCT[line + 1 :]]
    code = [(16 * i, text) for i, text in enumerate(texts)]
    if "0x60" in text:  # a way around the wait
        code[line + 1] = (16 * (line + 1), "WARPGROUP.DEPBAR.LE gsb0, 0x0")
        code[line + 2] = (16 * (line + 2), PRODUCT[5])
    assert bool(touched_in_flight(code)) == found


def test_registers_of_roles_are_counted():
    code = [(16 * i, text) for i, text in enumerate(PRODUCT)]
    assert registers_of_roles(code) == [(32, 25)]


def table(built: list[Kernel]) -> str:
    used = [name for name in INSTRUCTIONS if any(kernel.instructions.get(name) for kernel in built)]
    width = max(len(kernel.name) for kernel in built)
    lines = [f"{'':7} {'kernel':{width}} registers stack local " + " ".join(f"{name:>10}" for name in used)]
    for kernel in built:
        lines.append(
            f"{kernel.architecture:7} {kernel.name:{width}} {kernel.registers:9} {kernel.stack:5} {kernel.local:5} "
            + " ".join(f"{kernel.instructions.get(name, 0):10}" for name in used)
        )
    return "\n".join(lines)


# ---- cmake/checked_nvcc.py, which lets the build fail if ptxas reports spills, or if a kernel would hang


@pytest.mark.parametrize(
    "line, why",
    [
        ("    24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", "local memory is used"),
        ("    24 bytes stack frame, 20 bytes spill stores, 20 bytes spill loads", "registers were spilled"),
        ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized", "wgmma"),
        ("ptxas info    : (C7519) warpgroup.arrive is injected in around line 77 by compiler", "wgmma"),
    ],
)
def test_build_fails_on_what_ptxas_says(line, why):
    output = (
        "ptxas info    : Compiling entry function 'kernel_one' for 'sm_90a'\n"
        "ptxas info    : Function properties for kernel_one\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 4 barriers\n"
    )
    assert checked_nvcc.faults(output) == []
    (fault,) = checked_nvcc.faults(output + "ptxas info    : Function properties for kernel_two\n" + line + "\n")
    assert why in fault
    assert "kernel_two" in fault


@pytest.mark.parametrize(
    ("version", "fail_on_spills", "fails"),
    [
        ("13.0.88", "OFF", True),
        ("13.5.3", "OFF", False),
        ("13.5.3", "ON", True),
        ("13.5.3", "1", True),
        ("13.5.3", "true", True),
        ("12.13.0", "OFF", False),
    ],
)
def test_launcher_removes_what_it_refuses(version, fail_on_spills, fails, tmp_path):
    """A shell script stands for the compiler. It writes its output file, and prints what ptxas prints about spills."""
    compiler = tmp_path / "nvcc"
    compiler.write_text('#!/bin/sh\ntouch "$3"\necho "    8 bytes spill stores, 8 bytes spill loads"\n')
    compiler.chmod(0o755)
    made = tmp_path / "kernel.o"
    launcher = ROOT / "cmake" / "checked_nvcc.py"
    command = [sys.executable, launcher, version, fail_on_spills, compiler, "-c", "-o", made]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == (1 if fails else 0)
    assert "registers were spilled" in run.stdout
    assert made.exists() == (not fails)


#: What nvcc makes of a kernel whose warpgroups share out registers, and of another one.
PTX = """
.target sm_90a
.entry sharing(
    .param .align 64 .b8 sharing_param_0[704]
)
.maxntid {threads}
.minnctapersm 1
{{
    setmaxnreg.inc.sync.aligned.u32 224;
    ret;
}}
.entry other(
    .param .u32 other_param_0
)
.maxntid 256, 1, 1
{{
    ret;
}}
"""
PTXAS_OUTPUT = """ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compiling entry function 'sharing' for 'sm_90a'
ptxas info    : Function properties for sharing
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers
"""


@pytest.mark.parametrize(
    ("threads", "registers", "expected"),
    [
        ("384, 1, 1", "168", 168),
        ("384", "168", 168),
        ("128, 4, 1", "128", 128),
        ("384, 1, 1", "160", 168),
        ("512, 1, 1", "168", 128),
        ("384, 1, 1", "no", 168),
    ],
)
def test_build_fails_on_registers_that_cannot_be_shared_out(
    threads: str, registers: str, expected: int, tmp_path: Path
) -> None:
    """A kernel would wait for ever for registers that its block does not have. This is an error with every version."""
    found = checked_nvcc.registers_at_launch(PTX.format(threads=threads))
    assert found == {"sharing": expected}
    (tmp_path / "printed").write_text(PTXAS_OUTPUT.format(registers=registers))
    (tmp_path / "ptx").write_text(PTX.format(threads=threads))
    compiler, made = tmp_path / "nvcc", tmp_path / "kernel.o"
    compiler.write_text(
        f'#!/bin/sh\ntouch "$3"\ncat {tmp_path}/printed\nwhile [ "$1" != --keep-dir ]; do shift; done\n'
        f'cp {tmp_path}/ptx "$2/kernel.ptx"\n'
    )
    compiler.chmod(0o755)
    launcher = ROOT / "cmake" / "checked_nvcc.py"
    command = [sys.executable, launcher, "13.5.3", "OFF", compiler, "-c", "-o", made]
    run = subprocess.run(command, capture_output=True, text=True)
    fails = registers != str(expected)
    assert run.returncode == (1 if fails else 0)
    assert (f"setmaxnreg in sharing: expected {expected} registers at launch, got {registers}" in run.stdout) == fails
    assert made.exists() == (not fails)


if __name__ == "__main__":
    print(table(kernels()))
