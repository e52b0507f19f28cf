"""The model against stored outputs of transformers and of the numpy reference. Needs no torch.

A golden's float32 has the noise of a fresh run on another machine, so the parity check and its tolerances are the usual ones.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import exaone_jax
from tests.golden.cases import CASES, REFERENCE_ONLY
from tests.golden.make_goldens import checksum
from tests.golden.weights import random_tensors, write_checkpoint
from tests.model.parity import assert_parity

DIRECTORY = Path(__file__).parent


def test_there_is_one_for_every_case_and_they_are_small():
    files = sorted(DIRECTORY.glob("*.npz"))
    assert {file.stem for file in files} == set(CASES)
    assert sum(file.stat().st_size for file in files) < 1_000_000


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path):
    golden = np.load(DIRECTORY / f"{case}.npz", allow_pickle=False)
    config = json.loads(str(golden["config"]))
    assert config == CASES[case], "the case has changed since: make the goldens again"
    tensors = random_tensors(config, int(golden["seed"]))
    assert checksum(tensors) == int(golden["checksum"]), "the weights are not those that the golden was made with"
    model = exaone_jax.load(write_checkpoint(tmp_path, config, tensors), dtype="float32")
    tokens = jnp.asarray(golden["tokens"][None])
    logits, mtp = _logits(*nnx.split(model), tokens)
    assert_parity(logits[0][golden["positions"]], golden["logits"])
    assert (mtp is not None) == (case in REFERENCE_ONLY or case == "exaone4_5")
    if mtp is not None:
        assert_parity(mtp[0][golden["mtp_positions"]], golden["mtp_logits"])


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    hidden = model.forward(tokens).hidden
    mtp = None
    if model.config.mtp_layer is not None:
        mtp = model.logits(model.mtp_forward(hidden[:, :-1], tokens[:, 1:]))
    return model.logits(hidden), mtp
