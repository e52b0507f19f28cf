"""A run's YAML: what it is based on, what overrides it, and what is wrong with it said by name."""

from pathlib import Path

import pytest
import yaml

from exaone_jax.config.run import dump_run, parse_run, read_run
from exaone_jax.errors import ConfigError
from tests.training.runs import raw_run, yaml_file


def test_overrides_reach_into_mappings_and_lists(tmp_path: Path) -> None:
    changes = (
        "steps=10",
        "optimizer.learning_rate=1e-4",
        "data.sources.0.weight=2.5",
        "mesh=fsdp=2,tensor=4",
        "ema=null",
    )
    run = read_run(yaml_file(tmp_path), changes)
    assert (run.steps, run.optimizer.learning_rate, run.data.sources[0].weight) == (10, 1e-4, 2.5)
    assert (run.mesh, run.ema) == ("fsdp=2,tensor=4", None)
    assert run.optimizer.warmup == 2  # a sibling stays


def test_a_base_is_merged_key_by_key(tmp_path: Path) -> None:
    yaml_file(tmp_path)
    above = tmp_path / "above.yaml"
    above.write_text("base: run.yaml\nsteps: 9\noptimizer: {name: muon}\n")
    run = read_run(above)
    assert (run.steps, run.optimizer.name, run.optimizer.learning_rate) == (9, "muon", 1e-2)


def test_what_is_dumped_reads_back_the_same(tmp_path: Path) -> None:
    run = read_run(yaml_file(tmp_path), ["stages=[{start: 3, context: 32}]", "profile_steps=[1, 2]"])
    assert parse_run(yaml.safe_load(dump_run(run)), "dumped") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown key stepz; did you mean steps?"),
        ("optimizer.learning_rat=3", r"unknown key optimizer.learning_rat; did you mean learning_rate\?"),
        ("model.hiden_size=3", r"unknown key model.hiden_size; did you mean hidden_size\?"),
        ("data.sources.0.wait=3", r"unknown key data.sources.0.wait; did you mean weight\?"),
        ("guard.zzz=3", "unknown key guard.zzz; expected one of .*hang_seconds"),
        ("steps=many", 'steps: found "many": Input should be a valid integer'),
        ("steps=true", "steps: found true: Input should be a valid integer"),
        ("steps=0", "steps: found 0: Input should be greater than 0"),
        ("optimizer.learning_rate='1'", 'optimizer.learning_rate: found "1": Input should be a valid number'),
        ("dtype=float8", 'dtype: found "float8": Input should be'),
        ("trackers=[mlflow]", "trackers.0: found"),
        ("optimizer=null", "optimizer: found null"),
        ("stages=[{start: 6, context: 32}]", "stages must start in order between step 1 and steps 6, found"),
        ("evaluate.every=2", "evaluate.every needs data.eval_sources"),
        ("profile_steps=[3, 3]", "profile_steps must be"),
        ("model=null", "needs `model`"),
        ("tokenizer=null", "needs `tokenizer`"),
        ("data.sources.7.path=x", "'7' is no place in a list of 1"),
        ("steps", "found 'steps', expected key=value"),
        ("steps=[", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_run(yaml_file(tmp_path), [override])


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    raw = raw_run(tmp_path) | {"stepz": 1, "seed": "a"}
    del raw["context"]
    with pytest.raises(ConfigError) as caught:
        parse_run(raw, "x.yaml")
    assert {line.split(":")[1].split()[0] for line in str(caught.value).splitlines()} == {"context", "seed", "unknown"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "line 1: steps is given twice"),
        ("- 1\n", "found list, expected a mapping"),
        ("base: again.yaml\n", "is its own base"),
        ("base: [1]\n", r"base: found \[1\]"),
        ("base: nowhere.yaml\n", "nowhere.yaml: cannot be read"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "again.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(path)
