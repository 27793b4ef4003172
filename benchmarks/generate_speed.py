"""Speed of weitiao's batched generation against one-row-at-a-time `model.generate`, greedy, on the same prompts.

    python benchmarks/generate_speed.py --model FOLDER_OR_RUN --data dev.jsonl --rows 100 --dtype bfloat16 [--exact]

FOLDER holds a model, or a PEFT adapter (on the starter model, unless --base names another); a RUN is a weitiao run
folder, whose adapter is taken. Data rows are `{"context": …}`; a prompt is the beginning-of-sequence token and the
tokens of the context. Both sides get the same prompts, stop token and token limit and take turns in one process, so
that a machine that slows down slows both. Tokens are counted with their stop token.

Exits with 1 when weitiao is not at least 8 times as fast.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from weitiao.generate.engine import Sampling, generate
from weitiao.models.starter import starter_folder

WANTED_RATIO = 8.0


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One side's answers to some prompts (stop tokens included) and how long they took."""

    answers: list[list[int]]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(len(answer) for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides are asked."""

    model: PreTrainedModel | PeftModel
    stop_id: int
    max_new_tokens: int
    max_rows: int
    exact: bool


def open_model(folder: Path, base: Path, dtype: torch.dtype) -> PreTrainedModel | PeftModel:
    """The model in `folder`, or the adapter there on `base`, in evaluation mode."""
    if not (folder / "adapter_config.json").exists():
        return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder).eval()


def one_row_at_a_time(job: Job, prompts: Sequence[list[int]]) -> Turn:
    """Answers by transformers' own `generate`."""
    answers, start = [], time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt], device=job.model.device)
        output = job.model.generate(  # type: ignore[operator]  # PEFT hands it on untyped
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=job.max_new_tokens,
            eos_token_id=job.stop_id,
            pad_token_id=job.stop_id,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return Turn(answers=answers, seconds=time.perf_counter() - start)


def batched(job: Job, prompts: Sequence[list[int]]) -> Turn:
    """Answers by weitiao's engine."""
    answers: list[list[int]] = [[]] * len(prompts)
    sampling = Sampling(max_new_tokens=job.max_new_tokens)
    start = time.perf_counter()
    for done in generate(
        job.model, prompts, stop_ids=[job.stop_id], sampling=sampling, max_rows=job.max_rows, exact=job.exact
    ):
        answers[done.index] = [*done.token_ids, *([job.stop_id] if done.finish == "stop" else [])]
    return Turn(answers=answers, seconds=time.perf_counter() - start)


def where_and_when() -> str:
    """Machine, versions, date and commit, for the record beside the numbers."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {datetime.date.today()}; commit {git.stdout.strip() or 'unknown'}"
    )


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model, an adapter or a run")
    parser.add_argument("--base", type=Path, help="an adapter's base model; default: starter")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with a `context` each")
    parser.add_argument("--rows", type=int, default=100, help="prompts that weitiao answers")
    parser.add_argument("--reference-rows", type=int, help="how many of them one-row generation answers, too; all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-rows", type=int, default=32, help="rows that weitiao runs together")
    parser.add_argument("--exact", action="store_true", help="round as one row alone does (see generate)")
    parser.add_argument("--turns", type=int, default=3, help="how often each side has its turn")
    args = parser.parse_args()

    folder = args.model / "adapter" if (args.model / "adapter" / "adapter_config.json").exists() else args.model
    base = args.base or starter_folder()
    model = open_model(folder, base, {"bfloat16": torch.bfloat16, "float32": torch.float32}[args.dtype])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with args.data.open(encoding="utf-8") as file:
        contexts = [json.loads(line)["context"] for line in file][: args.rows]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [first + tokenizer(context, add_special_tokens=False).input_ids for context in contexts]
    job = Job(
        model=model,
        stop_id=tokenizer.eos_token_id,
        max_new_tokens=args.max_new_tokens,
        max_rows=args.max_rows,
        exact=args.exact,
    )

    for warm_up in (one_row_at_a_time, batched):
        warm_up(Job(model=model, stop_id=job.stop_id, max_new_tokens=4, max_rows=4, exact=job.exact), prompts[:4])
    # weitiao answers all rows in each of its turns, since a full batch is what is measured; one-row generation gains
    # nothing from more rows, so its turns share them out.
    picked = list(range(0, len(prompts), max(1, len(prompts) // (args.reference_rows or len(prompts)))))
    shares = [picked[turn :: args.turns] for turn in range(args.turns)]
    ours, theirs = [], []
    for share in shares:
        ours.append(batched(job, prompts))
        theirs.append(one_row_at_a_time(job, [prompts[index] for index in share]))

    fast = sum(turn.num_tokens for turn in ours) / sum(turn.seconds for turn in ours)
    slow = sum(turn.num_tokens for turn in theirs) / sum(turn.seconds for turn in theirs)
    same = [
        fast_turn.answers[index] == answer
        for share, fast_turn, slow_turn in zip(shares, ours, theirs, strict=True)
        for index, answer in zip(share, slow_turn.answers, strict=True)
    ]
    print(f"{args.model}, {args.dtype}, {len(prompts)} prompts of {args.data}, at most {job.max_new_tokens} new tokens")
    print(where_and_when())
    print(f"weitiao, {job.max_rows} rows{', exact' if job.exact else ''}: {fast:8.1f} tokens/s")
    print(f"model.generate, one row: {slow:8.1f} tokens/s")
    print(f"ratio: {fast / slow:.1f} (wanted: {WANTED_RATIO:g})")
    print(f"identical answers: {sum(same)} of {len(same)} ({sum(same) / len(same):.1%})")
    return 0 if fast / slow >= WANTED_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
