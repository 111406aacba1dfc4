"""Pairs of words, and rows of texts: the lists that the package carries, and files of yours.

>>> words("antonym")[0]
{'task': 'antonym', 'input': 'hot', 'output': 'cold'}
>>> task = tasks.Words("mine", data.words("mine.csv"))       # the header names the columns: input,output
"""

import json
from pathlib import Path

import pandas as pd
from datasets import Dataset

from vtv_nnsight import tasks


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
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{source} is no file, and none of {', '.join(tasks.WORDS)}: check the path.")
    try:
        if path.suffix.lower() == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if isinstance(rows, dict):
                rows = [{"input": word, "output": answer} for word, answer in rows.items()]
            frame = pd.DataFrame(rows)
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a .json or .csv file with rows of texts: {error}.") from error
    if frame.empty or frame.isna().any(axis=None):
        raise ValueError(f"{path} holds no rows, or rows of other columns; expected rows of the same columns of texts.")
    return Dataset.from_pandas(frame.astype(str), preserve_index=False)
