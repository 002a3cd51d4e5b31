"""LoRA of runs and of PEFT: equal logits both ways, checked with PEFT itself; what only PEFT has is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_vpt.backbones.build import build, timm_model
from dist_vpt.cli.main import main
from dist_vpt.errors import UserError, WeightsError
from dist_vpt.inference.load import load_run
from dist_vpt.inference.peft_import import load_peft
from dist_vpt.inference.peft_layout import peft_files, read_peft, write_peft
from dist_vpt.methods.base import Method
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.adapters import collect, restore
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs
from tests.inference.hub_server import Hub
from tests.running import train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("on_the_cpu")
CLASSES = list("abcd")
PATHS = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
BACKBONES = {
    "vit": "test_vit",
    "dinov2_registers": "dinov2_tiny_reg",
    "rotary": "vit_small_patch16_dinov3",
    "separate": "eva_tiny",  # layers of their own for queries, keys and values
}


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of timm's own classes under names of their own: DINOv2's shape with registers, and a small DINOv3."""
    from timm.models import _registry as registry
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    def eva_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
        shape = {
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "qkv_fused": False,
            "use_rot_pos_emb": True,
        }
        return Eva(**(shape | {k: v for k, v in options.items() if not k.startswith(("pretrained", "cache"))}))

    def dinov2_tiny_reg(pretrained: bool = False, **options: Any) -> nn.Module:
        shape = {"patch_size": 14, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 0.5}
        options = {k: v for k, v in options.items() if not k.startswith(("pretrained", "cache"))}
        return VisionTransformer(**(shape | {"reg_tokens": 4, "no_embed_class": True} | options))

    for name, made in (("dinov2_tiny_reg", dinov2_tiny_reg), ("eva_tiny", eva_tiny)):
        monkeypatch.setitem(registry._model_entrypoints, name, made)
    known = registry._model_entrypoints
    monkeypatch.setattr(timm, "is_model", lambda name: name.partition(".")[0] in known)
    real = timm.get_pretrained_cfg
    cfg = real("vit_small_patch14_reg4_dinov2.lvd142m")
    monkeypatch.setattr(
        timm, "get_pretrained_cfg", lambda name: cfg if name.endswith(("tiny_reg", "eva_tiny")) else real(name)
    )


def recipe_of(kind: str, *overrides: str) -> Any:
    size = 28 if kind == "dinov2_registers" else 32
    name = [f"backbone.name={BACKBONES[kind]}", "backbone.weights=random", f"data.image_size={size}"]
    return load_recipe([], [*name, "method.name=lora", *overrides])


def randomized(module: nn.Module, seed: int, only: Callable[[str], bool] = lambda name: True) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if only(name) and tensor.is_floating_point() and "rope" not in name:
                tensor.copy_(
                    tensor + torch.randn_like(tensor) * 0.2 if tensor.ndim > 1 else 1 + 0.3 * torch.randn_like(tensor)
                )


def method_and_plain(recipe: Any) -> tuple[Method, nn.Module]:
    """A run's method with random trained tensors, and the unchanged timm model with the same frozen weights."""
    inputs = resolve_inputs(recipe)
    method, _ = build_method(recipe, inputs, len(CLASSES))
    trained = {name for name, _ in method.adapter_tensors()}
    randomized(method, 1, trained.__contains__)
    made: dict[str, Any] = {}
    code = str(timm_model(recipe.backbone, inputs.transform.image_size, len(CLASSES)))
    exec(f"import timm\n{code}", made)
    backbone = {method.backbone.timm_name(n): t for n, t in method.backbone.state_dict().items()}
    missing, unexpected = made["model"].load_state_dict(backbone, strict=False)
    assert not unexpected
    assert set(missing) <= {"head.weight", "head.bias"}
    return method.eval(), made["model"].eval()


def images_of(method: Method) -> Tensor:
    size = method.backbone.image_size
    draw = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=draw)


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def close(one: Tensor, other: Tensor) -> None:
    assert float(other.std()) > 0.05
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


# From here to PEFT


@pytest.mark.parametrize(
    "settings",
    [
        ["method.targets=[q,v]"],
        ["method.targets=[v]", "method.alpha=3"],
        ["method.targets=[proj,fc2]", "method.rank=3"],
        ["method.targets=[q,k,v,proj,fc1,fc2]", "method.rank=3", "method.alpha=7.5", "method.head=published"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_peft_gives_a_runs_logits(kind: str, settings: list[str], tmp_path: Path) -> None:
    recipe = recipe_of(kind, *settings)
    method, plain = method_and_plain(recipe)
    images = images_of(method)
    folder = write(peft_files(recipe, collect(method), CLASSES, tmp_path), tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
    close(model(method.backbone.normalized(images)), method(images))


def test_the_files_are_those_that_peft_writes(tmp_path: Path) -> None:
    """The same names, shapes and keys as when PEFT makes and saves an adapter of these layers."""
    recipe = recipe_of("vit", "method.targets=[q,v,fc1]", "method.rank=3")
    method, plain = method_and_plain(recipe)
    ours = write(peft_files(recipe, collect(method), CLASSES, tmp_path), tmp_path / "ours")
    config = peft.LoraConfig.from_pretrained(str(ours))
    peft.get_peft_model(plain, config).save_pretrained(str(tmp_path / "theirs"))
    here, there = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {name: tensor.shape for name, tensor in here.items()} == {n: t.shape for n, t in there.items()}
    written, saved = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs"))
    assert written.keys() <= saved.keys()
    differs = {key for key in written if written[key] != saved[key] and key not in ("auto_mapping", "target_modules")}
    assert differs == set()
    assert sorted(written["target_modules"]) == sorted(saved["target_modules"]) == ["attn.qkv", "mlp.fc1"]
    assert (written["r"], written["rank_pattern"], written["alpha_pattern"]) == (3, {"attn.qkv": 6}, {"attn.qkv": 16})


def test_a_run_in_pefts_layout(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, "method.name=lora", "backbone.name=test_vit", "backbone.weights=random", "data.image_size=32",
          "train.batch_size=500", "train.test=false")  # fmt: skip
    out = write_peft(str(run), str(tmp_path / "adapter"))
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = load_run(str(run), "last")
    plain = timm.create_model("test_vit", num_classes=10, img_size=32)
    backbone = {loaded.method.backbone.timm_name(n): t for n, t in loaded.method.backbone.state_dict().items()}
    plain.load_state_dict(backbone, strict=False)
    model = peft.PeftModel.from_pretrained(plain, str(out)).eval()
    images = images_of(loaded.method)
    with torch.no_grad():
        expected = loaded.method(images)
        found = model(loaded.method.backbone.normalized(images))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(
        UserError,
        match=r"holds files \(adapter_config.json, adapter_model.safetensors\); name a new or an empty folder",
    ):
        write_peft(str(run), str(out))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=bias"], "method.name = bias: of all methods only lora has a form in PEFT"),
        (["runtime.quantize=int8"], "runtime.quantize = int8: the adapter was trained on quantized weights"),
    ],
)
def test_runs_that_peft_cannot_express(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        peft_files(recipe_of("vit", *overrides), {}, CLASSES, tmp_path)


def test_layers_that_timm_does_not_call(tmp_path: Path) -> None:
    """An adapter of PEFT on them would do nothing, without a word."""
    name = "eva02_tiny_patch14_224"
    recipe = load_recipe([], [f"backbone.name={name}", "backbone.weights=random", "method.name=lora", "method.rank=1"])
    method, _ = build_method(recipe, resolve_inputs(recipe), len(CLASSES))
    with pytest.raises(
        UserError, match=r"eva02_tiny_patch14_224: timm reads the weight of blocks\.0\.attn\.qkv without"
    ):
        peft_files(recipe, collect(method), CLASSES, tmp_path)


# From PEFT to here


def adapted(kind: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A timm model with random weights, and PEFT's model of it with a random adapter."""
    recipe = recipe_of(kind)
    inputs = resolve_inputs(recipe)
    made: dict[str, Any] = {}
    exec(f"import timm\n{timm_model(recipe.backbone, inputs.transform.image_size, len(CLASSES))}", made)
    torch.manual_seed(recipe.seed)
    backbone, _ = build(recipe.backbone, image_size=inputs.transform.image_size, mean=inputs.mean, std=inputs.std)
    plain = made["model"]
    plain.load_state_dict({backbone.timm_name(n): t for n, t in backbone.state_dict().items()}, strict=False)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["attn.qkv"], "modules_to_save": ["head"]} | settings
    if kind == "separate" and "attn.qkv" in options["target_modules"]:
        options["target_modules"] = [name for name in options["target_modules"] if name != "attn.qkv"]
        options["target_modules"] += ["attn.q_proj", "attn.v_proj"]
    model = peft.get_peft_model(plain, peft.LoraConfig(**options)).eval()
    randomized(model, 4, lambda name: "lora_" in name or "modules_to_save" in name)
    return backbone, model


def arguments_of(kind: str) -> list[str]:
    size = 28 if kind == "dinov2_registers" else 32
    return [f"backbone.name={BACKBONES[kind]}", "backbone.weights=random", f"data.image_size={size}"]


SETTINGS: dict[str, dict[str, Any]] = {
    "qkv": {},
    "all": {"target_modules": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]},
    "patterns": {
        "target_modules": ["attn.qkv", "attn.proj", "mlp.fc1"],
        "rank_pattern": {"attn.qkv": 4, r"blocks\.0\.mlp\.fc1": 2},
        "alpha_pattern": {"attn.proj": 11},
    },
    "some_blocks": {"target_modules": r"blocks\.[02]\.attn\.proj"},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_a_run_gives_pefts_logits(kind: str, settings: str, tmp_path: Path) -> None:
    backbone, model = adapted(kind, **SETTINGS[settings])
    model.save_pretrained(str(tmp_path / "adapter"))
    run = load_peft(str(tmp_path / "adapter"), arguments_of(kind))
    assert run.classes == ["0", "1", "2", "3"]
    method, _ = build_method(run.recipe, resolve_inputs(run.recipe), len(CLASSES))
    restore(method, run.tensors, tmp_path)
    images = images_of(method)
    close(method.eval()(images), model(backbone.normalized(images)))


@torch.no_grad()
def test_there_and_back_again(tmp_path: Path) -> None:
    """The factors of queries and values come back as they were: none is blown up to the joint rank."""
    recipe = recipe_of("vit", "method.targets=[q,v,fc2]", "method.rank=3", "method.head=published")
    method, _ = method_and_plain(recipe)
    before = collect(method)
    folder = write(peft_files(recipe, before, CLASSES, tmp_path), tmp_path / "adapter")
    run = load_peft(str(folder), arguments_of("vit"))
    assert run.recipe.method == recipe.method
    assert run.tensors.keys() == before.keys()
    assert all(torch.equal(run.tensors[name], before[name]) for name in before)


def test_an_imported_run_is_used_like_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    _, model = adapted("vit")
    model.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "a.png")
    run = str(tmp_path / "run")
    command = ["import-peft", str(tmp_path / "adapter"), *arguments_of("vit"), "--out", run]
    assert main([*command, "--classes", str(tmp_path / "names.txt")]) == 0
    assert "run: a run of test_vit with lora on q, k, v\n" in capsys.readouterr().out
    assert main(["predict", run, str(tmp_path / "a.png")]) == 0
    assert {line.split(",")[2] for line in capsys.readouterr().out.splitlines()[1:]} == {"ant", "bee", "cat", "dog"}
    assert main(["status", run]) == 0
    assert "done" in capsys.readouterr().out
    assert main(["merge", run, "--out", str(tmp_path / "merged.safetensors")]) == 0
    assert main(["push", run, "hub:me/x", "--dry-run"]) == 0
    assert "The run has no scores." in capsys.readouterr().out
    assert main(command) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_what_an_imported_run_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: tuple[str, ...]
) -> None:
    _, model = adapted("vit")
    model.save_pretrained(str(tmp_path / "adapter"))
    run, image, other = str(tmp_path / "run"), str(tmp_path / "a.png"), str(tmp_path / "other")
    assert main(["import-peft", str(tmp_path / "adapter"), *arguments_of("vit"), "--out", run]) == 0
    one_adapter = "was imported from PEFT with one adapter; leave it out"
    no_dataset = "was imported from PEFT, which names no dataset; give data.root=FOLDER, and data.format where"
    for command, message in (
        (["predict", run, image, "--adapters", "best"], f"--adapters best: {run} {one_adapter}"),
        (["push", run, "hub:me/x", "--dry-run", "--adapters", "best"], f"--adapters best: {run} {one_adapter}"),
        (
            ["predict", run, image, "--calibrated"],
            "has no temperature for its last adapters: it was imported from PEFT",
        ),
        (["eval", run], f"{run}: {no_dataset} that is no folder of class folders"),
        (["eval", run, *data], "or import it with --classes FILE: the dataset's classes in the order of the head"),
        (["compare", run, run], f"`dist-vpt eval {run} data.root=FOLDER --out {run}` writes them"),
        (["compress", run, "--keep", "0.5"], "only a vqt run has features to choose among"),
        (["train", f"{run}/recipe.yaml", f"run.dir={other}"], "error: this recipe: the folder of its dataset is not"),
    ):
        assert main(command) == 2, command
        found = capsys.readouterr().err
        assert message in found, found
        assert found.count("\n") == 1


@pytest.mark.parametrize("argument", ["method.rank=4", "vpt_deep"])
def test_the_method_is_the_adapters(argument: str, tmp_path: Path) -> None:
    _, model = adapted("vit")
    model.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=f"{argument}: the adapter itself gives the method; leave it out"):
        load_peft(str(tmp_path), [*arguments_of("vit"), argument])


def test_the_backbone_that_an_adapter_names(tmp_path: Path) -> None:
    _, model = adapted("vit")
    model.save_pretrained(str(tmp_path))
    with pytest.raises(
        UserError, match=r"names no model of timm \(base_model_name_or_path = None\); name its backbone"
    ):
        load_peft(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "timm/test_vit.r160_in1k"}))
    run = load_peft(str(tmp_path), ["data.image_size=32"])
    assert (run.recipe.backbone.name, run.recipe.backbone.weights) == ("test_vit.r160_in1k", "pretrained")


# What only PEFT has


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True: lora here has use_dora = False alone; in PEFT, merge_and_unload"),
        ({"bias": "lora_only"}, "bias = 'lora_only': lora here has bias = 'none' alone"),
        ({"lora_bias": True}, "lora_bias = True: lora here has lora_bias = False alone"),
        ({"modules_to_save": None}, r"has no trained head \(head.weight is missing\)"),
        (
            {"modules_to_save": ["head", "norm"]},
            r"base_model.model.norm.*: lora here has updates of the blocks' linear",
        ),
        ({"target_modules": ["patch_embed.proj"]}, "patch_embed.proj is not two matrices of one rank; only linear lay"),
        ({"target_modules": ["attn.qkv", "head"], "modules_to_save": []}, "has no trained head"),
    ],
)
def test_what_lora_here_does_not_have(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, model = adapted("vit", **settings)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(WeightsError, match=message):
        read_peft(tmp_path)


def test_other_methods_of_peft(tmp_path: Path) -> None:
    plain = timm.create_model("test_vit", num_classes=4)
    config = peft.IA3Config(target_modules=["attn.qkv"], feedforward_modules=[], modules_to_save=["head"])
    peft.get_peft_model(plain, config).save_pretrained(str(tmp_path))
    with pytest.raises(WeightsError, match="peft_type = IA3: only LORA can be a run here"):
        read_peft(tmp_path)


def test_another_backbone(tmp_path: Path) -> None:
    _, model = adapted("vit")
    model.save_pretrained(str(tmp_path))
    with pytest.raises(WeightsError, match="its head reads 64 features, and the backbone demo has 128; name the adap"):
        load_peft(str(tmp_path), ["backbone.name=demo"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {name.replace("blocks.0.", "blocks.77."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        WeightsError, match=r"has an update of blocks.77.attn.qkv, which is no layer that lora can chan"
    ):
        load_peft(str(tmp_path), arguments_of("vit"))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no adapter of PEFT \(adapter_config.json is missing\)"):
        read_peft(tmp_path)
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text("{")
    with pytest.raises(WeightsError, match=r"adapter_model.safetensors is missing; save the adapter as safetensors"):
        read_peft(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(WeightsError, match=r"is missing \(adapter_model.bin, a pickle, is not read\)"):
        read_peft(tmp_path)
    tensors.write_bytes(b"x" * 20)
    with pytest.raises(WeightsError, match="damaged"):
        read_peft(tmp_path)
    config.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": "much"}))
    with pytest.raises(WeightsError, match="damaged"):
        read_peft(tmp_path)
    layer = "base_model.model.blocks.0.attn.qkv"
    good = {"base_model.model.head.weight": torch.ones(4, 8), "base_model.model.head.bias": torch.ones(4)}
    good |= {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(24, 2)}
    save_file(good, tensors)
    with pytest.raises(WeightsError, match="lora_alpha or alpha_pattern cannot be read"):
        read_peft(tmp_path)
    config.write_text(json.dumps({"peft_type": "LORA", "alpha_pattern": {"(": 1}}))
    with pytest.raises(WeightsError, match="lora_alpha or alpha_pattern cannot be read"):
        read_peft(tmp_path)
    config.write_text(json.dumps({"peft_type": "LORA"}))
    read_peft(tmp_path)
    save_file({name: tensor for name, tensor in good.items() if "lora_B" not in name}, tensors)
    with pytest.raises(WeightsError, match=r"blocks.0.attn.qkv has lora_A or lora_B alone"):
        read_peft(tmp_path)
    save_file(good | {f"{layer}.lora_A.weight": torch.full((2, 8), torch.nan)}, tensors)
    with pytest.raises(WeightsError, match="holds numbers that are not finite"):
        read_peft(tmp_path)


@pytest.mark.parametrize("text", ["a\nb\nc\n", "a\nb\nc\nc\n", '["a", "b"]', "[", "a\nb\nc\nd\ne"])
def test_names_of_classes_that_do_not_fit(text: str, tmp_path: Path) -> None:
    _, model = adapted("vit")
    model.save_pretrained(str(tmp_path))
    (tmp_path / "names").write_text(text)
    with pytest.raises(
        UserError, match=r"--classes .*names: (has . different names, and the head 4 classes|cannot be)"
    ):
        load_peft(str(tmp_path), arguments_of("vit"), str(tmp_path / "names"))


@torch.no_grad()
def test_an_adapter_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    """Of the repository only the two files are downloaded."""
    backbone, model = adapted("vit")
    model.save_pretrained(str(tmp_path / "adapter"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    hub.create("me/adapter", files | {"pytorch_model.bin": b"\x80"})
    run = load_peft("hub:me/adapter", arguments_of("vit"))
    method, _ = build_method(run.recipe, resolve_inputs(run.recipe), len(CLASSES))
    restore(method, run.tensors, tmp_path)
    images = images_of(method)
    close(method.eval()(images), model(backbone.normalized(images)))
    resolved = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert resolved == {"adapter_config.json", "adapter_model.safetensors"}
    hub.create("me/pickled", {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"\x80"})
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors is missing; save the adapter as safetensors"):
        load_peft("hub:me/pickled", arguments_of("vit"))
