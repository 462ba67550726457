"""Arrow columns as Python values, whatever is in them: text that is not UTF-8, dates beyond Python's."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def is_bytes(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_fixed_size_binary(type_))


def values_of(column: pa.Array) -> list[Any]:
    """One Python value a row. Text that is not UTF-8 comes as bytes, what Python cannot hold as text or None."""
    for read in (_as_is, _with_raw_text, _as_text):
        try:
            return read(column)
        except (ValueError, TypeError, LookupError, OverflowError, ImportError, pa.ArrowException):
            continue
    return [None] * len(column)


def _as_is(column: pa.Array) -> list[Any]:
    return list(column.to_pylist())


def _with_raw_text(column: pa.Array) -> list[Any]:
    return [_decoded(value) for value in column.cast(_raw(column.type)).to_pylist()]


def _as_text(column: pa.Array) -> list[Any]:
    return list(column.cast(pa.string()).to_pylist())


def _raw(type_: pa.DataType) -> pa.DataType:
    """The type with bytes in place of text."""
    if pa.types.is_string(type_) or pa.types.is_dictionary(type_):
        return pa.binary()
    if pa.types.is_large_string(type_):
        return pa.large_binary()
    if pa.types.is_list(type_):
        return pa.list_(_raw(type_.value_type))
    if pa.types.is_large_list(type_):
        return pa.large_list(_raw(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, _raw(field.type)) for field in type_])
    return type_


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
