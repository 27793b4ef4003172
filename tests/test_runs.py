"""Run folders and contracts: whole files or none, whatever stops the writing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weitiao.contract import Contract
from weitiao.errors import ContractError, RunError
from weitiao.runs import RunFolder, clear_leftovers, write_bytes, write_folder, write_json, write_text


def in_another_process(code: str, *arguments: object) -> int:
    """The exit code of a fresh Python that runs `code`, to see what a sudden death leaves behind."""
    command = [sys.executable, "-c", "import os, sys\nfrom pathlib import Path\nfrom weitiao import runs\n" + code]
    return subprocess.run([*command, *map(str, arguments)], check=False, timeout=50).returncode


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_with(text: str) -> Any:
    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text(text, encoding="utf-8")
        write_text(folder / "b.txt", text)

    return fill


def content(folder: Path) -> tuple[str, str]:
    return (folder / "inner" / "a.txt").read_text(encoding="utf-8"), (folder / "b.txt").read_text(encoding="utf-8")


def disk_full(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


# ---- files -----------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")
    write_json(tmp_path / "a.json", {"名": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"名": [1, None]}
    assert "名" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert names_in(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_half_a_character_does_not_stop_a_report(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "bad \ud83d end")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == r"bad \ud83d end"


def test_a_full_disk_leaves_the_old_file_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "a.bin", b"old")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(RunError) as caught:
        write_bytes(tmp_path / "a.bin", b"new")
    assert str(caught.value) == (
        f"The disk is full: {tmp_path / 'a.bin'} could not be written. What was saved before is whole. "
        f"Free some space, then continue with --resume."
    )
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.bin"]


def test_a_place_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> tuple[int, str]:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".tmp-x"))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(RunError, match=r"^No permission to write \S+\.tmp-x\. Choose another place or its rights\.$"):
        write_text(tmp_path / "a.txt", "new")
    assert names_in(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match="No permission to write"):
            RunFolder.create(tmp_path / "run", resume=False)
    finally:
        tmp_path.chmod(0o700)


def test_a_missing_parent_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a\.txt could not be written: .*No such file"):
        write_text(tmp_path / "none" / "a.txt", "new")


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    code = "os.fsync = lambda descriptor: os._exit(9)\nruns.write_text(Path(sys.argv[1]), 'new')"
    assert in_another_process(code, tmp_path / "a.txt") == 9
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"
    clear_leftovers(tmp_path)
    assert names_in(tmp_path) == ["a.txt"]


# ---- folders ---------------------------------------------------------------------------------------------------


def test_a_folder_is_made_and_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "adapter"
    write_folder(target, fill_with("one"))
    write_folder(target, fill_with("two"))
    assert content(target) == ("two", "two")
    assert names_in(target.parent) == ["adapter"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt(), RunError("inner")])
def test_an_error_while_filling_keeps_the_old_folder(error: BaseException, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half.txt").write_text("half", encoding="utf-8")
        raise error

    write_folder(tmp_path / "adapter", fill_with("old"))
    with pytest.raises(type(error)):
        write_folder(tmp_path / "adapter", fill)
    assert content(tmp_path / "adapter") == ("old", "old")
    assert names_in(tmp_path) == ["adapter"]


def test_a_disk_that_fills_up_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "adapter", fill_with("old"))
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(RunError, match=r"The disk is full: .*Free some space, then continue with --resume\.$"):
        write_folder(tmp_path / "adapter", fill_with("new"))
    assert content(tmp_path / "adapter") == ("old", "old")
    assert names_in(tmp_path) == ["adapter"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "adapter", fill_with("old"))
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(RunError, match=r"could not be written: .*Input/output error"):
        write_folder(tmp_path / "adapter", fill_with("new"))
    assert content(tmp_path / "adapter") == ("old", "old")
    assert names_in(tmp_path) == ["adapter"]


def test_a_process_that_dies_while_filling_keeps_the_old_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", fill_with("old"))
    code = (
        "def fill(folder):\n    (folder / 'half.txt').write_text('half')\n    os._exit(9)\n"
        "runs.write_folder(Path(sys.argv[1]), fill)"
    )
    assert in_another_process(code, tmp_path / "adapter") == 9
    assert content(tmp_path / "adapter") == ("old", "old")
    clear_leftovers(tmp_path)
    assert names_in(tmp_path) == ["adapter"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_process_that_dies_between_the_renames_leaves_one_whole_folder(renames: int, tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", fill_with("old"))
    code = (
        "rename, left = Path.rename, [int(sys.argv[2])]\n"
        "def count(self, target):\n"
        "    rename(self, target)\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os._exit(9)\n"
        "Path.rename = count\n"
        "def fill(folder):\n"
        "    (folder / 'inner').mkdir()\n"
        "    for name in ('inner/a.txt', 'b.txt'): (folder / name).write_text('new')\n"
        "runs.write_folder(Path(sys.argv[1]), fill)"
    )
    assert in_another_process(code, tmp_path / "adapter", renames) == 9
    clear_leftovers(tmp_path)
    assert content(tmp_path / "adapter") == (("old", "old") if renames == 1 else ("new", "new"))
    assert names_in(tmp_path) == ["adapter"]


def test_clearing_leftovers_touches_nothing_else(tmp_path: Path) -> None:
    write_folder(tmp_path / "step-000010", fill_with("whole"))
    write_folder(tmp_path / ".old-step-000020", fill_with("its replacement never came"))
    write_folder(tmp_path / ".old-step-000010", fill_with("replaced"))
    write_folder(tmp_path / ".tmp-abc", fill_with("half"))
    write_text(tmp_path / ".tmp-state.json", "half")
    write_text(tmp_path / "notes.txt", "mine")
    clear_leftovers(tmp_path)
    assert names_in(tmp_path) == ["notes.txt", "step-000010", "step-000020"]
    assert content(tmp_path / "step-000010") == ("whole", "whole")


# ---- the run folder --------------------------------------------------------------------------------------------


def test_a_new_run_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs" / "first", resume=False)
    assert run.checkpoints.is_dir()


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "first", resume=False)
    write_text(run.recipe, "name: first\n")
    with pytest.raises(RunError, match=r"first already holds a run\. Continue it with --resume, .*name=OTHER"):
        RunFolder.create(tmp_path / "first", resume=False)
    assert RunFolder.create(tmp_path / "first", resume=True).path == run.path


def test_a_run_that_never_started_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"There is no run to resume in \S+first\. Start it without --resume\.$"):
        RunFolder.create(tmp_path / "first", resume=True)
    assert names_in(tmp_path) == []


def test_a_run_whose_place_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    with pytest.raises(RunError, match="could not be written"):
        RunFolder.create(tmp_path / "runs" / "first", resume=False)


def test_resuming_clears_what_a_crash_left(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "first", resume=False)
    write_text(run.recipe, "name: first\n")
    write_folder(run.checkpoints / ".tmp-half", fill_with("half"))
    write_folder(run.path / ".old-best", fill_with("best"))
    RunFolder.create(tmp_path / "first", resume=True)
    assert names_in(run.path) == ["best", "checkpoints", "recipe.yaml"]
    assert names_in(run.checkpoints) == []


def test_only_a_finished_run_can_be_opened(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"There is no run folder \S+first\. Runs are made by: weitiao train"):
        RunFolder.open(tmp_path / "first")
    run = RunFolder.create(tmp_path / "first", resume=False)
    with pytest.raises(RunError, match=r"holds no finished run .*--resume$"):
        RunFolder.open(tmp_path / "first")
    write_text(run.contract, "{}")
    run.adapter.mkdir()
    assert RunFolder.open(tmp_path / "first").path == run.path


def test_metrics_read_back_as_they_were_written(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "first", resume=False)
    assert run.read_metrics() == []
    lines = [{"step": step, "task": "情感", "loss": 1 / step} for step in range(1, 5)]
    for line in lines:
        run.append_metrics(line)
    assert run.read_metrics() == lines
    run.rewind_metrics(2)
    assert run.read_metrics() == lines[:2]


def test_a_metrics_line_cut_anywhere_is_left_out(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "first", resume=False)
    run.append_metrics({"step": 1, "task": "情感"})
    whole = run.metrics.read_bytes()
    run.append_metrics({"step": 2, "task": "情感"})
    everything = run.metrics.read_bytes()
    for length in range(len(whole), len(everything) - 1):  # also in the middle of a character
        run.metrics.write_bytes(everything[:length])
        run.rewind_metrics(5)
        run.append_metrics({"step": 3})
        assert run.read_metrics() == [{"step": 1, "task": "情感"}, {"step": 3}]


def test_metrics_on_a_full_disk_are_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    run = RunFolder.create(tmp_path / "first", resume=False)
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(RunError, match="The disk is full"):
        run.append_metrics({"step": 1})


# ---- the contract ----------------------------------------------------------------------------------------------

CONTRACT = Contract(
    base="starter",
    base_fingerprint="b" * 64,
    adapter_fingerprint="a" * 64,
    family="gemma",
    template="{{ 模板 }}",
    stop_ids=(1, 106),
    tasks=({"name": "labels", "form": {"shape": "label"}},),
    decoding={"temperature": 0.0},
    answer_limits={"labels": 12},
    batch_rows=8,
    max_length=2048,
    shorten_input=False,
    data_fingerprint="d" * 64,
    dtype="float32",
    versions={"weitiao": "0.1.0"},
)


def changed(path: Path, **changes: object) -> Path:
    """`CONTRACT` written to `path` with other values; None removes a key."""
    CONTRACT.write(path)
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in values.items() if value is not None})
    return path


def test_a_contract_reads_back_equal(tmp_path: Path) -> None:
    CONTRACT.write(tmp_path / "contract.json")
    assert Contract.read(tmp_path / "contract.json") == CONTRACT


def test_a_missing_contract_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"There is no contract \S+contract\.json\. Only a finished run has one\.$"):
        Contract.read(tmp_path / "contract.json")


@pytest.mark.parametrize("text", ["", '{"version": 1', "[]", "1", '{"version": 1}'])
def test_a_broken_contract_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "contract.json").write_text(text, encoding="utf-8")
    with pytest.raises(ContractError, match=r"^The contract \S+ cannot be read: .*Train the run again\.$"):
        Contract.read(tmp_path / "contract.json")


def test_a_contract_with_missing_or_unknown_parts_names_them(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"cannot be read: .*dtype"):
        Contract.read(changed(tmp_path / "a.json", dtype=None))
    with pytest.raises(ContractError, match=r"cannot be read: .*colour"):
        Contract.read(changed(tmp_path / "b.json", colour="red"))


def test_a_contract_of_another_version_names_who_wrote_it(tmp_path: Path) -> None:
    path = changed(tmp_path / "contract.json", version=2, versions={"weitiao": "9.0"}, unheard_of=1)
    with pytest.raises(ContractError, match=r"version 2, but this weitiao reads version 1\. Use .*wrote it: 9\.0\.$"):
        Contract.read(path)


def test_another_base_model_breaks_the_contract() -> None:
    CONTRACT.require_base("b" * 64, path="starter")
    with pytest.raises(ContractError, match=r"^/other is not the base model .*\(starter\).*cccccccccccc.*bbbbbbbbbbbb"):
        CONTRACT.require_base("c" * 64, path="/other")


def test_another_chat_format_breaks_the_contract() -> None:
    CONTRACT.require_format(template="{{ 模板 }}", stop_ids=(1, 106))
    with pytest.raises(ContractError, match=r"^The chat template of the base model starter changed"):
        CONTRACT.require_format(template="", stop_ids=(1, 106))
    with pytest.raises(ContractError, match=r"^The stop tokens of the base model starter changed"):
        replace(CONTRACT, stop_ids=(1,)).require_format(template="{{ 模板 }}", stop_ids=(1, 106))
