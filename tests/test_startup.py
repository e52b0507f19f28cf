"""Starting up is quick because nothing heavy is imported; benchmarks/startup.py prints the times."""

import subprocess
import sys

import pytest

HEAVY = ("jax", "jaxlib", "flax", "torch", "transformers", "orbax", "tensorstore", "grain", "numpy", "huggingface_hub")


def heavy_imports_after(code: str) -> list[str]:
    report = f"import sys; print('\\n' + ' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "code",
    [
        "import exaone_jax; exaone_jax.__version__; dir(exaone_jax)",
        "import exaone_jax.cli",
        "from exaone_jax.cli import main; main(['--help'])",
        "from exaone_jax.cli import main; main(['generate', '--help'])",
    ],
    ids=["import", "import cli", "--help", "generate --help"],
)
def test_nothing_heavy_is_imported(code):
    assert heavy_imports_after(code) == []


def test_inspect_needs_no_jax():
    code = "from exaone_jax.cli import main; main(['inspect', 'K-EXAONE-236B-A23B'])"
    assert {"jax", "flax", "torch", "transformers"}.isdisjoint(heavy_imports_after(code))


def test_the_public_names_are_found_when_used():
    result = subprocess.run(
        [sys.executable, "-c", "import exaone_jax; print(exaone_jax.load.__name__, exaone_jax.generate.__name__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["load", "generate"]


def test_an_unknown_name_is_an_attribute_error():
    import exaone_jax

    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        exaone_jax.lode  # noqa: B018
