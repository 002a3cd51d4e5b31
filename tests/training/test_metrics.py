"""Scores against plain counting in NumPy."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from dist_vpt.errors import DataError
from dist_vpt.training.metrics import BINS, MISTAKES_KEPT, CalibrationError, Scores

CPU = torch.device("cpu")


def draw(examples: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_NK = torch.randn(examples, classes, generator=generator) * 2
    labels_N = torch.randint(0, classes, (examples,), generator=generator)
    logits_NK[torch.arange(examples), labels_N] += 1.0
    return logits_NK, labels_N


def scored(logits_NK: Tensor, labels_N: Tensor, batch: int = 7, **options: Any) -> Scores:
    """Scores over batches of uneven length."""
    scores = Scores(logits_NK.shape[1], CPU, "val", **options)
    index_N = torch.arange(len(labels_N))
    for some in index_N.split(batch):
        scores.update(logits_NK[some], labels_N[some], torch.ones(len(some)), some)
    return scores


def calibration_by_hand(logits_NK: Tensor, labels_N: Tensor) -> float:
    """In percent: bin by bin, and in each image by image."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for logits_K, label in zip(logits_NK.double().numpy(), labels_N.tolist(), strict=True):
        probabilities_K = np.exp(logits_K - logits_K.max()) / np.exp(logits_K - logits_K.max()).sum()
        sure = float(probabilities_K.max())
        [number] = [m for m in range(BINS) if m / BINS < sure <= (m + 1) / BINS]
        bins[number].append((sure, int(probabilities_K.argmax()) == label))
    distances = [abs(sum(sure for sure, _ in one) - sum(right for _, right in one)) for one in bins]
    return 100 * sum(distances) / len(labels_N)


def by_hand(logits_NK: Tensor, labels_N: Tensor) -> dict[str, float]:
    logits, labels = logits_NK.double().numpy(), labels_N.numpy()
    order = np.argsort(-logits, axis=1)
    right = order[:, 0] == labels
    log_sums = np.log(np.exp(logits).sum(1))
    return {
        "loss": float(np.mean(log_sums - logits[np.arange(len(labels)), labels])),
        "top1": 100 * float(right.mean()),
        "top5": 100 * float((order[:, :5] == labels[:, None]).any(1).mean()),
        "per_class": 100 * float(np.mean([right[labels == k].mean() for k in np.unique(labels)])),
        "f1_macro": 100 * float(f1_score(labels, order[:, 0], average="macro")),
        "ece": calibration_by_hand(logits_NK, labels_N),
    }


def test_many_classes() -> None:
    logits_NK, labels_N = draw(100, 9)
    expected = by_hand(logits_NK, labels_N)
    assert len({round(value, 3) for value in expected.values()}) == 6
    assert scored(logits_NK, labels_N).compute() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (2, {"auroc"}),
        (3, set()),
        (5, set()),
        (6, {"top5"}),
    ],
)
def test_which_scores_there_are(classes: int, names: set[str]) -> None:
    always = {"loss", "top1", "per_class", "f1_macro", "ece"}
    assert set(scored(*draw(30, classes), confusion=True).compute()) == always | names


def test_two_classes_have_the_area_under_the_curve() -> None:
    logits_NK, labels_N = draw(60, 2)
    found = scored(logits_NK, labels_N).compute()
    assert 50 < found["auroc"] < 99
    assert found["auroc"] == pytest.approx(100 * roc_auc_score(labels_N, logits_NK.softmax(1)[:, 1]), rel=1e-5)


def test_a_class_without_images_does_not_lower_the_mean_over_classes() -> None:
    logits_NK = torch.tensor([[5.0, 0, 0], [5.0, 0, 0], [0, 0, 5.0], [0, 5.0, 0]])
    labels_N = torch.tensor([0, 0, 1, 1])  # class 2 is predicted once and has no image
    assert scored(logits_NK, labels_N).compute()["per_class"] == pytest.approx(75)


def test_padding_and_skipped_images_count_nothing() -> None:
    logits_NK, labels_N = draw(20, 8)
    padded_NK = torch.cat([logits_NK, torch.full((5, 8), float("nan")), -100 * torch.eye(8)])
    padded_N = torch.cat([labels_N, torch.zeros(5, dtype=torch.int64), torch.arange(8)])
    counts_N = torch.cat([torch.ones(20), torch.zeros(13)])
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    scores = Scores(8, CPU, "val", confusion=True)
    index_N = torch.cat([torch.arange(20), torch.full((13,), -1)])
    for some in order.split(6):
        scores.update(padded_NK[some], padded_N[some], counts_N[some], index_N[some])
    assert scores.compute() == pytest.approx(by_hand(logits_NK, labels_N), rel=1e-5)
    assert scores.confusion().sum() == 20
    assert all(mistake.index >= 0 for mistake in scores.mistakes)


def test_a_batch_of_padding_alone() -> None:
    logits_NK, labels_N = draw(10, 8)
    scores = scored(logits_NK, labels_N)
    before = scores.compute()
    scores.update(logits_NK, labels_N, torch.zeros(10), torch.full((10,), -1))
    assert scores.compute() == before


def test_confusion_has_labels_in_rows_and_predictions_in_columns() -> None:
    logits_NK, labels_N = draw(80, 4)
    found = scored(logits_NK, labels_N, confusion=True).confusion().numpy()
    assert np.array_equal(found, confusion_matrix(labels_N, logits_NK.argmax(1)))
    assert not np.array_equal(found, found.T)


def test_mistakes_are_the_first_wrong_ones() -> None:
    logits_NK, labels_N = draw(200, 7)
    mistakes = scored(logits_NK, labels_N, batch=50).mistakes
    wrong = (logits_NK.argmax(1) != labels_N).nonzero().flatten().tolist()
    assert len(wrong) > 50
    assert [mistake.index for mistake in mistakes] == wrong[:MISTAKES_KEPT]
    for mistake in mistakes:
        assert mistake.label == labels_N[mistake.index]
        assert mistake.predicted == logits_NK[mistake.index].argmax()
        assert mistake.probability == pytest.approx(float(logits_NK[mistake.index].softmax(0).max()), rel=1e-5)


def test_low_precision_logits_are_scored_in_float32() -> None:
    logits_NK, labels_N = draw(40, 8)
    low_NK = logits_NK.bfloat16()
    assert scored(low_NK, labels_N).compute() == scored(low_NK.float(), labels_N).compute()


def test_a_split_without_a_readable_image_is_an_error() -> None:
    for classes in (2, 3):
        scores = Scores(classes, torch.device("cpu"), "test")
        scores.update(torch.zeros(2, classes), torch.zeros(2, dtype=torch.long), torch.zeros(2), torch.arange(2))
        with pytest.raises(DataError, match="no readable image in the test split"):
            scores.compute()


def test_auroc_of_one_class_is_not_defined_and_warns_of_nothing() -> None:
    logits_NK, labels_N = draw(20, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(logits_NK, torch.ones_like(labels_N)).compute()
    assert found["auroc"] is None
    assert set(found) == {"loss", "top1", "per_class", "f1_macro", "ece", "auroc"}
    assert all(np.isfinite(value) for name, value in found.items() if name != "auroc")


@pytest.mark.parametrize("classes", [2, 9])
def test_calibration_error_is_that_of_torchmetrics(classes: int) -> None:
    logits_NK, labels_N = draw(500, classes)
    theirs = 100 * float(multiclass_calibration_error(logits_NK.softmax(1), labels_N, classes, n_bins=BINS))
    assert theirs > 2
    assert scored(logits_NK, labels_N).compute()["ece"] == pytest.approx(theirs, rel=1e-5)


def test_a_probability_on_an_edge_is_in_the_bin_below_it() -> None:
    """With 15 bins 3 / 5 is an edge: both images are in one bin, where their mean is right."""
    error = CalibrationError(CPU)
    error.update(torch.tensor([[0.6, 0.4], [0.55, 0.45]], dtype=torch.float64), torch.tensor([0, 1]))
    assert float(error.compute()) == pytest.approx(abs(0.6 + 0.55 - 1) / 2)


def test_calibration_of_certain_and_right_answers() -> None:
    labels_N = torch.arange(30) % 3
    assert scored(100 * torch.eye(3)[labels_N], labels_N).compute()["ece"] == 0


def test_f1_macro_counts_a_class_that_is_only_predicted() -> None:
    logits_NK = torch.eye(4)[[0, 0, 1, 2]]
    labels_N = torch.tensor([0, 0, 1, 1])  # class 2 is predicted once and has no image, class 3 is not met
    expected = f1_score(labels_N, logits_NK.argmax(1), average="macro")
    assert scored(logits_NK, labels_N).compute()["f1_macro"] == pytest.approx(100 * expected) == pytest.approx(500 / 9)


def test_calibration_error_of_divided_logits() -> None:
    logits_NK, labels_N = draw(90, 7)
    found = scored(logits_NK, labels_N, temperature=2.5).compute()
    assert found["ece_scaled"] == pytest.approx(calibration_by_hand(logits_NK / 2.5, labels_N), rel=1e-5)
    assert {name: value for name, value in found.items() if name != "ece_scaled"} == pytest.approx(
        by_hand(logits_NK, labels_N), rel=1e-5
    )


def test_among_some_classes_the_others_are_as_if_they_were_not_there() -> None:
    logits_NK, labels_N = draw(200, 12)
    few = torch.tensor([1, 2, 5, 6, 7, 9, 11])
    kept = torch.isin(labels_N, few)
    among = torch.zeros(12, dtype=torch.bool).index_fill(0, few, True)
    found = scored(logits_NK[kept], labels_N[kept], among=among).compute()
    assert found == pytest.approx(by_hand(logits_NK[kept][:, few], torch.searchsorted(few, labels_N[kept])), rel=1e-5)
    assert found["top1"] > scored(logits_NK[kept], labels_N[kept]).compute()["top1"]
    three = torch.zeros(12, dtype=torch.bool).index_fill(0, few[:3], True)
    assert "top5" not in scored(logits_NK[:1], few[:1], among=three).compute()


def test_predictions_in_the_order_of_the_split() -> None:
    logits_NK, labels_N = draw(50, 5)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    scores = Scores(5, CPU, "test", keep="predictions")
    for some in order.split(8):
        counts = (some != 3).float()  # image 3 could not be read
        scores.update(logits_NK[some], labels_N[some], counts, some)
    found = scores.predictions()
    rows = [i for i in range(50) if i != 3]
    assert found.index_n.tolist() == rows
    assert found.label_n.tolist() == labels_N[rows].tolist()
    assert found.predicted_n.tolist() == logits_NK[rows].argmax(1).tolist()
    expected = logits_NK.double().softmax(1)[rows, labels_N[rows]].numpy()
    assert found.probability_n == pytest.approx(expected, rel=1e-5)
    assert np.array_equal(found.confusion(5), confusion_matrix(labels_N[rows], logits_NK[rows].argmax(1)))


@pytest.mark.parametrize("classes", [2, 7])
def test_one_image_that_is_not_finite_shows_in_the_loss(classes: int) -> None:
    """torchmetrics would leave it out of the mean, and warn on the terminal."""
    logits_NK, labels_N = draw(50, classes)
    logits_NK[3] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(scored(logits_NK, labels_N).compute()["loss"])
