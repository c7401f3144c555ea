"""What a process of cpt ends with, and how the end of a process that was started is told: the one place of exit codes.

    0    done
    1    our bug
    2    the user can fix it
    3    the environment is at fault
    4    a gate was not met
    143  stopped on request; what was trained is saved completely

Refuses to judge exceptions: ``cpt.failures`` does.
"""

import signal

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_ENVIRONMENT, EXIT_GATE = range(5)
KILLED = 128  # and the number of the signal: what a shell says of a process that a signal has ended
EXIT_STOPPED = KILLED + int(signal.SIGTERM)  # 143


def exit_code(code: int) -> int:
    """The shell's convention, 128 + n, for a process that signal n killed (-n here). But 143 is what a rank says itself
    after a complete save, so one that SIGTERM killed unsaved gives 3.
    """
    if code >= 0:
        return code
    return EXIT_ENVIRONMENT if -code == signal.SIGTERM else KILLED - code
