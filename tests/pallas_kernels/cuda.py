"""Lowering for an NVIDIA GPU that is not there."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

TRITON = "__gpu$xla.gpu.triton"


def library_calls(run: Callable[..., Any], *arrays: Any, **named: Any) -> list[str]:
    """The calls of cuDNN's attention, Triton kernels and ragged products in the program for CUDA, in order."""
    device = AbstractDevice("NVIDIA H100", None, "gpu")  # from jax 0.11 Triton's lowering asks which card it is for
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        text = jax.jit(run).trace(*arrays, **named).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\$fmha\w+|__gpu\$xla\.gpu\.triton)\(|chlo\.(ragged_dot)", text)
    return ["".join(call) for call in calls]
