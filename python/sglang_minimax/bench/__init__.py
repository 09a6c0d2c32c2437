"""``sglang-minimax bench``: times whole steps or one operator, ours beside other engines, in one go on one host.

    command.py      the command line
    contestants.py  who is measured: an environment, its variables and flags; probe.py asks what is in it
    model_steps.py  one contestant's run of the engine's own ``bench_one_batch``, and what its log says
    operators.py    the scripts of ``benchmark/``, one an operator
    record.py       the JSON: host, clocks, versions, numbers; which records may stand side by side
    tables.py       medians, spreads, ratios and the screen
    plots.py        the same as PNG

Nothing here imports torch or the engine: those live in the children.
"""
