"""Positions resampled to another grid in plain NumPy float64, as the published code of VPT and VQT does.

R prefix tokens, D width, G and H sides of the grids.
"""

import numpy as np

Array = np.ndarray


def aligned(positions_1ND: Array, prefix: int, rows: int, columns: int) -> Array:
    """Bilinear, with the corners of the square grid on those of the new one; the prefix tokens stay as they are."""
    positions_ND = positions_1ND[0].astype(np.float64)
    side = round((len(positions_ND) - prefix) ** 0.5)
    grid_GGD = positions_ND[prefix:].reshape(side, side, -1)
    resized = [
        _between(grid_GGD, _place(row, rows, side), _place(column, columns, side))
        for row in range(rows)
        for column in range(columns)
    ]
    return np.concatenate([positions_ND[:prefix], np.stack(resized)])[None]


def _place(index: int, count: int, side: int) -> float:
    """Where the point of this index lies in the old grid, in steps of it; a grid of one point has its first corner."""
    return index * (side - 1) / (count - 1) if count > 1 else 0.0


def _between(grid_GGD: Array, row: float, column: float) -> Array:
    """The mean of the four neighbors of a point, each weighted by its nearness."""
    total_D = np.zeros(grid_GGD.shape[2])
    for i in range(grid_GGD.shape[0]):
        for j in range(grid_GGD.shape[1]):
            total_D += max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j)) * grid_GGD[i, j]
    return total_D
