"""Those of `Inputs` that mask or bias, as the launcher takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MaskSpec(NamedTuple):
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    mask: Tensor | None = None
    key_padding: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


NO_MASK = MaskSpec()
