"""`Seq2SeqTransformer` maps tokens to tokens, trains on padded batches, and generates with a KV cache."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from fused_attn import modes
from fused_attn.nn.attention import FusedMultiheadAttention
from fused_attn.nn.cache import KVCache
from fused_attn.nn.tracing import call_node
from fused_attn.nn.transformer import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    check_layer,
)

POSITIONAL = ("sinusoidal", "learned", "rotary")

MINUS_INF = float("-inf")


class Seq2SeqTransformer(nn.Module):
    """Encoder-decoder Transformer over tokens ("Attention is all you need"), with embeddings and generator.

    >>> import torch
    >>> from fused_attn import Seq2SeqTransformer
    >>> model = Seq2SeqTransformer(100, 80, d_model=64, nhead=4, num_encoder_layers=2, num_decoder_layers=2)
    >>> src, tgt = torch.randint(3, 100, (4, 20)), torch.randint(3, 80, (4, 12))  # 0 is padding
    >>> src[1, 15:] = 0
    >>> model(src, tgt).shape
    torch.Size([4, 12, 80])
    >>> tokens = model.generate(src, max_new_tokens=5)

    Every batch is batch-first and padded with ``pad_id`` on the right. The model builds the masks from the tokens:
    (B, S) masks for padding, and a flag for the causal mask. No (L, S) mask is ever stored.

    Args:
        src_vocab_size: source tokens are in [0, src_vocab_size).
        tgt_vocab_size: target tokens are in [0, tgt_vocab_size).
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation, norm_first: as in
            `torch.nn.Transformer`. ``dropout`` also applies to the embeddings.
        max_len: the longest source or target.
        positional: "sinusoidal" or "learned" for a position embedding. With "rotary", queries and keys of
            self-attention are rotated by their positions.
        pad_id: the token for padding. Padding is ignored wherever it stands.
        sos_id: the token at the start of every target.
        eos_id: the token at the end of a target. pad_id, sos_id and eos_id must be different.
        share_embeddings: source and target have the same token embedding. The vocabularies must have the same size.
        tie_generator: the generator uses the weight of the target embedding.
        num_kv_heads: heads of keys and values in every attention (GQA). Fewer than ``nhead`` make the KV cache smaller.
        backend: see `fused_attention`.

    Raises:
        TypeError: a size is no int.
        ValueError: an argument has a value that does not fit.
    """

    def __init__(
        self,
        src_vocab_size: int,
        tgt_vocab_size: int,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        norm_first: bool = False,
        max_len: int = 1024,
        positional: str = "sinusoidal",
        pad_id: int = 0,
        sos_id: int = 1,
        eos_id: int = 2,
        share_embeddings: bool = False,
        tie_generator: bool = False,
        *,
        num_kv_heads: int | None = None,
        backend: str | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_vocabularies(src_vocab_size, tgt_vocab_size, pad_id, sos_id, eos_id, share_embeddings)
        for name, count in (
            ("max_len", max_len),
            ("num_encoder_layers", num_encoder_layers),
            ("num_decoder_layers", num_decoder_layers),
        ):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        check_layer(d_model, nhead, dim_feedforward, dropout)
        if positional not in POSITIONAL:
            raise ValueError(f"positional: expected one of {POSITIONAL}, got {positional!r}")
        self.d_model, self.max_len = d_model, max_len
        self.pad_id, self.sos_id, self.eos_id = pad_id, sos_id, eos_id
        factory = {"device": device, "dtype": dtype}

        self.src_embedding = nn.Embedding(src_vocab_size, d_model, padding_idx=pad_id, **factory)
        self.tgt_embedding = (
            self.src_embedding
            if share_embeddings
            else nn.Embedding(tgt_vocab_size, d_model, padding_idx=pad_id, **factory)
        )
        self.positional = positional
        for name in ("src_positions", "tgt_positions"):
            table = nn.Parameter(torch.empty(max_len, d_model, **factory)) if positional == "learned" else None
            self.register_parameter(name, table)
        self._sinusoids: Tensor | None = None  # made when first needed, see _sinusoidal
        self.embedding_dropout = nn.Dropout(dropout)

        def attention(rotary: bool) -> FusedMultiheadAttention:
            """An attention module for a layer; the argument says whether positions rotate queries and keys."""
            return FusedMultiheadAttention(
                d_model,
                nhead,
                dropout,
                batch_first=True,
                num_kv_heads=num_kv_heads,
                rotary=rotary,
                backend=backend,
                **factory,
            )

        layer_arguments = {
            "d_model": d_model,
            "nhead": nhead,
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "activation": activation,
            "batch_first": True,
            "norm_first": norm_first,
            **factory,
        }
        encoder_layer = TransformerEncoderLayer(**layer_arguments)
        decoder_layer = TransformerDecoderLayer(**layer_arguments)
        encoder_layer.self_attn = attention(rotary=positional == "rotary")
        decoder_layer.self_attn = attention(rotary=positional == "rotary")
        decoder_layer.multihead_attn = attention(rotary=False)
        # Pre-norm layers leave their sum unnormalised, so a norm follows. Post-norm layers end in a norm already.
        norms = [nn.LayerNorm(d_model, **factory) if norm_first else None for _ in range(2)]
        self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norms[0])
        self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norms[1])
        self.generator = nn.Linear(d_model, tgt_vocab_size, **factory)
        self._tie_generator = tie_generator
        # load_state_dict(assign=True) makes a separate parameter of each entry. The hook ties the weights again.
        self.register_load_state_dict_post_hook(_tie_after_loading)
        self._init_weights()

    def reset_parameters(self) -> None:
        """Fills every parameter with its initial values.

        Matrices are Xavier-uniform, as in `torch.nn.Transformer`. Embeddings have unit variance after they are scaled.

        A model that was made with ``device="meta"`` can be used after ``to_empty(device=...)`` and a call of this
        method. Instead of this method, you may load a state dict.
        """
        modules = [*self.encoder.modules(), *self.decoder.modules()]
        for module in modules:
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        # Attention comes after the loop above has reset its out_proj, because the bias of out_proj starts at zero.
        for module in modules:
            if isinstance(module, nn.MultiheadAttention):
                module._reset_parameters()
        self._init_weights()

    def _init_weights(self) -> None:
        """The part of the initialisation that the constructors of the layers have not done."""
        for stack in (self.encoder, self.decoder):
            for parameter in stack.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for embedding in (self.src_embedding, self.tgt_embedding):
            nn.init.normal_(embedding.weight, std=self.d_model**-0.5)
            with torch.no_grad():
                embedding.weight[self.pad_id].zero_()
        tables: Any = (self.src_positions, self.tgt_positions)
        for table in tables:
            if table is not None:
                nn.init.normal_(table, std=0.02)
        if self._tie_generator:
            self.generator.weight = self.tgt_embedding.weight
            bound = self.d_model**-0.5  # as in nn.Linear
            nn.init.uniform_(self.generator.bias, -bound, bound)
        else:
            self.generator.reset_parameters()

    def _apply(self, fn, recurse=True):
        """Applies ``to``, ``to_empty``, ``half`` and so on to all parameters, and ties the weights again."""
        # to_empty and conversions to another kind of device make a new parameter for each place, which unties weights.
        weight, generator_weight = self._tied_weights()
        super()._apply(fn, recurse)
        if weight is not None and generator_weight is weight:
            self.generator.weight = self.tgt_embedding.weight
        return self

    def _tied_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """The weights of embedding and generator. None stands for a module that an adapter has replaced."""
        return self.tgt_embedding._parameters.get("weight"), self.generator._parameters.get("weight")

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits of the token that follows each target token.

        Args:
            src: (B, S) int64 or int32, padded with ``pad_id``.
            tgt: (B, T) int64 or int32, which begins with ``sos_id`` and is padded with ``pad_id``.

        Returns:
            logits: (B, T, tgt_vocab_size). Of the targets, ``logits[:, t]`` depends on ``tgt[:, : t + 1]`` alone.

        Raises:
            TypeError: the tokens have another dtype.
            ValueError: the tokens have a wrong shape, or some are out of range.
        """
        if has_torch_function_variadic(src, tgt):
            node = call_node(self, src, tgt)
            if node is not None:
                return node
        if src.shape[:1] != tgt.shape[:1]:
            raise ValueError(f"tgt: expected the batch size of src, {src.shape[0]}, got shape {tuple(tgt.shape)}")
        return self.decode(tgt, *self.encode(src))

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """The memory of the source tokens, for `decode`.

        Args:
            src: (B, S) int64 or int32, padded with ``pad_id``.

        Returns:
            memory: (B, S, E).
            memory_key_padding_mask: (B, S) bool, True = ignore.

        Raises:
            TypeError: the tokens have another dtype.
            ValueError: the tokens have a wrong shape, or some are out of range.
        """
        x = self._embed("src", src, self.src_embedding)
        padding = src == self.pad_id
        return self.encoder(x, src_key_padding_mask=padding), padding

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_key_padding_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, tgt_vocab_size) of the token that follows each of the target tokens (B, T).

        Args:
            tgt: (B, T) int64 or int32. With a cache: only the tokens that are new since the last call. Padding among
                them is then not ignored. This matters only to tokens that follow padding.
            memory: (B, S, E), from `encode`.
            memory_key_padding_mask: (B, S), from `encode`.
            cache: a new ``KVCache(num_decoder_layers)`` at the first call of a generation. Pass the same cache to the
                later calls.

        Raises:
            TypeError: the tokens have another dtype, or the cache is no `KVCache`.
            ValueError: the tokens have a wrong shape, some are out of range, or the cache does not fit.
        """
        start = 0 if cache is None else cache.length
        x = self._embed("tgt", tgt, self.tgt_embedding, start)
        arguments: dict[str, Any] = {"memory_key_padding_mask": memory_key_padding_mask}
        if cache is not None:  # self-attention with a cache is causal by itself
            arguments["cache"] = cache
        else:
            arguments |= {"tgt_key_padding_mask": tgt == self.pad_id, "tgt_is_causal": True}
            if not getattr(self.decoder, "takes_is_causal", False):
                arguments["tgt_mask"] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = self.decoder(x, memory, **arguments)
        return self.generator(x)

    @torch.no_grad()
    def generate(
        self,
        src: Tensor,
        max_new_tokens: int,
        *,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        length_penalty: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Generate a target for each source: greedily, by sampling, or by beam search.

        - Dropout is off during the generation.
        - The target of a source does not depend on the other sources in the batch, unless tokens are sampled.
        - ``pad_id`` and ``sos_id`` are never generated.
        - If a layer of the decoder, or its self-attention, is of a class that takes no cache, each step computes all
          tokens again, and a warning says so.

        Args:
            src: (B, S) int64 or int32, padded with ``pad_id``.
            max_new_tokens: the most tokens of a target, ``eos_id`` included; at most ``max_len``.
            num_beams: the number of hypotheses for each source; 1 = no beam search. A search ends when ``num_beams``
                hypotheses have ended and no unfinished one scores better. An ended hypothesis wins over unfinished
                ones.
            do_sample: draw each token from its distribution. With False, the likeliest token is taken.
            temperature: divides the logits before sampling.
            top_k: sample among the k likeliest tokens.
            top_p: sample among the fewest likeliest tokens whose probabilities add up to at least top_p.
            length_penalty: for beam search. A hypothesis of n tokens scores ``log-probability / n ** length_penalty``.
            generator: source of the random numbers. The default is torch's generator.

        Returns:
            tokens: (B, N) int64, N <= max_new_tokens. Each target is without ``sos_id`` and ends with ``eos_id``, which
                ``pad_id`` follows. A target of max_new_tokens may be without ``eos_id``. An empty batch has N = 0.

        Raises:
            TypeError: the tokens have another dtype, or a number is no int.
            ValueError: an argument is out of range, or two arguments exclude each other.
        """
        self._check_generate(max_new_tokens, num_beams, do_sample, temperature, top_k, top_p, length_penalty)
        with _evaluating(self):
            memory, padding = self.encode(src)
            if not src.shape[0]:
                return torch.empty(0, 0, dtype=torch.int64, device=memory.device)
            if num_beams > 1:
                return self._beam_search(memory, padding, max_new_tokens, num_beams, length_penalty)

            def choose(logits: Tensor) -> Tensor:  # (B, V) -> (B,)
                if not do_sample:
                    return logits.argmax(dim=-1)
                probabilities = sampling_probabilities(logits, temperature, top_k, top_p)
                return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

            return self._extend(memory, padding, max_new_tokens, choose)

    def _extend(
        self, memory: Tensor, padding: Tensor, max_new_tokens: int, choose: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Generates targets one token at a time; returns their tokens (B, N).

        memory, padding: the results of `encode`
        choose: maps logits (B, V) to the next tokens (B,)
        """
        batch = memory.shape[0]
        cache = self._new_cache()
        tokens = torch.full((batch, 1 + max_new_tokens), self.pad_id, device=memory.device)
        tokens[:, 0] = self.sos_id
        has_ended = torch.zeros(batch, dtype=torch.bool, device=memory.device)
        for end in range(1, 1 + max_new_tokens):
            newest = choose(self._next_logits(tokens[:, :end], memory, padding, cache))
            tokens[:, end] = newest.masked_fill(has_ended, self.pad_id)
            has_ended |= tokens[:, end] == self.eos_id
            if has_ended.all():
                break
        return tokens[:, 1 : 1 + end]

    def _beam_search(
        self, memory: Tensor, padding: Tensor, max_new_tokens: int, num_beams: int, length_penalty: float
    ) -> Tensor:
        """The best hypothesis of each source, (B, N). K is `num_beams`. memory and padding are the results of `encode`.

        open_beams:   (B, K, 1 + max_new_tokens), the likeliest unfinished hypotheses, best first
        open_log_p:   (B, K), the log-probabilities of open_beams
        ended:        (B, K, 1 + max_new_tokens), the best finished hypotheses, best first
        ended_scores: (B, K), the scores of ended; -inf = there is no such hypothesis yet
        """
        batch, device = memory.shape[0], memory.device
        memory, padding = (x.repeat_interleave(num_beams, dim=0) for x in (memory, padding))
        cache = self._new_cache()
        open_beams = torch.full((batch, num_beams, 1 + max_new_tokens), self.pad_id, device=device)
        open_beams[:, :, 0] = self.sos_id
        ended = open_beams
        # All beams of a source begin as the same hypothesis, so only one of them may count.
        open_log_p = torch.full((batch, num_beams), MINUS_INF, device=device, dtype=_float_dtype(memory))
        open_log_p[:, :1] = 0.0
        ended_scores = torch.full_like(open_log_p, MINUS_INF)
        is_done = torch.zeros(batch, 1, dtype=torch.bool, device=device)
        first_row = torch.arange(batch, device=device)[:, None] * num_beams  # the first row of each source in memory

        for end in range(1, 1 + max_new_tokens):
            log_p = self._next_logits(open_beams[:, :, :end].flatten(0, 1), memory, padding, cache).log_softmax(dim=-1)
            vocab = log_p.shape[1]
            log_p = open_log_p[:, :, None] + log_p.view(batch, num_beams, vocab)  # (B, K, V)
            # At most one hypothesis of each of the K beams ends with eos_id, so at least K of these 2K go on.
            log_p, index = log_p.flatten(1).topk(2 * num_beams)  # (B, 2K)
            beam, token = index // vocab, index % vocab
            hypotheses = _select(open_beams, beam)
            hypotheses[:, :, end] = token
            ends = token == self.eos_id

            scores = log_p / end**length_penalty
            scores = scores.masked_fill(~ends | is_done, MINUS_INF)
            ended_scores, best = torch.cat((ended_scores, scores), dim=1).topk(num_beams)
            ended = _select(torch.cat((ended, hypotheses), dim=1), best)

            open_log_p, best = log_p.masked_fill(ends, MINUS_INF).topk(num_beams)
            open_beams = _select(hypotheses, best)
            is_done |= ended_scores[:, -1:] >= open_log_p[:, :1] / end**length_penalty
            if is_done.all():
                break
            if cache is not None:
                cache.reorder((first_row + beam.gather(1, best)).flatten(), include_cross_attention=False)

        tokens = torch.where(ended_scores[:, :1] > MINUS_INF, ended[:, 0], open_beams[:, 0])[:, 1:]
        return tokens[:, : int((tokens != self.pad_id).sum(dim=1).amax())]

    def _new_cache(self) -> KVCache | None:
        """A new cache, or None with a warning if a layer or an attention of another class takes no cache."""
        if getattr(self.decoder, "takes_cache", False):
            return KVCache(len(self.decoder.layers))
        warnings.warn(
            "generate: each step computes all tokens anew, since a layer of the decoder, or its self-attention, takes "
            "no cache (fused_attn.TransformerDecoderLayer and FusedMultiheadAttention do)",
            stacklevel=5,  # the caller of generate; no_grad adds frames in between
        )
        return None

    def _next_logits(self, tokens: Tensor, memory: Tensor, padding: Tensor, cache: KVCache | None) -> Tensor:
        """Logits (B, V), at least float32, of the token that follows the tokens (B, L).

        A cache already has all of these tokens except the last.
        """
        logits = self.decode(tokens if cache is None else tokens[:, -1:], memory, padding, cache=cache)[:, -1]
        logits = logits.to(_float_dtype(logits))
        logits[:, [self.pad_id, self.sos_id]] = MINUS_INF
        return logits

    def _embed(self, name: str, tokens: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        """Embeds tokens (B, L), the first of which has the position `start`; returns (B, L, E)."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32 tokens, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"{name}: expected shape (B, L), got {tuple(tokens.shape)}")
        end = start + tokens.shape[1]
        if end > self.max_len:
            raise ValueError(f"{name}: expected at most max_len={self.max_len} tokens, got {end}")
        try:
            x = embedding(tokens)
        except IndexError:
            bounds = tokens.min().item(), tokens.max().item()
            raise ValueError(
                f"{name}: expected tokens in [0, {embedding.num_embeddings}), got {bounds[0]} to {bounds[1]}"
            ) from None
        x = x * math.sqrt(self.d_model)
        if self.positional == "learned":
            positions: Any = self.src_positions if name == "src" else self.tgt_positions
            x = x + positions[start:end]
        elif self.positional == "sinusoidal":
            x = x + self._sinusoidal(x)[start:end]
        return self.embedding_dropout(x)

    def _sinusoidal(self, x: Tensor) -> Tensor:
        """The sinusoidal table (max_len, E), in the dtype and on the device of x.

        The table is no buffer, for two reasons. A model that is made on "meta" and then gets its parameters would lose
        a buffer that only the constructor fills. And with mixed precision, buffers and parameters can have different
        dtypes.
        """
        table = self._sinusoids
        if table is None or table.dtype != x.dtype or table.device != x.device or table.shape[0] != self.max_len:
            with torch.inference_mode(False):
                table = sinusoidal_positions(self.max_len, self.d_model, device=x.device, dtype=x.dtype)
            # A table that was made under a tracer or a transform belongs to that trace. Only other tables are stored.
            if type(x) is Tensor and modes.is_direct() and not torch.compiler.is_compiling():
                self._sinusoids = table
        return table

    def _check_generate(
        self,
        max_new_tokens: int,
        num_beams: int,
        do_sample: bool,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        length_penalty: float,
    ) -> None:
        """Raises TypeError or ValueError for arguments of `generate` that are out of range or exclude each other."""
        for name, count in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams), ("top_k", top_k)):
            if not isinstance(count, int) and not (name == "top_k" and count is None):
                raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
        if not 1 <= max_new_tokens <= self.max_len:
            raise ValueError(f"max_new_tokens: expected 1 to max_len={self.max_len}, got {max_new_tokens}")
        if num_beams < 1:
            raise ValueError(f"num_beams: expected at least 1, got {num_beams}")
        if do_sample and num_beams > 1:
            raise ValueError(f"num_beams: expected 1 with do_sample=True, got {num_beams}")
        if not do_sample:
            settings = (("temperature", temperature, 1.0), ("top_k", top_k, None), ("top_p", top_p, None))
            for name, value, default in settings:
                if value != default:
                    raise ValueError(f"{name}: expected {default} with do_sample=False, got {value}")
        if not temperature > 0.0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected None or at least 1, got {top_k}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p: expected None or a number in (0, 1], got {top_p}")
        if not math.isfinite(length_penalty):
            raise ValueError(f"length_penalty: expected a finite number, got {length_penalty}")


def _tie_after_loading(model: Seq2SeqTransformer, incompatible_keys) -> None:
    """A hook after ``load_state_dict``: the generator gets the weight of the target embedding again."""
    weights = model._tied_weights()
    if model._tie_generator and all(type(weight) is nn.Parameter for weight in weights):  # none is quantised or sharded
        model.generator.weight = model.tgt_embedding.weight


def sinusoidal_positions(length: int, d_model: int, *, device=None, dtype=None) -> Tensor:
    """A table (length, d_model) of sines in the even columns and cosines in the odd ones.

    The wavelengths grow geometrically from column to column. The default dtype is torch's default dtype.

    >>> from fused_attn.nn.seq2seq import sinusoidal_positions
    >>> sinusoidal_positions(10, 64).shape
    torch.Size([10, 64])
    """
    # Angles are float64 until the end. Angles grow with the position, and a rounded angle would shift the position.
    position = torch.arange(length, device=device, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, d_model, 2, device=device, dtype=torch.float64) * (-math.log(10000.0) / d_model))
    table = torch.stack(((position * rate).sin(), (position * rate).cos()), dim=-1).flatten(1)
    return table[:, :d_model].to(dtype or torch.get_default_dtype())


def sampling_probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities (B, V) to draw from.

    Tokens that top_k excludes have the probability 0, and so have those that top_p then excludes. The likeliest token
    always stays.

    >>> import torch
    >>> from fused_attn.nn.seq2seq import sampling_probabilities
    >>> sampling_probabilities(torch.tensor([[0.0, 0.0, -1.0]]), temperature=1.0, top_k=2, top_p=None)
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, MINUS_INF)
    probabilities = logits.softmax(dim=-1)
    if top_p is None:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # the sum over the likelier tokens
    likeliest = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, likeliest / likeliest.sum(dim=-1, keepdim=True))


def _select(hypotheses: Tensor, index: Tensor) -> Tensor:
    """From hypotheses (B, N, length) those with the numbers index (B, K); returns (B, K, length)."""
    return hypotheses.gather(1, index[:, :, None].expand(-1, -1, hypotheses.shape[2]))


def _float_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which probabilities of many tokens are added up: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Puts every submodule into eval mode, and afterwards back into the mode that it had."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def _check_vocabularies(
    src_vocab_size: int, tgt_vocab_size: int, pad_id: int, sos_id: int, eos_id: int, share_embeddings: bool
) -> None:
    """Raises ValueError if a special token is in no vocabulary, or if the sizes or tokens contradict each other."""
    for name, size in (("src_vocab_size", src_vocab_size), ("tgt_vocab_size", tgt_vocab_size)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    for name, token, size in (
        ("pad_id", pad_id, min(src_vocab_size, tgt_vocab_size)),
        ("sos_id", sos_id, tgt_vocab_size),
        ("eos_id", eos_id, tgt_vocab_size),
    ):
        if not 0 <= token < size:
            raise ValueError(f"{name}: expected a token in [0, {size}), got {token}")
    if len({pad_id, sos_id, eos_id}) < 3:
        raise ValueError(f"pad_id, sos_id, eos_id: expected three different tokens, got {(pad_id, sos_id, eos_id)}")
    if share_embeddings and src_vocab_size != tgt_vocab_size:
        raise ValueError(
            f"share_embeddings: expected vocabularies of one size, got {src_vocab_size} and {tgt_vocab_size}"
        )
