"""`dist-vpt backbones check` and a training come to the same verdict on a file, and say the same of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vpt.backbones.build import build, preprocessing_of
from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.cli.main import main
from dist_vpt.errors import WeightsError
from tests.backbones.published import File, file

__all__ = ["file"]  # a fixture
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row costs a model, if one without memory."""
    for name in ZOO.keys() - {"tiny"}:
        monkeypatch.delitem(ZOO, name)


def doubled(state: State) -> State:
    """Of twice the width, as far as names tell."""
    return {name: torch.cat([tensor, tensor], dim=-1) if tensor.ndim else tensor for name, tensor in state.items()}


def cast(dtype: torch.dtype) -> Callable[[State], State]:
    return lambda state: {n: tensor.to(dtype) if tensor.is_floating_point() else tensor for n, tensor in state.items()}


def with_prefix(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def moved(state: State) -> State:
    """What an average of other steps would be."""
    return {name: tensor + name.endswith("norm.bias") for name, tensor in state.items()}


SECOND = re.compile(r"(blocks\.|block_)1(?=[./])")  # block of a model or of a stage
BUFFERS = ("relative_position_index", "attn_mask", "qkv.bias")
CHANGES: dict[str, Callable[[State], Any]] = {
    "as published": lambda state: state,
    "half precision": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "another width": doubled,
    "a block less": lambda state: {name: tensor for name, tensor in state.items() if not SECOND.search(name)},
    "a block more": lambda state: state | {SECOND.sub(r"\g<1>2", name): tensor for name, tensor in state.items()},
    "a prefix": lambda state: with_prefix("backbone.", state),
    "a text model beside it": lambda state: (
        with_prefix("visual.trunk.", state) | {"text.transformer.layers.0.ln_1.weight": torch.ones(3)}
    ),
    "an average beside it": lambda state: {"model": state, "model_ema": moved(state)},
    "a damaged average beside it": lambda state: {"model": state, "model_ema": doubled(state)},
    "two that none is preferred of": lambda state: {"one": state, "two": moved(state)},
    "not finite": lambda state: state | {n: tensor / 0 for n, tensor in state.items() if n.endswith("norm.bias")},
    "other buffers": lambda state: {name: tensor + name.endswith(BUFFERS) for name, tensor in state.items()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_is_judged_as_training_judges_it(
    file: File, change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.pth"
    torch.save(CHANGES[change]({name: torch.tensor(array) for name, array in file.arrays().items()}), path)
    for entry in (None, "model_ema", "nothing") if "average" in change else (None,):
        code = main(["backbones", "check", str(path), *(["--entry", entry] if entry else [])])
        out, err = capsys.readouterr()
        backbone = BackboneConfig(name="tiny", weights=str(path), entry=entry)
        wants = preprocessing_of(backbone)
        try:
            _, report = build(backbone, image_size=wants.image_size, mean=wants.mean, std=wants.std)
        except WeightsError as error:
            assert code == 2, out
            reason = str(error).partition("\n")[2] or str(error)
            assert reason in err or "fits none of the short names" in err
        else:
            assert (code, err) == (0, "")
            assert all(note in out for note in report.notes)
            chosen = f" backbone.entry={entry}" if entry else ""
            assert f"loads strictly yes: backbone.name=tiny backbone.weights={path}{chosen}\n" in out
