"""A frozen stream that is kept in 8 bits."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device

from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.frozen_stream import prefetch
from dist_vpt.frozen_stream.cache import CachedBatches, StreamCache, assemble, fill, layout, nbytes, write_rows
from dist_vpt.frozen_stream.compact import Packed, pack
from dist_vpt.frozen_stream.config import StreamDtype
from dist_vpt.frozen_stream.disk import cache_folder, identity, on_disk
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream
from tests.frozen_stream.test_cache import FAST, READERS, parts_of, run
from tests.methods.conftest import make_backbone

# Half a step of the largest number of a token; 3 bits behind the leading one, but below 2^-6 (of 448) a fixed step.
ERROR = {"int8": 0.5 / 127, "fp8": 2**-4}
SPECS = {
    "normed": StreamSpec((0, 2), key_scales=True),
    "keys": StreamSpec((1,), keys=True, pixels=True),
    "states": StreamSpec(states=(0, 3), patches_only=True),
    "sum": StreamSpec(states=(1, 2, 3), patches_only=True, summed=True),
}


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_token_is_kept_to_its_own_scale(dtype: StreamDtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 5, 32) * torch.logspace(-6, 6, 30).view(6, 5, 1)
    rows[2, 3] = 0
    rows[4, 1, 7] *= 100  # one number far above the others of its token
    packed = Packed(*pack(rows, dtype), torch.float32)
    found = packed.rows(torch.tensor([4, 0, 2])).unpack()
    wanted = rows[[4, 0, 2]].double()
    largest = wanted.abs().amax(-1, keepdim=True)
    allowed = ERROR[dtype] * (largest if dtype == "int8" else wanted.abs().maximum(largest / 448 * 2**-6))
    assert ((found.double() - wanted).abs() <= allowed * 1.001).all()
    assert (found[2, 3] == 0).all()


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_memory_and_disk_hold_the_same(kind: str, dtype: StreamDtype, tmp_path: Path) -> None:
    spec, parts, backbone = (
        replace(SPECS[kind], dtype=dtype),
        parts_of("data.image_size=16"),
        make_backbone("registers"),
    )
    split, batches = parts.splits["val"], partial(parts.evaluation, "val")
    facts = identity(split, parts.transform, 178.0, backbone, spec)
    cpu, stop = torch.device("cpu"), StopSignal()
    memory = fill(backbone, spec, batches(0, 1), split, RankAccelerator(cpu=True), cpu, stop)
    target = cache_folder(str(tmp_path), facts)
    built, _ = on_disk(target, facts, backbone, spec, batches, cpu, stop)
    opened, _ = on_disk(target, facts, backbone, spec, batches, cpu, stop)
    exact = compute_stream(backbone, torch.cat([batch["images"] for batch in batches(0, 1)]), spec)
    rows = torch.tensor([3, 199, 0])
    for cache in (memory, built, opened):
        assert (
            bytes_of(cache)
            == nbytes(backbone, spec, 200)
            == sum(a.nbytes for a in layout(backbone, spec, 200).values())
        )
        for name, found, first, wanted in zip(exact._fields, cache[rows], memory[rows], exact, strict=True):
            pairs = (
                [(found, first, wanted)] if isinstance(wanted, torch.Tensor) else zip(found, first, wanted, strict=True)
            )
            for one, other, of_all in pairs:
                assert torch.equal(one, other)
                error = (one - of_all[rows]).norm() / of_all[rows].norm()
                assert error < (1e-6 if name in ("pooled", "pixels", "key_scales") else 0.04), name
    plain = identity(split, parts.transform, 178.0, backbone, SPECS[kind])
    assert cache_folder(str(tmp_path), plain) != target


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_rows_cross_to_a_device_in_8_bits(dtype: StreamDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied is what is kept; what comes out is the same to the bit."""
    backbone, spec, images = make_backbone(), replace(SPECS["keys"], dtype=dtype), torch.arange(7)
    output = compute_stream(backbone, torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8), spec)
    arrays = {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in layout(backbone, spec, 7).items()}
    write_rows(arrays, spec, output, images)
    cache, device = assemble(arrays, np.ones(7, bool), spec, backbone.dtype), torch.device("cpu")
    sent: list[StreamOutput] = []

    def send(made: StreamOutput, *args: Any, **named: Any) -> StreamOutput:
        sent.append(made)
        return send_to_device(made, *args, **named)

    monkeypatch.setattr(prefetch, "send_to_device", send)
    ahead = CachedBatches(cache, np.zeros(7, np.int64), set(), device)
    monkeypatch.setattr(ahead, "_ahead", device)
    [batch] = ahead([(0, np.array([4, 0, 2]))])
    [packed] = sent
    for kept, name in ((packed.keys[0], "keys-01"), (packed.values[0], "values-01")):
        assert isinstance(kept, Packed)
        assert kept.values.dtype == (torch.int8 if dtype == "int8" else torch.uint8)
        assert torch.equal(kept.values, arrays[name][[4, 0, 2]])
        assert torch.equal(kept.scale, arrays[f"{name}-scale"][[4, 0, 2]])
    wanted = cache[torch.tensor([4, 0, 2])]
    for found, right in zip(batch["images"].keys + batch["images"].values, wanted.keys + wanted.values, strict=True):
        assert found.dtype == backbone.dtype
        assert torch.equal(found, right)
    assert torch.equal(batch["images"].pixels[0], output.pixels[0][[4, 0, 2]])


def bytes_of(cache: StreamCache) -> int:
    """Of all tensors that a cache keeps."""
    pooled, *fields = cache.kept
    kept = [pooled]
    for field in fields:
        for each in field:
            kept += [each.values, each.scale] if isinstance(each, Packed) else [each]
    return sum(tensor.nbytes for tensor in kept)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("reader", ["vqt", "combo"])
def test_training_on_8_bits_comes_close(reader: str, data: tuple[str, ...], tmp_path: Path) -> None:
    options = (*data, *FAST, *READERS[reader], "train.batch_size=30", "optim.lr=0.1", "train.epochs=2")
    exact = run(tmp_path / "exact", *options, "stream.cache=memory")
    for dtype in ("int8", "fp8"):
        found = run(tmp_path / dtype, *options, "stream.cache=memory", f"stream.dtype={dtype}")
        assert f"cached in {dtype} in memory" in found.line
        assert found.losses == pytest.approx(exact.losses, rel=0.05)
        assert found.losses != exact.losses
        assert np.isfinite(found.losses).all()


@pytest.mark.usefixtures("on_the_cpu")
def test_disk_serves_a_second_run(data: tuple[str, ...], tmp_path: Path) -> None:
    options = (*data, *FAST, *READERS["vqt"], "train.batch_size=30", "train.epochs=2", "optim.lr=0.1")
    disk = (*options, "stream.cache=disk", f"stream.dir={tmp_path / 'cache'}", "stream.dtype=int8")
    first, second = run(tmp_path / "first", *disk), run(tmp_path / "second", *disk)
    assert first.losses == second.losses
    assert second.live == 0
