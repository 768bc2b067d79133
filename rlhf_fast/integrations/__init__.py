"""This package's losses and passes inside the training loops of other libraries.

    trl.py       the trainers of TRL: `accelerate_trainer`
    trainer.py   the Trainer of transformers: `FusedTrainer`
    head.py      log-probs, entropies and what else TRL asks of a language model's last layer
    states.py    the hidden states of the real tokens, by our packed passes where these fit
    forwards.py  a model's forward, replaced and put back
    refusals.py  what does not fit, in one line

Left out: other libraries' loops of rollouts. `docs/recipes.md` has verl and OpenRLHF.
"""

from rlhf_fast.extras import need_train

need_train("rlhf_fast.integrations")
