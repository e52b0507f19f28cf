"""No GPU kernel of our own yet."""


def unsupported() -> str:
    """Why this implementation cannot serve a call."""
    return "there is no Mosaic GPU kernel yet; implementation='xla' runs lax.ragged_dot on a GPU"
