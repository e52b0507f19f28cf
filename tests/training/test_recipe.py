"""What a run's recipe promises: parts equal the whole, what is frozen stays, stages read on, checkpoints go in and out."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from exaone_jax.checkpoints.load import read_params
from exaone_jax.config.run import read_run
from exaone_jax.errors import ConfigError
from exaone_jax.training import report, trackers
from exaone_jax.training.loop import dry_run, train
from exaone_jax.training.saves import parameters_sha256, read_step, rows_of, step_folder
from exaone_jax.training.setup import Setup, initial_state, set_up
from exaone_jax.training.step import TrainState
from tests.training.runs import DENSE, SPARSE, small_run, text_file, yaml_file


def last_state(folder: Path, **changes) -> tuple[Setup, TrainState]:
    """Of a run that is done."""
    setup = set_up(small_run(folder, **changes))
    done = step_folder(folder / "run" / "checkpoints", setup.config.stop_after or setup.config.steps)
    return setup, read_step(done, setup.like, setup.identity)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_batch_in_parts_is_the_batch(tmp_path: Path) -> None:
    """Loss, gradient and update, with documents of any length in the parts; up to the order of float32 sums.

    Compared after one step of the schedule's full rate: later ones would enlarge what rounding did, as Adam divides by it.
    """
    recipe = {"model": SPARSE, "batch_size": 32, "stop_after": 1, "optimizer": {"learning_rate": 1e-2, "eps": 1e-3}}
    found = []
    for name, parts in (("whole", 1), ("parts", 4)):
        folder = tmp_path / name
        folder.mkdir()
        train(small_run(folder, **recipe, accumulate=parts))
        found.append((lines(folder)[0], last_state(folder, **recipe, accumulate=parts)[1]))
    (whole, a), (parts, b) = found
    assert whole["tokens"] == parts["tokens"]
    assert whole["expert_load"] == parts["expert_load"]
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a.params, b.params)
    jax.tree.map(np.testing.assert_array_equal, a.router_biases, b.router_biases)


def test_conversations_are_learnt_by_the_template_of_the_generation(tmp_path: Path) -> None:
    """The tokenizer of bytes has no template of its own. Only the assistant's turns count."""
    path = tmp_path / "chat.jsonl"
    record = {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "defgh"}]}
    path.write_text(f"{json.dumps(record)}\n" * 16)
    recipe = {"stop_after": 1, "context": 64, "data": {"sources": [{"path": str(path)}], "epochs": None}}
    train(small_run(tmp_path, **recipe))
    (line,) = lines(tmp_path)
    assert 0 < line["tokens"] < 16 * (len("defgh") + 8)  # the answer, its end of turn, and what thinking adds


def test_a_frozen_router_stays(tmp_path: Path) -> None:
    recipe = {"model": SPARSE, "freeze_router": True, "steps": 3, "router_bias_rate": 0.5}
    train(small_run(tmp_path, **recipe))
    setup, after = last_state(tmp_path, **recipe)
    before = initial_state(setup)
    for path, variable in jax.tree_util.tree_leaves_with_path((before.params, before.router_biases)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        now = dict(jax.tree_util.tree_leaves_with_path((after.params, after.router_biases)))[path]
        assert np.array_equal(variable, now) == ("router" in name.split(".")), name


def test_an_average_follows(tmp_path: Path) -> None:
    """One step: ema = 0.75 of what was and 0.25 of what is."""
    recipe = {"ema": 0.75, "stop_after": 1, "optimizer": {"learning_rate": 1e-2, "schedule": "constant"}}
    train(small_run(tmp_path, **recipe))
    setup, after = last_state(tmp_path, **recipe)
    before = initial_state(setup)
    jax.tree.map(
        lambda old, new, ema: np.testing.assert_allclose(ema, 0.75 * old + 0.25 * new, rtol=1e-6, atol=1e-7),
        before.params,
        after.params,
        after.ema,
    )


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


def test_from_a_checkpoint_and_to_hugging_face(tmp_path: Path) -> None:
    """Trained, exported, fine-tuned from the export, which starts from its very bits."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    train(small_run(first, model=SPARSE, export=str(tmp_path / "hf")))
    _, state = last_state(first, model=SPARSE)
    exported = read_params(tmp_path / "hf", dtype="float32")
    again = {"model": None, "tokenizer": None, "init_from": str(tmp_path / "hf")}
    setup = set_up(small_run(second, **again))
    assert parameters_sha256(initial_state(setup)) == parameters_sha256(state)
    assert len(exported) == len(jax.tree.leaves((state.params, state.router_biases)))
    assert train(small_run(second, **again)).steps == 6


ONCE = {"sources": [{"path": str(text_file())}]}


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
        (
            {"data": ONCE, "steps": 60},
            r"steps 0 to 60 of 8 rows read its \d+ rows [2-9]\.\d+ times, expected at most data.epochs",
        ),
        (
            {"data": ONCE | {"epochs": 1.5}, "steps": 60, "stages": [{"start": 2, "context": 32}]},
            r"steps 2 to 60 of 8 rows .* at most data.epochs = 1.5; that is enough to step \d+, and data.epochs=\d for this",
        ),
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


def test_what_a_person_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines, evaluation, samples, figures of each step, events, the curve; and trackers get the same."""
    heard: list[tuple] = []

    class Heard:
        def __init__(self, run_dir: Path, config: dict):
            heard.append((run_dir, config["steps"]))

        def log(self, step: int, figures: dict) -> None:
            heard.append((step, sorted(figures)))

        def text(self, step: int, name: str, text: str) -> None:
            heard.append((step, name))

        def close(self) -> None:
            heard.append(("closed",))

    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", Heard)
    evaluated = {"sources": [{"path": str(text_file())}], "eval_sources": [{"path": str(text_file())}]}
    changes = {
        "model": SPARSE, "data": evaluated, "evaluate": {"every": 4, "rows": 5}, "trackers": ["tensorboard"],
        "sample": {"every": 3, "prompts": ["line 1"], "max_new_tokens": 4},
    }  # fmt: skip
    train(small_run(tmp_path, **changes))
    out = capsys.readouterr().out.splitlines()
    steps = [line for line in out if line.startswith("step ")]
    assert len(steps) == 6
    assert all(
        line.split()[::2][:4] == ["step", "loss", "tokens/s/device", "TFLOP/s/device"] and "MFU -  memory" in line
        for line in steps
    )
    assert sum(line.startswith("evaluation ") for line in out) == 2
    assert sum(line.startswith("sample ") for line in out) == 1
    load = lines(tmp_path)[0]["expert_load"]
    np.testing.assert_allclose(np.mean(load), 1.0, atol=2e-3)
    events = [json.loads(line) for line in (tmp_path / "run" / "goodput.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "saved"] == ["started", "goodput"]
    assert sorted(event["step"] for event in events if event["event"] == "saved") == [2, 4, 6]
    seconds = events[-1]["seconds"]
    assert sum(seconds.values()) == pytest.approx(events[-1]["wall"] + seconds["lost"], rel=0.01)
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    assert heard[0] == (tmp_path / "run", 6) and heard[-1] == ("closed",)
    assert [entry[0] for entry in heard if isinstance(entry[-1], list) and "loss" in entry[-1]] == [1, 2, 3, 4, 5, 6]
    assert [entry[0] for entry in heard if entry[-1] == "sample"] == [3]


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


def test_changes_of_a_run_that_goes_on_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = yaml_file(tmp_path)
    train(read_run(path, ["stop_after=2"]))
    train(read_run(path, ["stop_after=3", "save.keep=5"]))
    assert "changed since: stop_after 2 -> 3, save " in capsys.readouterr().out


def test_a_journal_survives_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    journal = report.Journal(path)
    journal.write({"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert journal.read() == [{"step": 1}]
