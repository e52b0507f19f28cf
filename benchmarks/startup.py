"""How long starting takes: `import exaone_jax` (goal: under 1.5 s) and `exaone-jax --help` (goal: under 1 s), best of several."""

import subprocess
import sys
import time

RUNS = 5
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import exaone_jax": ["-c", "import exaone_jax"],
    "import exaone_jax; exaone_jax.load": ["-c", "import exaone_jax; exaone_jax.load"],
    "exaone-jax --help": ["-m", "exaone_jax.cli", "--help"],
    "exaone-jax inspect K-EXAONE-236B-A23B": ["-m", "exaone_jax.cli", "inspect", "K-EXAONE-236B-A23B"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    for name, arguments in COMMANDS.items():
        times = sorted(seconds(arguments) for _ in range(RUNS))
        print(f"{name:40} best {times[0]:6.3f} s   worst {times[-1]:6.3f} s")


if __name__ == "__main__":
    main()
