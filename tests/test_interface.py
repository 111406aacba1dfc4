"""The interface of models: the page "a model of your own" holds, and nothing outside `models` looks behind it."""

import re
from pathlib import Path

import pytest
import torch
from helpers import import_code, python_blocks

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, ablate, data, patch, search, tasks
from vtv_nnsight.models.interface import InContextModel, group_positions
from vtv_nnsight.prompts import crop

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your_model.md").read_text()
BLOCKS = python_blocks("docs/your_model.md")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's code, run as it stands."""
    torch.manual_seed(0)
    return import_code("".join(BLOCKS), tmp_path_factory.mktemp("page") / "your_model.py")


def test_the_example_is_short():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 80
    assert max(map(len, PAGE.splitlines())) <= 120


def test_the_page_works(page):
    assert page.scores.shape == (4, 4, 65)
    assert page.scores[..., 1:].isfinite().all() and page.scores[..., 0].isnan().all()
    assert page.space.names[1] == "layers.0.heads[0] @ output" and len(page.space) == 4 * 4 * 2
    assert page.painted.shape == (12, len(page.query_only.decoded), 3 * 8 * 8)
    assert page.table.values("segmentation", "task vector").shape == (12,)
    assert page.result.patches.space.stages == page.model.stages


def test_patches_equal_hooks_on_it(page):
    model, vector, prompts = page.model, page.vector, page.query_only[:3]
    chosen = PatchSet.random(page.space, 9, seed=3)
    mask, at = chosen.mask["layers"], 1 + prompts.decoded
    handles = []
    for layer, attention in enumerate(model._module.layers):

        def hook(_, args, layer=layer):
            z = args[0].unflatten(-1, (4, 16))
            return (torch.where(mask[layer, at][..., None], vector.mean["layers"][layer, at], z).flatten(-2),)

        handles.append(attention.proj.register_forward_pre_hook(hook))
    with torch.no_grad():
        expected = model._module(prompts.canvas, prompts.visible, prompts.decoded)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(prompts[:2]):
            patch(model, vector, chosen)
            found = model.output.save()
        with tracer.invoke(prompts[2:]):
            plain = model.output.save()
    torch.testing.assert_close(found, expected[:2])
    with torch.no_grad():
        bare = model._module(prompts.canvas, prompts.visible, prompts.decoded)
    torch.testing.assert_close(plain, bare[2:])
    assert (found - bare[:2]).abs().max() > 1e-3
    with torch.no_grad(), model.trace(prompts):
        ablate(model, chosen)
        silenced = model.output.save()
    assert not torch.equal(silenced, bare)


def test_losses_are_the_models_own(page):
    args = page.model, page.vector, tasks.segmentation, page.query_only, page.space
    own, pixels = search.Objective(*args), search.Objective(*args, loss="pixels")
    assert own.loss == "squared error" and own.differentiable and not pixels.differentiable
    choices = torch.rand(5, len(page.space), generator=torch.Generator().manual_seed(0)) < 0.5
    losses = own(choices, torch.arange(5))
    for row, loss in enumerate(losses):
        prompt = own.prompts[row]
        with torch.no_grad(), page.model.trace(prompt):
            patch(page.model, page.vector, PatchSet(page.space, choices[row]))
            output = page.model.output.save()
        answer = (prompt.decoded[:, None] == prompt.layout.regions["output"]).any(1)
        error = output[:, answer] - page.model.truth(prompt)
        torch.testing.assert_close(loss.float(), error.square().mean())
        painted = crop(page.model.paint(output, prompt), "output", prompt.layout)
        expected = tasks.segmentation.loss(painted, prompt.region("output"))
        torch.testing.assert_close(pixels(choices[row : row + 1], torch.tensor([row])), expected.double())
    with pytest.raises(ValueError, match="loss='tokens' is unknown; choose from squared error, pixels"):
        search.Objective(*args, loss="tokens")
    with pytest.raises(ValueError, match="loss='pixels' has no gradient; use loss=\"squared error\""):
        pixels.gradient(choices.float(), torch.arange(5))


def test_what_belongs_to_it_fits_no_other_model(page, tmp_path):
    page.result.patches.save(tmp_path / "patches.json")
    loaded = PatchSet.load(tmp_path / "patches.json")
    assert loaded == page.result.patches and hash(loaded) == hash(page.result.patches)
    page.vectors.save(tmp_path / "vectors.safetensors")
    again = TaskVectors.load(tmp_path / "vectors.safetensors")
    torch.testing.assert_close(again["identity"].mean, page.vectors["identity"].mean, rtol=0, atol=0, equal_nan=True)
    tiny = MAEVQGAN("tiny")
    other = tasks.identity.prompts(data.scenes("train", n=40), n=2, layout=tiny.layout)
    with pytest.raises(ValueError, match="'identity' does not fit this model: it has stages"), tiny.trace(other):
        patch(tiny, again["identity"], loaded)
    with pytest.raises(ValueError, match=r"stages=\['encoder'\] are not stages of the model; choose from layers"):
        PatchSpace(page.model, stages="encoder")


def test_what_is_missing_is_named():
    class Half(InContextModel):
        layout = None

    with pytest.raises(TypeError, match="abstract method"):
        Half()
    with pytest.raises(ValueError, match="granularity='region' is unknown; choose from head, quadrant, token"):
        group_positions("region", torch.arange(3), {}, torch.arange(3))


BEHIND = re.compile(
    r"(?<!import)_module\b|(?<!settings)(?<!options)(?<!self)\.vqgan\b|\.codebook\b|cls_token|\.(en|de)coder\b"
)
"""A model's own parts. (`settings.vqgan`, and a bundle's own, is where a tokenizer's file is.)"""
PACKAGE = ROOT / "vtv_nnsight"
ITS_OWN = ("models/", "testing/", "training/", "studies/circuits/known_circuit.py")
"""Training trains MAE-VQGANs, `known_circuit` builds a model, and the conformance suite hooks modules."""
FILES = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")]
FILES = [name for name in FILES if not name.startswith(ITS_OWN)] + ["models/interface.py"]


def test_nothing_looks_behind_the_interface():
    lines = {name: (PACKAGE / name).read_text(encoding="utf-8").splitlines() for name in FILES}
    assert not [f"{name}: {line}" for name in FILES for line in lines[name] if BEHIND.search(line)]
