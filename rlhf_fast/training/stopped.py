"""The error of a run that cannot go on, although its config is right."""


class Stopped(RuntimeError):
    """A check of the run does not hold, or a function of the user raised an exception. One sentence says which.

    The command prints the sentence, as for a wrong config, and ends with exit code 1.
    """


class Diverged(Stopped):
    """The run's numbers are not what they must be: weights or gradients that are not finite, drifting log-probs.

    The run adds which checkpoint is good, and how to go on. remedy: what may help, such as "a smaller learning_rate".
    """

    def __init__(self, sentence: str, remedy: str = "a smaller learning_rate") -> None:
        super().__init__(sentence)
        self.remedy = remedy
