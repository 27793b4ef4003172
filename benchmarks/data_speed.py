"""Speed and memory of preparing rows: weitiao, a plain `datasets.map`, and TRL's SFTTrainer; one file, one tokenizer.

    python benchmarks/data_speed.py --rows 1000000

A file of invented rows is written in the shape of the seeds' (`context`, `target`). Then every side, in a process of
its own, makes tokenised training examples of it:

    weitiao       reads, checks every row and answer, infers the tasks, renders, tokenises, writes its cache
    map           datasets.load_dataset("json") and .map(tokenise), a row at a time, as the seeds do it
    trl           SFTTrainer's own preparation of the same rows as prompt and completion, with a tiny random model
    map_batched   .map(tokenise, batched=True, num_proc=2): shown, and held to no target

Only weitiao checks anything. Imports and the loading of tokenizer and model are not timed. Memory is the most that a
side's process and all its children held together (resident, shared pages counted in each). Beside the seconds on the
wall stand those of processor time, which other work on the machine changes less. Exits with 1 when weitiao is
not twice as fast as the faster of `map` and `trl`, or takes 1 GB or more.

`--work FOLDER` keeps the file and the figures, so that the sides can be measured one at a time with `--only`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine

SIDES = ("weitiao", "map", "trl", "map_batched")
HELD_TO = ("map", "trl")
LEAST_RATIO, MOST_BYTES = 2.0, 1_000_000_000
MAX_LENGTH = 1024

_SURNAMES, _NAMES = "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨", "安白川东方光海江林明宁平清秋山云"
_TOWNS = ["北京", "上海", "广州", "成都", "西安", "南京", "杭州", "武汉", "苏州", "青岛", "大连", "厦门"]
_DEEDS = [
    "在一家书店上班",
    "经营一家茶馆",
    "每天骑车去河边画画",
    "教孩子们下棋",
    "写关于山的诗",
    "收集旧地图",
    "研究桥梁的历史",
    "修理钟表",
    "种了三亩橘子",
    "在码头上卖鱼",
]
_TOPICS = ["体育", "科技", "财经", "文化", "旅行"]
_TRIPLES = "从文中找出所有人物与其迁居的城市，用 JSON 写出来。"
_LABEL = f"这篇短文讲了什么？请选一个标签：{'、'.join(_TOPICS)}。"


# ---- the rows -------------------------------------------------------------------------------------------------------


def write_rows(path: Path, count: int) -> None:
    """Write `count` invented rows, by turns triples in a code fence and labels."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            people = [rng.choice(_SURNAMES) + rng.choice(_NAMES) + rng.choice(_NAMES) for _ in range(2)]
            towns = rng.sample(_TOWNS, 2)
            told = [
                f"{who}{rng.choice(_DEEDS)}，{rng.randrange(1950, 2020)}年搬到了{town}"
                for who, town in zip(people, towns, strict=True)
            ]
            text = f"{'。'.join(told)}。这是第{number}则故事。"
            if number % 2:
                triples = [
                    {"subject": who, "predicate": "搬到", "object": town}
                    for who, town in zip(people, towns, strict=True)
                ]
                question, target = _TRIPLES, f"```json\n{json.dumps(triples, ensure_ascii=False)}\n```"
            else:
                question, target = _LABEL, json.dumps([rng.choice(_TOPICS)], ensure_ascii=False)
            context = f"Instruction: 请仔细阅读短文，按要求回答。\nInput: {question}\n\n{text}\nAnswer: "
            file.write(json.dumps({"context": context, "target": target}, ensure_ascii=False) + "\n")


class Stopwatch:
    """Seconds since it was made: on the wall, and of processor time, ended child processes included."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), sum(os.times()[:4])

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._wall, "cpu_seconds": sum(os.times()[:4]) - self._cpu}


# ---- the sides; each returns the seconds it took and what tells that it did the work --------------------------------


def run_weitiao(rows: Path, work: Path) -> dict[str, Any]:
    from weitiao.dataset import load_dataset
    from weitiao.models.opening import open_renderer
    from weitiao.models.starter import starter_folder
    from weitiao.recipe import make_recipe
    from weitiao.token_cache import fit_side

    folder = starter_folder()
    data = {"train": str(rows), "held_out": 0, "max_length": MAX_LENGTH}
    recipe = make_recipe({"name": "speed", "model": "starter", "data": data})
    renderer = open_renderer("starter")
    watch = Stopwatch()
    dataset = load_dataset(recipe)
    read = watch.read()
    fitted, _ = fit_side(recipe.data, dataset, "train", renderer, model=folder, folder=work / "tokens")
    total = watch.read()
    lengths = fitted.examples.lengths  # type: ignore[attr-defined]  # so many rows are in a store
    started = time.perf_counter()
    again, note = fit_side(recipe.data, dataset, "train", renderer, model=folder, folder=work / "tokens")
    assert "from the cache" in note
    return {
        **total,
        "examples": len(again.examples),
        "tokens": int(lengths.sum()),
        "parts": {
            "read and checked": read["seconds"],
            "rendered and tokenised": total["seconds"] - read["seconds"],
            "found again in the cache": time.perf_counter() - started,
        },
    }


def run_map(rows: Path, work: Path, *, batched: bool = False) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    from weitiao.models.starter import starter_folder

    tokenizer = AutoTokenizer.from_pretrained(str(starter_folder()))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def join(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
        ids = [bos, *prompt, *answer, eos]
        return {"input_ids": ids, "labels": [-100] * (len(prompt) + 1) + ids[len(prompt) + 1 :]}

    def tokenise(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["context"], add_special_tokens=False)["input_ids"]
        return join(prompt, tokenizer(row["target"], add_special_tokens=False)["input_ids"])

    def tokenise_many(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = tokenizer(batch["context"], add_special_tokens=False)["input_ids"]
        answers = tokenizer(batch["target"], add_special_tokens=False)["input_ids"]
        joined = [join(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return {key: [each[key] for each in joined] for key in ("input_ids", "labels")}

    watch = Stopwatch()
    loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(work / "datasets"))
    columns = ["context", "target"]
    if batched:
        mapped = loaded.map(tokenise_many, batched=True, num_proc=os.cpu_count(), remove_columns=columns)
    else:
        mapped = loaded.map(tokenise, remove_columns=columns)
    return {**watch.read(), "examples": len(mapped), "tokens": _count_tokens(mapped)}


def run_trl(rows: Path, work: Path) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from weitiao.models.starter import starter_folder

    tokenizer = AutoTokenizer.from_pretrained(str(starter_folder()))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    settings = SFTConfig(
        output_dir=str(work / "trl"), max_length=MAX_LENGTH, report_to="none", use_cpu=True, bf16=False
    )
    watch = Stopwatch()
    loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(work / "datasets"))
    loaded = loaded.rename_columns({"context": "prompt", "target": "completion"})
    trainer = SFTTrainer(model=model, args=settings, train_dataset=loaded, processing_class=tokenizer)
    taken = watch.read()
    prepared: Any = trainer.train_dataset
    return {**taken, "examples": len(prepared), "tokens": _count_tokens(prepared)}


def _count_tokens(dataset: Any) -> int:
    return sum(len(chunk.flatten()) for chunk in dataset.data.column("input_ids").chunks)


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(side: str, rows: Path) -> dict[str, Any]:
    """The figures of one side from a process of its own, with the most memory it and its children took."""
    with tempfile.TemporaryDirectory(dir=rows.parent) as work:
        command = [sys.executable, __file__, "--side", side, "--file", str(rows), "--work", work]
        environment = {**os.environ, "HF_HOME": str(Path(work) / "hf"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.1)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{side} failed with code {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak_bytes": peak}


def resident_bytes(root: int) -> int:
    """What the process `root` and its descendants hold in memory together."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.name))
        resident[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    waiting, total = [root], 0
    while waiting:
        process = waiting.pop()
        total += resident.get(process, 0)
        waiting += children.get(process, [])
    return total


def report(figures: dict[str, dict[str, Any]], num_rows: int) -> bool:
    """Print the table; whether every target was met."""
    print(f"{describe_machine()}\n{num_rows:,} rows\n")
    print(f"{'side':12} {'rows/s':>9} {'seconds':>8} {'of CPU':>8} {'peak GB':>8} {'tokens':>14}  weitiao is")
    own = figures["weitiao"]["seconds"] if "weitiao" in figures else None
    for side in (each for each in SIDES if each in figures):
        one = figures[side]
        ratio = f"{one['seconds'] / own:.2f} x as fast" if own and side != "weitiao" else ""
        print(
            f"{side:12} {num_rows / one['seconds']:9,.0f} {one['seconds']:8.1f} {one['cpu_seconds']:8.1f} "
            f"{one['peak_bytes'] / 1e9:8.2f} {one['tokens']:14,}  {ratio}"
        )
        for part, seconds in one.get("parts", {}).items():
            print(f"    {part}: {seconds:.1f} s")
    if own is None or not all(side in figures for side in HELD_TO):
        return True
    faster = min(figures[side]["seconds"] for side in HELD_TO)
    missed = [f"{faster / own:.2f} x the faster, not {LEAST_RATIO}"] if faster < LEAST_RATIO * own else []
    if figures["weitiao"]["peak_bytes"] >= MOST_BYTES:
        missed.append(f"{figures['weitiao']['peak_bytes'] / 1e9:.2f} GB, not below {MOST_BYTES / 1e9:.0f}")
    print("\nTargets met." if not missed else f"\nMissed: {'; '.join(missed)}.")
    return not missed


def main() -> None:
    """Measure the sides asked for and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help="keep the file and the figures here")
    parser.add_argument("--only", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run = {
            "weitiao": run_weitiao,
            "map": run_map,
            "trl": run_trl,
            "map_batched": lambda rows, work: run_map(rows, work, batched=True),
        }[options.side]
        print(json.dumps(run(options.file, options.work)))
        return
    with tempfile.TemporaryDirectory() as passing:
        work = options.work or Path(passing)
        work.mkdir(parents=True, exist_ok=True)
        rows, kept = work / f"rows-{options.rows}.jsonl", work / f"figures-{options.rows}.json"
        if not rows.exists():
            write_rows(rows, options.rows)
        figures = json.loads(kept.read_text()) if kept.exists() else {}
        for side in options.only:
            figures[side] = measure(side, rows)
            kept.write_text(json.dumps(figures, indent=2))
        met = report(figures, options.rows)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
