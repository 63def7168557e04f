"""`Seq2SeqTransformer` maps tokens to tokens, trains on padded batches, and generates with a KV cache."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from fused_attn import modes
from fused_attn.attention import checks
from fused_attn.nn import element_dropout, generation
from fused_attn.nn.arguments import check_sizes
from fused_attn.nn.attention import FusedMultiheadAttention
from fused_attn.nn.cache import KVCache
from fused_attn.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fused_attn.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fused_attn.nn.generation import Generation, Settings
from fused_attn.nn.layer_checks import check_layer
from fused_attn.nn.paged_self_attention import paged_hint
from fused_attn.nn.restoring import restoring_layers
from fused_attn.nn.tracing import call_node

POSITIONAL = ("sinusoidal", "learned", "rotary")


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
        skip_padded_queries: self-attention leaves out padded tokens as queries, too; see `FusedMultiheadAttention`.
            Only the logits of padded targets change, which no loss should read.
        backend: see `fused_attention`.

    Raises:
        TypeError: a size is no int, or a flag is no bool.
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
        skip_padded_queries: bool = False,
        backend: str | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_vocabularies(src_vocab_size, tgt_vocab_size, pad_id, sos_id, eos_id, share_embeddings)
        check_sizes(1, max_len=max_len, num_encoder_layers=num_encoder_layers, num_decoder_layers=num_decoder_layers)
        check_layer(d_model, nhead, dim_feedforward, dropout, activation)
        checks.check_flags(norm_first=norm_first, tie_generator=tie_generator)
        if positional not in POSITIONAL:
            raise checks.fail("positional", f"one of {POSITIONAL}", repr(positional))
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
                skip_padded_queries=skip_padded_queries,
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
        for name, tokens in (("src", src), ("tgt", tgt)):
            checks.check_tensor(name, tokens)
            if tokens.dim() != 2:
                raise checks.fail(name, "shape (B, L)", tuple(tokens.shape))
        if src.shape[0] != tgt.shape[0]:
            raise checks.fail("tgt", f"the batch size of src, {src.shape[0]}", f"shape {tuple(tgt.shape)}")
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
        checks.check_tensor("src", src)
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
        with restoring_layers(getattr(cache, "layers", ())):
            return self.generator(self.decode_hidden(tgt, memory, memory_key_padding_mask, cache=cache))

    def decode_hidden(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_key_padding_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The output (B, T, E) of the decoder, from which the generator computes the logits of `decode`.

        The arguments and errors are those of `decode`.
        """
        checks.check_tensor("tgt", tgt)
        checks.check_tensor("memory", memory)
        checks.check_tensors(memory_key_padding_mask=memory_key_padding_mask)
        if cache is not None and not hasattr(cache, "layers"):
            raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}{paged_hint(cache)}")
        start = 0 if cache is None else cache.position
        x = self._embed("tgt", tgt, self.tgt_embedding, start)
        arguments: dict[str, Any] = {"memory_key_padding_mask": memory_key_padding_mask}
        if cache is not None:  # self-attention with a cache is causal by itself
            arguments["cache"] = cache
        else:
            arguments |= {"tgt_key_padding_mask": tgt == self.pad_id, "tgt_is_causal": True}
            if not getattr(self.decoder, "takes_is_causal", False):
                arguments["tgt_mask"] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.decoder(x, memory, **arguments)

    def recorded_step(
        self, tgt: Tensor, memory: Tensor, memory_key_padding_mask: Tensor | None, cache: KVCache
    ) -> Callable[[Tensor], Tensor] | None:
        """A function that computes `decode_hidden` for one new token (B, 1) of each target, with less work in Python.

        See `TransformerDecoder.recorded_step`, also for when this is None.
        """
        overrides = type(self).decode_hidden is not _DECODE_HIDDEN or "decode_hidden" in self.__dict__
        if overrides or type(self.decoder) is not TransformerDecoder or not tgt.is_cpu:
            return None
        row = memory.new_empty(tgt.shape[0], 1, memory.shape[2])
        decode = self.decoder.recorded_step(row, memory, memory_key_padding_mask, cache)
        if decode is None:
            return None
        return lambda tgt: decode(self._embed("tgt", tgt, self.tgt_embedding, cache.position))

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
        repetition_penalty: float = 1.0,
        prefix: Tensor | None = None,
        num_return_sequences: int = 1,
        stop_ids: int | Sequence[int] | Tensor = (),
        min_new_tokens: int = 0,
        logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
        return_scores: bool = False,
        on_tokens: Callable[[Tensor], bool | None] | None = None,
        progress: bool = False,
        cuda_graph: bool | None = None,
    ) -> Tensor | Generation:
        """Generate a target for each source: greedily, by sampling, or by beam search.

        - Dropout is off during the generation. If several threads generate with one model, call ``eval()`` first.
        - The target of a source does not depend on the other sources in the batch, unless tokens are sampled.
        - ``pad_id`` and ``sos_id`` are never generated.
        - If a layer of the decoder, or its self-attention, is of a class that takes no cache, each step computes all
          tokens again, and a warning says so.
        - On a GPU, a step is captured as a CUDA graph after two ordinary steps, and then replayed.

        Args:
            src: (B, S) int64 or int32, padded with ``pad_id``.
            max_new_tokens: the most tokens that are appended, ``eos_id`` included; at most ``max_len``.
            num_beams: the number of hypotheses for each source; 1 = no beam search. A search ends when ``num_beams``
                hypotheses have ended and no unfinished one scores better. An ended hypothesis wins over unfinished
                ones. With T tokens that end a target, a step looks at the ``num_beams * (1 + T)`` best continuations,
                so that num_beams of them go on. Those that end are kept if they are among the best ended ones.
            do_sample: draw each token from its distribution. With False, the likeliest token is taken.
            temperature: divides the logits before sampling.
            top_k: sample among the k likeliest tokens, and those that are as likely as the last of these.
            top_p: sample among the fewest likeliest tokens whose probabilities add up to at least top_p.
            length_penalty: for beam search, else 1.0. A hypothesis of n new tokens scores
                ``log-probability / n ** length_penalty``.
            generator: source of the random numbers. The default is torch's generator.
            repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the target
                contains already, its prefix included (Keskar et al., 2019). 1.0 changes nothing.
            prefix: (B, P) int64 or int32, tokens that each target begins with, after ``sos_id``. Shorter prefixes are
                padded with ``pad_id`` on the right. P + max_new_tokens is at most ``max_len``.
            num_return_sequences: R, the number of targets for each source: samples, or the best hypotheses of a beam
                search. If fewer targets are possible, the remaining ones are all ``pad_id``, and their score is -inf.
            stop_ids: tokens that end a target, besides ``eos_id``.
            min_new_tokens: so many tokens come before the one that ends a target.
            logits_processor: called in each step with the tokens so far (rows, n), ``sos_id`` included, and the logits
                (rows, V) of the next token, which is -inf for tokens that are never generated. It returns logits of the
                same shape and dtype, with -inf for a token that must not come next. The processors of Hugging Face
                have this form. A source has max(num_beams, R) rows. Shorter rows are padded with ``pad_id`` on the
                right. No step is captured as a CUDA graph then.
            return_scores: return a `Generation`, which also has the log-probabilities.
            on_tokens: called after each step with the new tokens (B * R,), on the device of the model. Targets that
                have ended get ``pad_id``. If the function returns True, the generation ends. On a GPU, up to four calls
                may follow after all targets have ended. The function must not change the model, because the steps of a
                generation are recorded.
            progress: show a progress bar, if rich is installed and the output is a terminal.
            cuda_graph: None = capture the step as a CUDA graph if possible. False = never. True = raise an error if
                this is not possible.

        Returns:
            tokens: (B * R, N) int64, N <= P + max_new_tokens. The R targets of a source follow one another. Each target
                is without ``sos_id``, begins with its prefix, and ends with ``eos_id`` or a stop token, which
                ``pad_id`` follows. A target of max_new_tokens may be without these. An empty batch has N = 0.
                With ``return_scores``, a `Generation`.

        Raises:
            TypeError: the tokens have another dtype, or another argument has the wrong type.
            ValueError: an argument is out of range, or two arguments exclude each other. The logits of a target were
                NaN or +inf, as float16 can overflow, or -inf for all tokens.
        """
        stop_ids = generation.checked_stop_ids(stop_ids)
        settings = Settings(
            max_new_tokens, min_new_tokens, num_beams, do_sample, temperature, top_k, top_p, repetition_penalty,
            length_penalty, num_return_sequences, stop_ids, logits_processor, generator,
        )  # fmt: skip
        generation.check(self, src, prefix, settings, on_tokens, progress, cuda_graph)
        checks.check_flag("return_scores", return_scores)
        with generation.evaluating(self):
            if not src.shape[0]:
                memory, _ = self.encode(src)
                tokens = torch.empty(0, 0, dtype=torch.int64, device=memory.device)
                dtype = torch.promote_types(memory.dtype, torch.float32)
                scores = torch.empty(0, dtype=dtype, device=memory.device)
                return Generation(tokens, scores, scores[:, None][:, :0]) if return_scores else tokens
            if not self.takes_cache:
                warnings.warn(
                    "generate: each step computes all tokens anew, since a layer of the decoder, or its "
                    "self-attention, takes no cache (fused_attn.TransformerDecoderLayer and FusedMultiheadAttention "
                    "do)",
                    stacklevel=3,  # the caller of generate; no_grad adds a frame in between
                )
            result = generation.generate(
                self, src, prefix, settings, on_tokens=on_tokens, progress=progress, cuda_graph=cuda_graph
            )
        return result if return_scores else result.tokens

    @property
    def takes_cache(self) -> bool:
        """Whether `decode` takes a cache. Every layer of the decoder must take its part of the cache."""
        return getattr(self.decoder, "takes_cache", False)

    @property
    def tgt_vocab_size(self) -> int:
        """The number of target tokens. A module, such as an adapter, may have wrapped the embedding."""
        return _num_tokens(self.tgt_embedding)

    def _embed(self, name: str, tokens: Tensor, embedding: nn.Embedding, start: int | Tensor = 0) -> Tensor:
        """Embeds tokens (B, L), the first of which has the position `start`; returns (B, L, E).

        start: an int, or (B,) on the device. The host reads such a tensor on a CPU alone, to check max_len
        """
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32 tokens, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise checks.fail(name, "shape (B, L)", tuple(tokens.shape))
        count = tokens.shape[1]
        if isinstance(start, int):
            rows: Any = slice(start, start + count)
            if rows.stop > self.max_len:
                raise checks.fail(name, f"at most max_len={self.max_len} tokens", rows.stop)
        else:
            if start.shape[0] != tokens.shape[0]:
                raise checks.fail(name, f"the batch size of the cache, {start.shape[0]}", tokens.shape[0])
            if modes.can_read(start) and start.numel() and (most := int(start.max()) + count) > self.max_len:
                raise checks.fail(name, f"at most max_len={self.max_len} tokens", most)
            rows = start[:, None] if count == 1 else start[:, None] + torch.arange(count, device=start.device)
        try:
            x = embedding(tokens)
        except IndexError:
            bounds = tokens.min().item(), tokens.max().item()
            expected = f"tokens in [0, {_num_tokens(embedding)})"
            raise checks.fail(name, expected, f"{bounds[0]} to {bounds[1]}") from None
        x = x * math.sqrt(self.d_model)
        if self.positional == "learned":
            positions: Any = self.src_positions if name == "src" else self.tgt_positions
            x = x + positions[rows]
        elif self.positional == "sinusoidal":
            x = x + self._sinusoidal(x)[rows]
        return element_dropout.call(self.embedding_dropout, x)

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


#: The method of the class, which a patch of the class may replace.
_DECODE_HIDDEN = Seq2SeqTransformer.decode_hidden


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


def _num_tokens(embedding: Any) -> int:
    """The number of tokens of an embedding, which another module may have wrapped."""
    for module in embedding.modules():
        if hasattr(module, "num_embeddings"):  # also that of a quantised embedding
            return module.num_embeddings
    raise checks.wrong_type(
        "tgt_embedding", "a module that is or contains an embedding, with num_embeddings", embedding
    )


def _check_vocabularies(
    src_vocab_size: int, tgt_vocab_size: int, pad_id: int, sos_id: int, eos_id: int, share_embeddings: bool
) -> None:
    """Raises TypeError if a size or token is no int, or share_embeddings no bool.

    Raises ValueError if a special token is in no vocabulary, or if the sizes or tokens contradict each other.
    """
    check_sizes(1, src_vocab_size=src_vocab_size, tgt_vocab_size=tgt_vocab_size)
    checks.check_flag("share_embeddings", share_embeddings)
    for name, token, size in (
        ("pad_id", pad_id, min(src_vocab_size, tgt_vocab_size)),
        ("sos_id", sos_id, tgt_vocab_size),
        ("eos_id", eos_id, tgt_vocab_size),
    ):
        checks.check_integer(name, token)
        if not 0 <= token < size:
            raise checks.fail(name, f"a token in [0, {size})", token)
    if len({pad_id, sos_id, eos_id}) < 3:
        raise checks.fail("pad_id, sos_id, eos_id", "three different tokens", (pad_id, sos_id, eos_id))
    if share_embeddings and src_vocab_size != tgt_vocab_size:
        raise checks.fail("share_embeddings", "vocabularies of one size", f"{src_vocab_size} and {tgt_vocab_size}")
