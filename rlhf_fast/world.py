"""The reward of the demo's world under the name that configs and checkpoints use: `rlhf_fast.world:true_reward`."""

from rlhf_fast.lab.world import true_reward as true_reward
