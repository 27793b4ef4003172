"""The house's layers, read from the imports themselves: a diagram that cannot go stale.

A new arrow is a decision: add it to `MAY_IMPORT`, draw it in docs/architecture.md and say why in docs/decisions.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import weitiao

SOURCE = Path(weitiao.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    # each layer may import those above it that it names
    "errors": set(),
    "cache": set(),
    "messages": {"errors"},
    "data": {"errors", "messages"},
    "tasks": {"errors", "messages", "data"},
    "render": {"errors", "messages", "data", "tasks"},
    "runs": {"errors"},
    "contract": {"errors", "runs"},
    "stopping": set(),
    "launch": {"errors"},
    "recipe": {"errors"},
    "visible": set(),
    "monitor": {"errors", "runs", "recipe", "visible"},
    "dataset": {"errors", "cache", "data", "tasks", "recipe"},
    "init": {"errors", "data", "dataset", "recipe", "runs"},
    # from here on with torch
    "environment": set(),
    "models": {"errors", "cache", "messages", "render"},
    "check": {"errors", "messages", "data", "tasks", "render", "recipe", "dataset", "runs", "visible", "models"},
    "migrate": {"errors", "data", "recipe", "runs", "models"},
    "tuning": {"errors", "recipe", "models"},
    "train": {"errors", "data", "tasks", "render", "recipe", "runs", "stopping", "launch", "models", "tuning"},
    "generate": {"errors", "messages", "tasks", "render", "models"},
    "evaluate": {"errors", "messages", "data", "tasks", "render", "runs", "visible", "generate"},
}
TOP = {"export", "tune", "token_cache", "preparation", "decoding", "dev_scoring", "lookup", "probe", "apply",
       "evaluation", "prompting", "search", "serve", "serving", "verify", "cluster", "cli", "__init__",
       "__main__"}  # fmt: skip
"""They bring everything together; nothing imports them but each other."""

WITHOUT_TORCH = {"errors", "cache", "messages", "data", "tasks", "render", "runs", "stopping", "launch", "contract",
                 "recipe",
                 "monitor", "dataset", "init", "visible", "check", "migrate", "cli", "__init__",
                 "__main__"}  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "matplotlib"}
WITH_NUMPY = {"data/near.py", "data/checks.py", "data/pieces.py", "data/postings.py", "render/example_store.py"}
"""A hundred thousand signatures take a second in numpy, minutes without; so does finding equal ones of a million."""

LONGEST_FILE = 450
NAMES_THAT_SAY_NOTHING = {"utils.py", "util.py", "helpers.py", "common.py", "constants.py", "misc.py"}


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands, and when it is loaded."""

    module: str
    """Full name, such as ``weitiao.tasks.base`` or ``torch.nn``."""
    place: str
    at_import_time: bool
    """False inside a function or under ``if TYPE_CHECKING``."""

    @property
    def layer(self) -> str:
        """``tasks`` of ``weitiao.tasks.base``; empty for what is not ours."""
        package, _, rest = self.module.partition(".")
        return rest.partition(".")[0] if package == "weitiao" else ""


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def layer_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of the file, late and type-checking ones included."""
    package = ["weitiao", *path.relative_to(SOURCE).parts[:-1]]

    def walk(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        place = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, place, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield Import(base, place, at_import_time)
            if base == "weitiao":  # `from . import tasks` names the layer behind the word import
                yield from (Import(f"weitiao.{alias.name}", place, at_import_time) for alias in node.names)
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        late = late or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_import_time and not late)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def test_every_file_has_its_place_in_the_table() -> None:
    assert {layer_of(path) for path in source_files()} <= MAY_IMPORT.keys() | TOP


def test_the_table_has_no_circles() -> None:
    above: set[str] = set()
    for layer, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{layer} may import {allowed - above}, which stands below it"
        above.add(layer)


def test_imports_point_up_the_table_only() -> None:
    wrong = [
        f"{found.place}: {layer_of(path)} imports {found.layer}"
        for path in source_files()
        if layer_of(path) not in TOP
        for found in imports_of(path)
        if found.layer and found.layer not in MAY_IMPORT[layer_of(path)] | {layer_of(path)}
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("layer", "never"),
    [
        ("train", "generate"),
        ("train", "evaluate"),
        ("train", "monitor"),
        ("generate", "train"),
        ("evaluate", "train"),
        ("evaluate", "models"),
        ("tasks", "render"),
        ("data", "tasks"),
        ("models", "tuning"),
    ],
)
def test_these_arrows_stay_undrawn(layer: str, never: str) -> None:
    assert never not in MAY_IMPORT[layer]


def test_data_and_forms_are_understood_without_torch() -> None:
    heavy = [
        f"{found.place}: {found.module}"
        for path in source_files()
        if layer_of(path) in WITHOUT_TORCH
        for found in imports_of(path)
        if found.at_import_time and found.module.partition(".")[0] in HEAVY
        if str(path.relative_to(SOURCE)) not in WITH_NUMPY or found.module.partition(".")[0] != "numpy"
    ]
    assert heavy == []


def test_torch_free_layers_do_not_load_torch_through_others() -> None:
    light = {path for path in source_files() if layer_of(path) in WITHOUT_TORCH}
    reached = {found.layer for path in light for found in imports_of(path) if found.at_import_time and found.layer}
    assert reached <= WITHOUT_TORCH


def test_only_type_checking_and_the_token_counter_know_heavy_libraries() -> None:
    places = {
        found.place.partition(":")[0]
        for path in source_files()
        if layer_of(path) in WITHOUT_TORCH
        for found in imports_of(path)
        if found.module.partition(".")[0] in HEAVY
    }
    renderers = {f"render/{name}.py" for name in ("template", "roles", "rounds", "glm", "glm_base", "glm_text")}
    assert places <= renderers | {"check/token_counts.py"} | WITH_NUMPY


def test_no_file_has_a_second_subject() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_bytes().splitlines()) for path in source_files()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_files_are_named_after_what_they_do() -> None:
    assert [path.name for path in source_files() if path.name in NAMES_THAT_SAY_NOTHING] == []


def test_every_module_says_what_it_does() -> None:
    silent = [
        str(path.relative_to(SOURCE))
        for path in source_files()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) and path.name != "__init__.py"
    ]
    assert silent == []


def test_no_code_that_comes_with_a_checkpoint_is_ever_run() -> None:
    wrong = []
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                trusting = not (isinstance(node.value, ast.Constant) and node.value.value is False)
                wrong += [f"{path.name}:{node.value.lineno}"] if trusting else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                wrong.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                wrong += [] if safe else [f"{path.name}:{node.lineno}"]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pickle.load", "pickle.loads", "yaml.load"):
                wrong.append(f"{path.name}:{node.lineno}")
    assert wrong == []


def test_every_public_name_is_where_the_table_of_contents_says() -> None:
    assert sorted(set(weitiao.__all__)) == sorted(weitiao.__all__)
    for name in weitiao.__all__:
        home = importlib.import_module(weitiao._HOMES[name], "weitiao")
        assert getattr(weitiao, name) is getattr(home, name)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = weitiao.nothing


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: f".{node.module}" for node in imports for alias in node.names}
    assert seen == weitiao._HOMES
