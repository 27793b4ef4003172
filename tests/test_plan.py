"""What a training will take, foretold before it starts: counted without a model, probed with one, never written."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from weitiao import probe
from weitiao.check.checkup import Checkup
from weitiao.check.examine import check_subject, find_subject
from weitiao.check.page import render_page
from weitiao.check.plan import Forecast, Memory, Plan, Times, memory_finding, tell_seconds
from weitiao.cli import app
from weitiao.errors import RunError
from weitiao.recipe import Train, load_recipe
from weitiao.render.base import Example
from weitiao.train import loop as loop_module
from weitiao.train import memory as memory_module
from weitiao.train import plan as plan_module
from weitiao.train import scoring as scoring_module
from weitiao.train.memory import limit_bytes, peak_bytes
from weitiao.train.step import Setup, pass_sizes, step_batches, take_step
from weitiao.tune import prepare, tune_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_module, "_matrix_peak", lambda dtype, device: 1e10)  # else a fifth of a second each time
    monkeypatch.setattr(scoring_module, "draw_curve", lambda path, metrics: path.write_bytes(b"no curve"))


@pytest.fixture
def recipe(sample_rows: Path, tiny_qwen2_folder: Path) -> str:
    """recipe.yaml: two epochs over the sample rows, a price."""
    values = {
        "model": {"path": str(tiny_qwen2_folder), "dtype": "float32"},
        "data": {"train": str(sample_rows)},
        "train": {"epochs": 2, "batch_size": 4, "compile": "never", "price_per_hour": 5.98},
        "generate": {"max_new_tokens": 8},
    }
    Path("recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    return "recipe.yaml"


def check(*words: str) -> Checkup:
    return check_subject(find_subject(words))


def forecast(*words: str) -> Checkup:
    subject = find_subject(words)
    return probe.add_forecast(subject, check_subject(subject))


def run_cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments], catch_exceptions=False)


# ---- counted without a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("tiny_llama_folder", ()),
        ("tiny_qwen2_folder", ("data.train.weight=0.5", "train.epochs=2.5", "train.batch_size=3")),
        ("tiny_qwen2_folder", ("data.train.weight=2", "data.train.limit=13", "data.held_out=0")),
        ("tiny_qwen2_folder", ("data.overlong=drop", "data.max_length=90")),
        ("tiny_qwen2_folder", ("data.overlong=shorten_input", "data.max_length=165")),
    ],
)
def test_steps_are_those_of_training_and_tokens_nearly(
    model: str, changes: tuple[str, ...], recipe: str, request: pytest.FixtureRequest
) -> None:
    words = (f"model.path={request.getfixturevalue(model)}", *changes)
    plan = check(recipe, *words).plan
    assert plan is not None
    assert plan.work is not None
    loaded = load_recipe(recipe, words)
    prepared = prepare(loaded, console=Console(file=io.StringIO()))
    rows, weights = prepared.train_rows.examples, prepared.weights
    true = plan_module.make_plan(prepared.model.get_base_model(), rows, weights, loaded.train)
    assert (plan.work.rows, plan.work.steps) == (true.rows, true.steps)
    assert plan.work.tokens_per_epoch == pytest.approx(true.tokens_per_epoch, rel=0.03)
    assert plan.work.learnt_per_epoch == pytest.approx(true.supervised_per_epoch, rel=0.03)
    assert abs(plan.work.longest - true.longest) <= 3


def test_the_plan_is_printed_and_stands_in_json_and_on_the_page(recipe: str) -> None:
    printed = run_cli(recipe).stdout
    assert "training: 22 rows of about " in printed
    assert "2 epochs are 12 optimiser steps of 4 rows" in printed
    assert "memory:" not in printed, "nothing was measured"
    found = json.loads(run_cli(recipe, "--json").stdout)["plan"]
    assert (found["rows"], found["steps"], found["exact"]) == (22, 12, False)
    assert (found["memory"], found["seconds"], found["cost"]) == (None, None, None)
    assert "12 optimiser steps" in render_page(check(recipe))


def test_without_a_recipe_there_is_no_plan(sample_rows: Path) -> None:
    assert check(str(sample_rows)).plan is None
    assert json.loads(run_cli(str(sample_rows), "--json").stdout)["plan"] is None
    result = run_cli(str(sample_rows), "--plan")
    assert result.exit_code == 2
    assert "A plan needs a recipe" in result.stderr


@pytest.mark.parametrize(("policy", "grade"), [("error", "error"), ("drop", "warning"), ("shorten_input", "warning")])
def test_rows_too_long_are_an_error_where_training_would_stop(policy: str, grade: str, recipe: str) -> None:
    (finding,) = (
        one for one in check(recipe, "data.max_length=60", f"data.overlong={policy}").findings if one.code == "too-long"
    )
    assert finding.grade == grade


def test_a_limit_that_is_only_asked_about_is_no_error_and_hides_none(recipe: str) -> None:
    subject = find_subject([recipe, "data.max_length=60"])
    graded = {one.title: one.grade for one in check_subject(subject, max_length=50).findings if one.code == "too-long"}
    assert [(title[:17], grade) for title, grade in graded.items()] == [
        ("At max_length 60,", "error"), ("At max_length 50,", "warning"),
    ]  # fmt: skip


# ---- probed with the model ----------------------------------------------------------------------------------------


def test_a_probe_foretells_memory_time_and_cost_and_writes_nothing(recipe: str) -> None:
    before = sorted(Path().rglob("*"))
    result = run_cli(recipe, "--plan", "--json")
    assert sorted(Path().rglob("*")) == before
    assert result.exit_code == 0
    found = json.loads(result.stdout)["plan"]
    assert found["exact"] is True
    assert found["device"] == "CPU"
    memory, seconds = found["memory"], found["seconds"]
    assert 2**27 < memory["bytes"] < memory["limit"]
    assert memory["measured"] is True
    assert seconds["scorings"] == 2
    assert seconds["all"] == pytest.approx(seconds["steps"] + seconds["scoring"])
    assert found["cost"] == pytest.approx(seconds["all"] / 3600 * 5.98)
    assert seconds["compiled_steps"] is None


def test_the_terminal_and_the_page_tell_what_was_foretold(recipe: str) -> None:
    result = run_cli(recipe, "--plan", "--html", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    for text in (result.stdout, page):
        for words in ("GB at the peak, of ", "for the steps, ", "for 2 scorings", "at ¥5.98 an hour"):
            assert words in text


def test_the_steps_of_a_probe_are_those_of_training(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []

    def take(setup: Setup, batches: Any, settings: Train) -> Any:
        taken.append([batch.token_ids.shape[1] for batch in batches])
        return take_step(setup, batches, settings)

    monkeypatch.setattr(probe, "take_step", take)
    monkeypatch.setattr(loop_module, "take_step", take)
    # with never no other passes are tried beside the recipe's own
    forecast(recipe, "train.tokens_per_pass=200", "train.evaluate_every=never", "train.fit_memory=never")
    probed, taken = taken, []
    tune_model(
        load_recipe(recipe, ["name=run", "train.tokens_per_pass=200", "train.evaluate_every=never"]),
        console=Console(file=io.StringIO()),
    )
    assert len(probed) == 3
    first_epoch = taken[:6]
    assert all(step in first_epoch for step in probed)
    assert max(probed[0]) == max(max(step) for step in first_epoch)


def test_rows_with_errors_are_not_probed(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "foretell", lambda *_: pytest.fail("the model was loaded"))
    result = run_cli(recipe, "--plan", "data.max_length=60")
    assert result.exit_code == 1
    assert "No steps were taken" in result.stderr


@pytest.mark.parametrize(
    ("limit", "never_called"), [(1000, "prepare"), (2**28, "take_step")], ids=["the weights alone", "the estimate"]
)
def test_what_cannot_fit_is_not_tried_and_ends_with_1(
    limit: int, never_called: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "limit_bytes", lambda device: limit)
    monkeypatch.setattr(probe, never_called, lambda *_, **__: pytest.fail("there was no room for it"))
    result = run_cli(recipe, "--plan", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    (finding,) = (one for one in found["findings"] if one["code"] == "memory")
    assert "Estimated: there was no room for a step (CPU)." in finding["message"]
    assert "train.tokens_per_pass (now 1536" in finding["fix"]
    assert "train.gradient_checkpointing=true" in finding["fix"]
    assert (found["plan"]["memory"]["measured"], found["plan"]["seconds"]) == (False, None)


def test_memory_that_runs_out_in_a_step_is_a_finding_and_other_faults_stay_faults(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(message: str) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(probe, "take_step", lambda *_: fail("DefaultCPUAllocator: can't allocate memory"))
    assert [one.code for one in forecast(recipe).of_grade("error")] == ["memory"]
    monkeypatch.setattr(probe, "take_step", lambda *_: fail("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        forecast(recipe)


def test_enough_memory_is_no_finding_and_cures_already_taken_are_not_named() -> None:
    def plan(peak: int) -> Plan:
        memory = Memory(bytes=peak, limit=2**30, measured=True)
        return Plan(forecast=Forecast(device="CPU", memory=memory, times=None))

    assert memory_finding(plan(2**30), Train()) is None
    finding = memory_finding(plan(2**31), Train(gradient_checkpointing=True))
    assert finding is not None
    assert "about 2.0 GB at the peak, of 1.0 GB to be had" in finding.title
    assert "gradient_checkpointing" not in finding.fix


@pytest.mark.parametrize(
    "changes",
    [
        ("train.epochs=2.5",), ("train.evaluate_every=4",), ("train.evaluate_every=5", "train.epochs=1"),
        ("train.evaluate_every=never",),
    ],
)  # fmt: skip
def test_scorings_are_counted_as_training_has_them(changes: tuple[str, ...], recipe: str) -> None:
    loaded = load_recipe(recipe, ["train.evaluate_rows=1", *changes])
    run = tune_model(loaded, console=Console(file=io.StringIO()))
    lines = run.read_metrics()
    steps = max(line["step"] for line in lines)
    assert probe._count_scorings(loaded.train, steps) == sum(line["kind"] == "dev" for line in lines)


def test_answers_take_places_as_others_end() -> None:
    assert probe._count_decode_steps([5, 3, 4], 3) == 5
    assert probe._count_decode_steps([5, 3, 4], 2) == 7
    assert probe._count_decode_steps([5, 3, 4], 1) == 12


# ---- figures ------------------------------------------------------------------------------------------------------


def test_times_are_told_with_and_without_compiling() -> None:
    times = Times(steps=1200, compiled_steps=900, compiles=False, scorings=3, scoring=180)
    assert times.describe() == "23 min: 20 min for the steps, 3.0 min for 3 scorings; 18 min with torch.compile"
    compiled = Times(steps=1200, compiled_steps=900, compiles=True, scorings=0, scoring=0)
    assert compiled.describe() == "15 min: 15 min for the steps, no scoring; 20 min without torch.compile"
    assert Times(steps=60, compiled_steps=None, compiles=False, scorings=1, scoring=6).all == 66


def test_seconds_are_told_to_two_figures() -> None:
    told = [tell_seconds(number) for number in (0.31, 48, 200, 1200, 5000, 90000)]
    assert told == ["0.3 s", "48 s", "3.3 min", "20 min", "1.4 h", "25 h"]


def test_memory_is_asked_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peak = peak_bytes(CPU)
    block = torch.ones(2**26)  # 256 MB
    assert peak_bytes(CPU) >= max(peak, block.nbytes)
    assert limit_bytes(CPU) > block.nbytes
    monkeypatch.setattr(memory_module, "_CGROUP_LIMITS", (tmp_path / "max", tmp_path / "none"))
    (tmp_path / "max").write_text("12345\n", encoding="utf-8")
    assert limit_bytes(CPU) == 12345
    (tmp_path / "max").write_text("max\n", encoding="utf-8")
    assert limit_bytes(CPU) > 2**28


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=9),
    tokens_per_pass=st.integers(16, 500),
    packing=st.booleans(),
)
def test_the_sizes_of_passes_are_foretold(lengths: list[int], tokens_per_pass: int, packing: bool) -> None:
    settings = Train(tokens_per_pass=tokens_per_pass, packing=packing)
    rows = [Example(token_ids=(7,) * length, loss_mask=(False,) * (length - 1) + (True,)) for length in lengths]
    batches = step_batches(rows, [""] * len(rows), settings, CPU)
    assert [batch.token_ids.shape[1] for batch in batches] == pass_sizes(lengths, settings)


# ---- a step whose float16 gradients overflow -----------------------------------------------------------------------


class _Scaled(nn.Module):
    """A loss whose gradient is `slope`: times a loss scale of 65,536 it overflows float16's range or does not."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.slope = slope

    def forward(self, batch: Any, losses: torch.Tensor) -> torch.Tensor:
        return _Half.apply(self.weight) * self.slope + 1  # type: ignore[no-any-return, no-untyped-call]


class _Half(torch.autograd.Function):
    """The identity, its gradient rounded to float16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.half().float()


def scaled_setup(slope: float) -> Setup:
    """A setup as Accelerate makes one for float16 on a GPU: its own optimiser wrapper around torch's own loss scale."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    model = _Scaled(slope)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(inner, total_iters=10)
    optimiser = AcceleratedOptimizer(inner, device_placement=False, scaler=accelerator.scaler)
    accelerator._optimizers.append(optimiser)
    return Setup(trained=model, optimiser=optimiser, scheduler=scheduler, accelerator=accelerator)  # type: ignore[arg-type]


def test_overflowing_float16_steps_are_skipped_until_the_scale_fits() -> None:
    setup = scaled_setup(slope=8.0)
    batch = step_batches([Example(token_ids=(1, 2), loss_mask=(False, True))], [""], Train(), CPU)
    norms, rates = [], []
    try:
        for _ in range(6):
            _, norm, _ = take_step(setup, batch, Train())
            norms.append(norm)
            rates.append(setup.scheduler.get_last_lr()[0])
    finally:
        AcceleratorState._reset_state(True)
    skipped = [not math.isfinite(norm) for norm in norms]
    assert skipped == [True] * 4 + [False] * 2, "65,536 · 8 / 2⁴ is the first below 65,504"
    assert rates[:4] == [rates[0]] * 4, "a skipped step is none for the schedule"
    assert rates[4] != rates[3]
    assert setup.trained.weight.item() != 0


def test_overflow_that_no_scale_ends_is_divergence() -> None:
    setup = scaled_setup(slope=1e6)
    batch = step_batches([Example(token_ids=(1, 2), loss_mask=(False, True))], [""], Train(), CPU)
    taken = 0
    try:
        with pytest.raises(RunError, match="training has diverged"):
            for taken in range(100):  # noqa: B007
                take_step(setup, batch, Train())
    finally:
        AcceleratorState._reset_state(True)
    assert taken == 16
