"""The documents say what the code does: reference pages, commands, recipes, rows, Python, links, figures."""

import ast
import doctest
import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import typer
import yaml

import weitiao
from weitiao.cli import app
from weitiao.data.formats import row_to_record
from weitiao.data.records import Record, read_records
from weitiao.init import describe_tasks
from weitiao.recipe import make_recipe, recipe_schema

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = sorted(
    path
    for folder, pattern in ((".", "*.md"), ("docs", "**/*.md"), ("examples", "**/*.md"))
    for path in (ROOT / folder).glob(pattern)
)
FIGURE_KEYS = {"README.md": ("Machine: ", "Date: ", "Commit: ", "Command: ")}
FIGURE_KEYS["README.zh.md"] = ("机器：", "日期：", "提交：", "命令：")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of one language on a page, longer fences that hold shorter ones included."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^(`{3,})(\w*)\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)
    return [body for _, its, body in found if its == language]


def shell_lines(path: Path) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(path, "sh") for line in block.splitlines() if line.strip()]


def commands() -> dict[str, typer.core.TyperCommand]:
    return typer.main.get_command(app).commands


@pytest.fixture(scope="module")
def make_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- reference pages ----------------------------------------------------------------------------------------------


def test_reference_pages_are_what_the_code_says(make_reference):
    assert make_reference.outdated() == [], "run: make docs"


def test_check_ends_with_1_when_a_page_differs(make_reference, monkeypatch, tmp_path):
    monkeypatch.setattr(make_reference, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["make_reference.py", "--check"])
    with pytest.raises(SystemExit) as left:
        make_reference.main()
    assert left.value.code == 1
    assert list(tmp_path.iterdir()) == []


def test_every_key_and_every_option_is_on_its_page(make_reference):
    pages = make_reference.pages()
    for part in (recipe_schema(), *recipe_schema()["$defs"].values()):
        for key in part["properties"]:
            assert f"| `{key}` |" in pages["recipe.md"]
    for name, command in commands().items():
        assert f"## {name}\n" in pages["commands.md"]
        for param in command.params:
            for option in param.opts:
                assert option in pages["commands.md"] or option.upper() in pages["commands.md"]


def test_schema_accepts_the_recipe_of_the_readme():
    for block in blocks(ROOT / "README.md", "yaml"):
        jsonschema.validate(yaml.safe_load(block), recipe_schema())


# ---- what the pages tell people to type ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_shown_exist_with_their_options(path):
    if path.name == "commands.md":
        return  # usage lines, made from the code
    for verb, *arguments in (line[1:] for line in shell_lines(path) if line[0] == "weitiao"):
        commands()[verb].make_context(verb, list(arguments))  # raises for an unknown option or a missing argument
        takes_overrides = verb in ("check", "show", "train")
        overrides = [word for word in arguments if takes_overrides and re.match(r"[a-z_.]+=", word)]
        make_recipe({"name": "n", "model": "starter", "data": {"train": "rows.jsonl"}}, overrides)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_make_targets_shown_exist(path):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = {line[1] for line in shell_lines(path) if line[0] == "make"}
    shown |= set(re.findall(r"`make (\w+)", path.read_text(encoding="utf-8")))
    assert shown <= targets


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_verb_is_shown_and_explained(path):
    assert {line[1] for line in shell_lines(path) if line[0] == "weitiao"} == set(commands())
    explained = re.findall(r"^\| `([\w-]+)` \|", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert explained == list(commands())


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_recipes_shown_can_be_used(path):
    shown = blocks(path, "yaml")
    assert shown
    for block in shown:
        recipe = make_recipe(yaml.safe_load(block))
        for source in (*recipe.data.train, *recipe.data.dev):
            assert (ROOT / source.path).is_file()


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_rows_shown_are_records(path):
    rows = [json.loads(line) for block in blocks(path, "json") for line in block.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert isinstance(row_to_record(row, "README.md:1", require_target=True), Record)


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_python_shown_calls_public_names_with_their_arguments(path):
    shown = [ast.parse(block) for block in blocks(path, "python")]
    calls = [
        node
        for tree in shown
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "weitiao"
    ]
    assert calls
    for call in calls:
        assert call.func.attr in weitiao.__all__
        keywords = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(getattr(weitiao, call.func.attr)).bind(*call.args, **keywords)


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_sessions_shown_print_what_they_show(path):
    shown = blocks(path, "pycon")
    assert shown
    for block in shown:
        test = doctest.DocTestParser().get_doctest(block, {}, path.name, str(path), 0)
        assert doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(test).failed == 0


def test_both_readmes_show_the_same_commands_and_sessions():
    english, chinese = READMES
    for language in ("sh", "pycon"):
        assert blocks(english, language) == blocks(chinese, language)


def test_readmes_show_what_init_says_of_the_shipped_rows():
    files = {"train": "examples/starter/train.jsonl", "dev": "examples/starter/heldout.jsonl"}
    recipe = make_recipe(
        {"name": "n", "model": "starter", "data": {key: str(ROOT / file) for key, file in files.items()}}
    )
    for line in describe_tasks(weitiao.load_dataset(recipe)):
        understood = f"• {line.partition('Asked as ')[0]}Asked as …"
        for path in READMES:
            assert understood in path.read_text(encoding="utf-8")


def test_starter_page_counts_its_rows():
    page = (ROOT / "examples/starter/README.md").read_text(encoding="utf-8")
    train, heldout = (len(read_records(ROOT / f"examples/starter/{name}.jsonl")) for name in ("train", "heldout"))
    assert f"| all | | | {train} | {heldout} |" in page
    assert page.count(f"{train + heldout} rows") == 1


# ---- the pages themselves -----------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_resolve(path):
    text = re.sub(r"^(`{3,}).*?^\1$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{name_of(path)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(path)} links to {link}"


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_figures_say_machine_date_commit_and_command(path):
    text = path.read_text(encoding="utf-8")
    shown = re.findall(r"<!-- figures:begin -->(.*?)<!-- figures:end -->", text, re.DOTALL)
    assert shown
    assert text.count("figures:begin") == text.count("figures:end") == len(shown)
    for block in shown:
        facts = [re.search(rf"^- {key}(\S.*)$", block, re.MULTILINE) for key in FIGURE_KEYS[path.name]]
        assert all(facts), block
        rows = [line for line in block.splitlines() if line.startswith("|")][2:]
        assert rows
        measured = any(row.split("|")[-2].strip() != "…" for row in rows)
        assert not measured or all(fact[1] != "…" for fact in facts), "figures without machine, date or commit"


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_source_tree_shown_is_the_one_there(path):
    tree = next(block for block in blocks(path, "text") if block.startswith("src/weitiao/"))
    shown = {name.rstrip("/") for name in re.findall(r"\b[a-z_]+(?:\.py|/(?= ))", tree)}
    package = ROOT / "src" / "weitiao"
    there = {entry.name for entry in package.iterdir() if not entry.name.startswith(("_", "py.typed"))}
    assert shown == there


def test_modules_named_by_the_architecture_exist_or_are_named_as_missing():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    built, missing = text.split("### Rooms not built yet")
    missing, rest = missing.split("## The life of an example")
    package = ROOT / "src" / "weitiao"
    for name in re.findall(r"`([a-z_/]+\.py)`", built + rest):
        assert (package / name).is_file(), name
    for name in re.findall(r"`([a-z_0-9/]+(?:\.py|/))`", missing):
        assert not (package / name).exists(), f"{name} is built: say so"


def test_decisions_are_numbered_and_say_context_decision_consequences():
    notes = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [int(note.name[:4]) for note in notes] == list(range(1, len(notes) + 1))
    for note in notes:
        headings = re.findall(r"^#+ (.+)$", note.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings[0].startswith(f"{int(note.name[:4])}. ")
        assert headings[1:] == ["Context", "Decision", "Consequences"]


def test_licences_are_whole():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    rows = (ROOT / "examples/starter/LICENSE").read_text(encoding="utf-8")
    assert "https://creativecommons.org/publicdomain/zero/1.0/" in rows
