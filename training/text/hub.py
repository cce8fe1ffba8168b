"""Rows of Hugging Face data sets; the ``datasets`` package is imported where it is needed."""

from __future__ import annotations

from typing import Any

from training.errors import UserError

PREFIX = "hfds/"

# What datasets raises for names, splits and files that do not exist, and without a connection.
_ERRORS = (ImportError, OSError, RuntimeError, ValueError, TypeError, KeyError)


def load_rows(name: str, split: str, columns: tuple[str, ...], kwargs: dict[str, Any]) -> Any:
    """Return a split of the data set ``name`` (without the prefix), whose rows are dicts.

    Raises :class:`UserError` where ``datasets`` is not installed, the data set cannot be opened,
    or a column is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"data.name: {PREFIX}{name} needs the datasets package: pip install datasets"
        ) from error
    try:
        rows = load_dataset(name, split=split, **kwargs)
    except _ERRORS as error:
        raise UserError(f"cannot open data set {name!r}, split {split!r}: {error}") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"data set {name!r} has no column {', '.join(missing)}; "
            f"it has {', '.join(rows.column_names)}"
        )
    return rows
