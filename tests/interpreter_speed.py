"""Spare Triton's CPU interpreter work that it repeats at every call of a device function.

It is two fifths of the time that our kernels take there.
"""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter


def quicken(monkeypatch) -> None:
    """Let the interpreter replace the functions of triton.language once a launch.

    It does so again whenever a kernel calls a device function, though all are replaced already, and walks through every
    member of four modules and classes for it.
    """
    replace = interpreter._patch_lang
    replaced: set[str] = set()

    def replace_once(fn):
        modules = {module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core}
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
