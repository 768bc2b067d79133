"""Listeners hear every row of a run in order; TensorBoard's curves hold what was logged."""

import pytest

from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.metrics import read_metrics
from tests.support.stages import STAGES, stage_config


class Recorder(Listener):
    def __init__(self):
        self.heard = []

    def begin(self, run):
        self.heard.append(("begin", run.first_step, list(run.learners)))

    def collected(self, step, experience):
        self.heard.append(("collected", step, len(experience.scores)))

    def log(self, step, row):
        self.heard.append(("log", step, row))

    def end(self):
        self.heard.append(("end",))


@pytest.mark.parametrize("name", list(STAGES))
def test_every_stage_tells_its_listeners(name, files, tiny_model, tmp_path):
    module, config_class = STAGES[name]
    config, recorder = stage_config(config_class, files, tiny_model, tmp_path), Recorder()
    module.train(config, listeners=[recorder])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    first, *rest = recorder.heard
    assert first == ("begin", 1, {"ppo": ["policy", "value"], "reward": ["reward"]}.get(name, ["policy"]))
    assert rest[-1] == ("end",)
    assert [event[2] for event in rest if event[0] == "log"] == rows
    collected = [event for event in rest if event[0] == "collected"]
    online = hasattr(config, "steps")
    assert collected == (
        [("collected", row["step"], config.batch_size) for row in rows if row["step"]] if online else []
    )


def test_a_run_that_fails_still_ends(files, tiny_model, tmp_path):
    class Failing(Recorder):
        def log(self, step, row):
            raise RuntimeError("no more disk")

    module, config_class = STAGES["sft"]
    listener = Failing()
    with pytest.raises(RuntimeError, match="no more disk"):
        module.train(stage_config(config_class, files, tiny_model, tmp_path), listeners=[listener])
    assert listener.heard[-1] == ("end",)


def test_a_listener_that_fails_keeps_no_other_from_its_end(files, tiny_model, tmp_path):
    class Unreachable(Recorder):
        def begin(self, run):
            raise OSError("no network")

    class Stuck(Recorder):
        def end(self):
            raise OSError("stuck")

    module, config_class = STAGES["sft"]
    before, unreachable, after = Recorder(), Unreachable(), Recorder()
    config = stage_config(config_class, files, tiny_model, tmp_path)
    with pytest.raises(OSError, match="no network"):
        module.train(config, listeners=[before, unreachable, after])
    assert before.heard == [("begin", 1, ["policy"]), ("end",)]
    assert unreachable.heard == after.heard == []  # neither of the two has begun
    with pytest.raises(OSError, match="stuck"):
        module.train(config, listeners=[Stuck(), after])
    assert after.heard[-1] == ("end",)
