"""`weitiao check`: data files or a recipe in, everything that is wrong with them out, in seconds and without a model.

Joins the doctor (data/doctor.py), the tasks' answers (tasks/answers.py), the recipe and, where its files are on this
machine, the model's tokenizer. What comes out is a `Checkup`; terminal.py and page.py show it.

Up to `MAX_KEPT` rows are held in memory. Of more, the tasks are inferred from a sample and the files are read a second
time, so that memory stays bounded.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ..data.doctor import Doctor
from ..data.files import KNOWN_ENDINGS, find_files
from ..data.findings import Finding, by_grade, count_of
from ..data.formats import recognise_format
from ..data.lengths import LengthCount
from ..data.mixture import choose_rows, choose_share, hold_out
from ..data.records import Record, RowCount, iter_records_or_problems
from ..dataset import merge_tasks, read_options, stratum
from ..errors import DataError, Problem, RecipeError
from ..messages import Message
from ..recipe import Data, Recipe, Source, load_recipe, make_recipe
from ..render.tools import tools_as_text
from ..tasks.answers import AnswerWatch
from ..tasks.base import Task, infer_tasks
from .checkup import Checkup, Excerpt, FileCheck, LengthLimit, Side, excerpt
from .plan import Plan, TrainTokens
from .spelling import SpellingWatch
from .token_counts import TokenCounter, open_counter

MAX_KEPT = 50_000
"""Rows held in memory; of more, tasks are inferred from a sample of this size."""
LIMITS = (256, 512, 1024, 2048)
SAMPLES_PER_TASK = 3
EXCERPTS_PER_FINDING = 5

_RECIPE_ENDINGS = (".yaml", ".yml")
_DEV_NAMES = {"dev", "valid", "validation", "val", "test", "eval", "heldout"}
_BATCH_ROWS = 512


# ---- what is to be checked ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What a check looks at."""

    name: str
    """As the user wrote it."""
    recipe: Recipe
    is_recipe: bool
    """Whether the user gave the recipe; else it was made up around the data files."""
    has_model: bool
    """Whether the user named a model, by the recipe or an override."""
    unread: tuple[str, ...] = ()
    """Files of a folder that hold no rows as far as their endings tell."""


def find_subject(words: Sequence[str]) -> Subject:
    """What the words after ``weitiao check`` mean: one recipe, or files and folders of rows; and overrides.

    A data file whose name says dev, valid, test or eval is scored on when there are others to learn from.

    Raises:
        RecipeError: no path, several recipes, a recipe among data files, an override that cannot be applied.
        DataError: a folder without data files.
    """
    paths = [word for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if word not in paths]
    if not paths:
        raise RecipeError("Give a recipe, or files or folders of rows: weitiao check rows.jsonl")
    if any(path.endswith(_RECIPE_ENDINGS) for path in paths):
        if len(paths) > 1:
            raise RecipeError(f"Give one recipe, or data files only, but not both: {', '.join(paths)}.")
        return Subject(name=paths[0], recipe=load_recipe(paths[0], overrides), is_recipe=True, has_model=True)
    files: list[str] = []
    unread: list[str] = []
    for path in paths:
        found = find_files(path) if Path(path).is_dir() or any(sign in path for sign in "*?[") else [path]
        files += found
        unread += _other_files(path, found) if Path(path).is_dir() else []
    dev = [file for file in files if _says_dev(file)]
    dev = dev if len(dev) < len(files) else []
    data = {"train": [{"path": file} for file in files if file not in dev], "dev": [{"path": f} for f in dev]}
    values = {"name": "check", "model": "starter", "data": {**data, "held_out": 0}}
    return Subject(
        name=" ".join(paths),
        recipe=make_recipe(values, overrides),
        is_recipe=False,
        has_model=any(word.partition("=")[0] in ("model", "model.path") for word in overrides),
        unread=tuple(unread),
    )


def _other_files(folder: str, data: Sequence[str]) -> list[str]:
    """The files of a folder that are not among its `data`, hidden ones aside."""
    names = (str(file) for file in Path(folder).iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(set(names) - {str(Path(file)) for file in data})


def _says_dev(file: str) -> bool:
    words = Path(file).name.lower().replace("-", ".").replace("_", ".").split(".")
    return bool(_DEV_NAMES & set(words[:-1]))


# ---- checking -------------------------------------------------------------------------------------------------------


def check_subject(subject: Subject, *, max_length: int | None = None) -> Checkup:
    """Everything that is wrong with the data of `subject`; rows longer than `max_length` are counted as well.

    Raises:
        DataError: a file that cannot be read at all, or holds no rows. Bad rows are findings, not errors.
        RecipeError, ModelError: the recipe's tasks or tokenizer cannot be used.
    """
    counter = open_counter(subject.recipe.model.path) if subject.has_model else None
    return _Examination(subject, counter, max_length).run()


def check_recipe(recipe: Recipe, name: str) -> Checkup:
    """Everything that is wrong with the data of the recipe in the file `name`, lengths in tokens aside.

    Raises as `check_subject`.
    """
    return check_subject(Subject(name=name, recipe=recipe, is_recipe=True, has_model=False))


def read_source(source: Source, data: Data, count: RowCount | None = None) -> Iterator[Record | Problem]:
    """The rows of one source, read as the recipe says, and the problems of bad ones; `count` is kept up to date."""
    return iter_records_or_problems(source.path, options=read_options(source, data), count=count)


class _Row(NamedTuple):
    """One accepted row and how it is used."""

    record: Record
    side: Side
    weight: float
    """How often training sees it per epoch."""


class _Examination:
    """One run of a check: reads the rows, infers the tasks, shows every row to those who watch."""

    def __init__(self, subject: Subject, counter: TokenCounter | None, max_length: int | None) -> None:
        self._subject, self._counter, self._max_length = subject, counter, max_length
        data = subject.recipe.data
        self._sources: list[tuple[Source, Side]] = [(source, "train") for source in data.train]
        self._sources += [(source, "dev") for source in data.dev]
        self._doctor = Doctor()
        self._kept: list[_Row] = []
        self._num_read = 0
        self._used: dict[str, frozenset[int]] = {}
        self._limited: list[str] = []
        self._lengths = LengthCount("tokens" if counter else "characters", "example")
        self._waiting: list[tuple[tuple[Message, ...], str]] = []
        self._waiting_weights: list[float] = []
        self._train_tokens = TrainTokens()
        self._places: list[str] = []
        self._spelling = SpellingWatch(counter)

    def run(self) -> Checkup:
        files = self._read()
        inferred = infer_tasks([row.record for row in self._kept]) if self._kept else ()
        tasks = merge_tasks(inferred, self._subject.recipe.tasks)
        answers = AnswerWatch(tasks)
        samples: defaultdict[str, list[Excerpt]] = defaultdict(list)
        sides: Counter[Side] = Counter()
        for record, side, weight in self._rows(tasks):
            task = answers.add(record, side=side)
            name, free = (task.name, task.kind == "text") if task else ("", True)
            self._doctor.add(record, side=side, task=name, free=free)
            self._measure(record, task, weight if side == "train" else 0)
            sides[side] += 1
            if len(samples[name]) < SAMPLES_PER_TASK:
                samples[name].append(excerpt(record, name))
        self._flush()
        found = [
            *self._doctor.finish(),
            *answers.finish(),
            *self._spelling.finish(),
            *self._too_long(),
            *self._unread(),
        ]
        findings = tuple(by_grade(self._softened(found)))
        example = self._lengths.describe() if self._counter else None
        return Checkup(
            name=self._subject.name,
            files=files,
            train=sides["train"],
            dev=sides["dev"],
            tasks=answers.summaries(),
            findings=findings,
            lengths=(*self._doctor.lengths(), *([example] if example else [])),
            limits=self._limits(),
            limits_unit=self._lengths.unit,
            personal_data=self._doctor.personal_data(),
            samples=tuple(one for group in samples.values() for one in group),
            excerpts=self._excerpts(findings),
            tokenizer=str(self._counter.folder) if self._counter else "",
            next_command=_next_command(self._subject, findings),
            plan=self._plan(),
        )

    # ---- reading ----

    def _read(self) -> tuple[FileCheck, ...]:
        """Read all files once, keep the rows or a sample of them; bad rows go to the doctor."""
        rng = random.Random(self._subject.recipe.train.seed)
        files: list[FileCheck] = []
        complaints: list[str] = []
        problems: list[Problem] = []
        for source, side in self._sources:
            formats: Counter[str] = Counter()
            count, start = RowCount(), len(self._kept)
            try:
                for item in read_source(source, self._subject.recipe.data, count):
                    if isinstance(item, Problem):
                        problems.append(item)
                    else:
                        formats[source.format or recognise_format(item.raw) or "unknown"] += 1
                        self._keep(_Row(item, side, source.weight), rng)
            except DataError as error:
                complaints.append(str(error).splitlines()[0])
                problems += error.problems
                continue
            file = FileCheck(
                path=source.path, side=side, accepted=count.accepted, rejected=count.rejected, formats=dict(formats)
            )
            complaints += [file.complaint] if file.rejected else []
            files.append(file)
            if source.limit is not None and count.accepted > source.limit:
                self._limit(source.path, count.accepted, source.limit, start)
        if len(files) < len(self._sources):
            raise DataError("\n".join(complaints), problems)
        for problem in problems:
            self._doctor.reject(problem)
        return tuple(files)

    def _limit(self, path: str, count: int, limit: int, start: int) -> None:
        """Of the rows kept from `start` on, leave those that training uses."""
        places = choose_rows(count, limit, seed=self._subject.recipe.rows_seed, path=path)
        self._used[path] = frozenset(places)
        self._limited.append(f"{path}: {limit:,} of {count:,} rows")
        if not self._is_sample:
            self._kept[start:] = [self._kept[start + place] for place in places]
            self._num_read -= count - limit

    def _keep(self, row: _Row, rng: random.Random) -> None:
        """Keep the row or, past `MAX_KEPT`, let it take another's place by chance (reservoir sampling)."""
        self._num_read += 1
        if len(self._kept) < MAX_KEPT:
            self._kept.append(row)
        elif (place := rng.randrange(self._num_read)) < MAX_KEPT:
            self._kept[place] = row

    @property
    def _is_sample(self) -> bool:
        return self._num_read > len(self._kept)

    def _rows(self, tasks: Sequence[Task]) -> Iterator[_Row]:
        """Every accepted row; its weight is 0 where training leaves it out for `data.share`, on average of a sample."""
        share, seed = self._subject.recipe.data.share, self._subject.recipe.train.seed
        if share == 1 or self._is_sample:
            yield from (row._replace(weight=row.weight * share) for row in self._sided_rows(tasks))
            return
        rows = list(self._sided_rows(tasks))
        train = [place for place, row in enumerate(rows) if row.side == "train"]
        chosen = choose_share([stratum(rows[place].record, tasks) for place in train], share=share, seed=seed)
        left_out = set(train).difference(train[place] for place in chosen)
        yield from (row._replace(weight=0.0) if place in left_out else row for place, row in enumerate(rows))

    def _sided_rows(self, tasks: Sequence[Task]) -> Iterator[_Row]:
        """Every accepted row with its side and weight; read again where not all were kept.

        Held-out rows are set apart only where all were kept: they never share an input with a train row.
        """
        data = self._subject.recipe.data
        if self._is_sample:
            for source, side in self._sources:
                items = read_source(source, data)
                records = (item for item in items if isinstance(item, Record))
                used = self._used.get(source.path)
                for place, record in enumerate(records):
                    if used is None or place in used:
                        yield _Row(record, side, source.weight)
        elif data.dev or not data.held_out:
            yield from self._kept
        else:
            kept = [row.record for row in self._kept]
            strata = [stratum(record, tasks) for record in kept]
            apart = hold_out(kept, strata, share=data.held_out, seed=self._subject.recipe.rows_seed)
            for place, row in enumerate(self._kept):
                yield row._replace(side="dev") if place in apart else row

    # ---- lengths ----

    def _measure(self, record: Record, task: Task | None, weight: float) -> None:
        """Count the row's length; `weight`: how often training sees it per epoch, 0 for a dev row."""
        answer = record.target
        text = answer if isinstance(answer, str) else task.form.style.dumps(answer) if task else repr(answer)
        self._places.append(record.source)
        self._spelling.add(record.source, text)
        if self._counter is None:
            self._lengths.add(sum(len(message.text) for message in record.messages) + len(text))
            return
        has_tools = record.tools or len(record.messages) > 1
        messages = tuple(tools_as_text(record.messages, record.tools)) if has_tools else record.messages
        self._waiting.append((messages, text))
        self._waiting_weights.append(weight)
        if len(self._waiting) >= _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._counter is not None and self._waiting:
            counts = self._counter.count(self._waiting, turns=self._subject.recipe.data.turns)
            self._lengths.add(*(count.total for count in counts))
            for count, weight in zip(counts, self._waiting_weights, strict=True):
                if weight:
                    self._train_tokens.add(total=count.total, learnt=count.learnt, weight=weight)
            self._waiting, self._waiting_weights = [], []

    def _plan(self) -> Plan | None:
        """What training comes to; None without a recipe, or where the model's tokenizer is not on this machine."""
        recipe = self._subject.recipe
        if not self._subject.is_recipe or self._counter is None:
            return None
        work = self._train_tokens.workload(recipe.data, recipe.train)
        if work is None:
            return None
        return Plan(work=work, price_per_hour=recipe.train.price_per_hour, currency=recipe.train.currency)

    def _limits(self) -> tuple[LengthLimit, ...]:
        own = {self._max_length} if self._max_length else set()
        if self._counter is not None and self._subject.is_recipe:
            own.add(self._subject.recipe.data.max_length)
        usual = LIMITS if self._counter is not None else ()
        return tuple(
            LengthLimit(limit=limit, over=len(self._lengths.over(limit)), own=limit in own)
            for limit in sorted({*usual, *own})
        )

    def _too_long(self) -> Iterator[Finding]:
        own = self._subject.recipe.data.max_length if self._subject.is_recipe and self._counter else None
        for limit in sorted({limit for limit in (own, self._max_length) if limit}):
            if places := self._lengths.over(limit):
                yield self._longer_than(limit, places, is_own=limit == own)

    def _longer_than(self, limit: int, places: Sequence[int], *, is_own: bool) -> Finding:
        """The rows at `places` are longer than `limit`, which is the recipe's own or the one asked about."""
        overlong = self._subject.recipe.data.overlong
        policy = {
            "error": "Training stops before its first step.",
            "drop": "Training leaves them out.",
            "shorten_input": "Training shortens their texts from the end.",
        }
        longest = max(map(self._lengths.value, places))
        about = "about " if self._counter else ""
        return Finding(
            code="too-long",
            grade="error" if is_own and overlong == "error" else "warning",
            title=f"At max_length {limit:,}, {count_of(len(places), 'row')} would not fit",
            message=f"{policy[overlong]} The longest has {about}{longest:,} {self._lengths.unit}.",
            sources=tuple(self._places[place] for place in places),
            details=tuple(f"{about}{self._lengths.value(place):,} {self._lengths.unit}" for place in places),
            count=len(places),
            fix=f"Set data.max_length={longest + longest // 20} or data.overlong=shorten_input, or shorten them.",
        )

    # ---- what else is to be said ----

    def _unread(self) -> Iterator[Finding]:
        if self._limited:
            yield Finding(
                code="limited",
                grade="note",
                title=f"{count_of(len(self._limited), 'source')} of which a part is used: {', '.join(self._limited)}",
                message="The rows are chosen by the seed; only these are examined further.",
                count=len(self._limited),
                fix="Nothing; to use all of them, remove the limit from the recipe.",
            )
        unread = self._subject.unread
        if unread:
            yield Finding(
                code="unread-file",
                grade="note",
                title=f"{count_of(len(unread), 'file')} of the folder not read",
                message=f"Rows are looked for in files that end with {', '.join(KNOWN_ENDINGS)}.",
                sources=unread,
                count=len(unread),
                fix="Nothing, if they hold no rows.",
            )

    def _softened(self, findings: Iterable[Finding]) -> Iterator[Finding]:
        """The findings; where forms were inferred from a sample, an answer that does not fit is a warning only."""
        for finding in findings:
            if self._is_sample and finding.code in ("misfit", "unknown-task"):
                caution = f" The forms were inferred from a sample of {len(self._kept):,} rows."
                finding = replace(finding, grade="warning", message=finding.message + caution)
            yield finding

    def _excerpts(self, findings: Iterable[Finding]) -> dict[str, Excerpt]:
        wanted = {source for finding in findings for source in finding.sources[:EXCERPTS_PER_FINDING]}
        return {row.record.source: excerpt(row.record, "") for row in self._kept if row.record.source in wanted}


def _next_command(subject: Subject, findings: Sequence[Finding]) -> str:
    """What to type next."""
    fixable = any(finding.edits for finding in findings if finding.grade != "note")
    several = len(subject.recipe.data.train) + len(subject.recipe.data.dev) > 1
    if fixable:
        return f"weitiao check {subject.name} --fix {'mended/' if several else 'mended.jsonl'}"
    if any(finding.grade == "error" for finding in findings):
        return f"weitiao check {subject.name}"
    if subject.is_recipe:
        return f"weitiao train {subject.name}"
    dev = "".join(f" --dev {source.path}" for source in subject.recipe.data.dev)
    return f"weitiao init {' '.join(source.path for source in subject.recipe.data.train)}{dev}"
