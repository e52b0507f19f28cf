"""Run a command on every host of a TPU or GPU machine: TPU VMs, queued resources, GKE by xpk, Slurm.

    python scripts/launch.py tpu-vm NAME --zone ZONE --dry-run -- python my_training.py
    python scripts/launch.py queued NAME --zone ZONE --accelerator v5p-64 --spot -- python my_training.py
    python scripts/launch.py queued NAME --zone ZONE --accelerator v6e-256 --slices 4 -- python my_training.py
    python scripts/launch.py gke NAME --cluster CLUSTER --tpu-type v5p-64 --image IMAGE -- python my_training.py
    python scripts/launch.py slurm NAME --nodes 4 --gpus 8 -- python my_training.py

What runs calls `exaone_jax.parallel.hosts.start()` first, which finds the other hosts from what these environments set. With
--dry-run the commands are printed and nothing runs. `gcloud`, `xpk` and `sbatch` come from their own installations.
"""

import shlex
import subprocess
import time
from dataclasses import dataclass
from typing import Annotated

import typer

# Cloud TPU software, by the generation that an accelerator type begins with.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v6e": "v2-alpha-tpuv6e",
}
INSTALL = "cd exaone_jax && python3 -m venv ../venv && ../venv/bin/pip install --quiet '.[tpu]'"
SECONDS_BETWEEN_LOOKS = 60
_LOST = {"FAILED", "SUSPENDED"}  # what a queued resource ends in when its machines are taken or cannot be had

Command = Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run on every host.")]
Name = Annotated[str, typer.Argument(help="Of the machine or job.")]
Zone = Annotated[str, typer.Option(help="Cloud zone, as us-east5-a.")]
Slices = Annotated[
    int, typer.Option("--slices", min=1, help="How many, which the mesh's data and fsdp axes may cross.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none.")]
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def run(command: list[str], dry_run: bool) -> None:
    """Print a command, and unless this is a dry run, run it; a failure ends the launch with its exit code."""
    print("+", shlex.join(command), flush=True)
    if not dry_run and (code := subprocess.run(command, check=False).returncode):
        raise typer.Exit(code)


@dataclass(frozen=True)
class Hosts:
    """kind: of gcloud's commands, by which they are reached. where: options that say which."""

    name: str
    kind: str
    where: tuple[str, ...]

    def copy(self) -> list[str]:
        """This checkout."""
        copied = ["scp", "--recurse", "--compress", ".", f"{self.name}:exaone_jax"]
        return ["gcloud", "compute", "tpus", self.kind, *copied, *self.where]

    def ssh(self, command: str) -> list[str]:
        """On all at once: by itself gcloud runs on 64 and then on the next, and those would wait for each other."""
        at_once = [*self.where, "--batch-size=all", f"--command={command}"]
        return ["gcloud", "compute", "tpus", self.kind, "ssh", self.name, *at_once]


def install_and_run(hosts: Hosts, command: list[str], dry_run: bool) -> None:
    """Copy this checkout to the hosts, install it there, and run the command in its environment."""
    run(hosts.copy(), dry_run)
    run(hosts.ssh(INSTALL), dry_run)
    run(hosts.ssh(f"source venv/bin/activate && cd exaone_jax && {shlex.join(command)}"), dry_run)


def runtime_of(accelerator: str) -> str:
    generation = accelerator.partition("-")[0]
    if generation not in RUNTIMES:
        raise typer.BadParameter(f"found {accelerator!r}, expected a type that begins with {', '.join(RUNTIMES)}")
    return RUNTIMES[generation]


@app.command("tpu-vm")
def tpu_vm(
    name: Name,
    command: Command,
    zone: Zone,
    worker: Annotated[str, typer.Option(help="Which hosts: a number, or all.")] = "all",
    accelerator: Annotated[str | None, typer.Option(help="Create the machine first, of this type, as v6e-8.")] = None,
    dry_run: DryRun = False,
) -> None:
    """On a TPU VM that exists, or is created: one host or all."""
    if accelerator is not None:
        kind = [f"--accelerator-type={accelerator}", f"--version={runtime_of(accelerator)}"]
        run(["gcloud", "compute", "tpus", "tpu-vm", "create", name, f"--zone={zone}", *kind], dry_run)
    install_and_run(Hosts(name, "tpu-vm", (f"--zone={zone}", f"--worker={worker}")), command, dry_run)


@app.command()
def queued(
    name: Name,
    command: Command,
    zone: Zone,
    accelerator: Annotated[str, typer.Option(help="As v5p-64.")],
    spot: Annotated[bool, typer.Option("--spot", help="Cheaper machines that may be taken away.")] = False,
    slices: Slices = 1,
    retries: Annotated[int, typer.Option(min=0, help="How often to ask again after machines were taken.")] = 10,
    dry_run: DryRun = False,
) -> None:
    """On a queued resource of one slice or several: ask, wait, run; ask again when its machines are taken away."""
    base = ["gcloud", "compute", "tpus", "queued-resources"]
    kind = [f"--accelerator-type={accelerator}", f"--runtime-version={runtime_of(accelerator)}"]
    nodes = [f"--node-id={name}"] if slices == 1 else [f"--node-count={slices}", f"--node-prefix={name}"]
    create = [*base, "create", name, *nodes, f"--zone={zone}", *kind, *(["--spot"] if spot else [])]
    delete = [*base, "delete", name, f"--zone={zone}", "--force", "--quiet"]
    describe = [*base, "describe", name, f"--zone={zone}", "--format=value(state.state)"]
    hosts = Hosts(name, "queued-resources", (f"--zone={zone}", "--node=all", "--worker=all"))
    for attempt in range(retries + 1):
        run(create, dry_run)
        state = wait_until_settled(describe, dry_run)
        if state == "ACTIVE":
            try:
                install_and_run(hosts, command, dry_run)
                return
            except typer.Exit:
                if look(describe) not in _LOST:  # the command itself failed: its machines are still there
                    raise
        print(f"attempt {attempt + 1} of {retries + 1}: the machines are gone ({look(describe)})", flush=True)
        run(delete, dry_run)
    raise typer.Exit(1)


def look(describe: list[str]) -> str:
    """The state of a queued resource."""
    return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()


def wait_until_settled(describe: list[str], dry_run: bool) -> str:
    """ACTIVE, or how it was lost."""
    print("+", shlex.join(describe), flush=True)
    if dry_run:
        return "ACTIVE"
    while (state := look(describe)) not in {"ACTIVE", *_LOST}:
        print(f"{time.strftime('%H:%M:%S')} {state}", flush=True)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return state


@app.command()
def gke(
    name: Name,
    command: Command,
    cluster: Annotated[str, typer.Option(help="An xpk cluster.")],
    tpu_type: Annotated[str, typer.Option(help="As v5p-64.")],
    image: Annotated[str, typer.Option(help="Container image with exaone_jax in it.")],
    zone: Annotated[str | None, typer.Option(help="Where the cluster is; gcloud's own if not given.")] = None,
    slices: Slices = 1,
    dry_run: DryRun = False,
) -> None:
    """On GKE, by xpk."""
    place = [f"--cluster={cluster}", *([] if zone is None else [f"--zone={zone}"])]
    kind = [f"--tpu-type={tpu_type}", f"--num-slices={slices}", f"--docker-image={image}"]
    run(["xpk", "workload", "create", f"--workload={name}", *place, *kind, f"--command={shlex.join(command)}"], dry_run)


@app.command()
def slurm(
    name: Name,
    command: Command,
    nodes: Annotated[int, typer.Option(min=1)],
    gpus: Annotated[int, typer.Option(min=1, help="Of a node; one process each.")] = 8,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    dry_run: DryRun = False,
) -> None:
    """On GPUs, by Slurm: one process a GPU, which is what jax takes Slurm to mean."""
    wanted = [f"--nodes={nodes}", f"--ntasks-per-node={gpus}", f"--gpus-per-node={gpus}"]
    where = [] if partition is None else [f"--partition={partition}"]
    run(["sbatch", f"--job-name={name}", *wanted, *where, f"--wrap=srun {shlex.join(command)}"], dry_run)


if __name__ == "__main__":
    app()
