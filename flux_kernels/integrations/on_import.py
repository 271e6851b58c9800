"""Call a function right after another library's module was imported, however late that is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec


class _Watcher(MetaPathFinder):
    """Import one module as it would be imported without this, and call back once its code has run."""

    def __init__(self, name: str, callback: Callable[[], None]):
        self.name = name
        self.callback = callback
        self._asking = False

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        """Return the spec of the watched module with its loader extended; None for any other module."""
        if fullname != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._then_call_back(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _then_call_back(self, run: Callable) -> Callable:
        def exec_module(module) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.callback()

        return exec_module


def after_import(name: str, callback: Callable[[], None]) -> None:
    """Call `callback` once the module `name` has been imported: now, where it has been, or later."""
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Watcher(name, callback))
