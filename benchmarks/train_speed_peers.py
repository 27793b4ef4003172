"""The peers of the training-speed benchmark: the ways a user would train the same adapter without weitiao.

    python benchmarks/train_speed_peers.py PEER --model DIR --rows FILE.jsonl --adapter INIT.safetensors --steps 6

Each peer trains on the rows, steps, first adapter and optimiser that `train_speed_rows` fixes, and prints one JSON
line per optimiser step and a last one with `"summary": true`. Run one peer per process, since the peak of memory is
the process's own. Nothing here knows weitiao.

`--set NAME=VALUE` changes one field of the peer's `Setting`; the search for `TRL_BEST` was made with it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from train_speed_rows import (
    IGNORED_LABEL,
    LEARNING_RATE,
    MAX_ROW_TOKENS,
    NUM_ROWS_PER_STEP,
    TokenRow,
    load_initial_adapter,
    lora_config,
    plan_steps,
    read_token_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a peer may choose for itself; none of it changes which rows make up a step, nor the loss that is meant."""

    rows_per_batch: int
    weights: str = "float32"
    adapters: str = "float32"
    autocast: bool = False
    checkpointing: bool = False
    # Within a step, sort the rows by length, so that a micro-batch holds rows of like length.
    sorted_by_length: bool = False
    # Plain loops only: the width to which every row is padded; None pads to the longest of the micro-batch.
    padded_width: int | None = None
    # TRL only: lay the rows of a micro-batch end to end instead of padding them.
    padding_free: bool = False
    # TRL only: "fused" is TRL's own tiled head; "logits" overrides `compute_loss` with that of transformers' Trainer.
    head: str = "fused"
    attention: str = "sdpa"
    compiled: bool = False
    num_workers: int = 0


# One row at a time in float32, nothing padded: slow, and the loss that the others are held against.
REFERENCE = Setting(rows_per_batch=1)
SEED = Setting(rows_per_batch=4, padded_width=MAX_ROW_TOKENS, checkpointing=True)
TRAINER = Setting(rows_per_batch=4, weights="bfloat16", autocast=True)
# SFTTrainer 1.16 given the name of a model: it loads float32 whatever the file says, and autocasts to bfloat16.
TRL_DEFAULT = Setting(rows_per_batch=8, autocast=True, checkpointing=True)
# The best found among SFTConfig's own settings: larger batches were slower (48 tokens/s at 8 rows), so was autocast.
TRL_BEST = Setting(rows_per_batch=1, weights="bfloat16", compiled=True)
# Not a setting but a subclass: SFTTrainer with the loss of transformers' Trainer, which computes all logits at once.
TRL_PATCHED = Setting(rows_per_batch=1, weights="bfloat16", compiled=True, head="logits")


@dataclass(frozen=True, kw_only=True)
class Task:
    """The work that is the same for every peer."""

    model_dir: Path
    adapter_path: Path
    tokenizer: PreTrainedTokenizerBase
    steps: Sequence[Sequence[TokenRow]]


class StepRecorder:
    """Writes a JSON line per optimiser step: loss, real tokens, seconds since the last step, peak memory so far."""

    def __init__(self, steps: Sequence[Sequence[TokenRow]], output: TextIO) -> None:
        self._steps = steps
        self._output = output
        self._records: list[dict[str, Any]] = []
        self._loss = 0.0
        self._load_peak_rss_mb = 0.0
        self._last_time = 0.0
        self._last_cpu_time = 0.0

    def begin_training(self) -> None:
        """Start the clock and, where the kernel allows it, the count of peak memory afresh, after all loading."""
        self._load_peak_rss_mb = read_peak_rss_mb()
        reset_peak_rss()
        self._restart_clocks()

    def add_micro_batch_loss(self, loss: float) -> None:
        """Add one micro-batch's share of the step's loss: its sum over supervised tokens ÷ those of the step."""
        self._loss += loss

    def end_step(self) -> None:
        record = {
            "step": len(self._records) + 1,
            "loss": self._loss,
            "real_tokens": sum(len(row.input_ids) for row in self._steps[len(self._records)]),
            "seconds": time.perf_counter() - self._last_time,
            # Of all threads: on one thread it tells the cost of a step even where other processes crowd the machine.
            "cpu_seconds": time.process_time() - self._last_cpu_time,
            "peak_rss_mb": read_peak_rss_mb(),
        }
        self._records.append(record)
        self._write(record)
        self._loss = 0.0
        self._restart_clocks()

    def write_summary(self, peer: str, setting: Setting) -> None:
        """Write the last line; its rate leaves out the first step, which warms up (or compiles)."""
        timed = self._records[1:] or self._records
        real_tokens = sum(record["real_tokens"] for record in timed)
        seconds = sum(record["seconds"] for record in timed)
        self._write(
            {
                "summary": True,
                "peer": peer,
                "num_steps": len(self._records),
                "num_timed_steps": len(timed),
                "real_tokens": real_tokens,
                "seconds": seconds,
                "cpu_seconds": sum(record["cpu_seconds"] for record in timed),
                "tokens_per_second": real_tokens / seconds,
                "peak_rss_mb": self._records[-1]["peak_rss_mb"],
                "load_peak_rss_mb": self._load_peak_rss_mb,
                "num_threads": torch.get_num_threads(),
                "setting": dataclasses.asdict(setting),
            }
        )

    def _restart_clocks(self) -> None:
        self._last_time = time.perf_counter()
        self._last_cpu_time = time.process_time()

    def _write(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self._output, flush=True)


def read_peak_rss_mb() -> float:
    """Return the most memory this process has had resident (VmHWM), in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM line; the benchmark needs Linux")


def reset_peak_rss() -> None:
    """Set VmHWM back to what is resident now; where that is forbidden, the peak of loading stays in the figure."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def train_with_plain_loop(task: Task, setting: Setting, recorder: StepRecorder) -> None:
    """Train as the first seed document does: a loop over padded batches, with logits and labels at every position.

    The document takes the mean loss of each batch of four. Here four batches make a step, so each mean counts in
    proportion to its supervised tokens, which makes the sum the mean over the step.
    """
    model = load_adapted_model(task, setting)
    model.config.use_cache = False
    if setting.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)

    model.train()
    recorder.begin_training()
    for rows in order_rows(task.steps, setting):
        num_supervised_tokens = sum(row.num_supervised_tokens for row in rows)
        optimizer.zero_grad()
        for start in range(0, len(rows), setting.rows_per_batch):
            batch_rows = rows[start : start + setting.rows_per_batch]
            batch = pad_right(batch_rows, pad_token_id=task.tokenizer.pad_token_id, width=setting.padded_width)
            share = sum(row.num_supervised_tokens for row in batch_rows) / num_supervised_tokens
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
                loss = model(**batch).loss * share
            loss.backward()
            recorder.add_micro_batch_loss(loss.item())
        optimizer.step()
        recorder.end_step()


def train_with_trainer(task: Task, setting: Setting, recorder: StepRecorder) -> None:
    """Train with transformers' Trainer and PEFT, the labels made beforehand."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as output_dir:
        trainer = Trainer(
            model=load_adapted_model(task, setting),
            args=TrainingArguments(
                **shared_arguments(task, setting, output_dir),
                bf16=setting.autocast,
                gradient_checkpointing=setting.checkpointing,
            ),
            train_dataset=[
                {"input_ids": list(row.input_ids), "attention_mask": [1] * len(row.input_ids), "labels": row.labels}
                for rows in order_rows(task.steps, setting)
                for row in rows
            ],
            data_collator=DataCollatorForSeq2Seq(task.tokenizer, padding=True, label_pad_token_id=IGNORED_LABEL),
            processing_class=task.tokenizer,
        )
        run_trainer(trainer, recorder)


def train_with_trl(task: Task, setting: Setting, recorder: StepRecorder) -> None:
    """Train with TRL's SFTTrainer on prompt/completion rows.

    The rows go in as tokens with a completion mask. Left to tokenise the texts, TRL would join prompt and completion
    first, which merges the space at the end of each prompt into the answer: other tokens than everyone else's.
    """
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class LogitsSFTTrainer(SFTTrainer):
        """SFTTrainer with the loss of its parent, which is how TRL advises to replace its own."""

        compute_loss = Trainer.compute_loss

    with tempfile.TemporaryDirectory() as output_dir:
        trainer_class = SFTTrainer if setting.head == "fused" else LogitsSFTTrainer
        trainer = trainer_class(
            model=str(task.model_dir),
            args=SFTConfig(
                **shared_arguments(task, setting, output_dir),
                bf16=setting.autocast,
                gradient_checkpointing=setting.checkpointing,
                completion_only_loss=True,
                padding_free=setting.padding_free,
                # The rows are already within the limit, and padding-free refuses one.
                max_length=None if setting.padding_free else 1024,
                model_init_kwargs={"dtype": setting.weights, "attn_implementation": setting.attention},
            ),
            train_dataset=Dataset.from_list(
                [
                    {
                        "input_ids": list(row.input_ids),
                        "completion_mask": [int(label != IGNORED_LABEL) for label in row.labels],
                    }
                    for rows in order_rows(task.steps, setting)
                    for row in rows
                ]
            ),
            processing_class=task.tokenizer,
            peft_config=lora_config(),
        )
        load_initial_adapter(trainer.model, task.adapter_path)
        cast_adapter(trainer.model, setting)
        run_trainer(trainer, recorder)


def shared_arguments(task: Task, setting: Setting, output_dir: str) -> dict[str, Any]:
    """Return the training arguments that both trainers take: what must be equal for all, and what the setting says."""
    return {
        "output_dir": output_dir,
        "use_cpu": True,
        "max_steps": len(task.steps),
        "per_device_train_batch_size": setting.rows_per_batch,
        "gradient_accumulation_steps": NUM_ROWS_PER_STEP // setting.rows_per_batch,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "torch_compile": setting.compiled,
        "dataloader_num_workers": setting.num_workers,
    }


def run_trainer(trainer: Trainer, recorder: StepRecorder) -> None:
    """Train, telling `recorder` the loss of every micro-batch and the end of every step."""
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            recorder.begin_training()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.end_step()

    run_training_step = trainer.training_step

    def run_and_record_training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = run_training_step(*args, **kwargs)
        recorder.add_micro_batch_loss(loss.item())
        return loss

    trainer.training_step = run_and_record_training_step
    trainer.add_callback(StepCallback)
    trainer.train()


def load_adapted_model(task: Task, setting: Setting) -> PeftModel:
    """Return the model with the initial adapter on it."""
    from peft import get_peft_model

    base = AutoModelForCausalLM.from_pretrained(
        task.model_dir, dtype=getattr(torch, setting.weights), attn_implementation=setting.attention
    )
    model = get_peft_model(base, lora_config())
    load_initial_adapter(model, task.adapter_path)
    cast_adapter(model, setting)
    return model


def cast_adapter(model: PeftModel, setting: Setting) -> None:
    """Store the adapter in the type of the setting; PEFT on its own makes it float32."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(getattr(torch, setting.adapters))


def order_rows(steps: Sequence[Sequence[TokenRow]], setting: Setting) -> Iterator[Sequence[TokenRow]]:
    """Yield the rows of each step in the order in which the setting cuts them into micro-batches."""
    for rows in steps:
        yield sorted(rows, key=lambda row: len(row.input_ids)) if setting.sorted_by_length else rows


def pad_right(rows: Sequence[TokenRow], *, pad_token_id: int, width: int | None) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `labels`, each of shape (rows, width); right padding needs no mask under causal attention.

    Rows of 2 and 3 tokens, `width=None` → `{"input_ids": [[5, 6, 0], [5, 6, 7]], "labels": [[-100, 6, -100], …]}`
    """
    width = width or max(len(row.input_ids) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row in rows:
        num_missing = width - len(row.input_ids)
        batch["input_ids"].append([*row.input_ids, *[pad_token_id] * num_missing])
        batch["labels"].append([*row.labels, *[IGNORED_LABEL] * num_missing])
    return {name: torch.tensor(values) for name, values in batch.items()}


PEERS: dict[str, tuple[Callable[[Task, Setting, StepRecorder], None], Setting]] = {
    "reference": (train_with_plain_loop, REFERENCE),
    "seed": (train_with_plain_loop, SEED),
    "trainer": (train_with_trainer, TRAINER),
    "trl_default": (train_with_trl, TRL_DEFAULT),
    "trl_best": (train_with_trl, TRL_BEST),
    "trl_patched": (train_with_trl, TRL_PATCHED),
}


def change_setting(setting: Setting, assignments: Sequence[str]) -> Setting:
    """Return `setting` with `name=value` assignments applied; values are JSON, or plain words."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        try:
            changes[name] = json.loads(text)
        except json.JSONDecodeError:
            changes[name] = text
    return dataclasses.replace(setting, **changes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one peer of the training-speed benchmark.")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="assignments")
    options = parser.parse_args()

    train, setting = PEERS[options.peer]
    setting = change_setting(setting, options.assignments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    steps = plan_steps(read_token_rows(options.rows, tokenizer), num_steps=options.steps, seed=options.seed)
    task = Task(model_dir=options.model, adapter_path=options.adapter, tokenizer=tokenizer, steps=steps)
    recorder = StepRecorder(steps, sys.stdout)
    # The trainers print their logs to the standard output, which is kept for the records.
    with contextlib.redirect_stdout(sys.stderr):
        train(task, setting, recorder)
    recorder.write_summary(options.peer, setting)


if __name__ == "__main__":
    main()
