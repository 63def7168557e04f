"""Stores the results of compilations, so that a kernel is compiled only if its result is not in compilations.json.

The file maps a hash to the resources of the compiled kernel. The hash covers everything that the result depends on:
- the kernel in TTIR, Triton's first intermediate language, without source lines,
- Triton's options, such as the number of warps,
- the architecture and the version of Triton.
So an entry is valid as long as the kernel, its tile and Triton do not change. Comments may change. After a change,
`python tests/triton/aot.py --store` compiles what is new and writes the file again. Without this, the tests of the
table pass or fail as before, but take minutes longer.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import stub_driver
import triton
from triton import knobs

FILE = Path(__file__).with_name("compilations.json")

#: The metadata of a compiled kernel that are stored. Triton needs them to launch it.
METADATA = ("name", "num_warps", "shared", "tmem_size")


class Compilation(NamedTuple):
    """The result of compiling one kernel.

    mma: how many instructions for matrix products there are, of each kind
    plain_loads: the result of `count_plain_loads`
    """

    hash: str
    metadata: dict[str, object]
    usage: stub_driver.Usage
    mma: dict[str, int]
    plain_loads: int

    @classmethod
    def of(cls, binary: triton.compiler.CompiledKernel) -> Compilation:
        """The compilation of a kernel, which was compiled after `install`."""
        hash, metadata, usage, mma, plain_loads = json.loads(binary.kernel)
        return cls(hash, metadata, stub_driver.Usage(*usage), mma, plain_loads)


def install(is_fresh: bool) -> None:
    """From now on, Triton puts a `Compilation`, as JSON, in the place of a kernel's machine code.

    is_fresh: all kernels are compiled. Otherwise, kernels whose results are in the file are not
    """
    stored = {} if is_fresh or not FILE.exists() else json.loads(FILE.read_text())

    def hook(backend=None, stages=None, options=None, language=None, capability=None) -> tuple[str, str] | None:
        """Triton calls this hook without arguments for a part of the key of its own cache.

        Later, for each kernel, it passes the stages of a compilation: ttir, ttgir, llir, ptx and cubin.
        """
        if stages is None:
            return "compilations", "compilations"
        after_ttir = list(stages)[1:]
        makers = [(name, stages.pop(name)) for name in after_ttir]

        def make(module, metadata) -> bytes:
            """All stages after ttir, or the stored result of them."""
            source = "\n".join((module.str_nodebug(), options.hash(), str(capability), triton.__version__))
            hash = hashlib.sha256(source.encode()).hexdigest()[:24]
            if hash in stored:
                result = Compilation(hash, *stored[hash])
                metadata.update(result.metadata)
            else:
                for name, maker in makers:
                    module = maker(module, metadata)
                    if name == "ttgir":
                        plain_loads = count_plain_loads(module.str_nodebug())
                    if name == "ptx":
                        mma = count_mma(module)
                added = {name: metadata[name] for name in METADATA if name in metadata}
                result = Compilation(hash, added, stub_driver.usage_of(module), mma, plain_loads)
            return json.dumps(result).encode()

        stages["cubin"] = make
        return None

    knobs.runtime.add_stages_inspection_hook = hook
    knobs.compilation.always_compile = is_fresh


def count_mma(ptx: str) -> dict[str, int]:
    """How many instructions for matrix products there are, of each kind."""
    return {
        "mma.sync": len(re.findall(r"\bmma\.sync", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
    }


#: The operations of TTGIR that multiply matrices, those that only move a tile on its way to a product, and the loads.
PRODUCT = re.compile(r"tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma")
MOVE = re.compile(r"ttg\.(convert_layout|local_alloc|local_load|memdesc_trans)|tt\.trans|ttng\.tmem_alloc")
TILE_LOAD = re.compile(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr<b?f16>")


def count_plain_loads(ttgir: str) -> int:
    """How many loads of 16-bit factors of matrix products stay in a loop together with the product.

    Triton's software pipeline makes asynchronous copies of such loads. A load that stays in the loop makes each step
    wait for memory. Loads of biases and masks do not count, because these are no factors of a product.
    """
    loops: list[int] = []  # the indents of the loops around the line
    tiles: dict[str, int] = {}  # for each value that is a tile loaded in the innermost loop, the line of the load
    plain = set()
    for number, line in enumerate(ttgir.splitlines()):
        code = line.strip()
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1]:
            loops.pop()
            tiles.clear()
        if re.search(r"\bscf\.(for|while)\b", code):
            loops.append(indent)
            tiles.clear()
        if not loops or not (match := re.match(r"(?:(%[\w.$-]+)(?::\d+)? = )?(.*)", code)):
            continue
        value, operation = match.groups()
        sources = [tiles[name] for name in re.findall(r"%[\w.$-]+", operation) if name in tiles]
        tiles.pop(value, None)  # names are used again in other regions
        if PRODUCT.match(operation):
            plain.update(sources)
        elif TILE_LOAD.match(operation):
            tiles[value] = number
        elif MOVE.match(operation) and sources:
            tiles[value] = sources[0]
    return len(plain)


def store(results: list[Compilation]) -> None:
    """Writes the file. Results that are not among `results` are removed from it."""
    lines = sorted(f"{json.dumps(result.hash)}: {json.dumps(result[1:])}" for result in results)
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
