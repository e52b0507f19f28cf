"""Paged attention on GPU: not written yet. The name stands so that asking for it gives a reason, not something else."""


def unsupported() -> str | None:
    """Returns why this implementation cannot serve a call, or None if it can."""
    return "the Mosaic GPU kernel is not written yet; 'xla' runs on GPU"
