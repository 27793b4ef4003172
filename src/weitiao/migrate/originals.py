"""A file → the original that wrote it, told by what it holds, and its settings; nothing in it is ever run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import RecipeError
from .commands import Command, read_commands
from .llama_factory import board_settings, old_names
from .python_config import read_config_classes

Kind = Literal["finetune_demo", "llama_factory", "seed_flags", "project_config", "ptuning_main", "glm_finetuning"]

_LARGEST = 1_000_000
_MODELS = (".safetensors", ".bin", ".pt", ".gguf")
_KNOWN = (
    "a configuration of ChatGLM3's or GLM-4's finetune_demo (lora.yaml), a YAML or JSON file of LLaMA-Factory, a shell "
    "script with a training command, or a Python class ProjectConfig"
)
_SIGNS: tuple[tuple[Kind, frozenset[str]], ...] = (
    ("seed_flags", frozenset({"use_lora", "use_ptuning", "max_source_seq_len", "max_target_seq_len", "save_freq"})),
    ("glm_finetuning", frozenset({"train_type", "max_src_len", "lora_dim", "lora_module_name", "show_loss_step"})),
    ("llama_factory", frozenset({"stage", "finetuning_type", "template", "cutoff_len", "lora_target", "dataset"})),
    ("ptuning_main", frozenset({"prompt_column", "response_column", "max_source_length", "pre_seq_len"})),
)
"""Settings that one original alone has; the first with two of them is meant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """What a file says, and which program it says it to."""

    kind: Kind
    settings: Mapping[str, Any]
    """Nested settings by dotted names."""
    spell: Callable[[str, Any], str]
    devices: int = 1
    computed: Mapping[str, str] = field(default_factory=dict)
    """Settings that Python would have to compute, as source text."""
    told: str = ""
    """Which of several commands it is."""


def read_original(path: Path, *, command: int | None = None) -> Original:
    """What the file at `path` says.

    Args:
        path: a configuration, a script, or a Python file.
        command: which command of a script is meant, counted from 1.

    Raises:
        RecipeError: the file cannot be read, or is none of those known.
    """
    text = _read(path)
    if path.suffix == ".py":
        return _from_python(text, path)
    if path.suffix not in (".yaml", ".yml", ".json") and (commands := read_commands(text)):
        return _from_commands(commands, path, command)
    return _from_mapping(_mapping(text, path), path)


def _read(path: Path) -> str:
    if path.is_dir():
        raise RecipeError(f"{path} is a folder. Name the file in it that says how to train: {_KNOWN}.")
    if path.suffix in _MODELS:
        raise RecipeError(f"{path} holds weights. What can be migrated: {_KNOWN}.")
    try:
        if path.stat().st_size > _LARGEST:
            raise RecipeError(f"{path} is too large to say how to train. What can be migrated: {_KNOWN}.")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"There is no file {path}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is no UTF-8 text. Save it as UTF-8, or name another file: {_KNOWN}.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error}.") from None


def _mapping(text: str, path: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated_keys(tree, path)
        values = yaml.safe_load(text)  # JSON too
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is none of the files that can be migrated ({_KNOWN}): {_first(error)}.") from None
    if not isinstance(values, dict) or not values:
        raise RecipeError(f"{path} holds no settings. What can be migrated: {_KNOWN}.")
    return {str(key): value for key, value in values.items()}


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _refuse_repeated_keys(node: yaml.Node | None, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise RecipeError(f"{path} sets {', '.join(repeated)} twice. Which is meant?")
        for _, value in node.value:
            _refuse_repeated_keys(value, path)


def _from_mapping(values: Mapping[str, Any], path: Path) -> Original:
    if "training_args" in values or ("peft_config" in values and "data_config" in values):
        return Original(kind="finetune_demo", settings=dict(_flat(values)), spell=_as_yaml)
    if any(key.startswith(("top.", "train.")) for key in values):
        return Original(kind="llama_factory", settings=board_settings(values), spell=_as_yaml)
    kind = _kind_of(values)
    if kind == "llama_factory" or (kind is None and {"model_name_or_path", "do_train"} <= values.keys()):
        return Original(kind="llama_factory", settings=old_names(values), spell=_as_yaml)
    if {"model", "data"} <= values.keys():
        raise RecipeError(f"{path} looks like a recipe of weitiao already. Check it with: weitiao check {path}")
    raise RecipeError(
        f"{path} holds {_some(values)}, and says how to train to no program that weitiao knows. What can be migrated: "
        f"{_KNOWN}."
    )


def _some(values: Mapping[str, Any]) -> str:
    names = list(values)
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _kind_of(settings: Mapping[str, Any]) -> Kind | None:
    counts = [(len(signs & settings.keys()), kind) for kind, signs in _SIGNS]
    best = max(count for count, _ in counts)
    return next(kind for count, kind in counts if count == best) if best else None


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _as_yaml(key: str, value: Any) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"{key}: {shown}"


def _as_flag(key: str, value: Any) -> str:
    shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"--{key}" if value is True else f"--{key} {shown}"


def _as_attribute(key: str, value: Any) -> str:
    return f"{key} = {value!r}" if not isinstance(value, str) else f"{key} = {value}"


# ---- Python -------------------------------------------------------------------------------------------------------


def _from_python(text: str, path: Path) -> Original:
    signs = dict(_SIGNS)["seed_flags"] | {"pre_model", "lora_rank", "train_path", "dev_path", "pre_seq_len"}
    for found in read_config_classes(text, path):
        if len(signs & found.settings.keys()) >= 2:
            plain = {key: value for key, value in found.settings.items() if key not in found.computed}
            return Original(
                kind="project_config",
                settings=plain,
                spell=_as_attribute,
                computed=found.computed,
                told=f"the class {found.name}",
            )
    raise RecipeError(
        f"{path} holds no class that says how to train, such as ProjectConfig with use_lora, lora_rank and train_path. "
        f"Python is read and never run; what can be migrated: {_KNOWN}."
    )


# ---- scripts ------------------------------------------------------------------------------------------------------


def _from_commands(commands: list[Command], path: Path, number: int | None) -> Original:
    read = [(one, _from_command(one, path)) for one in commands]
    known = [(one, original) for one, original in read if original is not None]
    if not known:
        programs = ", ".join(dict.fromkeys(one.program for one in commands))
        raise RecipeError(f"{path} starts {programs}, with no training flags that weitiao knows.")
    if len(known) > 1 and number is None:
        listed = "\n".join(f"  --command {n}: {_shown(one)}" for n, (one, _) in enumerate(known, start=1))
        raise RecipeError(f"{path} holds {len(known)} training commands. Say which one is meant:\n{listed}")
    if number is not None and number > len(known):
        raise RecipeError(f"{path} holds {len(known)} training commands, none with number {number}.")
    return known[(number or 1) - 1][1]


def _shown(command: Command) -> str:
    options = [_as_flag(key, value) for key, value in command.options.items()]
    return " ".join([command.program, *command.words, *options])[:150]


def _from_command(command: Command, path: Path) -> Original | None:
    """What one command says; None where it is none of those known."""
    launched = {key: value for key, value in command.launcher.items() if key == "mixed_precision"}
    if command.program in ("finetune_hf.py", "finetune.py") and len(command.words) >= 3:
        return _from_finetune_command(command, path)
    if command.program in ("llamafactory-cli", "llmtuner", "lmf"):
        if command.words[:1] not in (("train",), ()):
            return None
        return _from_llama_factory_command(command, path)
    kind = _kind_of(command.options)
    if kind is None:
        return None
    settings = old_names(command.options) if kind == "llama_factory" else command.options
    launched = launched if kind == "seed_flags" else {}
    return Original(kind=kind, settings={**settings, **launched}, spell=_as_flag, devices=command.devices)


def _beside(name: str, path: Path) -> Path:
    """The file `name` as a script at `path` sees it: from here, from its folder, or from the folder above."""
    places = [Path(name), path.parent / name, path.parent.parent / name]
    for place in places:
        if place.is_file():
            return place
    raise RecipeError(f"{path} names the configuration {name}, which lies neither here nor beside it.")


def _from_finetune_command(command: Command, path: Path) -> Original:
    data, model, config, *resume = command.words
    file = _beside(config, path)
    found = _from_mapping(_mapping(_read(file), file), file)
    given = {"DATA_DIR": data, "MODEL_DIR": model}
    given |= {"auto_resume_from_checkpoint": resume[0]} if resume else {}
    return Original(kind=found.kind, settings={**given, **found.settings}, spell=_as_yaml, devices=command.devices)


def _from_llama_factory_command(command: Command, path: Path) -> Original:
    settings: dict[str, Any] = {}
    words = list(command.words[1:])
    if words and re.search(r"\.(ya?ml|json)$", words[0]):
        file = _beside(words.pop(0), path)
        settings |= _mapping(_read(file), file)
    for word in words:  # key=value changes the file
        name, sign, value = word.partition("=")
        if not sign:
            raise RecipeError(f"{path}: {word!r} is neither a file nor key=value.")
        settings[name] = value
    settings |= command.options
    spell = _as_flag if command.options and not words else _as_yaml
    return Original(kind="llama_factory", settings=old_names(settings), spell=spell, devices=command.devices)
