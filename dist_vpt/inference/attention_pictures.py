"""``dist-vpt attention``: pictures of a run's attention, in a folder and in TensorBoard.

B images, H heads, R tokens whose attention is shown, M patches, S image side.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dist_vpt.backbones.blocks import unpack_block
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.files import write_atomically
from dist_vpt.inference.attention import ONLY, Attention, attend
from dist_vpt.inference.hub import is_hub_id, open_run
from dist_vpt.inference.image_files import image_files
from dist_vpt.inference.load import load_run, refuse_several
from dist_vpt.methods.vpt import VPT
from dist_vpt.training.event_files import no_traceback_of_event_writer

CELL = 112  # pixels of an image's side in a grid
COLUMNS = 4  # of a grid with a map for each block or head, and the least width of all
SHOWN = 16  # prompts or queries side by side in a picture; others go into further rows
OVERLAY = 0.65  # share of the map's color in a picture


def show(  # noqa: PLR0917 (a run, images, which maps, where to)
    run: str,
    images: Sequence[str],
    adapters: str = "last",
    block: int | None = None,
    head: int | None = None,
    out: str | None = None,
    weights: str | None = None,
) -> list[Path]:
    """Pictures of a run's attention to image files, in a folder and in the run's TensorBoard; returns the files.

    All blocks, with the mean over heads or one ``head`` alone; or one ``block``, with the mean and each head.
    """
    files = _files_by_name(images)
    run_folder = open_run(run)
    refuse_several(run_folder.load(), "attention")
    runtime = {"activation_checkpointing": "none", "attention": "eager", "compile": False, "offload": False}
    loaded = load_run(run, adapters, weights, **runtime)
    loaded.inputs = loaded.inputs.one_view()
    # What is downloaded is for reading: pictures of a run on the hub are written here.
    default = Path("attention") if is_hub_id(run) else run_folder.path / "attention"
    backbone, folder = loaded.method.backbone, Path(out) if out else default
    for name, value, count in (("block", block, len(backbone.blocks)), ("head", head, _heads(backbone))):
        if value is not None and not 0 <= value < count:
            raise UserError(f"--{name} {value}: the backbone's {name}s are 0 to {count - 1}")
    written = []
    pictures: dict[str, np.ndarray] = {}
    which = "".join(f"-{name}{value}" for name, value in (("block", block), ("head", head)) if value is not None)
    for stem, file in files.items():
        pixels_13SS = loaded.load_images([file])
        found = attend(loaded.method, pixels_13SS)
        if isinstance(loaded.method, VPT):  # whose patches may include a frame
            pixels_13SS = loaded.method.prompted_images(pixels_13SS).detach()
        image_SS3 = pixels_13SS[0].cpu().permute(1, 2, 0).float().clamp(0, 255).numpy() / 255
        for name, figure in _figures(found, image_SS3, block, head):
            path = folder / f"{stem}-{name}{which}.png"
            pictures[f"attention/{stem}/{name}{which}"] = drawn = _drawn(figure)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise UserError(f"--out {folder}: is a file; name a folder for the pictures") from error
            write_atomically(path, _png(drawn))
            print(path)
            written.append(path)
    events = run_folder.path / "tb"
    if events.is_dir():
        from torch.utils.tensorboard import SummaryWriter

        with no_traceback_of_event_writer(), SummaryWriter(str(events)) as writer:
            for name, drawn in pictures.items():
                writer.add_image(name, drawn, dataformats="HWC")
    return written


def _files_by_name(images: Sequence[str]) -> dict[str, Path]:
    """Image files by the names of their pictures: their path below a given folder, or their own name.

    Raises UserError for two files of one name, since one picture would overwrite the other.
    """
    named: dict[str, Path] = {}
    for image in images:
        for file in image_files([image]):
            relative = file.relative_to(image) if Path(image).is_dir() else Path(file.name)
            name = "-".join(relative.with_suffix("").parts)
            if named.setdefault(name, file) != file:
                raise UserError(
                    f"{named[name]} and {file}: the pictures of both would be called {name}-...; use separate calls, "
                    "each with its own --out"
                )
    return named


def _heads(backbone: Backbone) -> int:
    return unpack_block(backbone.blocks[0], 0, ONLY).heads


def _figures(found: Attention, image_SS3: np.ndarray, block: int | None, head: int | None) -> Iterator[tuple[str, Any]]:
    """Names and figures of one image: a map in each cell, over the image."""
    numbers = range(len(found.class_token)) if block is None else [block]
    token, prompt = found.names
    of = "mean over heads" if head is None else f"head {head}"

    def chosen(weights_BHRM: Tensor) -> Tensor:
        weights_HRM = weights_BHRM[0].cpu()
        return weights_HRM.mean(0) if head is None else weights_HRM[head]

    cells = {f"block {number}": chosen(found.class_token[number])[0] for number in numbers}
    if block is not None and head is None:
        cells = {"mean": cells[f"block {block}"]}
        cells |= {f"head {h}": weights_RM[0] for h, weights_RM in enumerate(found.class_token[block][0].cpu())}
    kind = "class token" if token == "class" else "mean over the patches"
    where = of if block is None else f"block {block}"
    yield token, _grid([list(cells.items())], image_SS3, f"Attention of the {kind} to the patches, {where}", COLUMNS)
    rows = []
    for number in numbers:
        maps_RM = chosen(found.prompts[number])
        if len(maps_RM):
            rows.append([(f"block {number}, {prompt} {r}", weights_M) for r, weights_M in enumerate(maps_RM)])
    if rows:
        columns = min(SHOWN, max(len(row) for row in rows))
        if columns == 1:
            rows, columns = [[row[0] for row in rows]], COLUMNS
        name = {"prompt": "prompts", "query": "queries"}[prompt]
        yield name, _grid(rows, image_SS3, f"Attention of each {prompt} to the patches, {of}", columns)


def _grid(rows: list[list[tuple[str, Tensor]]], image_SS3: np.ndarray, title: str, columns: int) -> Any:
    """A figure with a cell for each map, with rows longer than ``columns`` wrapped; colors span each map's range."""
    from matplotlib.figure import Figure

    lines = [row[at : at + columns] for row in rows for at in range(0, len(row), columns)]
    columns = max(COLUMNS, *map(len, lines))
    label, head = 0.22, 0.3  # inches
    figure = Figure(figsize=(columns * CELL / 100 + 0.1, len(lines) * (CELL / 100 + label) + head), dpi=100)
    width, height = figure.get_size_inches()
    for r, line in enumerate(lines):
        for c, (name, weights_M) in enumerate(line):
            bottom = height - head - (r + 1) * (CELL / 100 + label)
            side = CELL / 100 - 0.06
            axes = figure.add_axes(
                ((0.05 + c * CELL / 100) / width, (bottom + 0.03) / height, side / width, side / height)
            )
            axes.imshow(_overlaid(image_SS3, weights_M.numpy()))
            axes.set_axis_off()
            axes.set_title(name, fontsize=6, pad=2)
    figure.text(0.05 / width, 1 - head / 2 / height, title, fontsize=8, va="center")
    return figure


def _overlaid(image_SS3: np.ndarray, weights_M: np.ndarray) -> np.ndarray:
    """The image in gray under the map in colors, dark for the least weight and bright for the most."""
    from matplotlib import colormaps
    from PIL import Image

    side = round(len(weights_M) ** 0.5)
    least, most = weights_M.min(), weights_M.max()
    scaled_SS = ((weights_M - least) / max(most - least, 1e-12)).reshape(side, side)
    large = Image.fromarray((scaled_SS * 255).astype(np.uint8)).resize(
        image_SS3.shape[1::-1], Image.Resampling.BILINEAR
    )
    color_SS3 = colormaps["inferno"](np.asarray(large))[..., :3]
    gray_SS1 = image_SS3.mean(2, keepdims=True)
    return OVERLAY * color_SS3 + (1 - OVERLAY) * gray_SS1


def _drawn(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _png(drawn_HW3: np.ndarray) -> bytes:
    import io

    from PIL import Image

    written = io.BytesIO()
    Image.fromarray(drawn_HW3).save(written, format="png")
    return written.getvalue()
