"""Check what a pipeline folder says of its parts, and that their files are there."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import GGUFError

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
# What transformers reads a tokenizer from; any one of the groups will do.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("*.model",), ("vocab.txt",), ("tekken.json",))
_SHARDS = ".index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file of a pipeline folder.

    Raises:
        FileNotFoundError: where the file is missing, or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{path} is missing or no JSON ({error}). Get the --base folder again.") from error
    # Thousands of nested brackets.
    except RecursionError:
        raise FileNotFoundError(f"{path} is damaged: it is nested too deep. Get the --base folder again.") from None
    if not isinstance(content, dict):
        raise FileNotFoundError(f"{path} is damaged: it is no JSON object. Get the --base folder again.")
    return content


def missing_files(base: Path, parts: Iterable[str]) -> list[str]:
    """Say in words which files the folders of parts lack."""
    return [text for part in parts for text in _missing(base / part)]


def _missing(folder: Path) -> list[str]:
    part = folder.name
    if part == "scheduler":
        return _absent(folder, "scheduler_config.json")
    if part.startswith("tokenizer"):
        whole = any(all(any(folder.glob(name)) for name in names) for names in _VOCABULARIES)
        return [] if whole else [f"the vocabulary of {part} (such as {part}/tokenizer.json)"]
    if part.startswith(("text_encoder", "vae", "image_encoder")):
        return [*_absent(folder, "config.json"), *_missing_weights(folder)]
    return []


def _absent(folder: Path, name: str) -> list[str]:
    return [] if (folder / name).is_file() else [f"{folder.name}/{name}"]


def _missing_weights(folder: Path) -> list[str]:
    for index in sorted(folder.glob(f"*{_SHARDS}")):
        # A whole file beside the index of shards is read instead.
        if (folder / index.name.removesuffix(_SHARDS)).is_file():
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise FileNotFoundError(f"{index} is damaged: it lists no files. Get the --base folder again.")
        return [text for shard in sorted({*shards.values()}) for text in _absent(folder, shard)]
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return []
    return [f"the weights of {folder.name} (a .safetensors file)"]


def needed_parts(kind: str) -> list[str]:
    """List the parts that a class of diffusers cannot be made without, but for the transformer."""
    return [name for name, argument in _arguments(kind).items() if argument.default is argument.empty and name != "transformer"]


def _arguments(kind: str) -> dict[str, inspect.Parameter]:
    arguments = dict(inspect.signature(class_of("diffusers", kind).__init__).parameters)
    del arguments["self"]
    return arguments


def class_of(library: str, name: str) -> Any:
    """Return a class of an installed library, None where it has none of that name."""
    return getattr(import_module(library), name, None)


def check_index(base: Path, index: Mapping[str, Any], kind: str) -> None:
    """Raise GGUFError where an entry of an index is no such part, or a setting of another type.

    Args:
        base: the folder.
        index: what its model_index.json holds.
        kind: the class of diffusers that draws with it.
    """
    arguments = _arguments(kind)
    for name, said in index.items():
        argument = arguments.get(name)
        if argument is not None and _is_setting(kind, argument):
            problem = _wrong_setting(said, argument.default)
        elif argument is not None or (isinstance(said, list) and not name.startswith("_")):
            problem = _wrong_part(name, said)
        else:
            problem = ""
        if problem:
            raise GGUFError(f"{base / INDEX} is damaged: its {name} is {_short(said)}, {problem}. Get the --base folder again.")


def _is_setting(kind: str, argument: inspect.Parameter) -> bool:
    optional = class_of("diffusers", kind)._optional_components
    return argument.default is not argument.empty and argument.name not in optional


def _short(said: Any) -> str:
    text = json.dumps(said, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _wrong_setting(said: Any, default: Any) -> str:
    if default is None:
        whole = isinstance(said, list) and all(type(number) is int for number in said)
        return "" if said is None or whole else "not null or a list of numbers"
    return "" if type(said) is type(default) else f"not a value such as {json.dumps(default)}"


def _wrong_part(part: str, said: Any) -> str:
    if said == [None, None]:
        return ""
    if not (isinstance(said, list) and len(said) == 2 and all(isinstance(name, str) for name in said)):
        return "not a library and a class, nor two nulls"
    library, name = said
    if library not in LIBRARIES:
        return f"not a class of {' or '.join(LIBRARIES)}"
    made = class_of(library, name)
    # Classes that are missing here have sentences of their own; those that choose a class are left to diffusers.
    if made is None or type(made).__name__ == "DummyObject" or name.startswith("Auto") and library == "transformers":
        return ""
    fits = isinstance(made, type) and issubclass(made, _bases(part)) and (part != "vae" or name.startswith("Autoencoder"))
    return "" if fits else f"which is no {part.rstrip('_0123456789').replace('_', ' ')}"


def _bases(part: str) -> tuple[type, ...]:
    """Return what the class of a part derives from."""
    import diffusers
    import transformers

    if part == "scheduler":
        return (diffusers.SchedulerMixin,)
    if part.startswith("tokenizer"):
        return (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)
    if part.startswith(("text_encoder", "image_encoder")):
        return (transformers.PreTrainedModel,)
    if part.startswith(("vae", "transformer")):
        return (diffusers.ModelMixin,)
    return (object,)
