"""A training made to fit into the memory there is: what is foretold of passes, what is changed, and that it is said."""

from __future__ import annotations

import io
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tuned_models import FAMILIES, METHODS, eight_rows, fresh, set_up_for, settings_for
from weitiao.models.adapters import base_model
from weitiao.recipe import Full, Lora, Recipe, Train, make_recipe
from weitiao.render.base import Example
from weitiao.runs import RunFolder
from weitiao.train import fitting
from weitiao.train import footprint as footprint_module
from weitiao.train import scoring as scoring_module
from weitiao.train.checkpoint import list_checkpoints, read_progress
from weitiao.train.fitting import largest_pass, measure_need, try_settings
from weitiao.train.footprint import Footprint, measure_footprint
from weitiao.train.memory import limit_bytes
from weitiao.train.memory_needs import gradient_bytes, needed_bytes, state_bytes
from weitiao.train.optimisers import make_optimiser
from weitiao.train.step import Setup, step_batches, take_step
from weitiao.tune import tune_model
from weitiao.tuning.methods import add_adapter

CPU = torch.device("cpu")
MB = 1 << 20


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring_module, "draw_curve", lambda path, metrics: path.write_bytes(b"no curve"))


def rows_of(*lengths: int) -> list[Example]:
    return [
        Example(
            token_ids=tuple(5 + (7 * number + place) % 40 for place in range(length)),
            loss_mask=(False,) * (length - 2) + (True,) * 2,
        )
        for number, length in enumerate(lengths)
    ]


def setup_of(family: str = "qwen2", method: str = "lora", **changes: object) -> tuple[Setup, Train]:
    settings = settings_for(method).model_copy(update=changes)
    return set_up_for(add_adapter(fresh(family), METHODS[method], seed=0), settings), settings


# ---- what a pass takes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_measured_pass_leaves_nothing_behind(family: str) -> None:
    setup, _ = setup_of(family)
    rows = eight_rows(family)
    before = {name: p.detach().clone() for name, p in setup.trained.named_parameters()}
    state = torch.get_rng_state()
    found = measure_footprint(setup.trained, rows)
    assert found.per_token > 0
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in setup.trained.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_computing_layers_once_more_takes_less_for_every_token() -> None:
    rows = rows_of(60, 64, 64)
    per_token = {}
    for mode in (False, "selective", True):
        setup, _ = setup_of(gradient_checkpointing=mode)
        footprint = measure_footprint(setup.trained, rows)
        per_token[mode] = footprint.per_token
    assert per_token[True] < per_token["selective"] < per_token[False]


def test_what_a_pass_takes_is_linear_in_its_tokens() -> None:
    found = Footprint(fixed=100, per_token=2.0)
    assert found.bytes_of(50) == 200
    assert found.tokens_in(200) == 50
    assert found.tokens_in(99) == 0


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "schedule_free_adamw", "adamw_8bit"])
def test_what_an_optimiser_keeps_is_foretold(name: str) -> None:
    if name == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    settings = settings_for("full").model_copy(update={"optimiser": name, "learning_rate": 1e-4})
    model = add_adapter(fresh("qwen2"), Full(), seed=0)
    foretold = state_bytes(base_model(model), settings)
    optimiser = make_optimiser(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    parts = getattr(optimiser, "parts", (optimiser,))
    kept = {
        id(value): value.nbytes
        for part in parts
        for state in part.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and value.numel() != 256  # a map of 8 bits, shared
    }
    assert foretold == pytest.approx(sum(kept.values()), rel=0.05)


def test_gradients_freed_in_the_backward_pass_are_not_all_there() -> None:
    model = base_model(add_adapter(fresh("qwen2"), Full(), seed=0))
    largest = max(p.numel() for p in model.parameters())
    assert gradient_bytes(model, Train()) == 4 * sum(p.numel() for p in model.parameters())
    assert gradient_bytes(model, Train(update_in_backward=True, max_grad_norm=None)) == 4 * largest


def test_arithmetic_counts_what_checkpointed_layers_keep() -> None:
    model = base_model(add_adapter(fresh("qwen2"), Lora(rank=2), seed=0))
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size

    def grown(mode: bool | str) -> float:
        settings = Train(gradient_checkpointing=mode)  # type: ignore[arg-type]
        return (needed_bytes(model, settings, tokens=2000) - needed_bytes(model, settings, tokens=1000)) / 1000

    assert grown(True) > 4 * layers * hidden
    assert grown(True) <= grown(False) + 4 * layers * hidden


# ---- what is chosen -------------------------------------------------------------------------------------------------


def test_the_largest_pass_is_that_of_the_steps() -> None:
    rows = rows_of(*[40, 50, 60, 70] * 4)
    setup, settings = setup_of(tokens_per_pass=200, shared_prompts="never")
    sizes = [batch.token_ids.shape[1] for batch in step_batches(rows[:8], [""] * 8, settings, CPU)]
    assert largest_pass(setup, rows, [1.0] * 16, settings) == max(sizes) == 256
    assert largest_pass(setup, rows_of(300), [1.0], settings) == 384


def test_shared_beginnings_count_once() -> None:
    same = tuple(range(5, 205))
    rows = [Example(token_ids=(*same, 7 + n, 9), loss_mask=(False,) * 201 + (True,)) for n in range(8)]
    setup, settings = setup_of(tokens_per_pass=4000)
    assert largest_pass(setup, rows, [1.0] * 8, settings) == 256
    alone = settings.model_copy(update={"shared_prompts": "never"})
    assert largest_pass(setup, rows, [1.0] * 8, alone) == 1664


def test_passes_are_made_smaller_first_and_layers_computed_again_where_that_is_not_enough() -> None:
    rows = rows_of(*[300, 310, 320] * 8)
    setup, settings = setup_of(tokens_per_pass=4096, batch_size=24, shared_prompts="never")
    ones = [1.0] * 24
    need = measure_need(setup, rows, settings, steps=3)
    largest = largest_pass(setup, rows, ones, settings)
    plenty = try_settings(setup, rows, ones, settings, room=2**40, steps=3)[-1]
    assert plenty.settings == settings and plenty.changes(settings) == []

    def fitted(tokens: int) -> fitting.Fit:
        return try_settings(setup, rows, ones, settings, room=need.bytes_of(tokens), steps=3)[-1]

    half = fitted(largest // 2)
    assert half.fits and half.settings.gradient_checkpointing is False
    assert largest // 4 <= half.settings.tokens_per_pass <= largest * 3 // 4
    assert half.changes(settings) == [f"train.tokens_per_pass={half.settings.tokens_per_pass}"]
    assert half.as_written > half.room >= half.bytes

    none = fitted(-(10**6))
    assert not none.fits
    assert (none.settings.tokens_per_pass, none.settings.gradient_checkpointing) == (384, True)
    assert setup.trained.model.is_activation_checkpointing


def test_without_packing_there_are_no_smaller_passes() -> None:
    rows = rows_of(40, 50, 60)
    setup, settings = setup_of(packing=False)
    none = try_settings(setup, rows, [1.0] * 3, settings, room=1, steps=3)[-1]
    assert none.changes(settings) == ["train.gradient_checkpointing=true"]


# ---- trainings ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_of(tiny_qwen2_folder: Path, sample_rows: Path) -> Callable[..., Recipe]:
    def make(name: str, *words: str) -> Recipe:
        values = {
            "name": name,
            "model": {"path": str(tiny_qwen2_folder), "dtype": "float32"},
            "data": {"train": str(sample_rows)},
            "method": {"dropout": 0.0, "rank": 4},
            "train": {
                "epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1, "compile": "never",
                "evaluate_every": "never", "save_every": 1, "keep_checkpoints": 9, "shared_prompts": "never",
            },
        }  # fmt: skip
        return make_recipe(values, words)

    return make


def run(recipe: Recipe, *, resume: bool | int = False) -> tuple[RunFolder, str]:
    screen = io.StringIO()
    console = Console(file=screen, width=4000, markup=False)
    return tune_model(recipe, resume=resume, console=console), screen.getvalue()


def weights(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def test_a_training_that_would_not_fit_takes_what_fits_says_so_and_keeps_it(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "limit_bytes", lambda device, sharing: 1)
        small, said = run(recipe_of("small"))
    (line,) = (line for line in said.splitlines() if "So it takes" in line)
    fitted = read_progress(list_checkpoints(small)[-1]).fitted
    assert fitted["gradient_checkpointing"] is True
    assert f"train.tokens_per_pass={fitted['tokens_per_pass']} and train.gradient_checkpointing=true: about " in line
    # the figures are this process's, whatever it has imported by now
    told = re.match(r"As written, the training would take about (\d\.\d) GB \(cpu\), and 0\.0 GB are to be had\.", line)
    instead = re.search(r"gradient_checkpointing=true: about (\d\.\d) GB", line)
    assert told is not None and instead is not None and 0 < float(instead[1]) <= float(told[1])
    assert "the system may end it" in line
    assert small.recipe.read_text(encoding="utf-8").count("tokens_per_pass: 1536") == 1, "the recipe stays"

    resumed, again = run(recipe_of("small"), resume=1)
    assert "So it takes" not in again
    tokens = f"train.tokens_per_pass={fitted['tokens_per_pass']}"
    written, unsaid = run(recipe_of("written", tokens, "train.gradient_checkpointing=true"))
    assert "So it takes" not in unsaid
    assert weights(resumed) == weights(written)


def test_where_there_is_plenty_nothing_is_measured(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "try_settings", lambda *_, **__: pytest.fail("measured"))
    _, said = run(recipe_of("plenty"))
    assert "So it takes" not in said
    monkeypatch.setattr(fitting, "limit_bytes", lambda device, sharing: 1)
    run(recipe_of("never", "train.fit_memory=never"))


def test_a_run_may_go_on_with_smaller_passes_than_it_began_with(recipe_of: Callable[..., Recipe]) -> None:
    run(recipe_of("on"))
    resumed, _ = run(recipe_of("on", "train.tokens_per_pass=300", "train.gradient_checkpointing=true"), resume=1)
    fitted = read_progress(list_checkpoints(resumed)[-1]).fitted
    assert fitted == {}, "these are the recipe's own"


def test_a_limit_on_addresses_is_a_limit() -> None:
    whole = limit_bytes(CPU)
    before = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm").read_text(encoding="ascii").split()
    used, resident = (int(word) * resource.getpagesize() for word in statm[:2])
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MB, before[1]))
        limit = limit_bytes(CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert limit == pytest.approx(resident + 64 * MB, abs=8 * MB)
    assert limit < whole
    assert limit_bytes(CPU, sharing=2) <= whole


def test_what_is_foretold_of_a_small_model_is_what_its_tensors_take() -> None:
    rows = rows_of(*[200] * 12)
    setup, settings = setup_of(tokens_per_pass=4096, batch_size=12, shared_prompts="never")
    footprint = measure_footprint(setup.trained, rows)
    [batch] = step_batches(rows, [""] * 12, settings, CPU)
    tokens = batch.token_ids.shape[1]
    real = footprint_module._peak(setup.trained, batch)
    assert real <= 1.1 * footprint.bytes_of(tokens)
    assert footprint.bytes_of(tokens) < 3.5 * real
    take_step(setup, [batch], settings)
