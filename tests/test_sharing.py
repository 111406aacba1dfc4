"""Bundles on the Hub, against a server of this machine that speaks what is used of its HTTP interface: making a
repository, committing files, telling what it holds, handing files out."""

import base64
import hashlib
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
import torch

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, data, tasks
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.runs import bundles
from vtv_nnsight.search.result import SearchResult

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories are dicts of files, in `server.repositories`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(self.path.partition("?")[0])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.address}/{name}", "id": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[repository][line["value"]["path"]] = content
            return self.answer({"commitUrl": f"{self.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer({"error": f"no {path}"}, 404)

    def do_GET(self, content=True):
        path = unquote(self.path.partition("?")[0])
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = self.server.repositories.get("/".join(parts[2:4]))
            if files is None:
                return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if "tree" in parts:
                return self.answer([
                    {"type": "file", "path": name, "size": len(value), "oid": hashlib.sha1(value).hexdigest()}
                    for name, value in files.items()
                ])  # fmt: skip
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings, "private": False})
        if parts[2:3] == ["resolve"]:
            value = self.server.repositories.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if value is not None:
                told = {"ETag": f'"{hashlib.sha1(value).hexdigest()}"', "X-Repo-Commit": COMMIT}
                return self.answer(value if content else b"", 200, told | {"Content-Length": str(len(value))})
        return self.answer({"error": f"no {path}"}, 404, {"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self):
        return self.do_GET(content=False)

    @property
    def address(self):
        return "http://{}:{}".format(*self.server.server_address)

    def answer(self, content, status=200, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories on a Hub of this machine's own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = "http://{}:{}".format(*server.server_address)
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": address,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    yield server.repositories
    server.shutdown()


@pytest.fixture(scope="module")
def model(small_config):
    torch.manual_seed(0)
    return MAEVQGAN(MAEVQGANModel(small_config()))


@pytest.fixture(scope="module")
def bundle(model):
    rows = data.scenes("train", n=24, seed=0)
    prompts = {t.name: t.prompts(rows, 3, layout=model.layout) for t in (tasks.segmentation, tasks.lowlight)}
    vectors, space = TaskVectors.collect(model, prompts, progress=False), PatchSpace(model)
    found = {
        name: SearchResult("random", PatchSet.random(space, 5 + seed), torch.zeros(len(space)).double(), False, 1.0, 1,
                           (), {}, seed)
        for seed, name in enumerate(vectors)
    }  # fmt: skip
    return bundles.Bundle(vectors, found, "scenes", "somebody/mae-vqgan")


def test_a_bundle_goes_to_the_hub_and_comes_back(hub, bundle, model, tmp_path):
    (tmp_path / "table.md").write_text("| measured |\n")
    (tmp_path / "answers.png").write_bytes(b"\x89PNG")
    address = replace(bundle, folder=tmp_path).push_to_hub("me/vectors", licence="mit", token="hf_mine")
    assert address.endswith(f"/me/vectors/commit/{COMMIT}")
    assert set(hub["me/vectors"]) == {
        "README.md", "answers.png", "bundle.json", "table.md", "vectors.safetensors", "search/lowlight.safetensors",
        "search/segmentation.safetensors",
    }  # fmt: skip
    card = hub["me/vectors"]["README.md"].decode()
    assert "license: mit" in card and "| segmentation | 3 | 5 of 22 |" in card and "| measured |" in card
    assert "](answers.png)" in card and '"weights"' in card and "Model: `somebody/mae-vqgan`" in card
    again = bundles.load("hub:me/vectors")
    assert list(again) == list(bundle) and again.name == "me/vectors" and again.model == "somebody/mae-vqgan"
    for task in bundle:
        assert again[task][1] == bundle[task][1]
        for stage, mean in bundle[task][0].mean.items():
            torch.testing.assert_close(again[task][0].mean[stage], mean, equal_nan=True)
    again.check(model)


@pytest.mark.slow
def test_a_runs_model_is_read_with_its_tokenizer(hub, bundle, split_checkpoint, checkpoint, tmp_path):
    path, vqgan = map(str, split_checkpoint)
    replace(bundle, model=path, vqgan=vqgan).save(tmp_path)
    found = bundles.load(tmp_path)
    assert "vqgan" in found.load_model().network._modules
    assert "vqgan" in found.load_model(str(checkpoint)).network._modules  # which has its own
    with pytest.raises(ValueError, match="has no tokenizer"):
        found.load_model(path)
    found.push_to_hub("me/vectors", token="hf_mine")
    again = bundles.load("hub:me/vectors")
    assert (again.model, again.vqgan) == (path, vqgan)


def test_a_bundle_of_another_model_is_refused_by_name(hub, bundle, small_config):
    bundle.push_to_hub("me/vectors", token="hf_mine")
    torch.manual_seed(1)
    other = MAEVQGAN(MAEVQGANModel(small_config()))
    with pytest.raises(ValueError, match="the bundle of me/vectors does not fit this model: it has other weights"):
        bundles.from_hub("me/vectors").check(other)


def test_a_bundle_is_as_it_was_saved_or_refused(bundle, tmp_path):
    bundle.save(tmp_path)
    one, other = (tmp_path / "search" / f"{task}.safetensors" for task in ("segmentation", "lowlight"))
    whole = one.read_bytes()
    for content, words in ((other.read_bytes(), "not as it was written"), (None, "is missing"), (b"", "not as it was")):
        one.unlink() if content is None else one.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=f"segmentation.safetensors.*{words}"):
            bundles.load(tmp_path)
        one.write_bytes(whole)
    assert list(bundles.load(tmp_path)) == list(bundle)
    (tmp_path / "bundle.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no run.json, which says what is in it"):
        bundles.load(tmp_path)


def test_a_repository_that_is_not_there_or_no_bundle(hub):
    with pytest.raises(OSError, match="me/nothing"):
        bundles.from_hub("me/nothing")
    hub["me/other"] = {"README.md": b"something else"}
    with pytest.raises(OSError, match="^me/other on the Hub has no vectors.safetensors"):
        bundles.from_hub("me/other")
