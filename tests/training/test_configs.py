"""configs/train: each file parses, and arithmetic says that its step fits the machine in its name."""

from pathlib import Path

import pytest

from exaone_jax.config import published_names
from exaone_jax.config.run import read_run
from exaone_jax.planning.ask import Question, answer

FOLDER = Path(__file__).parents[2] / "configs" / "train"
FOR_A_MACHINE = sorted(FOLDER.glob("*_*.yaml"))


def test_every_published_model_has_one() -> None:
    assert {path.stem.split("_")[0] for path in FOR_A_MACHINE} == set(published_names())


@pytest.mark.parametrize("path", FOR_A_MACHINE, ids=lambda path: path.stem)
def test_a_step_fits(path: Path) -> None:
    """`MODEL_CHIP-SHAPE.yaml`, and `_lora` or `_qlora` after it: v6e-2x4 is a TPU slice, h100-8 eight GPUs."""
    run = read_run(path)
    model, machine, *adapters = path.stem.split("_")
    chip, shape = machine.split("-")
    where = {"topology": f"{chip}:{shape}"} if "x" in shape else {"chip": chip, "devices": int(shape)}
    rows = run.batch_size // run.accumulate
    given = {"mesh": run.mesh, "batch": rows, "context": run.context, "remat": run.remat, "lora": run.lora}
    assert answer(model, Question(**given, compiles=False, **where)).shortfall == ()
    kind = None if run.lora is None else "qlora" if run.lora.base in ("int8", "nf4") else "lora"
    assert adapters == ([] if kind is None else [kind])
    assert run.init_from == f"checkpoints/{model}"


def test_the_tiny_one_parses() -> None:
    assert read_run(FOLDER / "tiny.yaml").steps == 60
