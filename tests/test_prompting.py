"""Models that were never tuned, asked end to end: tiny random ones, whose answers are read like any other's."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from shutil import copytree

import pytest
from rich.console import Console

from weitiao.apply import predict_file
from weitiao.data.neighbours import load_index
from weitiao.data.record import Record
from weitiao.dataset import Dataset, load_dataset
from weitiao.errors import DataError, RecipeError, RunError
from weitiao.evaluate.predict import Answerer, OnReply
from weitiao.generate.chat import Reply
from weitiao.generate.engine import Sampling
from weitiao.models.opening import OpenModel, open_model
from weitiao.prompting import labelled_limits, prompt_model, prompt_room, shot_sides
from weitiao.recipe import Generate, Recipe, make_recipe
from weitiao.render.template import TemplateRenderer
from weitiao.tasks.base import Task
from weitiao.tune import tune_model

ROOT = Path(__file__).parents[1]
ADVERTS = ROOT / "examples" / "job-adverts"


def with_positions(folder: Path, into: Path, count: int) -> Path:
    """A copy of a tiny model that takes longer prompts."""
    copytree(folder, into)
    config = json.loads((into / "config.json").read_text(encoding="utf-8"))
    (into / "config.json").write_text(json.dumps({**config, "max_position_embeddings": count}), encoding="utf-8")
    return into


@pytest.fixture(scope="module", params=["tiny_qwen2_folder", "tiny_llama_folder"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a chat template, one without; both take prompts of 4,096 tokens."""
    folder: Path = request.getfixturevalue(request.param)
    return with_positions(folder, tmp_path_factory.mktemp("long") / folder.name, 4096)


def recipe_of(model: Path, *, most: int = 12, train: Path = ADVERTS / "rows.jsonl") -> Recipe:
    return make_recipe(
        {
            "name": "n",
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": str(train), "held_out": 0.25},
            "generate": {"max_new_tokens": most},
        }
    )


def quiet() -> Console:
    return Console(file=StringIO())


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_job_adverts_are_asked_with_one_example_and_their_answers_read(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    recipe = recipe_of(model, most=600)
    told = prompt_model(recipe, rows=ADVERTS / "new.jsonl", out=out, shots=1, console=quiet())
    assert [len(row.messages) for row in told.records] == [3, 3, 3, 3]
    [form] = {task.form for task in told.tasks}
    for row, line in zip(told.records, lines_of(out), strict=True):
        example, answer, question = (message.text for message in row.messages)
        assert example.startswith("只输出一个 JSON 对象") and form.write(form.parse(answer)) == answer
        assert question == f"{line['instruction']}\n{line['input']}" and row.text == line["input"]
        assert line["valid"], "held to the form, even a random model gives answers of it"
        assert form.parse(str(line["prediction"])) == line["answer"]
        for value in (value for values in line["answer"].values() for value in values):  # type: ignore[attr-defined]
            assert value in row.text or value == "该JD未要求"
    assert told.num_valid == 4


def test_the_example_runs_as_its_page_says(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "m").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ask.py", "m", "2"])
    runpy.run_path("examples/job-adverts/ask.py", run_name="__main__")
    assert len(lines_of(tmp_path / "runs" / "job-adverts.jsonl")) == 4


def test_the_page_of_the_example_shows_what_the_model_is_told(tiny_qwen2_folder: Path) -> None:
    from weitiao.tasks.asking import describe_answer

    [task] = load_dataset(recipe_of(tiny_qwen2_folder)).tasks
    assert f"```text\n{describe_answer(task.form)}\n```" in (ADVERTS / "README.md").read_text(encoding="utf-8")


def test_dev_rows_are_asked_by_default_and_never_shown(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, most=4)
    for nearest in (False, True):
        out = tmp_path / f"{nearest}.jsonl"
        told = prompt_model(recipe, out=out, shots=2, nearest=nearest, console=quiet())
        dev = [row.source for row in load_dataset(recipe).dev]
        assert [line["source"] for line in told.lines] == dev and len(dev) == 4
        held = {row.text for row in told.records}
        assert not any(text in turn.text for row in told.records for turn in row.messages[:-1] for text in held)


def test_prompts_are_the_same_from_run_to_run(model: Path, tmp_path: Path) -> None:
    twice = [prompt_model(recipe_of(model, most=4), out=tmp_path / f"{n}", shots=2, console=quiet()) for n in range(2)]
    assert [row.messages for row in twice[0].records] == [row.messages for row in twice[1].records]
    assert twice[0].lines == twice[1].lines


def test_examples_beyond_the_positions_are_left_out_and_said(tiny_qwen2_folder: Path, tmp_path: Path) -> None:
    short = with_positions(tiny_qwen2_folder, tmp_path / "short", 1400)
    said = Console(file=StringIO(), width=400)
    told = prompt_model(recipe_of(short, most=4), out=tmp_path / "out", shots=9, console=said)
    assert all(1 < len(row.messages) < 19 for row in told.records)
    assert "examples left out of 4 prompts they did not fit into" in said.file.getvalue()  # type: ignore[attr-defined]
    assert told.notes


def test_nothing_to_ask_is_said(tiny_qwen2_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_qwen2_folder)
    bare = recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": 0.0})})
    with pytest.raises(DataError, match=r"holds no dev rows apart, so there is nothing to ask\. Name a file of rows"):
        prompt_model(bare, out=tmp_path / "out", console=quiet())


def test_a_task_that_only_dev_rows_have_is_asked_without_examples(tiny_qwen2_folder: Path, tmp_path: Path) -> None:
    rows = {"train": [("好", "a"), ("坏", "b")] * 3, "dev": [("好", "a"), ("什么", "x"), ("怎么", "y")]}
    for name, pairs in rows.items():
        lines = [
            {"instruction": "评", "input": f"{text}{place}", "output": label, "task": "t" if label in "ab" else "u"}
            for place, (text, label) in enumerate(pairs, start=10 * len(name))
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe = recipe_of(tiny_qwen2_folder, train=tmp_path / "train.jsonl")
    data = {"train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.jsonl")}
    recipe = make_recipe({**recipe.model_dump(mode="json"), "data": data})
    told = prompt_model(recipe, out=tmp_path / "out", shots=2, console=quiet())
    assert [len(row.messages) for row in told.records] == [5, 1, 1]
    assert told.notes == [
        f"2 rows with fewer than 2 examples, for lack of rows to show: {tmp_path}/dev.jsonl:2, {tmp_path}/dev.jsonl:3"
    ]


def test_examples_are_never_learnt_along_with_all_turns() -> None:
    data = {"train": "rows.jsonl", "retrieve": 2}
    assert make_recipe({"name": "n", "model": "m", "data": data}).data.retrieve == 2
    with pytest.raises(
        RecipeError, match=r"data\.retrieve: with turns: all the answers of the examples would be learnt"
    ):
        make_recipe({"name": "n", "model": "m", "data": {**data, "turns": "all"}})


# --- Sides of an evaluation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(model: Path) -> OpenModel:
    return open_model(str(model), dtype="float32")


@pytest.fixture(scope="module")
def dataset(model: Path) -> Dataset:
    return load_dataset(recipe_of(model))


def answerer_of(opened: OpenModel, dataset: Dataset, most: int = 6) -> Answerer:
    limits = {task.name: most for task in dataset.tasks}
    return Answerer(
        model=opened.model,
        renderer=opened.renderer,
        sampling=Sampling(max_new_tokens=most),
        answer_limits=limits,
        batch_rows=8,
    )


def test_an_evaluation_has_a_side_for_each_number_of_examples(
    opened: OpenModel, dataset: Dataset, tmp_path: Path
) -> None:
    shown: list[tuple[str, int]] = []

    @contextmanager
    def counting(name: str) -> Iterator[OnReply]:
        yield lambda done, total: shown.append((name, total))

    def sides(**how: object) -> dict[str, list[int]]:
        made = shot_sides(
            answerer_of(opened, dataset),
            dataset.train,
            dataset.train_tasks,
            dataset.dev,
            dataset.dev_tasks,
            folder=tmp_path,
            key="k",
            **how,  # type: ignore[arg-type]
        )
        return {name: [len(row.messages) for row in side.records] for name, side in made.items()}

    assert sides(shots=(0, 2), counting=counting) == {"zero-shot": [1] * 4, "2-shot": [5] * 4}
    assert sides(shots=(0, 3), nearest=True) == {"zero-shot": [1] * 4, "3-nearest": [7] * 4}
    assert {name for name, _ in shown} == {"zero-shot", "2-shot"} and {total for _, total in shown} == {4}
    names = ["predictions-2-shot.jsonl", "predictions-3-nearest.jsonl", "predictions-zero-shot.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(ValueError, match="shots holds -1"):
        sides(shots=(-1,))


def test_a_side_goes_on_where_it_was_broken_off_and_begins_anew_with_other_examples(
    opened: OpenModel, dataset: Dataset, tmp_path: Path
) -> None:
    def ask(count: list[int], *, key: str = "k", seed: int = 0) -> None:
        @contextmanager
        def counting(_: str) -> Iterator[OnReply]:
            yield lambda done, total: count.append(done)

        parts = (dataset.train, dataset.train_tasks, dataset.dev, dataset.dev_tasks)
        answerer = answerer_of(opened, dataset)
        shot_sides(answerer, *parts, folder=tmp_path, key=key, shots=(1,), seed=seed, counting=counting)

    ask([])
    whole = tmp_path / "predictions-1-shot.jsonl"
    lines = lines_of(whole)
    first: list[int] = []

    def break_off() -> None:
        """What is there when the process dies after two answers."""

        class DiedError(Exception):
            pass

        @contextmanager
        def counting(_: str) -> Iterator[OnReply]:
            def count(done: int, total: int) -> None:
                if done == 2:
                    raise DiedError

            yield count

        parts = (dataset.train, dataset.train_tasks, dataset.dev, dataset.dev_tasks)
        with pytest.raises(DiedError):
            shot_sides(answerer_of(opened, dataset), *parts, folder=tmp_path, key="k", shots=(1,), counting=counting)

    break_off()
    ask(first)
    assert first == [3, 4] and lines_of(whole) == lines
    for other in ({"key": "another model"}, {"seed": 9}):
        break_off()
        anew: list[int] = []
        ask(anew, **other)  # type: ignore[arg-type]
        assert anew == [1, 2, 3, 4]


def test_limits_leave_room_for_the_longest_labelled_answer(opened: OpenModel, dataset: Dataset) -> None:
    limits = labelled_limits(dataset.train, dataset.train_tasks, opened.renderer, Generate())
    [task] = dataset.tasks
    longest = max(len(opened.renderer.render_answer(task.write_target(row))) for row in dataset.train)
    assert limits == {task.name: 3 * longest // 2}
    assert labelled_limits(dataset.train, dataset.train_tasks, opened.renderer, Generate(max_new_tokens=7)) == {
        task.name: 7
    }
    answerer = replace(answerer_of(opened, dataset), answer_limits=limits)
    assert prompt_room(answerer) == {task.name: 4096 - limits[task.name]}


def test_the_answer_of_a_model_without_turns_ends_where_it_asks_itself_the_next_question(
    opened: OpenModel, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model goes on like this; the random one must be made to."""
    talk = [*dataset.dev[0].messages] * 2
    if not opened.renderer.template:
        assert isinstance(opened.renderer, TemplateRenderer)
        pieces = opened.renderer.read_answer(opened.renderer.render_prompt(talk))
        assert "\n\nUser: " in pieces, "what is looked for is what the renderer writes"

    def answer(self: Answerer, records: object, tasks: object) -> Iterator[Reply]:
        for index in range(len(dataset.dev)):
            yield Reply(index=index, text="答\n\nUser: 下一个", finish="length", num_tokens=9, logprob=-1.0)

    monkeypatch.setattr(Answerer, "answer", answer)
    sides = shot_sides(
        answerer_of(opened, dataset),
        dataset.train,
        dataset.train_tasks,
        dataset.dev,
        dataset.dev_tasks,
        folder=tmp_path,
        key="k",
        shots=(1,),
    )
    given = {(line["prediction"], line["finish"]) for line in sides["1-shot"].lines}
    assert given == ({("答\n\nUser: 下一个", "length")} if opened.renderer.template else {("答", "stop")})


# --- A tuned model that looks up ------------------------------------------------------------------------------------


def test_a_run_that_looks_up_asks_as_it_learnt_and_cannot_do_without_its_rows(
    tiny_qwen2_folder: Path, tmp_path: Path
) -> None:
    model = with_positions(tiny_qwen2_folder, tmp_path / "long", 4096)
    recipe = make_recipe(
        {
            "name": "n",
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": str(ADVERTS / "rows.jsonl"), "held_out": 0.25, "retrieve": 1, "max_length": 3000},
            "train": {"epochs": 0.5, "evaluate_every": "never", "compile": "never"},
        }
    )
    run = tune_model(recipe, runs=tmp_path / "runs", console=quiet())
    train, dev = load_dataset(recipe).train, load_dataset(recipe).dev
    kept = load_index(run.neighbours.read_bytes(), where="neighbours.jsonl")
    assert len(kept) == len(train) == 12 and len(dev) == 4
    asked: list[tuple[str, ...]] = []
    answer = Answerer.answer

    def watch(self: Answerer, records: Sequence[Record], tasks: Sequence[Task]) -> Iterator[Reply]:
        asked.extend(tuple(turn.text for turn in record.messages) for record in records)
        return answer(self, records, tasks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "answer", watch)
        predict_file(run.path, ADVERTS / "new.jsonl", tmp_path / "out.jsonl", console=quiet())
    shown = {row.prompt: task.write_target(row) for row, task in zip(train, load_dataset(recipe).train_tasks)}
    assert len(asked) == 4 and all(shown[example] == answer for example, answer, _ in asked)
    assert all(line["valid"] or line["finish"] == "refused" for line in lines_of(tmp_path / "out.jsonl"))
    run.neighbours.unlink()
    with pytest.raises(RunError, match=r"neighbours\.jsonl is missing"):
        predict_file(run.path, ADVERTS / "new.jsonl", tmp_path / "again.jsonl", console=quiet())
