"""Synthetic weight files with the names and shapes of the published ones, two blocks deep and 16 wide.

B/16 stands for the ViT at 32 px here: D = 16, 2 heads, N = 1 + 2 x 2 tokens; Swin-T for 2 stages of 1 and 2 blocks.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_vpt.backbones.weights.zoo import CLIP, HALF, IMAGENET, ZOO, Project, ZooEntry
from tests.reference import rotary, swin, vit

D, H, DEPTH, G, SIDE = 16, 2, 2, 16, 32
N = 1 + (SIDE // G) ** 2
VIT = {"depth": DEPTH, "embed_dim": D, "num_heads": H}
SWIN = {"embed_dim": 8, "depths": (1, 2), "num_heads": (2, 4), "window_size": 2}
SWIN_SIDE = 32  # grids of 8 and 4
Arrays = dict[str, np.ndarray]


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    """Random numbers under these names; what scales is near one, so that it hides nothing."""
    random = np.random.default_rng(seed)
    scales = ("norm1.weight", "norm2.weight", "norm.weight", "ln_1.weight", "ln_2.weight", "ln_pre.weight")
    return {
        name: (random.normal(size=shape) * 0.3 + name.endswith((*scales, "ln_post.weight", "scale"))).astype(np.float32)
        for name, shape in shapes.items()
    }


def torch_vit(patch: int = G, depth: int = DEPTH, width: int = D, tokens: int = N) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (width,),
            f"blocks.{i}.norm1.bias": (width,),
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.qkv.bias": (3 * width,),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.attn.proj.bias": (width,),
            f"blocks.{i}.norm2.weight": (width,),
            f"blocks.{i}.norm2.bias": (width,),
            f"blocks.{i}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{i}.mlp.fc1.bias": (4 * width,),
            f"blocks.{i}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{i}.mlp.fc2.bias": (width,),
        }
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def _head(classes: int) -> dict[str, tuple[int, ...]]:
    return {"head.weight": (classes, D), "head.bias": (classes,)}


def _jax(**more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, D),
        "embedding/kernel": (G, G, 3, D),
        "embedding/bias": (D,),
        "Transformer/posembed_input/pos_embedding": (1, N, D),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
    }
    for i in range(DEPTH):
        at = f"Transformer/encoderblock_{i}"
        for norm in (0, 2):
            shapes |= {f"{at}/LayerNorm_{norm}/scale": (D,), f"{at}/LayerNorm_{norm}/bias": (D,)}
        for part in ("query", "key", "value"):
            shapes[f"{at}/MultiHeadDotProductAttention_1/{part}/kernel"] = (D, H, D // H)
            shapes[f"{at}/MultiHeadDotProductAttention_1/{part}/bias"] = (H, D // H)
        shapes |= {
            f"{at}/MultiHeadDotProductAttention_1/out/kernel": (H, D // H, D),
            f"{at}/MultiHeadDotProductAttention_1/out/bias": (D,),
            f"{at}/MlpBlock_3/Dense_0/kernel": (D, 4 * D),
            f"{at}/MlpBlock_3/Dense_0/bias": (4 * D,),
            f"{at}/MlpBlock_3/Dense_1/kernel": (4 * D, D),
            f"{at}/MlpBlock_3/Dense_1/bias": (D,),
        }
    return shapes | {name.replace("__", "/"): shape for name, shape in more.items()}


def _of_jax(file: Arrays) -> Arrays:
    """The same numbers under the reference's names, one matrix at a time."""
    found = {
        "cls_token": file["cls"],
        "pos_embed": file["Transformer/posembed_input/pos_embedding"],
        "patch_embed.proj.weight": np.einsum("ijcd->dcij", file["embedding/kernel"]),
        "patch_embed.proj.bias": file["embedding/bias"],
        "norm.weight": file["Transformer/encoder_norm/scale"],
        "norm.bias": file["Transformer/encoder_norm/bias"],
    }
    for i in range(DEPTH):
        at, to = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{at}/MultiHeadDotProductAttention_1"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            found[f"{to}.{ours}.weight"] = file[f"{at}/{theirs}/scale"]
            found[f"{to}.{ours}.bias"] = file[f"{at}/{theirs}/bias"]
        rows, biases = [], []
        for part in ("query", "key", "value"):
            for head in range(H):
                for e in range(D // H):
                    rows.append(file[f"{attention}/{part}/kernel"][:, head, e])
                    biases.append(file[f"{attention}/{part}/bias"][head, e])
        found[f"{to}.attn.qkv.weight"], found[f"{to}.attn.qkv.bias"] = np.stack(rows), np.stack(biases)
        out = file[f"{attention}/out/kernel"]
        columns = [out[head, e] for head in range(H) for e in range(D // H)]
        found[f"{to}.attn.proj.weight"] = np.stack(columns, axis=1)
        found[f"{to}.attn.proj.bias"] = file[f"{attention}/out/bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            found[f"{to}.mlp.{ours}.weight"] = np.einsum("io->oi", file[f"{at}/MlpBlock_3/{theirs}/kernel"])
            found[f"{to}.mlp.{ours}.bias"] = file[f"{at}/MlpBlock_3/{theirs}/bias"]
    return found


def fixed_positions(width: int, side: int, rows_first: bool) -> np.ndarray:
    """Sines and cosines of the row, then of the column (MoCo v3), or the other way (MAE); zero for the class token."""
    table = np.zeros((1, 1 + side * side, width), np.float32)
    for row in range(side):
        for column in range(side):
            for i in range(width // 4):
                rate = 1 / 10000 ** (i / (width // 4))
                place = table[0, 1 + row * side + column]
                first, second = (row, column) if rows_first else (column, row)
                place[i], place[width // 4 + i] = np.sin(first * rate), np.cos(first * rate)
                place[width // 2 + i], place[3 * width // 4 + i] = np.sin(second * rate), np.cos(second * rate)
    return table


def _moco_mlp(at: str, sizes: list[int]) -> dict[str, tuple[int, ...]]:
    """Linear layers without bias, each with a batch norm; the last one's has no scale."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (before, after) in enumerate(pairwise(sizes)):
        last = layer == len(sizes) - 2
        shapes[f"{at}.{3 * layer}.weight"] = (after, before)
        for name in () if last else ("weight", "bias"):
            shapes[f"{at}.{3 * layer + 1}.{name}"] = (after,)
        for name in ("running_mean", "running_var"):
            shapes[f"{at}.{3 * layer + 1}.{name}"] = (after,)
        shapes[f"{at}.{3 * layer + 1}.num_batches_tracked"] = ()
    return shapes


def _moco() -> Arrays:
    encoder = filled(torch_vit()) | {"pos_embed": fixed_positions(D, SIDE // G, rows_first=True)}
    other = filled(torch_vit(), seed=1) | {"pos_embed": fixed_positions(D, SIDE // G, rows_first=True)}
    heads = {e: filled(_moco_mlp(f"module.{e}.head", [D, 32, 32, 8])) for e in ("base_encoder", "momentum_encoder")}
    return {
        **{f"module.base_encoder.{name}": array for name, array in encoder.items()},
        **heads["base_encoder"],
        **{f"module.momentum_encoder.{name}": array for name, array in other.items()},
        **heads["momentum_encoder"],
        **filled(_moco_mlp("module.predictor", [8, 32, 8])),
    }


def _mae() -> Arrays:
    return filled(torch_vit()) | {"pos_embed": fixed_positions(D, SIDE // G, rows_first=False)}


def _mae_decoder() -> dict[str, tuple[int, ...]]:
    block = {
        name.replace("blocks.0", "decoder_blocks.0"): shape
        for name, shape in torch_vit(width=8).items()
        if name.startswith("blocks.0")
    }
    return block | {
        "mask_token": (1, 1, 8),
        "decoder_pos_embed": (1, N, 8),
        "decoder_embed.weight": (8, D),
        "decoder_embed.bias": (8,),
        "decoder_norm.weight": (8,),
        "decoder_norm.bias": (8,),
        "decoder_pred.weight": (G * G * 3, 8),
        "decoder_pred.bias": (G * G * 3,),
    }


def _mae_finetuned() -> dict[str, tuple[int, ...]]:
    shapes = {name: shape for name, shape in torch_vit().items() if not name.startswith("norm.")}
    return shapes | {"fc_norm.weight": (D,), "fc_norm.bias": (D,)} | _head(7)


def _swin() -> Arrays:
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,)}
    shapes |= {"patch_embed.norm.weight": (8,), "patch_embed.norm.bias": (8,)}
    for stage, (depth, heads, width) in enumerate(((1, 2, 8), (2, 4, 16))):
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}"
            shapes |= {
                f"{at}.norm1.weight": (width,),
                f"{at}.norm1.bias": (width,),
                f"{at}.attn.relative_position_bias_table": (9, heads),
                f"{at}.attn.qkv.weight": (3 * width, width),
                f"{at}.attn.qkv.bias": (3 * width,),
                f"{at}.attn.proj.weight": (width, width),
                f"{at}.attn.proj.bias": (width,),
                f"{at}.norm2.weight": (width,),
                f"{at}.norm2.bias": (width,),
                f"{at}.mlp.fc1.weight": (4 * width, width),
                f"{at}.mlp.fc1.bias": (4 * width,),
                f"{at}.mlp.fc2.weight": (width, 4 * width),
                f"{at}.mlp.fc2.bias": (width,),
            }
    shapes |= {
        "layers.0.downsample.reduction.weight": (16, 32),
        "layers.0.downsample.norm.weight": (32,),
        "layers.0.downsample.norm.bias": (32,),
        "norm.weight": (16,),
        "norm.bias": (16,),
        "head.weight": (7, 16),
        "head.bias": (7,),
    }
    buffers: Arrays = {}
    for stage, depth in enumerate((1, 2)):
        for block in range(depth):
            buffers[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = _pair_numbers(2)
    buffers["layers.1.blocks.1.attn_mask"] = _shifted_mask(grid=4, window=2, shift=1)
    return filled(shapes) | buffers


def _pair_numbers(window: int) -> np.ndarray:
    places = [(i, j) for i in range(window) for j in range(window)]
    wide = 2 * window - 1
    return np.array([[(i - a + window - 1) * wide + j - b + window - 1 for a, b in places] for i, j in places])


def _shifted_mask(grid: int, window: int, shift: int) -> np.ndarray:
    """-100 for two places of a window that come from both sides of the grid's edge."""
    windows = []
    for top in range(0, grid, window):
        for left in range(0, grid, window):
            over = [(top + a + shift >= grid, left + b + shift >= grid) for a in range(window) for b in range(window)]
            windows.append([[0.0 if one == other else -100.0 for other in over] for one in over])
    return np.array(windows, np.float32)


def _dinov2(**more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    scales = {f"blocks.{i}.ls{n}.gamma": (D,) for i in range(DEPTH) for n in (1, 2)}
    return torch_vit(patch=14) | scales | {"mask_token": (1, D), **more}


def _dinov3() -> Arrays:
    shapes = {name: shape for name, shape in _dinov2(storage_tokens=(1, 4, D)).items() if name != "pos_embed"}
    shapes = {name: (D, 3, G, G) if name == "patch_embed.proj.weight" else shape for name, shape in shapes.items()}
    arrays = filled(shapes | {"rope_embed.periods": (D // H // 4,)})
    for i in range(DEPTH):
        arrays[f"blocks.{i}.attn.qkv.bias"] = np.zeros(3 * D, np.float32)
        arrays[f"blocks.{i}.attn.qkv.bias_mask"] = np.repeat([1, np.nan, 1], D).astype(np.float32)
    return arrays


def _of_registers(file: Arrays) -> Arrays:
    found = {name: array for name, array in file.items() if name not in ("mask_token", "register_tokens")}
    found["reg_token"] = file["register_tokens"]
    found["cls_token"] = file["cls_token"] + file["pos_embed"][:, 0]
    found["pos_embed"] = file["pos_embed"][:, 1:]
    return found


def _clip() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (D,),
        "visual.positional_embedding": (N, D),
        "visual.proj": (D, 8),
        "visual.conv1.weight": (D, 3, G, G),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (D,), f"visual.{norm}.bias": (D,)}
    for tower, depth, width in (("visual.", DEPTH, D), ("", 1, 8)):
        for i in range(depth):
            at = f"{tower}transformer.resblocks.{i}"
            shapes |= {
                f"{at}.attn.in_proj_weight": (3 * width, width),
                f"{at}.attn.in_proj_bias": (3 * width,),
                f"{at}.attn.out_proj.weight": (width, width),
                f"{at}.attn.out_proj.bias": (width,),
                f"{at}.ln_1.weight": (width,),
                f"{at}.ln_1.bias": (width,),
                f"{at}.mlp.c_fc.weight": (4 * width, width),
                f"{at}.mlp.c_fc.bias": (4 * width,),
                f"{at}.mlp.c_proj.weight": (width, 4 * width),
                f"{at}.mlp.c_proj.bias": (width,),
                f"{at}.ln_2.weight": (width,),
                f"{at}.ln_2.bias": (width,),
            }
    text = {"token_embedding.weight": (20, 8), "ln_final.weight": (8,), "ln_final.bias": (8,), "logit_scale": ()}
    return shapes | text | {"positional_embedding": (7, 8), "text_projection": (8, 8)}


def _of_clip(file: Arrays) -> Arrays:
    found = {
        "cls_token": file["visual.class_embedding"].reshape(1, 1, D),
        "pos_embed": file["visual.positional_embedding"].reshape(1, N, D),
        "patch_embed.proj.weight": file["visual.conv1.weight"],
    }
    for ours, theirs in (("norm_pre", "ln_pre"), ("norm", "ln_post")):
        found |= {f"{ours}.{kind}": file[f"visual.{theirs}.{kind}"] for kind in ("weight", "bias")}
    for i in range(DEPTH):
        at = f"visual.transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            found[f"blocks.{i}.attn.qkv.{kind}"] = file[f"{at}.attn.in_proj_{kind}"]
            for ours, theirs in (
                ("norm1", "ln_1"), ("norm2", "ln_2"), ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                found[f"blocks.{i}.{ours}.{kind}"] = file[f"{at}.{theirs}.{kind}"]
    return found


def _without(*beginnings: str) -> Callable[[Arrays], Arrays]:
    return lambda file: {name: array for name, array in file.items() if not name.startswith(beginnings)}


_headless = _without("head.")


def _base_encoder(file: Arrays) -> Arrays:
    at = "module.base_encoder."
    return _headless({name.removeprefix(at): a for name, a in file.items() if name.startswith(at)})


@dataclass(frozen=True)
class File:
    """A published file in small."""

    layout: str  # as it is recognized
    arrays: Callable[[], Arrays]
    row: ZooEntry  # a tiny model in place of the published one
    left_out: tuple[str, ...]  # beginnings of the names that are left out on purpose
    wrap: Callable[[Any], Any] = lambda state: state  # what torch.save gets
    reference: Callable[[Arrays], Arrays] = _headless  # the encoder under the reference's names
    suffix: str = ".pth"
    config: dict[str, Any] = field(default_factory=dict)  # of the reference

    def save(self, folder: Path, arrays: Arrays | None = None) -> Path:
        arrays = self.arrays() if arrays is None else arrays
        path = folder / f"file{self.suffix}"
        if self.suffix == ".npz":
            np.savez(path, **arrays)  # type: ignore[arg-type]
        else:
            torch.save(self.wrap({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}), path)
        return path

    def features(self, arrays: Arrays, images: np.ndarray) -> np.ndarray:
        """What the published model gives for images, in float64."""
        mean, std = self.row.channels.mean, self.row.channels.std
        if self.row.layout == "swin":
            kept = {name: a for name, a in arrays.items() if not name.startswith("head.")}
            return swin.features(kept, images, heads=(2, 4), window=2, mean=mean, std=std)
        if self.row.layout == "dinov3":
            return rotary.features(arrays, images, heads=H, mean=mean, std=std)
        settings = {"num_heads": H, "patch_size": G, "mean": mean, "std": std, "pool": self.row.pool, **self.config}
        with pytest.MonkeyPatch.context() as patch:
            if self.row.layout == "clip":  # its GELU is an approximation
                patch.setattr(vit, "gelu_forward", lambda x: (x / (1 + np.exp(-1.702 * x)), None))
            return vit.features_forward(self.reference(arrays), vit.Config(**settings), images)[0]


def _row(architecture: str, layout: str, channels: Any, pool: str, size: int = SIDE, **options: Any) -> ZooEntry:
    shape = SWIN if layout == "swin" else VIT
    return ZooEntry(architecture, layout, None, channels, size, pool, "", Project("", ""), options=shape | options)


_B16 = "vit_base_patch16_224"
_ARGS = argparse.Namespace(lr=1e-3, model="vit", clip=None)
_OPTIMIZER = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
FILES = {
    "jax in21k": File(
        "jax",
        lambda: filled(_jax(pre_logits__kernel=(D, D), pre_logits__bias=(D,), head__kernel=(D, 21), head__bias=(21,))),
        _row(_B16, "jax", HALF, "token"),
        ("pre_logits/", "head/"),
        reference=_of_jax,
        suffix=".npz",
    ),
    "jax fine-tuned": File(
        "jax",
        lambda: filled(_jax(head__kernel=(D, 10), head__bias=(10,))),
        _row("vit_base_patch16_384", "jax", HALF, "token"),
        ("head/",),
        reference=_of_jax,
        suffix=".npz",
    ),
    "in1k": File(
        "timm",
        lambda: filled(torch_vit() | _head(10)),
        _row("deit_base_patch16_224", "timm", IMAGENET, "token"),
        ("head.",),
        wrap=lambda state: {"model": state},
    ),
    "mae": File(
        "mae",
        _mae,
        _row(_B16, "mae", IMAGENET, "avg"),
        (),
        wrap=lambda state: {"model": state, "args": _ARGS, "optimizer": _OPTIMIZER, "epoch": 1599, "scaler": {}},
        config={"pool": "avg"},
    ),
    "mae with decoder": File(
        "mae",
        lambda: _mae() | filled(_mae_decoder()),
        _row(_B16, "mae", IMAGENET, "avg"),
        ("mask_token", "decoder_"),
        wrap=lambda state: {"model": state},
        reference=_without("mask_token", "decoder_"),
    ),
    "mae fine-tuned": File(
        "timm",
        lambda: filled(_mae_finetuned()),
        _row(_B16, "mae", IMAGENET, "avg", global_pool="avg"),
        ("head.",),
        wrap=lambda state: {"model": state, "args": _ARGS},
    ),
    "mocov3": File(
        "mocov3",
        _moco,
        _row("vit_small_patch16_224", "mocov3", IMAGENET, "token"),
        ("momentum_encoder.", "predictor.", "base_encoder.head."),
        wrap=lambda state: {"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": _OPTIMIZER},
        reference=_base_encoder,
        suffix=".pth.tar",
    ),
    "mocov3 linear": File(
        "mocov3_linear",
        lambda: {
            f"module.{name}": array
            for name, array in (
                filled(torch_vit() | _head(10)) | {"pos_embed": fixed_positions(D, SIDE // G, rows_first=True)}
            ).items()
        },
        _row(_B16, "mocov3", IMAGENET, "token"),
        ("head.",),
        wrap=lambda state: {"epoch": 90, "arch": "vit_base", "state_dict": state, "best_acc1": torch.tensor(76.7)},
        reference=lambda file: _headless({name.removeprefix("module."): a for name, a in file.items()}),
        suffix=".pth.tar",
    ),
    "swin": File(
        "swin",
        _swin,
        _row("swin_tiny_patch4_window7_224", "swin", IMAGENET, "avg", SWIN_SIDE),
        ("head.", "layers."),
        wrap=lambda state: {"model": state},
    ),
    "dino": File("timm", lambda: filled(torch_vit()), _row(_B16, "timm", IMAGENET, "token"), ()),
    "dinov2": File(
        "dinov2",
        lambda: filled(_dinov2()),
        _row("vit_small_patch14_dinov2", "dinov2", IMAGENET, "token", 28),
        ("mask_token",),
        reference=_without("mask_token"),
        config={"patch_size": 14},
    ),
    "dinov2 with registers": File(
        "dinov2_registers",
        lambda: filled(_dinov2(register_tokens=(1, 4, D))),
        _row("vit_small_patch14_reg4_dinov2", "dinov2", IMAGENET, "token", 28),
        ("mask_token",),
        reference=_of_registers,
        config={"patch_size": 14, "no_embed_class": True},
    ),
    "dinov3": File(
        "dinov3",
        _dinov3,
        _row("vit_small_patch16_dinov3", "dinov3", IMAGENET, "token"),
        ("mask_token", "rope_embed."),
    ),
    "clip": File(
        "clip",
        lambda: filled(_clip()),
        _row("vit_base_patch16_clip_quickgelu_224", "clip", CLIP, "token"),
        ("visual.proj", "transformer.", "token_embedding", "ln_final", "logit_scale", "positional", "text_projection"),
        reference=_of_clip,
        config={"eps": 1e-5},
    ),
}


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> File:
    """Each of the files, with its tiny model as the short name 'tiny'."""
    found = FILES[request.param]
    monkeypatch.setitem(ZOO, "tiny", found.row)
    return found
