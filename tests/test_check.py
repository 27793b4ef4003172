"""`weitiao check`: what it takes, what it says in each of its three views, what it mends, with which code it ends."""

from __future__ import annotations

import html.parser
import json
import random
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import Result
from typer.testing import CliRunner

from weitiao.check import examine as check_module
from weitiao.check.checkup import Checkup, masked
from weitiao.check.examine import Subject, check_subject, find_subject
from weitiao.check.fix import mend_files
from weitiao.check.page import render_page
from weitiao.check.token_counts import open_counter
from weitiao.cli import app
from weitiao.dataset import load_dataset
from weitiao.errors import DataError, RecipeError
from weitiao.messages import Message
from weitiao.models.opening import open_renderer

LABELS = ("体育", "科技", "财经")


def row(number: int, label: str | None = None, **more: Any) -> dict[str, Any]:
    context = f"Instruction: 回答。\nInput: 选一个标签。\n\n第{number}篇短文讲的是{LABELS[number % 3]}。\nAnswer: "
    return {"context": context, "target": json.dumps([label or LABELS[number % 3]], ensure_ascii=False), **more}


def write(path: str | Path, rows: list[Any]) -> str:
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in rows]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *(str(argument) for argument in arguments)], catch_exceptions=False)


def check(*words: str, max_length: int | None = None) -> Checkup:
    return check_subject(find_subject(words), max_length=max_length)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def broken() -> str:
    """rows.jsonl with 34 rows: two unreadable, a contradiction, a misfit, a repeat, personal data, a bad label."""
    rows: list[Any] = [row(number) for number in range(30)]
    rows[3] = '"only a text"'
    rows[5] = '{"context": "a'
    rows[7]["target"] = "体育"
    rows[9]["context"] = rows[9]["context"].replace("短文", "电话13812345678的<b>短文</b>")
    rows[11]["target"] = '["财经 "]'
    return write("rows.jsonl", [*rows, row(12), row(13, "财经"), row(31, note="x"), row(32)])


# ---- what it takes ----------------------------------------------------------------------------------------------


def test_a_folder_is_its_data_files_and_dev_files_are_scored_on() -> None:
    Path("data").mkdir()
    write("data/train.jsonl", [row(number) for number in range(12)])
    write("data/my-dev.jsonl", [row(number) for number in range(20, 26)])
    Path("data/README.md").write_text("x", encoding="utf-8")
    found = check("data")
    assert (found.train, found.dev, found.rows) == (12, 6, 18)
    assert [finding.code for finding in found.findings if finding.sources == ("data/README.md",)] == ["unread-file"]
    assert found.next_command == "weitiao init data/train.jsonl --dev data/my-dev.jsonl"


def test_a_dev_file_alone_is_learnt_from_and_several_files_are_one_set() -> None:
    write("dev.jsonl", [row(number) for number in range(12)])
    write("more.jsonl", [row(number) for number in range(12, 20)])
    assert (check("dev.jsonl").train, check("dev.jsonl").dev) == (12, 0)
    assert (check("dev.jsonl", "more.jsonl").train, check("dev.jsonl", "more.jsonl").dev) == (8, 12)


def test_words_with_a_sign_of_equality_are_overrides_unless_they_are_files() -> None:
    write("a=b.jsonl", [row(number) for number in range(20)])
    found = check("a=b.jsonl", "data.held_out=0.5")
    assert found.train + found.dev == 20
    assert found.dev > 5
    for words, sentence in (
        (["data.held_out=0.5"], "Give a recipe, or files or folders"),
        (["a.yaml", "b.jsonl"], "Give one recipe, or data files only"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            find_subject(words)


@pytest.mark.parametrize("words", [["none.jsonl"], ["empty.jsonl"], ["none.yaml"], [], ["nothing"], ["nothing/"]])
def test_what_cannot_be_read_ends_with_2(words: list[str]) -> None:
    Path("nothing").mkdir()
    write("empty.jsonl", [])
    result = run_cli(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# ---- what it says -----------------------------------------------------------------------------------------------


def test_json_holds_every_row_every_finding_and_ends_with_1(broken: str) -> None:
    result = run_cli(broken, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["ok"], found["rows"], found["accepted"], found["rejected"]) == (False, 34, 32, 2)
    assert found["format"] == "context_target"
    assert found["tasks"][0] | {"labels": [], "form": ""} == {
        "name": "labels", "shape": "label list", "rows": 31, "train": 31, "dev": 0, "form": "", "labelled_by": "",
        "labels": [],
    }  # fmt: skip
    graded = {finding["code"]: finding["grade"] for finding in found["findings"]}
    assert graded == {
        "bad-row": "error", "contradiction": "error", "misfit": "error", "repeat": "warning",
        "label-variant": "warning", "personal-data": "warning", "unused-key": "note",
    }  # fmt: skip
    for finding in found["findings"]:
        assert set(finding) >= {"code", "grade", "title", "message", "sources", "count", "fix"}
        assert all(source.startswith("rows.jsonl:") for source in finding["sources"])
    assert "13812345678" not in result.stdout


def test_sound_rows_end_with_0_and_the_command_to_type_next() -> None:
    write("rows.jsonl", [row(number) for number in range(30)])
    result = run_cli("rows.jsonl")
    assert result.exit_code == 0
    assert "No problems in 30 train and 0 dev rows." in result.stdout
    assert result.stdout.endswith("Next: weitiao init rows.jsonl\n")
    Path("r.yaml").write_text("model: some/model\ndata: {train: rows.jsonl}\n", encoding="utf-8")
    assert run_cli("r.yaml").stdout.endswith("Next: weitiao train r.yaml\n")


def test_the_terminal_names_errors_first_with_their_rows(broken: str) -> None:
    printed = run_cli(broken).stdout
    assert "rows.jsonl: 2 of 34 rows cannot be used." in printed
    assert printed.index("✗ error: 2 rows cannot be used") < printed.index("! warning:") < printed.index("· note:")
    assert "rows.jsonl:6: row: is not JSON" in printed
    assert "Not ready to train: 3 errors, 3 warnings, 1 note in 34 rows." in printed
    assert "13812345678" not in printed


class _Page(html.parser.HTMLParser):
    """Collects what a page loads and whether its elements close in order."""

    VOID = frozenset({"meta", "rect", "line", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "onclick")]
        if tag in ("script", "link", "img"):
            self.loads.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_by_itself_and_shows_rows_without_personal_data(broken: str) -> None:
    result = run_cli(broken, "--html", "pages/check.html")
    assert result.exit_code == 1
    assert "Wrote pages/check.html." in result.stderr
    text = Path("pages/check.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert (page.open, page.loads) == ([], [])
    assert "电话▮▮▮的<b>短文</b>" in page.text, "shown as text, masked"
    assert "13812345678" not in text
    assert "2 rows cannot be used" in page.text
    assert "prefers-color-scheme: dark" in text


def test_the_page_of_sound_rows_and_of_bad_rows_only_can_be_drawn() -> None:
    write("good.jsonl", [row(number) for number in range(9)])
    assert "Nothing to mend." in render_page(check("good.jsonl"))
    write("bad.jsonl", ['"text"', "{}}"])
    bad = check("bad.jsonl")
    assert (bad.rows, bad.accepted, bad.rejected, bad.tasks) == (2, 0, 2, ())
    assert "2 rows cannot be used" in render_page(bad)


def test_personal_data_is_masked() -> None:
    assert masked("电话13812345678，邮箱abc@example.com。") == "电话▮▮▮，邮箱▮▮▮。"


# ---- lengths ----------------------------------------------------------------------------------------------------


def test_rows_that_would_not_fit_are_counted_in_the_models_tokens(tiny_qwen2_folder: Path) -> None:
    rows = [row(number) for number in range(30)]
    rows[4]["context"] = rows[4]["context"].replace("短文", "短文" * 150)
    write("rows.jsonl", rows)
    recipe = f"model: {tiny_qwen2_folder}\ndata: {{train: rows.jsonl, max_length: 300}}\n"
    Path("r.yaml").write_text(recipe, encoding="utf-8")
    found = check("r.yaml")
    assert {one.limit: one.over for one in found.limits} == {256: 1, 300: 1, 512: 1, 1024: 0, 2048: 0}
    (finding,) = [one for one in found.findings if one.code == "too-long"]
    assert finding.title == "At max_length 300, 1 row would not fit"
    assert finding.sources == ("rows.jsonl:5",)
    assert [one.unit for one in found.lengths] == ["characters", "characters", "tokens"]


@pytest.mark.parametrize("model", ["tiny_qwen2_folder", "tiny_llama_folder"])
def test_counted_tokens_are_those_of_training_to_within_a_few(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    counter, renderer = open_counter(str(folder)), open_renderer(str(folder))
    assert counter is not None
    user, system = Message(role="user", text="小王住在哪里？"), Message(role="system", text="请回答。")
    conversations = [
        (user,), (system, user), (user, Message(role="assistant", text="北京。"), user),
        (system, user, Message(role="assistant", text="北京。"), user),
    ]  # fmt: skip
    if model == "tiny_llama_folder":
        conversations = conversations[:1]
    counts = counter.count([(messages, '["体育"]') for messages in conversations])
    true = [len(renderer.render_example(messages, '["体育"]')) for messages in conversations]
    assert all(abs(count.total - length) <= 2 for count, length in zip(counts, true, strict=True)), (counts, true)


def test_the_replies_that_are_learnt_are_counted_as_training_learns_them(tiny_qwen2_folder: Path) -> None:
    counter, renderer = open_counter(str(tiny_qwen2_folder)), open_renderer(str(tiny_qwen2_folder))
    assert counter is not None
    messages = (
        Message(role="user", text="小王住在哪里？"), Message(role="assistant", text="北京。"),
        Message(role="user", text="她呢？"), Message(role="assistant", text="她住在上海。", learn=False),
        Message(role="user", text="写一个标签。"),
    )  # fmt: skip
    choices: tuple[Literal["flagged", "all", "last"], ...] = ("last", "flagged", "all")
    learnt = [counter.count([(messages, '["体育"]')], turns=turns)[0].learnt for turns in choices]
    reply = Message(role="assistant", text='["体育"]')
    true = [renderer.render_conversation(messages, reply, turns=turns)[0].num_supervised for turns in choices]
    assert learnt == true
    assert learnt[0] < learnt[1] < learnt[2]


def test_without_a_tokenizer_a_limit_counts_characters() -> None:
    write("rows.jsonl", [row(number) for number in range(12)])
    found = check("rows.jsonl", max_length=10)
    assert (found.limits_unit, found.limits[0].over, found.tokenizer) == ("characters", 12, "")
    assert open_counter("nobody/nothing") is None
    assert open_counter("./nowhere") is None


# ---- mending ----------------------------------------------------------------------------------------------------


def test_the_mended_copy_is_listed_and_the_file_stays_as_it_is(broken: str) -> None:
    before = Path(broken).read_bytes()
    result = run_cli(broken, "--fix", "out/mended.jsonl")
    assert result.exit_code == 1, "the file that was checked has errors still"
    assert Path(broken).read_bytes() == before
    lines = Path("out/mended.jsonl").read_text(encoding="utf-8").splitlines()
    changes = [json.loads(line) for line in Path("out/mended.changes.log").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 34 - 3
    assert [(change["row"], change["what"]) for change in changes] == [
        ("rows.jsonl:4", "dropped"), ("rows.jsonl:6", "dropped"), ("rows.jsonl:12", "answer"),
        ("rows.jsonl:31", "dropped"),
    ]  # fmt: skip
    assert "31 rows, 3 rows dropped, 1 answer rewritten; listed in out/mended.changes.log." in result.stderr
    again = {finding.code for finding in check("out/mended.jsonl").findings}
    assert not again & {"bad-row", "repeat", "label-variant"}
    assert again >= {"contradiction", "misfit"}, "these take a person"


def test_several_files_are_mended_into_a_folder_and_leaks_leave_the_train_file() -> None:
    write("train.jsonl", [row(number) for number in range(20)])
    write("dev.jsonl", [row(3), row(30), row(31)])
    subject = find_subject(["train.jsonl", "dev.jsonl"])
    mended = mend_files(subject, check_subject(subject), Path("mended"))
    assert [(str(one.copy), one.rows) for one in mended] == [("mended/train.jsonl", 19), ("mended/dev.jsonl", 3)]
    assert check("mended").ok


def test_nothing_is_ever_overwritten(broken: str) -> None:
    result = run_cli(broken, "--fix", broken)
    assert result.exit_code == 2
    assert "rows.jsonl exists already. Choose another place for --fix" in result.stderr
    assert not list(Path().glob(".tmp-*"))


# ---- the same answer as training, and large files ---------------------------------------------------------------


def test_check_and_training_refuse_the_same_data() -> None:
    rng = random.Random(4)
    changes: list[dict[str, Any]] = [
        {"target": "无"}, {"target": 5}, {"note": "x"}, {"task": "labels"}, {"target": '[ "体育"]'}
    ]  # fmt: skip
    verdicts = set()
    for _ in range(60):
        rows: list[Any] = [row(number) for number in range(24)]
        for _ in range(rng.randint(0, 2)):
            place, what = rng.randrange(24), rng.randrange(len(changes) + 2)
            if what < len(changes):
                rows[place] |= changes[what]
            else:
                rows.append(row(place, rng.choice(LABELS)))
        write("rows.jsonl", rows)
        write("dev.jsonl", [row(rng.choice([3, 40, 41])), row(50)])
        subject = find_subject(["rows.jsonl", "dev.jsonl"])
        try:
            load_dataset(subject.recipe)
            accepted = True
        except DataError:
            accepted = False
        found = check_subject(subject)
        assert found.ok == accepted, [finding.title for finding in found.findings]
        assert found.rows == found.accepted + found.rejected == len(rows) + 2
        verdicts.add(accepted)
    assert verdicts == {True, False}


def test_of_many_rows_tasks_come_from_a_sample_and_every_row_is_still_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "MAX_KEPT", 40)
    rows = [row(number) for number in range(120)]
    write("rows.jsonl", [*rows, rows[7], row(7, "财经"), "{"])
    found = check("rows.jsonl")
    graded = {finding.code: finding.grade for finding in found.findings}
    assert graded["repeat"] == "warning"
    assert graded["contradiction"] == graded["bad-row"] == "error"
    assert (found.rows, found.train) == (123, 122)
    assert sum(one.train for one in found.tasks) == 122


def test_free_text_may_have_several_replies_to_one_input() -> None:
    rows = [{"prompt": f"第{number}个问题是什么？", "response": f"这是第{number}个回答。"} for number in range(12)]
    write("rows.jsonl", [*rows, {"prompt": rows[0]["prompt"], "response": "也可以这样回答。"}])
    subject = find_subject(["rows.jsonl"])
    found = check_subject(subject)
    assert [(finding.code, finding.grade) for finding in found.findings] == [("several-answers", "note")]
    assert len(load_dataset(subject.recipe).train) == 13


def test_every_shared_set_is_read_whole(shared_or_skip: Path) -> None:
    files = sorted(path for path in (shared_or_skip / "data").rglob("*.json*") if path.is_file())
    assert files
    for file in files:
        found = check(str(file))
        assert found.rows == found.accepted + found.rejected > 50, file
        assert found.format not in ("", "mixed", "unknown"), file
        assert found.rejected == 0 or "placeholder" in found.findings[0].details[0], file


def test_a_subject_can_be_made_of_a_recipe_in_python() -> None:
    write("rows.jsonl", [row(number) for number in range(12)])
    subject = find_subject(["rows.jsonl"])
    again = Subject(name="mine", recipe=subject.recipe, is_recipe=True, has_model=False)
    assert check_subject(again).next_command == "weitiao train mine"


def test_the_recipes_options_and_limits_are_those_of_training() -> None:
    rows = [{"instruction": f"你是谁，第{number}次问？", "output": "我是{{name}}。"} for number in range(20)]
    write("rows.jsonl", rows)
    assert check("rows.jsonl").rejected == 20
    recipe = "model: x/y\ndata: {train: [{path: rows.jsonl, limit: 8}], held_out: 0, placeholders: {name: 小微}}\n"
    Path("r.yaml").write_text(recipe, encoding="utf-8")
    found = check("r.yaml")
    assert (found.rejected, found.train) == (0, 8)
    assert [finding.code for finding in found.findings] == ["limited"]
    sources = {record.source for record in load_dataset(find_subject(["r.yaml"]).recipe).train}
    assert {one.source for one in found.samples} <= sources
