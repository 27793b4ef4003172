"""The inputs that every side of the training-speed benchmark shares: token rows, their order, the first adapter.

Knows how a row becomes tokens, which sixteen rows make up which optimiser step, and how the adapter starts. Does not
know how any side trains. The rows are read where they lie and never copied.

Make the adapter file, from which every side starts:

    python benchmarks/train_speed_rows.py --model DIR --adapter INIT.safetensors --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

NUM_ROWS_PER_STEP = 16
# The fixed width to which the seed documents pad: 400 prompt tokens and 300 answer tokens.
MAX_ROW_TOKENS = 400 + 300
LEARNING_RATE = 2e-4
IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One row as the model reads it: `[bos] + prompt + answer + [eos]`, of which the answer and eos are supervised."""

    input_ids: tuple[int, ...]
    num_prompt_tokens: int

    @property
    def labels(self) -> list[int]:
        """The input ids with every prompt token masked.

        `input_ids=(2, 7, 8, 1), num_prompt_tokens=2` → `[-100, -100, 8, 1]`
        """
        return [IGNORED_LABEL] * self.num_prompt_tokens + list(self.input_ids[self.num_prompt_tokens :])

    @property
    def num_supervised_tokens(self) -> int:
        return len(self.input_ids) - self.num_prompt_tokens


def read_token_rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """Return the rows of a `{"context", "target"}` JSON Lines file, in the order of the file.

    Prompt and answer are tokenised apart, so that the boundary between them never moves: the contexts end in a space,
    which a joint tokenisation would merge into the first token of the answer.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        fields = json.loads(line)
        prompt_ids = [tokenizer.bos_token_id, *tokenizer.encode(fields["context"], add_special_tokens=False)]
        answer_ids = [*tokenizer.encode(fields["target"], add_special_tokens=False), tokenizer.eos_token_id]
        rows.append(TokenRow(input_ids=tuple(prompt_ids + answer_ids), num_prompt_tokens=len(prompt_ids)))
    return rows


def plan_steps(rows: Sequence[TokenRow], *, num_steps: int, seed: int) -> list[list[TokenRow]]:
    """Return the rows of each optimiser step; the same arguments give the same steps on every side and machine.

    Rows longer than `MAX_ROW_TOKENS` take no part. An epoch is one shuffle of the rest, of which the last few that
    fill no step are left out; the next epoch shuffles again.
    """
    eligible = [row for row in rows if len(row.input_ids) <= MAX_ROW_TOKENS]
    if len(eligible) < NUM_ROWS_PER_STEP:
        raise ValueError(
            f"{len(eligible)} of {len(rows)} rows have at most {MAX_ROW_TOKENS} tokens, and a step needs "
            f"{NUM_ROWS_PER_STEP}. Pass a file with more rows or shorter ones."
        )
    shuffler = random.Random(seed)
    steps: list[list[TokenRow]] = []
    while len(steps) < num_steps:
        shuffler.shuffle(eligible)
        for start in range(0, len(eligible) - NUM_ROWS_PER_STEP + 1, NUM_ROWS_PER_STEP):
            steps.append(eligible[start : start + NUM_ROWS_PER_STEP])
    return steps[:num_steps]


def lora_config() -> LoraConfig:
    """Return the adapter of the benchmark: rank 16 on every linear layer except the head."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def write_initial_adapter(model_dir: Path, path: Path, *, seed: int) -> None:
    """Write PEFT's default initial adapter (B zero, A random under `seed`) in float32, under PEFT's own key names."""
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    torch.manual_seed(seed)
    model = get_peft_model(base, lora_config())
    save_file({name: weight.contiguous() for name, weight in get_peft_model_state_dict(model).items()}, path)


def load_initial_adapter(model: PeftModel, path: Path) -> None:
    """Replace the adapter weights of `model` by those in `path`; raise `ValueError` when the two do not match."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights: dict[str, Any] = load_file(path)
    expected = get_peft_model_state_dict(model).keys()
    if weights.keys() != expected:
        raise ValueError(
            f"{path} holds {len(weights)} adapter weights and the model has {len(expected)}; "
            f"{len(weights.keys() ^ expected)} names differ. Make the file again for this model."
        )
    set_peft_model_state_dict(model, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the adapter file from which every side starts.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_initial_adapter(options.model, options.adapter, seed=options.seed)


if __name__ == "__main__":
    main()
