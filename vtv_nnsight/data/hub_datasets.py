"""Any data set of pictures that the datasets library can read: the Hub's, or files in a folder.

>>> images = hub("imagefolder", "train", data_dir="pictures")
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Image, load_dataset

COLUMNS = ("image", "mask", "label", "answer")
"""What tasks know how to use."""


def hub(name: str, split: str = "train", **kwargs: Any) -> Dataset:
    """A data set's split, with the columns that tasks use: image, and mask, label and answer where it has them.

    A single column of pictures serves as the image, whatever it is called.

    Args:
        name: A Hub id, a folder of Parquet files, or a builder of the datasets library such as "imagefolder".
        split: Also with slices, as "validation[:1000]".
        **kwargs: As for `datasets.load_dataset`: `revision`, `data_dir`, …

    Raises:
        FileNotFoundError, ValueError: from the datasets library, when there is no such data set or split; and when none
            or several of its columns are pictures and none is called "image".
    """
    rows = load_dataset(name, split=split, **kwargs)
    pictures = [column for column, feature in rows.features.items() if isinstance(feature, Image)]
    if "image" not in pictures:
        if len(pictures) != 1:
            raise ValueError(f'{name} has {len(pictures)} columns of pictures; expected one, or one called "image".')
        rows = rows.rename_column(pictures[0], "image")
    return rows.select_columns([column for column in COLUMNS if column in rows.column_names])
