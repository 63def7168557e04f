"""All that the plan of a call depends on as one hashable value, the signature, which a single native call makes.

Reading shape, dtype and device of three tensors in Python, and hashing them, takes longer than the kernel of a small
problem.
"""

from __future__ import annotations

from typing import Any

from fused_attn.native import _C


def _read(*arguments: Any) -> bytes | None:
    """The shapes and dtypes of tensors, and the types and values of other arguments.

    Returns None in two cases: there is no native module, or an argument is neither a plain tensor on the CPU nor a
    None, bool, int, float, str, or tuple or list of these.
    """
    return None


read = _read if _C is None else _C.signature
