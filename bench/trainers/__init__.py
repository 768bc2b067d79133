"""`python -m bench trainers`: whole training runs, this package beside TRL.

cases     what is compared, under which settings, and the models and data that all contenders start from
compare   one process per contender; they take turns
report    equalities, bars, rows for people, Markdown
turns, run_ours, run_trl, run_trl_ppo     what runs in those processes; a rival's environment need not have this package
"""
