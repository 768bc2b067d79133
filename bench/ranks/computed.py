"""Step times on machines that nobody has measured yet: bytes by the formula, operations of the model, named bandwidths.

Time is the larger one of computing and sending where they overlap, and their sum where they do not. Every process
computes its share of the batch. Left out: the optimizer, reward functions, the cache of keys and values that a decode
reads, and the time that a collective takes to begin.
"""

from typing import Any, NamedTuple

from bench.ranks.formula import ADD, GATHER, SCATTER, Sizes, Work, collectives

OPERATIONS = {  # of each weight for each token: 2 forward, 6 forward and backward
    "sft": 6,
    "dpo": 6,  # the reference's log-probs are taken before the first step
    "ppo": 6 + 6 + 4 * 2,  # policy, value model; rollout, reward, reference, values
    "remax": 6 + 5 * 2,  # policy; rollout and scores of sampled and greedy completions, reference
}
TRAINED, FROZEN = 16, 2  # bytes of a number: bf16 weight and gradient, fp32 master weight and two moments; bf16 weight


class Machine(NamedTuple):
    """Bandwidths and speed of a GPU, and how many GPUs there are."""

    name: str
    machines: int
    gpus: int  # of a machine


FLOPS = 989e12  # an H200 in bf16, dense
MEMORY = 4.8e12  # bytes a second of an H200
ROOM = 141e9  # bytes of an H200
LINK = 450e9  # bytes a second that a GPU sends over NVLink while it receives as many
NETWORK = 50e9  # bytes a second between two machines: 400 Gb/s
REACHED = {"operations": 0.4, "memory": 0.6, "links": 0.7}  # parts of these figures that are taken for granted
MACHINES = (Machine("8 x H200, NVLink", 1, 8), Machine("2 x 8 x H200, 400 Gb/s", 2, 8))


class Model(NamedTuple):
    """A Llama-shaped model in bf16, whose gradients are added up in fp32."""

    name: str
    layers: int
    layer_numbers: int
    root_numbers: int

    @property
    def sizes(self) -> Sizes:
        """As the formula takes them."""
        numbers = self.layer_numbers + self.root_numbers
        return Sizes(self.layers, self.layer_numbers, self.root_numbers, 2, 4, numbers, 9 * self.layers + 3)


QWEN = Model("Qwen2.5-1.5B", 28, 1_310_340_608, 233_375_232)
LLAMA = Model("Llama-2-7B", 32, 6_476_267_520, 262_148_096)


class Setting(NamedTuple):
    """A stage on a batch. tokens: of a row, prompt and response; half of them are the response of an online stage."""

    stage: str
    model: Model
    rows: int
    tokens: int
    micro_batches: int


SETTINGS = (
    Setting("sft", QWEN, 256, 2048, 2),
    Setting("sft", LLAMA, 256, 2048, 4),
    Setting("dpo", LLAMA, 128, 1024, 4),
    Setting("ppo", LLAMA, 512, 1024, 4),
    Setting("remax", LLAMA, 512, 1024, 4),
)


def table() -> list[dict[str, Any]]:
    """A row for each setting, machine and way to spread the models."""
    ways = {1: ("none", "full"), 2: ("none", "full", "hybrid")}
    return [
        _row(setting, machine, way) for setting in SETTINGS for machine in MACHINES for way in ways[machine.machines]
    ]


def _row(setting: Setting, machine: Machine, shard: str) -> dict[str, Any]:
    computing, sending = compute_seconds(setting, machine), sending_seconds(setting, machine, shard)
    total = f"{max(computing, sending):.2g} to {computing + sending:.2g} s"
    if shard == "none" and (needed := held_bytes(setting)) > ROOM:
        total = f"does not fit: {needed / 1e9:.0f} GB of weights and states"
    return {
        "stage, model": f"{setting.stage}, {setting.model.name}",
        "batch": f"{setting.rows} x {setting.tokens} tokens",
        "GPUs": machine.name,
        "shard": shard,
        "computing": f"{computing:.2g} s",
        "sending": f"{sending:.2g} s",
        "a step": total,
    }


def roles_of(stage: str) -> list[str]:
    """The models of a stage; policy and value model are trained."""
    return {"ppo": ["policy", "value", "reference", "reward"], "remax": ["policy", "reference", "reward"]}.get(
        stage, ["policy"]
    )


def held_bytes(setting: Setting) -> int:
    """Weights, gradients and optimizer states of a process that has all of them."""
    numbers = setting.model.layer_numbers + setting.model.root_numbers
    return sum(numbers * (TRAINED if role in ("policy", "value") else FROZEN) for role in roles_of(setting.stage))


def compute_seconds(setting: Setting, machine: Machine) -> float:
    """Matmuls of the share of a GPU, and the weights that it reads for each decoded token."""
    numbers = setting.model.layer_numbers + setting.model.root_numbers
    tokens = setting.rows * setting.tokens / (machine.machines * machine.gpus)
    twice = 2 if setting.stage == "dpo" else 1  # a pair has two answers
    seconds = twice * OPERATIONS[setting.stage] * numbers * tokens / (FLOPS * REACHED["operations"])
    if setting.stage in ("ppo", "remax"):
        seconds += setting.tokens / 2 * 2 * numbers / (MEMORY * REACHED["memory"])
    return seconds


def sending_seconds(setting: Setting, machine: Machine, shard: str) -> float:
    """The bytes of the formula over the slowest link that they cross."""
    sizes = {role: setting.model.sizes for role in roles_of(setting.stage)}
    work = Work(setting.stage, 1, setting.micro_batches)
    kinds = collectives(work, sizes, shards=shard != "none")
    size = machine.gpus if shard == "hybrid" else machine.machines * machine.gpus
    speed = REACHED["links"] * (LINK if machine.machines == 1 or shard == "hybrid" else NETWORK)
    times = {GATHER: 1, SCATTER: 1, ADD: 2}  # a ring sends everything once, or for a sum twice
    sent = sum(kinds[kind]["bytes"] * times[kind] for kind in times if kind in kinds) * (size - 1) / size
    seconds = sent / speed
    if shard == "hybrid":  # each machine then adds its gradients to the other machines', for every micro-batch
        between = kinds[SCATTER]["bytes"] * 2 * (machine.machines - 1) / machine.machines
        seconds += between / (REACHED["links"] * NETWORK)
    return seconds
