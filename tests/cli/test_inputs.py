"""Inputs that users have: each gives the right score, or one message that names it, and never a traceback."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from dist_vpt.cli.main import main
from tests.cli.inputs import (
    Build,
    added,
    gray16,
    listed,
    mapped,
    recipe,
    renamed,
    rooted,
    saved,
    shown,
    train,
    used,
    weights,
)

BASE = "base: [digits/linear]\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
HTML = b"<!DOCTYPE html><html>Log in</html>"
LAUGHS = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


def _strip(file: Path) -> None:
    Image.new("RGB", (1, 20000)).save(file)


def _bomb(file: Path) -> None:
    Image.new("1", (20000, 20000)).save(file)


def _loop(file: Path) -> None:
    os.symlink(file.name, file)


# What is refused: the input, and what its message says.
REFUSED: dict[str, tuple[Build, str]] = {
    "16-bit gray of 8-bit values": (saved(gray16(1)), "16-bit pixels of at most 255 would all be black"),
    "float TIFF": (saved(lambda p, file: p.convert("F").save(file.with_suffix(".tif"))), "mode F: 32-bit pixels"),
    "zero bytes": (added(b""), "z.png: the image cannot be read: the file is empty; download or copy it again"),
    "LFS pointer as image": (added(LFS), "a pointer of Git LFS in place of the file; run git lfs pull"),
    "web page as image": (added(HTML, "z.jpg"), "a web page in place of the file; download the file itself"),
    "text as image": (added(b"hello", "z.jpg"), "z.jpg: the image cannot be read (its content is no image that Pillow"),
    "truncated image": (added(b"\x89PNG\r\n\x1a\n" + bytes(9)), "z.png: the image cannot be read"),
    "strip": (
        added(_strip, "z.png", "train", "data.image_size=224"),
        "z.png: 1 x 20000 pixels would be resized to 256",
    ),
    "bomb": (added(_bomb), "20000 x 20000 pixels are 400.0 megapixels; at most 178"),
    "link to itself": (added(_loop), "z.png: the image cannot be read (Too many levels of symbolic links)"),
    "link to nothing": (added(lambda file: os.symlink("nowhere", file)), "z.png: there is no such image; restore"),
    "class without images": (added(lambda f: (f.parents[1] / "other").mkdir()), "other: holds no image; add images or"),
    "class of val alone": (
        renamed(("val/disc", "val/ring")),
        "class 'ring' has no folder in train; valid: cross, disc",
    ),
    "root is a file": (used(*train("data.root=k/train/disc/0.png")), "0.png is not a folder"),
    "root of a long name": (used(*train(f"data.root={'x' * 300}")), "cannot be read (File name too long)"),
    "run of a long name": (used(*train(f"run.dir={'x' * 300}")), "cannot be a run folder (File name too long)"),
    "run is a file": (used(*train("run.dir=k/train/disc/0.png")), "cannot be a run folder"),
    "run is the dataset": (used(*train("run.dir=k")), "k: holds files (test, train, val) but no run"),
    "list: two labels": (
        listed(lambda t: t + "train/disc/0.png 0\n", file="train800.txt"),
        "has the label 1 on a line",
    ),
    "list: from 1": (listed(label=lambda k: k + 1), "no image of train or trainval has label 0"),
    "list: negative": (listed(label=lambda k: -k), "label -1 is negative; labels count from 0"),
    "list: header": (listed("path label\n".__add__), "train800.txt:1: label 'label' is not a class number"),
    "list: commas": (listed(lambda t: t.replace(" ", ",")), "has no label; write 'relative/path label'"),
    "list: absolute": (listed("/".__add__), "leaves the dataset's folder"),
    "list: folder": (listed("train/disc 0\n".__add__), "there is no file 'train/disc'"),
    "list: long path": (listed(f"{'x' * 5000} 0\n".__add__), "there is no file 'xxx"),
    "list: empty": (listed(lambda t: "", file="test.txt"), "test.txt: is empty; add a"),
    "json: brackets": (mapped(lambda t: "[" * 100_000), "train.json: is not JSON that can be read"),
    "json: digits": (mapped(lambda t: f'{{"a": {"9" * 6000}}}'), "train.json: is not JSON that can be read"),
    "json: nested": (mapped(lambda t: f'{{"train": {t}}}'), "class id an object is neither a whole number nor text"),
    "json: bool": (mapped(label=bool), "class id True is neither a whole number nor text"),
    "json: text in test": (
        mapped(lambda t: t.replace(": 1", ': "disc"'), file="test.json"),
        "class id 'disc' has no image",
    ),
    "json: list": (mapped(lambda t: "[]"), "holds a list; use an object"),
    "weights: int8": (
        weights("w.safetensors", lambda t: (t * 10).to(torch.int8)),
        "holds int8 numbers, and weights are",
    ),
    "weights: fp8": (weights("w.safetensors", lambda t: t.to(torch.float8_e4m3fn)), "holds float8_e4m3fn numbers, and"),
    "weights: NaN": (weights("w.safetensors", lambda t: t * float("nan")), "values that are not finite"),
    "weights: LFS pointer": (weights("w.safetensors", LFS), "w.safetensors: no weights: a pointer of Git LFS in place"),
    "weights: web page": (weights("w.pth", HTML), "w.pth: no weights: a web page in place of the file"),
    "weights: empty": (weights("w.npz", b""), "w.npz: no weights: the file is empty"),
    "weights: text": (weights("w.safetensors", b"hello, there"), "w.safetensors: not a safetensors file"),
    "weights: zeros": (weights("w.safetensors", lambda t: t * 0), "w.safetensors: all weights are 0; download"),
    "weights: config": (weights("config.json", b'{"hidden_size": 64}'), "config.json: JSON, and not an index of safe"),
    "weights: HDF5": (weights("w.h5", b"\x89HDF\r\n\x1a\n" + bytes(500)), "w.h5: not a file of plain tensors"),
    "weights: zip": (weights("w.pth", b"PK\x05\x06" + bytes(18)), "w.pth: not a file of plain tensors"),
    "weights: cut off": (weights("w.pth", b"PK\x03\x04" + bytes(500)), "w.pth: the file is cut off; download it again"),
    "weights: address": (used(*train("backbone.weights=https://example.org/w.pth")), "an address; download the file"),
    "weights: scalar": (
        weights("w.safetensors", lambda t: t.new_zeros(()) if t.shape == (64,) else t),
        "of another shape: blocks.0.attn.proj.bias: file (), model (64,)",
    ),
    "weights: positions of one axis": (
        weights("w.safetensors", lambda t: t.flatten() if t.ndim == 3 and t.shape[1] > 1 else t),
        "1 of another shape: pos_embed: file (",
    ),
    "recipe: tabs": (recipe(BASE + "optim:\n\tlr: 3\n"), "r.yaml:3: not valid YAML"),
    "recipe: twice": (recipe(BASE + "seed: 1\nseed: 2\n"), "r.yaml:3: not valid YAML: duplicate key seed"),
    "recipe: latin-1": (recipe(BASE.encode() + b"# caf\xe9"), "byte 27 is not UTF-8; save it as UTF-8 text"),
    "recipe: UTF-16": (recipe(BASE.encode("utf-16")), "byte 0 is not UTF-8; save it as UTF-8 text"),
    "recipe: empty int": (recipe(BASE + "seed: !!int ''\n"), "not valid YAML: "),
    "recipe: no bool": (recipe(BASE + "seed: !!bool x\n"), "not valid YAML: "),
    "recipe: no date": (recipe(BASE + "seed: !!timestamp x\n"), "not valid YAML: "),
    "recipe: in itself": (recipe(BASE + "optim: &a {lr: *a}\n"), "its aliases stand for more than 100,000 values"),
    "recipe: laughs": (recipe(f"{BASE}a: &a [1]\n{LAUGHS}"), "its aliases stand for more than 100,000 values"),
    "recipe: deep": (recipe(f"{BASE}a: {'[' * 3000}{']' * 3000}\n"), "not valid YAML: nested too deeply"),
    "recipe: endless": (used("recipe", "show", "/dev/zero"), "/dev/zero: is no recipe: it has more than 1,000,000"),
    "octal number": (shown("train.epochs=010"), "train.epochs = '010': must be a valid integer"),
    "number of base 60": (shown("train.epochs=1:30"), "train.epochs = '1:30': must be a valid integer"),
    "space before =": (shown("seed =3"), "an override has no spaces around =; write seed=3"),
    "predict of a run of a long name": (used("predict", "x" * 300, "k"), "File name too long"),
    "predict: top": (used("predict", "run", "k", "--top", "0"), "--top 0: must be at least 1"),
    "predict: table": (used("predict", "run", "k", "--out", "a.xlsx"), "--out a.xlsx: must end in .csv or .json"),
}

# What is read.
READ: dict[str, Build] = {
    "16-bit gray": saved(gray16(257)),
    "CMYK": saved(lambda p, file: p.convert("CMYK").save(file.with_suffix(".jpg"))),
    "1-bit TIFF": saved(lambda p, file: p.convert("1").save(file.with_suffix(".tif"))),
    "PNG named .jpg": saved(lambda p, file: p.save(file.with_suffix(".jpg"), "PNG")),
    "names": renamed(
        ("train/disc/0.png", 'train/disc/a\nb,"\x1b[31m.png'), ("train/disc/1.png", "train/disc/-\U0001f600[red].png")
    ),
    "root of digits": rooted("2024"),
    "root with #": rooted("a #2"),
    "root in brackets": rooted("[k]"),
    "root with a colon": rooted("a: b"),
    "root in quotes": rooted("on", argument="'on'"),
    "list: names with line separators": listed(lambda t: t.replace("\n", "\r\n")),
    "list: BOM": listed("\ufeff".__add__),
}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_input_is_refused_in_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(build(tmp_path)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("name", READ)
def test_input_is_read_as_it_is_meant(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(READ[name](tmp_path)) == 0
    shown = capsys.readouterr()
    assert "8 images of 2 classes" in shown.out
    assert "Warning" not in shown.err
