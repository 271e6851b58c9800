"""This process among those that measure together, as torchrun and accelerate number them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..errors import FormatError


@dataclass(frozen=True)
class World:
    """Number this process among those that measure together.

    Attributes:
        rank: of this process among all.
        size: number of all processes.
        local_rank: of this process among those on this computer.
        local_size: number of those on this computer.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun and accelerate set them."""
        try:
            rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            world = cls(rank, size, int(os.environ.get("LOCAL_RANK", str(rank))), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        except ValueError as error:
            raise FormatError(
                f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are numbers ({error}). torchrun and accelerate set them."
            ) from None
        if not 0 <= world.rank < world.size:
            raise FormatError(f"RANK is {world.rank} of WORLD_SIZE {world.size}; legal is 0 to {world.size - 1}.")
        return world

    def device(self) -> torch.device:
        """Return this process's GPU, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())


ALONE = World()
