"""Raises while its module body runs, before any `__main__` guard; a helper frame makes the traceback worth showing."""

GREETING = "this script never gets to its own main"


def settings() -> dict[str, int]:
    raise RuntimeError("raised at import, on purpose")


SETTINGS = settings()

if __name__ == "__main__":
    print(GREETING)
