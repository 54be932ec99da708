"""Reads the constants of an OpenVINO IR graph (an XML of layers beside a file of raw numbers); runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

_TYPES = {"f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32}


class Constant(NamedTuple):
    """One constant of the graph, in the order of its layers."""

    name: str
    value: Tensor


def read_constants(graph: Path, weights: Path) -> list[Constant]:
    """Every constant of the graph, in topological order.

    Args:
        graph: The ``.xml`` file.
        weights: The ``.bin`` file.

    Raises:
        ValueError: If a constant points outside the file of weights, or has an unknown number type.
    """
    raw = weights.read_bytes()
    found = []
    for layer in ElementTree.parse(graph).getroot().iterfind("layers/layer"):
        if layer.get("type") != "Const":
            continue
        data = layer.find("data")
        kind = data.get("element_type")
        if kind not in _TYPES:
            raise ValueError(f"{graph.name}: constant {layer.get('name')} has the unknown number type {kind!r}")
        start, size = int(data.get("offset")), int(data.get("size"))
        if start + size > len(raw):
            raise ValueError(f"{weights.name} is too short for {graph.name}: the two do not belong together")
        shape = [int(n) for n in data.get("shape").split(",") if n.strip()]
        value = np.frombuffer(raw, _TYPES[kind], size // np.dtype(_TYPES[kind]).itemsize, start).reshape(shape)
        found.append(Constant(layer.get("name"), torch.from_numpy(value.copy())))
    return found
