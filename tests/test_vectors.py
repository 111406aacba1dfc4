import json

import pytest
import torch
from helpers import LAYOUT, all_heads, random_module, random_prompts
from safetensors import safe_open
from safetensors.torch import save_file

from vtv_nnsight import MAEVQGAN, Layout, TaskVectors, files
from vtv_nnsight.layouts import positions
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig, MAEVQGANModel
from vtv_nnsight.vectors import TaskVector, zero_vector
from vtv_nnsight.vectors.compatibility import fingerprint

QUERY = positions(LAYOUT.regions["query"])


@pytest.fixture(scope="module")
def module():
    return random_module()


@pytest.fixture(scope="module")
def model(module):
    return MAEVQGAN(module)


@pytest.fixture(scope="module")
def prompts():
    return {"a": random_prompts(7, 1), "b": random_prompts(5, 2), "c": random_prompts(6, 3).query_only()}


@pytest.fixture(scope="module")
def vectors(model, prompts):
    return TaskVectors.collect(model, prompts, batch_size=4, progress=False)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_collecting_equals_two_passes_in_float64(model, prompts, batch_size):
    found = TaskVectors.collect(model, prompts, batch_size=batch_size, progress=False)
    for task, rows in prompts.items():
        assert found[task].count == len(rows)
        seen = ByStage(encoder=positions(rows.visible), decoder=positions(rows.decoded))
        for i, z in all_heads(model, rows).items():
            mean, variance = z.double().mean(1), z.double().var(1).mean(-1)
            torch.testing.assert_close(found[task].mean[i][:, seen[i]].double(), mean, rtol=0, atol=1e-5)
            torch.testing.assert_close(found[task].variance[i][:, seen[i]].double(), variance, rtol=1e-5, atol=1e-9)


def test_what_a_prompt_hides_is_absent(vectors):
    assert torch.equal(vectors["c"].present["encoder"].nonzero()[:, 0], QUERY)
    assert torch.equal(vectors["c"].present["decoder"].nonzero()[:, 0], positions(LAYOUT.query_band))
    assert (
        vectors["a"].present["decoder"].all()
        and not vectors["a"].present["encoder"][positions(LAYOUT.regions["output"])[1:]].any()
    )
    assert vectors["c"].mean["encoder"][:, 1].isnan().all() and vectors["c"].variance["encoder"][:, 1].isnan().all()
    assert torch.equal((vectors["a"] + vectors["c"]).present["encoder"], vectors["c"].present["encoder"])


def test_arithmetic(vectors):
    a, b, c = vectors.values()
    made = 2 * a - b / 4 + -a
    for i in a.mean:
        expected = a.mean[i] - b.mean[i] / 4
        torch.testing.assert_close(made.mean[i], expected, equal_nan=True)
    assert made.variance is None and made.count == 5 and "b" in made.task
    mean = vectors.mean().mean["decoder"]
    torch.testing.assert_close(mean, (a.mean["decoder"] + b.mean["decoder"] + c.mean["decoder"]) / 3, equal_nan=True)
    assert a.to(torch.float64).mean["encoder"].dtype == torch.float64
    with pytest.raises(TypeError):
        a * b


def test_score_equals_its_definition(model, prompts, vectors):
    heads = {task: all_heads(model, rows) for task, rows in prompts.items()}
    seen = {t: ByStage(encoder=positions(p.visible), decoder=positions(p.decoded)) for t, p in prompts.items()}
    scores, over_positions, over_heads = vectors.score(), vectors.score("position"), vectors.score("head")
    for stack, size in {"encoder": (3, 4), "decoder": (2, 2)}.items():
        shared = seen["c"][stack]
        assert torch.equal(scores[stack][0, 0].isfinite().nonzero()[:, 0], shared)
        between, within = torch.zeros(size[0], len(shared), size[1]), torch.zeros(size[0], len(shared), size[1])
        for p, position in enumerate(shared):
            z = [heads[t][stack][:, :, seen[t][stack] == position][:, :, 0].double() for t in prompts]
            between[:, p] = torch.stack([x.mean(1) for x in z]).var(0).mean(-1)
            within[:, p] = torch.stack([x.var(1).mean(-1) for x in z]).mean(0)
        torch.testing.assert_close(scores[stack][:, :, shared].mT, between / within, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(over_positions[stack], between.sum(1) / within.sum(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(over_heads[stack][:, shared], between.sum(2) / within.sum(2), rtol=1e-4, atol=1e-6)


def test_a_head_that_tells_tasks_apart_scores_high(vectors):
    planted = {}
    for i, (name, vector) in enumerate(vectors.items()):
        mean = vector.mean.map(torch.clone)
        mean["encoder"][1, :, 2] += 10 * i
        planted[name] = TaskVector(name, mean, vector.variance, vector.count, vector.fingerprint)
    scores = TaskVectors(planted).score()["encoder"]
    assert scores[1, 2, QUERY].min() > 10 * scores.nan_to_num(0).index_fill(1, torch.tensor(2), 0).max()


def test_score_needs_tasks_and_variance(model, vectors):
    with pytest.raises(ValueError, match="there is only a"):
        TaskVectors({"a": vectors["a"]}).score()
    with pytest.raises(ValueError, match="'b' has no variance"):
        TaskVectors(
            {"a": vectors["a"], "b": TaskVectors.collect(model, {"b": random_prompts(1)}, progress=False)["b"]}
        ).score()
    with pytest.raises(ValueError, match="over='token'"):
        vectors.score(over="token")


def test_save_and_load(vectors, tmp_path):
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    loaded = TaskVectors.load(path)
    assert list(loaded) == ["a", "b", "c"] and list(tmp_path.iterdir()) == [path]
    for name, vector in vectors.items():
        assert loaded[name].count == vector.count and loaded[name].fingerprint == vector.fingerprint
        for field in ("mean", "variance"):
            for one, other in zip(getattr(loaded[name], field).values(), getattr(vector, field).values()):
                assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_what_could_not_be_read_back_is_not_written(model, prompts, vectors, tmp_path):
    more = TaskVectors.collect(model, {"b": prompts["b"]}, sites=("heads", "mlp"), progress=False)
    for a, b in ((vectors["a"], more["b"]), (more["b"], vectors["a"])):
        with pytest.raises(ValueError, match="has the sites heads.*; collect the same"):
            TaskVectors({"a": a, "b": b})
    with pytest.raises(ValueError, match="the mean of 'a' is not finite in torch.float16"):
        TaskVectors({"a": 1e6 * vectors["a"]}).save(tmp_path / "v.safetensors", torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_task_of_vit_l_takes_less_than_20_megabytes(tmp_path):
    with torch.device("meta"):
        zero = zero_vector(MAEVQGAN(MAEVQGANModel(MAEVQGANConfig(vqgan_channels=32))))
    mean = zero.mean.map(lambda m: torch.zeros(m.shape))
    mean["encoder"][:, positions(Layout().regions["output"])[1:]] = torch.nan
    vector = TaskVector("a", mean, mean.map(lambda m: m.mean(-1)), 100, zero.fingerprint)
    TaskVectors({"a": vector}).save(tmp_path / "vit-l.safetensors")
    assert 17e6 < (tmp_path / "vit-l.safetensors").stat().st_size < 20e6


def test_files_that_are_not_whole_or_something_else(vectors, tmp_path):
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        TaskVectors.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="expected task vectors"):
        TaskVectors.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        TaskVectors.load(tmp_path / "nothing")


def damaged(path, change):
    """A file of vectors with changed tensors, metadata or description."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    facts = json.loads(metadata["facts"])
    change(tensors, facts)
    save_file(tensors, path, metadata | {"facts": json.dumps(facts), "digest": files.UNSEALED})
    files.seal(path)


def put(tensors, name, value):
    tensors[name].flatten()[3] = value


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, f: put(t, "b/decoder/mean", torch.nan), "b/decoder/mean holds nan"),
        (lambda t, f: put(t, "a/encoder/variance", torch.inf), "a/encoder/variance holds inf"),
        (lambda t, f: t.pop("a/decoder/present"), "it has no 'a/decoder/present'"),
        (lambda t, f: t.update({"c/encoder/mean": t["c/encoder/mean"][:, 1:].clone()}), "c/encoder/mean has shape"),
        (lambda t, f: t.update({"a/encoder/present": torch.ones(9**6, dtype=torch.bool)}), "a/encoder/mean has shape"),
        (lambda t, f: f.pop("counts"), "it has no 'counts'"),
        (lambda t, f: f.pop("fingerprint"), "it has no 'fingerprint'"),
        (lambda t, f: f.update(fingerprint=3), "holds no whole task vectors"),
        (lambda t, f: f["fingerprint"].update({"encoder layers": 10**9}), "has shape"),
        (lambda t, f: f["fingerprint"].update(canvas_size=8 * 10**9), "has shape"),
        (lambda t, f: f["counts"].update(d=3), "it has no 'd/encoder/mean'"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(vectors, tmp_path, change, message):
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    damaged(path, change)
    with pytest.raises(ValueError, match=message):
        TaskVectors.load(path)


def test_the_same_vectors_give_the_same_bytes(model, prompts, vectors, tmp_path):
    paths = [tmp_path / name for name in "ab"]
    vectors.save(paths[0])
    TaskVectors.collect(model, prompts, batch_size=4, progress=False).save(paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_write_that_fails_leaves_the_old_file(vectors, tmp_path, monkeypatch):
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    before = path.read_bytes()

    def half(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("vtv_nnsight.files.save_file", half)
    with pytest.raises(OSError, match="no space"):
        vectors.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_nan_activations_are_named(prompts):
    module = random_module()
    module.decoder.blocks[1].attn.qkv.bias.data[2 * 16 + 8 :] = torch.nan
    with pytest.raises(ValueError, match=r"decoder\.blocks\.1\.attn\.heads\[1\] is not finite"):
        TaskVectors.collect(MAEVQGAN(module), prompts, progress=False)


def test_bad_input(model, vectors, prompts):
    with pytest.raises(ValueError, match="no tasks"):
        TaskVectors.collect(model, {})
    with pytest.raises(ValueError, match="no prompts of 'b'"):
        TaskVectors.collect(model, {"a": prompts["a"], "b": prompts["a"][:0]})
    with pytest.raises(ValueError, match="collect each"):
        TaskVectors.collect(
            model, {"a": prompts["a"], "b": random_prompts(2, layout=Layout(112, 8, order="horizontal"))}
        )
    with pytest.raises(KeyError, match="choose from a, b, c"):
        vectors["lowlight"]
    with pytest.raises(ValueError, match="no task vectors"):
        TaskVectors({})
    for divisor in (float("inf"), 10**400, float("nan"), 0):
        with pytest.raises(ValueError, match="the factor is (inf|nan)"):
            vectors["a"] / divisor
    with pytest.raises(ValueError, match="the factor is inf"):
        10**400 * vectors["a"]
    for divisor in ("2", None, torch.ones(4)):
        with pytest.raises(TypeError, match="unsupported operand"):
            vectors["a"] / divisor


def test_vectors_of_other_models_and_layouts_do_not_mix(model, vectors):
    horizontal = TaskVectors.collect(
        model, {"h": random_prompts(2, layout=Layout(112, 8, order="horizontal"))}, progress=False
    )["h"]
    with pytest.raises(ValueError, match="'h' .* order 'horizontal', not 'vertical'"):
        vectors["a"] + horizontal
    other = TaskVectors.collect(MAEVQGAN(random_module(1)), {"o": random_prompts(2)}, progress=False)["o"]
    with pytest.raises(ValueError, match="other weights"):
        TaskVectors({"a": vectors["a"], "o": other})
    smaller = TaskVectors.collect(
        MAEVQGAN(random_module(num_hidden_layers=2)), {"s": random_prompts(2)}, progress=False
    )["s"]
    with pytest.raises(ValueError, match="encoder layers 2, not 3"):
        vectors["a"] - smaller


def test_another_dtype_is_the_same_model(module, vectors):
    half = MAEVQGAN(module, dtype=torch.bfloat16)
    found = TaskVectors.collect(half, {"a": random_prompts(7, 1)}, progress=False)["a"]
    assert found.mean["encoder"].dtype == torch.float32
    close = (found - vectors["a"]).mean["encoder"].nan_to_num(0).abs().max()
    assert 0 < close < 0.1


def test_a_lazy_model_is_loaded(module, tmp_path):
    module.save_pretrained(tmp_path)
    lazy = MAEVQGAN(tmp_path)
    assert "weights" not in fingerprint(lazy)
    assert "weights" in TaskVectors.collect(lazy, {"a": random_prompts(1)}, progress=False)["a"].fingerprint
    assert [stage.name for stage in lazy.stages] == ["encoder", "decoder"]
