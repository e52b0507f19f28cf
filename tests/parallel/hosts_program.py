"""One process of a run on several hosts: two training steps on a mesh of all devices, and a hash of what came out.

python -m tests.parallel.hosts_program COORDINATOR PROCESSES RANK DEVICES [TIMEOUT] [VERSION]
"""

import hashlib
import json
import sys

import jax

from exaone_jax.parallel import hosts


def main() -> None:
    coordinator, processes, rank, devices = sys.argv[1:5]
    timeout, version = (*sys.argv[5:], *("60", "")[len(sys.argv) - 5 :])
    jax.config.update("jax_num_cpu_devices", int(devices))
    if version:
        hosts.versions = lambda: {"jax": version}
    hosts.start(hosts.Hosts(coordinator, int(processes), int(rank), int(timeout)))

    import numpy as np
    from flax import nnx

    from exaone_jax.parallel import MeshShape, init_model, make_mesh
    from exaone_jax.training import LossConfig, adamw, init_state, train_step
    from tests.parallel.small_model import CONFIG, GLOBAL, LOCAL, rows

    mesh = make_mesh(MeshShape.parse("fsdp=2,expert=2"))
    layers = (LOCAL, GLOBAL.model_copy(update={"moe": True}))
    model = init_model(CONFIG.model_copy(update={"layers": layers, "mtp_layer": None}), mesh)
    optimizer = adamw(lambda _: 1e-2, weight_decay=0.1, clip_norm=1.0)
    graphdef, state = init_state(model, optimizer)
    losses = []
    for _ in range(2):
        state, metrics = train_step(graphdef, state, rows(8, 40), optimizer=optimizer, loss=LossConfig())
        losses.append(float(metrics.loss.loss))
    digest = hashlib.sha256()
    for _, leaf in nnx.to_flat_state(state.params):
        whole = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))(leaf[...])
        digest.update(np.asarray(whole.addressable_shards[0].data).tobytes())
    print(json.dumps({"devices": jax.device_count(), "losses": losses, "sha256": digest.hexdigest()}))


if __name__ == "__main__":
    main()
