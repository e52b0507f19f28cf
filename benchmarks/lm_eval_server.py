"""lm-eval's `local-completions` against a running server, and the same log-likelihoods computed in this process.

    python -m venv /tmp/lme && /tmp/lme/bin/pip install 'lm-eval[api]==0.4.13' transformers==5.23.0
    exaone-jax serve --model CHECKPOINT --port 8000 --dtype float32
    python benchmarks/lm_eval_server.py --model CHECKPOINT --lm-eval /tmp/lme/bin/lm_eval --url http://127.0.0.1:8000

Forty questions with four answers each, made up here, so nothing is downloaded. lm-eval sends prompts as token ids with echo;
every one of its log-likelihoods must be what the model's own logits say, within `--tolerance` (1e-3 in float32: sums over an
answer's tokens), with the same verdict whether the answer is the greedy one. Exit code 1: one is not.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exaone_jax
from exaone_jax.model import Transformer
from exaone_jax.text import Tokenizer

TASK = """\
task: made_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
WORDS = ["the answer", "question", "library", "대한민국", "서울", "수도는", "in the", "is", "글자", "않는다"]


def write_task(folder: Path, questions: int) -> None:
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    docs = [{"question": words(rng.randint(2, 12)), "answers": [words(3) for _ in range(4)]} for _ in range(questions)]
    file = folder / "docs.jsonl"
    file.write_text("".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs), encoding="utf-8")
    (folder / "made_up.yaml").write_text(TASK.format(file=file), encoding="utf-8")


def run_lm_eval(program: str, url: str, checkpoint: Path, folder: Path) -> list[dict]:
    """The samples that it logged."""
    served = f"base_url={url}/v1/completions,tokenizer={checkpoint},tokenizer_backend=huggingface,num_concurrent=4"
    command = [
        program,
        "--model",
        "local-completions",
        "--model_args",
        f"{served},tokenized_requests=True,max_length=512",
    ]
    command += ["--tasks", "made_up", "--include_path", str(folder), "--output_path", str(folder), "--log_samples"]
    subprocess.run(command, check=True, env={**os.environ, "OPENAI_API_KEY": "none", "NO_PROXY": "*"})
    (file,) = folder.rglob("samples_made_up*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lm-eval", required=True, help="the program, in an environment of its own")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_task(Path(name), given.questions)
        samples = run_lm_eval(given.lm_eval, given.url, given.model.resolve(), Path(name))
    model, tokenizer = exaone_jax.load(given.model, dtype="float32"), Tokenizer.from_directory(given.model)
    worst, verdicts, count = 0.0, 0, 0
    for sample in samples:
        for asked, (answer,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            expected, greedy = score(model, tokenizer, asked["arg_0"], asked["arg_1"])
            worst = max(worst, abs(float(answer[0]) - expected))
            verdicts += (str(answer[1]) == "True") != greedy
            count += 1
    print(f"{count} log-likelihoods, largest difference {worst:.2e}, verdicts that differ: {verdicts}")
    return int(worst > given.tolerance or verdicts > 0 or count != 4 * given.questions)


def score(model: Transformer, tokenizer: Tokenizer, context: str, answer: str) -> tuple[float, bool]:
    """(log-likelihood of an answer, whether it is the greedy one), its tokens being those beyond the context's."""
    start = len(before := tokenizer.encode(context))
    whole = [*before, *tokenizer.encode(context + answer)[start:]]  # as lm-eval, which sends just this
    padded = np.zeros((1, -(-len(whole) // 64) * 64), np.int32)  # few lengths, so few programs; nothing looks ahead
    padded[0, : len(whole)] = whole
    log_probs = np.asarray(jax.nn.log_softmax(model(padded)[0].astype(np.float32)))[start - 1 : len(whole) - 1]
    told = whole[start:]
    return float(log_probs[np.arange(len(told)), told].sum()), bool((log_probs.argmax(-1) == told).all())


if __name__ == "__main__":
    raise SystemExit(main())
