"""The messages about recipes, frozen: each names the location, the key and its value, the rule and the fix.

A change here is a change of what users read.
"""

from pathlib import Path

import pytest

from dist_vpt.errors import RecipeError
from dist_vpt.recipe.differences import flatten
from dist_vpt.recipe.loading import load_recipe, split_arguments

LOGIN = (
    "holds a login, which would be saved with the run; leave it out, and give it to the library that logs in (https: a "
    "line of ~/.netrc)"
)
BOOLEAN = "must be a valid boolean; use true or false, without quotes"
CHOICE = "must be one of its choices; valid: "
INTEGER = "must be a valid integer; use a whole number such as 3, without quotes"
LIST = "must be a valid array; use a list such as [a, b]"
NUMBER = "must be a valid number; use a number such as 0.1, without quotes"
OPTIMIZERS = (
    "adabelief, adadelta, adafactor, adagrad, adam, adamax, adamw, adan, adopt, lamb, lambc, laprop, larc, lars, lion, "
    "nadam, nadamw, radam, rmsprop, rmsproptf, sgd, sgdw"
)
TEXT = "must be a valid string; use text, in quotes if it looks like a number"

# Each key with a value of a wrong type, a wrong choice or out of bounds: overrides, the value as shown, rule and fix.
VALUES = [
    ("protocol=x", "'x'", CHOICE + "default, published"),
    ("seed=x", "'x'", INTEGER),
    ("seed=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    (
        "data.format=x",
        "'x'",
        CHOICE + "digits, fgvc_json, hf, image_folder, shapes, table, tfds, vtab_folder, webdataset",
    ),
    ("data.labels=x", "'x'", CHOICE + "multiple, single"),
    ("data.table.separator=x", "'x'", CHOICE + "comma, pipe, semicolon, space"),
    ("data.train_on=x", "'x'", CHOICE + "train, trainval"),
    ("data.fraction=x", "'x'", NUMBER),
    ("data.fraction=-1", "-1", "must be greater than 0; use a value above 0"),
    ("data.shots=x", "'x'", INTEGER),
    ("data.shots=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("data.tries=x", "'x'", INTEGER),
    ("data.tries=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("data.try_index=x", "'x'", INTEGER),
    ("data.try_index=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("data.val_fraction=x", "'x'", NUMBER),
    ("data.val_fraction=-1", "-1", "must be greater than 0; use a value above 0"),
    ("data.test_fraction=x", "'x'", NUMBER),
    ("data.test_fraction=-1", "-1", "must be greater than 0; use a value above 0"),
    ("data.split_seed=x", "'x'", INTEGER),
    ("data.split_seed=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("data.image_size=x", "'x'", INTEGER),
    ("data.image_size=-1", "-1", "must be greater than or equal to 8; use 8 or more"),
    ("data.interpolation=x", "'x'", CHOICE + "bicubic, bilinear, vpt"),
    ("data.crop_mode=x", "'x'", CHOICE + "crop, squash"),
    ("data.normalize=x", "'x'", CHOICE + "none, vpt, weights"),
    ("data.mean=x", "'x'", LIST),
    ("data.std=x", "'x'", LIST),
    ("data.augment=x", "'x'", CHOICE + "fgvc, none"),
    ("data.random_erasing=x", "'x'", NUMBER),
    ("data.random_erasing=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("data.random_erasing_mode=x", "'x'", CHOICE + "const, pixel, rand"),
    ("data.test_crops=3", "3", CHOICE + "1, 10, 2, 5"),
    ("data.cache=x", "'x'", CHOICE + "memory, none"),
    ("data.workers=x", "'x'", INTEGER),
    ("data.workers=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("data.on_decode_error=x", "'x'", CHOICE + "fail, skip"),
    ("data.absent_classes=x", "'x'", CHOICE + "allow, fail"),
    ("data.check_counts=x", "'x'", BOOLEAN),
    ("data.check_leaks=x", "'x'", BOOLEAN),
    ("data.streaming=x", "'x'", BOOLEAN),
    ("data.streaming_disk_gib=x", "'x'", NUMBER),
    ("data.streaming_disk_gib=0", "0", "must be greater than 0; use a value above 0"),
    ("data.streaming_shuffle=x", "'x'", INTEGER),
    ("data.streaming_shuffle=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("data.table.classes=x", "'x'", LIST),
    ("data.webdataset.classes=x", "'x'", LIST),
    ("data.table.delimiter=x", "'x'", CHOICE + "comma, pipe, semicolon, tab"),
    ("data.exif=x", "'x'", CHOICE + "ignore, transpose"),
    ("data.max_megapixels=x", "'x'", NUMBER),
    ("data.max_megapixels=-1", "-1", "must be greater than 0; use a value above 0"),
    ("backbone.name=null", "None", TEXT),
    ("backbone.weights=null", "None", TEXT),
    ("backbone.load=x", "'x'", CHOICE + "lenient, strict"),
    ("backbone.global_pool=x", "'x'", CHOICE + "avg, token"),
    ("backbone.position_resize=x", "'x'", CHOICE + "timm, vpt"),
    ("backbone.drop_path=x", "'x'", NUMBER),
    ("backbone.drop_path=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("method.prompts=x", "'x'", INTEGER),
    ("method.prompts=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("method.location=x", "'x'", CHOICE + "add, add-1, below, pad, prepend, prepend-pixel"),
    ("method.deep=x", "'x'", BOOLEAN),
    ("method.layers=x", "'x'", INTEGER),
    ("method.layers=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("method.prompted_blocks=x", "'x'", CHOICE + "first, last"),
    ("method.expand=x", "'x'", BOOLEAN),
    ("method.shared=x", "'x'", BOOLEAN),
    ("method.dropout=x", "'x'", NUMBER),
    ("method.dropout=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("method.projection=x", "'x'", INTEGER),
    ("method.projection=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("method.pooling=x", "'x'", CHOICE + "img_pool, imgprompt_pool, original, prompt_pool"),
    ("method.head=x", "'x'", CHOICE + "published, standardized"),
    ("method.init=x", "'x'", CHOICE + "class_token, random, scaled, tokens"),
    ("method.extra_trainable=x", "'x'", LIST),
    ("stream.cache=x", "'x'", CHOICE + "auto, device, disk, memory, none"),
    ("stream.dtype=x", "'x'", CHOICE + "fp8, int8, precision"),
    ("optim.name=x", "'x'", CHOICE + OPTIMIZERS),
    ("optim.layer_decay=x", "'x'", NUMBER),
    ("optim.layer_decay=0", "0", "must be greater than 0; use a value above 0"),
    ("optim.lr=x", "'x'", NUMBER),
    ("optim.lr=-1", "-1", "must be greater than 0; use a value above 0"),
    ("optim.scale_lr=x", "'x'", BOOLEAN),
    ("optim.weight_decay=x", "'x'", NUMBER),
    ("optim.weight_decay=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("optim.momentum=x", "'x'", NUMBER),
    ("optim.momentum=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("optim.nesterov=x", "'x'", BOOLEAN),
    ("optim.betas=x", "'x'", LIST),
    ("optim.eps=x", "'x'", NUMBER),
    ("optim.eps=-1", "-1", "must be greater than 0; use a value above 0"),
    ("optim.clip_norm=x", "'x'", NUMBER),
    ("optim.clip_norm=-1", "-1", "must be greater than 0; use a value above 0"),
    ("optim.schedule=x", "'x'", CHOICE + "constant, cosine"),
    ("optim.warmup_epochs=x", "'x'", NUMBER),
    ("optim.warmup_epochs=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("optim.schedule_by=x", "'x'", CHOICE + "epoch, step"),
    ("train.epochs=x", "'x'", INTEGER),
    ("train.epochs=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("train.batch_size=x", "'x'", INTEGER),
    ("train.batch_size=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("train.grad_accum_steps=x", "'x'", INTEGER),
    ("train.grad_accum_steps=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("train.eval_batch_size=x", "'x'", INTEGER),
    ("train.eval_batch_size=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("train.eval_every=x", "'x'", INTEGER),
    ("train.eval_every=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("train.label_smoothing=x", "'x'", NUMBER),
    ("train.label_smoothing=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("train.class_weights=x", "'x'", CHOICE + "inv, inv_sqrt, none"),
    ("train.sampling=x", "'x'", CHOICE + "balanced, shuffle"),
    ("train.mixup_alpha=x", "'x'", NUMBER),
    ("train.mixup_alpha=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("train.cutmix_alpha=x", "'x'", NUMBER),
    ("train.cutmix_alpha=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("train.mixup_prob=x", "'x'", NUMBER),
    ("train.mixup_prob=0", "0", "must be greater than 0; use a value above 0"),
    ("train.mixup_switch_prob=x", "'x'", NUMBER),
    ("train.mixup_switch_prob=2", "2", "must be less than or equal to 1; use 1 or less"),
    ("train.model_ema_decay=x", "'x'", NUMBER),
    ("train.model_ema_decay=1", "1", "must be less than 1; use a value below 1"),
    ("train.model_ema_warmup=x", "'x'", BOOLEAN),
    ("train.data_seed=x", "'x'", INTEGER),
    ("train.data_seed=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("train.early_stop.patience=x", "'x'", INTEGER),
    ("train.early_stop.patience=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("train.early_stop.min_delta=x", "'x'", NUMBER),
    ("train.early_stop.min_delta=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("train.test=x", "'x'", BOOLEAN),
    ("runtime.device=x", "'x'", CHOICE + "auto, cpu"),
    ("runtime.precision=x", "'x'", CHOICE + "auto, bf16, fp16, fp32"),
    ("runtime.quantize=x", "'x'", CHOICE + "int8, none"),
    ("runtime.offload=x", "'x'", BOOLEAN),
    ("runtime.attention=x", "'x'", CHOICE + "auto, eager, flash, sdpa, sdpa_cudnn, sdpa_efficient, sdpa_flash"),
    ("runtime.compile=x", "'x'", BOOLEAN),
    ("runtime.tf32=x", "'x'", BOOLEAN),
    ("runtime.memory_check=x", "'x'", CHOICE + "ignore, refuse, warn"),
    ("runtime.deterministic=x", "'x'", BOOLEAN),
    ("run.resume=x", "'x'", CHOICE + "auto, never"),
    ("run.save_every=x", "'x'", INTEGER),
    ("run.save_every=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("run.log_every=x", "'x'", INTEGER),
    ("run.log_every=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("run.trackers=x", "'x'", LIST),
    ("run.timeout_minutes=x", "'x'", NUMBER),
    ("run.timeout_minutes=-1", "-1", "must be greater than 0; use a value above 0"),
    ("sweep.seeds=x", "'x'", LIST),
    ("sweep.search=x", "'x'", CHOICE + "grid, halving, optuna"),
    ("sweep.n_trials=x", "'x'", INTEGER),
    ("sweep.n_trials=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("sweep.pruner=x", "'x'", CHOICE + "asha, none"),
    ("sweep.reduction_factor=x", "'x'", INTEGER),
    ("sweep.reduction_factor=1", "1", "must be greater than or equal to 2; use 2 or more"),
    ("sweep.min_epochs=x", "'x'", INTEGER),
    ("sweep.min_epochs=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("sweep.parallelize=x", "'x'", CHOICE + "batch, trials"),
    ("method.name=mlp method.width=x", "'x'", INTEGER),
    ("method.name=mlp method.width=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=vqt method.queries=x", "'x'", INTEGER),
    ("method.name=vqt method.queries=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=vqt method.blocks=x", "'x'", LIST),
    ("method.name=vqt method.normalize=x", "'x'", BOOLEAN),
    ("method.name=vqt method.form=x", "'x'", CHOICE + "absorbed, auto, projected"),
    ("method.name=vqt method.keep=x", "'x'", INTEGER),
    ("method.name=vqt method.keep=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=side method.channels=x", "'x'", INTEGER),
    ("method.name=side method.channels=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=lora method.rank=x", "'x'", INTEGER),
    ("method.name=lora method.rank=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=lora method.alpha=x", "'x'", NUMBER),
    ("method.name=lora method.alpha=-1", "-1", "must be greater than 0; use a value above 0"),
    ("method.name=lora method.targets=x", "'x'", LIST),
    ("method.name=adapter method.style=x", "'x'", CHOICE + "houlsby, pfeiffer"),
    ("method.name=adapter method.bottleneck=x", "'x'", INTEGER),
    ("method.name=adapter method.bottleneck=-1", "-1", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=adaptformer method.scale=x", "'x'", NUMBER),
    ("method.name=adaptformer method.scale=-1", "-1", "must be greater than 0; use a value above 0"),
    ("method.name=knn method.k=x", "'x'", INTEGER),
    ("method.name=knn method.k=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=knn method.temperature=x", "'x'", NUMBER),
    ("method.name=knn method.temperature=0", "0", "must be greater than 0; use a value above 0"),
    ("method.name=logistic method.c=x", "'x'", NUMBER),
    ("method.name=logistic method.c=0", "0", "must be greater than 0; use a value above 0"),
    ("method.name=combo method.depth=x", "'x'", INTEGER),
    ("method.name=combo method.depth=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=combo method.heads=x", "'x'", INTEGER),
    ("method.name=combo method.heads=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=combo method.mlp_ratio=x", "'x'", INTEGER),
    ("method.name=combo method.mlp_ratio=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=combo method.grid=x", "'x'", INTEGER),
    ("method.name=combo method.grid=0", "0", "must be greater than or equal to 1; use 1 or more"),
    ("method.name=combo method.tokens=x", "'x'", CHOICE + "all, patches"),
    ("method.name=combo method.head_reads=x", "'x'", CHOICE + "blocks, pooled, token"),
    ("method.name=combo method.standardize=x", "'x'", CHOICE + "channel, token"),
    ("method.name=combo method.sum_blocks=x", "'x'", BOOLEAN),
    ("method.name=combo method.group_penalty=x", "'x'", NUMBER),
    ("method.name=combo method.group_penalty=-1", "-1", "must be greater than or equal to 0; use 0 or more"),
    ("method.name=cls method.reinit=x", "'x'", BOOLEAN),
]

# All other mistakes: files in the current folder, arguments, and the messages.
MISTAKES: list[tuple[dict[str, str], list[str], list[str]]] = [
    ({"a.yaml": "sed: 3"}, ["a.yaml"], ["a.yaml:1: sed = 3: unknown key; did you mean 'seed'?"]),
    (
        {"a.yaml": "seed: 1\noptim:\n  momentun: 0.9"},
        ["a.yaml"],
        ["a.yaml:3: optim.momentun = 0.9: unknown key; did you mean 'momentum'?"],
    ),
    (
        {"a.yaml": "method: {name: linear, prompts: 5}"},
        ["a.yaml"],
        ["a.yaml:1: method.prompts = 5: unknown key; valid: head, name, reads"],
    ),
    ({"a.yaml": "optim.lr: 3"}, ["a.yaml"], ["a.yaml:1: optim.lr = 3: unknown key; did you mean 'optim'?"]),
    (
        {"a.yaml": "on: 3"},
        ["a.yaml"],
        [
            (
                "a.yaml:1: on = 3: unknown key; valid: backbone, backbones, base, data, method, optim, protocol, "
                "published, run, runtime, seed, stream, sweep, train"
            )
        ],
    ),
    ({}, ["train.epoch=3"], ["command line: train.epoch = 3: unknown key; did you mean 'epochs'?"]),
    ({"a.yaml": "train: 3"}, ["a.yaml"], ["a.yaml:1: train = 3: must be an object; use {KEY: VALUE}"]),
    ({"a.yaml": "method: linear"}, ["a.yaml"], ["a.yaml:1: method = 'linear': must be an object; use {KEY: VALUE}"]),
    (
        {"a.yaml": "train: {early_stop: 3}"},
        ["a.yaml"],
        ["a.yaml:1: train.early_stop = 3: must be an object; use {KEY: VALUE}"],
    ),
    (
        {},
        ["seed=null"],
        ["command line: seed = None: must be a valid integer; use a whole number such as 3, without quotes"],
    ),
    (
        {},
        ["optim.lr=.inf"],
        ["command line: optim.lr = inf: must be a finite number; give a number other than inf and nan"],
    ),
    ({}, ["optim.options=x"], ["command line: optim.options = 'x': must be an object; use {KEY: VALUE}"]),
    (
        {},
        ["optim.options={betas: [0.9, 0.99]}"],
        [
            (
                "command line: optim.options = {'betas': [0.9, 0.99]}: are arguments of timm's optimizers, and adamw "
                "is torch's; use momentum, nesterov, betas and eps, or leave them out"
            )
        ],
    ),
    (
        {},
        ["optim.name=lion", "optim.betas=[0.9, 0.99]", "optim.momentum=0.5", "optim.options.lr=1"],
        [
            (
                "command line: optim.momentum = 0.5: is for sgd, and lion is timm's; put it into options if timm's "
                "lion has it, or leave it out"
            ),
            (
                "command line: optim.betas = [0.9, 0.99]: is for adam and adamw, and lion is timm's; put it into "
                "options if timm's lion has it, or leave it out"
            ),
            (
                "command line: optim.options.lr: is set by the recipe; use optim.lr and optim.weight_decay, and leave "
                "it out"
            ),
        ],
    ),
    (
        {},
        ["method.name=linear", "optim.name=lion"],
        [
            (
                "command line: optim.name = lion: method.name = linear is trained with many trials in one pass, which "
                "know sgd, adam and adamw; use one of them"
            )
        ],
    ),
    *(
        (
            {},
            ["method.name=vqt", f"{key}={value}"],
            [
                (
                    f"command line: {key} = {value}: method.name = vqt reads the frozen stream, which is computed once "
                    "for each image as it is, and may be cached; leave it out, or choose a writer such as lora"
                )
            ],
        )
        for key, value in {
            "data.rand_augment": "rand-m9-mstd0.5-inc1",
            "data.random_erasing": 0.25,
            "data.test_crops": 5,
            "train.mixup_alpha": 0.8,
            "train.cutmix_alpha": 1.0,
        }.items()
    ),
    (
        {},
        ["method.name=knn", "train.model_ema_decay=0.99"],
        [
            (
                "command line: train.model_ema_decay = 0.99: method.name = knn is trained with many trials in one "
                "pass, of which no average is kept; leave it out"
            )
        ],
    ),
    *(
        (
            {},
            [f"data.rand_augment={value}"],
            [
                (
                    f"command line: data.rand_augment = {value!r}: must be rand and timm's settings: mN (magnitude), "
                    "nN (operations), pP (probability of each), mstdS (deviation of the magnitude), mmaxN (its "
                    "maximum), incI (1: operations that grow with it), joined by hyphens; use rand-m9-mstd0.5-inc1"
                )
            ],
        )
        for value in ("augmix-m5", "rand-x3", "rand-m", "rand-m9n2", "rand-p2", "randm9", "rand-n0")
    ),
    (
        {},
        ["train.mixup_prob=0.5", "train.mixup_switch_prob=0.1", "train.model_ema_warmup=true"],
        [
            "command line: train.mixup_prob = 0.5: nothing is mixed; set mixup_alpha or cutmix_alpha, or leave it out",
            (
                "command line: train.mixup_switch_prob = 0.1: needs mixup and CutMix; set mixup_alpha and "
                "cutmix_alpha, or leave it out"
            ),
            "command line: train.model_ema_warmup = true: there is no average; set model_ema_decay, or leave it out",
        ],
    ),
    (
        {},
        ["data.random_erasing_mode=const"],
        [("command line: data.random_erasing_mode = const: nothing is erased; set random_erasing, or leave it out")],
    ),
    (
        {},
        ["optim.layer_decay=0.7"],
        [
            (
                "command line: optim.layer_decay = 0.7: method.name = vpt trains nothing that belongs to single layers "
                "of the backbone; leave it out, or choose full, partial, bias, lora, adapter, adaptformer or ssf"
            )
        ],
    ),
    ({}, ["optim.betas=[0.9]"], ["command line: optim.betas.1 = [0.9]: field required; give every value of the list"]),
    ({}, ["optim.betas=[1.0, 0.9]"], ["command line: optim.betas.0 = 1.0: must be less than 1; use a value below 1"]),
    (
        {},
        ["optim.betas=[0.9, 0.9, 0.9]"],
        ["command line: optim.betas = [0.9, 0.9, 0.9]: must have at most 2 items, not 3; leave values out"],
    ),
    (
        {},
        ["run.trackers=[tensorbord]"],
        ["command line: run.trackers.0 = 'tensorbord': must be one of its choices; did you mean 'tensorboard'?"],
    ),
    ({}, ["run.dir=''"], ["command line: run.dir = '': must have at least 1 character; use null to leave it out"]),
    ({}, ["sweep.seeds=[]"], ["command line: sweep.seeds = []: must have at least 1 item, not 0; add a value"]),
    ({}, ["sweep.seeds=[1, 1]"], ["command line: sweep.seeds = [1, 1]: must differ; give each once"]),
    ({}, ["sweep.grid=3"], ["command line: sweep.grid = 3: must be an object; use {KEY: VALUE}"]),
    ({}, ["sweep.grid.optim.lr=3"], ["command line: sweep.grid.optim.lr = 3: must be a list with at least one value"]),
    (
        {},
        ["sweep.grid.optim.lr=[]"],
        ["command line: sweep.grid.optim.lr = []: must be a list with at least one value"],
    ),
    (
        {},
        ["sweep.grid.optim.lr=[1, 1]"],
        ["command line: sweep.grid.optim.lr = [1, 1]: must be plain values, each given once"],
    ),
    (
        {},
        ["sweep.search=halving", "sweep.grid.train.epochs=[5, 10]"],
        ["command line: sweep.grid.train.epochs: is set by search = halving; leave it out, or use search=grid"],
    ),
    ({}, ["sweep.space=3"], ["command line: sweep.space = 3: must be an object; use {KEY: VALUE}"]),
    (
        {},
        ["sweep.space={}"],
        ["command line: sweep.space = {}: has no keys; give ranges, or null for what grid spans"],
    ),
    (  # each at the line of its own key
        {"a.yaml": "data:\n  shots: 3\n  fraction: 0.5\n  val_fraction: 0.2"},
        ["a.yaml", "data.normalize=vpt", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"],
        [
            "a.yaml:2: data.shots = 3, fraction = 0.5: both say how much of train is used; set either",
            "command line: data.normalize = 'vpt': mean and std replace it; set either",
            "a.yaml:4: data.val_fraction = 0.2: format 'digits' has fixed splits; remove val_fraction",
        ],
    ),
    (
        {},
        ["data.task=digit", "stream.cache=disk", "method.name=lora", "method.targets=[q, q]"],
        [
            (
                "command line: data.task = 'digit': is not a known task (did you mean 'digits'?); for your own "
                "dataset, set format and root as well"
            ),
            "command line: method.targets = ['q', 'q']: each only once; remove the repeated one",
            "command line: stream.cache = disk: needs a folder for its files; set stream.dir",
        ],
    ),
    (
        {},
        ["data.format=image_folder", "data.std=[1, 1, 1]"],
        [
            "command line: data.root is missing: format 'image_folder' needs the folder of the dataset; set root",
            "command line: data.mean and std go together: set both or neither",
        ],
    ),
    (
        {},
        ["sweep.space={optim: {lr: {low: 0.1, high: 0.01}}}"],
        [
            "command line: sweep.space.optim.lr = {'low': 0.1, 'high': 0.01}: low must be below high; swap them",
        ],
    ),
    (
        {},
        ["sweep.space.optim.lr={low: 0, high: 0.1, log: true}"],
        [
            "command line: sweep.space.optim.lr = {'low': 0, 'high': 0.1, 'log': True}: log needs a low above 0; "
            "raise low, or leave log out",
        ],
    ),
    (
        {},
        ["sweep.space.optim.lr={low: 0.1, step: 2}"],
        [
            "command line: sweep.space.optim.lr = {'low': 0.1, 'step': 2}: step: a range has low, high and log alone; "
            "leave it out",
        ],
    ),
    (
        {},
        ["sweep.space.optim.lr={low: 0.1, high: 0.1}"],
        [
            "command line: sweep.space.optim.lr = {'low': 0.1, 'high': 0.1}: low must be below high; give a list of "
            "values instead",
        ],
    ),
    (
        {},
        ["sweep.space.optim.lr={low: a, high: 0.1}"],
        ["command line: sweep.space.optim.lr = {'low': 'a', 'high': 0.1}: low and high must be numbers; give both"],
    ),
    (
        {},
        ["sweep.space.optim.lr=3"],
        [
            "command line: sweep.space.optim.lr = 3: must be a range such as {low: 1e-4, high: 1e-1, log: true}, or a "
            "list of values",
        ],
    ),
    (
        {},
        ["sweep.space.train.epochs=[5, 10]"],
        ["command line: sweep.space.train.epochs: is set by the sweep; leave it out"],
    ),
    ({}, ["sweep.grid.seed=[1]"], ["command line: sweep.grid.seed: is set by the sweep; leave it out"]),
    ({}, ["method.name=vppt"], ["command line: method.name = 'vppt': not a method; did you mean 'vpt'?"]),
    (
        {},
        ["method.name=3"],
        [
            (
                "command line: method.name = 3: not a method; valid: adapter, adaptformer, bias, cls, combo, full, "
                "knn, ladder, linear, logistic, lora, mlp, partial, side, ssf, vpt, vqt"
            )
        ],
    ),
    (
        {},
        ["backbone.entry=ema"],
        ["command line: backbone.entry = ema: weights = pretrained are one model; remove entry"],
    ),
    (
        {},
        ["backbone.name=swin_b_in22k", "backbone.position_resize=vpt"],
        [
            (
                "command line: backbone.position_resize = vpt: name = swin_b_in22k has no learned positions, so none "
                "are resampled; leave it out"
            )
        ],
    ),
    (
        {},
        ["backbone.name=vit_small_patch16_dinov3.lvd1689m", "backbone.position_resize=timm"],
        [
            (
                "command line: backbone.position_resize = timm: name = vit_small_patch16_dinov3.lvd1689m has no "
                "learned positions, so none are resampled; leave it out"
            )
        ],
    ),
    (
        {},
        ["data.background=brwn", "data.format=image_folder", "data.root=x", "data.task=mine"],
        ["command line: data.background = 'brwn': must be none, the name of a color or #rrggbb; use white"],
    ),
    (
        {},
        ["data.task=x", "data.format=table", "data.root=x.csv", "data.labels=multiple", "train.mixup_alpha=0.5"],
        ["command line: train.mixup_alpha = 0.5: images with several labels are not mixed; leave it out"],
    ),
    (
        {},
        ["data.task=x", "data.format=table", "data.root=x.csv", "data.labels=multiple", "data.extra_tests.a=x"],
        [
            "command line: data.extra_tests: class folders have one label an image, and labels = multiple; remove "
            "extra_tests"
        ],
    ),
    *(
        (
            {},
            ["data.task=x", "data.format=webdataset", f"data.root={root}"],
            [f"command line: data.root = {shown!r}: {message}"],
        )
        for root, shown, message in (
            ("https://me:secret@host/a", "https://host/a", LOGIN),
            ("https://secret@host/a", "https://host/a", LOGIN),
            ("ftp://me:secret@host/a", "ftp://host/a", LOGIN),
            (
                "https://host/a?token=secret",
                "https://host/a",
                "goes on after its path (? or #), and names of files are put behind it; give the address of a folder",
            ),
            ("https://host:port/a", "https://host:port/a", "its host or port cannot be read; correct the address"),
        )
    ),
    ({}, ["data.extra_tests=x"], ["command line: data.extra_tests = 'x': must be an object; use {KEY: VALUE}"]),
    (
        {},
        ["data.extra_tests.val=x"],
        [
            (
                "command line: data.extra_tests.val: 'val': must be letters, digits and . + - _, and not the name of a "
                "split; use imagenet-r"
            )
        ],
    ),
    (
        {},
        ["data.table.encoding=utf9", "data.format=table", "data.root=x", "data.task=mine"],
        [
            (
                "command line: data.table.encoding = 'utf9': is no encoding of text that Python knows; use utf-8, "
                "latin-1, cp1252 or utf-16"
            )
        ],
    ),
    (
        {},
        ["data.table.classes=[cat]", "data.format=table", "data.root=x", "data.task=mine"],
        ["command line: data.table.classes = ['cat']: must have at least 2 items, not 1; add a value"],
    ),
    (
        {},
        ["runtime.activation_checkpointing=every"],
        [
            (
                "command line: runtime.activation_checkpointing = 'every': must be none, mlp, block, every-N (such as "
                "every-2) or budget-F (budget-0.5)"
            )
        ],
    ),
    (
        {},
        ["optim.nesterov=true", "optim.name=adam"],
        [
            (
                "command line: optim.nesterov = true: needs name = sgd and momentum above 0, not name = adam and "
                "momentum = 0.9; set them, or nesterov=false"
            )
        ],
    ),
    (
        {},
        ["optim.warmup_epochs=5", "train.epochs=5"],
        [("command line: optim.warmup_epochs = 5.0: must be below train.epochs = 5; lower it or raise train.epochs")],
    ),
    (
        {},
        ["train.batch_size=10", "train.grad_accum_steps=3"],
        ["command line: train.grad_accum_steps = 3: must divide train.batch_size = 10; use a divisor"],
    ),
    (
        {},
        ["train.early_stop={}", "data.train_on=trainval"],
        [
            (
                "command line: train.early_stop needs a validation split, and data.train_on = trainval leaves none: "
                "set data.train_on=train or train.early_stop=null"
            )
        ],
    ),
    (
        {},
        ["backbone.drop_path=0.1", "method.name=linear"],
        [
            (
                "command line: backbone.drop_path = 0.1: method.name = linear trains nothing in the backbone; set "
                "backbone.drop_path=0"
            )
        ],
    ),
    (
        {},
        ["runtime.activation_checkpointing=block", "method.name=linear"],
        [
            (
                "command line: runtime.activation_checkpointing = block: method.name = linear keeps no activations of"
                " the backbone; leave it out"
            )
        ],
    ),
    (
        {},
        ["train.sampling=balanced", "method.name=knn"],
        [
            (
                "command line: train.sampling = balanced: method.name = knn is fitted to each image once; use "
                "train.class_weights=inv, or leave it out"
            )
        ],
    ),
    (
        {},
        ["runtime.offload=true", "method.name=vqt"],
        [
            (
                "command line: runtime.offload = True: method.name = vqt keeps no activations of the backbone; leave "
                "it out"
            )
        ],
    ),
    (
        {},
        ["runtime.quantize=int8", "method.name=full"],
        [
            (
                "command line: runtime.quantize = int8: method.name = full trains the blocks' weights; set "
                "runtime.quantize=none"
            )
        ],
    ),
    (
        {},
        ["runtime.quantize=int8", "method.name=vqt"],
        [
            (
                "command line: runtime.quantize = int8: method.name = vqt reads the blocks' weights itself; set "
                "runtime.quantize=none"
            )
        ],
    ),
    (
        {},
        ["runtime.compile=true", "runtime.activation_checkpointing=budget-0.5"],
        [
            (
                "command line: runtime.compile = true with runtime.activation_checkpointing = budget-0.5: a budget "
                "cannot choose among the operations of a compiled block; use mlp, block or every-N, or compile=false"
            )
        ],
    ),
    (
        {"a.yaml": "seed: 1\ntrain:\n  epochs: 3\noptim:\n  warmup_epochs: 4"},
        ["a.yaml"],
        [
            (
                "a.yaml:5, a.yaml:3: optim.warmup_epochs = 4.0: must be below train.epochs = 3; lower it or raise "
                "train.epochs"
            )
        ],
    ),
    (
        {"a.yaml": "seed: 1\ntrain:\n  epochs: 3\noptim:\n  warmup_epochs: 4"},
        ["a.yaml", "train.epochs=2"],
        [
            (
                "a.yaml:5, command line: optim.warmup_epochs = 4.0: must be below train.epochs = 2; lower it or raise"
                " train.epochs"
            )
        ],
    ),
    (
        {},
        ["train.epochs=0", "train.grad_accum_steps=3", "optim.lrr=1"],
        [
            "command line: optim.lrr = 1: unknown key; did you mean 'lr'?",
            "command line: train.epochs = 0: must be greater than or equal to 1; use 1 or more",
            "command line: train.grad_accum_steps = 3: must divide train.batch_size = 64; use a divisor",
        ],
    ),
    (
        {"a.yaml": "a: ["},
        ["a.yaml"],
        ["a.yaml:1: not valid YAML: expected the node content, but found '<stream end>'; correct the syntax"],
    ),
    (
        {"a.yaml": "seed: 1\noptim:\n\tlr: 1"},
        ["a.yaml"],
        ["a.yaml:3: not valid YAML: found character '\\t' that cannot start any token; correct the syntax"],
    ),
    ({"a.yaml": "seed: 1\nseed: 2"}, ["a.yaml"], ["a.yaml:2: not valid YAML: duplicate key seed; keep one of the two"]),
    (
        {"a.yaml": "seed: !!int x"},
        ["a.yaml"],
        ["a.yaml: not valid YAML: invalid literal for int() with base 10: 'x'; correct the syntax"],
    ),
    (
        {"a.yaml": "seed: !!python/object:os.system x"},
        ["a.yaml"],
        [
            (
                "a.yaml:1: not valid YAML: could not determine a constructor for the tag "
                "'tag:yaml.org,2002:python/object:os.system'; correct the syntax"
            )
        ],
    ),
    (
        {"a.yaml": "seed: 1\n---\nseed: 2"},
        ["a.yaml"],
        ["a.yaml:2: not valid YAML: but found another document; correct the syntax"],
    ),
    (
        {"a.yaml": "- 1"},
        ["a.yaml"],
        ["a.yaml:1: a recipe is a mapping of keys to values, not a list; write key: value"],
    ),
    ({"b.yaml": "seed: 1"}, ["a.yaml"], ["command line: a.yaml: no such recipe file; did you mean 'b.yaml'?"]),
    ({}, ["a.yaml"], ["command line: a.yaml: no such recipe file; correct the path"]),
    ({"accelerate_config.yaml": ""}, ["mine.yaml"], ["command line: mine.yaml: no such recipe file; correct the path"]),
    (
        {},
        ["configs/method/vqt.yaml"],
        ["command line: configs/method/vqt.yaml: no such recipe file; did you mean 'vqt'?"],
    ),
    (
        {},
        ["vpt_dep"],
        [
            (
                "command line: vpt_dep: neither a file nor the name of a recipe; did you mean 'vpt_deep' or "
                "'digits/vpt_deep'?"
            )
        ],
    ),
    (
        {},
        ["vpt-deep"],
        [
            (
                "command line: vpt-deep: neither a file nor the name of a recipe; did you mean 'vpt_deep' or "
                "'digits/vpt_deep'?"
            )
        ],
    ),
    (
        {},
        ["digits/vpt"],
        [
            (
                "command line: digits/vpt: neither a file nor the name of a recipe; did you mean 'digits/vqt' or "
                "'digits/vpt_deep' or 'digits/vpt_shallow'?"
            )
        ],
    ),
    (
        {},
        ["nonsense"],
        [("command line: nonsense: neither a file nor the name of a recipe; `dist-vpt recipe list` shows all names")],
    ),
    (
        {"a.yaml": "base: vpt_dep"},
        ["a.yaml"],
        [("a.yaml:1: vpt_dep: neither a file nor the name of a recipe; did you mean 'vpt_deep' or 'digits/vpt_deep'?")],
    ),
    (
        {"a.yaml": "\nbase: b.yaml", "bb.yaml": ""},
        ["a.yaml"],
        ["a.yaml:2: b.yaml: no such recipe file; did you mean 'bb.yaml'?"],
    ),
    ({"a.yaml": "base: a.yaml"}, ["a.yaml"], ["a.yaml:1: base: a.yaml inherits from itself; remove this base"]),
    (
        {"a.yaml": "base: b.yaml", "b.yaml": "base: a.yaml"},
        ["a.yaml"],
        ["b.yaml:1: base: a.yaml inherits from itself; remove this base"],
    ),
    (
        {"a.yaml": "base: 3"},
        ["a.yaml"],
        ["a.yaml:1: base = 3: must be a recipe file or a list of them; write base: [FILE, FILE]"],
    ),
    (
        {},
        ["base=a.yaml"],
        [("command line: base=a.yaml: base is a key of recipe files only; give a.yaml as an argument of its own")],
    ),
    ({}, ["optim.lr=["], ["command line: optim.lr=[: the value is not valid YAML; quote it"]),
    ({}, ["optim.lr", "=", "4"], ["command line: optim.lr = 4: an override has no spaces around =; write optim.lr=4"]),
    ({}, ["="], ["command line:  = : an override has no spaces around =; write KEY=VALUE"]),
    # Several backbones
    (
        {},
        ["backbones=[demo]", "method.name=linear"],
        ["command line: backbones: has 1 of them; name two or more, or one in `backbone`"],
    ),
    (
        {},
        ["backbones=demo", "method.name=linear"],
        ["command line: backbones: has 1 of them; name two or more, or one in `backbone`"],
    ),
    (
        {"a.yaml": "seed: 1\nbackbones: 3"},
        ["a.yaml", "method.name=linear"],
        ["a.yaml:2: backbones = 3: must be a valid array; use a list such as [a, b]"],
    ),
    (
        {},
        ["backbones=[demo, 3]", "method.name=linear"],
        ["command line: backbones.1 = 3: must be an object; use {KEY: VALUE}"],
    ),
    (
        {"a.yaml": "seed: 1\nbackbones: [demo, demo]\nmethod: {name: linear}"},
        ["a.yaml"],
        ["a.yaml:2: backbones: demo is given twice; leave one out"],
    ),
    (
        {},
        ["backbones=[demo, dinov2_s14]", "method.name=lora"],
        [
            (
                "command line: backbones: method.name = lora has one backbone; give it in `backbone`, or choose "
                "linear, mlp, knn, logistic or combo"
            )
        ],
    ),
    (
        {},
        ["backbones=[demo, dinov2_s14]", "method.name=linear", "backbone.name=dinov2_s14"],
        [
            (
                "command line: backbones: backbone.name = dinov2_s14 is given too, and a run has either; put it into "
                "the list, or leave it out"
            )
        ],
    ),
    (
        {},
        ["backbones=[demo, {base: dinov2_s14, drop_path: 0.1}]", "method.name=linear"],
        ["command line: backbones: drop_path: method.name = linear trains nothing in a backbone; leave it out"],
    ),
    (
        {},
        ["backbones=[demo, dinov2_s14]", "method.name=linear", "data.augment=fgvc"],
        [
            (
                "command line: data.augment = fgvc: several backbones see the same images, each at a size of its own, "
                "so that nothing can be drawn; leave it out"
            )
        ],
    ),
    (
        {},
        ["method.name=combo", "method.group_penalty=0.1"],
        [("command line: method.group_penalty = 0.1: compares several backbones; set backbones, or leave it out")],
    ),
    (
        {},
        ["backbones=[demo, dinov2_s1]", "method.name=linear"],
        [
            (
                "command line: backbones[1]: dinov2_s1: neither a file nor the name of a recipe; did you mean "
                "'dinov2_s14' or 'dinov3_s16' or 'dinov3_b16'?"
            )
        ],
    ),
    (
        {},
        ["backbones=[demo, {base: [a, b]}]", "method.name=linear"],
        ["command line: backbones[1].base = ['a', 'b']: must be the name of one recipe; write base: NAME"],
    ),
    (
        {},
        ["backbones=[demo, vqt]", "method.name=linear"],
        [
            (
                "command line: backbones[1] = 'vqt': a recipe without a backbone; name one of `dist-vpt recipe list` "
                "that has one, or write {name: MODEL} for a model of timm"
            )
        ],
    ),
    (
        {"a.yaml": "backbone: {nam: x}"},
        ["backbones=[demo, a.yaml]", "method.name=linear"],
        ["command line: backbones.1.nam = 'x': unknown key; did you mean 'name'?"],
    ),
    (
        {},
        ["backbones=[demo, {base: dinov2_s14, weigths: random}]", "method.name=linear"],
        ["command line: backbones.1.weigths = 'random': unknown key; did you mean 'weights'?"],
    ),
    (
        {},
        ["backbones=[demo, {image_size: 32}]", "method.name=linear"],
        [("command line: backbones[1] = {'image_size': 32}: names no backbone; add name: MODEL or base: RECIPE")],
    ),
    (
        {},
        ["backbones=[demo, {name: x, image_size: 3}]", "method.name=linear"],
        ["command line: backbones.1.image_size = 3: must be greater than or equal to 8; use 8 or more"],
    ),
    (
        {},
        ["backbones=[demo, {name: x, entry: ema}]", "method.name=linear"],
        ["command line: backbones.1.entry = ema: weights = pretrained are one model; remove entry"],
    ),
]


def messages(arguments: list[str]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(*split_arguments(arguments))
    first, *mistakes = str(caught.value).split("\n")
    return [mistake.strip() for mistake in mistakes] if mistakes else [first]


@pytest.mark.parametrize(("overrides", "shown", "rule"), VALUES, ids=[overrides for overrides, *_ in VALUES])
def test_a_value_that_a_key_does_not_take(overrides: str, shown: str, rule: str) -> None:
    key = overrides.rsplit(" ", maxsplit=1)[-1].partition("=")[0]
    assert messages(overrides.split(" ")) == [f"command line: {key} = {shown}: {rule}"]


def test_the_list_has_every_key() -> None:
    listed = {overrides.split(" ")[-1].partition("=")[0] for overrides, *_ in VALUES}
    methods = sorted(
        {tag for overrides, *_ in VALUES for tag in overrides.split(" ") if tag.startswith("method.name=")}
    )
    recipes = [load_recipe([], ["train.early_stop={}", *each]) for each in ([], *([method] for method in methods))]
    keys = {key for recipe in recipes for key, _ in flatten(recipe)}
    elsewhere = (
        "data.task",
        "data.root",
        "data.hf.",
        "data.webdataset.image",  # text
        "data.webdataset.label",
        *(f"data.table.{name}" for name in ("image", "label", "split", "suffix", "encoding")),  # text
        "data.background",
        "data.rand_augment",
        "backbone.entry",
        "backbones",
        "run.dir",
        "stream.dir",
        "sweep.grid.",
        "sweep.space",
        "method.name",
        "runtime.activation_checkpointing",
    )
    assert {key for key in keys if not key.startswith(elsewhere)} == listed


@pytest.mark.parametrize(("files", "arguments", "expected"), MISTAKES)
def test_mistakes(
    files: dict[str, str],
    arguments: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert messages(arguments) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
