"""Every TPU kernel x chip x shape of a published model, through the real TPU compiler. No TPU: `make test-tpu`.

One chip and a handful of shapes run wherever libtpu is installed; the whole matrix is slow.
"""

import functools
import importlib.util
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from exaone_jax.config.hf import published, published_names, read_config
from pallas_kernels.attention import attention
from pallas_kernels.grouped_matmul import QuantizedRhs, grouped_matmul
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.paged_attention import paged_attention, pool_format
from tests.pallas_kernels.tpu_compiler import TOPOLOGIES, array, compile_for, here, mesh_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make test-tpu"),
    pytest.mark.skipif(
        os.environ.get("JAX_PLATFORMS") != "cpu", reason="needs JAX_PLATFORMS=cpu, or libtpu looks for a TPU"
    ),
]


@pytest.fixture(autouse=True)
def _no_tpu_look_up(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # one a test process


class Heads(NamedTuple):
    """What attention sees of a layer."""

    heads: int
    kv_heads: int
    dim: int
    window: int | None

    def __str__(self):
        return f"{self.heads}/{self.kv_heads}x{self.dim}-W{self.window}"


def published_heads():
    """Every attention layer of every published model, once each."""
    found = set()
    for name in published_names():
        config = read_config(published(name))
        found |= {Heads(config.num_heads, config.num_kv_heads, config.head_dim, x.window) for x in config.layers}
    return sorted(found, key=str)


def test_the_published_layers_are_those_that_the_matrix_was_made_for():
    shapes = {(h.heads, h.kv_heads, h.dim) for h in published_heads()}
    assert shapes == {(32, 8, 64), (32, 8, 80), (32, 8, 128), (40, 8, 128), (64, 8, 128)}
    assert {h.window for h in published_heads()} == {None, 128, 4096}


class Attention(NamedTuple):
    """One call of `attention`: T queries, S keys, `offset` static, None for traced; ids one array, a pair, or none."""

    layer: Heads
    batch: int = 1
    queries: int = 8192
    keys: int = 8192
    offset: int | None = 0
    ids: str = "one"
    dtype: str = "bfloat16"
    backward: bool = True

    def __str__(self):
        offset = "traced" if self.offset is None else self.offset
        way = "grad" if self.backward else "forward"
        return f"{self.layer}-T{self.queries}-S{self.keys}-at-{offset}-ids-{self.ids}-{self.dtype}-{way}"

    def compile(self, chip):
        layer, batch = self.layer, self.batch
        q = array((batch, self.queries, layer.heads, layer.dim), self.dtype)
        k = array((batch, self.keys, layer.kv_heads, layer.dim), self.dtype)
        ids = [array((batch, n), jnp.int32) for n in (self.queries, self.keys)]
        ids = {"none": None, "one": ids[0], "pair": tuple(ids)}[self.ids]

        def forward(q, k, v, ids, offset):
            offset = offset if self.offset is None else self.offset
            call = functools.partial(attention, segment_ids=ids, q_offset=offset, window=layer.window)
            return call(q, k, v, implementation="tpu")

        def both(q, k, v, ids, offset, d_out):
            out, pull = jax.vjp(lambda *qkv: forward(*qkv, ids, offset), q, k, v)
            return out, pull(d_out)

        shapes = (q, k, k, ids, array((batch,), jnp.int32), *([q] if self.backward else []))
        return compile_for(chip, both if self.backward else forward, *shapes).memory_analysis()


def attention_calls():
    for layer in published_heads():
        yield Attention(layer)  # training on packed sequences
        if layer.window is not None and layer.window <= 1024:
            beside = layer.window - 1
            yield Attention(layer, 2, 1024, 1024 + beside, beside, "pair", backward=False)  # prefill on a ring
            yield Attention(layer, 1, 2048, 2048 + beside, beside, "pair")  # a shard of the context
            yield Attention(layer, 1, 2048, 16384, None, "pair")
        else:
            yield Attention(layer, 2, 1024, 32768, None, "none", backward=False)  # prefill of a chunk
            yield Attention(layer, 1, 2048, 16384, None, "pair")  # a shard of the context
    wide = Heads(64, 8, 128, 128)
    yield Attention(wide, ids="none")
    yield Attention(wide._replace(window=100), ids="none")
    yield Attention(wide._replace(window=1024))
    yield Attention(wide._replace(window=4096), 1, 32768, 32768)  # several chunks of keys
    yield Attention(Heads(8, 1, 128, None))  # one of eight tensor-parallel shards
    for window in (128, None):
        yield Attention(Heads(8, 2, 128, window), dtype="float32")
    yield Attention(Heads(8, 2, 128, None), 1, 2048, 8192, None, "pair", dtype="float32")


class Paged(NamedTuple):
    """One call of `paged_attention` for 64 sequences."""

    layer: Heads
    rows: int = 64
    page_size: int = 128
    context: int = 8192
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    def __str__(self):
        types = f"{self.dtype}-{self.kv_dtype}"
        return f"{self.layer}-{self.rows}-rows-pages-of-{self.page_size}-context-{self.context}-{types}"

    def compile(self, chip):
        layer, sequences, width = self.layer, 64, self.context // self.page_size
        pages = (min(sequences * width, 4096), layer.kv_heads, self.page_size)
        arrays = {f"{name}_pages": array((*pages, layer.dim), self.kv_dtype) for name in "kv"}
        if jnp.dtype(self.kv_dtype).itemsize == 1:
            arrays |= {f"{name}_scales": array(pages, jnp.float32) for name in "kv"}
        for name, shape in (
            ("page_table", (sequences, width)),
            ("query_starts", (sequences + 1,)),
            ("lengths", (sequences,)),
        ):
            arrays[name] = array(shape, jnp.int32)

        def call(q, arrays):
            return paged_attention(q, **arrays, window=layer.window, implementation="tpu")

        q = array((self.rows, layer.heads, layer.dim), self.dtype)
        return compile_for(chip, call, q, arrays).memory_analysis()


def paged_calls():
    for layer in published_heads():
        # A window layer's ring holds the window and a page of new rows; whole pages of 128.
        context = 8192 if layer.window is None else layer.window + 128
        for kv_dtype in ("bfloat16", "int8"):
            yield Paged(layer, context=context, kv_dtype=kv_dtype)
        yield Paged(layer, 512, context=8192)  # prefill and decoding mixed
    wide = Heads(64, 8, 128, None)
    yield Paged(wide, kv_dtype="float8_e4m3fn")
    yield Paged(wide._replace(window=128), page_size=64, context=256)  # a ring of four pages
    yield Paged(wide._replace(window=128), page_size=256, context=256, kv_dtype="int8")  # a ring of one page
    yield Paged(wide, 192)  # verifying two drafts
    yield Paged(wide, 2048, context=262144, kv_dtype="int8")
    yield Paged(Heads(8, 1, 128, None), 2048)  # one of eight tensor-parallel shards
    yield Paged(Heads(32, 32, 128, None), 512)
    yield Paged(Heads(8, 2, 128, 128), 512, page_size=16, dtype="float32", kv_dtype="float32")


class Grouped(NamedTuple):
    """One call of `grouped_matmul` on one of eight expert shards, matrices as checkpoints have them; with every gradient."""

    experts: int  # of the whole layer
    contracted: int
    columns: int
    rows: int = 16384
    weights: str = "bfloat16"
    scales: str = "none"  # of quantised weights: one an output channel, or one a block of 128 x 128

    def __str__(self):
        face = f"{self.experts}-experts-{self.rows}x{self.contracted}x{self.columns}"
        return f"{face}-{self.weights}-scales-{self.scales}"

    def compile(self, chip):
        own, n, k = self.experts // 8, self.columns, self.contracted
        scales = {"none": None, "channel": (own, n, 1), "block": (own, n // 128, k // 128)}[self.scales]
        rhs = array((own, n, k), self.weights)

        def call(lhs, rhs, scales, sizes, offset, grad):
            def product(lhs, rhs):
                rhs = rhs if scales is None else QuantizedRhs(rhs, scales)
                options = {"group_offset": offset, "transpose_rhs": True, "implementation": "tpu"}
                return grouped_matmul(lhs, rhs, sizes, **options)

            if scales is not None:
                out, pull = jax.vjp(lambda lhs: product(lhs, rhs), lhs)
            else:
                out, pull = jax.vjp(product, lhs, rhs)
            return out, pull(grad)

        lhs, grad = (array((self.rows, width), jnp.bfloat16) for width in (k, n))
        sizes, offset = array((self.experts,), jnp.int32), array((), jnp.int32)
        factors = None if scales is None else array(scales, jnp.float32)
        return compile_for(chip, call, lhs, rhs, factors, sizes, offset, grad).memory_analysis()


def grouped_calls():
    shapes = set()
    for name in published_names():
        config = read_config(published(name))
        if config.moe is not None:
            shapes.add((config.moe.num_experts, config.hidden_size, config.moe.intermediate_size))
    for experts, hidden, inner in sorted(shapes):
        for k, n in ((hidden, inner), (inner, hidden)):  # gate and up; down
            yield Grouped(experts, k, n)
            yield Grouped(experts, k, n, 512)  # 64 sequences decode
            for weights, scales in (("int8", "channel"), ("int4", "channel"), ("float8_e4m3fn", "block")):
                yield Grouped(experts, k, n, 512, weights, scales)


class Loss(NamedTuple):
    """One call of `linear_cross_entropy` for 8,192 rows, with a part of the vocabulary on each of `shards` devices."""

    vocab: int
    hidden: int
    shards: int = 1
    weight: str = "bfloat16"

    def __str__(self):
        return f"V{self.vocab}-D{self.hidden}-shards-{self.shards}-{self.weight}"

    def compile(self, chip):
        def total(x, weight, labels, mask):
            loss, _ = linear_cross_entropy(x, weight, labels, mask=mask, z_loss=1e-4, implementation="tpu")
            return loss.sum()

        x, labels = array((8192, self.hidden), jnp.bfloat16), array((8192,), jnp.int32)
        weight, mask = array((self.vocab // self.shards, self.hidden), self.weight), array((8192,), jnp.bool_)
        return compile_for(chip, jax.value_and_grad(total, (0, 1)), x, weight, labels, mask).memory_analysis()


def loss_calls():
    for vocab, hidden in sorted(
        {(c.vocab_size, c.hidden_size) for c in map(read_config, map(published, published_names()))}
    ):
        for shards in (1, 4):
            yield Loss(vocab, hidden, shards)
    yield Loss(153600, 6144, 4, "float32")  # master weights


QUICK = [
    Attention(Heads(64, 8, 128, 128)),
    Attention(Heads(64, 8, 128, 128), 2, 1024, 1151, 127, "pair", backward=False),
    Attention(Heads(40, 8, 128, None), 2, 1024, 32768, None, "none", backward=False),
    Paged(Heads(64, 8, 128, None)),
    Paged(Heads(64, 8, 128, 128), context=256, kv_dtype="int8"),
    Grouped(128, 6144, 2048, 512),
    Grouped(256, 2048, 6144, 512, "float8_e4m3fn", "block"),
    Loss(153600, 6144, 4),
]


def matrix(calls):
    for call in calls:
        for chip in TOPOLOGIES:
            quick = call in QUICK and chip == "v6e"
            yield pytest.param(chip, call, id=f"{chip}-{call}", marks=[] if quick else pytest.mark.slow)


def test_the_quick_slice_is_part_of_the_matrix():
    assert set(QUICK) <= {*attention_calls(), *paged_calls(), *grouped_calls(), *loss_calls()}


@pytest.mark.parametrize(("chip", "call"), list(matrix(attention_calls())))
def test_attention(chip, call):
    memory = call.compile(chip)
    face = memory.argument_size_in_bytes + memory.output_size_in_bytes
    window = call.layer.window
    if window is not None and window <= 1024 and call.layer.dim == 128 and call.offset is not None:
        # Re-laid-out copies of the arguments and the results, each once. Measured up to 0.91 at W = 128, and 1.12 at 1,024.
        assert memory.temp_size_in_bytes <= (1.1 if window <= 128 else 1.15) * face


@pytest.mark.parametrize(("chip", "call"), list(matrix(paged_calls())))
def test_paged_attention(chip, call):
    memory = call.compile(chip)
    heads, kv_heads, dim, _ = call.layer
    if dim == 128:
        # The pages are read where they are. Queries and results are copied, in float32 and with heads in eights.
        padded = call.rows * kv_heads * -(-(heads // kv_heads) // 8) * 8 * dim * 4
        assert memory.temp_size_in_bytes <= 4 * padded + 2**22


@pytest.mark.parametrize(("chip", "call"), list(matrix(grouped_calls())))
def test_grouped_matmul(chip, call):
    memory = call.compile(chip)
    # Copies of rows, results and their gradients, up to float32, and never one of the matrices. Their gradient, which only float
    # ones have, comes [K, N] from megablox and is turned.
    turned = call.experts // 8 * call.contracted * call.columns * 2 if call.scales == "none" else 0
    assert memory.temp_size_in_bytes <= 4 * call.rows * (call.contracted + call.columns) * 4 + turned + 2**24


@pytest.mark.parametrize(("chip", "call"), list(matrix(loss_calls())))
def test_linear_cross_entropy(chip, call):
    memory = call.compile(chip)
    # x's gradient in float32, and x without the rows that do not count. A float32 weight is rounded once, and its gradient is no
    # temporary.
    rounded = 2 * call.vocab // call.shards * call.hidden if call.weight == "float32" else 0
    assert memory.temp_size_in_bytes <= 1.1 * (4 + 2) * 8192 * call.hidden + rounded


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 80])
def test_a_pool_in_its_format_is_written_and_read_in_place(dim):
    """A decode step that donates its pool of 4,096 pages (1.1 GB on chip): temporaries are its rows, and no second pool."""
    mesh = mesh_of("v6e")
    plain, pool = here(mesh), pool_format(here(mesh))
    pages = jax.ShapeDtypeStruct((4096, 8, 128, dim), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((64, 8, dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((64, 32, dim), jnp.bfloat16)
    table, starts, lengths = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((64, 64), (65,), (64,)))

    def step(k, v, q, new, table, starts, lengths):
        last = lengths - 1
        page, slot = jnp.take_along_axis(table, last[:, None] // 128, 1)[:, 0], last % 128
        k, v = (pool.at[page, :, slot].set(new) for pool in (k, v))
        return paged_attention(q, k, v, table, starts, lengths, implementation="tpu"), k, v

    with jax.set_mesh(mesh):
        run = jax.jit(
            step, in_shardings=(pool, pool, *[plain] * 5), out_shardings=(plain, pool, pool), donate_argnums=(0, 1)
        )
        traced = run.trace(pages, pages, q, rows, table, starts, lengths)
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 2**24
