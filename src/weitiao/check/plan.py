"""What a training will take: counted from the rows without a model, foretold from a probe where one was made.

Holds the figures and their words; counting is examine.py's business, probing that of ../probe.py.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import asdict, dataclass
from typing import Any

from ..data.findings import Finding, count_of
from ..data.order import num_steps
from ..errors import RecipeError
from ..recipe import Data, Train


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """How much there is to learn."""

    rows: int
    tokens_per_epoch: int
    learnt_per_epoch: int
    """Those of the answers, which alone count in the loss."""
    longest: int
    """Tokens of the longest row."""
    epochs: float
    batch_size: int
    steps: int
    """Optimiser steps of the whole training."""
    exact: bool = False
    """Whether the tokens are those of training; else each row is counted to within a few."""

    def describe(self) -> str:
        """One line.

        ``90 rows of about 10,720 tokens an epoch, 1,210 of them learnt, the longest 310; 3 epochs are 36 optimiser
        steps of 8 rows``
        """
        about = "" if self.exact else "about "
        return (
            f"{count_of(self.rows, 'row')} of {about}{self.tokens_per_epoch:,} tokens an epoch, "
            f"{self.learnt_per_epoch:,} of them learnt, the longest {self.longest:,}; "
            f"{self.epochs:g} {'epoch is' if self.epochs == 1 else 'epochs are'} "
            f"{count_of(self.steps, 'optimiser step')} of {count_of(self.batch_size, 'row')}"
        )


class TrainTokens:
    """Collects the tokens of the train rows; sixteen bytes a row."""

    def __init__(self) -> None:
        self._totals, self._learnt, self._weights = array("I"), array("I"), array("d")

    def add(self, *, total: int, learnt: int, weight: float) -> None:
        """Take in a row: its tokens, those that are learnt, and how often the row is seen per epoch."""
        self._totals.append(total)
        self._learnt.append(learnt)
        self._weights.append(weight)

    def workload(self, data: Data, train: Train) -> Workload | None:
        """What training on these rows comes to, as the recipe's limit and epochs have it; None for no rows."""
        limit = data.max_length
        rows = [
            (min(total, limit) if data.overlong == "shorten_input" else total, learnt, weight)
            for total, learnt, weight in zip(self._totals, self._learnt, self._weights, strict=True)
            if total <= limit or data.overlong != "drop"
        ]
        if not rows:
            return None
        weights = [weight for _, _, weight in rows]
        return Workload(
            rows=len(rows),
            tokens_per_epoch=round(sum(total * weight for total, _, weight in rows)),
            learnt_per_epoch=round(sum(learnt * weight for _, learnt, weight in rows)),
            longest=max(total for total, _, _ in rows),
            epochs=train.epochs,
            batch_size=train.batch_size,
            steps=num_steps(weights, batch_size=train.batch_size, seed=train.seed, epochs=train.epochs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What the training takes at its peak, and what it may take."""

    bytes: int
    limit: int
    """What this process may come to take on this machine as it is now."""
    measured: bool
    """Whether real steps were taken; else it is estimated, because there was no room for them."""

    @property
    def fits(self) -> bool:
        """Whether there is room for the training."""
        return self.bytes <= self.limit

    def describe(self) -> str:
        """``4.1 GB at the peak, of 19.2 GB to be had``."""
        more = "" if self.measured else " or more"
        return f"{self.bytes / 2**30:.1f} GB{more} at the peak, of {self.limit / 2**30:.1f} GB to be had"


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """How long the training takes."""

    steps: float
    """Seconds of all optimiser steps, the layers not compiled."""
    compiled_steps: float | None
    """The same with torch.compile, compiling included, by the usual gain; None where it will not be used."""
    compiles: bool
    """Whether training will compile."""
    scorings: int
    scoring: float
    """Seconds of all scorings of the dev rows."""

    @property
    def all(self) -> float:
        """Seconds of the whole training as the recipe has it."""
        return self.scoring + (self.compiled_steps if self.compiles and self.compiled_steps else self.steps)

    def describe(self) -> str:
        """``23 min: 20 min for the steps, 3 min for 3 scorings; 17 min with torch.compile``."""
        scoring = f"{tell_seconds(self.scoring)} for {count_of(self.scorings, 'scoring')}"
        told = f"{tell_seconds(self.all)}: {tell_seconds(self.all - self.scoring)} for the steps, "
        told += scoring if self.scorings else "no scoring"
        if self.compiled_steps is None:
            return told
        other = self.scoring + (self.steps if self.compiles else self.compiled_steps)
        return f"{told}; {tell_seconds(other)} {'without' if self.compiles else 'with'} torch.compile"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to set what memory and time depend on, and what comes of it."""

    changes: tuple[str, ...]
    """What is not as the recipe has it, as overrides such as ``train.tokens_per_pass=512``; none: the recipe itself."""
    bytes: int
    """Foretold at the peak."""
    fits: bool
    seconds: float | None = None
    """Of all optimiser steps, the layers not compiled, from two real ones; None where none were taken."""
    applied: bool = False
    """Whether `weitiao train` does so by itself."""
    same_result: bool = True
    """Whether the same is learnt; else it is proposed and never done unasked."""
    faster: bool = False
    """Whether steps were faster than the recipe's own, and there is room for it."""

    def describe(self) -> str:
        """``5.4 GB, 25 min for the steps: weitiao train takes this by itself``."""
        time = "" if self.seconds is None else f", {tell_seconds(self.seconds)} for the steps"
        told = f"{self.bytes / 2**30:.1f} GB{time}"
        if not self.fits:
            return f"{told}: too much"
        if self.applied:
            return f"{told}: weitiao train takes this by itself"
        if self.faster:
            return f"{told}: faster, and there is room; write it into the recipe"
        return told if self.same_result else f"{told}: changes what is learnt, so only if you write it into the recipe"


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a few real steps on this machine foretell of the whole training."""

    device: str
    memory: Memory
    times: Times | None
    """None where there was no room for a step."""
    choices: tuple[Choice, ...] = ()
    """The recipe as it is and other settings of it; none where the model itself could not be loaded."""

    @property
    def applied(self) -> Choice | None:
        """What `weitiao train` would change by itself so that the training fits."""
        return next((one for one in self.choices if one.applied), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Workload, forecast and price of one training."""

    work: Workload | None = None
    """None where neither a tokenizer nor a probe could count."""
    forecast: Forecast | None = None
    """None where no probe was made."""
    price_per_hour: float | None = None
    currency: str = ""

    @property
    def cost(self) -> float | None:
        """What the machine's time costs; None without a probe or a price."""
        if self.forecast is None or self.forecast.times is None or self.price_per_hour is None:
            return None
        return self.forecast.times.all / 3600 * self.price_per_hour

    def figures(self) -> list[tuple[str, str]]:
        """What is known, as pairs such as ``("time", "about 23 min: …")``."""
        told = [("training", self.work.describe())] if self.work is not None else []
        if self.forecast is not None:
            told.append(("memory", f"about {self.forecast.memory.describe()} ({self.forecast.device})"))
            if self.forecast.times is not None:
                told.append(("time", f"about {self.forecast.times.describe()}"))
            if len(self.forecast.choices) > 1:
                told += [
                    ("with " + " ".join(one.changes) if one.changes else "as written", one.describe())
                    for one in self.forecast.choices
                ]
        if self.cost is not None:
            price = f"{self.currency}{self.price_per_hour:g}"
            told.append(("cost", f"about {self.currency}{self.cost:.2f} at {price} an hour"))
        return told

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints under ``plan``; what is not known is null."""
        work, seen = self.work, self.forecast
        return {
            "rows": work.rows if work else None,
            "tokens_per_epoch": work.tokens_per_epoch if work else None,
            "learnt_tokens_per_epoch": work.learnt_per_epoch if work else None,
            "longest": work.longest if work else None,
            "exact": work.exact if work else None,
            "epochs": work.epochs if work else None,
            "steps": work.steps if work else None,
            "device": seen.device if seen else None,
            "memory": asdict(seen.memory) if seen else None,
            "choices": [asdict(one) for one in seen.choices] if seen else [],
            "seconds": {"all": seen.times.all, **asdict(seen.times)} if seen and seen.times else None,
            "price_per_hour": self.price_per_hour,
            "currency": self.currency,
            "cost": self.cost,
        }


def memory_finding(plan: Plan, train: Train) -> Finding | None:
    """The finding that the memory does not suffice, with what to change; None where it does.

    A warning where the training fits with what `weitiao train` changes by itself, else an error.
    """
    if plan.forecast is None or plan.forecast.memory.fits:
        return None
    memory, applied = plan.forecast.memory, plan.forecast.applied
    how = "Measured by real steps" if memory.measured else "Estimated: there was no room for a step"
    if applied is not None:
        return Finding(
            code="memory",
            grade="warning",
            title=f"As written, the training does not fit into memory: about {memory.describe()}",
            message=f"{how} ({plan.forecast.device}). weitiao train takes {' '.join(applied.changes)} by itself: "
            f"{applied.describe().partition(':')[0]}. What is learnt stays the same.",
            count=1,
            fix=f"Write it into the recipe: {' '.join(applied.changes)}.",
        )
    longest = plan.work.longest if plan.work is not None else 0
    cures = []
    if train.tokens_per_pass > longest:
        cures.append(f"lower train.tokens_per_pass (now {train.tokens_per_pass}; the longest row has {longest} tokens)")
    if train.gradient_checkpointing is not True:
        cures.append("set train.gradient_checkpointing=true")
    proposed = [one for one in plan.forecast.choices if one.fits and not one.same_result]
    cures += [f"set {' '.join(one.changes)} ({one.bytes / 2**30:.1f} GB)" for one in proposed]
    cures += ["lower generate.batch_rows", "take a smaller model"]
    fix = "; or ".join(cures)
    return Finding(
        code="memory",
        grade="error",
        title=f"The training does not fit into memory: about {memory.describe()}",
        message=f"{how} ({plan.forecast.device}). Training would be ended by the system.",
        count=1,
        fix=f"{fix[0].upper()}{fix[1:]}.",
    )


def read_bytes(text: str) -> int:
    """The bytes that a user means by ``8GB``, ``8`` or ``512MB``; a GB has 2^30, as a machine's memory is told.

    Raises:
        RecipeError: it is no amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB|M)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise RecipeError(f"--memory {text!r} is no amount of memory. Write it like 8GB or 512MB.")
    unit = 1 << 20 if (found[2] or "G").upper().startswith("M") else 1 << 30
    return round(float(found[1]) * unit)


def tell_seconds(seconds: float) -> str:
    """A time to two figures or so: what is foretold is not known to the second.

    >>> [tell_seconds(number) for number in (0.31, 48, 200, 1200, 5000)]
    ['0.3 s', '48 s', '3.3 min', '20 min', '1.4 h']
    """
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    number, unit = (seconds / 60, "min") if seconds < 4800 else (seconds / 3600, "h")
    return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
