"""Handle kernels as jobs that are collected, written to a file, and compiled in parallel."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import cache as triton_cache
from triton.runtime.jit import JITFunction

from flux_kernels.machine.tune_compile import one_line


@dataclass(frozen=True, eq=False)
class Kernel:
    """Hold what `triton.compile` is called with; `options` are those that differ from defaults."""

    fn: JITFunction
    signature: dict
    constants: dict
    attributes: dict
    target: GPUTarget
    options: dict

    @classmethod
    def of(cls, source: ASTSource, target: GPUTarget, options: dict) -> Kernel:
        """Take a source apart, without what the backend sets by itself, such as this machine's libdevice."""
        own = vars(make_backend(target).parse_options({}))
        asked = {name: value for name, value in options.items() if name not in own or value != own[name]}
        return cls(source.fn, source.signature, source.constants, source.attrs, target, asked)

    @property
    def source(self) -> ASTSource:
        """Put the source together again."""
        return ASTSource(self.fn, self.signature, self.constants, self.attributes)

    @property
    def folder(self) -> str:
        """Return the name of its folder in Triton's cache, by the `triton_key` in force."""
        import hashlib

        from triton._C.libtriton import get_cache_invalidating_env_vars

        backend, source = make_backend(self.target), self.source
        options = backend.parse_options(dict(self.options, **source.parse_options()))
        key = triton_cache.get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
        return triton_cache._base32(hashlib.sha256(key.encode()).hexdigest())

    def cached(self, folder: Path) -> bool:
        """Tell whether a cache holds it."""
        return any(folder.joinpath(self.folder).glob("__grp__*.json"))

    def compile(self) -> None:
        """Compile it into Triton's cache; another card's code keeps its PTX with the machine code."""
        triton.knobs.compilation.store_binary_only = self.target.arch == 90
        triton.compile(self.source, target=self.target, options=self.options)


def collecting_compiler(kernels: list[Kernel], compiler: Callable) -> Callable:
    """Return a compiler that notes each kernel and passes it on."""

    def compile(source, target=None, options=None, **more):
        target = target or triton.runtime.driver.active.get_current_target()
        kernels.append(Kernel.of(source, target, dict(options or {})))
        return compiler(source, target=target, options=options, **more)

    return compile


def distinct(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Return each kernel once."""
    return list({kernel.folder: kernel for kernel in kernels}.values())


class _Pickler(pickle.Pickler):
    def reducer_override(self, value):
        if isinstance(value, JITFunction):
            return _named, (value.fn.__module__, value.fn.__qualname__)
        return NotImplemented


def _named(module: str, name: str) -> JITFunction:
    return getattr(importlib.import_module(module), name)


def save(kernels: list[Kernel], path: Path) -> None:
    """Write kernels to a file; functions by their names."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump([(k.fn, k.signature, k.constants, k.attributes, astuple(k.target), k.options) for k in kernels])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def load(path: Path) -> list[Kernel]:
    """Read kernels from a file that `save` wrote (a pickle of our own: load no other)."""
    return [Kernel(*parts[:4], GPUTarget(*parts[4]), parts[5]) for parts in pickle.loads(path.read_bytes())]


_WORK: list[Kernel] = []


def compile_all(kernels: list[Kernel], processes: int = os.cpu_count() or 1, seconds: float = 1e9) -> tuple[int, list[str]]:
    """Compile kernels in forked processes, until the time is up; return how many were, and what failed.

    Must be called where no CUDA context is.
    """
    if not kernels:
        return 0, []
    _WORK[:] = kernels
    failed, done, end = [], 0, time.monotonic() + seconds
    # On one thread each: a fork has none of its parent's.
    with multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,)) as pool:
        for problem in pool.imap_unordered(_compile, range(len(kernels))):
            done += not problem
            failed += [problem] if problem else []
            if time.monotonic() > end:
                pool.terminate()
                break
    return done, failed


def _compile(index: int) -> str:
    kernel = _WORK[index]
    try:
        kernel.compile()
    except Exception as problem:  # noqa: BLE001 - such as a tile that the compiler cannot do: the session's row will say so
        return f"{kernel.fn.fn.__name__}: {one_line(problem)}"
    return ""
