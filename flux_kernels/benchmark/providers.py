"""Compare providers: each makes, for one weight, a function x -> y, or says why it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compute import COMPUTE_MODES, DATACENTER, WEIGHT_ONLY_M, capability_of, mode_of_call
from ..errors import BackendUnavailable
from ..formats import Packed
from ..install_hints import install_command
from ..layers.linear import GGUFLinear
from ..machine.tune_compile import one_line
from ..torch_backend import reference
from .names import EXACT, OURS, TORCH, way_of


@dataclass(frozen=True)
class Problem:
    """Hold what every provider computes with: a weight (for Triton or in file order), bias, dtype of x."""

    weight: Packed
    bias: Tensor
    dtype: torch.dtype


class Unavailable(RuntimeError):
    """Say why a provider cannot run here."""


# What is no failure of a provider: it cannot run here, or not in this memory.
CANNOT_RUN = (Unavailable, BackendUnavailable, torch.OutOfMemoryError)


def why(error: Exception) -> str:
    """Return the note of a provider that could not run, or raised."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return str(error) if isinstance(error, CANNOT_RUN) else one_line(error)


def not_installed(module: str, package: str = "") -> Unavailable:
    """Return the error of a missing module, with the command that gets its package, or all of the bench."""
    command = f"pip install '{package}'" if package else install_command("bench")
    return Unavailable(f"not installed: {module}. Run: {command}")


@dataclass(frozen=True)
class Provider:
    """Describe one side of the comparison.

    Attributes:
        name: in the rows.
        make: takes a problem and returns x -> y; raises Unavailable where it cannot run.
        gate: relative RMS error against float64 on the packed weights above which no speed is reported.
        group: "base" (unquantized, or decode first), "ours", "kernels" (ours, one algorithm by name) or "peer".
        source: where its makers document the call made here.
        own_weights: whether it quantizes the decoded weight anew, so that it does not read the packed bytes.
        package: the distribution whose version belongs in the row.
    """

    name: str
    make: Callable[[Problem], Callable[[Tensor], Tensor]]
    gate: float
    group: str
    source: str = ""
    own_weights: bool = False
    package: str = ""


PROVIDERS: dict[str, Provider] = {}
# bf16 rounds inputs and output to 2^-9 each; int8 rounds activations to a 254th of their group's largest.
GATE_EXACT, GATE_INT8 = 0.01, 0.025


def provider(name: str, group: str, gate: float = GATE_EXACT, **more):
    """Register a provider under a name."""

    def register(make):
        PROVIDERS[name] = Provider(name, make, gate, group, **more)
        return make

    return register


@provider(TORCH, "base")
def _plain(problem: Problem):
    """The unquantized model: torch's linear on the decoded weight (the baseline)."""
    weight = _decoded(problem)
    bias = problem.bias.to(problem.dtype)
    return lambda x: F.linear(x, weight, bias)


@provider("dequantize", "base")
def _dequantize_then_linear(problem: Problem):
    """Decode in torch in one piece, then multiply, on every call: how GGUF layers that only store do it."""

    def call(x: Tensor) -> Tensor:
        weight = reference.decode_rows(problem.weight).to(problem.dtype)
        return F.linear(x, weight, problem.bias.to(problem.dtype))

    return call


_DIFFUSERS = "https://huggingface.co/docs/diffusers/quantization/gguf"


@provider("diffusers", "base", source=_DIFFUSERS, package="diffusers")
def _diffusers(problem: Problem):
    """diffusers' own GGUFLinear, eager."""
    try:
        import gguf
        from diffusers.quantizers.gguf import utils as theirs
    except ImportError as error:
        raise not_installed(error.name or "diffusers") from error
    packed = problem.weight
    # The gguf package may not know a type as young as this library's youngest.
    ggml_type = packed.fmt.ggml_type
    if ggml_type not in {int(known) for known in theirs.dequantize_functions}:
        raise Unavailable(f"diffusers does not support {packed.fmt.name}")
    data = packed.arranged(planes=False).data
    k = packed.k
    layer = theirs.GGUFLinear(k, data.shape[0], bias=True, compute_dtype=problem.dtype, device=data.device)
    layer.weight = theirs.GGUFParameter(data, quant_type=gguf.GGMLQuantizationType(ggml_type))
    layer.bias = torch.nn.Parameter(problem.bias.to(problem.dtype), requires_grad=False)
    return layer


_COMPILED = "https://huggingface.co/docs/diffusers/optimization/fp16#torchcompile"


@provider("diffusers compiled", "base", source=_COMPILED, package="diffusers")
def _diffusers_compiled(problem: Problem):
    """The same under torch.compile."""
    layer = _diffusers(problem)
    # Every shape is a first shape, or the second would be compiled for changing sizes.
    torch.compiler.reset()
    return torch.compile(layer, fullgraph=True)


def own_layer(problem: Problem, compute: str) -> GGUFLinear:
    """Make this library's layer for a weight, which keeps what a layer keeps."""
    data, fmt, planes, _ = problem.weight
    backend = "torch" if data.device.type == "cpu" else "triton"
    return GGUFLinear.from_packed(
        data, fmt, problem.bias, planes=planes, backend=backend, compute=compute, compute_dtype=problem.dtype
    )


for _compute in COMPUTE_MODES:
    provider(OURS + _compute, "ours", GATE_INT8 if _compute == "int8" else GATE_EXACT)(partial(own_layer, compute=_compute))


def same_call(provider: str, m: int) -> str:
    """Return the side whose code `provider` runs with `m` rows."""
    compute = way_of(provider)
    return f"{OURS}{mode_of_call(compute, m)}" if compute in COMPUTE_MODES else provider


def _algorithm(name: str):
    def make(problem: Problem):
        if problem.weight.data.device.type == "cpu":
            raise Unavailable("Triton kernels need a GPU")
        from ..kernels import exact
        from ..kernels.choice import Choice, tile_of
        from ..kernels.launching import device_of

        def call(x: Tensor) -> Tensor:
            y = torch.empty(x.shape[0], problem.weight.n, dtype=x.dtype, device=x.device)
            tile = tile_of(name, problem.weight.fmt, y.shape[0], y.shape[1], x.shape[1], capability_of(x.device))
            with device_of(x):
                choice = Choice(name, tile, "named")
                exact.linear(x, problem.weight, problem.bias, y, choice=choice)
            return y

        return call

    return make


for _name in ("fused", "two_stage", "small_m"):
    provider(f"ours {_name}", "kernels")(_algorithm(_name))


# The order of a default comparison, what tells most first: a run may be cut short.
_FIRST = (TORCH, EXACT, "ours int8", "ours fp16_accumulate")
# Rows up to which fused or two-stage is to be measured on a data-center card, whose default switches below.
_OPEN_QUESTION = 1024


def default_providers(m: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> list[str]:
    """List whom to compare for a call of `m` rows where nobody was named, the most informative first.

    Neither peers nor what compiles for minutes; of our single algorithms only those that could be chosen for such a call.
    """
    names = [name for name, side in PROVIDERS.items() if side.group != "peer" and "compiled" not in name]
    names = [name for name in names if not pointless(name, m, dtype, capability)]
    return sorted(names, key=lambda name: (PROVIDERS[name].group == "kernels", name not in _FIRST, names.index(name)))


def pointless(provider: str, m: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> str:
    """Say why a single algorithm's time for `m` rows would tell nothing; "" where it tells something."""
    if provider == "ours small_m" and m > WEIGHT_ONLY_M:
        return "it reads the weight once per row: 70 ms for 4,608 rows, by arithmetic, where the others take two"
    if provider == "ours two_stage" and m <= WEIGHT_ONLY_M:
        return "it writes and reads a weight of 16 bits, which alone takes several times the packed weight's bytes"
    if provider == "ours fused" and m > WEIGHT_ONLY_M and dtype == torch.float32:
        return "its tiles are for 16-bit activations: in float32 they spill, and pass a GeForce's shared memory"
    if provider == "ours fused" and m > _OPEN_QUESTION and capability in DATACENTER:
        return "its decode cannot hide behind tensor cores as fast as these: on an H200 it had 0.23 to 0.36 of cuBLAS's speed"
    return ""


def _decoded(problem: Problem) -> Tensor:
    return reference.dequantize(problem.weight, problem.dtype)
