"""Bytes of a step on each device, by arithmetic.

Parameters, optimizer and keys and values are exact: they are what the step takes. Gradients are float32, each split as its
parameter. Activations and temporaries are an estimate of what the compiler will have alive at once; `compile` reads the truth.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from jax.sharding import AbstractMesh, Mesh

from exaone_jax.config import LayerSpec, ModelConfig
from exaone_jax.costs.workload import Workload
from exaone_jax.parallel import MESH_AXES
from exaone_jax.parallel.exchange import GATHER_UP_TO, rounds_of
from exaone_jax.planning.inputs import StepInputs, device_bytes
from pallas_kernels.linear_cross_entropy.xla import default_chunk_size

_GRADIENT = 4  # bytes of float32


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. activations: what the forward pass keeps for the backward pass. temporaries: all else that a step
    makes and forgets: the layer at work, gathered weights, experts' buffers, a chunk of logits."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    kv: int
    temporaries: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class _Sizes:
    """What one device has of the model: tokens of a step, over how many devices heads and widths (`tensor`) and experts are
    split, and the bytes of a number."""

    tokens: int
    tensor: int
    expert: int
    itemsize: int = 2


def estimate(config: ModelConfig, work: Workload, inputs: StepInputs) -> Memory:
    """For inputs on a mesh, abstract or not."""
    mesh = inputs.placement.mesh
    params = device_bytes((inputs.params, inputs.router_biases, inputs.frozen))
    sizes = _Sizes(device_tokens(work, inputs), mesh.shape["tensor"], mesh.shape["expert"], work.itemsize)
    layers = [_layer(config, layer, sizes, work.mode == "train") for layer in (*config.layers, *_mtp(config, work))]
    gathered = _gathered_weights(config, work, mesh)
    if work.mode != "train":
        logits = 2 * 4 * work.batch * config.vocab_size // _parts(work.batch, mesh)
        scores = _scores(config, work, sizes)
        temporaries = max(layer.everything + layer.exchange for layer in layers) + gathered + logits + scores
        return Memory(params, 0, 0, 0, device_bytes(inputs.kv), temporaries)
    kept = sum(layer.kept[work.remat] for layer in layers)
    # The backward pass has the layer at work again and the gradients of its parts, those of its weights in float32.
    backward = max(2 * layer.everything + layer.exchange for layer in layers)
    wide = (
        mesh.shape["fsdp"] > 1 if work.lora is None else work.lora.base in ("int8", "nf4")
    )  # or what small codes stand for
    backward += gathered + (gathered // work.itemsize * _GRADIENT if wide else 0)
    # The compiler casts stacked weights once, before the loop over them.
    stored = "float32" if work.lora is None else work.lora.base
    cast = params // _GRADIENT * work.itemsize if stored == "float32" and work.itemsize < _GRADIENT else 0
    trains_head = work.lora is None or "lm_head" in work.lora.targets
    temporaries = cast + max(backward, _loss(config, sizes, mesh, trains_head))
    return Memory(params, device_bytes(inputs.opt_state), device_bytes(inputs.params), kept, 0, temporaries)


def abstract_mesh(sizes: tuple[int, ...]) -> AbstractMesh:
    """Of these sizes along MESH_AXES."""
    return AbstractMesh(sizes, MESH_AXES)


@dataclass(frozen=True)
class _Layer:
    """Bytes that the backward pass of a layer needs: `everything` of it, and `kept` of it by remat policy.

    exchange: around experts of several devices, in a round of tokens of training the backward one; nothing of that is kept.
    """

    everything: int
    exchange: int
    kept: dict[str | None, int]


def _layer(config: ModelConfig, layer: LayerSpec, sizes: _Sizes, train: bool) -> _Layer:
    tokens, size, moe = sizes.tokens, config.hidden_size, config.moe
    q = config.num_heads * config.head_dim // sizes.tensor
    kv = config.num_kv_heads * config.head_dim // sizes.tensor
    # Into and out of the norms, projected q, k, v, again after norm and rotation, attention's result.
    attention = tokens * (4 * size + 3 * q + 4 * kv)
    dots = tokens * (2 * size + q + 2 * kv)
    exchange = 0
    if layer.moe and moe is not None:
        width = moe.intermediate_size // sizes.tensor
        shared = moe.num_shared_experts * width
        feed = 3 * tokens * shared
        dots += tokens * (2 * shared + size)
        if sizes.expert == 1:
            # Sorted, gate, up, hidden, answers in two orders; brought home, weighed in float32.
            routed = tokens * moe.num_experts_per_tok
            feed += routed * (4 * size + 3 * width) + routed * 3 * size
        else:
            rows, local = _round_rows(config, sizes), moe.num_experts // sizes.expert
            if train:
                # Tokens, their gradients and those of the answers, each as it travels and by expert, what the experts make of
                # them first in float32; gate, up, hidden and their gradients, some in float32. And beside the sum of the
                # gradients of the experts' weights those of this round, in float32.
                exchange = sizes.itemsize * rows * (8 * size + 4 * width) + 4 * rows * (2 * size + 3 * width)
                exchange += _GRADIENT * 3 * local * size * width
            else:
                # Tokens and answers, each as they travel and by expert; gate, up, hidden. Products come in float32 first.
                exchange = sizes.itemsize * rows * (4 * size + 3 * width) + 4 * rows * (size + 2 * width)
    else:
        width = config.intermediate_size // sizes.tensor
        feed = 3 * tokens * width
        dots += tokens * (2 * width + size)
    everything = sizes.itemsize * (attention + feed + 2 * tokens * size)
    inputs = sizes.itemsize * tokens * size
    return _Layer(
        everything,
        exchange,
        {None: everything, "dots": inputs + sizes.itemsize * dots, "full": inputs, "offload": 2 * inputs // 8},
    )


def _expert_rows(config: ModelConfig, sizes: _Sizes) -> int:
    """Rows of the buffers around the experts: the worst case, in which every token of the group comes to one device."""
    moe = config.moe
    if moe is None or sizes.expert == 1:
        return sizes.tokens * (1 if moe is None else moe.num_experts_per_tok)
    if sizes.tokens <= GATHER_UP_TO:
        return sizes.expert * sizes.tokens * moe.num_experts_per_tok
    return sizes.expert * sizes.tokens * min(moe.num_experts_per_tok, moe.num_experts // sizes.expert)


def _round_rows(config: ModelConfig, sizes: _Sizes) -> int:
    """Of `_expert_rows`, those of one round."""
    rows = _expert_rows(config, sizes)
    if sizes.tokens <= GATHER_UP_TO:
        return rows
    return -(-rows // rounds_of(sizes.tokens, rows * config.hidden_size * sizes.itemsize))


def _gathered_weights(config: ModelConfig, work: Workload, mesh: Mesh | AbstractMesh) -> int:
    """The weights of the widest layer, whole along fsdp, in the dtype they multiply in; of the head in training, too."""
    if mesh.shape["fsdp"] == 1 and work.mode != "train":
        return 0
    tensor, expert, moe = mesh.shape["tensor"], mesh.shape["expert"], config.moe
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    dense = 3 * config.hidden_size * config.intermediate_size
    sparse = 0
    if moe is not None:
        one = 3 * config.hidden_size * moe.intermediate_size
        sparse = one * (moe.num_experts // expert + moe.num_shared_experts)
    return work.itemsize * (attention + max(dense, sparse)) // tensor


def _loss(config: ModelConfig, sizes: _Sizes, mesh: Mesh | AbstractMesh, trains_head: bool) -> int:
    """Some float32 copies of a chunk's logits, the head in the compute dtype and its gradients, if it has any."""
    shards = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert", "context", "tensor"))
    chunk = min(default_chunk_size(config.vocab_size), sizes.tokens * shards // sizes.tensor)
    head = config.vocab_size * config.hidden_size // sizes.tensor
    gradients = 1 if config.mtp_layer is None else 2  # of the loss and of that of the multi-token-prediction layer
    gradients = gradients if trains_head else 0
    return 3 * 4 * chunk * config.vocab_size // shards + (sizes.itemsize + _GRADIENT * gradients) * head


def _scores(config: ModelConfig, work: Workload, sizes: _Sizes) -> int:
    """Of a decoding step against every slot of the longest layer: float32, twice, beside the layer's keys and values."""
    if work.chunk > 16:
        return 0
    slots = work.context if any(layer.window is None for layer in config.layers) else 0
    return 2 * 4 * sizes.tokens * config.num_heads // sizes.tensor * slots


def expert_fill(config: ModelConfig, tokens: int, devices: int) -> float:
    """Of the rows of the experts' buffers on a device of so many tokens, the part that an even router fills."""
    if config.moe is None:
        return 1.0
    return tokens * config.moe.num_experts_per_tok / _expert_rows(config, _Sizes(tokens, 1, devices))


def device_tokens(work: Workload, inputs: StepInputs) -> int:
    """Of a step."""
    return device_bytes(inputs.tokens) // inputs.tokens.dtype.itemsize


def _parts(batch: int, mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices the logits of a batch are split."""
    rows = 1
    for axis in ("data", "fsdp", "expert"):
        if batch % (rows * mesh.shape[axis]):
            break
        rows *= mesh.shape[axis]
    return rows * mesh.shape["tensor"]


def _mtp(config: ModelConfig, work: Workload) -> list[LayerSpec]:
    return [config.mtp_layer] if work.mode == "train" and config.mtp_layer is not None else []
