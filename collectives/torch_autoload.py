"""Makes the name "elastic" known to torch, and imports the backend when it is first asked for.

Workers of elastic-run call `register` when torch.distributed is imported, so `init_process_group("elastic")` needs no
import of ours there; elsewhere `import elastic_run.collectives.torch_backend` does it. It is written to serve as an
entry point of the group `torch.backends` too; the package declares none, because torch would then load it in every
program, and a user's own file named elastic_run.py would break `import torch`.
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
