"""What diffusers and peft do to a model with adapters, done to a swapped one.

See test_operations_table.py.
"""

from __future__ import annotations

import pytest
import torch

import flux_kernels as fk

from ..conftest import flux_inputs
from .lora import lora_config, lora_state_dict, pipeline
from .twins import CLOSE, assert_same, run, twin


def test_add_adapter_and_train(model):
    plain = twin(model)
    gradients = []
    for each in (plain, model):
        torch.manual_seed(1)
        each.add_adapter(lora_config(init_lora_weights=False))
        each.train()
        each(**flux_inputs())[0].square().mean().backward()
        gradients.append([value.grad for name, value in each.named_parameters() if "lora" in name])
    assert gradients[0] and all(gradient is not None for gradient in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)


def test_training_an_adapter_lowers_the_loss(model):
    torch.manual_seed(0)
    model.add_adapter(lora_config())
    trained = [value for name, value in model.named_parameters() if value.requires_grad and "lora" in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    target, losses = torch.randn(1, 16, 64), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(**flux_inputs())[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_load_two_adapters_scale_delete_and_unload(model, expected):
    plain, outputs = twin(model), []
    for each in (plain, model):
        pipe = pipeline(each)
        pipe.load_lora_weights(lora_state_dict(1), adapter_name="one")
        pipe.load_lora_weights(lora_state_dict(2, "to_k"), adapter_name="two")
        steps = []
        for names, weights in ((["one"], [1.0]), (["one", "two"], [0.7, 0.3])):
            pipe.set_adapters(names, adapter_weights=weights)
            steps.append(run(each))
        pipe.delete_adapters("one")
        steps.append(run(each))
        pipe.unload_lora_weights()
        steps.append(run(each))
        outputs.append(steps)
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    assert not torch.allclose(outputs[1][0], outputs[1][1])
    assert_same(model, expected)


def test_hotswap(model):
    plain, outputs = twin(model), []
    for each in (plain, model):
        pipe = pipeline(each)
        pipe.load_lora_weights(lora_state_dict(1), adapter_name="one")
        first = run(each)
        pipe.load_lora_weights(lora_state_dict(3), adapter_name="one", hotswap=True)
        outputs.append([first, run(each)])
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    assert not torch.allclose(outputs[1][0], outputs[1][1])


@pytest.mark.parametrize("safe", [False, True])
def test_fuse_and_unfuse_lora(model, expected, safe):
    plain, outputs = twin(model), []
    for each in (plain, model):
        pipe = pipeline(each)
        pipe.load_lora_weights(lora_state_dict(1), adapter_name="one")
        pipe.fuse_lora(lora_scale=0.5, safe_fusing=safe)
        outputs.append(run(each))
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    assert not torch.allclose(outputs[1], expected, **CLOSE)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert_same(model, expected)


def test_dora(model):
    plain, outputs = twin(model), []
    for each in (plain, model):
        torch.manual_seed(1)
        each.add_adapter(lora_config(use_dora=True, init_lora_weights=False))
        outputs.append(run(each))
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


def test_adapters_that_edit_the_base_weight_refuse(model):
    with pytest.raises(fk.FormatError, match="packed"):
        model.add_adapter(lora_config(init_lora_weights="pissa"))


def test_lora_and_packed_layers_compile_together(model):
    model.add_adapter(lora_config(init_lora_weights=False))
    want = run(model)
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), want, **CLOSE)
