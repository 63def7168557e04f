"""Fused attention for PyTorch that stays fast when there is a mask."""

from fused_attn import subinterpreters  # noqa: F401  before torch is imported
from fused_attn.api import explain, fused_attention, fused_attention_paged, fused_attention_varlen
from fused_attn.attention.key_ranges import key_ranges_of, key_ranges_of_segments
from fused_attn.attention.relative_bias import alibi_bias, t5_relative_bias
from fused_attn.installation import info
from fused_attn.nn import (
    FusedMultiheadAttention,
    KVCache,
    PagedKVCache,
    Seq2SeqTransformer,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    convert_attention,
)

__version__ = "0.1.0"

__all__ = [
    "FusedMultiheadAttention",
    "KVCache",
    "PagedKVCache",
    "Seq2SeqTransformer",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "alibi_bias",
    "convert_attention",
    "explain",
    "fused_attention",
    "fused_attention_paged",
    "fused_attention_varlen",
    "info",
    "key_ranges_of",
    "key_ranges_of_segments",
    "t5_relative_bias",
]
