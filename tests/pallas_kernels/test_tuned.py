"""Tables of block sizes: what is read, what the tuner writes, and that both are the same thing."""

import json

import pytest

from benchmarks import tpu_tune
from pallas_kernels import _tuned
from pallas_kernels.attention import tuned as attention_tuned
from pallas_kernels.paged_attention import tuned as paged_tuned

OPS = {"attention": attention_tuned, "paged_attention": paged_tuned}


@pytest.mark.parametrize("op", OPS)
def test_the_table_has_every_chip_and_is_as_the_tuner_writes_it(op, tmp_path):
    module = OPS[op]
    assert set(module.table()) == set(_tuned.CHIPS.values())
    _tuned.write_table(tmp_path / "tuned.json", module.table())
    assert (tmp_path / "tuned.json").read_text() == module.TABLE.read_text()
    assert all(tpu_tune.fits(sizes) for rows in module.table().values() for sizes in rows.values())


def test_chips_by_device_kind():
    kinds = {
        "TPU v5 lite": "v5e",
        "TPU v5e": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "TPU7x": "tpu7x",
    }
    assert {kind: _tuned.chip(kind) for kind in kinds} == kinds
    assert _tuned.chip("something new") == "v6e"


def test_a_shape_has_its_own_row_or_that_of_any():
    rows = {"v6e": {"any": "usual", "5x128": "own"}}
    assert _tuned.find(rows, "TPU v6 lite", 5, 128) == "own"
    assert _tuned.find(rows, "TPU v6 lite", 5, 64) == "usual"


@pytest.mark.parametrize("broken", ["fields", "any"])
def test_a_broken_table_is_named(broken, tmp_path):
    table = json.loads(paged_tuned.TABLE.read_text())
    if broken == "fields":
        table["v5e"]["any"]["row"] = table["v5e"]["any"].pop("rows")
    else:
        table["v5e"] = {"8x128": table["v5e"]["any"]}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"tuned.json: v5e .*{broken}"):
        _tuned.read_table(path, paged_tuned.Tiles)


def distance_to(best):
    """A cost whose least is at `best`; sizes with a larger first field do not compile."""

    def cost(args, case):
        def of(sizes):
            if sizes[0] > best[0]:
                return None
            return 1 + sum(abs(a - b) / b for a, b in zip(sizes, best, strict=True))

        return of

    return cost


@pytest.mark.parametrize("op", OPS)
def test_the_tuner_finds_the_least_and_writes_a_table_that_loads(op, tmp_path, capsys):
    module = OPS[op]
    path = tmp_path / "tuned.json"
    path.write_text(module.TABLE.read_text())
    before = module.table()["v5e"]["any"]
    wanted = before._replace(**{
        "attention": {"window_unroll": 8, "flash_keys": 256, "flash_rows_backward": 2048},
        "paged_attention": {"keys": 256, "block": 1024},
    }[op])  # fmt: skip
    tpu_tune.main([op, "--chip", "v5e", "--heads", "32", "8", "--table", str(path)], distance_to(wanted))
    table = _tuned.read_table(path, module.Tiles)
    assert _tuned.find(table, "TPU v5 lite", 4, 128) == wanted
    assert _tuned.find(table, "TPU v5 lite", 2, 128) == before
    changed = set(path.read_text().splitlines()) - set(module.TABLE.read_text().splitlines())
    assert len(changed) == 1
    if op == "attention":
        assert "refused" in capsys.readouterr().out


def test_sizes_that_do_not_compile_are_nothing_to_start_from(tmp_path):
    with pytest.raises(SystemExit, match="do not compile"):
        tpu_tune.main(["attention", "--table", str(attention_tuned.TABLE)], lambda args, case: lambda sizes: None)


def test_only_the_named_fields_are_tried(tmp_path):
    tried = []

    def cost(args, case):
        return lambda sizes: tried.append((case, sizes)) or 1.0

    path = tmp_path / "tuned.json"
    path.write_text(attention_tuned.TABLE.read_text())
    tpu_tune.main(["attention", "--fields", "flash_block", "--table", str(path)], cost)
    assert {case for case, _ in tried} == {"causal"}
    space = tpu_tune.SPACES["attention"]["causal"]["flash_block"]
    assert {sizes.flash_block for _, sizes in tried} == set(space)
    assert path.read_text() == attention_tuned.TABLE.read_text()
