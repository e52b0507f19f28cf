"""Attention on TPU: not written yet. The name is kept so that asking for it gives a reason, never another implementation."""


def unsupported() -> str | None:
    """Returns why this implementation cannot serve a call, or None if it can."""
    return "the Pallas TPU kernel is not written yet; 'xla' runs on TPU"
