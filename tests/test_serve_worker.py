"""The worker against offline generation, on tiny random models in fp32: same answers, whatever else is asked."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator

import pytest
import torch

from test_engine import in_order, random_prompts, tiny_model
from tiny_models import ask, setting
from weitiao.generate.chat import reply_all, reply_of
from weitiao.generate.engine import Sampling, generate
from weitiao.generate.sampling import Steering
from weitiao.models.adapter_set import AdapterSet
from weitiao.serve.fair_queue import FairQueue
from weitiao.serve.limits import Limits
from weitiao.serve.requests import BusyError, ClosedError, Done, Failed, Piece, Request, Ticket, UnfitError
from weitiao.serve.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def working(family: str = "llama", **limits: int) -> Iterator[Worker]:
    worker = Worker(AdapterSet(tiny_model(family)), limits=Limits(**limits))
    try:
        yield worker
    finally:
        worker.close()


def answer(worker: Worker, request: Request) -> Done:
    event = worker.submit(request).wait()
    assert isinstance(event, Done), event
    return event


def heads_and_tails(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of which some begin alike for some dozens of tokens."""
    draw = random.Random(seed)
    heads = random_prompts(3, longest=60, seed=seed)
    tails = random_prompts(count, longest=20, seed=seed + 1)
    return [[*draw.choice([[], *heads]), *tail] for tail in tails]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=16), Sampling(max_new_tokens=16, temperature=1.3, top_p=0.9, seed=3)]
)
def test_requests_are_answered_as_offline_whatever_runs_beside_them(family: str, sampling: Sampling) -> None:
    prompts = heads_and_tails(24)
    model = tiny_model(family)
    expected = [next(iter(generate(model, [prompt], stop_ids=[5, 9], sampling=sampling))) for prompt in prompts]
    with working(family, max_rows=5, prefill_tokens=24) as worker:
        tickets = [
            worker.submit(Request(prompt_ids=prompt, stop_ids=[5, 9], limit=16, sampling=sampling))
            for prompt in prompts
        ]
        for ticket, offline in zip(tickets, expected, strict=True):
            events = list(ticket)
            done = events[-1]
            assert isinstance(done, Done)
            assert done.generation.token_ids == offline.token_ids
            assert done.finish == offline.finish
            assert done.generation.logprob == pytest.approx(offline.logprob, abs=1e-3)
            told = [choice for event in events[:-1] if isinstance(event, Piece) for choice in event.tokens]
            assert tuple(told) == done.tokens
            assert tuple(choice.token for choice in told) == offline.token_ids
        stats = worker.stats()
    assert stats.finished == 24
    assert stats.cached_tokens > 100
    assert stats.prefix_hits > 5


GRAMMARS = (
    'start: "[\\"" ("体育" | "科技" | "财经") "\\"]"',
    'start: "{\\"name\\": \\"" /[a-z]{1,12}/ "\\", \\"age\\": " /[0-9]{1,3}/ "}"',
    None,
)


@pytest.mark.parametrize("tokenizer", ["chatml", "inst"])
def test_replies_are_those_of_evaluation(tokenizer: str) -> None:
    model, renderer, compile_ = setting(tokenizer)
    asked = [ask(f"小王在北京的一家书店上班，他喜欢读什么？第{index}题。") for index in range(18)]
    grammars = [GRAMMARS[index % 3] for index in range(18)]
    sampling = Sampling(max_new_tokens=40)
    expected = in_order(reply_all(model, renderer, asked, sampling=sampling, grammars=grammars))
    compiled = {grammar: compile_(grammar, before=renderer.before_answer()) for grammar in GRAMMARS if grammar}
    requests = [
        Request(
            prompt_ids=renderer.render_prompt(messages),
            stop_ids=renderer.stop_ids,
            limit=40,
            sampling=sampling,
            constraint=compiled[grammar] if grammar else None,
        )
        for messages, grammar in zip(asked, grammars, strict=True)
    ]
    worker = Worker(AdapterSet(model), limits=Limits(max_rows=7, prefill_tokens=64))
    tickets: dict[int, Ticket] = {}

    def send(first: int) -> None:
        for index in range(first, 18, 3):
            tickets[index] = worker.submit(requests[index])

    threads = [threading.Thread(target=send, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, reply in enumerate(expected):
        done = tickets[index].wait()
        assert isinstance(done, Done)
        served = reply_of(done.generation, renderer, held=grammars[index] is not None)
        assert (served.text, served.finish, served.num_tokens) == (reply.text, reply.finish, reply.num_tokens)
        assert [span[:2] for span in served.tokens] == [span[:2] for span in reply.tokens]
        assert [span[2] for span in served.tokens] == pytest.approx([span[2] for span in reply.tokens], abs=1e-4)
    assert worker.stats().cached_tokens > 0
    worker.close()


def endless(prompt: list[int], limit: int = 90, **more: str) -> Request:
    return Request(prompt_ids=prompt, stop_ids=[], limit=limit, **more)  # type: ignore[arg-type]


def test_a_cancelled_request_leaves_its_row_to_others() -> None:
    first, second = random_prompts(2, longest=20)
    with working(max_rows=1) as worker:
        gone, kept = worker.submit(endless(first)), worker.submit(endless(second, 9))
        next(iter(gone))
        gone.cancel()
        end = gone.wait()
        assert isinstance(end, Failed) and end.kind == "cancelled"
        done = kept.wait()
        assert isinstance(done, Done)
        offline = next(iter(generate(tiny_model("llama"), [second], stop_ids=[], sampling=Sampling(max_new_tokens=9))))
        assert done.generation.token_ids == offline.token_ids
        waiting = [worker.submit(endless(first)) for _ in range(3)]
        waiting[2].cancel()  # one that has no row yet
        assert isinstance(waiting[2].wait(), Failed)
        assert [type(ticket.wait()) for ticket in waiting[:2]] == [Done, Done]
        stats = worker.stats()
    assert (stats.cancelled, stats.finished, stats.accepted) == (2, 3, 5)


def test_a_client_that_goes_away_cancels_its_request() -> None:
    async def listen(worker: Worker) -> tuple[Ticket, int]:
        ticket, seen = worker.submit(endless([3, 4, 5])), 0
        async with contextlib.aclosing(ticket.events()) as events:
            async for event in events:
                seen += isinstance(event, Piece)
                if seen == 3:
                    break
        whole = await worker.submit(endless([3, 4, 5], 7)).result()
        assert isinstance(whole, Done)
        assert len(whole.tokens) == 7
        task = asyncio.create_task(worker.submit(endless([6, 7])).result())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return ticket, seen

    with working() as worker:
        ticket, seen = asyncio.run(listen(worker))
        assert isinstance(ticket.wait(), Failed)
        assert seen == 3
    assert worker.stats().cancelled == 2


def test_a_full_queue_says_when_to_come_again() -> None:
    with working(max_rows=1, max_queue=2) as worker:
        running = worker.submit(endless([3, 4]))
        next(iter(running))
        waiting = [worker.submit(endless([3, 4], 2)) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests are waiting, of at most 2") as caught:
            worker.submit(endless([3, 4], 2))
        assert 1 <= caught.value.retry_after_s <= 120
        with pytest.raises(BusyError):
            worker.submit_all([endless([3, 4], 2)] * 2)
        assert all(isinstance(ticket.wait(), Done) for ticket in waiting)
        assert isinstance(worker.submit(endless([3, 4], 2)).wait(), Done)
        assert worker.stats().refused_busy == 3


@pytest.mark.parametrize(("drain_s", "ends"), [(60.0, [Done, Done]), (0.0, [Failed, Failed])])
def test_closing_finishes_or_fails_what_is_there(drain_s: float, ends: list[type]) -> None:
    with working(max_rows=1) as worker:
        tickets = [worker.submit(endless([3, 4], 60)), worker.submit(endless([5, 6], 5))]
        next(iter(tickets[0]))
        worker.close(drain_s)
        found = [ticket.wait() for ticket in tickets]
        assert [type(event) for event in found] == ends
        assert all(event.kind == "shutdown" for event in found if isinstance(event, Failed))
        with pytest.raises(ClosedError, match="shutting down"):
            worker.submit(endless([3]))
        assert not worker.alive


def test_an_error_of_the_model_fails_its_requests_and_the_worker_lives_on() -> None:
    model = tiny_model("llama")
    calls = [0]

    def fail(*_: object) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError("out of luck")

    model.get_decoder().register_forward_pre_hook(fail)
    worker = Worker(AdapterSet(model))
    broken = worker.submit_all([endless([3, 4]), endless([7, 8, 9])])
    for ticket in broken:
        event = ticket.wait()
        assert isinstance(event, Failed)
        assert (event.kind, event.reason) == ("error", "The model could not be run: RuntimeError: out of luck")
    offline = next(iter(generate(tiny_model("llama"), [[3, 4]], stop_ids=[], sampling=Sampling(max_new_tokens=9))))
    assert answer(worker, endless([3, 4], 9)).generation.token_ids == offline.token_ids
    stats = worker.stats()
    worker.close()
    assert (stats.alive, stats.errors, stats.failed) == (True, 1, 2)


def test_several_answers_to_one_prompt_compute_it_once() -> None:
    prompt, sampling = random_prompts(1, longest=60, seed=2)[0] * 2, Sampling(temperature=1.5, seed=7, max_new_tokens=6)
    requests = [
        Request(prompt_ids=prompt, stop_ids=[5], limit=6, sampling=sampling, choice=choice) for choice in range(5)
    ]
    with working() as worker:
        found = [ticket.wait() for ticket in worker.submit_all(requests)]
        offline = in_order(generate(tiny_model("llama"), [prompt] * 5, stop_ids=[5], sampling=sampling))
        assert [d.generation.token_ids for d in found if isinstance(d, Done)] == [one.token_ids for one in offline]
        cached = [done.usage.cached_tokens for done in found if isinstance(done, Done)]
        assert cached == [0] + [len(prompt) - 1] * 4
        assert answer(worker, requests[3]).generation.token_ids == offline[3].token_ids


def test_memory_is_bounded_and_given_back() -> None:
    prompts = random_prompts(40, longest=60, seed=9)
    with working(max_cache_tokens=300, kept_bytes=20_000) as worker:
        sizes = []
        for _ in range(2):
            tickets = [worker.submit(endless(prompt, 10)) for prompt in prompts]
            assert all(isinstance(ticket.wait(), Done) for ticket in tickets)
            sizes.append(worker.stats())
        worker.close()
        for stats in sizes:
            assert stats.kept_bytes <= 20_000
        assert worker.stats().running == worker.stats().queued == 0
        assert sizes[0].cache_bytes < 8 * 200 * 2 * 2 * 16 * 4 * 2, "eight rows of the longest, in fp32"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (endless([]), "The prompt has 0 tokens"),
        (endless([3], 0), "may have 0"),
        (endless([3] * 150, 11), "150 tokens \\+ 11 new ones = 161 positions of 160"),
        (endless([3], adapter="b"), "no adapter 'b'. There are: none"),
        (endless([61]), "no token 61: the model has 61"),
        (Request(prompt_ids=[3], stop_ids=[], limit=1, steering=Steering(logit_bias={99: 1})), "no token 99"),
    ],
)
def test_what_can_never_run_is_refused_at_once(request_: Request, words: str) -> None:
    with working() as worker, pytest.raises(UnfitError, match=words):
        worker.submit(request_)


def test_steering_reaches_the_choice_and_alternatives_are_told() -> None:
    with working() as worker:
        free = answer(worker, endless([3, 4, 5], 12))
        banned = {choice.token: -100.0 for choice in free.tokens}
        steering = Steering(logit_bias=banned, num_top=4, frequency_penalty=2.0)
        steered = answer(worker, Request(prompt_ids=[3, 4, 5], stop_ids=[], limit=12, steering=steering))
        assert not {choice.token for choice in steered.tokens} & banned.keys()
        assert steered.tokens[0].top[0][0] == free.tokens[0].token
        assert all(len(choice.top) == 4 for choice in steered.tokens)
        assert all(choice.logprob <= choice.top[0][1] + 1e-6 for choice in steered.tokens)


def test_keys_take_turns() -> None:
    queue = FairQueue()
    tickets = {name: Ticket(endless([3], key=name[0]), lambda: None) for name in ("a1", "a2", "a3", "b1", "c1", "b2")}
    for ticket in tickets.values():
        queue.push(ticket)
    order = []
    while len(queue):
        ticket = next(iter(queue))
        queue.serve(ticket)
        order.append(next(name for name, each in tickets.items() if each is ticket))
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert list(queue) == []


def test_batches_cannot_run_a_model_in_training() -> None:
    with pytest.raises(Exception, match="training mode"):
        Worker(AdapterSet(tiny_model("llama").train()))
    assert torch.is_grad_enabled()
