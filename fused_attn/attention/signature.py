"""The metadata of a call's tensors as one hashable value, the signature, which a single native call makes.

Reading shape, dtype and device of three tensors in Python, and hashing them, takes longer than the kernel of a small
problem. `read` returns None in two cases: there is no native module, or a tensor is not a plain tensor on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.attention.checks import Meta
from fused_attn.native import _C

if _C is None:

    def read(query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None) -> bytes | None:
        """None, because only the native module can read a signature."""
        return None

else:
    read = _C.signature
    _DTYPES = tuple(getattr(torch, dtype) for dtype in _C.signature_dtypes)
    _CPU = torch.device("cpu")


def metas(signature: bytes) -> list[Meta | None]:
    """The `Meta` of each tensor that a signature describes; None for a tensor that was None.

    A signature is a row of int64: for each tensor its dtype (-1 = no tensor), its rank, and its sizes.
    """
    words = iter(memoryview(signature).cast("q"))
    return [
        None if dtype < 0 else Meta(torch.Size([next(words) for _ in range(next(words))]), _DTYPES[dtype], _CPU)
        for dtype in words
    ]
