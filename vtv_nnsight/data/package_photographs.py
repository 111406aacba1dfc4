"""Real photographs, carried inside the wheels of scikit-image, scikit-learn and matplotlib: nothing is downloaded.

`PHOTOGRAPHS` lists them with their licences. The documents, drawings and scientific measurements beside them are left
out, and so are photographs that come without terms.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Features, Image, Value

from vtv_nnsight.data.checks import check_split

SPLITS = ("train", "test")
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}


class Photograph(NamedTuple):
    """Where a photograph lies, on what terms, and in which split."""

    module: str
    file: str
    licence: str
    split: str
    grey: bool = False


PHOTOGRAPHS = {
    "astronaut": Photograph("skimage", "data/astronaut.png", "public domain (NASA)", "train"),
    "hubble": Photograph("skimage", "data/hubble_deep_field.jpg", "public domain (NASA)", "train"),
    "ihc": Photograph("skimage", "data/ihc.png", "no known restrictions (CMMI)", "train"),
    "retina": Photograph("skimage", "data/retina.jpg", "CC0 (Mikael Häggström)", "train"),
    "rocket": Photograph("skimage", "data/rocket.jpg", "public domain (SpaceX)", "train"),
    "china": Photograph("sklearn", "datasets/images/china.jpg", "CC BY 2.0 (danielbuechele, Flickr)", "train"),
    "flower": Photograph("sklearn", "datasets/images/flower.jpg", "CC BY 2.0 (vultilion, Flickr)", "train"),
    "brick": Photograph("skimage", "data/brick.png", "CC0 (CC0Textures)", "train", grey=True),
    "camera": Photograph("skimage", "data/camera.png", "CC0 (Lav Varshney)", "train", grey=True),
    "clock": Photograph("skimage", "data/clock_motion.png", "public domain (Stefan van der Walt)", "train", grey=True),
    "coins": Photograph("skimage", "data/coins.png", "no known restrictions (Brooklyn Museum)", "train", grey=True),
    "grass": Photograph("skimage", "data/grass.png", "CC0 (linolafett, DeviantArt)", "train", grey=True),
    "gravel": Photograph("skimage", "data/gravel.png", "CC0 (CC0Textures)", "train", grey=True),
    "chelsea": Photograph("skimage", "data/chelsea.png", "CC0 (Stefan van der Walt)", "test"),
    "coffee": Photograph("skimage", "data/coffee.png", "CC0 (Rachel Michetti)", "test"),
    "hopper": Photograph(
        "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "public domain (United States Navy)", "test"
    ),
}


def photographs(split: str | None = None, *, grey: bool = True) -> Dataset:
    """The photographs of a split ("train" or "test"; None is both), with columns image (RGB), name and source.

    The embedded model has learned from those of scikit-image and scikit-learn, whichever split they are in.
    `grey=False` leaves out those that have no colour, from which colorization cannot be learned.
    """
    check_split(split, (None, *SPLITS))
    names = [n for n, p in PHOTOGRAPHS.items() if split in (None, p.split) and (grey or not p.grey)]
    files = [{"bytes": _read(PHOTOGRAPHS[name]), "path": None} for name in names]
    sources = [f"{PACKAGES[p.module]}, {p.file}: {p.licence}" for p in map(PHOTOGRAPHS.__getitem__, names)]
    features = Features(image=Image(mode="RGB"), name=Value("string"), source=Value("string"))
    return Dataset.from_dict({"image": files, "name": names, "source": sources}, features)


def _read(photograph: Photograph) -> bytes:
    spec = find_spec(photograph.module)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(
            f"The photographs need {PACKAGES[photograph.module]}, which is not installed: "
            "pip install vtv-nnsight[pretraining]"
        )
    return Path(spec.submodule_search_locations[0], photograph.file).read_bytes()
