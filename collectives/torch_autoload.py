"""Makes the name "elastic" known to torch, and imports the backend when it is first asked for.

torch calls `register` itself at `import torch` when the package is installed (entry point group `torch.backends`), so
`init_process_group("elastic")` needs no import of ours. It runs in every program that imports torch: it costs one
small import and cannot fail for want of anything that is not torch's.
"""

from typing import Any

NAME = "elastic"
DEVICES = ("cpu", "cuda")


def register() -> None:
    """Register the backend, once."""
    import torch.distributed as dist

    if dist.is_available() and NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=list(DEVICES))


def _create(backend_options: Any, group_options: Any) -> Any:
    from elastic_run.collectives.torch_backend import create

    return create(backend_options, group_options)
