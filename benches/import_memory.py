"""Memory that what pruning a folder imports takes, one after the other.

    python benches/import_memory.py

Resident memory, and what of it no file backs, which the kernel cannot take back. Prints Markdown.
"""

import ctypes
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from stream_prune import memory

LIBRARIES = ("libtorch_cpu.so", "libtorch_cuda.so")
MODULES = ("torch", "transformers", "transformers.modeling_utils", "moecollab.pruning.pruning")


def libraries():
    """Libraries of torch that are there; the second only where it is built for CUDA."""
    folder = Path(find_spec("torch").origin).parent / "lib"
    return [folder / name for name in LIBRARIES if (folder / name).exists()]


def show(name, began, before):
    """Prints one row; what is held now."""
    now = (memory("VmHWM"), memory("RssAnon"))
    cells = "".join(
        f"| {held:.0f} | {held - old:+.0f} " for held, old in zip(now, before, strict=True)
    )
    print(f"| {name} | {time.process_time() - began:.1f} {cells}|", flush=True)
    return now


def main() -> None:
    """Imports and prints."""
    print("| after | CPU s | MB resident | more | of these without a file | more |")
    print("| --- " + "| ---: " * 5 + "|")
    began = time.process_time()
    held = show("the interpreter", began, (0, 0))
    import_module("numpy")
    held = show("numpy", began, held)
    for library in libraries():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        held = show(library.name, began, held)
    for name in MODULES:
        import_module(name)
        held = show(name, began, held)


if __name__ == "__main__":
    main()
