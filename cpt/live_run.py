"""A run in this process: the objects that its hooks work with, and its diary."""

import json
import sys
from dataclasses import dataclass, field

from cpt.checkpoint.background import Saver
from cpt.checkpoint.upload import Uploader
from cpt.config import RunConfig
from cpt.data.skipping import SkippedRows
from cpt.eval.live_suite import LiveSuite
from cpt.model.build import LoadedModel
from cpt.prepare import Prepared
from cpt.rundir import RunDir, note_event
from cpt.train.engine import Engine, Topology
from cpt.train.guard import StopFlag
from cpt.train.metrics import MetricsHook
from cpt.train.phases import Phases, build_phases
from cpt.train.profiling import StepProfiler
from cpt.train.spikes import SpikeDetector


@dataclass
class Run:
    """What a run's hooks work with."""

    prepared: Prepared
    rundir: RunDir
    topology: Topology
    engine: Engine
    loaded: LoadedModel
    stop: StopFlag
    phases: Phases = field(init=False)
    saver: Saver = field(init=False)
    uploader: Uploader | None = None  # rank 0 alone copies checkpoints
    detector: SpikeDetector = field(init=False)
    metrics: MetricsHook | None = None  # rank 0 alone writes metrics
    profiler: StepProfiler | None = None  # where a trace was asked for
    suite: LiveSuite | None = None  # rank 0 alone knows the benchmarks
    evaluation_cut_short: bool = False
    skipped: SkippedRows = field(default_factory=SkippedRows)  # the rows that the guard leaves out

    def __post_init__(self) -> None:
        self.phases = build_phases(self.topology.device)
        self.detector = SpikeDetector(self.config.guard.spike_sigma, tokens_per_row=self.prepared.plan.seq_len)
        self.saver = Saver(rank=self.topology.rank, world_size=self.topology.world_size)
        if (url := self.config.checkpoint.upload_to) and self.topology.rank == 0:
            self.uploader = Uploader(url, self.config.run.name)

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    def event(self, name: str, step: int, **details: object) -> None:
        """Add a line to events.jsonl, from rank 0."""
        if self.topology.rank != 0:
            return
        try:
            note_event(name, step, self.rundir, **details)
        except OSError as error:  # a full disk must not end a run over its diary
            print(f"WARNING: could not note {name}, {json.dumps(details)}: {error}", file=sys.stderr, flush=True)
