"""Fused attention for PyTorch that stays fast when there is a mask."""

from fused_attn.api import explain, fused_attention, fused_attention_varlen
from fused_attn.relative_bias import alibi_bias, t5_relative_bias

__version__ = "0.1.0"

__all__ = [
    "alibi_bias",
    "explain",
    "fused_attention",
    "fused_attention_varlen",
    "t5_relative_bias",
]
