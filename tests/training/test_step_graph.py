"""Steps of trials that are captured and replayed are the steps that are not; with a tape in place of a CUDA graph."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vpt.errors import Interrupted
from dist_vpt.methods.base import Reader
from dist_vpt.methods.linear import Linear
from dist_vpt.methods.mlp import MLP
from dist_vpt.runs.adapters import collect
from dist_vpt.training import step_graph, trials
from dist_vpt.training.step_graph import WARM_UP, CudaRecorder, StepGraph
from dist_vpt.training.trial_state import Trial
from dist_vpt.training.trials import TrialGroup, fit_trials
from tests.training.tape import TapeRecorder
from tests.training.test_reads import make_group
from tests.training.test_trials import ask_to_stop, few, fitted, make, settings

CACHED = ["stream.cache=memory"]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """With it, steps on a CPU are captured."""
    made = TapeRecorder()
    monkeypatch.setattr(trials, "recorder_of", lambda _: made)
    return made


def plain(tmp_path: Path, each: Sequence[Sequence[str]]) -> TrialGroup:
    """The trials trained without captures, as on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "recorder_of", step_graph.recorder_of)
        return fitted(tmp_path / "plain", each)


def assert_equal(a: TrialGroup, b: TrialGroup) -> None:
    """In all that was trained, remembered and reported, to the last bit."""
    for one, other in zip(a.trials, b.trials, strict=True):
        assert one.diverged == other.diverged
        assert one.progress.last == other.progress.last
        tensors = collect(other.reader) | other.state
        for name, tensor in (collect(one.reader) | one.state).items():
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(
    ("method", "optimizer", "more"),
    [
        ("linear", "sgd", []),
        ("linear", "adam", ["train.grad_accum_steps=2"]),
        ("vqt", "adamw", ["train.label_smoothing=0.1", "train.class_weights=inv"]),
        ("side", "adam", []),
        ("combo", "adamw", []),
        ("combo_sum", "sgd", []),
        ("ladder", "adamw", []),
    ],
)
def test_replayed_steps_are_the_plain_ones(  # noqa: PLR0917 (what pytest gives)
    method: str, optimizer: str, more: list[str], data: tuple[str, ...], tmp_path: Path, recorder: TapeRecorder
) -> None:
    """With a schedule, a last batch that is smaller, trials that differ in rates, decays and shapes, and dropout."""
    each = [[*some, *CACHED, "train.batch_size=30", *more] for some in few(settings(method, optimizer, 4), data)]
    found = fitted(tmp_path / "replayed", each)
    wanted = plain(tmp_path, each)
    assert_equal(found, wanted)
    # 5 epochs of 3 batches of 30 and one of 10, each of which is called as it is at first.
    assert recorder.rehearsals == 2 * WARM_UP
    assert recorder.replays == [15 - WARM_UP, 5 - WARM_UP]
    assert found.trials[0].reader.backbone.chosen["training step"] == "captured in a CUDA graph"
    assert "training step" not in wanted.trials[0].reader.backbone.chosen


def twins(*words: str) -> tuple[TrialGroup, TrialGroup, Any]:
    """Two equal groups of trials, of which the second one's steps are never captured, and a batch for them."""
    (found, batch), (wanted, _) = make_group(*words), make_group(*words)
    for one, other in zip(found.trials, wanted.trials, strict=True):
        other.reader.load_state_dict(one.reader.state_dict())
    wanted.graph = StepGraph(None, lambda _: None)
    return found, wanted, batch


def test_gradient_scales_fall_in_replayed_steps(recorder: TapeRecorder) -> None:
    """One so large that gradients overflow in all of them."""
    found, wanted, batch = twins("runtime.precision=fp16")
    steps = WARM_UP + 4
    for group in (found, wanted):
        group.trials[1].state["scale"].fill_(2.0**200)
        for _ in range(steps):
            group.take_step([batch])
            group.read_steps(but=1)
        group.read_steps()
        assert [float(trial.state["scale"]) for trial in group.trials] == [2.0**16, 2.0 ** (200 - steps), 2.0**16]
        assert [float(trial.state["steps"]) for trial in group.trials] == [steps, 0, steps]
    assert_equal(found, wanted)
    assert recorder.replays == [4]


@pytest.mark.parametrize("at", [1, WARM_UP + 2])
def test_a_trial_that_diverges_touches_no_other(at: int, recorder: TapeRecorder) -> None:
    """Its step and all later ones leave it as it is; those that are replayed before its end is read, too."""
    found, wanted, batch = twins()
    for group in (found, wanted):
        for step in range(2 * WARM_UP + 6):
            if step == at:
                with torch.no_grad():  # logits overflow
                    group.trials[1].reader.head.weight.fill_(3e38)  # type: ignore[union-attr,operator]
            group.take_step([batch])
            group.read_steps(but=1)
        group.read_steps()
    assert_equal(found, wanted)
    assert found.trials[1].diverged == f"the loss is nan at step {at}"
    assert [trial.diverged for trial in found.trials[::2]] == ["", ""]
    assert len(recorder.captures) == (1 if at == 1 else 2), "trials that go on are captured anew"
    assert recorder.replays[-1] > 0


def test_a_resumed_pass_is_the_undisturbed_one(tmp_path: Path, recorder: TapeRecorder) -> None:
    each = [[*some, *CACHED] for some in settings("vqt", "adam", 3)]
    interrupted = make(tmp_path / "b", each)
    ask_to_stop(interrupted)
    with pytest.raises(Interrupted, match="stopped at step 25"):
        fit_trials(interrupted)
    interrupted.close()
    assert recorder.replays == [25 - WARM_UP]
    resumed = make(tmp_path / "b", each)
    fit_trials(resumed)
    resumed.close()
    assert recorder.replays[1:] == [25 - WARM_UP]
    assert_equal(resumed, plain(tmp_path, each))


def test_why_steps_are_not_captured(tmp_path: Path, data: tuple[str, ...], recorder: TapeRecorder) -> None:
    """One line, and the same in result.json; the steps are taken all the same."""
    reasons = {
        ("method.name=linear", "stream.cache=none"): "the frozen stream is computed anew for each batch",
        ("method.name=mlp", "method.dropout=0.1", *CACHED): "dropout of mlp draws from torch's default random numbers",
    }
    for number, (words, reason) in enumerate(reasons.items()):
        lines: list[str] = []
        each = [[*data, "train.batch_size=10", "train.epochs=1", f"optim.lr={lr}", *words] for lr in (0.1, 0.01)]
        group = make(tmp_path / str(number), each, lines.append)
        fit_trials(group)
        group.close()
        assert [line for line in lines if "captured" in line] == [
            f"the training step is not captured in a CUDA graph: {reason}"
        ]
        assert group.trials[0].reader.backbone.chosen["training step"] == f"not in a CUDA graph: {reason}"
        assert group.trials[0].progress.images == 100
    assert not recorder.captures
    assert MLP.one_by_one()
    assert not Linear.one_by_one()


class OfOnesOwn(Reader):
    """Whose dropout has no rate in the recipe."""

    def __init__(self, backbone: Any):
        super().__init__(backbone, 4, torch.float32, head="standardized")
        self.before = torch.nn.Dropout(0.5)

    def read(self, stream: Any) -> Tensor:
        return self.classify(self.before(stream.pooled))


def test_dropout_layers_are_seeded_whatever_their_rate_is_called(recorder: TapeRecorder) -> None:
    """A trial draws the same in whatever state torch's own source is, as after resuming; so that none is replayed."""
    losses = []
    for state in (1, 2):
        torch.manual_seed(0)
        group, batch = make_group()
        group.trials = [Trial(each.recipe, OfOnesOwn(each.reader.backbone).train()) for each in group.trials]
        torch.manual_seed(state)
        for _ in range(WARM_UP + 2):
            group.take_step([batch])
        losses.append([unread.numbers.read() for unread in group.unread])
    assert losses[0] == losses[1]
    assert not recorder.captures


def test_what_waits_or_fails_is_not_captured() -> None:
    """Later steps are called as they are; what was wrong is reported once."""
    lines: list[str] = []
    calls: list[str] = []

    class Failing(TapeRecorder):
        def capture(self, step: Any, sources: Any, beside: Any = None) -> Any:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    def waiting(x: Tensor) -> Tensor:
        calls.append("waiting")
        return x * x.sum().item()

    for recorder, step, reason in (
        (TapeRecorder(), waiting, "it waits for the GPU"),
        (Failing(), torch.neg, "CUDA out of memory. Tried to allocate 2 GiB"),
    ):
        graph = StepGraph(recorder, lines.append)
        for number in range(WARM_UP + 3):
            x = torch.full((2,), float(number))
            assert torch.equal(graph(step, x, []), step(x))
        assert lines == [reason]
        assert recorder.rehearsals == WARM_UP
        lines.clear()
    assert len(calls) == 2 * (WARM_UP + 3)


def test_a_number_that_python_computes_is_a_constant_of_the_capture() -> None:
    """So that the tape would show one that should have been an input."""
    graph, numbers = StepGraph(TapeRecorder(), lambda _: None), iter(range(10))
    found = [float(graph(lambda x: x + next(numbers), torch.ones(()), [])) for _ in range(WARM_UP + 3)]
    assert found == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]


class FakeCuda:
    """The calls of torch.cuda that a recorder makes, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        self.stream, self.ends = "main", True
        self.underway: list[str] = []  # pools that the allocator takes for those of a capture
        outer = self

        class Stream:
            device = torch.device("cuda", 0)

            def __init__(self, name: str):
                self.name = name

            def wait_stream(self, other: "Stream") -> None:
                outer.calls.append(f"{self.name} waits for {other.name}")

        class Graph:
            def register_generator_state(self, source: torch.Generator) -> None:
                outer.calls.append("register")

            def replay(self) -> None:
                outer.calls.append("replay")

        @contextmanager
        def use(stream: Stream) -> Iterator[None]:
            outer.stream, before = stream.name, outer.stream
            try:
                yield
            finally:
                outer.stream = before

        @contextmanager
        def graph(graph: Graph, *, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            outer.calls.append(f"capture on {stream.name} in {pool}, {capture_error_mode}")
            outer.underway.append(pool)
            try:
                yield
            finally:
                if not outer.ends:
                    raise RuntimeError("capture invalidated")
                outer.underway.remove(pool)

        def end(device: int, pool: str) -> None:
            if pool not in outer.underway:
                raise RuntimeError("not currently recording")
            outer.underway.remove(pool)

        monkeypatch.setattr(step_graph, "side_stream", lambda device, use: Stream(use))
        monkeypatch.setattr(step_graph, "NOT_ENDED", [])
        for name, fake in {
            "CUDAGraph": Graph,
            "graph": graph,
            "graph_pool_handle": lambda: "a new pool",
            "stream": use,
            "current_stream": lambda device: Stream("main"),
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: self.calls.append(f"sync debug {mode}"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: self.calls.append(f"release {pool}"))

    def step(self) -> Tensor:
        self.calls.append(f"step on {self.stream}")
        return torch.ones(())


def test_the_calls_that_make_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsed between waits of the streams for each other; random sources are known before a capture begins."""
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda", 0))
    made, waited = recorder.rehearse(cuda.step)
    assert (float(made), waited) == (1.0, False)
    rehearsed = ["steps waits for main", "sync debug warn", "step on steps", "sync debug 0", "main waits for steps"]
    assert cuda.calls == rehearsed
    cuda.calls.clear()
    first = recorder.capture(cuda.step, [torch.Generator()])
    first.replay()
    assert cuda.calls == ["register", "capture on steps in a new pool, thread_local", "step on steps", "replay"]
    cuda.calls.clear()
    recorder.capture(cuda.step, [], first)
    assert cuda.calls == ["capture on steps in a new pool, thread_local", "step on steps"]


def test_what_a_rehearsed_step_warns_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it waits is noted, and its other warnings reach the user."""
    FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda", 0))

    def step() -> Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        warnings.warn("a method of one's own warns", stacklevel=2)
        return torch.ones(())

    with pytest.warns(UserWarning, match="of one's own") as caught:
        assert recorder.rehearse(step)[1]
    assert len(caught) == 1


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_could_not_be_ended(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch still has its graph's address, and would take it for underway; another one it gives back itself."""
    cuda = FakeCuda(monkeypatch)
    cuda.ends = ends

    def step() -> Tensor:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CudaRecorder(torch.device("cuda", 0)).capture(step, [])
    assert len(step_graph.NOT_ENDED) == (0 if ends else 1)
    assert cuda.calls[1:] == ([] if ends else ["release a new pool"])
    assert not cuda.underway
    assert cuda.stream == "main"
