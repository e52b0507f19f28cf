"""Model FLOPs: against counts by hand, position by position, and against published sizes."""

import pytest

from exaone_jax.config import published, read_config
from exaone_jax.costs.flops import forward_flops, step_flops, visible_keys
from exaone_jax.costs.workload import workload
from exaone_jax.errors import ConfigError
from exaone_jax.planning.inspect import inspect_model


@pytest.mark.parametrize("window", [None, 1, 5, 9, 40])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 20), (3, 4), (3, 30), (12, 30)])
def test_visible_keys_position_by_position(window: int | None, start: int, stop: int):
    expected = sum(min(p + 1, stop if window is None else window) for p in range(start, stop))
    assert visible_keys(start, stop, window) == expected


@pytest.mark.parametrize("name", ["EXAONE-4.0-32B", "K-EXAONE-236B-A23B"])
def test_a_token_multiplies_with_every_active_weight(name: str):
    inspection = inspect_model(name)
    config = inspection.config
    flops = forward_flops(config, workload(config, "decode", 1, 1000))
    # Active parameters count norms and router biases, which multiply no matrix: under a thousandth.
    matrices = flops.total - flops.attention
    assert 0.999 * 2 * inspection.active_parameters < matrices <= 2 * inspection.active_parameters
    windows = [min(1000, layer.window or 1000) for layer in config.layers]
    assert flops.attention == 4 * config.num_heads * config.head_dim * sum(windows)


def test_chunks_of_prefill_add_up_to_the_whole():
    config = read_config(published("EXAONE-4.0-32B"))
    whole = forward_flops(config, workload(config, "prefill", 2, 8192, 8192))
    parts = [forward_flops(config, workload(config, "prefill", 2, end, 2048)) for end in (2048, 4096, 6144, 8192)]
    assert sum(part.layers for part in parts) == whole.layers


def test_training_is_three_forward_passes_and_what_is_recomputed():
    config = read_config(published("K-EXAONE-236B-A23B"))
    none, dots, full = (step_flops(config, workload(config, "train", 8, 4096, remat=p)) for p in (None, "dots", "full"))
    assert none.model == dots.model == full.model == 3 * full.forward.total
    assert none.forward.mtp > none.forward.head  # the MTP layer has a pass through the head of its own
    assert 0 < none.recomputed < dots.recomputed < full.recomputed < full.forward.total * 1.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "serve"}, "mode: found 'serve'"),
        ({"context": 70000}, "context: found 70,000, expected 1 to 65,536"),
        ({"batch": 0}, "batch: found 0"),
        ({"chunk": 5}, "chunk: found 5 in mode train"),
        ({"remat": "some"}, "remat: found 'some'"),
    ],
)
def test_what_is_no_step_is_refused(change: dict, message: str):
    config = read_config(published("EXAONE-4.0-1.2B"))
    with pytest.raises(ConfigError, match=message):
        workload(config, **({"mode": "train", "batch": 1, "context": 128} | change))
