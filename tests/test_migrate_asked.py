"""Migration: numbers that need the rows, what must be asked for, scripts that lead elsewhere, wrong files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command_line import refuse, run_cli, succeed
from foreign_settings import DEMO, FACTORY, LIUCONGG, LORA, SEED, changed, flags, migrate, write, write_rows
from weitiao.data.order import num_steps
from weitiao.errors import RecipeError
from weitiao.recipe import Freeze, Full, load_recipe


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- numbers ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 20_000))
def test_as_many_steps_are_taken_as_the_original_took(rows: int, batch: int, steps: int) -> None:
    odd = {"max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
    file = write("c.yaml", changed(FACTORY, **odd, val_size=None, max_samples=None))
    epochs = migrate(file, rows=rows).recipe.train.epochs
    assert num_steps([1.0] * rows, batch_size=batch, seed=42, epochs=epochs) == steps


def test_steps_of_warm_up_and_rows_kept_apart_become_shares() -> None:
    write_rows("r.json", 110)
    odd = {"warmup_steps": 20, "val_size": 10, "num_train_epochs": 2.0, "gradient_accumulation_steps": 1}
    file = write("c.yaml", changed(FACTORY, **odd, max_samples=None, per_device_train_batch_size=1))
    recipe = migrate(file, data=("r.json",)).recipe
    assert round(recipe.data.held_out * 110) == 10
    assert recipe.train.warmup == pytest.approx(20 / 200)
    refused = refuse("migrate", file, "-o", "x.yaml")
    assert "val_size: 10 counts rows" in refused and "warmup_steps: 20 counts steps" in refused and "--rows" in refused


def test_steps_that_are_many_passes_over_few_rows_are_told() -> None:
    write_rows("d/train.json", 10)
    write_rows("d/dev.json", 10)
    notes = migrate(write("c.yaml", DEMO + LORA), model="m", data=("d",)).notes
    assert any("makes 1000 passes over 10 rows" in note for note in notes)


def test_devices_multiply_the_rows_of_a_step() -> None:
    assert migrate(write("c.yaml", FACTORY), devices=4).recipe.train.batch_size == 64


# ---- what the user must say ---------------------------------------------------------------------------------------


def test_everything_that_must_be_said_is_asked_for_at_once() -> None:
    told = refuse("migrate", write("sft.yaml", DEMO + "peft_config:\n  peft_type: ADALORA\n"), "-o", "new.yaml")
    assert "--model FOLDER" in told and "--data FOLDER" in told and "--rows N" in told
    assert "tunes by adalora. weitiao has no such method yet" in told and "--method lora" in told
    assert not Path("new.yaml").exists()


def test_full_fine_tuning_becomes_lora_only_where_the_user_says_so() -> None:
    file = write("sft.yaml", DEMO + "  deepspeed: ds_zero_3.json\n")
    done = migrate(file, model="THUDM/chatglm3-6b", data=("a.json",), rows=10, method="lora")
    assert done.recipe.method.name == "lora" and done.recipe.method.targets == "all-linear"
    assert any("every weight" in note and "learning_rate" in note for note in done.notes)
    carried = {entry.setting: entry for entry in done.carried}
    assert carried["training_args.deepspeed: ds_zero_3.json"].place == "train.shard"
    assert "as ZeRO-3 does" in carried["training_args.deepspeed: ds_zero_3.json"].words
    assert done.recipe.train.shard == "fsdp"


def test_a_configuration_of_zero_2_is_named_as_it_is_and_one_of_zero_3_spreads_the_weights() -> None:
    for name, train in (("ds_z2_config.json", {"deepspeed": "examples/ds_z2_config.json"}), ("ds_z3_config.json", {})):
        done = migrate(write("c.yaml", changed(FACTORY, deepspeed=f"examples/{name}")))
        assert done.recipe.train.deepspeed == train.get("deepspeed")
        assert done.recipe.train.shard == ("none" if train else "fsdp")


def test_full_fine_tuning_stays_what_it_is() -> None:
    done = migrate(write("sft.yaml", DEMO), model="THUDM/chatglm3-6b", data=("a.json",), rows=10)
    assert done.recipe.method == Full()
    assert done.recipe.train.learning_rate == 5e-5
    script = migrate(write("train.sh", LIUCONGG.replace("--train_type lora", "--train_type all")))
    assert script.recipe.method == Full()
    left = {entry.setting for entry in script.left}
    assert "--freeze_module_name layers.27." in left and "--lora_dim 16" in left


def test_layers_that_learn_become_parts_of_names() -> None:
    text = LIUCONGG.replace("--train_type lora", "--train_type freeze")
    named = text.replace('"layers.27."', '"layers.27.,layers.26."')
    assert migrate(write("a.sh", named)).recipe.method == Freeze(layers=0, parameters=("layers.27.", "layers.26."))
    other = text.replace("--mode glm ", "--mode glm3 ").replace("ChatGLM-6B/", "chatglm3-6b/")
    other = other.replace('"layers.27."', "transformer.encoder.layers.27.")
    assert migrate(write("b.sh", other)).recipe.method == Freeze(layers=0, parameters=("layers.27.",))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", Freeze(layers=2)),
        ("freeze_trainable_layers: 4\nfreeze_extra_modules: norm, lm_head\n",
         Freeze(layers=4, parameters=("norm", "lm_head"))),
        ("freeze_trainable_layers: -2\n", Freeze(layers=0, parameters=("layers.0.", "layers.1."))),
    ],
)  # fmt: skip
def test_llama_factorys_frozen_layers(keys: str, expected: Freeze) -> None:
    done = migrate(write("c.yaml", FACTORY.replace("finetuning_type: lora", "finetuning_type: freeze") + "\n" + keys))
    assert done.recipe.method == expected
    assert not any("freeze" in entry.setting for entry in done.left)


def test_a_method_that_weitiao_lacks_is_named() -> None:
    file = write("c.yaml", FACTORY.replace("finetuning_type: lora", "finetuning_type: oft"))
    with pytest.raises(RecipeError, match=r"has no such method yet\. The nearest is LoRA"):
        migrate(file)
    assert migrate(file, method="lora").recipe.method.name == "lora"


def test_of_several_commands_one_is_chosen() -> None:
    file = write("train.sh", SEED + SEED.replace("--lora_rank 8", "--lora_rank 16"))
    told = refuse("migrate", file)
    assert "holds 2 training commands" in told and "--command 2: train.py" in told
    with pytest.raises(RecipeError, match="none with number 3"):
        migrate(file, command=3)
    method = migrate(file, command=2).recipe.method
    assert method.name == "lora" and method.rank == 16


def test_what_lies_elsewhere_is_told() -> None:
    notes = migrate(write("train.sh", SEED)).notes
    assert any(note.startswith("data/train.jsonl does not lie here") for note in notes)
    write_rows("data/train.jsonl", 1)
    assert not any(note.startswith("data/train.jsonl") for note in migrate(Path("train.sh")).notes)


def test_files_beside_a_script_are_found() -> None:
    write_rows("project/data/train.jsonl", 3)
    done = migrate(write("project/train.sh", SEED))
    assert [source.path for source in done.recipe.data.train] == ["project/data/train.jsonl"]
    assert [source.path for source in done.recipe.data.dev] == ["data/dev.jsonl"], "as written, for it lies nowhere"


def test_rows_of_a_data_set_in_a_list_are_counted() -> None:
    write_rows("data/rows.json", 40)
    columns = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "tags": columns}
    write("data/dataset_info.json", json.dumps({"identity": entry}))
    file = write("c.yaml", changed(FACTORY, dataset="identity", max_steps=30, val_size=0.1, max_samples=None))
    recipe = migrate(file).recipe
    assert num_steps([1.0] * 36, batch_size=16, seed=42, epochs=recipe.train.epochs) == 30


# ---- scripts that lead to a configuration -------------------------------------------------------------------------


def test_finetune_hf_names_its_configuration_its_model_and_its_rows() -> None:
    write("configs/lora.yaml", DEMO + LORA)
    command = "torchrun --nproc_per_node=8 finetune_hf.py data/ THUDM/chatglm3-6b configs/lora.yaml yes"
    done = migrate(write("run.sh", f"cd x && {command} > log.txt 2>&1"), rows=1000)
    assert done.recipe.train.batch_size == 32 and done.recipe.data.train[0].path == "data/train.json"
    assert "auto_resume_from_checkpoint: yes" in [entry.setting for entry in done.left]
    done = migrate(write("run.sh", command.replace("yes", "configs/ds_zero_2.json")), rows=1000)
    assert any("configs/ds_zero_2.json" in note and "trains nothing" in note for note in done.notes)
    with pytest.raises(RecipeError, match="lies neither here nor beside it"):
        migrate(write("run.sh", command.replace("lora", "none")), rows=1000)


def test_llamafactory_cli_names_a_file_and_changes_it() -> None:
    write("scripts/f.yaml", FACTORY)
    script = write("scripts/run.sh", "llamafactory-cli train f.yaml learning_rate=1e-3 > log 2>&1")
    assert migrate(script).recipe.train.learning_rate == 1e-3


def test_llmtuner_with_flags() -> None:
    kept = {key: value for key, value in yaml.safe_load(FACTORY).items() if value is not None}
    words = " ".join(f"--{key.replace('_', '-')} '{value}'" for key, value in kept.items() if key != "lora_rank")
    method = migrate(write("run.sh", f"llmtuner train {words} --lora-rank 4")).recipe.method
    assert method.name == "lora" and method.rank == 4


# ---- wrong files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "rows.jsonl",
            '{"context": "a", "target": "b"}\n',
            "holds context, target, and says how to train to no program",
        ),
        ("rows.json", '[{"a": 1}]', "holds no settings"),
        ("empty.yaml", "", "holds no settings"),
        ("broken.yaml", "a: [1\nb: 2", "is none of the files that can be migrated"),
        ("twice.yaml", "stage: sft\nstage: dpo\n", "sets stage twice"),
        ("dpo.yaml", "stage: dpo\nfinetuning_type: lora\n", "weitiao learns from labelled answers alone"),
        ("merge.yaml", "finetuning_type: lora\ntemplate: qwen\nexport_dir: x\n", "merges and exports a model"),
        ("recipe.yaml", "model: starter\ndata: {train: a.jsonl}\n", "looks like a recipe of weitiao already"),
        ("model.py", "class Model:\n    layers = 28\n", "holds no class that says how to train"),
        ("broken.py", "def (:\n", "is no Python that can be read"),
        ("go.sh", "python serve.py --port 8000\n", "starts serve.py, with no training flags"),
        ("open.sh", "python train.py --use_lora 'True\n", "A line of the script cannot be read"),
        ("eval.sh", "python main.py --do_predict --pre_seq_len 8 --prompt_column a\n", "trains nothing"),
        ("word.sh", "python train.py --use_lora True --lora_rank eight --dev_path a\n", "'eight' is no number"),
        ("yes.sh", "python train.py --use_lora perhaps --lora_rank 8 --dev_path a\n", "is neither true nor false"),
        ("half.yaml", changed(FACTORY, lora_rank=8.5), "8.5 is no whole number"),
        ("model.safetensors", "x", "holds weights"),
    ],
)
def test_a_wrong_file_gets_a_sentence(name: str, text: str, told: str) -> None:
    assert told in refuse("migrate", write(name, text), "-o", "out.yaml").replace("\n", " ")
    assert not Path("out.yaml").exists()


def test_folders_missing_files_bytes_and_large_files_get_a_sentence(here: Path) -> None:
    assert "is a folder" in refuse("migrate", here)
    assert "There is no file" in refuse("migrate", here / "none.yaml")
    Path("b.yaml").write_bytes(b"\xff\xfe\x00stage")
    assert "is no UTF-8 text" in refuse("migrate", "b.yaml")
    assert "is too large" in refuse("migrate", write("large.yaml", "stage: sft\n" * 100_000))


def test_values_that_no_recipe_takes_get_a_sentence() -> None:
    told = refuse("migrate", write("c.yaml", changed(FACTORY, learning_rate=-1)), "-o", "out.yaml")
    assert "What c.yaml says cannot be used as written" in told and "train.learning_rate" in told
    assert not Path("out.yaml").exists()


def test_nothing_in_a_script_is_run(here: Path) -> None:
    text = SEED.replace("checkpoints/x", f"$(touch {here}/ran)").replace("cuda:0", f"`touch {here}/ran`")
    migrate(write("train.sh", text))
    assert not (here / "ran").exists()


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_terminal_tells_what_became_of_every_setting() -> None:
    write("train.sh", SEED.rstrip() + " --frobnicate '# 3: [4'\n")
    printed = succeed("migrate", "train.sh", "-o", "new.yaml")
    assert "--learning_rate 3e-5 → train.learning_rate: 3.0e-05" in printed
    assert all(f"--{name}" in printed for name in flags(SEED))
    assert "--frobnicate # 3: [4 — unknown: no setting" in printed
    assert load_recipe("new.yaml").name == "new" and "--frobnicate # 3: [4" in Path("new.yaml").read_text("utf-8")
    assert "exists already" in refuse("migrate", "train.sh", "-o", "new.yaml")
    assert run_cli("migrate", "train.sh", "-o", "new.yaml", "--force").exit_code == 0
