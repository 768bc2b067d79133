"""`python -m bench ranks`: several processes beside one, and what they send each other.

cases       shapes, stages and their settings; models and rows are made on the spot
groups      the processes of a contender, started as a launcher starts them; contenders take turns
process     what runs in such a process: a stage, with its turns or with its traffic counted
traffic     counts torch's collectives and their bytes
formula     the collectives and bytes that the documents promise
computed    step times on machines that nobody has measured, from bytes, operations and bandwidths
report      rows for people, bars, Markdown
command     the command
"""
