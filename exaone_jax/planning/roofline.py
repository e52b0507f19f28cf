"""A lower bound on the time of a step, from published peaks: no program on these chips is faster, and most are slower."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from flax import nnx

from exaone_jax.config import ModelConfig
from exaone_jax.costs.chips import Chip
from exaone_jax.costs.workload import Workload
from exaone_jax.planning.inputs import StepInputs, device_bytes


@dataclass(frozen=True)
class Bound:
    """Seconds that each resource needs at its peak; all at once, the step takes at least the longest.

    link_seconds are of what stays within a slice, dcn_seconds of what leaves it.
    mfu: model FLOPs over what the chips could do in that time, the most that the step can reach.
    """

    compute_seconds: float
    hbm_seconds: float
    link_seconds: float
    dcn_seconds: float
    mfu: float

    @property
    def seconds(self) -> float:
        return max(self._times.values())

    @property
    def limited_by(self) -> str:
        return max(self._times, key=lambda name: self._times[name])

    @property
    def one_after_the_other(self) -> float:
        """Seconds of a step in which they did not overlap."""
        return sum(self._times.values())

    @property
    def _times(self) -> dict[str, float]:
        times = (self.compute_seconds, self.hbm_seconds, self.link_seconds, self.dcn_seconds)
        return dict(zip(("compute", "HBM", "links", "DCN"), times, strict=True))

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self) | {"seconds": self.seconds, "limited_by": self.limited_by}


def bound(
    chip: Chip, devices: int, flops: int, model_flops: int, hbm_bytes: int, sent_bytes: int, dcn_bytes: int
) -> Bound:
    """flops and model_flops over all devices; hbm_bytes, sent_bytes and of these dcn_bytes, that leave the slice, of one."""
    compute = flops / (devices * chip.flops / chip.devices)
    hbm = hbm_bytes / (chip.hbm_bandwidth / chip.devices)
    link = (sent_bytes - dcn_bytes) / (chip.link_bandwidth / chip.devices)
    dcn = dcn_bytes / (chip.dcn_bandwidth / chip.devices) if dcn_bytes else 0.0
    seconds = max(compute, hbm, link, dcn)
    return Bound(compute, hbm, link, dcn, model_flops / (seconds * devices * chip.flops / chip.devices))


def least_hbm_bytes(config: ModelConfig, work: Workload, inputs: StepInputs) -> int:
    """That a device must read or write: in training all that changes once each way, and what is frozen once; in serving its
    weights, of the experts those that an even router would choose, and its keys and values."""
    if work.mode == "train":
        return 2 * device_bytes((inputs.params, inputs.opt_state)) + device_bytes(inputs.frozen)
    routed = device_bytes([leaf for path, leaf in nnx.to_flat_state(inputs.params) if "experts" in path])
    total = device_bytes((inputs.params, inputs.router_biases, inputs.kv))
    if config.moe is None:
        return total
    untouched = (1 - config.moe.num_experts_per_tok / config.moe.num_experts) ** work.tokens
    return round(total - routed * untouched)
