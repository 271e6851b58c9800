"""The shapes of a file's tensors, as the rows of architectures/ read a config from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import GGUFError

Shapes = Mapping[str, tuple[int, ...]]
# Far above any model: they bound the time and the sizes that a hostile header can ask for.
_MAX_WIDTH = 2**16
_MAX_SIZE = 2**18
_MAX_BLOCKS = 512


@dataclass(frozen=True)
class StoredShapes:
    """Hold the tensor shapes of a file of one architecture.

    Attributes:
        model: the architecture's name.
        shapes: tensor name without prefix -> shape in torch order.
        name_of: gives the name under which an unsplit diffusers parameter is stored.
        kinds: names of the lists of blocks, (original, diffusers).
    """

    model: str
    shapes: Shapes
    name_of: Callable[[str], str]
    kinds: tuple[tuple[str, str], ...]

    def has(self, parameter: str) -> bool:
        """Tell whether an unsplit diffusers parameter is stored."""
        return self.name_of(parameter) in self.shapes

    def matrix(self, parameter: str) -> tuple[int, int]:
        """Return (rows, columns) of an unsplit diffusers parameter."""
        rows, columns = self.shape(parameter, 2)
        return rows, columns

    def length(self, parameter: str) -> int:
        """Return the length of a vector."""
        return self.shape(parameter, 1)[0]

    def sizes(self, parameter: str) -> tuple[int, ...]:
        """Return the shape of an unsplit diffusers parameter that tools store with fewer dimensions."""
        return self.shape(parameter, len(self.shapes.get(self.name_of(parameter), (0,))))

    def shape(self, parameter: str, dims: int) -> tuple[int, ...]:
        """Return the shape of an unsplit diffusers parameter.

        Raises:
            GGUFError: where the file lacks it, or has another number of dimensions.
        """
        name = self.name_of(parameter)
        if name not in self.shapes:
            raise GGUFError(f"The file lacks {name!r}, which every {self.model} file holds. It is incomplete or another model.")
        shape = self.shapes[name]
        if len(shape) != dims or 0 in shape:
            raise GGUFError(
                f"{name!r} has shape {list(shape)}; {self.model} has {dims} dimension{'s' * (dims > 1)} there, none of them 0."
            )
        if max(shape) > _MAX_SIZE:
            raise GGUFError(
                f"{name!r} has shape {list(shape)}; {self.model} has far less, and more than {_MAX_SIZE} is not read."
            )
        return shape

    def heads(self, width: int, head_dim: int) -> int:
        """Return how many heads make up a width.

        Raises:
            GGUFError: where they do not, or the width is beyond any model's.
        """
        if width > _MAX_WIDTH:
            raise GGUFError(
                f"The file has width {width}; {self.model} models have far less, and more than {_MAX_WIDTH} is not read."
            )
        if width % head_dim:
            raise GGUFError(
                f"The file has width {width} and heads of {head_dim}; a {self.model} width is whole heads. The file is damaged."
            )
        return width // head_dim

    def blocks(self, kind: str) -> int:
        """Count the blocks of a list, by diffusers' name of it, before a model of that size is built.

        Raises:
            GGUFError: where indices are missing, or there are far too many.
        """
        kinds = next((pair for pair in self.kinds if pair[1] == kind), (kind, kind))
        index = re.compile(rf"({'|'.join(map(re.escape, kinds))})\.([0-9]{{1,6}})\.")
        matches = map(index.match, self.shapes)
        return self._counted({int(match[2]) for match in matches if match}, kinds[0])

    def _counted(self, indices: set[int], what: str) -> int:
        """Return how many things have these numbers; raise GGUFError unless they count from 0 without gaps."""
        missing = next((index for index in range(len(indices)) if index not in indices), None)
        if missing is not None:
            raise GGUFError(
                f"The file has {what} up to {max(indices)}, but none with index {missing}. {self.model} blocks are numbered from 0 "
                "without gaps: the file is incomplete."
            )
        if len(indices) > _MAX_BLOCKS:
            raise GGUFError(
                f"The file has {len(indices)} {what}; {self.model} has far fewer, and more than {_MAX_BLOCKS} are not read."
            )
        return len(indices)
