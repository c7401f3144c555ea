"""The module that every rank runs: ``deepspeed --module cpt.train.main RUN.yaml [a.b=c ...]`` or ``--resume RUN_DIR``.

``RUN.yaml --or-resume`` is for schedulers that give the same command again: it goes on where the run's folder holds a
run already. An entry point like ``cpt.cli``: it may import what stands above its floor.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.local.ranks import end_with_launcher, seconds_before


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cpt.train.main", description="Train, as one rank of a job.")
    parser.add_argument("config", nargs="?", type=Path, help="run YAML; left out with --resume")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="continue the run in this folder")
    parser.add_argument(
        "--or-resume", action="store_true", help="continue the run that the run YAML names, where it is there already"
    )
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="steps to write a trace of, at rank 0")
    parser.add_argument(
        "--local_rank", type=int, default=0, help="given by the launcher; the environment is used instead"
    )
    options = parser.parse_args(arguments)
    if options.resume and options.config:  # the first positional is an override then
        options.overrides.insert(0, str(options.config))
        options.config = None
    if (options.config is None) == (options.resume is None):
        parser.error("give a run YAML, or --resume RUN_DIR")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and return the exit code: 0 done, 2 the user can fix it, 3 the environment, 143 stopped after a save, 1
    our bug.
    """
    end_with_launcher()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    from cpt.train.guard import AskedToStop, StopFlag

    stop = StopFlag(seconds_before=seconds_before())
    stop.install()  # before anything slow, so that a signal during start-up is obeyed too
    from cpt.config import ConfigError, load_config
    from cpt.exit_codes import EXIT_STOPPED
    from cpt.failures import explain
    from cpt.run import train
    from cpt.rundir import RunDir
    from cpt.runfolder import check_changeable, finished_words, is_finished, read_run_config

    try:
        if options.resume:
            check_changeable(options.overrides)
        else:
            config = load_config(options.config, options.overrides)
            if options.or_resume and RunDir(config.run_dir).config.exists():
                options.resume, options.overrides = config.run_dir, []
        if options.resume:
            if is_finished(options.resume):
                if os.environ.get("RANK", "0") == "0":
                    print(finished_words(options.resume), flush=True)
                return 0
            config = read_run_config(options.resume, options.overrides)
        return train(config, resume=bool(options.resume), stop=stop, profile_steps=options.profile)
    except Exception as error:
        code, message = (EXIT_STOPPED, str(error)) if isinstance(error, AskedToStop) else explain(error)
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, ConfigError):  # a config is the same on every rank, a bad row is not
            # In one write: unbuffered, print() sends the newline by itself, and another rank's line comes between.
            sys.stderr.write(f"{message}\n" if rank == "0" else f"rank {rank}: {message}\n")
            sys.stderr.flush()
        return code


if __name__ == "__main__":
    from cpt.failures import leave

    leave(main())
