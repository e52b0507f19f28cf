"""Attention on GPU: not written yet. The name is kept so that asking for it gives a reason, never another implementation."""


def unsupported() -> str | None:
    """Returns why this implementation cannot serve a call, or None if it can."""
    return "the Mosaic GPU kernel is not written yet; 'xla' runs on GPU"
