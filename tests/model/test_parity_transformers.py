"""The model against transformers in float32, through the public face: a Hugging Face directory in, logits out."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import exaone_jax  # noqa: E402
from tests.golden.cases import LENGTHS, TRANSFORMERS, batch  # noqa: E402
from tests.model.hf_models import HFModel, build  # noqa: E402
from tests.model.parity import assert_parity, chunked_logits, kl_divergence, left_padded, oracle_logits  # noqa: E402


class Case:
    """One small model in both worlds, and what transformers says of every row on its own."""

    def __init__(self, name: str, directory):
        self.hf: HFModel = build(name, directory)
        self.tokens = batch(name)
        self.rows = [self.hf.logits(row[None, :length])[0] for row, length in zip(self.tokens, LENGTHS, strict=True)]
        # Scanned here, as on accelerators; the golden and reference tests have the form that a CPU prefers.
        self.model = exaone_jax.load(self.hf.published, dtype="float32", scan_layers=True)


@pytest.fixture(scope="module", params=TRANSFORMERS)
def case(request, tmp_path_factory) -> Iterator[Case]:
    yield Case(request.param, tmp_path_factory.mktemp("model"))
    jax.clear_caches()  # nothing compiled for one case serves another


def test_oracles_agree_and_no_expert_is_a_toss_up(case: Case):
    for row, exact in zip(case.rows, oracle_logits(case.hf.config, case.hf.tensors, case.tokens), strict=True):
        assert_parity(row, exact)


def test_one_shot(case: Case):
    logits = case.model(case.tokens[:1])
    assert logits.dtype == jnp.float32
    assert logits.shape == (1, *case.rows[0].shape)
    assert_parity(logits[0], case.rows[0])


def test_what_transformers_saves_is_the_same_model(case: Case):
    """Config and names as LG publishes them, and as `save_pretrained` writes them: not a bit of difference.

    transformers drops the MTP layer on loading. Its copy of a model that had one loads without.
    """
    saved = exaone_jax.load(case.hf.saved, dtype="float32", scan_layers=True)
    assert saved.config.layers == case.model.config.layers
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(model))) for model in (case.model, saved))
    ours = {path: value for path, value in ours.items() if path[0] != "mtp"}
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value[...], theirs[path][...], err_msg=str(path))


def test_left_padding(case: Case):
    """transformers pads on the left with a mask; ours says the same with segment ids (0 is padding) and its positions."""
    padded, mask = left_padded(case.tokens)
    theirs = case.hf.logits(padded, mask)
    positions = jnp.broadcast_to(jnp.arange(padded.shape[1]), padded.shape)  # shifted by the padding, as theirs are
    ours = np.asarray(case.model(padded, positions, jnp.asarray(mask, jnp.int32)))
    for row, real in enumerate(mask.astype(bool)):
        assert_parity(ours[row, real], theirs[row, real])
        assert_parity(ours[row, real], case.rows[row])


@pytest.mark.parametrize("long", [True, False], ids=["chunks-over-window", "chunks-under-window"])
def test_ragged_chunked_prefill_then_decode(case: Case, long: bool):
    """Rows of 640, 400, 150 tokens together, by chunks longer than the window with a decoded end, and by shorter ones."""
    window = case.hf.config.get("text_config", case.hf.config).get("sliding_window")
    if window is None and not long:
        pytest.skip("no window to be shorter than")
    chunk = 200 if long else window - window // 4
    decode = 24 if long else 0
    for ours, theirs in zip(chunked_logits(case.model, case.tokens, LENGTHS, chunk, decode), case.rows, strict=True):
        assert_parity(ours, theirs)


@pytest.mark.parametrize("name", ["exaone3.5-tied", "exaone4-hybrid", "exaone_moe"])
def test_bfloat16_is_no_worse_than_theirs(name: str, tmp_path):
    """There is no right answer to within bfloat16, only a distance from float32: ours is at most about that of transformers."""
    hf = build(name, tmp_path / "float32")
    tokens = batch(name)[:1]
    exact = hf.logits(tokens)
    theirs = kl_divergence(build(name, tmp_path / "bfloat16", dtype=torch.bfloat16).logits(tokens), exact)
    ours = kl_divergence(np.asarray(exaone_jax.load(hf.published, dtype="bfloat16", scan_layers=True)(tokens)), exact)
    # Means over 640 tokens of errors that rounding draws anew: alike to a few tens of per cent, so a factor of 1.5.
    assert ours.mean() <= 1.5 * theirs.mean(), (ours.mean(), theirs.mean())
    assert np.median(ours) <= 1.5 * np.median(theirs), (np.median(ours), np.median(theirs))
