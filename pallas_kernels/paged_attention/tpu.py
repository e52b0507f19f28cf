"""Paged attention on TPU."""

from typing import Any


def unsupported(q: Any = None, pages: Any = None, *, interpret: bool = False) -> str | None:
    """Returns why this implementation cannot serve a call, or None if it can. Without arrays: any call at all."""
    return "the TPU kernel is not written yet; 'xla' runs on TPU"
