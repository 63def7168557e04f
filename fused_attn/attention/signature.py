"""The metadata of a call's tensors as one hashable value, which the native module reads in a single call.

Asking three tensors in Python for shape, dtype and device, and hashing the answers, takes longer than the kernel of a
small problem. Where there is no native module, or a tensor is anything but a plain one on the CPU, `read` returns None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.attention.checks import Meta
from fused_attn.native import _C

if _C is None:

    def read(query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None) -> bytes | None:
        return None

else:
    read = _C.signature
    _DTYPES = tuple(getattr(torch, dtype) for dtype in _C.signature_dtypes)
    _CPU = torch.device("cpu")


def metas(signature: bytes) -> list[Meta | None]:
    """What `read` has read, tensor by tensor."""
    words = iter(memoryview(signature).cast("q"))
    return [
        None if dtype < 0 else Meta(torch.Size([next(words) for _ in range(next(words))]), _DTYPES[dtype], _CPU)
        for dtype in words
    ]
