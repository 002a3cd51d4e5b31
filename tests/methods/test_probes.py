"""knn and logistic: against float64 references, against scikit-learn, and every setting of a group at once."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_vpt.errors import Interrupted, UserError
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods import attach, softmax_regression
from dist_vpt.methods.fitted import FittedReader, Observed
from dist_vpt.methods.knn import KNN
from dist_vpt.methods.softmax_regression import solve_path
from dist_vpt.methods.stack import ReaderStack
from dist_vpt.planning.measure import _peak_on_cpu
from tests.methods.conftest import config_of, make_backbone
from tests.reference.probes import newton, objective, vote

C_PATH = [10 ** (-6 + i / 4) for i in range(45)]
SHAPES = [(60, 6, 3), (200, 20, 2), (40, 30, 4)]  # images, features, classes; the last is separable


def drawn(images: int, features: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features of very different sizes, and labels that they tell in part."""
    draw = torch.Generator().manual_seed(images)
    x_nF = torch.randn(images, features, generator=draw).double() * torch.linspace(0.3, 3, features) + 2
    noise = torch.randn(images, classes, generator=draw)
    labels_n = ((x_nF[:, :classes] - 2) * 0.7 + noise).argmax(1)
    labels_n[:classes] = torch.arange(classes)
    return x_nF, labels_n


def readers_of(settings: list[dict[str, Any]], classes: int = 3) -> list[FittedReader]:
    backbone = make_backbone()
    return [cast(FittedReader, attach(config_of(each), backbone, classes)) for each in settings]


def observed_of(width: int, images: int = 40, classes: int = 3) -> Observed:
    x_nF, labels_n = drawn(images, width, classes)
    return Observed(x_nF.float(), labels_n, torch.ones(images))


# Logistic regression


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_path_has_the_optimum_of_newtons_method(shape: tuple[int, int, int]) -> None:
    x_nF, labels_n = drawn(*shape)
    weights_n = torch.linspace(0.5, 1.5, len(labels_n))
    solution = solve_path(x_nF, labels_n, shape[2], C_PATH, weights_n, 0.1)
    assert not solution.unfinished
    for t in range(0, len(C_PATH), 8):
        c = C_PATH[t]
        best = newton(x_nF, labels_n, shape[2], c, weights_n, 0.1)
        theta = torch.cat([solution.weight_TKF[t], solution.bias_TK[t][:, None]], 1).requires_grad_()
        found = objective(theta, x_nF, labels_n, c, weights_n, 0.1)
        [gradient] = torch.autograd.grad(found, theta)
        assert found.item() == pytest.approx(best, rel=1e-5)
        assert found.item() == pytest.approx(solution.objective_T[t].item(), rel=1e-9)
        at_zero = torch.zeros_like(theta).requires_grad_()
        [first] = torch.autograd.grad(objective(at_zero, x_nF, labels_n, c, weights_n, 0.1), at_zero)
        assert gradient.norm() < 2e-3 * first.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_path_has_the_optimum_of_scikit_learn(shape: tuple[int, int, int]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_nF, labels_n = drawn(*shape)
    solution = solve_path(x_nF, labels_n, shape[2], C_PATH, torch.ones(len(labels_n)))
    for t in range(0, len(C_PATH), 3):
        c = C_PATH[t]
        model = linear_model.LogisticRegression(C=c, tol=1e-10, max_iter=20000).fit(x_nF.numpy(), labels_n.numpy())
        theta = torch.from_numpy(np.concatenate([model.coef_, model.intercept_[:, None]], 1))
        theta = torch.cat([-theta / 2, theta / 2]) if shape[2] == 2 else theta
        theirs = objective(theta, x_nF, labels_n, c, torch.ones(len(labels_n))).item()
        assert solution.objective_T[t].item() == pytest.approx(theirs, rel=1e-4)


def test_one_value_alone_is_what_it_is_in_a_path_whatever_the_order() -> None:
    x_nF, labels_n = drawn(60, 6, 3)
    ones = torch.ones(60)
    path = solve_path(x_nF, labels_n, 3, C_PATH, ones)
    turned = solve_path(x_nF, labels_n, 3, C_PATH[::-1], ones)
    torch.testing.assert_close(turned.objective_T.flip(0), path.objective_T, rtol=1e-6, atol=0)
    for t in (0, 13, 30):
        alone = solve_path(x_nF, labels_n, 3, [C_PATH[t]], ones)
        assert alone.objective_T.item() == pytest.approx(path.objective_T[t].item(), rel=1e-6)


def test_a_class_without_images_is_never_predicted_and_its_loss_is_finite() -> None:
    x_nF, labels_n = drawn(60, 6, 3)
    solution = solve_path(x_nF, 2 * labels_n, 6, [1.0], torch.ones(60))
    logits_nK = x_nF @ solution.weight_TKF[0].mT + solution.bias_TK[0]
    assert set(logits_nK.argmax(1).tolist()) <= {0, 2, 4}
    assert F.cross_entropy(logits_nK, torch.ones(60, dtype=torch.long)).isfinite()
    few = solve_path(x_nF, labels_n, 3, [1.0], torch.ones(60))
    torch.testing.assert_close(solution.weight_TKF[0, ::2], few.weight_TKF[0])


@pytest.mark.parametrize("blocks", [True, False])
def test_memory_stays_within_the_budget(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tensors at once; a budget without blocks for the preconditioner leads to the same optima."""
    x_nF, labels_n = drawn(400, 24, 4)
    ones = torch.ones(400)
    whole = solve_path(x_nF, labels_n, 4, C_PATH, ones)
    problem = softmax_regression._Problem(x_nF, labels_n, 4, ones, 0.0)
    assert problem.has_blocks
    each = problem.numbers if blocks else problem.numbers - 1  # just not enough for one C with blocks
    monkeypatch.setattr(softmax_regression, "BUDGET", (5 if blocks else 1) * each)
    small = softmax_regression._Problem(x_nF, labels_n, 4, ones, 0.0)
    assert small.has_blocks == blocks
    found: list[softmax_regression.Solution] = []
    peak = _peak_on_cpu(lambda: found.append(solve_path(x_nF, labels_n, 4, C_PATH, ones)))
    torch.testing.assert_close(found[0].objective_T, whole.objective_T, rtol=1e-6, atol=0)
    solved = 4 * len(C_PATH) * 4 * 25  # what is found, and turned back at the end
    features = 4 * 400 * 25 + 4 * 25**2
    assert peak <= 8 * (softmax_regression.BUDGET + features + solved)


def test_what_is_raised_at_a_stop_ends_the_solver() -> None:
    x_nF, labels_n = drawn(60, 6, 3)
    calls = []

    def raise_on_stop() -> None:
        calls.append(None)
        if len(calls) == 5:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted, match="stopped"):
        solve_path(x_nF, labels_n, 3, C_PATH, torch.ones(60), 0.0, raise_on_stop)
    assert len(calls) == 5


def test_classes_without_images_add_nothing_to_the_loss_that_is_shown() -> None:
    """Also with label smoothing, which is spread over the classes that occur."""
    losses = []
    for classes in (3, 6):
        [reader] = readers_of([{"name": "logistic", "c": 1.0}], classes)
        observed = observed_of(reader.backbone.width)._replace(smoothing=0.1)
        [score], _ = type(reader).fit([reader], observed)
        losses.append(score["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("head", ["standardized", "published"])
def test_logistic_is_the_optimum_of_what_its_head_reads(head: str) -> None:
    readers = readers_of([{"name": "logistic", "head": head, "c": c} for c in (0.01, 1.0)])
    observed = observed_of(readers[0].backbone.width)
    scores, _ = type(readers[0]).fit(readers, observed)
    x_nF = observed.features_nF
    if head == "standardized":
        x_nF = (x_nF - x_nF.mean(0)) / x_nF.std(0, correction=0) * 20 / x_nF.shape[1] ** 0.5
    for reader, score, c in zip(readers, scores, (0.01, 1.0), strict=True):
        best = newton(x_nF.double(), observed.labels_n, 3, c, observed.weights_n)
        weight, bias = (tensor.detach().double() for tensor in (reader.head.weight, reader.head.bias))
        theta = torch.cat([weight, bias[:, None]], 1)
        assert objective(theta, x_nF.double(), observed.labels_n, c, observed.weights_n).item() == pytest.approx(
            best, rel=1e-4
        )
        logits = reader.read(StreamOutput(observed.features_nF))
        assert score["loss"] == pytest.approx(F.cross_entropy(logits, observed.labels_n).item(), rel=1e-3)


# Nearest neighbours


@pytest.mark.parametrize("head", ["standardized", "published"])
@pytest.mark.parametrize("temperature", [0.07, None])
def test_votes_are_those_of_the_reference(head: str, temperature: float | None) -> None:
    settings = [{"name": "knn", "head": head, "k": k, "temperature": temperature} for k in (1, 4, 40)]
    readers = readers_of(settings)
    observed = observed_of(readers[0].backbone.width)
    observed = observed._replace(weights_n=torch.linspace(0.5, 1.5, 40))
    scores, _ = KNN.fit(readers, observed)
    queries, _ = drawn(7, readers[0].backbone.width, 3)
    x_nF, q_BF = observed.features_nF.double(), queries.float().double()
    if head == "standardized":
        mean, std = x_nF.mean(0), x_nF.std(0, correction=0)
        x_nF, q_BF = (x_nF - mean) / std, (q_BF - mean) / std
    stack = ReaderStack.of(readers)
    [logits_TBK] = KNN.read_stacks([stack], StreamOutput(queries.float()), [None])
    for reader, score, logits_BK in zip(readers, scores, logits_TBK, strict=True):
        k = reader.k
        expected = vote(x_nF, observed.labels_n, observed.weights_n.double(), q_BF, 3, k, temperature)
        torch.testing.assert_close(logits_BK.exp().double(), expected.clamp_min(1e-6), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(reader.read(StreamOutput(queries.float())), logits_BK)
        rows = torch.arange(40)
        left = [
            vote(
                *(each[rows != i] for each in (x_nF, observed.labels_n, observed.weights_n.double())),
                x_nF[i : i + 1],
                3,
                min(k, 39),
                temperature,
            )
            for i in range(40)
        ]
        right = (torch.cat(left).argmax(1) == observed.labels_n).double().mean().item()
        assert score["top1"] == pytest.approx(100 * right, abs=1e-6)


def test_a_group_holds_the_training_images_once() -> None:
    readers = readers_of([{"name": "knn", "k": k} for k in (1, 2, 3)])
    KNN.fit(readers, observed_of(readers[0].backbone.width))
    stack = ReaderStack.of(readers)
    assert {reader.bank.data_ptr() for reader in readers} == {stack.fixed["bank"].data_ptr()}


def test_too_few_images_are_refused() -> None:
    [reader] = readers_of([{"name": "knn", "k": 41}])
    with pytest.raises(UserError, match=r"method.k = 41: there are 40 images to train on.*lower method.k"):
        KNN.fit([reader], observed_of(reader.backbone.width))
    for name in ("knn", "logistic"):
        [reader] = readers_of([{"name": name}])
        one = observed_of(reader.backbone.width)._replace(labels_n=torch.ones(40, dtype=torch.long))
        with pytest.raises(UserError, match=rf"method.name = {name}: there are images of one class alone \(number 1\)"):
            type(reader).fit([reader], one)


def test_a_large_similarity_over_a_small_temperature_stays_finite() -> None:
    [reader] = readers_of([{"name": "knn", "k": 5, "temperature": 1e-4}])
    observed = observed_of(reader.backbone.width)
    KNN.fit([reader], observed)
    logits = reader.read(StreamOutput(observed.features_nF))
    assert logits.isfinite().all()
    assert logits.min() == pytest.approx(math.log(1e-6))
    assert (logits.argmax(1) == observed.labels_n).all()  # each is its own nearest neighbour
