"""Which GPUs can run a binary of CUDA kernels, by the architectures that nvcc has built it for.

The architectures are written as CMake's CUDA_ARCHITECTURES, with commas: "80" stands for machine code of sm_80 and for
PTX, which the driver compiles for later GPUs; "80-real" for the machine code alone, "80-virtual" for the PTX alone.
The rules are those of the CUDA programming guide, "Compute capability" and "Architecture-specific features":

- Machine code runs on GPUs of the same major number and the same or a higher minor number.
- PTX runs on GPUs of the same or a higher compute capability.
- With the suffix a, as in "90a", both run on this compute capability alone. With f, both run on the same major number.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Capability = tuple[int, int]


class Architecture(NamedTuple):
    """One entry of the list.

    capability: the compute capability, such as (9, 0)
    suffix: "", "a" or "f"
    """

    capability: Capability
    suffix: str
    has_machine_code: bool
    has_ptx: bool

    @property
    def name(self) -> str:
        """The name without sm_ or compute_, such as 90a."""
        return "".join(map(str, self.capability)) + self.suffix

    def __str__(self) -> str:
        kinds = [kind for kind, has in (("machine code", self.has_machine_code), ("PTX", self.has_ptx)) if has]
        return f"sm_{self.name} ({' and '.join(kinds)})"

    def way_on(self, capability: Capability) -> str | None:
        """How its kernels run on a GPU: "machine code of sm_80" or "PTX of sm_80, ..."; None if they cannot."""
        is_same_major = self.capability[0] == capability[0] and self.capability[1] <= capability[1]
        fits = {"a": self.capability == capability, "f": is_same_major}
        if self.has_machine_code and fits.get(self.suffix, is_same_major):
            return f"machine code of sm_{self.name}"
        if self.has_ptx and fits.get(self.suffix, self.capability <= capability):
            return f"PTX of sm_{self.name}, which the driver compiles at first use"
        return None


def parsed(architectures: str) -> tuple[Architecture, ...]:
    """The entries of a list such as "80,90a-real".

    Raises:
        ValueError: an entry is no architecture.
    """
    return tuple(map(_parsed_entry, filter(None, architectures.split(","))))


def _parsed_entry(entry: str) -> Architecture:
    found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
    if found is None:
        raise ValueError(f"architectures: expected entries such as 80 or 90a-real, got {entry!r}")
    major, minor, suffix, kind = found.groups()
    return Architecture((int(major), int(minor)), suffix, kind != "-virtual", kind != "-real")


def way_on(architectures: tuple[Architecture, ...], capability: Capability) -> str | None:
    """How a GPU runs a binary with these architectures: by machine code if there is some, else by PTX, else None."""
    ways = [way for way in (architecture.way_on(capability) for architecture in architectures) if way is not None]
    return max(ways, key=lambda way: way.startswith("machine code"), default=None)
