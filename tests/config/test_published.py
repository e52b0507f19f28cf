"""The published models as data: layer plans, and parameter, tensor and byte counts to the last one."""

import pytest

from exaone_jax.checkpoints.names import totals
from exaone_jax.config import layer_plan, published, published_names, read_config
from exaone_jax.planning.inspect import inspect_model

# name: parameters, tensors, bytes of tensor data, layer plan.
# The counts of the last three are published, those of K-EXAONE 236B with the total_size of its index. Of the others the
# parameters are known; their tensors follow from the names (9 a layer in 3.x, 11 in 4.0, and 2 or 3 around the layers)
# and their bytes are 2 a parameter, for nothing in them is float32.
PUBLISHED = {
    "EXAONE-3.0-7.8B-Instruct": (7_818_448_896, 291, 15_636_897_792, "32 x [Gr]"),
    "EXAONE-3.5-2.4B-Instruct": (2_405_327_360, 272, 4_810_654_720, "30 x [Gr]"),
    "EXAONE-3.5-7.8B-Instruct": (7_818_448_896, 291, 15_636_897_792, "32 x [Gr]"),
    "EXAONE-3.5-32B-Instruct": (32_003_200_000, 579, 64_006_400_000, "64 x [Gr]"),
    "EXAONE-Deep-2.4B": (2_405_327_360, 272, 4_810_654_720, "30 x [Gr]"),
    "EXAONE-Deep-7.8B": (7_818_448_896, 291, 15_636_897_792, "32 x [Gr]"),
    "EXAONE-Deep-32B": (32_003_200_000, 579, 64_006_400_000, "64 x [Gr]"),
    "EXAONE-4.0-1.2B": (1_279_391_488, 332, 2_558_782_976, "30 x [Gr]"),
    "EXAONE-4.0-32B": (32_003_216_384, 707, 64_006_432_768, "16 x [L4096 L4096 L4096 G]"),
    "EXAONE-4.0.1-32B": (32_003_216_384, 707, 64_006_432_768, "16 x [L4096 L4096 L4096 G]"),
    "EXAONE-4.5-33B": (34_350_097_664, 1_064, 68_700_195_328, "16 x [L4096 L4096 L4096 G]"),
    "K-EXAONE-236B-A23B": (
        237_099_669_632,
        18_688,
        474_199_351_296,
        "1 x [L128d L128 L128 G] + 11 x [L128 L128 L128 G]",
    ),
    "K-EXAONE-2.0-750B-A37B": (
        749_357_484_800,
        59_396,
        1_498_715_008_512,
        "1 x [Gd L4096d] + 15 x [L128 L128 L128 G] + 4 x [L128c7 L128c7 L128c7 Gc7]",
    ),
}


def test_the_list_is_complete():
    assert set(published_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts(name):
    found = totals(read_config(published(name)))
    assert (found.parameters, found.tensors, found.bytes) == PUBLISHED[name][:3]


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_plan(name):
    config = read_config(published(name))
    assert inspect_model(name).plan == PUBLISHED[name][3]
    segments = layer_plan(config.layers)
    assert tuple(layer for s in segments for _ in range(s.repeats) for layer in s.pattern) == config.layers


def test_without_their_mtp_layer():
    main = {"K-EXAONE-236B-A23B": 236_571_156_352, "K-EXAONE-2.0-750B-A37B": 748_828_971_520}
    for name, parameters in main.items():
        config = read_config(published(name)).model_copy(update={"mtp_layer": None})
        assert totals(config).parameters == parameters


def test_head_dim_is_not_always_hidden_over_heads():
    config = read_config(published("K-EXAONE-236B-A23B"))
    assert config.num_heads * config.head_dim == 8192 != config.hidden_size
    assert read_config(published("EXAONE-3.5-2.4B-Instruct")).head_dim == 80
    assert read_config(published("EXAONE-4.5-33B")).head_dim == 128


def test_k_exaone_2_by_layer():
    layers = read_config(published("K-EXAONE-2.0-750B-A37B")).layers
    assert [layer.window for layer in layers[:6]] == [None, 4096, 128, 128, 128, None]
    assert sum(layer.window == 128 for layer in layers) == 57
    assert sum(layer.window is None for layer in layers) == 20
    assert [layer.swiglu_limit for layer in layers] == [None] * 62 + [7.0] * 16
    assert [layer.moe for layer in layers] == [False] * 2 + [True] * 76
