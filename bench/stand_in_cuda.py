"""Let torch's CPU stand for a CUDA device: what code asks of `torch.cuda` around its launches.

Tensors stay on the CPU and say that they are on "cuda:0"; a tensor made for or moved to that device is made on the CPU. What the
library leaves to torch, products and a maximum, costs one dispatch on a tiny tensor and leaves the result as it was.
Events measure the wall clock; graphs record nothing. Inside a capture everything raises that would end a real capture: waiting
for the device, reading a value back, loading a kernel.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_device_of_base = torch._C.TensorBase.device.__get__
_is_meta = torch._C.TensorBase.is_meta.__get__
_READS = ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
_MAKERS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
_SILENT = ("_lazy_init", "_lazy_call", "set_device", "graph_pool_handle", "reset_peak_memory_stats", "empty_cache")
_SILENT += ("set_sync_debug_mode", "manual_seed", "manual_seed_all", "_sleep")
_ZERO = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")


class _Generator(torch.Generator):
    """Be a generator of the CPU for whatever device it is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, _here(device))


class Cuda:
    """Hold the stand-in device's state: whether a graph is captured, and how often graphs were replayed."""

    def __init__(self, card):
        self.card = card
        self.device = torch.device("cuda", 0)
        self.capturing = False
        self.replays = 0

    def refuse_while_capturing(self, what: str) -> None:
        """Raise what CUDA raises, where a graph is being captured."""
        if self.capturing:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def synchronize(self, device=None) -> None:
        """Wait for nothing; raise inside a capture."""
        self.refuse_while_capturing("synchronize")


@contextmanager
def patched(cuda: Cuda) -> Iterator[None]:
    """Put the stand-in's functions into torch until the context ends."""
    # Asked before anything is replaced: it remembers the functions themselves.
    constructors = _device_constructors()
    with ExitStack() as stack:
        for owner, name, value in _replacements(cuda, constructors):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _replacements(cuda: Cuda, constructors) -> Iterator[tuple[object, str, object]]:
    yield from ((torch.cuda, name, value) for name, value in _functions(cuda).items())
    yield torch.Tensor, "device", property(lambda self: _device_of_base(self) if _is_meta(self) else cuda.device)
    yield torch.Tensor, "is_cuda", property(lambda self: _device_of_base(self) == _CPU)
    for function in constructors:
        if getattr(torch, function.__name__, None) is function:
            yield torch, function.__name__, _made_here(function)
    yield from ((torch, name, _made_here(getattr(torch, name))) for name in _LIKE)
    yield torch, "Generator", _Generator
    yield from ((torch.Tensor, name, _made_here(getattr(torch.Tensor, name))) for name in _MAKERS)
    yield from _products()
    yield torch.Tensor, "to", _moved_here(torch.Tensor.to)
    yield torch.Tensor, "cuda", lambda self, *args, **kwargs: self
    yield torch.Tensor, "pin_memory", lambda self, *args: self
    yield from ((torch.Tensor, name, _reading(getattr(torch.Tensor, name), cuda)) for name in _READS)


def _here(device):
    """Return where a tensor for `device` is made: the CPU for "cuda", in any of the forms torch takes."""
    if not isinstance(device, torch.device):
        # "cuda", "cuda:0" or a number.
        device = torch.device(device)
    return _CPU if device.type == "cuda" else device


def _made_here(function: Callable) -> Callable:
    @wraps(function)
    def make(*args, **kwargs):
        if kwargs.get("device") is not None:
            kwargs["device"] = _here(kwargs["device"])
        return function(*args, **kwargs)

    return make


def _moved_here(function: Callable) -> Callable:
    @wraps(function)
    def to(self, *args, **kwargs):
        if args and isinstance(args[0], (str, int, torch.device)):
            args = (_here(args[0]), *args[1:])
        elif kwargs.get("device") is not None:
            kwargs["device"] = _here(kwargs["device"])
        return function(self, *args, **kwargs)

    return to


def _products() -> Iterator[tuple[object, str, object]]:
    """Yield stand-ins of what kernels leave to torch; products check the inner sizes, as torch's do."""
    tiny, row = torch.zeros(8, 8), torch.zeros(8)
    mm, addmm, amax = torch.mm, torch.addmm, torch.Tensor.amax

    def checked(a, b) -> tuple[int, int]:
        if a.shape[1] != b.shape[0]:
            raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({list(a.shape)} and {list(b.shape)})")
        return a.shape[0], b.shape[1]

    def stand_in_mm(a, b, *, out=None):
        mm(tiny, tiny)
        return a.new_empty(checked(a, b)) if out is None else out

    def stand_in_addmm(start, a, b, *, out=None, beta=1, alpha=1):
        addmm(row, tiny, tiny)
        return a.new_empty(checked(a, b)) if out is None else out

    def stand_in_addmm_(self, a, b, *, beta=1, alpha=1):
        checked(a, b)
        addmm(row, tiny, tiny)
        return self

    def stand_in_amax(self, dim=(), keepdim=False):
        amax(tiny, 0)
        return self.select(dim, 0) if isinstance(dim, int) and not keepdim else amax(self, dim, keepdim)

    yield torch, "mm", stand_in_mm
    yield torch, "addmm", stand_in_addmm
    yield torch.Tensor, "addmm_", stand_in_addmm_
    yield torch.Tensor, "amax", stand_in_amax


_M_MMAP_THRESHOLD = -3  # malloc.h
# Bytes from which memory then comes from the system, which hands out zeros and nothing that was touched
_FRESH = 1 << 16


@contextmanager
def without_arithmetic() -> Iterator[None]:
    """Make torch's larger work cost nothing in a stand-in: fresh memory and products are zeros.

    For dry runs at true sizes, in a process of their own: malloc keeps the setting. Errors computed there are zero and mean nothing.
    """
    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _FRESH)
    new_empty, read_back = torch.Tensor.new_empty, torch.Tensor.norm

    def fresh(make: Callable) -> Callable:
        @wraps(make)
        def zeros(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.zero_() if not tensor.is_meta and tensor.nbytes < _FRESH else tensor

        return zeros

    zeros = fresh(new_empty)

    def linear(x, weight, bias=None):
        if x.shape[-1] != weight.shape[-1]:
            raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({list(x.shape)} and {list(weight.T.shape)})")
        return zeros(x, (*x.shape[:-1], weight.shape[0]))

    def matmul(a, b):
        return zeros(a, (*a.shape[:-1], b.shape[-1]))

    def norm(self, *_, **__):
        return read_back(zeros(self, (1,)))

    replaced = (
        *((torch, name, fresh(getattr(torch, name))) for name in ("empty", "empty_like")),
        (torch, "randn", lambda *size, generator=None, **more: torch.empty(*size, **more)),
        (torch.Tensor, "new_empty", zeros),
        (torch.nn.functional, "linear", linear),
        (torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: zeros(q, q.shape)),
        (torch, "matmul", matmul),
        (torch.Tensor, "__matmul__", matmul),
        (torch, "_int_mm", lambda a, b: zeros(a, (a.shape[0], b.shape[1]), dtype=torch.int32)),
        (torch, "_scaled_mm", lambda a, b, *, out_dtype, **_: zeros(a, (a.shape[0], b.shape[1]), dtype=out_dtype)),
        (torch.Tensor, "double", lambda self: self),
        (torch.Tensor, "norm", norm),
    )
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _reading(function: Callable, cuda: Cuda) -> Callable:
    @wraps(function)
    def read(*args, **kwargs):
        cuda.refuse_while_capturing(f"reading a value back by {function.__name__}")
        return function(*args, **kwargs)

    return read


def _answering(value) -> Callable:
    """Return a function of its own that takes anything: torch's compiler wants no two names for it."""
    return lambda *_, **__: value


def _functions(cuda: Cuda) -> dict[str, object]:
    """Return the stand-ins of torch.cuda's functions and classes, by name."""
    stream = SimpleNamespace(
        cuda_stream=0,
        device=cuda.device,
        synchronize=cuda.synchronize,
        wait_stream=lambda other: None,
        wait_event=lambda e: None,
    )
    return dict(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _exchange_device=lambda device: 0,
        _maybe_exchange_device=lambda device: 0,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_name=lambda device=None: cuda.card.name,
        get_device_capability=lambda device=None: cuda.card.capability,
        get_device_properties=cuda.card.properties,
        is_bf16_supported=lambda *_, **__: True,
        synchronize=cuda.synchronize,
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        Stream=_Maker(lambda *_, **__: stream),
        stream=lambda stream: nullcontext(),
        Event=_Maker(lambda *_, **__: _Event(cuda)),
        CUDAGraph=_Maker(lambda *_, **__: _Graph(cuda)),
        graph=lambda graph, *_, **__: graph.captured(),
        is_current_stream_capturing=lambda: cuda.capturing,
        mem_get_info=lambda device=None: (cuda.card.memory_bytes, cuda.card.memory_bytes),
        **{name: _answering(None) for name in _SILENT},
        **{name: _answering(0) for name in _ZERO},
        profiler=SimpleNamespace(start=_answering(None), stop=_answering(None)),
    )


class _Maker:
    """Make instances as a class would, in annotations too (`torch.cuda.Stream | None`)."""

    def __init__(self, make: Callable):
        self.make = make

    def __call__(self, *args, **kwargs):
        return self.make(*args, **kwargs)

    def __or__(self, other):
        return object


class _Event:
    """Hold a moment of the wall clock."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.time = cuda, 0.0

    def record(self, stream=None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def query(self) -> bool:
        """Return that the device, busy with what was queued before, has not come to this event."""
        return False

    def elapsed_time(self, other: _Event) -> float:
        """Return milliseconds."""
        self.cuda.synchronize()
        return 1e3 * (other.time - self.time)


class _Graph:
    """Count replays of what was captured."""

    def __init__(self, cuda: Cuda):
        self.cuda = cuda

    @contextmanager
    def captured(self) -> Iterator[None]:
        self.cuda.capturing = True
        try:
            yield
        finally:
            self.cuda.capturing = False

    def replay(self) -> None:
        self.cuda.replays += 1

    def reset(self) -> None:
        pass
