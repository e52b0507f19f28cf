"""From text to token ids."""

from collections.abc import Iterable

import numpy as np

from exaone_jax.errors import InputError
from exaone_jax.text import Tokenizer


def tokenise(tokenizer: Tokenizer, texts: Iterable[str]) -> list[np.ndarray]:
    """int32 ids of each text, with the tokenizer's end token after it, so that a model learns where documents end.

    Raises InputError where the tokenizer names no end token, or a text has no UTF-8 form.
    """
    if tokenizer.eos_id is None:
        raise InputError("this tokenizer names no eos_token to end documents with")
    return [np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32) for text in texts]
