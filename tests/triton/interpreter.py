"""Triton's interpreter, made quick, and with the arithmetic of a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Makes the interpreter about four times as fast, by leaving out what it does again at every operation:

    - It patches `triton.language` whenever one kernel function calls another. Here it is patched once.
    - It checks integers for overflow even if it does not report the result, which it does in debug mode alone.
    - It makes every type and every shape anew. Here equal ones are made once.
    """
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        _remember_types(patch)
        patch.setattr(interpreter, "_patch_attr", _patch_attr)
        scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": core}))
        patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        try:
            yield
        finally:
            scope.restore()


def _patch_attr(
    owner: object, name: str, member: Callable, builder: object, scope: interpreter._LangPatchScope
) -> None:
    """Does what the interpreter's function of this name does, but copies no dict at every call."""

    def call(*args: object, **kwargs: object) -> object:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(owner, name, call)


def _remember_types(patch: pytest.MonkeyPatch) -> None:
    """Lets equal block types, and tensors of equal types, share their attributes, which nothing changes later."""
    make_type, make_tensor, numpy_dtype = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    types, shapes, numpy_dtypes = {}, {}, {}

    def block_type(self: core.block_type, element_ty: core.dtype, shape: list) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def tensor(self: core.tensor, handle: interpreter.TensorHandle, type: core.dtype) -> None:
        if type.name not in shapes:
            make_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    def _get_np_dtype(type: core.dtype) -> np.dtype:
        if type.name not in numpy_dtypes:
            numpy_dtypes[type.name] = numpy_dtype(type)
        return numpy_dtypes[type.name]

    patch.setattr(core.block_type, "__init__", block_type)
    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(interpreter, "_get_np_dtype", _get_np_dtype)


def round_as_on_gpus(patch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter round float32 as compiled kernels do, where numpy would round differently:

    - A dot product adds its terms one after the other, by multiply-adds that round once.
    - a * b - c rounds once, because the compiler makes a multiply-add of it.
    """
    builder = type(interpreter.interpreter_builder)
    create_dot, create_fmul, create_fsub = builder.create_dot, builder.create_fmul, builder.create_fsub

    def dot(self, a, b, acc, *options):
        if a.data.dtype != np.float32:
            return create_dot(self, a, b, acc, *options)
        total = acc.data
        for column, row in zip(a.data.astype(np.float64).T, b.data.astype(np.float64), strict=True):
            total = (column[:, None] * row + total).astype(np.float32)
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    def fmul(self, a, b):
        product = create_fmul(self, a, b)
        product.exact = a.data.astype(np.float64) * b.data.astype(np.float64)
        return product

    def fsub(self, a, b):
        difference = create_fsub(self, a, b)
        if hasattr(a, "exact"):
            difference.data = (a.exact - b.data).astype(difference.data.dtype)
        return difference

    patch.setattr(builder, "create_dot", dot)
    patch.setattr(builder, "create_fmul", fmul)
    patch.setattr(builder, "create_fsub", fsub)
