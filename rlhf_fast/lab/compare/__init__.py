"""`rlhf-fast compare`: methods, critics and LoRA side by side, on one model, one machine and the same token budget.

`start` makes or checks what all runs start from, `cells` says what is run, `cell` runs one stage in a process of its
own so that its memory is its own, `figures` reads what they left and works out the tables, `command` ties it together.
"""
