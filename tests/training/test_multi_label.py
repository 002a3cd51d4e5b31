"""Several labels an image: the loss against slow float64 mathematics, the scores against scikit-learn."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import DataError
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import OptimConfig, TrainConfig
from dist_vpt.training.accelerator import make_accelerator
from dist_vpt.training.class_weights import class_weights
from dist_vpt.training.learning import Guessing, warning_of
from dist_vpt.training.metrics import Scores
from dist_vpt.training.multi_label import MultiLabelScores, best_thresholds, scores_of
from dist_vpt.training.step import image_losses, right_answers, weigh
from tests.forks import launched
from tests.reference import multi_label as reference

CPU = torch.device("cpu")


def draw(images: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that know something, and labels, of which the classes have fewer and fewer."""
    generator = torch.Generator().manual_seed(seed)
    shares_K = torch.linspace(0.6, 0.1, classes)
    labels_nK = (torch.rand(images, classes, generator=generator) < shares_K).float()
    logits_nK = torch.randn(images, classes, generator=generator) + 1.5 * labels_nK - 1
    return logits_nK, labels_nK


def scored(logits_nK: Tensor, labels_nK: Tensor, batch: int = 7) -> MultiLabelScores:
    scores = MultiLabelScores(logits_nK.shape[1], CPU, "val")
    for some in torch.arange(len(labels_nK)).split(batch):
        scores.update(logits_nK[some], labels_nK[some], torch.ones(len(some)), some)
    return scores


def by_scikit_learn(logits_nK: Tensor, labels_nK: Tensor, thresholds: list[float]) -> dict[str, float]:
    probabilities_nK = logits_nK.sigmoid().double().numpy()
    labels, predicted = labels_nK.numpy(), probabilities_nK >= np.array(thresholds)
    there = labels.any(0)
    ones = np.ones(labels.shape[1])
    return {
        "loss": reference.loss(logits_nK.double().numpy(), labels, np.ones(len(labels)), 0.0, ones)[0],
        "mAP": 100 * average_precision_score(labels[:, there], probabilities_nK[:, there], average="macro"),
        "f1_micro": 100 * f1_score(labels, predicted, average="micro"),
        "f1_macro": 100 * f1_score(labels, predicted, average="macro", zero_division=0),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_against_slow_mathematics(smoothing: float, weighted: bool) -> None:
    logits_BK, labels_BK = draw(9, 5)
    logits_BK, labels_BK = logits_BK.double().requires_grad_(), labels_BK.double()
    weights_B = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0, 1]).double()
    weights_K = torch.tensor([0.5, 2, 3, 1, 7]).double() if weighted else torch.ones(5).double()
    batch = cast(Any, {"labels": labels_BK, "weight": weights_B})
    assert weigh(batch, weights_K) is weights_B  # classes are weighed inside of an image's loss
    loss = (image_losses(logits_BK, labels_BK, smoothing, weights_K) * weights_B).sum() / weights_B.sum()
    loss.backward()
    expected, gradient_BK = reference.loss(
        logits_BK.detach().numpy(), labels_BK.numpy(), weights_B.numpy(), smoothing, weights_K.numpy()
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    assert logits_BK.grad is not None
    np.testing.assert_allclose(logits_BK.grad.numpy(), gradient_BK, rtol=1e-10, atol=1e-15)


def test_losses_of_many_trials_are_those_of_each() -> None:
    _, labels_BK = draw(7, 5)
    logits_TBK, weights_K = torch.randn(3, 7, 5), torch.rand(5) + 0.5
    losses_TB = image_losses(logits_TBK, labels_BK, 0.1, weights_K)
    answers_TB = right_answers(logits_TBK, labels_BK)
    for logits_BK, losses_B, answers_B in zip(logits_TBK, losses_TB, answers_TB, strict=True):
        assert torch.equal(losses_B, image_losses(logits_BK, labels_BK, 0.1, weights_K))
        assert torch.equal(answers_B, ((logits_BK > 0) == (labels_BK > 0)).float().mean(1))


def test_class_weights_balance_each_class() -> None:
    labels_nK = np.array([[1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]], np.uint8)
    assert class_weights("inv", labels_nK, 4).tolist() == [3, 1, 1, 1]  # negatives / positives, where there are both
    assert class_weights("none", labels_nK, 4).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_scores_against_scikit_learn(batch: int) -> None:
    logits_nK, labels_nK = draw(60, 6)
    scores = scored(logits_nK, labels_nK, batch)
    found = scores.compute()
    assert found == pytest.approx(by_scikit_learn(logits_nK, labels_nK, list(scores.thresholds)), rel=1e-6)
    given = [0.5, 0.3, 0.7, 0.1, 0.9, 0.2]
    scores.given = given
    assert scores.compute() == pytest.approx(by_scikit_learn(logits_nK, labels_nK, given), rel=1e-6)
    assert list(scores.thresholds) == given
    own = [100 * average_precision_score(labels_nK[:, k], logits_nK[:, k]) for k in range(6)]
    assert [each.average_precision for each in scores.of_classes] == pytest.approx(own, rel=1e-6)


def test_a_class_without_a_positive_is_not_in_the_mean_average_precision() -> None:
    logits_nK, labels_nK = draw(40, 5)
    labels_nK[:, 2] = 0
    scores = scored(logits_nK, labels_nK)
    assert scores.compute() == pytest.approx(by_scikit_learn(logits_nK, labels_nK, list(scores.thresholds)), rel=1e-6)
    assert scores.thresholds[2] == 0.5
    assert scores.of_classes[2].average_precision is None


def test_thresholds_have_the_highest_f1_and_lie_between_probabilities() -> None:
    logits_nK, labels_nK = draw(50, 8, seed=3)
    probabilities_nK = (logits_nK.sigmoid() * 20).round().double() / 20  # many are equal
    thresholds_K = best_thresholds(probabilities_nK, labels_nK.long())
    for k, threshold in enumerate(thresholds_K.tolist()):
        column, labels = probabilities_nK[:, k].numpy(), labels_nK[:, k].numpy()
        assert f1_score(labels, column >= threshold) == pytest.approx(reference.best_f1(column, labels), rel=1e-12)
        assert np.abs(column - threshold).min() > 0.01  # no rounding moves a probability across it


def test_of_equally_good_thresholds_the_highest_is_taken() -> None:
    # 2 of 2 right and 1 of 2 missed: F1 is 2/3 at the first probability, and again at the last.
    probabilities_n1 = torch.tensor([[0.9], [0.8], [0.7], [0.6]]).double()
    labels_n1 = torch.tensor([[1], [0], [0], [1]])
    assert best_thresholds(probabilities_n1, labels_n1).tolist() == pytest.approx([0.85])


def test_padding_and_skipped_images_count_nothing() -> None:
    logits_nK, labels_nK = draw(20, 4)
    scores = MultiLabelScores(4, CPU, "val")
    counts_n, index_n = torch.ones(20), torch.arange(20)
    counts_n[5:9] = 0
    logits_nK[5:9] = torch.nan
    for some in torch.arange(20).split(6):
        scores.update(logits_nK[some], labels_nK[some], counts_n[some], index_n[some])
    real = counts_n > 0
    assert scores.compute() == scored(logits_nK[real], labels_nK[real]).compute()


def test_what_cannot_be_scored_is_an_error() -> None:
    logits_nK, labels_nK = draw(4, 3)
    scores = MultiLabelScores(3, CPU, "val")
    scores.update(logits_nK, labels_nK, torch.zeros(4), torch.arange(4))
    with pytest.raises(DataError, match="there is no readable image in the val split"):
        scores.compute()
    with pytest.raises(DataError, match="no image of the val split has a label, so there is no mAP; add labels"):
        scored(logits_nK, torch.zeros_like(labels_nK)).compute()


def test_the_split_says_which_scores_there_are() -> None:
    batches = cast(Any, SimpleNamespace(split="val", multiple=True))
    assert isinstance(scores_of(batches, 3, CPU), MultiLabelScores)
    batches.multiple = False
    assert isinstance(scores_of(batches, 3, CPU), Scores)


@pytest.mark.distributed
@pytest.mark.usefixtures("on_the_cpu")
def test_scores_over_processes_are_those_of_one(tmp_path: Path) -> None:
    """One process has more images than the other, or all of them."""
    logits_nK, labels_nK = draw(17, 4)

    def work(rank: int) -> None:
        accelerator = make_accelerator(load_recipe([], ["data.task=digits", "runtime.device=cpu"]), LaunchEnv.current())
        found = []
        for sizes in ([12, 5], [16, 1], [17, 0]):
            scores, some = MultiLabelScores(4, accelerator.device, "val"), torch.arange(17).split(sizes)[rank]
            scores.update(logits_nK[some], labels_nK[some], torch.ones(len(some)), some)
            found.append([scores.compute(), list(scores.thresholds)])
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))
        accelerator.end_training()

    processes = launched(work, tmp_path / "log", "ddp")
    assert processes.finish() == [0, 0], processes.output
    alone = scored(logits_nK, labels_nK)
    expected = alone.compute()
    for rank in range(2):
        for found, thresholds in json.loads((tmp_path / f"{rank}.json").read_text()):
            assert found == pytest.approx(expected, rel=1e-6)
            assert thresholds == pytest.approx(list(alone.thresholds), rel=1e-6)


def test_a_loss_of_shares_is_the_least_that_knows_no_image() -> None:
    _, labels_nK = draw(200, 4)
    labels, weights_K = labels_nK.numpy().astype(np.uint8), np.array([1.0, 2, 0.5, 3])
    guessing = Guessing.of(labels, weights_K, 0.1)
    bias_K = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias_K], max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = image_losses(bias_K.expand(200, 4), labels_nK.double(), 0.1, torch.from_numpy(weights_K)).mean()
        value.backward()
        return value

    assert float(loss().detach()) == pytest.approx(guessing.loss, rel=1e-9)
    optimizer.step(loss)  # type: ignore[arg-type]
    assert float(loss().detach()) == pytest.approx(guessing.loss_of_shares, rel=1e-6)
    assert guessing.majority is None


def test_no_more_than_the_shares_of_the_classes_is_no_learning() -> None:
    optim, train = OptimConfig(lr=0.5), TrainConfig(epochs=10)
    guessing = Guessing(math.log(2), None, 0.4)
    learned = warning_of(optim, train, 5, {"loss": 0.3, "label_accuracy": 80.0}, 100, guessing)
    nothing = warning_of(optim, train, 5, {"loss": 0.4, "label_accuracy": 80.0}, 100, guessing)
    assert learned == ""
    assert nothing.startswith("after half of the epochs the training loss is 0.4, and 0.4 where each class is as prob")
