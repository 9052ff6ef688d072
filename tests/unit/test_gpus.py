"""Which GPUs workers see, and in which order."""

from collections.abc import Iterator
from pathlib import Path

import fake_nvml
import pytest

from elastic_run.runtime.affinity import Refusal
from elastic_run.runtime.gpus import Gpu, list_gpus, visible_gpus

ALIKE = tuple(Gpu(pci_address=f"0000:{bus:02x}:00.0", uuid=f"GPU-{bus}abc", model="H") for bus in (1, 2, 3))
MIXED = (*ALIKE, Gpu(pci_address="0000:04:00.0", uuid="GPU-4abc", model="T"))


@pytest.fixture(autouse=True)
def nvml() -> Iterator[None]:
    fake_nvml.set_gpus(("GPU-a", "H"), ("GPU-b", "H"))
    yield
    fake_nvml.broken = False
    assert fake_nvml.opened == []


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    (tmp_path / "nvidiactl").touch()
    return tmp_path


def test_the_driver_tells_address_and_names(driver: Path) -> None:
    assert list_gpus(driver, "fake_nvml") == (
        Gpu(pci_address="0000:01:00.0", uuid="GPU-a", model="H"),
        Gpu(pci_address="0000:02:00.0", uuid="GPU-b", model="H"),
    )


def test_a_machine_without_a_driver_has_no_gpus_and_needs_no_binding(tmp_path: Path) -> None:
    fake_nvml.broken = True
    assert list_gpus(tmp_path, "fake_nvml") == list_gpus(tmp_path, "no_such_module") == ()


def test_a_driver_that_cannot_be_asked_is_a_refusal(driver: Path) -> None:
    missing = list_gpus(driver, "no_such_module")
    assert isinstance(missing, Refusal) and "pip install nvidia-ml-py" in missing.reason
    fake_nvml.broken = True
    broken = list_gpus(driver, "fake_nvml")
    assert isinstance(broken, Refusal) and "version mismatch" in broken.reason


@pytest.mark.parametrize(
    ("named", "buses"),
    [
        (None, "123"),
        ("", ""),
        ("2,0", "31"),
        ("GPU-2,0", "21"),
        ("0,9,1", "1"),
        ("1,-1,0", "2"),
        ("GPU-", ""),
        ("NoDevFiles", ""),
    ],
)
def test_cuda_visible_devices_chooses_and_orders(named: str | None, buses: str) -> None:
    environ = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    seen = visible_gpus(ALIKE, environ)
    assert not isinstance(seen, Refusal)
    assert [gpu.pci_address[6] for gpu in seen] == list(buses)


@pytest.mark.parametrize("environ", [{}, {"CUDA_VISIBLE_DEVICES": "0,1"}])
def test_an_order_that_only_cuda_knows_is_a_refusal(environ: dict[str, str]) -> None:
    seen = visible_gpus(MIXED, environ)
    assert isinstance(seen, Refusal) and "CUDA_DEVICE_ORDER=PCI_BUS_ID" in seen.reason
    assert not isinstance(visible_gpus(MIXED, environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}), Refusal)


def test_names_need_no_order_and_parts_of_gpus_are_refused() -> None:
    assert visible_gpus(MIXED, {"CUDA_VISIBLE_DEVICES": "GPU-4,GPU-1"}) == (MIXED[3], MIXED[0])
    assert isinstance(visible_gpus(ALIKE, {"CUDA_VISIBLE_DEVICES": "MIG-1"}), Refusal)
