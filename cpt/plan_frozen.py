"""The frozen plan of a run: stages of rows, the one stage look-up, and ``plan.json`` with its fingerprint.

Owns how steps, tokens and rows of a plan map to each other. How a plan comes about is ``cpt.plan``'s, which row of a
source comes when is the sampler's business. Refuses a plan whose parts contradict each other, and a ``plan.json`` that
was cut short or edited.

Worked example: rows of 8 tokens, 4 of them a step, so 32 tokens; a stage of 2 steps, then one of 3 steps with rows of
16 tokens, 2 a step. Rows 0 to 7 belong to the first stage, rows 8 to 13 to the second; step 3 holds rows 10 and 11,
and 96 tokens were seen before it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.json_fields import check_integer, check_text, take_fields, take_list
from cpt.plan_parts import PlanSource, Stage
from cpt.quotas import apportion
from cpt.rundir import DataError, write_atomic

FORMAT_VERSION = 1
RARE: Mapping[str, Any] = {"in_order": False, "rows_by_length": (), "seq_len": None}  # of sources and stages
MAX_BLOCK_ROWS = 65_536  # the sampler sorts one block per look-up


@dataclass(frozen=True)
class Plan:
    """The whole order of a run, up to the sampler's arithmetic.

    A step holds ``global_batch_rows`` rows of ``seq_len`` tokens. A stage with rows of its own length has so many of
    them in a step that its tokens are the same: tokens and steps are proportional all along, rows are not.
    """

    seed: int
    seq_len: int
    global_batch_rows: int
    block_rows: int
    sources: tuple[PlanSource, ...]
    stages: tuple[Stage, ...]
    packing: str = "concat"

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, low=0)
        check_integer("seq_len", self.seq_len, low=1)
        check_integer("global_batch_rows", self.global_batch_rows, low=1)
        if check_integer("block_rows", self.block_rows, low=1) > MAX_BLOCK_ROWS:
            raise DataError(f"block_rows is {self.block_rows}; it must be at most {MAX_BLOCK_ROWS}")
        check_text("packing", self.packing)
        _check_sources(self)
        _check_stages(self)

    @property
    def global_batch_tokens(self) -> int:
        return self.seq_len * self.global_batch_rows

    @property
    def num_rows(self) -> int:
        return self.stages[-1].end_row if self.stages else 0

    @property
    def num_steps(self) -> int:
        return int(self._first_steps[-1])

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.global_batch_tokens

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Row lengths of the stages, in order of first use."""
        return tuple(dict.fromkeys(map(self.seq_len_of, range(len(self.stages)))))

    def seq_len_of(self, stage: int) -> int:
        return self.stages[stage].seq_len or self.seq_len

    def rows_per_step(self, stage: int) -> int:
        return self.step_rows(self.seq_len_of(stage))

    def step_rows(self, seq_len: int) -> int:
        """Rows of ``seq_len`` tokens in a step; raises DataError where a step is not whole rows of that length."""
        if self.global_batch_tokens % seq_len:
            raise DataError(f"a step of {self.global_batch_tokens} tokens does not divide into rows of {seq_len}")
        return self.global_batch_tokens // seq_len

    def epoch_rows(self, source: int, seq_len: int) -> int:
        """Rows of ``seq_len`` tokens that one pass over a source has; 0 where it is not packed so."""
        found = self.sources[source]
        return found.num_rows if seq_len == self.seq_len else dict(found.rows_by_length).get(seq_len, 0)

    def first_step(self, stage: int) -> int:
        return int(self._first_steps[stage])

    def stage_of_step(self, step: int) -> int:
        assert 0 <= step < self.num_steps, f"step {step} lies outside the plan's {self.num_steps} steps"
        return int(np.searchsorted(self._first_steps, step, side="right")) - 1

    def rows_before(self, step: int) -> int:
        """Rows of the first ``step`` steps, all stages together: the first row of step number ``step``."""
        if step == self.num_steps:
            return self.num_rows
        stage = self.stage_of_step(step)
        return self.stages[stage].start_row + (step - self.first_step(stage)) * self.rows_per_step(stage)

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex characters of the SHA-256 of the canonical JSON; any changed field changes it."""
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def _stage_starts(self) -> NDArray[np.int64]:
        return np.array([stage.start_row for stage in self.stages], dtype=np.int64)

    @cached_property
    def _first_steps(self) -> NDArray[np.int64]:
        """Of every stage, and then the number of steps."""
        steps = [stage.num_rows // self.rows_per_step(index) for index, stage in enumerate(self.stages)]
        return np.cumsum([0, *steps], dtype=np.int64)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def stages_at(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Stage index of each global row (any shape). The only stage look-up of the project."""
        return np.searchsorted(self._stage_starts, rows, side="right").astype(np.int64) - 1

    def stage_at(self, row: int) -> int:
        assert 0 <= row < self.num_rows, f"row {row} lies outside the plan's {self.num_rows} rows"
        return int(self.stages_at(np.array([row]))[0])

    def shares(self, stage: int) -> dict[str, float]:
        """Share of tokens by source in one stage; they sum to 1."""
        counts = self.stages[stage].block_counts
        return {source.name: count / self.block_rows for source, count in zip(self.sources, counts, strict=True)}

    def rows_by_source(self, stage: int | None = None) -> dict[str, int]:
        """Planned rows of one stage, or of all (None). Only a stage's last, partial block may turn out a row off."""
        return self._summed(stage, lambda source, seq_len, rows: rows)

    def tokens_by_source(self, stage: int | None = None) -> dict[str, int]:
        return self._summed(stage, lambda source, seq_len, rows: rows * seq_len)

    def epochs_by_source(self, stage: int | None = None) -> dict[str, float]:
        """How often each source's rows are seen, fractional, in one stage or in all (None)."""
        return self._summed(
            stage, lambda source, seq_len, rows: rows / self.epoch_rows(source, seq_len) if rows else 0.0
        )

    def _summed(self, stage: int | None, amount: Callable[[int, int, int], Any]) -> dict[str, Any]:
        """``amount`` (source, row length, planned rows of it) of every source, summed over row lengths."""
        chosen = range(len(self.stages)) if stage is None else [stage]
        sums: list[Any] = [0] * len(self.sources)
        for seq_len in self.seq_lens:
            same = [self.stages[index] for index in chosen if self.seq_len_of(index) == seq_len]
            if total := sum(each.num_rows for each in same):
                drawn = [sum(each.block_counts[i] * each.num_rows for each in same) for i in range(len(sums))]
                for i, rows in enumerate(apportion(drawn, total)):
                    sums[i] += amount(i, seq_len, rows)
        return {source.name: sums[i] for i, source in enumerate(self.sources)}

    def share_general(self, stage: int | None = None) -> float:
        tokens = self.tokens_by_source(stage)
        general = sum(tokens[source.name] for source in self.sources if source.group == "general")
        return general / sum(tokens.values())

    def share_domain(self, stage: int | None = None) -> float:
        return 1 - self.share_general(stage)

    def to_json(self) -> str:
        content = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, **self._content()}
        return json.dumps(content, indent=1) + "\n"

    def _content(self) -> dict[str, Any]:
        """What few plans use is written where it is used only: all others keep file and fingerprint."""
        content = asdict(self)
        for part in (*content["sources"], *content["stages"]):
            for name, unused in RARE.items():
                if part.get(name) == unused:
                    part.pop(name, None)
        return content

    @classmethod
    def from_json(cls, text: str | bytes) -> "Plan":
        """Raises DataError: not JSON, another format, a field that is missing, unknown or breaks its rule, an edit."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a complete JSON file ({error})") from error
        if isinstance(raw, dict) and raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version")
            raise DataError(f"format_version is {found!r:.80}; this version of cpt reads {FORMAT_VERSION}")
        fields = take_fields(raw, cls, "plan", extra=("format_version", "fingerprint"))
        stated = fields.pop("fingerprint")
        del fields["format_version"]
        fields["sources"] = take_list(_whole(fields["sources"], PlanSource), PlanSource, "sources")
        fields["stages"] = take_list(_whole(fields["stages"], Stage), Stage, "stages")
        plan = cls(**fields)
        if not plan.stages:
            raise DataError("stages is empty; a plan has at least one")
        if stated != plan.fingerprint:
            raise DataError(f"fingerprint is {stated!r:.80} but the content gives {plan.fingerprint!r}; it was edited")
        return plan


def _whole(parts: Any, kind: type[PlanSource | Stage]) -> Any:
    """Sources or stages as they are read, with what ``Plan._content`` left out."""
    if not isinstance(parts, list):
        return parts
    rare = {name: unused for name, unused in RARE.items() if name in kind.__dataclass_fields__}
    found = [{**rare, **part} if isinstance(part, dict) else part for part in parts]
    for part in found:
        if isinstance(part, dict) and isinstance(part.get("rows_by_length"), list):
            part["rows_by_length"] = tuple(
                tuple(pair) if isinstance(pair, list) else pair for pair in part["rows_by_length"]
            )
    return found


def write_plan(path: Path, plan: Plan) -> None:
    write_atomic(path, plan.to_json())


def read_plan(path: Path) -> Plan:
    """Raises DataError naming the file, the field and the fix."""
    try:
        return Plan.from_json(path.read_bytes())
    except (OSError, DataError) as error:
        raise DataError(f"{path}: {error}. Restore the file from a copy, or plan the run again.") from error


def _check_sources(plan: Plan) -> None:
    seen: set[str] = set()
    for source in plan.sources:
        if source.name in seen:
            raise DataError(f"sources name {source.name!r} twice; every source has its own name")
        seen.add(source.name)
        concat = plan.packing == "concat" or source.in_order  # any other rule would undo a source's order
        for seq_len, rows in ((plan.seq_len, source.num_rows), *source.rows_by_length):
            if concat and rows * seq_len > source.num_tokens:
                raise DataError(
                    f"num_rows of source {source.name!r} is {rows}, but {source.num_tokens} tokens hold at most "
                    f"{source.num_tokens // seq_len} rows of {seq_len}"
                )


def _check_stages(plan: Plan) -> None:
    end = 0
    for index, stage in enumerate(plan.stages):
        where = f"stages[{index}]"
        if stage.start_row != end:
            raise DataError(f"{where}.start_row is {stage.start_row}; it must be {end}, where the stage before ends")
        rows = plan.rows_per_step(index)
        if stage.num_rows % rows:
            unit = (
                f"global_batch_rows {rows}" if stage.seq_len is None else f"{rows} after start_row, the rows of a step"
            )
            raise DataError(f"{where}.end_row is {stage.end_row}; it must be a multiple of {unit}")
        if len(stage.block_counts) != len(plan.sources) or sum(stage.block_counts) != plan.block_rows:
            raise DataError(
                f"{where}.block_counts is {list(stage.block_counts)!r:.80}; it must hold one count for each of "
                f"{len(plan.sources)} sources and sum to block_rows {plan.block_rows}"
            )
        for i, count in enumerate(stage.block_counts):
            if count and not plan.epoch_rows(i, plan.seq_len_of(index)):
                rule = f"{where} draws rows of {plan.seq_len_of(index)} tokens from source {plan.sources[i].name!r}"
                raise DataError(f"{rule}, whose rows_by_length has none")
        end = stage.end_row
