"""Which of torch's function transforms surround a call."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# Private names, so their absence must not break an import: then no transform is ever seen, as before they existed.
_are_functorch_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def are_active() -> bool:
    """True inside `torch.func` transforms and forward-mode AD, which see through PyTorch code but not into kernels."""
    return getattr(forward_ad, "_current_level", -1) >= 0 or _are_functorch_transforms_active()
