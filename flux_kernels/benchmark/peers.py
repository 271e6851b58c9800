"""Provide other libraries, each called as its own documentation recommends, on the decoded weight.

They quantize the weight anew, to their own format. Their gate is wide: 4-bit peers lose up to 10 % on it, by design; the error
of every row tells what a speed costs. A library that is not installed is a row that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch
from torch import nn

from .providers import GATE_INT8, Problem, Unavailable, _decoded, not_installed, provider

# Relative RMS error on gaussian weights: 8 bits a weight about 1 % (fp8 4 %, squared with its activations 5 %), 4 bits 10 %.
GATE_8, GATE_4 = 0.08, 0.2

_DISTRIBUTIONS = {
    "vllm_gguf_plugin": "vllm-gguf-plugin",
    "_vllm_gguf_plugin_kernels": "vllm-gguf-plugin",
    "optimum": "optimum-quanto",
}


def _needs(module: str):
    """Import a peer, or say that it is not there and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise not_installed(error.name or module, _DISTRIBUTIONS.get(package, package)) from error


def _plain(problem: Problem) -> nn.Linear:
    weight = _decoded(problem)
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=problem.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(problem.bias.to(problem.dtype), requires_grad=False)
    return layer


def _gpu(problem: Problem, what: str) -> None:
    if problem.weight.data.device.type != "cuda":
        raise Unavailable(f"{what} needs a GPU")


def _peer(name: str, package: str, source: str, gate: float = GATE_8):
    """Register a library that packs the decoded weight anew.

    `source` is the page, and the place on it, whose call is made here. Which versions ran where: docs/decisions/peers.md.
    """
    return provider(name, "peer", gate, source=source, own_weights=True, package=package)


_BNB = "https://huggingface.co/docs/bitsandbytes/reference/nn/"


@_peer("bitsandbytes nf4", "bitsandbytes", _BNB + "linear4bit", GATE_4)
def _bitsandbytes_nf4(problem: Problem):
    """NF4 with the compute dtype of the activations."""
    bnb, plain = _needs("bitsandbytes"), _plain(problem)
    layer = bnb.nn.LinearNF4(plain.in_features, plain.out_features, bias=True, compute_dtype=problem.dtype)
    layer.load_state_dict(plain.state_dict())
    return layer.to(problem.dtype).to(problem.weight.data.device).eval()


def _bitsandbytes_int8(threshold: float):
    def make(problem: Problem):
        bnb, plain = _needs("bitsandbytes"), _plain(problem)
        options = dict(bias=True, has_fp16_weights=False, threshold=threshold)
        layer = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, **options)
        layer.load_state_dict(plain.state_dict())
        return layer.to(problem.weight.data.device).eval()

    return make


# With the outlier threshold that diffusers' BitsAndBytesConfig sets, and with the class's own default, which has none and is faster.
for _name, _threshold in (("bitsandbytes int8", 6.0), ("bitsandbytes int8 no outliers", 0.0)):
    _peer(_name, "bitsandbytes", _BNB + "linear8bit")(_bitsandbytes_int8(_threshold))

_TORCHAO = "https://docs.pytorch.org/ao/stable/quick_start.html: quantize_ and torch.compile"


def _torchao(config: str, needs_gpu: bool = False):
    def make(problem: Problem):
        quantization = _needs("torchao.quantization")
        if needs_gpu:
            _gpu(problem, "torchao's fp8")
        model = nn.Sequential(_plain(problem))
        arguments = dict(granularity=quantization.PerRow()) if needs_gpu else {}
        quantization.quantize_(model, getattr(quantization, config)(**arguments))
        torch.compiler.reset()
        return torch.compile(model, mode="max-autotune-no-cudagraphs", fullgraph=True)

    return make


_peer("torchao int8 weight-only", "torchao", _TORCHAO)(_torchao("Int8WeightOnlyConfig"))
_peer("torchao int8 dynamic", "torchao", _TORCHAO)(_torchao("Int8DynamicActivationInt8WeightConfig"))
_peer("torchao fp8 dynamic", "torchao", _TORCHAO)(_torchao("Float8DynamicActivationFloat8WeightConfig", True))

_SDNQ = "https://github.com/Disty0/sdnq, README: quantization config, post load quantization on any model"


@_peer("sdnq int8", "sdnq", _SDNQ)
def _sdnq(problem: Problem):
    """int8 with quantized matmul, the combination its documentation gives for speed."""
    sdnq, common = _needs("sdnq"), _needs("sdnq.common")
    model = nn.Sequential(_plain(problem))
    options = dict(weights_dtype="int8", use_quantized_matmul=bool(common.use_torch_compile), add_skip_keys=False)
    done = sdnq.sdnq_post_load_quant(model, torch_dtype=problem.dtype, **options)
    return done[0] if isinstance(done, tuple) else done


def _gemlite(name: str):
    def make(problem: Problem):
        _gpu(problem, "gemlite")
        helper = _needs("gemlite.helper")
        return getattr(helper, name)(device=str(problem.weight.data.device), dtype=problem.dtype).from_linear(_plain(problem))

    return make


_GEMLITE = "https://github.com/mobiusml/gemlite, gemlite/helper.py: what patch_model does to a linear layer"
_peer("gemlite int8 weight-only", "gemlite", _GEMLITE)(_gemlite("A16W8_INT8"))
_peer("gemlite int8 dynamic", "gemlite", _GEMLITE)(_gemlite("A8W8_INT8_dynamic"))

_QUANTO = "https://github.com/huggingface/optimum-quanto, README: quantization workflow for vanilla pytorch models"


@_peer("quanto int8", "optimum-quanto", _QUANTO)
def _quanto(problem: Problem):
    """Weights of 8 bits, frozen; activations stay as they are."""
    quanto = _needs("optimum.quanto")
    model = nn.Sequential(_plain(problem))
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


_VLLM = "https://github.com/vllm-project/vllm-gguf-plugin, quantization/linear.py: what its linear layer calls"


def _packed_call(multiply, problem: Problem):
    """Call theirs on the packed bytes in file order; it has no bias, which is added."""
    data = problem.weight.arranged(planes=False).data
    ggml_type, bias = int(problem.weight.fmt.ggml_type), problem.bias.to(problem.dtype)
    return lambda x: multiply(data, x, ggml_type, data.shape[0]) + bias


@provider("vllm-gguf-plugin", "peer", GATE_INT8, source=_VLLM, package="vllm-gguf-plugin")
def _vllm_gguf(problem: Problem):
    """Its own dispatch over M and type: CUDA kernels with 8-bit activations where built, else Triton."""
    _gpu(problem, "vllm-gguf-plugin")
    linear = _needs("vllm_gguf_plugin.quantization.linear")
    return _packed_call(lambda data, x, ggml_type, _: linear._fused_mul_mat_gguf(x, data, ggml_type), problem)


@provider("vllm-gguf-plugin triton", "peer", source=_VLLM, package="vllm-gguf-plugin")
def _vllm_gguf_triton(problem: Problem):
    """Its Triton product, what its dispatch takes with VLLM_GGUF_USE_CUDA=0.

    The package imports vLLM, its Triton files only torch and triton: they are imported under a name of their own.
    """
    _gpu(problem, "vllm-gguf-plugin")
    alias, spec = "_vllm_gguf_plugin_kernels", importlib.util.find_spec("vllm_gguf_plugin")
    if spec is None:
        raise not_installed("vllm_gguf_plugin", _DISTRIBUTIONS["vllm_gguf_plugin"])
    if alias not in sys.modules:
        package = ModuleType(alias)
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[alias] = package
    multiply = _needs(f"{alias}.triton.gemm.interface").ggml_mul_mat_a8_triton
    return _packed_call(multiply, problem)
