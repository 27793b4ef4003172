"""Ways of tuning: what learns, at which pace, from what start; and runs that tune a model's own weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from transformers import AutoModelForCausalLM

from command_line import quick_training, read_lines, refuse, succeed
from prefix_models import tiny
from test_train import Screen, losses, recipe_for, run_recipe
from tuned_models import eight_rows, learn, logits_of, set_up_for, settings_for
from weitiao.apply import open_run
from weitiao.contract import Contract
from weitiao.errors import ModelError, RecipeError
from weitiao.models.adapters import adapter_fingerprint, load_adapter, save_adapter, without_adapter
from weitiao.models.lora_layers import ignoring_peft_warnings
from weitiao.models.own_weights import WEIGHTS_FILE, changed_weights_of, computing_dtype
from weitiao.models.quantized import quantize_model
from weitiao.preparation import prepare
from weitiao.recipe import AnyMethod, Freeze, Full, Ia3, Lora, Recipe, Train, make_recipe
from weitiao.runs import RunFolder
from weitiao.train.plan import make_plan
from weitiao.tuning.methods import add_adapter, count_parameters, resume_adapter

IDS = torch.tensor([[5, 9, 33, 12, 40, 8]])


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with quick_training():
        yield


def learning(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read(method: dict[str, Any], **train: Any) -> Recipe:
    return make_recipe({"name": "a", "model": "m", "data": {"train": "r.jsonl"}, "method": method, "train": train})


# --- The recipe -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_the_methods_own_where_the_recipe_says_none() -> None:
    assert read({"name": "lora"}).train.learning_rate == read({}).train.learning_rate == Train().learning_rate == 5e-4
    assert read({"name": "full"}).train.learning_rate < read({"name": "freeze"}).train.learning_rate < 5e-4
    assert read({"name": "prompt_tuning"}).train.learning_rate == 0.3  # of the spread of the vocabulary's embeddings
    assert read({"name": "ptuning_v1"}).train.learning_rate == 0.3  # the network that makes them learns at a 60th of it
    assert read({"name": "ptuning_v2"}).train.learning_rate == 0.1  # of the spread of words' keys and values
    assert read({"name": "ptuning_v2", "projection": True}).train.learning_rate == 2e-3
    assert read({"name": "full"}, learning_rate=1e-3, epochs=1).train.learning_rate == 1e-3
    assert read({"name": "full"}, epochs=1).train.epochs == 1
    written = read({"name": "full"})
    built = Recipe(name="a", model="m", data={"train": "r.jsonl"}, method=Full(), train=Train(epochs=2))  # type: ignore[arg-type]
    assert built.train.learning_rate == written.train.learning_rate


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"layers": "5-3"}, "method.layers: say all, a range such as 12-17"),
        ({"layers": []}, "method.layers: no layer would learn"),
        ({"init": "pissa", "dora": True}, "init: pissa and dora: true exclude each other"),
        ({"name": "freeze", "layers": 0}, "parameters names none, so nothing would learn"),
        ({"name": "ia3", "target": ["k_proj"]}, "Did you mean targets?"),
        ({"name": "prefix"}, "method.name: 'prefix' is none of 'lora', 'ptuning_v2', 'ptuning_v1', 'prompt_tuning'"),
    ],
)
def test_methods_that_mean_nothing_are_refused(method: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(method)
    assert told in str(caught.value)


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "targets", "expected"),
    [
        ("1-2", "all-linear", {(layer, kind) for layer in (1, 2) for kind in "qkvogud"}),
        ((0, -1), ("q_proj", "v_proj"), {(layer, kind) for layer in (0, 2) for kind in "qv"}),
        ("all", r".*\.mlp\..*", {(layer, kind) for layer in (0, 1, 2) for kind in "gud"}),
        ((1,), r".*\.mlp\.(?:up|down)_proj", {(1, "u"), (1, "d")}),
    ],
)
def test_layers_and_modules_are_chosen_by_number_name_or_pattern(
    layers: Any, targets: Any, expected: set[tuple[int, str]], tmp_path: Path
) -> None:
    method = Lora(rank=2, layers=layers, targets=targets)
    tuned = add_adapter(tiny("qwen2"), method, seed=1)
    parts = [name.split(".") for name, module in tuned.named_modules() if isinstance(module, LoraLayer)]
    assert {(int(part[part.index("layers") + 1]), part[-1][0]) for part in parts} == expected
    save_adapter(tuned, tmp_path)
    assert learning(resume_adapter(tiny("qwen2"), method, tmp_path)).keys() == learning(tuned).keys()
    with pytest.raises(RecipeError, match=f"it is on {len(expected)} layers .* and method.layers '0-0'"):
        resume_adapter(tiny("qwen2"), Lora(rank=2, layers="0-0", targets=targets), tmp_path)


def test_layers_that_a_model_lacks_are_named() -> None:
    with pytest.raises(RecipeError, match="means layer 3, but the model's 3 layers are numbered from 0 to 2"):
        add_adapter(tiny("qwen2"), Lora(layers="2-4"), seed=1)
    with pytest.raises(RecipeError, match=r"matches no layer within method\.layers=\(0,\)"):
        add_adapter(tiny("qwen2"), Lora(layers=(0,), targets=("nothing",)), seed=1)


def test_matrices_b_learn_at_a_rate_of_their_own() -> None:
    settings = Train(learning_rate=1e-3, schedule="constant", warmup=0, weight_decay=0.1)
    tuned = add_adapter(tiny("qwen2"), Lora(rank=2, b_learning_rate=16.0), seed=1)
    before = {name: p.detach().clone() for name, p in learning(tuned).items()}
    setup = set_up_for(tuned, settings)
    assert setup.scheduler.get_last_lr() == pytest.approx([1e-3, 16e-3]), "the first is what is shown"
    learn(setup, eight_rows("qwen2"), settings, steps=1)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in learning(tuned).items()}
    # Adam's first step is the learning rate; A has no gradient yet
    assert all(moved[name] == pytest.approx(16e-3, rel=1e-3) for name in moved if "lora_B" in name)


def test_pissa_starts_from_the_strongest_directions_and_leaves_the_base_alone(tmp_path: Path) -> None:
    rows = eight_rows("qwen2")
    base = logits_of(tiny("qwen2"), rows)
    tuned = add_adapter(tiny("qwen2"), Lora(rank=4, alpha=8, init="pissa"), seed=1)
    assert isinstance(tuned, PeftModel)
    torch.testing.assert_close(logits_of(tuned, rows), base, rtol=1e-4, atol=1e-4)
    layer: Any = tuned.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    a, b = (layer.get_submodule(f"lora_{which}.default").weight.detach().clone() for which in "AB")
    left, values, right = torch.linalg.svd(layer.base_layer.weight.detach(), full_matrices=False)
    strongest = left[:, :4] * values[:4] @ right[:4]
    assert layer.scaling["default"] == 8 / 4
    torch.testing.assert_close(b[:, :4] @ a[:4] * 2, strongest, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(b[:, 4:] @ a[4:] * 2, -strongest, rtol=1e-2, atol=1e-3)
    assert count_parameters(tuned)[0] == count_parameters(add_adapter(tiny("qwen2"), Lora(rank=4), seed=1))[0]

    settings = settings_for("pissa").model_copy(update={"weight_decay": 0.5})
    setup = set_up_for(tuned, settings)
    found = learn(setup, rows, settings, steps=20)
    assert found[-1] < 0.5 * found[0]
    now_a, now_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(now_a[4:], a[4:]) and torch.equal(now_b[:, 4:], b[:, 4:]), "not even weight decay moves these"
    assert not torch.equal(now_a[:4], a[:4])
    save_adapter(tuned, tmp_path)
    with setup.trained.generating():
        learnt = logits_of(tuned, rows)
        with without_adapter(tuned):
            assert torch.equal(logits_of(tuned, rows), base)
    with ignoring_peft_warnings():
        plain = PeftModel.from_pretrained(tiny("qwen2"), str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(plain, rows), learnt, rtol=1e-4, atol=1e-4)
    with pytest.raises(RecipeError, match=r"has its start already, but method\.init is pissa"):
        resume_adapter(tiny("qwen2"), Lora(rank=4, alpha=8, init="pissa"), tmp_path)


# --- (IA)³ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "outer", "inner"),
    [("qwen2", {"k_proj", "v_proj"}, {"down_proj"}), ("chatglm", {"query_key_value"}, {"dense_4h_to_h"})],
)
def test_ia3_scales_keys_values_and_inner_activations(
    family: str, outer: set[str], inner: set[str], tmp_path: Path
) -> None:
    tuned = add_adapter(tiny(family).bfloat16(), Ia3(), seed=1)
    config: Any = tuned.active_peft_config  # type: ignore[union-attr]
    assert (set(config.target_modules), set(config.feedforward_modules)) == (outer | inner, inner)
    assert {p.dtype for p in learning(tuned).values()} == {torch.float32}
    assert all(bool((p == 1).all()) for p in learning(tuned).values())
    settings = Train(learning_rate=1e-9, schedule="constant", warmup=0, weight_decay=1.0)
    setup = set_up_for(tuned, settings)
    assert [group["weight_decay"] for group in setup.optimiser.param_groups] == [0.0], "1 is no change, 0 is"
    save_adapter(tuned, tmp_path)
    assert learning(resume_adapter(tiny(family), Ia3(), tmp_path)).keys() == learning(tuned).keys()
    with pytest.raises(RecipeError, match=r"its targets is .* but method\.targets is"):
        resume_adapter(tiny(family), Ia3(targets=("dense",)), tmp_path)
    with pytest.raises(RecipeError, match="matches no layer of this model"):
        add_adapter(tiny(family), Ia3(targets=("a",), feedforward=("b",)), seed=1)


# --- The model's own weights ------------------------------------------------------------------------------------------


def test_layers_from_the_end_and_parts_of_names_say_what_learns(tmp_path: Path) -> None:
    model = add_adapter(tiny("qwen2"), Freeze(layers=1, parameters=("layers.0.mlp.", "model.norm")), seed=1)
    names = learning(model)
    assert {name.split(".")[2] for name in names if "layers" in name} == {"0", "2"}
    assert "model.norm.weight" in names and "model.layers.0.self_attn.q_proj.weight" not in names
    assert sum(name.startswith("model.layers.0.") for name in names) == 3
    with pytest.raises(RecipeError, match=r"method\.layers is 4, but the model has 3 layers"):
        add_adapter(tiny("qwen2"), Freeze(layers=4), seed=1)
    with pytest.raises(RecipeError, match=r"no parameter of this model has 'layers\.27\.' in its name"):
        add_adapter(tiny("qwen2"), Freeze(layers=0, parameters=("layers.27.",)), seed=1)
    packed = tiny("qwen2")
    quantize_model(packed, 8)
    with pytest.raises(ModelError, match="are packed in 4 or 8 bits"):
        add_adapter(packed, Full(), seed=1)
    save_adapter(model, tmp_path)
    with pytest.raises(RecipeError, match="it holds 16 of the model's parameters and the method means 12"):
        resume_adapter(tiny("qwen2"), Freeze(layers=1), tmp_path)
    with pytest.raises(RecipeError, match=r"holds no weights of the model's own, but method\.name is full"):
        lora = tmp_path / "lora"
        lora.mkdir()
        save_adapter(add_adapter(tiny("qwen2"), Lora(rank=2), seed=1), lora)
        resume_adapter(tiny("qwen2"), Full(), lora)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_weights_of_a_bfloat16_model_learn_in_float32_and_are_saved_as_it_computes(family: str, tmp_path: Path) -> None:
    rows, base = eight_rows(family), tiny(family).bfloat16()
    base.config.tie_word_embeddings = True
    base.tie_weights()  # type: ignore[no-untyped-call]
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    expected = logits_of(base, rows)
    model = add_adapter(base, Full(), seed=1)
    assert not isinstance(model, PeftModel)
    assert {p.dtype for p in learning(model).values()} == {torch.float32}
    assert count_parameters(model) == (sum(p.numel() for p in before.values()),) * 2, "tied weights count once"
    assert computing_dtype(model) == torch.bfloat16
    assert torch.equal(logits_of(model, rows), expected)

    settings = settings_for("full").model_copy(update={"learning_rate": 1e-4})
    setup = set_up_for(model, settings)
    found = learn(setup, rows, settings, steps=40)
    assert found[-1] < found[0]
    # 1e-4 a step is a thirtieth of what bfloat16 can add to a weight of 1: only float32 sums such steps up
    grown = {name: p for name, p in model.named_parameters() if "norm" in name}
    assert any(float((p.detach() - 1).abs().max()) > 1.5e-3 for p in grown.values())
    with setup.trained.generating() as generating:
        learnt = logits_of(generating, rows)
        save_adapter(generating, tmp_path)
        with pytest.raises(ModelError, match="not kept while they learn"), without_adapter(generating):
            pass
    plan = make_plan(model, rows, [1.0] * 8, settings)
    assert plan.trainable == plan.parameters

    fresh = tiny(family).bfloat16()
    fresh.config.tie_word_embeddings = True
    fresh.tie_weights()  # type: ignore[no-untyped-call]
    again = load_adapter(fresh, tmp_path)
    assert torch.equal(logits_of(again, rows), learnt)
    with without_adapter(again):
        assert torch.equal(logits_of(again, rows), expected)
        with without_adapter(again):
            assert torch.equal(logits_of(again, rows), expected)
    assert torch.equal(logits_of(again, rows), learnt)
    changed = changed_weights_of(again)
    assert changed is not None and set(changed.names) == before.keys()
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 2.2 * sum(p.numel() for p in before.values()) + 20_000
    with pytest.raises(ModelError, match="have no place in the model"):
        load_adapter(tiny("glm"), tmp_path)


def own_weights(folder: Path, rows: Path, method: str, *more: str, name: str = "own") -> Recipe:
    return recipe_for(folder, rows, f"method={method}", "train.learning_rate=3e-3", *more, name=name)


@pytest.mark.parametrize("method", ["{name: full}", "{name: freeze, layers: 1, parameters: [norm]}"])
def test_a_run_of_own_weights_answers_compares_and_is_exported(
    method: str, tiny_qwen2_folder: Path, sample_rows: Path
) -> None:
    def evaluated(run: RunFolder) -> dict[str, list[str]]:
        succeed("evaluate", run.path, "--data", sample_rows)
        folder = run.path / "evaluations/rows"
        told = json.loads((folder / "report.json").read_text("utf-8"))["sides"]
        return {side: [line["answer"] for line in read_lines(folder / one["file"])] for side, one in told.items()}

    freely = "generate.constrain=false"
    run = run_recipe(own_weights(tiny_qwen2_folder, sample_rows, method, freely))
    assert losses(run)[-1] < 0.95 * losses(run)[0]
    assert Contract.read(run.contract).adapter_fingerprint == adapter_fingerprint(run.adapter)
    assert Contract.read(run.contract).dtype == "float32"
    sides = evaluated(run)
    lora = evaluated(run_recipe(recipe_for(tiny_qwen2_folder, sample_rows, freely, name="lora")))
    assert sides["base"] == lora["base"]
    assert sides["tuned"] != sides["base"]
    succeed("export", run.path, "whole")
    exported = AutoModelForCausalLM.from_pretrained("whole", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(IDS).logits, open_run(run.path)[2].model(IDS).logits, rtol=1e-4, atol=1e-4)

    more = run_recipe(own_weights(tiny_qwen2_folder, sample_rows, method, f"model.adapter={run.adapter}", name="more"))
    assert losses(more)[0] < 0.95 * losses(run)[0]
    stopped = own_weights(tiny_qwen2_folder, sample_rows, method, freely, name="stopped")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(stopped, screen=Screen(press_at="step 6/"))
    resumed = run_recipe(stopped, resume=True)
    assert adapter_fingerprint(resumed.adapter) == adapter_fingerprint(run.adapter)


@pytest.mark.parametrize("method", ["{name: prompt_tuning}", "{name: ptuning_v1}", "{name: ia3}"])
def test_a_run_of_learnt_tokens_or_factors_answers_the_same_when_opened_again(
    method: str, tiny_gemma3_folder: Path, sample_rows: Path
) -> None:
    more = ("train.learning_rate=5e-2", "data.held_out=0.2", "train.evaluate_every=epoch")
    run = run_recipe(recipe_for(tiny_gemma3_folder, sample_rows, f"method={method}", *more))
    assert losses(run)[-1] < losses(run)[0]
    answers = []
    for name in ("a.jsonl", "b.jsonl"):
        succeed("predict", run.path, sample_rows, "-o", name)
        answers.append([line["prediction"] for line in read_lines(Path(name))])
    assert answers[0] == answers[1]
    if "ia3" in method:
        succeed("export", run.path, "whole")
    else:
        assert "They cannot be merged into weights" in refuse("export", run.path, "whole")


@pytest.mark.parametrize(
    ("method", "rate", "told"),
    [
        ("{name: full}", "5e-4", "a model's own weights soon lose what they hold"),
        ("{name: prompt_tuning}", "5e-4", "what prompt_tuning learns hardly moves at that"),
        ("{name: full}", "5e-5", None),
        ("{name: prompt_tuning}", "3e-2", None),
    ],
)
def test_a_learning_rate_that_suits_another_method_is_told(
    method: str, rate: str, told: str | None, tiny_llama_folder: Path, sample_rows: Path
) -> None:
    screen = Screen()
    recipe = recipe_for(tiny_llama_folder, sample_rows, f"method={method}", f"train.learning_rate={rate}")
    prepare(recipe, console=Console(file=screen, width=300))
    assert (told or "note: train.learning_rate") in screen.getvalue() or told is None
    assert ("note: train.learning_rate" in screen.getvalue()) is (told is not None)


def test_plans_count_the_gradients_of_weights_that_learn() -> None:
    rows = eight_rows("qwen2")

    def planned(method: AnyMethod) -> tuple[int, float]:
        plan = make_plan(add_adapter(tiny("qwen2").bfloat16(), method, seed=1), rows, [1.0] * 8, Train())  # type: ignore[arg-type]
        return plan.memory_bytes, plan.seconds

    few, some, full = planned(Freeze(layers=1)), planned(Freeze(layers=3)), planned(Full())
    assert few < some < full
    count = sum(p.numel() for p in tiny("qwen2").parameters())
    lora = planned(Lora(rank=1))
    # float32 weights, gradients and two moments are 16 bytes, and the copy that computes 2; bfloat16 alone is 2
    assert full[0] - lora[0] > 14 * count
