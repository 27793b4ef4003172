"""Penalties, bias, min-p and alternatives: OpenAI's definitions, worked out by hand from the model's own scores."""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from typing import Any

import pytest
import torch

from weitiao.generate.sampling import Chooser, Sampling, Steering, _draw, choose_tokens

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -3.0])


def chooser(*, written: tuple[int, ...] = (), temperature: float = 0.0, **steering: Any) -> Chooser:
    return Chooser(
        sampling=Sampling(temperature=temperature),
        random=Random(0),
        steering=Steering(**steering),
        counts=Counter(written),
    )


def choose(one: Chooser, allowed: list[int] | None = None) -> Any:
    ids = None if allowed is None else torch.tensor(allowed)
    return choose_tokens(LOGITS[None], allowed=[ids], choosers=[one])[0]


def test_presence_is_taken_once_and_frequency_for_every_time() -> None:
    assert choose(chooser(presence_penalty=0.6)).token == 0  # nothing is written yet
    assert choose(chooser(written=(0,), presence_penalty=0.4)).token == 0  # 2 - 0.4 = 1.6
    assert choose(chooser(written=(0,), presence_penalty=0.6)).token == 1  # 1.4 < 1.5
    assert choose(chooser(written=(0,) * 9, presence_penalty=0.4)).token == 0
    assert choose(chooser(written=(0,), frequency_penalty=0.3)).token == 0
    assert choose(chooser(written=(0, 0), frequency_penalty=0.3)).token == 1  # 2 - 0.6
    assert choose(chooser(written=(0, 0, 1, 1, 1), frequency_penalty=0.3)).token == 0  # 1.4 against 0.6 and 1.0
    assert choose(chooser(written=(1, 2), presence_penalty=-0.8)).token == 1  # negative ones ask for repetition
    assert choose(chooser(written=(0, 1), presence_penalty=0.4, frequency_penalty=0.7)).token == 2


def test_bias_bans_and_forces_and_counts_inside_a_constraint() -> None:
    assert choose(chooser(logit_bias={0: -100})).token == 1
    assert choose(chooser(logit_bias={4: 100})).token == 4
    assert choose(chooser(logit_bias={0: 100}), allowed=[1, 2]).token == 1, "a bias lets nothing in that is not allowed"
    assert choose(chooser(logit_bias={1: -1.0}), allowed=[1, 2]).token == 2


def test_logprobs_are_the_models_own_whatever_steers_the_choice() -> None:
    own = LOGITS.log_softmax(0)
    made = choose(chooser(written=(0,), temperature=1.7, presence_penalty=2.0, logit_bias={3: 100}, num_top=3))
    assert made.token == 3
    assert made.logprob == pytest.approx(float(own[3]))
    assert [token for token, _ in made.top] == [0, 1, 2]
    assert [value for _, value in made.top] == pytest.approx(own[:3].tolist())
    held = choose(chooser(num_top=20), allowed=[1, 3])
    assert held.token == 1
    assert held.top[0][1] == held.logprob == pytest.approx(-math.log1p(math.exp(-1.5)))
    assert sum(math.exp(value) for _, value in held.top) == pytest.approx(1.0)
    assert [token for token, _ in held.top] == [1, 3], "no more than there are"
    assert choose(chooser()).top == ()


def test_min_p_keeps_what_is_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([0.1, 0.5, 0.4]).log()
    points = [i / 500 for i in range(500)]
    for num_best in (1, 2, 1024):
        monkeypatch.setattr("weitiao.generate.sampling._NUCLEUS_TOKENS", num_best)
        for min_p, expected in ((0.19, [0.1, 0.5, 0.4]), (0.21, [0, 5 / 9, 4 / 9]), (0.9, [0, 1, 0]), (1.0, [0, 1, 0])):
            drawn = [_draw(scores, Sampling(temperature=1.0), point, min_p=min_p) for point in points]
            assert [drawn.count(token) / 500 for token in range(3)] == pytest.approx(expected, abs=0.005)
        drawn = [_draw(scores, Sampling(temperature=1.0, top_p=0.45), point, min_p=0.1) for point in points]
        assert set(drawn) == {1}


def test_each_row_is_chosen_by_its_own_wishes() -> None:
    rows = [chooser(), chooser(logit_bias={0: -100}), chooser(temperature=1.0), chooser(logit_bias={4: 100}, num_top=1)]
    made = choose_tokens(LOGITS.expand(4, -1), allowed=[None, None, torch.tensor([3]), None], choosers=rows)
    assert [one.token for one in made] == [0, 1, 3, 4]
    assert [len(one.top) for one in made] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logit_bias": {5: 101}}, "token 5 is 101"),
        ({"logit_bias": {-1: 1}}, "token -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"num_top": 21}, "num_top is 21"),
    ],
)
def test_impossible_wishes_are_refused_in_a_sentence(wish: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Steering(**wish)
