"""The recipe: one typed description of a whole run, from YAML files and ``a.b=c`` overrides."""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dist_vpt.backbones.recipe import BackboneRecipe
from dist_vpt.data.recipe import DataRecipe
from dist_vpt.data.tasks import TASKS
from dist_vpt.errors import RecipeError, nearest
from dist_vpt.methods.recipe import MethodRecipe, VPTRecipe
from dist_vpt.optim import OptimRecipe


class Section(BaseModel):
    """A part of the recipe: frozen, and unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StreamRecipe(Section):
    """Where a reader's frozen stream is kept between epochs."""

    cache: Literal["auto", "none", "device", "memory", "disk"] = Field(
        "auto",
        description="none: computed anew for each batch; device, memory, disk: computed once and kept on the "
        "accelerator, in host memory, or in stream.dir; auto: the first of device, memory and (with stream.dir) disk "
        "that it fits in, else none",
    )
    dir: str | None = Field(None, min_length=1, description="folder of the cache files; they serve later runs too")

    @model_validator(mode="after")
    def _disk_has_a_folder(self) -> Self:
        if self.cache == "disk" and self.dir is None:
            raise ValueError("cache = disk: needs a folder for its files; set stream.dir")
        return self


class EarlyStopRecipe(Section):
    """Stop when the validation accuracy no longer rises."""

    patience: int = Field(10, ge=1, description="evaluations without a rise before training stops")
    min_delta: float = Field(0.0, ge=0, description="a rise counts above this many points of percent")


class TrainRecipe(Section):
    """The loop: epochs, batch and loss."""

    epochs: int = Field(100, ge=1, description="passes over the training split")
    batch_size: int = Field(64, ge=1, description="GLOBAL batch: images per optimiser step over all processes")
    accumulate: int = Field(1, ge=1, description="micro-batches that a process computes one after the other per step")
    eval_batch_size: int = Field(128, ge=1, description="images per process and evaluation step")
    eval_every: int = Field(1, ge=1, description="epochs between evaluations on the validation split")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    class_weights: Literal["none", "inv", "inv_sqrt"] = Field(
        "none",
        description="weight of a class in the loss: 1, 1/count or 1/sqrt(count), scaled to a mean of 1 per image",
    )
    order_seed: int | None = Field(
        None, ge=0, lt=2**63, description="of data order and augmentation alone; null: the recipe's seed"
    )
    early_stop: EarlyStopRecipe | None = Field(None, description="stop early on the validation split; null: never")
    test: bool = Field(True, description="score the test split once, after training")


POLICY = re.compile(r"^(none|mlp|block|every-[1-9][0-9]*|budget-0\.[0-9]*[1-9][0-9]*)$")


def _policy(value: str) -> str:
    if not POLICY.match(value):
        raise ValueError(f"{value!r}: must be none, mlp, block, every-N (such as every-2) or budget-F (budget-0.5)")
    return value


Policy = Annotated[str, AfterValidator(_policy), Field(json_schema_extra={"pattern": POLICY.pattern})]


class RuntimeRecipe(Section):
    """Where and how numbers are computed."""

    device: Literal["auto", "cpu"] = Field("auto", description="auto: the accelerator if there is one")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of activations and frozen weights; what is trained is always float32"
    )
    frozen_weights: Literal["precision", "int8"] = Field(
        "precision",
        description="how frozen weights are held: in runtime.precision; or int8: those of the blocks' linear layers in "
        "8 bits with a scale a row (pip install 'dist-vpt[int8]'), made numbers of where they are used",
    )
    checkpointing: Policy = Field(
        "none",
        description="what is computed again in backward instead of kept: none; mlp: the inside of each MLP; block: all "
        "but each block's input; every-N: that in every N-th block; budget-F: as much as it takes to keep at most F "
        "(such as 0.5) of what none keeps, the cheapest first",
    )
    offload: bool = Field(False, description="keep what blocks keep for backward in host memory; needs a GPU")
    attention: Literal["auto", "sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flash", "eager"] = Field(
        "auto",
        description="kernel: sdpa: torch's fused attention, the kernel of torch's choice, or the one named; flash: a "
        "flash-attn package (pip install 'dist-vpt[flash]'); eager: plain, with the attention matrix in memory; auto: "
        "sdpa, but eager where it is quicker (on a CPU, in bf16, up to 256 tokens, gradients through the blocks)",
    )
    compile: bool = Field(
        False, description="compile each block (torch.compile); where no compiler is, the log says so and none is used"
    )
    memory_check: Literal["refuse", "warn", "ignore"] = Field(
        "refuse", description="on a GPU, when `dist-vpt plan` says that the run cannot fit: refuse it, or try"
    )
    deterministic: bool = Field(False, description="deterministic kernels alone: equal to the last bit, and slower")


class RunRecipe(Section):
    """The run folder, resuming, logging."""

    dir: str | None = Field(None, min_length=1, description="the run folder; null: runs/<name of the recipe file>")
    resume: Literal["never", "auto"] = Field(
        "never",
        description="auto: go on from the newest state in the folder, if there is one; never: refuse a used folder",
    )
    save_every: int | None = Field(
        None,
        ge=1,
        description="steps between saved states; null: at ends of epochs, in a reader's sweep 30 seconds apart",
    )
    log_every: int = Field(10, ge=1, description="steps between log lines and TensorBoard scalars")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"], description="where curves are sent")
    timeout_minutes: float = Field(30.0, gt=0, description="how long a process waits for the others before it gives up")


class SweepRecipe(Section):
    """What `dist-vpt sweep` tries; `train` does not read it."""

    grid: dict[str, Any] = Field(
        {"optim": {"lr": [1.0, 0.5, 0.25, 0.1, 0.05], "weight_decay": [1e-2, 1e-3, 1e-4, 0.0]}},
        description="recipe keys, each with a list of values: every combination is one trial on train, and the best on "
        "val after its last epoch is chosen (VQT's published grid unless said otherwise)",
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (42, 44, 82, 100, 800), min_length=1, description="the chosen setting is trained on trainval with each of them"
    )
    split: Literal["trials", "batch"] = Field(
        "trials", description="what several processes share: the trials, each on its own, or every batch"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        def check(values: Any, at: str) -> Iterator[str]:
            if isinstance(values, dict) and values:
                for key, inner in values.items():
                    yield from check(inner, f"{at}.{key}")
            elif not isinstance(values, list) or not values:
                yield f"{at} = {values!r}: must be a list with at least one value"
            elif any(isinstance(value, (list, dict)) for value in values) or len(set(values)) < len(values):
                yield f"{at} = {values!r}: must be plain values, each said once"
            if at in ("grid.seed", "grid.sweep", "grid.run", "grid.data.train_on", "grid.train.test"):
                yield f"{at}: is the sweep's own; leave it out"

        mistakes = list(check(self.grid, "grid"))
        if len(set(self.seeds)) < len(self.seeds):
            mistakes.append(f"seeds = {list(self.seeds)}: each once")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


def grid_axes(grid: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The keys of a grid, as ``a.b``, each with its values."""
    for key, value in grid.items():
        path = f"{at}.{key}" if at else key
        if isinstance(value, dict):
            yield from grid_axes(value, path)
        else:
            yield path, value


class Recipe(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, lt=2**63, description="of initialisation, data order, augmentation and dropout")
    data: DataRecipe = Field(default_factory=DataRecipe, description="task, format and preprocessing")
    backbone: BackboneRecipe = Field(default_factory=BackboneRecipe, description="the frozen transformer")
    method: MethodRecipe = Field(default_factory=VPTRecipe, description="what is trained")
    stream: StreamRecipe = Field(default_factory=StreamRecipe, description="where readers keep the frozen stream")
    optim: OptimRecipe = Field(default_factory=OptimRecipe, description="optimiser and schedule")
    train: TrainRecipe = Field(default_factory=TrainRecipe, description="the loop")
    runtime: RuntimeRecipe = Field(default_factory=RuntimeRecipe, description="device, precision, memory")
    run: RunRecipe = Field(default_factory=RunRecipe, description="the run folder")
    sweep: SweepRecipe = Field(default_factory=SweepRecipe, description="what `dist-vpt sweep` tries")

    @property
    def doubts(self) -> list[str]:
        """What is allowed, and hardly meant."""
        if self.backbone.name == "demo" and self.data.task != "digits":
            letters = "the backbone is demo, which has seen printed letters of 24 px alone"
            return [f"{letters}; others are in configs/backbone and told by `dist-vpt backbones`"]
        return []

    @model_validator(mode="after")
    def _rules(self) -> Self:
        mistakes = list(self._mistakes())
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _mistakes(self) -> Iterator[str]:
        if self.optim.warmup_epochs >= self.train.epochs:
            yield f"optim.warmup_epochs = {self.optim.warmup_epochs}: must be below train.epochs = {self.train.epochs}"
        if self.train.batch_size % self.train.accumulate:
            yield f"train.accumulate = {self.train.accumulate}: must divide train.batch_size = {self.train.batch_size}"
        if self.train.early_stop and self.data.train_on == "trainval":
            yield (
                "train.early_stop needs a validation split, and data.train_on = trainval leaves none: "
                "set data.train_on=train or train.early_stop=null"
            )
        method = f"method.name = {self.method.name}"
        if self.stream != StreamRecipe() and not self.method.reader:
            yield f"stream: {method} changes the image's tokens, so that no frozen stream is kept; leave stream out"
        if self.backbone.drop_path > 0 and self.method.reader:
            yield (
                f"backbone.drop_path = {self.backbone.drop_path}: {method} trains nothing in the backbone; "
                "set backbone.drop_path=0"
            )
        if self.method.reader:
            for name, unused in (("checkpointing", "none"), ("offload", False)):
                if (value := getattr(self.runtime, name)) != unused:
                    yield (
                        f"runtime.{name} = {value}: {method} keeps nothing of the backbone for backward; leave it out"
                    )
        if self.runtime.frozen_weights == "int8" and self.method.name in ("full", "partial", "vqt"):
            does = "reads the blocks' weights itself" if self.method.name == "vqt" else "trains the blocks' weights"
            yield f"runtime.frozen_weights = int8: {method} {does}; set runtime.frozen_weights=precision"
        if self.runtime.compile and self.runtime.checkpointing.startswith("budget"):
            yield (
                f"runtime.compile = true with runtime.checkpointing = {self.runtime.checkpointing}: a compiled block "
                "does not show the products that a budget chooses among; use mlp, block or every-N, or compile=false"
            )

    def to_yaml(self) -> str:
        """The resolved recipe, every key spelled out; loading it gives an equal recipe."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=110)


Path_ = tuple[str | int, ...]  # a key's place: ("optim", "lr")
COMMAND_LINE = "command line"  # where an override was said


@dataclass
class _Draft:
    """Plain data merged so far, and where each key was said last."""

    data: dict[str, Any] = field(default_factory=dict)
    said: dict[Path_, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def put(self, values: Mapping[str, Any], places: Mapping[Path_, str], at: Path_ = ()) -> None:
        into = self._mapping(at)
        # Another method has other settings: what earlier files said of the old one does not carry over.
        if at == ("method",) and "name" in values and into.get("name", values["name"]) != values["name"]:
            for key in [key for key in into if self.said.get((*at, key)) != COMMAND_LINE]:
                del into[key]
        for key, value in values.items():
            path = (*at, key)
            self.said[path] = places.get(path, places.get(at, ""))
            if isinstance(value, Mapping):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                self.put(value, places, path)
            else:
                into[key] = value

    def _mapping(self, at: Path_) -> dict[str, Any]:
        into = self.data
        for key in at:
            into = into[key]  # type: ignore[index]
        return into


def load_recipe(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Merge recipe files in order (each on top of its own ``base:`` files), then ``a.b=c`` overrides.

    Raises RecipeError with all mistakes, each with its file and line, key, value, rule and fix.
    """
    draft = _Draft(data={"method": {"name": "vpt"}})  # a method without a name is the default one
    for file in files:
        _read(Path(file), draft, asked_by=COMMAND_LINE, open_files=())
    for override in overrides:
        _override(override, draft)
    _take_published_counts(draft.data)
    try:
        recipe = _validated(draft.data)
    except ValidationError as error:
        draft.mistakes += [mistake for e in error.errors() for mistake in _explain(e, draft)]
        draft.mistakes += _broken_rules(draft, error)
    if draft.mistakes:
        unique = list(dict.fromkeys(draft.mistakes))
        count = "1 mistake" if len(unique) == 1 else f"{len(unique)} mistakes"
        raise RecipeError("\n".join([f"{count} in the recipe:", *(f"  {m}" for m in unique)]))
    if recipe.run.dir is None:
        name = "-".join(Path(file).stem for file in files) or "default"
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": f"runs/{name}"})})
    return recipe


def _take_published_counts(data: dict[str, Any]) -> None:
    """Prompts and queries that nobody said: the paper's for this task, where it has them."""
    task = data.get("data", {}).get("task") if isinstance(data.get("data"), dict) else None
    row, method = TASKS.get(task) if isinstance(task, str) else None, data.get("method")
    if row is None or not isinstance(method, dict):
        return
    prepended = method.get("location", "prepend") == "prepend"
    if method.get("name") == "vpt" and method.get("deep", True) and prepended and row.prompts:
        method.setdefault("prompts", row.prompts)
    if method.get("name") == "vqt" and row.queries:
        method.setdefault("queries", row.queries)


def load_recipe_from(data: dict[str, Any]) -> Recipe:
    """A recipe from the plain data of another one (``model_dump``). Raises RecipeError."""
    try:
        return _validated(data)
    except ValidationError as error:
        found = [f"{'.'.join(str(k) for k in e['loc']) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise RecipeError("; ".join(found)) from error


def _validated(data: dict[str, Any]) -> Recipe:
    # Through JSON, where strict types (no "3" and no true for a number) still let a list be a tuple.
    return Recipe.model_validate_json(json.dumps(data, default=str), strict=True)


def _broken_rules(draft: _Draft, error: ValidationError) -> list[str]:
    """Rules over several sections that are broken beside wrong keys, which keep pydantic from looking at them."""
    data, wrong = copy.deepcopy(draft.data), []
    for e in error.errors():
        _, path = _model_at(e["loc"])
        into: Any = data
        for key in path[:-1]:
            into = into.get(key, {}) if isinstance(into, dict) else {}
        if path and isinstance(into, dict) and into.pop(path[-1], None) is not None:
            wrong.append(".".join(map(str, path)))
    try:
        _validated(data)
    except ValidationError as again:
        rules = [mistake for e in again.errors() if not e["loc"] for mistake in _explain(e, draft)]
        return [rule for rule in rules if not any(key in rule for key in wrong)]  # of a default that nobody chose
    return []


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words -> recipe files and ``a.b=c`` overrides. Raises RecipeError for a lone ``=``."""
    if "=" in arguments:
        at = arguments.index("=")
        key, value = (" ".join(arguments[part]) for part in (slice(max(at - 1, 0), at), slice(at + 1, at + 2)))
        raise RecipeError(f"command line: {key} = {value}: a key and its value are one word; write {key}={value}")
    overrides = [word for word in arguments if re.match(r"[A-Za-z_][\w.]*=", word)]
    return [word for word in arguments if word not in overrides], overrides


def says_method(file: str) -> bool:
    """Whether a recipe file, or one that it inherits from, says anything of the method."""
    draft = _Draft(data={})
    _read(Path(file), draft, asked_by=COMMAND_LINE, open_files=())
    return "method" in draft.data


def json_schema() -> dict[str, Any]:
    """A JSON Schema of recipe files, for editors."""
    schema = Recipe.model_json_schema()
    base = {
        "description": "recipe files to inherit from, relative to this one; later ones win, this file over all",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    schema["properties"] = {"base": base, **schema["properties"]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def flat(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """All keys of a recipe, written with dots, with their values."""

    def below(value: Any, at: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield at, value
            return
        for key, inner in value.items():
            yield from below(inner, f"{at}.{key}" if at else key)

    return below(recipe.model_dump(mode="json"), "")


def differences(old: Recipe, new: Recipe) -> list[str]:
    """``key: old -> new`` for every key of two recipes that differs."""
    before, after = dict(flat(old)), dict(flat(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


class _Loader(yaml.SafeLoader):
    """Safe YAML whose keys are strings, each said once; 1e-3 is a number (YAML 1.1 wants 1.0e-3), a date a string."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        said: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != YAML_TAG + "merge":
                key.tag = YAML_TAG + "str"
                if key.value in said:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is said twice", key.start_mark)
                said.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that _Loader would read as numbers."""


YAML_TAG = "tag:yaml.org,2002:"
SHORT_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != YAML_TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(YAML_TAG + "float", SHORT_FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver(YAML_TAG + "float", SHORT_FLOAT, list("-+0123456789."))


def _read(file: Path, draft: _Draft, asked_by: str, open_files: tuple[Path, ...]) -> None:
    if file.resolve() in open_files:
        draft.mistakes.append(f"{asked_by}: base: {file} inherits from itself; remove one of the two")
        return
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, _Loader)
        content = yaml.load(text, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such recipe file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        siblings = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        hint = f"; {nearest(str(file), siblings)}" if siblings else ""
        draft.mistakes.append(f"{asked_by}: {file}: {reason}{hint}")
        return
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        draft.mistakes.append(f"{file}{line}: not valid YAML: {getattr(error, 'problem', error)}; mend the syntax")
        return
    except ValueError as error:  # a tag that its value contradicts: !!int x
        draft.mistakes.append(f"{file}: not valid YAML: {error}; mend the syntax")
        return
    if content is None:
        return
    if not isinstance(content, dict):
        draft.mistakes.append(
            f"{file}:1: a recipe is a mapping of keys to values, not a {type(content).__name__}; write key: value"
        )
        return
    places = dict(_places(node, file))
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        draft.mistakes.append(
            f"{places[('base',)]}: base = {bases!r}: must be a recipe file or a list of them; mend it"
        )
        bases = []
    for base in bases:
        _read(file.parent / base, draft, asked_by=places[("base",)], open_files=(*open_files, file.resolve()))
    draft.put(content, places)


def _places(node: yaml.Node | None, file: Path, at: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*at, key.value)
            yield path, f"{file}:{key.start_mark.line + 1}"
            yield from _places(value, file, path)


def _override(text: str, draft: _Draft) -> None:
    dotted, _, raw = text.partition("=")
    keys = dotted.split(".")
    if dotted == "base":
        draft.mistakes.append(
            f"{COMMAND_LINE}: {text}: base belongs into a recipe file; give {raw} as a word of its own"
        )
        return
    try:
        value = yaml.load(raw, _Loader)
    except (yaml.YAMLError, ValueError):
        draft.mistakes.append(f"{COMMAND_LINE}: {text}: the value is not valid YAML; quote it")
        return
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    places: dict[Path_, str] = {tuple(keys[: i + 1]): COMMAND_LINE for i in range(len(keys))}
    draft.put(nested, places)


def _explain(error: Any, draft: _Draft) -> list[str]:
    """Mistakes, one but for rules over several keys, as place: key = value: rule; fix."""
    loc: Path_ = error["loc"]
    model, path = _model_at(loc)
    key = ".".join(map(str, path))
    place = next((draft.said[path[:n]] for n in range(len(path), 0, -1) if path[:n] in draft.said), "recipe")
    kind, context = error["type"], error.get("ctx", {})
    value = error["input"]
    if kind == "extra_forbidden":
        names = [*(model.model_fields if model else ()), *(("base",) if model is Recipe else ())]
        return [f"{place}: {key} = {value!r}: unknown key; {nearest(str(path[-1]), names)}"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, dict) else value
        tags = re.findall(r"'(\w+)'", str(context.get("expected_tags", ""))) or [
            tag for member in _union_members(Recipe.model_fields["method"].annotation) for tag in _tag(member)
        ]
        place = draft.said.get((*path, "name"), place)
        return [f"{place}: {key}.name = {name!r}: not a method; {nearest(str(name), tags)}"]
    if kind == "value_error":  # a rule over several keys: its own message names keys and fix
        messages = str(context.get("error", error["msg"])).split("\n")
        if key:
            return [f"{place}: {key}: {message}" for message in messages]
        return [f"{_said_of(message, draft)}: {message}" for message in messages]
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return [f"{place}: {key} = {value!r}: must be one of its choices; {nearest(str(value), expected)}"]
    rule = error["msg"][0].lower() + error["msg"][1:]
    return [f"{place}: {key} = {value!r}: {rule}; mend the value"]


def _said_of(message: str, draft: _Draft) -> str:
    """Where the keys that a message mentions were said."""
    mentioned = [path for path in draft.said if len(path) > 1 and ".".join(map(str, path)) in message]
    return ", ".join(dict.fromkeys(draft.said[path] for path in mentioned)) or "recipe"


def _model_at(loc: Path_) -> tuple[type[BaseModel] | None, Path_]:
    """The model that holds the last key of a pydantic location, and the location without union tags."""
    model: type[BaseModel] | None = Recipe
    path: list[str | int] = []
    pending: dict[str, type[BaseModel]] = {}
    for i, key in enumerate(loc):
        if pending and key in pending:  # a discriminator's tag, not a key of the recipe
            model, pending = pending[str(key)], {}
            continue
        path.append(key)
        if i == len(loc) - 1 or model is None:
            break
        info = model.model_fields.get(str(key))
        members = list(_union_members(info.annotation)) if info else []
        pending = {tag: member for member in members for tag in _tag(member)} if len(members) > 1 else {}
        model = members[0] if members else None
    return model, tuple(path)


def _union_members(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None or isinstance(annotation, type(Union[int, str])):  # noqa: UP007
        for part in get_args(annotation):
            yield from _union_members(part)


def _tag(model: type[BaseModel]) -> tuple[str, ...]:
    name = model.model_fields.get("name")
    return get_args(name.annotation) if name and get_origin(name.annotation) is Literal else ()
