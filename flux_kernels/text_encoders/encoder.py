"""The row of a text encoder, which loading and saving loop over.

A row says by which tensors a file shows the encoder, how files name its tensors, how its config follows from them and from the
file's key-values, and which class of transformers it is. Rows are files of encoders/; the list of them is encoders/__init__.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import GGUFError
from ..gguf.conventions import KeyValues
from ..models.architecture import Mark
from .facts import EncoderFacts


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Describe a family of text encoders: its files and its class of transformers.

    "Parameter" is transformers' name of a tensor, as the model class has it; "kind" is the last word of it, such as "weight".

    Attributes:
        name: of one, for errors, such as "T5 encoder".
        covers: the models that it stands for, for errors.
        gguf_names: `general.architecture` of its files, the one that is written first. Key-values begin with them. They only choose
            among rows that a file's tensors show.
        model_class: of transformers.
        model_type: of its config.
        mark: regular expression; a parameter that matches it as a whole shows the encoder, together with its token table.
        lacks: regular expression of tensors, under any name, that others with the mark have and this encoder has not.
        blocks: what stands before a block's index: (llama.cpp's, transformers').
        in_block: llama.cpp's module inside a block -> transformers'.
        outside: llama.cpp's name of a tensor outside the blocks -> the parameter.
        table: the parameter that is the token table.
        read_config: the arguments of the class's config, from a file's shapes and key-values.
        written_keys: the key-values that llama.cpp's converter writes, without architecture, from the config of a model.
        checked_keys: key-value without architecture -> argument of the config that the tensors give: they must agree.
        largest: the published model with the most blocks, and how many it has.
        example: where a pipeline has such a model, for errors.
        kinds: of the tensors that a module may have.
        in_block_without: module that a file lacks in every block -> what takes the place of entries of `in_block` there.
        twins: second name of a parameter, that some files use or have beside the first -> the first.
        unused: regular expression; names that begin with it are parts of a file that the encoder has no use for.
        prefixes: that checkpoints put before all names.
        exact: regular expression of parameters that are written in 32 bit though they are matrices.
        permuted: module inside a block, llama.cpp's -> argument of the config that counts its heads, where llama.cpp's converter
            interleaves the two halves of each head's rows, for rotary positions.
        relatives: models that are not loaded and that the mark would show too; they are refused by name.
        never: attribute of models of the same type that are no such encoder.
    """

    name: str
    covers: str
    gguf_names: tuple[str, ...]
    model_class: str
    model_type: str
    mark: str
    blocks: tuple[str, str]
    in_block: Mapping[str, str]
    outside: Mapping[str, str]
    table: str
    read_config: Callable[[EncoderFacts], dict[str, Any]]
    written_keys: Callable[[Any], KeyValues]
    checked_keys: Mapping[str, str]
    largest: tuple[str, int]
    example: str
    lacks: str = r"(?!)"
    kinds: tuple[str, ...] = ("weight",)
    in_block_without: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    twins: Mapping[str, str] = field(default_factory=dict)
    unused: str = r"(?!)"
    prefixes: tuple[str, ...] = ()
    exact: str = r"(?!)"
    permuted: Mapping[str, str] = field(default_factory=dict)
    relatives: tuple[Mark, ...] = ()
    never: tuple[str, ...] = ()

    def strip_prefix(self, name: str) -> str:
        """Drop the prefix that checkpoints put before the encoder's names."""
        return next((name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix)), name)

    def block_name(self, name: str) -> str | None:
        """Return the name of a tensor inside a block with "*" for the block's index, None for any other."""
        match = self._in_any_block.fullmatch(self.strip_prefix(name))
        return match and f"{match[1]}.*.{match[2]}"

    def facts(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any]) -> EncoderFacts:
        """Return what `read_config` reads of a file: shapes by parameter, and key-values."""
        return EncoderFacts(self.name, self.gguf_names, self.blocks[1], self.largest, shapes, metadata)

    def is_shown_by(self, names: Collection[str]) -> bool:
        """Tell whether a file's tensor names are those of such an encoder."""
        parameters = {parameter for parameter, _ in self.named(names)}
        return self.table in parameters and self._any(self.mark, parameters) and not self._any(self.lacks, parameters)

    def relative_shown_by(self, names: Collection[str]) -> Mark | None:
        """Return the relative that a file's tensor names show."""
        parameters = {parameter for parameter, _ in self.named(names)}
        return next((mark for mark in self.relatives if self.table in parameters and self._any(mark.tensor, parameters)), None)

    @staticmethod
    def _any(pattern: str, names: Collection[str]) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    def parameter_names(self, names: Collection[str]) -> dict[str, str]:
        """Map parameters to the names in the file.

        Unused tensors are left out; a name that is not known stays as it is, for the check against the model to name it.

        Raises:
            GGUFError: where two tensors are one parameter.
        """
        names_by_parameter: dict[str, str] = {}
        for parameter, name in self.named(names):
            if parameter in names_by_parameter:
                twins = f"{names_by_parameter[parameter]!r} and {name!r}"
                raise GGUFError(f"Tensors {twins} are both {parameter!r}. A file must hold each once.")
            names_by_parameter[parameter] = name
        return names_by_parameter

    def named(self, names: Collection[str]) -> list[tuple[str, str]]:
        """Return (parameter, name in the file) of each tensor that is used."""
        bare = {name: self.strip_prefix(name) for name in names}
        held, modules = set(bare.values()), dict(self.in_block)
        for module, others in self.in_block_without.items():
            if not any(f".{module}." in name for name in names):
                modules |= others
        return [
            (self._parameter(own, modules), name)
            for name, own in bare.items()
            if not re.match(self.unused, own) and self.twins.get(own) not in held
        ]

    def _parameter(self, bare: str, modules: Mapping[str, str]) -> str:
        match = self._in_block_of_llama.fullmatch(bare)
        if not match or match[2] not in modules:
            return self.twins.get(bare) or self.outside.get(bare, bare)
        return f"{self.blocks[1]}.{match[1]}.{modules[match[2]]}.{match[3]}"

    def written_name(self, parameter: str) -> str:
        """Return llama.cpp's name of a parameter.

        Raises:
            GGUFError: where it has none.
        """
        outside = {theirs: ours for ours, theirs in self.outside.items()}
        if parameter in outside:
            return outside[parameter]
        index, module, kind = self._module_of(parameter)
        if module is None:
            raise GGUFError(f"{parameter!r} is no parameter of a {self.name} that GGUF has a name for.")
        return f"{self.blocks[0]}.{index}.{module}.{kind}"

    def is_exact(self, parameter: str) -> bool:
        """Tell whether a matrix is written in 32 bit."""
        return re.fullmatch(self.exact, parameter) is not None

    def permuted_heads(self, parameter: str, config: Mapping[str, Any]) -> int | None:
        """Return of how many heads llama.cpp's converter interleaves the rows; None where it leaves them."""
        counted_by = self.permuted.get(self._module_of(parameter)[1] or "")
        return None if counted_by is None else config[counted_by]

    def _module_of(self, parameter: str) -> tuple[str, str | None, str]:
        """Return (block's index, llama.cpp's module inside it or None, kind) of a parameter."""
        match = self._in_block_of_transformers.fullmatch(parameter)
        return (match[1], self._llama_modules.get(match[2]), match[3]) if match else ("", None, "")

    @cached_property
    def _llama_modules(self) -> dict[str, str]:
        """Transformers' module inside a block -> llama.cpp's."""
        all_modules = [self.in_block, *self.in_block_without.values()]
        return {theirs: ours for modules in all_modules for ours, theirs in modules.items()}

    @cached_property
    def _in_any_block(self) -> re.Pattern[str]:
        return re.compile(rf"({'|'.join(map(re.escape, self.blocks))})\.[0-9]{{1,6}}\.(.+)")

    @cached_property
    def _in_block_of_llama(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.blocks[0])}\.([0-9]{{1,6}})\.(\w+)\.({'|'.join(self.kinds)})")

    @cached_property
    def _in_block_of_transformers(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.blocks[1])}\.([0-9]{{1,6}})\.(.+)\.({'|'.join(self.kinds)})")

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The children of the model that hold its parameters, the token table's first."""
        parameters = (self.table, f"{self.blocks[1]}.", *self.outside.values())
        return tuple(dict.fromkeys(parameter.split(".")[0] for parameter in parameters))
