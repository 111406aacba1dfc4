"""Files are whole, have the usual permissions, and are the same bytes for the same content."""

import os
import resource
import signal
import stat
import subprocess
import sys

import pandas as pd
import pytest
import torch
from PIL import Image

from vtv_nnsight import files
from vtv_nnsight.digests import bytes_digest, file_digest, json_digest, tensor_digest
from vtv_nnsight.evaluation import Table
from vtv_nnsight.files import read_json, read_tensors, replacing, write_json, write_picture, write_tensors, write_text
from vtv_nnsight.search.journal import Journal

TENSORS = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}


def test_permissions_are_those_of_new_files(tmp_path):
    (tmp_path / "mine").touch()
    usual = stat.S_IMODE((tmp_path / "mine").stat().st_mode)
    write_text(tmp_path / "text", "é")
    write_tensors(tmp_path / "tensors", "test", TENSORS, {})
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("text", "tensors")} == {usual}
    assert sorted(os.listdir(tmp_path)) == ["mine", "tensors", "text"]


@pytest.mark.slow
def test_the_same_content_is_the_same_bytes(tmp_path):
    """In several processes, each of which has its own order of hashes."""
    script = (
        "import sys, torch; from vtv_nnsight.files import write_tensors; "
        "write_tensors(sys.argv[1], 'kind', {'b': torch.arange(3.0), 'a': torch.ones(2, 2)}, {'x': 'é', 'y': [1]})"
    )
    for i in range(3):
        subprocess.run([sys.executable, "-c", script, tmp_path / str(i)], check=True)
    assert len({file_digest(tmp_path / str(i)) for i in range(3)}) == 1
    tensors, metadata = read_tensors(tmp_path / "0", "kind")
    assert metadata == {"x": "é", "y": [1]} and {n: t.tolist() for n, t in tensors.items()} == {
        n: t.tolist() for n, t in TENSORS.items()
    }


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "file"):
        raise RuntimeError
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder and a file was to be written"):
        write_text(tmp_path / "folder", "")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_text(tmp_path / "nowhere" / "file", "")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OSError, match=f"{path} is a device or a pipe"):
            write_text(path, "")
    for path in ("/proc/nothing", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=f"^{path} cannot be written: "):
            write_text(path, "")
    for make, words in (
        (tmp_path / "new" / "deeper", "there is no folder .*new to make deeper in"),
        (tmp_path / "pipe", "is no folder and a folder was to be written there"),
    ):
        with pytest.raises(OSError, match=words):
            files.make_folder(make)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


@pytest.mark.parametrize("write", [
    lambda path: write_text(path, "x" * 3_000_000),
    lambda path: write_tensors(path, "test", {"a": torch.ones(2_000_000)}, {}),
    lambda path: write_picture(path, Image.effect_noise((2000, 2000), 60).save),
    lambda path: Journal(path, {"x": "x" * 3_000_000}),
])  # fmt: skip
def test_a_full_disk_is_a_sentence_with_the_name(write, tmp_path):
    """A file may not grow over a limit, which the system refuses as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        with pytest.raises(OSError, match=r"^\S+file.png cannot be written: "):
            write(tmp_path / "file.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/text")
    write_text(tmp_path / "link", "a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "text").read_text() == "a"


def test_pictures_are_whole_and_of_the_kind_that_they_end_in(tmp_path):
    from matplotlib.figure import Figure

    image, figure = Image.new("RGB", (8, 8)), Figure()
    for save in (image.save, figure.savefig):
        for name, kind in (("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.tif", "TIFF"), ("a", "PNG")):
            write_picture(tmp_path / name, save)
            with Image.open(tmp_path / name) as written:
                assert written.format == kind
    write_picture(tmp_path / "a.svg", figure.savefig, dpi=50)
    assert "<svg" in (tmp_path / "a.svg").read_text()
    for save in (image.save, figure.savefig):
        with pytest.raises(ValueError, match="a.txt cannot be|Format 'txt' is not supported"):
            write_picture(tmp_path / "a.txt", save)

    def break_off(path, format):
        path.write_bytes(b"half")
        raise OSError("no space left")

    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OSError, match="no space left"):
        write_picture(tmp_path / "a.png", break_off)
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a", "a.JPG", "a.png", "a.svg", "a.tif"]


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "file"
    for metadata, words in (
        (None, "holds something else; expected test"),
        ({"kind": "other"}, "holds other; expected test"),
        ({"kind": "test", "facts": "{}"}, "is not as it was written"),
    ):
        save_file(TENSORS, path, metadata)
        with pytest.raises(ValueError, match=words):
            read_tensors(path, "test")
    write_tensors(path, "test", TENSORS, {})
    whole = path.read_bytes()
    for cut in (0, 7, 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            read_tensors(path, "test")
    path.write_bytes(whole.replace(b"[2,2]", b"[2,9]"))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        read_tensors(path, "test")
    with pytest.raises(ValueError, match="is a folder"):
        read_tensors(tmp_path, "test")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "nowhere", "test")


def test_every_bit_of_a_file_counts(tmp_path):
    """Of those that are read again: tensors, records and tables."""
    frame = pd.DataFrame(
        {"task": "a", "metric": "mse", "condition": ["b", "c"], "fold": 0, "image": [0, 1], "score": 0.5}
    )
    writers = {
        "tensors": (
            lambda path: write_tensors(path, "test", TENSORS, {"a": "é"}),
            lambda path: read_tensors(path, "test"),
        ),
        "record": (lambda path: write_json(path, {"a": [1, "é"]}), read_json),
        "table": (Table(frame).to_parquet, Table.load),
    }
    for name, (write, read) in writers.items():
        path = tmp_path / name
        write(path)
        read(path)
        whole = path.read_bytes()
        write(path)
        assert path.read_bytes() == whole
        for place in range(0, len(whole), 1 + len(whole) // 150):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=str(path)):
                read(path)
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=str(path)):
            read(path)
        path.write_bytes(whole)
    assert read_json(tmp_path / "record") == {"a": [1, "é"]}


def test_a_value_has_the_digest_of_its_copy():
    for values in (torch.tensor(3).expand(1), torch.arange(6).view(2, 3).T, torch.empty(0)):
        assert tensor_digest(values) == tensor_digest(values.clone(memory_format=torch.contiguous_format))


def test_digests_are_of_what_is_held(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file") == bytes_digest(b"abc") != bytes_digest(b"abd")
    values = torch.arange(6.0).view(2, 3)
    assert tensor_digest(values) == tensor_digest(values.T.contiguous().T) != tensor_digest(values.view(3, 2))
    assert (
        tensor_digest(values[:1, :1]) == tensor_digest(torch.zeros(()).expand(1, 1)) != tensor_digest(torch.zeros(()))
    )
    assert tensor_digest(values.bfloat16()) != tensor_digest(values) and tensor_digest(values[:0])
    assert json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1}) != json_digest({"a": 1})
