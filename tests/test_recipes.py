"""The recipes of known trainings: each loads, is on both pages, and trains on a tiny model of its architecture."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

from command_line import light_training, read_lines, succeed, write_rows
from foreign_settings import DEMO, LORA, write
from foreign_settings import write_rows as write_migrated_rows
from glm_folders import write_glm_folder
from weitiao.cli import app
from weitiao.recipe import load_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
RECIPES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/*.yaml"))
TRAINED = [name for name in RECIPES if name != "extraction/one-shot.yaml"]
PAGES = [FOLDER / "README.md", FOLDER / "README.zh.md"]

ORIGINAL = {
    "multi-task/lora.yaml": ("THUDM/chatglm-6b", 2, 4, 3e-5, "linear", 0.06),
    "multi-task/ptuning.yaml": ("THUDM/chatglm-6b", 2, 4, 3e-5, "linear", 0.06),
    "extraction/lora.yaml": ("THUDM/chatglm-6b", 2, 1, 3e-5, "linear", 0),
    "extraction/ptuning.yaml": ("THUDM/chatglm-6b", 2, 1, 2e-4, "linear", 0),
    "persona/lora.yaml": ("THUDM/chatglm3-6b", 3, 4, 5e-5, "linear", 0),
    "self-cognition/lora.yaml": ("THUDM/chatglm3-6b", 50, 16, 5e-5, "cosine", 0),
    "self-cognition/rslora.yaml": ("THUDM/chatglm3-6b", 50, 16, 5e-5, "cosine", 0),
    "self-cognition/dora.yaml": ("THUDM/chatglm3-6b", 50, 16, 5e-5, "cosine", 0),
    "classification/qwen2.yaml": ("Qwen/Qwen2-0.5B", 2, 16, 1e-4, "linear", 0),
}
METHODS = {
    "multi-task/lora.yaml": (8, 32, 0.1, ("query_key_value",)),
    "extraction/lora.yaml": (8, 32, 0.1, ("query_key_value",)),
    "persona/lora.yaml": (8, 32, 0.1, ("q_proj", "k_proj", "v_proj")),
    "self-cognition/lora.yaml": (8, 16, 0.0, ("q_proj", "k_proj", "v_proj")),
    "self-cognition/rslora.yaml": (8, 16, 0.0, ("q_proj", "k_proj", "v_proj")),
    "self-cognition/dora.yaml": (8, 16, 0.0, ("q_proj", "k_proj", "v_proj")),
    "classification/qwen2.yaml": (
        *(8, 32, 0.1),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
}
LAYOUTS = {"THUDM/chatglm-6b": "chatglm", "THUDM/chatglm3-6b": "chatglm3"}
FEW_ROWS = 9


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own beside recipes and examples, for recipes name paths from the project's folder."""
    for name in ("recipes", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    with light_training():
        yield tmp_path


@pytest.fixture(scope="session")
def glm_folders(tmp_path_factory: pytest.TempPathFactory, shared_or_skip: Path) -> dict[str, Path]:
    """Tiny random checkpoints as ChatGLM-6B and ChatGLM3-6B were released, with their real vocabularies."""
    place = tmp_path_factory.mktemp("released")
    return {name: write_glm_folder(place / layout, layout, shared_or_skip) for name, layout in LAYOUTS.items()}


@pytest.fixture
def model(request: pytest.FixtureRequest, name: str) -> Path:
    """A tiny model of the architecture that the recipe tunes."""
    path = load_recipe(FOLDER / name).model.path
    if path in LAYOUTS:
        folder: Path = request.getfixturevalue("glm_folders")[path]
    else:
        folder = request.getfixturevalue("tiny_qwen2_folder")
    return folder


def chats() -> None:
    succeed("import-chats", "examples/persona", "--me", "小明", "-o", "chats", "--held-out", "0.2")


@cache
def commands() -> dict[str, typer.core.TyperCommand]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


# ---- what they say ------------------------------------------------------------------------------------------------


def test_every_recipe_is_held_to_its_original() -> None:
    assert set(ORIGINAL) == set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_the_numbers_are_those_of_the_original(name: str) -> None:
    recipe = load_recipe(FOLDER / name)
    train = recipe.train
    found = (recipe.model.path, train.epochs, train.batch_size, train.learning_rate, train.schedule, train.warmup)
    assert found == ORIGINAL[name]
    assert train.gradient_checkpointing and train.weight_decay == 0
    assert train.row_balance == 0, "the originals count every learnt token the same"
    assert recipe.data.loss_mask == "family", "the originals' own tokens are learnt"
    method = recipe.method
    if method.name == "lora":
        assert (method.rank, method.alpha, method.dropout, method.targets) == METHODS[name]
        assert (method.rslora, method.dora) == ("rslora" in name, "dora" in name)
    else:
        assert method.num_virtual_tokens == (200 if name.startswith("multi-task") else 128) and not method.projection


def test_names_are_unique_and_tell_the_file() -> None:
    names = [load_recipe(FOLDER / name).name for name in RECIPES]
    assert names == [name.removesuffix(".yaml").replace("/", "-") for name in RECIPES]


@pytest.mark.parametrize("name", RECIPES)
def test_the_rows_can_be_trained_on(name: str) -> None:
    if name.startswith("persona"):
        chats()
    values = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    values["model"] = "a-model-that-is-not-here"
    Path("copy.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    found = json.loads(succeed("check", "copy.yaml", "--json"))
    assert found["ok"] and found["rows"] >= 7 and found["dev"] >= 1
    if name.startswith("self-cognition"):
        assert "{{" not in json.dumps(found, ensure_ascii=False)


# ---- the pages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_is_on_the_page_and_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    listed = re.findall(r"^\| \[([\w./-]+)\]\(([\w./-]+)\) \|", text, re.MULTILINE)
    assert sorted(shown for shown, _ in listed) == RECIPES
    assert all((FOLDER / link).is_file() for link in re.findall(r"\]\(([\w./-]+)\)", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_page_exist_and_fit_their_recipe(page: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    lines += [shlex.split(line[1:]) for name in RECIPES for line in (FOLDER / name).read_text("utf-8").splitlines()
              if line.startswith("#   weitiao")]  # fmt: skip
    assert len(lines) > 12
    for program, verb, *words in lines:
        assert program == "weitiao"
        commands()[verb].make_context(verb, list(words))  # raises for an unknown option
        if verb in ("train", "check"):
            load_recipe(words[0], [word for word in words[1:] if "=" in word])


def test_both_pages_show_the_same_commands() -> None:
    english, chinese = (re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
                        for page in PAGES)  # fmt: skip
    assert english == chinese


# ---- training -----------------------------------------------------------------------------------------------------


def few(name: str) -> list[str]:
    """The recipe's own rows, a few of them, as overrides: its sources are written anew, shorter."""
    if name.startswith("persona"):
        chats()
    recipe = load_recipe(FOLDER / name)
    changes = []
    for side, sources in (("train", recipe.data.train), ("dev", recipe.data.dev)):
        for number, source in enumerate(sources):
            path = Path(source.path)
            rows = json.loads(path.read_text("utf-8")) if path.suffix == ".json" else read_lines(path)
            short = write_rows(Path(f"{side}-{number}.jsonl"), rows[: FEW_ROWS if side == "train" else 4])
            changes.append((side, number, short))
    if len(recipe.data.train) > 1 or name.startswith("classification"):
        return [f"data.{side}.{number}.path={short}" for side, number, short in changes]
    return [f"data.{side}={short}" for side, _, short in changes]


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_and_answers(name: str, model: Path) -> None:
    quick = [f"model.path={model}", "model.dtype=float32", "train.epochs=1", "train.batch_size=4", "train.log_every=1"]
    quick += ["train.compile=never", "train.evaluate_every=never", "generate.max_new_tokens=8", "evaluate.resamples=10"]
    quick += ["evaluate.base=false", "train.learning_rate=0.01"]
    # a grammar over 130,000 tokens takes seconds to make, and other tests hold such answers to their form
    quick += [] if name.startswith("classification") else ["generate.constrain=false"]
    recipe = load_recipe(FOLDER / name, [*few(name), *quick])
    Path("recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    succeed("train", "recipe.yaml")
    run = Path("runs") / recipe.name
    losses = [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert 2 <= len(losses) <= 5 and all(loss > 0 for loss in losses)
    contract = json.loads((run / "contract.json").read_text("utf-8"))
    assert contract["tasks"]
    if name.startswith("classification"):
        succeed("evaluate", run)
    rows = read_lines(Path("train-0.jsonl"))[:1]
    write_rows(Path("one.jsonl"), rows)
    succeed("predict", run, "one.jsonl", "-o", "answers.jsonl")
    [answer] = read_lines(Path("answers.jsonl"))
    assert "prediction" in answer and answer["valid"] in (True, False)


@pytest.mark.parametrize("name", ["extraction/one-shot.yaml"])
def test_the_model_is_asked_with_one_example(name: str, model: Path) -> None:
    rows = read_lines(ROOT / "examples/job-adverts/new.jsonl")[:1]
    write_rows(Path("new.jsonl"), rows)
    changes = [f"model.path={model}", "model.dtype=float32", "generate.max_new_tokens=8", "generate.constrain=false"]
    succeed("prompt", f"recipes/{name}", *changes, "--rows", "new.jsonl", "--shots", "1", "-o", "answers.jsonl")
    [answer] = read_lines(Path("answers.jsonl"))
    assert answer["input"] == rows[0]["input"] and "prediction" in answer


@pytest.mark.parametrize("name", ["multi-task/lora.yaml"])
def test_the_row_that_the_course_prints_is_asked_with_the_same_tokens(name: str, model: Path, here: Path) -> None:
    """The course prints the ids of one row: context, [gMASK], <sop>, answer, <eop>; learnt from <sop> on."""
    import weitiao
    from weitiao.data.records import read_records
    from weitiao.render.fitting import render_record
    from weitiao.tasks.base import assign_task, infer_tasks

    text = "如何演好自己的角色，请读《演员自我修养》《喜剧之王》周星驰崛起于穷困潦倒之中的独门秘笈"
    facts = [
        {
            "predicate": "主演",
            "object_type": "人物",
            "subject_type": "影视作品",
            "object": "周星驰",
            "subject": "喜剧之王",
        }
    ]
    asked = "你现在是一个很厉害的阅读理解器，严格按照人类指令进行回答。\nInput: 找到句子中的三元组信息并输出成json给我:"
    context = f"Instruction: {asked}\n\n{text}\nAnswer: "
    target = f"```json\n{json.dumps(facts, ensure_ascii=False)}\n```"
    records = read_records(write_rows(here / "row.jsonl", [{"context": context, "target": target}]))
    tasks = infer_tasks(records)
    renderer = weitiao.open_model(str(model), dtype="float32").renderer
    [example] = render_record(records[0], assign_task(records[0], tasks), renderer)
    ids = list(example.token_ids)
    assert ids[:3] == [37010, 12, 5], "as printed in the course"
    start = ids.index(130004)
    assert ids[start - 1] == 130001 and ids[-1] == 130005 and ids[start + 1 : start + 5] == [5, 125827, 2031, 4]
    learnt = [place for place, flag in enumerate(example.loss_mask) if flag]
    assert learnt == list(range(start, len(ids)))


def test_a_migrated_configuration_trains_as_many_steps_as_it_says(glm_folders: dict[str, Path]) -> None:
    write_migrated_rows("AdvertiseGen/train.json", 9)
    write_migrated_rows("AdvertiseGen/dev.json", 2, first=100)
    text = (DEMO + LORA).replace("max_steps: 3000", "max_steps: 4").replace("eval_steps: 500", "eval_steps: 4")
    folder = glm_folders["THUDM/chatglm3-6b"]
    write("lora.yaml", text)
    succeed("migrate", "lora.yaml", "-o", "recipe.yaml", "--model", folder, "--data", "AdvertiseGen")
    quick = ["model.dtype=float32", "train.compile=never", "generate.max_new_tokens=4", "train.log_every=1"]
    succeed("train", "recipe.yaml", *quick)
    steps = [line["step"] for line in read_lines(Path("runs/lora/metrics.jsonl")) if "loss" in line]
    assert steps[-1] == 4


def test_self_cognition_variants_differ_in_their_method_alone() -> None:
    plain, rs, dora = (
        load_recipe(FOLDER / f"self-cognition/{name}.yaml").model_dump() for name in ("lora", "rslora", "dora")
    )
    assert rs["method"].pop("rslora") and dora["method"].pop("dora")
    for each in (plain, rs, dora):
        each.pop("name")
        each["method"].pop("rslora", None)
        each["method"].pop("dora", None)
    assert plain == rs == dora
