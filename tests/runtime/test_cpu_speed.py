"""How fast a CPU multiplies: measured once for a machine, and what a run makes of it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dist_vpt.backbones import products
from dist_vpt.runtime import cpu_speed as module
from dist_vpt.runtime.cpu_speed import CPUSpeed, cpu_speed, use_faster_products
from tests.running import train

FAST, SLOW = CPUSpeed(bf16=6, onednn=2), CPUSpeed(bf16=0.3, onednn=1.1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(products, "_switch", {"onednn": False})
    return tmp_path / "cache/dist_vpt/cpu_speed.json"


def machine(monkeypatch: pytest.MonkeyPatch, speed: CPUSpeed) -> None:
    monkeypatch.setattr(module, "_measure", lambda: speed)


def test_products_are_timed_on_one_thread() -> None:
    threads = torch.get_num_threads()
    speed = module._measure()
    assert speed.bf16 > 0
    assert speed.onednn > 0
    assert torch.get_num_threads() == threads


def test_each_product_has_its_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 9.0, *(3.0, 5.0) * 9, 2.0, 4.0])
    monkeypatch.setattr(module, "_time", lambda _: next(times))
    assert module._seconds([lambda: None, lambda: None]) == [2, 4]
    assert not list(times)


def test_a_torch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONEDNN_LINEAR", None)
    assert module._measure().onednn == 1
    monkeypatch.setattr(products, "ONEDNN_LINEAR", None)
    products.use_onednn(True)
    assert products._switch == {"onednn": False}


def test_a_machine_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, FAST)
    assert cpu_speed() == FAST
    machine(monkeypatch, SLOW)
    assert cpu_speed() == FAST
    monkeypatch.setattr(module, "_machine", lambda: "another")
    assert cpu_speed() == SLOW
    assert list(json.loads(cache.read_text()).values()) == [asdict(FAST), asdict(SLOW)]


def test_what_is_measured_with_other_instructions_is_not_kept_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, SLOW)
    with monkeypatch.context() as limited:
        limited.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        assert cpu_speed() == SLOW
    machine(monkeypatch, FAST)
    assert cpu_speed() == FAST


def test_processes_that_start_together_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([FAST, SLOW])

    def slowly() -> CPUSpeed:
        time.sleep(0.2)
        return next(measured)

    monkeypatch.setattr(module, "_measure", slowly)
    with ThreadPoolExecutor() as threads:
        assert list(threads.map(lambda _: cpu_speed(), range(2))) == [FAST, FAST]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"x": null}', '"a"', '{"x": 3}', '{"x": {"bf16": 3}}', '{"x": {"bf16": 3, "onednn": "2"}}'],
)
def test_a_damaged_file_is_measured_anew(content: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace("x", module._machine()))
    machine(monkeypatch, FAST)
    assert cpu_speed() == FAST
    assert json.loads(cache.read_text())[module._machine()] == asdict(FAST)


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine(monkeypatch, FAST)
    assert cpu_speed() == FAST


@pytest.mark.parametrize(("times", "note"), [(1.19, ""), (2.04, "by oneDNN, 2.0 times as fast here as torch's own")])
def test_onednn_is_used_where_it_is_faster(times: float, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, CPUSpeed(1, times))
    for before in (False, True):
        products.use_onednn(before)
        assert use_faster_products() == note
        assert products._switch == {"onednn": bool(note)}


def test_a_run_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, CPUSpeed(1, 2))
    note = "by oneDNN, 2.0 times as fast here as torch's own"
    assert train(tmp_path / "r", "runtime.precision=fp32")["runtime"]["float32 products"] == note
    assert f"float32 products {note}" in (tmp_path / "r/train.log").read_text()
    assert "float32 products" not in train(tmp_path / "h", "runtime.precision=bf16")["runtime"]
