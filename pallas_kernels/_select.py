"""How an operation picks one of its implementations: a named one serves or raises, and only `None` chooses."""

import logging
from collections.abc import Iterable, Mapping

import jax

logger = logging.getLogger("pallas_kernels")

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")

_logged: set[tuple[str, str, str]] = set()


def target() -> str:
    """The platform that a call is for: that of the mesh in force, as in a compile ahead of time, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "tpu" if device is not None and device.device_kind.startswith("TPU") else jax.default_backend()


def not_pallas(interpret: bool) -> str | None:
    """Why an implementation without a Pallas kernel ("reference", "xla") cannot serve a call, or None."""
    return "interpret=True is for Pallas kernels, and this is none" if interpret else None


def choose(
    op: str, implementation: str | None, reasons: Mapping[str, str | None], *, order: Iterable[str] | None = None
) -> str:
    """Returns the name of the implementation that serves this call.

    Args:
      op: the operation's name, for messages and the log.
      implementation: a name, or None to choose.
      reasons: for every implementation, None if it can serve this call, else one sentence why it cannot.
      order: the names None may choose, best first; by default the backend's own kernel ("tpu" or "gpu"), then "xla".

    Raises:
      ValueError: an unknown name.
      NotImplementedError: the named implementation cannot serve this call (or, for None, none of `order` can), and why.
    """
    if implementation is not None:
        if implementation not in reasons:
            raise ValueError(f"{op}: unknown implementation {implementation!r}; known are {', '.join(sorted(reasons))}")
        if (reason := reasons[implementation]) is not None:
            raise NotImplementedError(f"{op}: implementation {implementation!r} cannot serve this call: {reason}")
        return implementation
    backend = target()
    names = tuple(order) if order is not None else (backend, "xla")
    for name in names:
        if name in reasons and reasons[name] is None:
            _log_once(op, name, backend)
            return name
    why = "; ".join(f"{name}: {reasons.get(name, 'no such implementation')}" for name in names)
    raise NotImplementedError(f"{op}: no implementation can serve this call on backend {backend!r} ({why})")


def _log_once(op: str, name: str, backend: str) -> None:
    if (op, name, backend) not in _logged:
        _logged.add((op, name, backend))
        logger.info("%s: chose implementation %r on backend %r", op, name, backend)
