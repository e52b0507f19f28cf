"""No TPU kernel of our own yet."""


def unsupported() -> str:
    """Why this implementation cannot serve a call."""
    return (
        "there is no TPU kernel yet (tokamax's has no label mask on Python 3.11); implementation='xla' goes by chunks"
    )
