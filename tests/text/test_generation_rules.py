import pytest

from exaone_jax.errors import ConfigError
from exaone_jax.text import RULES, ChatTemplate, Generation, detect_generation

G = Generation


@pytest.mark.parametrize(
    ("config", "template", "tokens", "expected"),
    [
        ({"model_type": "exaone"}, None, (), G.EXAONE_3),
        ({"model_type": "exaone"}, "[|assistant|]<thought>\n", (), G.DEEP),
        ({"model_type": "exaone", "_name_or_path": "LGAI-EXAONE/EXAONE-Deep-2.4B"}, None, (), G.DEEP),
        ({"model_type": "exaone4"}, None, ("[|assistant|]",), G.EXAONE_4),
        ({"model_type": "exaone4"}, None, ("<|assistant|>",), G.EXAONE_4_5),
        ({"model_type": "exaone4"}, "[|assistant|]", (), G.EXAONE_4),
        ({"model_type": "exaone4_5", "text_config": {"model_type": "exaone4_5_text"}}, None, (), G.EXAONE_4_5),
        ({"model_type": "exaone4_5_text"}, None, (), G.EXAONE_4_5),
        ({"model_type": "exaone_moe", "sliding_windows": [128, 0]}, None, (), G.K),
        ({"model_type": "exaone_moe", "swiglu_limits": [0.0, 7.0]}, None, (), G.K_2),
        ({"model_type": "exaone_moe"}, "<function=", (), G.K_2),
    ],
)
def test_detection(config, template, tokens, expected):
    assert detect_generation(config, template=template, tokens=tokens) is expected


@pytest.mark.parametrize("generation", Generation)
def test_a_builtin_template_is_detected_as_its_generation(generation):
    model_type = {"3": "exaone", "deep": "exaone", "4": "exaone4", "4.5": "exaone4"}.get(generation, "exaone_moe")
    template = ChatTemplate.for_generation(generation)
    assert detect_generation({"model_type": model_type}, template=template.source) is generation
    assert template.rules is RULES[generation]
    assert template.rules.template_kwargs <= template.variables


@pytest.mark.parametrize("model_type", [None, "llama", 3])
def test_unknown_model_type(model_type):
    with pytest.raises(ConfigError, match="model_type"):
        detect_generation({"model_type": model_type})
