"""Claim: a report of 20 runs with 200 evaluated checkpoints each is built in 10 s, has at most 5 MB, and can be used
within a second after a browser opens it.

Synthetic run folders in the real formats: 5,000 logged steps a run (10^5 in all), held-out losses of 200 checkpoints,
a suite of 30 tasks with 200 items at each of them, items and losses by document at both ends. Built by `cpt report` in
a process of its own, imports included. Then Chromium without a window: until the page's script is through, counted
from the start of the navigation, and how long a redraw of every figure takes when a run is hidden.

    python -m benchmarks.eval.report_size       # writes benchmarks/results/eval_report.json
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cpt" / "report"))

from chromium import Browser, browser_command  # noqa: E402
from run_stories import Exam, Story, evaluated_steps, write_document_losses, write_exam, write_run  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "eval_report.json"
RUNS, CHECKPOINTS, STEPS, TASKS = 20, 200, 5000, 30
BARS = {"build_seconds": 10.0, "megabytes": 5.0, "interactive_seconds": 1.0}
REDRAW = """new Promise((done) => {
  const start = performance.now();
  document.querySelector('.legend button').click();
  const wait = () => requestAnimationFrame(() => {
    if (document.querySelectorAll('.charts .r0.d0.line').length) wait(); else done(performance.now() - start);
  });
  wait();
})"""


def write_runs(folder: Path) -> list[Path]:
    roots = []
    for number in range(RUNS):
        share = number / RUNS
        story = Story(
            name=f"replay_{number:02d}",
            share_general=share,
            general_end=3.6 - 0.6 * share,
            domain_end=2.25 + 0.2 * share**2,
            steps=STEPS,
            evaluations=CHECKPOINTS,
        )
        root = write_run(folder, story)
        tasks = {
            f"task_{n:02d}": ("domain" if n % 3 == 0 else "general", (1 - share) * n / 100, 0.05) for n in range(TASKS)
        }
        write_exam(root, Exam(tasks), evaluated_steps(story))
        write_document_losses(root, story, documents=500)
        roots.append(root)
    return roots


def built(roots: list[Path], out: Path) -> tuple[float, float]:
    """Seconds by the clock, and of a processor: the latter say more on a machine that does something else, too."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "cpt.cli", "report", *map(str, roots), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - started, cpu


def read_in_browser(page: Path, profile: Path) -> dict[str, float]:
    ready, redraw = [], []
    with Browser(profile) as browser:
        for _ in range(4):
            with browser.open(page) as tab:
                ready.append(float(tab.run("document.documentElement.dataset.ready")) / 1000)
                redraw.append(float(tab.run(REDRAW)) / 1000)
                assert tab.complaints() == []
    # The first tab also waits for the browser's own start.
    return {"interactive_seconds": statistics.median(ready[1:]), "redraw_seconds": statistics.median(redraw[1:])}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        roots = write_runs(Path(scratch) / "runs")
        out = Path(scratch) / "out"
        seconds = [built(roots, out) for _ in range(3)]
        page = out / "index.html"
        found = {
            "runs": RUNS,
            "checkpoints": RUNS * CHECKPOINTS,
            "logged_steps": RUNS * STEPS,
            "build_seconds": statistics.median(wall for wall, _ in seconds),
            "build_cpu_seconds": statistics.median(cpu for _, cpu in seconds),
            "megabytes": page.stat().st_size / 1e6,
            "markdown_kilobytes": (out / "report.md").stat().st_size / 1e3,
        }
        if browser_command():
            found |= read_in_browser(page, Path(scratch) / "profile")
    found = {name: round(value, 3) for name, value in found.items()}
    bars = {name: {"bar": bar, "met": found[name] <= bar} for name, bar in BARS.items() if name in found}
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    RESULT.write_text(json.dumps({**found, "bars": bars, "machine": machine}, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
