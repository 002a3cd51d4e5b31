"""Images of ``data.cache: memory`` on the device: what is drawn for an epoch is cut and flipped there, batch by batch.

n images, b of a micro-batch, S image side, H and W of an image before the cut, X all bytes of all images.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dist_vpt.data.transforms import ImageTransform, nearest_two


class DeviceImages:
    """Images that were read, on a device, and batches of them that equal those of ImageBatches.

    ``pixels``: image -> what ImageReader gives for it: final pixels [3, S, S] or, where something is drawn,
    uint8 [H, W, 3] of any height and width; None for one that could not be read.
    """

    def __init__(
        self,
        pixels: Mapping[int, np.ndarray | None],
        transform: ImageTransform,
        device: torch.device,
        *,
        seed: int,
        final: bool,
    ):
        self._transform, self._device, self._seed, self._final = transform, device, seed, final
        readable = {i: each for i, each in pixels.items() if each is not None}
        self._row = {i: row for row, i in enumerate(readable)}
        arrays = list(readable.values())
        size = transform.image_size
        if final:
            empty = np.empty((0, 3, size, size), transform.dtype)
            self._final_n3SS = torch.from_numpy(np.stack(arrays) if arrays else empty).to(device)
            return
        # One after the other, since they differ in size.
        flat = [np.ascontiguousarray(each).reshape(-1) for each in arrays]
        self._flat_X = torch.from_numpy(np.concatenate(flat) if flat else np.empty(0, np.uint8)).to(device)
        self._start_n = np.concatenate([[0], np.cumsum([len(each) for each in flat])]).astype(np.int64)
        self._size_n = [each.shape[:2] for each in arrays]

    @staticmethod
    def nbytes(pixels: Mapping[int, np.ndarray | None]) -> int:
        """Bytes that these images take on the device."""
        return sum(each.nbytes for each in pixels.values() if each is not None)

    def is_readable(self, i: int) -> bool:
        """Whether an image was read."""
        return i in self._row

    def __call__(self, epoch: int | np.ndarray, index_b: np.ndarray) -> Tensor:
        """Images [b, 3, S, S] of the transform's dtype on the device; zeros for padding and what was not read.

        ``epoch``: or a number in its place for each position.
        """
        dtype = torch.float32 if self._transform.dtype == np.float32 else torch.uint8
        shape = self._final_n3SS.shape[1:] if self._final else self._transform.shape(train=True)
        images_b3SS = torch.zeros((len(index_b), *shape), dtype=dtype, device=self._device)
        positions = [position for position, i in enumerate(index_b) if int(i) in self._row]
        if not positions:
            return images_b3SS
        images = [int(index_b[position]) for position in positions]
        rows = [self._row[i] for i in images]
        epochs = np.broadcast_to(epoch, len(index_b))[positions].tolist()
        made = self._final_n3SS[self._sent(rows)] if self._final else self._cut(epochs, images, rows)
        images_b3SS[self._sent(positions)] = made
        return images_b3SS

    def _cut(self, epochs: list[int], images: list[int], rows: list[int]) -> Tensor:
        """The drawn squares of some images, [b, 3, S, S]."""
        transform, size = self._transform, self._transform.image_size
        vpt = transform.interpolation == "vpt"
        ys, xs = [], []  # by image: source positions of the square's rows and columns; for vpt two, and a weight
        for epoch, i, row in zip(epochs, images, rows, strict=True):
            height, width = self._size_n[row]
            rows_H, columns_W = transform.size_before_cut(height, width, train=True) if vpt else (height, width)
            top, left, flip = transform.drawn(rows_H, columns_W, self._seed, epoch, i)
            y, x = np.arange(top, top + size), np.arange(left, left + size)
            x = x[::-1] if flip else x
            if vpt:
                ys.append([each[y] for each in nearest_two(height, rows_H)])
                xs.append([each[x] for each in nearest_two(width, columns_W)])
            else:
                ys.append([y])
                xs.append([x])
        start_b = self._sent([int(self._start_n[row]) for row in rows])
        width_b = self._sent([self._size_n[row][1] for row in rows])

        def read(y_bS: Tensor, x_bS: Tensor) -> Tensor:
            pixel_bSS = y_bS[:, :, None] * width_b[:, None, None] + x_bS[:, None, :]
            channel_3 = torch.arange(3, device=self._device)
            place_b3SS = start_b[:, None, None, None] + 3 * pixel_bSS[:, None] + channel_3[None, :, None, None]
            return self._flat_X[place_b3SS]

        if not vpt:
            return read(self._sent(ys)[:, 0], self._sent(xs)[:, 0])
        low_y, high_y, low_x, high_x = (self._sent([each[k] for each in of]) for of in (ys, xs) for k in (0, 1))
        weight_y, weight_x = (self._sent([each[2] for each in of]) for of in (ys, xs))

        def along_x(y_bS: Tensor) -> Tensor:
            left_b3SS = read(y_bS, low_x).float()
            return left_b3SS + (read(y_bS, high_x).float() - left_b3SS) * weight_x[:, None, None, :]

        top_b3SS = along_x(low_y)
        return top_b3SS + (along_x(high_y) - top_b3SS) * weight_y[:, None, :, None]

    def _sent(self, numbers: object) -> Tensor:
        """On the device, without waiting for it."""
        made = torch.from_numpy(np.ascontiguousarray(np.array(numbers)))
        return made.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else made
