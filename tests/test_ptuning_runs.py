"""Runs that tune by P-Tuning v2, rsLoRA and DoRA, or go on from an adapter: on tiny models, from rows to answers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import PreTrainedModel

from command_line import quick_training, read_lines, succeed
from glm_checkpoints import golden_folder
from test_train import Screen, losses, recipe_for, run_recipe, without_speed
from weitiao.apply import open_run
from weitiao.contract import Contract
from weitiao.errors import ContractError, ModelError, RecipeError, ResumeError
from weitiao.evaluate.forgetting import compare_probe, score_probe
from weitiao.evaluate.probe_questions import Question
from weitiao.models.adapters import without_adapter
from weitiao.models.lora_layers import ignoring_peft_warnings
from weitiao.models.opening import OpenModel, open_model
from weitiao.models.ptuning import prefix_encoder_of, without_prefix
from weitiao.preparation import prepare
from weitiao.prompting import prompt_model
from weitiao.recipe import Lora, PTuning, Recipe
from weitiao.runs import RunFolder
from weitiao.tuning.methods import add_adapter, count_parameters, resume_adapter

QUESTIONS = [
    Question(source=f"q:{n}", category="all", text=f"第{n}题？", choices=("甲", "乙丙", "丁"), right=n % 3)
    for n in range(4)
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, where runs/ goes; drawing curves takes half of a tiny run's time."""
    monkeypatch.chdir(tmp_path)
    with quick_training():
        yield


def p_tuning(model: Path, rows: Path, *overrides: str, name: str = "tiny") -> Recipe:
    method = ("method.name=ptuning_v2", "method.num_virtual_tokens=12", "train.learning_rate=5e-2")
    return recipe_for(model, rows, *method, *overrides, name=name)


def prefix_file(run: RunFolder) -> bytes:
    return (run.adapter / "prefix_encoder.safetensors").read_bytes()


def plain(opened: OpenModel) -> PreTrainedModel:
    assert isinstance(opened.model, PreTrainedModel)
    return opened.model


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([[5, 9, 33, 12, 40, 8]])).logits
    return found


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "projection"), [("llama", "true"), ("gemma3", "false")])
def test_a_prefix_learns_eight_rows_and_answers_the_same_when_it_is_opened_again(
    family: str, projection: str, sample_rows: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}_folder")
    rows = Path("eight.jsonl")
    rows.write_text("".join(sample_rows.read_text("utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    more = (
        "data.held_out=0",
        "train.epochs=50",
        "train.batch_size=8",
        "train.learning_rate=0.1",
        "method.num_virtual_tokens=64",
    )
    recipe = p_tuning(folder, rows, *more, f"method.projection={projection}", "train.log_every=10")
    run = run_recipe(recipe)
    found = losses(run)
    assert found[-1] < 0.75 * found[0]

    config = json.loads((run.adapter / "adapter_config.json").read_text("utf-8"))
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PTUNING_V2", 64)
    assert config["projection"] is (projection == "true")
    contract = Contract.read(run.contract)
    assert contract.adapter_fingerprint == hashlib.sha256(prefix_file(run)).hexdigest()
    assert contract.quantize == "none"
    answers = []
    for name in ("a.jsonl", "b.jsonl"):
        succeed("predict", run.path, rows, "-o", name)
        answers.append([(line["prediction"], line["confidence"]) for line in read_lines(Path(name))])
    assert answers[0] == answers[1]
    _, _, opened = open_run(run.path)
    model = plain(opened)
    with without_prefix(model):
        assert torch.equal(logits(model), logits(open_model(str(folder), dtype="float32").model))
    assert not torch.allclose(logits(model), logits(open_model(str(folder), dtype="float32").model), atol=0.1)


def test_evaluation_scores_the_base_model_without_the_prefix(tiny_qwen2_folder: Path, sample_rows: Path) -> None:
    def evaluated(recipe: Recipe) -> dict[str, list[str]]:
        run = run_recipe(recipe)
        succeed("evaluate", run.path, "--data", sample_rows, "--shots", "0")
        folder = run.path / "evaluations/rows"
        told = json.loads((folder / "report.json").read_text("utf-8"))["sides"]
        files = {side: read_lines(folder / one["file"]) for side, one in told.items()}
        return {side: [line["answer"] for line in lines] for side, lines in files.items()}

    freely = "generate.constrain=false"
    prefix = evaluated(p_tuning(tiny_qwen2_folder, sample_rows, freely, name="prefix"))
    lora = evaluated(recipe_for(tiny_qwen2_folder, sample_rows, freely, name="lora"))
    assert list(prefix) == ["base", "zero-shot", "tuned"]
    assert prefix["base"] == lora["base"]
    assert prefix["zero-shot"] == lora["zero-shot"]
    assert prefix["tuned"] != prefix["base"]


@pytest.mark.parametrize("setting", ["train.packing=false", "train.gradient_checkpointing=true"])
def test_memory_settings_leave_the_losses_of_a_prefix_unchanged(
    setting: str, tiny_gemma3_folder: Path, sample_rows: Path
) -> None:
    settings = ("method.projection=true", "method.dropout=0", "train.epochs=1")
    usual = run_recipe(p_tuning(tiny_gemma3_folder, sample_rows, *settings))
    other = run_recipe(p_tuning(tiny_gemma3_folder, sample_rows, *settings, setting, name="other"))
    assert losses(other) == pytest.approx(losses(usual), rel=1e-4)


@pytest.mark.parametrize("projection", ["false", "true"])
def test_a_run_of_a_prefix_stopped_and_resumed_ends_in_the_bits_of_one_never_stopped(
    projection: str, tiny_llama_folder: Path, sample_rows: Path
) -> None:
    settings = (f"method.projection={projection}", "method.dropout=0.3", "data.held_out=0.2", "train.evaluate_every=4")
    whole = run_recipe(p_tuning(tiny_llama_folder, sample_rows, *settings, name="whole"))
    stopped = p_tuning(tiny_llama_folder, sample_rows, *settings, name="stopped")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(stopped, screen=Screen(press_at="step 6/"))
    resumed = run_recipe(stopped, resume=True)
    assert prefix_file(resumed) == prefix_file(whole)
    assert without_speed(resumed.read_metrics()) == without_speed(whole.read_metrics())
    other = ("method.num_virtual_tokens=13", "method.dropout=0.2")
    with pytest.raises(ResumeError, match=r"recipe\.method\.num_virtual_tokens: was 12, is 13"):
        run_recipe(p_tuning(tiny_llama_folder, sample_rows, *settings, *other, name="stopped"), resume=True)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.learning_rate=5e-4", True),
        ("train.learning_rate=2e-2", False),
        ("method={name: ptuning_v2, num_virtual_tokens: 4, projection: true}", False),
        ("method={name: lora}", False),
    ],
)
def test_a_learning_rate_that_leaves_a_prefix_where_it_is_is_told(
    override: str, told: bool, tiny_llama_folder: Path, sample_rows: Path
) -> None:
    screen = Screen()
    recipe = p_tuning(tiny_llama_folder, sample_rows, "train.learning_rate=5e-4", override)
    prepare(recipe, console=Console(file=screen, width=200))
    assert ("note: train.learning_rate is 0.0005: a P-Tuning prefix" in screen.getvalue()) is told


def test_dropout_on_the_prefix_is_for_training_alone(tiny_llama_folder: Path) -> None:
    method = PTuning(num_virtual_tokens=6, dropout=0.5)
    model = plain(open_model(str(tiny_llama_folder), dtype="float32"))
    add_adapter(model, method, seed=1)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_what_a_model_forgets_is_measured_with_the_prefix_off_and_on(tiny_qwen2_folder: Path) -> None:
    opened = open_model(str(tiny_qwen2_folder), dtype="float32")
    before = score_probe(opened.model, opened.renderer, QUESTIONS)
    with pytest.raises(ModelError, match="has no adapter"):
        compare_probe(opened.model, opened.renderer, QUESTIONS)
    add_adapter(plain(opened), PTuning(num_virtual_tokens=6), seed=1)
    change = compare_probe(opened.model, opened.renderer, QUESTIONS)
    assert change.before == before
    assert change.after.answers != before.answers


# --- LoRA's variants --------------------------------------------------------------------------------------------------


def test_rslora_scales_by_the_root_of_the_rank(tiny_llama_folder: Path) -> None:
    tuned = add_adapter(
        plain(open_model(str(tiny_llama_folder), dtype="float32")), Lora(rank=16, alpha=8, rslora=True), seed=1
    )
    scalings = {
        module.scaling["default"]
        for module in tuned.modules()
        if hasattr(module, "scaling") and hasattr(module, "lora_A")
    }
    assert scalings == {8 / 4}


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_of_lora_learn_and_open_again(variant: str, tiny_qwen2_folder: Path, sample_rows: Path) -> None:
    run = run_recipe(recipe_for(tiny_qwen2_folder, sample_rows, f"method.{variant}=true"))
    found = losses(run)
    assert sum(found[-3:]) < 0.95 * sum(found[:3])
    _, _, opened = open_run(run.path)
    assert isinstance(opened.model, PeftModel)
    config = opened.model.active_peft_config
    assert getattr(config, f"use_{variant}") is True
    names = load_file(run.adapter / "adapter_model.safetensors").keys()
    assert any("magnitude" in name for name in names) is (variant == "dora")
    with ignoring_peft_warnings():
        reference = PeftModel.from_pretrained(
            plain(open_model(str(tiny_qwen2_folder), dtype="float32")), str(run.adapter)
        )
    assert torch.allclose(logits(opened.model), logits(reference.eval()), atol=1e-5)


# --- Going on from an adapter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "prefix"])
def test_tuning_goes_on_from_an_adapter(kind: str, tiny_llama_folder: Path, sample_rows: Path) -> None:
    def recipe(*overrides: str, name: str) -> Recipe:
        if kind == "prefix":
            return p_tuning(tiny_llama_folder, sample_rows, *overrides, name=name)
        return recipe_for(
            tiny_llama_folder, sample_rows, f"method.dora={str(kind == 'dora').lower()}", *overrides, name=name
        )

    first = run_recipe(recipe("train.epochs=4", name="first"))
    second = run_recipe(recipe(f"model.adapter={first.adapter}", name="second"))
    assert losses(second)[0] < 0.98 * losses(first)[0]
    assert Contract.read(second.contract).adapter_fingerprint != Contract.read(first.contract).adapter_fingerprint
    fresh, going_on = (
        prepare(one, console=Console(quiet=True)).model
        for one in (recipe(name="a"), recipe(f"model.adapter={first.adapter}", name="b"))
    )
    assert count_parameters(fresh) == count_parameters(going_on)
    learnt = {name: p for name, p in going_on.named_parameters() if p.requires_grad}
    assert learnt.keys() == {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learnt.values()} == {torch.float32}
    assert torch.equal(logits(going_on.eval()), logits(open_run(first.path)[2].model))


def test_an_adapter_of_another_kind_is_refused_with_every_difference(
    tiny_llama_folder: Path, sample_rows: Path
) -> None:
    lora = run_recipe(recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1", name="lora")).adapter
    prefix = run_recipe(p_tuning(tiny_llama_folder, sample_rows, "train.epochs=1", name="prefix")).adapter

    def refusal(method: Lora | PTuning, folder: Path) -> str:
        with pytest.raises(RecipeError, match=r"cannot be tuned further as the recipe's method says") as caught:
            resume_adapter(plain(open_model(str(tiny_llama_folder), dtype="float32")), method, folder)
        return str(caught.value)

    said = refusal(Lora(rank=8, dora=True, targets=("q_proj", "v_proj")), lora)
    assert "its rank is 16, but method.rank is 8" in said
    assert "its dora is False, but method.dora is True" in said
    assert "it is on 14 layers" in said
    assert "alpha" not in said
    assert "no P-Tuning prefix, but method.name is ptuning_v2" in refusal(PTuning(), lora)
    assert "no LoRA adapter, but method.name is lora" in refusal(Lora(), prefix)
    said = refusal(PTuning(num_virtual_tokens=64, projection=True), prefix)
    assert "its num_virtual_tokens is 12, but method.num_virtual_tokens is 64" in said
    assert "its projection is False, but method.projection is True" in said
    resumed = resume_adapter(
        plain(open_model(str(tiny_llama_folder), dtype="float32")), PTuning(num_virtual_tokens=12, dropout=0.4), prefix
    )
    encoder = prefix_encoder_of(resumed)
    assert encoder is not None
    assert encoder.dropout == 0.4


def test_a_run_goes_on_only_from_the_adapter_that_it_started_from(tiny_llama_folder: Path, sample_rows: Path) -> None:
    first = run_recipe(p_tuning(tiny_llama_folder, sample_rows, name="first")).adapter
    other = run_recipe(p_tuning(tiny_llama_folder, sample_rows, "train.seed=5", name="other")).adapter
    with pytest.raises(KeyboardInterrupt):
        start = p_tuning(tiny_llama_folder, sample_rows, f"model.adapter={first}", name="stopped")
        run_recipe(start, screen=Screen(press_at="step 3/"))
    with pytest.raises(ResumeError, match=r"starting adapter: was '\w+', is '\w+'"):
        run_recipe(p_tuning(tiny_llama_folder, sample_rows, f"model.adapter={other}", name="stopped"), resume=True)
    shutil.move(first, "moved")
    run_recipe(p_tuning(tiny_llama_folder, sample_rows, "model.adapter=moved", name="stopped"), resume=True)


def test_a_model_asked_untuned_has_the_adapter_that_its_recipe_names(
    tiny_qwen2_folder: Path, sample_rows: Path
) -> None:
    adapter = run_recipe(p_tuning(tiny_qwen2_folder, sample_rows, name="first")).adapter
    asked = []
    for more in ((), (f"model.adapter={adapter}",)):
        recipe = p_tuning(tiny_qwen2_folder, sample_rows, "generate.constrain=false", *more)
        side = prompt_model(recipe, out="same.jsonl", shots=0, rows=sample_rows, console=Console(quiet=True))
        asked.append([line["prediction"] for line in side.lines])
    assert asked[0] != asked[1]


# --- The contract -----------------------------------------------------------------------------------------------------


def test_a_run_on_quantised_weights_is_opened_on_quantised_weights(tiny_qwen2_folder: Path, sample_rows: Path) -> None:
    run = run_recipe(p_tuning(tiny_qwen2_folder, sample_rows, "model.quantize=int8"))
    assert Contract.read(run.contract).quantize == "int8"
    _, _, opened = open_run(run.path)
    expected = open_model(str(tiny_qwen2_folder), adapter=run.adapter, dtype="float32", quantize="int8")
    assert torch.equal(logits(opened.model), logits(expected.model))
    assert not torch.equal(
        logits(opened.model), logits(open_model(str(tiny_qwen2_folder), adapter=run.adapter, dtype="float32").model)
    )


def test_contracts_from_before_quantisation_are_read(tiny_llama_folder: Path, sample_rows: Path) -> None:
    run = run_recipe(recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1"))
    written: dict[str, Any] = json.loads(run.contract.read_text("utf-8"))
    del written["quantize"]
    run.contract.write_text(json.dumps(written), encoding="utf-8")
    assert Contract.read(run.contract).quantize == "none"
    written["bits"] = 4
    run.contract.write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(ContractError, match="bits"):
        Contract.read(run.contract)


# --- Models that bring a prefix ---------------------------------------------------------------------------------------


def test_lora_leaves_the_prefix_alone_that_a_model_brings() -> None:
    folder = golden_folder("chatglm3_ptuning/projection")
    opened = open_model(str(folder), dtype="float32")
    before = logits(opened.model)
    tuned = add_adapter(plain(opened), Lora(rank=2), seed=1)
    assert torch.equal(logits(tuned.eval()), before), "LoRA starts from nothing, behind the prefix"
    learnt = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert learnt
    assert not any("prefix_encoder" in name for name in learnt)
    with without_adapter(tuned):
        assert torch.equal(logits(tuned), before)


def test_a_prefix_that_a_model_brings_is_not_replaced_unasked() -> None:
    folder = golden_folder("chatglm3_ptuning/projection")
    method = PTuning(num_virtual_tokens=8, projection=True)
    opened = open_model(str(folder), dtype="float32")
    with pytest.raises(
        RecipeError, match="has a P-Tuning prefix of 8 tokens, which a fresh one would take the place of"
    ):
        add_adapter(plain(opened), method, seed=1)
    tuned = resume_adapter(plain(opened), method, folder)
    assert torch.equal(logits(tuned), logits(open_model(str(folder), dtype="float32").model))
    assert {name.partition(".")[0] for name, p in tuned.named_parameters() if p.requires_grad} == {"prefix_encoder"}
