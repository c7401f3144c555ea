"""How many ranks a run can have: groups that share rows or weights, and whole micro-batches for each.

Owns the rules between a run file and the number of ranks, which is known only when a job starts. Refuses to look at
data: ``cpt.prepare`` lists its problems together with these.
"""

from cpt.config import ConfigError, Problem, RunConfig
from cpt.mixtures import row_lengths
from cpt.plan_parts import micro_rows


def check_world(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError with all of ``world_problems``."""
    if problems := world_problems(config, world_size):
        raise ConfigError(*problems)


def world_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Where ranks do not divide into groups that share rows or weights, or a step's rows, of any stage, into whole
    micro-batches of ``world_size`` ranks.
    """
    shared, tokens = config.deepspeed.sequence_parallel, config.train.global_batch_tokens
    problems = []
    if world_size % config.deepspeed.hpz_size:
        rule = f"must divide the {world_size} ranks of this job: that many hold a copy of the weights together"
        problems.append(Problem("deepspeed.hpz_size", config.deepspeed.hpz_size, rule))
    if world_size % shared:
        rule = f"must divide the {world_size} ranks of this job, which share rows in groups of that size"
        return [*problems, Problem("deepspeed.sequence_parallel", shared, rule)]
    readers, base = world_size // shared, config.data.seq_len
    who = f"{world_size} ranks" if shared == 1 else f"{readers} groups of {shared} ranks"
    for seq_len in row_lengths(config):
        micro = micro_rows(config.train.micro_batch_size, seq_len=seq_len, stated_for=base)
        if tokens % seq_len == 0 and tokens // seq_len % (micro * readers):
            of = "" if seq_len == base else f" of {seq_len} tokens (data.stages)"
            rule = f"{tokens // seq_len} rows{of} do not divide into {who} x {micro} rows (train.micro_batch_size)"
            unit = micro * readers * seq_len
            nearest = max(1, round(tokens / unit)) * unit
            problems.append(Problem("train.global_batch_tokens", tokens, rule, f"the nearest that does is {nearest}"))
    return problems
