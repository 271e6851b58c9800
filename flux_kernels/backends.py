"""Backends and compute modes as data: which exist, what each can run, and on which device.

The backend a user names is the backend that runs, or an error says why it cannot. "auto" is resolved when a layer runs,
from the device it runs on, and never retries after a failure.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from . import _triton
from .compute import COMPUTE_MODES, DATACENTER, HOPPER, TENSOR_CORE_CAPABILITY, capability_of, check_mode, dtype_name
from .errors import BackendUnavailable, FormatError
from .formats import BlockFormat

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (7, 5)  # Turing: Triton unpacks, cuBLAS multiplies
# Architectures with matrix cores: CDNA 2, RDNA 3 and later (AMD's instruction set manuals).
_AMD_MATRIX_CORES = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
_EVERYWHERE = 'Use backend="auto" with compute="exact", which runs everywhere'

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """Describe one backend.

    Attributes:
        name: what a user writes.
        module: dotted name of the module with its `linear` and `dequantize`, imported when it first runs.
        refusal: takes (device, format, compute mode); returns why it cannot run that there as one sentence, or None where it can.
    """

    name: str
    module: str
    refusal: Callable[[torch.device, BlockFormat, str], str | None]

    def load(self) -> ModuleType:
        """Import and return the backend's module."""
        return importlib.import_module(self.module)


def _triton_refusal(device: torch.device, fmt: BlockFormat, compute: str) -> str | None:
    return _mode_refusal(compute, device) or _device_refusal(device, fmt)


def _device_refusal(device: torch.device, fmt: BlockFormat) -> str | None:
    if _triton.TRITON_VERSION is None:
        return "Triton is not installed; install it with `pip install triton`"
    if fmt.decode_tile is None:
        return f"{fmt.name} has no Triton decoder yet"
    if device.type in ("xpu",) or (device.type == "cuda" and torch.version.hip):
        return None
    if device.type == "cuda":
        capability = capability_of(device)
        if capability is not None and capability < MIN_CAPABILITY:
            had, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
            return f"{device} has compute capability {had}, and {needed} (an RTX 20 card) is the oldest supported"
        return None
    if device.type == "cpu" and _triton.interpreting():
        return None
    return f"Triton kernels do not run on {device.type} (only under TRITON_INTERPRET=1)"


@cache
def _architecture(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).gcnArchName


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("triton", "flux_kernels.kernels", _triton_refusal),
        Backend("torch", "flux_kernels.torch_backend", lambda device, fmt, compute: None),
    )
}


def check_names(backend: str, compute: str = "exact") -> None:
    """Raise BackendUnavailable where `backend` or `compute` is not a known name."""
    if backend != "auto" and backend not in BACKENDS:
        raise BackendUnavailable(f"Unknown backend {backend!r}. Known: auto, {', '.join(BACKENDS)}.")
    if compute not in COMPUTE_MODES:
        raise BackendUnavailable(f"Unknown compute mode {compute!r}. Known: {', '.join(COMPUTE_MODES)}.")


@cache
def resolve(backend: str, compute: str, device: torch.device, fmt: BlockFormat) -> Backend:
    """Return the backend that runs `fmt` on `device`.

    Raises BackendUnavailable with the reason where none can.

    "auto" takes Triton on an accelerator where it runs, else torch for "exact"; torch's twins of the other modes are many times
    slower than "exact", so on an accelerator they have to be named. It never takes Triton's interpreter on the CPU, which is
    for tests of kernels.
    """
    check_names(backend, compute)
    if backend != "auto":
        named = [BACKENDS[backend]]
    elif device.type == "cpu":
        named = [BACKENDS["torch"]]
    else:
        named = list(BACKENDS.values()) if compute == "exact" else [BACKENDS["triton"]]
    reasons = []
    for candidate in named:
        reason = candidate.refusal(device, fmt, compute)
        if reason is None:
            if compute == "int8" and _is_hopper(candidate, device):
                _say_slower(device)
            return candidate
        reasons.append(f'backend="{candidate.name}" cannot run: {reason}.')
    raise BackendUnavailable(" ".join([*reasons, f"{_EVERYWHERE}."]))


@cache
def _say_slower(device: torch.device) -> None:
    log.warning(
        'compute="int8" took longer than "exact" on an H200, with bfloat16 x (docs/decisions/first-gpu.md); %s is of its kind',
        device,
    )


def _is_hopper(backend: Backend, device: torch.device) -> bool:
    return backend.name == "triton" and capability_of(device) == HOPPER


def _mode_refusal(compute: str, device: torch.device) -> str | None:
    """Return why Triton cannot run a mode on a device, None where it can."""
    if compute == "exact" or device.type != "cuda":
        return None
    if torch.version.hip:
        if _architecture(device).startswith(_AMD_MATRIX_CORES):
            return None
        return f'compute="{compute}" needs matrix cores (Instinct MI200, RX 7000 or newer); {device} is {_architecture(device)}'
    capability = capability_of(device)
    if capability is not None and capability < TENSOR_CORE_CAPABILITY:
        return f'compute="{compute}" needs tensor cores that Triton supports (an RTX 30 card or newer); {device} is older'
    if compute == "fp16_accumulate" and capability in DATACENTER:
        return (
            f'compute="{compute}" is for cards that multiply fp16 faster with fp16 accumulation (GeForce); {device} does not, and its '
            '"exact" is faster and more accurate'
        )
    return None


def own_device() -> torch.device:
    """Return the device to work on where none is named: the GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(name: torch.device | str) -> torch.device:
    """Return the device of a name.

    Raises:
        BackendUnavailable: where torch does not know the name or cannot use such a device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BackendUnavailable(
            f"The device {str(name)!r} cannot be used here: {reason}. `flux-kernels doctor` tells what is there."
        ) from error
    return device


def execution_devices(device: torch.device) -> list[torch.device]:
    """List the devices a layer on `device` may run on: its own, and an accelerator it may be moved to."""
    if device.type not in ("cpu", "meta"):
        return [device]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        devices.append(torch.device("xpu", torch.xpu.current_device()))
    return devices


def check_runnable(backend: str, compute: str, device: torch.device, fmt: BlockFormat, k: int | None = None) -> None:
    """Raise where a layer of rows of `k` weights (None: any) could run on no device it may be moved to.

    A faster mode is asked for because of an accelerator: where there is one, it is the one that has to run it.

    Raises:
        BackendUnavailable: where no backend can run it, with the reasons.
        FormatError: where K does not suit the mode.
    """
    if k is not None:
        check_mode(compute, k)
    candidates = execution_devices(device)
    if compute != "exact" and backend == "auto":
        candidates = candidates[1:] or candidates
    failures = []
    for candidate in candidates:
        try:
            resolve(backend, compute, candidate, fmt)
            return
        except BackendUnavailable as error:
            failures.append(error)
    raise failures[-1]


def wants_planes(backend: str, device: torch.device, fmt: BlockFormat) -> bool:
    """Tell whether a layer now on `device` should hold its rows as planes (see `BlockFormat.planes`)."""
    if not fmt.planes or backend == "torch":
        return False
    if backend == "triton":
        return True
    return any(
        BACKENDS["triton"].refusal(candidate, fmt, "exact") is None
        for candidate in execution_devices(device)
        if candidate.type != "cpu"
    )


def check_activation_dtype(dtype: torch.dtype, what: str, hint: str = "") -> None:
    """Raise FormatError where `dtype` is not one the kernels compute in."""
    if dtype not in ACTIVATION_DTYPES:
        legal = ", ".join(dtype_name(legal) for legal in ACTIVATION_DTYPES)
        if not isinstance(dtype, torch.dtype):
            raise FormatError(f"{what} must be a torch.dtype, one of {legal}, got {dtype!r}.")
        raise FormatError(f"{what} must be one of {legal}, got {dtype_name(dtype)}.{hint}")
