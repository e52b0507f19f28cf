"""Attention over a split sequence is attention over the whole one, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from exaone_jax.parallel import MeshShape, make_mesh
from exaone_jax.parallel.context import context_attention
from pallas_kernels.attention import attention

ROWS = P(None, "context")


@pytest.mark.parametrize("length", [64, 36])  # a part of 16 and, odd, of 9: the latter trades no queries
@pytest.mark.parametrize("window", [None, 1, 2, 9, 10, 17, 18, 40, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_split_is_whole(length: int, window: int | None, packed: bool):
    mesh = make_mesh(MeshShape(context=4), jax.devices()[:4])
    keys = jax.random.split(jax.random.key(0), 4)
    q, target = (jax.random.normal(key, (2, length, 4, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, 2, 16)) for key in keys[2:])
    ends = np.array([[5, 30], [22, 35]]) if packed else np.zeros((2, 0), int)
    ids = jnp.asarray((np.arange(length) >= ends[:, :, None]).sum(1), jnp.int32)

    def whole(q, k, v):
        return attention(q, k, v, window=window, segment_ids=ids)

    def split(q, k, v):
        run = partial(context_attention, window=window, axis="context")
        return jax.shard_map(run, mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False)(q, k, v, ids)

    results = []
    for form in (whole, split):
        out, pull = jax.vjp(jax.jit(form), q, k, v)
        results.append((out, *pull(target)))
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)  # sums of up to 64 terms of order 1 in float32
