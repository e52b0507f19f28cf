"""How many tokens to draft: what drafts are worth beside what they cost."""

_MEMORY = 128  # drafted steps of a request after which the estimates have forgotten most of what was before
_LOOK = 256  # steps after which all drafts are tried again, twice: the first time those of the step before lack
_AT_FIRST = 0.8  # of the drafts, each is believed to be kept


class Drafting:
    """Chooses how many drafts every request of a step has.

    A step of n requests with j drafts each says n (1 + p_1 + … + p_j) tokens, where p_i is how often the first i drafts are all
    kept. It costs max(free_rows, n (j + 1)) to verify, in rows, as up to free_rows are computed while the weights are
    read, and j max(free_rows, n) draft_cost to draft. The best ratio wins, and of equal ones the fewest drafts.

    Args:
        most: drafts at most.
        free_rows: see above.
        draft_cost: the share of the weights that a draft reads.
    """

    def __init__(self, most: int, *, free_rows: int, draft_cost: float):
        self._most, self._free_rows, self._draft_cost = most, free_rows, draft_cost
        self.kept = [_AT_FIRST**i for i in range(1, most + 1)]
        self._steps = 0

    def choose(self, running: int) -> int:
        """Drafts for the next step."""
        self._steps += 1
        if self._steps % _LOOK < 2:
            return self._most
        ratios = [self._said(j) / self._cost(max(1, running), j) for j in range(self._most + 1)]
        return ratios.index(max(ratios))

    def saw(self, proposed: int, kept: int) -> None:
        """Take note of how many of a request's drafts were kept."""
        for i in range(proposed):
            self.kept[i] += ((kept > i) - self.kept[i]) / _MEMORY

    def _said(self, drafts: int) -> float:
        return 1 + sum(self.kept[:drafts])

    def _cost(self, running: int, drafts: int) -> float:
        verified = max(self._free_rows, running * (drafts + 1))
        return verified + drafts * max(self._free_rows, running) * self._draft_cost
