"""Every setting that other programs document becomes a key of a recipe, needs none, or is named with the reason."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainingArguments

from foreign_settings import (
    BOARD,
    DEMO,
    FACTORY,
    FACTORY_OTHERS,
    LIUCONGG,
    LORA,
    PREFIX,
    PTUNING,
    SEED,
    accounts,
    changed,
    flags,
    keys,
    migrate,
    write,
    write_rows,
)
from weitiao.data.order import num_steps

PROJECT_CONFIG = """
import os.path, torch
open({ran!r}, "w").close()
base_dir = os.path.dirname(os.path.abspath(__file__))
class ProjectConfig(object):
    def __init__(self):
        self.device = 'cuda:0' if torch.cuda.is_available() else 'cpu'
        self.pre_model = os.path.join(base_dir, '../models/chatglm-6b-int4')
        self.train_path = os.path.join(base_dir, 'data/train.jsonl')
        self.dev_path = os.path.join(base_dir, 'data/dev.jsonl')
        self.use_lora = True
        self.use_ptuning = False
        self.lora_rank = 8
        self.batch_size = 4
        self.epochs = 2
        self.learning_rate = 3e-5
        self.weight_decay = 0
        self.warmup_ratio = 0.06
        self.max_source_seq_len = 100
        self.max_target_seq_len = 100
        self.logging_steps = 10
        self.save_freq = 200
        self.pre_seq_len = 200
        self.prefix_projection = False
        self.save_dir = os.path.join(base_dir, 'save_model')
        self.threads = os.cpu_count()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("peft", [LORA, PREFIX], ids=["lora.yaml", "ptuning_v2.yaml"])
def test_finetune_demo_is_carried_key_by_key(peft: str) -> None:
    write_rows("AdvertiseGen/train.json", 50)
    write_rows("AdvertiseGen/dev.json", 5)
    done = migrate(write("c.yaml", DEMO + peft), model="THUDM/chatglm3-6b", data=("AdvertiseGen",))
    found = accounts(done, keys(DEMO + peft))
    recipe = done.recipe
    assert [source.path for source in (*recipe.data.train, *recipe.data.dev)] == [
        "AdvertiseGen/train.json",
        "AdvertiseGen/dev.json",
    ]
    assert (recipe.data.max_length, recipe.data.overlong) == (769, "shorten_input")
    assert (recipe.train.batch_size, recipe.train.learning_rate, recipe.train.schedule) == (4, 5e-5, "linear")
    assert (recipe.train.warmup, recipe.train.row_balance, recipe.train.gradient_checkpointing) == (0, 0, True)
    assert (recipe.train.save_every, recipe.train.evaluate_every, recipe.train.evaluate_rows) == (500, 500, 50)
    assert num_steps([1.0] * 50, batch_size=4, seed=42, epochs=recipe.train.epochs) == 3000
    assert found["training_args.max_steps"] == "carried train.epochs"
    assert found["training_args.generation_config.max_new_tokens"] == "carried generate.max_new_tokens"
    if peft is LORA:
        assert recipe.method.name == "lora"
        assert (recipe.method.rank, recipe.method.alpha, recipe.method.dropout) == (8, 32, 0.1)
        assert recipe.method.targets == ("q_proj", "k_proj", "v_proj"), "query_key_value by transformers' names"
    else:
        assert recipe.method.name == "ptuning_v2" and recipe.method.num_virtual_tokens == 128


def test_glm4s_own_keys_are_carried() -> None:
    text = DEMO + LORA + "  target_modules: [q_proj, k_proj, v_proj]\ncombine: True\nfreezeV: True\nswanlab: local\n"
    done = migrate(write("c.yaml", text), model="THUDM/glm-4-9b-chat", data=("a.jsonl",), rows=100)
    found = accounts(done, [name for name in keys(text) if name != "data_config.val_file"])
    assert (found["combine"], found["freezeV"]) == ("carried data.turns", "needless")
    assert found["swanlab"] == "carried monitor"
    [monitor] = done.recipe.monitor
    assert monitor.name == "swanlab" and monitor.mode == "local" and not monitor.tables, "figures alone"
    assert done.recipe.data.turns == "last" and not done.recipe.data.dev


def test_every_flag_of_the_seeds_trainer_is_carried_or_named() -> None:
    done = migrate(write("train.sh", SEED))
    found = accounts(done, flags(SEED), dashes="--")
    recipe = done.recipe
    assert len(found) == 22 and (recipe.model.path, recipe.model.quantize) == ("THUDM/chatglm-6b", "int8")
    assert recipe.method.name == "lora"
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.dropout) == (8, 32, 0.1)
    assert recipe.method.targets == ("query_key_value",), "ChatGLM-6B keeps its own names"
    assert (recipe.data.max_length, recipe.train.weight_decay, recipe.train.warmup) == (700, 0.001, 0.1)
    assert recipe.train.save_every == recipe.train.evaluate_every == 1000
    assert found["pre_seq_len"] == found["prefix_projection"] == "left", "no prefix where LoRA tunes"


def test_the_seeds_p_tuning_on_two_gpus() -> None:
    start = "CUDA_VISIBLE_DEVICES=0,1 accelerate launch --multi_gpu --mixed_precision=fp16 --num_processes=2 t.py"
    text = SEED.replace("python train.py", start).replace('--use_ptuning ""', "--use_ptuning True")
    done = migrate(
        write("train.sh", text.replace("--use_lora True", "").replace("projection False", "projection True"))
    )
    settings = {
        "name": "ptuning_v2",
        "num_virtual_tokens": 128,
        "projection": True,
        "dropout": 0.1,
        "init": "vocabulary",
    }
    assert done.recipe.method.model_dump() == settings
    assert done.recipe.train.batch_size == 2, "a row on each of two devices"
    assert "--mixed_precision fp16" in [entry.setting for entry in done.left]


def test_a_project_config_class_is_read_and_never_run(here: Path) -> None:
    source = PROJECT_CONFIG.format(ran=str(here / "ran"))
    file = write(str(here / "course/glm_config.py"), source)
    done = migrate(file)
    found = accounts(done, re.findall(r"self\.(\w+) =", source))
    assert not (here / "ran").exists()
    recipe = done.recipe
    assert recipe.model.path == str(here / "models/chatglm-6b-int4")
    assert recipe.data.train[0].path == str(here / "course/data/train.jsonl")
    assert (recipe.train.batch_size, recipe.train.warmup, recipe.data.max_length) == (4, 0.06, 200)
    assert recipe.train.save_every == recipe.train.evaluate_every == "epoch"
    assert found["threads"] == "left" and found["save_freq"] == "left" and found["epochs"] == "carried train.epochs"


def test_every_flag_of_ptuning_main_is_carried_or_named() -> None:
    write_rows("train.json", 100)
    done = migrate(write("train.sh", PTUNING))
    found = accounts(done, flags(PTUNING), dashes="--")
    recipe = done.recipe
    assert (recipe.model.path, recipe.model.quantize) == ("THUDM/chatglm-6b", "int4")
    assert (recipe.model.adapter, recipe.model.dtype) == ("old/checkpoint-1", "float16")
    assert recipe.method.name == "ptuning_v2"
    assert (recipe.method.num_virtual_tokens, recipe.method.projection) == (128, True)
    assert (recipe.train.batch_size, recipe.data.max_length, recipe.train.learning_rate) == (32, 128, 0.02)
    assert (recipe.data.train[0].limit, recipe.data.dev[0].limit) == (50, 5)
    assert num_steps([1.0] * 50, batch_size=32, seed=42, epochs=recipe.train.epochs) == 3000
    assert found["source_prefix"] == "left", "rows with a history are asked as they are"


def test_a_source_prefix_becomes_the_prompt_of_rows_without_history() -> None:
    done = migrate(write("train.sh", PTUNING.replace("--history_column history", "")), rows=100)
    assert done.recipe.data.train[0].prompt == "问：{content}"


def test_every_flag_of_liuconggs_trainer_is_carried_or_named() -> None:
    done = migrate(write("train.sh", LIUCONGG))
    found = accounts(done, flags(LIUCONGG), dashes="--")
    recipe = done.recipe
    assert recipe.method.name == "lora"
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.targets) == (16, 64, ("query_key_value", "dense"))
    assert (recipe.data.overlong, recipe.train.batch_size) == ("drop", 16)
    assert recipe.train.weight_decay == 0.1 and found["weight_decay"] == "left", "the original ignores the flag"
    other = migrate(write("train.sh", LIUCONGG.replace("ChatGLM-6B", "ChatGLM3-6B"))).recipe.method
    assert other.name == "lora" and other.targets == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_a_file_of_llama_factory_is_carried_key_by_key() -> None:
    done = migrate(write("c.yaml", FACTORY))
    accounts(done, keys(FACTORY))
    recipe = done.recipe
    assert [source.path for source in recipe.data.train] == [
        "data/dataset_info.json#identity",
        "data/dataset_info.json#my.json",
    ]
    assert {source.limit for source in recipe.data.train} == {1000}
    assert (recipe.data.held_out, recipe.data.max_length, recipe.train.batch_size) == (0.1, 1024, 16)
    assert recipe.method.name == "lora"
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.targets) == (8, 16, "all-linear")
    assert (recipe.train.schedule, recipe.train.warmup, recipe.train.epochs) == ("cosine", 0.1, 50)
    assert recipe.model.dtype == "float16" and recipe.train.gradient_checkpointing


def test_json_says_the_same_as_yaml() -> None:
    import json

    import yaml

    by_yaml = migrate(write("c.yaml", FACTORY))
    by_json = migrate(write("c.json", json.dumps(yaml.safe_load(FACTORY))))
    assert by_yaml.recipe == by_json.recipe and by_yaml.left == by_json.left


def test_all_other_keys_of_llama_factory_are_known() -> None:
    odd = {**dict.fromkeys(FACTORY_OTHERS.split(), 1), "quantization_bit": 4, "adapter_name_or_path": "old"}
    odd |= {"lora_dropout": 0.1}
    text = changed(FACTORY, **odd)
    done = migrate(write("c.yaml", text))
    accounts(done, keys(text))
    method, model = done.recipe.method, done.recipe.model
    assert method.name == "lora" and method.rslora and method.dora
    assert (model.quantize, model.adapter) == ("int4", "old")
    assert done.recipe.data.turns == "last" and done.recipe.generate.temperature == 1.0


def test_trackers_become_monitors_that_send_no_text() -> None:
    odd = {"report_to": ["tensorboard", "wandb"], "use_swanlab": True, "swanlab_mode": "local"}
    odd |= {"swanlab_project": "p", "swanlab_api_key": "secret-of-mine", "swanlab_workspace": "w"}
    done = migrate(write("c.yaml", changed(FACTORY, **odd)))
    accounts(done, odd)
    assert [monitor.name for monitor in done.recipe.monitor] == ["tensorboard", "wandb", "swanlab"]
    assert not any(monitor.tables for monitor in done.recipe.monitor)
    last = done.recipe.monitor[-1]
    assert last.name == "swanlab" and (last.mode, last.project, last.workspace) == ("local", "p", "w")
    assert "secret-of-mine" not in done.text and not any("secret-of-mine" in entry.setting for entry in done.left)


def test_every_argument_of_the_installed_trainer_is_known() -> None:
    named = {field.name: 1 for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    del named["generation_config"]  # LLaMA-Factory has its own settings of generation
    words = {"lr_scheduler_type": "linear", "eval_strategy": "steps", "save_strategy": "epoch", "num_train_epochs": 2}
    done = migrate(write("c.yaml", changed(FACTORY, **{**named, **words, "max_steps": 50})), rows=100)
    accounts(done, named)


def test_what_a_llama_board_saved_is_read() -> None:
    done = migrate(write("llamaboard_config.yaml", BOARD))
    assert not [entry for entry in done.left if entry.words.startswith("unknown")]
    recipe = done.recipe
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.model.dtype) == (16, 50, "float16")
    assert recipe.method.name == "lora" and recipe.method.dora
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.targets) == (8, 16, ("q_proj", "k_proj", "v_proj"))
    assert recipe.data.held_out == 0 and any("No row is kept apart" in note for note in done.notes)
