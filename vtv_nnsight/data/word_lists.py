"""Pairs of words, and rows of texts: those of `tasks.words` (`tasks/words.json`), and files of yours.

>>> words("antonym")[0]
{'task': 'antonym', 'input': 'hot', 'output': 'cold'}
>>> task = tasks.Words("mine", data.words("mine.csv"))       # the header names the columns: input,output
"""

import csv
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from vtv_nnsight import tasks
from vtv_nnsight.text import check_kind, quoted


def words(source: str | Path | None = None) -> Dataset:
    """Rows of texts.

    Args:
        source: One of `tasks.WORDS`, or None for all of them one after the other: columns task, input and output. Else
            the path of a .csv file with a header, or of a .json file with {input: output}, or with a list of rows such
            as {"input": "hot", "output": "cold"}, which function_vectors' data sets are: the columns it has.

    Raises:
        FileNotFoundError: when there is neither such a list nor such a file.
        ValueError: when the file does not hold rows with the same columns.
    """
    if source is None or source in tasks.WORDS:
        named = map(tasks.words, tasks.WORDS if source is None else [str(source)])
        return Dataset.from_list([{"task": task.name, **row} for task in named for row in task.rows])
    check_kind(source, (str, Path), f"source={quoted(source)}", "the name of a list, or a path")
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{source} is no file, and none of {', '.join(tasks.WORDS)}: check the path.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = json.load(file) if path.suffix.lower() == ".json" else list(csv.DictReader(file, strict=True))
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is not a .json or .csv file with rows of texts: {error}.") from error
    if isinstance(rows, dict):
        rows = [{"input": word, "output": answer} for word, answer in rows.items()]
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no rows; expected a list of rows, or {{input: output}}.")
    for number, row in enumerate(rows):
        if (columns := _columns(row)) is None or columns != _columns(rows[0]):
            raise ValueError(f"row {number} of {path} is {str(row)[:80]}; expected rows of the same columns of texts.")
    return Dataset.from_list([{name: str(text) for name, text in row.items()} for row in rows])


def _columns(row: Any) -> set[str] | None:
    """The names of a row's columns; None where it is not a row of texts, or numbers, by name."""
    texts = isinstance(row, dict) and row and all(isinstance(text, (str, int, float)) for text in row.values())
    return set(row) if texts else None
