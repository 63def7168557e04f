"""`AttentionProblem`, the immutable description of a call for dispatch, backends and error messages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

from fused_attn.attention.inputs import Shapes

UNBOUNDED = -1


class Band(NamedTuple):
    """Visible diagonals: query ``i`` sees key ``j`` iff ``-left <= j - (i + offset) <= right``; -1 = unbounded side.

    Causal is ``right=0``; ``offset=0`` aligns the diagonal to the upper left, ``offset=S - L`` to the lower right.

    is_from_end: the diagonal ends at the last key that each sequence has. Its offset is then ``offset`` + (the number
        of keys of the sequence) - (the number of its queries), so that the queries are the last rows of their sequence.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    offset: int = 0
    is_from_end: bool = False

    @property
    def is_unbounded(self) -> bool:
        """Whether the band hides nothing."""
        return self.left == UNBOUNDED and self.right == UNBOUNDED

    def offset_of(self, seqlen_q: int, seqlen_k: int) -> int:
        """The offset of a sequence with these lengths."""
        return self.offset + (seqlen_k - seqlen_q if self.is_from_end else 0)


UNBOUNDED_BAND = Band()


class DropoutOrigin(NamedTuple):
    """The position of the first entry of the scores among the scores that dropout numbers.

    A call that computes a part of a larger attention drops the entries that the whole call would drop.
    """

    batch: int = 0
    head: int = 0
    query: int = 0
    key: int = 0


NO_ORIGIN = DropoutOrigin()


class Scalars(NamedTuple):
    """The numbers of a call that do not follow from the shapes of its tensors, as the registered operators take them.

    max_seqlen_q, max_seqlen_k: L and S; for a packed call, at least the lengths of the longest sequences
    num_splits: into how many parts the keys of a row are cut, if the kernel cuts them; 0 = the backend chooses
    dropout_batch, dropout_head, dropout_query, dropout_key: the `DropoutOrigin`
    """

    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    band_left: int = UNBOUNDED
    band_right: int = UNBOUNDED
    band_offset: int = 0
    band_from_end: bool = False
    num_splits: int = 0
    dropout_batch: int = 0
    dropout_head: int = 0
    dropout_query: int = 0
    dropout_key: int = 0


def lengths_of(shapes: Shapes, scalars: Scalars) -> tuple[int, int]:
    """L and S of a call of an operator, from the shapes where shapes tell them.

    `torch.jit.trace` stores the scalars of its example. Kernels that trusted the lengths among them would write beyond
    the results of a shorter call.
    """
    seqlen_q, seqlen_k = scalars.max_seqlen_q, scalars.max_seqlen_k
    if shapes.cu_seqlens_q is None:
        seqlen_q = shapes.query[2]
    if shapes.block_table is not None:
        seqlen_k = shapes.block_table[1] * shapes.key[1]
    elif shapes.cu_seqlens_k is None:
        seqlen_k = shapes.key[2]
    return seqlen_q, seqlen_k


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """Everything about one attention call except the contents of its tensors.

    Problems are compared and hashed by identity, so that a backend finds what it has cached for a problem quickly.

    is_packed:      the rows of all sequences stand one after another, see `Inputs`; ``batch`` is the number of
                    sequences, ``seqlen_q`` and ``seqlen_k`` are the largest lengths
    page_size:      the rows of a page of keys; 0 = keys and values are not paged
    num_ranges:     how many ranges of keys a query has (`Inputs.key_ranges`); 0 = the call has no ranges
    num_splits:     as in `Scalars`
    has_key_bias:   the key padding is floating point. The call may have no key bias nevertheless, if all entries of the
                    padding are 0 or -inf.
    allows_tf32:    the factors of float32 products may be rounded to TF32. Torch's setting for it can change between
                    calls, so a backend that obeys this setting fills in the field itself.
    dropout_origin: where the scores of this call lie in the scores of a larger attention
    is_part:        for backward: out and lse are those of rows with more keys than the keys of this call, so that the
                    probs of a row need not add up to 1
    capability:     the compute capability of a CUDA device, read from the device if not given; None without a GPU
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    band: Band = UNBOUNDED_BAND
    is_packed: bool = False
    has_mask: bool = False
    has_key_padding: bool = False
    has_key_lengths: bool = False
    num_ranges: int = 0
    page_size: int = 0
    num_splits: int = 0
    has_bias: bool = False
    has_key_bias: bool = False
    has_relative_bias: bool = False
    has_sinks: bool = False
    allows_tf32: bool = False
    dropout_origin: DropoutOrigin = NO_ORIGIN
    is_part: bool = False
    capability: tuple[int, int] | None = None
    #: How many query heads share a key head.
    group_size: int = field(init=False, default=1)
    #: The call has no tensors but query, key and value.
    is_plain: bool = field(init=False, default=False)
    #: Keys and values lie in pages, to which a block table leads.
    is_paged: bool = field(init=False, default=False)
    #: The call may have one of the tensors `inputs.SHARED`.
    has_shared: bool = field(init=False, default=False)
    #: What backends keep for their later calls, by the name of the backend.
    prepared: dict[str, Any] = field(init=False, default_factory=dict)
    #: The dtype of the scores, the lse and the gradients of biases: float64 for float64 inputs, else float32.
    accumulate_dtype: torch.dtype = field(init=False, default=torch.float32)

    @classmethod
    def of(cls, shapes: Shapes, dtype: torch.dtype, device: torch.device, scalars: Scalars) -> AttentionProblem:
        """The problem of a call. Every call makes its problem here.

        Args:
            shapes: those of the `Inputs`.
            dtype: the dtype of query, key and value.
        """
        offsets, is_paged = shapes.cu_seqlens_q, shapes.block_table is not None
        return cls(
            batch=shapes.query[0] if offsets is None else offsets[0] - 1,
            num_heads=shapes.query[1],
            num_kv_heads=shapes.key[2 if is_paged else 1],
            seqlen_q=scalars.max_seqlen_q,
            seqlen_k=scalars.max_seqlen_k,
            head_dim=shapes.query[-1],
            value_dim=shapes.value[-1],
            dtype=dtype,
            device=device,
            scale=scalars.scale,
            softcap=scalars.softcap,
            dropout_p=scalars.dropout_p,
            band=Band(scalars.band_left, scalars.band_right, scalars.band_offset, scalars.band_from_end),
            dropout_origin=DropoutOrigin(
                scalars.dropout_batch, scalars.dropout_head, scalars.dropout_query, scalars.dropout_key
            ),
            is_packed=offsets is not None,
            has_mask=shapes.mask is not None,
            has_key_padding=shapes.key_padding is not None,
            has_key_lengths=shapes.key_lengths is not None,
            num_ranges=0 if shapes.key_ranges is None else shapes.key_ranges[3],
            page_size=shapes.key[1] if is_paged else 0,
            num_splits=scalars.num_splits,
            has_bias=shapes.bias is not None,
            has_key_bias=shapes.key_bias is not None,
            has_relative_bias=shapes.relative_bias is not None,
            has_sinks=shapes.sinks is not None,
        )

    @property
    def scalars(self) -> Scalars:
        """The numbers of the problem in the form that the registered operators take."""
        numbers = (self.seqlen_q, self.seqlen_k, self.scale, self.softcap, self.dropout_p)
        return Scalars(*numbers, *self.band, self.num_splits, *self.dropout_origin)

    def __post_init__(self):
        has_shared = self.has_bias or self.has_key_bias or self.has_relative_bias or self.has_sinks
        has_others = (
            self.is_packed or self.has_mask or self.num_ranges > 0 or self.has_key_padding or self.has_key_lengths
        ) or self.dropout_p > 0.0
        object.__setattr__(self, "group_size", self.num_heads // max(self.num_kv_heads, 1))
        object.__setattr__(self, "is_paged", self.page_size != 0)
        object.__setattr__(self, "has_shared", has_shared)
        object.__setattr__(self, "is_plain", not (has_shared or has_others))
        object.__setattr__(self, "accumulate_dtype", torch.float64 if self.dtype == torch.float64 else torch.float32)
        if self.capability is None and self.device.type == "cuda" and torch.cuda.is_available():
            object.__setattr__(self, "capability", torch.cuda.get_device_capability(self.device))

    def on(self, device: torch.device | str | int) -> AttentionProblem:
        """The same problem on another device, or on an NVIDIA architecture such as ``"sm_90"``.

        Raises:
            ValueError: device is neither, or it is the number of a GPU that this machine does not have.
        """
        capability = None
        named: torch.device | str | int = device
        if isinstance(named, str) and (architecture := re.fullmatch(r"sm_(\d+)(\d)[af]?", named)):
            major, minor = architecture.groups()
            named, capability = "cuda", (int(major), int(minor))
        try:
            named = torch.device(named)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"device: expected a torch.device, its name, or an NVIDIA architecture such as 'sm_90', got {device!r}"
            ) from error
        if named.type == "cuda" and named.index is not None and named.index >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"device: expected one of the {count} GPUs of this machine, or an NVIDIA architecture such as 'sm_90' "
                f"for one that is not here, got {device!r}"
            )
        return replace(self, device=named, capability=capability)

    def __str__(self) -> str:
        sizes = (
            f"B={self.batch} H={self.num_heads}"
            + (f" Hkv={self.num_kv_heads}" if self.num_kv_heads != self.num_heads else "")
            + f" L={self.seqlen_q} S={self.seqlen_k} D={self.head_dim}"
            + (f" Dv={self.value_dim}" if self.value_dim != self.head_dim else "")
        )
        flags = [
            f.name.removeprefix("has_").removeprefix("is_")
            for f in fields(self)
            if f.init and getattr(self, f.name) is True
        ]
        if not self.band.is_unbounded:
            end = ", from the end" if self.band.is_from_end else ""
            flags.append(f"band(left={self.band.left}, right={self.band.right}, offset={self.band.offset}{end})")
        if self.softcap:
            flags.append(f"softcap={self.softcap}")
        if self.dropout_p:
            flags.append(f"dropout_p={self.dropout_p}")
        if self.num_ranges:
            flags.append(f"num_ranges={self.num_ranges}")
        if self.is_paged:
            flags.append(f"page_size={self.page_size}")
        if self.num_splits:
            flags.append(f"num_splits={self.num_splits}")
        dtype = str(self.dtype).removeprefix("torch.")
        where = (
            str(self.device) if self.capability is None else f"{self.device} sm_{''.join(map(str, self.capability))}"
        )
        return f"{sizes} {dtype} on {where}" + (f" with {', '.join(flags)}" if flags else "")
