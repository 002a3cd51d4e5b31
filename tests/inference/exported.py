"""Methods on tiny backbones as the tests of export need them, and the runtimes of exported files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods import attach
from dist_vpt.methods.base import Method
from dist_vpt.methods.fitted import FittedReader, Observed
from tests.methods.conftest import config_of

CLASSES = 4


def fitted_or_random(settings: dict[str, Any], backbone: Backbone) -> Method:
    """A method whose every trained number is random, or that is fitted to random features."""
    method = attach(config_of(settings), backbone, CLASSES)
    torch.manual_seed(3)
    if isinstance(method, FittedReader):
        features = torch.randn(24, backbone.width)
        type(method).fit([method], Observed(features, torch.arange(24) % CLASSES, torch.ones(24)))
        return method.eval()
    with torch.no_grad():
        for _, parameter in method.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return method.eval()


def run_onnx(file: Path, *arrays: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [found.name for found in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))[0]


def run_torch(file: Path, *arrays: np.ndarray) -> np.ndarray:
    return torch.export.load(file).module()(*map(torch.from_numpy, arrays)).numpy()  # without no_grad


def metadata_of(file: Path) -> dict[str, Any]:
    if file.suffix == ".onnx":
        found = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
        return {key: json.loads(value) for key, value in found.items()}
    files = {"metadata.json": ""}
    torch.export.load(file, extra_files=files)
    return json.loads(files["metadata.json"])
