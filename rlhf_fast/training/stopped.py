"""The error of a run that cannot go on, although its config is right."""


class Stopped(RuntimeError):
    """A check of the run does not hold, or a function of the user raised an exception. One sentence says which.

    The command prints the sentence, as for a wrong config, and ends with exit code 1.
    """
