"""A model's activations and layers on a mesh."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.model.cache import CACHE_AXES, LayerKV, PagedKV
from exaone_jax.model.linear import Axes, dot, dot_rounding_parts
from exaone_jax.model.moe import Experts, ExpertWeights, Routing
from exaone_jax.model.narrow import Narrow, narrow_dot
from exaone_jax.model.paged import PAGES_AXES
from exaone_jax.model.placement import ACTIVATIONS, CachedAttention, OneDevice, PagedAttention, T
from exaone_jax.parallel.context import context_attention
from exaone_jax.parallel.exchange import Layout, exchange
from exaone_jax.parallel.gather import Parts, gathered, summed
from exaone_jax.parallel.rules import RULES, Path, Rules, parameter_shardings
from pallas_kernels.attention import attention

_HEADS: Axes = ("batch", "sequence", "heads", "head_dim")
_KV_HEADS: Axes = ("batch", "sequence", "kv_heads", "head_dim")
_CACHED_HEADS: Axes = ("batch", "chunk", "heads", "head_dim")
_CACHED_KV_HEADS: Axes = ("batch", "chunk", "kv_heads", "head_dim")
_PAGED_HEADS: Axes = ("one", "rows", "heads", "head_dim")
_PAGED_KV_HEADS: Axes = ("one", "rows", "kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class MeshPlacement:
    """Implements `exaone_jax.model.placement.Placement`.

    An activation's dimension is split over as many of its rule's mesh axes, from the first, as divide it: a batch of one
    is whole everywhere. narrow: as `OneDevice` has it.
    """

    mesh: Mesh | AbstractMesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    narrow: Narrow | None = None

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(x.shape, axes)))

    def embed(self, table: jax.Array, tokens: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Every device looks up its part of each row, of its part of the vocabulary, for all tokens of its `embed` group;
        only rows that were asked for travel, and the table never does."""
        parts, ids = self.spec(table.shape, ("vocab", "embed")), self.spec(tokens.shape, ACTIVATIONS[:2])
        across = _only(self._split(table.shape[1], "embed"), "embed")
        vocab = self._split(table.shape[0], "vocab")
        shared = across in self._split(tokens.shape[0], "batch")

        def run(table: jax.Array, tokens: jax.Array) -> jax.Array:
            if across and shared:
                tokens = lax.all_gather(tokens, across, tiled=True)
            if not vocab:
                rows = table[tokens].astype(dtype)
            else:
                own = tokens - lax.axis_index(vocab) * len(table)
                found = (own >= 0) & (own < len(table))
                rows = summed(jnp.where(found[..., None], table[jnp.where(found, own, 0)], 0).astype(dtype), vocab)
            if across and shared:
                return lax.all_to_all(rows, across, split_axis=0, concat_axis=2, tiled=True)
            return lax.all_gather(rows, across, axis=2, tiled=True) if across else rows

        return self._map(run, (parts, ids), PartitionSpec(*ids))(table, tokens)

    def zeros(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, axes: Axes) -> jax.Array:
        return jnp.zeros(shape, dtype, device=NamedSharding(self.mesh, self.spec(shape, axes)))

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, window: int | None
    ) -> jax.Array:
        queries, keys = self.spec(q.shape, _HEADS), self.spec(k.shape, _KV_HEADS)
        rows = PartitionSpec(*queries[:2])
        axis = _only(self._split(q.shape[1], "sequence"), "sequence")
        if axis is None:
            run = partial(_attend, window=window)
            ids_spec = None if segment_ids is None else rows
        else:
            run = partial(context_attention, window=window, axis=axis)
            ids_spec = rows
            segment_ids = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        return self._map(run, (queries, keys, keys, ids_spec), queries)(q, k, v, segment_ids)

    def attend_cached(
        self,
        run: CachedAttention,
        layer: LayerKV,
        index: jax.typing.ArrayLike,
        lengths: jax.Array,
        valid: jax.Array,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, LayerKV]:
        q, k, _ = qkv
        queries, keys = self.spec(q.shape, _CACHED_HEADS), self.spec(k.shape, _CACHED_KV_HEADS)
        cache, rows = self.spec(layer.k.shape, CACHE_AXES), PartitionSpec(queries[0])
        layers = LayerKV(*cast(Any, (cache, cache)))
        specs = (layers, PartitionSpec(), rows, rows, queries, keys, keys)
        return self._map(run, specs, (queries, layers))(layer, jnp.asarray(index), lengths, valid, *qkv)

    def attend_paged(
        self,
        run: PagedAttention,
        layer: PagedKV,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        where: tuple[jax.typing.ArrayLike, ...],
    ) -> tuple[jax.Array, PagedKV]:
        """Every device has its heads of every page, and the whole table."""
        queries, keys = self.spec(qkv[0].shape, _PAGED_HEADS), self.spec(qkv[1].shape, _PAGED_KV_HEADS)
        layers = jax.tree.map(lambda x: self.spec(x.shape, PAGES_AXES[: x.ndim]), layer)
        specs = (layers, (queries, keys, keys), *(PartitionSpec(),) * len(where))
        return self._map(run, specs, (queries, layers))(layer, qkv, *map(jnp.asarray, where))

    def per_token(
        self, run: Callable[..., T], each: tuple[jax.Array, ...], whole: tuple[tuple[jax.Array, Axes], ...] = ()
    ) -> T:
        split = [self._split(size, axis) for size, axis in zip(each[0].shape[:2], ACTIVATIONS[:2], strict=True)]
        tokens = PartitionSpec(*(axes or None for axes in split))
        # Over the other axes the compiler splits `run` itself: a vocabulary stays in its parts.
        names = tuple(axis for axes in split for axis in axes)
        if not names:
            return run(*each, *(array for array, _ in whole))
        copies = (self._copies(array, axes, names, each[0].dtype) for array, axes in whole)

        def local(*arrays: jax.Array) -> T:
            return run(*arrays[: len(each)], *(copy[0] for copy in arrays[len(each) :]))

        specs = (*(tokens,) * len(each), *(PartitionSpec(names),) * len(whole))
        return self._map(local, specs, tokens, set(names))(*each, *copies)

    def _copies(self, weight: jax.Array, axes: Axes, names: tuple[str, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        """One copy of a parameter `[devices, ...]` for each device along the mesh axes `names`, put together from what these
        split of it. Made by itself: where the compiler has a part in splitting, it undoes that around a collective."""
        splits = [self._split(size, axis) for size, axis in zip(weight.shape, axes, strict=True)]
        parts = [Parts(split, dim) for dim, split in enumerate(splits) if set(names).intersection(split)]
        kept = (None if set(names).intersection(split) else split or None for split in splits)

        def run(weight: jax.Array) -> jax.Array:
            for part in parts:
                weight = gathered(weight, part, dtype)
            return weight[None]

        return self._map(run, (self.spec(weight.shape, axes),), PartitionSpec(names, *kept))(weight)

    def project(self, x: jax.Array, weights: tuple[jax.Array, ...], axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
        """Each device has columns of every product, and the gradients of x add up before they travel: one sum for all."""
        one_device = OneDevice(self.narrow)
        splits = {self._split(len(weight), axis) for weight, axis in zip(weights, axes, strict=True)}
        if len(splits) > 1 or splits == {()}:
            return one_device.project(x, weights, axes)
        split = splits.pop()
        copies = jnp.broadcast_to(x, (math.prod(self.mesh.shape[axis] for axis in split), *x.shape))

        def run(copy: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
            return one_device.project(copy[0], weights, axes)

        columns = PartitionSpec(*(None,) * (x.ndim - 1), split)
        specs = (PartitionSpec(split),) * (1 + len(weights))
        return self._map(run, specs, (columns,) * len(weights), set(split))(copies, *weights)

    def contract(self, x: jax.Array, weight: jax.Array, axis: str) -> jax.Array:
        if self.narrow is not None:  # the compiler takes the largest over all parts, and the sums of int8 are exact
            return narrow_dot(x, weight, self.narrow)
        return dot_rounding_parts(x, weight) if self._split(weight.shape[1], axis) else dot(x, weight)

    def over_vocab(self, run: Callable[..., jax.Array], each: tuple[jax.Array, ...], table: jax.Array) -> jax.Array:
        """Of the table only the parts of its `embed` dimension are gathered: no device sees another's words."""
        tokens, words = self.spec(each[0].shape[:2], ACTIVATIONS[:2]), self.spec(table.shape, ("vocab", "embed"))
        axis, parts = (
            _only(self._split(table.shape[0], "vocab"), "vocab"),
            Parts(self._split(table.shape[1], "embed"), 1),
        )
        dtype = each[0].dtype

        def local(table: jax.Array, *each: jax.Array) -> jax.Array:
            return run(*each, gathered(table, parts, dtype), axis)

        return self._map(local, (words, *(tokens,) * len(each)), tokens)(table, *each)

    def answer(self, experts: Experts, x: jax.Array, routing: Routing) -> jax.Array:
        parts = experts.weights
        axis = _only(self._split(len(parts.gate), "experts"), "experts")
        tokens = self.spec(x.shape, ACTIVATIONS)
        parameters = (experts.gate_proj, experts.up_proj, experts.down_proj)
        names = [parameter.get_metadata("axes")[-3:] for parameter in parameters]
        specs = tuple(map(self.spec, (weight.shape for weight in parts), names))
        embed = [axes.index("embed") for axes in names]
        sizes = (weight.shape[dim] for weight, dim in zip(parts, embed, strict=True))
        gate, up, down = (Parts(self._split(size, "embed"), dim) for size, dim in zip(sizes, embed, strict=True))
        partial_sums = self._split(parts.gate.shape[-2], "expert_mlp")  # each device has a part of the width
        split = axis in self._split(x.shape[0], "batch")

        def run(x: jax.Array, routing: Routing, weights: tuple[jax.Array, ...]) -> jax.Array:
            rows, choice = x.reshape(-1, x.shape[-1]), Routing(*(a.reshape(-1, a.shape[-1]) for a in routing))
            if axis is None:
                whole = (gathered(w, p, x.dtype) for w, p in zip(weights, (gate, up, down), strict=True))
                out = experts.answer(ExpertWeights(*whole), rows, choice, self.narrow)
            else:
                layout = Layout(axis, experts.limit, (gate, up, down), self.narrow)
                out = exchange(rows, choice, ExpertWeights(*weights), layout, split)
            out = out.astype(x.dtype)
            return (summed(out, partial_sums) if partial_sums else out).reshape(x.shape)

        return self._map(run, (tokens, tokens, specs), tokens)(x, routing, tuple(parts))

    def spec(self, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        """How an activation of this shape is split; an axis without a rule is not. Axes of size one are left out."""
        return PartitionSpec(*(self._split(size, axis) or None for size, axis in zip(shape, axes, strict=True)))

    def _split(self, size: int, axis: str) -> tuple[str, ...]:
        """The mesh axes over which a dimension is split."""
        split: tuple[str, ...] = ()
        for mesh_axis in dict(self.rules).get(axis, ()):
            if size % math.prod(self.mesh.shape[a] for a in (*split, mesh_axis)):
                break
            split += (mesh_axis,)
        return tuple(a for a in split if self.mesh.shape[a] > 1)

    def _map(
        self, run: Callable[..., Any], in_specs: Any, out_specs: Any, names: set[str] | None = None
    ) -> Callable[..., Any]:
        """`shard_map` over the named axes; None: over all, as kernels of TPUs need it."""
        names, idle = names or set(self.mesh.axis_names), ()
        if names == set(self.mesh.axis_names):
            idle = tuple(axis for axis, size in self.mesh.shape.items() if size == 1)

        def spread(spec: PartitionSpec) -> PartitionSpec:
            """Also over the axes of one device: gradients of what an axis does not split are summed over it, and a sum
            over one device would stay in the program as a collective."""
            if not spec:
                return spec
            first, *rest = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
            return PartitionSpec((*first, *idle) or None, *(entry or None for entry in rest))

        in_specs = jax.tree.map(spread, in_specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
        )


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None, window: int | None) -> jax.Array:
    return attention(q, k, v, window=window, segment_ids=ids)


def _only(split: tuple[str, ...], axis: str) -> str | None:
    if len(split) > 1:
        raise ConfigError(f"rules: {axis!r} may be split over one mesh axis, found {', '.join(split)}")
    return split[0] if split else None


def init_model(
    config: ModelConfig,
    mesh: Mesh,
    *,
    seed: int = 0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike | None = None,
    rules: Rules = RULES,
) -> Transformer:
    """A random model, as `Transformer`, of which every device makes its own parts: the values do not depend on the mesh.

    Raises ConfigError where a rule cannot split an array.
    """
    placement = place(config, mesh, rules)

    def make() -> Transformer:
        return Transformer(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed), placement=placement)

    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    shardings = parameter_shardings(abstract, mesh, rules)
    leaves = [(path, leaf.replace(shardings[cast(Path, path)])) for path, leaf in nnx.to_flat_state(abstract)]
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(make()), out_shardings=nnx.from_flat_state(leaves))())


def place(
    config: ModelConfig, mesh: Mesh | AbstractMesh, rules: Rules = RULES, narrow: Narrow | None = None
) -> MeshPlacement:
    """The placement of a model on a mesh.

    Raises ConfigError where the mesh splits heads that it does not divide, or experts' matrices that are to be narrow.
    """
    placement = MeshPlacement(mesh, tuple(rules.items()), narrow)
    parts = math.prod(mesh.shape[a] for a in rules["expert_mlp"])
    if narrow is not None and config.moe is not None and parts > 1:
        raise ConfigError(
            f"mesh: {' x '.join(rules['expert_mlp'])} splits the experts' matrices into {parts} parts, whose products are "
            f"not made in {narrow}: a row's scale is of the whole row; expected 1 part"
        )
    for axis, heads in (("heads", config.num_heads), ("kv_heads", config.num_kv_heads)):
        parts = math.prod(mesh.shape[a] for a in rules[axis])
        if heads % parts:
            raise ConfigError(
                f"mesh: {axis} over {' x '.join(rules[axis])} is {parts} parts, and the model has {heads}"
            )
    return placement
