"""The pictures of the README's first screen, of the model, vectors and pictures in the package:

    python docs/first_screen.py

hero.png has two rows, a drawn scene and a real picture, each the median of its class by the vector's score; and
sixty_seconds.png is what the README's first snippet writes; pictures/tutorial_N.png
is the first picture of notebook N.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vtv_nnsight import MAEVQGAN, bundles, data, patch, tasks
from vtv_nnsight.report.pictures import strip

DOCS = Path(__file__).parent


def main() -> None:
    model, vectors = MAEVQGAN("tiny"), bundles.load("tiny")
    rows = [
        median_of_its_class(model, vectors, images) for images in (data.scenes("test", n=100), data.pictures("test"))
    ]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    sheet.paste(rows[0], (0, 0))
    sheet.paste(rows[1], (0, rows[0].height))
    sheet.save(DOCS / "hero.png", optimize=True)
    names: dict = {"__name__": "readme"}
    source = (DOCS.parent / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    path = DOCS / "snippet.py"  # nnsight reads the source of a trace from its file
    path.write_text(source.replace('"answers.png"', repr(str(DOCS / "sixty_seconds.png"))), encoding="utf-8")
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), names)
    path.unlink()
    for notebook in sorted((DOCS.parent / "tutorials").glob("*.ipynb")):
        outputs = (o for cell in json.loads(notebook.read_text())["cells"] for o in cell.get("outputs", []))
        content = next(o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {}))
        picture = Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")
        picture = picture.crop((0, 0, min(picture.width, 3 * picture.height), picture.height))
        picture.thumbnail((240, 90))
        picture.save(DOCS / "pictures" / f"tutorial_{notebook.stem[0]}.png", optimize=True)


def median_of_its_class(model: Any, vectors: Any, images: Any) -> Image.Image:
    """Query, zero-shot answer, answer with the vector, and truth: of the class that the vector does best, of ten
    pictures or more, the one of the median score."""
    task, count = tasks.segmentation, min(len(images), 300)
    prompts = task.prompts(images, n=count, layout=model.layout).query_only()
    answers, guesses = [], []
    for batch in prompts.split(32):
        with model.generate(batch) as tracer:
            patch(model, *vectors[task.name])
            patched = tracer.result.save()
        answers.append(patched.answer)
        guesses.append(model.generate(batch).answer)
    answer, guess = torch.cat(answers), torch.cat(guesses)
    scores = task.score(answer, prompts.region("output")).numpy()
    labels = {row: images[row]["label"] for row in range(len(images))}
    keys = {tuple(task.cells(images[row], model.layout.cell_size)[0].flatten()[:64].tolist()): row for row in labels}
    queries = [labels[keys[tuple(cell.flatten()[:64].tolist())]] for cell in prompts.region("query")]
    kinds = {label: [i for i, own in enumerate(queries) if own == label] for label in set(queries)}
    medians = {label: np.median(scores[rows]) for label, rows in kinds.items() if len(rows) >= 10}
    best = max(medians, key=medians.__getitem__)
    order = sorted(kinds[best], key=lambda row: scores[row])
    at = order[(len(order) - 1) // 2]
    print(images.features["label"].int2str(best), f"median of {len(order)}: {scores[at]:.3f} mIoU")
    pictures = {"query": prompts.region("query")[at], "zero-shot": guess[at], "task vector": answer[at]}
    return strip(pictures | {"truth": prompts.region("output")[at]}, side=150)


if __name__ == "__main__":
    main()
