"""What a model still knows beside its tasks: multiple-choice questions scored by likelihood, before and after tuning.

Nothing is generated. For every choice the log-probability of its tokens behind the question is summed, as the model's
own chat format renders the question; the model's answer is the likeliest choice. `accuracy` divides that sum by the
choice's length in UTF-8 bytes, because a longer text is less likely whatever it says; `accuracy_raw` does not. For
letters, which all have one length, the two are the same. These are `acc_norm` and `acc` of lm-evaluation-harness.
The end token does not count, so a model that was taught to end its answers otherwise is not taken to have forgotten.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import DataError, ModelError, Problem
from ..generate.likelihood import BATCH_TOKENS, Continuation, OnSequences, log_likelihoods
from ..messages import Message
from ..render.base import Renderer
from .probe_questions import Question, read_probe
from .score import draws


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeAnswer:
    """What a model holds of one question's choices."""

    source: str
    category: str
    right: int
    chosen: int
    """Place of the choice that is likeliest for its length."""
    chosen_raw: int
    """Place of the choice that is likeliest as it is."""
    log_likelihoods: tuple[float, ...]
    """Of each choice, in nats."""

    @property
    def correct(self) -> bool:
        """Whether the likeliest choice for its length is the right one."""
        return self.chosen == self.right

    @property
    def right_probability(self) -> float:
        """The right choice's share (0–1) of the probability that the choices have together."""
        top = max(self.log_likelihoods)
        shares = [math.exp(value - top) for value in self.log_likelihoods]
        return shares[self.right] / sum(shares)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbePart:
    """The figures of the questions of one category, or of all. All are 0–1."""

    name: str
    rows: int
    accuracy: float
    """Share of questions whose likeliest choice for its length is the right one: the figure to look at."""
    interval: tuple[float, float]
    """95 % interval of `accuracy` (Wilson 1927)."""
    accuracy_raw: float
    """The same by log-likelihoods that are not divided by length."""
    right_probability: float
    """Mean share of the right choice in the probability of all; it moves before any answer flips."""
    chance: float
    """What guessing gets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeScore:
    """One model's answers to a probe."""

    overall: ProbePart
    categories: tuple[ProbePart, ...]
    """By name."""
    answers: tuple[ProbeAnswer, ...]
    """In the order of the questions."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeChange:
    """A probe before and after tuning."""

    before: ProbeScore
    after: ProbeScore
    change: float
    """Accuracy after less accuracy before."""
    interval: tuple[float, float]
    """95 % interval of `change`: bootstrap over questions, each with both of its answers."""
    lost: tuple[str, ...]
    """Sources of questions answered rightly before and wrongly after."""
    gained: tuple[str, ...]
    """The other way round."""

    @property
    def forgotten(self) -> bool:
        """Whether accuracy fell by more than chance explains."""
        return self.interval[1] < 0

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {**asdict(self), "forgotten": self.forgotten}


def score_probe(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    probe: str | Path | Sequence[Question],
    *,
    batch_tokens: int = BATCH_TOKENS,
    adapted: bool = True,
    on_questions: OnSequences | None = None,
) -> ProbeScore:
    """The answers of `model` to the questions of `probe`, and how many are right.

    Args:
        model: a causal language model in evaluation mode.
        renderer: its chat format; each question is one message of the user.
        probe: a file of questions (see `probe_questions.py`), or questions read before.
        batch_tokens: most tokens of one forward pass.
        adapted: False asks the model as it was before it was tuned, its adapter off.
        on_questions: told of the progress.

    Raises:
        DataError: the file holds no such questions, or some do not fit the model's positions; before anything runs.
        ModelError: the model is in training mode, its adapter adds virtual tokens in PEFT's way, or it is asked for
            without an adapter that it does not have.
    """
    questions = read_probe(probe) if isinstance(probe, str | Path) else tuple(probe)
    if not questions:
        raise DataError("The probe holds no questions.")
    _check_model(model)
    asked = [_asked(renderer, question) for question in questions]
    _check_lengths(model, questions, asked)
    values = iter(
        log_likelihoods(
            model,
            [*chain.from_iterable(asked)],
            batch_tokens=batch_tokens,
            adapted=adapted,
            on_sequences=on_questions,
        )
    )
    answers = tuple(_answer(question, tuple(next(values) for _ in question.choices)) for question in questions)
    names = sorted({answer.category for answer in answers})
    return ProbeScore(
        overall=_part("all", questions, answers),
        categories=tuple(_part(name, questions, answers, category=name) for name in names),
        answers=answers,
    )


def compare_probe(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    probe: str | Path | Sequence[Question],
    *,
    resamples: int = 2000,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    on_questions: OnSequences | None = None,
) -> ProbeChange:
    """The probe with the adapter of `model` switched off and on: before and after, from the same loaded weights.

    Raises as `score_probe` does; ModelError also when the model has no adapter.
    """
    questions = read_probe(probe) if isinstance(probe, str | Path) else tuple(probe)
    before, after = (
        score_probe(model, renderer, questions, batch_tokens=batch_tokens, adapted=adapted, on_questions=on_questions)
        for adapted in (False, True)
    )
    return probe_change(before, after, resamples=resamples, seed=seed)


def probe_change(before: ProbeScore, after: ProbeScore, *, resamples: int = 2000, seed: int = 0) -> ProbeChange:
    """What changed between two scores of the same questions. Raises DataError when the questions differ."""
    pairs = list(zip(before.answers, after.answers))
    if len(before.answers) != len(after.answers) or any(
        (old.source, old.right, len(old.log_likelihoods)) != (new.source, new.right, len(new.log_likelihoods))
        for old, new in pairs
    ):
        raise DataError("The two scores are of different questions. Score the same probe twice.")
    steps = np.array([float(new.correct) - float(old.correct) for old, new in pairs])
    drawn = np.concatenate([block @ steps for block in draws(len(steps), seed=seed, resamples=resamples)]) / len(steps)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ProbeChange(
        before=before,
        after=after,
        change=float(steps.mean()),
        interval=(float(low), float(high)),
        lost=tuple(old.source for old, new in pairs if old.correct and not new.correct),
        gained=tuple(new.source for old, new in pairs if new.correct and not old.correct),
    )


def wilson_interval(right: int, rows: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share `right` / `rows` (Wilson 1927): sensible near 0 and 1 and for few rows.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    share, spread = right / rows, z * z / rows
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


# ---- what is asked ----------------------------------------------------------------------------------------------


def _asked(renderer: Renderer, question: Question) -> list[Continuation]:
    """Each choice behind its question, as tokens."""
    prompt = renderer.render_prompt([Message(role="user", text=question.text)])
    num_end = len(renderer.render_answer(""))
    asked: list[Continuation] = []
    for choice in question.choices:
        blank = " " if not renderer.template and _needs_blank(question.text) else ""
        ids = renderer.render_answer(blank + choice)
        asked.append((prompt, ids[: len(ids) - num_end]))
    return asked


def _needs_blank(text: str) -> bool:
    """Whether a base model, which goes on writing the question's own text, would set a blank before the answer."""
    return not text[-1].isspace() and unicodedata.east_asian_width(text[-1]) not in ("W", "F")


def _answer(question: Question, values: tuple[float, ...]) -> ProbeAnswer:
    lengths = [len(choice.encode("utf-8", "surrogatepass")) for choice in question.choices]
    normalised = [value / length for value, length in zip(values, lengths, strict=True)]
    return ProbeAnswer(
        source=question.source,
        category=question.category,
        right=question.right,
        chosen=max(range(len(values)), key=normalised.__getitem__),
        chosen_raw=max(range(len(values)), key=values.__getitem__),
        log_likelihoods=values,
    )


def _part(
    name: str, questions: Sequence[Question], answers: Sequence[ProbeAnswer], *, category: str | None = None
) -> ProbePart:
    own = [(question, answer) for question, answer in zip(questions, answers) if category in (None, answer.category)]
    right = sum(answer.correct for _, answer in own)
    return ProbePart(
        name=name,
        rows=len(own),
        accuracy=right / len(own),
        interval=wilson_interval(right, len(own)),
        accuracy_raw=sum(answer.chosen_raw == answer.right for _, answer in own) / len(own),
        right_probability=sum(answer.right_probability for _, answer in own) / len(own),
        chance=sum(1 / len(question.choices) for question, _ in own) / len(own),
    )


# ---- the model --------------------------------------------------------------------------------------------------


def _check_model(model: PreTrainedModel | PeftModel) -> None:
    if model.training:
        raise ModelError("The model is in training mode, so dropout would change its answers. Call model.eval() first.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"The adapter's method {model.active_peft_config.peft_type} is PEFT's own way of adding virtual tokens to "
            "the prompt, which the probe does not support. Use LoRA, or weitiao's ptuning_v2."
        )


def _check_lengths(
    model: PreTrainedModel | PeftModel, questions: Sequence[Question], asked: Sequence[Sequence[Continuation]]
) -> None:
    limit = model.config.get_text_config().max_position_embeddings
    problems = []
    for question, choices in zip(questions, asked, strict=True):
        longest = max(len(prompt) + len(choice) - 1 for prompt, choice in choices)
        if longest > limit:
            message = f"It takes {longest} of the model's {limit} positions."
            problems.append(Problem(source=question.source, field="question", message=message, fix="Shorten it."))
    if problems:
        raise DataError(f"{len(problems)} of {len(questions)} questions cannot be asked of this model.", problems)
