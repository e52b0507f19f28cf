"""Small models of the inference and model tests. Weights come from numpy, so that no test compiles an initialiser."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from exaone_jax.config.model import LayerSpec, Llama3RopeScaling, ModelConfig, MoEConfig
from exaone_jax.model import Transformer

VOCAB = 40
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "dtype": "float32",
}
_MOE = MoEConfig(
    num_experts=4, num_experts_per_tok=2, num_shared_experts=1, intermediate_size=16, routed_scaling_factor=2.5
)
_POST = {"norm": "post"}

# One model of every generation with an MTP layer; windows of 3 to 6, so that rings wrap many times.
K_EXAONE = ModelConfig(
    model_type="exaone_moe",
    layers=(LayerSpec(window=4), LayerSpec(window=4, moe=True), LayerSpec(rope=False, moe=True)),
    moe=_MOE,
    mtp_layer=LayerSpec(),
    **_SIZES,
)
EXAONE_4_5 = ModelConfig(
    model_type="exaone4_5",
    layers=(LayerSpec(window=5, **_POST), LayerSpec(rope=False, **_POST)) * 2,
    mtp_layer=LayerSpec(window=5, **_POST),
    rope_scaling=Llama3RopeScaling(
        factor=16, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=32
    ),
    **_SIZES,
)
K_EXAONE_2 = ModelConfig(
    model_type="exaone_moe",
    layers=(LayerSpec(rope=False), LayerSpec(window=6), LayerSpec(window=3, moe=True, swiglu_limit=0.3)),
    moe=_MOE.model_copy(update={"n_group": 2}),
    mtp_layer=LayerSpec(window=3),
    **_SIZES,
)
WITH_MTP = {"k-exaone": K_EXAONE, "4.5": EXAONE_4_5, "k-exaone-2.0": K_EXAONE_2}


def make(config: ModelConfig, seed: int = 0, *, dtype=jnp.float32, param_dtype=None, **given) -> Transformer:
    """A model with random weights; `given` maps paths joined by two underscores to values of other weights."""
    abstract = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    rng, filled = np.random.default_rng(seed), []
    for path, leaf in nnx.to_flat_state(state):
        value = rng.standard_normal(leaf.shape) * (0.1 if path[-1] in ("scale", "bias") else config.initializer_range)
        value = given.pop("__".join(map(str, path)), value + 1 if path[-1] == "scale" else value)
        filled.append((path, leaf.replace(jnp.asarray(value, leaf.dtype))))
    if given:
        raise ValueError(f"no weights are named {', '.join(given)}")
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def agreeing(config: ModelConfig, seed: int = 0, peak: float = 2.0, loud: float = 2.0) -> Transformer:
    """A random model whose MTP layer often guesses right, though nothing was trained.

    Both favour a next token that depends on the newest one: the residual stream carries its embedding, the output
    head maps that to the next one's logit, and the left half of `fc` hands the MTP layer the embedding as it is.
    peak: how strongly the head favours it. loud: how strong the embedding is beside what the layers add.
    """
    vocab, size = config.vocab_size, config.hidden_size
    rng = np.random.default_rng(seed + 1000)
    embedding = loud * rng.standard_normal((vocab, size))
    head = 0.05 * rng.standard_normal((vocab, size)) + peak / size / loud * embedding[rng.permutation(vocab)]
    fc = np.concatenate([loud * np.eye(size), np.zeros((size, size))], axis=1)
    fc += config.initializer_range * rng.standard_normal(fc.shape)
    return make(config, seed, embed__embedding=embedding, lm_head__weight=head, mtp__fc__weight=fc)


def reciting(
    next_token: Mapping[int, int], vocab: int, *, wrong_drafts: Mapping[int, int] | None = None, **config
) -> Transformer:
    """A model that is sure of what follows each token: next_token[t]. Layers add nothing.

    Its MTP layer knows as much, but takes the tokens t in wrong_drafts for wrong_drafts[t].
    """
    size = min(vocab, 128)
    rng = np.random.default_rng(0)
    embedding = np.eye(size) if size == vocab else rng.choice([-1.0, 1.0], (vocab, size))
    head = np.zeros((vocab, size))
    for token, following in next_token.items():
        head[following] += embedding[token]
    fc = np.concatenate([np.eye(size), np.zeros((size, size))], axis=1)
    for token, taken_for in (wrong_drafts or {}).items():
        fc[:, token] = np.eye(size)[taken_for]
    fields = {
        "model_type": "exaone_moe",
        "layers": (LayerSpec(window=4), LayerSpec(rope=False)),
        "mtp_layer": LayerSpec(window=4),
        **_SIZES,
    }
    fields |= {"vocab_size": vocab, "hidden_size": size, "initializer_range": 0.0, **config}  # 0: layers give zeros
    return make(ModelConfig(**fields), embed__embedding=embedding, lm_head__weight=head, mtp__fc__weight=fc)


def prompts(lengths: Sequence[int], vocab: int = VOCAB, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def padded_logits(model: Transformer, rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Logits float32 `[B, length, V]` of rows padded on the right; causality keeps the padding from mattering."""
    tokens = np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return np.asarray(model(tokens))


def all_finite(tree) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
