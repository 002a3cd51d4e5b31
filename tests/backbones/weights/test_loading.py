"""Weight files: every format gives the same model, nothing else is loaded, nothing is executed."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from dist_vpt.backbones.weights.convert import LoadReport
from dist_vpt.backbones.weights.loading import load_into, read_weights
from dist_vpt.errors import WeightsError

MakeVit = Callable[..., VisionTransformer]
State = dict[str, torch.Tensor]


def same(vit: VisionTransformer, state: State) -> bool:
    own = vit.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


def refused(vit: VisionTransformer, path: Path, *, lenient: bool = False) -> str:
    """The message of a refusal, which names the file and leaves no finite mixture of two models to be used."""
    with pytest.raises(WeightsError) as caught:
        load_into(vit, path, lenient=lenient)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def jax_layout(vit: VisionTransformer) -> dict[str, np.ndarray]:
    """A ViT's weights under the names and in the axes of the published JAX files."""
    state = {name: tensor.numpy() for name, tensor in vit.state_dict().items()}
    heads = vit.blocks[0].attn.num_heads
    D = vit.embed_dim
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.zeros((D, 3), np.float32),
        "head/bias": np.zeros(3, np.float32),
    }
    for i in range(len(vit.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weights, biases = np.split(state[f"{ours}attn.qkv.weight"], 3), np.split(state[f"{ours}attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(D, heads, D // heads)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, D // heads)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, D // heads, D)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for norm, number in (("norm1", 0), ("norm2", 2)):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        for layer, number in (("fc1", 0), ("fc2", 1)):
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/kernel"] = state[f"{ours}mlp.{layer}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/bias"] = state[f"{ours}mlp.{layer}.bias"]
    return arrays


def save(vit: VisionTransformer, path: Path, layout: str) -> Path:
    state = vit.state_dict()
    if layout == "npz":
        np.savez(path, **jax_layout(vit))
    elif layout == "safetensors":
        save_file(state, path)
    else:
        with_module = {f"module.{name}": tensor for name, tensor in state.items()}
        content: Any = {
            "plain": state,
            "model": {"model": state, "epoch": 3},
            "state_dict": {"state_dict": with_module, "optimizer": {"lr": 0.1}},
            "both": {"state_dict": {"model": state}},
            "module": with_module,
        }[layout]
        torch.save(content, path)
    return path


FILES = {
    "safetensors": "a.safetensors",
    "npz": "a.npz",
    "plain": "a.pth",
    "model": "a.pth",
    "state_dict": "a.pt",
    "both": "a.bin",
    "module": "a.pth",
}


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("lenient", [False, True])
def test_every_layout_gives_the_same_model(layout: str, lenient: bool, tiny_vit: MakeVit, tmp_path: Path) -> None:
    source, vit = tiny_vit(seed=1), tiny_vit(seed=2)
    difference = load_into(vit, save(source, tmp_path / FILES[layout], layout), lenient=lenient)
    assert not difference
    assert str(difference) == ""
    assert same(vit, source.state_dict())


def test_half_precision_files_are_widened_exactly(tiny_vit: MakeVit, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in tiny_vit(seed=1).state_dict().items()}
    save_file(half, tmp_path / "a.safetensors")
    vit = tiny_vit(seed=2)
    load_into(vit, tmp_path / "a.safetensors", lenient=False)
    assert same(vit, {name: tensor.float() for name, tensor in half.items()})


def test_a_classifier_in_the_file_is_left_out_and_said(tiny_vit: MakeVit, tmp_path: Path) -> None:
    source, vit = tiny_vit(seed=1, num_classes=5), tiny_vit(seed=2)
    difference = load_into(vit, save(source, tmp_path / "a.safetensors", "safetensors"), lenient=False)
    assert not difference
    assert difference.left_out == ("head.bias", "head.weight")
    assert torch.equal(vit.norm.weight, source.norm.weight)


@pytest.mark.parametrize("layout", ["safetensors", "npz"])
@pytest.mark.parametrize("size", [8, 24])
def test_position_embedding_of_another_image_size(layout: str, size: int, tiny_vit: MakeVit, tmp_path: Path) -> None:
    source, vit = tiny_vit(seed=1), tiny_vit(seed=2, img_size=size)
    assert not load_into(vit, save(source, tmp_path / FILES[layout], layout), lenient=False)
    grid = [size // 4, size // 4]
    kernel = {"interpolation": "bilinear", "antialias": False} if layout == "npz" else {}
    expected = resample_abs_pos_embed(source.pos_embed.detach(), grid, num_prefix_tokens=1, **kernel)
    assert vit.pos_embed.shape == expected.shape != source.pos_embed.shape
    assert torch.allclose(vit.pos_embed, expected, atol=1e-6)
    assert torch.equal(vit.pos_embed[:, :1], source.pos_embed[:, :1])
    rest = {name: tensor for name, tensor in source.state_dict().items() if name != "pos_embed"}
    assert all(torch.equal(vit.state_dict()[name], tensor) for name, tensor in rest.items())


# Differences


def changed(source: VisionTransformer, path: Path) -> Path:
    """A file that lacks one tensor, has one too many and has one of another shape."""
    state = source.state_dict()
    del state["blocks.1.norm2.bias"]
    state["extra.thing"] = torch.zeros(2)
    state["norm.weight"] = torch.zeros(3)
    save_file(state, path)
    return path


def test_strict_lists_all_differences(tiny_vit: MakeVit, tmp_path: Path) -> None:
    vit = tiny_vit(seed=2)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    message = refused(vit, changed(tiny_vit(seed=1), tmp_path / "a.safetensors"))
    assert message.splitlines()[1:] == [
        "  1 missing in the file: blocks.1.norm2.bias",
        "  1 unexpected in the file: extra.thing",
        "  1 of another shape: norm.weight: file (3,), model (8,)",
    ]
    assert "backbone.load=lenient" in message
    assert same(vit, before)


def test_lenient_returns_the_difference_and_loads_the_rest(tiny_vit: MakeVit, tmp_path: Path) -> None:
    source, vit = tiny_vit(seed=1), tiny_vit(seed=2)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    difference = load_into(vit, changed(source, tmp_path / "a.safetensors"), lenient=True)
    assert difference == LoadReport(
        missing=("blocks.1.norm2.bias",),
        unexpected=("extra.thing",),
        mismatched=("norm.weight: file (3,), model (8,)",),
    )
    assert difference
    for name, tensor in vit.state_dict().items():
        kept = name in ("blocks.1.norm2.bias", "norm.weight")
        assert torch.equal(tensor, before[name] if kept else source.state_dict()[name])


def test_what_was_loaded_is_proven(tiny_vit: MakeVit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tiny_vit(seed=1), tmp_path / "a.safetensors", "safetensors")
    vit = tiny_vit(seed=2)
    whole = vit.load_state_dict

    def forgetful(state: State, **options: Any) -> Any:
        result = whole(state, **options)
        with torch.no_grad():
            vit.blocks[1].mlp.fc1.bias[0] += 1
        return result

    monkeypatch.setattr(vit, "load_state_dict", forgetful)
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.fc1\.bias differs from the file"):
        load_into(vit, path, lenient=True)


def test_a_long_list_is_cut() -> None:
    shown = str(LoadReport(missing=tuple(f"n{i}" for i in range(11))))
    assert shown == "  11 missing in the file: n0, n1, n2, n3, n4, n5, n6, n7 and 3 more"


@pytest.mark.parametrize(
    "other",
    [
        {"depth": 3},
        {"depth": 1},
        {"embed_dim": 16},
        {"patch_size": 8},
        {"patch_size": 2},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2},
        {"qk_norm": True},
        {"init_values": 0.1},
        {"mlp_ratio": 2},
        {"global_pool": "avg"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["safetensors", "npz"])
def test_weights_of_another_architecture(other: dict[str, Any], layout: str, tiny_vit: MakeVit, tmp_path: Path) -> None:
    if layout == "npz" and other.keys() & {"class_token", "reg_tokens", "qk_norm", "init_values", "global_pool"}:
        source, vit = tiny_vit(seed=1), tiny_vit(seed=2, **other)  # what JAX files do not have
    else:
        source, vit = tiny_vit(seed=1, **other), tiny_vit(seed=2)
    assert "not weights of this architecture" in refused(vit, save(source, tmp_path / FILES[layout], layout))


def test_lenient_is_no_license_for_weights_of_nothing_alike(tiny_vit: MakeVit, tmp_path: Path) -> None:
    save_file({"blocks.0.conv.weight": torch.zeros(3, 3)}, tmp_path / "a.safetensors")
    assert "name the architecture" in refused(tiny_vit(), tmp_path / "a.safetensors", lenient=True)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize("lenient", [False, True])
def test_values_that_are_not_finite_raise(number: float, lenient: bool, tiny_vit: MakeVit, tmp_path: Path) -> None:
    state = tiny_vit(num_classes=3).state_dict()
    state["head.weight"][0, 0] = number  # left out: no matter
    save_file(state, tmp_path / "a.safetensors")
    assert not load_into(tiny_vit(seed=1), tmp_path / "a.safetensors", lenient=lenient)
    state["blocks.1.mlp.fc1.weight"][3, :2] = number
    save_file(state, tmp_path / "a.safetensors")
    message = refused(tiny_vit(seed=1), tmp_path / "a.safetensors", lenient=lenient)
    assert message.endswith("blocks.1.mlp.fc1.weight holds 2 values that are not finite; download the file again")


def test_lenient_does_not_resample_patches(tiny_vit: MakeVit, tmp_path: Path) -> None:
    source, vit = tiny_vit(seed=1, patch_size=8, img_size=32), tiny_vit(seed=2)
    before = vit.patch_embed.proj.weight.clone()
    difference = load_into(vit, save(source, tmp_path / "a.safetensors", "safetensors"), lenient=True)
    assert difference.mismatched == ("patch_embed.proj.weight: file (8, 3, 8, 8), model (8, 3, 4, 4)",)
    assert torch.equal(vit.patch_embed.proj.weight, before)


# Files that are not what they should be


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt", ".safetensors", ".npz", ".pkl", ""])
@pytest.mark.parametrize("kind", ["pickle", "torch", "torch-in-model", "legacy", "npz"])
def test_code_in_a_file_is_never_executed(kind: str, suffix: str, tiny_vit: MakeVit, tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / f"a{suffix}"
    payload = Payload(target)
    with open(path, "wb") as file:
        if kind == "pickle":
            pickle.dump(payload, file)
        elif kind == "npz":
            np.savez(file, **{"embedding/kernel": np.array([payload], dtype=object)})
        else:
            content: Any = {"model": payload, "x": torch.zeros(1)} if kind == "torch-in-model" else payload
            torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")
    for lenient in (False, True):
        message = refused(tiny_vit(), path, lenient=lenient)
        assert "not a" in message
    assert not target.exists()
    if kind == "pickle":  # the payload is a real one
        pickle.loads(path.read_bytes())
        assert target.exists()


def test_the_fix_for_pickles_is_named(tiny_vit: MakeVit, tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "x"), tmp_path / "a.pth")
    assert "convert the weights to .safetensors" in refused(tiny_vit(), tmp_path / "a.pth")


@pytest.mark.parametrize("layout", ["safetensors", "npz", "plain"])
@pytest.mark.parametrize("length", [0, 5, 0.5, 0.99])
def test_truncated_files(layout: str, length: float, tiny_vit: MakeVit, tmp_path: Path) -> None:
    path = save(tiny_vit(seed=1), tmp_path / FILES[layout], layout)
    content = path.read_bytes()
    path.write_bytes(content[: length if isinstance(length, int) else int(length * len(content))])
    vit = tiny_vit(seed=2)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    refused(vit, path)
    assert same(vit, before)


@pytest.mark.parametrize(
    "content", [{}, {"a": 3}, {"model": {"a": torch.zeros(1), "epoch": 3}}, [torch.zeros(1)], torch.zeros(1)], ids=repr
)
def test_torch_files_of_something_else(content: object, tiny_vit: MakeVit, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert "holds no mapping of names to tensors" in refused(tiny_vit(), tmp_path / "a.pth")


def test_an_npz_of_something_else(tiny_vit: MakeVit, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    assert "not a JAX vision transformer" in refused(tiny_vit(), tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["nix.safetensors", "nix.npz", "nix.pth", ""])
def test_missing_files_and_folders(name: str, tiny_vit: MakeVit, tmp_path: Path) -> None:
    message = refused(tiny_vit(), tmp_path / name)
    assert "no such weights file" in message
    assert "backbone.weights" in message


def test_reading_gives_the_tensors_as_they_are(tiny_vit: MakeVit, tmp_path: Path) -> None:
    state = tiny_vit(seed=1).state_dict()
    for layout in ("safetensors", "plain", "state_dict"):
        found = read_weights(save(tiny_vit(seed=1), tmp_path / FILES[layout], layout)).tensors
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
