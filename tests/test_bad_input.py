"""Bad rows, recipes, models and disks, and Ctrl-C: each ends in a sentence, with nothing left half-done."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from weitiao.cli import app
from weitiao.dataset import load_dataset
from weitiao.recipe import load_recipe
from weitiao.runs import RunFolder
from weitiao.train import plan as plan_module
from weitiao.train import scoring as scoring_module
from weitiao.train.checkpoint import list_checkpoints

TRAIN = {
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "log_every": 1,
    "save_every": 5,
    "evaluate_every": "never",
    "compile": "never",
}


@pytest.fixture(autouse=True)
def work(tmp_path: Path, sample_rows: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with rows.jsonl and a recipe.yaml for a run named tiny that takes 12 short steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_module, "_matrix_peak", lambda dtype, device: 1e10)
    model = {"path": str(tiny_llama_folder), "dtype": "float32"}
    recipe = {"name": "tiny", "model": model, "data": {"train": "rows.jsonl"}, "train": TRAIN}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def refuse(*arguments: object) -> str:
    """The sentences of a command that ended with code 2, or of a check with 1, and left no run behind."""
    result = run_cli(*arguments)
    examined = arguments[0] == "check" and "Not ready to train: " in result.stdout
    assert result.exit_code == (1 if examined else 2), result.output
    assert "Traceback" not in result.output
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
    return result.stdout if examined else result.stderr


def leftovers(folder: Path) -> list[Path]:
    return [*folder.rglob(".tmp-*"), *folder.rglob(".old-*")]


def read_rows() -> list[str]:
    return Path("rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)


def write_rows(lines: list[str]) -> None:
    Path("rows.jsonl").write_text("".join(lines), encoding="utf-8")


def change_row(number: int, change: Callable[[dict[str, object]], object]) -> None:
    """Change line `number` (from 1) of rows.jsonl in place."""
    lines = read_rows()
    row = json.loads(lines[number - 1])
    change(row)
    lines[number - 1] = json.dumps(row, ensure_ascii=False) + "\n"
    write_rows(lines)


VERBS = pytest.mark.parametrize("verb", ["check", "train"])


# --- Files of rows ---------------------------------------------------------------------------------------------------


@VERBS
def test_a_missing_file_is_named_with_its_nearest_neighbour(verb: str) -> None:
    assert "rowz.jsonl does not exist. Did you mean rows.jsonl?" in refuse(verb, "recipe.yaml", "data.train=rowz.jsonl")


@VERBS
def test_a_bad_row_in_a_folder_is_named_with_its_file_and_line(verb: str, work: Path) -> None:
    (work / "data").mkdir()
    (work / "data" / "a.jsonl").write_text("{}", encoding="utf-8")
    assert "data/a.jsonl:1: row: has no keys" in refuse(verb, "recipe.yaml", "data.train=data")


@VERBS
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(verb: str, content: str) -> None:
    Path("rows.jsonl").write_text(content, encoding="utf-8")
    assert "rows.jsonl holds no rows. Write one JSON object per line." in refuse(verb, "recipe.yaml")


def test_a_byte_order_mark_and_windows_line_ends_change_nothing() -> None:
    plain = load_dataset(load_recipe("recipe.yaml")).fingerprint
    data = Path("rows.jsonl").read_bytes()
    for other in (b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")):
        Path("rows.jsonl").write_bytes(other)
        result = run_cli("check", "recipe.yaml")
        assert result.exit_code == 0, result.stderr
        assert "No problems in 22 train and 2 dev rows." in result.stdout
        assert load_dataset(load_recipe("recipe.yaml")).fingerprint == plain


@VERBS
def test_one_broken_line_among_many_is_named_with_its_place(verb: str) -> None:
    lines = read_rows()
    lines[6] = lines[6].rstrip()[:-1] + "\n"
    write_rows(lines)
    sentences = refuse(verb, "recipe.yaml")
    assert "rows.jsonl: 1 of 24 rows cannot be used." in sentences
    assert re.search(r"rows\.jsonl:7: row: is not JSON: .* at column \d+, where the line ends\. Fix: Write", sentences)


@VERBS
def test_a_row_without_target_is_named(verb: str) -> None:
    change_row(3, lambda row: row.pop("target"))
    assert "rows.jsonl:3: target: is missing. Fix: Add `target` as a string." in refuse(verb, "recipe.yaml")


@VERBS
def test_a_number_is_no_target(verb: str) -> None:
    change_row(24, lambda row: row.update(target=5))
    sentences = refuse(verb, "recipe.yaml")
    assert 'rows.jsonl:24: target: is a number (`5`), not text. Fix: Write it as a string: "5".' in sentences


@VERBS
def test_every_bad_row_is_named_at_once(verb: str) -> None:
    for number in (2, 5, 11, 20):
        change_row(number, lambda row: row.pop("context"))
    sentences = refuse(verb, "recipe.yaml")
    assert re.findall(r"rows\.jsonl:(\d+): ", sentences) == ["2", "5", "11", "20"]
    assert "4 of 24 rows" in sentences


@VERBS
def test_every_bad_file_is_named_at_once(verb: str, work: Path) -> None:
    change_row(2, lambda row: row.pop("context"))
    (work / "dev.jsonl").write_text("", encoding="utf-8")
    sentences = refuse(verb, "recipe.yaml", "data.train=[rows.jsonl, gone.jsonl]", "data.dev=dev.jsonl")
    assert "rows.jsonl: 1 of 24 rows cannot be used." in sentences
    assert "rows.jsonl:2: row: has the keys `target`" in sentences
    assert "gone.jsonl does not exist." in sentences
    assert "dev.jsonl holds no rows." in sentences


def test_brackets_in_paths_and_labels_are_printed_as_they_are(work: Path) -> None:
    """The console's own markup must not swallow them or trip over them."""
    change_row(2, lambda row: row.pop("context"))
    Path("rows.jsonl").rename("rows[b]:cat:.jsonl")
    assert "rows[b]:cat:.jsonl:2: row:" in refuse("check", "recipe.yaml", "data.train='rows[b]:cat:.jsonl'")
    write_rows([
        json.dumps({"context": f"Instruction: I\nInput: Q\n\n{i}\nAnswer: ", "target": ["[/b]", "[red]"][i % 2]}) + "\n"
        for i in range(20)
    ])  # fmt: skip
    assert "out of 2: [/b], [red]" in run_cli("check", "recipe.yaml").stdout
    result = run_cli("train", "recipe.yaml", "train.epochs=0.2")
    assert result.exit_code == 0
    assert "out of 2: [/b], [red]" in result.stderr


def test_a_list_as_target_is_learnt_in_the_form_of_the_other_rows() -> None:
    lines = read_rows()
    fenced = json.loads(lines[12])["target"]
    assert fenced.startswith("```json\n[{")
    change_row(13, lambda row: row.update(target=json.loads(fenced.strip("`").removeprefix("json"))))
    result = run_cli("check", "recipe.yaml")
    assert result.exit_code == 0, result.stderr
    dataset = load_dataset(load_recipe("recipe.yaml", ["data.held_out=0"]))
    assert isinstance(dataset.train[12].target, list)
    assert dataset.train_tasks[12].write_target(dataset.train[12]) == fenced


def test_objects_as_targets_are_learnt_with_their_keys_in_one_order() -> None:
    answers = [{"a": i, "b": "x"} if i % 5 else {"b": "y", "a": i} for i in range(20)]
    rows = [{"context": f"Instruction: I\nInput: Q\n\n{i}\nAnswer: ", "target": a} for i, a in enumerate(answers)]
    write_rows([json.dumps(row) + "\n" for row in rows])
    result = run_cli("show", "recipe.yaml", "data.held_out=0", "-n", 1)
    assert result.exit_code == 0, result.stderr
    assert '{"a": 0, "b": "y"}' in result.stdout


@VERBS
def test_two_answers_to_one_input_contradict_each_other(verb: str) -> None:
    lines = read_rows()
    row = json.loads(lines[0])
    write_rows([*lines, json.dumps({**row, "target": '["科技"]'}, ensure_ascii=False) + "\n"])
    sentences = refuse(verb, "recipe.yaml", "data.held_out=0")
    assert "rows.jsonl:25: " in sentences
    assert """'["科技"]' answers the input of rows.jsonl:1, which is answered '["体育"]' there.""" in sentences
    assert "Keep the right one of the two rows." in sentences


@VERBS
def test_dev_rows_that_are_also_trained_on_are_refused(verb: str, work: Path) -> None:
    (work / "dev.jsonl").write_text("".join(read_rows()[3:5]), encoding="utf-8")
    sentences = refuse(verb, "recipe.yaml", "data.dev=dev.jsonl")
    for dev, train in ((1, 4), (2, 5)):
        assert f"dev.jsonl:{dev}: " in sentences
        assert f"This dev row has the same input as the train row rows.jsonl:{train}." in sentences
    assert "Remove it from one of the two files." in sentences


@VERBS
def test_an_answer_without_the_form_of_the_others_is_named(verb: str) -> None:
    change_row(20, lambda row: row.update(target='```json\n[{"subject": "a", "predicat": "b", "object": "c"}]\n```'))
    sentences = refuse(verb, "recipe.yaml")
    assert "rows.jsonl:20: " in sentences
    assert "The answer does not have the form of the other triples answers" in sentences
    assert "Mend the answer" in sentences


def test_rows_longer_than_the_limit_are_named_with_their_sizes() -> None:
    lengths = {}
    sentences = refuse("train", "recipe.yaml", "data.max_length=60")
    sizes = re.compile(r"  rows\.jsonl:(\d+): (?:target|text): (\d+) tokens: (\d+) of prompt, (\d+) of answer;")
    for line in sentences.splitlines():
        if found := sizes.match(line):
            number, whole, prompt, answer = found.groups()
            lengths[int(number)] = int(whole)
            assert int(prompt) + int(answer) == int(whole) > 60
            assert f"Fix: Set data.max_length={whole} or more" in line
    assert len(lengths) > 3
    assert refuse("train", "recipe.yaml", f"data.max_length={max(lengths.values()) - 1}").count("rows.jsonl:") == 1


# --- Recipes and models ----------------------------------------------------------------------------------------------


@VERBS
def test_an_unknown_key_is_refused_with_the_nearest_known_one(verb: str) -> None:
    assert "train.epoch: there is no such key. Did you mean epochs?" in refuse(verb, "recipe.yaml", "train.epoch=3")
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    Path("recipe.yaml").write_text(text.replace("batch_size", "batch"), encoding="utf-8")
    sentences = refuse(verb, "recipe.yaml", "train.colour=red")
    assert "recipe.yaml cannot be used as written" in sentences
    assert "train.batch: there is no such key. Did you mean batch_size?" in sentences
    assert "train.colour: there is no such key. Known keys: epochs," in sentences


@VERBS
def test_a_recipe_that_is_missing_or_not_yaml_is_refused(verb: str, work: Path) -> None:
    assert "There is no recipe none.yaml." in refuse(verb, "none.yaml")
    (work / "broken.yaml").write_text("model: [", encoding="utf-8")
    assert "broken.yaml is not YAML" in refuse(verb, "broken.yaml")
    (work / "text.yaml").write_text("just text", encoding="utf-8")
    assert "must hold keys such as model: and data:" in refuse(verb, "text.yaml")


@VERBS
def test_a_value_of_the_wrong_kind_is_named(verb: str) -> None:
    sentences = refuse(verb, "recipe.yaml", "train.epochs=many", "train.batch_size=0", "method.rank=2.5")
    for place in ("train.epochs", "train.batch_size", "method.rank"):
        assert f"  {place}: " in sentences
    assert "(found 'many')" in sentences


@pytest.mark.parametrize("path", ["./none", "none", "/none/of/this"])
def test_a_model_that_is_not_there_is_refused(path: str) -> None:
    sentences = refuse("train", "recipe.yaml", f"model.path={path}")
    assert f"There is no model folder {path}. Give a folder with a config.json" in sentences


def test_a_folder_without_a_model_is_refused(work: Path) -> None:
    assert "holds no model: it has no config.json" in refuse("train", "recipe.yaml", f"model.path={work}")


@pytest.mark.parametrize("kept", [0, 7, 200, 20_000, -4])
def test_weights_cut_short_are_refused(kept: int, work: Path, tiny_llama_folder: Path) -> None:
    model = shutil.copytree(tiny_llama_folder, work / "model")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:kept])
    sentences = refuse("train", "recipe.yaml", f"model.path={model}")
    assert f"The model in {model} cannot be loaded" in sentences
    assert "A file may be cut short or missing" in sentences


# --- Disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond `num_bytes` in this process: writing on fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_same_adapter_as_never_stopped(*overrides: str) -> None:
    assert run_cli("train", "recipe.yaml", *overrides, "name=whole").exit_code == 0
    found = [Path(f"runs/{name}/adapter/adapter_model.safetensors").read_bytes() for name in ("tiny", "whole")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("limit", "overrides", "file"),
    [
        (30_000, (), "checkpoints/step-000005"),  # the checkpoint's weights
        (100_000, (), "checkpoints/step-000005"),  # its optimiser
        (30_000, ("train.evaluate_every=3",), "best"),
        (12_000, ("method.rank=1", "method.targets=[q_proj]"), "adapter"),  # the tokenizer
    ],
)
def test_a_file_that_cannot_grow_ends_training_in_a_sentence_and_it_can_be_resumed(
    limit: int, overrides: tuple[str, ...], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_module, "draw_curve", lambda path, metrics: path.write_bytes(b"no curve"))
    with largest_file(limit):
        result = run_cli("train", "recipe.yaml", *overrides)
    assert result.exit_code == 2, result.output
    assert f"runs/tiny/{file} could not be written: [Errno 27] File too large." in result.stderr
    assert not leftovers(Path("runs"))
    assert not Path("runs/tiny/contract.json").exists()
    result = run_cli("train", "recipe.yaml", *overrides, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_adapter_as_never_stopped(*overrides)


def test_a_curve_that_cannot_be_written_ends_in_a_sentence() -> None:
    with largest_file(12_000):
        result = run_cli("train", "recipe.yaml", "method.rank=1", "method.targets=[q_proj]", "train.epochs=0.2")
    assert result.exit_code == 2, result.output
    assert "runs/tiny/curve.png could not be written" in result.stderr
    assert not leftovers(Path("runs"))


@pytest.fixture
def small_disk(work: Path) -> Iterator[Path]:
    """runs/ on a disk of 400 kB; skips where disks may not be mounted."""
    folder = work / "runs"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_training_in_a_sentence_and_with_more_space_it_goes_on(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(50_000))
    overrides = ("train.save_every=1",)
    result = run_cli("train", "recipe.yaml", *overrides)
    assert result.exit_code == 2, result.output
    assert "The disk is full: runs/tiny/" in result.stderr
    assert "What was saved before is whole. Free some space, then continue with --resume." in result.stderr
    assert list_checkpoints(RunFolder("runs/tiny")), "at least one checkpoint fits"
    assert not leftovers(small_disk)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    result = run_cli("train", "recipe.yaml", *overrides, "--resume")
    assert result.exit_code == 0, result.output
    assert "Going on from step" in result.stderr
    assert_same_adapter_as_never_stopped(*overrides)


def test_a_place_that_may_not_be_written_is_named(work: Path) -> None:
    """Even root may not make a folder in /sys."""
    if not Path("/sys/kernel").is_dir():
        pytest.skip("there is no /sys on this system")
    Path("runs").symlink_to("/sys/kernel")
    result = run_cli("train", "recipe.yaml")
    assert result.exit_code == 2, result.output
    assert "No permission to write runs/tiny" in result.stderr
    assert "Choose another place" in result.stderr


def test_a_file_in_the_place_of_the_runs_folder_is_named() -> None:
    Path("runs").write_text("", encoding="utf-8")
    result = run_cli("train", "recipe.yaml")
    assert result.exit_code == 2, result.output
    assert "runs/tiny could not be written" in result.stderr
    result = run_cli("init", "rows.jsonl", "-o", "runs/recipe.yaml")
    assert result.exit_code == 2, result.output
    assert "runs/recipe.yaml could not be written" in result.stderr


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@contextmanager
def training_process(*overrides: str) -> Iterator[subprocess.Popen[str]]:
    """`weitiao train recipe.yaml` as a process of its own, ended in any case."""
    command = [sys.executable, "-m", "weitiao", "train", "recipe.yaml", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end, f"waited two minutes for {what}"
        time.sleep(0.01)


def num_logged() -> int:
    path = Path("runs/tiny/metrics.jsonl")
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def test_ctrl_c_saves_and_leaves_with_code_130() -> None:
    with training_process("train.epochs=200") as process:
        wait_until(lambda: num_logged() >= 3, "the third step")
        process.send_signal(signal.SIGINT)
        _, sentences = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in sentences
    found = re.search(r"Saved at step (\d+) of 1200\. Continue with --resume\.", sentences)
    assert found is not None
    [checkpoint] = list_checkpoints(RunFolder("runs/tiny"))[-1:]
    assert checkpoint.name == f"step-{int(found[1]):06}"
    assert num_logged() == int(found[1])
    assert not leftovers(Path("runs"))


def test_ctrl_c_twice_leaves_in_the_middle_of_a_step_and_the_last_checkpoint_stands() -> None:
    """A step of two thousand rows takes far longer than the second and a half before the second Ctrl-C."""
    long_steps = ("data.train=[{path: rows.jsonl, weight: 100}]", "train.batch_size=2000", "train.save_every=1")
    with training_process(*long_steps) as process:
        wait_until(lambda: Path("runs/tiny/metrics.jsonl").exists(), "the first step to begin")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, sentences = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Press it again to leave at once." in sentences
    assert "Traceback" not in sentences
    assert "Saved at step" not in sentences
    assert list_checkpoints(RunFolder("runs/tiny")) == []
    assert not leftovers(Path("runs"))
