"""A model in onnxruntime against itself in torch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from layer_collapse.graph import ordered_inputs
from layer_collapse.reduce.proof import difference

from .architectures import call


def onnx_error(model: fx.GraphModule, example: Tensor | dict[str, Tensor]) -> float:
    """Largest relative difference of all outputs in float32."""
    ordered = ordered_inputs(model, example)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, tuple(ordered), str(path), dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        given = dict(zip(names, (tensor.numpy() for tensor in ordered), strict=True))
        got = [torch.from_numpy(value) for value in session.run(None, given)]
    return difference(got, tree_leaves(call(model, example)))[1]
