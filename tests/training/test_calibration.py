"""Temperature scaling against a search in float64."""

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from dist_vpt.training.calibration import fit_temperature
from dist_vpt.training.metrics import Scores
from tests.training.test_metrics import CPU, draw


def cross_entropy(logits_NK: Tensor, labels_N: Tensor, temperature: float) -> float:
    logits = logits_NK.double().numpy() / temperature
    logits = logits - logits.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), labels_N.numpy()]))


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_no_temperature_of_a_grid_has_a_lower_cross_entropy(scale: float) -> None:
    logits_NK, labels_N = draw(400, 7)
    logits_NK = scale * logits_NK
    found = fit_temperature(logits_NK, labels_N)
    assert found["images"] == 400
    lowest = cross_entropy(logits_NK, labels_N, found["value"])
    grid = np.geomspace(0.05, 20, 20_001)
    losses = [cross_entropy(logits_NK, labels_N, temperature) for temperature in grid[::100]]
    near = grid[max(0, 100 * int(np.argmin(losses)) - 100) :][:201]
    fine = [cross_entropy(logits_NK, labels_N, temperature) for temperature in near]
    assert lowest <= min(fine) + 1e-14
    assert found["value"] == pytest.approx(near[int(np.argmin(fine))], rel=2e-3)


def test_logits_of_known_temperature() -> None:
    """Labels that are drawn by the probabilities of z: of 3 z the temperature is 3."""
    generator = torch.Generator().manual_seed(0)
    logits_NK = torch.randn(40_000, 5, generator=generator)
    labels_N = logits_NK.softmax(1).multinomial(1, generator=generator)[:, 0]
    assert fit_temperature(3 * logits_NK, labels_N)["value"] == pytest.approx(3, rel=0.02)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NK, labels_N = draw(300, 7)
    whole = fit_temperature(logits_NK, labels_N)["value"]
    monkeypatch.setattr("dist_vpt.training.calibration.CHUNK", 70)
    assert fit_temperature(logits_NK, labels_N)["value"] == pytest.approx(whole, rel=1e-10)


def least(logits_NK: Tensor, labels_N: Tensor) -> float:
    """The temperature by SciPy's bounded minimisation of the cross entropy in float64, to about 1e-7."""
    found = optimize.minimize_scalar(
        lambda log: cross_entropy(logits_NK, labels_N, float(np.exp(log))), bounds=(-4.5, 4.5), method="bounded",
        options={"xatol": 1e-9, "maxiter": 1000},
    )  # fmt: skip
    return float(np.exp(found.x))


@pytest.mark.parametrize("scale", [0.05, 0.3, 4.0, 10.0])
@pytest.mark.parametrize("sample", [7, 200, 10**9])  # logits: 1 image, 28 of 400, all
def test_an_estimate_on_some_images_leads_to_the_optimum_of_all(
    scale: float, sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_NK, labels_N = draw(400, 7)
    logits_NK = scale * logits_NK
    monkeypatch.setattr("dist_vpt.training.calibration.SAMPLE", sample)
    found = fit_temperature(logits_NK, labels_N)["value"]
    assert found == pytest.approx(least(logits_NK, labels_N), rel=1e-6)
    monkeypatch.setattr("dist_vpt.training.calibration.SAMPLE", 10**9)
    assert found == pytest.approx(fit_temperature(logits_NK, labels_N)["value"], rel=1e-10)


def test_some_images_without_a_mistake_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth image is right by far; of the others every second one is wrong."""
    labels_N = torch.arange(100) % 3
    logits_NK = 20 * torch.eye(3)[labels_N]
    wrong = torch.arange(1, 100, 2)
    logits_NK[wrong] = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("dist_vpt.training.calibration.SAMPLE", 30)
    assert fit_temperature(logits_NK, labels_N)["value"] == pytest.approx(least(logits_NK, labels_N), rel=1e-6)
    monkeypatch.setattr("dist_vpt.training.calibration.NEWTON_STEPS", 0)
    assert fit_temperature(logits_NK, labels_N)["value"] == pytest.approx(least(logits_NK, labels_N), rel=1e-6)
    assert "no mistake" in fit_temperature(20 * torch.eye(3)[labels_N], labels_N)["reason"]


def test_it_is_invariant_to_shifts_and_follows_the_scale() -> None:
    logits_NK, labels_N = draw(300, 7)
    value = fit_temperature(logits_NK, labels_N)["value"]
    shifted = fit_temperature(8 * logits_NK.double() + torch.arange(300)[:, None], labels_N)["value"]
    assert shifted == pytest.approx(8 * value, rel=1e-9)


@pytest.mark.parametrize(
    ("logits_NK", "reason"),
    [
        (torch.eye(3), "no mistake"),
        (-torch.eye(3), "no better than by guessing"),
        (torch.zeros(3, 3), "no better than by guessing"),
        (torch.full((3, 3), torch.nan), "not finite"),
    ],
)
def test_where_no_temperature_is_best(logits_NK: Tensor, reason: str) -> None:
    found = fit_temperature(logits_NK, torch.arange(3))
    assert found["value"] is None
    assert reason in found["reason"]


def test_the_calibration_error_falls() -> None:
    logits_NK, labels_N = draw(2_000, 7)
    scores = Scores(7, CPU, "val", keep="logits")
    for some in torch.arange(1_000).split(64):
        scores.update(logits_NK[some], labels_N[some], torch.ones(len(some)), some)
    kept_NK, kept_N = scores.logits()
    assert torch.equal(kept_NK, logits_NK[:1_000])
    assert torch.equal(kept_N, labels_N[:1_000])
    value = fit_temperature(kept_NK, kept_N)["value"]
    test = Scores(7, CPU, "test", temperature=value)
    rest = torch.arange(1_000, 2_000)
    test.update(logits_NK[rest], labels_N[rest], torch.ones(1_000), rest)
    found = test.compute()
    assert found["ece_scaled"] < found["ece"] / 2
