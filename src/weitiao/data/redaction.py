"""Texts without their personal data: every piece is replaced by a placeholder, and nothing else is touched.

    "我的电话13812345678，微信同号13812345678"   → "我的电话[电话1]，微信同号[电话1]"

One `Redactor` serves one conversation: the same number, however it is written, gets the same placeholder throughout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

from .privacy import KINDS, USUAL_KINDS, Kind, KnownData, find_personal_data, normalise_personal_data


@dataclass(frozen=True, kw_only=True, slots=True)
class RedactionStyle:
    """How a placeholder is written."""

    names: Mapping[Kind, str]
    template: str = "[{name}{number}]"
    """``{name}`` is the kind's, ``{number}`` counts the different ones of a conversation from 1."""

    def __post_init__(self) -> None:
        assert set(self.names) == set(KINDS), "every kind needs a name"
        assert "{number}" in self.template, "without a number two phones would become one"

    def write(self, kind: Kind, number: int) -> str:
        """The placeholder of the `number`-th piece of its name."""
        return self.template.replace("{name}", self.names[kind]).replace("{number}", str(number))


CHINESE = RedactionStyle(
    names={
        "phone": "电话",
        "landline": "座机",
        "email": "邮箱",
        "id_card": "身份证",
        "bank_card": "银行卡",
        "qq": "QQ",
        "wechat": "微信",
        "password": "密码",
        "account": "账号",
        "plate": "车牌",
    }
)
ENGLISH = RedactionStyle(
    names={
        "phone": "phone",
        "landline": "landline",
        "email": "email",
        "id_card": "ID card",
        "bank_card": "bank card",
        "qq": "QQ",
        "wechat": "WeChat",
        "password": "password",
        "account": "account",
        "plate": "plate",
    },
    template="[{name} {number}]",
)
STYLES: Mapping[str, RedactionStyle] = {"zh": CHINESE, "en": ENGLISH}
"""The styles by the names that options give them."""


@final
class Redactor:
    """Replaces personal data in the texts of one conversation.

    >>> redactor = Redactor()
    >>> redactor.redact("打我电话13812345678"), redactor.redact("138-1234-5678还是13912345678？")
    ('打我电话[电话1]', '[电话1]还是[电话2]？')
    >>> dict(redactor.counts)
    {'phone': 3}
    """

    def __init__(
        self,
        *,
        style: RedactionStyle = CHINESE,
        kinds: Collection[Kind] = USUAL_KINDS,
        known: KnownData | None = None,
    ) -> None:
        self.counts: Counter[Kind] = Counter()
        """How many pieces were replaced, by kind; a repeated one counts each time."""
        self._style = style
        self._kinds = kinds
        self._known = known
        self._placeholders: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()

    def redact(self, text: str) -> str:
        """`text` with each piece of personal data replaced; every other character stays as it is."""
        written: list[str] = []
        end = 0
        for piece in find_personal_data(text, kinds=self._kinds, known=self._known):
            written += (text[end : piece.start], self._placeholder(piece.kind, text[piece.start : piece.end]))
            end = piece.end
            self.counts[piece.kind] += 1
        return "".join((*written, text[end:]))

    def _placeholder(self, kind: Kind, value: str) -> str:
        key = normalise_personal_data(value)
        if key not in self._placeholders:
            name = self._style.names[kind]
            self._numbers[name] += 1
            self._placeholders[key] = self._style.write(kind, self._numbers[name])
        return self._placeholders[key]
