"""What the routes share: the models by name, the worker, and what is counted and remembered of answers."""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..apply import calibrated
from ..evaluate.predict import read_reply
from ..generate.chat import Reply
from ..generate.sampling import Sampling, Steering
from .backend import Backend
from .choices import Ended
from .feedback import Feedback, Given
from .figures import Figures
from .problems import bad_request, no_model, shutting_down, too_busy
from .protocol import SamplingShape
from .requests import BusyError, ClosedError, Request, Ticket, UnfitError
from .served import Ask, ServedModel
from .writing import Heading


@dataclass(frozen=True, kw_only=True)
class Server:
    """Everything behind the routes."""

    models: Mapping[str, ServedModel]
    worker: Backend
    figures: Figures
    feedback: Feedback

    def model(self, name: str) -> ServedModel:
        """The model called `name`. Raises RefusedError (404) naming those there are."""
        if name not in self.models:
            raise no_model(name, list(self.models))
        return self.models[name]

    def heading(self, model: ServedModel, kind: str) -> Heading:
        """The heading of a new reply, such as ``chatcmpl-…`` for the kind chatcmpl."""
        contract = model.run.contract if model.run is not None else None
        parts = (__version__, model.opened.fingerprint, contract.adapter_fingerprint if contract is not None else "")
        fingerprint = hashlib.sha256("/".join(parts).encode()).hexdigest()[:10]
        return Heading(
            id=f"{kind}-{uuid.uuid4().hex}", created=int(time.time()), model=model.name, fingerprint=f"fp_{fingerprint}"
        )

    def submit(
        self, ask: Ask, asked: SamplingShape | None, model: ServedModel, *, key: str, num_top: int = 0
    ) -> list[Ticket]:
        """Hand the choices of a request to the worker. As `submit_all` for one prompt."""
        return self.submit_all([ask], asked, model, key=key, num_top=num_top)[0]

    def submit_all(
        self, asks: Sequence[Ask], asked: SamplingShape | None, model: ServedModel, *, key: str, num_top: int = 0
    ) -> list[list[Ticket]]:
        """Hand the choices of every one of a request's prompts to the worker, all or none.

        Args:
            asks: what is asked, one for each prompt.
            asked: how it is to be sampled; None: as the model was scored, once.
            model: who is asked.
            key: whose request it is.
            num_top: how many alternatives of each token are to be told.

        Raises:
            RefusedError: the queue is full (429), the server closes (503), or the request can never be run (400).
        """
        sampling, steering = _sampling_of(asked, model, num_top)
        num_choices = (asked.n if asked is not None else None) or 1
        requests = [
            Request(
                prompt_ids=ask.prompt_ids,
                stop_ids=model.opened.renderer.stop_ids,
                limit=ask.limit,
                sampling=sampling,
                steering=steering,
                constraint=ask.constraint,
                grammar=ask.grammar,
                before=ask.before,
                adapter=model.adapter,
                choice=choice,
                key=key,
            )
            for ask in asks
            for choice in range(num_choices)
        ]
        try:
            tickets = self.worker.submit_all(requests)
        except BusyError as busy:
            raise too_busy(self.worker.stats().queued, busy.retry_after_s) from None
        except ClosedError:
            raise shutting_down() from None
        except UnfitError as error:
            raise bad_request(str(error), param="messages") from None
        return [tickets[first : first + num_choices] for first in range(0, len(tickets), num_choices)]

    def read_answer(self, model: ServedModel, ask: Ask, reply: Reply) -> dict[str, Any]:
        """What `reply` is worth as an answer of the task: the keys of a line of `weitiao predict`."""
        assert ask.task is not None, "free conversation has no answers"
        return calibrated(read_reply(ask.record, ask.task, reply), model.calibration)

    def note_answer(self, reply_id: str, model: ServedModel, ask: Ask, ended: Ended, *, ticket: Ticket) -> None:
        """Count an answer, and remember it for who wants to rate it.

        The first choice of a reply is rated by the reply's id, another one by that and its number: ``ID.1``.
        """
        seconds = (ticket.ended or time.monotonic()) - ticket.submitted
        self.figures.tokens.labels(model.name, "prompt").inc(ended.usage.prompt_tokens)
        self.figures.tokens.labels(model.name, "completion").inc(ended.usage.completion_tokens)
        if ticket.first_token is not None:
            self.figures.first.observe(ticket.first_token - ticket.submitted)
        if ask.task is not None and ask.as_evaluated and ended.reply is not None:
            line = self.read_answer(model, ask, ended.reply)
            self.figures.answered(
                model.name, ask.task.name, valid=line["valid"], confidence=line["confidence"], seconds=seconds
            )
        task = ask.task if ask.as_evaluated else None
        answer_id = f"{reply_id}.{ended.index}" if ended.index else reply_id
        self.feedback.remember(answer_id, Given(model=model.name, record=ask.record, task=task, text=ended.text))


def _sampling_of(asked: SamplingShape | None, model: ServedModel, num_top: int) -> tuple[Sampling, Steering]:
    """How tokens are chosen: as asked, where nothing is asked as the model was scored."""
    usual = model.decoding
    if asked is None:
        return usual, Steering(num_top=num_top)
    sampling = Sampling(
        max_new_tokens=usual.max_new_tokens,
        temperature=usual.temperature if asked.temperature is None else asked.temperature,
        top_p=usual.top_p if asked.top_p is None else asked.top_p,
        top_k=usual.top_k if asked.top_k is None else asked.top_k,
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
    )
    steering = Steering(
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (asked.logit_bias or {}).items()},
        num_top=num_top,
    )
    return sampling, steering
