"""What a search asks of an objective, what it keeps in its journal, and the registry: without a model."""

import base64
import inspect
import json

import pytest
import torch

from vtv_nnsight import search
from vtv_nnsight.digests import tensor_digest
from vtv_nnsight.search.registry import algorithm


class Coins:
    """An objective of the test's own: coins that are worth `target` (known: all, and no debt); no model, no patches."""

    def __init__(self, prompts=8):
        self.space = search.NamedUnits(["debt", "2c", "5c", "10c", "20c", "50c"])
        self.worth = torch.tensor([-10.0, 2.0, 5.0, 10.0, 20.0, 50.0])
        self.target, self.asked = 87.0, 0
        self.train, self.held_out = torch.arange(prompts), prompts + torch.arange(3)
        self.group = torch.zeros(prompts + 3, dtype=torch.long)

    def losses(self, gates, rows):
        return ((gates @ self.worth - self.target) / 10).square() + rows / 100

    def __call__(self, choices, rows):
        self.asked += len(rows)
        return self.losses(choices.float(), rows)


class SmoothCoins(Coins):
    def gradient(self, gates, rows):
        gates = gates.clone().requires_grad_()
        losses = self.losses(gates, rows)
        return losses.detach(), torch.autograd.grad(losses.sum(), gates)[0]


def options_of(algorithm, space):
    """What an algorithm cannot do without here."""
    return {"scores": torch.arange(len(space)).float()} if algorithm.needs_scores else {}


@pytest.mark.parametrize("name", search.ALGORITHMS)
def test_every_algorithm_runs_on_an_objective_without_a_model(name, tmp_path):
    algorithm, objective = search.ALGORITHMS[name], SmoothCoins()
    options = options_of(algorithm, objective.space)
    result = algorithm.on(objective, budget=3000, seed=0, progress=False, **options)
    assert list(result.patches) == ["2c", "5c", "10c", "20c", "50c"]
    assert result.held_out_loss == pytest.approx(0.09)
    result.save(tmp_path / "result.safetensors")
    loaded = search.SearchResult.load(tmp_path / "result.safetensors")
    assert loaded.patches == result.patches and list(loaded.patches) == list(result.patches)
    assert torch.equal(loaded.scores, result.scores) and repr(loaded) == repr(result)
    assert "2c" in loaded.patches and "debt" not in loaded.patches


@pytest.mark.parametrize("name", search.ALGORITHMS)
def test_only_those_that_say_so_need_a_gradient(name):
    algorithm, objective = search.ALGORITHMS[name], Coins()
    options = options_of(algorithm, objective.space)
    if algorithm.needs_gradient:
        with pytest.raises(AttributeError, match="no attribute 'gradient'"):
            algorithm.on(objective, progress=False, **options)
    else:
        assert algorithm.on(objective, budget=3000, progress=False, **options).evaluations == objective.asked


def test_an_objective_that_lacks_something_is_refused():
    objective = Coins()
    del objective.group, objective.train
    with pytest.raises(AttributeError, match="no attribute '(train|group)'"):
        search.greedy.on(objective, progress=False)

    class Wrong(Coins):
        def losses(self, gates, rows):
            return super().losses(gates, rows).mean()

    with pytest.raises(RuntimeError, match="invalid for input of size 1"):
        search.greedy.on(Wrong(), images=1, start=0.002, progress=False)


def test_the_registry_says_what_an_algorithm_takes():
    for name, own in search.ALGORITHMS.items():
        assert own is getattr(search, name) and own.name == name == own.__name__
        assert own.description and "\n" not in own.description and own.description in repr(own)
        parameters = inspect.signature(own).parameters
        assert set(own.options) < set(parameters) and "vectors" in parameters
        assert own.takes_size == ("size" in parameters) and own.needs_scores == ("scores" in parameters)
    with_gradient = {name for name, own in search.ALGORITHMS.items() if own.needs_gradient}
    assert with_gradient == {"attribution", "consistent_attribution", "gates"}


def test_a_new_algorithm_takes_a_decorator(monkeypatch):
    monkeypatch.setattr("vtv_nnsight.search.registry.ALGORITHMS", known := dict(search.ALGORITHMS))

    @algorithm("the same set whatever the loss")
    def everything(search, *, but: int):
        "All units but one."
        choices = torch.arange(search.units) != but
        search.validate(choices)
        return choices, choices.double()

    assert known["everything"] is everything and everything.__doc__ == "All units but one."
    assert everything.on(Coins(), but=0, progress=False).held_out_loss == pytest.approx(0.09)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'but'"):
        everything.on(Coins(), progress=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        everything.on(Coins(), but=0, size=3, progress=False)


def test_gates_and_attribution_find_more_with_their_options():
    """A ranking by the slope at nothing patched is misled where a unit's worth depends on the others'."""

    class Bait(SmoothCoins):
        def losses(self, gates, rows):
            bait = gates[:, 0]
            return super().losses(gates, rows) - 40 * bait + 120 * bait.square()

    straight, bent = (search.attribution.on(Bait(), steps=n, progress=False) for n in (1, 16))
    assert straight.scores[0] == pytest.approx(40 - 17.4, abs=0.01)
    assert bent.scores[0] < 0 < bent.scores[1:].min()
    started = search.gates.on(SmoothCoins(), start="attribution", budget=1200, images=4, progress=False)
    assert list(started.patches) == ["2c", "5c", "10c", "20c", "50c"]
    with pytest.raises(ValueError, match="start='best' is unknown"):
        search.gates.on(SmoothCoins(), start="best", progress=False)


# Journals


@pytest.fixture
def journal(tmp_path):
    """The lines of a journal that a search has written, and a function that resumes from lines."""
    path = tmp_path / "search.jsonl"
    search.greedy.on(Coins(), budget=1000, resume=path, progress=False)
    lines = path.read_bytes().splitlines(keepends=True)

    def resume(lines, objective=None):
        path.write_bytes(b"".join(lines))
        return search.greedy.on(objective or Coins(), budget=1000, resume=path, progress=False)

    return lines, resume


def changed(line, **fields):
    return json.dumps(json.loads(line) | fields).encode() + b"\n"


def encoded(*values):
    return base64.b64encode(torch.tensor(values, dtype=torch.float64).numpy().tobytes()).decode()


@pytest.mark.parametrize(
    "damage",
    [
        {"values": encoded(1.0, 2.0)},
        {"values": ""},
        {"values": "!!!"},
        {"values": "AAAA"},
        {"values": 3},
        {"values": None},
        {"count": 0},
        {"count": -4},
        {"count": True},
        {"count": "many"},
        {"count": 10**30},
        {"seconds": "soon"},
        {"seconds": None},
        {"seconds": float("nan")},
        {"query": 7},
    ],
)
def test_a_damaged_answer_is_named(journal, damage):
    lines, resume = journal
    with pytest.raises(ValueError, match="search.jsonl is damaged at line 2; remove it"):
        resume([lines[0], changed(lines[1], **damage), *lines[2:]])


@pytest.mark.parametrize(
    "line", [b"\n", b"[1, 2]\n", b"null\n", b"\xff\xfe\n", b'{"query": "a"}\n', b"[" * 9999 + b"\n"]
)
def test_a_damaged_line_is_named(journal, line):
    lines, resume = journal
    with pytest.raises(ValueError, match="search.jsonl is damaged at line 3; remove it"):
        resume([*lines[:2], line, *lines[3:]])


def test_changed_values_are_noticed_by_their_checksum(journal):
    lines, resume = journal
    count = json.loads(lines[1])["count"]
    values = torch.zeros(count, dtype=torch.float64)
    with pytest.raises(ValueError, match="damaged at line 2"):
        resume([lines[0], changed(lines[1], values=encoded(*values.tolist())), *lines[2:]])
    for value in (float("nan"), float("inf")):
        values[0] = value
        damaged = changed(lines[1], values=encoded(*values.tolist()), checksum=tensor_digest(values))
        with pytest.raises(ValueError, match="damaged at line 2"):
            resume([lines[0], damaged, *lines[2:]])


@pytest.mark.parametrize("line", [b'{"vtv search": 3}\n', b'{"other": {}}\n', b"[]\n", b"7\n", b"\xff\n"])
def test_a_file_that_is_no_journal_is_named(journal, line):
    lines, resume = journal
    with pytest.raises(ValueError, match=r"search.jsonl is not the journal of a search \(line 1\)"):
        resume([line, *lines[1:]])


def test_a_journal_of_another_search_names_what_differs(journal, tmp_path):
    lines, resume = journal
    header = json.loads(lines[0])["vtv search"]
    other = json.dumps({"vtv search": header | {"flips": 9}}).encode() + b"\n"
    with pytest.raises(ValueError, match="is of another search: its flips is 9, this one's 1"):
        resume([other, *lines[1:]])
    objective = Coins()
    objective.fingerprint = {"space": {"sizes": 1, "kind": "coins"}}
    with pytest.raises(ValueError, match="its space is None, this one's"):
        resume(lines, objective)
    nested = json.dumps({"vtv search": header | {"space": {"sizes": 2, "kind": "coins"}}}).encode() + b"\n"
    with pytest.raises(ValueError, match="its space sizes is 2, this one's 1"):
        resume([nested, *lines[1:]], objective)
    swapped = [lines[0], lines[2], lines[1], *lines[3:]]
    with pytest.raises(ValueError, match="answers other questions than this search asks, from answer 1 on"):
        resume(swapped)


def test_a_journal_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path} is a folder and a file was to be written there"):
        search.greedy.on(Coins(), resume=tmp_path, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="there is no folder .*file to write search.jsonl in"):
        search.greedy.on(Coins(), resume=tmp_path / "file" / "search.jsonl", progress=False)


def test_a_loss_that_is_not_a_number_is_not_kept(tmp_path):
    class Broken(Coins):
        def losses(self, gates, rows):
            return super().losses(gates, rows).where(rows != 2, torch.nan)

    path = tmp_path / "search.jsonl"
    for objective in (Broken(), Broken()):
        with pytest.raises(ValueError, match="a loss is nan"):
            search.greedy.on(objective, budget=1000, resume=path, progress=False)
    assert len(path.read_bytes().splitlines()) == 1


# Results


def test_a_damaged_result_is_named(tmp_path):
    result = search.greedy.on(Coins(), budget=1000, progress=False)
    from vtv_nnsight.files import read_tensors, write_tensors

    path = tmp_path / "result.safetensors"
    result.save(path)
    tensors, metadata = read_tensors(path, "search result")
    for damage, message in (
        ((tensors | {"scores": torch.zeros(2)}, metadata), "scores of shape"),
        ((tensors | {"choices": torch.zeros(2)}, metadata), "choices of shape"),
        (({"scores": tensors["scores"]}, metadata), "lacks 'history'"),
        ((tensors, {"space": {}}), "search again"),
        ((tensors, metadata | {"shoe size": 44}), "search again"),
    ):
        write_tensors(path, "search result", *damage)
        with pytest.raises(ValueError, match=f"result.safetensors is no whole search result: .*{message}"):
            search.SearchResult.load(path)
