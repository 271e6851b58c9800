"""Other libraries as providers: each called as its own documentation recommends, on a plain linear with the decoded weight.

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


# Each `source` is the page, and the place on it, whose call is made here. Which versions ran where: docs/decisions/peers.md.
_BNB = "https://huggingface.co/docs/bitsandbytes/reference/nn/"


@provider("bitsandbytes nf4", "peer", GATE_4, source=_BNB + "linear4bit", own_weights=True, package="bitsandbytes")
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
_INT8 = dict(source=_BNB + "linear8bit", own_weights=True, package="bitsandbytes")
provider("bitsandbytes int8", "peer", GATE_8, **_INT8)(_bitsandbytes_int8(6.0))
provider("bitsandbytes int8 no outliers", "peer", GATE_8, **_INT8)(_bitsandbytes_int8(0.0))


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


_AO = dict(source=_TORCHAO, own_weights=True, package="torchao")
provider("torchao int8 weight-only", "peer", GATE_8, **_AO)(_torchao("Int8WeightOnlyConfig"))
provider("torchao int8 dynamic", "peer", GATE_8, **_AO)(_torchao("Int8DynamicActivationInt8WeightConfig"))
provider("torchao fp8 dynamic", "peer", GATE_8, **_AO)(_torchao("Float8DynamicActivationFloat8WeightConfig", True))


@provider(
    "sdnq int8",
    "peer",
    GATE_8,
    source="https://github.com/Disty0/sdnq, README: quantization config, post load quantization on any model",
    own_weights=True,
    package="sdnq",
)
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


_GEM = dict(
    source="https://github.com/mobiusml/gemlite, gemlite/helper.py: what patch_model does to a linear layer",
    own_weights=True,
    package="gemlite",
)
provider("gemlite int8 weight-only", "peer", GATE_8, **_GEM)(_gemlite("A16W8_INT8"))
provider("gemlite int8 dynamic", "peer", GATE_8, **_GEM)(_gemlite("A8W8_INT8_dynamic"))


@provider(
    "quanto int8",
    "peer",
    GATE_8,
    source="https://github.com/huggingface/optimum-quanto, README: quantization workflow for vanilla pytorch models",
    own_weights=True,
    package="optimum-quanto",
)
def _quanto(problem: Problem):
    """Weights of 8 bits, frozen; activations stay as they are."""
    quanto = _needs("optimum.quanto")
    model = nn.Sequential(_plain(problem))
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


_VLLM = dict(
    source="https://github.com/vllm-project/vllm-gguf-plugin, quantization/linear.py: what its linear layer calls",
    package="vllm-gguf-plugin",
)


def _packed_call(multiply, problem: Problem):
    """Call theirs on the packed bytes in file order; it has no bias, which is added."""
    data = problem.weight.in_file_order().data
    kind, bias = int(problem.weight.fmt.ggml_type), problem.bias.to(problem.dtype)
    return lambda x: multiply(data, x, kind, data.shape[0]) + bias


@provider("vllm-gguf-plugin", "peer", GATE_INT8, **_VLLM)
def _vllm_gguf(problem: Problem):
    """Its own dispatch over M and type: CUDA kernels with 8-bit activations where its extension is built, Triton otherwise."""
    _gpu(problem, "vllm-gguf-plugin")
    linear = _needs("vllm_gguf_plugin.quantization.linear")
    return _packed_call(lambda data, x, kind, _: linear._fused_mul_mat_gguf(x, data, kind), problem)


@provider("vllm-gguf-plugin triton", "peer", **_VLLM)
def _vllm_gguf_triton(problem: Problem):
    """Its Triton product, what its dispatch takes with VLLM_GGUF_USE_CUDA=0.

    The package imports vLLM, its Triton files only torch and triton: they are imported under a name of their own.
    """
    _gpu(problem, "vllm-gguf-plugin")
    alias, found = "_vllm_gguf_plugin_kernels", importlib.util.find_spec("vllm_gguf_plugin")
    if found is None:
        raise not_installed("vllm_gguf_plugin", _DISTRIBUTIONS["vllm_gguf_plugin"])
    if alias not in sys.modules:
        package = ModuleType(alias)
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules[alias] = package
    multiply = _needs(f"{alias}.triton.gemm.interface").ggml_mul_mat_a8_triton
    return _packed_call(multiply, problem)
