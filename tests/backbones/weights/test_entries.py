"""Files of several models, and files whose names all have a prefix: what is loaded, and what is said of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dist_vpt.backbones.weights.loading import load_into
from dist_vpt.cli.main import main
from dist_vpt.errors import WeightsError

MakeVit = Callable[..., VisionTransformer]
State = dict[str, torch.Tensor]


def with_prefix(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(tmp_path: Path, make: MakeVit, content: Any, entry: str | None = None) -> tuple[VisionTransformer, str]:
    """A model with the file's weights, and the lines about the file."""
    torch.save(content, tmp_path / "a.pth")
    vit = make(seed=9)
    report = load_into(vit, tmp_path / "a.pth", lenient=False, entry=entry)
    assert not report
    return vit, "\n".join(report.notes)


def equal(vit: VisionTransformer, state: State) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in vit.state_dict().items())


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "backbone.", "encoder.", "module._orig_mod.", "net.vit."])
def test_a_common_prefix_is_taken_off_and_named(prefix: str, tiny_vit: MakeVit, tmp_path: Path) -> None:
    state = tiny_vit(seed=1).state_dict()
    vit, notes = loaded(tmp_path, tiny_vit, with_prefix(prefix, state))
    assert equal(vit, state)
    assert notes == f"{prefix.removeprefix('module.')!r} is taken off all names"


def test_what_is_outside_of_the_prefix_is_left_out_and_named(tiny_vit: MakeVit, tmp_path: Path) -> None:
    state = tiny_vit(seed=1).state_dict()
    head = {"head.mlp.0.weight": torch.ones(2, 2), "loss.center": torch.ones(2)}
    vit, notes = loaded(tmp_path, tiny_vit, with_prefix("backbone.", state) | head)
    assert equal(vit, state)
    assert notes == "'backbone.' is taken off all names; left out, outside of 'backbone.': head, loss"


def test_an_average_beside_the_model_is_named_and_can_be_chosen(tiny_vit: MakeVit, tmp_path: Path) -> None:
    model, ema = tiny_vit(seed=1).state_dict(), tiny_vit(seed=2).state_dict()
    content = {"model": model, "model_ema": ema, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    vit, notes = loaded(tmp_path, tiny_vit, content)
    assert equal(vit, model)
    assert notes == "entry 'model' is loaded; backbone.entry chooses another: model_ema"
    vit, notes = loaded(tmp_path, tiny_vit, content, "model_ema")
    assert equal(vit, ema)
    assert notes == "entry 'model_ema' is loaded; backbone.entry chooses another: model"


@pytest.mark.parametrize("nested", [True, False])
def test_self_distillation_gives_the_teacher(nested: bool, tiny_vit: MakeVit, tmp_path: Path) -> None:
    teacher, student = tiny_vit(seed=1).state_dict(), tiny_vit(seed=2).state_dict()
    heads = {"head.mlp.0.weight": torch.ones(2, 2)}
    content: dict[str, Any] = {
        "student": with_prefix("module.backbone.", student) | heads,
        "teacher": with_prefix("backbone.", teacher) | heads,
        "args": None,
    }
    if not nested:
        del content["args"]
        content = {f"{key}.{name}": tensor for key, part in content.items() for name, tensor in part.items()}
        content = {name.replace("module.", ""): tensor for name, tensor in content.items()}
    vit, notes = loaded(tmp_path, tiny_vit, content)
    assert equal(vit, teacher)
    assert "backbone.entry chooses another" in notes
    assert "student" in notes
    assert "left out, outside of" in notes
    vit, _ = loaded(tmp_path, tiny_vit, content, "student")
    assert equal(vit, student)


def test_what_cannot_be_chosen_is_listed(tiny_vit: MakeVit, tmp_path: Path) -> None:
    state = tiny_vit(seed=1).state_dict()
    path = re.escape(str(tmp_path / "a.pth"))
    with pytest.raises(WeightsError, match=rf"^{path}: holds several models; set backbone.entry to one of one, two$"):
        loaded(tmp_path, tiny_vit, {"one": state, "two": state})
    with pytest.raises(WeightsError, match=r"has no entry 'three'; set backbone.entry to one of one, two"):
        loaded(tmp_path, tiny_vit, {"one": state, "two": state}, "three")
    with pytest.raises(WeightsError, match=r"holds no mapping of names to tensors, but epoch \(int\), args \(dict\)"):
        loaded(tmp_path, tiny_vit, {"epoch": 3, "args": {"lr": 1.0}})


@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_entry_of_a_file_with_one_model_is_refused(prefix: str, tiny_vit: MakeVit, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no entry 'ema', since it holds one model; remove backbone.entry"):
        loaded(tmp_path, tiny_vit, with_prefix(prefix, tiny_vit(seed=1).state_dict()), "ema")


def test_lenient_is_advised_only_where_it_would_load_something(tiny_vit: MakeVit, tmp_path: Path) -> None:
    state = tiny_vit(seed=1).state_dict()
    with pytest.raises(WeightsError, match=r"or use backbone.load=lenient"):
        loaded(tmp_path, tiny_vit, {name: tensor for name, tensor in state.items() if name != "norm.bias"})
    foreign = {name: tensor[..., :1] for name, tensor in state.items()}
    with pytest.raises(WeightsError) as caught:
        loaded(tmp_path, tiny_vit, with_prefix("x", foreign) | {"blocks.0.nix": torch.ones(1)})
    assert "backbone.load=lenient" not in str(caught.value)


def test_the_check_command_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    demo = Path(__file__).parents[3] / "dist_vpt/backbones/demo/demo.safetensors"
    save_file(with_prefix("model.", load_file(demo)), tmp_path / "a.safetensors")
    main(["backbones", "check", str(tmp_path / "a.safetensors")])
    assert "'model.' is taken off all names" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["text.transformer.resblocks.0.", "text.transformer.layers.0."])
def test_of_an_image_and_text_model_the_image_model_is_loaded(text: str, tiny_vit: MakeVit, tmp_path: Path) -> None:
    state = tiny_vit(seed=1).state_dict()
    content = with_prefix("visual.trunk.", state) | {f"{text}ln_1.weight": torch.ones(2), "logit_scale": torch.ones(())}
    vit, notes = loaded(tmp_path, tiny_vit, content)
    assert equal(vit, state)
    assert notes.startswith("'visual.trunk.' is taken off all names")
    assert "logit_scale" in notes
    assert "text" in notes


def test_an_image_model_with_other_patches_is_refused(tiny_vit: MakeVit, tmp_path: Path) -> None:
    state = tiny_vit(seed=1, patch_size=8).state_dict()
    with pytest.raises(WeightsError, match=r"1 of another shape: patch_embed.proj.weight: file \(8, 3, 8, 8\), model"):
        loaded(tmp_path, tiny_vit, with_prefix("visual.trunk.", state))
