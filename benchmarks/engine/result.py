"""Where the benchmarks of the engine leave their figures, and what machine they say they ran on."""

import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def write_result(name: str, figures: dict[str, Any]) -> None:
    """``figures`` with the machine they were measured on, as ``benchmarks/results/NAME``; printed too."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = {"device": device, "cpus": os.cpu_count(), "python": platform.python_version()}
    text = json.dumps({**figures, "machine": {**machine, "torch": torch.__version__}}, indent=1)
    (RESULTS / name).write_text(text + "\n")
    print(text)
