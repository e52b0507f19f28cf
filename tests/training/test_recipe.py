"""What a run's recipe promises: parts equal the whole, what is frozen stays, stages read on, checkpoints go in and out."""

from pathlib import Path

import jax
import numpy as np
import pytest

from exaone_jax.errors import ConfigError
from exaone_jax.training import report
from exaone_jax.training.loop import dry_run, train
from exaone_jax.training.saves import rows_of
from exaone_jax.training.setup import set_up
from tests.training.runs import DENSE, small_run

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_stages_read_on_where_the_last_one_ended(tmp_path: Path) -> None:
    setup = set_up(
        small_run(tmp_path, stages=[{"start": 2, "context": 32}, {"start": 4, "context": 64, "batch_size": 16}])
    )
    assert [(stage.start, stage.stop, stage.shape) for stage in setup.stages] == [
        (0, 2, (8, 16)), (2, 4, (8, 32)), (4, 6, (16, 64)),
    ]  # fmt: skip
    assert [stage.first for stage in setup.stages] == [
        0,
        1,
        1,
    ]  # 256 tokens are one batch of 256; 768 less than one of 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "batch_size: found 12 rows, expected a multiple of accumulate 1 x data x fsdp x expert 8"),
        ({"context": 128}, "context: found 128, expected at most the model's 64"),
        ({"mesh": "data=3"}, "found 8 devices, expected 3"),
        ({"model": DENSE | {"vocab_size": 600}}, "tokenizer: has ids up to 617, and the model's vocabulary is of 600"),
        ({"model": "K-EXAONE-3"}, "no published model 'K-EXAONE-3'"),
        ({"optimizer": {"learning_rate": 1.0, "warmup": 7}}, "a schedule of 6 steps needs"),
        ({"data": {"sources": [{"path": "nowhere.jsonl"}]}}, "nowhere.jsonl"),
    ],
)
def test_a_run_that_cannot_be_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        train(small_run(tmp_path, **changes))
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(small_run(tmp_path, export=str(tmp_path / "hf")))
    run = small_run(
        tmp_path, run_dir=str(tmp_path / "next"), init_from=str(tmp_path / "hf"), model=DENSE | {"hidden_size": 32}
    )
    with pytest.raises(
        ConfigError, match="is a checkpoint of another model than `model`; different: hidden_size 16 for 32"
    ):
        train(run)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    sizes = dry_run(small_run(tmp_path))
    assert sizes["arguments"] > 3 * 4 * 21_760  # parameters and two moments
    assert sizes["total"] == sizes["arguments"] + sizes["temporaries"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "clearml"])
def test_a_tracker_that_is_not_installed_says_what_to_install(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"trackers: {name} needs the package {name}: pip install 'exaone-jax\[{name}\]'"
    ):
        train(small_run(tmp_path, trackers=[name]))


def test_rows_come_in_order_whatever_their_size(tmp_path: Path) -> None:
    """Of arrays larger than a piece, split over devices: the bytes of the whole."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = np.arange(3 * 8 * 6, dtype=np.float32).reshape(3, 8, 6)
    array = jax.device_put(values, jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor")))
    for limit in (24, 50, 200, 1 << 20):
        assert b"".join(part.tobytes() for part in rows_of(array, limit)) == values.tobytes()


def test_a_journal_survives_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    journal = report.Journal(path)
    journal.write({"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert journal.read() == [{"step": 1}]
