"""Fine-tuning on a few conversations teaches the answers, the template and where a turn ends."""

import json
from pathlib import Path

import exaone_jax
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.text import complete
from exaone_jax.text import encode_chat
from exaone_jax.training.loop import train
from exaone_jax.training.setup import initial_state, set_up
from exaone_jax.training.step import trained_model
from tests.training.runs import DENSE, small_run

ANSWERS = {"red": "rouge", "blue": "bleu", "green": "vert", "white": "blanc", "black": "noir", "grey": "gris"}
WIDER = {"hidden_size": 48, "intermediate_size": 96, "head_dim": 24, "num_heads": 2}


def test_a_tuned_model_answers_and_stops_at_the_end_of_its_turn(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    turns = (({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in ANSWERS.items())
    path.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns))
    layers = [{"norm": "post"}, {"norm": "post"}]
    config = small_run(
        tmp_path,
        model=DENSE | WIDER | {"layers": layers},
        data={"sources": [{"path": str(path)}], "epochs": None},
        context=64,
        steps=150,
        save={"every": 150},
        optimizer={"learning_rate": 1e-2, "warmup": 10},
        export=str(tmp_path / "tuned"),
    )
    train(config)
    setup = set_up(config)
    model = exaone_jax.load(tmp_path / "tuned")
    chats = ([{"role": "user", "content": each}] for each in ANSWERS)
    prompts = [encode_chat(setup.tokenizer, chat, setup.template, enable_thinking=False).ids for chat in chats]
    found = complete(model, setup.tokenizer, prompts, SamplingParams(max_new_tokens=40))
    assert [each.text.strip() for each in found] == list(ANSWERS.values())
    assert {each.finish_reason for each in found} == {"stop"}
    fresh = trained_model(setup.graphdef, initial_state(setup))
    found = complete(fresh, setup.tokenizer, prompts, SamplingParams(max_new_tokens=40))
    assert not any(each.text.strip() in ANSWERS.values() for each in found)
