"""`python -m bench busy`: the same work beside other busy processes, under several ways of waiting and threads.

command.py   the settings, the turns, the table
process.py   a process of one setting, which works when it is told to
"""
