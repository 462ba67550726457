"""The language of `--where`: comparisons over the columns of `samples/`, as SQL has them, evaluated by Arrow.

    any   := each ("or" each)*            each := one ("and" one)*         one := "not" one | "(" any ")" | test
    test  := column ( ("=" | "!=" | "<" | "<=" | ">" | ">=") value | "is" ["not"] "null"
                    | ["not"] ( "in" "(" value ("," value)* ")" | "like" text | "contains" text
                              | "starts" "with" text | "ends" "with" text ) )
    value := 'text' | "text" | number | true | false

What is not known (null) answers no test but `is null`, nor its opposite.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import SAMPLES_PART
from pipelines.errors import ConfigError

Kind = Literal["text", "number", "flag", "any"]
Test = Callable[[pa.Table], Any]

MOST_NESTED, MOST_CHARACTERS = 64, 1_000_000
CAPTION, CAPTIONS, METADATA = "caption", "captions", "metadata"
_NOTES = {CAPTION: "of an image, its first", CAPTIONS: "how many", METADATA: "with .KEY for what is in it"}
_TYPES: dict[Kind, pa.DataType] = {"text": pa.string(), "flag": pa.bool_(), "any": pa.bool_()}
_A: dict[Kind, str] = {"text": "a text", "number": "a number", "flag": "true or false"}
_COMPARE = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_MATCH = {"like": pc.match_like, "contains": pc.match_substring, "starts": pc.starts_with, "ends": pc.ends_with}
_WORDS = {"and", "or", "not", "in", "is", "null", "true", "false", "with", *_MATCH}


def column_kinds() -> dict[str, Kind]:
    """The columns that a test may name."""
    kinds: dict[str, Kind] = {
        field.name: "number" if pa.types.is_integer(field.type) else "text" for field in SAMPLES_PART
    }
    return {**kinds, CAPTIONS: "number", CAPTION: "text"}


@dataclass(frozen=True)
class Field:
    """A column of the table that a test reads. keys: the way to a value within `metadata`, which has `kind`."""

    column: str
    keys: tuple[str, ...] = ()
    kind: Kind = "any"

    @property
    def name(self) -> str:
        return ".".join([self.column, *self.keys]) + (f":{self.kind}" if self.keys else "")

    def of_metadata(self, documents: list[str | None]) -> pa.Array:
        """What JSON objects have at the keys; null where that is nothing, or of another kind."""
        values = [self._value(document) for document in documents]
        return _numbers(values) if self.kind == "number" else pa.array(values, _TYPES[self.kind])

    def _value(self, document: str | None) -> Any:
        value = json.loads(document) if document else None
        for key in self.keys:
            value = value.get(key) if isinstance(value, dict) else None
        if self.kind == "any":
            return None if value is None else True
        return value if kind_of(value) == self.kind else None


def _numbers(values: list[Any]) -> pa.Array:
    """int64 where all are whole and fit, which keeps all their digits; else double, null for what is beyond it."""
    if all(value is None or (isinstance(value, int) and abs(value) < 2**63) for value in values):
        return pa.array(values, pa.int64())
    return pa.array([_float(value) for value in values], pa.float64())


def _float(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except OverflowError:
        return None


def _alike(column: Any, values: list[Any]) -> tuple[Any, pa.Array]:
    """A column and literals of one type: int64, or double where a number of either is no whole one."""
    if pa.types.is_integer(column.type) and not any(isinstance(value, float) for value in values):
        return pc.cast(column, pa.int64()), pa.array(values, pa.int64())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return pc.cast(column, pa.float64(), safe=False), pa.array(map(float, values), pa.float64())
    return column, pa.array(values, column.type)


def kind_of(value: Any) -> Kind:
    if isinstance(value, bool):
        return "flag"
    return "number" if isinstance(value, int | float) else "text" if isinstance(value, str) else "any"


@dataclass(frozen=True)
class Where:
    """An expression that was understood. fields: what it reads. test: bool or null for each row of these."""

    text: str
    fields: frozenset[Field]
    test: Test


def parse(text: str) -> Where:
    """Raises: ConfigError that points at what is not understood, and tells the columns there are."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--where: {text!a} is not Unicode text", "Write it in UTF-8.") from None
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"--where: an expression of {len(text):,} characters", f"Use {MOST_CHARACTERS:,} at most.")
    return _Parser(text).whole()


@dataclass(frozen=True)
class _Token:
    kind: Literal["word", "text", "number", "sign", "end"]
    text: str
    at: int

    @property
    def word(self) -> str:
        return self.text.lower() if self.kind in ("word", "sign") else ""

    @property
    def fits(self) -> bool:
        """Of a number, whether it can be compared with: a long one is not even read."""
        digits = self.text.lstrip("-0")
        return not digits.isdecimal() or (len(digits) <= 19 and abs(int(digits)) < 2**63)

    @property
    def value(self) -> Any:
        if self.kind == "text":
            return self.text[1:-1].replace(self.text[0] * 2, self.text[0])
        return float(self.text) if re.search(r"[.eE]", self.text) else int(self.text)


_TOKEN = re.compile(
    r"""\s*(?:(?P<word>[^\W\d]\w*)|(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    |(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<sign><=|>=|!=|<>|==|[=<>(),.]))""",
    re.VERBOSE,
)


class _Parser:
    """Goes through the tokens once, from left to right."""

    def __init__(self, text: str) -> None:
        self._text, self._kinds, self._fields = text, column_kinds(), set[Field]()
        self._tokens = list(self._cut())
        self._at = 0

    def _cut(self) -> Iterator[_Token]:
        at = 0
        while at < len(self._text.rstrip()):
            found = _TOKEN.match(self._text, at)
            if not found or not found.lastgroup:
                start = at + len(self._text[at:]) - len(self._text[at:].lstrip())
                opened = "is not closed" if self._text[start] in "'\"" else "is not understood"
                self._refuse(_Token("end", self._text[start], start), opened)
            yield _Token(found.lastgroup, found[found.lastgroup], found.start(found.lastgroup))  # type: ignore[arg-type]
            at = found.end()
        yield _Token("end", "", len(self._text))

    def _refuse(self, token: _Token, why: str, fix: str = "") -> NoReturn:
        said = f"{token.text} {why}" if token.text else f"the end: {why}"
        marks = " " * token.at + "^" * max(1, len(token.text))
        listed = ", ".join(f"{name} ({_NOTES[name]})" if name in _NOTES else name for name in sorted(self._kinds))
        raise ConfigError(f"--where: {said}\n    {self._text}\n    {marks}", fix or f"Columns: {listed}.")

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        token = self._next
        self._at += token.kind != "end"
        return token

    def _took(self, *words: str) -> str:
        """The next word, where it is one of these."""
        return self._take().word if self._next.word in words else ""

    def _expect(self, *words: str) -> None:
        if not self._took(*words):
            self._refuse(self._next, f"where {' or '.join(words)} is expected", "As in label = 'cat' and width > 256.")

    def whole(self) -> Where:
        test = self._any(0)
        if self._next.kind != "end":
            self._refuse(self._next, "where and, or, or the end is expected", "As in label = 'cat' and width > 256.")
        return Where(self._text, frozenset(self._fields), test)

    def _any(self, depth: int) -> Test:
        tests = [self._each(depth)]
        while self._took("or"):
            tests.append(self._each(depth))
        return _combined(pc.or_kleene, tests)

    def _each(self, depth: int) -> Test:
        tests = [self._one(depth)]
        while self._took("and"):
            tests.append(self._one(depth))
        return _combined(pc.and_kleene, tests)

    def _one(self, depth: int) -> Test:
        if depth > MOST_NESTED:
            self._refuse(self._next, f"is nested more than {MOST_NESTED} deep", "Write it with fewer parentheses.")
        if self._took("not"):
            return _negated(self._one(depth + 1))
        if self._took("("):
            test = self._any(depth + 1)
            self._expect(")")
            return test
        return self._test()

    def _test(self) -> Test:
        named, column, keys = self._column()
        if self._took("is"):
            wanted = not self._took("not")
            self._expect("null")
            name = self._field(column, keys, "any")
            return lambda table: pc.equal(pc.is_null(table[name]), wanted)
        if self._next.word in _COMPARE:
            return self._comparison(_COMPARE[self._take().word], named, column, keys)
        negated = self._took("not")
        test = self._membership(named, column, keys)
        return _negated(test) if negated else test

    def _column(self) -> tuple[_Token, str, tuple[str, ...]]:
        token = self._take()
        column = token.text.lower()
        if token.kind != "word" or column in _WORDS:
            self._refuse(token, "where a column is expected")
        if column not in self._kinds:
            self._refuse(token, "is not a column")
        keys: list[str] = []
        while self._took("."):
            key = self._take()
            if column != METADATA or key.kind not in ("word", "text"):
                self._refuse(key, "where a key of metadata is expected", "As in metadata.license = 'CC0'.")
            keys.append(key.text if key.kind == "word" else key.value)
        return token, column, tuple(keys)

    def _field(self, column: str, keys: tuple[str, ...], kind: Kind) -> str:
        field = Field(column, keys, kind) if keys else Field(column)
        self._fields.add(field)
        return field.name

    def _comparison(self, compare: Any, named: _Token, column: str, keys: tuple[str, ...]) -> Test:
        value = self._value(named, column, keys)
        name = self._field(column, keys, kind_of(value))

        def test(table: pa.Table) -> Any:
            column, (wanted,) = _alike(table[name], [value])
            return compare(column, wanted)

        return test

    def _value(self, named: _Token, column: str, keys: tuple[str, ...]) -> Any:
        token = self._take()
        if token.kind not in ("text", "number") and token.word not in ("true", "false"):
            self._refuse(token, "where a value is expected", "Texts are quoted, as in label = 'cat'.")
        if token.kind == "number" and not token.fits:
            self._refuse(token, "is more than an integer of 64 bits holds", "Write it with a point, as in 1e30.")
        value = token.word == "true" if token.kind == "word" else token.value
        kind = kind_of(value) if keys else self._kinds[column]
        if kind_of(value) != kind:
            self._refuse(token, f"is not {_A[kind]}, which {named.text} is", "Texts are quoted, numbers are not.")
        return value

    def _membership(self, named: _Token, column: str, keys: tuple[str, ...]) -> Test:
        if self._took("in"):
            return self._in(named, column, keys)
        word = self._took(*_MATCH)
        if not word:
            expected = "where =, !=, <, <=, >, >=, is, in, like, contains, starts with or ends with is expected"
            self._refuse(self._next, expected, "As in label = 'cat' and width > 256.")
        if word in ("starts", "ends"):
            self._expect("with")
        if self._kinds[column] != "text":
            self._refuse(named, "is not a text", "Compare it, as in width > 256.")
        if self._next.kind != "text":
            self._refuse(self._next, "where a quoted text is expected", "As in key starts with 'photos/'.")
        wanted, match = self._take().value, _MATCH[word]
        name = self._field(column, keys, "text")
        return lambda table: match(table[name], wanted)

    def _in(self, named: _Token, column: str, keys: tuple[str, ...]) -> Test:
        self._expect("(")
        values = [self._value(named, column, keys)]
        while self._took(","):
            values.append(self._value(named, column, keys))
        self._expect(")")
        if len({kind_of(value) for value in values}) > 1:
            self._refuse(named, "is compared with values of several kinds", "Join two tests with or.")
        name = self._field(column, keys, kind_of(values[0]))

        # Arrow takes null for a member that is not there; here it is not known.
        def test(table: pa.Table) -> Any:
            column, members = _alike(table[name], values)
            return pc.if_else(pc.is_valid(column), pc.is_in(column, members), None)

        return test


def _combined(how: Any, tests: list[Test]) -> Test:
    return lambda table: reduce(how, (test(table) for test in tests))


def _negated(test: Test) -> Test:
    return lambda table: pc.invert(test(table))
