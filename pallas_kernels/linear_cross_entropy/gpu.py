"""No GPU kernel of our own yet."""


def unsupported() -> str:
    """Why this implementation cannot serve a call."""
    return "there is no GPU kernel yet; implementation='xla' goes by chunks"
