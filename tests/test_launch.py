"""The launchers: the commands of a dry run, and a queued resource that is lost and asked for again."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "launch.py"
JOB = ["--", "python", "train.py", "name=a b"]


def launch(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **({} if path is None else {"PATH": f"{path}:{os.environ['PATH']}"})}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, *JOB], capture_output=True, text=True, check=False, env=env
    )


def commands(*arguments: str) -> list[list[str]]:
    done = launch(*arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize(("worker", "create"), [("all", []), ("0", ["--accelerator", "v6e-8"])])
def test_tpu_vm(worker: str, create: list[str]):
    found = commands("tpu-vm", "pod", "--zone", "us-east5-a", "--worker", worker, *create)
    if create:
        created = found.pop(0)
        assert created[3:6] == ["tpu-vm", "create", "pod"]
        assert created[6:] == ["--zone=us-east5-a", "--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e"]
    copied, installed, ran = found
    assert copied[4:] == [
        "scp",
        "--recurse",
        "--compress",
        ".",
        "pod:exaone_jax",
        "--zone=us-east5-a",
        f"--worker={worker}",
    ]
    assert "pip install" in installed[-1]
    assert ran[4:9] == ["ssh", "pod", "--zone=us-east5-a", f"--worker={worker}", "--batch-size=all"]
    assert ran[9].endswith("cd exaone_jax && python train.py 'name=a b'")


def test_queued():
    created, looked, *rest = commands("queued", "pod", "--zone", "z", "--accelerator", "v5p-64", "--spot")
    assert created[3:6] == ["queued-resources", "create", "pod"]
    assert created[6:] == [
        "--node-id=pod", "--zone=z", "--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5", "--spot"
    ]  # fmt: skip
    assert looked[4:] == ["describe", "pod", "--zone=z", "--format=value(state.state)"]
    copied, *_, ran = rest
    assert len(rest) == 3
    assert copied[3:5] == ["queued-resources", "scp"] and ran[3:5] == ["queued-resources", "ssh"]
    assert copied[-3:] == ["--zone=z", "--node=all", "--worker=all"]
    assert ran[5:10] == ["pod", "--zone=z", "--node=all", "--worker=all", "--batch-size=all"]


def test_queued_slices():
    created, *_ = commands("queued", "pod", "--zone", "z", "--accelerator", "v6e-256", "--slices", "4")
    assert created[5:] == [
        "pod", "--node-count=4", "--node-prefix=pod", "--zone=z", "--accelerator-type=v6e-256",
        "--runtime-version=v2-alpha-tpuv6e",
    ]  # fmt: skip
    done = launch("queued", "pod", "--zone", "z", "--accelerator", "v6e-256", "--slices", "0", "--dry-run")
    assert done.returncode == 2 and "--slices" in done.stderr


def test_gke_and_slurm():
    (created,) = commands("gke", "job", "--cluster", "c", "--tpu-type", "v5p-64", "--image", "i", "--slices", "2")
    assert created == [
        "xpk", "workload", "create", "--workload=job", "--cluster=c", "--tpu-type=v5p-64", "--num-slices=2",
        "--docker-image=i", "--command=python train.py 'name=a b'",
    ]  # fmt: skip
    (submitted,) = commands("slurm", "job", "--nodes", "4", "--gpus", "8", "--partition", "gpu")
    assert submitted == [
        "sbatch", "--job-name=job", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu",
        "--wrap=srun python train.py 'name=a b'",
    ]  # fmt: skip


def test_an_unknown_accelerator_is_refused():
    done = launch("queued", "pod", "--zone", "z", "--accelerator", "v99-8", "--dry-run")
    assert done.returncode == 2
    assert "'v99-8'" in done.stderr


GCLOUD = """#!/bin/sh
# Machines that are taken away once, while the command runs, and then stay.
echo "$4 $5" >> {log}
case "$4" in
  describe) if [ -e {taken} ] && ! [ -e {again} ]; then echo SUSPENDED; else echo ACTIVE; fi ;;
  delete) touch {again} ;;
  ssh) if ! [ -e {taken} ]; then touch {taken}; exit 255; fi ;;
esac
"""


def test_machines_that_are_taken_away_are_asked_for_again(tmp_path: Path):
    log, gcloud = tmp_path / "log", tmp_path / "gcloud"
    gcloud.write_text(GCLOUD.format(log=log, taken=tmp_path / "taken", again=tmp_path / "again"))
    gcloud.chmod(0o755)
    done = launch("queued", "pod", "--zone", "z", "--accelerator", "v5p-64", path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.split()[0] for line in log.read_text().splitlines()]
    assert said.count("create") == 2
    assert said.count("delete") == 1
    assert said[-1] == "ssh"
    assert "attempt 1 of 11: the machines are gone (SUSPENDED)" in done.stdout


def test_a_command_that_fails_on_machines_that_stay_ends_the_launch(tmp_path: Path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\ncase "$4" in describe) echo ACTIVE ;; ssh) exit 3 ;; esac\n')
    gcloud.chmod(0o755)
    assert launch("queued", "pod", "--zone", "z", "--accelerator", "v5p-64", path=tmp_path).returncode == 3
