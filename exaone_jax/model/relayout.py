"""The same weights in another form of one model: its layers scanned or unrolled, its MTP layer with a window."""

import jax
import jax.numpy as jnp
from flax import nnx

from exaone_jax.config.model import Segment, single_layers
from exaone_jax.model.transformer import Transformer

_Place = tuple[int, int, int]  # segment, place in its pattern, repeat


def _places(plan: tuple[Segment, ...]) -> list[_Place]:
    """Where each layer stands in a plan, in order."""
    return [
        (s, p, r) for s, segment in enumerate(plan) for r in range(segment.repeats) for p in range(len(segment.pattern))
    ]


def with_layers(model: Transformer, *, scan: bool) -> Transformer:
    """The same model with its layers scanned or unrolled; `model` itself if it already is so.

    Weights are copied block by block, so at most one more copy of the layers is alive while `model` is.
    """
    kept = {"dtype": model.dtype, "placement": model.placement}
    target = nnx.eval_shape(lambda: Transformer(model.config, rngs=nnx.Rngs(0), scan_layers=scan, **kept))
    if target.plan == model.plan:
        return model
    old, places = nnx.to_pure_dict(nnx.state(model)), _places(model.plan)
    new = {name: value for name, value in old.items() if name != "segments"}
    layer_at = {place: index for index, place in enumerate(_places(target.plan))}

    def one_layer(index: int) -> dict:
        s, p, r = places[index]
        return jax.tree.map(lambda leaf: leaf[r], old["segments"][s][p])

    new["segments"] = {
        s: {
            p: jax.tree.map(
                lambda *rows: jnp.stack(rows), *(one_layer(layer_at[s, p, r]) for r in range(segment.repeats))
            )
            for p in range(len(segment.pattern))
        }
        for s, segment in enumerate(target.plan)
    }
    graphdef, state = nnx.split(target)
    nnx.replace_by_pure_dict(state, new)
    return nnx.merge(graphdef, state)


def with_mtp_window(model: Transformer, window: int) -> Transformer:
    """The same model, whose MTP layer sees at most `window` positions (the fewer, where it has a window). Shares the weights."""
    if model.config.mtp_layer is None:
        return model
    spec = model.config.mtp_layer
    spec = spec.model_copy(update={"window": min(window, spec.window or window)})
    config, scan = model.config.model_copy(update={"mtp_layer": spec}), model.plan != single_layers(model.config.layers)
    kept = {"dtype": model.dtype, "placement": model.placement, "scan_layers": scan}
    target = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **kept))
    return nnx.merge(nnx.split(target)[0], nnx.state(model))
