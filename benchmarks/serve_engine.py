"""Tokens a second of the serving worker at 1, 8 and 32 concurrent requests, against one request at a time.

    python benchmarks/serve_engine.py [--model starter] [--requests 32] [--tokens 32] [--turns 2]

Every side answers the same requests, greedy, without stop tokens, so each writes the same number of tokens:

    one at a time     transformers' own `generate`, one prompt after the other
    worker, N         N clients, each of which sends its next request when the last one is answered

The sides take turns in one process. The prompts share an instruction, as a task's do; `--apart` gives each its own.
Then what choosing another adapter costs (two random LoRA adapters on the linear layers), and a step with rows of both
against one with rows of one. Exits with 1 where 32 clients are not served 4 times as fast as one at a time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from machine import describe_machine, seconds
from peft import LoraConfig, get_peft_model

from weitiao.models.adapter_set import AdapterSet
from weitiao.models.adapters import base_model, save_adapter
from weitiao.models.opening import open_model
from weitiao.serve.limits import Limits
from weitiao.serve.requests import Done, Request
from weitiao.serve.worker import Worker

WANTED_RATIO = 4.0
INSTRUCTION = (
    "请阅读下面的短文，找出文中所有的人物关系，并用 JSON 写出来。每个关系写成一个对象，含 subject、predicate 和 object "
    "三个字段；没有关系就写一个空的列表。不要写别的话。\n短文："
)
TEXTS = ("小王住在北京，在一家书店上班。", "老李的女儿叫李梅，她住在苏州。", "陈师傅在码头修船，他的儿子叫陈海。")


def one_at_a_time(models: AdapterSet, prompts: Sequence[list[int]], tokens: int) -> None:
    """Answer by transformers' own `generate`."""
    models.choose(None)
    for prompt in prompts:
        ids = torch.tensor([prompt], device=models.base.device)
        models.base.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        )


def with_clients(
    worker: Worker, prompts: Sequence[list[int]], tokens: int, clients: int, adapters: Sequence[str | None] = (None,)
) -> None:
    """Answer by the worker, asked by so many clients at once."""
    waiting = list(enumerate(prompts))
    lock = threading.Lock()

    def ask() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                place, prompt = waiting.pop()
            adapter = adapters[place % len(adapters)]
            event = worker.submit(Request(prompt_ids=prompt, stop_ids=(), limit=tokens, adapter=adapter)).wait()
            assert isinstance(event, Done), event

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while worker.stats().cache_bytes:  # an idle worker holds none, and leaves the model as it was
        time.sleep(0.001)


def seconds_of(run: Callable[[], None]) -> float:
    """How long it takes: the processor's time of all threads where torch has one thread, else as the clock says."""
    start = seconds()
    run()
    return seconds() - start


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--alone-requests", type=int, default=8, help="how many one-at-a-time answers in a turn")
    parser.add_argument("--apart", action="store_true", help="prompts that begin differently")
    args = parser.parse_args()

    opened = open_model(args.model, dtype=args.dtype)
    texts = [f"{TEXTS[place % len(TEXTS)]}第 {place} 段。" for place in range(args.requests)]
    asked = [f"{place}：{INSTRUCTION}{text}" if args.apart else INSTRUCTION + text for place, text in enumerate(texts)]
    prompts = [list(opened.tokenizer(text).input_ids) for text in asked]
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: make_lora(args.model, args.dtype, Path(folder) / name) for name in ("one", "two")}
        models = AdapterSet(base_model(opened.model), folders)
        worker = Worker(models, limits=Limits(max_rows=32))
        with_clients(worker, prompts[:4], 4, 4, (None, "one", "two"))
        one_at_a_time(models, prompts[:1], 4)
        clients = (1, 8, 32)
        spent = dict.fromkeys((0, *clients), 0.0)
        for _ in range(args.turns):
            for count in clients:
                few = prompts if count > 1 else prompts[: args.alone_requests]
                spent[count] += seconds_of(partial(with_clients, worker, few, args.tokens, count))
            alone = prompts[: args.alone_requests]
            spent[0] += seconds_of(partial(one_at_a_time, models, alone, args.tokens))
        rates = {}
        for count, taken in spent.items():
            answered = args.requests if count > 1 else args.alone_requests
            rates[count] = args.turns * answered * args.tokens / taken
        print(describe_machine(), f"; {torch.get_num_threads()} threads")
        print(f"{args.model}, {opened.model.dtype}, {args.requests} requests, prompts of {len(prompts[0])} tokens, "
              f"{args.tokens} new ones")  # fmt: skip
        print(f"one at a time (generate): {rates[0]:8.1f} tokens/s")
        for count in clients:
            print(f"worker, {count:2} clients:       {rates[count]:8.1f} tokens/s, {rates[count] / rates[0]:.1f} times")
        stats = worker.stats()
        print(f"prompt tokens copied: {stats.cached_tokens} of {stats.prompt_tokens}; steps: {stats.steps}")
        for adapters in (("one",), ("one", "two")):
            taken = seconds_of(partial(with_clients, worker, prompts, args.tokens, 16, adapters))
            print(f"16 clients, {len(adapters)} adapter(s): {args.requests * args.tokens / taken:8.1f} tokens/s")
        worker.close()
        start = seconds()
        for name in ("one", "two") * 50:
            models.choose(name)
        taken = seconds() - start
        print(f"choosing another adapter: {taken * 10:.2f} ms")
    return 0 if rates[32] >= WANTED_RATIO * rates[0] else 1


def make_lora(model: str, dtype: str, folder: Path) -> Path:
    """A random LoRA adapter of rank 16 on all linear layers."""
    folder.mkdir()
    base = open_model(model, dtype=dtype).model
    save_adapter(get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)), folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
