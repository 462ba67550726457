"""Arrow columns as Python values, whatever is in them: text that is not UTF-8, dates beyond Python's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa

# Arrow's own make plain values. Others are whatever a library has registered: Ray's unpickles what it finds.
_FOREIGN = re.compile(r"extension<(?!arrow\.)")


def is_bytes(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_fixed_size_binary(type_))


def values_of(column: pa.Array) -> list[Any]:
    """One Python value a row. Text that is not UTF-8 comes as bytes, what Python cannot hold as text or None, values
    of a type that is not Arrow's own as what they are stored as."""
    for read in (_as_is, _with_raw_text, _as_text):
        try:
            return read(_stored(column))
        except (ValueError, TypeError, LookupError, OverflowError, ImportError, pa.ArrowException):
            continue
    return [None] * len(column)


def _stored(column: pa.Array) -> pa.Array:
    """Raises: TypeError where a foreign type lies within one that cannot be taken apart."""
    if not _FOREIGN.search(str(column.type)):
        return column
    plain = _changed(column.type, lambda type_: type_)
    if _FOREIGN.search(str(plain)):
        raise TypeError(f"{column.type} cannot be read")
    return column.cast(plain)


def _as_is(column: pa.Array) -> list[Any]:
    return list(column.to_pylist())


def _with_raw_text(column: pa.Array) -> list[Any]:
    return [_decoded(value) for value in column.cast(_raw(column.type)).to_pylist()]


def _as_text(column: pa.Array) -> list[Any]:
    return list(column.cast(pa.string()).to_pylist())


def _raw(type_: pa.DataType) -> pa.DataType:
    """The type with bytes in place of text."""

    def raw(leaf: pa.DataType) -> pa.DataType:
        if pa.types.is_string(leaf) or pa.types.is_dictionary(leaf):
            return pa.binary()
        return pa.large_binary() if pa.types.is_large_string(leaf) else leaf

    return _changed(type_, raw)


def _changed(type_: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `leaf` of all that is no list or struct, and foreign types as what they are stored as."""
    if isinstance(type_, pa.BaseExtensionType) and _FOREIGN.search(str(type_)):
        return _changed(type_.storage_type, leaf)
    if pa.types.is_list(type_):
        return pa.list_(_changed(type_.value_type, leaf))
    if pa.types.is_large_list(type_):
        return pa.large_list(_changed(type_.value_type, leaf))
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, _changed(field.type, leaf)) for field in type_])
    return leaf(type_)


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        # An image's bytes may happen to be text; they stay bytes.
        return {name: item if name == "bytes" else _decoded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value
