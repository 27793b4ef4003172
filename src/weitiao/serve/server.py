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
from .problems import RefusedError, bad_request, no_model, shutting_down, too_busy
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
        """Hand the choices of a request to the worker.

        Args:
            ask: what is asked.
            asked: how it is to be sampled; None: as the model was scored, once.
            model: who is asked.
            key: whose request it is.
            num_top: how many alternatives of each token are to be told.

        Raises:
            RefusedError: the queue is full (429), the server closes (503), or the request can never be run (400).
        """
        sampling, steering = _sampling_of(asked, model, num_top)
        stop_ids = model.opened.renderer.stop_ids
        requests = [
            Request(
                prompt_ids=ask.prompt_ids,
                stop_ids=stop_ids,
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
            for choice in range((asked.n if asked is not None else None) or 1)
        ]
        return self.submit_requests(requests)

    def submit_requests(self, requests: Sequence[Request]) -> list[Ticket]:
        """Hand requests to the worker, all or none. Raises as `submit`."""
        try:
            return self.worker.submit_all(requests)
        except BusyError as busy:
            raise too_busy(self.worker.stats().queued, busy.retry_after_s) from None
        except ClosedError:
            raise shutting_down() from None
        except UnfitError as error:
            raise bad_request(str(error), param="messages") from None

    def read_answer(self, model: ServedModel, ask: Ask, reply: Reply) -> dict[str, Any]:
        """What `reply` is worth as an answer of the task: the keys of a line of `weitiao predict`."""
        assert ask.task is not None, "free conversation has no answers"
        return calibrated(read_reply(ask.record, ask.task, reply), model.calibration)

    def note_answer(self, answer_id: str, model: ServedModel, ask: Ask, ended: Ended, *, ticket: Ticket) -> None:
        """Count an answer, and remember it for who wants to rate it."""
        seconds = (ticket.ended or time.monotonic()) - ticket.submitted
        self.figures.tokens.labels(model.name, "prompt").inc(ended.usage.prompt_tokens)
        self.figures.tokens.labels(model.name, "completion").inc(ended.usage.completion_tokens)
        if ticket.first_token is not None:
            self.figures.first.observe(ticket.first_token - ticket.submitted)
        if ask.task is not None and ask.held and ended.reply is not None:
            line = self.read_answer(model, ask, ended.reply)
            self.figures.answered(
                model.name, ask.task.name, valid=line["valid"], confidence=line["confidence"], seconds=seconds
            )
        task = ask.task if ask.held else None
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


__all__ = ["RefusedError", "Server"]
