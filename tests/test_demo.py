"""`make demo` end to end at its smallest, and that it fails where it must."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import exaone_jax
from exaone_jax.training import Evaluation

pytest.importorskip("matplotlib", reason="the demo draws its loss curve with matplotlib (extra: demo)")


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_quick_demo_trains_writes_loads_and_completes(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "def insort_left(" in printed
    for word in ("ln V", "tokens/s", "acceptance", "held-out loss", "loss.png", "exaone-jax inspect"):
        assert word in printed
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "loss.png", "text"]
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "exaone_moe"
    assert config["sliding_window"] == 128
    logits = exaone_jax.load(tmp_path / "hf")(np.array([[1, 2, 3]]))
    assert np.isfinite(logits).all()


def test_held_out_files_are_not_trained_on(demo: ModuleType) -> None:
    corpus = demo.gather(200_000)
    assert not set(corpus.train) & set(corpus.held_out)
    assert corpus.prompt.splitlines()[-1].startswith("def insort_left(")
    assert any(corpus.prompt in text for text in corpus.held_out)
    assert not any(corpus.prompt in text for text in corpus.train)
    assert demo.gather(200_000) == corpus


@pytest.mark.parametrize("after", [3.81, 7.6, float("nan")])
def test_a_loss_that_does_not_fall_enough_fails(demo: ModuleType, after: float) -> None:
    curve = demo.Curve([], Evaluation(7.6, 100, None), Evaluation(after, 100, None))
    with pytest.raises(demo.DemoError, match=r"must fall below 3\.8"):
        demo.check_target(curve, 0.5)


def test_a_failed_demo_exits_with_one(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise demo.DemoError("the loss is 9")

    monkeypatch.setattr(demo, "run", failing)
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert "the loss is 9" in capsys.readouterr().out


def test_another_models_logits_are_noticed(demo: ModuleType) -> None:
    def one(tokens: np.ndarray) -> np.ndarray:
        return np.zeros((*tokens.shape, 5), np.float32)

    def other(tokens: np.ndarray) -> np.ndarray:
        return one(tokens) + np.float32(0.1)

    assert demo.check_same_logits(one, one, np.zeros((1, 3), int)) == 0
    for wrong in (other, lambda tokens: one(tokens) * np.float32("nan")):
        with pytest.raises(demo.DemoError, match="differ"):
            demo.check_same_logits(one, wrong, np.zeros((1, 3), int))
