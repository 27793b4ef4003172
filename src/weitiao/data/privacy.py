"""Where personal data stands in a text: phone numbers, e-mail addresses, identity and bank cards, accounts, passwords.

    find_personal_data("我的电话13812345678")    → (PersonalData(kind="phone", start=4, end=15),)

Patterns only, no model: names and addresses of people are not found. Nothing here relies on word boundaries, because
there is none between a Chinese character and a digit. Full-width, keycap and other digits count as digits, and
invisible characters inside a number do not hide it. What to do with a find is another's business (`redaction.py`,
`leaks.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

Kind = Literal["phone", "landline", "email", "id_card", "bank_card", "qq", "wechat", "password", "account", "plate"]
"""What a piece of personal data is."""

KINDS: tuple[Kind, ...] = (
    "email", "id_card", "phone", "bank_card", "landline", "qq", "wechat", "password", "account", "plate",
)  # fmt: skip
"""Every kind. Where two fit the same characters, the earlier one names them: shapes before keywords."""
USUAL_KINDS: tuple[Kind, ...] = KINDS[:-1]
"""Looked for unless told otherwise; number plates are asked for by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonalData:
    """A piece of personal data in a text: ``text[start:end]``, without the keyword before it."""

    kind: Kind
    start: int
    end: int
    certain: bool = True
    """False where only the shape speaks for it: an identity number with a wrong check digit, a bare landline number."""


@final
@dataclass(frozen=True, slots=True)
class KnownData:
    """Personal data that was announced somewhere in a chat, and so is found again where nothing announces it.

    After "密码是abc123" in one message, a later "abc123对吧" holds a password too. Kept are values of at least five
    characters with a digit in them: a password that is a plain word would be found in every sentence with that word.
    """

    kinds: Mapping[str, Kind]
    pattern: re.Pattern[str]

    @classmethod
    def collect(cls, texts: Iterable[str], *, kinds: Collection[Kind] = USUAL_KINDS) -> KnownData | None:
        """What `texts` announce; None when that is nothing."""
        known: dict[str, Kind] = {}
        for text in texts:
            for piece in find_personal_data(text, kinds=kinds):
                value = _fold(text[piece.start : piece.end]).text
                if len(value) >= 5 and re.search(r"[0-9]", value):
                    known.setdefault(value, piece.kind)
        if not known:
            return None
        values = "|".join(re.escape(value) for value in sorted(known, key=len, reverse=True))
        return cls(known, re.compile(rf"(?<![A-Za-z0-9])(?:{values})(?![A-Za-z0-9])"))

    def find(self, folded: str) -> Iterator[PersonalData]:
        """Each place in the folded text where a known value stands."""
        for match in self.pattern.finditer(folded):
            yield PersonalData(kind=self.kinds[match[0]], start=match.start(), end=match.end())


def find_personal_data(
    text: str, *, kinds: Collection[Kind] = USUAL_KINDS, known: KnownData | None = None
) -> tuple[PersonalData, ...]:
    """Every piece of personal data in `text`, in order, none overlapping another.

        "邮箱abc@qq.com"              email       "abc@qq.com"
        "身份证 11010119900307123X"   id_card     "11010119900307123X"
        "密码是abc123"                password    "abc123"
        "passenger list"              nothing

    Finds that overlap are joined into one, so that no character of either is left out. Takes time linear in the text.
    """
    if not _MAY_HOLD.search(text):
        return ()
    folded = _fold(text)
    found = [piece for kind in _hinted_kinds(folded.text) if kind in kinds for piece in _FINDERS[kind](folded.text)]
    if known is not None:
        found += known.find(folded.text)
    found.sort(key=lambda piece: (piece.start, -piece.end))  # stable: for equal spans the order of KINDS decides
    joined: list[PersonalData] = []
    for piece in found:
        if joined and piece.start < joined[-1].end:
            last = joined[-1]
            joined[-1] = replace(last, end=max(last.end, piece.end), certain=last.certain or piece.certain)
        else:
            joined.append(piece)
    places = folded.places
    return tuple(replace(piece, start=places[piece.start], end=_end(piece.end, folded, text)) for piece in joined)


def normalise_personal_data(text: str) -> str:
    """`text`, a find, in the spelling by which two are compared: ASCII, lower case, no separators, no country code.

    "+86 138-1234-5678"   → "13812345678"
    "１３８１２３４５６７８"  → "13812345678"
    "ABC@QQ.com"          → "abc@qq.com"
    """
    bare = re.sub(r"[(（\[［]at[)）\]］]", "@", _fold(text).text.lower()).strip()
    if re.fullmatch(r"[0-9x \t.\-·_/()（）+]+", bare):  # x is a check digit
        bare = re.sub(r"[^0-9x]", "", bare)
        return re.sub(r"^(?:00)?86(?=1[3-9][0-9]{9}$)", "", bare)
    return bare


# --- One spelling for all digits, letters and separators -------------------------------------------------------------

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe0f\u20e3\ufeff]")
_SPOKEN_DIGITS = re.compile("[零〇一二三四五六七八九幺]{11,}")
_SPOKEN = str.maketrans("零〇一二三四五六七八九幺", "001234567891")


def fold_text(text: str) -> str:
    """`text` in one spelling: no invisible characters, digits, Latin letters, dashes and blanks as in ASCII."""
    return _fold(text).text


class _Folding(dict[int, int]):
    """Code point → the ASCII one that means the same, for digits, letters, dashes, blanks and a few signs."""

    def __missing__(self, code: int) -> int:
        char = chr(code)
        folded = code
        if code >= 0x80:
            digit = unicodedata.decimal(char, None)
            category = unicodedata.category(char)
            if digit is not None:
                folded = ord("0") + digit
            elif char in "＠＋．＿：＝" or "Ａ" <= char <= "Ｚ" or "ａ" <= char <= "ｚ":
                folded = code - 0xFEE0
            elif category == "Pd" or char == "−":
                folded = ord("-")
            elif category == "Zs":
                folded = ord(" ")
        self[code] = folded
        return folded


_FOLDING = _Folding()


@dataclass(frozen=True, slots=True)
class _Folded:
    """A text in one spelling, and for each of its characters the place in the text as given."""

    text: str
    places: Sequence[int]


def _fold(text: str) -> _Folded:
    """`text` without invisible characters, every other character in its ASCII spelling where it has one."""
    places: Sequence[int] = range(len(text))
    if _INVISIBLE.search(text):
        places = [index for index, char in enumerate(text) if not _INVISIBLE.match(char)]
        text = _INVISIBLE.sub("", text)
    text = text.translate(_FOLDING)
    return _Folded(_SPOKEN_DIGITS.sub(lambda run: run[0].translate(_SPOKEN), text), places)


def _end(end: int, folded: _Folded, text: str) -> int:
    """Where the find that ends at `end` of the folded text ends in `text`, the frame of a keycap digit included."""
    place = folded.places[end - 1] + 1
    while text[place : place + 1] in ("\ufe0f", "\u20e3"):
        place += 1
    return place


# --- Shapes ----------------------------------------------------------------------------------------------------------

_NO_DIGIT_BEFORE = r"(?<![0-9])(?<!(?<![0-9])0\.)"  # nor a decimal's "0."
_NO_DIGIT_AFTER = r"(?![0-9])"
_GAP = r"[ \t.\-·_/]{1,3}"

_MOBILE = re.compile(
    rf"{_NO_DIGIT_BEFORE}(?:[(（]?(?:\+|00)?86[)）]?(?:{_GAP})?)?"
    rf"(?:1[3-9][0-9]{{9}}"
    rf"|1[3-9][0-9]{_GAP}(?:[0-9]{{8}}|[0-9]{{4}}{_GAP}[0-9]{{4}}|[0-9]{{3}}{_GAP}[0-9]{{5}}"
    rf"|[0-9]{{4}}{_GAP}[0-9]{{2}}{_GAP}[0-9]{{2}})"
    rf"|1[3-9][0-9]{{2}}{_GAP}(?:[0-9]{{7}}|[0-9]{{3}}{_GAP}[0-9]{{4}}|[0-9]{{4}}{_GAP}[0-9]{{3}})"
    rf"|1[3-9][0-9]{{3}}{_GAP}[0-9]{{6}}"
    rf"|1[3-9][0-9]{{5}}{_GAP}[0-9]{{4}}){_NO_DIGIT_AFTER}"
)
_ABROAD = re.compile(r"(?<![0-9A-Za-z)])\+[1-9](?:[ \-]?[0-9]){7,13}(?![0-9])")
_LANDLINE = re.compile(
    rf"(?<![0-9])(?<![0-9][.\-/])(?P<value>[(（]?(?:010|02[0-9]|0[3-9][0-9]{{2}})(?P<gap>[)）][ ]?|[ \-]{{1,3}})?"
    rf"[2-9][0-9]{{2,3}}[ \-]?[0-9]{{4}}(?:(?:-|转|ext\.?)[ ]?[0-9]{{1,6}})?){_NO_DIGIT_AFTER}"
)
_ID_18 = re.compile(
    rf"{_NO_DIGIT_BEFORE}[1-9][0-9]{{5}}(?:{_GAP})?(?:18|19|20)[0-9]{{2}}(?:{_GAP})?"
    rf"(?:0[1-9]|1[0-2])(?:{_GAP})?(?:0[1-9]|[12][0-9]|3[01])(?:{_GAP})?[0-9]{{3}}[0-9Xx]{_NO_DIGIT_AFTER}"
)
_ID_15 = re.compile(
    rf"{_NO_DIGIT_BEFORE}[1-9][0-9]{{7}}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{{3}}{_NO_DIGIT_AFTER}"
)
_ID_NAMED = re.compile(
    rf"(?:身份证|ID card)(?:号码?|件号)?[^0-9\n]{{0,6}}(?P<value>[0-9]{{17}}[0-9Xx]|[0-9]{{15}}){_NO_DIGIT_AFTER}"
)
_BANK_CARD = re.compile(
    rf"{_NO_DIGIT_BEFORE}(?:[3-69][0-9]{{15,18}}|3[47][0-9]{{13}}"
    rf"|[3-69][0-9]{{3}}(?:{_GAP}[0-9]{{4}}){{3}}(?:{_GAP}[0-9]{{1,3}})?){_NO_DIGIT_AFTER}"
)
_AT = re.compile(r"(?:@|[(（\[［]at[)）\]］])(?:[A-Za-z0-9\-]{1,63}\.){1,8}[A-Za-z]{2,24}")
_LOCAL_PART = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._%+-")
_PLATE = re.compile(
    r"[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼][A-HJ-NP-Za-hj-np-z][ ·•\-]?"
    r"(?=[A-Za-z]{0,5}[0-9])(?:[A-HJ-NP-Za-hj-np-z0-9]{5,6}|[A-HJ-NP-Za-hj-np-z0-9]{4}[挂学警港澳])(?![A-Za-z0-9])"
)

# --- What a keyword announces ----------------------------------------------------------------------------------------

_IS = r"[ \t]{0,4}(?:就是|是|为|叫|改成|改为|设成|设为|换成|is\b)?[ \t]{0,4}"
_COLON = r"[ \t]{0,4}(?:就是|是|为|is)?[ \t]{0,4}[:=→][ \t]{0,4}[\"“'「]?"
_HAS_DIGIT = r"(?=[!-/:-~]{0,63}[0-9])"
_ID_HAS_DIGIT = r"(?=[A-Za-z]{0,19}[0-9_\-])"

_QQ = re.compile(
    rf"(?:(?<![A-Za-z])(?:[Qq]{{2}}|(?=[Qq](?:号|[ ]?:))[Qq])|扣扣|企鹅)(?:群号?|账号|帐号|号码|号)?(?:{_COLON}|{_IS})"
    rf"(?P<value>[1-9][0-9]{{4,10}}){_NO_DIGIT_AFTER}"
)
_WXID = re.compile(r"(?<![A-Za-z0-9])(?:wxid_[A-Za-z0-9]{6,30}|gh_[0-9a-f]{12})(?![A-Za-z0-9])")
_WECHAT_WORD = r"(?:微信|薇信|威信|[Vv]信|(?<![A-Za-z])(?:[VvWw][Xx]|[Ww]e[Cc]hat|WECHAT|[Ww]eixin)(?![A-Za-z]))"
_WECHAT_NAME = r"[A-Za-z][A-Za-z0-9_\-]{5,19}(?![A-Za-z0-9_\-])"
_WECHAT = re.compile(
    rf"{_WECHAT_WORD}(?:(?:号码?|[Ii][Dd])(?:{_COLON}|{_IS})|{_COLON})(?P<value>{_WECHAT_NAME})"
    rf"|(?<=的){_WECHAT_WORD}(?:就是|是)[ ]?(?P<said>{_WECHAT_NAME})"
    rf"|{_WECHAT_WORD}{_IS}(?P<bare>{_ID_HAS_DIGIT}{_WECHAT_NAME})"
)
_PASSWORD_WORD = (
    r"(?:密码|口令|验证码|校验码|动态码"
    r"|(?<![A-Za-z])(?:[Pp]ass(?:word|wd|code)|PASSWORD|[Pp]wd|PWD|PIN|[Pp]in码)(?![A-Za-z]))"
)
_PASSWORD = re.compile(
    rf"(?:{_PASSWORD_WORD}(?:{_COLON}|[ \t]{{0,4}}(?:就是|是|为|改成|改为|设成|设为|换成)[ \t]{{0,4}})"
    rf"|(?<![A-Za-z])[Pp]ass(?![A-Za-z])[ \t]{{0,4}}[:=][ \t]{{0,4}})(?P<value>[!-~]{{4,}})"
    rf"|{_PASSWORD_WORD}{_IS}(?P<bare>{_HAS_DIGIT}[!-~]{{4,}})"
)
_ACCOUNT_WORD = (
    r"(?:账号|帐号|账户|帐户|用户名|登录名|卡号|学号|工号|社保号|护照号?码?|支付宝"
    r"|(?<![A-Za-z])(?:[Aa]ccount|[Uu]ser[ ]?name|[Ll]ogin|[Pp]assport)(?![A-Za-z]))"
)
_ACCOUNT_NAME = r"[A-Za-z0-9][A-Za-z0-9._@\-]{2,}[A-Za-z0-9]"
_ACCOUNT = re.compile(
    rf"{_ACCOUNT_WORD}{_COLON}(?P<value>{_ACCOUNT_NAME})"
    rf"|{_ACCOUNT_WORD}{_IS}(?P<bare>(?=[A-Za-z._@\-]{{0,63}}[0-9]){_ACCOUNT_NAME})"
)

# --- What lets most texts off without a closer look ------------------------------------------------------------------

_MAY_HOLD = re.compile(rf"[ -~\dＡ-Ｚａ-ｚ＠＋．＿：＝{_INVISIBLE.pattern[1:-1]}]{{4}}|{_SPOKEN_DIGITS.pattern}")
_FIVE_DIGITS = re.compile(r"[0-9](?:[^0-9\n]{0,3}[0-9]){4}")
_DIGIT_KINDS: frozenset[Kind] = frozenset({"id_card", "phone", "bank_card", "landline", "qq", "plate"})
_HINTS: dict[Kind, tuple[str, ...]] = {
    "email": ("@", "at)", "at）", "at]", "at］"),
    "wechat": ("微信", "薇信", "威信", "v信", "vx", "wx", "wechat", "weixin", "gh_"),
    "password": ("密码", "口令", "验证码", "校验码", "动态码", "pass", "pwd", "pin"),
    "account": ("账号", "帐号", "账户", "帐户", "用户名", "登录名", "卡号", "学号", "工号", "社保号", "护照", "支付宝",
                "account", "user", "login"),
}  # fmt: skip
assert _HINTS.keys() | _DIGIT_KINDS == set(KINDS)


def _hinted_kinds(text: str) -> Iterator[Kind]:
    """The kinds that `text`, a folded one, may hold, in the order of `KINDS`."""
    lower = text.lower()
    digits = _FIVE_DIGITS.search(text) is not None
    for kind in KINDS:
        if (digits if kind in _DIGIT_KINDS else any(hint in lower for hint in _HINTS[kind])) or kind == "plate":
            yield kind


# --- Finders, one for each kind --------------------------------------------------------------------------------------


def _find_phones(text: str) -> Iterator[PersonalData]:
    for pattern in (_MOBILE, _ABROAD):
        for match in pattern.finditer(text):
            yield PersonalData(kind="phone", start=match.start(), end=match.end())


def _find_landlines(text: str) -> Iterator[PersonalData]:
    for match in _LANDLINE.finditer(text):
        yield PersonalData(kind="landline", start=match.start(), end=match.end(), certain=match["gap"] is not None)


def _find_emails(text: str) -> Iterator[PersonalData]:
    for match in _AT.finditer(text):  # from the sign backwards: forwards would be quadratic in a long word
        start = match.start()
        while start > 0 and text[start - 1] in _LOCAL_PART:
            start -= 1
        while start < match.start() and text[start] in ".%+-":
            start += 1
        if start < match.start():
            yield PersonalData(kind="email", start=start, end=match.end())


def _find_id_cards(text: str) -> Iterator[PersonalData]:
    for match in _ID_18.finditer(text):
        certain = has_id_card_check_digit(match[0])
        yield PersonalData(kind="id_card", start=match.start(), end=match.end(), certain=certain)
    for match in _ID_15.finditer(text):
        yield PersonalData(kind="id_card", start=match.start(), end=match.end(), certain=False)
    for match in _ID_NAMED.finditer(text):
        yield PersonalData(kind="id_card", start=match.start("value"), end=match.end("value"))


def has_id_card_check_digit(text: str) -> bool:
    """Whether the last of the 18 characters of a Chinese identity number follows from the others (ISO 7064, 11-2)."""
    digits = re.sub(r"[^0-9Xx]", "", text)
    if not re.fullmatch(r"[0-9]{17}[0-9Xx]", digits):
        return False
    total = sum(int(digit) * 2 ** (17 - index) for index, digit in enumerate(digits[:17]))
    return "10X98765432"[total % 11] == digits[17].upper()


def _find_bank_cards(text: str) -> Iterator[PersonalData]:
    for match in _BANK_CARD.finditer(text):
        if passes_luhn(match[0]):
            yield PersonalData(kind="bank_card", start=match.start(), end=match.end())


def passes_luhn(text: str) -> bool:
    """Whether the digits of `text` pass the check of payment cards; a tenth of all numbers does."""
    digits = [int(char) for char in text if "0" <= char <= "9"]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return bool(digits) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _find_plates(text: str) -> Iterator[PersonalData]:
    for match in _PLATE.finditer(text):
        yield PersonalData(kind="plate", start=match.start(), end=match.end())


def _find_wechat_names(text: str) -> Iterator[PersonalData]:
    for match in _WXID.finditer(text):
        yield PersonalData(kind="wechat", start=match.start(), end=match.end())
    yield from _find_announced(text, "wechat", _WECHAT)


def _find_announced(text: str, kind: Kind, pattern: re.Pattern[str]) -> Iterator[PersonalData]:
    """What stands after a keyword: the named group that matched, without the punctuation that ends a sentence."""
    for match in pattern.finditer(text):
        group = match.lastgroup
        assert group is not None, "every branch of the pattern names its value"
        value = match[group].rstrip(".,;:?)]}>\"'") if kind == "password" else match[group]
        if len(value) >= 4:
            start = match.start(group)
            yield PersonalData(kind=kind, start=start, end=start + len(value))


_FINDERS: dict[Kind, Callable[[str], Iterator[PersonalData]]] = {
    "email": _find_emails,
    "id_card": _find_id_cards,
    "phone": _find_phones,
    "bank_card": _find_bank_cards,
    "landline": _find_landlines,
    "qq": lambda text: _find_announced(text, "qq", _QQ),
    "wechat": _find_wechat_names,
    "password": lambda text: _find_announced(text, "password", _PASSWORD),
    "account": lambda text: _find_announced(text, "account", _ACCOUNT),
    "plate": _find_plates,
}
