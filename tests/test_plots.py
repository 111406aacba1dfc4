import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import FAST, LAYOUT, all_heads, random_module, random_prompts
from matplotlib.figure import Figure
from sklearn.metrics import silhouette_samples

from vtv_nnsight import MAEVQGAN, TaskVectors, evaluate, plots, tasks
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.studies.clusters import activations, silhouette, silhouettes


@pytest.fixture(scope="module")
def model():
    return MAEVQGAN(random_module(**FAST))


@pytest.fixture(scope="module")
def prompts():
    return {"a": random_prompts(5, 1), "b": random_prompts(7, 2)}


@pytest.fixture(scope="module")
def heads(model, prompts):
    return activations(model, prompts, batch_size=3, progress=False)


def images(figure):
    return [np.asarray(picture.get_array()) for axes in figure.axes for picture in axes.images]


def test_activations_are_means_over_a_region(model, prompts, heads):
    z = all_heads(model, prompts["b"])
    tokens = LAYOUT.index(LAYOUT.visible, LAYOUT.regions["query"])
    expected = z["encoder"][:, :, tokens].mean(2).transpose(0, 1)
    torch.testing.assert_close(heads["encoder"]["b"], expected)
    assert heads["decoder"]["a"].shape == (5, 2, 2, 8)
    output = activations(model, prompts, "output", progress=False)
    assert output["encoder"] is None and silhouettes(output)["encoder"] is None
    torch.testing.assert_close(
        activations(model, prompts, "cls", progress=False)["encoder"]["b"], z["encoder"][:, :, 0].transpose(0, 1)
    )
    with pytest.raises(ValueError, match="'sky' is not a region; choose 'cls' or one of example_input"):
        activations(model, prompts, "sky", progress=False)
    with pytest.raises(ValueError, match="no stage sees 'example_input'"):
        activations(model, {"a": prompts["a"].query_only()}, "example_input", progress=False)
    with pytest.raises(ValueError, match="no prompts"):
        activations(model, {"a": prompts["a"][:0]})


def test_silhouettes_equal_scikit_learns(heads):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 12, 3, generator=generator)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3])
    expected = [silhouette_samples(cloud.double().numpy(), labels.numpy()).mean() for cloud in points]
    np.testing.assert_allclose(silhouette(points, labels), expected, atol=1e-10)
    found = silhouettes(heads)
    assert found["encoder"].shape == (3, 4) and found["encoder"].abs().max() < 1
    apart = ByStage(encoder={"a": heads["encoder"]["a"], "b": heads["encoder"]["b"].clone()}, decoder=None)
    apart["encoder"]["b"][:, 1, 2] += 50
    planted = silhouettes(apart)["encoder"]
    assert planted[1, 2] > 0.9 and (planted > 0.9).sum() == 1
    with pytest.raises(ValueError, match="only a"):
        silhouettes(ByStage(encoder={"a": heads["encoder"]["a"]}, decoder=None))


def test_score_map_shows_every_region_a_stack_sees(model, prompts):
    vectors = TaskVectors.collect(model, prompts, progress=False)
    scores = vectors.score()
    figure = plots.score_map(scores, LAYOUT)
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(titles) == 9 and "encoder @ output" not in titles and "decoder @ output" in titles
    shown = images(figure)[titles.index("encoder @ query")]
    np.testing.assert_allclose(shown, scores["encoder"][..., 1 + LAYOUT.regions["query"]].mean(-1), rtol=1e-5)
    zero_shot = TaskVectors.collect(model, {t: p.query_only() for t, p in prompts.items()}, progress=False)
    titles = [axes.get_title() for axes in plots.score_map(zero_shot.score(), LAYOUT).axes if axes.images]
    assert titles == ["encoder @ cls", "encoder @ query", "decoder @ cls", "decoder @ query", "decoder @ output"]


def test_head_map(heads):
    found = silhouettes(heads)
    np.testing.assert_allclose(images(plots.head_map(found))[0], found["encoder"])
    assert len(images(plots.head_map(ByStage(encoder=None, decoder=found["decoder"])))) == 1


def test_projection(heads, tmp_path):
    figure = plots.projection(heads, "encoder", 1, [0, 3])
    panels = figure.axes
    assert len(panels) == 2 and [len(c.get_offsets()) for c in panels[0].collections] == [5, 7]
    width = silhouettes(heads)["encoder"][1, 3]
    assert panels[1].get_title() == f"encoder layer 1, head 3: silhouette {width:.2f}"
    figure.savefig(tmp_path / "projection.png")
    line = torch.outer(torch.tensor([-3.0, -1.0, 1.0, 3.0]), torch.tensor([0.6, 0.8, 0.0]))
    flat = plots.project(line + torch.tensor([5.0, 5.0, 5.0]))
    np.testing.assert_allclose(np.abs(flat), [[3, 0], [1, 0], [1, 0], [3, 0]], atol=1e-6)
    assert plots.project(torch.cat(list(heads["encoder"].values()))[:, 0, 0], "tsne").shape == (12, 2)
    with pytest.raises(ValueError, match="'umap' is unknown"):
        plots.project(line, "umap")
    with pytest.raises(ValueError, match="encoder does not see"):
        plots.projection(ByStage(encoder=None, decoder=heads["decoder"]), "encoder", 0, 0)


def test_tsne_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match="needs scikit-learn"):
        plots.project(torch.rand(5, 3), "tsne")


def test_answers_show_pictures_and_scores(model, prompts):
    table = evaluate(model, tasks.identity, prompts["b"], keep=3, progress=False)
    figure = plots.answers(table)
    (sheet,) = figure.axes
    assert isinstance(figure, Figure) and len(sheet.images) == 3 * 6
    words = [text.get_text() for text in sheet.texts]
    assert [word for word in words if not word[0].isdigit()] == [
        "prompt", "truth", "one-shot", "zero-shot", "tokenizer", "copy"
    ]  # fmt: skip
    for row, score in enumerate(table.values("identity", "zero-shot")[:3]):
        picture = next(i for i in sheet.images if (i.get_extent()[0], i.get_extent()[3]) == (3, row))
        shown = table.pictures["identity"]["zero-shot"][row].permute(1, 2, 0)
        assert np.array_equal(np.asarray(picture.get_array()), shown)
        below = [t.get_text() for t in sheet.texts if t.get_position() == (3 + 0.47, row + 0.9)]
        assert below == [f"{score:.3f}"]
    with pytest.raises(ValueError, match="kept no pictures"):
        plots.answers(evaluate(model, tasks.identity, prompts["b"], {"x": None}, keep=0, progress=False))


def test_matrix_shows_every_vector_on_every_task():
    rows = [
        {"task": task, "vector": vector, "mean": mean, "label": label, "higher_is_better": up}
        | {"difference_low": low, "difference_high": high, "pictures": 8}
        for task, label, up, cells in (
            ("a", "mIoU ↑", True, {"a": (0.8, 0, 0), "b": (0.5, -0.4, -0.2), "c": (0.2, -0.7, -0.5)}),
            ("b", "MSE ↓", False, {"a": (0.9, 0.1, 0.3), "b": (0.6, 0, 0), "c": (0.5, -0.2, 0.1)}),
        )
        for vector, (mean, low, high) in cells.items()
    ]
    figure = plots.matrix(pd.DataFrame(rows).assign(pictures=8))
    (panel,) = figure.axes
    np.testing.assert_allclose(images(figure)[0], [[1, 0.5, 0], [0, 0.75, 1]])
    words = [text.get_text() for text in panel.texts]
    assert words == ["0.800", "0.500", "0.200", "0.900", "0.600", "0.500 *"]
    assert [frame.get_xy() for frame in panel.patches] == [(-0.47, -0.46), (0.53, 0.54)]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a\nmIoU ↑", "b\nMSE ↓"]
    both = plots.matrix({"fixed": pd.DataFrame(rows), "anew": pd.DataFrame(rows)})
    assert [panel.get_title() for panel in both.axes] == ["fixed", "anew"]
