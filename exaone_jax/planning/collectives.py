"""Bytes that each device must send in a step, by arithmetic: what the compiled program is held against."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from exaone_jax.config import LayerSpec, ModelConfig
from exaone_jax.costs.workload import Workload
from exaone_jax.planning.inputs import StepInputs, device_bytes

_GRADIENT = 4  # bytes of float32

_BATCH_AND_SEQUENCE = ("data", "fsdp", "expert", "context")  # mesh axes along which a parameter may have copies

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def least_bytes(config: ModelConfig, work: Workload, inputs: StepInputs) -> dict[str, int]:
    """By kind of collective; bytes that one device sends over rings (all-gather: (n-1)/n of the result; all-reduce twice).

    Weights split over fsdp are gathered in the dtype they multiply in, in training once forward and once backward;
    gradients are summed in float32. Frozen weights are gathered in what is smaller, that or what they are kept in, and have no
    gradient. Tokens go to their experts evenly. Of a recomputed layer only what its backward pass
    cannot do without is sent again: the sums over `tensor` that go into its feed-forward part and into a norm after it.
    """
    mesh, passes = inputs.placement.mesh, 2 if work.mode == "train" else 1
    sent: Counter[str] = Counter()
    for value, frozen in _weights(config, inputs):
        _weight(value, mesh, work, sent, frozen)
    tokens = device_bytes(inputs.tokens) // inputs.tokens.dtype.itemsize
    rows = work.itemsize * tokens * config.hidden_size
    mtp = [config.mtp_layer] if work.mode == "train" and config.mtp_layer is not None else []
    for layer in (*config.layers, *mtp):
        again = (2 if layer.norm == "post" else 1) if work.remat in ("full", "offload") else 0
        sent["all-reduce"] += (passes * 2 + again) * _all_reduce(rows, mesh.shape["tensor"])
        if layer.moe and config.moe is not None:
            _experts(rows, config.moe.num_experts_per_tok, mesh.shape["expert"], passes, sent)
        if work.mode == "train":
            _context(config, layer, tokens, inputs, work, sent)
    return {kind: sent[kind] for kind in KINDS if sent[kind]}


def _weights(config: ModelConfig, inputs: StepInputs) -> Iterator[tuple[jax.ShapeDtypeStruct, bool]]:
    """Those that products take whole, and whether they are frozen."""
    for state in (inputs.params, inputs.frozen):
        for path, variable in nnx.to_flat_state(state):
            if path[0] != "embed" or config.tie_word_embeddings:  # a table is looked up where its parts are
                yield variable.get_value(), state is inputs.frozen


def least_dcn_bytes(work: Workload, inputs: StepInputs, slices: dict[str, int]) -> dict[str, int]:
    """Of `least_bytes`, what crosses slices, as where each slice does its part first: a device sends its part of a weight to
    its like in every other slice, and of a gradient what is its own after the sum within the slice.

    slices: of each mesh axis, how many it crosses.
    """
    if max(slices.values()) == 1:
        return {}
    mesh, train, sent = inputs.placement.mesh, work.mode == "train", Counter[str]()
    states = ((inputs.params, False), (inputs.frozen, True))
    for variable, frozen in ((each, frozen) for state, frozen in states for _, each in nnx.to_flat_state(state)):
        value = variable.get_value()
        split, local = _split(value), math.prod(value.sharding.shard_shape(value.shape))
        if "fsdp" in split:
            sent["all-gather"] += (2 if train else 1) * _itemsize(value, work) * local * (slices["fsdp"] - 1)
        if train and not frozen and "fsdp" in split:
            sent["reduce-scatter"] += _GRADIENT * local * (slices["fsdp"] - 1)
        if train and not frozen:
            copies = [axis for axis in _BATCH_AND_SEQUENCE if axis not in split]
            across = math.prod(slices[axis] for axis in copies)
            within = math.prod(mesh.shape[axis] for axis in copies) // across
            sent["all-reduce"] += _all_reduce(_GRADIENT * local // within, across)
    return {kind: sent[kind] for kind in KINDS if sent[kind]}


def _split(value: jax.ShapeDtypeStruct) -> set[str]:
    """The mesh axes that split an array."""
    spec = value.sharding.spec
    return {axis for axes in spec for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis}


def _itemsize(value: jax.ShapeDtypeStruct, work: Workload) -> int:
    """Bytes of a number of a weight that travels."""
    return min(work.itemsize, value.dtype.itemsize)


def _weight(
    value: jax.ShapeDtypeStruct, mesh: Mesh | AbstractMesh, work: Workload, sent: Counter[str], frozen: bool
) -> None:
    split = _split(value)
    local = math.prod(value.sharding.shard_shape(value.shape))
    whole = local * (mesh.shape["fsdp"] if "fsdp" in split else 1)
    train = work.mode == "train"
    sent["all-gather"] += (2 if train else 1) * _itemsize(value, work) * (whole - local)
    if train and not frozen:
        copies = math.prod(mesh.shape[axis] for axis in _BATCH_AND_SEQUENCE if axis not in split)
        sent["reduce-scatter"] += _GRADIENT * (whole - local)
        sent["all-reduce"] += _all_reduce(_GRADIENT * local, copies)


def _experts(rows: int, chosen: int, devices: int, passes: int, sent: Counter[str]) -> None:
    """A token and its answers cross once each way, for every expert that is elsewhere."""
    sent["all-to-all"] += passes * 2 * rows * chosen * (devices - 1) // devices


def _context(
    config: ModelConfig, layer: LayerSpec, tokens: int, inputs: StepInputs, work: Workload, sent: Counter[str]
) -> None:
    """Keys and values forward, their gradients backward."""
    mesh = inputs.placement.mesh
    parts = mesh.shape["context"]
    if parts == 1:
        return
    pair = 2 * work.itemsize * config.num_kv_heads // mesh.shape["tensor"] * config.head_dim
    rows = tokens * parts // work.context  # of this device
    if layer.window is not None and layer.window <= work.context // parts:
        sent["collective-permute"] += 2 * pair * rows * (layer.window - 1)
    else:
        sent["all-gather"] += pair * tokens * (parts - 1)
        sent["reduce-scatter"] += pair * tokens * (parts - 1)


def _all_reduce(size: int, devices: int) -> int:
    return 2 * size * (devices - 1) // devices
