"""Spare Triton's CPU interpreter work that it repeats at every operation.

It is three fifths of our kernels' time there. Nothing here changes a value. Each function does what it replaces does, from a table of what was asked before.
"""

from __future__ import annotations

import builtins
from functools import cache

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken(monkeypatch) -> None:
    """Replace what the interpreter repeats, until `monkeypatch` is undone."""
    _replace_functions_once(monkeypatch)
    _look_up_numpy_types(monkeypatch)
    _share_block_types(monkeypatch)
    _share_shapes(monkeypatch)
    _leave_equal_shapes(monkeypatch)
    _leave_equal_types(monkeypatch)


def _replace_functions_once(monkeypatch) -> None:
    """Let the interpreter replace the functions of triton.language once a launch.

    It does so again whenever a kernel calls a device function, though all are replaced already, and walks through every
    member of four modules and classes for it.
    """
    replace = interpreter._patch_lang
    replaced: set[str] = set()

    @cache
    def modules_of(fn) -> frozenset[str]:
        return frozenset(module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core)

    def replace_once(fn):
        modules = modules_of(fn)
        if modules and modules <= replaced:
            return interpreter._LangPatchScope()
        scope = replace(fn)
        replaced.update(modules)
        restore = scope.restore

        def restore_all():
            replaced.clear()
            restore()

        scope.restore = restore_all
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", replace_once)


def _look_up_numpy_types(monkeypatch) -> None:
    """Keep numpy's type of each Triton type.

    The interpreter makes a table of all of them at every question.
    """
    make, known = interpreter._get_np_dtype, {}

    def look_up(dtype) -> np.dtype:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return make(scalar)
        if scalar.name not in known:
            known[scalar.name] = make(scalar)
        return known[scalar.name]

    monkeypatch.setattr(interpreter, "_get_np_dtype", look_up)


def _share_block_types(monkeypatch) -> None:
    """Check and name the type of a block once for each element type and shape."""
    make, known = core.block_type.__init__, {}

    def share(self, element_ty, shape) -> None:
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        key = (element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in sizes))
        if isinstance(element_ty, tl.pointer_type):
            make(self, element_ty, shape)
            return
        if key not in known:
            make(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    monkeypatch.setattr(core.block_type, "__init__", share)


def _share_shapes(monkeypatch) -> None:
    """Make a tensor's shape and number of elements once for each shape: nobody changes them."""
    make, known = core.tensor.__init__, {}

    def share(self, handle, type) -> None:
        shape = builtins.tuple(type.shape) if type.is_block() else ()
        if shape not in known:
            make(self, handle, type)
            known[shape] = (self.numel, self.shape)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known[shape]

    monkeypatch.setattr(core.tensor, "__init__", share)


def _leave_equal_shapes(monkeypatch) -> None:
    """Compare shapes as Python's tuples before they are broadcast, and leave equal ones alone."""
    broadcast = TritonSemantic.broadcast_impl_value

    def leave(self, lhs, rhs):
        of_lhs, of_rhs = lhs.type, rhs.type
        if of_lhs.is_block() and of_rhs.is_block() and of_lhs.shape.values == of_rhs.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", leave)


def _leave_equal_types(monkeypatch) -> None:
    """Cast nothing to the type object that it has."""
    cast = TritonSemantic.cast

    def leave(self, input, dst_ty, fp_downcast_rounding=None):
        return input if input.dtype is dst_ty.scalar else cast(self, input, dst_ty, fp_downcast_rounding)

    monkeypatch.setattr(TritonSemantic, "cast", leave)
