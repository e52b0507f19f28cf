"""What a run needs before it runs."""

from exaone_jax.planning.inspect import Inspection, inspect_model, render

__all__ = ["Inspection", "inspect_model", "render"]
