"""Optimizers over the model's parameters, and learning-rate schedules."""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from optax import contrib

from exaone_jax.errors import ConfigError
from exaone_jax.model.linear import Axes

Tree = Any  # an nnx.State, whole or with optax's MaskedNode in the place of values


class Optimizer(NamedTuple):
    """An optax transformation of nnx.State gradients, and its learning rate at each step, to be reported."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def wsd(peak: float, steps: int, *, warmup: int, decay: int, final: float = 0.0) -> optax.Schedule:
    """Warm-up, stable, decay: linear from 0 to `peak` in `warmup` steps, and linear to `final` in the last `decay` of `steps`.

    Raises ConfigError where warm-up and decay do not fit into the steps.
    """
    _check_phases(steps, warmup, decay)
    phases = [
        optax.linear_schedule(0.0, peak, warmup),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, final, decay),
    ]
    return optax.join_schedules(phases, [warmup, steps - decay])


def cosine(peak: float, steps: int, *, warmup: int, final: float = 0.0) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup` steps, then half a cosine to `final` at `steps`.

    Raises ConfigError where the warm-up takes all the steps.
    """
    _check_phases(steps, warmup, 1)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)


def _check_phases(steps: int, warmup: int, decay: int) -> None:
    if warmup < 0 or decay < 1 or warmup + decay > steps:
        raise ConfigError(
            f"a schedule of {steps} steps needs warmup >= 0, decay >= 1 and warmup + decay <= {steps}; "
            f"found warmup {warmup}, decay {decay}"
        )


def adamw(
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    clip_norm: float = 1.0,
) -> Optimizer:
    """AdamW on gradients clipped to a global norm. Matrices decay; norms and the embedding do not."""
    update = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    return Optimizer(optax.chain(optax.clip_by_global_norm(clip_norm), update), schedule)


def muon(
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.1,
    beta: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    clip_norm: float = 1.0,
) -> Optimizer:
    """Muon for matrices, AdamW for norms, embedding and output head, at one learning rate (arXiv 2502.16982).

    Each matrix of a stack, of layers or of experts, is orthogonalised by itself, and its update scaled to the root mean
    square that an update of AdamW has, about 0.2.
    """
    matrices = optax.chain(
        contrib.scale_by_muon(beta=beta, weight_dimension_numbers=_dimensions),
        optax.stateless(_scaled_like_adamw),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    rest = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    update = optax.partition({"muon": matrices, "adamw": rest}, _labels)
    return Optimizer(optax.chain(optax.clip_by_global_norm(clip_norm), update), schedule)


def frozen(optimizer: Optimizer, names: tuple[str, ...]) -> Optimizer:
    """The optimizer for all parameters but those below a module of one of these names, which stay as they are."""

    def labels(params: Tree) -> Tree:
        def label(path: jax.tree_util.KeyPath, variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
            parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
            found = "frozen" if set(names).intersection(parts) else "trained"
            return jax.tree.map(lambda _: found, variable)

        return jax.tree_util.tree_map_with_path(label, params, is_leaf=lambda x: isinstance(x, nnx.Variable))

    parts: dict[Hashable, optax.GradientTransformation] = {
        "trained": optimizer.transform,
        "frozen": optax.set_to_zero(),
    }
    return Optimizer(optax.partition(parts, labels), optimizer.schedule)


def decays(params: Tree) -> Tree:
    """For each parameter whether weight decay applies: to matrices, but not to the embedding `[V, D]`."""
    return _each(params, lambda name, axes: _is_matrix(axes) and name != "embedding")


def _labels(params: Tree) -> Tree:
    return _each(params, lambda _, axes: "muon" if _is_matrix(axes) and "vocab" not in axes else "adamw")


def _dimensions(params: Tree) -> Tree:
    """The axes of a matrix product, for parameters `[..., out, in]`."""
    return _each(params, lambda _, axes: contrib.MuonDimensionNumbers(len(axes) - 1, len(axes) - 2))


def _scaled_like_adamw(updates: Tree, params: Tree) -> Tree:
    """An orthogonal matrix `[out, in]` has root mean square 1 / sqrt(max(out, in))."""
    del params
    return jax.tree.map(lambda update: 0.2 * math.sqrt(max(update.shape[-2:])) * update, updates)


def _is_matrix(axes: Axes) -> bool:
    """Whether a parameter is a matrix `[out, in]`, or a stack of matrices of layers or of layers' experts."""
    return len(axes) - (axes[0] == "layers") >= 2


def _each(params: Tree, rule: Callable[[str, Axes], Any]) -> Tree:
    """`rule` of name and logical axes of each parameter, in its place; where optax masked the value out it stays so."""

    def apply(path: jax.tree_util.KeyPath, variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        found = rule(jax.tree_util.keystr(path[-1:], simple=True), variable.get_metadata("axes"))
        return jax.tree.map(lambda _: found, variable)

    return jax.tree_util.tree_map_with_path(apply, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
