"""The tests of diffusers on its models and quantizers, pointed at a tiny Flux with packed layers.

diffusers keeps them as mixins in tests/models/testing_utils of its repository (quantization, lora, memory, training, compile),
not in its wheel. The methods here have their names and check the same, so that a maintainer can move a class over and let it
inherit the mixin instead. Where a mixin only asks for finite numbers, these compare with the decoded model.
"""

from __future__ import annotations

import copy
import json
from typing import ClassVar

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import nn

import flux_kernels as fk
from flux_kernels import FluxKernelsConfig, GGUFLinear

from ..conftest import TINY_FLUX, flux_inputs

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ACCELERATOR = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_accelerator = pytest.mark.skipif(ACCELERATOR.type == "cpu", reason="streams and splits between devices need a GPU")


class FluxTesterConfig:
    """Say what is tested, under the names that diffusers' mixins ask for."""

    model_class = FluxTransformer2DModel
    output_shape = (16, 64)
    torch_dtype = torch.float32
    LORA_TARGETS: ClassVar = ["to_q", "to_k", "to_v", "to_out.0"]

    @pytest.fixture(autouse=True)
    def _folder(self, plain_folder):
        self.pretrained_model_name_or_path = str(plain_folder)

    def get_init_dict(self):
        return {**TINY_FLUX, "num_layers": 1, "num_single_layers": 1}

    def get_dummy_inputs(self, height: int = 4, width: int = 4):
        inputs = flux_inputs(tokens=height * width, dtype=self.torch_dtype)
        del inputs["return_dict"]
        return {key: value.to(ACCELERATOR) for key, value in inputs.items()}

    _models: ClassVar = {}

    def get_model(self):
        """Build a model from its config and pack all of its linear layers (once; tests get copies)."""
        if "swapped" not in self._models:
            torch.manual_seed(0)
            self._models["swapped"] = self.model_class(**self.get_init_dict())
            fk.swap_linear(self._models["swapped"], format="Q8_0")
        return copy.deepcopy(self._models["swapped"])

    def run(self, model, **changes):
        with torch.no_grad():
            return model(**{**self.get_dummy_inputs(), **changes}, return_dict=False)[0]


class FluxKernelsConfigMixin(FluxTesterConfig):
    CONFIGS: ClassVar = {
        "Q8_0": {"format": "Q8_0"},
        "mixed": {"format": {"x_embedder": "Q5_1", "*.attn.*": "Q6_K", "*": "Q4_K"}},
    }
    # Against bfloat16.
    EXPECTED_MEMORY_REDUCTIONS: ClassVar = {"Q8_0": 1.8, "mixed": 3.0}
    modules_to_not_convert_for_test = ("transformer_blocks.0", "norm_out.linear")

    def _load_unquantized_model(self, **options):
        return self.model_class.from_pretrained(self.pretrained_model_name_or_path, **options)

    def _create_quantized_model(self, config_kwargs, **options):
        config = FluxKernelsConfig(**config_kwargs)
        return self._load_unquantized_model(quantization_config=config, **options)

    def _is_module_quantized(self, module):
        return isinstance(module, GGUFLinear)

    def _linears(self, model):
        return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


class LoRALayer(nn.Module):
    """Add a trainable low-rank product to a layer."""

    def __init__(self, module: nn.Linear, rank: int = 4):
        super().__init__()
        self.module = module
        down = nn.Linear(module.in_features, rank, bias=False)
        up = nn.Linear(rank, module.out_features, bias=False)
        self.adapter = nn.Sequential(down, up).to(module.weight.device)
        nn.init.zeros_(up.weight)

    def forward(self, input, *args, **kwargs):
        return self.module(input, *args, **kwargs) + self.adapter(input)


@pytest.mark.parametrize("config_name", list(FluxKernelsConfigMixin.CONFIGS))
class TestFluxQuantization(FluxKernelsConfigMixin):
    def test_quantization_num_parameters(self, config_name):
        quantized = self._create_quantized_model(self.CONFIGS[config_name])
        assert quantized.num_parameters() == self._load_unquantized_model().num_parameters()

    def test_quantization_memory_footprint(self, config_name):
        plain = self._load_unquantized_model(torch_dtype=torch.bfloat16).get_memory_footprint()
        packed = self._create_quantized_model(self.CONFIGS[config_name], torch_dtype=torch.bfloat16).get_memory_footprint()
        assert plain / packed >= self.EXPECTED_MEMORY_REDUCTIONS[config_name]

    def test_quantization_inference(self, config_name):
        model = self._create_quantized_model(self.CONFIGS[config_name]).to(ACCELERATOR)
        torch.testing.assert_close(self.run(model), self.run(copy.deepcopy(model).dequantize()), **CLOSE)

    def test_quantization_dtype_assignment(self, config_name):
        model = self._create_quantized_model(self.CONFIGS[config_name])
        for cast in (
            lambda: model.to(torch.float16),
            lambda: model.to(device="cpu", dtype=torch.float16),
            model.float,
            model.half,
        ):
            with pytest.raises(ValueError):
                cast()
        model.to(ACCELERATOR)

    def test_quantization_lora_inference(self, config_name):
        model = self._create_quantized_model(self.CONFIGS[config_name])
        plain = copy.deepcopy(model).dequantize()
        outputs = []
        for each in (plain, model):
            torch.manual_seed(0)
            each.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=self.LORA_TARGETS, init_lora_weights=False))
            outputs.append(self.run(each.to(ACCELERATOR)))
        torch.testing.assert_close(*outputs, **CLOSE)

    @pytest.mark.parametrize("max_shard_size", ["10GB", "1MB"])
    def test_quantization_serialization(self, config_name, max_shard_size, tmp_path):
        model = self._create_quantized_model(self.CONFIGS[config_name])
        model.save_pretrained(str(tmp_path), safe_serialization=True, max_shard_size=max_shard_size)
        loaded = self.model_class.from_pretrained(str(tmp_path))
        torch.testing.assert_close(self.run(loaded), self.run(model), **CLOSE)

    def test_quantized_layers(self, config_name):
        plain, model = self._load_unquantized_model(), self._create_quantized_model(self.CONFIGS[config_name])
        assert all(self._is_module_quantized(module) for module in self._linears(model).values())
        assert list(self._linears(model)) == list(self._linears(plain))

    def test_quantization_config_serialization(self, config_name):
        config = self._create_quantized_model(self.CONFIGS[config_name]).config["quantization_config"]
        assert json.loads(json.dumps(config.to_dict()))["quant_method"] == config.quant_method.value == "flux_kernels"
        assert json.loads(config.to_json_string()) == config.to_diff_dict()
        assert FluxKernelsConfig.from_dict(config.to_dict()) == config

    def test_original_dtype(self, config_name):
        model = self._create_quantized_model(self.CONFIGS[config_name], torch_dtype=torch.float16)
        assert model.config["_pre_quantization_dtype"] == torch.float16

    def test_keep_modules_in_fp32(self, config_name, monkeypatch):
        monkeypatch.setattr(self.model_class, "_keep_in_fp32_modules", ["proj_out"])
        model = self._create_quantized_model(self.CONFIGS[config_name], torch_dtype=torch.bfloat16)
        for name, module in self._linears(model).items():
            kept = "proj_out" in name
            assert module.weight.dtype == (torch.float32 if kept else torch.bfloat16)
            assert self._is_module_quantized(module) != kept

    def test_modules_to_not_convert(self, config_name):
        kwargs = self.CONFIGS[config_name]
        model = self._create_quantized_model({**kwargs, "modules_to_not_convert": self.modules_to_not_convert_for_test})
        excluded = [
            name for name in self._linears(model) if any(entry in name for entry in self.modules_to_not_convert_for_test)
        ]
        assert excluded
        for name, module in self._linears(model).items():
            assert self._is_module_quantized(module) == (name not in excluded)
        assert model.get_memory_footprint() > self._create_quantized_model(kwargs).get_memory_footprint()

    def test_device_map(self, config_name):
        model = self._create_quantized_model(self.CONFIGS[config_name], device_map="auto")
        assert model.hf_device_map is not None and not self.run(model).isnan().any()

    def test_cpu_device_map(self, config_name):
        model = self._create_quantized_model(self.CONFIGS[config_name], device_map="cpu")
        assert model.hf_device_map is not None and model.device == torch.device("cpu")

    def test_dequantize(self, config_name):
        model = self._create_quantized_model(self.CONFIGS[config_name]).to(ACCELERATOR)
        before = self.run(model)
        model.dequantize()
        assert not any(self._is_module_quantized(module) for module in model.modules())
        torch.testing.assert_close(self.run(model), before, **CLOSE)

    def test_quantization_training(self, config_name):
        model = self._create_quantized_model(self.CONFIGS[config_name]).to(ACCELERATOR)
        for parameter in model.parameters():
            parameter.requires_grad = False
            if parameter.ndim == 1:
                parameter.data = parameter.data.to(torch.float32)
        adapters = []
        for module in list(model.modules()):
            for name in ("to_k", "to_q", "to_v"):
                if "Attention" in type(module).__name__ and hasattr(module, name):
                    setattr(module, name, LoRALayer(getattr(module, name)))
                    adapters.append(getattr(module, name))
        assert adapters
        with torch.autocast(ACCELERATOR.type, dtype=torch.bfloat16):
            model(**self.get_dummy_inputs(), return_dict=False)[0].norm().backward()
        assert all(layer.adapter[1].weight.grad.norm().item() > 0 for layer in adapters)


class TestFluxQuantizationCompile(FluxKernelsConfigMixin):
    def test_torch_compile(self):
        """The backend is the tracing half of inductor, whose code generation sees one custom op."""
        model = self._create_quantized_model(self.CONFIGS["Q8_0"])
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            first = self.run(compiled)
            torch.testing.assert_close(self.run(compiled), first)
        torch.testing.assert_close(first, self.run(model), **CLOSE)

    @needs_accelerator
    def test_torch_compile_with_group_offload(self):
        model = self._create_quantized_model(self.CONFIGS["mixed"])
        expected = self.run(copy.deepcopy(model).to(ACCELERATOR))
        model.enable_group_offload(ACCELERATOR, torch.device("cpu"), offload_type="leaf_level", use_stream=True)
        torch.testing.assert_close(self.run(torch.compile(model)), expected, **CLOSE)


class TestFluxGGUF(FluxKernelsConfigMixin):
    """As diffusers tests its own GGUF quantizer, with the same file and our config."""

    torch_dtype = torch.bfloat16

    @pytest.fixture(autouse=True)
    def _file(self, tiny_gguf):
        self.gguf_filename, self.folder = str(tiny_gguf / "tiny.gguf"), str(tiny_gguf)

    def _create_quantized_model(self, config_kwargs=None, **options):
        options = {"torch_dtype": torch.bfloat16, "device_map": str(ACCELERATOR), "config": self.folder, **options}
        config = FluxKernelsConfig(**(config_kwargs or {}))
        return self.model_class.from_single_file(self.gguf_filename, quantization_config=config, **options)

    def test_gguf_quantization_inference(self):
        assert not self.run(self._create_quantized_model().to(ACCELERATOR)).isnan().any()

    def test_gguf_keep_modules_in_fp32(self, monkeypatch):
        monkeypatch.setattr(self.model_class, "_keep_in_fp32_modules", ["proj_out"])
        for name, module in self._linears(self._create_quantized_model()).items():
            assert module.weight.dtype == (torch.float32 if "proj_out" in name else torch.bfloat16)

    def test_gguf_quantization_dtype_assignment(self):
        model = self._create_quantized_model()
        for cast in (lambda: model.to(torch.float16), model.float, model.half):
            with pytest.raises(ValueError):
                cast()

    def test_gguf_quantization_lora_inference(self):
        model = self._create_quantized_model()
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=self.LORA_TARGETS, init_lora_weights=False))
        assert not self.run(model.to(ACCELERATOR)).isnan().any()

    def test_gguf_dequantize(self):
        model = self._create_quantized_model()
        model.dequantize()
        assert not any(self._is_module_quantized(module) for module in model.modules())
        assert not self.run(model).isnan().any()
