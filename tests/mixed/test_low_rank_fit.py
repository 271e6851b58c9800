"""Low-rank corrections: the best product there is, better where the inputs are, and counted in bytes."""

from __future__ import annotations

import pytest
import torch

import flux_kernels as fk
from flux_kernels.measure.measurer import Measurer
from flux_kernels.mixed.low_rank_fit import STORED, corrected, fit, root_of
from flux_kernels.mixed.option import Option

from .captured import embedded_pipeline, states

QKV = "double_blocks.0.img_attn.qkv.weight"


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
@pytest.mark.parametrize("correlated", [False, True])
def test_the_fit_is_the_truncated_svd(shape, correlated):
    torch.manual_seed(1)
    error, inputs = torch.randn(shape), torch.randn(200, shape[1]) @ torch.randn(shape[1], shape[1])
    moments = inputs.T @ inputs / 200 if correlated else inputs.square().mean(0)
    root = root_of(moments)
    matrix = root if correlated else root.diag()
    torch.testing.assert_close(matrix @ matrix, (moments if correlated else moments.diag()).double(), rtol=0.01, atol=0.5)
    down, up = fit(error, 5, root)
    assert down.shape == (5, shape[1]) and up.shape == (shape[0], 5)
    left = ((error - up @ down).double() @ matrix).square().sum()
    singular = torch.linalg.svdvals(error.double() @ matrix)
    # Eckart and Young: no product of rank 5 leaves less. float32 factors: relative 1e-7 of terms as large as the matrix
    assert left.item() == pytest.approx(singular[5:].square().sum().item(), rel=1e-5)


def round_trip(weight):
    return fk.dequantize(fk.quantize(weight, "Q2_K"), "Q2_K")


def test_a_correction_takes_what_a_type_does_worst():
    torch.manual_seed(2)
    weight = torch.randn(64, 256) * 0.02 + 0.2 * torch.randn(64, 4) @ torch.randn(4, 256)
    decoded, down, up = corrected(weight, round_trip, 8)
    assert down.dtype == up.dtype == STORED
    plain = (weight - round_trip(weight)).square().sum()
    left = (weight - decoded - up.float() @ down.float()).square().sum()
    # Without the four large directions what remains is a tenth in size, a hundredth in square.
    assert left < 0.1 * plain


def test_importance_says_where():
    torch.manual_seed(3)
    weight, importance = torch.randn(64, 256), torch.full((256,), 1e-2)
    importance[:32] = 1.0

    def seen(factors):
        decoded, down, up = factors
        return ((weight - decoded - up.float() @ down.float()).square() * importance).sum()

    assert seen(corrected(weight, round_trip, 8, importance)) < 0.8 * seen(corrected(weight, round_trip, 8))


def test_a_corrected_tensor_is_measured_and_counted():
    measurer = Measurer(embedded_pipeline().transformer, states())
    plain, ranked = measurer.measure_one(QKV, Option("Q2_K")), measurer.measure_one(QKV, Option("Q2_K", 16))
    assert ranked.bytes == plain.bytes + 2 * 16 * (768 + 256)
    assert ranked.cost < plain.cost and ranked.error_weight_rms < plain.error_weight_rms
    assert measurer.measure_joint({QKV: Option("Q2_K", 16)}).cost == ranked.cost
    correlated = Measurer(embedded_pipeline().transformer, states(), covariance=True)
    torch.testing.assert_close(correlated.covariance[QKV].diagonal().float(), correlated.channel_weights(QKV))
    # Its inputs, one a picture, span few directions.
    modulation = "single_blocks.0.modulation.lin.weight"
    ranked = Option("Q2_K", 4)
    assert correlated.measure_one(modulation, ranked).cost < 0.5 * measurer.measure_one(modulation, ranked).cost
    shape = measurer.tensors[QKV].shape
    assert Option("Q4_K", 16).fits(shape) and not Option("Q4_K", 300).fits(shape)
