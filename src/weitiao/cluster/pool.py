"""Shards handed to workers on a Ray cluster until each is answered, whatever dies meanwhile.

Plain actors, one shard a call: a worker that died is replaced and its shard given to another, and how often a shard was
the last thing that a worker did is counted, so that rows which kill their worker are named instead of tried for ever.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, Problem, RunError
from .answering import Assignment, Outcome, ShardWorker
from .session import Share
from .shards import RAY_SAID, Manifest, Shard

MAX_DEATHS = 3
"""A shard that so many workers died of is given up."""

_PATIENCE_SECONDS = 60.0
"""So long without a worker until that is told."""

OnDone = Callable[[Shard, Manifest], None]
"""Called for every shard that was answered."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What a worker is doing: opening the run, or answering `shard`."""

    actor: Any
    shard: Shard | None = None


def answer_shards(
    ray: Any,
    todo: Sequence[Shard],
    assignment: Assignment,
    share: Share,
    *,
    on_done: OnDone,
    say: Callable[[str], None],
) -> None:
    """Have every shard of `todo` answered by the workers that `share` describes.

    Args:
        ray: the module, joined to a cluster.
        todo: shards that are not finished.
        assignment: what every worker is given.
        share: how many workers there are, and what each gets.
        on_done: told of each shard, as it is done.
        say: told in a line what the user should know.

    Raises:
        DataError: rows cannot be asked, all of which are named; the other shards are answered by then.
        RunError: the run cannot be opened by the workers, or they die.
    """
    pool = _Pool(ray, assignment, share, say)
    waiting, problems, unanswered = deque(todo), list[Problem](), list[Shard]()
    deaths, answered, refused = Counter[int](), 0, 0
    try:
        pool.fill(min(share.workers, len(waiting)))
        while waiting or pool.answering:
            while waiting and pool.idle:
                pool.give(waiting.popleft())
            if not waiting and not pool.answering:
                break
            call, outcome = pool.next()
            if outcome is None:  # the worker died
                if call.shard is not None:
                    deaths[call.shard.number] += 1
                    if deaths[call.shard.number] < MAX_DEATHS:
                        waiting.appendleft(call.shard)
                    else:
                        unanswered.append(call.shard)
                        if not answered:
                            break  # it is hardly the rows
                pool.fill(min(share.workers, len(waiting) + pool.answering))
            elif call.shard is not None:
                if outcome.manifest is not None:
                    answered += 1
                    on_done(call.shard, outcome.manifest)
                elif outcome.problems:
                    refused += 1
                    problems += outcome.problems
                else:
                    raise RunError(outcome.error)
    finally:
        pool.end()
    if problems:
        raise DataError(
            f"{len(problems)} rows cannot be asked; the others of their {refused} shards are not answered "
            f"either, all other shards are. Mend the rows and run the same command again.",
            problems,
        )
    if unanswered:
        raise RunError(
            f"{MAX_DEATHS} workers died over each of these: {', '.join(map(str, unanswered))}. Look for the reason in "
            f"{assignment.parts.folder / RAY_SAID} and in /tmp/ray/session_latest/logs on their machines; often memory "
            f"is short, then ask for fewer workers. The other answers are kept: the same command goes on."
        )


class _Pool:
    """The workers, and what each is doing."""

    def __init__(self, ray: Any, assignment: Assignment, share: Share, say: Callable[[str], None]) -> None:
        self._ray, self._share, self._say = ray, share, say
        self._assignment = ray.put(assignment)
        self._remote = ray.remote(ShardWorker)
        self._calls: dict[Any, _Call] = {}
        self._failed_to_open = 0
        self._told = False
        self.idle: list[Any] = []
        """Workers with the run open and nothing to do."""

    @property
    def answering(self) -> int:
        """How many shards are being answered."""
        return sum(call.shard is not None for call in self._calls.values())

    def fill(self, workers: int) -> None:
        """Start workers until there are so many."""
        while len(self._calls) + len(self.idle) < workers:
            actor = self._remote.options(
                num_cpus=self._share.cpus,
                num_gpus=self._share.gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            ).remote(self._assignment)
            self._calls[actor.open.remote()] = _Call(actor)

    def give(self, shard: Shard) -> None:
        """Have an idle worker answer `shard`."""
        actor = self.idle.pop()
        self._calls[actor.answer.remote(shard)] = _Call(actor, shard)

    def next(self) -> tuple[_Call, Outcome | None]:
        """The next call that ended, and what came of it; None where its worker died.

        Raises RunError when the run cannot be opened.
        """
        ref = self._wait()
        call = self._calls.pop(ref)
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayActorError:
            self._ray.kill(call.actor)  # one that is out of reach may live on; it would only write the same once more
            self._tell_death(call)
            return call, None
        if call.shard is None:
            if result:
                raise RunError(result)
            self._failed_to_open = 0
            result = Outcome()
        self.idle.append(call.actor)
        return call, result

    def _wait(self) -> Any:
        while True:
            ended, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_PATIENCE_SECONDS)
            if ended:
                return ended[0]
            if not self.idle and not self.answering and not self._told:
                self._told = True
                gpus = f" and {self._share.gpus:g} GPUs" if self._share.gpus else ""
                self._say(
                    f"note: still waiting for a worker to open the run: each needs {self._share.cpus} free "
                    f"cores{gpus}. ray status shows who has them."
                )

    def _tell_death(self, call: _Call) -> None:
        if call.shard is not None:
            self._say(f"note: the worker that answered {call.shard} died; they are given to another one.")
            return
        self._failed_to_open += 1
        if self._failed_to_open >= MAX_DEATHS * self._share.workers:
            raise RunError(
                f"{self._failed_to_open} workers died while they opened the run. Look for the reason in "
                f"/tmp/ray/session_latest/logs; often memory is short, then ask for fewer with --workers."
            )

    def end(self) -> None:
        """Let all workers go; those that start or answer are ended."""
        for actor in [*self.idle, *(call.actor for call in self._calls.values())]:
            self._ray.kill(actor)
