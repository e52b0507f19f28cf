"""What a compiled program takes."""

import jax


def program_bytes(program: jax.stages.Compiled) -> int:
    """All that a device allocates for a compiled program, its arguments included.

    On a TPU it is what the compiler holds against the chip's HBM. jax before 0.11 does not state it: there it is arguments,
    results and temporaries, which is up to 1.4 times as much, for buffers that follow one another in one place count twice.
    """
    stats = program.memory_analysis()
    if stats is None:
        raise RuntimeError("this backend does not say what memory its programs take")
    parts = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    parts += stats.output_size_in_bytes - stats.alias_size_in_bytes  # what is given back in place of an argument
    return getattr(stats, "total_allocation_bytes", parts)
