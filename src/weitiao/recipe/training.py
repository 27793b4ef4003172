"""The recipe's `train` part: how to learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .part import Part


class Train(Part):
    """How to learn."""

    epochs: float = Field(3, gt=0, description="Passes over the rows.")
    batch_size: int = Field(8, ge=1, description="Rows per optimiser step.")
    tokens_per_pass: int = Field(1536, ge=16, description="Tokens per forward pass: lower it when memory runs out.")
    learning_rate: float = Field(
        5e-4,
        gt=0,
        description="Peak learning rate. Left out, it is what suits the method: 5e-4 for LoRA, see docs/methods.md.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="How the learning rate falls.")
    warmup: float = Field(0.06, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    optimiser: Literal[
        "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "muon", "schedule_free_adamw"
    ] = Field(
        "adamw",
        description="What moves the weights, see docs/memory.md. Those named 8bit and paged need bitsandbytes, "
        "schedule_free_adamw needs schedulefree and the schedule constant.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of matrices; biases and norms never decay.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients are scaled down to this norm; null: left as they are."
    )
    row_balance: float = Field(
        0.25,
        ge=0,
        le=1,
        description="0: every token of an answer counts the same. 1: every row counts the same, however long its "
        "answer. Between: in between.",
    )
    task_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="How much the rows of a task count in the loss, by the task's name; 1 where it is not named."
    )
    gradient_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="Compute the layers once more in the backward pass instead of keeping what they computed: less "
        "memory, about a third slower. selective: some of it only, see docs/memory.md.",
    )
    offload_activations: bool = Field(
        False,
        description="Keep what the layers computed in the machine's memory until the backward pass, instead of in the "
        "GPU's; slower.",
    )
    update_in_backward: bool = Field(
        False,
        description="Update each weight as soon as its gradient is there and free that at once, so that gradients "
        "never exist all together. Needs max_grad_norm: null and one process.",
    )
    fit_memory: Literal["auto", "never"] = Field(
        "auto",
        description="auto: a training that would not fit into memory takes smaller passes, then computes layers once "
        "more (tokens_per_pass, gradient_checkpointing), and says so; neither changes what is learnt. never: only what "
        "is written here, even where memory runs out.",
    )
    packing: bool = Field(True, description="Rows end to end without padding. false: one row at a time, for models "
                          "whose attention cannot be packed.")  # fmt: skip
    shared_prompts: Literal["auto", "never"] = Field(
        "auto",
        description="What the rows of a step begin with alike, a document or an instruction, is computed once. auto: "
        "where it saves a quarter of the tokens, and the first such step proves that loss and gradient stay the same.",
    )
    group_prompts: bool = Field(
        False,
        description="Draw rows of which half or more is a common beginning, such as questions over one document, into "
        "the same steps. With shared_prompts that is faster, but a step then learns from fewer documents.",
    )
    shard: Literal["none", "fsdp"] = Field(
        "none",
        description="Several processes: none: each holds the whole model. fsdp: the weights are spread over them layer "
        "by layer, for models that do not fit into one GPU (docs/many-processes.md).",
    )
    deepspeed: str | None = Field(
        None,
        description="File of a DeepSpeed configuration (ZeRO-1 or ZeRO-2): several processes divide the optimiser's "
        "state, and with ZeRO-2 the gradients (docs/many-processes.md). Needs weitiao[deepspeed].",
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile the layers. auto: when a C++ compiler is there and the run is long enough."
    )
    seed: int = Field(42, ge=0, description="Seed of the split, the order, the adapter and the dropout.")
    log_every: int = Field(5, ge=1, description="Steps between log lines.")
    evaluate_every: Annotated[int, Field(ge=1)] | Literal["epoch", "never"] = Field(
        "epoch", description="Steps between scorings of the dev rows by generation, or epoch, or never."
    )
    evaluate_rows: int = Field(100, ge=0, description="At most this many dev rows are scored while training; 0: all.")
    save_every: Annotated[int, Field(ge=1)] | Literal["epoch"] = Field(
        50, description="Steps between checkpoints, or epoch."
    )
    save_minutes: float | None = Field(
        None, gt=0, description="Also save when the last checkpoint is so many minutes old; null: by steps alone."
    )
    keep_checkpoints: int = Field(2, ge=1, description="How many of the latest checkpoints stay on disk.")
    patience: int = Field(0, ge=0, description="Stop after this many scorings without a better one; 0: never.")
    price_per_hour: float | None = Field(
        None,
        ge=0,
        description="What an hour of the machine costs: weitiao check --plan then tells the training's cost.",
    )
    currency: str = Field("¥", description="What the price is in, as written before the number.")

    @model_validator(mode="before")
    @classmethod
    def _schedule_by_optimiser(cls, values: Any) -> Any:
        """Fill in the schedule that Schedule-Free has, where the recipe says none."""
        if (
            isinstance(values, Mapping)
            and values.get("optimiser") == "schedule_free_adamw"
            and "schedule" not in values
        ):
            return {**values, "schedule": "constant"}
        return values

    @field_validator("optimiser")
    @classmethod
    def _one_schedule(cls, optimiser: str, info: ValidationInfo) -> str:
        if optimiser == "schedule_free_adamw" and info.data.get("schedule") not in ("constant", None):
            raise PydanticCustomError(
                "optimiser",
                "averages the weights instead of lowering the learning rate; set train.schedule: constant, or leave it "
                "out.",
            )
        return optimiser

    @field_validator("deepspeed")
    @classmethod
    def _divided_once(cls, deepspeed: str | None, info: ValidationInfo) -> str | None:
        if deepspeed is not None and info.data.get("shard") == "fsdp":
            raise PydanticCustomError(
                "deepspeed",
                "divides among the processes what train.shard: fsdp divides already; take one of the two out.",
            )
        return deepspeed

    @field_validator("update_in_backward")
    @classmethod
    def _no_norm_of_all(cls, update: bool, info: ValidationInfo) -> bool:
        norm = info.data.get("max_grad_norm")
        if update and norm is not None:
            raise PydanticCustomError(
                "update_in_backward",
                "the first weights are updated before the norm of all gradients is known, so that these cannot be "
                "scaled down to max_grad_norm ({norm}); set train.max_grad_norm: null, or leave this out.",
                {"norm": norm},
            )
        return update
