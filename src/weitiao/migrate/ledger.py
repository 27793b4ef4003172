"""The ledger of a migration: every setting of the original is written down once, with what became of it.

    carried     it became a key of the recipe
    needless    weitiao does so anyway, and needs no key for it
    left        it could not be carried, with the reason

`close` finds the settings that nothing was written about: unknown ones, which are left and named. Knows no original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import RecipeError

OFF: tuple[object, ...] = (None, False, 0, "", "0", "0.0", "none", "None", "null", "no", "false", "False", (), [])
"""What a setting is that asks for nothing."""


_SECRETS = ("_key", "_token", "_secret", "password", "webhook_url")
"""How the names of settings end that nobody else shall read."""

DEFAULT = "the original's default"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the user says beside the file."""

    model: str | None = None
    data: tuple[str, ...] = ()
    """Files of train rows, or the folder that the original's own names are in."""
    dev: tuple[str, ...] = ()
    method: Literal["lora", "ptuning_v2"] | None = None
    rows: int | None = None
    """How many train rows there are, where they do not lie here."""
    devices: int | None = None
    """On how many devices the original ran, where the file does not say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What became of one setting, or of several that are one key together."""

    setting: str
    """As the user wrote it: ``--learning_rate 3e-5``."""
    place: str
    """The recipe's key, such as ``train.learning_rate``; empty where there is none."""
    words: str
    """A note, or the reason why it was left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A key of the recipe, its value, and what stands in the comment beside it."""

    value: Any
    comment: str


@dataclass(kw_only=True)
class Ledger:
    """The settings of an original, and what becomes of each."""

    settings: Mapping[str, Any]
    spell: Callable[[str, Any], str]
    """How a setting is written in the original: ``("learning_rate", "3e-5")`` → ``--learning_rate 3e-5``."""
    folder: Path
    """Where the file lies that says them."""
    lines: dict[str, Line] = field(default_factory=dict)
    """The recipe so far, by dotted key."""
    carried: list[Entry] = field(default_factory=list)
    needless: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What differs though no setting says so."""
    asked: list[str] = field(default_factory=list)
    """What the user must say before a recipe can be written."""
    _seen: set[str] = field(default_factory=set)

    # ---- reading ----

    def has(self, key: str) -> bool:
        """Whether the original sets `key` to something."""
        return self.settings.get(key) is not None

    def text(self, key: str) -> str | None:
        """The setting as text; None where it is not there."""
        value = self.settings.get(key)
        return None if value is None else str(value)

    def number(self, key: str) -> float | None:
        """The setting as a number, ``"5e-5"`` too; None where it is not there. Raises RecipeError for anything else."""
        value = self.settings.get(key)
        if value is None or str(value).lower() in ("none", "null", ""):
            return None
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError):
            raise RecipeError(f"{self.spelled(key)} cannot be migrated: {value!r} is no number.") from None

    def whole(self, key: str) -> int | None:
        """The setting as a whole number; None where it is not there. Raises RecipeError for anything else."""
        value = self.number(key)
        if value is None:
            return None
        if value != int(value):
            raise RecipeError(f"{self.spelled(key)} cannot be migrated: {value:g} is no whole number.")
        return int(value)

    def flag(self, key: str) -> bool | None:
        """The setting as yes or no; None where it is not there. Raises RecipeError for anything else."""
        value = self.settings.get(key)
        if value is None or isinstance(value, bool):
            return value
        word = str(value).lower()
        if word in ("true", "yes", "1", "on"):
            return True
        if word in ("false", "no", "0", "off", "none", ""):
            return False
        raise RecipeError(f"{self.spelled(key)} cannot be migrated: {value!r} is neither true nor false.")

    def spelled(self, *keys: str) -> str:
        """The settings as the user wrote them; keys and passwords are not repeated, for recipes are passed around."""
        return ", ".join(
            self.spell(key, "…" if key.endswith(_SECRETS) and self.settings[key] else self.settings[key])
            for key in keys
            if key in self.settings
        )

    # ---- writing ----

    def carry(self, keys: str | tuple[str, ...], place: str, value: Any, note: str = "") -> None:
        """`keys` became ``place: value``. Those of `keys` that the original does not set are no part of it."""
        present = tuple(key for key in ((keys,) if isinstance(keys, str) else keys) if key in self.settings)
        told = self.spelled(*present)
        self.lines[place] = Line(value=value, comment=f"{told} ({note})" if told and note else told or note or DEFAULT)
        if present:
            self.carried.append(Entry(setting=told, place=place, words=note))
            self._seen.update(present)

    def carry_into(self, key: str, place: str, note: str) -> None:
        """`key` became a part of what stands at `place` already, or will stand there."""
        if key in self.settings:
            self.carried.append(Entry(setting=self.spelled(key), place=place, words=note))
            self._seen.add(key)

    def imply(self, place: str, value: Any, why: str) -> None:
        """The original says nothing and does so by itself: ``place: value``, unless something was carried there."""
        if place not in self.lines:
            self.lines[place] = Line(value=value, comment=why)

    def needs_no_key(self, key: str, why: str) -> None:
        """`key` asks for what weitiao does anyway."""
        if key in self.settings and key not in self._seen:
            self.needless.append(Entry(setting=self.spelled(key), place="", words=why))
            self._seen.add(key)

    def leave(self, key: str, why: str, *, even_off: bool = False) -> None:
        """`key` could not be carried; one that is off needs no key, unless `even_off` it is a difference."""
        if key not in self.settings or key in self._seen:
            return
        if not even_off and self.settings[key] in OFF:
            self.needs_no_key(key, "off, as in weitiao")
            return
        self.left.append(Entry(setting=self.spelled(key), place="", words=why))
        self._seen.add(key)

    def settle(self, verdicts: Mapping[str, str], *, needless: bool) -> None:
        """`verdicts` of several keys at once, each with its reason: needless, or left."""
        for key, why in verdicts.items():
            (self.needs_no_key if needless else self.leave)(key, why)

    def note(self, words: str) -> None:
        """A difference that no setting names."""
        self.notes.append(words)

    def ask(self, words: str) -> None:
        """Something that the recipe cannot be written without."""
        self.asked.append(words)

    def close(self, original: str) -> None:
        """Name every setting that nothing was written about.

        Raises:
            RecipeError: something must be asked for; all of it in one message.
        """
        for key in self.settings:
            self.leave(key, f"unknown: no setting of {original} that weitiao knows")
        if self.asked:
            raise RecipeError("No recipe was written yet:\n" + "\n".join(f"  {words}" for words in self.asked))
