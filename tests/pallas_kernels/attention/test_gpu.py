"""attention on GPU: what cuDNN or Triton is asked for, read from the program lowered for CUDA. No GPU computes here."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pallas_kernels.attention import attention, choose_implementation, gpu, reference
from tests.pallas_kernels.cuda import TRITON, library_calls

HEADS = {"2.4B": (32, 8, 80), "7.8B": (32, 8, 128), "32B": (40, 8, 128), "1.2B": (32, 8, 64), "236B": (64, 8, 128)}


@pytest.fixture
def cuda(monkeypatch):
    """A GPU with cuDNN, as far as tracing and lowering look."""
    monkeypatch.setattr(gpu, "target", lambda: "gpu")
    monkeypatch.setattr("pallas_kernels._select.target", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)


def shapes(heads, kv_heads, head_dim, length=512, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype)
    kv = jax.ShapeDtypeStruct((2, length, kv_heads, head_dim), dtype)
    return q, kv, kv


def calls(run, arrays):
    """What the lowered program asks of cuDNN: [(name, its backend_config)]."""
    text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r'custom_call @(__cudnn\$fmha\w+)\(.*?backend_config = "(.*?)"[,}]', text)
    configs = [json.loads(re.sub(r"\\22", '"', config)) for _, config in found]
    return [(name, c["cudnn_fmha_backend_config"]) for (name, _), c in zip(found, configs, strict=True)]


@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("window", [None, 128, 4096])
def test_lowers_to_cudnn_forward_and_backward(cuda, model, window):
    run = functools.partial(attention, window=window)
    length = 8192 if window == 4096 else 512
    loss = lambda q, k, v: run(q, k, v).astype(jnp.float32).sum()  # noqa: E731
    asked = calls(jax.grad(loss, (0, 1, 2)), shapes(*HEADS[model], length=length))
    assert [name for name, _ in asked] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for _, config in asked:
        assert config["mask_type"] == "CAUSAL"
        assert config["sliding_window_length"] == (window or 0)  # cuDNN's counts the query, as ours
        assert config["fmha_scale"] == pytest.approx(HEADS[model][2] ** -0.5)


def test_a_window_that_hides_nothing_is_causal(cuda):
    ((_, config),) = calls(functools.partial(attention, window=512), shapes(32, 8, 128))
    assert config["sliding_window_length"] == 0


def test_none_takes_cudnn_on_a_gpu(cuda):
    assert choose_implementation() == "gpu"
    assert len(calls(attention, shapes(32, 8, 128))) == 1


IDS = np.zeros((2, 512), np.int32)
BEYOND_CUDNN = {
    "segments": ({"segment_ids": IDS}, jnp.bfloat16, 128, "no segment ids"),
    "offset": ({"q_offset": 3}, jnp.bfloat16, 128, "q_offset=0"),
    "traced": ({"q_offset": np.zeros(2, np.int32)}, jnp.bfloat16, 128, "q_offset=0"),
    "lse": ({"return_lse": True}, jnp.bfloat16, 128, "log-sum-exp"),
    "float32": ({}, jnp.float32, 128, "this is float32"),
    "dim": ({}, jnp.bfloat16, 100, "multiples of 8 up to 128, and this is 100"),
}


@pytest.mark.parametrize("name", BEYOND_CUDNN)
def test_what_cudnn_would_ignore_or_refuse_is_the_pallas_kernel_by_name(cuda, name):
    kwargs, dtype, head_dim, _ = BEYOND_CUDNN[name]
    run = functools.partial(attention, implementation="gpu", **kwargs)
    loss = lambda *x: sum(y.astype(jnp.float32).sum() for y in jax.tree.leaves(run(*x)))  # noqa: E731
    asked = library_calls(jax.grad(loss, (0, 1, 2)), *shapes(8, 2, head_dim, dtype=dtype))
    assert asked == [TRITON] * 3  # forward, d_q, and d_k with d_v


@pytest.mark.parametrize("name", BEYOND_CUDNN)
def test_what_cudnn_cannot_serve_goes_to_xla_when_nothing_was_named(cuda, name):
    kwargs, dtype, head_dim, _ = BEYOND_CUDNN[name]
    assert library_calls(functools.partial(attention, **kwargs), *shapes(8, 2, head_dim, dtype=dtype)) == []


@pytest.mark.parametrize("name", BEYOND_CUDNN)
def test_what_neither_serves_is_refused_with_both_reasons(cuda, name):
    kwargs, dtype, head_dim, reason = BEYOND_CUDNN[name]
    run = functools.partial(attention, implementation="gpu", causal=False, **kwargs)
    with pytest.raises(
        NotImplementedError, match=f"'gpu' cannot serve this call: .*{reason}.*; the Pallas kernel is causal"
    ):
        jax.eval_shape(run, *shapes(8, 2, head_dim, dtype=dtype))


def test_wide_heads_and_long_arrays_are_refused(cuda):
    run = functools.partial(attention, implementation="gpu")
    with pytest.raises(NotImplementedError, match="kernel takes head dimensions up to 128, and this is 136"):
        jax.eval_shape(run, *shapes(8, 2, 136))
    with pytest.raises(NotImplementedError, match="32 bits"):
        jax.eval_shape(functools.partial(run, return_lse=True), *shapes(64, 8, 128, length=2**17))


def test_other_lengths_of_keys_are_not_for_cudnn(cuda):
    q, _, _ = shapes(8, 2, 128)
    _, k, v = shapes(8, 2, 128, length=640)
    with pytest.raises(NotImplementedError, match="T=512, S=640"):
        jax.eval_shape(functools.partial(attention, implementation="gpu", causal=False), q, k, v)
    assert library_calls(functools.partial(attention, implementation="gpu"), q, k, v) == [TRITON]


@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("window", [None, 128, 4096])
def test_packed_training_lowers_to_the_pallas_kernels(cuda, model, window):
    length = 8192 if window == 4096 else 512
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def loss(q, k, v, ids):
        out = attention(q, k, v, window=window, segment_ids=ids, implementation="gpu")
        return out.astype(jnp.float32).sum()

    asked = library_calls(jax.grad(loss, (0, 1, 2)), *shapes(*HEADS[model], length=length), ids)
    assert asked == [TRITON] * 3


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_the_window_of_jax_nn_is_ours(window):
    """The same translation on jax.nn's other implementation, which computes here."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 33, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    found = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation="xla"
    )
    offset = jnp.zeros(2, jnp.int32)
    wanted, _ = reference.attention(q, k, v, offset, None, causal=True, window=window, scale=0.25)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
