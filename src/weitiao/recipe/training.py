"""The recipe's `train` part: how to learn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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
    weight_decay: float = Field(0.0, ge=0, description="AdamW decay of matrices; biases and norms never decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
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
    gradient_checkpointing: bool = Field(False, description="Less memory, about a third slower.")
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
