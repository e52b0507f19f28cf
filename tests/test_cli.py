"""The command line: what it prints where, and every exit code."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import exaone_jax
from exaone_jax import cli
from exaone_jax.text import Tokenizer, train_bpe
from tests.golden.cases import CASES
from tests.golden.weights import random_tensors, write_checkpoint

PROGRAM = [sys.executable, "-m", "exaone_jax.cli"]
BRIEF = ["--max-new-tokens", "6"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([Path(json.__file__).read_text(encoding="utf-8")], 700)


def _checkpoint(directory: Path, case: str, tokenizer: Tokenizer) -> Path:
    """The last two layers of the case, a window and a global one: half the time to compile."""
    config = CASES[case] | {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 2}
    for key in ("layer_types", "mlp_layer_types", "is_moe_layer", "sliding_windows"):
        if key in config:
            config[key] = config[key][-2:]
    config |= {"sliding_window_pattern": "LG", "first_k_dense_replace": 0}
    write_checkpoint(directory, config, random_tensors(config, seed=3))
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A small K-EXAONE with an MTP layer, as Hugging Face writes it."""
    return _checkpoint(tmp_path_factory.mktemp("k-exaone"), "exaone_moe-mtp", tokenizer)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    capsys.readouterr()
    code = cli.main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


class StdinOf:
    """Standard input that is no terminal."""

    def __init__(self, content: bytes):
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


# -- the program


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("inspect", "convert", "generate", "chat"))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == exaone_jax.__version__


def test_no_arguments_show_the_help(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert "inspect" in captured.out
    assert "error" not in captured.err


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "x", "--bogus"], ["bogus"], ["convert", "verify", "a"]])
def test_wrong_usage(capsys, arguments):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "--help" in captured.err
    assert captured.out == ""


def test_an_error_can_be_json(capsys):
    code, out = run_json(capsys, "inspect", "K-EXAONE-236B-A23C")
    assert code == 2
    assert out["error"]["type"] == "ConfigError"
    assert out["error"]["exit_code"] == 2
    assert "K-EXAONE-236B-A23B" in out["error"]["message"]
    code, out = run_json(capsys, "inspect", "--bogus")
    assert (code, out["error"]["type"]) == (2, "UsageError")


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 3), (MemoryError(), 70)]
)
def test_what_a_verb_raises(monkeypatch, capsys, raised, code):
    def fail(_: object) -> None:
        raise raised

    monkeypatch.setattr("exaone_jax.planning.inspect.inspect_model", fail)
    assert cli.main(["inspect", "x"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code == 70)  # a fault of ours keeps its traceback


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_output_that_nobody_reads_or_that_does_not_fit(as_json):
    command = [*PROGRAM, "inspect", "EXAONE-4.0-32B", *as_json]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        assert (program.stderr.read(), program.wait()) == ("", 141)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 3
    assert result.stderr.strip() == "error: [Errno 28] No space left on device"


# -- inspect


def test_inspect(capsys):
    code, out = run_json(capsys, "inspect", "K-EXAONE-236B-A23B")
    assert code == 0
    keys = ("model_type", "parameters", "tensors", "bytes", "layers", "kv_bytes_per_token")
    assert [out[key] for key in keys[:3]] == ["exaone_moe", 237_099_669_632, 18_688]
    assert set(keys) <= out.keys()
    assert cli.main(["inspect", "K-EXAONE-236B-A23B"]) == 0
    assert "237,099,669,632" in capsys.readouterr().out


# -- convert


def test_convert_there_and_back(capsys, checkpoint, tmp_path):
    native, again = tmp_path / "native", tmp_path / "again"
    code, plan = run_json(capsys, "convert", "from-hf", checkpoint, native, "--dry-run")
    assert (code, plan["dry_run"]) == (0, True)
    assert not native.exists()
    code, report = run_json(capsys, "convert", "from-hf", checkpoint, native)
    assert code == 0
    assert report["tensors"] == plan["tensors"] > 0
    assert cli.main(["convert", "to-hf", str(native), str(again)]) == 0
    assert f"{report['tensors']:,} tensors" in capsys.readouterr().out
    for file in sorted(checkpoint.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    code, same = run_json(capsys, "convert", "verify", checkpoint, native)
    assert (code, same["ok"], same["tensors"]) == (0, True, report["tensors"])


def test_convert_leaves_an_output_that_exists(capsys, checkpoint, tmp_path):
    native = tmp_path / "native"
    assert cli.main(["convert", "from-hf", str(checkpoint), str(native)]) == 0
    assert cli.main(["convert", "from-hf", str(checkpoint), str(native)]) == 3
    assert str(native) in capsys.readouterr().err
    assert cli.main(["convert", "from-hf", str(checkpoint), str(native), "--overwrite"]) == 0


def test_verify_finds_a_difference(capsys, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = random_tensors(config, seed=3)
    tensors["model.norm.weight"][5] += np.float32(1e-6)
    other = write_checkpoint(tmp_path / "other", config, tensors)
    assert cli.main(["convert", "verify", str(checkpoint), str(other)]) == 1
    assert "model.norm.weight" in capsys.readouterr().out
    code, out = run_json(capsys, "convert", "verify", checkpoint, other)
    assert (code, out["different"]) == (1, {"model.norm.weight": 1})


# -- generate


def test_generate_is_the_same_from_everywhere_and_with_mtp(capsys, monkeypatch, checkpoint, tmp_path):
    prompt = "def load(file):\n    return"
    code, out = run_json(capsys, "generate", checkpoint, prompt, *BRIEF)
    assert code == 0
    assert (len(out["tokens"]), out["finish_reason"], out["drafted"]) == (6, "length", 0)
    code, drafted = run_json(capsys, "generate", checkpoint, prompt, *BRIEF, "--mtp")
    assert (code, drafted["tokens"]) == (0, out["tokens"])
    assert drafted["drafted"] > 0
    code, spread = run_json(capsys, "generate", checkpoint, prompt, *BRIEF, "--mesh", "fsdp=4,expert=2")
    assert (code, spread["tokens"]) == (0, out["tokens"])
    file = tmp_path / "prompt.txt"
    file.write_text(prompt)
    assert cli.main(["generate", str(checkpoint), "--prompt-file", str(file), *BRIEF]) == 0
    assert capsys.readouterr().out == out["text"] + "\n"
    monkeypatch.setattr(sys, "stdin", StdinOf(prompt.encode()))
    code, piped = run_json(capsys, "generate", checkpoint, *BRIEF)
    assert (code, piped["text"]) == (0, out["text"])


def test_generate_with_a_seed(capsys, checkpoint):
    sampling = [*BRIEF, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.99, "--min-p", 0.001]
    penalties = ["--presence-penalty", 0.5, "--frequency-penalty", 0.5, "--repetition-penalty", 1.1]
    texts = [
        run_json(capsys, "generate", checkpoint, "import", *sampling, *penalties, "--seed", seed)[1]["tokens"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_generate_ends_before_a_stop_string(capsys, checkpoint):
    _, whole = run_json(capsys, "generate", checkpoint, "import", *BRIEF)
    stop = whole["text"][2:4]
    code, out = run_json(capsys, "generate", checkpoint, "import", *BRIEF, "--stop", stop, "--stop", "never this")
    assert (code, out["finish_reason"]) == (0, "stop")
    assert out["text"] == whole["text"][: whole["text"].index(stop)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "--prompt-file", "x"], "both"),
        (["--prompt-file", "not/there"], "not/there"),
        ([""], "empty"),
        (["import", "--temperature", "-1"], "temperature"),
        (["import", "--top-p", "0"], "top_p"),
        (["import", "--max-new-tokens", "100000"], "context"),
        (["import", "--dtype", "int8"], "int8"),
    ],
)
def test_generate_refuses(capsys, checkpoint, arguments, message):
    assert cli.main(["generate", str(checkpoint), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_generate_refuses_a_prompt_that_is_no_text(capsys, monkeypatch, checkpoint):
    monkeypatch.setattr(sys, "stdin", StdinOf(b"abc\xff"))
    assert cli.main(["generate", str(checkpoint)]) == 2
    assert "not UTF-8 text: byte 0xff at 3" in capsys.readouterr().err


def test_generate_needs_a_checkpoint_and_its_mtp_layer(capsys, tokenizer, tmp_path):
    assert cli.main(["generate", str(tmp_path / "none"), "import"]) == 2
    dense = _checkpoint(tmp_path / "dense", "exaone4-hybrid-80", tokenizer)
    assert cli.main(["generate", str(dense), "import", "--mtp"]) == 2
    assert "no MTP layer" in capsys.readouterr().err


# -- chat


def test_chat_answers_line_by_line(capsys, monkeypatch, checkpoint):
    monkeypatch.setattr(sys, "stdin", StdinOf(b"Hello\n\nAnd again\n/clear\nHello\n"))
    assert cli.main(["chat", str(checkpoint), "--no-thinking", "--system", "Be brief.", *BRIEF, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["reasoning"] for answer in answers] == [None] * 3
    assert all(answer["content"] for answer in answers)
    assert answers[0] == answers[2], "/clear forgets"


def test_chat_goes_on_after_a_turn_that_failed_and_says_so_at_the_end(capsys, monkeypatch, checkpoint):
    monkeypatch.setattr(sys, "stdin", StdinOf(b"Hello\nno \xff text\n" + b"long " * 5000 + b"\nHello\n"))
    assert cli.main(["chat", str(checkpoint), "--no-thinking", *BRIEF, "--json"]) == 2
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(answer) == ["error"] for answer in answers] == [False, True, True, False]
    assert "not UTF-8 text: byte 0xff at 3" in answers[1]["error"]["message"]


def test_chat_shows_reasoning_apart(capsys, monkeypatch, checkpoint):
    monkeypatch.setattr(sys, "stdin", StdinOf(b"Hello\n"))
    assert cli.main(["chat", str(checkpoint), "--thinking", *BRIEF]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--- reasoning\n")
    assert len(out.splitlines()) >= 2
