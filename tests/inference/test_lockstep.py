"""What one process tells the others before each step; real processes are in tests/server/test_hosts.py."""

from types import SimpleNamespace
from typing import cast

import pytest

from exaone_jax.inference import lockstep
from exaone_jax.inference.engine import Engine


def test_a_process_that_drew_other_tokens_does_not_go_on():
    stepped = []
    engine = cast(Engine, SimpleNamespace(digest=7, step=lambda: stepped.append(1), cancel=stepped.append))
    lockstep._step(engine, {"digest": 7, "arrived": [], "cancelled": [3]})
    assert stepped == [3, 1]
    with pytest.raises(lockstep.LockstepError, match="process 0 has drawn other tokens than process 0"):
        lockstep._step(engine, {"digest": 8, "arrived": [], "cancelled": []})
    assert stepped == [3, 1]
