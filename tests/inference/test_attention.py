"""Attention maps against softmax(q k^T) computed from the weights in float64, and the pictures of a run.

B images, H heads, N tokens, R tokens whose attention is shown, M patches, D width, E = D / H.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dist_vpt.errors import UserError
from dist_vpt.inference.attention import attend
from dist_vpt.inference.attention_pictures import show
from dist_vpt.methods import attach
from dist_vpt.methods.base import Method
from dist_vpt.runtime.attention import apply_attention
from tests.backbones.test_swin import make_backbone as make_swin_backbone
from tests.methods.conftest import config_of, make_backbone
from tests.running import train

Array = NDArray[np.float64]
PATCHES, HEADS, WIDTH = 4, 2, 16


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def make(settings: dict[str, Any], kind: str) -> Method:
    torch.manual_seed(0)
    method = attach(config_of(settings), make_backbone(kind), classes=5).eval()
    apply_attention(method.backbone, "eager", torch.float32, writes=True, cpu=True)
    return method


def weights_of(method: Method, number: int) -> dict[str, Array]:
    return {n: p.detach().double().numpy() for n, p in method.backbone.blocks[number].named_parameters()}


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon) * weight + bias


def heads_of(w: dict[str, Array], part: int, normed_BND: Array) -> Array:
    """Queries (0) or keys (1) of tokens, [B, H, N, E], normalized by heads where the block does that."""
    rows = slice(part * WIDTH, (part + 1) * WIDTH)
    x_BND = normed_BND @ w["attn.qkv.weight"][rows].T + w["attn.qkv.bias"][rows]
    x_BHNE = x_BND.reshape(*x_BND.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)
    name = ("attn.q_norm", "attn.k_norm")[part]
    if f"{name}.weight" in w:
        x_BHNE = layer_norm(x_BHNE, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    return x_BHNE


def softmax_of(w: dict[str, Array], asking_BRD: Array, tokens_BND: Array) -> Array:
    """Attention of some tokens to others, [B, H, R, N]."""
    q_BHRE, k_BHNE = (
        heads_of(w, part, layer_norm(x, w["norm1.weight"], w["norm1.bias"], 1e-6))
        for part, x in enumerate((asking_BRD, tokens_BND))
    )
    scores = np.einsum("bhre,bhne->bhrn", q_BHRE, k_BHNE) / np.sqrt(WIDTH // HEADS)
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def block_inputs(method: Method, images: torch.Tensor) -> list[Array]:
    """What the method's prompt_maps forward pass shows to each block."""
    seen: list[Array] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double().numpy()))
        for block in method.backbone.blocks
    ]
    with torch.no_grad():
        method(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["class_token", "registers", "no_class_token"])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "vpt", "prompts": 3},
        {"name": "vpt", "prompts": 3, "layers": 1, "prompted_blocks": "last"},
        {"name": "vqt", "queries": 2, "blocks": (0, 2)},
        {"name": "linear"},
    ],
    ids=["vpt", "vpt last", "vqt", "linear"],
)
def test_maps_are_the_softmax_of_the_weights(settings: dict[str, Any], kind: str, images: torch.Tensor) -> None:
    method = make(settings, kind)
    prefix = {"class_token": 1, "registers": 3, "no_class_token": 0}[kind]
    found, inputs = attend(method, images), block_inputs(method, images)
    assert found.names == ("class" if prefix else "patches", "query" if settings["name"] == "vqt" else "prompt")
    assert len(found.class_token) == len(found.prompts) == len(inputs) == 3
    for number, tokens_BND in enumerate(inputs):
        w = weights_of(method, number)
        all_BHNN = softmax_of(w, tokens_BND, tokens_BND)
        to_patches = all_BHNN[..., -PATCHES:]
        token_maps = to_patches[:, :, :1] if prefix else to_patches[:, :, -PATCHES:].mean(2, keepdims=True)
        np.testing.assert_allclose(found.class_token[number], token_maps, rtol=1e-4, atol=1e-6)
        prompts = tokens_BND.shape[1] - prefix - PATCHES
        prompt_maps = to_patches[:, :, prefix : prefix + prompts]
        if settings["name"] == "vqt" and number in settings["blocks"]:
            queries_QD = method.queries[settings["blocks"].index(number)].detach().double().numpy()  # type: ignore[index, union-attr]
            prompt_maps = softmax_of(w, np.stack([queries_QD] * len(images)), tokens_BND)[..., -PATCHES:]
        assert found.prompts[number].shape == prompt_maps.shape
        assert prompt_maps.shape[2] == {"vqt": 2 * (number != 1), "linear": 0}.get(
            settings["name"], 3 * ("layers" not in settings or number == 2)
        )
        np.testing.assert_allclose(found.prompts[number], prompt_maps, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "seven.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def vpt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 3 prompts; trained in a way that hides attention, which the pictures must not be."""
    folder = tmp_path_factory.mktemp("runs") / "vpt"
    options = ("method.prompts=3", "runtime.activation_checkpointing=block", "runtime.attention=sdpa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        train(folder, *options)
    return folder


def test_pictures_go_into_the_run_and_into_tensorboard(vpt_run: Path, photo: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = show(str(vpt_run), [str(photo)])
    assert files == [vpt_run / "attention" / f"seven-{name}.png" for name in ("class", "prompts")]
    events = EventAccumulator(str(vpt_run / "tb"), size_guidance={"images": 0})
    events.Reload()
    for file, name in zip(files, ("class", "prompts"), strict=True):
        image = Image.open(file)
        assert np.asarray(image.convert("L")).std() > 10
        (shown,) = events.Images(f"attention/seven/{name}")
        assert (shown.width, shown.height) == image.size


def test_no_picture_takes_the_place_of_another(vpt_run: Path, photo: Path, tmp_path: Path) -> None:
    """Images of equal names in the folders of their classes, as image folders have them; all blocks and one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for place in ("cat/000.png", "dog/000.png"):
        (tmp_path / "in" / place).parent.mkdir(parents=True)
        (tmp_path / "in" / place).write_bytes(photo.read_bytes())
    files = show(str(vpt_run), [str(tmp_path / "in")], out=str(tmp_path / "out"))
    files += show(str(vpt_run), [str(tmp_path / "in")], block=1, head=0, out=str(tmp_path / "out"))
    names = {
        f"{animal}-000-{what}{which}"
        for animal in ("cat", "dog")
        for what in ("class", "prompts")
        for which in ("", "-block1-head0")
    }
    assert len(files) == len(set(files)) == len(names)
    assert {file.stem for file in (tmp_path / "out").iterdir()} == names
    events = EventAccumulator(str(vpt_run / "tb"), size_guidance={"images": 0})
    events.Reload()
    tags = {tag.removeprefix("attention/") for tag in events.Tags()["images"]}
    assert tags >= {f"{name[:7]}/{name[8:]}" for name in names}


def test_two_images_of_one_name_are_refused(vpt_run: Path, photo: Path, tmp_path: Path) -> None:
    other = tmp_path / "seven.jpg"
    other.write_bytes(photo.read_bytes())
    with pytest.raises(UserError, match=r"seven.png and .*seven.jpg: the pictures of both would be called seven-"):
        show(str(vpt_run), [str(photo), str(other)], out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_for_pictures(vpt_run: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*out: is a file; name a folder for the pictures"):
        show(str(vpt_run), [str(photo)], out=str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_a_backbone_whose_blocks_cannot_be_unpacked_is_reported(images: torch.Tensor) -> None:
    """And not that another method would do."""
    method = attach(config_of({"name": "linear"}), make_swin_backbone(), classes=5)
    with pytest.raises(UserError, match=r"a SwinTransformerBlock with .* EvaBlock, .*; attention can be drawn of runs"):
        attend(method, images)


def test_one_block_and_one_head(vpt_run: Path, photo: Path, tmp_path: Path) -> None:
    shown = {}
    for options in ({}, {"block": 1}, {"head": 0}, {"block": 1, "head": 0}):
        files = show(str(vpt_run), [str(photo)], out=str(tmp_path), **options)
        assert [file.parent for file in files] == [tmp_path] * 2
        shown[tuple(options)] = np.asarray(Image.open(files[0]))
    assert not any(np.array_equal(shown[()], picture) for options, picture in shown.items() if options)
    assert shown["block", "head"].size < shown["block",].size  # one map; the mean and each head


@pytest.mark.parametrize("options", [{"block": 99}, {"block": -1}, {"head": 99}])
def test_blocks_and_heads_that_are_not_there(options: dict[str, int], vpt_run: Path, photo: Path) -> None:
    (name,) = options
    with pytest.raises(UserError, match=rf"--{name} -?\d+: the backbone's {name}s are 0 to "):
        show(str(vpt_run), [str(photo)], **options)
