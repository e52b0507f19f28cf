"""Write the golden outputs: `python -m tests.golden.make_goldens`, from the repository's root, with the test extra (torch).

One small .npz a case: config, seed and checksum of the weights (which are made again from the seed, not stored), tokens, and
logits at some positions. `source` says whose they are: transformers in float32, or the numpy reference in float64 for what
transformers does not compute.
"""

import json
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests import reference_model
from tests.golden.cases import CASES, LENGTH, REFERENCE_ONLY, TRANSFORMERS, batch
from tests.golden.weights import random_tensors

DIRECTORY = Path(__file__).parent
SEED = 0
# Before, at and after the ends of windows of 16 and 128, the last token, and some in between.
POSITIONS = np.array([0, 1, 14, 15, 16, 17, 96, 126, 127, 128, 129, 255, 257, 400, 511, 639])


def checksum(tensors: Mapping[str, np.ndarray]) -> int:
    """crc32 of all tensors in the order of their names."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).tobytes(), crc)
    return crc


def transformers_logits(case: str) -> tuple[np.ndarray, str]:
    import transformers

    from tests.model.hf_models import build

    with tempfile.TemporaryDirectory() as directory:
        logits = build(case, Path(directory), SEED).logits(batch(case)[:1])[0]
    return logits, f"transformers {transformers.__version__}, float32"


def golden(case: str) -> dict[str, np.ndarray]:
    config, tokens = CASES[case], batch(case)[0]
    tensors = random_tensors(config, SEED)
    if case in TRANSFORMERS:
        logits, source = transformers_logits(case)
    else:
        logits, source = reference_model.run(config, tensors, tokens).logits, "tests/reference_model.py, float64"
    found = {"config": np.array(json.dumps(config)), "seed": np.array(SEED), "checksum": np.array(checksum(tensors))}
    found |= {"tokens": tokens.astype(np.int32), "positions": POSITIONS, "source": np.array(source)}
    found["logits"] = logits[POSITIONS].astype(np.float32)
    if case in REFERENCE_ONLY or case == "exaone4_5":
        mtp = reference_model.mtp_logits(config, tensors, tokens)[0]
        found["mtp_positions"] = POSITIONS[POSITIONS < LENGTH - 1]
        found["mtp_logits"] = mtp[found["mtp_positions"]].astype(np.float32)
    return found


def main() -> None:
    for case in CASES:
        path = DIRECTORY / f"{case}.npz"
        np.savez_compressed(path, **golden(case))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
