"""Tries to open a laboratory without a right (`rights`) or without the TUN device (`tun`) and prints the refusal."""

import ctypes
import sys

from elastic_run.chaos.network import kernel
from elastic_run.chaos.network.lab import Lab, LabUnavailable

PR_CAPBSET_DROP = 24
CAP_SYS_ADMIN = 21


def main(lack: str) -> None:
    if lack == "rights":  # takes effect in the programs that this process starts
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0)
    else:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("tmpfs", "/dev/net", "tmpfs", 0)
    try:
        Lab(("a", "b")).close()
    except LabUnavailable as error:
        print(error)


if __name__ == "__main__":
    main(sys.argv[1])
