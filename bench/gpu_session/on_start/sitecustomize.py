"""Give Triton another build's cache key, $TRITON_KEY_FILE, in processes that a session starts.

Compiled kernels stay valid where only Triton's own library differs, as between builds for two Pythons.
"""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

_MODULE = "triton.runtime.cache"


class _KeyOfAnotherBuild(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Load the module as ever, then replace one function."""

    def __init__(self, key: str):
        self.key = key

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        module.triton_key = lambda: self.key


if os.environ.get("TRITON_KEY_FILE"):
    sys.meta_path.insert(0, _KeyOfAnotherBuild(Path(os.environ["TRITON_KEY_FILE"]).read_text(encoding="utf-8")))
