"""Memory policies, attention kernels and the compiler: what they keep, that they change no number, what is refused.

B images, N tokens, D width, H heads, L blocks, P prompts.
"""

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from dist_vpt.backbones import products
from dist_vpt.errors import RecipeError, UserError
from dist_vpt.methods import attach
from dist_vpt.methods.base import Method
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runtime import activation_checkpointing
from dist_vpt.runtime.activation_checkpointing import apply_checkpointing
from dist_vpt.runtime.attention import apply_attention
from dist_vpt.runtime.compile import apply_compile
from dist_vpt.runtime.offload import apply_offload
from tests.methods.conftest import config_of, make_backbone
from tests.methods.test_structure import loss_of
from tests.running import train

B, N, D, H, L = 3, 4 + 1 + 10, 16, 2, 4  # 2 x 2 patches, a class token and 10 prompts
FLOAT = 4  # bytes
TOKENS = B * N * D * FLOAT
SMALL = FLOAT * B * (H * N + 4 * N)  # attention's log-sum-exp; mean and deviation of two norms
IMAGES = torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
VPT: dict[str, Any] = {"name": "vpt"}


def make(policy: str = "none", kernel: str = "sdpa", settings: dict[str, Any] = VPT, **backbone: Any) -> Method:
    torch.manual_seed(0)
    made = make_backbone(**({"depth": L} | backbone))
    method = attach(config_of(settings), made, classes=5).train()
    apply_attention(method.backbone, kernel, torch.float32, writes=True, cpu=True)
    apply_checkpointing(method.backbone, policy)
    return method


def saved(method: Method, *, hidden: bool = True) -> int:
    """Bytes kept for backward, weights left out; ``hidden``: with what torch 2.10 shows no hook."""
    weights = {t.untyped_storage().data_ptr() for t in method.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    modes: list[Any] = []

    def contexts(policy: Any) -> Any:
        modes.append((found := create_selective_checkpoint_contexts(policy))[0])
        return found

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        patch.setattr(activation_checkpointing, "create_selective_checkpoint_contexts", contexts)
        loss_of(method, IMAGES)
    if hidden and not activation_checkpointing.HAS_HOOK_OPTIONS:
        for each in tree_leaves([list(mode.storage.values()) for mode in modes]):
            if isinstance(each.val, torch.Tensor):
                pack(each.val)
    return sum(storage.nbytes() for storage in kept.values())


def numbers(method: Method) -> list[torch.Tensor]:
    """The loss and all gradients."""
    torch.manual_seed(1)
    loss = loss_of(method, IMAGES)
    loss.backward()
    return [loss.detach(), *(parameter.grad for _, parameter in method.trainable() if parameter.grad is not None)]


class Calls(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.of[name] = self.of.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def whole() -> int:
    return saved(make())


# Of a frozen block autograd keeps its input (1), query, key and value (3), attention's output (1), the sum after it
# (1) and what the MLP's first layer gives (4), in units of TOKENS.
@pytest.mark.parametrize(
    ("policy", "saves"),
    [
        ("mlp", L * 3 * TOKENS),  # its input is kept in place of its inside
        ("block", L * (9 * TOKENS + SMALL)),
        ("every-2", L // 2 * (9 * TOKENS + SMALL)),
        ("every-3", L // 3 * (9 * TOKENS + SMALL)),
    ],
)
def test_bytes_saved_by_hand(policy: str, saves: int, whole: int) -> None:
    assert saved(make(policy)) == whole - saves


def test_none_by_hand(whole: int) -> None:
    # Beside the blocks' own: the last one's output, mean and deviation of its norm, and the head's few numbers.
    rest = whole - L * (10 * TOKENS + SMALL) - TOKENS - 2 * B * N * FLOAT
    assert 0 < rest < 10 * B * D * FLOAT


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [VPT, {"name": "full"}], ids=["vpt", "full"])
def test_a_budget_is_kept_and_used(settings: dict[str, Any], kernel: str) -> None:
    def found(policy: str) -> int:
        return saved(make(policy, kernel, settings, embed_dim=64))

    none, block = found("none"), found("block")
    prompts = 10 if settings == VPT else 0
    tokens = B * (4 + 1 + prompts) * 64 * FLOAT
    outside = block - (L + 1) * tokens  # of the images, of the head
    before = none
    for fraction in (0.9, 0.7, 0.5, 0.3, 0.2):
        kept = found(f"budget-{fraction}")
        assert kept - outside <= fraction * (none - outside)
        assert kept - outside >= fraction * (none - outside) - 7 * tokens  # what is left over is less than a step
        assert kept < before
        before = kept


@pytest.mark.parametrize("name", ["adapter", "adaptformer", "lora"])
def test_a_budget_holds_where_the_first_block_needs_no_input(name: str) -> None:
    """It keeps less than a block whose input asks for a gradient, and what hangs on a block is no activation."""
    settings = {"name": name} | ({} if name == "lora" else {"bottleneck": 16})
    none, kept = (saved(make(policy, settings=settings, embed_dim=64)) for policy in ("none", "budget-0.5"))
    assert kept <= 0.5 * none + 10 * B * 64 * FLOAT  # the head's few numbers
    assert kept > 0.3 * none


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("settings", [VPT, {"name": "full"}, {"name": "lora"}], ids=["vpt", "full", "lora"])
@pytest.mark.parametrize("policy", ["mlp", "block", "every-2", "budget-0.9", "budget-0.5", "budget-0.3"])
def test_with_onednn_as_much_is_kept_and_the_numbers_stay(policy: str, settings: dict[str, Any]) -> None:
    plain, policied = make(settings=settings, embed_dim=64), make(policy, settings=settings, embed_dim=64)
    assert all(map(torch.equal, numbers(plain), numbers(policied)))
    kept = saved(make(policy, settings=settings, embed_dim=64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_switch", {"onednn": False})
        assert kept == saved(make(policy, settings=settings, embed_dim=64))


@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("block", 2), ("budget-0.5", 1), ("every-2", 1.5)])
def test_attention_is_the_dearest_to_compute_again(policy: str, times: float) -> None:
    method = make(policy)
    loss_of(method, IMAGES)  # the budget is planned in the first one
    with Calls() as calls:
        loss_of(method, IMAGES).backward()
    assert calls.of["_scaled_dot_product_flash_attention_for_cpu"] == times * L


def test_a_budget_that_no_block_can_keep() -> None:
    with pytest.raises(
        UserError, match=r"runtime.activation_checkpointing = budget-0.05: a block's input alone is 0.10 of"
    ):
        loss_of(make("budget-0.05"), IMAGES)


@pytest.mark.parametrize("policy", ["block", "budget-0.5"])
def test_scoring_and_blocks_without_gradients_keep_nothing(policy: str) -> None:
    with torch.no_grad():
        make(policy)(IMAGES)
    method = make(policy, settings={"name": "vpt", "layers": 1, "prompted_blocks": "last"})
    wanted = numbers(make(settings={"name": "vpt", "layers": 1, "prompted_blocks": "last"}))
    for a, b in zip(numbers(method), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "policy", ["none", "mlp", "block", "every-1", "every-12", "budget-0.5", "budget-0.05", "budget-0.333"]
)
def test_policies_of_a_recipe(policy: str) -> None:
    assert load_recipe([], [f"runtime.activation_checkpointing={policy}"]).runtime.activation_checkpointing == policy


@pytest.mark.parametrize("policy", ["blok", "every-0", "every-", "budget-0", "budget-0.0", "budget-1.5", "budget-1"])
def test_policies_that_are_none(policy: str) -> None:
    with pytest.raises(
        RecipeError, match=r"command line: runtime.activation_checkpointing = '.*': must be none, mlp, block"
    ):
        load_recipe([], [f"runtime.activation_checkpointing={policy}"])


@pytest.mark.parametrize(
    ("policy", "backbone", "message"),
    [
        (
            "every-5",
            {},
            "every-5: the backbone has 4 blocks, and none would be recomputed; use at most every-4",
        ),
        (
            "mlp",
            {"block_fn": ParallelScalingBlock},
            "mlp: a ParallelScalingBlock of the backbone has no MLP module",
        ),
    ],
)
def test_policies_that_would_do_nothing(policy: str, backbone: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"runtime.activation_checkpointing = {message}"):
        make(policy, **backbone)


@pytest.mark.parametrize(
    ("tokens", "compute", "writes", "cpu", "chosen"),
    [
        (17, torch.bfloat16, True, True, "eager"),
        (17, torch.bfloat16, False, True, "sdpa"),
        (17, torch.float32, True, True, "sdpa"),
        (17, torch.bfloat16, True, False, "sdpa"),
        (257, torch.bfloat16, True, True, "sdpa"),
    ],
)
def test_auto_chooses(tokens: int, compute: torch.dtype, writes: bool, cpu: bool, chosen: str) -> None:
    backbone = make_backbone(img_size=32 if tokens == 17 else 128)
    assert backbone.tokens == tokens
    apply_attention(backbone, "auto", compute, writes=writes, cpu=cpu)
    assert backbone.chosen == {"attention": chosen}
    assert {block.attn.fused_attn for block in backbone.blocks} == {chosen == "sdpa"}  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", ["none", "block"])  # the kernel is the same where backward computes it again
@pytest.mark.parametrize(("kernel", "fused"), [("sdpa_flash", True), ("sdpa", True), ("eager", False)])
def test_kernels_give_the_same(kernel: str, fused: bool, policy: str) -> None:
    wanted = numbers(make(kernel="eager"))
    with Calls() as calls:
        found = numbers(make(policy, kernel))
    names = [name for name in calls.of if "backward" not in name]
    assert any("flash" in name for name in names) == fused
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa_efficient", "sdpa_cudnn"])
def test_a_kernel_that_is_not_there(kernel: str) -> None:
    with pytest.raises(
        UserError, match=rf"attention = {kernel}: there is no such kernel for cpu, float32 and heads of"
    ):
        make(kernel=kernel)


def test_flash_without_a_package_and_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    activated = []

    def activate(name: str) -> None:
        if name == "FA9":
            raise ModuleNotFoundError("No module named 'flash_nine'")
        activated.append(name)

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA9"], raising=False)
    with pytest.raises(UserError, match=r"\(FA9: No module named 'flash_nine'\); pip install 'dist-vpt\[flash\]', or"):
        make(kernel="flash")
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA8", "FA9"], raising=False)
    assert make(kernel="flash").backbone.chosen == {"attention": "flash (FA8)"}
    assert activated == ["FA8"]


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_a_package_that_cannot_compute_here_is_restored(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashAttention-4 on a GPU of another kind: it can be activated, and raises where it is called."""
    active: list[str] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor) -> torch.Tensor:
            if fails == "forward":
                raise RuntimeError("FA9 SDPA forward unsupported: FA9 requires compute capability 10.0")
            return q.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("FA9 SDPA backward unsupported: FA9 requires compute capability 10.0")

    def dispatched(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return Kernel.apply(q) if active == ["FA9"] else attend(q, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", dispatched)
    monkeypatch.setattr(
        torch.nn.attention,
        "activate_flash_attention_impl",
        lambda name: active.__setitem__(slice(None), [name]),
        raising=False,
    )
    monkeypatch.setattr(
        torch.nn.attention, "current_flash_attention_impl", lambda: next(iter(active), None), raising=False
    )
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear, raising=False)
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA9"], raising=False)
    with pytest.raises(
        UserError,
        match=rf"for cpu \(FA9: FA9 SDPA {fails} unsupported: FA9 requires compute capability 10.0\); pip install",
    ):
        make(kernel="flash")
    assert not active
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA8", "FA9"], raising=False)
    assert make(kernel="flash").backbone.chosen == {"attention": "flash (FA8)"}
    assert active == ["FA8"]
    make(kernel="sdpa")
    assert not active  # a later run of the process has torch's own kernels


@pytest.mark.parametrize("policy", ["none", "mlp", "block", "every-2", "budget-0.5"])
def test_offload_copies_what_is_kept_but_no_weights(policy: str, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    method, copied, kept = make(policy), [], saved(make(policy), hidden=False)
    empty_like = torch.empty_like

    def counted(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options == {"device": "cpu", "pin_memory": False}
        copied.append(tensor)
        return empty_like(tensor, **options)

    apply_offload(method.backbone)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", counted)
        found = numbers(method)
    for a, b in zip(found, numbers(make()), strict=True):
        assert torch.equal(a, b)
    outside = whole - L * (10 * TOKENS + SMALL)
    # Frozen blocks save nothing twice, so that as much is copied as is kept.
    assert sum(tensor.nbytes for tensor in copied) == kept - outside
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    assert not any(tensor.untyped_storage().data_ptr() in weights for tensor in copied)


@pytest.mark.usefixtures("on_the_cpu")
def test_offload_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runtime.offload = true: a CPU's tensors are in host memory already"):
        train(tmp_path / "run", "runtime.offload=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method.name=linear", "runtime.offload=true"],
            "runtime.offload = True: method.name = linear keeps no activations",
        ),
        (
            ["runtime.compile=true", "runtime.activation_checkpointing=budget-0.5"],
            "a budget cannot choose among the operations",
        ),
    ],
)
def test_keys_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe([], overrides)


def test_compiled_blocks_give_the_same() -> None:
    """All blocks by one compiled function, which checkpointing runs again."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wanted = numbers(make())
    for policy in ("none", "block"):
        method = make()
        apply_compile(method.backbone, cpu=True)
        apply_checkpointing(method.backbone, policy)
        assert method.backbone.chosen["compile"] == "each block"
        for a, b in zip(numbers(method), wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the probe's, and one for all blocks


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_without_a_compiler_blocks_run_uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dist_vpt.runtime.apply.use_faster_products", str)  # a line of its own on some CPUs

    def no_compiler(device: str) -> None:
        raise RuntimeError(f"no compiler for {device}\nand a page of advice")

    monkeypatch.setattr("dist_vpt.runtime.compile._try_compiler", no_compiler)
    result = train(tmp_path / "run", "runtime.compile=true", "runtime.activation_checkpointing=block")
    plain = train(tmp_path / "plain")
    assert result["last"]["test"] == plain["last"]["test"]
    warning = "warning: no compiler here, blocks run uncompiled (no compiler for cpu)"
    assert result["runtime"] == {"attention": "sdpa", "compile": warning, "checkpointing": "block"}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["runtime"] == result["runtime"]
    assert f"attention sdpa; compile {warning}; checkpointing block" in (tmp_path / "run" / "train.log").read_text()
    assert plain["runtime"] == {"attention": "sdpa"}


def test_what_is_offloaded_comes_back_a_block_early_and_is_dropped_with_its_graph() -> None:
    """Order alone: the copies of a device are in tests/gpu."""
    events: list[tuple[str, int]] = []
    alive: list[Any] = []

    class Copy:
        def __init__(self, tensor: torch.Tensor):
            self.tensor, self.block = tensor.clone(), running[-1]
            alive.append(weakref.ref(self))

        def prefetch(self) -> None:
            events.append(("prefetched", self.block))

        def __call__(self) -> torch.Tensor:
            events.append(("used", self.block))
            return self.tensor

    method, running = make(), [0]
    run = method.backbone.run_block

    def counting(block: torch.nn.Module, tokens_BND: torch.Tensor) -> torch.Tensor:
        running.append(list(method.backbone.blocks).index(block))  # type: ignore[call-overload]
        return run(block, tokens_BND)

    method.backbone.run_block = counting
    wanted = numbers(make())
    apply_offload(method.backbone, Copy)
    for a, b in zip(numbers(method), wanted, strict=True):
        assert torch.equal(a, b)
    first_used = {block: events.index(("used", block)) for block in range(L)}
    for block in range(L):
        fetched = [number for number, event in enumerate(events) if event == ("prefetched", block)]
        assert len(fetched) == sum(event == ("used", block) for event in events)  # each once
        assert max(fetched) < first_used[block]
        if block < L - 1:
            assert max(fetched) < first_used[block + 1]  # backward has not used the later block yet
    assert not [copy for copy in alive if copy() is not None]
    loss_of(method, IMAGES)  # a graph without a backward
    assert not [copy for copy in alive if copy() is not None]


@pytest.mark.parametrize("policy", ["mlp", "block", "every-2", "budget-0.9", "budget-0.5"])
def test_updates_written_to_a_layer_s_output_do_not_reach_what_a_policy_keeps(policy: str) -> None:
    """LoRA writes in place only where nobody else has the output."""
    settings = {"name": "lora", "targets": ("q", "v", "proj", "fc1", "fc2")}
    found = []
    for method in (make("none", settings=settings), make(policy, settings=settings)):
        with torch.no_grad():
            for name, parameter in method.trainable():
                if ".up." in name:  # zero at first: nothing would be written
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        for _ in range(2):  # a budget is planned in the first one
            method.zero_grad()
            loss_of(method, IMAGES).backward()
        found.append({name: p.grad for name, p in method.trainable()})
    for name, wanted in found[0].items():
        assert torch.equal(found[1][name], wanted), name
