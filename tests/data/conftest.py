"""Small datasets on disk."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.data.splits import Splits

SaveImage = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes of shards are kept in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def save_image() -> SaveImage:
    """Writes an image file of one gray value per pixel column, and the folders above it."""

    def save(path: Path, value: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = size
        pixels = np.full((height, width, 3), value, np.uint8)
        pixels[:, :, 1] = np.arange(width)
        Image.fromarray(pixels).save(path)
        return path

    return save


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Splits]:
    """Opens tmp_path in a format."""

    def open_as(storage: str, **settings) -> Splits:
        settings = {"task": "mine", "format": storage, "root": str(tmp_path), **settings}
        return open_splits(DataConfig(**settings))

    return open_as


@pytest.fixture
def folders(tmp_path: Path, save_image: SaveImage) -> Path:
    """Class folders in train, val and test, with six different images of two classes each."""
    for s, split in enumerate(("train", "val", "test")):
        for k, name in enumerate(("cat", "dog")):
            for i in range(6):
                save_image(tmp_path / split / name / f"{i}.png", 60 * s + 20 * k + i)
    return tmp_path
