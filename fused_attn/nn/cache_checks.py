"""Checks of the arguments of caches: numbers, and new rows of keys and values; and copies of caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention import checks


class WritableCopies:
    """A cache whose copies, by ``copy.deepcopy`` or ``pickle``, can be written in any mode.

    Under `torch.inference_mode`, a copied tensor is one of inference mode, which cannot be written outside of it. A
    copy sends no gradients to the rows that it holds: torch copies no tensor that an operation has made.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: _as_leaf(x) for name, x in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: as_writable(x) for name, x in state.items()})


def _as_leaf(x: Any) -> Any:
    """x without the graph of the operation that has made it, if x is such a tensor, or a pair of them."""
    if type(x) is tuple:
        return tuple(map(_as_leaf, x))
    return x.detach() if isinstance(x, Tensor) and not x.is_leaf else x


def as_writable(x: Any) -> Any:
    """x with copies of the tensors of inference mode, which may be in a tuple. Other values stay the same objects."""
    if isinstance(x, Tensor) and x.is_inference():
        with torch.inference_mode(False):
            return x.clone()
    if isinstance(x, tuple):
        made = [as_writable(item) for item in x]
        if all(new is old for new, old in zip(made, x, strict=True)):
            return x
        return type(x)(*made) if hasattr(x, "_fields") else tuple(made)
    return x


def check_count(name: str, count: int) -> None:
    """Raises TypeError or ValueError unless count is an int of at least 1."""
    checks.check_integer(name, count)
    if count < 1:
        raise checks.fail(name, "at least 1", count)


def checked_length(length: int | Tensor) -> int:
    """The length to which a cache is cropped. Raises TypeError or ValueError unless it is an int of at least 0."""
    if not checks.is_int(length):
        hint = "; StaticKVCache takes a tensor of lengths" if isinstance(length, Tensor) else ""
        raise TypeError(f"length: expected an int, got {type(length).__name__}{hint}")
    if length < 0:
        raise checks.fail("length", "at least 0", length)
    return length


def checked_lengths(lengths: Tensor, batch: int) -> Tensor:
    """The lengths (B,) to which the batch entries of a cache are cropped, none of them negative.

    Raises:
        ValueError: lengths are no integers (B,), or one is negative. The device does not wait for the second check:
            there, a negative length is taken for 0.
    """
    if lengths.shape != (batch,) or lengths.dtype not in (torch.int64, torch.int32):
        expected = f"an int or integers of shape (B,) = ({batch},)"
        raise checks.fail("length", expected, f"{lengths.dtype} of shape {tuple(lengths.shape)}")
    if modes.can_read(lengths) and batch > 0 and (least := int(lengths.min())) < 0:
        raise checks.fail("length", "at least 0", least)
    return lengths.clamp(min=0)


def check_indices(indices: Tensor) -> None:
    """Raises TypeError or ValueError unless indices are integers (B,), by which a cache is reordered."""
    if not isinstance(indices, Tensor):
        raise checks.wrong_type("indices", "a tensor of shape (B,)", indices)
    if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32):
        raise checks.fail("indices", "integers of shape (B,)", f"{indices.dtype} of shape {tuple(indices.shape)}")


def select_entries(x: Tensor, indices: Tensor) -> Tensor:
    """The batch entries `indices` (new B,) of x (B, ...).

    Raises:
        IndexError: on a CPU, an index is outside of [0, B). On a GPU, the kernel stops with an error.
    """
    try:
        return x.index_select(0, indices.to(x.device))  # the layers of a model may be on several devices
    # torch finds the index, so a call without an error pays for no check.
    except (IndexError, RuntimeError) as error:
        wrong = indices[(indices < 0) | (indices >= x.shape[0])].tolist()
        if not wrong:
            raise
        raise IndexError(f"indices: expected numbers of [0, {x.shape[0]}), got {wrong[0]}") from error


def check_target(device: Any, dtype: Any) -> None:
    """Raises what ``torch.Tensor.to`` raises, also for a cache that is empty.

    Raises:
        TypeError: device or dtype is of another type than torch takes, or dtype is no floating-point dtype.
        RuntimeError: there is no device of this name.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise checks.wrong_type("dtype", "None or a torch.dtype", dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    if device is None or isinstance(device, torch.device):
        return
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise checks.wrong_type("device", "None, a torch.device or the name of one", device)
    torch.device(device)


def check_pair(key: Tensor, value: Tensor) -> None:
    """Raises TypeError or ValueError unless key is (B, Hkv, L, D) and value is (B, Hkv, L, Dv)."""
    checks.check_tensor("key", key)
    checks.check_tensor("value", value)
    if key.dim() != 4:
        raise checks.fail("key", "shape (B, Hkv, L, D)", tuple(key.shape))
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise checks.fail("value", f"shape {(*key.shape[:3], 'Dv')}", tuple(value.shape))


def check_continues(name: str, buffer: Tensor, rows: Tensor) -> None:
    """Raises ValueError unless the new rows have the sizes, dtype and device of the rows in the cache."""
    batch, heads, _, columns = buffer.shape
    if (batch, heads, columns) != (rows.shape[0], rows.shape[1], rows.shape[3]):
        raise checks.fail(name, f"shape ({batch}, {heads}, L, {columns}), as in the cache", tuple(rows.shape))
    if (buffer.dtype, buffer.device) != (rows.dtype, rows.device):
        got = f"{rows.dtype} on {rows.device}; cache.to(...) converts a cache, such as one of steps under autocast"
        raise checks.fail(name, f"{buffer.dtype} on {buffer.device}, as in the cache", got)
