"""A checkpoint read onto eight devices: each part where the rules say, and the same logits as on one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax import nnx

from exaone_jax.checkpoints.convert import save_hf
from exaone_jax.config import LayerSpec, ModelConfig, MoEConfig
from exaone_jax.model import Transformer

LOCAL, GLOBAL = LayerSpec(window=8), LayerSpec(rope=False)
CONFIG = ModelConfig(
    model_type="exaone_moe",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LOCAL, *(layer.model_copy(update={"moe": True}) for layer in (LOCAL, LOCAL, GLOBAL))),
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, num_shared_experts=1, intermediate_size=16),
    mtp_layer=LayerSpec(),
    max_position_embeddings=128,
    initializer_range=0.2,
    dtype="float32",
)
# The number of CPU devices is fixed when jax starts, so eight of them need a process of their own.
PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from flax import nnx
import exaone_jax
from exaone_jax.parallel import MeshShape, make_mesh
directory, tokens, out = sys.argv[1:]
model = exaone_jax.load(directory, mesh=make_mesh(MeshShape.parse("fsdp=2,expert=2,tensor=2")))
np.save(out, np.asarray(model(np.load(tokens))))
parts = {".".join(map(str, path)): list(variable[...].addressable_shards[0].data.shape)
         for path, variable in nnx.to_flat_state(nnx.state(model))}
print(json.dumps(parts))
"""


def test_eight_devices_hold_parts_and_compute_the_same(tmp_path: Path):
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    save_hf(nnx.state(model), CONFIG, tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 24))
    np.save(tmp_path / "tokens.npy", tokens)
    arguments = [str(tmp_path / name) for name in ("hf", "tokens.npy", "logits.npy")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout)
    assert parts["embed.embedding"] == [48, 16]
    assert parts["segments.0.1.moe.experts.gate_proj"] == [1, 4, 8, 16]
    assert parts["segments.0.0.attention.o_proj.weight"] == [1, 16, 32]
    assert parts["norm.scale"] == [32]
    # float32 sums in another order over logits of order 1.
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), model(tokens), atol=2e-5)
