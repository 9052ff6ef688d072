"""Lists the NVIDIA GPUs that a worker sees, in the order in which torch.cuda numbers them, without loading torch.

Invariants (tests/unit/test_gpus.py):
1. An order that cannot be known is a refusal, never a guess.
2. A machine without the driver needs no NVML binding.
Not here: where on the machine a GPU is (numa_binding.py).
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_run.runtime.affinity import Refusal

NVML_MODULE = "pynvml"
CONTROL_DEVICE = "nvidiactl"
VISIBLE = "CUDA_VISIBLE_DEVICES"
GPUS_MAX = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    pci_address: str
    """As in sysfs: `0000:dc:00.0`."""
    uuid: str
    model: str


def find_gpus(devices: Path, environ: Mapping[str, str]) -> tuple[Gpu, ...] | Refusal:
    """Return the GPUs that workers with this environment see, by index. The driver is not asked when they see none."""
    if not environ.get(VISIBLE, "all").strip():
        return ()
    found = list_gpus(devices)
    return found if isinstance(found, Refusal) else visible_gpus(found, environ)


def list_gpus(devices: Path, nvml_module: str = NVML_MODULE) -> tuple[Gpu, ...] | Refusal:
    """Return the machine's GPUs in PCI order; none without a driver. `devices`: /dev, where the driver shows itself."""
    driver = (devices / CONTROL_DEVICE).exists()
    try:
        nvml: Any = importlib.import_module(nvml_module)
    except ImportError:
        if not driver:
            return ()
        return Refusal(reason="nvidia-ml-py is needed to find this machine's NVIDIA GPUs: pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Refusal(reason=f"the NVIDIA driver does not answer ({error}); leave the flag out") if driver else ()
    try:
        count = min(nvml.nvmlDeviceGetCount(), GPUS_MAX)
        return tuple(_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count))
    except nvml.NVMLError as error:
        return Refusal(reason=f"the NVIDIA driver does not tell about the GPUs ({error}); leave the flag out")
    finally:
        nvml.nvmlShutdown()


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[Gpu, ...] | Refusal:
    """Return those that CUDA_VISIBLE_DEVICES leaves, in its order. As in CUDA, its first wrong entry ends the list."""
    named = environ.get(VISIBLE)
    if named is None:
        return _in_cuda_order(gpus, environ)
    chosen: list[Gpu] = []
    by_index = False
    for entry in (item.strip() for item in named.split(",")):
        if entry.startswith("MIG-"):
            return Refusal(reason="CUDA_VISIBLE_DEVICES names MIG instances, which are not placed; leave the flag out")
        if entry.isdecimal():
            by_index = True
            found = gpus[int(entry) : int(entry) + 1]
        else:
            found = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        if len(found) != 1:
            break
        chosen.append(found[0])
    known = _in_cuda_order(gpus, environ) if by_index else gpus
    return known if isinstance(known, Refusal) else tuple(chosen)


def _in_cuda_order(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[Gpu, ...] | Refusal:
    """CUDA numbers the fastest first; among GPUs of one model that is the order on the PCI bus."""
    if environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and len({gpu.model for gpu in gpus}) > 1:
        return Refusal(reason="the GPUs are of several models; set CUDA_DEVICE_ORDER=PCI_BUS_ID to fix their order")
    return tuple(gpus)


def _gpu(nvml: Any, handle: Any) -> Gpu:
    pci = nvml.nvmlDeviceGetPciInfo(handle)
    return Gpu(
        pci_address=f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0",
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        model=_text(nvml.nvmlDeviceGetName(handle)),
    )


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value  # bytes before nvidia-ml-py 12
