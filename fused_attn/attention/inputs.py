"""The tensors of a call, in the one order in which they travel from the API to the kernels and gradients back."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Fields = TypeVar("Fields", bound=NamedTuple)
Shape = tuple[int, ...]


class Inputs(NamedTuple):
    """Everything of a call that has contents. The band and all numbers are in `AttentionProblem`.

    The first six can have gradients. The order is also that of the registered operators and of the native modules.

    query:         (B, H, L, D); packed problems have B = 1 and the rows of all sequences one after the other
    key:           (B, Hkv, S, D)
    value:         (B, Hkv, S, Dv)
    bias:          (B|1, H|1, L|1, S|1) floating point, added to the scores
    relative_bias: (H|1, L + S - 1) floating point; column ``j - i + L - 1`` is added to score (i, j)
    sinks:         (H,) floating point, a logit for each head that joins the softmax denominator only
    seed:          () int64, given where ``dropout_p > 0``
    mask:          (B|1, H|1, L|1, S|1) bool, True = attend
    key_padding:   (B, S) bool, True = IGNORE; ignored keys may hold NaN
    cu_seqlens_q:  (num_sequences + 1,) int32, row offsets of packed queries
    cu_seqlens_k:  (num_sequences + 1,) int32, row offsets of packed keys
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    mask: Tensor | None = None
    key_padding: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    def is_shared_grad_required(self) -> bool:
        """True if one of `SHARED` requires a gradient."""
        for x in self[SHARED_ITEMS]:  # noqa: SIM110  # any(...) makes a generator, which takes four times as long
            if x is not None and x.requires_grad:
                return True
        return False


#: `Inputs` of a tuple of all eleven. ``Inputs(...)`` takes twice the time, which calls of a few microseconds feel.
inputs_of: Callable[[Iterable[Tensor | None]], Inputs] = functools.partial(tuple.__new__, Inputs)


class Shapes(NamedTuple):
    """The shape of each of the `Inputs`, under the same name; None for those that do not take part."""

    query: Shape
    key: Shape
    value: Shape
    bias: Shape | None = None
    relative_bias: Shape | None = None
    sinks: Shape | None = None
    seed: Shape | None = None
    mask: Shape | None = None
    key_padding: Shape | None = None
    cu_seqlens_q: Shape | None = None
    cu_seqlens_k: Shape | None = None


#: The inputs that batch entries share, so that their gradients are sums over the batch.
SHARED = ("bias", "relative_bias", "sinks")
#: Where `SHARED` stand in `Inputs`, `Gradients` and `Wanted`.
SHARED_ITEMS = slice(3, 6)


class Gradients(NamedTuple):
    """The gradient of each of the first `Inputs`, in their shape and dtype; None where it was not wanted."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None


class Wanted(NamedTuple):
    """Which of the `Gradients` a backward call is to compute."""

    query: bool = False
    key: bool = False
    value: bool = False
    bias: bool = False
    relative_bias: bool = False
    sinks: bool = False

    @classmethod
    @functools.cache
    def of(cls, *needs_input_grad: bool) -> Wanted:
        """What torch asks for, of a step whose arguments begin with `Inputs`, or are the first few of them."""
        needed = dict(zip(Inputs._fields, needs_input_grad, strict=False))
        return cls(**{name: needed[name] for name in cls._fields if name in needed})

    @property
    def is_any_shared(self) -> bool:
        return self.bias or self.relative_bias or self.sinks

    def select(self, grads: Sequence[Tensor]) -> Gradients:
        """grads: one for each input, those that are not wanted holding anything."""
        return Gradients(*(grad if is_wanted else None for grad, is_wanted in zip(grads, self, strict=True)))


class Saved(NamedTuple):
    """What backward gets besides the inputs.

    out:  (B, H, L, Dv), as forward has returned it
    lse:  (B, H, L), likewise
    dout: (B, H, L, Dv), the gradient of out; backends always get one
    dlse: (B, H, L), the gradient of lse; None = zero
    """

    out: Tensor | None = None
    lse: Tensor | None = None
    dout: Tensor | None = None
    dlse: Tensor | None = None


def take(kind: type[Fields], values: Sequence[Any]) -> tuple[Fields, Sequence[Any]]:
    """The first values as a named tuple of that kind, and the values behind them."""
    count = len(kind._fields)
    return kind._make(values[:count]), values[count:]


def gradients_of_arguments(grads: Gradients, saved: Saved | None = None) -> tuple[Tensor | None, ...]:
    """What a step's backward returns to torch: gradients of `Inputs`, perhaps of `Saved`, none of what follows.

    torch wants one entry for each argument, and lets there be more of them as long as these are None.
    """
    if saved is None:
        return grads + _NO_GRADIENTS
    return (*grads, *_NO_GRADIENTS[: len(Inputs._fields) - len(grads)], *saved, *_NO_GRADIENTS)


#: None for every argument behind the differentiable ones. No step has more of them.
_NO_GRADIENTS: tuple[Tensor | None, ...] = tuple(itertools.repeat(None, 16))
