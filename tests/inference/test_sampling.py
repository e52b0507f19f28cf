"""Penalties, filters and draws, against transformers and against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exaone_jax.errors import InputError
from exaone_jax.inference.sampling import RowSampling, SamplingParams, draw, log_distribution, penalise, sampling_params
from tests.inference import reference

VOCAB = 24
ROWS = 32
# Sums of 24 float32 probabilities: rounding of 24 * 6e-8, with room for exp and log.
TOLERANCE = 1e-5

FILTERS = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-k of one": {"temperature": 1.0, "top_k": 1},
    "top-k beyond the vocabulary": {"temperature": 1.0, "top_k": 2**31 - 1},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "tiny top-p": {"temperature": 1.0, "top_p": 1e-6},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "min-p of one": {"temperature": 1.0, "min_p": 1.0},
    "all": {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.15},
}
PENALTIES = {
    "repetition": {"repetition_penalty": 1.3},
    "reward of repetition": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 0.8},
    "frequency": {"frequency_penalty": -0.5},
    "all": {"repetition_penalty": 1.2, "presence_penalty": -0.3, "frequency_penalty": 0.4},
}

_log_distribution, _penalise = jax.jit(log_distribution), jax.jit(penalise)
_draw = jax.jit(draw, static_argnums=3)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(scale=2.0, size=(ROWS, VOCAB)).astype(np.float32)


def distributions(logits: np.ndarray, rows: list[SamplingParams]) -> np.ndarray:
    return np.exp(np.asarray(_log_distribution(jnp.asarray(logits), RowSampling.of(rows))))


def penalised(logits: np.ndarray, prompt: np.ndarray, generated: np.ndarray, params: SamplingParams) -> np.ndarray:
    """prompt `[ROWS, P]`, generated `[ROWS, N]`."""
    counts = np.stack([np.bincount(row, minlength=VOCAB) for row in generated])
    in_prompt = np.stack([np.isin(np.arange(VOCAB), row) for row in prompt])
    return np.asarray(_penalise(jnp.asarray(logits), counts, in_prompt, RowSampling.of([params] * ROWS)))


@pytest.fixture(scope="module")
def history() -> tuple[np.ndarray, np.ndarray]:
    """(prompt, generated); tokens of either, of both and of none, some generated more than once."""
    rng = np.random.default_rng(1)
    return rng.integers(0, VOCAB, (ROWS, 6)), rng.integers(0, VOCAB // 2, (ROWS, 9))


@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_numpy(name: str, logits: np.ndarray):
    params = SamplingParams(**FILTERS[name])
    expected = np.stack([reference.distribution(row, params) for row in logits])
    found = distributions(logits, [params] * ROWS)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_transformers(name: str, logits: np.ndarray):
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers").generation.logits_process
    params = SamplingParams(**FILTERS[name])
    chain = [warpers.TemperatureLogitsWarper(params.temperature)] if params.temperature != 1.0 else []
    chain += [warpers.TopKLogitsWarper(params.top_k)] if params.top_k else []
    chain += [warpers.TopPLogitsWarper(params.top_p)] if params.top_p < 1.0 else []
    chain += [warpers.MinPLogitsWarper(params.min_p)] if params.min_p else []
    scores = torch.tensor(logits)
    for warper in chain:
        scores = warper(torch.zeros(ROWS, 1, dtype=torch.long), scores)
    expected = torch.softmax(scores, dim=-1).numpy()
    found = distributions(logits, [params] * ROWS)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_equal_numpy(name: str, logits: np.ndarray, history):
    prompt, generated = history
    params = SamplingParams(**PENALTIES[name])
    expected = [reference.penalised(*row, params) for row in zip(logits, prompt, generated, strict=True)]
    np.testing.assert_allclose(penalised(logits, prompt, generated, params), expected, atol=TOLERANCE)


def test_repetition_penalty_equals_transformers(logits: np.ndarray, history):
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("transformers").generation.logits_process.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor(np.concatenate(history, axis=1)), torch.tensor(logits)).numpy()
    found = penalised(logits, *history, SamplingParams(repetition_penalty=1.3))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_the_order_of_filters_matters_and_is_kept():
    """Probabilities .4 .3 .2 .1, and filters of which every other order keeps other tokens."""
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))

    def kept(**params) -> int:
        return int((distributions(logits, [SamplingParams(**params)]) > 0).sum())

    # Top-p after top-k: of 4/7 and 3/7, 0.55 is reached by the first. Before it, two would be needed.
    assert kept(temperature=1.0, top_k=2, top_p=0.55) == 1
    assert kept(temperature=1.0, top_p=0.55) == 2
    # Temperature before top-p: at T = 0.25 the first token has 0.72 of the mass.
    assert kept(temperature=0.25, top_p=0.6) == 1
    assert kept(temperature=1.0, top_p=0.6) == 2
    # Temperature before min-p: at T = 2 the last token has half the first one's probability.
    assert kept(temperature=2.0, min_p=0.45) == 4
    assert kept(temperature=1.0, min_p=0.45) == 3


def test_penalties_come_before_temperature(logits: np.ndarray, history):
    """Dividing by the temperature first would make a presence penalty count the more the colder the row is."""
    prompt, generated = history
    params = SamplingParams(temperature=0.5, presence_penalty=1.0)
    found = distributions(penalised(logits, prompt, generated, params), [params] * ROWS)
    for row in range(ROWS):
        inside = reference.penalised(logits[row], prompt[row], generated[row], params)
        np.testing.assert_allclose(found[row], reference.distribution(inside, params), atol=TOLERANCE)


def test_ties_at_the_edge_of_top_k_keep_k():
    """transformers keeps every token that ties with the k-th; k is k here, the lower ids first."""
    found = distributions(np.zeros((1, 8), np.float32), [SamplingParams(temperature=1.0, top_k=3)])
    np.testing.assert_allclose(found[0], [1 / 3] * 3 + [0] * 5, atol=TOLERANCE)


def test_greedy_rows_put_all_mass_on_the_first_best_token(logits: np.ndarray):
    logits = logits.copy()
    logits[0, [4, 9]] = 50.0
    for params in (
        SamplingParams(),
        SamplingParams(top_k=3, top_p=0.5, min_p=0.5),
        SamplingParams(temperature=1e-6, top_p=0.2),
    ):
        found = distributions(logits, [params] * ROWS)
        np.testing.assert_array_equal(found, np.eye(VOCAB)[logits.argmax(axis=1)])
    assert logits[0].argmax() == 4


def test_a_row_does_not_see_its_neighbours(logits: np.ndarray):
    """Bit for bit, though a batch without filters and draws takes shorter ways."""
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.9, seed=3),
        SamplingParams(**FILTERS["all"], seed=4),
    ]
    mixed = RowSampling.of(kinds)
    together = _log_distribution(jnp.asarray(logits[:3]), mixed)
    tokens = _draw(together, mixed, jnp.arange(3), 0)
    for row, params in enumerate(kinds):
        rows = RowSampling.of([params])
        alone = _log_distribution(jnp.asarray(logits[row : row + 1]), rows)
        np.testing.assert_array_equal(alone[0], together[row])
        assert _draw(alone, rows, jnp.array([row]), 0)[0] == tokens[row]


def test_draws_depend_on_seed_position_and_purpose_alone():
    flat = jnp.zeros((6, 1 << 12))  # two draws that should differ agree once in 4096
    rows = RowSampling.of([SamplingParams(temperature=1.0, seed=seed) for seed in (7, 7, 8, 7, 2**32 - 1, 2**31 - 1)])
    position = jnp.array([10, 10, 10, 11, 10, 10])
    tokens = np.asarray(_draw(flat, rows, position, 0))
    assert tokens[0] == tokens[1], "same seed and position, another place in the batch"
    assert len(set(tokens[[0, 2, 3, 4, 5]].tolist())) == 5, "another seed or position, another draw"
    assert tokens[0] != np.asarray(_draw(flat, rows, position, 1))[0], "another purpose, another draw"
    np.testing.assert_array_equal(draw(flat, rows, position, 0), tokens)


def test_draws_follow_the_distribution():
    """Chi-squared with 5 degrees of freedom: 25.7 is passed by one in 10,000; the seeds are fixed."""
    chances = np.array([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
    count = 20_000
    rows = RowSampling.of([SamplingParams(temperature=1.0)])
    rows = RowSampling(*(jnp.broadcast_to(x, (count,)) for x in rows))._replace(
        seed=jnp.arange(count, dtype=jnp.uint32)
    )
    tokens = _draw(jnp.broadcast_to(jnp.log(chances), (count, 6)), rows, jnp.full(count, 5), 0)
    expected = chances * count
    observed = np.bincount(np.asarray(tokens), minlength=6)
    assert ((observed - expected) ** 2 / expected).sum() < 25.7


def test_greedy_draws_ignore_the_seed(logits: np.ndarray):
    rows = RowSampling.of([SamplingParams(seed=seed) for seed in range(ROWS - 1)] + [SamplingParams(temperature=2.0)])
    tokens = _draw(_log_distribution(jnp.asarray(logits), rows), rows, jnp.arange(ROWS), 0)
    np.testing.assert_array_equal(tokens[:-1], logits[:-1].argmax(axis=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", ("",)),
        ("stop", (3,)),
        ("top_q", 0.9),
        ("temperature", "hot"),
    ],
)
def test_a_bad_parameter_is_named(field: str, value):
    with pytest.raises(InputError, match=field):
        sampling_params(**{field: value})


def test_every_bad_parameter_is_named_and_shown():
    with pytest.raises(InputError) as caught:
        sampling_params(top_p=7.25, min_p=-3.5)
    assert all(part in str(caught.value) for part in ("top_p", "7.25", "min_p", "-3.5"))


def test_good_parameters_arrive():
    params = sampling_params(temperature=0.7, top_k=3, stop=("a", "b"), seed=2**32 - 1)
    assert (params.temperature, params.top_k, params.stop, params.seed) == (0.7, 3, ("a", "b"), 2**32 - 1)
    rows = RowSampling.of([params])
    assert rows.seed.dtype == jnp.uint32
    assert int(rows.seed[0]) == 2**32 - 1
    assert rows.top_k.dtype == jnp.int32
