"""The driver of an absent card: what it hands to the interpreter is what a GPU would get."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from bench.aot.ptx import Fault
from bench.aot.ptx.driver import absent_card
from flux_kernels import kernels
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import choice, int8
from flux_kernels.kernels.choice import Choice
from flux_kernels.kernels.tiles import INT8_TILE
from flux_kernels.machine.random_rows import random_weight


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def copy_without_mask_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


def test_a_kernel_reads_and_writes_tensors():
    with absent_card(89) as card:
        x, y = torch.randn(100), torch.empty(100)
        copy_kernel[(2,)](x, y, 100, BLOCK=64)
        assert torch.equal(card.allocations.check(y), x)
        assert [name for name, _ in card.launches] == ["copy_kernel"]
        with pytest.raises(Fault, match="outside every buffer"):
            copy_without_mask_kernel[(2,)](x, y, 100, BLOCK=64)


def test_an_output_that_is_not_written_throughout():
    with absent_card(89) as card:
        x, y = torch.randn(100), torch.empty(100)
        copy_kernel[(1,)](x, y, 100, BLOCK=64)
        with pytest.raises(Fault, match="36 of 100 elements of an output were never written"):
            card.allocations.check(y)
        z = torch.empty(100)
        with pytest.raises(Fault, match="nobody wrote"):
            copy_kernel[(2,)](y, z, 100, BLOCK=64)


def test_a_view_is_all_that_may_be_touched():
    with absent_card(89) as card:
        wide = torch.zeros(100)
        copy_kernel[(1,)](torch.ones(50), wide[10:60], 50, BLOCK=64)
        assert wide.sum() == 50 and wide[10:60].all()
        with pytest.raises(Fault, match="outside every buffer"):
            copy_kernel[(1,)](torch.ones(51), wide[10:60], 51, BLOCK=64)
        del card


def test_shared_memory_that_the_card_does_not_have():
    """Triton's own refusal comes through: five stages of two 16 KiB tiles fit an H100 and no GeForce."""
    fmt = FORMATS["Q8_0"]
    x, weight = torch.randn(17, 256).half(), random_weight(fmt, 32, 256)
    named = Choice("two_stage", replace(INT8_TILE, num_stages=5), "too large")
    with absent_card(89), pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        int8.linear(x, weight, None, torch.empty(17, 32, dtype=x.dtype), choice=named)


def test_tiles_are_those_of_the_card():
    """Check the choices for an absent card: Hopper gets row scales in int8, a GeForce does not.

    No launch of one meets the other.
    """
    fmt = FORMATS["Q4_K"]
    names = {}
    for capability in (90, 89):
        with absent_card(capability) as card:
            kernels.linear(torch.randn(17, 256).half(), random_weight(fmt, 32, 256, planes=False), None, "int8")
            names[capability] = [name for name, _ in card.launches]
    assert "row_largest_kernel" in names[90] and "row_largest_kernel" not in names[89]


def test_everything_is_put_back():
    empty, capability_of = torch.empty, choice.capability_of
    with absent_card(89):
        assert torch.empty is not empty
        assert choice.capability_of(torch.device("cpu")) == (8, 9)
    assert torch.empty is empty
    assert choice.capability_of is capability_of
