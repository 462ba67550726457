"""`python -m tests.gpu`: precision, out-of-memory and rate of the encode stage, as a table and as JSON.

Needs torch, transformers, pyarrow, pillow, numpy, pydantic, pyyaml, fsspec, tenacity and filelock; no
network, no Ray, no open_clip, no FAISS, no pytest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

NEEDED = ["torch", "transformers", "pyarrow", "PIL", "numpy", "pydantic", "yaml", "fsspec", "tenacity", "filelock"]


def main() -> int:
    """0: all within bounds, 1: something is not, 2: a module is missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda:0", help="as torch names it: cuda:0, cpu")
    parser.add_argument("--small", action="store_true", help="a small model and few images, for a CPU")
    arguments = parser.parse_args()
    missing = [module for module in NEEDED if find_spec(module) is None]
    if missing:
        print(f"Python modules are missing: {', '.join(missing)}. Install them and run the command again.")
        return 2
    rows = measured(arguments.device, arguments.small)
    for row in rows:
        verdict = {True: "ok", False: "FAILED", None: "-"}[row["passed"]]
        value = "" if row["value"] is None else f"{row['value']:.5g}"
        print(f"{row['check']:38} {value:>10}  {row['bound']:8} {verdict:7} {row['note']}")
    print(json.dumps({"device": device_name(arguments.device), "small": arguments.small, "rows": rows}))
    return int(any(row["passed"] is False for row in rows))


def measured(device: str, small: bool) -> list[dict[str, object]]:
    from pipelines.encoders import registry
    from tests.gpu import measure
    from tests.gpu.checkpoint import save_clip

    with tempfile.TemporaryDirectory() as folder:
        save_clip(Path(folder), small)
        spec = registry.describe(f"hf:{folder}")
        bench = measure.Bench(spec, folder, device, batch_size=8 if small else 256, images=32 if small else 64)
        checks = (measure.precision(bench), measure.out_of_memory(bench), measure.rate(bench, 4 if small else 16))
        return [asdict(row) for check in checks for row in check]


def device_name(device: str) -> str:
    import torch

    return (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    sys.exit(main())
