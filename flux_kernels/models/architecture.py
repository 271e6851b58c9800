"""The row of an architecture, which loading, saving, quantizing and measuring loop over.

A row says how files name a model's tensors, how its config follows from their shapes, and which matrices published files
quantize. Rows are files of architectures/; the list of them is architectures/__init__.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..report.amounts import counted
from .stored_shapes import Shapes, StoredShapes

DIFFUSERS = "diffusers"
INDEX = "{i}"


@dataclass(frozen=True)
class Link:
    """Relate a module of the original files to the diffusers modules that its output rows become.

    Attributes:
        original: module name; "{i}" stands for the block index.
        diffusers: module names, in the order of the stored rows.
        swap_halves: whether the stored rows are (shift, scale) where diffusers wants (scale, shift): True, False, or "last" for
            the last block alone.
        kinds: original name of a parameter -> diffusers' name; "" where the module's name is the parameter's.
        flat: whether the original is one row of numbers, whatever shape diffusers gives them.
    """

    original: str
    diffusers: tuple[str, ...]
    swap_halves: bool | str = False
    kinds: Mapping[str, str] = field(default_factory=lambda: {"weight": "weight", "bias": "bias"})
    flat: bool = False


def norm(original: str, diffusers: str) -> Link:
    """Relate norms: one vector, called `scale` in original files and `weight` by diffusers."""
    return Link(original, (diffusers,), kinds={"scale": "weight"})


def parameter(original: str, diffusers: str, *, flat: bool = False) -> Link:
    """Relate tensors that are no module's weight, such as a table of shifts."""
    return Link(original, (diffusers,), kinds={"": ""}, flat=flat)


@dataclass(frozen=True)
class Mark:
    """Name a model that is not loaded by a tensor name that shows it.

    The name is a regular expression, matched against the whole.
    """

    model: str
    tensor: str
    advice: str = ""


WITH_DIFFUSERS = "Load it with the diffusers class of that model and GGUFQuantizationConfig, then call swap_linear on it."


@dataclass(frozen=True)
class Variant:
    """Name a published model of an architecture, with the settings that its makers use.

    Attributes:
        name: such as "FLUX.1-schnell".
        config: the arguments of the model class that tell it from other sizes; the rest are the class's defaults. A file is of
            the first variant whose values fit.
        steps: of a drawing.
        guidance: the scale that the pipeline takes; 0 where the model is distilled of it.
        text_tokens: that a prompt is padded or cut to.
        size: (width, height) in pixels of a usual picture.
        latent_frames: of a usual video; 1 for pictures.
        patch: pixels of a side that become a token, where that is not the architecture's.
        word: regular expression of a word by which the titles of its files tell it from variants of the same config.
        distilled: what `is_distilled` of its pipeline's folder tells it from variants of the same config by; None where its
            pipeline does not say.
        from_text: whether it draws from text alone.
        pipelines: diffusers' classes for it, where the architecture's first does not run it; () where it does.
        transformers: how many it has, each in a file of its own.
        unsourced: regular expression of a word by which the titles of its files tell models whose own settings have no source.
    """

    name: str
    config: Mapping[str, Any]
    steps: int
    guidance: float
    text_tokens: int = 512
    size: tuple[int, int] = (1024, 1024)
    latent_frames: int = 1
    patch: int | None = None
    word: str = r"(?!)"
    distilled: bool | None = None
    from_text: bool = True
    pipelines: tuple[str, ...] = ()
    transformers: int = 1
    unsourced: str = r"(?!)"

    def is_named(self, title: str) -> bool:
        """Tell whether a file's title has the variant's word, which "de-turbo" does not have of Turbo."""
        return _word_in(title, self.word) is not None and _word_in(title, rf"de[-_. ]?({self.word})") is None

    def unsourced_word(self, title: str) -> str | None:
        """Return the word of a file's title that tells a model whose own settings have no source."""
        return _word_in(title, self.unsourced)

    @property
    def slug(self) -> str:
        """The name for options and file names, such as "flux1-schnell"."""
        return re.sub(r"(?<=[a-z])\.", "", self.name.lower()).replace(" ", "-")


@dataclass(frozen=True, eq=False)
class Architecture:
    """Describe a family of transformers: its files, its model class and its published variants.

    Attributes:
        name: for people, such as "FLUX.1".
        covers: the models that it stands for, for errors and tables.
        gguf_name: `general.architecture` of its files. Many models say "flux", so it recognises nothing.
        mark: regular expression; a tensor name that matches it as a whole shows the architecture.
        mark_needs: names of which one must be there too; () for none.
        model_class: of diffusers.
        pipelines: diffusers' pipeline classes, the one for drawing from text first.
        blocks: names of the lists of blocks, (original, diffusers), in the order in which they run.
        counts: original name of a list of blocks -> the config value that counts it.
        links: how the original names become diffusers'; what no link names has one name in both. () where all names agree.
        read_config: all arguments of `model_class`, from a file's shapes.
        untold: config values that no tensor shows -> what they are by default, or a function of the other values; a file or a
            caller may say otherwise.
        variants: published models; of those with one config, the first is taken where a file's title has no word of another.
        pruned: counts of blocks of published models that are a variant with fewer of them.
        describe: names the model of a config, or gives None where the fitting variant's name does.
        plain: starts of the original names of matrices that stay in 16 or 32 bit, as ComfyUI-GGUF's tools leave them.
        narrow: regular expression of original names that the "old" layout of FLUX.1 keeps in 32 bit.
        precise: regular expression of original names that are F32 in every layout, since readers decode nothing there.
        never_bf16: original names of matrices that readers take for something else in BF16.
        undecoded: regular expression of original names of tensors that readers take as they lie: F16 where a layout has BF16.
        relatives: models that have the mark too and are refused by name.
        unused: regular expression of names that files hold and the model has no use for.
        flags: name of a tensor without weights -> the config value that is True where a file holds it.
        original: what the original naming is called.
        patch: pixels of a side that become a token.
        tokens: fnmatch pattern of layers in the blocks (diffusers' names, "*" for the block) -> what reaches them: "text", "both",
            "batch" (a row a picture), or a multiple such as "text*12"; the first that matches counts, and others get the picture's tokens.
        side_tokens: the most tokens of a picture's side that a model of a config has positions for; None where that is no limit.
    """

    name: str
    covers: str
    gguf_name: str
    mark: str
    model_class: str
    pipelines: tuple[str, ...]
    blocks: tuple[tuple[str, str], ...]
    counts: Mapping[str, str]
    links: tuple[Link, ...]
    read_config: Callable[[StoredShapes], dict[str, Any]]
    variants: tuple[Variant, ...]
    describe: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    pruned: tuple[Mapping[str, int], ...] = ()
    untold: Mapping[str, Any] = field(default_factory=dict)
    mark_needs: tuple[str, ...] = ()
    relatives: tuple[Mark, ...] = ()
    plain: tuple[str, ...] = ()
    narrow: str = r"(?!)"
    precise: str = r"(?!)"
    never_bf16: tuple[str, ...] = ()
    undecoded: str = r"(?!)"
    unused: str = r"(?!)"
    flags: Mapping[str, str] = field(default_factory=dict)
    original: str = "original"
    patch: int = 16
    tokens: Mapping[str, str] = field(default_factory=dict)
    side_tokens: Callable[[Mapping[str, Any]], int] | None = None

    @property
    def namings(self) -> tuple[str, ...]:
        """The namings a file can have: the original's and diffusers', or diffusers' alone."""
        return (self.original, DIFFUSERS) if self.links else (DIFFUSERS,)

    @property
    def main_naming(self) -> str:
        """The naming that other readers know: the original's."""
        return self.namings[0]

    def stored(self, shapes: Shapes, naming: str) -> StoredShapes:
        """Return a file's shapes as `read_config` asks for them."""
        name_of = str if naming == DIFFUSERS else self.original_of
        return StoredShapes(self.name, shapes, name_of, self.blocks)

    def flagged(self, config: Mapping[str, Any]) -> list[str]:
        """Name the tensors without weights that a file of a config holds."""
        return [name for name, value in self.flags.items() if config[value]]

    def width(self, config: Mapping[str, Any]) -> int:
        """Return the channels of a hidden state."""
        heads = ("num_attention_heads", "attention_head_dim")
        return config["dim"] if "dim" in config else config[heads[0]] * config[heads[1]]

    def picture_tokens(self, usual: Variant, width: int | None = None, height: int | None = None) -> int:
        """Return the tokens of a picture, or of a video of the usual length, of so many pixels."""
        patch = usual.patch or self.patch
        across, down = (width or usual.size[0]) // patch, (height or usual.size[1]) // patch
        return usual.latent_frames * across * down

    @property
    def text_tokens(self) -> int:
        """The most text tokens that its models take."""
        return max(variant.text_tokens for variant in self.variants)

    def settings(self, config: Mapping[str, Any], title: str = "") -> Variant:
        """Return the variant whose settings a model takes: its own, or that which most of its values fit.

        Args:
            config: of the model.
            title: of its file, as `file_title` gives it.
        """
        return self.alike(config, title)[0]

    def alike(self, config: Mapping[str, Any], title: str = "") -> list[Variant]:
        """Return the variants that most values of a config fit, one where a file's title tells it."""
        return self._of_one_config(min(self.variants, key=lambda row: _misfits(row, config)), title)

    def published(self, config: Mapping[str, Any], title: str = "") -> list[Variant]:
        """Return the published models that a file can be.

        They are several where variants have one config and its title does not tell them apart.
        """
        fits = next((row for row in self.variants if not _misfits(row, config)), None)
        return [] if fits is None else self._of_one_config(fits, title)

    def _of_one_config(self, variant: Variant, title: str) -> list[Variant]:
        """Return the variants of one config, or the one of them that a title names."""
        alike = [row for row in self.variants if row.config == variant.config]
        named = [row for row in alike if row.is_named(title)]
        return named if len(named) == 1 else alike

    def variant_name(self, config: Mapping[str, Any], title: str = "") -> str:
        """Name the model of a config; where neither it nor a file's title tells variants apart, all of them."""
        counts = (config.get(name) for name in ("num_layers", "n_layers"))
        blocks = next((f" with {counted(count, 'block')}" for count in counts if count is not None), "")
        known = " or ".join(variant.name for variant in self.published(config, title))
        return self.describe(config) or known or f"{self.name} architecture{blocks}"

    def original_of(self, name: str) -> str:
        """Return the original name of a tensor that has diffusers' name; any other name comes back as it is."""
        for whole, index in _with_and_without_index(name):
            stem, _, kind = whole.rpartition(".")
            if whole in self._bare:
                return self._bare[whole].original.replace(INDEX, index)
            if stem in self._by_diffusers:
                link = self._by_diffusers[stem]
                kinds = {theirs: ours for ours, theirs in link.kinds.items()}
                return f"{link.original}.{kinds.get(kind, kind)}".replace(INDEX, index)
        return name

    def is_original(self, name: str) -> bool:
        """Tell whether only the original naming has this tensor name."""
        tensors = {whole for whole, _ in _with_and_without_index(name)}
        modules = {whole.rpartition(".")[0] for whole in tensors}
        named = modules & self._only_original or tensors & self._bare_originals
        return bool(named) or name.startswith(self._original_blocks)

    @cached_property
    def _bare(self) -> dict[str, Link]:
        """Diffusers' name of a tensor that is no module's -> its link."""
        return {link.diffusers[0]: link for link in self.links if "" in link.kinds}

    @cached_property
    def _by_diffusers(self) -> dict[str, Link]:
        return {module: link for link in self.links for module in link.diffusers if "" not in link.kinds}

    @cached_property
    def _only_original(self) -> set[str]:
        """Modules of the original naming alone."""
        modules = {link.original for link in self.links if "" not in link.kinds}
        return modules - {module for link in self.links for module in link.diffusers}

    @cached_property
    def _bare_originals(self) -> set[str]:
        """Tensors of the original naming alone that are no module's."""
        return {link.original for link in self._bare.values()} - self._bare.keys()

    @cached_property
    def _original_blocks(self) -> tuple[str, ...]:
        return tuple(f"{ours}." for ours, theirs in self.blocks if ours != theirs)


def _word_in(title: str, word: str) -> str | None:
    found = re.search(rf"(?<![a-z])({word})(?![a-z])", title.lower())
    return found and found[0]


def _misfits(variant: Variant, config: Mapping[str, Any]) -> int:
    """Count the values of a variant that a config does not have."""
    return sum(config.get(name) != value for name, value in variant.config.items())


_NUMBER = re.compile(r"(?<=\.)[0-9]{1,6}(?=\.)")


def _with_and_without_index(name: str) -> tuple[tuple[str, str], ...]:
    """Return a name as it is, and with "{i}" for its first number, each with the number."""
    match = _NUMBER.search(name)
    whole = ((name, ""),)
    return (*whole, (name[: match.start()] + INDEX + name[match.end() :], match[0])) if match else whole
