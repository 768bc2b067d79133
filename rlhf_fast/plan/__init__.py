"""The memory planner, `rlhf-fast plan`: what a run will hold, role by role and phase by phase, before it is started.

`roles` counts parameters and their static bytes by arithmetic. `passes` runs the stages' own forward and backward code
on fake tensors, which have shapes but no memory, and counts their bytes. `phases` puts both together into the peak of
every phase; `spread` has the processes of a run and puts fake models into shards; `command` is the command line, `gpus`
the verdicts, `measure` runs the real stage and compares.

Left out on purpose: time; what an allocator loses to fragmentation and CUDA to its context, for which a verdict keeps a
margin; token ids, masks and per-token numbers of a rollout (about 100 bytes a token); evaluation. Which models' logits
are no plain product with the last hidden state is tried out on weights, which are not there: plan those (Cohere,
Granite) with `--no-fused-head`.
"""

from rlhf_fast.extras import need_train

need_train("rlhf_fast.plan")
