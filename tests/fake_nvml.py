"""Stands in for the module pynvml: answers with the GPUs of `gpus`, or not at all when `broken` is set."""

from types import SimpleNamespace

gpus: list[SimpleNamespace] = []
broken = False
opened: list[bool] = []
"""One entry for each nvmlInit without its nvmlShutdown."""


class NVMLError(Exception):
    pass


def set_gpus(*found: tuple[str, str]) -> None:
    """(uuid, model) of each; GPU n is on bus n + 1 of domain 0."""
    gpus[:] = [SimpleNamespace(uuid=uuid, model=model, bus=index + 1) for index, (uuid, model) in enumerate(found)]


def nvmlInit() -> None:
    if broken:
        raise NVMLError("Driver/library version mismatch")
    opened.append(True)


def nvmlShutdown() -> None:
    opened.pop()


def nvmlDeviceGetCount() -> int:
    return len(gpus)


def nvmlDeviceGetHandleByIndex(index: int) -> SimpleNamespace:
    return gpus[index]


def nvmlDeviceGetPciInfo(gpu: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(domain=0, bus=gpu.bus, device=0)


def nvmlDeviceGetUUID(gpu: SimpleNamespace) -> str:
    return str(gpu.uuid)


def nvmlDeviceGetName(gpu: SimpleNamespace) -> bytes:
    return str(gpu.model).encode()
