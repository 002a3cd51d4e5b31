"""The ONNX file of a recorded method."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_vpt.errors import UserError
from dist_vpt.inference.export_check import Arrays, Check
from dist_vpt.inference.export_torch import Recorded

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
LARGEST_FILE = 1_900_000_000  # bytes of weights: protobuf, in which ONNX is written, ends at 2 GiB


def check_packages() -> None:
    """Raises UserError where a package of the extra ``export`` is missing."""
    from importlib import import_module

    for name in PACKAGES:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(
                f"--format onnx: {name} is not installed ({error}); pip install 'dist-vpt[export]', or use --format "
                "torch"
            ) from error


def write(file: Path, recorded: Recorded, facts: dict[str, Any], check: Check, *, quantize: bool) -> str:
    """Write an ONNX file and run it with onnxruntime; returns a text about it.

    Weights of 2 GB and more are in a second file beside it, FILE.data.
    """
    names = recorded.names
    made: Any = torch.onnx.export(
        recorded.program, (), dynamo=True, verbose=False, input_names=names, output_names=["logits"],
        dynamic_shapes=recorded.shapes,
    )  # fmt: skip
    model = made.model
    for part in (*model.graph.all_nodes(), *model.graph.inputs, *model.graph.outputs):
        part.metadata_props.clear()  # which line of which source it comes from
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    model.metadata_props.update(metadata)
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values()) > LARGEST_FILE
    made.save(file, external_data=large)
    found = check.compare(lambda arrays: _run(file, names, arrays))
    opset = model.opset_imports[""]
    text = f"ONNX (opset {opset}), {_mib(file)}"
    if not quantize:
        return f"{text}; {found}"
    quantize_onnx(file, metadata, large=large)
    found = check.report_quantized(lambda arrays: _run(file, names, arrays))
    return f"{text} in float32, {_mib(file)} in int8; {found}"


def _run(file: Path, names: list[str], arrays: Arrays) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, arrays, strict=True)))[0]


def quantize_onnx(file: Path, metadata: dict[str, str], *, large: bool = False) -> None:
    """Replace a file by one whose matrices are int8, quantized by onnxruntime; activations are as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    weights = file.with_name(f"{file.name}.data")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        prepared, made = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        # Folds constants: weights that two operations share would stay as they are.
        quant_pre_process(file, prepared, skip_symbolic_shape=True, save_as_external_data=large)
        quantize_dynamic(
            prepared, made, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=large,
            nodes_to_exclude=_stacks_of_matrices(onnx.load(prepared, load_external_data=False)),
        )  # fmt: skip
        model = onnx.load(made)
    onnx.helper.set_model_props(model, metadata)
    weights.unlink(missing_ok=True)
    onnx.save(model, file, save_as_external_data=large, location=weights.name)


def _stacks_of_matrices(model: Any) -> list[str]:
    """Names of products with constants of more than two dimensions, which onnxruntime cannot scale row by row."""
    flat = {each.name for each in model.graph.initializer if len(each.dims) <= 2}
    constants = {each.name for each in model.graph.initializer} - flat
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and constants & set(node.input)]


def _mib(file: Path) -> str:
    weights = file.with_name(f"{file.name}.data")
    size = sum(path.stat().st_size for path in (file, weights) if path.exists())
    return f"{size / 2**20:,.1f} MiB"
