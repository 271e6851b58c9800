"""The poison itself: where torch.empty is guarded, only full of NaN, or torch's own."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .poisoned_memory import GUARD, poisoned


@pytest.mark.parametrize("place", [-1, 12])
def test_a_write_beside_a_tensor_is_noticed(place):
    with pytest.raises(AssertionError, match=r"tensor \[3, 4\] of torch.float32 were written"), poisoned():
        made = torch.empty(3, 4)
        assert made.isnan().all() and made.shape == (3, 4)
        torch.as_strided(made, (1,), (1,), made.storage_offset() + place).zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [(3, 4), ((3, 4),), ((),), (0, 4)], ids=str)
def test_without_guards_it_is_a_tensor_of_its_own(size, dtype):
    """What tests on a GPU get: torch's own storage, poisoned."""
    plain = torch.empty(*size, dtype=dtype)
    with poisoned(guarded=()):
        made = torch.empty(*size, dtype=dtype)
    assert (made.shape, made.dtype, made.stride()) == (plain.shape, dtype, plain.stride())
    assert made.float().isnan().all()
    assert made.storage_offset() == 0 and made.untyped_storage().nbytes() == plain.untyped_storage().nbytes()


@pytest.mark.parametrize("guarded", [("cpu",), ()], ids=str)
def test_what_has_no_memory_to_poison_is_left_alone(guarded):
    with poisoned(guarded):
        with torch.device("meta"):
            assert torch.empty(3).is_meta
        with FakeTensorMode():
            assert type(torch.empty(3)) is not torch.Tensor
        assert torch.empty(2, out=torch.zeros(2)).storage_offset() == 0
        compiled = torch.compile(lambda x: x + torch.empty(3).fill_(1), backend="eager", fullgraph=True)
        assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))


def test_guards_keep_the_widest_alignment():
    with poisoned():
        assert torch.empty(5, dtype=torch.uint8).data_ptr() % 16 == 0 == GUARD % 16
