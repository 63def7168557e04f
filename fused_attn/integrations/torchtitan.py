"""The fused kernel as an attention of torchtitan: packed sequences, windows and a differentiable log-sum-exp.

torchtitan builds the attention of a layer from a ``Config``. `VarlenAttention.Config` is one, and it builds a module
that takes what torchtitan's own varlen attention takes. Neither this module nor torchtitan imports the other.

>>> import torch
>>> from typing import NamedTuple
>>> from fused_attn.integrations.torchtitan import VarlenAttention
>>> class VarlenMetadata(NamedTuple):  # torchtitan has such a class
...     cu_seq_q: torch.Tensor
...     cu_seq_k: torch.Tensor
...     max_q: int
...     max_k: int
>>> attention = VarlenAttention.Config(window_size=(128, 0)).build()
>>> query, key, value = torch.randn(3, 10, 4, 16).unbind()  # two documents of 4 and 6 tokens
>>> offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
>>> attention(query, key, value, attention_masks=VarlenMetadata(offsets, offsets, 6, 6)).shape
torch.Size([10, 4, 16])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fused_attn.api import fused_attention_varlen
from fused_attn.attention import checks


class VarlenAttention(nn.Module):
    """Attention over packed documents.

    Args:
        config: the options.
    """

    @dataclass(kw_only=True, slots=True)
    class Config:
        """The options of `VarlenAttention`.

        window_size: (left, right), how many tokens before and after itself a query sees; -1 = unbounded. The default is
            the causal mask.
        softcap, backend: see `fused_attention`.
        """

        window_size: tuple[int, int] = (-1, 0)
        softcap: float = 0.0
        backend: str | None = None

        def build(self) -> VarlenAttention:
            """The module with these options."""
            return VarlenAttention(self)

    def __init__(self, config: Config | None = None):
        super().__init__()
        if config is not None and not isinstance(config, VarlenAttention.Config):
            raise checks.wrong_type("config", "None or a VarlenAttention.Config", config)
        self.config = config or VarlenAttention.Config()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: Any,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The attention of each document to itself, (T, N, Dv). On a GPU, the host waits for nothing.

        Args:
            q: (T, N, H): T tokens of all documents, N heads, head dim H.
            k: (T, N, H), or fewer heads with ``enable_gqa``.
            v: (T, N, Dv), or fewer heads with ``enable_gqa``.
            attention_masks: an object with the fields of torchtitan's VarlenMetadata: cu_seq_q and cu_seq_k (documents
                + 1,) int32, max_q and max_k.
            scale: the factor of the scores; default ``1 / sqrt(H)``.
            enable_gqa: see `fused_attention`.
            out_transform: gets out (T, N, Dv) and lse (T, N), and returns the result. Gradients flow through both.

        Raises:
            TypeError, ValueError: an argument does not fit, such as a BlockMask in the place of VarlenMetadata.
        """
        fields = ("cu_seq_q", "cu_seq_k", "max_q", "max_k")
        if not all(hasattr(attention_masks, name) for name in fields):
            raise checks.fail(
                "attention_masks",
                f"an object with {', '.join(fields)}, as VarlenMetadata",
                type(attention_masks).__name__,
            )
        if out_transform is not None and not callable(out_transform):
            raise checks.wrong_type("out_transform", "None or a callable", out_transform)
        masks = attention_masks
        out, lse = fused_attention_varlen(
            q, k, v, masks.cu_seq_q, masks.cu_seq_k, masks.max_q, masks.max_k, scale=scale, enable_gqa=enable_gqa,
            window_size=self.config.window_size, softcap=self.config.softcap, diagonal_alignment="lower_right",
            return_lse=True, backend=self.config.backend,
        )  # fmt: skip
        return out if out_transform is None else out_transform(out, lse.transpose(0, 1))
