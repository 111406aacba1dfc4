import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import DATA
from matplotlib.figure import Figure
from PIL import Image
from rich.text import Text

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, cli, data, tasks
from vtv_nnsight.cli import start
from vtv_nnsight.cli.group import COMMANDS, LazyCommand, load_commands
from vtv_nnsight.cli.output import say
from vtv_nnsight.files import read_tensors, write_picture, write_tensors
from vtv_nnsight.images import as_rgb, resize, to_tensor
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.models.mae_vqgan.published import load_checkpoint
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.runs import bundles
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.vectors.files import KIND

SUPPORT, QUERY = DATA / "support_image.png", DATA / "query_image.png"


def picture(path):
    return to_tensor(Image.open(path))


def test_help_is_grouped_by_step(vtv):
    code, out, _ = vtv("--help")
    assert code == 0 and out.index("Model") < out.index("convert") < out.index("Prompts") < out.index("prompt ")
    assert "Example" in vtv("convert", "-h")[1]


@pytest.mark.parametrize("policy", [None, "ACTIVE"])
def test_help_needs_no_torch_and_threads_yield_unless_told_otherwise(policy):
    script = (
        "import os, sys\nfrom vtv_nnsight import cli\nsys.argv = ['vtv', '--help']\n"
        "try: cli.main()\nfinally: print(os.environ['OMP_WAIT_POLICY']); sys.exit('torch' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": policy} if policy else {}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=DATA.parents[1], env=env)
    assert done.returncode == 0 and "import-released" in done.stdout, done.stderr
    assert done.stdout.split()[-1] == (policy or "PASSIVE")


def test_help_shows_commands_as_their_own_help_does():
    for name, command in load_commands().items():
        stand_in = LazyCommand(name, {n: m for names in COMMANDS.values() for n, m in names.items()}[name])
        assert command.help.startswith(stand_in.help) and stand_in.help.endswith("."), name


def test_options_of_a_run_are_in_panels(vtv):
    out = vtv("run", "--help")[1]
    places = [out.index(f" {panel} ─") for panel in ("Basics", "Search", "Evaluation", "Expert")]
    assert places == sorted(places)
    assert {parameter.rich_help_panel for parameter in load_commands()["run"].params} == set(start.PANELS)


def test_info_of_a_published_file(vtv, checkpoint, split_checkpoint):
    code, out, _ = vtv("info", checkpoint)
    assert code == 0 and "24 layers of width 64, 16 heads" in out and "vqgan" in out
    assert f"{sum(p.numel() for p in load_checkpoint(checkpoint).parameters()):,}" in out
    path, vqgan = split_checkpoint
    code, out, _ = vtv("info", path, "--vqgan", vqgan)
    assert code == 0 and f"tokenizer from {vqgan}" in out


def test_convert_writes_what_info_reads(vtv, checkpoint, tmp_path):
    code, out, _ = vtv("convert", checkpoint, tmp_path / "model", "--heads", 8)
    assert (code, out) == (0, f"wrote {tmp_path / 'model'}\n")
    assert MAEVQGANModel.from_pretrained(tmp_path / "model").config.num_attention_heads == 8
    assert "24 layers of width 64, 8 heads" in vtv("info", tmp_path / "model")[1]


def as_they_are(*pictures):
    names = ("example_input", "example_output", "query")
    cells = {name: to_tensor(resize(as_rgb(Image.open(file)), 111)) for name, file in zip(names, pictures)}
    return VisualPrompt.from_cells(cells, Layout())


@pytest.mark.parametrize("options", [["--example", SUPPORT, QUERY], ["--example", SUPPORT, "--example", QUERY]])
def test_prompt_of_two_example_files_shows_them_as_they_are(vtv, tmp_path, options):
    out = tmp_path / "prompt.png"
    code, printed, _ = vtv("prompt", "--task", "colorization", *options, "--query", SUPPORT, "-o", out)
    assert (code, printed) == (0, f"wrote {out}\n")
    assert np.array_equal(Image.open(out), as_they_are(SUPPORT, QUERY, SUPPORT).picture())


@pytest.mark.parametrize("order", ["vertical", "horizontal"])
def test_prompt_of_one_example_file_shows_the_tasks_corruptions(vtv, tmp_path, order):
    out = tmp_path / "prompt.png"
    args = ("prompt", "--task", "colorization", "--example", SUPPORT, "--query", QUERY, "--order", order)
    assert vtv(*args, "--output", out)[0] == 0
    rows = ({"image": Image.open(file)} for file in (SUPPORT, QUERY))
    assert np.array_equal(Image.open(out), tasks.colorization.prompt(*rows, Layout(order=order)).picture())


def test_prompt_with_a_mask(vtv, tmp_path, rows):
    support, query = rows
    support["mask"].save(tmp_path / "mask.png")
    out = tmp_path / "prompt.png"
    args = ("prompt", "--task", "segmentation+inpainting", "--example", SUPPORT, "--query", QUERY, "-o", out)
    assert vtv(*args, "--mask", tmp_path / "mask.png")[0] == 0
    expected = tasks.get("segmentation+inpainting").prompt(support, {"image": query["image"]})
    assert np.array_equal(Image.open(out), expected.picture())


def test_a_model_paints_the_output(vtv, tmp_path, checkpoint):
    out = tmp_path / "completed.png"
    args = ("prompt", "--task", "identity", "--example", SUPPORT, QUERY, "--query", SUPPORT, "-o", out)
    assert vtv(*args, "--model", checkpoint)[0] == 0
    prompt = as_they_are(SUPPORT, QUERY, SUPPORT)
    expected = load_checkpoint(checkpoint).generate(prompt.canvas, prompt.visible, prompt.decoded)[0]
    assert torch.equal((picture(out) * 255).round(), (expected * 255).round())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["info", "nowhere.pth"], "Error: there is no file nowhere.pth."),
        (["info", QUERY], "is not a PyTorch checkpoint"),
        (["convert", QUERY, "out"], "is not a PyTorch checkpoint"),
        (["prompt", "--task", "sing", "--example", SUPPORT, "--query", QUERY], "'sing' is not a task"),
        (["prompt", "--example", SUPPORT, "--query", "none.png"], "Error: there is no file none.png."),
        (["prompt", "--example", DATA / "make_checkpoint.py", "--query", QUERY], "cannot be read as a picture"),
        (["prompt", "--example", SUPPORT, QUERY, QUERY, "--query", QUERY], "--example names 3 files"),
        (["prompt", "--example", SUPPORT, QUERY, "--mask", QUERY, "--query", QUERY], "single --example"),
        (["prompt", "--task", "segmentation", "--example", SUPPORT, "--query", QUERY], "has no 'mask'"),
        (["prompt", "--example", SUPPORT, "--query", QUERY, "--order", "round"], "order='round'"),
        (["collect", "tiny", "-o", "x", "--device", "cuda:99"], "there is no device 'cuda:99' here; choose one of cpu"),
        (["run", "--device", "tpu"], "there is no device 'tpu' here; choose one of cpu"),
        (["collect", "tiny", "-o", "x", "--prompts", 10**20], "is not a whole number from 1 to 10,000,000"),
        (["run", "--seed", 2**40], "seed=1099511627776 is not a whole number from 0"),
        (["run", "--images", "nowhere"], "--images nowhere is not a folder"),
        (["run", "--folds", "a,b"], "--folds a,b are not numbers"),
        (["run", "--quick", "--published"], "give one"),
        (["run", "--tasks", "sing[/b]"], "'sing[/b]' is not a task"),
        (["run", "--sites", "heads,mpl"], "sites='mpl' is unknown; choose from heads, attn, mlp, residual"),
        (["collect", "tiny", "-o", "x", "--sites", ""], "an empty value follows --sites; give one, or leave it out"),
        (["run", "--tasks", ""], "an empty value follows --tasks"),
        (["run", "--device="], "an empty value follows --device"),
        (["run", "--images", " "], "an empty value follows --images"),
        (["info", ""], "an empty value follows info"),
        (["run", "--data", "pictures", "--images", "."], "--images and --data both say"),
        (["run", "--search-fold", 1], "--search-fold has no use but with --published"),
        (["prompt", "--example", SUPPORT, "--query", QUERY, "--dtype", "AAAA"], "--dtype has no use without a model"),
        (["prompt", "--example", SUPPORT, "--query", QUERY, "--scale", 2], "--scale has no use without --vectors"),
        (
            ["prompt", "--task", "antonym", "--example", "big", "small", "--query", "hot", "--scale", 2],
            "no use without",
        ),
        (["prompt", "--vectors", "tiny", "--query", QUERY, "--scale", "nan"], "--scale is nan; give a number"),
        (["prompt", "--example", SUPPORT, "--query", QUERY, "--mask", QUERY], "--mask has no use for identity"),
        (["prompt", "--vectors", "tiny", "--query", QUERY, "--order", "vertical"], "--order has no use with --vectors"),
        (["report", "run", "-o", "page.html"], "--output has no use for a single run"),
        (["report", "one", "other", "-o", "."], "is a folder and a file was to be written there"),
        (["report", "one", "other", "-o", "deeper/page.html"], "there is no folder"),
        (["info", "x" * 3000], "xxxxx…xxxxx"),
        (["search", "tiny", "-o", "x", "--vectors", "tiny", "--sites", "neck"], "sites='neck' is unknown"),
        (["collect", "tiny", "-o", "x", "--dtype", "int7"], "dtype='int7' is unknown; give a floating-point one"),
        (["collect", "tiny", "-o", "x", "--embedding-type", "semantic"], "embedding_type='semantic' is for SegGPT"),
    ],
)
def test_mistakes_are_one_sentence(vtv, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, complaint = vtv(*args, *(["-o", "out.png"] if args[0] == "prompt" else []))
    assert code == 1 and not out and words in complaint
    assert complaint.startswith("Error: ") and complaint.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        ["collect", "nowhere.pth"],
        ["search", "nowhere.pth", "--vectors", "nowhere.safetensors"],
        ["prompt", "--query", "nowhere.png", "--example", "nowhere.png"],
    ],
)
def test_a_place_for_the_output_is_seen_to_before_the_work(vtv, tmp_path, args):
    assert "there is no file nowhere" in vtv(*args, "-o", tmp_path / "file.png")[2]
    assert "is a folder and a file was to be written there" in vtv(*args, "-o", tmp_path)[2]
    assert "/dev/null is a device or a pipe" in vtv(*args, "-o", "/dev/null")[2]
    for folder in (tmp_path / "new", tmp_path / "new" / "folder", QUERY, QUERY / "deeper"):
        expected = f"Error: there is no folder {folder} to write file.png in.\n"
        assert vtv(*args, "-o", folder / "file.png")[2] == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [["evaluate", "nowhere.pth"], ["run", "--model", "nowhere.pth"], ["import-released", "nowhere.pth", "nowhere.pkl"]],
)
def test_a_place_for_a_folder_is_seen_to_before_the_work(vtv, tmp_path, args):
    assert "there is no file" in vtv(*args, "-o", tmp_path / "new")[2]
    assert "is no folder and a folder was to be written there" in vtv(*args, "-o", QUERY)[2]
    for folder in (tmp_path / "new", QUERY):
        expected = f"Error: there is no folder {folder} to make deeper in.\n"
        assert vtv(*args, "-o", folder / "deeper")[2] == expected
    assert not list(tmp_path.iterdir())


def test_help_keeps_its_brackets(vtv):
    """Rich takes those of a lower-case word for its markup."""
    for name, command in load_commands().items():
        if name == "bench":
            continue
        printed = re.sub(r"[\s│]+", "", vtv(name, "--help")[1])
        written = (
            Text.from_markup(shown.help or "").plain for shown in (command, *command.params) if hasattr(shown, "help")
        )
        brackets = [words for text in written for words in re.findall(r"\S*\[\S*", text)]
        assert all(words in printed for words in brackets)
        if name == "demo":
            assert '"vtv-nnsight[demo]".' in brackets


def test_a_picture_that_cannot_be_finished_leaves_the_one_before(vtv, tmp_path, monkeypatch):
    def break_off(_, path, **options):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("PIL.Image.Image.save", break_off)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", break_off)
    out = tmp_path / "out.png"
    out.write_text("before")
    code, _, complaint = vtv("prompt", "--example", SUPPORT, "--query", QUERY, "-o", out)
    assert (code, complaint) == (1, f"Error: {out} cannot be written: no space left.\n")
    with pytest.raises(OSError, match="cannot be written: no space left"):
        write_picture(out, Figure().savefig)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_of_several_processes_the_first_prints(vtv, monkeypatch, capsys):
    from vtv_nnsight.cli.start import summarise

    empty = SimpleNamespace(tasks=[], lines=dict, table=SimpleNamespace(tasks=[]), record={"notes": []}, anew=None)
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        code, out, _ = vtv("info", "tiny")
        assert code == 0 and bool(out) == prints
        summarise(empty)
        assert bool(capsys.readouterr().out) == prints


def test_a_picture_of_a_billion_pixels_is_not_opened(vtv, tmp_path):
    huge = bytearray(QUERY.read_bytes())
    huge[16:24] = struct.pack(">II", 30_000, 30_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    (tmp_path / "huge.png").write_bytes(huge)
    args = ("prompt", "--example", SUPPORT, "--query", tmp_path / "huge.png", "-o", tmp_path / "out.png")
    code, _, complaint = vtv(*args)
    assert code == 1 and "huge.png has more than" in complaint and complaint.count("\n") == 1


def test_vectors_that_are_not_finite_are_named(vtv, tmp_path, small_config):
    model = MAEVQGAN(MAEVQGANModel(small_config()))
    rows = data.scenes("train", 20)
    vectors = TaskVectors.collect(
        model, {t.name: t.prompts(rows, 2, 0, model.layout) for t in (tasks.identity, tasks.lowlight)}, progress=False
    )
    vectors.save(tmp_path / "vectors.safetensors")
    tensors, told = read_tensors(tmp_path / "vectors.safetensors", KIND)
    tensors["lowlight/decoder/mean"][0, 0, 0, 1] = torch.nan
    write_tensors(tmp_path / "vectors.safetensors", KIND, tensors, told)
    model._module.save_pretrained(tmp_path / "model")
    given = ("--vectors", tmp_path / "vectors.safetensors", "-o", tmp_path / "units.json")
    code, _, complaint = vtv("search", tmp_path / "model", "--tasks", "lowlight", *given)
    assert code == 1 and "lowlight/decoder/mean holds nan" in complaint


@pytest.mark.slow
def test_other_sites_of_the_layers(vtv, tmp_path, small_config):
    """--sites from collecting to evaluating: what is collected is scored, searched and patched."""
    model, vectors, units = tmp_path / "model", tmp_path / "vectors.safetensors", tmp_path / "units.json"
    MAEVQGANModel(small_config()).save_pretrained(model)
    own = ("--tasks", "segmentation,lowlight", "--prompts", 4, "--max-images", 10)
    assert vtv("collect", model, *own, "--sites", "residual, mlp", "-o", vectors)[0] == 0
    loaded = TaskVectors.load(vectors)
    stages = [stage.name for stage in MAEVQGAN(model).stages]
    sites = [f"{stage}.{site}" for stage in stages for site in ("mlp", "residual")]
    assert list(map(str, loaded["lowlight"].mean)) == sites and loaded["lowlight"].mean["encoder", "mlp"].shape[2] == 1

    search = ("search", model, "--tasks", "lowlight", *own[2:], "--vectors", vectors, "--algorithm", "random")
    search += ("--budget", 40, "-o", units)
    assert vtv(*search)[0] == 0
    assert PatchSet.load(units).space.sites == ("mlp", "residual")  # all that the vectors have
    assert vtv(*search, "--sites", "mlp")[0] == 0
    chosen = PatchSet.load(units)
    assert chosen.space.sites == ("mlp",) and all(".mlp @" in name for name in chosen)
    code, out, complaint = vtv(*search, "--sites", "heads,mlp")
    assert code == 1 and complaint == (
        f"Error: {vectors} has vectors of mlp, residual and none of heads; collect with sites heads,mlp,residual.\n"
    )

    evaluate = ("evaluate", model, "--tasks", "lowlight", "--prompts", 6, "-o", tmp_path / "out")
    assert vtv(*evaluate, "--vectors", vectors, "--patches", units)[0] == 0
    assert "task vector" in (tmp_path / "out" / "table.md").read_text()
    assert vtv("collect", model, *own, "-o", vectors)[0] == 0
    code, _, complaint = vtv(*evaluate, "--vectors", vectors, "--patches", units)
    expected = f"Error: {vectors} has vectors of heads and none of mlp; collect with sites heads,mlp.\n"
    assert (code, complaint) == (1, expected)


def test_an_error_that_nobody_thought_of_is_one_sentence(vtv, monkeypatch):
    def fail(*args, **options):
        raise AttributeError("'NoneType' object\nhas no attribute 'x[/b]'")

    monkeypatch.setattr("vtv_nnsight.tasks.get", fail)
    code, _, complaint = vtv("prompt", "--example", SUPPORT, "--query", QUERY, "-o", "out.png")
    said = "Error: AttributeError: 'NoneType' object has no attribute 'x[/b]' (--debug shows where)\n"
    assert (code, complaint) == (1, said)


def test_version(vtv):
    assert vtv("--version")[1].startswith("vtv-nnsight ")


def test_brackets_in_a_message_are_shown(vtv):
    assert "Error: there is no file [bold]x.pth." in vtv("info", "[bold]x.pth")[2]


def test_debug_shows_the_traceback(vtv, monkeypatch):
    for args in (["--debug", "info", "nowhere.pth"], ["info", "nowhere.pth", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["vtv", *args])
        with pytest.raises(FileNotFoundError, match="nowhere.pth"):
            cli.main()


def test_a_command_without_its_arguments_says_which(vtv):
    code, _, complaint = vtv("info")
    assert code == 2 and "SOURCE" in complaint.upper()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, small_config):
    """A folder with a model, and one with vectors and units of it, as a run leaves them."""
    folder = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(0)
    model = MAEVQGANModel(small_config())
    model.save_pretrained(folder / "model")
    model = MAEVQGAN(model)
    prompts = {t.name: t.prompts(data.scenes("train", n=24), 3, layout=model.layout) for t in tasks.VTV[:2]}
    vectors = TaskVectors.collect(model, prompts, progress=False)
    space = PatchSpace(model)
    result = SearchResult(
        "random", PatchSet.random(space, 9), torch.zeros(len(space)).double(), False, 1.0, 1, (), {}, 0
    )
    bundles.Bundle(vectors, dict.fromkeys(vectors, result), model=str(folder / "model")).save(folder / "run")
    return folder


@pytest.mark.parametrize(
    ("options", "shown"), [([], 5), (["--example", SUPPORT], 6), (["--example", SUPPORT, QUERY], 5)]
)
def test_prompt_with_vectors_answers_in_a_strip(vtv, tmp_path, bundle, options, shown):
    out, full = tmp_path / "strip.png", tmp_path / "strip-full.png"
    args = ("prompt", "--vectors", bundle / "run", "--task", "lowlight", *options, "--query", QUERY)
    code, printed, _ = vtv(*args, "--scale", 20, "-o", out)
    assert code == 0 and printed.endswith(f"wrote {full}\nwrote {out}\n")
    assert ("answer carried over" in printed) == (len(options) < 3)
    with Image.open(out) as strip, Image.open(full) as carried, Image.open(QUERY) as query:
        assert strip.width == 22 + 342 * shown and carried.size == query.size
        lefts = (strip.width - 342 * place for place in (1, 2))
        last, before = (np.asarray(strip.crop((left, 80, left + 320, strip.height - 22))) for left in lefts)
    assert (last != before).any()
    assert vtv(*args, "--scale", 0, "-o", out)[0] == 0
    with Image.open(out) as strip:
        lefts = (strip.width - 342 * place for place in (2, 4 if options[1:] else 3))
        patched, before = (np.asarray(strip.crop((left, 80, left + 320, strip.height - 22))) for left in lefts)
    assert (patched == before).all() or len(options) > 1


def test_prompt_names_its_file_and_answers_the_packages_photograph(vtv, tmp_path, bundle, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = vtv("prompt", "--vectors", bundle / "run", "--task", "segmentation", "--query", "sample")
    assert (code, printed) == (0, "wrote sample-segmentation-full.png\nwrote sample-segmentation.png\n")


def test_prompt_with_vectors_of_another_model_is_refused(vtv, tmp_path, bundle, checkpoint):
    args = ("prompt", "--query", QUERY, "-o", tmp_path / "strip.png", "--vectors")
    code, _, complaint = vtv(*args, bundle / "run", "--model", checkpoint)
    assert code == 1 and "does not fit this model: it has encoder layers" in complaint and complaint.count("\n") == 1
    complaint = vtv(*args, bundle / "run", "--task", "edges")[2]
    assert complaint.startswith("Error: the bundle of") and "nothing of 'edges'; choose from segmentation" in complaint
    assert "there is no --example" in vtv("prompt", "--query", QUERY, "-o", tmp_path / "x.png")[2]


@pytest.mark.nightly
@pytest.mark.parametrize("script", ["odd_commands.py", "damaged_runs.py"])
def test_odd_lines_and_damaged_files_end_in_a_sentence(script):
    """A part of what the scripts do whole."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), "--count", "60"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_a_wide_table_fits_a_terminal_and_stays_markdown_in_a_file(capsys, monkeypatch):
    columns = [f"a long heading {number}" for number in range(12)]
    table = "\n".join(["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * 12, ["0.123"] * 12)])
    say("Scores:\n\n" + table)
    assert table in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "180")
    say("Scores:\n\n" + table)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 100 and not any("|" in line for line in lines)


def test_progress_says_how_long_is_left(capsys):
    for _ in progress_bar(range(3), mininterval=0):
        pass
    assert "00:00 left" in capsys.readouterr().err
