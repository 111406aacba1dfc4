import os
import pickle

import numpy as np
import pytest
import torch
from helpers import make_config

from vtv_nnsight import MAEVQGAN, Layout, cli, tasks
from vtv_nnsight.layouts import positions
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig, MAEVQGANModel
from vtv_nnsight.patching import PatchSet, PatchSpace, patch
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.studies import released
from vtv_nnsight.vectors import TaskVectors


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    module = MAEVQGANModel(make_config()).eval()
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module


@pytest.fixture
def model(module):
    return MAEVQGAN(module)


@pytest.fixture(scope="module")
def prompts():
    canvas = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return VisualPrompt.from_canvas(canvas, Layout(64, 16))


@pytest.fixture
def vectors(model, prompts):
    return TaskVectors.collect(model, {"lowlight": prompts, "segmentation": prompts[:2]}, progress=False)


def projected(module, vector):
    """A vector as the released code keeps it: every head after its slice of the projection, with all of the bias."""
    stacks = []
    for stack, mean in vector.mean.items():
        present = vector.present[stack]
        layers = []
        for block, z in zip(getattr(module, stack.stage).blocks, mean[:, present]):
            slices = block.attn.proj.weight.unflatten(1, (z.shape[1], -1))
            layers.append(torch.einsum("thd,whd->thw", z, slices) + block.attn.proj.bias)
        stacks.append(torch.stack(layers)[:, None].detach())
    return [vector.count, *stacks]


@pytest.fixture
def folder(module, vectors, tmp_path):
    for name, task in (("lowlight_enhance", "lowlight"), ("segmentation", "segmentation")):
        with open(tmp_path / f"{name}_mean_activations.pkl", "wb") as file:
            pickle.dump(projected(module, vectors[task]), file)
    return tmp_path


def test_activations_are_recovered(model, vectors, folder):
    found, residuals = released.read_activations(model, folder)
    assert set(found) == {"lowlight", "segmentation"}
    for task, vector in found.items():
        assert vector.count == vectors[task].count and vector.variance is None
        assert vector.fingerprint == vectors[task].fingerprint
        for a, b in zip(vector.mean.values(), vectors[task].mean.values()):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, equal_nan=True)
        assert all(0 <= value < 1e-6 for value in residuals[task].values())


def test_imported_vectors_patch_as_ones_own_do(model, prompts, vectors, folder):
    imported = released.read_activations(model, folder / "segmentation_mean_activations.pkl")[0]
    chosen = PatchSet.random(PatchSpace(model, prompts.layout), 9)
    logits = []
    for vector in (imported["segmentation"], vectors["segmentation"]):
        with model.trace(prompts.query_only()):
            patch(model, vector, chosen)
            logits.append(model.output.logits.save())
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    with model.trace(prompts.query_only()):
        plain = model.output.logits.save()
    assert (logits[0] - plain).abs().max() > 0.01


def test_activations_in_half_precision_leave_a_residual(module, model, vectors, tmp_path):
    count, encoder, decoder = projected(module, vectors["lowlight"])
    for dtype, most in ((torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        with open(tmp_path / "inpaint_mean_activations.pkl", "wb") as file:
            pickle.dump([count, encoder.to(dtype), decoder.to(dtype)], file)
        found, residuals = released.read_activations(model, tmp_path)
        assert list(found) == ["inpainting"] and most / 100 < max(residuals["inpainting"].values()) < most


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_tensors_and_arrays_come_back_as_they_were(tmp_path, protocol):
    stored = {
        "tensor": torch.arange(24.0).reshape(2, 3, 4),
        "turned": torch.arange(6).reshape(2, 3).T[1:],
        "empty": torch.zeros(0, 3),
        "array": np.arange(6, dtype="<i8").reshape(2, 3),
        "big-endian": np.arange(3, dtype=">f4"),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "logits": [np.array(-1.0, np.float32), np.float64(0.5), (1, "two", None, True)],
    }
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(stored, protocol))
    found = released.load(path)
    for name, value in stored.items():
        if name == "logits":
            assert float(found[name][0]) == -1 and found[name][0].dtype == np.float32
            assert found[name][1:] == [0.5, [1, "two", None, True]]
        else:
            assert type(found[name]) is type(value) and found[name].shape == value.shape
            assert (found[name] == value).all() and found[name].dtype == value.dtype


class Hostile:
    """A pickle that calls something when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker):
    run = Hostile(os.system, f"touch {marker}")
    nested = pickle.dumps(run)
    yield "a bare call", run
    yield "among tensors", [5, torch.zeros(2), run]
    yield "in a dict key's place", {"a": [run]}
    yield "by eval", Hostile(eval, f"open({str(marker)!r}, 'w')")
    yield "in an object array", np.array([run], dtype=object)
    yield "inside a storage's bytes", Hostile(torch.storage._load_from_bytes, nested)
    yield "by pickle itself", Hostile(pickle.loads, nested)
    yield "by torch.load", Hostile(torch.load, str(marker))
    yield "by an attribute", Hostile(getattr, "text", "upper")


@pytest.mark.parametrize("i", range(9))
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, i, protocol):
    marker = tmp_path / "it ran".replace(" ", "_")
    name, content = list(hostile(marker))[i]
    path = tmp_path / "segmentation_mean_activations.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match="is truncated, damaged or no pickle: it (names|holds)"):
        released.load(path)
    assert not marker.exists(), name


def test_a_hostile_file_would_have_run(tmp_path):
    """The test above can fail."""
    for i, (_, content) in enumerate(hostile(tmp_path / "ran")):
        if i in (0, 3):
            pickle.loads(pickle.dumps(content))
            assert (tmp_path / "ran").exists()
            (tmp_path / "ran").unlink()


def test_stack_globals_by_hand_are_refused(tmp_path):
    path = tmp_path / "bernoullis_x.pkl"
    for text in (
        b"cposix\nsystem\n(S'true'\ntR.",
        b"cbuiltins\n__import__\n(S'os'\ntR.",
        b"ctorch._utils\nos.system\n.",
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="it names"):
            released.load(path)


def test_lists_that_hold_each_other_stay_shared(tmp_path):
    """Made empty and filled from the outside in, so that none is large when it is used."""
    text = b"".join(b"]q" + bytes([i]) + b"0" for i in range(100))
    text += b"".join(b"h" + bytes([i]) + b"(" + (b"h" + bytes([(i + 1) % 100])) * 10 + b"e0" for i in range(100))
    (tmp_path / "bernoullis_0.pkl").write_bytes(b"\x80\x02" + text + b"h\x00.")
    found = released.load(tmp_path / "bernoullis_0.pkl")
    assert len(found) == 10 and all(inner is found[0] for inner in found)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([torch.zeros(99)])[:-40]])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="truncated, damaged or no pickle"):
        released.load(tmp_path / "x.pkl")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    storage = torch.storage.TypedStorage([0.0] * 4, dtype=torch.float32, _internal=True)
    content = Hostile(torch._utils._rebuild_tensor_v2, storage, 0, (9, 9), (9, 1), False, {})
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="damaged"):
        released.load(tmp_path / "x.pkl")


def test_activations_that_do_not_fit_are_refused(module, model, folder, tmp_path):
    path = folder / "segmentation_mean_activations.pkl"
    count, encoder, decoder = released.load(path)
    for content, words in (
        ([count, encoder], "is not \\[count"),
        ([count, encoder[:1], decoder], r"encoder's activations are \[1, 1, 13, 4, 32\]; expected \[2, 1, 13, 4, 32\]"),
        ([count, encoder, decoder[:, :, :5]], r"decoder's activations are \[1, 1, 5, 2, 16\]"),
        ([count, torch.randn_like(encoder), decoder], "encoder's activations are not outputs of this model"),
        ([count, encoder * torch.nan, decoder], "encoder's activations are not all finite"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=words):
            released.read_activations(model, path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        released.read_activations(model, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no TASK_mean_activations.pkl"):
        released.read_activations(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="called neither"):
        released.find(__file__)


def write_logits(path, logits):
    path.write_bytes(pickle.dumps([np.array(float(value), np.float32) for value in logits]))
    return path


@pytest.mark.parametrize("granularity", ["head", "quadrant", "token"])
def test_patches_are_the_likely_units(model, tmp_path, granularity):
    space = PatchSpace(model, granularity=granularity)
    logits = torch.randn(len(space), generator=torch.Generator().manual_seed(0))
    path = write_logits(tmp_path / "bernoullis_1.pkl", logits)
    found = released.read_patches(model, path)
    assert found == PatchSet(space, logits > 0) and 0 < len(found) < len(space)
    drawn = [released.read_patches(model, path, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    shut = write_logits(path, [-1000.0] * (len(space) - 1) + [1000.0])
    assert list(released.read_patches(model, shut, seed=3)) == [space.names[-1]]


@pytest.mark.slow
def test_the_published_order_of_units(tmp_path):
    """Of the 1152 logits of the published model, stack, layer and head change slower than the place."""
    with torch.device("meta"):
        model = MAEVQGAN(MAEVQGANModel(MAEVQGANConfig()))
    logits = np.full(1152, -1.0)
    logits[[3 * 32 + 2 * 5 + 1, 768 + 2 * 48 + 3 * 7 + 2]] = 1
    found = released.read_patches(model, write_logits(tmp_path / "bernoullis_0.pkl", logits))
    assert list(found) == ["encoder.blocks.3.attn.heads[5] @ query", "decoder.blocks.2.attn.heads[7] @ output"]
    token = np.full(31872, -1.0)
    token[1200 + 0 * 50 + 2] = 1
    found = released.read_patches(model, write_logits(tmp_path / "bernoullis_0.pkl", token))
    second = positions(Layout().regions["query"])[2].item() - 1
    assert list(found) == [f"encoder.blocks.1.attn.heads[8] @ patch {second}"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([np.array(0.0)] * 7, "holds 7 logits; this model has 10 by head, 22 by quadrant"),
        ([np.array(np.nan)] * 10, "10 logits that are NaN"),
        ([np.zeros(2)] * 10, "is not a list of logits"),
        ({"a": 1}, "is not a list of logits"),
        (5, "is not a list of logits"),
    ],
)
def test_logits_that_do_not_fit_are_refused(model, tmp_path, content, words):
    path = tmp_path / "bernoullis_0.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=words):
        released.read_patches(model, path)


def test_from_the_command_line(module, model, vectors, folder, tmp_path, monkeypatch, capsys):
    module.save_pretrained(tmp_path / "model")
    logits = torch.randn(22, generator=torch.Generator().manual_seed(1))
    write_logits(folder / "bernoullis_0_1_best.pkl", logits)
    out = tmp_path / "imported"
    arguments = ["vtv", "import-released", str(tmp_path / "model"), str(folder), "-o", str(out)]

    def run():
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr()

    code, printed = run()
    assert code == 0 and "lowlight: 5 prompts, residual encoder" in printed.out
    found = TaskVectors.load(out / "vectors.safetensors")
    torch.testing.assert_close(
        found["lowlight"].mean["decoder"], vectors["lowlight"].mean["decoder"], atol=1e-5, rtol=1e-4, equal_nan=True
    )
    assert PatchSet.load(out / "bernoullis_0_1_best.json") == PatchSet(PatchSpace(model), logits > 0)

    (folder / "bernoullis_1.pkl").write_bytes(pickle.dumps(Hostile(os.system, "true")))
    code, printed = run()
    assert code == 1 and printed.err.startswith("Error: ") and "system" in printed.err and printed.err.count("\n") == 1


def test_names_of_released_tasks_are_tasks():
    assert all(tasks.get(name).name == name for name in released.TASKS.values())


@pytest.mark.slow
def test_the_released_files_give_the_released_numbers(golden, golden_model, tmp_path):
    """Golden logits of canvas a, patched with what canvas b's one-shot activations are, both read from files."""
    model = MAEVQGAN(golden_model)
    example, query = (VisualPrompt.from_canvas(golden[f"canvas_{name}"]) for name in "ba")
    vectors = TaskVectors.collect(model, {"segmentation": example}, progress=False)
    content = projected(golden_model, vectors["segmentation"])
    for name in (name for name in golden if name.startswith("b_heads_")):
        stack, layer = name.removeprefix("b_heads_").split("_")
        ours = content[1 if stack == "encoder" else 2][int(layer), 0]
        torch.testing.assert_close(ours, golden[name], atol=2e-5, rtol=0)
        ours.copy_(golden[name])
    (tmp_path / "segmentation_mean_activations.pkl").write_bytes(pickle.dumps(content))
    found, residuals = released.read_activations(model, tmp_path)
    assert max(residuals["segmentation"].values()) < 1e-5
    rank = Layout().index(Layout().query_band, Layout().regions["output"]) - 1
    for granularity in range(3):
        logits = 2.0 * golden[f"mask_g{granularity}"] - 1
        patches = released.read_patches(model, write_logits(tmp_path / "bernoullis_0.pkl", logits))
        with torch.no_grad(), model.trace(query.query_only()):
            patch(model, found["segmentation"], patches)
            output = model.output.logits.save()
        expected = golden[f"a_zero_shot_patched_g{granularity}_logits_q4"]
        torch.testing.assert_close(output[0, rank], expected, atol=2e-5, rtol=0)
