"""Build a backbone and give its preprocessing. The only module that creates timm models."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from safetensors import safe_open
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.eva import EvaBackbone, learns_rotary
from dist_vpt.backbones.swin import SwinBackbone
from dist_vpt.backbones.vit import Backbone
from dist_vpt.backbones.weights.convert import LoadReport
from dist_vpt.backbones.weights.deferred import without_matrices
from dist_vpt.backbones.weights.loading import load_into
from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.errors import UserError, WeightsError, nearest

DEMO = Path(__file__).parent / "demo" / "demo.safetensors"
SUPPORTED = (
    "this version tunes timm's VisionTransformer, Eva and SwinTransformer models (vit_*, deit3_*, eva*, swin_*, ...): "
    "choose a short name of `dist-vpt backbones`, or one of `timm.list_models('vit_*')`"
)
AnyModel: TypeAlias = VisionTransformer | SwinTransformer | Eva
# Of these classes themselves: a subclass (the distilled DeiT) has another stem.
KINDS: dict[type, type[Backbone]] = {VisionTransformer: Backbone, SwinTransformer: SwinBackbone, Eva: EvaBackbone}


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that weights were trained with; known without building the model."""

    image_size: int  # pixels
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    interpolation: str


def preprocessing_of(recipe: BackboneConfig) -> Preprocessing:
    """The preprocessing that the backbone's weights were trained with."""
    if recipe.name == "demo":
        facts = _demo_metadata()["preprocessing"]
        return Preprocessing(facts["image_size"], tuple(facts["mean"]), tuple(facts["std"]), facts["interpolation"])
    if recipe.name in ZOO:
        row = ZOO[recipe.name]
        return Preprocessing(row.size, row.channels.mean, row.channels.std, row.interpolation)
    cfg = timm.get_pretrained_cfg(_known(recipe.name))
    if cfg is None:
        raise UserError(f"backbone.name = {recipe.name}: timm has no preprocessing for it; add the tag of its weights")
    interpolation = cfg.interpolation if cfg.interpolation in ("bilinear", "bicubic") else "bicubic"
    return Preprocessing(cfg.input_size[-1], tuple(cfg.mean), tuple(cfg.std), interpolation)


def build(
    recipe: BackboneConfig,
    *,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    frame: int = 0,
    defer: bool = False,
) -> tuple[Backbone, LoadReport]:
    """Build the backbone, load its weights; frozen, in float32 and in eval mode.

    ``frame``: pixels that will be put on each side of an image. ``defer``: leave the blocks' matrices in a file that
    has them all, for ``weights.deferred.read_deferred``.

    Returns the backbone and how its tensors differ from the file's. Raises WeightsError if they differ and
    ``recipe.load`` is strict, UserError for a model that is no ViT, Eva or Swin, or an image size that its
    patches or windows do not divide.
    """
    load_report = None
    if defer and recipe.weights != "random":
        with without_matrices():
            model = _create(recipe, image_size, frame)
        load_report = _load(model, recipe, defer=True)
    if load_report is None:
        model = _create(recipe, image_size, frame)
        load_report = _load(model, recipe)
        assert load_report is not None
    pool = _pool(recipe)
    if pool not in (None, model.global_pool):  # after loading: a timm model built for another pooling has other norms
        if isinstance(model, SwinTransformer):
            raise UserError(
                f"backbone.global_pool = {pool}: Swin has the mean of its patches, and no class token; leave it out"
            )
        if pool == "token" and model.cls_token is None:  # timm before 1.0.28 accepts it, and pools the first patch
            raise UserError("backbone.global_pool = token: the backbone has no class token. Choose another pool")
        try:
            model.reset_classifier(0, pool)
        except AssertionError as error:
            raise UserError(f"backbone.global_pool = {pool}: timm rejects it: {error} Choose another pool") from error
    return wrap(model, mean=mean, std=std, stochastic=recipe.drop_path > 0), load_report


def wrap(model: AnyModel, *, mean: tuple[float, ...], std: tuple[float, ...], stochastic: bool) -> Backbone:
    """A timm model as a frozen backbone, which takes it apart. ``stochastic``: drop paths in training.

    ``mean`` and ``std``: of the channels of pixels in [0, 1]; images are given in 0..255. Raises UserError for a model
    that cannot be tuned here.
    """
    refuse_model(model, "the model")
    backbone = KINDS[type(model)](model, mean=mean, std=std, stochastic=stochastic)
    return backbone.requires_grad_(False)


def refuse_model(model: Any, what: str) -> None:
    """Raises UserError for a timm model that cannot be tuned here; ``what``: how the message calls it."""
    if type(model) not in KINDS:
        raise UserError(f"{what} is a {type(model).__name__}; {SUPPORTED}")
    if isinstance(model, Eva) and learns_rotary(model):
        raise UserError(
            f"{what} has a {type(model.rope).__name__}, whose rotary positions are weights of each block; {SUPPORTED}"
        )
    if hasattr(model.patch_embed, "backbone"):
        raise UserError(f"{what} is a hybrid (a vision transformer on a ResNet stem); {SUPPORTED}")


@dataclass(frozen=True)
class TimmModel:
    """A call that creates the unmodified timm model, with a classifier, which merged weights fit."""

    architecture: str  # timm's name of the model; VisionTransformer: the class itself
    options: dict[str, Any]
    pool: str | None  # that the classifier is reset to; None: the model's own

    def __str__(self) -> str:
        """The call as lines of Python."""
        arguments = [f"{name}={value!r}" for name, value in self.options.items()]
        if self.architecture == "VisionTransformer":
            lines = [f"model = timm.models.VisionTransformer({', '.join(arguments)})"]
        else:
            lines = [f"model = timm.create_model({', '.join([repr(self.architecture), *arguments])})"]
        if self.pool is not None:
            lines.append(f"model.reset_classifier({self.options['num_classes']}, {self.pool!r})")
        return "\n".join(lines)


def timm_model(recipe: BackboneConfig, image_size: int, classes: int) -> TimmModel:
    """The unmodified timm model of a backbone."""
    row = ZOO.get(recipe.name)
    name, options = (row.architecture, row.options) if row else (recipe.name, {})
    with torch.device("meta"):
        if recipe.name == "demo":
            name, options = "VisionTransformer", _demo_metadata()["architecture"]
            model = VisionTransformer(**options)
        else:
            model = create(name, image_size, **options)
    pool = _pool(recipe)
    options = options | {"num_classes": classes, "img_size": image_size}
    return TimmModel(name, options, None if pool in (None, model.global_pool) else pool)


def weights_source(recipe: BackboneConfig) -> tuple[str | None, str | None]:
    """The id on the hub of a backbone's pretrained weights, and their license as the hub writes it; None: not known."""
    if recipe.weights == "random":
        return None, None
    if recipe.name == "demo":
        return None, "apache-2.0" if recipe.file is None else None
    row = ZOO.get(recipe.name)
    cfg = timm.get_pretrained_cfg(row.pretrained or row.architecture if row else recipe.name)
    license = row.project.license if row else cfg and recipe.file is None and cfg.license
    return cfg.hf_hub_id if cfg and recipe.file is None else None, license.lower() if license else None


def _pool(recipe: BackboneConfig) -> str | None:
    """Pooling set by the recipe or by the zoo; None: the timm model's."""
    return recipe.global_pool or (ZOO[recipe.name].pool if recipe.name in ZOO else None)


def create(architecture: str, image_size: int, **options: Any) -> AnyModel:
    """A timm model without a head and with random weights. Raises UserError where it cannot be tuned here."""
    options = {"num_classes": 0, "img_size": image_size} | options
    try:
        model = timm.create_model(architecture, pretrained=False, **options)
    except (TypeError, AssertionError, RuntimeError) as error:  # Runtime: Swin V2 of timm before 1.0.28, by its windows
        raise UserError(
            f"backbone.name = {architecture}, image size {image_size}: timm rejects it: {error}; {SUPPORTED}"
        ) from error
    refuse_model(model, f"backbone.name = {architecture}")
    return model


def _create(recipe: BackboneConfig, image_size: int, frame: int = 0) -> AnyModel:
    framed = image_size + 2 * frame
    if recipe.name == "demo":
        architecture = _demo_metadata()["architecture"] | {
            "img_size": framed,
            "drop_path_rate": recipe.drop_path,
        }
        _check_patches(image_size, architecture["patch_size"], frame)
        return VisionTransformer(**architecture)
    row = ZOO.get(recipe.name)
    name, options = (row.architecture, row.options) if row else (_known(recipe.name), {})
    model = create(name, framed, drop_path_rate=recipe.drop_path, **options)
    if isinstance(model, SwinTransformer):
        if frame:
            raise UserError(
                "method.location = pad: on Swin prompts are prepended to the patches of each window; leave it out"
            )
        _check_windows(image_size, preprocessing_of(recipe).image_size, model)
    else:
        _check_patches(image_size, model.patch_embed.patch_size[0], frame)
    return model


def _load(model: AnyModel, recipe: BackboneConfig, defer: bool = False) -> LoadReport | None:
    if recipe.weights == "random":
        return LoadReport()
    options: dict[str, Any] = {"lenient": recipe.load == "lenient", "position_resize": recipe.positions, "defer": defer}
    if recipe.file is not None:
        return load_into(model, recipe.file, entry=recipe.entry, **options)
    if recipe.name == "demo":
        return load_into(model, DEMO, **options | {"lenient": False})
    name = recipe.name
    if name in ZOO:
        row = ZOO[name]
        if row.pretrained is None:
            raise WeightsError(
                f"backbone.name = {name}: timm's hub has no such weights; download the file from {row.project.page} "
                "and set backbone.weights=FILE"
            )
        name = row.pretrained
    return load_into(model, _from_hub(name), **options)


def _from_hub(name: str) -> Path:
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise WeightsError(
            f"backbone.name = {name}: timm has no pretrained weights for it; add a tag "
            f"({', '.join(timm.list_pretrained(name + '.*')[:6]) or 'none is known'}) or set backbone.weights=FILE"
        )
    try:
        if cfg.hf_hub_id:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError

            names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
            for filename in names[:-1]:
                try:
                    return Path(hf_hub_download(cfg.hf_hub_id, filename))
                except EntryNotFoundError:  # an older repository without safetensors
                    continue
            return Path(hf_hub_download(cfg.hf_hub_id, names[-1]))
        from timm.models._hub import download_cached_file

        return Path(download_cached_file(cfg.url, check_hash=False))
    except Exception as error:  # the hub raises many types; all mean that there are no weights
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"backbone.name = {name}: its weights could not be downloaded ({reason}); "
            "download them elsewhere and set backbone.weights=FILE"
        ) from error


def is_known(name: str) -> bool:
    """Whether a recipe's ``backbone.name`` can be this: a short name or a timm model."""
    return name == "demo" or name in ZOO or timm.is_model(name)


def _known(name: str) -> str:
    if not timm.is_model(name):
        hint = nearest(name, ["demo", *ZOO, *_models()])
        raise UserError(f"backbone.name = {name}: neither a short name (`dist-vpt backbones`) nor a timm model; {hint}")
    architecture, _, tag = name.partition(".")
    tags = {known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", include_tags=True)}
    if tag and tag not in tags:
        raise UserError(f"backbone.name = {name}: timm has no weights {tag!r} for it; {nearest(tag, tags)}")
    return name


def _models() -> list[str]:
    return timm.list_models(["vit_*", "deit*", "eva*", "swin_*"])


def _check_windows(image_size: int, pretrained_size: int, swin: SwinTransformer) -> None:
    """At the pretraining size, windows tile the grid of every stage; so they do at its multiples, and only there."""
    if image_size % pretrained_size:
        lower = image_size // pretrained_size * pretrained_size
        sizes = f"{lower} or {lower + pretrained_size}" if lower else str(pretrained_size)
        window, patch = swin.layers[0].blocks[0].window_size[0], swin.patch_embed.patch_size[0]
        raise UserError(
            f"image size {image_size}: Swin's windows of {window} x {window} patches of {patch} pixels must tile the "
            f"grids of all its {len(swin.layers)} stages: must be a multiple of {pretrained_size}; use "
            f"data.image_size={sizes}"
        )


def _check_patches(image_size: int, patch_size: int, frame: int) -> None:
    if frame and (image_size + 2 * frame) % patch_size:
        wider = next((n for n in range(frame, frame + patch_size) if (image_size + 2 * n) % patch_size == 0), None)
        fix = f"method.prompts={wider}" if wider else f"a data.image_size that {patch_size} divides"
        raise UserError(
            f"image size {image_size} with a frame of {frame} pixels (method.location = pad) is "
            f"{image_size + 2 * frame}: must be a multiple of the patch size {patch_size}; use {fix}"
        )
    if image_size % patch_size and not frame:
        lower = image_size // patch_size * patch_size
        sizes = f"{lower} or {lower + patch_size}" if lower else str(patch_size)
        raise UserError(
            f"image size {image_size}: must be a multiple of the patch size {patch_size}; use data.image_size={sizes}"
        )


def _demo_metadata() -> dict[str, Any]:
    with safe_open(DEMO, "pt") as file:
        metadata = file.metadata()
    return {key: json.loads(metadata[key]) for key in ("architecture", "preprocessing")}
