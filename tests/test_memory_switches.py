"""The switches that save memory: what is learnt stays what it is, and what cannot be is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from command_line import quick_training, refuse, run_cli
from tuned_models import FAMILIES, METHODS, RATES, eight_rows, fresh, gradients, learn, set_up_for
from weitiao.errors import DivergedError, RecipeError, RunError
from weitiao.recipe import Freeze, Train, make_recipe
from weitiao.runs import RunFolder
from weitiao.train import activations as activations_module
from weitiao.train import optimisers as optimisers_module
from weitiao.train.activations import Offloading
from weitiao.train.checkpoint import load_checkpoint
from weitiao.train.loop import train
from weitiao.train.optimisers import weights_in_use
from weitiao.train.ranks import Ranks
from weitiao.train.step import Setup, step_batches, take_step
from weitiao.train.switches import notes_on_switches, require_switches, updates_in_backward
from weitiao.tuning.methods import add_adapter

NEEDED = {"adamw_8bit": "bitsandbytes", "paged_adamw": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes"}
OPTIMISERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name in NEEDED and importlib.util.find_spec(NEEDED[name]) is None, reason=f"needs {NEEDED.get(name)}"
        ),
    )
    for name in ("adamw", *NEEDED, "adafactor", "muon", "schedule_free_adamw")
]
KINDS = [one for one in OPTIMISERS if not str(one.values[0]).startswith("paged")]
"""Those that differ where there is no GPU."""

IN_BACKWARD = {"update_in_backward": True, "max_grad_norm": None}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with quick_training():
        yield


def settings_of(name: str, **switches: Any) -> Train:
    values = {"learning_rate": RATES[name], "warmup": 0, "batch_size": 8, "row_balance": 0, "compile": "never"}
    return Train(**{**values, "schedule": "constant", **switches})


def ready(name: str, settings: Train, *, family: str = "qwen2") -> Setup:
    return set_up_for(add_adapter(fresh(family), METHODS[name], seed=1), settings)


def learnt(setup: Setup) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in setup.trained.named_parameters() if p.requires_grad}


# --- Optimisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_optimiser_learns_at_the_learning_rates_of_adamw(optimiser: str) -> None:
    settings = settings_of("lora", optimiser=optimiser)
    losses = learn(ready("lora", settings), eight_rows("qwen2"), settings, steps=20)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_optimiser_keeps_the_pace_of_each_parameter(optimiser: str) -> None:
    settings = settings_of("lora_plus", optimiser=optimiser, weight_decay=0.3)
    setup = ready("lora_plus", settings)
    names = {id(p): name for name, p in setup.trained.named_parameters()}
    seen = 0
    for group in setup.optimiser.param_groups:
        assert group["weight_decay"] == 0.3
        for parameter in group["params"]:
            seen += 1
            assert group["lr"] == pytest.approx(RATES["lora_plus"] * (4 if "lora_B" in names[id(parameter)] else 1))
    assert seen == len(learnt(setup))

    setup = ready("full", settings_of("full", optimiser=optimiser, weight_decay=0.3))
    for group in setup.optimiser.param_groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.3}


def test_muon_is_given_the_matrices_inside_the_layers_alone() -> None:
    setup = ready("full", settings_of("full", optimiser="muon"))
    names = {id(p): name for name, p in setup.trained.named_parameters()}
    muon, adamw = setup.optimiser.optimizer.parts  # type: ignore[attr-defined]
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert of_muon == {name for name in of_muon | others if "_proj" in name and name.endswith("weight")}
    assert any("embed_tokens" in name for name in others)
    assert of_muon | others == set(learnt(setup))


def test_a_gradient_without_a_largest_norm_is_left_as_it_is() -> None:
    found = []
    for norm in (None, 1e9, 1e-3):
        settings = settings_of("lora", max_grad_norm=norm, optimiser="muon")
        setup = ready("lora", settings)
        losses = learn(setup, eight_rows("qwen2"), settings, steps=3)
        assert losses[2] < losses[0]
        found.append(learnt(setup))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert not all(torch.equal(tensor, found[2][name]) for name, tensor in found[0].items())


# --- A run that goes on ----------------------------------------------------------------------------------------------


def tune(folder: Path, settings: Train, *, dev: bool = False) -> RunFolder:
    rows, run = eight_rows("qwen2"), RunFolder(folder)
    folder.mkdir(exist_ok=True)
    model = add_adapter(fresh("qwen2"), METHODS["lora"], seed=1)
    held_out, quiet = rows[:3] if dev else [], Console(quiet=True)
    train(model, rows, [1.0] * len(rows), held_out, settings=settings, run=run, console=quiet)
    return run


def short_run(**switches: Any) -> Train:
    return settings_of("lora", **{"batch_size": 2, "epochs": 2, "save_every": 3, "keep_checkpoints": 9, **switches})


def weights_at(run: RunFolder, step: int) -> bytes:
    return (run.checkpoints / f"step-{step:06}" / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("optimiser", "switches"),
    [
        *(pytest.param(*one.values, {}, marks=one.marks, id=str(one.values[0])) for one in KINDS),
        pytest.param("adafactor", IN_BACKWARD, id="adafactor in the backward pass"),
        pytest.param("schedule_free_adamw", IN_BACKWARD, id="schedule_free_adamw in the backward pass"),
    ],
)
def test_a_run_gone_on_with_ends_in_the_bits_of_one_never_stopped(
    optimiser: str, switches: dict[str, Any], tmp_path: Path
) -> None:
    settings = short_run(optimiser=optimiser, warmup=0.3, weight_decay=0.1, evaluate_every=2, **switches)
    whole = tune(tmp_path / "whole", settings, dev=True)
    stopped = tmp_path / "stopped" / "checkpoints"
    shutil.copytree(whole.checkpoints / "step-000003", stopped / "step-000003")
    gone_on = tune(tmp_path / "stopped", settings, dev=True)
    assert weights_at(gone_on, 8) == weights_at(whole, 8)
    name = "adapter_model.safetensors"
    assert (gone_on.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert gone_on.read_metrics()[-1]["loss"] == whole.read_metrics()[-1]["loss"]


def test_schedule_free_is_scored_and_saved_at_the_average_and_learns_on_as_if_it_were_not(tmp_path: Path) -> None:
    settings = short_run(optimiser="schedule_free_adamw", evaluate_every="never")
    plain = tune(tmp_path / "plain", settings)
    scored = tune(tmp_path / "scored", settings.model_copy(update={"evaluate_every": 1}), dev=True)
    assert weights_at(plain, 8) == weights_at(scored, 8)

    setup = ready("lora", settings)
    load_checkpoint(plain.checkpoints / "step-000008", setup.trained, setup.optimiser, setup.scheduler)
    learning = [p for p in setup.trained.parameters() if p.requires_grad]
    y = [p.detach().clone() for p in learning]
    x = [(p.detach() - 0.1 * setup.optimiser.state[p]["z"]) / 0.9 for p in learning]
    with weights_in_use(setup.optimiser, settings):
        torch.testing.assert_close([p.detach() for p in learning], x)
        saved = load_file(plain.adapter / "adapter_model.safetensors")
        assert all(any(torch.equal(tensor, p) for p in learning) for tensor in saved.values())
    assert all(torch.equal(p, kept) for p, kept in zip(learning, y, strict=True))
    assert max(float((one - other).abs().max()) for one, other in zip(x, y, strict=True)) > 1e-4


# --- Updates in the backward pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_pass", [4096, 40], ids=["one pass", "several"])
@pytest.mark.parametrize("optimiser", KINDS)
def test_updates_in_the_backward_pass_end_in_the_weights_of_those_after_it(
    optimiser: str, tokens_per_pass: int
) -> None:
    found = []
    for switches in ({"max_grad_norm": None}, IN_BACKWARD):
        settings = settings_of("full", optimiser=optimiser, weight_decay=0.1, tokens_per_pass=tokens_per_pass)
        settings = settings.model_copy(update=switches)
        setup = ready("full", settings)
        losses = learn(setup, eight_rows("qwen2"), settings, steps=3)
        found.append((losses, learnt(setup)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_no_two_gradients_exist_together_when_weights_are_updated_in_the_backward_pass() -> None:
    settings = settings_of("full", **IN_BACKWARD)
    setup = ready("full", settings)
    learning = [p for p in setup.trained.parameters() if p.requires_grad]
    alive: list[int] = []
    for parameter in learning:  # behind the hook that updates
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(one.grad is not None for one in learning))
        )
    learn(setup, eight_rows("qwen2"), settings, steps=1)
    assert alive == [0] * len(learning)


def test_the_norm_told_is_that_of_the_whole_gradient() -> None:
    norms = []
    for switches in ({"max_grad_norm": None}, IN_BACKWARD):
        settings = settings_of("full", tokens_per_pass=40, **switches)
        setup, rows = ready("full", settings), eight_rows("qwen2")
        batches = step_batches(rows, [""] * len(rows), settings, torch.device("cpu"))
        assert len(batches) > 1
        norms.append(take_step(setup, batches, settings)[1])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_loss_that_is_no_number_updates_nothing() -> None:
    settings = settings_of("full", **IN_BACKWARD)
    setup = ready("full", settings)
    learn(setup, eight_rows("qwen2"), settings, steps=1)
    with torch.no_grad():
        setup.trained.model.model.norm.weight[0] = float("nan")
    before = learnt(setup)
    with pytest.raises(DivergedError, match="The loss is nan"):
        learn(setup, eight_rows("qwen2"), settings, steps=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learnt(setup).items() if "norm" not in name)


# --- Activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_computed_again_have_the_gradients_of_layers_kept(family: str) -> None:
    found, recomputed = [], []
    for kind in (False, "selective", True):
        settings = settings_of("lora", gradient_checkpointing=kind)
        setup = ready("lora", settings, family=family)
        rows = eight_rows(family)
        learn(setup, rows, settings, steps=2)  # A has no gradient while B is zero
        found.append(gradients(setup, rows, settings))
        layers = [one for one in setup.trained.modules() if isinstance(one, GradientCheckpointingLayer)]
        recomputed.append([one.gradient_checkpointing for one in layers])
    plain, *others = found
    assert plain
    for other in others:
        assert plain.keys() == other.keys()
        assert all(torch.equal(other[name], gradient) for name, gradient in plain.items())
    none, some, all_layers = recomputed
    assert not any(none)
    assert some == [number % 2 == 0 for number in range(len(none))]
    assert all(all_layers)


def test_layers_below_the_first_that_learns_take_no_part_in_the_backward_pass() -> None:
    settings = settings_of("freeze", gradient_checkpointing=True)
    setup = set_up_for(add_adapter(fresh("qwen2"), Freeze(layers=1), seed=1), settings)
    needed = []
    for layer in setup.trained.model.model.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: needed.append(output.requires_grad))
    assert gradients(setup, eight_rows("qwen2"), settings)
    assert needed == [False, False, True]


def test_activations_kept_elsewhere_give_the_same_gradients_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations_module, "_LEAST_BYTES", 1)
    for kind in (False, True):
        settings = settings_of("lora", gradient_checkpointing=kind)
        setup, rows = ready("lora", settings), eight_rows("qwen2")
        learn(setup, rows, settings, steps=2)
        plain = gradients(setup, rows, settings)
        moving = Offloading(setup.trained, torch.device("cpu"))
        setup.optimiser.zero_grad()
        batches = step_batches(rows, [""] * len(rows), settings, torch.device("cpu"))
        for batch in batches:
            with moving:
                loss = setup.trained(batch)
            loss.backward()
        assert moving.num_moved > 0
        for name, parameter in setup.trained.named_parameters():
            assert name not in plain or torch.equal(parameter.grad, plain[name])

    weight, activation = setup.trained.model.model.layers[0].mlp.up_proj.weight, torch.randn(64, 64)
    assert moving._pack(weight.t()).data_ptr() == weight.data_ptr()
    device, there = moving._pack(activation)
    assert there.data_ptr() != activation.data_ptr()
    assert torch.equal(moving._unpack((device, there)), activation)
    assert Offloading(setup.trained, torch.device("cuda"))._pack(activation) is activation


# --- What is refused, and what is said -------------------------------------------------------------------------------


def test_a_recipe_whose_switches_do_not_go_together_is_refused() -> None:
    def refused(**train: Any) -> str:
        with pytest.raises(RecipeError) as error:
            make_recipe({"name": "n", "model": "starter", "data": {"train": "rows.jsonl"}, "train": train})
        return str(error.value)

    told = refused(update_in_backward=True)
    assert "train.update_in_backward" in told
    assert "cannot be scaled down to max_grad_norm (1.0); set train.max_grad_norm: null" in told
    told = refused(optimiser="schedule_free_adamw", schedule="cosine")
    assert "train.optimiser: averages the weights instead of lowering the learning rate" in told
    assert "set train.schedule: constant" in told
    assert "gradient_checkpointing" in refused(gradient_checkpointing="some")
    assert Train(optimiser="schedule_free_adamw").schedule == "constant"
    assert Train().schedule == "cosine"


@pytest.mark.parametrize(
    ("optimiser", "package"), [*NEEDED.items(), ("schedule_free_adamw", "schedulefree")], ids=lambda word: word
)
def test_an_optimiser_whose_package_is_missing_says_what_to_install(
    optimiser: str, package: str, monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path, sample_rows: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimisers_module, "find_spec", lambda name: None)
    write_recipe(tiny_llama_folder, sample_rows, optimiser=optimiser)
    told = refuse("train", "recipe.yaml")
    assert f"train.optimiser={optimiser} needs {package}, which is not installed" in " ".join(told.split())
    assert f"pip install 'weitiao[{package}]'" in " ".join(told.split())
    assert not Path("runs").exists()


def test_switches_that_several_processes_or_a_scaled_loss_forbid_are_refused() -> None:
    settings = settings_of("full", **IN_BACKWARD)
    require_switches(settings)
    with pytest.raises(RunError, match=r"before the gradients of the 2 processes are summed\. Train by one process"):
        require_switches(settings, Ranks(rank=0, size=2))
    setup: Any = ready("full", settings)
    scaled: Any = SimpleNamespace(scaler=object())
    with pytest.raises(RunError, match="does not go with float16"):
        updates_in_backward(setup.optimiser.optimizer, settings, scaled, setup.ranks)


def test_what_a_switch_does_not_bring_is_said() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert notes_on_switches(Train(), [2000] * 20, cpu) == []
    assert notes_on_switches(Train(offload_activations=True, optimiser="paged_adamw"), [9], gpu) == []
    offload, paged = notes_on_switches(Train(offload_activations=True, optimiser="paged_adamw_8bit"), [9], cpu)
    assert "train.offload_activations does nothing without a GPU" in offload
    assert "moves nothing without a GPU" in paged
    assert "those of adamw_8bit" in paged
    settings = Train(batch_size=4, tokens_per_pass=100, **IN_BACKWARD)
    assert notes_on_switches(settings, [25] * 40, gpu) == []
    (several,) = notes_on_switches(settings, [25] * 40 + [30], gpu)
    assert "train.tokens_per_pass=105 or a smaller train.batch_size" in several
    (single,) = notes_on_switches(settings.model_copy(update={"packing": False}), [25] * 40, gpu)
    assert "train.batch_size=1" in single


def write_recipe(model: Path, rows: Path, **train: Any) -> None:
    values = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "evaluate_every": "never", "compile": "never"}
    recipe = {
        "name": "tiny",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(rows)},
        "train": {**values, **train},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def test_a_recipe_with_every_switch_trains_and_says_what_a_cpu_does_not_do(
    tiny_gemma3_folder: Path, sample_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    switches = {"gradient_checkpointing": "selective", "offload_activations": True, "optimiser": "adafactor"}
    write_recipe(tiny_gemma3_folder, sample_rows, **switches, **IN_BACKWARD)
    result = run_cli("train", "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert "note: train.offload_activations does nothing without a GPU" in " ".join(result.stderr.split())
    assert RunFolder("runs/tiny").contract.is_file()
