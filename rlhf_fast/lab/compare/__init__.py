"""`rlhf-fast compare`: methods, critics and LoRA side by side, on one model, one machine and the same token budget.

`start` makes or checks the models and data that all runs start from. `cells` lists the runs. `cell` runs one stage in a
process of its own, so that its memory can be measured. `figures` reads the files that the runs left and works out the
tables. `command` ties it together.
"""
