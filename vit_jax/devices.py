"""Peak FLOP rates and memory of accelerators: the denominator of MFU, and what `plan` fills."""

import dataclasses

from vit_jax.errors import UserError, did_you_mean

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator as JAX counts them (`jax.devices()`): a GPU, a TPU chip, or, on TPU v2 and
    v3, one of a chip's two cores.

    Attributes:
      name: what `--device` is given.
      kinds: `jax.Device.device_kind` of this accelerator.
      bf16_flops: FLOPs per second of dense bfloat16 matrix products with float32 accumulation, at
        most. Vendors often print twice as much, which holds for 2:4 sparse matrices only.
      memory_bytes: of a GPU what its driver reports (nvidia-smi, with ECC), of a TPU its HBM.
      source: where the FLOPs come from.
    """

    name: str
    kinds: tuple[str, ...]
    bf16_flops: float
    memory_bytes: int
    source: str

    @property
    def is_nvidia(self) -> bool:
        return self.kinds[0].startswith("NVIDIA")


# V100 and T4 are not here: they have no bfloat16 tensor cores.
DEVICES = (
    Device("a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 40_960 * _MIB,
           "NVIDIA A100 datasheet"),
    Device("a100-80gb", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 312e12, 81_920 * _MIB,
           "NVIDIA A100 datasheet"),
    Device("h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 81_559 * _MIB,
           "NVIDIA H100 whitepaper, SXM5"),
    Device("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 81_559 * _MIB,
           "NVIDIA H100 whitepaper, PCIe"),
    Device("h100-nvl", ("NVIDIA H100 NVL",), 835.5e12, 95_830 * _MIB,
           "NVIDIA H100 datasheet, NVL: 1,671 TFLOPS with sparsity"),
    Device("h200", ("NVIDIA H200",), 989.5e12, 143_771 * _MIB,
           "NVIDIA H200 datasheet, SXM: 1,979 TFLOPS with sparsity"),
    Device("h200-nvl", ("NVIDIA H200 NVL",), 835.5e12, 143_771 * _MIB,
           "NVIDIA H200 datasheet, NVL: 1,671 TFLOPS with sparsity"),
    Device("gh200", ("NVIDIA GH200 480GB", "NVIDIA GH200 120GB"), 990e12, 97_871 * _MIB,
           "NVIDIA GH200 datasheet, 96 GB of HBM3"),
    Device("gh200-144gb", ("NVIDIA GH200 144G HBM3e",), 990e12, 146_831 * _MIB,
           "NVIDIA GH200 datasheet, 144 GB of HBM3e"),
    Device("b200", ("NVIDIA B200",), 2_250e12, 183_359 * _MIB,
           "NVIDIA DGX B200 datasheet: 36 PFLOPS with sparsity on 8 GPUs"),
    Device("l4", ("NVIDIA L4",), 121e12, 23_034 * _MIB,
           "NVIDIA L4 datasheet: 242 TFLOPS with sparsity"),
    Device("l40s", ("NVIDIA L40S",), 362.05e12, 46_068 * _MIB, "NVIDIA L40S datasheet"),
    Device("a10g", ("NVIDIA A10G",), 70e12, 23_028 * _MIB, "NVIDIA A10G datasheet for AWS"),
    Device("rtx-4090", ("NVIDIA GeForce RTX 4090",), 165.2e12, 24_564 * _MIB,
           "NVIDIA Ada whitepaper, BF16 with FP32 accumulate"),
    Device("tpu-v2", ("TPU v2",), 23e12, 8 * 1024 * _MIB,
           "Jouppi et al., CACM 63(7), 2020, table 3: 46 TFLOPS a chip of 2 cores"),
    Device("tpu-v3", ("TPU v3",), 61.5e12, 16 * 1024 * _MIB,
           "Cloud TPU documentation: 123 TFLOPS a chip of 2 cores"),
    Device("tpu-v4", ("TPU v4",), 275e12, 32 * 1024 * _MIB, "Cloud TPU documentation"),
    Device("tpu-v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * 1024 * _MIB,
           "Cloud TPU documentation"),
    Device("tpu-v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * 1024 * _MIB, "Cloud TPU documentation"),
    Device("tpu-v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * 1024 * _MIB,
           "Cloud TPU documentation"),
)


def find(device_kind: str) -> Device | None:
    """The accelerator that JAX calls `device_kind`; None where it is not in the table. Kinds are
    compared whole, so a new card never gets an old one's numbers."""
    return next((device for device in DEVICES if device_kind in device.kinds), None)


def named(name: str) -> Device:
    """The accelerator of `--device=NAME`, in any case.

    Raises:
      UserError: there is none.
    """
    for device in DEVICES:
        if name.lower() == device.name:
            return device
    names = [device.name for device in DEVICES]
    raise UserError(f"--device={name} is not known{did_you_mean(name, names)} "
                    f"There are {', '.join(names)}.")


def train_flops(forward_flops: float) -> float:
    """FLOPs of training on an image whose forward pass takes `forward_flops`: 3 times as many,
    since the backward pass multiplies twice for every forward product (gradients of inputs and of
    weights)."""
    return 3.0 * forward_flops


def mfu(images_per_second: float, forward_flops: float, device: Device) -> float:
    """Model FLOPs utilisation: the share of a device's peak that goes into the model.

    images/s per device x training FLOPs per image / peak bfloat16 FLOPs, as PaLM defines it (arXiv
    2204.02311, appendix B): what `remat` computes a second time does not count, so that the number
    compares runs by how fast they train.

    Args:
      images_per_second: of one device.
      forward_flops: of one image, the `needed_flops` of `vit_jax.models.summary.summarize`.
      device: the accelerator.
    """
    return images_per_second * train_flops(forward_flops) / device.bf16_flops
