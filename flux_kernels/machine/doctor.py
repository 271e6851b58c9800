"""Gather what `doctor` shows: versions, devices, what would run on them, what is missing."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field

import torch

from ..backends import BACKENDS, execution_devices, resolve
from ..errors import BackendUnavailable
from ..formats import FORMATS, get_format
from ..install_hints import install_command
from ..version import installed_version, own_version


@dataclass(frozen=True)
class Package:
    """Name a package: what it is for, and the command that installs it."""

    name: str
    purpose: str
    command: str
    needed: bool = True


_FENCED_TRITON = (3, 7)
_ALL = install_command()
PACKAGES = (
    Package("torch", "everything", _ALL),
    Package(
        "triton",
        "the Triton backend on a GPU",
        "pip install triton-windows" if sys.platform == "win32" else "pip install triton",
        needed=sys.platform == "linux",
    ),
    Package("diffusers", "pipelines, load_flux", _ALL),
    Package("transformers", "text encoders", _ALL),
    Package("accelerate", "offloading", _ALL),
    Package("peft", "LoRAs", _ALL),
    Package("safetensors", "model files", _ALL),
    Package("gguf", "tests; diffusers' own GGUF loading", install_command("bench"), needed=False),
    Package(
        "libggml-python", "fast decode on the CPU, types without a quantizer here", "pip install libggml-python", needed=False
    ),
)


@dataclass(frozen=True)
class PackageFact:
    """Tell whether a package is there: its version, or None and the command to get it."""

    name: str
    version: str | None
    purpose: str
    needed: bool
    command: str


@dataclass(frozen=True)
class DeviceFact:
    """Describe a device and what `backend="auto"` runs there.

    Attributes:
        device: torch's name of it.
        name: of the hardware.
        capability: (major, minor) of an NVIDIA GPU, else None.
        memory_bytes: of a GPU, else None.
        runs: backend name -> ggml types that "auto" computes with it.
        reasons: backend name -> why it does not run the types it does not run.
    """

    device: str
    name: str
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    runs: dict[str, list[str]] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class CallFact:
    """Describe what a call of a FLUX.1-dev step would run: x [M, K] times w [N, K], `calls` times a step."""

    where: str
    m: int
    k: int
    n: int
    calls: int
    algorithm: str
    tile: str
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """Hold all that `doctor` shows; `driver` is the CUDA driver's version where a GPU is seen."""

    flux_kernels: str
    python: str
    system: str
    cuda_build: str | None
    driver: str | None
    packages: list[PackageFact]
    devices: list[DeviceFact]
    advice: list[str]


def diagnose() -> Diagnosis:
    """Look at this machine; nothing is installed, downloaded or compiled."""
    packages = [_package_fact(package) for package in PACKAGES]
    return Diagnosis(
        flux_kernels=own_version(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cuda_build=torch.version.cuda or torch.version.hip,
        driver=_driver(),
        packages=packages,
        devices=[_device_fact(device) for device in execution_devices(torch.device("cpu"))],
        advice=_advice(packages),
    )


def planned_calls(
    format: str, compute: str, device: torch.device | None = None, capability: tuple[int, int] | None = None
) -> list[CallFact]:
    """List what each call of a 1024 x 1024 step runs on a GPU.

    Args:
        format: ggml type of the weights.
        compute: mode of the model.
        device: whose measured choices count; None takes the defaults.
        capability: of the card whose defaults are listed.
    """
    from ..compute import mode_of_call
    from ..kernels.choice import choose, default_choice
    from ..models.calls import step_calls

    fmt, facts = get_format(format), []
    for call in step_calls():
        mode = mode_of_call(compute, call.m)
        shape = (call.m, call.n, call.k)
        choice = default_choice(mode, fmt, *shape, capability) if device is None else choose(mode, fmt, *shape, device)
        tile = str(choice.tile or "")
        facts.append(CallFact(call.where, call.m, call.k, call.n, call.calls, choice.algorithm, tile, choice.why))
    return facts


def tuning_record(device: str) -> str | None:
    """Return the path of the card's own tuning record, or None where `flux-kernels tune` has not run."""
    from ..kernels.record import record_path

    path = record_path(torch.cuda.get_device_name(device))
    return str(path) if path.exists() else None


def _package_fact(package: Package) -> PackageFact:
    version = installed_version(package.name)
    if version is None and package.name == "triton":
        version = installed_version("triton-windows")
    return PackageFact(package.name, version, package.purpose, package.needed, package.command)


def _driver() -> str | None:
    """Return the CUDA version that the driver supports, or None without a driver."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    # Builds for CUDA have it.
    number = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return f"{number // 1000}.{number % 1000 // 10}"


def _device_fact(device: torch.device) -> DeviceFact:
    runs: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for name, fmt in FORMATS.items():
        try:
            runs.setdefault(resolve("auto", "exact", device, fmt).name, []).append(name)
        except BackendUnavailable as error:
            reasons.setdefault("auto", []).append(f"{name}: {error}")
        for backend in BACKENDS.values():
            refusal = backend.refusal(device, fmt, "exact")
            if refusal and refusal not in reasons.setdefault(backend.name, []):
                reasons[backend.name].append(refusal)
    reasons = {name: refusals for name, refusals in reasons.items() if refusals}
    if device.type != "cuda":
        return DeviceFact(str(device), platform.processor() or platform.machine(), runs=runs, reasons=reasons)
    properties = torch.cuda.get_device_properties(device)
    capability = None if torch.version.hip else (properties.major, properties.minor)
    return DeviceFact(str(device), properties.name, capability, properties.total_memory, runs, reasons)


def _advice(packages: list[PackageFact]) -> list[str]:
    advice = [f"{p.name} is missing ({p.purpose}): {p.command}" for p in packages if p.version is None and p.needed]
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return [*advice, *_compiler_advice()]
    if torch.version.cuda or torch.version.hip:
        why = "this torch was built for a GPU, so the driver is missing, too old, or the card is hidden (CUDA_VISIBLE_DEVICES)"
    else:
        why = "this torch is a CPU build; for an NVIDIA card install the CUDA build that torch's own installation page names"
    return [*advice, f"No GPU is seen, everything runs on the torch backend on the CPU: {why}."]


def _compiler_advice() -> list[str]:
    """Warn of a Triton whose code for Hopper lacks a fence (docs/decisions/ptx-interpreter.md)."""
    triton = installed_version("triton")
    if triton is None or torch.version.hip or not torch.cuda.is_available():
        return []
    major_minor = tuple(int(part) for part in triton.split(".")[:2])
    if torch.cuda.get_device_capability()[0] != 9 or major_minor >= _FENCED_TRITON:
        return []
    line = (
        f"Triton {triton} leaves out a memory fence that Hopper asks for between a copy and a product, so results could be "
        "wrong there: install 3.7.1 or newer with the torch that goes with it."
    )
    return [line]
