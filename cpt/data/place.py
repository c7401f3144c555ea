"""Where a rank stands when rows are dealt out: which rows it reads, and which part of each it holds.

Without sequence parallelism every rank reads its own whole rows. With it, P consecutive ranks read the same rows, and
each of them holds T / P of their positions. Refuses a number of ranks that P does not divide. Example, 4 ranks, P = 2:

    rank          0            1            2            3
    reads as      0 of 2       0 of 2       1 of 2       1 of 2
    positions     first half   second half  first half   second half
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Rank ``rank`` of ``world_size``, of which ``sequence_parallel`` share a row."""

    rank: int = 0
    world_size: int = 1
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size} does not exist"
        assert self.world_size % self.sequence_parallel == 0, (
            f"{self.world_size} ranks are no whole groups of {self.sequence_parallel}"
        )

    @property
    def reader(self) -> int:
        """Number of this rank's rows among those that are read at the same time."""
        return self.rank // self.sequence_parallel

    @property
    def num_readers(self) -> int:
        return self.world_size // self.sequence_parallel

    @property
    def part(self) -> int:
        """Which of the ``sequence_parallel`` parts of a row this rank holds."""
        return self.rank % self.sequence_parallel

    def positions(self, seq_len: int) -> slice:
        """The positions of a row of ``seq_len`` that this rank holds."""
        assert seq_len % self.sequence_parallel == 0, f"{seq_len} positions for {self.sequence_parallel} ranks"
        held = seq_len // self.sequence_parallel
        return slice(self.part * held, (self.part + 1) * held)
