"""The model in the package: that it is there, and that it does what its card says."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from vtv_nnsight import MAEVQGAN, Layout, data, evaluate, tasks
from vtv_nnsight.prompts import crop
from vtv_nnsight.runs import bundles

FOLDER = files("vtv_nnsight") / "weights" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return MAEVQGAN("tiny", dispatch=True)


def test_it_is_small_and_has_a_card():
    assert (FOLDER / "model.safetensors").stat().st_size < 30 * 2**20
    card = (FOLDER / "README.md").read_text()
    assert all(word in card for word in ("Data", "Licence", "seed", "PSNR", "one-shot", "zero-shot"))


def test_its_geometry_is_the_published_grid_at_a_quarter_of_the_pixels(tiny):
    assert tiny.layout == Layout(canvas_size=112, patch_size=8)
    assert tiny.layout.grid == Layout().grid
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "mae_vqgan"


@pytest.mark.parametrize("task", tasks.VTV, ids=lambda task: task.name)
def test_the_example_decides(tiny, task):
    """One-shot is at least twice as good as zero-shot with nothing patched, on scenes that training never drew."""
    prompts = task.prompts(data.scenes("test", n=96), n=32, layout=tiny.layout)
    table = evaluate(tiny, task, prompts, {"one-shot": None, "zero-shot": "zero-shot"}, progress=False)
    one_shot, zero_shot = (table.values(task.name, name).mean() for name in ("one-shot", "zero-shot"))
    if task.higher_is_better:
        assert one_shot > 2 * zero_shot
    else:
        assert one_shot < zero_shot / 2


def test_the_tokenizer_redraws_a_canvas(tiny):
    canvas = tasks.segmentation.prompts(data.scenes("test", n=32), n=8, layout=tiny.layout).canvas
    with torch.no_grad():
        codes = tiny._module.vqgan.encode(canvas)
        error = (tiny._module.vqgan.decode(codes) - canvas).square().mean()
    assert codes.shape == (8, tiny.layout.num_patches)
    assert -10 * error.log10() > 19


def test_its_vectors_are_in_the_package(tiny):
    bundle = bundles.load("tiny")
    assert list(bundle) == [task.name for task in tasks.VTV]
    bundle.check(tiny)
    sizes = [file.stat().st_size for file in FOLDER.rglob("*.safetensors") if file.name != "model.safetensors"]
    assert len(sizes) == 6 and sum(sizes) < 1_500_000


def test_the_readme_begins_with_lines_that_run(tiny, tmp_path):
    first = (Path(__file__).parents[1] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    path, names = tmp_path / "first.py", {"__name__": "readme"}
    path.write_text(first)  # nnsight reads the source of a trace from its file
    exec(compile(first, path, "exec"), names)
    asked = names["prompts"]
    scores = tasks.segmentation.score(crop(names["answers"], "output", asked.layout), asked.region("output"))
    assert scores.mean() > 0.7
