"""What a file says of a text encoder before any weight is read: shapes and key-values.

Each is checked when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import GGUFError
from ..gguf.spec import shown

# Far above any model's: bounds the time that a hostile header can ask for.
_MAX_BLOCKS = 256
_EPSILON_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")


@dataclass(frozen=True)
class EncoderFacts:
    """Hold what a config is read from.

    Attributes:
        name: of the encoder, for errors.
        gguf_names: what key-values begin with.
        blocks: what stands before a block's index in a parameter.
        largest: the published model with the most blocks, and how many it has.
        shapes: parameter -> shape in torch order.
        metadata: the file's key-values.
    """

    name: str
    gguf_names: tuple[str, ...]
    blocks: str
    largest: tuple[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, Any]

    def matrix(self, parameter: str) -> tuple[int, int]:
        """Return rows and columns of a parameter; raise GGUFError where it is missing or no matrix."""
        rows, columns = self._sizes(parameter, 2, "two dimensions there, none of them 0")
        return rows, columns

    def vector(self, parameter: str) -> int:
        """Return the length of a parameter; raise GGUFError where it is missing or no vector."""
        (length,) = self._sizes(parameter, 1, "one dimension there, not 0")
        return length

    def _sizes(self, parameter: str, count: int, legal: str) -> tuple[int, ...]:
        if parameter not in self.shapes:
            raise GGUFError(f"The file lacks {parameter!r}, which every {self.name} holds. It is incomplete.")
        shape = self.shapes[parameter]
        if len(shape) != count or 0 in shape:
            raise GGUFError(f"{parameter!r} has shape {list(shape)}; a {self.name} has {legal}.")
        return shape

    def heads(self, rows: int, width: int, what: str) -> int:
        """Return how many heads of a width some rows are; raise GGUFError where they are no whole heads."""
        if rows % width:
            raise GGUFError(
                f"The file has heads of width {width} and {rows} rows of {what}; rows are whole heads. The file is damaged."
            )
        return rows // width

    def block_count(self) -> int:
        """Return the number of blocks; raise GGUFError where one is missing, or they are too many."""
        matches = (re.match(rf"{re.escape(self.blocks)}\.([0-9]{{1,6}})\.", name) for name in self.shapes)
        indices = {int(match[1]) for match in matches if match}
        if len(indices) > _MAX_BLOCKS:
            model, most = self.largest
            raise GGUFError(
                f"The file has {len(indices)} blocks; {model} has {most}, and more than {_MAX_BLOCKS} are not read."
            )
        missing = next((index for index in range(len(indices)) if index not in indices), None)
        if missing is not None:
            raise GGUFError(f"The file has blocks up to {max(indices)}, but none with index {missing}. It is incomplete.")
        return len(indices)

    def key_value(self, key: str) -> Any:
        """Return a key-value of any of the encoder's architectures; None where the file has none."""
        return next((self.metadata[f"{arch}.{key}"] for arch in self.gguf_names if f"{arch}.{key}" in self.metadata), None)

    def required(self, key: str, legal: str, low: float, high: float) -> int | float:
        """Return a number that no tensor shows.

        Args:
            key: without architecture.
            legal: the legal values in words.
            low: the number is above it.
            high: the number is at most it.

        Raises:
            GGUFError: where the file does not say it, or what it says is no such number.
        """
        value = self.key_value(key)
        if value is None:
            raise GGUFError(
                f"The file lacks the key '{self.gguf_names[0]}.{key}', which no tensor shows; its architecture key says "
                f"{self.metadata.get('general.architecture')!r}. It is another model, or not made by llama.cpp's converter."
            )
        if not isinstance(value, int | float) or isinstance(value, bool) or not low < value <= high:
            raise GGUFError(f"The key-value {key!r} is {shown(str(value))}; legal is {legal}. The file is damaged.")
        return value

    def epsilon(self, usual: float) -> float:
        """Return the layer norm epsilon, `usual` where the file does not say it."""
        given = (self.key_value(key) for key in _EPSILON_KEYS)
        epsilon = next((value for value in given if value is not None), usual)
        if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
            raise GGUFError(f"The key-values give a layer norm epsilon of {epsilon!r}; legal is a number between 0 and 1.")
        # A key-value is float32: 1e-6 comes back as 9.999999974752427e-07.
        return float(f"{epsilon:.7g}")

    def compare(self, config: Mapping[str, Any], checked_keys: Mapping[str, str]) -> None:
        """Raise GGUFError where a key-value says another number than the tensors have."""
        for key, name in checked_keys.items():
            value = self.key_value(key)
            if value is not None and value != config[name]:
                raise GGUFError(f"The key-value {key!r} says {value}, the tensors have {config[name]}. The file is damaged.")
