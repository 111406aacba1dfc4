"""A folder of your inputs and answers: any change of pictures is a task.

>>> images = pairs("sketches")                       # sketches/inputs/cat.png, sketches/answers/cat.png, …
>>> prompts = tasks.pairs.prompts(images, n=50, layout=model.layout)
"""

from pathlib import Path

from datasets import Dataset, Features, Image

from vtv_nnsight.data.folders import folder
from vtv_nnsight.text import join_names

FOLDERS = ("inputs", "answers")


def pairs(path: str | Path) -> Dataset:
    """Pictures and their answers, columns image and answer, sorted by name: PATH/inputs and PATH/answers hold a picture
    of each name, of any suffix, in folders inside them or not. The Dataset refers to the files where they lie.

    Raises:
        FileNotFoundError: when a folder is missing.
        ValueError: when a picture has no partner, two have one name, or there are none.
    """
    by_name = []
    for name in FOLDERS:
        inside = Path(path).expanduser() / name
        if not inside.is_dir():
            raise FileNotFoundError(
                f"there is no folder {inside}; expected {' and '.join(FOLDERS)} with a picture of each name in both."
            )
        rows = folder(inside).cast_column("image", Image(decode=False))
        files = [Path(cell["path"]) for cell in rows["image"]]
        names = {file.relative_to(inside.absolute()).with_suffix("").as_posix(): str(file) for file in files}
        if len(names) < len(files):
            raise ValueError(f"{inside} holds several pictures of one name and other suffixes; give each another name.")
        by_name.append(names)
    inputs, answers = by_name
    if alone := sorted(inputs.keys() ^ answers.keys()):
        raise ValueError(f"{len(alone)} pictures in {path} have no partner in the other folder: {join_names(alone)}.")
    columns = {"image": list(inputs.values()), "answer": [answers[name] for name in inputs]}
    return Dataset.from_dict(columns, Features(image=Image(), answer=Image()))
