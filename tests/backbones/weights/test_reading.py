"""Weight files are read by what they hold, whatever they are called, and refused with what is wrong with them."""

import argparse
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dist_vpt.backbones.weights.loading import load_into, read_weights
from dist_vpt.errors import WeightsError

TENSORS = {"blocks.0.a": torch.arange(3.0), "blocks.1.a": torch.ones(2, 2, dtype=torch.bfloat16)}
MakeVit = Callable[..., VisionTransformer]
NAMES = ("w.safetensors", "W.SAFETENSORS", "w.pth", "w.bin", "w.npz", "w")


def write(tensors: dict[str, Tensor], path: Path, stored: str) -> None:
    if stored == "safetensors":
        save_file(tensors, path)
    elif stored == "numpy":
        with open(path, "wb") as opened:
            np.savez(opened, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        with open(path, "wb") as opened:
            torch.save(tensors, opened, _use_new_zipfile_serialization=stored == "torch")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stored", ["safetensors", "numpy", "torch", "torch, legacy"])
def test_the_name_of_a_file_does_not_matter(stored: str, name: str, tmp_path: Path) -> None:
    tensors = {key: tensor.float() if stored == "numpy" else tensor for key, tensor in TENSORS.items()}
    write(tensors, tmp_path / name, stored)
    found = read_weights(tmp_path / name).tensors
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in tensors.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mark", [b"\x80", b"PK"])
def test_a_header_whose_length_looks_like_another_format(mark: bytes, name: str, tmp_path: Path) -> None:
    """The file starts with the length as a number, in which any two bytes may come first."""
    save_file(TENSORS, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    length = next(n for n in range(end, 2**16) if n.to_bytes(8, "little").startswith(mark))
    header = content[8:end].ljust(length)  # the format allows spaces at its end
    (tmp_path / name).write_bytes(length.to_bytes(8, "little") + header + content[end:])
    found = read_weights(tmp_path / name).tensors
    assert {key: found[key].tolist() for key in found} == {key: tensor.tolist() for key, tensor in TENSORS.items()}


def test_an_index_of_several_files(tmp_path: Path) -> None:
    names = {"blocks.0.a": "model-00001-of-00002.safetensors", "blocks.1.a": "model-00002-of-00002.safetensors"}
    for key, name in names.items():
        save_file({key: TENSORS[key]}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": names}))
    found = read_weights(index).tensors
    assert {key: found[key].tolist() for key in found} == {key: tensor.tolist() for key, tensor in TENSORS.items()}
    (tmp_path / names["blocks.1.a"]).unlink()
    with pytest.raises(WeightsError, match=r"lists model-00002-of-00002\.safetensors, and there is no such file"):
        read_weights(index)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{", '{"width": 64}'])
def test_json_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"config\.json: JSON, and not an index of safetensors files"):
        read_weights(tmp_path / "config.json")


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/index.json").write_text(json.dumps({"weight_map": {"blocks.0.a": "../a.safetensors"}}))
    with pytest.raises(WeightsError, match="there is no such file beside it"):
        read_weights(tmp_path / "in/index.json")


def test_numbers_of_numpy_beside_the_tensors_are_read_past(tmp_path: Path) -> None:
    scores = {"top1": np.float64(3.5), "epoch": np.int64(4), "loss": np.float32(1), "args": argparse.Namespace(lr=1)}
    torch.save({"model": TENSORS, **scores}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").tensors.keys() == TENSORS.keys()


class _Made:
    """Pickled as a call, and a state."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_no_type_of_numpy_is_made_of_a_pickle(tmp_path: Path) -> None:
    """A forged type takes bytes of the file for objects: making it would crash this process."""
    state = (3, "<", (_Made(np.dtype, ("O",)), (2,)), None, None, -1, -1, 0)
    forged = _Made(np.dtype, ("f8", False, True), state)
    scalar: Any = np.float64(0).__reduce__()[0]
    number = _Made(scalar, (_Made(np.dtype, ([("a", forged), ("b", "f8")],)), b"A" * 64))
    torch.save({**TENSORS, "x": _Made(OrderedDict, (number,))}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="Pickled objects are never executed"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("length", [384, 640, 31520])
def test_a_header_s_length_that_looks_like_something_else(length: int, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w", {"a": ""})
    bare = int.from_bytes((tmp_path / "w").read_bytes()[:8], "little")
    for filling in range(length):
        save_file(TENSORS, tmp_path / "w", {"a": "x" * max(0, length - bare - 8 + filling)})
        if int.from_bytes((tmp_path / "w").read_bytes()[:8], "little") >= length:
            break
    assert int.from_bytes((tmp_path / "w").read_bytes()[:8], "little") == length
    assert read_weights(tmp_path / "w").tensors.keys() == TENSORS.keys()


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-200])
    with pytest.raises(WeightsError, match=r"w\.pth: .*the file is cut off; download it again"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "w.pth")
    (tmp_path / "w.pth").chmod(0)
    with pytest.raises(WeightsError, match=r"w\.pth: cannot be read \(Permission denied\); correct its permissions"):
        read_weights(tmp_path / "w.pth")


def test_an_address(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="an address; download the file and name it"):
        read_weights(Path("https://example.org/w.pth"))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to_sparse(), "blocks.1.a is stored as sparse_coo; save it as a dense tensor"),
        (lambda tensor: tensor.to("meta"), "blocks.1.a has no values"),
    ],
)
def test_tensors_that_are_no_plain_ones(change, message: str, tmp_path: Path) -> None:
    torch.save({**TENSORS, "blocks.1.a": change(TENSORS["blocks.1.a"])}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "w.pth")


def test_weights_of_nothing_but_zeros(tiny_vit: MakeVit, tmp_path: Path) -> None:
    torch.save({name: torch.zeros_like(tensor) for name, tensor in tiny_vit().state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="all weights are 0; download the file again"):
        load_into(tiny_vit(), tmp_path / "w.pth", lenient=False)


def test_a_torchscript_archive_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this way of saving is old
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "a.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(WeightsError, match="a TorchScript archive, which is a program"):
            read_weights(tmp_path / "a.pt")
