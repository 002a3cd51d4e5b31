"""Scores against plain counting in NumPy."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, roc_auc_score
from torch import Tensor

from dist_vpt.errors import DataError
from dist_vpt.training.metrics import MISTAKES_KEPT, Scores

CPU = torch.device("cpu")


def draw(examples: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_NK = torch.randn(examples, classes, generator=generator) * 2
    labels_N = torch.randint(0, classes, (examples,), generator=generator)
    logits_NK[torch.arange(examples), labels_N] += 1.0
    return logits_NK, labels_N


def scored(logits_NK: Tensor, labels_N: Tensor, batch: int = 7, **options: bool) -> Scores:
    """Scores over batches of uneven length."""
    scores = Scores(logits_NK.shape[1], CPU, "val", **options)
    index_N = torch.arange(len(labels_N))
    for some in index_N.split(batch):
        scores.update(logits_NK[some], labels_N[some], torch.ones(len(some)), some)
    return scores


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
    }


def test_many_classes() -> None:
    logits_NK, labels_N = draw(100, 9)
    expected = by_hand(logits_NK, labels_N)
    assert len({round(value, 3) for value in expected.values()}) == 4
    assert scored(logits_NK, labels_N).compute() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (2, {"loss", "top1", "per_class", "auroc"}),
        (3, {"loss", "top1", "per_class"}),
        (5, {"loss", "top1", "per_class"}),
        (6, {"loss", "top1", "per_class", "top5"}),
    ],
)
def test_which_scores_there_are(classes: int, names: set[str]) -> None:
    assert set(scored(*draw(30, classes), confusion=True).compute()) == names


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
    assert set(found) == {"loss", "top1", "per_class", "auroc"}
    assert all(np.isfinite(value) for name, value in found.items() if name != "auroc")
