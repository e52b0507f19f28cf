"""The real step compiled ahead of time for devices that need not be here, and what the program says of itself.

For a TPU topology that takes libtpu and no TPU: the compiler runs on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import jax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from exaone_jax.config import ModelConfig
from exaone_jax.costs.chips import Topology
from exaone_jax.costs.memory import program_bytes
from exaone_jax.costs.workload import Workload
from exaone_jax.data.packing import PackedRows
from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.model.cache import KVCache
from exaone_jax.parallel import MeshShape, make_mesh
from exaone_jax.planning.hlo import Program, read_program
from exaone_jax.planning.inputs import OPTIMIZER, StepInputs, abstract_model, device_bytes, step_inputs
from exaone_jax.planning.memory import Memory, device_tokens, expert_fill
from exaone_jax.training.loss import LossConfig
from exaone_jax.training.step import TrainState, train_step

# libtpu asks the cloud's metadata server what machine this is, and lets one process at a time in: not for a compile alone.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Compiled:
    """Figures of one device's program.

    Attributes:
        memory: parameters, optimizer and kv as the program takes them. The compiler gives one figure for all that it
            allocates besides: gradients and activations are the estimate's share of it, temporaries the rest, and the total
            is the compiler's own. Where nothing was allocated (it does not fit) the same, of what it asked for.
        flops: of matrix products and kernels, as often as their loops turn; of the experts' products as many rows as an even
            router sends, for their buffers hold the worst case. None where the text could not be read.
        sent: bytes by kind of collective.
        dcn: of these, the bytes that leave the slice.
        kernels: calls of TPU kernels by name.
        seconds: that lowering and compiling took.
        notes: what could not be known.
    """

    memory: Memory
    flops: int | None
    sent: dict[str, int]
    kernels: dict[str, int]
    seconds: float
    notes: tuple[str, ...]
    dcn: dict[str, int] = field(default_factory=dict)


def compile_for_topology(
    config: ModelConfig, work: Workload, shape: MeshShape, topology: Topology, estimated: Memory
) -> Compiled:
    """Raises ConfigError without libtpu, or where libtpu does not know the topology."""
    return compile_step(config, work, make_mesh(shape, tpu_devices(topology)), estimated)


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """Of slices that are not here."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "compiling for a TPU needs libtpu, which is not installed: pip install 'exaone-jax[tpu]' (no TPU is needed); "
            "--no-compile plans by arithmetic alone"
        )
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.one_slice, num_slices=topology.slices
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology {topology}: libtpu refuses it: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def compile_step(config: ModelConfig, work: Workload, mesh: Mesh, estimated: Memory) -> Compiled:
    """On any mesh of devices, real or of a topology."""
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        inputs = step_inputs(config, work, mesh)
        lowered = _lower(config, work, inputs, mesh.devices.flat[0].platform)
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return _too_large(error, inputs, estimated, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    memory = _memory(inputs, estimated, program_bytes(program) - _held(inputs))
    try:
        text = program.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        note = f"this jaxlib cannot read the program of this libtpu, so its FLOPs are unknown: {str(error).splitlines()[0]}"
        return Compiled(memory, None, {}, {}, seconds, (note,))
    found = read_program(text)
    flops = found.flops + round(
        found.ragged_flops * expert_fill(config, device_tokens(work, inputs), mesh.shape["expert"])
    )
    sent, dcn, kernels = dict(found.sent), dict(found.dcn), dict(found.kernels)
    return Compiled(memory, flops, sent, kernels, seconds, tuple(_notes(found)), dcn)


def _lower(config: ModelConfig, work: Workload, inputs: StepInputs, platform: str) -> jax.stages.Lowered:
    graphdef = nnx.graphdef(abstract_model(config, work.mode, work.dtype, work.lora, inputs.placement))
    if inputs.opt_state is not None:
        count = cast(jax.Array, jax.ShapeDtypeStruct((), jax.numpy.int32))
        state = TrainState(inputs.params, inputs.router_biases, inputs.opt_state, count, frozen=inputs.frozen)
        rows = cast(jax.Array, inputs.tokens)
        loss = LossConfig(remat=work.remat)
        traced = train_step.trace(graphdef, state, PackedRows(rows, rows), optimizer=OPTIMIZER, loss=loss)
    else:
        serve = jax.jit(_serve, static_argnums=0, donate_argnames="cache")
        traced = serve.trace(graphdef, (inputs.params, inputs.router_biases), inputs.tokens, cache=inputs.kv)
    return traced.lower(lowering_platforms=(platform,))


def _serve(
    graphdef: nnx.GraphDef[Transformer], states: tuple[nnx.State, ...], tokens: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """The logits float32 `[B, V]` of each row's last token, and the cache with all of them."""
    model = nnx.merge(graphdef, *states)
    hidden, cache = model.step(tokens, cache)
    return model.logits(hidden[:, -1]), cache


def _held(inputs: StepInputs) -> int:
    return device_bytes((inputs.params, inputs.router_biases, inputs.frozen, inputs.opt_state, inputs.kv))


def _memory(inputs: StepInputs, estimated: Memory, allocated: int) -> Memory:
    gradients = min(estimated.gradients, allocated)
    activations = min(estimated.activations, allocated - gradients)
    return Memory(
        parameters=device_bytes((inputs.params, inputs.router_biases, inputs.frozen)),
        optimizer=device_bytes(inputs.opt_state),
        gradients=gradients,
        activations=activations,
        kv=device_bytes(inputs.kv),
        temporaries=allocated - gradients - activations,
    )


def _too_large(error: Exception, inputs: StepInputs, estimated: Memory, seconds: float) -> Compiled:
    """From the compiler's refusal; any other error of it goes on."""
    asked = asked_bytes(str(error))
    if asked is None:
        raise error
    memory = _memory(inputs, estimated, max(asked - _held(inputs), 0))
    note = f"the compiler refused: {str(error).splitlines()[0]}"
    return Compiled(memory, None, {}, {}, seconds, (note,))


def asked_bytes(message: str) -> int | None:
    """That a program needs in all, from libtpu's refusal of it; None where the message is of something else.

    libtpu 0.0.48 and later: `… total memory required for HLO temporaries (40.00G) exceeds available HBM (15.75G)`; those
    temporaries hold the arguments, too. 0.0.41 names one array that alone is too large: the least that is needed.
    """
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of|Ran out of memory[^(]*\(([\d.]+)([KMGT]?)\) exceeds", message):
        size, unit = (part for part in found.groups() if part is not None)
        return round(float(size) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit])
    found = re.search(r"Allocation \(size=(\d+)\) would exceed memory", message)
    return None if found is None else int(found.group(1))


def _notes(program: Program) -> Iterable[str]:
    if program.unknown_loops:
        yield f"{program.unknown_loops} loops turn a number of times that depends on the data; counted once"
    for name, count in program.uncounted.items():
        yield f"{count} calls of {name} state no FLOPs and were left out"
