"""Checks of the arguments that the modules share, and the texts of their errors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.attention import checks
from fused_attn.backends.dispatch import BACKEND_NAMES


def accepts(method: Callable, keyword: str) -> bool:
    """Whether a method takes a keyword, such as ``cache``. Methods with torch's own signature take none of ours.

    The answer for a method of a class is remembered. An answer for another callable is not, because the memory would
    keep the callable alive, and with it a module.
    """
    function = getattr(method, "__func__", None)
    if function is None or torch.compiler.is_compiling():
        return _has_parameter(method, keyword)
    return _remembered_parameter(function, keyword)


def _has_parameter(function: Callable, keyword: str) -> bool:
    """Whether a function takes a keyword, by name or among ``**kwargs``."""
    parameters = inspect.signature(function).parameters
    return keyword in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


_remembered_parameter = functools.lru_cache(maxsize=256)(_has_parameter)


def runs_methods_of(cls: type, module: nn.Module, *names: str) -> bool:
    """Whether a module runs these methods of `cls`, so that no subclass and no instance has put others in their place.

    A method of an instance counts as the method that it wraps, as `torch.compile`, `functools.partial` and
    `functools.wraps` do, which hand all arguments on.
    """
    own = module.__dict__
    for name in names:
        method = _unwrapped(own[name]) if name in own else getattr(type(module), name)
        if method is not getattr(cls, name):
            return False
    return True


def _unwrapped(method: Any) -> Any:
    """The function under the wrappers of a method."""
    while True:
        # Not getattr: a mock has every attribute, and each of them is another mock.
        attributes = getattr(method, "__dict__", {})
        if "__wrapped__" in attributes:
            method = attributes["__wrapped__"]
        elif "_torchdynamo_orig_callable" in attributes:
            method = attributes["_torchdynamo_orig_callable"]
        elif isinstance(method, functools.partial):
            method = method.func
        elif isinstance(method, MethodType):
            method = method.__func__
        else:
            return method


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None. Methods with torch's own signature can be called with what is left."""
    return {name: option for name, option in options.items() if option is not None}


def batch_layout(batch_first: bool) -> str:
    """A text about the layout of the inputs. Messages about sizes end with it, because most such errors come from
    inputs in the wrong layout.
    """
    return f"batch_first={batch_first} means inputs {'(N, L, E)' if batch_first else '(L, N, E)'}"


class NotADivisorError(ValueError, AssertionError):
    """The number of heads does not divide the number of features.

    torch.nn raises an AssertionError in this case, and this library raises ValueError for wrong values. So the error is
    both.
    """


def check_sizes(least: int, **sizes: int | None) -> None:
    """Raises TypeError if a size is no integer, and ValueError if a size is below `least`. None is allowed."""
    for name, size in sizes.items():
        if size is None:
            continue
        checks.check_integer(name, size)
        if size < least:
            raise checks.fail(name, f"at least {least}", size)


def check_divides(name: str, divisor: int, whole_name: str, whole: int) -> None:
    """Raises `NotADivisorError` unless `divisor` divides `whole`. The names are those of the arguments."""
    if whole % divisor:
        raise NotADivisorError(f"{name}: expected a divisor of {whole_name}={whole}, got {divisor}")


def check_backend(backend: str | None) -> None:
    """Raises ValueError if there is no backend of this name. Whether a backend can run a call depends on the call."""
    if backend is not None and backend not in BACKEND_NAMES:
        raise checks.fail("backend", f"None or one of {BACKEND_NAMES}", repr(backend))


def check_mask_dtype(name: str, mask: Tensor) -> None:
    """Raises TypeError if a mask is no tensor.

    Raises AssertionError, as the parent class does, if the mask is neither bool nor floating point.
    """
    checks.check_tensor(name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        hint = checks.hint_for_integers(name)
        raise AssertionError(f"{name}: expected bool or floating point, got {mask.dtype}{hint}")
