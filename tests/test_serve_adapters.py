"""Several adapters on one base in memory: each answers as where it was opened alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from prefix_models import tiny
from test_engine import random_prompts
from weitiao.errors import ModelError
from weitiao.generate.engine import Sampling, generate
from weitiao.models.adapter_set import AdapterSet
from weitiao.models.adapters import load_adapter, save_adapter
from weitiao.models.lora_layers import LoraLinear
from weitiao.models.own_weights import learn_weights
from weitiao.models.prompt_tuning import attach_prompt
from weitiao.models.ptuning import attach_prefix
from weitiao.serve.limits import Limits
from weitiao.serve.requests import Done, Request
from weitiao.serve.worker import Worker

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT 0.21 asks for it
]
FAMILY = "qwen2"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of five kinds, all on the same base."""
    made: dict[str, Any] = {}
    for seed, targets in ((1, ["q_proj", "v_proj"]), (2, ["q_proj", "down_proj"])):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_alpha=8)
        made[f"lora.{seed}"] = get_peft_model(tiny(FAMILY), config)
    made["prefix"] = attach_prefix(tiny(FAMILY), num_virtual_tokens=5, projection=False, seed=3)
    made["prompt"] = attach_prompt(tiny(FAMILY), num_virtual_tokens=7, seed=4)
    made["weights"] = learn_weights(tiny(FAMILY), ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
    with torch.no_grad():
        for parameter in (p for p in made["weights"].parameters() if p.requires_grad):
            parameter.mul_(-1.5)
    found = {}
    for name, model in made.items():
        found[name] = tmp_path_factory.mktemp(name)
        save_adapter(model, found[name])
    return found


def alone(folder: Path | None, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    model: Any = tiny(FAMILY) if folder is None else load_adapter(tiny(FAMILY), folder).eval()
    done = generate(model, prompts, stop_ids=[5], sampling=Sampling(max_new_tokens=10))
    return [one.token_ids for one in sorted(done, key=lambda each: each.index)]


def test_rows_of_several_adapters_are_answered_as_where_each_is_alone(folders: dict[str, Path]) -> None:
    prompts = [[7, 8, 9, 10] * 6 + prompt for prompt in random_prompts(4, longest=9)]
    expected = {name: alone(folders.get(name or ""), prompts) for name in (None, *folders)}
    assert len({tuple(answers) for answers in expected.values()}) == 6, "each answers in its own way"
    base = tiny(FAMILY)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    models = AdapterSet(base, folders)
    assert set(models.names) == set(folders)
    assert isinstance(models.model, PeftModel)
    assert all(isinstance(layer, LoraLinear) for name, layer in base.named_modules() if name.endswith("down_proj"))
    worker = Worker(models, limits=Limits(max_rows=9, prefill_tokens=40))
    tickets = [
        (name, place, worker.submit(Request(prompt_ids=prompt, stop_ids=[5], limit=10, adapter=name)))
        for _ in range(2)
        for place, prompt in enumerate(prompts)
        for name in expected
    ]
    for name, place, ticket in tickets:
        done = ticket.wait()
        assert isinstance(done, Done)
        assert done.generation.token_ids == expected[name][place], name
    stats = worker.stats()
    worker.close()
    assert stats.adapter_switches > 10
    assert stats.cached_tokens > 300, "beginnings are shared within each adapter"
    models.choose(None)
    own = {name.replace(".base_layer", ""): values for name, values in base.named_parameters() if ".lora_" not in name}
    assert own.keys() == before.keys()
    assert all(torch.equal(own[name], before[name]) for name in before), "the base is what it was"


def test_one_adapter_or_none_is_a_set_too(folders: dict[str, Path]) -> None:
    prompts = random_prompts(2, longest=9)
    for name in (None, "prefix", "lora.1", "weights"):
        models = AdapterSet(tiny(FAMILY), {name: folders[name]} if name else {})
        models.choose(name)
        worker = Worker(models)
        tickets = [
            worker.submit(Request(prompt_ids=prompt, stop_ids=[5], limit=10, adapter=name)) for prompt in prompts
        ]
        answers = [done.generation.token_ids for t in tickets if isinstance(done := t.wait(), Done)]
        worker.close()
        assert answers == alone(folders.get(name or ""), prompts)


def test_adapters_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        AdapterSet(tiny(FAMILY), {"a": tmp_path})
    with pytest.raises(KeyError):
        AdapterSet(tiny(FAMILY)).choose("nobody")
    other = get_peft_model(tiny(FAMILY), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    save_adapter(other, tmp_path)
    with pytest.raises(ModelError, match="different peft types"):
        AdapterSet(tiny(FAMILY), {"a": folders["lora.2"], "b": tmp_path})
