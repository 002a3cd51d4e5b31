"""The files of ``dist-vpt features``: shards of safetensors or Parquet, each written whole or not at all.

n images of a shard; features [n, ...] float32.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from dist_vpt.data.labels import are_multiple
from dist_vpt.errors import UserError
from dist_vpt.files import write_atomically

Format = Literal["safetensors", "parquet"]
INSTALL = "pip install 'dist-vpt[parquet]'"


@dataclass(frozen=True)
class Shard:
    """Some images of a split, in its order."""

    features: Tensor
    labels_n: Tensor  # int64 [n], or uint8 [n, K] of several labels an image
    paths: list[str]


def check_format(format: Format) -> None:
    """Raises UserError where the package that writes the format is missing."""
    if format == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--format parquet: needs pyarrow, which is not installed ({INSTALL}); or use --format safetensors"
            ) from error


def write_shard(file: Path, shard: Shard, format: Format, classes: Sequence[str], facts: dict[str, Any]) -> None:
    """Write a shard; ``facts`` are its metadata, as JSON under ``dist_vpt``."""
    if format == "safetensors":
        metadata = {"format": "pt", "dist_vpt": json.dumps(facts), "paths": json.dumps(shard.paths)}
        write_atomically(file, save({"features": shard.features.contiguous(), "labels": shard.labels_n}, metadata))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = shard.features.flatten(1).numpy()
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    labels = shard.labels_n.numpy()
    if are_multiple(labels):  # for each image the numbers and the names of its classes
        numbers = [np.flatnonzero(row).tolist() for row in labels]
        named = pa.array([[classes[k] for k in row] for row in numbers], pa.list_(pa.string()))
        columns = {"path": pa.array(shard.paths), "label": pa.array(numbers, pa.list_(pa.int64())), "class": named}
    else:
        named = pa.DictionaryArray.from_arrays(pa.array(labels.astype(np.int32)), pa.array(list(classes)))
        columns = {"path": pa.array(shard.paths), "label": pa.array(labels), "class": named}
    table = pa.table(columns | {"features": values}).replace_schema_metadata({"dist_vpt": json.dumps(facts)})
    written = io.BytesIO()
    pq.write_table(table, written)
    write_atomically(file, written.getbuffer())


def join(parts: Sequence[Shard]) -> Shard:
    """Several as one."""
    features, labels_n = (torch.cat([getattr(part, name) for part in parts]) for name in ("features", "labels_n"))
    return Shard(features, labels_n, [path for part in parts for path in part.paths])
