"""Every EXAONE language model in JAX: from a Hugging Face checkpoint to text, and back.

`load` reads a checkpoint, `generate` continues a text. Importing this package imports neither jax nor flax: the two names
are looked up in `exaone_jax.api` when first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exaone_jax.api import generate, load

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("exaone_jax.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
