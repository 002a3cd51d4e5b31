"""Pretrain the demo vision transformer from scratch on printed characters (never on a digit).

    python tools/pretrain_demo.py --fonts /usr/share/fonts --out demo.safetensors --seed 0

Every glyph of every font is drawn once into a bank; batches are distorted on the fly. One font family in
ten is held out whole and measures the result. dist_vpt/backbones/demo/README.md names the fonts and the outcome.

Shapes: B batch, G glyphs in the bank, C color channels.
"""
# ruff: noqa: RUF001 - Greek and Cyrillic letters are meant

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

IMAGE_PIXELS = 24
CHANNELS = 3
ARCHITECTURE = {
    "img_size": IMAGE_PIXELS,
    "patch_size": 4,
    "in_chans": CHANNELS,
    "num_classes": 0,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "class_token": True,
    "global_pool": "token",
}
PREPROCESSING = {"image_size": IMAGE_PIXELS, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}

# One word, one class: characters that differ only in size, or look the same in many fonts, share a word.
# No digit is among them.
CHARACTERS = (
    "A a B b Cc D d E e F f G g H h Il| i J j Kk L M m N n Oo Pp Q q R r Ss T t Uu Vv Ww Xx Y y Zz "
    "! # $ % & ( ) * + / < = > ? @ [ ] \\ { } ~ "
    "Γ Δ Θ Λ Ξ Π Σ Φφ Ψψ Ω α β γ δ ε ζ η θ λ μ ξ π σ τ ω "
    "Б Д Ж И Л Ц Ч Ш Щ Ы Э Ю Я Þ ß æ § £ €"
)
CLASSES = CHARACTERS.split()

NOT_LETTERS = {"D050000L", "Standard Symbols PS", "Linux Biolinum Keyboard O"}  # pictures on letter codes

BANK_PIXELS = 48  # side of a stored glyph
GLYPH_PIXELS = 40  # its longer side
STYLES_PER_FAMILY = 6  # so that a family with fifty files does not outvote the others
BATCH = 64
PEAK_RATE = 1e-3
WARMUP = 200


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Drawn glyphs and their classes."""

    glyphs_G: Tensor  # (G, BANK_PIXELS, BANK_PIXELS), uint8, ink is 255
    labels_G: Tensor
    fonts: int
    families: int


def usable_fonts(folders: list[Path]) -> dict[str, list[Path]]:
    """Font files by family: those with the basic Latin letters, each style once, ordered by file name."""
    letters = {ord(letter) for letter in "AZaz"}
    styles: dict[str, dict[str, Path]] = {}
    files = (file for folder in folders for file in folder.rglob("*") if file.suffix in {".ttf", ".otf"})
    for file in sorted(files, key=lambda file: file.name):
        try:
            family, style = ImageFont.truetype(file, 16).getname()
            charmap = FT2Font(str(file)).get_charmap()
        except (OSError, RuntimeError):  # a bitmap or damaged font
            continue
        if family and family not in NOT_LETTERS and letters <= charmap.keys():
            styles.setdefault(family, {}).setdefault(style or "", file)
    return {family: list(found.values())[:STYLES_PER_FAMILY] for family, found in sorted(styles.items())}


def draw(font: ImageFont.FreeTypeFont, character: str) -> Tensor | None:
    """One character, cut out and scaled into the middle of a bank cell; None where the font draws nothing."""
    left, top, right, bottom = map(math.floor, font.getbbox(character))
    width, height = right - left + 2, bottom - top + 2
    if width < 6 or height < 6 or max(width, height) > 400:
        return None
    page = Image.new("L", (width, height))
    ImageDraw.Draw(page).text((1 - left, 1 - top), character, fill=255, font=font)
    box = page.getbbox()
    if box is None:
        return None
    glyph = page.crop(box)
    scale = GLYPH_PIXELS / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    cell = Image.new("L", (BANK_PIXELS, BANK_PIXELS))
    cell.paste(
        glyph.resize(size, Image.Resampling.BICUBIC),
        ((BANK_PIXELS - size[0]) // 2, (BANK_PIXELS - size[1]) // 2),
    )
    return torch.frombuffer(bytearray(cell.tobytes()), dtype=torch.uint8).view(BANK_PIXELS, BANK_PIXELS)


def draw_bank(families: list[list[Path]]) -> Bank:
    glyphs, labels = [], []
    for file in (file for files in families for file in files):
        font, charmap = ImageFont.truetype(file, 64), FT2Font(str(file)).get_charmap()
        for label, word in enumerate(CLASSES):
            for character in word:
                glyph = draw(font, character) if ord(character) in charmap else None
                if glyph is not None:
                    glyphs.append(glyph)
                    labels.append(label)
    return Bank(
        glyphs_G=torch.stack(glyphs),
        labels_G=torch.tensor(labels),
        fonts=sum(map(len, families)),
        families=len(families),
    )


def uniform(rng: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=rng)


def distort(glyphs_B: Tensor, rng: torch.Generator) -> Tensor:
    """uint8 glyphs -> normalized images (B, C, 24, 24): stroke, shape, resolution, contrast, noise."""
    batch, size = len(glyphs_B), IMAGE_PIXELS
    ink = glyphs_B[:, None].float() / 255
    heavier, lighter = F.max_pool2d(ink, 3, 1, 1), -F.max_pool2d(-ink, 3, 1, 1)
    stroke = uniform(rng, -0.8, 1, batch, 1, 1, 1)
    ink = torch.lerp(ink, torch.where(stroke > 0, heavier, lighter), stroke.abs())

    turn = uniform(rng, -0.25, 0.25, batch)
    zoom_x, zoom_y = uniform(rng, 0.8, 1.7, batch), uniform(rng, 0.8, 1.25, batch)
    shear = uniform(rng, -0.3, 0.3, batch)
    shift = uniform(rng, -0.1, 0.1, 2, batch)
    rows = [
        torch.stack([zoom_x * turn.cos(), zoom_x * (shear - turn.sin()), shift[0]], -1),
        torch.stack([zoom_y * turn.sin(), zoom_y * turn.cos(), shift[1]], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [batch, 1, size, size], align_corners=False)
    bends = 0.06 * torch.randn(batch, 2, 4, 4, generator=rng)  # a hand does not draw straight
    grid = grid + F.interpolate(bends, size=(size, size), mode="bicubic").permute(0, 2, 3, 1)
    ink = F.grid_sample(ink, grid, align_corners=False)

    groups = list(ink.chunk(8))  # every group of the batch gets one resolution
    for i in range(len(groups)):
        side = int(torch.randint(7, 40, (), generator=rng))
        if side < 20:
            coarse = F.interpolate(groups[i], size=(side, side), mode="area")
            groups[i] = F.interpolate(coarse, size=(size, size), mode="bicubic")
    ink = torch.cat(groups).clamp(0, 1)

    ink = ink * uniform(rng, 0.6, 1, batch, 1, 1, 1) + uniform(rng, 0, 0.1, batch, 1, 1, 1)
    ink = ink + uniform(rng, 0, 0.06, batch, 1, 1, 1) * torch.randn(ink.shape, generator=rng)
    ink = ink.clamp(0, 1)
    return ((ink - 0.5) / 0.5).expand(-1, CHANNELS, -1, -1)


def build() -> tuple[VisionTransformer, nn.Linear]:
    backbone = VisionTransformer(**ARCHITECTURE)
    waves = build_sincos2d_pos_embed([6, 6], backbone.embed_dim)  # learns sooner than from noise
    backbone.pos_embed.data[0, 1:].copy_(0.5 * waves)
    for block in backbone.blocks:
        block.attn.fused_attn = False  # three times as fast in bfloat16 on a CPU with this few tokens
    return backbone, nn.Linear(backbone.embed_dim, len(CLASSES))


def train(bank: Bank, steps: int, rng: torch.Generator) -> tuple[VisionTransformer, nn.Linear]:
    backbone, head = build()
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05, betas=(0.9, 0.98))
    started = time.perf_counter()
    for step in range(steps):
        progress = step / steps
        rate = PEAK_RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        index_B = torch.randint(len(bank.labels_G), (BATCH,), generator=rng)
        images_B, labels_B = distort(bank.glyphs_G[index_B], rng), bank.labels_G[index_B]
        with torch.autocast("cpu", torch.bfloat16):
            logits_B = head(backbone(images_B))
        loss = F.cross_entropy(logits_B.float(), labels_B, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss:.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    return backbone, head


@torch.inference_mode()
def accuracy(backbone: VisionTransformer, head: nn.Linear, bank: Bank, rng: torch.Generator) -> float:
    """Share of distorted glyphs classified correctly."""
    right = 0
    for glyphs_B, labels_B in zip(bank.glyphs_G.split(512), bank.labels_G.split(512), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits_B = head(backbone(distort(glyphs_B, rng)))
        right += int((logits_B.argmax(-1) == labels_B).sum())
    return right / len(bank.labels_G)


def save(backbone: VisionTransformer, out: Path) -> None:
    metadata = {
        "architecture": json.dumps(ARCHITECTURE),
        "preprocessing": json.dumps(PREPROCESSING),
        "made_by": "python tools/pretrain_demo.py",
        "license": "Apache-2.0",
    }
    save_file({name: value.half().contiguous() for name, value in backbone.state_dict().items()}, out, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, nargs="+", required=True, help="folders searched for .ttf and .otf")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=7000, help=f"optimizer steps, of {BATCH} glyphs each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = torch.Generator().manual_seed(options.seed)
    families = list(usable_fonts(options.fonts).values())
    order = torch.randperm(len(families), generator=rng).tolist()
    held_out = len(families) // 10
    test = draw_bank([families[i] for i in order[:held_out]])
    bank = draw_bank([families[i] for i in order[held_out:]])
    for name, part in (("train", bank), ("held out", test)):
        print(f"{name}: {part.families} families, {part.fonts} fonts, {len(part.labels_G)} glyphs")
    print(f"{len(CLASSES)} classes", flush=True)

    backbone, head = train(bank, options.steps, rng)
    save(backbone, options.out)
    print(f"accuracy on held-out families, distorted: {accuracy(backbone, head, test, rng):.3f}")


if __name__ == "__main__":
    main()
