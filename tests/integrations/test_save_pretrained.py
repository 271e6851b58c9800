"""save_pretrained and back without any argument: bytes, types, modes, backends and dtypes stay."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from peft import LoraConfig

import flux_kernels as fk
from flux_kernels import FluxKernelsConfig, GGUFLinear
from flux_kernels.generation.embedded import PIPELINE_KWARGS, embedded_model_path

from ..conftest import TINY_FLUX
from ..flux_files import Architecture, flux_file, layout_types
from .conftest import assert_same_model, packed, run

PACKED = {"*.to_q": "Q6_K", "*.attn.*": "Q8_0", "*transformer_blocks.*": "Q4_K"}


def load(folder, **options):
    return FluxTransformer2DModel.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def _model(plain_folder):
    config = FluxKernelsConfig(PACKED, compute={"*proj_mlp": "int8", "*.1.*": "fp16_accumulate"}, backend={"*to_k": "torch"})
    return load(plain_folder, quantization_config=config, torch_dtype=torch.bfloat16)


@pytest.fixture
def model(_model):
    """Copy a tiny Flux with four types, three compute modes and two backends, in bfloat16."""
    return copy.deepcopy(_model)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "1MB"}, {"variant": "packed"}, {"variant": "packed", "max_shard_size": "1MB"}],
    ids=["plain", "sharded", "variant", "sharded variant"],
)
def test_round_trip(model, tmp_path, options):
    model.save_pretrained(tmp_path, **options)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 if "max_shard_size" in options else len(files) == 1
    loaded = load(tmp_path, **{key: value for key, value in options.items() if key == "variant"})
    assert_same_model(loaded, model)
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), model)


def test_round_trip_through_torch_save_files(model, tmp_path):
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    assert_same_model(load(tmp_path, use_safetensors=False), model)


def test_what_push_to_hub_uploads_is_the_same_folder(model, tmp_path, monkeypatch):
    uploaded = {}
    for name, value in (("create_repo", None), ("load_or_create_model_card", None), ("populate_model_card", None)):
        monkeypatch.setattr(f"diffusers.models.modeling_utils.{name}", lambda *args, _value=value, **kwargs: _Card())
    monkeypatch.setattr(
        FluxTransformer2DModel, "_upload_folder", lambda self, folder, repo, **kwargs: uploaded.update({repo: folder})
    )
    model.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="someone/tiny")
    assert_same_model(load(uploaded["someone/tiny"]), model)


class _Card:
    repo_id = "someone/tiny"

    def save(self, path):
        """Write nothing."""


def test_config_json_can_be_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "flux_kernels" and saved["dtype"] == "bfloat16"
    assert saved["format"]["transformer_blocks.*.attn.to_q"] == "Q6_K"
    assert saved["format"]["single_transformer_blocks.*.proj_mlp"] == "Q4_K"
    assert saved["compute"]["single_transformer_blocks.*.proj_mlp"] == "int8"
    assert saved["compute"]["transformer_blocks.1.attn.to_q"] == "fp16_accumulate"
    # A pattern for all blocks where all agree.
    assert len(saved["format"]) < 30
    assert FluxKernelsConfig.from_dict(saved).to_dict() == saved


def test_models_of_load_flux(tmp_path):
    file = flux_file(Architecture(), layout_types("new", "Q4_K"))
    model = fk.load_flux(file.write(tmp_path / "in.gguf"), compute="int8")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["compute"] == "int8"
    loaded = load(tmp_path / "saved")
    assert_same_model(loaded, model)
    fk.save_gguf(loaded, tmp_path / "out.gguf")
    assert_same_model(fk.load_flux(tmp_path / "out.gguf", compute="int8"), model)


def test_swapped_models_and_later_changes(plain_folder, tmp_path):
    model = load(plain_folder, torch_dtype=torch.bfloat16)
    fk.swap_linear(model, format="Q8_0", exclude="transformer_blocks.1.*")
    # By hand.
    model.proj_out.compute = "int8"
    model.transformer_blocks[0].norm1.linear = model.transformer_blocks[0].norm1.linear.dequantize()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_model(loaded, model)
    fk.swap_linear(loaded, format="Q4_0", backend="torch")
    loaded.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_model(again, loaded)
    assert {layer[0] for layer in packed(again).values()} == {"Q8_0", "Q4_0"} and packed(again)["proj_out"][2] == "torch"


def test_models_that_diffusers_loaded_from_gguf(swapped_flux, tmp_path):
    swapped_flux.save_pretrained(tmp_path)
    assert_same_model(load(tmp_path), swapped_flux)


def test_a_model_can_be_saved_over_the_files_it_is_mapped_from(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert_same_model(loaded, model)
    assert_same_model(load(tmp_path), model)


@pytest.mark.parametrize("move", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_can_be_saved(model, tmp_path, move):
    model.proj_out.compute = "int8"
    clone = move(model)
    clone.save_pretrained(tmp_path)
    assert_same_model(load(tmp_path), model)


def change_by_hand(model, how: str) -> None:
    attention = model.transformer_blocks[0].attn
    if how == "type":
        attention.to_q = GGUFLinear.from_linear(attention.to_q.dequantize(), "Q5_0")
    else:
        attention.to_q.set_low_rank(torch.randn(4, 256).bfloat16(), torch.randn(256, 4).bfloat16())


@pytest.mark.parametrize("how", ["type", "branch"])
def test_copies_that_were_changed_by_hand(model, tmp_path, how):
    """A copy is described as it is; an unpickled model is unknown to its config until it is swapped.

    Until then it says so.
    """
    clone = copy.deepcopy(model)
    change_by_hand(clone, how)
    clone.save_pretrained(tmp_path / "copy")
    assert_same_model(load(tmp_path / "copy"), clone)
    unpickled = pickle.loads(pickle.dumps(model))
    change_by_hand(unpickled, how)
    with pytest.raises(ValueError, match="attn.to_q was changed after the model was unpickled.*swap_linear"):
        unpickled.save_pretrained(tmp_path)
    fk.swap_linear(unpickled, compute={})
    unpickled.save_pretrained(tmp_path)
    assert_same_model(load(tmp_path), unpickled)


def test_rows_in_field_planes_are_saved_in_file_order(model, tmp_path):
    """As on a GPU, where some types are rearranged."""
    before = {name: data.clone() for name, (*_, data) in packed(model).items()}
    for layer in model.modules():
        if isinstance(layer, GGUFLinear):
            layer.qweight.data = fk.FORMATS[layer.format].layout.to_planes(layer.qweight.data)
            layer.planes = True
    model.save_pretrained(tmp_path)
    loaded = packed(load(tmp_path))
    assert all(torch.equal(loaded[name][-1], data) for name, data in before.items())


def test_low_rank_branches_and_outliers_are_saved(model, tmp_path):
    layer = model.single_transformer_blocks[0].proj_mlp
    layer.set_low_rank(torch.randn(4, layer.in_features).bfloat16(), torch.randn(layer.out_features, 4).bfloat16())
    layer.keep_outliers(torch.tensor([3, 1]))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_model(loaded, model)
    assert loaded.single_transformer_blocks[0].proj_mlp.rank == 4


def test_adapters_and_fused_projections_are_refused_before_anything_is_written(model, tmp_path):
    folder = tmp_path / "saved"
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="attn.to_q has an adapter.*save_lora_weights"):
        model.save_pretrained(folder)
    # Describes the model all the same.
    repr(model.config)
    model.delete_adapters("default")
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    # Layers are fused where type, compute mode and backend are the same.
    attention = model.transformer_blocks[0].attn
    attention.to_q, attention.to_v = copy.deepcopy(attention.to_k), copy.deepcopy(attention.to_k)
    fk.fuse_projections(model)
    with pytest.raises(ValueError, match="is a FusedPart.*unfuse_projections"):
        model.save_pretrained(folder)
    assert not folder.exists()
    fk.unfuse_projections(model)
    model.save_pretrained(folder)
    assert_same_model(load(folder), model)


def test_meta_weights_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="is on the meta device"):
        model.to("meta").save_pretrained(tmp_path)


def test_dequantize_forgets_the_config(model, tmp_path):
    before = run(model)
    model.dequantize()
    assert "quantization_config" not in model.config and not hasattr(model, "hf_quantizer") and not packed(model)
    # int8 layers were among them.
    torch.testing.assert_close(run(model), before, rtol=0.05, atol=0.05)
    model.to(torch.float32).save_pretrained(tmp_path)
    assert not packed(load(tmp_path)) and "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_damaged_and_mixed_up_checkpoints(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    good, config = load_file(path), (tmp_path / "config.json").read_text()

    def problem(state: dict, text: str = config) -> str:
        path.unlink()
        save_file(state, path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError) as caught:
            load(tmp_path)
        return str(caught.value)

    name = "transformer_blocks.0.attn.to_k"
    cut = {**good, f"{name}.qweight": good[f"{name}.qweight"][:5].contiguous()}
    assert f"{name} is described as [ggml type, N, K, planes] [8, 256, 256, 0], its rows are [5, 272]" in problem(cut)
    missing = {key: value for key, value in good.items() if not key.startswith(f"{name}.")}
    assert f"The checkpoint holds no weight for {name}" in problem(missing)
    assert f"{name}.qweight is torch.uint8 [256, 272]; Q4_K rows" in problem(good, config.replace("Q8_0", "Q4_K"))
    newer = config.replace('"dtype"', '"future": 1, "dtype"')
    assert "has future, which this version of flux_kernels does not know" in problem(good, newer)


def test_the_model_is_freed_when_it_is_deleted(plain_folder):
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        model = load(plain_folder, quantization_config=FluxKernelsConfig("Q8_0"))
        alive = [weakref.ref(part) for part in (model, model.proj_out, model.transformer_blocks[0].attn.to_q)]
        del model
        assert [part() for part in alive] == [None] * 3
    finally:
        gc.enable()


PIPELINE = {**PIPELINE_KWARGS, "num_inference_steps": 2, "output_type": "pt"}


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red seven", generator=torch.Generator().manual_seed(0), **PIPELINE).images


def test_pipeline_round_trip(tmp_path):
    mapping = {"transformer": FluxKernelsConfig("Q4_K", modules_to_not_convert=["norm_out"])}
    options = {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping), "torch_dtype": torch.float32}
    pipe = FluxPipeline.from_pretrained(embedded_model_path(), **options)
    assert {layer[0] for layer in packed(pipe.transformer).values()} == {"Q4_K"}
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    assert_same_model(loaded.transformer, pipe.transformer)
    torch.testing.assert_close(draw(loaded), draw(pipe), rtol=1e-3, atol=1e-3)


LATE = """
import sys
from diffusers import FluxTransformer2DModel

try:
    FluxTransformer2DModel.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
import flux_kernels

print(sum(isinstance(layer, flux_kernels.GGUFLinear) for layer in FluxTransformer2DModel.from_pretrained(sys.argv[1]).modules()))
"""


def test_diffusers_needs_flux_kernels_imported_early_or_late(model, tmp_path):
    model.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LATE, tmp_path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Unknown quantization type, got flux_kernels" in done.stdout and done.stdout.split()[-1] == str(len(packed(model)))


def test_the_tiny_flux_counts_its_weights(model):
    assert model.num_parameters() == FluxTransformer2DModel(**TINY_FLUX).num_parameters()
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable
    assert model.get_memory_footprint() == fk.memory_footprint(model)["total"]
