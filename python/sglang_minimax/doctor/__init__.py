"""Whether this environment serves MiniMax-M2 models right, before a server is started.

Read in this order:
    finding.py      what a check says: ok, warning, error or not applicable, and the command that mends it
    facts.py        what is so on this host and in this environment, gathered once
    probe.py        the child processes that look: torch and CUDA are imported there and nowhere else
    checks.py       one function a check, from facts to a finding
    self_check.py   QK norm on every rank against plain torch: starts the ranks and judges their answers
    rank.py         one rank of it
    child.py        child processes with a time limit
    command.py      the command line and the screen

Nothing here imports torch or the engine into the command's own process: an install may be so broken that the import
ends it, and that has to be a finding. For the same reason only the standard library and this package are used; rich
is imported where something is rendered.
"""
