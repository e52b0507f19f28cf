"""How many tokens stay in memory: a hybrid model beside the same model with every window taken away.

    python benchmarks/kv_residency.py [--model K-EXAONE-236B-A23B] [--sequences 100] [--drafts 2] [--draft-window 1024]

Sequences of one length, no two alike, are read in chunks by the engine's own allocator, with prefix caching and MTP on, until the
next one finds no page. The memory is what `--sequences` of them take without windows. Nothing is computed, so it needs
no accelerator. `--draft-window`: the MTP layer reads so many positions back only, as the engine's setting of that name.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exaone_jax.config.hf import published, read_config
from exaone_jax.config.model import ModelConfig
from exaone_jax.inference.engine import FUSED_STEPS, written_ahead
from exaone_jax.inference.pools import Holding, KeyChain, PoolRequest, Pools, plan_pools

LENGTHS = (1024, 8192, 32_768, 131_072, 262_144)
CHUNK, PAGE = 512, 32


def all_full(config: ModelConfig) -> ModelConfig:
    """The same layers, none with a window."""
    layers = tuple(layer.model_copy(update={"window": None}) for layer in config.layers)
    mtp = config.mtp_layer and config.mtp_layer.model_copy(update={"window": None})
    return config.model_copy(update={"layers": layers, "mtp_layer": mtp})


def drafting_in(config: ModelConfig, window: int | None) -> ModelConfig:
    """The model whose MTP layer has this window; None: as it was trained."""
    if config.mtp_layer is None or window is None:
        return config
    return config.model_copy(update={"mtp_layer": config.mtp_layer.model_copy(update={"window": window})})


def full_bytes(config: ModelConfig, length: int) -> int:
    """Of one sequence without windows, in bfloat16, with a page to go on."""
    layers = config.num_layers + (config.mtp_layer is not None)
    return layers * 2 * config.num_kv_heads * config.head_dim * 2 * (length + PAGE)


def resident_tokens(config: ModelConfig, length: int, memory: int, *, sequences: int, drafts: int) -> int:
    """Tokens of the sequences, at most so many, that fit into `memory` bytes of bfloat16 pages, ready to decode on."""
    ahead = written_ahead(drafts)
    ask = PoolRequest(
        page_size=PAGE,
        max_length=length + PAGE,
        max_sequences=sequences,
        rows=CHUNK,
        ahead=ahead,
        spare=written_ahead(drafts, FUSED_STEPS) - ahead,
        typical_length=length + PAGE,
        dtype="bfloat16",
        mtp=drafts > 0,
    )
    planned = plan_pools(config, ask, memory)
    pools = Pools(planned, PAGE, sequences)
    for sequence in range(sequences):
        holding, tokens = Holding(len(planned)), range(length + 1)
        keys = KeyChain(PAGE, lookahead=int(drafts > 0), salt=str(sequence)).extend(tokens)
        for start in range(0, length, CHUNK):
            end = min(start + CHUNK, length)
            pools.pass_by(holding, start)
            if not pools.reserve(sequence, holding, start, end):
                return sequence * length
            pools.publish(holding, keys, end)
        pools.pass_by(holding, length)
        if not pools.reserve(sequence, holding, length, length + ahead):
            return sequence * length
    return sequences * length


def ratio(
    config: ModelConfig, length: int, *, sequences: int, drafts: int, draft_window: int | None
) -> tuple[int, int]:
    """(resident tokens, those of the model without windows) in the memory that the latter fills."""
    memory = sequences * full_bytes(config, length)
    most = sequences * (config.num_layers + 1)
    return (
        resident_tokens(drafting_in(config, draft_window), length, memory, sequences=most, drafts=drafts),
        resident_tokens(all_full(config), length, memory, sequences=most, drafts=drafts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="K-EXAONE-236B-A23B")
    parser.add_argument("--sequences", type=int, default=100)
    parser.add_argument("--drafts", type=int, default=2)
    parser.add_argument("--draft-window", type=int, default=None)
    args = parser.parse_args()
    config = read_config(published(args.model))
    kept = f"read {args.draft_window} positions back" if args.draft_window else "as trained"
    print(f"{args.model}, bfloat16, pages of {PAGE}, {args.drafts} drafts, {kept}")
    print("| tokens a sequence | GiB | resident tokens | all full | ratio |\n|---|---|---|---|---|")
    for length in (n for n in LENGTHS if n <= config.max_position_embeddings):
        sequences = max(20, args.sequences * 8192 // length)
        hybrid, full = ratio(config, length, sequences=sequences, drafts=args.drafts, draft_window=args.draft_window)
        memory = sequences * full_bytes(config, length) / (1 << 30)
        print(f"| {length:,} | {memory:,.0f} | {hybrid:,} | {full:,} | {hybrid / full:.2f} |")


if __name__ == "__main__":
    main()
