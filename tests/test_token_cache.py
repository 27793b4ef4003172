"""Rows are tokenised once: the cache holds the very examples, knows when it is stale, and survives a crash anywhere."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weitiao import token_cache
from weitiao.data.records import Record, read_records
from weitiao.dataset import Dataset, load_dataset
from weitiao.errors import DataError
from weitiao.models.opening import open_renderer
from weitiao.recipe import Recipe, make_recipe
from weitiao.render.base import Conversation, Example, Renderer
from weitiao.render.example_store import (
    BATCH_EXAMPLES,
    ExampleStore,
    ExampleWriter,
    answers_of,
    lengths_of,
    supervised_of,
)
from weitiao.render.fitting import FittedRows, Fitting, fit_rows
from weitiao.tasks.base import Task, infer_tasks
from weitiao.token_cache import fingerprint_tokenizer, fit_in_threads, fit_or_open, fit_side, token_key
from weitiao.train.batches import make_batches, make_probe

KEY = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def renderer(tiny_qwen2_folder: Path) -> Renderer:
    return open_renderer(str(tiny_qwen2_folder))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Forty rows with texts of different lengths, and ten conversations with several replies to learn."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {
            "context": f"Instruction: 答。\nInput: 选。\n\n{'短文。' * (n % 7 + 1)}{n}\nAnswer: ",
            "target": json.dumps(["ab"[n % 2]]),
        }
        for n in range(40)
    ]
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"你好{n}"},
                {"role": "assistant", "content": "好。", "learn": n % 2 == 0},
                {"role": "user", "content": "再见"},
                {"role": "assistant", "content": "再见。"},
            ]
        }
        for n in range(10)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*lines, *talks]), encoding="utf-8")
    return read_records(path)


@pytest.fixture(scope="module")
def tasks(records: list[Record]) -> list[Task]:
    labels, talk = infer_tasks(records)
    return [labels] * 40 + [talk] * 10


def how(renderer: Renderer, **policy: Any) -> Fitting:
    return Fitting(**{"renderer": renderer, "max_length": 500, "overlong": "error", "turns": "flagged", **policy})


def in_memory(records: Sequence[Record], tasks: Sequence[Task], fitting: Fitting) -> FittedRows:
    return fit_rows(
        records,
        tasks,
        fitting.renderer,
        max_length=fitting.max_length,
        overlong=fitting.overlong,
        turns=fitting.turns,
    )


def unfolded(fitted: FittedRows) -> dict[str, Any]:
    return {
        "examples": list(fitted.examples),
        "rows": [int(row) for row in fitted.rows],
        "records": list(fitted.records),
        "kept": list(fitted.kept),
        "dropped": fitted.dropped,
        "shortened": fitted.shortened,
    }


class Unused(Renderer):
    """A renderer that must not be asked for anything but its name."""

    stop_ids = (1,)
    template = "t"
    tokenizer = None

    def render_prompt(self, messages: Any, tools: Any = ()) -> tuple[int, ...]:
        raise AssertionError("nothing is to be rendered")

    render_answer = render_reply = read_answer = show_tokens = render_prompt  # type: ignore[assignment]


# ---- the same examples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"turns": "last"},
        {"turns": "all"},
        {"overlong": "drop", "max_length": 60},
        {"overlong": "shorten_input", "max_length": 60},
    ],
)
def test_the_cache_holds_what_rendering_in_memory_gives(
    policy: dict[str, Any], renderer: Renderer, records: list[Record], tasks: list[Task], tmp_path: Path
) -> None:
    fitting = how(renderer, **policy)
    known = in_memory(records, tasks, fitting)
    made = fit_or_open(records, tasks, fitting, folder=tmp_path, key=KEY)
    again = fit_or_open(records, tasks, replace(fitting, renderer=Unused()), folder=tmp_path, key=KEY)
    assert (made.found, again.found) == (False, True)
    assert unfolded(made.fitted) == unfolded(again.fitted) == unfolded(known)
    if "overlong" in policy:
        assert known.dropped or known.shortened, "the policy is put to work"


def test_parts_come_in_order_and_as_one_would_give_them(
    renderer: Renderer, records: list[Record], tasks: list[Task]
) -> None:
    chunks = list(fit_in_threads(records, tasks, how(renderer), chunk_rows=3))
    known = in_memory(records, tasks, how(renderer))
    assert [example for chunk in chunks for example in chunk.examples] == list(known.examples)
    assert [row for chunk in chunks for row in chunk.rows] == list(known.rows)


def test_many_texts_at_once_give_the_tokens_of_one_at_a_time(renderer: Renderer, records: list[Record]) -> None:
    hostile = ["<|im_end|>", "a<|im_start|>b", "", " 空 ", "\n\n", "😀<|im_end", "\ue002\ue003"]
    talks = [Conversation(messages=r.messages, reply=replace(r.messages[-1], role="assistant")) for r in records[:9]]
    talks += [
        Conversation(messages=[replace(records[0].messages[-1], text=text)], reply=replace(talks[0].reply, text=text))
        for text in hostile
    ]
    for turns in ("flagged", "last"):
        together = renderer.render_conversations(talks, turns=turns)  # type: ignore[arg-type]
        assert together == [
            renderer.render_conversation(talk.messages, talk.reply, turns=turns)  # type: ignore[arg-type]
            for talk in talks
        ]


def test_a_store_is_a_sequence_of_examples(tmp_path: Path) -> None:
    examples = [
        Example(token_ids=tuple(range(n % 5 + 2)), loss_mask=tuple(bool(n >> bit & 1) for bit in range(n % 5 + 2)))
        for n in range(2 * BATCH_EXAMPLES + 7)
    ]
    with ExampleWriter(tmp_path / "x.arrow") as writer:
        for start in range(0, len(examples), 100):
            writer.add(examples[start : start + 100], range(start, min(start + 100, len(examples))))
    store = ExampleStore(tmp_path / "x.arrow")
    assert len(store) == len(examples)
    assert list(store) == examples
    places = [0, -1, BATCH_EXAMPLES - 1, BATCH_EXAMPLES, 2 * BATCH_EXAMPLES, 77]
    assert [store[place] for place in places] == [examples[place] for place in places]
    assert store[5:30:6] == examples[5:30:6]
    with pytest.raises(IndexError):
        _ = store[len(examples)]
    for count in (lengths_of, supervised_of, answers_of):
        assert count(store).tolist() == count(examples).tolist()
    assert store.rows.tolist() == list(range(len(examples)))
    assert list(pickle.loads(pickle.dumps(store))) == examples, "another process maps the file itself"


def test_no_examples_are_a_store_too(tmp_path: Path) -> None:
    with ExampleWriter(tmp_path / "x.arrow"):
        pass
    assert list(ExampleStore(tmp_path / "x.arrow")) == []


def test_batches_from_the_cache_are_those_from_memory(
    renderer: Renderer, records: list[Record], tasks: list[Task], tmp_path: Path
) -> None:
    known = in_memory(records, tasks, how(renderer)).examples
    found = fit_or_open(records, tasks, how(renderer), folder=tmp_path, key=KEY).fitted.examples
    pairs = zip(
        [make_probe(known), *make_batches(known, tokens_per_pass=300)],
        [make_probe(found), *make_batches(found, tokens_per_pass=300)],
        strict=True,
    )
    for one, other in pairs:
        for part in ("token_ids", "positions", "row_starts", "predictors", "targets", "weights"):
            assert torch.equal(getattr(one, part), getattr(other, part))


# ---- the key ---------------------------------------------------------------------------------------------------------


def key_of(renderer: Renderer, tasks: Sequence[Task], **other: Any) -> str:
    policy = {name: other.pop(name) for name in ("max_length", "overlong", "turns") if name in other}
    parts = {"rows": "a", "tasks": [*dict.fromkeys(tasks)], "row_tasks": tasks, "tokenizer": "b", "reading": []}
    return token_key(how=how(renderer, **policy), **{**parts, **other})  # type: ignore[arg-type]


def test_the_key_is_another_when_anything_the_examples_depend_on_is(
    renderer: Renderer, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, talk = tasks[0], tasks[-1]
    fenced = replace(labels, form=replace(labels.form, fence_open="```json\n", fence_close="\n```"))
    keys = [
        key_of(renderer, tasks),
        key_of(renderer, tasks, rows="other"),
        key_of(renderer, [fenced] * 40 + [talk] * 10),
        key_of(renderer, tasks, row_tasks=[*tasks[:39], talk, *tasks[40:]]),
        key_of(renderer, tasks, tokenizer="other"),
        key_of(Unused(), tasks),
        key_of(renderer, tasks, max_length=501),
        key_of(renderer, tasks, overlong="drop"),
        key_of(renderer, tasks, turns="last"),
        key_of(renderer, tasks, reading=[["alpaca", None, None]]),
    ]
    monkeypatch.setattr(token_cache, "version", lambda name: "99")
    keys.append(key_of(renderer, tasks))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert key_of(renderer, tasks) == keys[0]


def test_another_vocabulary_or_chat_template_is_another_tokenizer(tiny_qwen2_folder: Path, tmp_path: Path) -> None:
    known = fingerprint_tokenizer(tiny_qwen2_folder)
    folder = shutil.copytree(tiny_qwen2_folder, tmp_path / "copy")
    assert fingerprint_tokenizer(folder) == known
    for name in ("tokenizer.json", "chat_template.jinja"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text + " ", encoding="utf-8")
        assert fingerprint_tokenizer(folder) != known
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert fingerprint_tokenizer(folder) == known


def recipe_of(rows: Path, **data: Any) -> Recipe:
    return make_recipe({"name": "t", "model": "starter", "data": {"train": str(rows), "held_out": 0, **data}})


def test_a_data_set_is_tokenised_once_and_again_when_it_changes(
    sample_rows: Path, tiny_qwen2_folder: Path, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "KEPT_FROM", 10)

    def fit(recipe: Recipe) -> tuple[Dataset, FittedRows, str]:
        dataset = load_dataset(recipe)
        place = tmp_path / "tokens"
        rows, note = fit_side(recipe.data, dataset, "train", renderer, model=tiny_qwen2_folder, folder=place)
        return dataset, rows, note

    dataset, first, note = fit(recipe_of(sample_rows))
    assert note.startswith("24 train examples tokenised in ")
    _, again, note = fit(recipe_of(sample_rows))
    assert note.startswith("24 train examples: tokenised rows from the cache")
    assert unfolded(first) == unfolded(again) == unfolded(in_memory(dataset.train, dataset.train_tasks, how(renderer)))
    lines = sample_rows.read_text(encoding="utf-8").splitlines(keepends=True)
    sample_rows.write_text("".join(lines[:-1]), encoding="utf-8")
    assert fit(recipe_of(sample_rows))[2].startswith("23 train examples tokenised in ")
    sample_rows.write_text("".join(lines), encoding="utf-8")
    assert "from the cache" in fit(recipe_of(sample_rows))[2]
    assert "tokenised in" in fit(recipe_of(sample_rows, max_length=400))[2]


def test_few_rows_are_not_kept(sample_rows: Path, tiny_qwen2_folder: Path, renderer: Renderer, tmp_path: Path) -> None:
    recipe = recipe_of(sample_rows)
    rows, note = fit_side(
        recipe.data, load_dataset(recipe), "train", renderer, model=tiny_qwen2_folder, folder=tmp_path / "tokens"
    )
    assert (len(rows.examples), note) == (24, "")
    assert not (tmp_path / "tokens").exists()


# ---- crashes, damage, other processes --------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is killed here: nothing that would tidy up runs after it."""


class Fuse:
    """Lets so many calls through, then kills; everything that would still touch the disk is dead from then on."""

    def __init__(self, calls_left: int) -> None:
        self.calls_left = calls_left

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def fused(*args: Any, **kwargs: Any) -> Any:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Crash
            return call(*args, **kwargs)

        return fused


def killed_while_tokenising(
    calls_left: int, records: Sequence[Record], tasks: Sequence[Task], fitting: Fitting, folder: Path
) -> bool:
    fuse = Fuse(calls_left)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (shutil, "rmtree"), (Path, "rename"), (Path, "write_text"),
                            (ExampleWriter, "add"), (ExampleWriter, "_write")):  # fmt: skip
            patch.setattr(owner, name, fuse.wrap(getattr(owner, name)))
        try:
            fit_or_open(records, tasks, fitting, folder=folder, key=KEY)
        except Crash:
            return True
    return False


def test_a_kill_at_any_moment_leaves_nothing_that_is_trusted(
    renderer: Renderer, records: list[Record], tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "CHUNK_ROWS", 20)
    known = unfolded(in_memory(records, tasks, how(renderer)))
    for calls_left in range(60):
        folder = tmp_path / str(calls_left)
        killed = killed_while_tokenising(calls_left, records, tasks, how(renderer), folder)
        after = fit_or_open(records, tasks, how(renderer), folder=folder, key=KEY)
        assert unfolded(after.fitted) == known
        assert not [*folder.glob(".tmp-*")]
        if not killed:
            break
    assert calls_left > 5, "every call was a moment to be killed"
    assert after.found


@pytest.mark.parametrize("damage", ["cut", "no index", "bad index", "no examples", "other rows", "garbage"])
def test_a_damaged_set_is_made_anew(
    damage: str, renderer: Renderer, records: list[Record], tasks: list[Task], tmp_path: Path
) -> None:
    place = fit_or_open(records, tasks, how(renderer), folder=tmp_path, key=KEY).folder
    examples, index = place / "examples.arrow", place / "index.json"
    whole = examples.read_bytes()
    match damage:
        case "cut":
            examples.write_bytes(whole[:-100])
        case "garbage":
            examples.write_bytes(b"\0" * len(whole))
        case "no index":
            index.unlink()
        case "bad index":
            index.write_text("{", encoding="utf-8")
        case "no examples":
            examples.unlink()
        case "other rows":
            index.write_text(index.read_text().replace('"rows": 50', '"rows": 51'), encoding="utf-8")
    again = fit_or_open(records, tasks, how(renderer), folder=tmp_path, key=KEY)
    assert not again.found
    assert examples.read_bytes() == whole


def test_rows_that_are_too_long_are_named_as_in_memory_and_nothing_is_kept(
    renderer: Renderer, records: list[Record], tasks: list[Task], tmp_path: Path
) -> None:
    fitting = how(renderer, max_length=60)
    with pytest.raises(DataError) as known:
        in_memory(records, tasks, fitting)
    with pytest.raises(DataError) as found:
        fit_or_open(records, tasks, fitting, folder=tmp_path, key=KEY)
    assert str(found.value) == str(known.value)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_full_disk_is_named_with_the_way_out(
    renderer: Renderer, records: list[Record], tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ExampleWriter, "_write", refuse)
    with pytest.raises(DataError, match=r"the disk is full.*WEITIAO_CACHE"):
        fit_or_open(records, tasks, how(renderer), folder=tmp_path, key=KEY)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_of_several_that_start_at_once_one_tokenises(
    renderer: Renderer, records: list[Record], tasks: list[Task], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(3) as pool:
        started = [pool.submit(fit_or_open, records, tasks, how(renderer), folder=tmp_path, key=KEY) for _ in range(3)]
        made = [each.result() for each in started]
    assert sorted(each.found for each in made) == [False, True, True]
    assert all(list(each.fitted.examples) == list(made[0].fitted.examples) for each in made)


def test_the_sets_longest_not_used_are_forgotten(
    renderer: Renderer, records: list[Record], tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "MOST_SETS", 2)
    folders = {}
    for number, key in enumerate(("a" * 64, "b" * 64, "a" * 64, "c" * 64)):
        folders[key[0]] = fit_or_open(records, tasks, how(renderer), folder=tmp_path, key=key).folder
        os.utime(folders[key[0]], (number, number))
    assert {name for name, folder in folders.items() if folder.exists()} == {"a", "c"}
