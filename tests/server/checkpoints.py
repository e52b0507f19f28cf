"""Small checkpoints for a server to read: of K-EXAONE's shape, with tokenizer and chat template."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from flax import nnx

from exaone_jax.checkpoints.convert import save_hf
from exaone_jax.config.model import LayerSpec, ModelConfig
from exaone_jax.model import Transformer
from exaone_jax.text import ChatTemplate, Tokenizer, train_bpe
from tests.inference.small_models import K_EXAONE, agreeing, reciting

CORPUS = ["the answer to the question is in the library; 대한민국의 수도는 서울이다. 나뉘지 않는 글자. " * 20]
END = 53


@functools.cache
def tokenizer() -> Tokenizer:
    return train_bpe(CORPUS, 700, chat_template=ChatTemplate.for_generation("k").source)


def write(path: Path, model: Transformer, *, with_tokenizer: bool = True) -> Path:
    save_hf(nnx.split(model)[1], model.config, path)
    if with_tokenizer:
        tokenizer().save(path)
    return path


def random_config(context: int = 4096) -> ModelConfig:
    layers = (LayerSpec(window=4), LayerSpec(rope=False, moe=True))
    sizes = {
        "layers": layers,
        "vocab_size": tokenizer().vocab_size,
        "max_position_embeddings": context,
        "eos_token_ids": (END,),
    }
    return K_EXAONE.model_copy(update=sizes)


def random_model(context: int = 4096, seed: int = 0) -> Transformer:
    """Its MTP layer often guesses right. Weights are random: it says anything, Korean in pieces included."""
    return agreeing(random_config(context), seed)


def reciting_model(say: Sequence[int], context: int = 512) -> Transformer:
    """It says these tokens, all different, over and over, from any of them on."""
    follows: Mapping[int, int] = dict(itertools.pairwise([*say, say[0]]))
    return reciting(follows, tokenizer().vocab_size, eos_token_ids=(END,), max_position_embeddings=context)
