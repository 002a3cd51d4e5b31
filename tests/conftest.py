"""What all tests share: no network, one thread, a fresh Accelerate for each test, tiny backbones, cheap tiny runs."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer

torch.set_num_threads(1)
LONGEST = ("slurm", "distributed", "slow")  # marks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: what is left at the end is short, so that all processes end together."""
    places: dict[Path, int] = {}
    for item in items:
        marks = [LONGEST.index(mark.name) for mark in item.iter_markers() if mark.name in LONGEST]
        places[item.path] = min([places.get(item.path, len(LONGEST)), *marks])
    items.sort(key=lambda item: places[item.path])


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in classes: what one test set is not the next one's."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
        state.PartialState._reset_state()


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Each run collects garbage: it need not look for some among all that was imported, which takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def blank_figures() -> Iterator[None]:
    """Drawing a test split takes longer than a tiny run: figures are written, but empty.

    A file that looks at them, or at a run as a whole, has a fixture of this name that does nothing.
    """
    logger = sys.modules.get("dist_vpt.training.logger")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("confusion_figure", "mistakes_figure"):
            if logger is not None:
                patch.setattr(logger, name, lambda *_: Figure(figsize=(0.1, 0.1)))
        yield


@pytest.fixture(scope="module")
def on_the_cpu() -> Iterator[None]:
    """Hides the GPU from this process and those that it forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        yield


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All float32 products of linear layers on the CPU are oneDNN's, small ones too."""
    from dist_vpt.backbones import products

    monkeypatch.setattr(products, "_switch", {"onednn": True})
    monkeypatch.setattr(products, "LEAST", 0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for a tenth of the digits: 100 images to train on, 20 of val and 59 of test."""
    from tests.running import few_digits

    return few_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a text file below tmp_path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


@pytest.fixture
def tiny_vit() -> Callable[..., VisionTransformer]:
    """Makes random ViTs: 2 blocks of width 8 on 4 x 4 patches of 4 pixels, but for what is said otherwise."""

    def make(seed: int = 0, **changes: object) -> VisionTransformer:
        torch.manual_seed(seed)
        shape = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 0}
        vit = VisionTransformer(**(shape | changes))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.normal_()
        return vit

    return make
