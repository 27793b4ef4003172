"""Training settings as other programs' users write them, with every setting that these programs document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from weitiao.migrate import Migration, Wishes, migrate_file
from weitiao.recipe import load_recipe

DEMO = """
data_config:
  train_file: train.json
  val_file: dev.json
  test_file: dev.json
  num_proc: 16
max_input_length: 256
max_output_length: 512
training_args:
  # see `transformers.Seq2SeqTrainingArguments`
  output_dir: ./output
  max_steps: 3000
  learning_rate: 5e-5
  per_device_train_batch_size: 4
  dataloader_num_workers: 16
  remove_unused_columns: false
  save_strategy: steps
  save_steps: 500
  log_level: info
  logging_strategy: steps
  logging_steps: 10
  per_device_eval_batch_size: 16
  evaluation_strategy: steps
  eval_steps: 500
  predict_with_generate: yes
  generation_config:
    max_new_tokens: 512
  use_cpu: false
"""
LORA = """peft_config:
  peft_type: LORA
  task_type: CAUSAL_LM
  r: 8
  lora_alpha: 32
  lora_dropout: 0.1
"""
PREFIX = """peft_config:
  peft_type: PREFIX_TUNING
  task_type: CAUSAL_LM
  num_virtual_tokens: 128
"""

SEED = """#!/bin/bash
# 单卡训练
python train.py \\
    --train_path data/train.jsonl \\
    --dev_path data/dev.jsonl \\
    --use_lora True --use_ptuning "" \\
    --lora_rank 8 --pre_seq_len 128 --prefix_projection False \\
    --batch_size 1 --num_train_epochs 2 --save_freq 1000 \\
    --learning_rate 3e-5 --weight_decay 0.001 --warmup_ratio 0.1 --logging_steps 100 \\
    --max_source_seq_len 400 --max_target_seq_len 300 \\
    --save_dir checkpoints/x --img_log_dir "log/curve" --img_log_name "ChatGLM Fine-Tune" \\
    --device cuda:0 --preprocessing_num_workers 1 --quantization_bit 8
"""

PTUNING = """PRE=128
LR=2e-2
torchrun --standalone --nnodes=1 --nproc_per_node=2 main.py \\
    --do_train --do_eval --do_predict --overwrite_cache --overwrite_output_dir --predict_with_generate \\
    --model_name_or_path THUDM/chatglm-6b --ptuning_checkpoint old/checkpoint-1 --config_name c --tokenizer_name t \\
    --cache_dir d --use_fast_tokenizer True --model_revision v1.1.0 --use_auth_token True \\
    --resize_position_embeddings True --quantization_bit 4 --pre_seq_len $PRE --prefix_projection True --lang zh \\
    --dataset_name o/n --dataset_config_name c --prompt_column content --response_column summary \\
    --history_column history --train_file train.json --validation_file dev.json --test_file test.json \\
    --preprocessing_num_workers 10 --max_source_length 64 --max_target_length 64 --val_max_target_length 64 \\
    --pad_to_max_length True --max_train_samples 50 --max_eval_samples 5 --max_predict_samples 5 --num_beams 2 \\
    --ignore_pad_token_for_loss True --source_prefix 问： --forced_bos_token x --output_dir output/pt-$PRE-$LR \\
    --learning_rate $LR --max_steps 3000 --logging_steps 10 --save_steps 1000 --fp16 --deepspeed deepspeed.json \\
    --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16
"""

LIUCONGG = """CUDA_VISIBLE_DEVICES=0,1,2,3 deepspeed --master_port 520 train.py --train_path spo.json \\
    --model_name_or_path ChatGLM-6B/ --per_device_train_batch_size 1 --max_len 1560 --max_src_len 1024 --is_skip True \\
    --learning_rate 1e-4 --weight_decay 0.3 --num_train_epochs 2 --gradient_accumulation_steps 4 --warmup_ratio 0.1 \\
    --mode glm --train_type lora --lora_dim 16 --lora_alpha 64 --lora_dropout 0.1 \\
    --lora_module_name "query_key_value,dense" --freeze_module_name "layers.27." --pre_seq_len 16 \\
    --prefix_projection True --seed 1234 --local_rank -1 --show_loss_step 10 --save_model_step 100 \\
    --ds_file ds_zero2.json --output_dir ./out --gradient_checkpointing
"""

FACTORY = """
### model
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: identity, my.json
dataset_dir: data
template: qwen
cutoff_len: 1024
max_samples: 1000
packing: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: saves/qwen/lora/sft
logging_steps: 5
save_steps: 100
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]
### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 5.0e-5
num_train_epochs: 50.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
fp16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
max_grad_norm: 1.0
optim: adamw_torch
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
FACTORY_OTHERS = """additional_target adapter_folder adapter_name_or_path add_special_tokens add_tokens apollo_rank
    badam_mode buffer_size cache_dir compute_accuracy create_new_adapter default_system disable_gradient_checkpointing
    disable_shuffling do_sample double_quantization ds_offload early_stopping_steps enable_liger_kernel enable_thinking
    eval_num_beams eval_on_each_dataset export_dir export_size flash_attn freeze_extra_modules freeze_trainable_layers
    freeze_trainable_modules freeze_vision_tower galore_rank hf_hub_token image_max_pixels
    include_effective_tokens_per_second infer_backend infer_dtype interleave_probs length_penalty lora_alpha
    lora_dropout loraplus_lr_ratio low_cpu_mem_usage mask_history max_length max_new_tokens media_dir mix_strategy
    mixture_of_depths moe_aux_loss_coef model_revision neat_packing neftune_noise_alpha num_beams offload_folder
    oft_rank pissa_init ppo_epochs pref_beta pref_loss print_param_status pure_bf16 quantization_bit
    quantization_method quantization_type ray_num_workers ref_model repetition_penalty reserved_label_len resize_vocab
    reward_model rope_scaling shift_attn skip_special_tokens split_special_tokens streaming swanlab_project
    temperature tokenized_path tool_format top_k top_p train_from_scratch train_on_prompt upcast_layernorm use_adam_mini
    use_badam use_dft_loss use_dora use_fast_tokenizer use_galore use_kv_cache use_llama_pro use_muon use_rslora
    use_swanlab use_unsloth vllm_maxlen"""

BOARD = """
top.lang: zh
top.model_name: ChatGLM3-6B-Chat
top.model_path: THUDM/chatglm3-6b
top.finetuning_type: lora
top.quantization_bit: none
top.template: chatglm3
train.training_stage: Supervised Fine-Tuning
train.dataset_dir: data
train.dataset: [self_cognition, psychology]
train.learning_rate: 5e-5
train.num_train_epochs: '50.0'
train.max_grad_norm: '1.0'
train.max_samples: '100000'
train.compute_type: fp16
train.cutoff_len: 1024
train.batch_size: 2
train.gradient_accumulation_steps: 8
train.val_size: 0
train.lr_scheduler_type: cosine
train.logging_steps: 5
train.save_steps: 100
train.warmup_steps: 0
train.neftune_alpha: 0
train.optim: adamw_torch
train.lora_rank: 8
train.lora_alpha: 16
train.lora_dropout: 0
train.use_rslora: false
train.use_dora: true
train.lora_target: query_key_value
"""


def write(name: str, text: str) -> Path:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def changed(text: str, **values: Any) -> str:
    """The YAML `text` with other values; None takes a key out."""
    kept = {**yaml.safe_load(text), **values}
    return yaml.safe_dump({key: value for key, value in kept.items() if value is not None}, sort_keys=False)


def write_rows(path: str, count: int, *, first: int = 0) -> None:
    rows = [
        {"conversations": [{"role": "user", "content": f"问{n}"}, {"role": "assistant", "content": f"答{n}"}]}
        for n in range(first, first + count)
    ]
    write(path, json.dumps(rows, ensure_ascii=False))


def migrate(file: Path, *, command: int | None = None, **wishes: Any) -> Migration:
    """The migration of `file`; what it wrote is the recipe that it tells of."""
    done = migrate_file(file, wishes=Wishes(**wishes), command=command, out="new.yaml", overwrite=True)
    assert load_recipe("new.yaml") == done.recipe
    return done


def flags(script: str) -> list[str]:
    return re.findall(r"(?<= )--(\w+)", script.partition(".py")[2])


def keys(text: str) -> list[str]:
    """The keys of a YAML text, inner ones by dotted names."""
    return list(_flat(yaml.safe_load(text)))


def _flat(values: dict[str, Any], before: str = "") -> Iterable[str]:
    for key, value in values.items():
        yield from _flat(value, f"{before}{key}.") if isinstance(value, dict) else [f"{before}{key}"]


def accounts(done: Migration, names: Iterable[str], *, dashes: str = "") -> dict[str, str]:
    """For each setting what became of it: it stands in exactly one entry, with words, and in the recipe's text."""
    found: dict[str, str] = {}
    for kind, entries in (("carried", done.carried), ("needless", done.needless), ("left", done.left)):
        for entry in entries:
            assert entry.words or entry.place
            assert not entry.words.startswith("unknown"), entry
            for name in names:
                if re.search(rf"(^|, ){dashes}{re.escape(name)}(:| |,|$)", entry.setting):
                    assert name not in found, f"{name} is told twice"
                    found[name] = f"{kind} {entry.place}".strip()
    missing = sorted(set(names) - set(found))
    assert not missing, f"nothing is told of {missing}"
    unwritten = [name for name in names if f"{dashes}{name}" not in done.text]
    assert not unwritten, f"the recipe says nothing of {unwritten}"
    return found
