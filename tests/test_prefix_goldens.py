"""The engine and packed training against answers, losses, gradients of ChatGLM-6B's released code (shared/golden)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny_models import in_order
from weitiao.generate.engine import Sampling, generate
from weitiao.models.glm.chatglm import ChatGlmForCausalLM
from weitiao.models.glm.chatglm_config import ChatGlmConfig
from weitiao.models.ptuning import attach_original_prefix, prefix_encoder_of
from weitiao.render.base import Example
from weitiao.train.batches import make_batches
from weitiao.train.model import TrainedModel

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden fixtures are not beside this checkout")
FOLDERS = ["chatglm_v1", "chatglm_v1_28l", "chatglm_v1_ptuning/no_projection", "chatglm_v1_ptuning/projection"]


@pytest.fixture(params=FOLDERS)
def golden(request: pytest.FixtureRequest) -> Iterator[tuple[ChatGlmForCausalLM, dict[str, Any]]]:
    """The model, all of it or its prefix learning, and the released code's arrays."""
    folder = GOLDEN / request.param
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = ChatGlmForCausalLM(ChatGlmConfig(**{k: v for k, v in config.items() if k in ChatGlmConfig().to_dict()}))
    weights = {name: value for name, value in load_file(folder / "model.safetensors").items() if "inv_freq" not in name}
    model.float().load_state_dict({name: value.float() for name, value in weights.items()})
    if "ptuning" in request.param:
        attach_original_prefix(model, config, load_file(folder / "prefix_encoder.safetensors"))
        encoder = prefix_encoder_of(model)
        assert encoder is not None
        encoder.requires_grad_(True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.load(folder / "goldens.npz") as arrays:
        yield model.eval(), dict(arrays)
    torch.set_num_threads(before)


@pytest.mark.parametrize("exact", [False, True])
def test_the_engine_gives_the_released_codes_answers(golden: Any, exact: bool) -> None:
    model, arrays = golden
    for case in ("gen_single", "gen_leftpad"):
        ids, mask, whole = (arrays[f"{case}/{name}"] for name in ("input_ids", "attention_mask", "sequences"))
        prompts = [row[~hidden[0].diagonal()].tolist() for row, hidden in zip(ids, mask, strict=True)]
        sampling = Sampling(max_new_tokens=whole.shape[1] - ids.shape[1])
        found = in_order(generate(model, prompts, stop_ids=[], sampling=sampling, max_rows=2, exact=exact))
        assert [list(row.token_ids) for row in found] == whole[:, ids.shape[1] :].tolist()


def test_packed_rows_have_the_released_codes_loss_and_gradients(golden: Any) -> None:
    """There the rows are padded on the right; here they lie end to end, with filler behind them."""
    model, arrays = golden
    rows = []
    for tokens, labels in zip(arrays["train_rightpad/input_ids"], arrays["train_rightpad/labels"], strict=True):
        length = int(np.flatnonzero(labels != -100)[-1]) + 1
        rows.append(
            Example(token_ids=tuple(tokens[:length].tolist()), loss_mask=tuple((labels[:length] != -100).tolist()))
        )
    trained = TrainedModel(model, packing=True)
    [batch] = make_batches(rows, tokens_per_pass=1000, round_to=128, row_prefix=trained.row_prefix)
    loss = trained(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(arrays["train_rightpad/loss"]), abs=1e-5)
    parameters = {
        name if name.startswith("transformer.") or name == "lm_head.weight" else f"transformer.{name}": parameter
        for name, parameter in model.named_parameters()
    }
    # of the 28 layers of one fixture some are told
    lengths = {k.split("/", 2)[2]: v[2] for k, v in arrays.items() if k.startswith("train_rightpad/gradstat/")}
    assert lengths.keys() <= {name for name, parameter in parameters.items() if parameter.grad is not None}
    assert lengths
    for name, length in lengths.items():
        assert float(parameters[name].grad.norm()) == pytest.approx(length, rel=1e-4), name
        if (whole := arrays.get(f"train_rightpad/grad/{name}")) is not None:
            difference = parameters[name].grad.flatten() - torch.tensor(whole).flatten()
            assert float(difference.norm()) <= 1e-4 * length, name
