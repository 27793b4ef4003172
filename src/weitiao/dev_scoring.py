"""Scoring while training: the dev rows answered and scored as an evaluation does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from .data.record import Record
from .decoding import sampling_of
from .errors import RunError
from .evaluate.best import choose_figure
from .evaluate.predict import Answerer, as_prediction, read_reply
from .evaluate.prediction import Prediction
from .evaluate.score import score_side
from .evaluate.user_metrics import UserMetric, measure_rows
from .generate.chat import Reply
from .generate.engine import cache_bytes
from .models.adapters import base_model
from .models.out_of_memory import give_memory_back, ran_out_of_memory
from .models.sources import first_line
from .preparation import Prepared
from .recipe import Recipe
from .runs import Sample
from .tasks.base import Task
from .train.ranks import ALONE, Ranks
from .train.scoring import OnEval, Scoring
from .train.sharding import in_company, is_spread

_SAMPLES_PER_TASK = 3
"""Enough to see what changes from scoring to scoring; the report of an evaluation shows all rows."""


def scoring_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """The memory that scoring while training adds: keys and values of the rows that are answered together."""
    examples = prepared.scored_examples(recipe.train)
    if not examples:
        return 0
    return cache_bytes(
        base_model(prepared.model),
        longest_prompt=max(len(example) - example.num_answer for example in examples),
        max_new_tokens=max(prepared.answer_limits.values()),
        num_rows=min(recipe.generate.batch_rows, len(examples)),
    )


def make_on_eval(
    recipe: Recipe,
    prepared: Prepared,
    metrics: Sequence[UserMetric] = (),
    *,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = lambda _: None,
) -> OnEval | None:
    """What the loop calls to score the dev rows: the same asking and scoring as `evaluate_run`.

    `metrics` are the user's own, which may choose the best checkpoint. Each of `ranks` asks for a share of the
    rows, and the first scores them all. Where memory runs out, half as many are asked together from then on, and `say`
    is told. None when no rows are scored.
    """
    places = prepared.scored(recipe.train)
    records = [prepared.dev_rows.records[place] for place in places]
    tasks = [prepared.dev_task(place) for place in places]
    if not records:
        return None

    fewer = FewerRows(recipe.generate.batch_rows, say)

    def on_eval(model: PreTrainedModel) -> Scoring:
        answerer = Answerer(
            model=model,
            renderer=prepared.opened.renderer,
            sampling=sampling_of(recipe.generate, prepared.answer_limits),
            answer_limits=prepared.answer_limits,
            batch_rows=recipe.generate.batch_rows,
            constrain=recipe.generate.constrain,
        )
        own = range(ranks.rank, len(records), ranks.size)
        with in_company(model, ranks):
            answered = fewer.answer(answerer, [records[place] for place in own], [tasks[place] for place in own])
        gathered = ranks.gather([replace(reply, index=own[reply.index]) for reply in answered])
        return ranks.by_first(lambda: score([reply for replies in gathered for reply in replies]))

    def score(all_replies: Sequence[Reply]) -> Scoring:
        replies = {reply.index: reply for reply in all_replies}
        predictions = [
            as_prediction(record, task, read_reply(record, task, replies[index]))
            for index, (record, task) in enumerate(zip(records, tasks, strict=True))
        ]
        all_tasks = prepared.dataset.tasks
        extra = measure_rows(metrics, predictions, all_tasks, [record.raw for record in records]) if metrics else ()
        scored = [score for score in score_side(predictions, all_tasks, resamples=0, extra=extra).scores if score.rows]
        return Scoring(
            overall=choose_figure(scored, recipe.evaluate.best_by),
            tasks={score.task: {"primary": score.metrics[score.primary], **score.metrics} for score in scored},
            samples=samples_of(predictions),
        )

    return on_eval


class FewerRows:
    """Asks for answers, half as many together whenever memory runs out; each answer stays the same but for rounding."""

    def __init__(self, batch_rows: int, say: Callable[[str], None]) -> None:
        """At first `batch_rows` together; `say` is told when they become fewer."""
        self.batch_rows = batch_rows
        self._say = say

    def answer(self, answerer: Answerer, records: Sequence[Record], tasks: Sequence[Task]) -> list[Reply]:
        """The replies to `records`.

        Raises:
            RunError: memory runs out with one row too, or where processes answer in step with each other.
        """
        while True:
            try:
                return list(replace(answerer, batch_rows=self.batch_rows).answer(records, tasks))
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error):
                    raise
                why = first_line(error)
            give_memory_back()
            was = min(self.batch_rows, len(records))
            if was <= 1 or is_spread(answerer.model):
                raise RunError(
                    f"Memory ran out while {was} rows were answered together ({why}). Lower generate.batch_rows (now "
                    f"{self.batch_rows}), generate.max_new_tokens or data.max_length, or set "
                    f"train.evaluate_every=never and score the run elsewhere."
                )
            self.batch_rows = was // 2
            self._say(
                f"Memory ran out while {was} rows were answered together ({why}); from here on they are "
                f"{self.batch_rows} (generate.batch_rows)."
            )


def samples_of(predictions: Sequence[Prediction], per_task: int = _SAMPLES_PER_TASK) -> tuple[Sample, ...]:
    """The first `per_task` predictions of each task, to look at: the same rows at every scoring."""
    taken: Counter[str] = Counter()
    samples = []
    for one in predictions:
        taken[one.task] += 1
        if taken[one.task] <= per_task:
            samples.append(
                Sample(task=one.task, source=one.source, question=one.prompt, gold=one.gold, answer=one.answer)
            )
    return tuple(samples)
