"""Finding a marker in text that arrives in pieces."""


def held_back(text: str, *markers: str) -> int:
    """How many characters at the end of the text may be the beginning of one of the markers."""
    longest = max((len(marker) for marker in markers), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(len(marker) > length and marker.startswith(tail) for marker in markers):
            return length
    return 0
