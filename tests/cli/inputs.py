"""Builders of inputs that users have and that are not as they should be: pictures, lists, weights and recipes.

Each builder gets an empty folder, and returns the arguments of the command that meets the input there.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

Build = Callable[[Path], list[str]]
COUNTS = {"train": 4, "val": 2, "test": 2}
SHORT = (
    "data.image_size=24",
    "data.workers=0",
    "train.epochs=1",
    "train.batch_size=16",
    "optim.warmup_epochs=0",
    "runtime.precision=fp32",
    "run.dir=run",
)
LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}


def draw(kind: str) -> Image.Image:
    """A white disc or cross on black, 48 pixels, gray."""
    picture = Image.new("L", (48, 48))
    pen, a, b = ImageDraw.Draw(picture), random.randint(2, 9), 47 - random.randint(2, 9)
    if kind == "disc":
        pen.ellipse([a, a, b, b], fill=255)
    else:
        pen.rectangle([19, a, 29, b], fill=255)
        pen.rectangle([a, 19, b, 29], fill=255)
    return picture


def toy(root: Path, save: Callable[[Image.Image, Path], None] | None = None) -> Path:
    """Splits of folders of discs and crosses."""
    random.seed(0)
    for split, count in COUNTS.items():
        for kind in ("disc", "cross"):
            (root / split / kind).mkdir(parents=True)
            for number in range(count):
                file = root / split / kind / f"{number}.png"
                draw(kind).convert("RGB").save(file) if save is None else save(draw(kind), file)
    return root


def train(*more: str, stored: str = "image_folder") -> list[str]:
    """A short training of the pictures in ``k``."""
    return ["train", "linear", stored, "data.root=k", "backbone.name=demo", *SHORT, *more]


def saved(save: Callable[[Image.Image, Path], None]) -> Build:
    """All pictures are written in another way."""

    def build(folder: Path) -> list[str]:
        toy(folder / "k", save)
        return train()

    return build


def added(content: bytes | Callable[[Path], None], name: str = "z.png", split: str = "train", *more: str) -> Build:
    """One more file among the discs."""

    def build(folder: Path) -> list[str]:
        file = toy(folder / "k") / split / "disc" / name
        file.write_bytes(content) if isinstance(content, bytes) else content(file)
        return train(*more)

    return build


def renamed(*pairs: tuple[str, str]) -> Build:
    """Files or folders of the dataset have other names."""

    def build(folder: Path) -> list[str]:
        toy(folder / "k")
        for old, new in pairs:
            os.rename(folder / "k" / old, folder / "k" / new)
        return train()

    return build


def rooted(name: str, *, argument: str | None = None) -> Build:
    """The folder of the dataset has another name."""

    def build(folder: Path) -> list[str]:
        toy(folder / name)
        return train(f"data.root={name if argument is None else argument}")

    return build


def listed(edit: Callable[[str], str] = str, *, label: Callable[[int], object] = int, file: str | None = None) -> Build:
    """vtab_folder's lists; ``edit``: of the text of the list ``file``, or of all."""

    def build(folder: Path) -> list[str]:
        root = toy(folder / "k")
        for split, name in LISTS.items():
            lines = [
                f"{each.relative_to(root)} {label(each.parent.name == 'disc')}\n"
                for each in sorted(_files(root, split))
            ]
            text = "".join(lines)
            (root / name).write_bytes((edit(text) if file in (None, name) else text).encode())
        return train("data.task=mine", stored="vtab_folder")

    return build


def mapped(edit: Callable[[str], str] = str, *, label: Callable[[int], object] = int, file: str | None = None) -> Build:
    """fgvc_json's objects; ``edit``: of the text of ``file``, or of all."""

    def build(folder: Path) -> list[str]:
        root = toy(folder / "k")
        for split in COUNTS:
            pairs = {
                str(each.relative_to(root)): label(each.parent.name == "disc") for each in sorted(_files(root, split))
            }
            name, text = f"{split}.json", json.dumps(pairs)
            (root / name).write_text(edit(text) if file in (None, name) else text)
        return train("data.task=mine", stored="fgvc")

    return build


def _files(root: Path, split: str) -> list[Path]:
    return list((root / split).glob("*/*"))


def weights(name: str, content: bytes | Callable[[torch.Tensor], torch.Tensor]) -> Build:
    """A weights' file: raw bytes, or a tiny timm model whose tensors were changed."""

    def build(folder: Path) -> list[str]:
        toy(folder / "k")
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.manual_seed(0)
            state = timm.create_model("test_vit", num_classes=0).state_dict()
            changed = {key: content(tensor).contiguous() for key, tensor in state.items()}
            save_file(changed, folder / name)
        return train("backbone.name=test_vit", f"backbone.weights={name}", "data.image_size=32")

    return build


def recipe(text: str | bytes) -> Build:
    """A recipe file that is shown."""

    def build(folder: Path) -> list[str]:
        (folder / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["recipe", "show", "r.yaml"]

    return build


def shown(*arguments: str) -> Build:
    """Arguments that are shown as a recipe."""
    return lambda folder: ["recipe", "show", "digits/linear", *arguments]


def used(*arguments: str) -> Build:
    """A command, in a folder with pictures."""

    def build(folder: Path) -> list[str]:
        toy(folder / "k")
        return list(arguments)

    return build


def gray16(factor: int) -> Callable[[Image.Image, Path], None]:
    """Saves 16-bit gray: pixels of 0 to 255 times ``factor``."""
    return lambda picture, file: Image.fromarray(np.asarray(picture).astype(np.uint16) * factor).save(file)
