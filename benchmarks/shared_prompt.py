"""Rows per second when the rows of a step share a document, and each row computed whole; one run, in turns.

    python benchmarks/shared_prompt.py --rows ../shared/data/spo_and_topics/train.jsonl

Every optimiser step has eight questions over a document of 600 tokens, another document in every step; starter model,
LoRA as by default. First the proof in float32: loss and gradient of a step laid out in both ways. Then both ways take
the same steps in turns, in the weights' own dtype; each has its model to itself. Printed: rows per second of both, the
tokens that were computed, the losses (they must agree). Exits with 1 when the gradients differ by more than 1e-5 of
their norm or sharing is less than 3 × as fast.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import describe_machine, seconds

from weitiao.messages import Message
from weitiao.models.opening import OpenModel, open_model
from weitiao.models.starter import starter_folder
from weitiao.recipe import Lora, Train
from weitiao.render.base import Example
from weitiao.train.batches import Batch
from weitiao.train.shared_prompts import compare_layouts
from weitiao.train.step import Setup, set_up, step_batches, take_step
from weitiao.tuning.methods import add_adapter

ROWS = Path(__file__).parents[2] / "shared/data/spo_and_topics/train.jsonl"
QUESTIONS = {
    "这段文字主要讲了什么？": "介绍了人物、作品和机构之间的关系。",
    "文中第一个提到的人物是谁？请只写出姓名。": "文中没有明确说明。",
    "请列出文中出现的作品名称，用顿号隔开。": "《春天》、《故乡的河》、《远山》",
    "文中提到了哪些地点？": "北京、上海和杭州。",
    "这段文字属于什么类别？只回答类别名。": "文化娱乐",
    "文中的机构成立于哪一年？": "1998年",
    "请用 JSON 写出文中的人物和职业。": '[{"人物": "李明", "职业": "演员"}, {"人物": "王芳", "职业": "导演"}]',
    "文中有没有提到奖项？回答有或没有。": "没有",
}
TARGET, TOLERANCE = 3.0, 1e-5


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way of laying out the steps, with a model of its own."""

    name: str
    share: bool
    setup: Setup
    settings: Train

    def lay_out(self, rows: list[Example]) -> list[Batch]:
        """The passes of a step."""
        device = self.setup.trained.model.device
        return step_batches(rows, [""] * len(rows), self.settings, device, share=self.share)

    def take(self, rows: list[Example]) -> tuple[float, float, int]:
        """Seconds, loss and computed tokens of a step."""
        started = seconds()
        batches = self.lay_out(rows)
        loss, _, _ = take_step(self.setup, batches, self.settings)
        return seconds() - started, loss, sum(batch.token_ids.shape[1] for batch in batches)


def make_steps(opened: OpenModel, path: Path, *, num_steps: int, num_tokens: int) -> list[list[Example]]:
    """The questions over one document of `num_tokens` tokens after the other, each made of the rows' texts."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    text = "".join(row["context"].split("\n\n")[-1].removesuffix("\nAnswer: ") + "\n" for row in rows)
    ids = opened.tokenizer(text[: 20 * num_steps * num_tokens], add_special_tokens=False)["input_ids"]
    if len(ids) < num_steps * num_tokens:
        raise SystemExit(f"{path} holds {len(ids)} tokens; {num_steps * num_tokens} are wanted.")
    steps = []
    for number in range(num_steps):
        document = opened.tokenizer.decode(ids[number * num_tokens : (number + 1) * num_tokens])
        asked = [[Message(role="user", text=f"{document}\n\n{question}")] for question in QUESTIONS]
        answers = QUESTIONS.values()
        steps.append([opened.renderer.render_example(*pair) for pair in zip(asked, answers, strict=True)])
    return steps


def make_side(name: str, options: argparse.Namespace, *, share: bool, dtype: str | None = None) -> Side:
    opened = open_model(str(options.model), **({"dtype": dtype} if dtype else {}))
    model = add_adapter(opened.model, Lora(), seed=0)  # type: ignore[arg-type]
    settings = Train(batch_size=len(QUESTIONS), learning_rate=1e-4, warmup=0.0, schedule="constant")
    setup = set_up(model, settings, steps=options.steps)
    setup.trained.train()
    return Side(name=name, share=share, setup=setup, settings=settings)


def prove(options: argparse.Namespace, rows: list[Example]) -> float:
    """The difference of both layouts' gradients of one step in float32, as a share of their norm."""
    side = make_side("float32", options, share=False, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    learnt = {name: p for name, p in side.setup.trained.named_parameters() if p.requires_grad}
    with torch.no_grad():  # a fresh adapter's B is zero, and so would be the gradient of every A
        for name, parameter in learnt.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    found = []
    for share in (False, True):
        total, device = 0.0, side.setup.trained.model.device
        for batch in step_batches(rows, [""] * len(rows), side.settings, device, share=share):
            loss = side.setup.trained(batch)
            loss.backward()
            total += loss.item()
        found.append((total, torch.cat([p.grad.flatten() for p in learnt.values() if p.grad is not None])))
        side.setup.optimiser.zero_grad(set_to_none=True)
    (plain_loss, plain), (shared_loss, shared) = found
    difference = float((shared - plain).norm() / plain.norm())
    largest = float((shared - plain).abs().max() / plain.abs().max())
    print(
        f"float32: loss {plain_loss:.6f} each row whole, {shared_loss:.6f} shared; gradients of {plain.numel():,} "
        f"numbers differ by {difference:.1e} of their norm, at most by {largest:.1e} of the largest"
    )
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="default: the starter model")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where the documents' text comes from")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each side")
    parser.add_argument("--document", type=int, default=600, help="tokens of a document")
    parser.add_argument("--compile", action="store_true", help="with compiled layers")
    options = parser.parse_args()
    options.model = options.model or starter_folder()
    print(describe_machine(), flush=True)
    opened = open_model(str(options.model))
    warmup = 1
    steps = make_steps(opened, options.rows, num_steps=options.steps + warmup, num_tokens=options.document)
    del opened
    difference = prove(options, steps[0])

    sides = [make_side("each row whole", options, share=False), make_side("shared", options, share=True)]
    problem = compare_layouts(sides[0].setup.trained, sides[0].lay_out(steps[0]), sides[1].lay_out(steps[0]))
    print(f"the proof of the first step: {problem or 'loss and gradient agree'}", flush=True)
    if options.compile:
        for side in sides:
            side.setup.trained.compile_layers()
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for number, rows in enumerate(steps):
        for side in sides:
            took, loss, computed = side.take(rows)
            if number >= warmup:
                times[side.name].append(took)
            note = " (not counted)" if number < warmup else ""
            print(f"step {number + 1} {side.name}: {took:.2f} s, loss {loss:.4f}, {computed} tokens{note}", flush=True)
    whole = sum(map(len, steps[-1]))
    speed = {name: len(QUESTIONS) / statistics.median(taken) for name, taken in times.items()}
    gain = speed["shared"] / speed["each row whole"]
    print(f"\neight rows of {whole} tokens in all\n\n| layout | rows/s | tokens/s of whole rows |\n|---|---|---|")
    for name, value in speed.items():
        print(f"| {name} | {value:.2f} | {value * whole / len(QUESTIONS):.0f} |")
    print(f"\nshared is {gain:.2f} × as fast (wanted {TARGET:.0f} ×)")
    raise SystemExit(int(gain < TARGET or not difference <= TOLERANCE or bool(problem)))


if __name__ == "__main__":
    main()
