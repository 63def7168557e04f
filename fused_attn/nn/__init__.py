"""Modules on the fused kernel: `torch.nn.MultiheadAttention`, `torch.nn.Transformer*`, and models built of these."""

from fused_attn.nn.attention import FusedMultiheadAttention
from fused_attn.nn.cache import CrossAttentionCache, KVCache, LayerCache, PagedBatch, SlidingKVCache, StaticKVCache
from fused_attn.nn.convert import convert_attention
from fused_attn.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fused_attn.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fused_attn.nn.paged_cache import OutOfPages, PagedKVCache
from fused_attn.nn.paged_self_attention import PagedSelfAttentionCache
from fused_attn.nn.positions import RotaryEmbedding, T5RelativeBias
from fused_attn.nn.self_attention_cache import (
    SelfAttentionCache,
    SlidingSelfAttentionCache,
    StaticSelfAttentionCache,
)
from fused_attn.nn.seq2seq import Seq2SeqTransformer
from fused_attn.nn.transformer import Transformer

__all__ = [
    "CrossAttentionCache",
    "FusedMultiheadAttention",
    "KVCache",
    "LayerCache",
    "OutOfPages",
    "PagedBatch",
    "PagedKVCache",
    "PagedSelfAttentionCache",
    "RotaryEmbedding",
    "SelfAttentionCache",
    "Seq2SeqTransformer",
    "SlidingKVCache",
    "SlidingSelfAttentionCache",
    "StaticKVCache",
    "StaticSelfAttentionCache",
    "T5RelativeBias",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "convert_attention",
]
