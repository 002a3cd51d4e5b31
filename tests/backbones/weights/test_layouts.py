"""Every layout of published files: loaded strictly it gives what the published model gives, or is refused by name."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_vpt.backbones.build import build, create, preprocessing_of
from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.vit import Backbone
from dist_vpt.backbones.weights.loading import load_into, read_weights
from dist_vpt.backbones.weights.recognize import recognize
from dist_vpt.backbones.weights.zoo import ZOO, ZooEntry
from dist_vpt.errors import WeightsError
from tests.backbones.published import FILES, SWIN, VIT, Arrays, File, file, filled, fixed_positions, torch_vit

__all__ = ["file"]  # a fixture
TOLERANCE = 2e-5  # float32, relative to the largest number, as for the methods


def built(path: Path) -> Backbone:
    recipe = BackboneConfig(name="tiny", weights=str(path))
    preprocessing = preprocessing_of(recipe)
    return build(recipe, image_size=preprocessing.image_size, mean=preprocessing.mean, std=preprocessing.std)[0]


def model_of(row: ZooEntry) -> Any:
    return create(row.architecture, row.size, **row.options)


def test_the_features_are_the_published_models(file: File, tmp_path: Path) -> None:
    arrays = file.arrays()
    images = np.random.default_rng(5).integers(0, 256, (2, 3, file.row.size, file.row.size), dtype=np.uint8)
    backbone = built(file.save(tmp_path, arrays))
    found_BD = backbone.pool(backbone(torch.from_numpy(images))).double().numpy()
    wanted_BD = file.features(arrays, images)
    assert found_BD.shape == wanted_BD.shape
    assert np.abs(found_BD - wanted_BD).max() < TOLERANCE * np.abs(wanted_BD).max()


def computed(file: File) -> tuple[str, ...]:
    """Ends of the names of what a model computes itself."""
    return {"swin": ("index", "mask"), "dinov3": ("qkv.bias", "mask")}.get(file.row.layout, ("nothing",))


def test_what_is_left_out_is_reported(file: File, tmp_path: Path) -> None:
    difference = load_into(model_of(file.row), file.save(tmp_path), lenient=False)
    names = {name.removeprefix("module.") for name in file.arrays()}
    loaded = {name for name in names if not name.endswith(computed(file))}
    loaded = {name for name in loaded if not name.startswith(file.left_out) or name.startswith("layers.")}
    assert set(difference.left_out) == names - loaded
    assert recognize(read_weights(file.save(tmp_path)).tensors) == file.layout


def needed(file: File, arrays: Arrays) -> list[str]:
    """Names that a model cannot do without."""
    others = tuple(beginning for beginning in file.left_out if beginning != "layers.")
    names = [name for name in arrays if not name.removeprefix("module.").startswith(others)]
    # A file without registers is one of the layout without them, and is reported as that.
    return [name for name in names if not name.endswith((*computed(file), "register_tokens"))]


def refused(model: Any, path: Path) -> str:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_into(model, path, lenient=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


def test_a_file_without_a_tensor_is_refused_by_its_name(file: File, tmp_path: Path) -> None:
    arrays, model = file.arrays(), model_of(file.row)
    for name in needed(file, arrays):
        message = refused(model, file.save(tmp_path, {n: a for n, a in arrays.items() if n != name}))
        assert f"1 missing in the file: {name.removeprefix('module.')}" in message


def test_a_file_with_one_tensor_more_is_refused_by_its_name(file: File, tmp_path: Path) -> None:
    arrays, model = file.arrays(), model_of(file.row)
    last = "visual.extra.thing" if file.layout == "clip" else "extra.thing"
    block = needed(file, arrays)[-5].removeprefix("module.") + "_two"
    for name in (last, block):
        message = refused(model, file.save(tmp_path, arrays | {name: np.zeros(2, np.float32)}))
        assert message.endswith(f"1 unexpected in the file: {name}")


def test_a_file_with_a_tensor_of_another_shape_is_refused_by_its_name(file: File, tmp_path: Path) -> None:
    arrays, model = file.arrays(), model_of(file.row)
    for number, name in enumerate(needed(file, arrays)):
        array = arrays[name]
        axis = number % array.ndim
        longer = np.concatenate([array, np.take(array, [0], axis)], axis)
        for other in (longer, array[None]) if number % 5 == 0 or name.endswith("pos_embed") else (longer,):
            message = refused(model, file.save(tmp_path, arrays | {name: other}))
            assert f"1 of another shape: {name.removeprefix('module.')}: file {other.shape}, model " in message


def test_positions_are_resampled_to_another_image_size(file: File, tmp_path: Path) -> None:
    if file.row.layout in ("swin", "dinov3"):
        pytest.skip("has no table of positions")
    model = create(file.row.architecture, 2 * file.row.size, **file.row.options)
    assert not load_into(model, file.save(tmp_path), lenient=False)
    assert model.pos_embed.isfinite().all()


def dinov3_file(model: Any) -> Arrays:
    """The published names, with those of a SwiGLU where the model has one, and what the largest models have besides."""
    arrays = FILES["dinov3"].arrays() | filled({"local_cls_norm.weight": (16,), "local_cls_norm.bias": (16,)})
    if not hasattr(model.blocks[0].mlp, "fc1_g"):
        return arrays
    arrays = {name: array for name, array in arrays.items() if ".mlp." not in name}
    inner = model.blocks[0].mlp.fc2.weight.shape[1]
    for i in range(2):
        shapes: dict[str, tuple[int, ...]] = {"w1": (inner, 16), "w2": (inner, 16), "w3": (16, inner)}
        for name, shape in shapes.items():
            of_layer = {f"blocks.{i}.mlp.{name}.weight": shape, f"blocks.{i}.mlp.{name}.bias": shape[:1]}
            arrays |= filled(of_layer, seed=int(name[1]))
    return arrays


@pytest.mark.parametrize("size", ["small", "small_plus", "base", "large", "huge_plus"])
@pytest.mark.parametrize("biases", ["", "_qkvb"])
def test_dinov3_loads_as_timm_converts_it(size: str, biases: str, tmp_path: Path) -> None:
    from timm.models.eva import checkpoint_filter_fn

    architecture = f"vit_{size}_patch16_dinov3{biases}"
    loaded, converted = (create(architecture, 32, **VIT) for _ in range(2))
    arrays = dinov3_file(loaded)
    if biases:
        for i in range(2):
            arrays[f"blocks.{i}.attn.qkv.bias"][:16], arrays[f"blocks.{i}.attn.qkv.bias"][32:] = 0.1 + i, 0.3 - i
    path = FILES["dinov3"].save(tmp_path, arrays)
    assert not load_into(loaded, path, lenient=False)
    found = checkpoint_filter_fn({name: torch.from_numpy(array) for name, array in arrays.items()}, converted)
    converted.load_state_dict(found, strict=True)
    state, wanted = loaded.state_dict(), converted.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name in state if not torch.equal(state[name], wanted[name])] == []


@pytest.mark.parametrize(
    "architecture", ["eva02_tiny_patch14_224", "eva02_base_patch16_clip_224", "vit_small_patch16_dinov3"]
)
def test_timms_own_files_of_evas_load(architecture: str, tmp_path: Path) -> None:
    side = 32 if "16" in architecture else 28
    source, loaded = (create(architecture, side, **VIT) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert not load_into(loaded, tmp_path / "a.pth", lenient=False)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in source.state_dict().items())


def test_dinov3_with_swiglu_loads(tmp_path: Path) -> None:
    model = create("vit_huge_plus_patch16_dinov3", 32, **VIT, mlp_ratio=4)
    arrays = dinov3_file(model)
    path = FILES["dinov3"].save(tmp_path, arrays)
    assert recognize(read_weights(path).tensors) == "dinov3_swiglu"
    assert not load_into(model, path, lenient=False)
    for ours, theirs in (("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3")):
        found = getattr(model.blocks[1].mlp, ours).weight
        assert torch.equal(found, torch.from_numpy(arrays[f"blocks.1.mlp.{theirs}.weight"]))


def test_a_bias_that_the_model_has_not_must_be_zero(tmp_path: Path) -> None:
    arrays = FILES["dinov3"].arrays()
    arrays["blocks.1.attn.qkv.bias"][3] = 0.1
    path = FILES["dinov3"].save(tmp_path, arrays)
    message = refused(model_of(FILES["dinov3"].row), path)
    assert "1 of another shape: blocks.1.attn.qkv.bias: its values differ" in message
    with_bias = create("vit_small_patch16_dinov3_qkvb", 32, **VIT)
    assert not load_into(with_bias, path, lenient=False)
    assert torch.equal(with_bias.blocks[1].attn.q_bias, torch.from_numpy(arrays["blocks.1.attn.qkv.bias"][:16]))


def test_dinov2_with_swiglu_loads(tmp_path: Path) -> None:
    """The giant model's MLP has a gate; its hidden size is timm's for the width."""
    model = create("vit_giant_patch14_reg4_dinov2", 28, **VIT, mlp_ratio=4)
    inner = model.blocks[0].mlp.fc2.weight.shape[1]
    shapes = {name: shape for name, shape in torch_vit(patch=14).items() if ".mlp." not in name}
    for i in range(2):
        shapes |= {f"blocks.{i}.ls{n}.gamma": (16,) for n in (1, 2)}
        shapes |= {f"blocks.{i}.mlp.w12.weight": (2 * inner, 16), f"blocks.{i}.mlp.w12.bias": (2 * inner,)}
        shapes |= {f"blocks.{i}.mlp.w3.weight": (16, inner), f"blocks.{i}.mlp.w3.bias": (16,)}
    arrays = filled(shapes | {"mask_token": (1, 16), "register_tokens": (1, 4, 16)})
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "g.pth")
    assert not load_into(model, tmp_path / "g.pth", lenient=False)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, torch.from_numpy(arrays["blocks.1.mlp.w12.weight"]))
    assert torch.equal(model.blocks[1].mlp.fc2.weight, torch.from_numpy(arrays["blocks.1.mlp.w3.weight"]))


# What is known of a file besides names and shapes


@pytest.mark.parametrize("buffer", ["layers.1.blocks.1.attn_mask", "layers.0.blocks.0.attn.relative_position_index"])
def test_swins_own_tables_are_not_taken_on_trust(buffer: str, tmp_path: Path) -> None:
    arrays = FILES["swin"].arrays()
    arrays[buffer] = arrays[buffer].copy()
    arrays[buffer][0, 0] += 1
    message = refused(model_of(FILES["swin"].row), FILES["swin"].save(tmp_path, arrays))
    assert message.endswith(
        f"1 of another shape: {buffer}: its values differ from those that the model computes itself"
    )


def test_moco_v3s_small_model_has_twelve_heads(tmp_path: Path) -> None:
    width = 384
    arrays = filled(torch_vit(depth=1, width=width)) | {"pos_embed": fixed_positions(width, 2, rows_first=True)}
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "s.pth.tar")
    assert recognize(read_weights(tmp_path / "s.pth.tar").tensors) == "mocov3_linear"
    message = refused(create("vit_small_patch16_224", 32, depth=1), tmp_path / "s.pth.tar")
    assert message.endswith("has 12 attention heads, the model 6; set backbone.name=mocov3_s16")
    assert not load_into(
        create("vit_small_patch16_224", 32, depth=1, **ZOO["mocov3_s16"].options), tmp_path / "s.pth.tar", lenient=False
    )


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        (
            "swin",
            ("vit_base_patch16_224", 32, VIT),
            "holds a Swin Transformer, and backbone.name is a vision transformer",
        ),
        ("in1k", ("swin_tiny_patch4_window7_224", 32, SWIN), "holds a vision transformer, and backbone.name is a Swin"),
    ],
)
def test_files_of_another_family(name: str, model: tuple[str, int, Any], message: str, tmp_path: Path) -> None:
    assert message in refused(create(*model[:2], **model[2]), FILES[name].save(tmp_path))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["conv_root/kernel", "block1/unit1/conv1/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"], "a hybrid"),
        (["patch_embed.backbone.stem.conv.weight", "blocks.0.norm1.weight"], "a hybrid"),
        (["stem/kernel", "MixerBlock_0/LayerNorm_0/scale"], "an MLP-Mixer"),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "a ResNet"),
        (["module.base_encoder.layer1.0.conv1.weight"], "a ResNet"),
        (["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"], "a ConvNeXt"),
        (["layers.0.blocks.0.attn.logit_scale", "layers.0.blocks.0.attn.cpb_mlp.0.weight"], "a Swin Transformer V2"),
        (["cls_token", "dist_token", "blocks.0.norm1.weight"], "a distilled DeiT"),
        (["blocks.0.attn.relative_position_bias_table"], "a BEiT"),
        (
            ["vit.embeddings.patch_embeddings.projection.weight"],
            "a vision transformer in the layout of the transformers",
        ),
        (["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "a language model"),
        (["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"], "a language model"),
        (["features.0.weight", "features.3.weight", "features.6.weight"], "a convolutional network"),
        (["stages.0.blocks.0.attn.kv.weight", "stages.0.blocks.0.mlp.dwconv.weight"], "a Pyramid Vision Transformer"),
        (["blocks.0.attn.qkv.weight", "blocks.0.local_mp.conv1.weight"], "an XCiT"),
        (["blocks.0.attn.q_proj.weight", "blocks.0.attn.inner_attn_ln.weight"], "an EVA-02 in its project's own"),
        (["visual.blocks.0.attn.q_bias", "visual.blocks.0.mlp.ffn_ln.weight"], "an EVA-02 in its project's own"),
        (["blocks.0.attn.qkv.weight", "blocks_token_only.0.attn.q.weight"], "a CaiT"),
        (["blocks.0.attn.rel_pos_h", "blocks.0.attn.qkv.weight"], "a vision transformer with relative positions"),
        (["cls_token", "encoder.0.attention.weight"], "no blocks of a transformer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_reported_as_what_they_are(names: list[str], what: str, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(1, 1, 1, 1) for name in names}, tmp_path / "a.pth")
    message = refused(create("vit_base_patch16_224", 32, **VIT), tmp_path / "a.pth")
    assert f"a.pth: holds {what}" in message
    assert "dist-vpt backbones" in message


# Files with objects beside the tensors


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


class Innocent:
    """An object of a training script."""


def test_training_arguments_beside_the_tensors_are_read_past(tmp_path: Path) -> None:
    torch.save(
        {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1, inner=argparse.Namespace())}, tmp_path / "a"
    )
    assert torch.equal(read_weights(tmp_path / "a").tensors["a"], torch.ones(2))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("legacy", [False, True])
def test_code_inside_of_training_arguments_is_never_executed(legacy: bool, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    content = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(hook=Payload(target))}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="Pickled objects are never executed"):
        read_weights(tmp_path / "a.pth")
    assert not target.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)  # the payload is a real one
    assert target.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "a.pt"))
    with pytest.raises(WeightsError, match=r"plain tensors \(a TorchScript archive, which is a program\)"):
        read_weights(tmp_path / "a.pt")


def test_another_object_is_named(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "config": Innocent()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a pickle of tests\.backbones\.weights\.test_layouts\.Innocent"):
        read_weights(tmp_path / "a.pth")
