"""`python -m bench gpu`: everything that has to be known from the first hour on a GPU, in nine minutes.

part.py        what a part is: its name, its work, its limit, its function
predict.py     seconds from bytes and flops by an H200's data sheet, and the host's seconds, which are assumed
parts.py       the parts in order of worth; runs.py has their functions by name
build.py, smoke.py, tables.py, choice.py, decoding.py, methods.py, sanitizer.py
               what the parts do
child.py       a part in a process of its own
hour.py        the parts by turns: which fits, which is ended, which is missing
record.py      the results: JSON, and one Markdown table
wheels.py      the packages that an image lacks
command.py     the command line

A dry run takes the same path on the CPU, with toy shapes: Triton's kernels run in its interpreter, CUDA's are emulated.
"""
