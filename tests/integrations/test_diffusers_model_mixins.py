"""What diffusers tests on models (see test_diffusers_mixins.py), on a tiny Flux after swap_linear."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from .test_diffusers_mixins import ACCELERATOR, CLOSE, FluxTesterConfig, needs_accelerator

LORA_FILE = "pytorch_lora_weights.safetensors"


def has_lora(model) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


class TestFluxLoRA(FluxTesterConfig):
    def adapted(self, rank: int = 4, **options):
        model = self.get_model()
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=self.LORA_TARGETS, init_lora_weights=False, **options)
        )
        assert has_lora(model)
        return model

    @pytest.mark.parametrize("use_dora", [False, True])
    def test_save_load_lora_adapter(self, tmp_path, use_dora):
        before = self.run(self.get_model())
        model = self.adapted(use_dora=use_dora)
        with_lora = self.run(model)
        assert not torch.allclose(before, with_lora, **CLOSE)
        model.save_lora_adapter(tmp_path)
        saved = load_file(tmp_path / LORA_FILE)
        assert saved and not any("base_layer" in key or "qweight" in key for key in saved)
        model.unload_lora()
        assert not has_lora(model)
        torch.testing.assert_close(self.run(model), before, **CLOSE)
        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        torch.testing.assert_close(self.run(model), with_lora, **CLOSE)

    def test_lora_wrong_adapter_name_raises_error(self, tmp_path):
        with pytest.raises(ValueError, match="Adapter name foo not found in the model."):
            self.adapted().save_lora_adapter(tmp_path, adapter_name="foo")

    def test_lora_adapter_metadata_is_loaded_correctly(self, tmp_path):
        model = self.adapted()
        expected = model.peft_config["default"].to_dict()
        model.save_lora_adapter(tmp_path)
        model.unload_lora()
        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        loaded = model.peft_config["default_0"].to_dict()
        assert {key: loaded[key] for key in ("r", "lora_alpha", "use_dora")} == {
            key: expected[key] for key in ("r", "lora_alpha", "use_dora")
        }
        assert set(loaded["target_modules"]) == set(expected["target_modules"])

    def test_lora_adapter_wrong_metadata_raises_error(self, tmp_path):
        model = self.adapted()
        model.save_lora_adapter(tmp_path)
        known = LoraConfig(r=4, target_modules=["to_q"]).to_dict()
        unknown = json.dumps({**known, "target_modules": ["to_q"], "foo": 1, "bar": 2}, default=str)
        metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: unknown}
        save_file(load_file(tmp_path / LORA_FILE), tmp_path / LORA_FILE, metadata=metadata)
        model.unload_lora()
        with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
            model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)

    @pytest.mark.parametrize(("do_compile", "rank0", "rank1"), [(False, 4, 4), (False, 4, 7), (True, 4, 7)])
    def test_hotswapping_model(self, tmp_path, rank0, rank1, do_compile):
        expected = []
        for index, rank in enumerate((rank0, rank1)):
            torch.manual_seed(index)
            adapted = self.get_model()
            torch.manual_seed(10 + index)
            targets = [*self.LORA_TARGETS, "proj_mlp"] if index == 0 else self.LORA_TARGETS
            adapted.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
            adapted.save_lora_adapter(tmp_path / str(index))
            expected.append(self.run(adapted))
        model = self.get_model()
        if do_compile or rank0 != rank1:
            model.enable_lora_hotswap(target_rank=max(rank0, rank1))
        model.load_lora_adapter(tmp_path / "0" / LORA_FILE, adapter_name="adapter0", prefix=None)
        torch.compiler.reset()
        runs = torch.compile(model, backend="aot_eager") if do_compile else model
        torch.testing.assert_close(self.run(runs), expected[0], **CLOSE)
        model.load_lora_adapter(tmp_path / "1" / LORA_FILE, adapter_name="adapter0", hotswap=True, prefix=None)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(self.run(runs), expected[1], **CLOSE)
        with pytest.raises(ValueError, match="no existing adapter by that name"):
            model.load_lora_adapter(tmp_path / "1" / LORA_FILE, adapter_name="missing", hotswap=True, prefix=None)


class TestFluxMemory(FluxTesterConfig):
    @needs_accelerator
    def test_cpu_offload(self, tmp_path):
        model = self.get_model()
        expected, size = self.run(copy.deepcopy(model).to(ACCELERATOR)), model.get_memory_footprint()
        model.save_pretrained(tmp_path)
        split = {0: int(0.7 * size), "cpu": 2 * size}
        loaded = self.model_class.from_pretrained(tmp_path, device_map="auto", max_memory=split)
        assert set(loaded.hf_device_map.values()) == {0, "cpu"}
        torch.testing.assert_close(self.run(loaded), expected, **CLOSE)

    @pytest.mark.parametrize("safe_serialization", [False, True], ids=["without_safetensors", "with_safetensors"])
    def test_disk_offload(self, tmp_path, safe_serialization):
        """Everything on the disk: a split between devices needs a GPU."""
        model = self.get_model()
        model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
        options = {"device_map": {"": "disk"}, "use_safetensors": safe_serialization}
        with pytest.raises(ValueError, match="offload_folder"):
            self.model_class.from_pretrained(tmp_path, **options)
        loaded = self.model_class.from_pretrained(tmp_path, offload_folder=str(tmp_path / "offload"), **options)
        assert loaded.proj_out.qweight.is_meta
        torch.testing.assert_close(self.run(loaded), self.run(model), **CLOSE)

    @pytest.mark.parametrize(
        "options",
        [
            {"offload_type": "block_level", "num_blocks_per_group": 1},
            {"offload_type": "block_level", "num_blocks_per_group": 1, "non_blocking": True},
            {"offload_type": "leaf_level"},
            pytest.param({"offload_type": "leaf_level", "use_stream": True}, marks=needs_accelerator),
            pytest.param({"offload_type": "leaf_level", "use_stream": True, "record_stream": True}, marks=needs_accelerator),
        ],
    )
    def test_group_offloading(self, options):
        model = self.get_model().eval()
        expected = self.run(copy.deepcopy(model).to(ACCELERATOR))
        model.enable_group_offload(ACCELERATOR, **options)
        torch.testing.assert_close(self.run(model), expected, **CLOSE)

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_group_offloading_with_layerwise_casting(self, offload_type):
        model = self.get_model().eval()
        count = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        model.enable_group_offload(ACCELERATOR, offload_type=offload_type, use_stream=ACCELERATOR.type == "cuda", **count)
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
        assert self.run(model).isfinite().all()

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_group_offloading_with_disk(self, tmp_path, offload_type):
        model = self.get_model().eval()
        expected = self.run(copy.deepcopy(model).to(ACCELERATOR))
        count = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        stream = ACCELERATOR.type == "cuda"
        folder = str(tmp_path)
        model.enable_group_offload(
            ACCELERATOR, offload_type=offload_type, offload_to_disk_path=folder, use_stream=stream, **count
        )
        assert list(tmp_path.glob("*.safetensors"))
        torch.testing.assert_close(self.run(model), expected, **CLOSE)

    def test_layerwise_casting_training(self):
        model = self.get_model()
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        model.train()
        output = model(**self.get_dummy_inputs(), return_dict=False)[0]
        nn.functional.mse_loss(output, torch.randn_like(output)).backward()


class TestFluxTraining(FluxTesterConfig):
    def loss(self, model):
        output = model(**self.get_dummy_inputs(), return_dict=False)[0]
        noise = torch.randn((1, *self.output_shape), generator=torch.Generator().manual_seed(0)).to(output)
        return nn.functional.mse_loss(output, noise)

    def test_training(self):
        model = self.get_model().to(ACCELERATOR).train()
        self.loss(model).backward()
        assert model.transformer_blocks[0].attn.to_q.bias.grad is not None

    def test_training_with_ema(self):
        model = self.get_model().to(ACCELERATOR).train()
        ema = EMAModel(model.parameters())
        self.loss(model).backward()
        ema.step(model.parameters())
        ema.copy_to(model.parameters())
        assert model.proj_out.qweight.dtype == torch.uint8 and self.run(model).isfinite().all()

    def test_gradient_checkpointing(self):
        model = self.get_model()
        assert not model.is_gradient_checkpointing
        model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing

    def test_gradient_checkpointing_is_applied(self):
        model = self.get_model()
        model.enable_gradient_checkpointing()
        applied = {type(module).__name__ for module in model.modules() if getattr(module, "gradient_checkpointing", False)}
        assert applied == {"FluxTransformer2DModel"}

    def test_gradient_checkpointing_equivalence(self):
        model, other = self.get_model().train(), self.get_model().train()
        other.load_state_dict(model.state_dict())
        other.enable_gradient_checkpointing()
        losses = [self.loss(each) for each in (model, other)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        gradients = dict(other.named_parameters())
        compared = [name for name, value in model.named_parameters() if value.grad is not None]
        assert compared
        for name, value in model.named_parameters():
            if value.grad is not None:
                torch.testing.assert_close(value.grad, gradients[name].grad, atol=5e-5, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_mixed_precision_training(self, dtype):
        model = self.get_model().to(ACCELERATOR).train()
        with torch.autocast(ACCELERATOR.type, dtype=dtype):
            loss = self.loss(model)
        loss.backward()
        assert model.transformer_blocks[0].attn.to_q.bias.grad.isfinite().all()


class TestFluxCompile(FluxTesterConfig):
    different_shapes_for_compilation = ((4, 4), (4, 8), (8, 8))

    @pytest.fixture(autouse=True)
    def _reset(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def test_torch_compile_recompilation_and_graph_break(self):
        model = self.get_model().to(ACCELERATOR).eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(self.run(compiled), self.run(compiled))

    def test_torch_compile_repeated_blocks(self):
        model = self.get_model().to(ACCELERATOR).eval()
        expected = self.run(model)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(recompile_limit=1):
            self.run(model)
            torch.testing.assert_close(self.run(model), expected, **CLOSE)

    @needs_accelerator
    def test_compile_with_group_offloading(self):
        model = self.get_model().eval()
        expected = self.run(copy.deepcopy(model).to(ACCELERATOR))
        model.enable_group_offload(
            ACCELERATOR,
            torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
            non_blocking=True,
        )
        model.compile()
        torch.testing.assert_close(self.run(model), expected, **CLOSE)

    def test_compile_on_different_shapes(self):
        model = self.get_model().to(ACCELERATOR).eval()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True), torch.fx.experimental._config.patch(use_duck_shape=False):
            for height, width in self.different_shapes_for_compilation:
                inputs = self.get_dummy_inputs(height, width)
                torch.testing.assert_close(self.run(compiled, **inputs), self.run(model, **inputs), **CLOSE)
