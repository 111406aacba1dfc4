import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from vtv_nnsight import MAEVQGAN, Layout, cli, data, tasks
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.prompts import crop
from vtv_nnsight.studies import clusters
from vtv_nnsight.studies.prompting import ensembles
from vtv_nnsight.studies.prompting import prompt_engineering as engineering


@pytest.fixture
def module(small_config):
    torch.manual_seed(0)
    module = MAEVQGANModel(small_config(decoder_num_hidden_layers=2)).eval()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


@pytest.fixture
def images():
    return data.scenes("train", n=12, seed=0)


def test_the_table_scores_every_layout_in_every_colour(module, images):
    model = MAEVQGAN(module)
    scores = engineering.compare(model, images, n=5, seed=1, batch_size=2)
    layouts, colours = ["vertical", "horizontal", "vertical + horizontal"], ["black/white", "purple/yellow"]
    assert list(scores) == [(layout, colour) for colour in colours for layout in layouts]
    task = tasks.Segmentation(tasks.YELLOW, tasks.PURPLE)
    prompts = [task.prompts(images, 5, 1, Layout(64, 16, order=order)) for order in ("vertical", "horizontal")]
    truth = prompts[1].region("output")
    answer = crop(model.generate(prompts[1]), "output", prompts[1].layout)
    assert torch.equal(scores["horizontal", "purple/yellow"], task.score(answer, truth))
    answer = crop(ensembles.generate(model, prompts), "output", prompts[0].layout)
    assert torch.equal(scores["vertical + horizontal", "purple/yellow"], task.score(answer, truth))


def test_other_looks_of_a_mask_can_be_compared(module, images):
    looks = {"edges": tasks.Segmentation(fill="edges"), "texture": tasks.Segmentation(fill="texture")}
    scores = engineering.compare(MAEVQGAN(module), images, n=2, tasks=looks)
    assert {look for _, look in scores} == set(looks) and all(len(values) == 2 for values in scores.values())


def test_the_table_in_text():
    scores = {
        (layout, colour): torch.tensor([value, value + 0.1])
        for value, (layout, colour) in enumerate([(a, b) for b in ("x", "colour") for a in ("vertical", "flip")])
    }
    assert engineering.table(scores).splitlines() == [
        "          x  colour",
        "vertical  0.050   2.050",
        "flip      1.050   3.050",
    ]


@pytest.mark.parametrize("zero_shot", [False, True])
def test_attention_to_regions_is_the_pattern_summed(module, images, zero_shot):
    module.set_attn_implementation("eager")
    prompts = tasks.identity.prompts(images, n=3, layout=Layout(64, 16))
    prompts = prompts.query_only() if zero_shot else prompts
    found = engineering.attention_to_regions(MAEVQGAN(module), prompts)
    assert set(found) == {"cls", "query", "output"} | (set() if zero_shot else {"example_input", "example_output"})
    patterns = []
    for block in module.decoder.blocks:
        block.attn.softmax.register_forward_hook(lambda *args: patterns.append(args[-1]))
    module(prompts.canvas, prompts.visible, prompts.decoded)
    seen = prompts.decoded.tolist()
    rank = {name: [1 + seen.index(i) for i in prompts.layout.regions[name].tolist()] for name in found if name != "cls"}
    for layer, pattern in enumerate(patterns):
        mean = pattern.mean((0, 1))[rank["output"]].mean(0)
        for name in found:
            expected = mean[rank[name]].sum() if name != "cls" else mean[0]
            torch.testing.assert_close(found[name][layer], expected)
    torch.testing.assert_close(sum(found.values()), torch.ones(2))


def test_attention_is_read_however_the_model_was_loaded(module, images):
    prompts = tasks.identity.prompts(images, n=2, layout=Layout(64, 16))
    found = []
    for implementation in ("sdpa", "eager"):
        module.set_attn_implementation(implementation)
        found.append(engineering.attention_to_regions(MAEVQGAN(module), prompts))
        assert module.config._attn_implementation == implementation
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_the_command_line_compares_layouts(small_config, tmp_path):
    MAEVQGANModel(small_config()).save_pretrained(tmp_path / "model")
    args = ["layouts", tmp_path / "model", "--data", "scenes", "--n", 3, "--ensemble", "product"]
    args += ["-o", tmp_path / "layouts.csv"]
    result = CliRunner().invoke(cli.app, list(map(str, args)))
    assert result.exit_code == 0, result.output
    written = pd.read_csv(tmp_path / "layouts.csv")
    model = MAEVQGAN(str(tmp_path / "model"))
    scores = engineering.compare(model, data.load("scenes", "test", 6), 3, rule="product")
    for (layout, look), values in scores.items():
        np.testing.assert_allclose(written[f"{layout}, {look}"], values, atol=1e-6)
    assert engineering.table(scores) in result.output
    wrongs = ((["--ensemble", "vote"], "--ensemble vote is unknown"), (["--colours", "edges"], "edges is not"))
    for wrong, words in wrongs:
        refused = CliRunner().invoke(cli.app, list(map(str, [*args, *wrong])))
        assert refused.exit_code == 1 and words in refused.output


def test_the_command_line_draws_clusters(small_config, tmp_path):
    MAEVQGANModel(small_config()).save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    args = ["clusters", tmp_path / "model", "--n", 4, "--max-images", 20, "--tasks", "lowlight,colorization"]
    args += ["--top", 2, "-o", tmp_path / "pictures" / "c.png"]
    result = CliRunner().invoke(cli.app, list(map(str, args)))
    assert result.exit_code == 0, result.output
    widths = [float(line.rsplit(" ", 1)[1]) for line in result.output.splitlines() if "silhouette" in line]
    model, rows = MAEVQGAN(str(tmp_path / "model")), data.load("pictures", "train", 20)
    prompts = {name: tasks.get(name).prompts(rows, 4, 0, model.layout) for name in ("lowlight", "colorization")}
    own = clusters.silhouettes(clusters.activations(model, prompts, progress=False))
    every = torch.cat([values.flatten() for values in own.values() if values is not None])
    assert widths == pytest.approx(every.sort(descending=True).values[:2].tolist(), abs=1e-3)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["c_1.png", "c_2.png"]
