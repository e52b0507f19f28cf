"""The one model that is every EXAONE language model."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from exaone_jax.config.model import ModelConfig, Segment, layer_plan, single_layers
from exaone_jax.errors import InputError
from exaone_jax.model import stack
from exaone_jax.model.attention import Cached
from exaone_jax.model.block import Block
from exaone_jax.model.cache import KVCache, LayerKV, PagedKV, init_cache
from exaone_jax.model.linear import Linear, ParamFactory, dot
from exaone_jax.model.norm import RMSNorm
from exaone_jax.model.paged import Paged, PagedCache, Rows, Window, init_paged_cache
from exaone_jax.model.placement import ONE_DEVICE, Placement
from exaone_jax.model.rope import Rotation, inverse_frequencies, rotation
from exaone_jax.model.stack import KV, Look, Remat, SegmentStats


class ForwardOutput(NamedTuple):
    """hidden `[B, T, D]` after the final norm; stats for each segment and place in its pattern, None where dense."""

    hidden: jax.Array
    stats: tuple[SegmentStats, ...]


class Embedding(nnx.Module):
    """Token embedding `[V, D]`."""

    def __init__(self, make: ParamFactory, vocab: int, size: int):
        self.embedding = make.normal((vocab, size), ("vocab", "embed"))


class MTP(nnx.Module):
    """Multi-token prediction: the hidden state of position p and the embedding of token p+1 predict token p+2.

    One decoder layer over fc([norm(embedding), norm(hidden)]); embedding and output head are the main model's.
    """

    def __init__(self, make: ParamFactory, config: ModelConfig, plan: Segment):
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = RMSNorm(make, size, eps, "norm")
        self.hidden_norm = RMSNorm(make, size, eps, "norm")
        self.fc = Linear(make, 2 * size, size, ("embed", "mtp_in"))
        self.block = Block(make.stacked(plan.repeats), config, plan.pattern[0])
        self.norm = RMSNorm(make, size, eps, "norm")

    def combine(self, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
        return self.fc(jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(hidden)], axis=-1))


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions int32 `[B, T]` that count from 0 inside each run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


class Transformer(nnx.Module):
    """An EXAONE language model.

    Args:
        config: which model.
        dtype: of activations and matrix products; logits, router, norms' means and softmax are float32 always.
        param_dtype: of the parameters; `dtype` if None. The router bias is float32 always.
        rngs: for random initial values: normal(0, initializer_range), norms one, router bias zero.
        scan_layers: layers that repeat are stacked and scanned (`config.layer_plan`); False keeps each by itself, which
            compiles longer and decodes faster where slicing a layer out of its stack is a copy, as on a CPU.
        placement: where activations lie and layers compute; `exaone_jax.parallel` makes that of a mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
        scan_layers: bool = True,
        placement: Placement = ONE_DEVICE,
    ):
        make = ParamFactory(rngs, dtype if param_dtype is None else param_dtype, config.initializer_range)
        self.config, self.dtype, self.placement = config, jnp.dtype(dtype), placement
        self.plan = layer_plan(config.layers) if scan_layers else single_layers(config.layers)
        self.embed = Embedding(make, config.vocab_size, config.hidden_size)
        self.segments = nnx.List(
            [
                nnx.List([Block(make.stacked(segment.repeats), config, spec) for spec in segment.pattern])
                for segment in self.plan
            ]
        )
        self.norm = RMSNorm(make, config.hidden_size, config.rms_norm_eps, "norm")
        if not config.tie_word_embeddings:
            self.lm_head = Linear(make, config.hidden_size, config.vocab_size, ("vocab", "embed"))
        if config.mtp_layer is not None:
            self.mtp = MTP(make, config, self._mtp_plan)

    def __call__(
        self, tokens: jax.typing.ArrayLike, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits float32 `[B, T, V]` for int32 tokens `[B, T]`; compiled. The arguments are those of `forward`.

        Raises InputError on tokens of another shape or dtype, ids outside the vocabulary, or positions or segment_ids of
        another shape than the tokens'.
        """
        tokens = check_tokens(tokens, self.config.vocab_size)
        for name, array in {"positions": positions, "segment_ids": segment_ids}.items():
            if array is not None and (array.shape != tokens.shape or not jnp.issubdtype(array.dtype, jnp.integer)):
                raise InputError(
                    f"{name} must be integers {list(tokens.shape)} like the tokens, found {array.dtype} {list(array.shape)}"
                )
        graphdef, params = nnx.split(self)
        return _logits(graphdef, params, tokens, positions, segment_ids)

    def forward(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        remat: Remat = None,
    ) -> ForwardOutput:
        """The whole sequence at once, for training and scoring.

        Args:
            tokens: int32 `[B, T]`.
            positions: int32 `[B, T]`; None counts from 0 in each segment.
            segment_ids: int32 `[B, T]`, packed documents that do not see each other; 0 marks padding, which router
                statistics leave out. None is one document a row.
            remat: what the backward pass recomputes: None nothing, "dots" all but matrix products, "full" everything but
                what enters each layer, "offload" the same with that kept in the host's memory.
        """
        if positions is None:
            ids = jnp.zeros_like(tokens) if segment_ids is None else segment_ids
            positions = segment_positions(ids)
        x, rotation = self._embed(tokens), self._rotation(positions)
        real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
        stats = []
        for blocks in self.segments:
            x, segment_stats = stack.run(blocks, x, rotation, real, segment_ids, remat, self.placement)
            stats.append(segment_stats)
        return ForwardOutput(self.norm(x), tuple(stats))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 `[..., V]` of hidden states `[..., D]` after the final norm."""
        return dot(hidden, self.head_weight()).astype(jnp.float32)

    def head_weight(self) -> jax.Array:
        """The output projection `[V, D]`; of tied models the embedding. Float32 where an adapter is added to it."""
        if self.config.tie_word_embeddings:
            return self.embed.embedding[...]
        weight, adapter = self.lm_head.weight[...], self.lm_head.adapter
        return weight if adapter is None else adapter.added_to(weight)

    def init_cache(self, batch: int, capacity: int, chunk: int) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` positions, at most `chunk` of them a step."""
        return init_cache(self.config, self.plan, batch, capacity, chunk, self.dtype, self.placement.zeros)

    def step(self, tokens: jax.Array, cache: KVCache, valid: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        """The next C tokens of every row: prefill, a chunk of one, decode and verify are all this.

        Args:
            tokens: int32 `[B, C]`, C at most the `chunk` of the cache; rows may be padded on the right.
            cache: the positions before. The caller keeps lengths + C within the capacity.
            valid: int32 `[B]`, how many tokens of each row are real; None: all.

        Returns: hidden `[B, C, D]` after the final norm (of no meaning where tokens are not real), and the cache.
        """
        valid, real = _real(tokens, valid)
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
        look = self._look_cached(cache.lengths, valid)
        hidden, layers = self._step(tokens, positions, real, cache.layers, look)
        return hidden, KVCache(layers, cache.lengths + valid)

    def init_paged_cache(
        self, pages: dict[Window, int], page_size: int, *, mtp: bool, dtype: jax.typing.DTypeLike | None = None
    ) -> PagedCache:
        """Empty pages for `ragged_step`, and with `mtp` for `mtp_ragged_step`: pages for each window that layers have.

        dtype: int8, float8_e4m3fn, or None: the model's.
        """
        own, dtype = self._mtp_plan if mtp else None, self.dtype if dtype is None else dtype
        return init_paged_cache(self.config, self.plan, own, pages, page_size, dtype, self.placement.zeros)

    def ragged_step(self, tokens: jax.Array, cache: PagedCache, rows: Rows) -> tuple[jax.Array, PagedCache]:
        """As `step` for tokens int32 `[N]` of many sequences on one axis: chunks, single tokens and drafts to verify.

        Returns hidden `[N, D]` after the final norm (of no meaning in rows of nobody), and the cache.
        """
        hidden, layers = self._step(
            tokens[None], rows.positions[None], rows.real[None], cache.layers, self._look_paged(rows)
        )
        return hidden[0], dataclasses.replace(cache, layers=layers)

    def _step(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        real: jax.Array,
        layers: Sequence[Sequence[KV]],
        look: Look[KV],
    ) -> tuple[jax.Array, tuple[tuple[KV, ...], ...]]:
        x, rotation = self._embed(tokens), self._rotation(positions)
        updated = []
        for blocks, caches in zip(self.segments, layers, strict=True):
            x, new = stack.step(blocks, x, rotation, real, caches, look, self.placement)
            updated.append(new)
        return self.norm(x), tuple(updated)

    def mtp_forward(
        self,
        hidden: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        remat: Remat = None,
    ) -> jax.Array:
        """Hidden `[B, T, D]` whose logits at p predict token p+2, from hidden at p and next_tokens (p+1) `[B, T]`."""
        if positions is None:
            positions = segment_positions(jnp.zeros_like(next_tokens) if segment_ids is None else segment_ids)
        x = self.mtp.combine(hidden, self._embed(next_tokens))
        real = jnp.ones(next_tokens.shape, bool)
        blocks, rotation = nnx.List([self.mtp.block]), self._rotation(positions)
        x, _ = stack.run(blocks, x, rotation, real, segment_ids, remat, self.placement)
        return self.mtp.norm(x)

    def init_mtp_cache(self, batch: int, capacity: int, chunk: int) -> KVCache:
        """The MTP layer's own cache, as `init_cache`."""
        return init_cache(self.config, (self._mtp_plan,), batch, capacity, chunk, self.dtype, self.placement.zeros)

    def mtp_step(
        self, hidden: jax.Array, next_tokens: jax.Array, cache: KVCache, valid: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """As `step` for the MTP layer: hidden `[B, C, D]` of C positions and the token after each, int32 `[B, C]`.

        Returns hidden `[B, C, D]` whose logits predict the token after that; fed back as `hidden` with that token it
        drafts on.
        """
        valid, real = _real(next_tokens, valid)
        positions = cache.lengths[:, None] + jnp.arange(next_tokens.shape[1])
        look = self._look_cached(cache.lengths, valid)
        out, layer = self._mtp_step(hidden, next_tokens, positions, real, cache.layers[0][0], look)
        return out, KVCache(((layer,),), cache.lengths + valid)

    def mtp_ragged_step(
        self, hidden: jax.Array, next_tokens: jax.Array, cache: PagedCache, rows: Rows
    ) -> tuple[jax.Array, PagedCache]:
        """As `mtp_step` for hidden `[N, D]` and next_tokens int32 `[N]` of many sequences on one axis."""
        if cache.mtp is None:
            raise ValueError("this paged cache was made without pages of the MTP layer")
        out, layer = self._mtp_step(
            hidden[None], next_tokens[None], rows.positions[None], rows.real[None], cache.mtp, self._look_paged(rows)
        )
        return out[0], dataclasses.replace(cache, mtp=layer)

    def _mtp_step(
        self,
        hidden: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array,
        real: jax.Array,
        layer: KV,
        look: Look[KV],
    ) -> tuple[jax.Array, KV]:
        x = self.mtp.combine(hidden, self._embed(next_tokens))
        blocks = nnx.List([self.mtp.block])
        x, (layer,) = stack.step(blocks, x, self._rotation(positions), real, [layer], look, self.placement)
        return self.mtp.norm(x), layer

    def _look_cached(self, lengths: jax.Array, valid: jax.Array) -> Look[LayerKV]:
        return lambda layer, index: Cached(layer, index, lengths, valid, self.placement)

    def _look_paged(self, rows: Rows) -> Look[PagedKV]:
        return lambda layer, index: Paged(layer, index, rows, self.placement)

    @property
    def _mtp_plan(self) -> Segment:
        if self.config.mtp_layer is None:
            raise InputError(f"this {self.config.model_type} model has no multi-token-prediction layer")
        return Segment(pattern=(self.config.mtp_layer,), repeats=1)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return self.placement.embed(self.embed.embedding[...], tokens, self.dtype)

    def _rotation(self, positions: jax.Array) -> Rotation:
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return rotation(positions, frequencies, self.dtype)


def _real(tokens: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(valid int32 `[B]`, which of the tokens `[B, C]` are real)."""
    batch, count = tokens.shape
    valid = jnp.full((batch,), count, jnp.int32) if valid is None else valid
    return valid, jnp.arange(count) < valid[:, None]


@partial(jax.jit, static_argnums=0)
def _logits(
    graphdef: nnx.GraphDef[Transformer],
    params: nnx.State,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(model.forward(tokens, positions, segment_ids).hidden)


def check_tokens(tokens: jax.typing.ArrayLike, vocab_size: int) -> jax.Array:
    """tokens as int32 `[B, T]`; raises InputError where they are something else. Traced values are not looked at."""
    if not isinstance(tokens, jax.core.Tracer):
        try:
            found = np.asarray(tokens)
        except ValueError as error:
            raise InputError(f"tokens must be [B, T] with rows of one length: {error}") from error
        if found.ndim != 2 or found.size == 0:
            raise InputError(f"tokens must be [B, T] with B, T >= 1, found shape {list(found.shape)}")
        if not np.issubdtype(found.dtype, np.integer):
            raise InputError(f"tokens must be integers, found {found.dtype}")
        if found.min() < 0 or found.max() >= vocab_size:
            raise InputError(
                f"token ids must be in [0, {vocab_size}), the vocabulary; found {found.min()} to {found.max()}"
            )
    return jnp.asarray(tokens, jnp.int32)
