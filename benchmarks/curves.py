"""Draw a run's curves from its event files: python benchmarks/curves.py RUN --out FILE.svg

Loss, accuracy and learning rate by step, and the norms of gradient, trained parameters and updates, as TensorBoard
shows them; for pages that cannot start a TensorBoard.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_vpt.cli.main import run_with_exit_code
from dist_vpt.errors import RunFolderError

PANELS = {
    "loss": ("train/loss", "val/epoch_loss"),
    "top-1 accuracy, %": ("train/top1", "val/epoch_top1", "test/epoch_top1"),
    "learning rate": ("train/lr",),
    "L2 norms": ("norm/gradient", "norm/update", "norm/parameter"),
}


def draw(run: Path, out: Path) -> None:
    """One panel for each kind of curve; raises RunFolderError for a folder without event files."""
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    if not (run / "tb").is_dir():
        raise RunFolderError(f"{run}: no tb/ in it; name a run with run.trackers=[tensorboard]")
    events.Reload()
    known = set(events.Tags()["scalars"])
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name in (n for n in names if n in known):
            points = events.Scalars(name)
            marker = "o" if len(points) == 1 else None
            axes.plot([p.step for p in points], [p.value for p in points], label=name, marker=marker)
        axes.set(title=title, xlabel="step", yscale="log" if title == "L2 norms" else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, required=True, help="an .svg or .png file")
    options = parser.parse_args()
    return run_with_exit_code(lambda: draw(options.run, options.out), debug=False)


if __name__ == "__main__":
    sys.exit(main())
