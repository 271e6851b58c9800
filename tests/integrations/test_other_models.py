"""Packed layers in other transformers of diffusers: the library knows none, so all have to work."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from torch import nn

import flux_kernels as fk

from .conftest import assert_same_model

# Blocks of 32, so that models can be tiny.
FORMAT = "Q8_0"
# float32; sums in another order, and some outputs are differences of large numbers.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 32}
HALF = torch.tensor([0.5])
TEXT = normal(1, 8, 64)

# Class name -> arguments of the model, arguments of one forward.
MODELS = {
    "Flux2Transformer2DModel": (
        dict(
            in_channels=32, num_layers=1, num_single_layers=1, joint_attention_dim=64, axes_dims_rope=(8, 8, 8, 8), **ATTENTION
        ),
        dict(
            hidden_states=normal(1, 16, 32),
            encoder_hidden_states=TEXT,
            timestep=HALF,
            guidance=HALF,
            img_ids=torch.zeros(1, 16, 4),
            txt_ids=torch.zeros(1, 8, 4),
        ),
    ),
    "ChromaTransformer2DModel": (
        dict(
            in_channels=32,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
            approximator_num_channels=32,
            approximator_hidden_dim=64,
            approximator_layers=1,
            **ATTENTION,
        ),
        dict(
            hidden_states=normal(1, 16, 32),
            encoder_hidden_states=TEXT,
            timestep=HALF,
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
        ),
    ),
    "SD3Transformer2DModel": (
        dict(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=64,
            caption_projection_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
            **ATTENTION,
        ),
        dict(hidden_states=normal(1, 4, 8, 8), encoder_hidden_states=TEXT, pooled_projections=normal(1, 64), timestep=HALF),
    ),
    "QwenImageTransformer2DModel": (
        dict(in_channels=32, out_channels=8, num_layers=2, joint_attention_dim=64, axes_dims_rope=(8, 12, 12), **ATTENTION),
        dict(
            hidden_states=normal(1, 16, 32),
            encoder_hidden_states=TEXT,
            encoder_hidden_states_mask=torch.ones(1, 8, dtype=torch.bool),
            timestep=HALF,
            img_shapes=[[(1, 4, 4)]],
        ),
    ),
    "WanTransformer3DModel": (
        dict(
            in_channels=4, out_channels=4, text_dim=64, freq_dim=64, ffn_dim=128, num_layers=2, rope_max_seq_len=32, **ATTENTION
        ),
        dict(hidden_states=normal(1, 4, 2, 8, 8), encoder_hidden_states=TEXT, timestep=torch.tensor([500])),
    ),
    "ZImageTransformer2DModel": (
        dict(
            in_channels=16,
            dim=64,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=64,
            axes_dims=[8, 12, 12],
            axes_lens=[256, 32, 32],
        ),
        dict(x=[normal(16, 1, 8, 8)], t=HALF, cap_feats=[normal(8, 64)]),
    ),
    "Lumina2Transformer2DModel": (
        dict(
            sample_size=8,
            in_channels=8,
            hidden_size=96,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=32,
            axes_dim_rope=(8, 12, 12),
            axes_lens=(64, 32, 32),
            cap_feat_dim=64,
        ),
        dict(
            hidden_states=normal(1, 8, 8, 8),
            encoder_hidden_states=TEXT,
            timestep=HALF,
            encoder_attention_mask=torch.ones(1, 8, dtype=torch.bool),
        ),
    ),
    "HunyuanVideoTransformer3DModel": (
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=64,
            pooled_projection_dim=64,
            rope_axes_dim=(8, 12, 12),
            **ATTENTION,
        ),
        dict(
            hidden_states=normal(1, 4, 1, 8, 8),
            encoder_hidden_states=TEXT,
            encoder_attention_mask=torch.ones(1, 8),
            pooled_projections=normal(1, 64),
            timestep=HALF,
            guidance=HALF,
        ),
    ),
    "LTXVideoTransformer3DModel": (
        dict(in_channels=32, out_channels=32, num_layers=2, cross_attention_dim=64, caption_channels=64, **ATTENTION),
        dict(
            hidden_states=normal(1, 8, 32),
            encoder_hidden_states=TEXT,
            encoder_attention_mask=torch.ones(1, 8, dtype=torch.bool),
            timestep=HALF,
            num_frames=2,
            height=2,
            width=2,
        ),
    ),
    "AuraFlowTransformer2DModel": (
        dict(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=64,
            caption_projection_dim=64,
            pos_embed_max_size=16,
            **ATTENTION,
        ),
        dict(hidden_states=normal(1, 4, 8, 8), encoder_hidden_states=TEXT, timestep=HALF),
    ),
}


def run(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0]
    return output if isinstance(output, torch.Tensor) else torch.cat([each.flatten() for each in output])


@pytest.fixture(params=MODELS)
def case(request):
    """Build a tiny random model; return it, its inputs, and the layers that have no whole blocks."""
    config, inputs = MODELS[request.param]
    torch.manual_seed(0)
    model = getattr(diffusers, request.param)(**config).eval()
    # Some are made without values, or as zeros that would hide errors.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    unfit = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer.in_features % 32]
    return model, inputs, unfit


def packed_layers(model) -> list[fk.GGUFLinear]:
    return [module for module in model.modules() if isinstance(module, fk.GGUFLinear)]


def test_swap_copy_state_dict_and_round_trip(case, tmp_path):
    model, inputs, unfit = case
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = model.num_parameters()
    report = fk.swap_linear(model, format=FORMAT, exclude=unfit)
    assert len(report.swapped) == len(packed_layers(model)) == len(linears) - len(unfit) > 5
    assert model.num_parameters() == weights
    expected = run(copy.deepcopy(model).dequantize(), inputs)
    assert expected.isfinite().all() and expected.std() > 1e-3
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)
    other = copy.deepcopy(model)
    for layer in packed_layers(other):
        layer.qweight.data.zero_()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(other, inputs), expected, **CLOSE)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_model(loaded, model)
    torch.testing.assert_close(run(loaded, inputs), expected, **CLOSE)


def test_quantizing_while_loading(case, tmp_path):
    """Parts that the class keeps in float32 stay plain; all else equals swap_linear."""
    model, inputs, unfit = case
    kept = set(model._keep_in_fp32_modules or ())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=fk.FluxKernelsConfig(FORMAT))
    spared = [name for name, _ in model.named_modules() if kept & set(name.split("."))]
    fk.swap_linear(model, format=FORMAT, exclude=[*unfit, *spared])
    assert_same_model(loaded, model)
    torch.testing.assert_close(run(loaded, inputs), run(model, inputs), **CLOSE)
    for name, layer in loaded.named_modules():
        if isinstance(layer, fk.GGUFLinear):
            assert not kept & set(name.split("."))


@pytest.mark.parametrize("case", ["ZImageTransformer2DModel", "AuraFlowTransformer2DModel"], indirect=True)
def test_layers_that_do_not_fit_are_refused_by_name(case):
    model, _, unfit = case
    assert unfit
    with pytest.raises(fk.FormatError, match=r"Q8_0 needs K % 32 == 0, got K=\d+ .*exclude="):
        fk.swap_linear(model, format=FORMAT)
    assert not packed_layers(model)
